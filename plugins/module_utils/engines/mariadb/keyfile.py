# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Names of data keys and the key file of the plugin file_key_management: pure functions.

A line of the key file is ``id;hex`` (MariaDB's manual, "File Key Management Encryption Plugin"). Each line is a data
key of the store, named ``key.<id>.<tablespace>``: the key with the highest id of a tablespace is its current one.
"""

from __future__ import annotations

import re
import typing as t

from ...common.errors import TdeError
from ...keystore.format import check_value

#: Bytes of a data key; the plugin takes 16, 24 or 32 (same page of the manual).
KEY_BYTES = 32

#: The server's own two keys: redo log, binary log and system tablespace; temporary files and tables.
SYSTEM, TEMPORARY = "system", "temporary"
SYSTEM_ID, TEMPORARY_ID = 1, 2
#: What tables belong to that no tablespace was named for.
DEFAULT = "default"
#: The keys that a keystore is made with.
FIRST = {SYSTEM_ID: SYSTEM, TEMPORARY_ID: TEMPORARY, 3: DEFAULT}

#: ``key.<id>.<name>`` has at most 63 characters (common/state.py), an id at most ten digits.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,44}")
_KEY_ID = re.compile(rf"key\.([1-9][0-9]{{0,9}})\.({NAME.pattern})")
_LINE = re.compile(r"([1-9][0-9]{0,9});([0-9a-f]+)")
_SINCE = re.compile(r"# since ([0-9]+\.[0-9]+)")


class Name(t.NamedTuple):
    """What the name of a data key says: the server's number for it, and the tablespace that it is for."""

    number: int
    tablespace: str

    @property
    def key_id(self) -> str:
        """The data key's name in the store."""
        return f"key.{self.number}.{self.tablespace}"


def parse_name(key_id: str) -> Name | None:
    """A data key's name, None if it is not one of this engine's."""
    found = _KEY_ID.fullmatch(key_id)
    return Name(int(found[1]), found[2]) if found else None


def names(key_ids: t.Iterable[str]) -> list[Name]:
    """The data keys of the store, by their numbers.

    :raises TdeError: ``keystore_foreign``: two of one number, or a name that is none.
    """
    found: dict[int, Name] = {}
    for key_id in key_ids:
        name = parse_name(key_id)
        if name is None or name.number in found:
            raise TdeError(
                "keystore_foreign",
                "is no key of a MariaDB server" if name is None else f"has the number of {found[name.number].key_id}",
                obj=f"data key {key_id}",
                next_step="Find out who put it there.",
            )
        found[name.number] = name
    return [found[number] for number in sorted(found)]


def first(there: t.Sequence[Name]) -> list[Name]:
    """The keys that a keystore is made with, as far as it has none for their purpose; one whose number is taken gets the next."""
    taken = {name.number for name in there}
    has = {name.tablespace for name in there}
    return [
        Name(number if number not in taken else max(*taken, *FIRST) + 1, tablespace)
        for number, tablespace in FIRST.items()
        if tablespace not in has
    ]


def current(keys: t.Iterable[Name]) -> dict[str, int]:
    """The number of each tablespace's current key."""
    found: dict[str, int] = {}
    for name in keys:
        found[name.tablespace] = max(name.number, found.get(name.tablespace, 0))
    return found


class KeyFile(t.NamedTuple):
    """What a key file says, without its keys.

    :param checks: check values by number.
    :param since: when a key came into it, by number: CLOCK_BOOTTIME in seconds.
    """

    checks: dict[int, str]
    since: dict[int, float]


def render(keys: t.Mapping[int, bytes], since: t.Mapping[int, float]) -> bytes:
    """The key file's content; the server skips lines with ``#``."""
    lines = [line for number in sorted(keys) for line in (f"# since {since[number]:.3f}", f"{number};{keys[number].hex()}")]
    return ("\n".join(lines) + "\n").encode()


def keys_of(content: bytes) -> dict[int, bytes]:
    """The keys of a key file, by number. What is no line of one is left out: the comparison with the store tells."""
    found = {}
    for line in content.decode("ascii", "replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match and len(match[2]) % 2 == 0:
            found[int(match[1])] = bytes.fromhex(match[2])
    return found


def parse(content: bytes) -> KeyFile:
    """What a key file says."""
    since: dict[int, float] = {}
    moment = 0.0
    for line in content.decode("ascii", "replace").splitlines():
        said, key = _SINCE.fullmatch(line.strip()), _LINE.fullmatch(line.strip())
        moment = float(said[1]) if said else moment
        if key:
            since[int(key[1])] = moment
    return KeyFile({number: check_value(key) for number, key in keys_of(content).items()}, since)
