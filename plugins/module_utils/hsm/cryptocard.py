# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Crypto Express adapters of IBM Z and LinuxONE: what sysfs says of the AP bus, its cards and queues.

sysfs is the source of truth (attributes: drivers/s390/crypto/{ap_bus,ap_card,ap_queue,zcrypt_card,zcrypt_queue,zcrypt_cex4}.c
of the kernel); ``lszcrypt`` is the second (:mod:`.cryptocard_lszcrypt`). Nothing here needs root.
"""

from __future__ import annotations

import os
import re
import threading
import typing as t

from ..common.errors import TdeError
from . import cryptocard_lszcrypt as lszcrypt
from . import cryptocard_verdict as verdict
from .cryptocard_verdict import Bus, Card, Facts, Queue, Register

#: Bits of ``ap_functions`` (fac_bits in zconf/zcrypt/lszcrypt.c of s390-tools).
_CCA, _ACCELERATOR, _EP11, _RESTRICTED = 0x10000000, 0x08000000, 0x04000000, 0x00400000

_CARD = re.compile("card([0-9a-f]{2})")
_QUEUE = re.compile(r"([0-9a-f]{2})\.([0-9a-f]{4})")
#: cca_mkvps_show and ep11_mkvps_show of zcrypt_cex4.c: ``AES CUR: valid 0x0123456789abcdef``, ``WK NEW: empty -``, ``APKA OLD: - -``.
_MKVP = re.compile(r"([A-Z]+) (NEW|CUR|OLD): (\S+) (?:0x([0-9a-f]+)|-)")
_REGISTERS = {"NEW": "new", "CUR": "current", "OLD": "old"}
#: States in which a register holds a key.
_HOLDING = ("valid", "partial", "full", "uncommitted", "committed")

#: A sysfs attribute is at most a page.
_PAGE = 4096
#: Seconds that a card has to answer; the kernel itself waits much longer.
_ANSWER_SECONDS = 20.0


class Unreadable(t.TypedDict):
    """An attribute that is there and could not be read."""

    attribute: str
    reason: str


class Read(Facts):
    """What was read, and what could not be."""

    unreadable: list[Unreadable]


class Told(Read):
    """What the module returns."""

    default_domain: verdict.Verdict
    usage_domains: verdict.Verdict
    lszcrypt: lszcrypt.Compared


def gather(
    root: str,
    program: str | None,
    expected: t.Mapping[str, str] | None = None,
    mode: str | None = None,
    seconds: float = _ANSWER_SECONDS,
) -> Told:
    """Read everything, compare it with lszcrypt, judge it.

    :param root: where sysfs is mounted.
    :param program: lszcrypt's path; looked for where programs are if it is none.
    :param expected: as :func:`.cryptocard_verdict.expected_patterns` gives them.
    :param mode: ``cca`` or ``ep11``, if only these are asked about.
    :param seconds: what a card has to answer in.
    :raises TdeError: ``file_absent`` (no sysfs at ``root``), ``command_missing`` (the program that was named).
    """
    facts = read(root, seconds)
    compared = lszcrypt.compare(facts, root, program)
    return {
        **facts,
        "default_domain": verdict.default_domain(facts, expected, mode),
        "usage_domains": verdict.usage_domains(facts, expected, mode),
        "lszcrypt": compared,
    }


def read(root: str, seconds: float = _ANSWER_SECONDS) -> Read:
    """What sysfs says.

    :raises TdeError: ``file_absent`` when no sysfs is mounted at ``root``: then nothing is known, not even that there is no bus.
    """
    if not os.path.isdir(os.path.join(root, "bus")):
        raise TdeError("file_absent", "no sysfs is mounted there", obj=root, next_step="Mount it, or correct sysfs_root.")
    tree = _Tree(os.path.join(root, "bus", "ap"), seconds)
    facts: Read = {
        "present": os.path.isdir(tree.path),
        "message": "",
        "bus": _bus(tree),
        "cards": [],
        "queues": [],
        "unreadable": tree.unreadable,
    }
    for name in tree.devices():
        if found := _CARD.fullmatch(name):
            facts["cards"].append(_card(tree, name, found.group(1)))
    cards = {card["id"]: card for card in facts["cards"]}
    for name in tree.devices():
        if found := _QUEUE.fullmatch(name):
            facts["queues"].append(_queue(tree, name, found.group(1), found.group(2), cards.get(found.group(1))))
    facts["message"] = _message(facts, root)
    return facts


def _message(facts: Read, root: str) -> str:
    if not facts["present"]:
        return (
            f"This host has no AP bus ({root}/bus/ap is not there): it is no IBM Z or LinuxONE system, or the kernel's module ap is "
            "not loaded."
        )
    if not facts["cards"]:
        return "The AP bus is there, and no crypto adapter is assigned to this partition or guest."
    domain = facts["bus"]["default_domain"]
    online = sum(queue["status"] == "online" for queue in facts["queues"])
    return f"Cards: {len(facts['cards'])}. Queues: {len(facts['queues'])}, {online} of them online. " + (
        f"Default domain: {domain}." if domain else "No default domain."
    )


class _Tree:
    """The folder of the bus.

    :ivar unreadable: attributes that are there and could not be read.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path = path
        self.unreadable: list[Unreadable] = []
        self._seconds = seconds
        self._silent: set[str] = set()

    def devices(self) -> list[str]:
        try:
            return sorted(os.listdir(os.path.join(self.path, "devices")))
        except FileNotFoundError:
            return []

    def text(self, *name: str) -> str | None:
        """An attribute without its line end; none where the kernel has no such attribute, or cannot read it."""
        try:
            return _content(os.path.join(self.path, *name)).strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            self._failed(name, exc.strerror or "not readable")
            return None

    def number(self, *name: str) -> int | None:
        """A whole number, decimal or as 0x…; none where it is a word (``-``) or missing."""
        try:
            return int(self.text(*name) or "", 0)
        except ValueError:
            return None

    def asked(self, card: str, *name: str) -> str | None:
        """An attribute for which the kernel asks the card. A card that once did not answer in time is not asked again."""
        if card in self._silent:
            return None
        found: list[str | None] = []
        # Not to be interrupted otherwise; the thread ends with the process.
        thread = threading.Thread(target=lambda: found.append(self.text(*name)), daemon=True)
        thread.start()
        thread.join(self._seconds)
        if not found:
            self._silent.add(card)
            self._failed(name, f"the card did not answer within {self._seconds:g} seconds")
            return None
        return found[0]

    def driver(self, name: str) -> str | None:
        try:
            return os.path.basename(os.readlink(os.path.join(self.path, "devices", name, "driver")))
        except OSError:
            return None

    def _failed(self, name: t.Sequence[str], reason: str) -> None:
        self.unreadable.append({"attribute": "/".join(part for part in name if part != "devices"), "reason": reason})


def _content(path: str) -> str:
    with open(path, "rb") as handle:
        return handle.read(_PAGE).decode("ascii", "replace")


def domains_of_mask(mask: str | None) -> list[str] | None:
    """Domains of a mask of 64 hexadecimal digits, bit 0 leftmost (ap_bus.c); none for ``not supported``."""
    digits = (mask or "").removeprefix("0x")
    if not re.fullmatch("[0-9a-fA-F]+", digits):
        return None
    bits = f"{int(digits, 16):0{4 * len(digits)}b}"
    return [f"{number:04x}" for number, bit in enumerate(bits) if bit == "1"]


def _domain(number: int | None) -> str | None:
    """The kernel says -1 for none."""
    return None if number is None or number < 0 else f"{number:04x}"


def _bus(tree: _Tree) -> Bus:
    return {
        "default_domain": _domain(tree.number("ap_domain")),
        "max_domain": _domain(tree.number("ap_max_domain_id")),
        "usage_domains": domains_of_mask(tree.text("ap_usage_domain_mask")),
        "control_domains": domains_of_mask(tree.text("ap_control_domain_mask")),
        "features": (tree.text("features") or "").split(),
    }


def _status(config: int | None, checkstop: int | None, online: int | None, driver: str | None) -> str:
    """In the order of lszcrypt's read_subdev_rec_default."""
    if config == 0:
        return "deconfigured"
    if checkstop:
        return "checkstopped"
    if online is not None:
        return "online" if online else "offline"
    if driver == "vfio_ap":
        return "reserved"
    return "unknown" if driver else "unbound"


def _card(tree: _Tree, name: str, number: str) -> Card:
    functions = tree.number("devices", name, "ap_functions")
    mode = "unknown"
    if functions is not None:
        modes = {_CCA: "cca", _ACCELERATOR: "accelerator", _EP11: "ep11"}
        mode = next((word for bit, word in modes.items() if functions & bit), "unknown")
    driver = tree.driver(name)
    status = _status(
        tree.number("devices", name, "config"),
        tree.number("devices", name, "chkstop"),
        tree.number("devices", name, "online"),
        driver,
    )
    return {
        "id": number,
        "type": tree.text("devices", name, "type"),
        "mode": mode,
        "status": status,
        "restricted": None if functions is None else bool(functions & _RESTRICTED),
        "hwtype": tree.number("devices", name, "hwtype"),
        "requests": tree.number("devices", name, "request_count"),
        "driver": driver,
        "serial": (tree.asked(number, "devices", name, "serialnr") or None) if status == "online" else None,
    }


def _queue(tree: _Tree, name: str, card: str, domain: str, of: Card | None) -> Queue:
    driver = tree.driver(name)
    status = _status(
        tree.number("devices", name, "config"),
        tree.number("devices", name, "chkstop"),
        tree.number("devices", name, "online"),
        driver,
    )
    mode = of["mode"] if of else "unknown"
    # Of a queue that is not online, kernels before 6.16 show what they last saw: worth nothing.
    shown = tree.asked(card, "devices", name, "mkvps") if status == "online" and mode in verdict.MASTER_KEYS else None
    return {
        "id": name,
        "card": card,
        "domain": domain,
        "type": of["type"] if of else None,
        "mode": mode,
        "status": status,
        "requests": tree.number("devices", name, "request_count"),
        "driver": driver,
        "se_bind": tree.text("devices", name, "se_bind"),
        "se_associate": tree.text("devices", name, "se_associate"),
        "master_keys": master_keys(shown or ""),
    }


def master_keys(text: str) -> dict[str, dict[str, Register]]:
    """Registers of a queue from its attribute ``mkvps``; lines of another form are left out, so that their key is unknown."""
    found: dict[str, dict[str, Register]] = {}
    for line in text.splitlines():
        parts = _MKVP.fullmatch(line.strip())
        if parts:
            key, register, state, pattern = parts.groups()
            found.setdefault(key.lower(), {})[_REGISTERS[register]] = {
                "state": "unknown" if state == "-" else state,
                "pattern": pattern if state in _HOLDING else None,
            }
    return found
