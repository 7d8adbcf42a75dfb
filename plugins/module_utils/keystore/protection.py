# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What guards a keyslot, behind one interface. A further protection is one file and one line in :func:`load`."""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory
    from .format import Document, Identity, Keyslot

#: Gives the data key of a keyslot back; called within an opened credential.
Unwrap = t.Callable[["Identity", "Keyslot"], bytes]


class Credential(t.Protocol):
    """What opens keyslots of one protection."""

    @property
    def protection(self) -> str:
        """A name that :func:`load` knows."""

    def words(self) -> str:
        """The credential as messages name it. Never the secret."""


class Slot(Credential, t.Protocol):
    """A wish for a keyslot; also the credential that opens it."""

    @property
    def name(self) -> str:
        """The keyslot's name."""


class Wrapped(t.NamedTuple):
    """What a protection makes of a data key: the keyslot's ``target`` and ``blob``."""

    target: dict[str, str]
    blob: dict[str, t.Any]


class Protection(t.Protocol):
    """One protection; each of its files ends with an object of this shape named ``PROTECTION``."""

    def check(self, slot: Keyslot) -> None:
        """Judge a keyslot that was read, before anything in it is used.

        :raises TdeError: ``keystore_damaged``, ``kdf_parameters_refused``.
        """

    def wrap(self, wish: t.Any, key: bytes, context: bytes, state: StateDirectory) -> Wrapped:
        """Wrap a data key. :param context: authenticated with it."""

    def opened(
        self, credential: t.Any, slots: t.Sequence[Keyslot], state: StateDirectory
    ) -> contextlib.AbstractContextManager[Unwrap]:
        """Use a credential for as many keyslots as there are: one login.

        :param slots: those that it will be used for.
        """

    def candidates(self, slots: t.Sequence[Keyslot], credential: t.Any) -> list[Keyslot]:
        """The keyslots of this protection that a credential may open, the likeliest first."""

    def is_target(self, slot: Keyslot, wish: t.Any) -> bool:
        """Whether a keyslot can be the one wished for, as far as its public facts tell."""


#: What :func:`load` knows. A file may have keyslots of others, from a later version; they are passed over.
NAMES = ("kmip", "passphrase", "token")


def load(name: str) -> Protection:
    """The protection of a name.

    :raises TdeError: ``invalid_option``.
    """
    if name == "kmip":
        from . import kmip

        return kmip.PROTECTION
    if name == "passphrase":
        from . import passphrase

        return passphrase.PROTECTION
    if name == "token":
        from . import token

        return token.PROTECTION
    raise TdeError("invalid_option", "is not a protection that this version knows", obj=f"protection {name}")


@dataclasses.dataclass
class Failure:
    """Why one credential did not open one keyslot (``keyslot`` empty: not any)."""

    credential: str
    keyslot: str
    error: TdeError


Found = t.Tuple["Keyslot", bytes]


def unlock(
    documents: t.Sequence[Document],
    credentials: t.Iterable[Credential],
    state: StateDirectory,
    *,
    eligible: t.Callable[[Keyslot], bool] = lambda slot: True,
) -> list[Found | TdeError]:
    """Open files with credentials: each credential is used once, for all files, and never again after a refusal.

    :param documents: the files; :param eligible: which of their keyslots may be tried.
    :returns: for each file a keyslot and the data key it gave, or the error that says why none did.
    """
    found: dict[int, Found] = {}
    failures: dict[int, list[Failure]] = {number: [] for number in range(len(documents))}
    for credential in credentials:
        protection = load(credential.protection)
        waiting: dict[int, list[Keyslot]] = {}
        for number, document in enumerate(documents):
            slots = protection.candidates([slot for slot in document.keyslots if eligible(slot)], credential)
            if number not in found and slots:
                waiting[number] = slots
        if not waiting:
            continue
        try:
            with protection.opened(credential, [slot for slots in waiting.values() for slot in slots], state) as unwrap:
                for number, slots in waiting.items():
                    for slot in slots:
                        try:
                            found[number] = (slot, unwrap(documents[number].identity, slot))
                            break
                        except TdeError as exc:
                            failures[number].append(Failure(credential.words(), slot.name, exc))
        except TdeError as exc:
            for number in waiting:
                if number not in found:
                    failures[number].append(Failure(credential.words(), "", exc))
    return [
        found[number] if number in found else _why_not(document, failures[number]) for number, document in enumerate(documents)
    ]


def _why_not(document: Document, failures: list[Failure]) -> TdeError:
    slots = ", ".join(f"{slot.name} ({slot.protection})" for slot in document.keyslots)
    if not failures:
        return TdeError(
            "credential_missing",
            f"no credential given fits one of its keyslots: {slots}",
            obj=document.identity.words(),
            next_step="Give the PIN of the token or the passphrase of one of them.",
        )
    # A credential that fits a keyslot which was tampered with says more than one that fits none.
    first = next((each for each in failures if each.error.cause == "damaged"), failures[0])
    others = "".join(f"; {other.credential}: {other.error.code}" for other in failures if other is not first)
    where = f"keyslot {first.keyslot} of {document.identity.words()}" if first.keyslot else document.identity.words()
    return TdeError(
        first.error.code,
        f"{first.error.obj + ': ' if first.error.obj else ''}{first.error.message}{others}",
        obj=where,
        kept=first.error.kept,
        next_step=first.error.next_step,
        details={
            **first.error.details,
            "tried": [
                {"credential": each.credential, "keyslot": each.keyslot, "error_code": each.error.code} for each in failures
            ],
        },
    )
