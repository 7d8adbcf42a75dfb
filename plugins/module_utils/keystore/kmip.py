# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Protection ``kmip``: a KEK at an external key management service.

The keyslot names the service, the KEK's name, id and check value, and whether the KEK leaves the server for its use. The
servers' addresses, the authority that they are believed from and the client's certificate stand in the cluster's record,
which is root's own: whoever can write the store must not choose whom root trusts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError
from ..kmip import kek
from ..kmip.access import KmipAccess
from ..kmip.client import Client
from .format import Identity, Keyslot, damaged
from .protection import Unwrap, Wrapped

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory

#: What a keyslot says about its KEK.
TARGET = ("kmip_service", "kek_label", "kek_id", "kek_kcv", "kek_leaves_server")


@dataclasses.dataclass(frozen=True)
class KmipCredential:
    """A service, and this host's certificate for it, that may open any keyslot of this protection."""

    access: KmipAccess
    protection: t.ClassVar[str] = "kmip"

    def words(self) -> str:
        return self.access.words()


@dataclasses.dataclass(frozen=True)
class KmipSlot:
    """A keyslot under a KEK at a KMIP service. :param name: the keyslot's."""

    name: str
    access: KmipAccess
    kek: kek.KekRef
    protection: t.ClassVar[str] = "kmip"

    def words(self) -> str:
        return f"{self.access.words()} for keyslot {self.name}"


def _facts(blob: t.Mapping[str, t.Any]) -> dict[str, str]:
    return {
        **{name: blob[name] for name in ("kek_label", "kek_id", "kek_kcv")},
        "kek_leaves_server": "no" if blob["mechanism"] == kek.BY_SERVER else "yes",
    }


class _Kmip:
    def check(self, slot: Keyslot) -> None:
        try:
            kek.check(dict(slot.blob))
        except TdeError as exc:
            code = "keystore_newer" if exc.code == "envelope_newer" else "keystore_damaged"
            raise damaged(f"keyslot {slot.name}: {exc.message}", code) from None
        if set(slot.target) != set(TARGET) or any(slot.target[name] != value for name, value in _facts(slot.blob).items()):
            raise damaged(f"keyslot {slot.name} does not name the KEK of its wrapped key")

    def wrap(self, wish: KmipSlot, key: bytes, context: bytes, state: StateDirectory) -> Wrapped:
        with Client(wish.access) as client:
            blob = kek.wrap(client, wish.kek, key, context)
        return Wrapped({"kmip_service": wish.access.service, **_facts(blob)}, blob)

    @contextlib.contextmanager
    def opened(
        self, credential: KmipCredential | KmipSlot, slots: t.Sequence[Keyslot], state: StateDirectory
    ) -> t.Iterator[Unwrap]:
        with Client(credential.access) as client:

            def unwrap(identity: Identity, slot: Keyslot) -> bytes:
                try:
                    return kek.unwrap(client, slot.blob, identity.context(slot.uid))
                except TdeError as exc:
                    if exc.code == "envelope_damaged":
                        raise TdeError(
                            "keyslot_foreign", exc.message, obj=exc.obj, next_step=exc.next_step, details=exc.details
                        ) from None
                    raise

            yield unwrap

    def candidates(self, slots: t.Sequence[Keyslot], credential: KmipCredential | KmipSlot) -> list[Keyslot]:
        own = [slot for slot in slots if slot.protection == "kmip"]
        # A replica of the service may go by another name here; tried if nothing fits better.
        own = [slot for slot in own if slot.target["kmip_service"] == credential.access.service] or own
        if isinstance(credential, KmipSlot):
            own.sort(key=lambda slot: (slot.name != credential.name, slot.target["kek_id"] != credential.kek.id))
        return own

    def is_target(self, slot: Keyslot, wish: KmipSlot) -> bool:
        named = (slot.target.get("kmip_service"), slot.target.get("kek_label"), slot.target.get("kek_id"))
        return slot.protection == "kmip" and named == (wish.access.service, *wish.kek)


PROTECTION = _Kmip()
