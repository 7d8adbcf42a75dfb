# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tokens: listed with flags in words, found without guessing, opened with one try and no trace left."""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError
from ..common.secret import Secret
from ..common.state import StateDirectory
from .cryptoki import CkError
from .errors import ckr_name, error_from_ckr, translated
from .library import Library, LibraryAccess, load, text
from .opencryptoki import is_opencryptoki
from .refused import RefusedPins
from .registry import Registry, same_serial
from .uri import Uri, parse

if t.TYPE_CHECKING:
    import pkcs11

#: CK_TOKEN_INFO flags in words (pkcs11t.h of PKCS#11 v3.0).
_FLAGS: dict[int, str] = {
    0x00000001: "rng",
    0x00000002: "write_protected",
    0x00000004: "login_required",
    0x00000008: "user_pin_initialized",
    0x00000020: "restore_key_not_needed",
    0x00000040: "clock_on_token",
    0x00000100: "protected_authentication_path",
    0x00000200: "dual_crypto_operations",
    0x00000400: "token_initialized",
    0x00000800: "secondary_authentication",
    0x00010000: "user_pin_count_low",
    0x00020000: "user_pin_final_try",
    0x00040000: "user_pin_locked",
    0x00080000: "user_pin_to_be_changed",
    0x00100000: "so_pin_count_low",
    0x00200000: "so_pin_final_try",
    0x00400000: "so_pin_locked",
    0x00800000: "so_pin_to_be_changed",
    0x01000000: "error_state",
}
#: CKR_ numbers that a wrong PIN answers, and those of a slot that is empty.
_PIN_INCORRECT, _PIN_INVALID = 0xA0, 0xA1
_NO_TOKEN = (0xE0,)

User = t.Literal["user", "so"]


def flag_words(flags: int) -> tuple[str, ...]:
    """Token flags in words; bits without a name in hexadecimal."""
    words = [word for bit, word in _FLAGS.items() if flags & bit]
    rest = flags & ~sum(_FLAGS)
    return (*words, f"0x{rest:x}") if rest else tuple(words)


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """A token as its library shows it now.

    ``pin_min`` and ``pin_max`` are bytes; both 0 where the token does not say (or says nonsense).
    """

    slot_id: int
    slot_description: str
    label: str
    serial: str
    manufacturer: str
    model: str
    flags: tuple[str, ...]
    pin_min: int
    pin_max: int
    hardware_version: str
    firmware_version: str

    @property
    def initialized(self) -> bool:
        return "token_initialized" in self.flags

    def __str__(self) -> str:
        if not self.initialized:
            return f"token in slot {self.slot_id}"
        return f"token {self.label!r} (serial {self.serial or 'none'}, slot {self.slot_id})"

    def public(self) -> dict[str, t.Any]:
        """The facts as a module returns them."""
        return {**dataclasses.asdict(self), "flags": list(self.flags), "initialized": self.initialized}


@dataclasses.dataclass(frozen=True)
class TokenSelector:
    """Which token; every attribute that is given must match.

    :param uri: RFC 7512; its attributes count as if they were given beside the others.
    """

    label: str | None = None
    serial: str | None = None
    slot_id: int | None = None
    uri: str | None = None

    def __str__(self) -> str:
        named = {"label": self.label, "serial": self.serial, "slot": self.slot_id, "URI": self.uri}
        return "token " + (", ".join(f"{name} {value!r}" for name, value in named.items() if value is not None) or "(not named)")

    def uris(self) -> list[Uri]:
        """The selector as URIs, all of which a token must match.

        :raises TdeError: ``uri_invalid``, ``uri_forbidden``.
        """
        own = Uri(token=self.label, serial=self.serial, slot_id=self.slot_id)
        return [own, parse(self.uri)] if self.uri else [own]


@dataclasses.dataclass(frozen=True)
class TokenAccess:
    """How to open a token.

    :param pin: of whoever logs in; None where the token asks for none.
    :param allow_low_pin_count: try although the token says that wrong PINs were entered.
    """

    library: LibraryAccess
    selector: TokenSelector
    pin: Secret | None = None
    allow_low_pin_count: bool = False


@dataclasses.dataclass(frozen=True)
class Session:
    """An open session. Made by :func:`open_session` only.

    :ivar raw: python-pkcs11's session; its ``close`` is not to be called.
    :ivar user: who is logged in: ``user``, ``so`` or None.
    """

    library: Library
    token: TokenInfo
    raw: pkcs11.Session
    user: User | None

    @property
    def handle(self) -> int:
        """The session's handle, for C calls."""
        return t.cast(int, self.raw.handle)  # type: ignore[attr-defined]


def scan(library: Library) -> tuple[list[TokenInfo], dict[int, str]]:
    """Every token, and by slot what the slots that failed answered."""
    found, failed = [], {}
    with translated(f"library {library.path}"):
        slots = library.slots()
    for slot_id in slots:
        try:
            found.append(token_in(library, slot_id))
        except CkError as exc:
            if exc.rv not in _NO_TOKEN:
                failed[slot_id] = ckr_name(exc.rv)
    return found, failed


def token_in(library: Library, slot_id: int) -> TokenInfo:
    """The token in a slot, read anew.

    :raises CkError: what the library answered.
    """
    slot, info = library.slot_info(slot_id), library.token_info(slot_id)
    sane = 0 < info.pin_max < 1 << 16 and info.pin_min <= info.pin_max
    return TokenInfo(
        slot_id=slot_id,
        slot_description=text(slot.description),
        label=text(info.label),
        serial=text(info.serial),
        manufacturer=text(info.manufacturer),
        model=text(info.model),
        flags=flag_words(info.flags),
        pin_min=info.pin_min if sane else 0,
        pin_max=info.pin_max if sane else 0,
        hardware_version=f"{info.hardware_version.major}.{info.hardware_version.minor}",
        firmware_version=f"{info.firmware_version.major}.{info.firmware_version.minor}",
    )


def tokens(library: Library) -> list[TokenInfo]:
    """Every token that answers, initialised or not, by slot id.

    :raises TdeError: the library does not answer at all.
    """
    return sorted(scan(library)[0], key=lambda info: info.slot_id)


def matches(info: TokenInfo, selector: TokenSelector) -> bool:
    """Whether a token is the one meant (RFC 7512 section 2.5: exact, an attribute not given matches all)."""
    for uri in selector.uris():
        if uri.serial is not None and not same_serial(uri.serial, info.serial):
            return False
        wanted = (
            (uri.token, info.label),
            (uri.manufacturer, info.manufacturer),
            (uri.model, info.model),
            (uri.slot_id, info.slot_id),
            (uri.slot_description, info.slot_description),
        )
        if any(want is not None and want != have for want, have in wanted):
            return False
    return True


def find(library: Library, selector: TokenSelector, registry: Registry | None) -> TokenInfo:
    """The one initialised token that is meant.

    :param registry: what must exist; None to create a replacement for what is lost.
    :raises TdeError: ``token_absent``; ``token_slot_absent`` and ``token_slot_empty`` where a slot was named; ``token_unreachable``
        where the registry names it, where another token with its label stands in its place, or where a slot did not answer;
        ``token_ambiguous``; ``invalid_option``.
    """
    uris = selector.uris()
    if all(uri == Uri() for uri in uris):
        raise TdeError(
            "invalid_option", "the token is not named", obj="token", next_step="Give token_label, token_uri or slot_id."
        )
    label = next((uri.token for uri in uris if uri.token is not None), None)
    serial = next((uri.serial for uri in uris if uri.serial is not None), None)
    listed, failed = scan(library)
    found = [info for info in listed if info.initialized and matches(info, selector)]
    if len(found) > 1:
        raise TdeError(
            "token_ambiguous",
            f"{len(found)} tokens match: " + ", ".join(f"slot {info.slot_id} serial {info.serial or 'none'}" for info in found),
            obj=str(selector),
            next_step="Name token_serial or slot_id as well.",
            details={"tokens": [info.public() for info in found]},
        )
    known = registry.names_token(label=label, serial=serial) if registry else None
    if not found:
        if known:
            raise _unreachable(selector, f"the library does not list it; this host has known it since {known['since']}", known)
        if failed:
            raise TdeError(
                "token_unreachable",
                "no token matches, and not every slot answered: "
                + ", ".join(f"slot {slot}: {ckr}" for slot, ckr in failed.items()),
                obj=str(selector),
                details={"slots": {str(slot): ckr for slot, ckr in failed.items()}},
            )
        slot_id = next((uri.slot_id for uri in uris if uri.slot_id is not None), None)
        if slot_id is not None and all(info.slot_id != slot_id for info in listed):
            raise no_token_in(library, slot_id, str(selector))
        raise TdeError(
            "token_absent",
            "no token matches",
            obj=str(selector),
            next_step="Initialise it (hsm.tde.pkcs11_token), or correct its name.",
        )
    if registry and known and serial is None and not registry.names_token(label=label, serial=found[0].serial):
        raise _unreachable(
            selector,
            f"another token with its label (serial {found[0].serial}) is listed; this host knows serial {known['serial']}",
            known,
        )
    return found[0]


def no_token_in(library: Library, slot_id: int, obj: str) -> TdeError:
    """Why a slot that was named has no token: there is no such slot, or it is empty.

    :param obj: the token that was looked for, in words.
    """
    with translated(f"library {library.path}"):
        slots = library.slots(with_token=False)
    if slot_id in slots:
        return TdeError("token_slot_empty", f"slot {slot_id} is there and has no token in it", obj=obj)
    return TdeError(
        "token_slot_absent",
        f"the library lists no slot {slot_id}; it lists {', '.join(map(str, slots)) or 'none'}",
        obj=obj,
        next_step="Correct slot_id. Why openCryptoki does not list a slot that is configured, hsm.tde.opencryptoki_info tells."
        if is_opencryptoki(library.path)
        else "",
    )


def _unreachable(selector: TokenSelector, reason: str, known: t.Mapping[str, str]) -> TdeError:
    return TdeError(
        "token_unreachable",
        reason,
        obj=str(selector),
        kept="Nothing was created in its place.",
        next_step=f"Mount the token's folder, plug the device in or start its service (last seen through {known['library']}); "
        "only if it is lost for good, create another with hsm.tde.pkcs11_token and replace_lost.",
        details={"registry": dict(known)},
    )


def check_pin_length(info: TokenInfo, pin: Secret, what: str) -> None:
    """Refuse a PIN that the token's limits rule out, before a try is spent.

    :param what: the PIN in words (``user PIN``, ``new SO PIN`` …).
    :raises TdeError: ``pin_length``.
    """
    if info.pin_max and not info.pin_min <= len(pin) <= info.pin_max:
        raise TdeError(
            "pin_length",
            f"the {what} has a length outside the token's {info.pin_min} to {info.pin_max} bytes",
            obj=str(info),
            kept="It was not tried; nothing was changed.",
            details={"pin_min": info.pin_min, "pin_max": info.pin_max},
        )


def check_flags(info: TokenInfo, user: User, allow_low: bool) -> None:
    """Refuse to log in where the token's flags say that a try would cost too much.

    :raises TdeError: ``pin_locked``, ``pin_tries_low``.
    """
    who = {"user": "user PIN", "so": "SO PIN"}[user]
    if f"{user}_pin_locked" in info.flags:
        raise TdeError(
            "pin_locked",
            f"the {who} is locked",
            obj=str(info),
            kept="No try was made.",
            next_step="The security officer sets it anew (hsm.tde.pkcs11_token with unlock_user_pin)."
            if user == "user"
            else "The token's maker describes what is left; mostly it must be deleted with all its keys.",
        )
    low = [flag for flag in (f"{user}_pin_final_try", f"{user}_pin_count_low") if flag in info.flags]
    if low and not allow_low:
        raise TdeError(
            "pin_tries_low",
            f"wrong tries of the {who} were made ({', '.join(low)})",
            obj=str(info),
            kept="No try was made.",
            next_step="Make sure that the PIN is right, then allow one try with allow_low_pin_count.",
            details={"flags": list(info.flags)},
        )


@contextlib.contextmanager
def open_session(
    access: TokenAccess, state: StateDirectory, *, user: User | None = "user", rw: bool = False
) -> t.Iterator[Session]:
    """A session on the token, logged in, closed on every exit.

    Flags are read first, a PIN that the token refused before is not tried, and one try is all that is made.
    One session a token at a time: its end logs the process out of the token.

    :param user: who logs in; None reads public objects only.
    :param rw: whether objects may be changed; the security officer's session always is.
    :raises TdeError: what :func:`find` and the library raise; ``pin_missing``, ``pin_length``, ``pin_refused``,
        ``pin_refused_before``, ``pin_locked``, ``pin_tries_low``, ``pin_expired``, ``token_not_ready``.
    """
    library = load(access.library)
    info = find(library, access.selector, Registry(state))
    with session_on(library, info, state, user=user, pin=access.pin, rw=rw, allow_low=access.allow_low_pin_count) as session:
        yield session


@contextlib.contextmanager
def session_on(
    library: Library, info: TokenInfo, state: StateDirectory, *, user: User | None, pin: Secret | None, rw: bool, allow_low: bool
) -> t.Iterator[Session]:
    """As :func:`open_session`, on a token already found; its flags are read anew."""
    with translated(str(info)):
        info = token_in(library, info.slot_id)
    if info.slot_id in library.open_slots:
        raise TdeError("session_open", "this process already has a session on the token", obj=str(info))
    if user == "user" and pin is None and "login_required" not in info.flags:
        user = None
    if user:
        pin = _ready(info, state, user, pin, allow_low)
    library.open_slots.add(info.slot_id)
    try:
        with translated(str(info)):
            slot = next((one for one in library.raw.get_slots(token_present=True) if one.slot_id == info.slot_id), None)
            if slot is None:
                raise TdeError("token_unreachable", "its slot is gone since it was found", obj=str(info), kept="No try was made.")
            raw = slot.get_token().open(rw=rw or user == "so")
        session = Session(library, info, raw, user)
        if user and pin:
            _login(session, state, user, pin)
        yield session
    finally:
        library.open_slots.discard(info.slot_id)
        # The token may be gone by now; what matters has been done or raised.
        with contextlib.suppress(CkError):
            library.close_all_sessions(info.slot_id)


def _ready(info: TokenInfo, state: StateDirectory, user: User, pin: Secret | None, allow_low: bool) -> Secret:
    """The PIN, if one try with it may be made."""
    who = {"user": "user PIN", "so": "SO PIN"}[user]
    if not pin:
        raise TdeError("pin_missing", f"asks for a login and no {who} was given", obj=str(info), kept="No try was made.")
    check_flags(info, user, allow_low=True)
    check_pin_length(info, pin, who)
    if RefusedPins(state).knows(info.label, info.serial, user, pin):
        raise TdeError(
            "pin_refused_before",
            f"refused this {who} before",
            obj=str(info),
            kept="It was not tried again.",
            next_step=f"Give the right PIN. If the token's PIN was set to this one by other means since, remove {state.refused}.",
        )
    check_flags(info, user, allow_low)
    return pin


def _login(session: Session, state: StateDirectory, user: User, pin: Secret) -> None:
    """One try."""
    info = session.token
    try:
        session.library.login(session.handle, user, pin)
    except CkError as exc:
        if exc.rv not in (_PIN_INCORRECT, _PIN_INVALID):
            raise error_from_ckr(ckr_name(exc.rv), str(info)) from None
        raise refused(session.library, info, state, user, pin, ckr_name(exc.rv)) from None


def refused(library: Library, info: TokenInfo, state: StateDirectory, user: User, pin: Secret, ckr: str) -> TdeError:
    """Remember a refused PIN; the error, with what the token's flags say after the try."""
    who = {"user": "user PIN", "so": "SO PIN"}[user]
    kept = "One try is spent; this PIN is not tried again on this host."
    try:
        RefusedPins(state).remember(info.label, info.serial, user, pin)
    except TdeError as exc:
        kept = f"One try is spent, and it could not be remembered ({exc.code}): do not run again with this PIN."
    with contextlib.suppress(CkError):
        info = token_in(library, info.slot_id)
    said = [flag for flag in (f"{user}_pin_{word}" for word in ("count_low", "final_try", "locked")) if flag in info.flags]
    return TdeError(
        "pin_refused",
        f"the {who} is wrong ({ckr}); the token now says {', '.join(said) or 'nothing about tries left'}",
        obj=str(info),
        kept=kept,
        next_step="Give the right PIN.",
        details={"ckr": ckr, "flags": list(info.flags)},
    )
