# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The registry: which tokens and keys must exist on this host.

A token or key that is named here and that the library does not list is unreachable, never absent: an unmounted
SoftHSM folder looks exactly like an empty slot. ``registry.json``::

    {"version": 1,
     "tokens": [{"label": str, "serial": str, "library": str, "since": ISO 8601}],
     "keys":   [{"token_label": str, "token_serial": str, "label": str, "id": hex, "cls": str, "cluster": str, "since": ISO 8601}]}
"""

from __future__ import annotations

import contextlib
import datetime
import typing as t

from ..common.errors import TdeError
from ..common.files import lock, remove_leftovers_of
from ..common.state import StateDirectory, read_json, write_json

_VERSION = 1
#: Serial numbers that tell nothing: every openCryptoki soft token has "123" up to 3.22 and none from 3.23 on.
_NO_SERIAL = ("", "123")

Entry = t.Dict[str, str]


def same_serial(one: str, other: str) -> bool:
    """Whether two serial numbers may be of one token; those that identify nothing are equal."""
    return one == other or (one in _NO_SERIAL and other in _NO_SERIAL)


class Registry:
    """A host's registry. Making the object reads nothing; every call reads the file anew.

    :param state: the state directory; it is created by the first entry.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._state = state

    def tokens(self) -> list[Entry]:
        """The tokens that must exist.

        :raises TdeError: ``registry_damaged``, and what reading a private file raises.
        """
        return self._read()["tokens"]

    def keys(self) -> list[Entry]:
        """The keys that must exist.

        :raises TdeError: ``registry_damaged``, and what reading a private file raises.
        """
        return self._read()["keys"]

    def names_token(self, *, label: str | None = None, serial: str | None = None) -> Entry | None:
        """The entry of a token with this label and serial number; None if neither is given or none matches."""
        if label is None and serial is None:
            return None
        for entry in self.tokens():
            if (label is None or entry["label"] == label) and (serial is None or same_serial(entry["serial"], serial)):
                return entry
        return None

    @staticmethod
    def is_in(key: Entry, token_label: str, token_serial: str) -> bool:
        """Whether the entry of a key says that it is in this token."""
        return key["token_label"] == token_label and same_serial(key["token_serial"], token_serial)

    def names_key(self, token_label: str, token_serial: str, label: str, id_hex: str | None = None) -> Entry | None:
        """The entry of a key in a token, by label and, if given, CKA_ID in hex."""
        for entry in self.keys():
            if self.is_in(entry, token_label, token_serial) and entry["label"] == label and id_hex in (None, entry["id"]):
                return entry
        return None

    def remember_token(self, label: str, serial: str, library: str) -> bool:
        """Enter a token.

        :param library: real path of the library it was seen through; for the reader of a message only.
        :returns: whether it was new.
        """
        with self._changing() as content:
            if any(entry["label"] == label and same_serial(entry["serial"], serial) for entry in content["tokens"]):
                return False
            content["tokens"].append({"label": label, "serial": serial, "library": library, "since": _now()})
            return True

    def forget_token(self, label: str, serial: str | None = None) -> None:
        """Strike out a token and the keys in it: it was initialised anew or declared lost.

        :param serial: None strikes out every token with the label.
        """
        with self._changing() as content:
            content["tokens"] = [
                entry
                for entry in content["tokens"]
                if entry["label"] != label or (serial is not None and not same_serial(entry["serial"], serial))
            ]
            content["keys"] = [
                entry
                for entry in content["keys"]
                if entry["token_label"] != label or (serial is not None and not same_serial(entry["token_serial"], serial))
            ]

    def remember_key(self, token_label: str, token_serial: str, label: str, id_hex: str, cls: str, cluster: str = "") -> bool:
        """Enter a key.

        :param cls: its class in words (``secret_key``, ``private_key`` …); :param cluster: whose keystore needs it, or "".
        :returns: whether it was new.
        """
        entry = {
            "token_label": token_label,
            "token_serial": token_serial,
            "label": label,
            "id": id_hex,
            "cls": cls,
            "cluster": cluster,
        }
        with self._changing() as content:
            if any(all(known[name] == value for name, value in entry.items()) for known in content["keys"]):
                return False
            content["keys"].append({**entry, "since": _now()})
            return True

    def forget_key(self, token_label: str, token_serial: str, label: str, id_hex: str) -> None:
        """Strike out a key that was destroyed on purpose."""
        with self._changing() as content:
            content["keys"] = [
                entry
                for entry in content["keys"]
                if not (self.is_in(entry, token_label, token_serial) and entry["label"] == label and entry["id"] == id_hex)
            ]

    def _read(self) -> dict[str, list[Entry]]:
        content = read_json(self._state.registry, "registry_damaged", {"version": _VERSION, "tokens": [], "keys": []})
        if not _sound(content):
            raise TdeError(
                "registry_damaged",
                "is of another version or shape",
                obj=self._state.registry,
                next_step="Restore it from a backup; without it a missing token would be taken for one that never was.",
            )
        return t.cast("dict[str, list[Entry]]", content)

    @contextlib.contextmanager
    def _changing(self) -> t.Iterator[dict[str, list[Entry]]]:
        self._state.create()
        with lock(self._state.registry + ".lock", wait_seconds=10):
            remove_leftovers_of(self._state.registry)
            content = self._read()
            before = (list(content["tokens"]), list(content["keys"]))
            yield content
            if (content["tokens"], content["keys"]) != before:
                write_json(self._state.registry, content)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


_TOKEN_FIELDS = {"label", "serial", "library", "since"}
_KEY_FIELDS = {"token_label", "token_serial", "label", "id", "cls", "cluster", "since"}


def _sound(content: t.Any) -> bool:
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return False
    for name, fields in (("tokens", _TOKEN_FIELDS), ("keys", _KEY_FIELDS)):
        rows = content.get(name)
        if not isinstance(rows, list):
            return False
        for row in rows:
            if not isinstance(row, dict) or not fields <= set(row) or not all(isinstance(row[field], str) for field in fields):
                return False
    return True
