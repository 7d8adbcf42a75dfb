# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A user's own secret, wrapped to a file: the internal KMS for pgcrypto users and the like.

The keyslots hold a random file key and the file key encrypts the secret, so that nothing in the file is a function of
the secret alone: there is no check value by which a weak one could be guessed.
"""

from __future__ import annotations

import os
import secrets
import typing as t

from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.secret import Secret
from ..common.state import NAME, StateDirectory
from . import recorded
from .format import SECRET, Document, Identity, Keyslot, b64, damaged, hkdf, unb64
from .keyfile import KeyFile
from .protection import Credential, Slot
from .sealed import Opened
from .store import document_facts

#: Bytes of a secret; four thirds of it, in base64, stand in a file of at most 1 MiB.
MAX_SECRET = 64 << 10
_FILE_KEY = 32
_IV = 12  # bytes; NIST SP 800-38D, section 8.2
_CIPHER = "AES-256-GCM"


def _cipher(key: bytes, identity: Identity) -> t.Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(hkdf(key, identity.label("payload")))


class SecretFile:
    """A wrapped secret. Making the object touches nothing.

    :param path: absolute; its folder and all parents root's own. :param state: for journal and lock.
    :param name: bound into the file, so that one secret cannot be put in another's place; the file's name if None.
    """

    def __init__(self, state: StateDirectory, path: str, name: str | None = None) -> None:
        self.path = os.path.normpath(path)
        self.state = state
        self.name = os.path.basename(self.path) if name is None else name
        if not os.path.isabs(path) or not NAME.fullmatch(self.name):
            raise TdeError(
                "invalid_option",
                "the path must be absolute, and its last part 1 to 63 of A-Z a-z 0-9 _ . - (or give name)",
                obj=f"wrapped secret {path!r}",
            )
        self.file = KeyFile(state, self.path, Identity(SECRET, "", self.name), os.path.join(state.path, "secrets.lock"))

    def create(
        self, secret: Secret, slots: t.Sequence[Slot], *, replace: Document | None = None, replace_lost: bool = False
    ) -> Document:
        """Wrap a secret; when this returns, every keyslot has opened the file.

        :param replace: the document that holds another secret now; a new file key is made, so that who opened the
            old one with a keyslot that is gone meanwhile cannot open the new one.
        :param replace_lost: see :meth:`KeyFile.create`.
        :raises TdeError: ``keystore_too_large`` and as :meth:`KeyFile.create`.
        """
        if not 0 < len(secret) <= MAX_SECRET:
            raise TdeError(
                "keystore_too_large", f"has {len(secret)} bytes; 1 to {MAX_SECRET} can be wrapped", obj=f"secret {self.name}"
            )
        self.state.create()
        key, iv, identity = secrets.token_bytes(_FILE_KEY), secrets.token_bytes(_IV), self.file.identity
        ciphertext = _cipher(key, identity).encrypt(iv, secret.reveal(), identity.label("payload"))
        payload = {"cipher": _CIPHER, "iv": b64(iv), "ciphertext": b64(ciphertext)}
        return self.file.create(key, slots, check=None, payload=payload, replace=replace, replace_lost=replace_lost)

    def open(self, credentials: t.Sequence[Credential]) -> tuple[Opened, Secret]:
        """Open the file and decrypt the secret.

        :raises TdeError: as :func:`sealed.open_files`.
        """
        from cryptography.exceptions import InvalidTag

        opened = self.file.open(credentials)
        payload = opened.document.payload or {}
        iv = unb64(payload.get("iv"), "payload")
        if payload.get("cipher") != _CIPHER or len(iv) != _IV:
            raise damaged("its payload is of another cipher than this version knows")
        try:
            plain = _cipher(opened.key, self.file.identity).decrypt(
                iv, unb64(payload.get("ciphertext"), "payload"), self.file.identity.label("payload")
            )
        except InvalidTag:
            raise damaged("its payload does not decrypt under the key of its keyslots") from None
        return opened, Secret(plain)


def describe_secrets(state: StateDirectory) -> list[dict[str, t.Any]]:
    """Public facts of every wrapped secret that this host's journal knows: ``path`` and what ``KeyStore.describe`` tells of a key.

    :raises TdeError: ``keystore_unreachable`` if one does not show: then nobody can say which KEKs are needed.
    """
    known: dict[str, str] = {}
    for entry in Journal(state.journal).entries():
        if entry["result"] == recorded.DONE and entry["detail"].get("file_kind") == SECRET and "file_digest" in entry["detail"]:
            known[entry["detail"]["file_path"]] = entry["key_id"]
    described = []
    for path, name in sorted(known.items()):
        judged = SecretFile(state, path, name).file.judged()
        described.append({"path": path, **document_facts(judged.document, judged.verdict)})
    return described


def unwrap_secret(path: str, credentials: t.Sequence[Credential], state: StateDirectory, name: str | None = None) -> Secret:
    """A wrapped secret for its consumer; see :func:`unwrap`.

    :param name: see :class:`SecretFile`.
    """
    return unwrap(SecretFile(state, path, name), credentials)


def unwrap(file: SecretFile, credentials: t.Sequence[Credential]) -> Secret:
    """A wrapped secret for its consumer; the journal says that it was given out, or refused.

    :raises TdeError: as :meth:`SecretFile.open`.
    """
    try:
        opened, secret = file.open(credentials)
    except TdeError as exc:
        if exc.code != "data_key_absent":
            _note(file, "refused" if exc.cause == "refused" else "failed", error_code=exc.code)
        raise
    note_unwrapped(file, opened.slot)
    return secret


def note_unwrapped(file: SecretFile, slot: Keyslot, **facts: str) -> None:
    """Write down that the secret is given out.

    :param slot: the keyslot that opened it; :param facts: where to.
    """
    _note(file, recorded.DONE, keyslot=slot.name, **facts)


def _note(file: SecretFile, result: str, **facts: str) -> None:
    Journal(file.state.journal).append(
        "unwrap_secret",
        file.file.identity.words(),
        result=result,
        key=file.name,
        key_id=file.name,
        **recorded.place(file.file.identity, file.path),
        **facts,
    )
