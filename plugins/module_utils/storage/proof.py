# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether a place is encrypted, judged from the raw blocks of its files.

:func:`judge` decides from plain facts; :func:`prove` collects them. The rule: ``encrypted`` only if the kernel
says so of every inode, under *our* key, and raw blocks were compared and none was equal, and the same reading
was shown to find a file that is in the clear; ``plain`` if any block is equal; else ``unknown``, with the reasons.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import secrets
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error
from . import fscrypt
from .blocks import FileFacts, Reader, examine, look_at_inode, open_device
from .control import candidates, clear_ancestor, control_content, temporary_file
from .mounts import RawDevice, raw_device

#: What is read of a file and of a place at most, in bytes, and of how many files.
FILE_BUDGET = 4 << 20
PLACE_BUDGET = 128 << 20
MAX_FILES = 256
#: How many files in the clear are tried until one is found on the device.
_CONTROL_TRIES = 8


#: What no proof of a place shows, for the reader of a report.
NOT_COVERED = (
    "Freed blocks: what lay on the disk before, at this place or at the one that data moved away from, may still stand there in plain text.",
    "Copies: base backups, dumps, archived logs and what is replicated leave the encrypted place; so do the server's log and swap space.",
)
NOT_COVERED_BY_A_PART = (
    "What a database keeps outside its tablespaces: write-ahead log, temporary files, statistics, catalogs. "
    "Only a proof of the whole data directory covers them."
)


@dataclasses.dataclass(frozen=True)
class ProofTarget:
    """A place that a proof looks at; the engine names it.

    :param place: its name as the user knows it (a tablespace's name, ``data directory``, ``database.schema.table``).
    :param directory: the directory, its links resolved.
    :param key_identifier: the key under which it ought to be encrypted (its data key's check value), None if it ought not.
    :param files: the files to be examined, absolute; empty: every regular file under the directory.
    :param marker: text known to stand in the files, to be searched on the device as well.
    :param control: a file in the clear on the same file system; without it one is looked for.
    :param notes: sentences for the reader (``the server is down, so there was no CHECKPOINT``).
    :param links: folders of the place whose links lead to places with proofs of their own (``pg_tblspc``).
    """

    place: str
    directory: str
    key_identifier: str | None
    files: tuple[str, ...] = ()
    marker: bytes | None = None
    control: str | None = None
    notes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclasses.dataclass
class Facts:
    """All that :func:`judge` looks at.

    :ivar expected: the key identifier that ought to be there.
    :ivar identifier: that of the directory's policy; ``key_status`` as :func:`fscrypt.key_status` says.
    :ivar inodes: every file of the place, its inode only; ``files``: those whose blocks were read.
    :ivar control_equal: blocks of the control found on the device; None: there was no control.
    :ivar marker: a marker was searched.
    :ivar crypt: a dm-crypt device below.
    :ivar problems: what could not be established, in sentences.
    """

    expected: str | None
    identifier: str | None = None
    key_status: str | None = None
    inodes: list[FileFacts] = dataclasses.field(default_factory=list)
    files: list[FileFacts] = dataclasses.field(default_factory=list)
    control_equal: int | None = None
    marker: bool = False
    crypt: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    def total(self, count: str) -> int:
        """The sum of one count over the files whose blocks were read."""
        return sum(getattr(one, count) for one in self.files)


class Verdict(t.NamedTuple):
    """``encrypted``, ``plain``, ``empty`` or ``unknown``, and the sentences that say why."""

    verdict: str
    reasons: list[str]


def judge(facts: Facts) -> Verdict:
    """The verdict on a place; pure."""
    equal, examined = facts.total("equal"), facts.total("examined")
    on_device = facts.total("marker_on_device") if facts.marker else 0
    seen = []
    if equal:
        seen.append(f"{equal} of {examined} blocks stand on the device as they are in the files.")
    if on_device:
        seen.append(f"The marker stands {on_device} times on the device.")
    if seen and facts.crypt:
        return Verdict(
            "unknown",
            [*seen, f"But {facts.crypt} is a dm-crypt device: what the disk below it holds, under which key, was not looked at."],
        )
    if seen:
        return Verdict("plain", seen)
    doubts = _doubts(facts)
    if not doubts and not facts.marker and not any(one.size or one.gone for one in _unique(facts)):
        return Verdict("empty", [f"It holds nothing yet; its directory is encrypted under the key {facts.expected}."])
    doubts += _reading_doubts(facts, examined) if facts.files or not doubts else []
    if doubts:
        return Verdict("unknown", doubts)
    reasons = [
        f"0 of {examined} blocks stand on the device as they are in the files.",
        f"Every inode is encrypted under the key {facts.expected}.",
    ]
    if facts.marker:
        reasons.append(f"The marker stands {facts.total('marker_in_file')} times in the files and not on the device.")
    return Verdict("encrypted", reasons)


def _doubts(facts: Facts) -> list[str]:
    doubts = list(facts.problems)
    if facts.expected is None:
        doubts.append("No key of ours belongs to this place.")
    else:
        doubts += _key_doubts(facts, facts.expected)
    doubts += _foreign_inodes(facts.inodes, facts.expected)
    doubts += [f"{one.path}: {one.problem}." for one in _unique(facts) if one.problem][:10]
    return doubts


def _key_doubts(facts: Facts, expected: str) -> list[str]:
    doubts = []
    if facts.key_status == "incompletely_removed":
        doubts.append("The key was removed from the kernel while files were open; close them and open the keystore again.")
    elif facts.key_status == "absent":
        doubts.append("The kernel does not hold the key, so the files cannot be read: open the keystore.")
    elif facts.key_status != "present":
        doubts.append("Whether the kernel holds the key could not be established.")
    if facts.identifier is not None and facts.identifier != expected:
        doubts.append(f"The directory is encrypted under another key: {facts.identifier}, not {expected}.")
    elif facts.identifier is None:
        doubts.append("The directory has no encryption policy.")
    return doubts


def _reading_doubts(facts: Facts, examined: int) -> list[str]:
    """What the reading of the blocks lacks; told only if it came to a reading, for else it lacks everything."""
    doubts = []
    if facts.control_equal is None:
        doubts.append("No file in the clear was found on this file system, so it was not shown that the reading would see one.")
    elif not facts.control_equal:
        doubts.append("A file in the clear was not found on the device, so this reading proves nothing.")
    if facts.total("device_zero"):
        doubts.append(
            f"{facts.total('device_zero')} blocks are zeros on the device and not in the files: they were not written yet."
        )
    if not examined:
        doubts.append("No written block with content was found, so there was nothing to compare.")
    if facts.marker and not facts.total("marker_in_file"):
        doubts.append("The marker does not stand in what was read of the files, so its absence on the device proves nothing.")
    return doubts


def _unique(facts: Facts) -> list[FileFacts]:
    """One row a file: what was read of it, or else its inode."""
    return list({one.path: one for one in [*facts.inodes, *facts.files]}.values())


def _foreign_inodes(inodes: list[FileFacts], expected: str | None) -> list[str]:
    doubts = []
    present = [one for one in inodes if not one.gone and not one.problem]
    for words, rows in (
        ("not encrypted, as the kernel says", [one for one in present if not one.encrypted]),
        ("encrypted under another key", [one for one in present if one.encrypted and one.identifier != expected]),
    ):
        if rows:
            others = " and others." if len(rows) > 1 else "."
            doubts.append(f"{len(rows)} of {len(present)} files are {words}: {rows[0].path}{others}")
    return doubts


def choose(inodes: t.Sequence[FileFacts], rng: random.Random, first: str | None = None, most: int = MAX_FILES) -> list[FileFacts]:
    """The files whose blocks are read: all, or half of them the largest and the others by chance; empty ones never.

    :param first: a path that is chosen in any case, and first.
    """
    filled = [one for one in inodes if one.size and not one.gone and not one.problem]
    filled.sort(key=lambda one: (one.path != first, -one.size, one.path))
    if len(filled) <= most:
        return filled
    return filled[: most // 2] + rng.sample(filled[most // 2 :], most - most // 2)


def relation_files(path: str) -> list[str]:
    """A relation's files from its first: segments (``.1`` …) and forks (``_fsm``, ``_vm``, ``_init``) with theirs.

    Source: PostgreSQL's manual, "Database File Layout".

    :raises TdeError: ``file_absent``, ``fscrypt_key_absent``, ``permission_denied``.
    """
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise os_error(exc, folder) from None
    return sorted(os.path.join(folder, one) for one in names if _belongs(one, name))


def _belongs(candidate: str, name: str) -> bool:
    if not candidate.startswith(name):
        return False
    rest = candidate[len(name) :]
    for fork in ("_fsm", "_vm", "_init"):
        rest = rest.removeprefix(fork)
    return not rest or (rest[0] == "." and rest[1:].isdecimal())


def walk(directory: str, links: t.Container[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """Every regular file under a directory, and a sentence for each link that leads out of it and each folder not read.

    :param links: folders whose links lead to places with proofs of their own.
    :returns: files, what keeps the place from being called encrypted (part of it lies elsewhere), and notes.
    """
    files: list[str] = []
    doubts: list[str] = []
    notes: list[str] = []

    def unread(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError):
            doubts.append(f"{exc.filename} could not be read: {os.strerror(exc.errno or 0)}.")

    device = os.stat(directory).st_dev
    for folder, folders, names in os.walk(directory, onerror=unread):
        for name in [*folders, *names]:
            path = os.path.join(folder, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue
            mode = info.st_mode
            if info.st_dev != device and os.path.ismount(path):
                # It may be empty now and hold temporary files a moment later.
                doubts.append(f"Another file system is mounted on {path}.")
            if stat.S_ISREG(mode):
                files.append(path)
            elif stat.S_ISLNK(mode) and not os.path.realpath(path).startswith(os.path.join(directory, "")):
                said = doubts if folder not in links else notes
                said.append(f"{path} leads out of the place, to {os.path.realpath(path)}, which was not looked at.")
    return sorted(files), doubts, notes


def prove(
    target: ProofTarget, *, canary: bool = False, rng: random.Random | None = None, sysfs: str = "/sys"
) -> dict[str, t.Any]:
    """Examine a place.

    Reads only, unless ``canary``: then a file with a marker is written into the place and one in the clear beside it,
    both looked for on the device, both removed.

    :returns: ``place``, ``path``, ``verdict``, ``examined`` (counts), ``how`` (a sentence), ``reasons``, ``notes``.
    """
    rng = rng or random.SystemRandom()
    facts = Facts(target.key_identifier)
    notes = list(target.notes)
    how = "Nothing could be looked at."
    try:
        how = _collect(target, facts, notes, canary, rng, sysfs)
    except TdeError as exc:
        facts.problems.append(f"{exc.obj}: {exc.message}." if exc.obj else f"{exc.message}.")
    verdict = judge(facts)
    return {
        "place": target.place,
        "path": target.directory,
        "verdict": verdict.verdict,
        "examined": _examined(facts),
        "how": how,
        "reasons": verdict.reasons,
        "notes": notes + _remarks(facts),
    }


def _examined(facts: Facts) -> dict[str, int]:
    names = {"examined": "blocks", "equal": "blocks_equal", "zero": "blocks_zero", "bytes_read": "bytes"}
    counts = {word: facts.total(name) for name, word in names.items()}
    if facts.marker:
        counts["marker_in_files"], counts["marker_on_device"] = facts.total("marker_in_file"), facts.total("marker_on_device")
    return {
        "files": len(facts.inodes),
        "files_read": len(facts.files),
        **counts,
        "control_blocks_equal": facts.control_equal or 0,
    }


def _remarks(facts: Facts) -> list[str]:
    remarks = []
    unread = sum(1 for one in facts.inodes if one.size) - len(facts.files)
    if facts.files and unread > 0:
        remarks.append(f"Of {len(facts.inodes)} files the blocks of {len(facts.files)} were read; of the others the inode only.")
    sampled = sum(one.sampled for one in facts.files)
    if sampled:
        remarks.append(
            f"{sampled} files were read in part, at most {FILE_BUDGET >> 20} MiB of each: the first and the last stretch and others by chance."
        )
    for name, words in (("pending", "had no place on the device yet"), ("moved", "moved meanwhile")):
        if facts.total(name):
            remarks.append(f"{facts.total(name)} blocks {words} and were left out.")
    return remarks


def _collect(target: ProofTarget, facts: Facts, notes: list[str], canary: bool, rng: random.Random, sysfs: str) -> str:
    directory = os.path.realpath(target.directory)
    if not os.path.isdir(directory):
        raise TdeError("file_absent", "does not exist or is not a directory", obj=target.directory)
    if target.key_identifier is not None and not _key_there(directory, target.key_identifier, facts):
        return "The kernel was asked for the key; the files were not looked at."
    files = list(target.files)
    if not files:
        files, doubts, remarks = walk(directory, target.links)
        facts.problems += doubts
        notes += remarks
    with contextlib.ExitStack() as temporary:
        marker, control, first = target.marker, target.control, None
        if canary:
            control = temporary.enter_context(temporary_file(clear_ancestor(directory), control_content()))
            if marker is None:
                marker = secrets.token_hex(16).encode()
                first = temporary.enter_context(temporary_file(directory, marker * 2048))
                files.append(first)
        facts.marker = marker is not None
        facts.inodes = [look_at_inode(path) for path in files]
        device = raw_device(directory, sysfs)
        facts.crypt = device.crypt
        with open_device(device) as reader:
            _read_blocks(facts, reader, marker, first, rng)
            facts.control_equal = _control(directory, control, reader, rng)
    return _how(device)


def _key_there(directory: str, expected: str, facts: Facts) -> bool:
    """Ask for policy and key; :returns: whether the files can be read: a place that is not encrypted at all can be, too."""
    try:
        found = fscrypt.policy(directory)
        facts.key_status = fscrypt.key_status(directory, expected)
    except TdeError as exc:
        if exc.code != "fscrypt_unsupported":
            raise
        facts.problems.append(f"{exc.obj}: {exc.message}.")
        return True
    if found is None:
        return True
    facts.identifier = found["identifier"]
    return found["version"] == 2 and fscrypt.key_status(directory, found["identifier"]) == "present"


def _read_blocks(facts: Facts, reader: Reader, marker: bytes | None, first: str | None, rng: random.Random) -> None:
    left = PLACE_BUDGET
    for inode in choose(facts.inodes, rng, first):
        if left <= 0:
            break
        seen = examine(inode.path, reader, marker=marker, budget=min(FILE_BUDGET, left), rng=rng)
        left -= seen.bytes_read
        if not seen.gone:
            facts.files.append(seen)


def _how(device: RawDevice) -> str:
    return (
        "Every file's inode was asked for its encryption and key identifier; blocks were located by FIEMAP after a sync, read directly from "
        f"{device.layers[0]} and compared with the files' content."
    )


def _control(directory: str, control: str | None, reader: Reader, rng: random.Random) -> int | None:
    """Blocks of a file in the clear that were found on the device; None without such a file."""
    best = None
    for number, path in enumerate([control] if control else candidates(directory)):
        if number == _CONTROL_TRIES:
            break
        seen = examine(path, reader, budget=FILE_BUDGET, rng=rng)
        if seen.encrypted or seen.identifier or not seen.examined:
            continue
        best = max(best or 0, seen.equal)
        if best:
            break
    return best
