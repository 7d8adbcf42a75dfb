# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A token brought to the wished state: initialised with label, SO PIN and user PIN, remembered, unlocked.

A kill between any two acts leaves a token that the next run recognises by its flags and finishes.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..common.state import StateDirectory
from .apart import apart
from .cryptoki import CkError
from .errors import ckr_name, error_from_ckr, translated
from .keys import Reader
from .library import LABEL_BYTES, Library, LibraryAccess, load
from .refused import RefusedPins
from .registry import Registry
from .token import (
    TokenInfo,
    TokenSelector,
    check_flags,
    check_pin_length,
    find,
    no_token_in,
    refused,
    session_on,
    token_in,
    tokens,
)

#: What every token of openCryptoki has from the factory (its manual, "Initializing a token"): SO PIN and user PIN.
_OPENCRYPTOKI_FACTORY = (Secret("87654321"), Secret("12345678"))
_PIN_INCORRECT = 0xA0
#: openCryptoki's C_InitToken after a changed SO PIN: with 3.8.1 nobody can log in any more, with 3.23 all is well (both run).
_REINITIALIZES_SINCE = (3, 23)
#: Seconds to wait for the child of a run that was killed (:mod:`.apart`).
LOCK_WAIT = 2.0


@dataclasses.dataclass(frozen=True)
class TokenWish:
    """What a token shall be.

    :param selector: its label names a token that is not there yet; its slot says where that one is initialised.
    :param so_pin: of the security officer, existing or to be set; None where no act of the officer is meant.
    :param pin: the user PIN, to be set or to be verified; None leaves it alone.
    :param unlock_user_pin: set the user PIN anew where it is locked.
    :param force_reinitialize: destroy everything in the token and begin anew.
    :param replace_lost: create the token although the registry names one that does not show.
    """

    library: LibraryAccess
    selector: TokenSelector
    so_pin: Secret | None = None
    pin: Secret | None = None
    unlock_user_pin: bool = False
    force_reinitialize: bool = False
    replace_lost: bool = False
    allow_low_pin_count: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """What is there.

    :param token: the token meant, if it is initialised.
    :param slot: the token to initialise: the free one if ``token`` is None, ``token`` itself if it shall be initialised again.
    :param remembered: the registry names ``token``.
    :param lost: the registry names a token of this label, and it is not this one.
    :param contents: what initialising destroys (:func:`contents`); None if nothing is destroyed.
    :param library_version: of the library.
    """

    token: TokenInfo | None
    slot: TokenInfo | None
    remembered: bool
    lost: bool
    contents: dict[str, t.Any] | None = None
    library_version: tuple[int, int] = (0, 0)


def label_of(wish: TokenWish) -> str | None:
    """The label that the wish names, in the selector or in its URI."""
    return next((uri.token for uri in wish.selector.uris() if uri.token is not None), None)


def has_factory_so_pin(info: TokenInfo) -> bool:
    """Whether the SO PIN is the one that everybody knows: openCryptoki says so by a flag."""
    return info.manufacturer.startswith("IBM") and "so_pin_to_be_changed" in info.flags


def _is_factory(info: TokenInfo, pin: Secret) -> bool:
    return info.manufacturer.startswith("IBM") and pin in _OPENCRYPTOKI_FACTORY


def refuse_factory_pin(info: TokenInfo, pin: Secret, what: str) -> None:
    """Refuse to set a PIN that every token of its kind has from the factory; openCryptoki itself refuses some of them.

    :param what: the PIN in words.
    :raises TdeError: ``pin_is_factory``.
    """
    if _is_factory(info, pin):
        raise TdeError("pin_is_factory", f"the {what} is one that openCryptoki's tokens have from the factory", obj=str(info))


def inspect(library: Library, wish: TokenWish, state: StateDirectory) -> Found:
    """Read what is there. With ``force_reinitialize`` this logs in with ``pin``, to count what would be lost.

    :raises TdeError: as :func:`.token.find`; ``token_initialized``, ``token_slot_absent``, ``token_ambiguous`` where it is
        not clear which slot is meant; ``invalid_option``.
    """
    registry = Registry(state)
    label = label_of(wish)
    known = registry.names_token(label=label) if label is not None else None
    try:
        token: TokenInfo | None = _locate(library, wish.selector, None if wish.replace_lost else registry)
    except TdeError as exc:
        if exc.code != "token_absent":
            raise
        token = None
    if token is None:
        return Found(None, _free_slot(library, wish, label), remembered=False, lost=known is not None)
    remembered = registry.names_token(label=token.label, serial=token.serial) is not None
    if not wish.force_reinitialize:
        return Found(token, None, remembered, lost=known is not None and not remembered)
    return Found(token, token, remembered, False, contents(library, token, wish, state), library.version)


def _locate(library: Library, selector: TokenSelector, registry: Registry | None) -> TokenInfo:
    """As :func:`.token.find`; a slot beside a label only tells two tokens of that label apart.

    Initialising moves a SoftHSM token to another slot: the same task must find it again.
    """
    if selector.label is None or selector.slot_id is None:
        return find(library, selector, registry)
    try:
        return find(library, dataclasses.replace(selector, slot_id=None), registry)
    except TdeError as exc:
        if exc.code != "token_ambiguous":
            raise
        return find(library, selector, registry)


def _free_slot(library: Library, wish: TokenWish, label: str | None) -> TokenInfo:
    """The token to initialise: the one in the slot named, or the only one that is not initialised."""
    selector = wish.selector
    if not label or len(label.encode()) > LABEL_BYTES or label != label.strip() or not label.isprintable():
        raise TdeError(
            "invalid_option",
            f"a new token needs a label of 1 to {LABEL_BYTES} bytes that neither begins nor ends with a blank",
            obj="option token_label",
        )
    listed = tokens(library)
    for info in listed:
        if info.initialized and info.label == label:
            raise TdeError(
                "token_initialized",
                f"a token of this label is in slot {info.slot_id}, and it is not the one named (serial {info.serial or 'none'})",
                obj=str(selector),
                next_step="Correct token_serial or token_uri, or choose another label.",
            )
    if selector.slot_id is not None:
        listed = [info for info in listed if info.slot_id == selector.slot_id]
        if not listed:
            raise no_token_in(library, selector.slot_id, f"token {label!r}")
        if listed[0].initialized:
            raise TdeError(
                "token_initialized",
                f"slot {selector.slot_id} holds the token {listed[0].label!r}",
                obj=f"token {label!r}",
                next_step="Name another slot, or that token with force_reinitialize if all its keys may go.",
            )
    free = [info for info in listed if not info.initialized]
    if not free:
        raise TdeError("token_slot_absent", "no slot holds a token that is not initialised", obj=f"token {label!r}")
    if len(free) > 1:
        raise TdeError(
            "token_ambiguous",
            "several slots hold tokens that are not initialised: " + ", ".join(str(info.slot_id) for info in free),
            obj=f"token {label!r}",
            next_step="Name slot_id.",
        )
    return free[0]


def contents(library: Library, info: TokenInfo, wish: TokenWish, state: StateDirectory) -> dict[str, t.Any]:
    """What a token holds, as far as it can be seen.

    :returns: ``objects`` (count), ``labels`` (distinct, sorted), ``private_objects_seen`` (False without a working user PIN: then
        there may be more), ``registered_keys`` (what the registry names in it, with the clusters that need them).
    """

    def seen(pin: Secret | None) -> tuple[int, list[str]]:
        user: t.Literal["user"] | None = "user" if pin else None
        with session_on(library, info, state, user=user, pin=pin, rw=False, allow_low=False) as session:
            reader = Reader(session, ("label",))
            with translated(str(info)):
                handles = reader.search({})
                objects = [reader.read(handle) for handle in handles]
            return len(handles), sorted({(raw["label"] or b"").decode("utf-8", "replace") for raw in objects if raw})

    private = False
    if wish.pin and "user_pin_initialized" in info.flags:
        try:
            count, labels = seen(wish.pin)
            private = True
        except TdeError as exc:
            # The PIN of the wish is the one to be set; the present one may be lost, which is a reason to begin anew.
            if exc.code not in ("pin_refused", "pin_refused_before", "pin_locked", "pin_tries_low"):
                raise
    if not private:
        count, labels = seen(None)
    entries = Registry(state).keys()
    registered = [
        {"label": entry["label"], "id": entry["id"], "cluster": entry["cluster"]}
        for entry in entries
        if Registry.is_in(entry, info.label, info.serial)
    ]
    return {"objects": count, "labels": labels, "private_objects_seen": private, "registered_keys": registered}


def decide(found: Found, wish: TokenWish) -> Plan:
    """The steps from what is there to the wish."""
    steps: Plan = []
    if found.slot is not None:
        steps += _from_scratch(found, found.slot, wish)
    elif found.token is not None:
        steps += _complete(found.token, wish)
    if found.lost:
        steps.insert(
            0, Step("forget_lost_token", f"token {label_of(wish)!r}", "replace_lost: the registry's token does not show")
        )
    if found.slot is not None or not found.remembered:
        name = label_of(wish) or (found.token.label if found.token else "")
        steps.append(
            Step("remember_token", f"token {name!r}", "a token that does not show must never be taken for one that never was")
        )
    return steps


def _from_scratch(found: Found, slot: TokenInfo, wish: TokenWish) -> Plan:
    label = (found.token.label if found.token else label_of(wish)) or ""
    why = f"slot {slot.slot_id} holds a token that is not initialised"
    if found.contents is not None:
        lost, clusters = found.contents, sorted({key["cluster"] for key in found.contents["registered_keys"] if key["cluster"]})
        why = f"force_reinitialize: DESTROYS {lost['objects']} objects" + (
            "" if lost["private_objects_seen"] else " and all private ones, unseen"
        )
        if clusters:
            why += f", master keys of the clusters {', '.join(clusters)} among them"
    obj = f"token {label!r}"
    steps = [Step("initialize_token", obj, why, {"slot_id": slot.slot_id, "label": label})]
    if has_factory_so_pin(slot):
        steps.append(Step("set_so_pin", obj, "it is the factory's"))
    if wish.pin:
        steps.append(Step("set_user_pin", obj, "it is not set"))
    return steps


def _complete(token: TokenInfo, wish: TokenWish) -> Plan:
    steps, obj = [], f"token {token.label!r}"
    if wish.so_pin and has_factory_so_pin(token):
        steps.append(Step("set_so_pin", obj, "it is the factory's"))
    if wish.pin and wish.so_pin and "user_pin_initialized" not in token.flags:
        steps.append(Step("set_user_pin", obj, "it is not set"))
    if wish.unlock_user_pin and "user_pin_locked" in token.flags:
        steps.append(Step("unlock_user_pin", obj, "it is locked after wrong tries"))
    return steps


def check(found: Found, wish: TokenWish, plan: Plan) -> None:
    """Refuse what would fail or do harm half-way, before the first act.

    :raises TdeError: ``token_reinitialize_unsafe``, ``pin_missing``, ``pin_length``, ``pin_is_factory``, ``pin_locked``,
        ``pin_tries_low``.
    """
    actions = {step.action for step in plan}
    info = found.slot or found.token
    if info is None or not actions & {"initialize_token", "set_so_pin", "set_user_pin", "unlock_user_pin"}:
        return
    unsafe = info.manufacturer.startswith("IBM") and not has_factory_so_pin(info) and found.library_version < _REINITIALIZES_SINCE
    if "initialize_token" in actions and unsafe:
        raise TdeError(
            "token_reinitialize_unsafe",
            "openCryptoki {}.{} (seen with 3.8, not with 3.23) initialises a token whose SO PIN was changed so that nobody can log in "
            "any more".format(*found.library_version),
            obj=str(info),
            next_step="End the programs that use it and pkcsslotd, move the token's folder (in /var/lib/opencryptoki) aside, remove its "
            "shared memory (/dev/shm/var.lib.opencryptoki.<folder>), start pkcsslotd, and run again without force_reinitialize: the "
            "token is then as from the factory.",
        )
    if not wish.so_pin:
        raise TdeError(
            "pin_missing", "needs the SO PIN for: " + ", ".join(sorted(actions)), obj=str(info), next_step="Give so_pin."
        )
    check_pin_length(info, wish.so_pin, "SO PIN")
    setting = [(wish.so_pin, "SO PIN")] if "set_so_pin" in actions else []
    if actions & {"set_user_pin", "unlock_user_pin"}:
        if not wish.pin:
            raise TdeError("pin_missing", "needs the user PIN that shall be set", obj=str(info), next_step="Give pin.")
        check_pin_length(info, wish.pin, "user PIN")
        setting.append((wish.pin, "user PIN"))
    for pin, what in setting:
        refuse_factory_pin(info, pin, what)
    # A free SoftHSM slot says SO_PIN_LOCKED; before the first initialising the flag means nothing there.
    if info.initialized or has_factory_so_pin(info):
        check_flags(info, "so", wish.allow_low_pin_count)


def verify(library: Library, wish: TokenWish, token: TokenInfo, state: StateDirectory) -> None:
    """Log in once with the user PIN, if one is given.

    :raises TdeError: as :func:`.token.open_session`.
    """
    if wish.pin:
        with session_on(library, token, state, user="user", pin=wish.pin, rw=False, allow_low=wish.allow_low_pin_count):
            pass


@dataclasses.dataclass
class Outcome:
    """What :func:`ensure` did, or would do.

    :param before: the token before, None if there was none; :param after: None in check mode where it does not exist yet.
    :param lost: what initialising destroyed, or would.
    """

    plan: Plan
    before: TokenInfo | None
    after: TokenInfo | None
    lost: dict[str, t.Any] | None
    warnings: list[str]


def ensure(wish: TokenWish, state: StateDirectory, *, check_mode: bool = False) -> Outcome:
    """Bring a token to the wished state.

    The user PIN, where one is given, is verified by one login, in check mode too: one host a token does so before a fleet works with it.

    :raises TdeError: as :func:`inspect`, :func:`check` and :func:`verify`.
    """
    if check_mode:
        return _ensure(wish, state, act=False)
    with state.locked(LOCK_WAIT):
        return _ensure(wish, state, act=True)


def _ensure(wish: TokenWish, state: StateDirectory, *, act: bool) -> Outcome:
    library = load(wish.library)
    found = inspect(library, wish, state)
    plan = decide(found, wish)
    check(found, wish, plan)
    sets_pin = any(step.action in ("initialize_token", "set_user_pin", "unlock_user_pin") for step in plan)
    if found.token and not sets_pin:
        verify(library, wish, found.token, state)
    after = found.token
    if act and plan:
        after = _Runner(library, wish, state, found).run(plan)
        if sets_pin:
            verify(library, wish, after, state)
    warnings = []
    if after and has_factory_so_pin(after) and not (plan and not act):
        warnings.append(f"The SO PIN of {after} is the factory's, which everybody knows. Give so_pin to replace it.")
    if after and wish.pin and _is_factory(after, wish.pin):
        warnings.append(
            f"The user PIN of {after} is one that openCryptoki's tokens have from the factory. Change it (hsm.tde.pkcs11_pin)."
        )
    return Outcome(plan, found.token, after, found.contents, warnings)


class _Runner:
    """Carries a plan out on one token."""

    def __init__(self, library: Library, wish: TokenWish, state: StateDirectory, found: Found) -> None:
        self._library, self._wish, self._state, self._found = library, wish, state, found
        self._registry, self._refused, self._journal = Registry(state), RefusedPins(state), Journal(state.journal)
        self._token = found.token or t.cast(TokenInfo, found.slot)

    def run(self, plan: Plan) -> TokenInfo:
        planning.run(
            plan,
            {
                "forget_lost_token": self._forget_lost,
                "initialize_token": self._initialize,
                "set_so_pin": self._set_so_pin,
                "set_user_pin": self._set_user_pin,
                "unlock_user_pin": self._set_user_pin,
                "remember_token": self._remember,
            },
            self._record,
        )
        return self._token

    def _record(self, step: Step) -> None:
        self._journal.append(step.action, step.obj, serial=self._token.serial, library=self._library.path)

    def _again(self) -> None:
        """Read the token anew: its flags changed."""
        self._token = token_in(self._library, self._token.slot_id)

    def _initialized(self, info: TokenInfo, label: str) -> TokenInfo:
        """The token just initialised: SoftHSM moves it to another slot."""
        return _locate(self._library, TokenSelector(label, None, info.slot_id), None)

    def _forget_lost(self, step: Step) -> None:
        self._registry.forget_token(label_of(self._wish) or self._token.label)

    def _initialize(self, step: Step) -> None:
        info, label = self._token, step.data["label"]
        pin = _OPENCRYPTOKI_FACTORY[0] if has_factory_so_pin(info) else t.cast(Secret, self._wish.so_pin)
        if self._refused.knows(info.label, info.serial, "so", pin):
            raise TdeError("pin_refused_before", "refused this SO PIN before", obj=str(info), kept="It was not tried again.")

        def act() -> None:
            try:
                self._library.init_token(info.slot_id, pin, label)
            except CkError as exc:
                if exc.rv == _PIN_INCORRECT:
                    raise refused(self._library, info, self._state, "so", pin, ckr_name(exc.rv)) from None
                raise error_from_ckr(ckr_name(exc.rv), str(info)) from None

        apart(self._library, act, str(info))
        if self._found.token:
            self._registry.forget_token(info.label, info.serial)
        for user in ("user", "so"):
            self._refused.forget(info.label, info.serial, user)
        self._token = self._initialized(info, label)

    def _set_so_pin(self, step: Step) -> None:
        factory, pin = _OPENCRYPTOKI_FACTORY[0], t.cast(Secret, self._wish.so_pin)

        def act() -> None:
            with session_on(self._library, self._token, self._state, user="so", pin=factory, rw=True, allow_low=True) as session:
                with translated(str(self._token), kept="The SO PIN is still the factory's."):
                    self._library.set_pin(session.handle, factory, pin)

        apart(self._library, act, str(self._token))
        self._refused.forget(self._token.label, self._token.serial, "so")
        self._again()

    def _set_user_pin(self, step: Step) -> None:
        pin, allow_low = t.cast(Secret, self._wish.pin), self._wish.allow_low_pin_count

        def act() -> None:
            with session_on(
                self._library, self._token, self._state, user="so", pin=self._wish.so_pin, rw=True, allow_low=allow_low
            ) as session:
                self._refused.forget(self._token.label, self._token.serial, "user")
                with translated(str(self._token), kept="The user PIN is as it was."):
                    self._library.init_pin(session.handle, pin)

        apart(self._library, act, str(self._token))
        self._again()

    def _remember(self, step: Step) -> None:
        self._registry.remember_token(self._token.label, self._token.serial, self._library.path)
