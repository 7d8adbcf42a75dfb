# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Secret keys whose generation a kill broke off: told from keys beyond doubt, and taken away.

SoftHSM 2.6.1 writes a new key with label and CKA_ID first, and its value, its check value and CKA_LOCAL after that
(SoftHSM.cpp: generateAES, generateGeneric). A kill in between leaves an object that shows like a key and has no value.

What is destroyed here is gone for good. So this host's journal must say that the generation was begun and never done
(that is the caller's to look up: :func:`begun`), and the object itself must bear all of these marks; what a token does not
tell counts as not borne:

- it is alone with its label and CKA_ID, and a secret key;
- CKA_LOCAL is false, so no generation of it ended; and yet CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE are true, which
  C_CreateObject and C_UnwrapKey make false (PKCS#11 v2.40, 5.7 and 5.13), so it was not brought in either;
- its check value is empty, and it is not bound to some mechanisms;
- used as its flags allow, the token answers what it answers for a value of no length;
- a key generated like it, for this session only, has CKA_LOCAL and a check value, and works: so it is none of session,
  login, device, policy or mechanism that keeps the object from working;
- all that still holds a moment later: nobody else is making it just now.

Key pairs are never destroyed here: of what a kill leaves of a pair, a public half may be whole.
"""

from __future__ import annotations

import time
import typing as t

from ..common.errors import TdeError
from .attributes import KCV_BYTES
from .errors import ckr_of, translated
from .keys import KeyInfo, Reader, aes_block, find, handle_of

if t.TYPE_CHECKING:
    from ..common.journal import Journal
    from .token import Session, TokenInfo

#: The act in plans and in the journal.
ACTION = "destroy_unfinished_key"

#: Flags of an object that was neither generated to its end nor brought in.
_FLAGS = {"token": True, "local": False, "always_sensitive": True, "never_extractable": True}
#: By type: the use that is tried, and what SoftHSM 2.6.1 answers to it for a value of no length (SoftHSM.cpp:
#: SymEncryptInit, where the cipher refuses its key; MacSignInit, where the key is shorter than the digest).
_TRIES = {"aes": ("encrypt", "CKR_MECHANISM_INVALID"), "hmac": ("sign", "CKR_KEY_SIZE_RANGE")}
_BLOCK = bytes(16)
#: Seconds between the first look and the last: longer than a token takes to make a secret key.
_PAUSE = 1.0


def begun(journal: Journal, token: TokenInfo) -> set[tuple[str, bytes]]:
    """Label and CKA_ID of each key that a run began to generate in a token, and that no run has acted on since.

    :raises TdeError: ``journal_damaged``.
    """
    found = set()
    here = (token.label, token.serial)
    for entry in journal.entries():
        if (entry["detail"].get("token_label"), entry["detail"].get("token_serial")) not in (here, (None, None)):
            continue
        key = (entry["key"], entry["key_id"])
        if entry["action"] == "generate_key" and entry["result"] == "begun":
            found.add(key)
        elif entry["action"] != ACTION or entry["result"] == "done":
            found.discard(key)
    return {(label, bytes.fromhex(id_)) for label, id_ in found}


def proved(session: Session, label: str, id_: bytes) -> bool:
    """Whether the one object of a label and CKA_ID is a secret key without a value.

    :raises TdeError: what the token answered, wherever that does not prove it.
    """
    return _unfinished(session, label, id_) is not None


def destroy(session: Session, label: str, id_: bytes) -> None:
    """Destroy an object that was :func:`proved` to have no value, once that is proved again.

    :param session: read-write.
    :raises TdeError: ``key_mismatch`` if it has become another meanwhile; ``pkcs11_refused`` where the token keeps it; what
        the token answered.
    """
    time.sleep(_PAUSE)
    info = _unfinished(session, label, id_)
    if info is None:
        raise TdeError(
            "key_mismatch",
            "had no value a moment ago, and is another now",
            obj=f"key {label!r} (id {id_.hex()})",
            next_step="Find out who else makes keys in this token.",
        )
    with translated(str(info.ref)):
        handle_of(session, info).destroy()
    if find(session, label, id=id_):
        raise TdeError("pkcs11_refused", "the token says that it destroyed the object and still lists it", obj=str(info.ref))


def _unfinished(session: Session, label: str, id_: bytes) -> KeyInfo | None:
    found = find(session, label, id=id_)
    info = found[0] if len(found) == 1 else None
    if info is None or info.cls != "secret" or info.type not in _TRIES:
        return None
    use, expected = _TRIES[info.type]
    if any(info.flags.get(name) is not value for name, value in {**_FLAGS, use: True}.items()):
        return None
    with translated(str(info.ref)):
        raw = Reader(session, ("check_value", "allowed_mechanisms")).read(info.handle)
        if raw is None or (raw["check_value"], raw["allowed_mechanisms"]) != (b"", b""):
            return None
        try:
            _use(session, info.type, info.handle, handle_of(session, info))
            return None
        except Exception as exc:
            if ckr_of(exc) != expected:
                raise
    return info if _such_keys_work(session, info) else None


def _use(session: Session, type_: str, handle: int, raw: t.Any) -> None:
    """:raises CkError: what the token answered; python-pkcs11's exceptions."""
    from pkcs11 import Mechanism

    if type_ == "aes":
        aes_block(session, handle, _BLOCK)
    else:
        raw.sign(_BLOCK, mechanism=Mechanism.SHA256_HMAC)


def _such_keys_work(session: Session, info: KeyInfo) -> bool:
    """Whether a key of the same type, size and use, generated now and for this session only, is one in every respect.

    :raises TdeError: what the token answered.
    """
    from pkcs11 import Attribute, KeyType

    kind = KeyType.AES if info.type == "aes" else KeyType.GENERIC_SECRET
    template = {Attribute[_TRIES[info.type][0].upper()]: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
    with translated(f"a key of this session in token {session.token.label}"):
        key = session.raw.generate_key(kind, info.size, store=False, capabilities=0, template=template)
        try:
            raw = Reader(session, ("local", "check_value")).read(key.handle)
            _use(session, info.type, key.handle, key)
        finally:
            key.destroy()
    return raw is not None and raw["local"] is True and len(raw["check_value"] or b"") == KCV_BYTES
