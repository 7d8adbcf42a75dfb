# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Protection ``token``: a KEK that never leaves a PKCS#11 token.

The keyslot names the token's label and serial and the KEK's label, id and check value, nothing else: where the library
lies and where the PIN comes from is for the caller to know, not for whoever can write the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError
from ..pkcs11 import blob, envelope
from ..pkcs11.keys import KeyRef
from ..pkcs11.registry import same_serial
from ..pkcs11.token import TokenAccess, open_session
from .format import Identity, Keyslot, damaged
from .protection import Unwrap, Wrapped

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory

#: What a keyslot says about its KEK.
TARGET = ("token_label", "token_serial", "kek_label", "kek_id", "kek_kcv")


@dataclasses.dataclass(frozen=True)
class TokenCredential:
    """A token, with its PIN, that may open any keyslot of this protection."""

    access: TokenAccess
    protection: t.ClassVar[str] = "token"

    def words(self) -> str:
        return str(self.access.selector)


@dataclasses.dataclass(frozen=True)
class TokenSlot:
    """A keyslot under a KEK in a token. :param name: the keyslot's."""

    name: str
    access: TokenAccess
    kek: KeyRef
    protection: t.ClassVar[str] = "token"

    def words(self) -> str:
        return f"{self.access.selector} for keyslot {self.name}"


def _kek(slot: Keyslot) -> KeyRef:
    return KeyRef(slot.target["kek_label"], bytes.fromhex(slot.target["kek_id"]))


def _kek_facts(wrapped: blob.Blob) -> dict[str, str]:
    return {"kek_label": wrapped.kek_label, "kek_id": wrapped.kek_id.hex(), "kek_kcv": wrapped.kek_kcv.hex()}


def _named_token(access: TokenAccess) -> tuple[str | None, str | None]:
    uris = access.selector.uris()
    label = next((uri.token for uri in uris if uri.token is not None), None)
    return label, next((uri.serial for uri in uris if uri.serial is not None), None)


def _on_token(slot: Keyslot, access: TokenAccess) -> bool:
    label, serial = _named_token(access)
    return label in (None, slot.target["token_label"]) and (serial is None or same_serial(serial, slot.target["token_serial"]))


class _Token:
    def check(self, slot: Keyslot) -> None:
        try:
            wrapped = blob.parse(slot.blob)
        except TdeError as exc:
            code = "keystore_newer" if exc.code == "envelope_newer" else "keystore_damaged"
            raise damaged(f"keyslot {slot.name}: {exc.message}", code) from None
        if set(slot.target) != set(TARGET) or any(slot.target[name] != value for name, value in _kek_facts(wrapped).items()):
            raise damaged(f"keyslot {slot.name} does not name the KEK of its wrapped key")

    def wrap(self, wish: TokenSlot, key: bytes, context: bytes, state: StateDirectory) -> Wrapped:
        with open_session(wish.access, state) as session:
            wrapped = envelope.wrap(session, wish.kek, key, context)
        token = {"token_label": session.token.label, "token_serial": session.token.serial}
        return Wrapped({**token, **_kek_facts(blob.parse(wrapped))}, wrapped)

    @contextlib.contextmanager
    def opened(
        self, credential: TokenCredential | TokenSlot, slots: t.Sequence[Keyslot], state: StateDirectory
    ) -> t.Iterator[Unwrap]:
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(open_session(credential.access, state))
            except TdeError as exc:
                if exc.code == "token_absent" and any(_on_token(slot, credential.access) for slot in slots):
                    raise TdeError(
                        "token_unreachable",
                        f"keyslot {slots[0].name} names it, and the library does not list it",
                        obj=str(credential.access.selector),
                        kept="Nothing was created in its place.",
                        next_step="Mount the token's folder, plug the device in or start its service.",
                    ) from None
                raise

            def unwrap(identity: Identity, slot: Keyslot) -> bytes:
                try:
                    return envelope.unwrap(session, dict(slot.blob), identity.context(slot.uid))
                except TdeError as exc:
                    if exc.code == "envelope_damaged":
                        raise TdeError(
                            "keyslot_foreign", exc.message, obj=exc.obj, next_step=exc.next_step, details=exc.details
                        ) from None
                    raise

            yield unwrap

    def candidates(self, slots: t.Sequence[Keyslot], credential: TokenCredential | TokenSlot) -> list[Keyslot]:
        own = [slot for slot in slots if slot.protection == "token"]
        # A copy of the KEK may lie in a token of another name (a standby's, a member of a group); tried if nothing fits better.
        own = [slot for slot in own if _on_token(slot, credential.access)] or own
        if isinstance(credential, TokenSlot):
            own.sort(key=lambda slot: (slot.name != credential.name, _kek(slot) != credential.kek))
        return own

    def is_target(self, slot: Keyslot, wish: TokenSlot) -> bool:
        return slot.protection == "token" and _kek(slot) == wish.kek and _on_token(slot, wish.access)


PROTECTION = _Token()
