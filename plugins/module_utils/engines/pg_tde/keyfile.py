# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The key file of the provider ``file``: which keys it has, and its copy on the disk under the store's data key.

The server writes its keys into the file, which lies in memory only. What it wrote is sealed with AES-256-GCM under a
data key of the store, beside the store's own files, before any key of it is set. The sealed file::

    {"format": "hsm-tde pg_tde keys", "version": 1, "cluster": "main", "names": ["hsm-tde.main"],
     "check": "8699…", "iv": "…", "content": "…"}

Its head is authenticated; ``check`` is the check value of the key file's content, by which the file in memory is compared
without a credential. The journal has it, too: an older copy in its place is noticed.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import typing as t

from ...common.errors import TdeError
from ...common.files import read_private, remove_leftovers_of, write_atomic
from ...common.journal import Journal
from ...common.state import StateDirectory
from ...keystore.format import b64, check_value, hkdf, unb64

#: Name of the data key in the store, and its bytes.
DATA_KEY, KEY_BYTES = "keyfile", 32
#: KeyInfo: name[256], KeyData {data[32], unsigned len} (pg_tde, src/include/keyring/keyring_api.h).
_ENTRY = struct.Struct("=256s32sI")
#: The journal's action.
SEAL = "seal_keys"
_FORMAT, _VERSION, _IV = "hsm-tde pg_tde keys", 1, 12
_HEAD = ("format", "version", "cluster", "names", "check")


def names(content: bytes) -> tuple[str, ...]:
    """The names of a key file's keys.

    :raises TdeError: ``keystore_damaged``.
    """
    if len(content) % _ENTRY.size:
        raise TdeError(
            "keystore_damaged",
            f"has {len(content)} bytes, which is no whole number of keys as pg_tde 1 and 2 write them",
            obj="the key file of pg_tde",
            next_step="Find out which program wrote it.",
        )
    return tuple(raw.rstrip(b"\0").decode("utf-8", "replace") for raw, dummy, dummy in _ENTRY.iter_unpack(content))


def keys(content: bytes) -> set[tuple[str, bytes]]:
    """A key file's keys, each with its name: secret. :raises TdeError: as :func:`names`."""
    found = names(content)
    return {(name.lower(), data[:length]) for name, (dummy, data, length) in zip(found, _ENTRY.iter_unpack(content), strict=True)}


class Head(t.NamedTuple):
    """What the sealed file says without a credential."""

    names: tuple[str, ...]
    check: str


class Sealed:
    """A cluster's sealed file. Making the object touches nothing."""

    def __init__(self, state: StateDirectory, cluster: str) -> None:
        self.cluster = cluster
        self.path = os.path.join(state.store(cluster), "keys.sealed")
        self.journal = Journal(state.journal)

    def head(self) -> Head | None:
        """What it says, None if nothing was sealed yet.

        :raises TdeError: ``keystore_unreachable``, ``keystore_rolled_back``, ``keystore_damaged``.
        """
        document = self._read()
        return Head(tuple(document["names"]), document["check"]) if document else None

    def _read(self) -> dict[str, t.Any] | None:
        expected = self._recorded()
        try:
            document: dict[str, t.Any] = json.loads(read_private(self.path))
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
            # A first one that was begun may not have come to be.
            if expected and "" not in expected:
                raise TdeError(
                    "keystore_unreachable",
                    "the journal says that it was written, and it does not show",
                    obj=self.path,
                    kept="Nothing was made in its place.",
                    next_step="Mount the file system that it is on, or restore the state directory from a backup.",
                ) from None
            return None
        except ValueError:
            raise self._damaged("is no JSON") from None
        known = (
            isinstance(document, dict) and document.get("format") == _FORMAT and document.get("version") == _VERSION
            and document.get("cluster") == self.cluster and isinstance(document.get("names"), list)
            and all(isinstance(document.get(name), str) for name in ("check", "iv", "content"))
        )  # fmt: skip
        if not known:
            raise self._damaged(f"is no file of this cluster in version {_VERSION}")
        if expected and document["check"] not in expected:
            raise TdeError(
                "keystore_rolled_back",
                "is not the file that this host wrote last, by the journal",
                obj=self.path,
                next_step="Put the newest copy back: keys that were made later are in no other.",
            )
        return document

    def _damaged(self, reason: str) -> TdeError:
        return TdeError("keystore_damaged", reason, obj=self.path, next_step="Restore it from a backup.")

    def _recorded(self) -> set[str]:
        """The check values that the file may have by the journal, "" for no file; empty if the journal knows nothing of it."""
        allowed: set[str] = set()
        for entry in self.journal.entries():
            if entry["action"] == SEAL and entry["cluster"] == self.cluster:
                allowed = {*(allowed or {""}), entry["kcv"]} if entry["result"] == "begun" else {entry["kcv"]}
        return allowed

    def content(self, key: bytes) -> bytes:
        """The key file's content.

        :raises TdeError: as :meth:`head`.
        """
        document = self._read()
        if document is None:
            raise self._damaged("does not exist")
        return self._open(document, key)

    def _open(self, document: t.Mapping[str, t.Any], key: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        try:
            content = AESGCM(self._key(key)).decrypt(
                unb64(document["iv"], "iv"), unb64(document["content"], "content"), _associated(document)
            )
        except (InvalidTag, ValueError):
            raise self._damaged("does not open with the data key of the store") from None
        return content

    def _key(self, key: bytes) -> bytes:
        return hkdf(key, b"hsm-tde 1 pg_tde keys " + self.cluster.encode())

    def write(self, content: bytes, key: bytes) -> None:
        """Seal a key file's content, and prove it: what the disk gives back opens to the same.

        :raises TdeError: what writing raises, ``keystore_damaged``.
        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        document: dict[str, t.Any] = {
            "format": _FORMAT, "version": _VERSION, "cluster": self.cluster, "names": list(names(content)), "check": check_value(content),
        }  # fmt: skip
        iv = secrets.token_bytes(_IV)
        document["content"] = b64(AESGCM(self._key(key)).encrypt(iv, content, _associated(document)))
        document["iv"] = b64(iv)
        self._note("begun", document)
        remove_leftovers_of(self.path)
        write_atomic(self.path, json.dumps(document, indent=1).encode() + b"\n")
        if self._open(json.loads(read_private(self.path)), key) != content:
            raise self._damaged("does not give back what was written")
        self._note("done", document)

    def confirm(self) -> None:
        """Write down that the file is there whose writer was killed before it did so. Call it before anything rests on it."""
        document = self._read()
        if document and self._recorded() != {document["check"]}:
            self._note("done", document)

    def _note(self, result: str, document: t.Mapping[str, t.Any]) -> None:
        self.journal.append(
            SEAL, self.path, result=result, cluster=self.cluster, key_id=DATA_KEY, kcv=document["check"], names=document["names"]
        )


def _associated(document: t.Mapping[str, t.Any]) -> bytes:
    return json.dumps({name: document[name] for name in _HEAD}, sort_keys=True).encode()
