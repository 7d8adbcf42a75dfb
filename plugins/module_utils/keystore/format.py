# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped-key file as pure functions: bytes to :class:`Document` and back. ``docs/keystore-format.md`` is its specification.

Three things are kept apart. The *checksum* needs no key and tells that a file is not what was written. The *MAC* is
under a key derived from the data key and tells that whoever wrote it held the data key. The *generation* is compared
with the journal (see ``recorded.py``) and tells that it is the file written last.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import json
import re
import typing as t

from ..common.check import is_int
from ..common.errors import TdeError
from ..common.files import MAX_BYTES
from ..common.state import NAME

FORMAT = "hsm-tde wrapped key"
VERSION = 1

#: Kinds of file: an engine's data key, or a user's own secret.
DATA_KEY = "data_key"
SECRET = "secret"  # noqa: S105 - the name of a kind

#: As many as LUKS2 has (LUKS2 on-disk format specification, section 3.1).
MAX_KEYSLOTS = 32
#: Removed keyslots that a file remembers; what is older stands in the journal alone.
MAX_HISTORY = 256
#: Bytes of a data key. The HMAC over the file is under a key derived from it, so it must not be guessable.
MIN_LENGTH, MAX_LENGTH = 16, 1024
#: The largest integer that every JSON reader keeps exactly (RFC 8259, section 6).
_MAX_INTEGER = 2**53 - 1

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_UID = re.compile(r"[0-9a-f]{32}")
_HEX = re.compile(r"(?:[0-9a-f]{2})+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROTECTION = re.compile(r"[a-z0-9_]{1,32}")

_MAC_LABEL = ',\n "mac": "'
_CHECKSUM_LABEL = '",\n "checksum": "'
_END = '"\n}\n'
_DIGEST = 64

#: What a file may name nowhere: code to load, a credential, or where a credential lies.
_FORBIDDEN_NAMES = frozenset(
    [
        "environment",
        "library",
        "library_environment",
        "library_path",
        "module",
        "module_name",
        "module_path",
        "pin",
        "pin_source",
        "pin_value",
        "so_pin",
        "uri",
        "user_pin",
    ]
)
_FORBIDDEN_URI = re.compile(r"(?i)\s*pkcs11:.*(module-(name|path)|pin-(source|value))\s*=", re.DOTALL)

Json = t.Mapping[str, t.Any]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which key a file holds; bound into every wrapped blob and every derived key.

    :param kind: DATA_KEY or SECRET.
    :param cluster: the cluster's name; empty for a secret.
    :param key_id: the data key's or secret's name.
    """

    kind: str
    cluster: str
    key_id: str

    def words(self) -> str:
        """The key in words, as messages name it."""
        return f"secret {self.key_id}" if self.kind == SECRET else f"data key {self.key_id} of cluster {self.cluster}"

    def label(self, purpose: str) -> bytes:
        """HKDF's ``info`` for a purpose. No part can hold a zero byte, so no two identities share one."""
        return b"\0".join(part.encode("ascii") for part in (f"hsm-tde 1 {purpose}", self.kind, self.cluster, self.key_id))

    def context(self, uid: str) -> bytes:
        """What is authenticated with the wrapped key of a keyslot; :param uid: the keyslot's."""
        return self.label("keyslot") + b"\0" + uid.encode("ascii")


@dataclasses.dataclass(frozen=True)
class Keyslot:
    """The data key under one protection.

    :param name: unique in the file, except while a keyslot is being replaced by one of the same name.
    :param uid: 16 random bytes in hex; tells the two apart.
    :param protection: a name that ``protection.load`` knows.
    :param created: when it was written, UTC; :param proved: when it first gave the data key back, None if it has not.
    :param target: public facts that tell what opens it (for a token: its label and serial, the KEK's label, id and check value).
    :param blob: the wrapped key, by the protection's own rules.
    :param mac: HMAC over this keyslot, hex; tells a keyslot of elsewhere from edited facts around it.
    """

    name: str
    uid: str
    protection: str
    created: str
    proved: str | None
    target: t.Mapping[str, str]
    blob: Json
    mac: str = ""

    def facts(self) -> dict[str, t.Any]:
        """Everything but blob and MAC."""
        return {
            "name": self.name,
            "uid": self.uid,
            "protection": self.protection,
            "created": self.created,
            "proved": self.proved,
            "target": dict(self.target),
        }


@dataclasses.dataclass(frozen=True)
class Document:
    """A wrapped-key file.

    :param length: the data key's, in bytes; for a secret, of the key that encrypts it.
    :param created: UTC; :param generation: 1, and one more with every write.
    :param check: ``{"kind": "hkdf-sha256" | "consumer", "value": hex}``; None for a secret.
    :param history: facts of removed keyslots, each with ``removed`` (UTC), oldest first.
    :param history_omitted: how many older ones the file no longer lists.
    :param payload: a secret's ciphertext; None for a data key.
    :param mac: over the file, hex; :param raw: the file's bytes, once it has been read or sealed.
    """

    identity: Identity
    length: int
    created: str
    generation: int
    check: t.Mapping[str, str] | None
    keyslots: tuple[Keyslot, ...]
    history: tuple[Json, ...] = ()
    history_omitted: int = 0
    payload: t.Mapping[str, str] | None = None
    mac: str = ""
    raw: bytes = dataclasses.field(default=b"", repr=False)

    def digest(self) -> str:
        """SHA-256 of the file, hex; what the journal records."""
        return hashlib.sha256(self.raw).hexdigest()

    def without(self, uids: t.Collection[str], removed: str) -> Document:
        """This document without some keyslots, which the history remembers.

        :param removed: the time, UTC.
        """
        gone = [{**slot.facts(), "removed": removed} for slot in self.keyslots if slot.uid in uids]
        history = (*self.history, *gone)
        excess = max(0, len(history) - MAX_HISTORY)
        return dataclasses.replace(
            self,
            keyslots=tuple(slot for slot in self.keyslots if slot.uid not in uids),
            history=history[excess:],
            history_omitted=self.history_omitted + excess,
        )


def hkdf(key: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 without salt (RFC 5869)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), length, None, info).derive(key)


def b64(data: bytes) -> str:
    """Base64 with padding, one line (RFC 4648, section 4)."""
    return base64.b64encode(data).decode("ascii")


def unb64(text: t.Any, what: str) -> bytes:
    """The bytes of a base64 text in its one valid spelling.

    :param what: the field, for the message.
    :raises TdeError: ``keystore_damaged``.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        data = b""
    if not data or b64(data) != text:
        raise damaged(f"{what} is not base64")
    return data


def damaged(reason: str, code: str = "keystore_damaged") -> TdeError:
    """An error about a file's content; the reader of the file adds its path."""
    return TdeError(
        code,
        reason,
        kept="It was not used, and nothing was changed.",
        next_step="Restore it, together with the journal of the same time, from a backup.",
    )


def _compact(content: t.Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def keyslot_mac(identity: Identity, slot: Keyslot, key: bytes) -> str:
    """HMAC-SHA256 over a keyslot under a key derived from the data key, hex."""
    content = {**slot.facts(), "blob": slot.blob}
    return hmac.new(hkdf(key, identity.label("keyslot mac")), _compact(content), "sha256").hexdigest()


def check_value(key: bytes) -> str:
    """Tells whether two data keys are the same without telling what they are: 16 bytes of HKDF-SHA256, hex."""
    return hkdf(key, b"hsm-tde 1 check value", 16).hex()


def _head(document: Document) -> str:
    body = {
        "format": FORMAT,
        "version": VERSION,
        "kind": document.identity.kind,
        "cluster": document.identity.cluster,
        "key_id": document.identity.key_id,
        "length": document.length,
        "created": document.created,
        "generation": document.generation,
        "check": document.check,
        "keyslots": [{**slot.facts(), "blob": slot.blob, "mac": slot.mac} for slot in document.keyslots],
        "history": list(document.history),
        "history_omitted": document.history_omitted,
        "payload": document.payload,
    }
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True)[: -len("\n}")] + _MAC_LABEL


def _assemble(head: str, mac: str) -> bytes:
    text = head + mac + _CHECKSUM_LABEL
    return (text + hashlib.sha256(text.encode("ascii")).hexdigest() + _END).encode("ascii")


def seal(document: Document, key: bytes) -> Document:
    """Put the MACs and the checksum on a document.

    :param key: the data key.
    :returns: the document with ``raw``, the bytes to be written.
    :raises TdeError: ``keystore_too_large``, ``keystore_forbidden``, ``keystore_damaged`` for a fact that no file may hold.
    """
    if len(document.keyslots) > MAX_KEYSLOTS:
        raise TdeError("keystore_too_large", f"has {MAX_KEYSLOTS} keyslots already", next_step="Remove one first.")
    slots = tuple(dataclasses.replace(slot, mac=keyslot_mac(document.identity, slot, key)) for slot in document.keyslots)
    document = dataclasses.replace(document, keyslots=slots)
    head = _head(document)
    raw = _assemble(head, hmac.new(hkdf(key, document.identity.label("file mac")), head.encode("ascii"), "sha256").hexdigest())
    if len(raw) > MAX_BYTES:
        raise TdeError("keystore_too_large", f"would have {len(raw)} bytes; at most {MAX_BYTES} are read back")
    return decode(raw)


def verify(document: Document, key: bytes, slot: Keyslot) -> None:
    """Check that whoever wrote the file held the data key.

    :param key: what keyslot ``slot`` gave.
    :raises TdeError: ``keyslot_foreign``, ``keystore_edited``.
    """
    head = document.raw[: -len(_CHECKSUM_LABEL) - 2 * _DIGEST - len(_END)]
    expected = hmac.new(hkdf(key, document.identity.label("file mac")), head, "sha256").hexdigest()
    if len(key) == document.length and hmac.compare_digest(expected, document.mac):
        return
    order = [slot, *(other for other in document.keyslots if other.uid != slot.uid)]
    foreign = [other.name for other in order if not hmac.compare_digest(keyslot_mac(document.identity, other, key), other.mac)]
    if foreign:
        raise damaged(f"keyslot {', '.join(foreign)} was not written by a holder of the data key", "keyslot_foreign")
    raise damaged("its HMAC is wrong: it was changed by somebody who does not hold the data key", "keystore_edited")


def decode(raw: bytes, identity: Identity | None = None) -> Document:
    """Read a file's bytes, strictly: there is one valid spelling of every document.

    :param identity: what the file must hold; not compared if None.
    :raises TdeError: ``keystore_truncated``, ``keystore_damaged``, ``keystore_newer``, ``keystore_forbidden``, ``keystore_foreign``.
    """
    if not raw.endswith(_END.encode("ascii")):
        raise damaged("its end is missing", "keystore_truncated")
    text = raw[: -_DIGEST - len(_END)]
    written = raw[len(text) : -len(_END)]
    if hashlib.sha256(text).hexdigest().encode("ascii") != written:
        raise damaged("its checksum is wrong")
    try:
        content = json.loads(raw.decode("ascii"), parse_int=_integer, parse_float=_no_number, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise damaged("is not valid JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged("is not a wrapped-key file")
    version = content.get("version")
    if is_int(version) and version > VERSION:
        raise TdeError(
            "keystore_newer",
            f"has version {version}; this collection reads up to {VERSION}",
            next_step="Use the version of hsm.tde that wrote it, or a newer one.",
        )
    if not is_int(version) or version != VERSION:
        raise damaged("has no valid version")
    _refuse_forbidden(content)
    document = dataclasses.replace(_document(content), mac=_text(content["mac"], "mac", _SHA256), raw=raw)
    if _assemble(_head(document), document.mac) != raw:
        raise damaged("is not in the one spelling that the format allows")
    if identity is not None and document.identity != identity:
        raise TdeError(
            "keystore_foreign",
            f"holds {document.identity.words()}, not {identity.words()}",
            kept="It was not used, and nothing was changed.",
            next_step="Find out who put it there; restore the right file from a backup.",
        )
    return document


def _integer(digits: str) -> int:
    if len(digits) > len(str(_MAX_INTEGER)):
        raise ValueError("integer too long")
    return int(digits)


def _no_number(_text: str) -> t.NoReturn:
    raise ValueError("not an integer")


def _refuse_forbidden(content: t.Any) -> None:
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for name in item:
                if name.lower().replace("-", "_") in _FORBIDDEN_NAMES:
                    raise damaged(f"names a {name}, which it must not", "keystore_forbidden")
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str) and _FORBIDDEN_URI.match(item):
            raise damaged("holds a PKCS#11 URI with a PIN, a PIN's source or a module", "keystore_forbidden")


def _fields(content: t.Any, what: str, names: str) -> dict[str, t.Any]:
    if not isinstance(content, dict) or set(content) != set(names.split()):
        raise damaged(f"{what} has missing or unknown fields")
    return content


def _text(value: t.Any, what: str, pattern: re.Pattern[str] | None = None) -> str:
    # Printable excludes control characters, which would act on a terminal, and lone surrogates.
    if not isinstance(value, str) or not value.isprintable() or (pattern and not pattern.fullmatch(value)):
        raise damaged(f"field {what} is not valid")
    return value


def _number(value: t.Any, what: str, least: int, most: int = _MAX_INTEGER) -> int:
    if not is_int(value) or not least <= value <= most:
        raise damaged(f"field {what} is not valid")
    return value


def _facts(content: dict[str, t.Any]) -> dict[str, t.Any]:
    target = content["target"]
    if not isinstance(target, dict):
        raise damaged("field target is not valid")
    return {
        "name": _text(content["name"], "name", NAME),
        "uid": _text(content["uid"], "uid", _UID),
        "protection": _text(content["protection"], "protection", _PROTECTION),
        "created": _text(content["created"], "created", _TIME),
        "proved": None if content["proved"] is None else _text(content["proved"], "proved", _TIME),
        "target": {_text(name, "target"): _text(value, "target") for name, value in target.items()},
    }


def _keyslot(content: t.Any) -> Keyslot:
    fields = _fields(content, "a keyslot", "name uid protection created proved target blob mac")
    blob = fields["blob"]
    if not isinstance(blob, dict):
        raise damaged("field blob is not valid")
    for name, value in blob.items():
        _text(name, "blob")
        if not is_int(value):
            _text(value, "blob")
    return Keyslot(**_facts(fields), blob=blob, mac=_text(fields["mac"], "mac", _SHA256))


def _document(content: dict[str, t.Any]) -> Document:
    _fields(
        content,
        "the file",
        "format version kind cluster key_id length created generation check keyslots history history_omitted payload mac checksum",
    )
    kind = content["kind"]
    if kind not in (DATA_KEY, SECRET) or not isinstance(content["cluster"], str):
        raise damaged("field kind is not valid")
    cluster = content["cluster"] if kind == SECRET and content["cluster"] == "" else _text(content["cluster"], "cluster", NAME)
    if (kind == SECRET) != (cluster == ""):
        raise damaged("field cluster is not valid")
    check, payload = content["check"], content["payload"]
    if (check is None) != (kind == SECRET) or (payload is None) != (kind == DATA_KEY):
        raise damaged("field check or payload is not valid")
    if check is not None:
        _fields(check, "check", "kind value")
        _text(check["value"], "check", _HEX)
        if check["kind"] not in ("hkdf-sha256", "consumer"):
            raise damaged("field check is not valid")
    if payload is not None:
        _fields(payload, "payload", "cipher iv ciphertext")
        for name in payload:
            _text(payload[name], "payload")
    slots, history = content["keyslots"], content["history"]
    if not isinstance(slots, list) or not 1 <= len(slots) <= MAX_KEYSLOTS:
        raise damaged("field keyslots is not valid")
    if not isinstance(history, list) or len(history) > MAX_HISTORY:
        raise damaged("field history is not valid")
    keyslots = tuple(_keyslot(slot) for slot in slots)
    if len({slot.uid for slot in keyslots}) != len(keyslots):
        raise damaged("two keyslots have one uid")
    past = []
    for item in history:
        fields = _fields(item, "an entry of the history", "name uid protection created proved target removed")
        past.append({**_facts(fields), "removed": _text(fields["removed"], "removed", _TIME)})
    return Document(
        identity=Identity(kind, cluster, _text(content["key_id"], "key_id", NAME)),
        length=_number(content["length"], "length", MIN_LENGTH, MAX_LENGTH),
        created=_text(content["created"], "created", _TIME),
        generation=_number(content["generation"], "generation", 1),
        check=check,
        keyslots=keyslots,
        history=tuple(past),
        history_omitted=_number(content["history_omitted"], "history_omitted", 0),
        payload=payload,
    )
