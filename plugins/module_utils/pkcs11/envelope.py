# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A data key wrapped under a KEK that never leaves the token.

With AES-GCM where the token does it, the context as associated data. Else with AES-CBC and an HMAC under a second
key in the token, the KEK's *companion*: same CKA_ID, label with :data:`COMPANION` at its end. A KEK that has a
companion is used with CBC and HMAC only, one that has none with GCM only; a blob that claims otherwise is refused.
Which of the two, the probe by use decides when the KEK is made (``kek.py``): what a token says of its mechanisms is
not to be trusted.

Publishing the KEK's check value tells 24 bits of GCM's hash key; a forgery stays beyond 2^-100 for what is wrapped here.
"""

from __future__ import annotations

import hmac
import os
import typing as t

from ..common.errors import TdeError
from .attributes import KCV_BYTES
from .blob import CBC_HMAC, CONFIRMATION, GCM, IV_BYTES, MAC_BYTES, MAX_PLAINTEXT, TAG_BITS, Blob, parse
from .errors import ckr_of, error_from_ckr, translated
from .keys import KeyInfo, KeyRef, check_value, find, handle_of, unreachable

if t.TYPE_CHECKING:
    from .token import Session

#: End of a companion's label. A colon is in no cluster's name and no tag, so no KEK has such a label.
COMPANION = ":mac"
#: What the companion signs for its check value; no message begins so (they begin with a length below 2^16).
_MAC_CHECK = b"hsm.tde check value"
_AES_256 = 256


class Kek:
    """A KEK at work in one session, with its companion if it has one.

    :param key: the KEK as the token shows it; :param companion: its HMAC key, or None.
    """

    def __init__(self, session: Session, key: KeyInfo, companion: KeyInfo | None) -> None:
        self.info = key
        self.obj = f"{key.ref} in {session.token}"
        self.mechanism = CBC_HMAC if companion else GCM
        self._session = session
        self._key = handle_of(session, key)
        self._companion: t.Any = handle_of(session, companion) if companion else None
        self._companion_info = companion

    def encrypt(self, mechanism: str, iv: bytes, data: bytes, associated: bytes) -> bytes:
        """C_Encrypt. :raises: python-pkcs11's exceptions."""
        return t.cast(bytes, self._key.encrypt(data, **self._parameters(mechanism, iv, associated)))

    def decrypt(self, mechanism: str, iv: bytes, data: bytes, associated: bytes) -> bytes:
        """C_Decrypt. :raises: python-pkcs11's exceptions."""
        return t.cast(bytes, self._key.decrypt(data, **self._parameters(mechanism, iv, associated)))

    def _parameters(self, mechanism: str, iv: bytes, associated: bytes) -> dict[str, t.Any]:
        from pkcs11 import Mechanism
        from pkcs11.mechanisms import GCMParams

        if mechanism == GCM:
            return {"mechanism": Mechanism.AES_GCM, "mechanism_param": GCMParams(iv, associated, TAG_BITS)}
        return {"mechanism": Mechanism.AES_CBC_PAD, "mechanism_param": iv}

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 under the companion. :raises: python-pkcs11's exceptions."""
        from pkcs11 import Mechanism

        if self._companion_info is None or not self._companion_info.flags.get("sign"):
            raise suspended(self.obj, "the companion key may not sign")
        return t.cast(bytes, self._companion.sign(message, mechanism=Mechanism.SHA256_HMAC))

    def kcv(self) -> bytes:
        """The KEK's check value."""
        value = check_value(self._session, self.info)
        if value is None:
            raise suspended(self.obj, "it may not encrypt")
        return value

    def mac_kcv(self) -> bytes:
        """The companion's check value, empty if there is none."""
        if self._companion is None:
            return b""
        with translated(self.obj):
            return self.mac(_MAC_CHECK)[:KCV_BYTES]


def suspended(obj: str, reason: str) -> TdeError:
    """The error of a key whose usage flags forbid the use."""
    return TdeError(
        "key_suspended", reason, obj=obj, next_step="Set its usage flags (hsm.tde.pkcs11_key), if it was suspended by mistake."
    )


def load_kek(session: Session, ref: KeyRef) -> Kek:
    """A KEK that somebody's record names.

    :raises TdeError: ``key_unreachable``, ``key_ambiguous``, ``kek_unfit``, ``pin_missing``; what the token answered.
    """
    obj = f"{ref} in {session.token}"
    found = find(session, ref.label, id=ref.id, cls="secret")
    companions = find(session, ref.label + COMPANION, id=ref.id, cls="secret")
    if len(found) > 1 or len(companions) > 1:
        raise TdeError(
            "key_ambiguous",
            "two keys share this label and id",
            obj=obj,
            next_step="Find out which is the right one; destroy neither before.",
        )
    if not found:
        raise unreachable(obj, "a wrapped key or a keyslot names it")
    if found[0].type != "aes":
        raise TdeError("kek_unfit", f"is of type {found[0].type}, not AES", obj=obj)
    return Kek(session, found[0], companions[0] if companions else None)


def check_fit(info: KeyInfo, obj: str) -> None:
    """Refuse to protect data by a key that does not stay in the token.

    :raises TdeError: ``kek_unfit``.
    """
    faults = [
        words
        for name, right, words in (
            ("token", True, "it is not stored in the token"),
            ("sensitive", True, "its value can be read"),
            ("extractable", False, "it can be taken out of the token"),
        )
        if info.flags.get(name) is not right
    ]
    if info.type == "aes" and info.size not in (None, _AES_256):
        faults.append(f"it has {info.size} bits, not {_AES_256}")
    if faults:
        raise TdeError("kek_unfit", "; ".join(faults), obj=obj, next_step="Let hsm.tde make the KEK, or name another key.")


def wrap(session: Session, kek: KeyRef, plaintext: bytes, context: bytes) -> dict[str, t.Any]:
    """Encrypt a data key, and open the result once before it is given out.

    :param plaintext: 1 to :data:`.blob.MAX_PLAINTEXT` bytes.
    :param context: what the blob is bound to (which cluster, which key); the same bytes are needed to open it.
    :returns: a JSON object as ``blob.py`` describes it.
    :raises TdeError: as :func:`load_kek`; ``key_suspended``, ``mechanism_unsupported``, ``invalid_option``.
    """
    if not 0 < len(plaintext) <= MAX_PLAINTEXT:
        raise TdeError("invalid_option", f"has {len(plaintext)} bytes; 1 to {MAX_PLAINTEXT} can be wrapped", obj="secret to wrap")
    key = load_kek(session, kek)
    check_fit(key.info, key.obj)
    if not key.info.flags.get("encrypt") or not key.info.flags.get("decrypt"):
        raise suspended(key.obj, "it may not encrypt and decrypt")
    fields: dict[str, t.Any] = {
        "mechanism": key.mechanism,
        "kek_label": kek.label,
        "kek_id": kek.id,
        "kek_kcv": key.kcv(),
        "iv": os.urandom(IV_BYTES[key.mechanism]),
        "mac_kcv": key.mac_kcv(),
    }
    head = Blob(ciphertext=b"", **fields)
    padded = plaintext if key.mechanism == GCM else CONFIRMATION + plaintext
    try:
        ciphertext = key.encrypt(key.mechanism, head.iv, padded, head.associated(context))
    except Exception as exc:
        raise _no_mechanism(exc, key) from None
    blob = Blob(ciphertext=ciphertext, **fields)
    if key.mechanism == CBC_HMAC:
        with translated(key.obj):
            blob = Blob(ciphertext=ciphertext, **fields, mac=key.mac(blob.message(context)))
    result = blob.public()
    if not hmac.compare_digest(_open(key, parse(result), context), plaintext):
        raise TdeError("mechanism_unsupported", f"{key.mechanism} did not give back what was encrypted", obj=key.obj)
    return result


def _no_mechanism(exc: Exception, key: Kek) -> Exception:
    ckr = ckr_of(exc)
    if ckr is None:
        return exc
    if ckr in ("CKR_MECHANISM_INVALID", "CKR_MECHANISM_PARAM_INVALID", "CKR_FUNCTION_NOT_SUPPORTED"):
        return TdeError(
            "mechanism_unsupported",
            f"{key.mechanism} answered {ckr}",
            obj=key.obj,
            next_step="Let hsm.tde make the KEK: it then makes the companion key that the other mechanism needs.",
            details={"ckr": ckr},
        )
    return error_from_ckr(ckr, key.obj)


def unwrap(session: Session, content: t.Any, context: bytes) -> bytes:
    """Decrypt a data key.

    :param content: what :func:`wrap` gave, from wherever it was kept.
    :param context: as it was given to :func:`wrap`.
    :raises TdeError: ``envelope_invalid``, ``envelope_newer``; ``envelope_damaged``: the KEK is right and the blob or its
        context is not; ``kek_mismatch``: another key stands in the KEK's place; ``key_unreachable``: it does not show;
        ``key_suspended``; what the token answered.
    """
    blob = parse(content)
    key = load_kek(session, KeyRef(blob.kek_label, blob.kek_id))
    if blob.mechanism != key.mechanism:
        if blob.mechanism == CBC_HMAC:
            raise unreachable(f"companion of {key.obj}", "a wrapped key says that it has one")
        raise _damaged(key, f"it claims {blob.mechanism}, with which this KEK does not work")
    if not key.info.flags.get("decrypt"):
        raise suspended(key.obj, "it may not decrypt")
    return _open(key, blob, context)


def _open(key: Kek, blob: Blob, context: bytes) -> bytes:
    if blob.mechanism == CBC_HMAC:
        with translated(key.obj, kept="Nothing was decrypted."):
            expected = key.mac(blob.message(context))
        if len(expected) != MAC_BYTES or not hmac.compare_digest(expected, blob.mac):
            raise _why(key, blob, "its HMAC is wrong")
    try:
        plaintext = key.decrypt(blob.mechanism, blob.iv, blob.ciphertext, blob.associated(context))
    except Exception as exc:
        ckr = ckr_of(exc)
        if ckr is None:
            raise
        raise _why(key, blob, f"decrypting it answered {ckr}", ckr) from None
    if blob.mechanism == GCM:
        return plaintext
    if not hmac.compare_digest(plaintext[: len(CONFIRMATION)], CONFIRMATION):
        raise _why(key, blob, "what was decrypted is no wrapped key")
    return plaintext[len(CONFIRMATION) :]


def _why(key: Kek, blob: Blob, reason: str, ckr: str = "") -> TdeError:
    """After a failure: the check values tell a damaged blob from a KEK that is not the one meant."""
    if not key.info.flags.get("encrypt"):
        return TdeError(
            "envelope_damaged",
            f"{reason}; the KEK may not encrypt any more, so its check value cannot be compared: either this is damaged, or the KEK is another",
            obj=f"wrapped key under {key.obj}",
            kept="Nothing was decrypted.",
            next_step="Use another keyslot.",
            details={"ckr": ckr} if ckr else {},
        )
    found = (key.kcv(), key.mac_kcv())
    if found == (blob.kek_kcv, blob.mac_kcv):
        return _damaged(key, reason, ckr)
    return TdeError(
        "kek_mismatch",
        f"its check value is {found[0].hex()}; the wrapped key was made under {blob.kek_kcv.hex()}"
        if found[0] != blob.kek_kcv
        else "the KEK is the right one; its companion key is another than the wrapped key was made with",
        obj=key.obj,
        kept="Nothing was decrypted.",
        next_step="Find out whether it is the right token, and what became of the key; another keyslot opens the data key.",
        details={"ckr": ckr} if ckr else {},
    )


def _damaged(key: Kek, reason: str, ckr: str = "") -> TdeError:
    return TdeError(
        "envelope_damaged",
        f"{reason}; the KEK is the right one, so the wrapped key, or what it is bound to, was changed",
        obj=f"wrapped key under {key.obj}",
        kept="Nothing was decrypted.",
        next_step="Restore it from a backup, or use another keyslot.",
        details={"ckr": ckr} if ckr else {},
    )


def kcv(session: Session, kek: KeyRef) -> str:
    """A KEK's check value: AES-ECB of 16 zero bytes, the first 3 in hex.

    :raises TdeError: as :func:`load_kek`; ``key_suspended``.
    """
    return load_kek(session, kek).kcv().hex()
