# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Making a KEK so that a kill at any moment leaves one KEK or none, never two.

Order: the journal says "begun" with an id chosen beforehand → C_GenerateKey → the key is read back → the registry
names it → a probe decides the mechanism → where it needs one, the companion is made and registered → the journal says
"done". Only then is the reference given out, so no data is under a KEK that a later run could take for lost or foreign.
"""

from __future__ import annotations

import os
import typing as t

from ..common.errors import TdeError
from . import make, unfinished
from .blob import CBC_HMAC, GCM, IV_BYTES, MAC_BYTES, TAG_BITS
from .envelope import COMPANION, Kek, check_fit, load_kek
from .errors import ckr_of, translated
from .keys import KeyInfo, KeyRef, find, unreachable
from .keyspec import KeySpec

if t.TYPE_CHECKING:
    from ..common.journal import Journal
    from .registry import Registry
    from .token import Session

_ACTION = "generate_kek"
#: Random bytes of a KEK's CKA_ID: two KEKs of one label, made one after the other, are told apart.
_ID_BYTES = 16
#: Answers after which nothing more can be said about mechanisms.
_GONE = (
    "CKR_DEVICE_ERROR",
    "CKR_DEVICE_REMOVED",
    "CKR_TOKEN_NOT_PRESENT",
    "CKR_SESSION_CLOSED",
    "CKR_SESSION_HANDLE_INVALID",
    "CKR_USER_NOT_LOGGED_IN",
    "CKR_CRYPTOKI_NOT_INITIALIZED",
)


#: Answers of a token that lacks a mechanism.
_LACKING = ("CKR_MECHANISM_INVALID", "CKR_MECHANISM_PARAM_INVALID", "CKR_FUNCTION_NOT_SUPPORTED")


def create_kek(
    session: Session, label: str, *, cluster: str, registry: Registry, journal: Journal, replace_lost: bool = False
) -> KeyRef:
    """The KEK of a label: the one that this host made before, else a new one. Call it with the state directory locked.

    AES-256, in the token for good, sensitive, not extractable, for encryption and decryption only.

    :param session: read-write, the user logged in.
    :param cluster: whose KEK it is; ``pkcs11_key`` refuses to destroy a key that the registry names for a cluster.
    :param replace_lost: make a new one although this host remembers one that does not show.
    :raises TdeError: ``key_unreachable``; ``key_foreign``: the token has a key of the label that this host did not make;
        ``key_ambiguous``, ``key_not_protected``, ``kek_unfit``, ``mechanism_unsupported``; what the token answered.
    """
    standing = _standing(session, label, registry, journal, replace_lost)
    for id_ in standing.lost:
        _forget(session, KeyRef(label, id_), registry, journal, cluster)
    if standing.made:
        return standing.made
    begun = standing.begun
    return _complete(session, KeyRef(label, begun or os.urandom(_ID_BYTES)), bool(begun), cluster, registry, journal)


def check_kek(session: Session, label: str, *, registry: Registry, journal: Journal) -> None:
    """Refuse, before anything is done, what :func:`create_kek` would refuse: a label that is taken, a token that cannot.

    :raises TdeError: as :func:`create_kek`.
    """
    if not _standing(session, label, registry, journal, replace_lost=False).made:
        _check_mechanisms(session)


def _check_mechanisms(session: Session) -> None:
    """Try the mechanisms with keys that end with the session.

    A token that makes no such keys is not refused here: the KEK itself will tell.
    """
    from pkcs11 import Attribute, KeyType, Mechanism
    from pkcs11.mechanisms import GCMParams

    def key(kind: KeyType, *usage: Attribute) -> t.Any:
        template = {**dict.fromkeys(usage, True), Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        return session.raw.generate_key(kind, 256, store=False, capabilities=0, template=template)

    def gcm() -> None:
        aes.encrypt(b"data", mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(bytes(IV_BYTES[GCM]), b"", TAG_BITS))

    def answer(act: t.Callable[[], t.Any]) -> str:
        """The failure's CKR_ name, empty if there was none."""
        try:
            act()
        except Exception as exc:
            _raise_if_gone(exc, str(session.token))
            return ckr_of(exc) or ""
        return ""

    try:
        aes = key(KeyType.AES, Attribute.ENCRYPT, Attribute.DECRYPT)
    except Exception as exc:
        _raise_if_gone(exc, str(session.token))
        return
    refused = answer(gcm)
    if not refused:
        return
    others = (
        lambda: aes.encrypt(b"data", mechanism=Mechanism.AES_CBC_PAD, mechanism_param=bytes(IV_BYTES[CBC_HMAC])),
        lambda: key(KeyType.GENERIC_SECRET, Attribute.SIGN).sign(b"data", mechanism=Mechanism.SHA256_HMAC),
    )
    for answered in map(answer, others):
        if answered in _LACKING:
            raise TdeError(
                "mechanism_unsupported",
                f"AES-GCM answered {refused}, and AES-CBC with padding or HMAC-SHA256 {answered}",
                obj=str(session.token),
                details={"ckr": answered},
            )


class _Standing(t.NamedTuple):
    """What there is of a KEK: the one that was made, the id of one that was begun, the ids of those that were lost."""

    made: KeyRef | None
    begun: bytes | None
    lost: list[bytes]


def _standing(session: Session, label: str, registry: Registry, journal: Journal, replace_lost: bool) -> _Standing:
    token = session.token
    listed = find(session, label, cls="secret")
    by_id = {info.id: info for info in listed}
    if len(by_id) != len(listed):
        raise TdeError("key_ambiguous", "two keys have this label and one id", obj=f"KEK {label!r} in {token}")
    named = [bytes.fromhex(entry["id"]) for entry in make.registered(registry, token, label)]
    lost = [id_ for id_ in named if id_ not in by_id]
    if lost and not replace_lost:
        raise unreachable(f"{KeyRef(label, lost[0])} in {token}")
    begun = _begun(journal, session, label)
    ours = [id_ for id_ in named if id_ in by_id]
    foreign = [info for info in listed if info.id not in (*ours, begun)]
    if foreign:
        raise TdeError(
            "key_foreign",
            f"the token has {', '.join(str(info.ref) for info in foreign)}, which this host did not make",
            obj=f"KEK {label!r} in {token}",
            next_step="Give the cluster a name of its own, or restore this host's state directory if it was lost.",
        )
    if len(ours) > 1:
        raise TdeError("key_ambiguous", f"{len(ours)} KEKs of this label are registered", obj=f"KEK {label!r} in {token}")
    if ours and begun != ours[0]:
        ref = KeyRef(label, ours[0])
        check_fit(by_id[ref.id], f"{ref} in {token}")
        return _Standing(ref, None, lost)
    return _Standing(None, begun, lost)


def _complete(session: Session, ref: KeyRef, resumed: bool, cluster: str, registry: Registry, journal: Journal) -> KeyRef:
    """Everything from "begun" to "done", each part left out that a killed run has done."""

    def write(result: str, **facts: t.Any) -> None:
        journal.append(
            _ACTION,
            f"{ref} in {session.token}",
            result=result,
            cluster=cluster,
            key=ref.label,
            key_id=ref.id.hex(),
            token_label=session.token.label,
            token_serial=session.token.serial,
            **facts,
        )

    if not resumed:
        write("begun")
    else:
        for label in (ref.label, ref.label + COMPANION):
            _clear(session, KeyRef(label, ref.id), cluster, registry, journal)
    usage = {"encrypt": True, "decrypt": True}
    info = _ensure(session, KeySpec(ref.label, ref.id, "aes", size=256, usage=usage), cluster, registry)
    kek = Kek(session, info, None)
    mechanism = GCM if _gcm_works(kek) else CBC_HMAC
    if mechanism == CBC_HMAC:
        usage = {"sign": True, "verify": True}
        companion = KeySpec(ref.label + COMPANION, ref.id, "hmac", size=256, usage=usage)
        _ensure(session, companion, cluster, registry)
        kek = load_kek(session, ref)
        _probe_cbc(kek)
    write("done", kcv=kek.kcv().hex(), mechanism=mechanism)
    return ref


def _clear(session: Session, ref: KeyRef, cluster: str, registry: Registry, journal: Journal) -> None:
    """Take away what a kill left of a key in the midst of its generation; a key that is one stays."""
    token = session.token
    if registry.names_key(token.label, token.serial, ref.label, ref.id.hex()) or not unfinished.proved(
        session, ref.label, ref.id
    ):
        return
    facts = {
        "cluster": cluster,
        "key": ref.label,
        "key_id": ref.id.hex(),
        "token_label": token.label,
        "token_serial": token.serial,
    }
    journal.append(unfinished.ACTION, f"{ref} in {token}", result="begun", **facts)
    unfinished.destroy(session, ref.label, ref.id)
    journal.append(unfinished.ACTION, f"{ref} in {token}", **facts)


def _ensure(session: Session, spec: KeySpec, cluster: str, registry: Registry) -> KeyInfo:
    found = find(session, spec.label, id=spec.id, cls="secret")
    info = found[0] if found else make.generate(session, spec)
    obj = f"{info.ref} in {session.token}"
    check_fit(info, obj)
    if any(info.flags.get(name) is False for name in ("local", "always_sensitive", "never_extractable")):
        # Between a kill and this run somebody with the PIN may have put a key of his own in its place.
        raise TdeError(
            "kek_unfit", "was not generated in the token, or could be read once", obj=obj, next_step="Find out who made it."
        )
    make.remember(session, registry, info, cluster)
    return info


def _forget(session: Session, ref: KeyRef, registry: Registry, journal: Journal, cluster: str) -> None:
    for label in (ref.label, ref.label + COMPANION):
        registry.forget_key(session.token.label, session.token.serial, label, ref.id.hex())
    journal.append(
        "forget_key", f"{ref} in {session.token}", cluster=cluster, key=ref.label, key_id=ref.id.hex(), why="replace_lost"
    )


def _begun(journal: Journal, session: Session, label: str) -> bytes | None:
    """The id of a KEK that a killed run had begun to make."""
    for entry in reversed(journal.entries()):
        detail = entry["detail"]
        if (
            entry["action"] == _ACTION
            and entry["key"] == label
            and (detail.get("token_label"), detail.get("token_serial")) == (session.token.label, session.token.serial)
        ):
            return bytes.fromhex(entry["key_id"]) if entry["result"] == "begun" else None
    return None


def _gcm_works(kek: Kek) -> bool:
    """Whether AES-GCM gives back what it encrypted, and refuses another context."""
    data, iv = os.urandom(48), os.urandom(IV_BYTES[GCM])
    try:
        ciphertext = kek.encrypt(GCM, iv, data, b"right")
        if kek.decrypt(GCM, iv, ciphertext, b"right") != data or data in ciphertext:
            return False
    except Exception as exc:
        _raise_if_gone(exc, kek.obj)
        return False
    try:
        kek.decrypt(GCM, iv, ciphertext, b"wrong")
    except Exception as exc:
        _raise_if_gone(exc, kek.obj)
        return True
    return False


def _raise_if_gone(exc: Exception, obj: str) -> None:
    ckr = ckr_of(exc)
    if ckr is None or ckr in _GONE:
        with translated(obj):
            raise exc


def _probe_cbc(kek: Kek) -> None:
    data, iv = os.urandom(48), os.urandom(IV_BYTES[CBC_HMAC])
    try:
        ciphertext = kek.encrypt(CBC_HMAC, iv, data, b"")
        works = kek.decrypt(CBC_HMAC, iv, ciphertext, b"") == data and data not in ciphertext
        macs = [kek.mac(message) for message in (b"one", b"one", b"two")]
    except TdeError:
        raise
    except Exception as exc:
        _raise_if_gone(exc, kek.obj)
        raise TdeError(
            "mechanism_unsupported",
            f"AES-CBC with padding, or HMAC-SHA256, answered {ckr_of(exc)}",
            obj=kek.obj,
            kept="No data was wrapped.",
        ) from None
    if not works or macs[0] != macs[1] or macs[0] == macs[2] or len(macs[0]) != MAC_BYTES:
        raise TdeError(
            "mechanism_unsupported", "AES-CBC or HMAC-SHA256 does not work as it should", obj=kek.obj, kept="No data was wrapped."
        )
