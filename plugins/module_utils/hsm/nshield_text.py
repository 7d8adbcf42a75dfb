# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What nShield's commands print, as plain data; pure.

Sources of the formats: ``nfkminfo`` (world, ``-l``) and ``ppmk``: transcripts that their users published; ``nfkminfo -s``,
``-c``, ``-k`` and ``rocs list keys``: the manual's examples, read leniently (columns by their order, not their width). What does
not have these shapes is refused as a whole: a list that was understood by half would hide keys.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ..common.errors import TdeError

_HASH = r"[0-9a-f]{40}"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot of an HSM. ``state``: ``empty``, ``operator``, ``admin`` or the tool's word; ``cardset``: the set's hash, if it tells."""

    number: int
    state: str
    cardset: str | None = None
    card: int | None = None


@dataclasses.dataclass(frozen=True)
class Module:
    """An HSM."""

    number: int
    esn: str | None
    usable: bool
    state: str
    slots: tuple[Slot, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """A Security World as ``nfkminfo`` tells it.

    :ivar fips_level: 2, 3, or None if its mode is none that is known here.
    :ivar mode: the word of the line ``mode``; None from software that prints none.
    :ivar acs_quorum: (k, n) of the administrator card set.
    """

    flags: tuple[str, ...]
    mode: str | None
    fips_level: int | None
    acs_quorum: tuple[int, int] | None
    created: str | None
    identity: str | None
    modules: tuple[Module, ...]

    @property
    def usable(self) -> bool:
        return "Initialised" in self.flags and "Usable" in self.flags and any(module.usable for module in self.modules)

    @property
    def recovery(self) -> bool:
        return "Recovery" in self.flags


@dataclasses.dataclass(frozen=True)
class Softcard:
    """A softcard; names repeat, hashes do not."""

    hash: str
    name: str


@dataclasses.dataclass(frozen=True)
class Cardset:
    """An operator card set (OCS) with the quorum k of n."""

    hash: str
    name: str
    k: int
    n: int
    persistent: bool
    remote: bool
    timeout: str


@dataclasses.dataclass(frozen=True)
class Key:
    """A key file.

    :ivar protection: ``module``, ``softcard`` or ``ocs``; :ivar token: the hash of the softcard or card set, None for the module.
    """

    application: str
    ident: str
    name: str
    protection: str
    token: str | None


@dataclasses.dataclass(frozen=True)
class KeyDetail:
    """What ``nfkminfo -k APPLICATION IDENT`` tells of a key. ``hash``: of the key itself, whatever protects it."""

    protection: str
    token: str | None
    recovery: bool
    hash: str


class RocsKey(t.NamedTuple):
    """A row of rocs' ``list keys``."""

    number: int
    name: str
    application: str
    protected_by: str
    recoverable: bool


def _unknown(command: str, reason: str) -> TdeError:
    return TdeError("nshield_answer_unknown", reason, obj=command)


def world(text: str) -> World:
    """Parse ``nfkminfo``.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    blocks = _blocks(text)
    if not blocks or blocks[0][0] != "World" or "state" not in blocks[0][1]:
        raise _unknown("nfkminfo", "it printed no block World with a state")
    head = blocks[0][1]
    flags = tuple(re.findall(r"!?[A-Za-z]\w*", head["state"].partition(" ")[2]))
    return World(
        flags=flags,
        mode=head.get("mode"),
        fips_level=_fips_level(head.get("mode"), flags),
        acs_quorum=_quorum(head.get("k-out-of-n")),
        created=head.get("createtime"),
        identity=head.get("hknso"),
        modules=tuple(_modules(blocks[1:])),
    )


def _blocks(text: str) -> list[tuple[str, dict[str, str]]]:
    """The output as blocks: a line at the margin, and the indented lines ``name value`` below it."""
    blocks: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith(" "):
            blocks.append((line.strip(), {}))
        elif line.strip() and blocks:
            found = re.match(r"\s+(k-out-of-n|other quora|nso timeout|min pp|card names|ex\.client|\S+)\s*(.*)", line)
            if found:
                blocks[-1][1].setdefault(found.group(1), found.group(2).strip())
    return blocks


def _fips_level(mode: str | None, flags: t.Sequence[str]) -> int | None:
    """Level 3 is a mode or, before there were modes, the flag StrictFIPS140; the other known modes ask for no FIPS authorisation."""
    if mode is None:
        return 3 if "StrictFIPS140" in flags else 2
    found = re.fullmatch(r"fips140\d?level([23])", mode)
    if found:
        return int(found.group(1))
    return 2 if mode in ("none", "unrestricted") else None


def _quorum(text: str | None) -> tuple[int, int] | None:
    found = re.match(r"(\d+)/(\d+)", text or "")
    return (int(found.group(1)), int(found.group(2))) if found else None


def _modules(blocks: t.Sequence[tuple[str, dict[str, str]]]) -> t.Iterator[Module]:
    """Modules with their slots; a block ``Cardset`` belongs to the slot before it."""
    modules: dict[int, tuple[dict[str, str], list[Slot]]] = {}
    last: list[Slot] = []
    for title, lines in blocks:
        found = re.match(r"Module #(\d+)(?: Slot #(\d+))?", title)
        if found and found.group(2) is None:
            modules[int(found.group(1))] = (lines, [])
        elif found:
            share = lines.get("shareno")
            word = lines.get("state", "").rpartition(" ")[2].lower() or "unknown"
            last = modules.setdefault(int(found.group(1)), ({}, []))[1]
            last.append(Slot(int(found.group(2)), word, None, int(share) if share and share.isdigit() else None))
        elif title == "Cardset" and last:
            hashes = re.match(_HASH, lines.get("hkltu", ""))
            last[-1] = dataclasses.replace(last[-1], cardset=hashes.group(0) if hashes else None)
    for number, (lines, slots) in modules.items():
        state = lines.get("state", "").partition(" ")[2]
        yield Module(number, lines.get("esn"), "Usable" in state.split(), state, tuple(slots))


def softcards(text: str) -> list[Softcard]:
    """Parse ``nfkminfo -s``.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    count, rows = _table(text, r"SoftCard summary - (\d+) softcards?", "nfkminfo -s")
    found = [re.fullmatch(rf"\s*({_HASH})\s+(.+?)\s*", row) for row in rows]
    return [Softcard(row.group(1), row.group(2)) for row in _all(found, count, "nfkminfo -s")]


def cardsets(text: str) -> list[Cardset]:
    """Parse ``nfkminfo -c``.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    count, rows = _table(text, r"Cardset list - (\d+) cardsets?", "nfkminfo -c")
    found = [re.fullmatch(rf"\s*({_HASH})\s+(\d+)/(\d+)\s+(\S+?)-([PN])([RL])\s+(.+?)\s*", row) for row in rows]
    return [
        Cardset(row[1], row[7], int(row[2]), int(row[3]), row[5] == "P", row[6] == "R", row[4])
        for row in _all(found, count, "nfkminfo -c")
    ]


def _table(text: str, title: str, command: str) -> tuple[int, list[str]]:
    """The number that a list's title tells, and its rows below the line of column names."""
    lines = [line for line in text.splitlines() if line.strip()]
    # An empty list may be told in words of its own.
    if lines and re.match(r"No (soft)?card ?sets?|No softcards?", lines[0], re.IGNORECASE):
        return 0, []
    found = re.match(title, lines[0], re.IGNORECASE) if lines else None
    if not found:
        raise _unknown(command, "its title is none that is known here")
    return int(found.group(1)), [line for line in lines[1:] if not re.match(r"\s*Operator logical token hash", line)]


def _all(rows: t.Sequence[re.Match[str] | None], count: int, command: str) -> list[re.Match[str]]:
    found = [row for row in rows if row]
    if len(found) != len(rows) or len(found) != count:
        raise _unknown(command, f"it tells of {count} and {len(found)} of {len(rows)} lines could be read")
    return found


_SECTIONS = {
    "keys with module protection": "module",
    "keys protected by softcards": "softcard",
    "keys protected by cardsets": "ocs",
    "keys protected by card sets": "ocs",
}


def keys(text: str) -> list[Key]:
    """Parse ``nfkminfo -l``. The token's hash is the one in the ident, where there is one.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    protection = None
    found = []
    for line in text.splitlines():
        title = line.strip().rstrip(":").lower()
        if title in _SECTIONS:
            protection = _SECTIONS[title]
        elif line.strip():
            row = re.fullmatch(r"\s*key_([^_\s]+)_(\S+)\s+`(.*)'\s*", line)
            if not row or protection is None:
                if re.match(r"\s*no keys", line, re.IGNORECASE):
                    continue
                raise _unknown("nfkminfo -l", f"the line {line.strip()[:60]!r} is none that is known here")
            token = re.match(rf"uc({_HASH})-", row.group(2))
            found.append(Key(row.group(1), row.group(2), row.group(3), protection, token.group(1) if token else None))
    return found


def key_detail(text: str) -> KeyDetail:
    """Parse ``nfkminfo -k APPLICATION IDENT``.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    lines = next((lines for title, lines in _blocks(text) if title.startswith("Key AppName")), {})
    protection = {"module": "module", "softcard": "softcard", "cardset": "ocs"}.get(lines.get("protection", "").lower())
    token = lines.get("softcard") or lines.get("cardset")
    if protection is None or "hash" not in lines or (protection != "module" and not re.fullmatch(_HASH, token or "")):
        raise _unknown("nfkminfo -k", "it tells no protection, or not whose")
    return KeyDetail(protection, token if protection != "module" else None, lines.get("recovery") == "Enabled", lines["hash"])


def rocs_keys(text: str) -> list[RocsKey]:
    """Parse rocs' ``list keys``, prompts and introduction around it left aside.

    :raises TdeError: ``nshield_answer_unknown``.
    """
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if re.search(r"No\.\s+Name\s+App\s+Protected by", line)), None)
    if start is None:
        if re.search(r"no keys", text, re.IGNORECASE):
            return []
        raise _unknown("rocs list keys", "it printed no list")
    found = []
    for line in lines[start + 1 :]:
        if not line.strip() or line.startswith("rocs"):
            break
        # Names may have spaces; what protects the key has no two in a row.
        row = re.fullmatch(r"\s*([A-Z]?)\s*(\d+)\s+(.*?)\s+(\S+)\s{2,}((?:\S| (?! ))+?)\s*", line)
        if not row:
            raise _unknown("rocs list keys", f"the line {line.strip()[:60]!r} is none that is known here")
        protector = re.split(r"\s+-+>\s+", row[5])[0]
        found.append(RocsKey(int(row[2]), row[3], row[4], protector, row[1] != "N"))
    if [row.number for row in found] != list(range(1, len(found) + 1)):
        raise _unknown("rocs list keys", "its numbers are not in order")
    return found
