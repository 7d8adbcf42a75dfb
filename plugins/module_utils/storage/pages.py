# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether files of PostgreSQL pages are in the clear or look encrypted, judged from what stands in them.

For servers that encrypt pages themselves: below them, nothing tells but the bytes. A page is plain if its header is
sound and its unused middle is zeros or its line pointers point to what follows it (PostgreSQL's manual, "Database Page Layout");
it is opaque if its body cannot be compressed.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import struct
import typing as t
import zlib

PAGE = 8192
#: pd_pagesize_version of every PostgreSQL since 8.3: page size and layout version 4.
_VERSION = PAGE | 4
_HEADER = 24
#: PD_HAS_FREE_LINES, PD_PAGE_FULL, PD_ALL_VISIBLE.
_FLAGS = 0x0007
#: Bytes of zeros in the middle that no cipher gives.
_HOLE = 32
#: What is read of a file and of a place at most, in bytes; of each file one page at least, for one that nobody looked at may be plain.
FILE_BUDGET = 4 << 20
PLACE_BUDGET = 256 << 20

PLAIN, OPAQUE, ZERO, UNCLEAR = "plain", "opaque", "zero", "unclear"


@dataclasses.dataclass
class PageFacts:
    """What stands in a place's files.

    :ivar files: their number; ``read``: those with content. ``pages``: by kind. ``known``: texts that the server holds there
        and that were searched, ``found``: those that stand in the files as they are. ``unread``: files that were read in part,
        for there is too much of them.
    :ivar may_be_empty: a place that is made before anything is put there; not a whole server's.
    :ivar control: plain pages that the same reading found in a file in the clear; None: there was none.
    """

    files: int = 0
    read: int = 0
    size: int = 0
    pages: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys((PLAIN, OPAQUE, ZERO, UNCLEAR), 0))
    known: int = 0
    found: int = 0
    unread: int = 0
    may_be_empty: bool = False
    control: int | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def kind_of(page: bytes) -> str:
    """PLAIN, OPAQUE, ZERO or UNCLEAR; pure."""
    if not page.strip(b"\0"):
        return ZERO
    if len(page) == PAGE and _sound(page):
        return PLAIN
    body = page[_HEADER:]
    return OPAQUE if body and len(zlib.compress(body, 1)) >= len(body) else UNCLEAR


def _sound(page: bytes) -> bool:
    flags, lower, upper, special, version = struct.unpack_from("<HHHHH", page, 10)
    if version != _VERSION or flags & ~_FLAGS or not _HEADER <= lower <= upper <= special <= PAGE:
        return False
    hole = page[lower:upper]
    if len(hole) >= _HOLE and not hole.strip(b"\0"):
        return True
    # ItemIdData: 15 bits offset, 2 bits flags, 15 bits length; those without storage point nowhere.
    pointers = struct.unpack_from(f"<{(lower - _HEADER) // 4}I", page, _HEADER)
    items = [(one & 0x7FFF, one >> 17) for one in pointers if one >> 17]
    if not all(upper <= start and start + length <= special for start, length in items):
        return False
    # What was removed from a page stays in its middle (bufpage.c, compactify_tuples); then the lowest item ends it.
    return len(hole) < _HOLE or (bool(items) and min(items)[0] == upper)


def read(paths: t.Sequence[str], known: t.Collection[bytes] = ()) -> PageFacts:
    """Look at files. :param known: texts to be searched in them; they are neither kept nor told."""
    facts = PageFacts(known=len(known))
    seen: set[bytes] = set()
    share = min(FILE_BUDGET, max(1, PLACE_BUDGET // PAGE // max(1, len(paths))) * PAGE)
    for path in paths:
        facts.files += 1
        try:
            content, whole = _content(path, share)
        except FileNotFoundError:
            continue
        except OSError as exc:
            facts.problems.append(f"{path} could not be read: {os.strerror(exc.errno or 0)}.")
            continue
        facts.read += bool(content)
        facts.unread += not whole
        facts.size += len(content)
        seen |= {text for text in known if text in content}
        for start in range(0, len(content), PAGE):
            facts.pages[kind_of(content[start : start + PAGE])] += 1
    facts.found = len(seen)
    return facts


def _content(path: str, most: int) -> tuple[bytes, bool]:
    """The beginning of a regular file, and whether it is all of it; what the server's user put there instead is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as handle:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return handle.read(most), info.st_size <= most


def judge(facts: PageFacts) -> tuple[str, list[str]]:
    """The verdict (``encrypted``, ``plain``, ``empty`` or ``unknown``) and the sentences that say why; pure."""
    pages, looked = facts.pages, sum(facts.pages.values()) - facts.pages[ZERO]
    seen = []
    if facts.found:
        seen.append(f"{facts.found} of {facts.known} values of its tables stand in the files as they are.")
    if pages[PLAIN]:
        seen.append(f"{pages[PLAIN]} of {looked} pages have the structure of a plain page.")
    if seen:
        return "plain", seen
    doubts = list(facts.problems)
    if facts.may_be_empty and not doubts and not facts.size and not facts.unread:
        return "empty", ["It holds nothing yet."]
    if not looked:
        doubts.append("No page with content was found, so there was nothing to judge.")
    if pages[UNCLEAR]:
        doubts.append(f"{pages[UNCLEAR]} of {looked} pages are neither plain nor free of structure.")
    if not facts.control:
        doubts.append("No plain page was found in a file in the clear, so it was not shown that this reading would see one.")
    if doubts:
        return "unknown", doubts
    reasons = [f"None of {looked} pages has a plain page's structure, and none can be compressed."]
    if facts.known:
        reasons.append(f"None of {facts.known} values of its tables stands in the files.")
    return "encrypted", reasons


def told(place: str, directory: str, facts: PageFacts, notes: t.Sequence[str]) -> dict[str, t.Any]:
    """A proof as :func:`storage.proof.prove` gives it."""
    verdict, reasons = judge(facts)
    looked = sum(facts.pages.values()) - facts.pages[ZERO]
    return {
        "place": place,
        "path": directory,
        "verdict": verdict,
        "examined": {
            "files": facts.files,
            "files_read": facts.read,
            "blocks": looked,
            "blocks_equal": facts.pages[PLAIN],
            "blocks_zero": facts.pages[ZERO],
            "bytes": facts.size,
            "control_blocks_equal": facts.control or 0,
            **({"marker_in_files": facts.known, "marker_on_device": facts.found} if facts.known else {}),
        },
        "how": "The files were read as the server wrote them: each page's structure was judged, and values of the tables were searched in them.",
        "reasons": reasons,
        "notes": [*notes, *([f"Of {facts.unread} of the files no more than the beginning was read."] if facts.unread else [])],
    }
