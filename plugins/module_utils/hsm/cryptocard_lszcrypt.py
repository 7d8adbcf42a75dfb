# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``lszcrypt`` (package s390-tools) as a second source beside sysfs: its two listings parsed by their headers, and compared.

Formats: zconf/zcrypt/lszcrypt.c of s390-tools 2.3, 2.15, 2.36 and 2.43; columns changed their names, widths and number in
between, and values wider than their column push the others to the right, so cells are counted and not measured.
"""

from __future__ import annotations

import re
import typing as t

from ..common.errors import TdeError
from ..common.run import run_program
from .cryptocard_verdict import Card, Facts, Queue

_SECONDS = 30

#: Column names that meant the same in older releases.
_COLUMNS = {"CARD.DOMAIN": "CARD.DOM", "REQUEST_CNT": "REQUESTS", "HW_TYPE": "HWTYPE"}
_MODES = {"CCA-Coproc": "cca", "EP11-Coproc": "ep11", "Accelerator": "accelerator"}
#: The last three are vfio_ap's (AP_QUEUE_ASSIGNED and its kind in vfio_ap_ops.c); ``in use`` is two words.
_STATUS = {
    "online": "online",
    "offline": "offline",
    "deconfig": "deconfigured",
    "chkstop": "checkstopped",
    "assigned": "reserved",
    "unassigned": "reserved",
    "in use": "reserved",
}
_ID = re.compile(r"[0-9a-f]{2}(\.[0-9a-f]{4})?")


class Row(t.TypedDict):
    """A line of ``lszcrypt -V`` in our words; none where it says nothing."""

    type: str | None
    mode: str | None
    status: str | None
    requests: int | None
    hwtype: int | None
    driver: str | None


class Listing(t.NamedTuple):
    """``lszcrypt -V``: rows by name, its warnings, and lines that were not understood."""

    rows: dict[str, Row]
    warnings: list[str]
    strange: list[str]


class Compared(t.TypedDict):
    """What became of the comparison; ``path`` is none where there is no such program."""

    path: str | None
    message: str
    warnings: list[str]
    differences: list[str]
    filled: list[str]


def devices(text: str) -> Listing:
    """Parse ``lszcrypt -V``."""
    found = Listing({}, [], [])
    columns: list[str] = []
    for line in text.splitlines():
        cells = line.split()
        if not cells or set(line.strip()) == {"-"}:
            continue
        if cells[0] == "Warning:":
            found.warnings.append(line.strip())
        elif cells[0].startswith("CARD."):
            columns = [_COLUMNS.get(cell, cell) for cell in cells]
        else:
            row = _row(columns, cells)
            if row is None:
                found.strange.append(line.strip())
            else:
                found.rows[cells[0]] = row
    return found


def _row(columns: t.Sequence[str], cells: list[str]) -> Row | None:
    if "STATUS" not in columns or not _ID.fullmatch(cells[0]):
        return None
    # Only a status has words of its own with a space in between.
    place, more = columns.index("STATUS"), len(cells) - len(columns)
    if more < 0:
        return None
    cells = [*cells[:place], " ".join(cells[place : place + more + 1]), *cells[place + more + 1 :]]
    said = dict(zip(columns, cells, strict=True))
    return {
        "type": _word(said.get("TYPE")),
        "mode": _MODES.get(said.get("MODE", "")),
        "status": _STATUS.get(said["STATUS"]),
        "requests": _number(said.get("REQUESTS")),
        "hwtype": _number(said.get("HWTYPE")),
        "driver": _word(said.get("DRIVER")),
    }


def _word(cell: str | None) -> str | None:
    """``(null)`` is what release 2.15 prints for a value that it never had."""
    return None if cell in (None, "-", "-no-driver-", "(null)") else cell


def _number(cell: str | None) -> int | None:
    return int(cell) if cell is not None and re.fullmatch("[0-9]+", cell) else None


def bus_domain(text: str) -> tuple[bool, str | None]:
    """The default domain from ``lszcrypt -b``: whether it says one way or the other, and the domain, none if it is not set.

    Forms: ``0x5``, ``0x05``, ``0x05 (unavailable)``, ``-1 (not set)`` and, of older releases, -1 as 64 bits.
    """
    found = re.search(r"^ap_domain=(-1|0x[0-9a-f]+)( \(.*\))?$", text, re.MULTILINE)
    if not found:
        return False, None
    number = int(found.group(1), 0)
    return True, f"{number:04x}" if 0 <= number <= 0xFFFF else None


def compare(facts: Facts, root: str, program: str | None) -> Compared:
    """Ask lszcrypt about the same tree; what sysfs lacks is filled into the facts, differences are reported, sysfs wins.

    :param facts: cards and queues; changed in place where sysfs said nothing.
    :param root: where sysfs is; lszcrypt takes it from SYSFS_ROOT (libutil/util_path.c).
    :param program: the program's path; looked for if it is none.
    :raises TdeError: ``command_missing`` when the program that was named is not there.
    """
    compared: Compared = {"path": None, "message": "", "warnings": [], "differences": [], "filled": []}
    if not facts["present"]:
        compared["message"] = "Not asked: there is no AP bus."
        return compared
    path = program or "lszcrypt"
    try:
        # 1: a card without queues ends the listing, and older releases end so when there is no card.
        listing = run_program([path, "-V"], environment={"SYSFS_ROOT": root}, timeout=_SECONDS, ok=(0, 1))
        bus = run_program([path, "-b"], environment={"SYSFS_ROOT": root}, timeout=_SECONDS, ok=(0, 1))
    except TdeError as exc:
        if exc.code == "command_missing" and not program:
            compared["message"] = "lszcrypt is not installed (package s390-tools): sysfs alone was read."
            return compared
        if exc.code == "command_missing":
            raise
        compared["path"], compared["message"] = path, exc.message
        return compared
    read = devices(listing.stdout.decode("utf-8", "replace"))
    said = [*listing.stderr.decode("utf-8", "replace").split("\n"), *(f"not understood: {line}" for line in read.strange)]
    compared["path"] = path
    compared["message"] = " ".join(line.strip() for line in said if line.strip())
    compared["warnings"] = read.warnings
    compared["filled"], compared["differences"] = reconcile(
        facts, read, bus.stdout.decode("utf-8", "replace"), complete=listing.returncode == 0
    )
    return compared


def reconcile(facts: Facts, listing: Listing, bus: str, *, complete: bool = True) -> tuple[list[str], list[str]]:
    """What lszcrypt adds to the facts (done in place), and where it differs.

    :param bus: what ``lszcrypt -b`` printed.
    :param complete: whether the listing came to its end.
    :returns: sentences of what was filled in, sentences of differences. Counts of requests move and are not compared.
    """
    filled: list[str] = []
    differences: list[str] = []
    told, domain = bus_domain(bus)
    if told and domain != facts["bus"]["default_domain"]:
        ours = facts["bus"]["default_domain"]
        differences.append(f"Default domain: sysfs says {ours or 'none'}, lszcrypt says {domain or 'none'}.")
    known: dict[str, Card | Queue] = {card["id"]: card for card in facts["cards"]}
    known.update({queue["id"]: queue for queue in facts["queues"]})
    for name, device in sorted(known.items()):
        what = f"{'Queue' if '.' in name else 'Card'} {name}"
        row = listing.rows.get(name)
        if row is not None:
            _fill(what, t.cast("dict[str, object]", device), row, filled, differences)
        elif complete and device["status"] not in ("unbound", "reserved", "unknown"):
            # Releases before 2.7 leave out what has no driver of zcrypt.
            differences.append(f"{what}: sysfs has it, lszcrypt does not list it.")
    differences += [f"{name}: lszcrypt lists it, sysfs does not have it." for name in sorted(set(listing.rows) - set(known))]
    return filled, differences


def _fill(what: str, device: dict[str, object], row: Row, filled: list[str], differences: list[str]) -> None:
    for field, value in row.items():
        if value is None or field not in device:
            continue
        ours = device[field]
        if ours is None or (ours == "unknown" and field in ("mode", "status")):
            device[field] = value
            filled.append(f"{what}: {field} {value} is from lszcrypt.")
        elif ours != value and field != "requests":
            differences.append(f"{what}: sysfs says {field} {ours}, lszcrypt says {value}.")
