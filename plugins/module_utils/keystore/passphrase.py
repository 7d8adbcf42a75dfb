# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Protection ``passphrase``: a KEK derived by scrypt (PBKDF2 where FIPS rules), verified before it is used.

The verifier tells a wrong passphrase from a keyslot that was changed: it depends on the passphrase, the salt and the
parameters only, so it still agrees when the wrapped key or its context does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import secrets
import typing as t

from ..common.check import is_int
from ..common.errors import TdeError
from ..common.secret import Secret
from .format import Identity, Keyslot, b64, damaged, hkdf, unb64
from .protection import Unwrap, Wrapped

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory

#: Characters of a passphrase for a new keyslot. The file can be tried offline by whoever copies it.
MIN_CHARACTERS = 12
#: Bytes; a bound on what is hashed.
MAX_BYTES = 1024

_SALT = 16  # bytes; NIST SP 800-132, section 5.1 asks for 128 bits
_IV = 12  # bytes; NIST SP 800-38D, section 8.2
_CIPHER = "AES-256-GCM"


@dataclasses.dataclass(frozen=True)
class Scrypt:
    """scrypt's cost (RFC 7914). The default takes 128 MiB and about 0.4 s (OWASP's first choice: N = 2^17, r = 8, p = 1).

    :param log_n: N is 2 to the power of it; memory is 128 * N * r bytes.
    """

    log_n: int = 17
    r: int = 8
    p: int = 1

    name = "scrypt"

    def fields(self) -> dict[str, int]:
        """The parameters as a keyslot holds them."""
        return {"log_n": self.log_n, "r": self.r, "p": self.p}

    def sound(self) -> bool:
        """Whether the parameters are within the bounds: at most 256 MiB, and eight times the default's work."""
        if not (10 <= self.log_n <= 20 and 1 <= self.r <= 32 and 1 <= self.p <= 16):
            return False
        return (self.r << self.log_n) * 128 <= 256 << 20 and (self.r << self.log_n) * self.p <= 8 * (8 << 17)

    def derive(self, passphrase: bytes, salt: bytes) -> bytes:
        """32 bytes. :raises UnsupportedAlgorithm, MemoryError: handled by the caller."""
        from cryptography.hazmat.primitives.kdf import scrypt

        return scrypt.Scrypt(salt=salt, length=32, n=1 << self.log_n, r=self.r, p=self.p).derive(passphrase)


@dataclasses.dataclass(frozen=True)
class Pbkdf2:
    """PBKDF2-HMAC-SHA256 (RFC 8018), for hosts where scrypt may not run.

    :param iterations: OWASP asks for 600,000; a million takes 0.1 to 0.5 s.
    """

    iterations: int = 1_000_000

    name = "pbkdf2-hmac-sha256"

    def fields(self) -> dict[str, int]:
        """The parameters as a keyslot holds them."""
        return {"iterations": self.iterations}

    def sound(self) -> bool:
        """Whether the parameters are within the bounds (the least of NIST SP 800-132; ten times the default)."""
        return 1000 <= self.iterations <= 10_000_000

    def derive(self, passphrase: bytes, salt: bytes) -> bytes:
        """32 bytes."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf import pbkdf2

        return pbkdf2.PBKDF2HMAC(hashes.SHA256(), 32, salt, self.iterations).derive(passphrase)


Kdf: t.TypeAlias = Scrypt | Pbkdf2
_KDFS: dict[str, t.Callable[..., Kdf]] = {Scrypt.name: Scrypt, Pbkdf2.name: Pbkdf2}


@dataclasses.dataclass(frozen=True)
class PassphraseCredential:
    """A passphrase that may open any keyslot of this protection."""

    passphrase: Secret
    protection: t.ClassVar[str] = "passphrase"

    def words(self) -> str:
        return "passphrase"


@dataclasses.dataclass(frozen=True)
class PassphraseSlot:
    """A keyslot under a passphrase.

    :param name: the keyslot's; :param passphrase: UTF-8 as it was given, nothing is normalised.
    :param kdf: how a new keyslot derives its KEK; None for what this host can do best.
    """

    name: str
    passphrase: Secret
    kdf: Kdf | None = None
    protection: t.ClassVar[str] = "passphrase"

    def words(self) -> str:
        return f"passphrase of keyslot {self.name}"


def default_kdf() -> Kdf:
    """scrypt, or PBKDF2 where FIPS rules: the kernel says so, or OpenSSL has no scrypt."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        with open("/proc/sys/crypto/fips_enabled", encoding="ascii") as handle:
            if handle.read().strip() == "1":
                return Pbkdf2()
    except OSError:
        pass  # the kernel has no such mode
    try:
        Scrypt(log_n=10).derive(b"", bytes(_SALT))
    except UnsupportedAlgorithm:
        return Pbkdf2()
    return Scrypt()


def _derive(kdf: Kdf, passphrase: Secret, salt: bytes) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return kdf.derive(passphrase.reveal(), salt)
    except UnsupportedAlgorithm:
        raise TdeError(
            "kdf_unsupported",
            f"this host's OpenSSL does not run {kdf.name}",
            next_step="Open it with another keyslot, or on a host without FIPS mode, and add a keyslot under PBKDF2.",
        ) from None
    except MemoryError:
        raise TdeError("kdf_unsupported", f"not enough memory for {kdf.name} with {kdf.fields()}") from None


def _verifier(kek: bytes) -> str:
    return b64(hkdf(kek, b"hsm-tde 1 passphrase verifier"))


def _cipher(kek: bytes) -> t.Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(hkdf(kek, b"hsm-tde 1 passphrase wrap"))


def _kdf(slot: Keyslot) -> Kdf:
    blob = slot.blob
    make = _KDFS.get(blob.get("kdf", ""))
    if make is None:
        raise damaged(f"keyslot {slot.name} has no key derivation that this version knows")
    common = {"kdf", "salt", "verifier", "cipher", "iv", "ciphertext"}
    own = set(make().fields())
    if set(blob) != common | own or slot.target or blob["cipher"] != _CIPHER or any(not is_int(blob[name]) for name in own):
        raise damaged(f"keyslot {slot.name} has missing or unknown fields")
    kdf = make(**{name: blob[name] for name in own})
    if not kdf.sound():
        raise damaged(f"keyslot {slot.name} asks for {kdf.name} with {kdf.fields()}", "kdf_parameters_refused")
    return kdf


def check_length(wish: PassphraseSlot) -> None:
    """Refuse a passphrase that no new keyslot may have.

    :raises TdeError: ``passphrase_length``.
    """
    if len(wish.passphrase.text()) < MIN_CHARACTERS or len(wish.passphrase) > MAX_BYTES:
        raise TdeError(
            "passphrase_length",
            f"must have at least {MIN_CHARACTERS} characters and at most {MAX_BYTES} bytes",
            obj=wish.words(),
            next_step="Choose one that cannot be guessed: whoever copies the file can try offline.",
        )


class _Passphrase:
    def check(self, slot: Keyslot) -> None:
        _kdf(slot)
        if len(unb64(slot.blob["salt"], "salt")) != _SALT or len(unb64(slot.blob["iv"], "iv")) != _IV:
            raise damaged(f"keyslot {slot.name} has a salt or iv of the wrong length")
        unb64(slot.blob["ciphertext"], "ciphertext")
        unb64(slot.blob["verifier"], "verifier")

    def wrap(self, wish: PassphraseSlot, key: bytes, context: bytes, state: StateDirectory) -> Wrapped:
        check_length(wish)
        kdf = wish.kdf or default_kdf()
        if not kdf.sound():
            raise TdeError("invalid_option", f"{kdf.name} with {kdf.fields()} is outside the bounds", obj=wish.words())
        salt, iv = secrets.token_bytes(_SALT), secrets.token_bytes(_IV)
        kek = _derive(kdf, wish.passphrase, salt)
        blob = {
            "kdf": kdf.name,
            **kdf.fields(),
            "salt": b64(salt),
            "verifier": _verifier(kek),
            "cipher": _CIPHER,
            "iv": b64(iv),
            "ciphertext": b64(_cipher(kek).encrypt(iv, key, context)),
        }
        return Wrapped({}, blob)

    @contextlib.contextmanager
    def opened(
        self, credential: PassphraseCredential | PassphraseSlot, slots: t.Sequence[Keyslot], state: StateDirectory
    ) -> t.Iterator[Unwrap]:
        def unwrap(identity: Identity, slot: Keyslot) -> bytes:
            from cryptography.exceptions import InvalidTag

            kek = _derive(_kdf(slot), credential.passphrase, unb64(slot.blob["salt"], "salt"))
            if not hmac.compare_digest(_verifier(kek), slot.blob["verifier"]):
                raise TdeError("passphrase_refused", "the passphrase does not open it", next_step="Correct the passphrase.")
            try:
                iv, ciphertext = unb64(slot.blob["iv"], "iv"), unb64(slot.blob["ciphertext"], "ciphertext")
                return t.cast(bytes, _cipher(kek).decrypt(iv, ciphertext, identity.context(slot.uid)))
            except InvalidTag:
                raise damaged(
                    "the passphrase is right, and the wrapped key was made for another keyslot or was changed", "keyslot_foreign"
                ) from None

        yield unwrap

    def candidates(self, slots: t.Sequence[Keyslot], credential: PassphraseCredential | PassphraseSlot) -> list[Keyslot]:
        own = [slot for slot in slots if slot.protection == "passphrase"]
        if isinstance(credential, PassphraseSlot):
            own.sort(key=lambda slot: slot.name != credential.name)
        return own

    def is_target(self, slot: Keyslot, wish: PassphraseSlot) -> bool:
        return slot.protection == "passphrase"


PROTECTION = _Passphrase()
