# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A KEK at a KMIP server, and data keys wrapped under it, so that a kill at any moment leaves one KEK or none.

Where the server speaks KMIP 1.4 it encrypts and decrypts itself, and the KEK never leaves it. Else the KEK is got over TLS
for each use. The blob, a flat JSON object::

    version     1
    mechanism   "KMIP-AES-GCM" (by the server) or "KMIP-GET+AES-GCM" (here, with the KEK that was got)
    kek_label   text, the KEK's name
    kek_id      text, the server's unique identifier of the KEK
    kek_kcv     hex, 3 bytes: the beginning of 16 zero bytes under AES-GCM with an IV of 12 zero bytes
    iv          base64, 12 bytes
    ciphertext  base64, the tag of 16 bytes at its end

The associated data of both mechanisms are "hsm.tde kmip envelope 1", mechanism, kek_label, kek_id, kek_kcv and the context,
each after its length (see :func:`pkcs11.blob.joined`).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import typing as t

from ..common.check import is_int
from ..common.errors import TdeError
from ..pkcs11.blob import MAX_PLAINTEXT, invalid, joined
from .keys import Spec, ambiguous, create, find, find_one, note, one_at_a_time

if t.TYPE_CHECKING:
    from ..common.journal import Journal
    from ..common.state import StateDirectory
    from ..pkcs11.registry import Registry
    from .client import Client, KeyFacts

VERSION = 1
BY_SERVER = "KMIP-AES-GCM"
BY_US = "KMIP-GET+AES-GCM"

#: What stands for a token's serial number in the registry's entry of a key at a KMIP server; no token has it.
SERIAL = "kmip"
#: A key's class in the registry.
CLASS = "kmip_key"

_IV, _TAG, _KCV = 12, 16, 3  # bytes; NIST SP 800-38D, sections 8.2 and 5.2.1.2
_DOMAIN = b"hsm.tde kmip envelope 1"
_FIELDS = {"version", "mechanism", "kek_label", "kek_id", "kek_kcv", "iv", "ciphertext"}
_ACTION = "generate_kek"

#: A server's answers to a decryption from which it does not show whether the key or the ciphertext is another.
_UNCLEAR = ("kmip_server_failed", "kmip_cryptographic_failure", "kmip_request_refused")


class KekRef(t.NamedTuple):
    """A KEK. :param label: its name; :param id: the server's unique identifier."""

    label: str
    id: str

    def __str__(self) -> str:
        return f"KEK {self.label!r} (id {self.id})"


# --- making one


def create_kek(
    client: Client, label: str, *, cluster: str, registry: Registry, journal: Journal, state: StateDirectory
) -> KekRef:
    """The KEK of a label: the one that this host made before, else a new one, active and for encryption and decryption.

    Call it with the state directory locked.

    :raises TdeError: ``key_unreachable``, ``key_foreign``, ``key_ambiguous``, ``kek_unfit``, and what the server answers.
    """
    with one_at_a_time(state):
        made = standing(client, label, registry, journal)
        if made:
            return made
        service = client.access.service

        def write(result: str, uid: str = "", **facts: t.Any) -> None:
            obj = f"KEK {label!r} at {client.access.words()}"
            journal.append(_ACTION, obj, result=result, cluster=cluster, key=label, key_id=uid, service=service, **facts)

        begun = _begun(journal, service, label)
        if not begun:
            write("begun")
        # One that a killed run of this host made and did not come to register.
        facts = (find_one(client, label, journal) if begun else None) or create(client, Spec(label), journal, cluster=cluster)
        obj = f"KEK {label!r} at {client.access.words()}"
        _check_fit(facts, obj)
        if facts.state == "pre_active":
            client.activate(facts.uid)
            note(journal, client, "activate_kmip_key", label, facts.uid, cluster=cluster)
        kek = Kek(client, KekRef(label, facts.uid))
        mechanism, kcv = kek.probe()
        registry.remember_key(service, SERIAL, label, facts.uid, CLASS, cluster)
        write("done", facts.uid, kcv=kcv, mechanism=mechanism)
        return kek.ref


def standing(client: Client, label: str, registry: Registry, journal: Journal) -> KekRef | None:
    """The KEK of a label that this host made, None if it has yet to be made.

    :raises TdeError: ``key_unreachable``: it must be there and does not show; ``key_foreign``: there is one that this host did
        not make; ``key_ambiguous``.
    """
    service = client.access.service
    obj = f"KEK {label!r} at {client.access.words()}"
    ref = registered(registry, service, label)
    if ref:
        load_kek(client, ref)
        return ref
    found = find(client, label)
    if found and not _begun(journal, service, label):
        raise TdeError(
            "key_foreign",
            f"the server has {', '.join(one.uid for one in found)}, which this host did not make",
            obj=obj,
            next_step="Give the cluster a name of its own, or a secret its own kek_label; or restore this host's state directory "
            "if it was lost.",
        )
    return None


def registered(registry: Registry, service: str, label: str) -> KekRef | None:
    """The KEK of a label that this host made at a service, as far as it remembers; the newest."""
    named = [
        entry["id"]
        for entry in registry.keys()  # noqa: SIM118 - a registry is no dictionary
        if registry.is_in(entry, service, SERIAL) and entry["label"] == label
    ]
    return KekRef(label, named[-1]) if named else None


def made_elsewhere(client: Client, label: str, registry: Registry, journal: Journal) -> bool:
    """Whether the server has a key of a label that this host did not make.

    :raises TdeError: as :func:`standing`, but for ``key_foreign``.
    """
    try:
        standing(client, label, registry, journal)
    except TdeError as exc:
        if exc.code == "key_foreign":
            return True
        raise
    return False


def adopt_kek(client: Client, label: str, *, cluster: str, registry: Registry, journal: Journal) -> KekRef:
    """Take the KEK of a label that another node of the cluster made, once it was tried out.

    :raises TdeError: ``key_ambiguous``, ``kek_unfit``, ``kmip_key_state``, and what the server answers.
    """
    found = find(client, label)
    if len(found) != 1:
        raise ambiguous(client, label, found)
    ref = KekRef(label, found[0].uid)
    load_kek(client, ref)
    mechanism, kcv = Kek(client, ref).probe()
    registry.remember_key(client.access.service, SERIAL, label, ref.id, CLASS, cluster)
    note(journal, client, "adopt_kek", label, ref.id, cluster=cluster, kcv=kcv, mechanism=mechanism)
    return ref


def load_kek(client: Client, ref: KekRef) -> KeyFacts:
    """A KEK that must be there.

    :raises TdeError: ``key_unreachable``, ``kek_unfit``, ``kmip_key_state``.
    """
    obj = f"{ref} at {client.access.words()}"
    try:
        facts = client.attributes(ref.id)
    except TdeError as exc:
        if exc.code == "kmip_key_absent":
            raise _lost(obj) from None
        raise
    if facts.gone:
        raise _lost(obj)
    _check_fit(facts, obj)
    if facts.state != "active":
        raise _not_active(obj, facts)
    return facts


def _lost(obj: str) -> TdeError:
    return TdeError(
        "key_unreachable",
        "the server does not have it: destroyed, or another server",
        obj=obj,
        kept="Nothing was created in its place.",
        next_step="Name the server that has it, or restore it there; another keyslot opens the data meanwhile.",
    )


def _not_active(obj: str, facts: KeyFacts) -> TdeError:
    return TdeError("kmip_key_state", f"is {(facts.state or 'of no known state').replace('_', '-')}", obj=obj)


def _check_fit(facts: KeyFacts, obj: str) -> None:
    if (facts.algorithm, facts.length) != ("aes", 256) or not {"encrypt", "decrypt"} <= set(facts.usage):
        raise TdeError("kek_unfit", "is not an AES key of 256 bits that may encrypt and decrypt", obj=obj)


def _begun(journal: Journal, service: str, label: str) -> bool:
    """Whether a killed run of this host had begun to make it."""
    for entry in reversed(journal.entries()):
        if entry["action"] == _ACTION and entry["key"] == label and entry["detail"].get("service") == service:
            return bool(entry["result"] == "begun")
    return False


# --- using one


class Kek:
    """A KEK in use. :param client: its connection lives as long."""

    def __init__(self, client: Client, ref: KekRef) -> None:
        self._client = client
        self.ref = ref
        self._cipher: t.Any = None

    @property
    def obj(self) -> str:
        return f"{self.ref} at {self._client.access.words()}"

    def encrypt(self, mechanism: str, iv: bytes, data: bytes, associated: bytes) -> bytes:
        """AES-GCM. :returns: the ciphertext with the tag at its end."""
        if mechanism == BY_SERVER:
            ciphertext, tag = self._client.encrypt(self.ref.id, data, iv, associated)
            return ciphertext + tag
        return t.cast(bytes, self._got().encrypt(iv, data, associated))

    def decrypt(self, mechanism: str, iv: bytes, ciphertext: bytes, associated: bytes) -> bytes:
        """The reverse. :raises TdeError: ``kmip_cryptographic_failure`` or what the server says of a wrong tag."""
        if mechanism == BY_SERVER:
            return self._client.decrypt(self.ref.id, ciphertext[:-_TAG], iv, associated, ciphertext[-_TAG:])
        from cryptography.exceptions import InvalidTag

        try:
            return t.cast(bytes, self._got().decrypt(iv, ciphertext, associated))
        except InvalidTag:
            raise TdeError("kmip_cryptographic_failure", "does not fit the ciphertext", obj=self.obj) from None

    def _got(self) -> t.Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if self._cipher is None:
            self._cipher = AESGCM(self._client.get(self.ref.id).reveal())
        return self._cipher

    def kcv(self, mechanism: str) -> str:
        """Tells whether two KEKs are the same; nothing else is ever encrypted under this IV."""
        return self.encrypt(mechanism, bytes(_IV), bytes(16), b"")[:_KCV].hex()

    def probe(self) -> tuple[str, str]:
        """Which mechanism works, found by using it, and the check value.

        :raises TdeError: ``mechanism_unsupported`` and what the server answers.
        """
        mechanism = BY_SERVER
        data, iv = os.urandom(48), os.urandom(_IV)
        try:
            ciphertext = self.encrypt(mechanism, iv, data, b"right")
        except TdeError as exc:
            # A server that takes no such request lacks it; one that refuses or fails is not to be got round.
            if exc.code not in ("kmip_unsupported", "kmip_request_refused"):
                raise
            mechanism = BY_US
            ciphertext = self.encrypt(mechanism, iv, data, b"right")
        if self.decrypt(mechanism, iv, ciphertext, b"right") != data or data in ciphertext or len(ciphertext) != len(data) + _TAG:
            raise TdeError(
                "mechanism_unsupported", "AES-GCM does not work as it should", obj=self.obj, kept="No data was wrapped."
            )
        return mechanism, self.kcv(mechanism)


# --- wrapped keys


def _associated(fields: t.Mapping[str, t.Any], context: bytes) -> bytes:
    names = (fields["mechanism"], fields["kek_label"], fields["kek_id"])
    return joined(_DOMAIN, *(name.encode() for name in names), bytes.fromhex(fields["kek_kcv"]), context)


def wrap(client: Client, ref: KekRef, data: bytes, context: bytes) -> dict[str, t.Any]:
    """Wrap a data key. :param context: authenticated with it. :returns: the blob."""
    load_kek(client, ref)
    kek = Kek(client, ref)
    mechanism, kcv = kek.probe()
    fields: dict[str, t.Any] = {
        "version": VERSION,
        "mechanism": mechanism,
        "kek_label": ref.label,
        "kek_id": ref.id,
        "kek_kcv": kcv,
    }
    iv = os.urandom(_IV)
    ciphertext = kek.encrypt(mechanism, iv, data, _associated(fields, context))
    return {**fields, "iv": base64.b64encode(iv).decode(), "ciphertext": base64.b64encode(ciphertext).decode()}


def unwrap(client: Client, blob: t.Mapping[str, t.Any], context: bytes) -> bytes:
    """Give a data key back.

    :param blob: well-formed (:func:`check`).
    :raises TdeError: ``key_unreachable``, ``kmip_key_state``, ``kek_mismatch``, ``envelope_damaged`` and what the server answers.
    """
    kek = Kek(client, KekRef(blob["kek_label"], blob["kek_id"]))
    mechanism = blob["mechanism"]
    iv, ciphertext = base64.b64decode(blob["iv"]), base64.b64decode(blob["ciphertext"])
    try:
        return kek.decrypt(mechanism, iv, ciphertext, _associated(blob, context))
    except TdeError as exc:
        if exc.code == "kmip_key_absent":
            raise _lost(kek.obj) from None
        if exc.code in ("kmip_permission_denied", "kmip_key_state"):
            # Says more than the refusal, where the server lets us look.
            load_kek(client, kek.ref)
        if exc.code not in _UNCLEAR:
            raise
        raise _what_differs(kek, blob, exc) from None


def _what_differs(kek: Kek, blob: t.Mapping[str, t.Any], exc: TdeError) -> TdeError:
    """Tell another KEK from a changed wrapped key by the KEK's check value."""
    try:
        same = hmac.compare_digest(kek.kcv(blob["mechanism"]), blob["kek_kcv"])
    except TdeError:
        return exc
    if not same:
        return TdeError(
            "kek_mismatch",
            "another key stands under its id",
            obj=kek.obj,
            next_step="Name the server that has it, or restore it there.",
        )
    return TdeError(
        "envelope_damaged",
        "the wrapped key, or the context it is bound to, is not what was written; the KEK is the right one",
        obj="wrapped key",
        kept="It was not used.",
        next_step="Restore it from a backup, or use another keyslot.",
    )


def check(blob: t.Any) -> None:
    """Judge a blob before anything in it is used.

    :raises TdeError: ``envelope_invalid``, ``envelope_newer``.
    """
    version = blob.get("version") if isinstance(blob, dict) else None
    if is_int(version) and version > VERSION:
        raise TdeError("envelope_newer", f"has version {version}; {VERSION} is known here", obj="wrapped key")
    if not is_int(version) or version != VERSION or set(blob) != _FIELDS or blob["mechanism"] not in (BY_SERVER, BY_US):
        raise invalid("a field is missing, too many or of another version")
    for name in ("kek_label", "kek_id"):
        value = blob[name]
        if not isinstance(value, str) or not 0 < len(value) <= 255 or not value.isprintable():
            raise invalid(f"field {name}")
    if not isinstance(blob["kek_kcv"], str) or not re.fullmatch(rf"[0-9a-f]{{{2 * _KCV}}}", blob["kek_kcv"]):
        raise invalid("field kek_kcv")
    if len(_bytes(blob, "iv")) != _IV or not _TAG < len(_bytes(blob, "ciphertext")) <= MAX_PLAINTEXT + _TAG:
        raise invalid("field iv or ciphertext")


def _bytes(blob: t.Mapping[str, t.Any], name: str) -> bytes:
    try:
        raw = base64.b64decode(blob[name], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != blob[name]:
        raise invalid(f"field {name}")
    return raw
