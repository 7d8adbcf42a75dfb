# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Changing a PIN in the token and where it rests, so that a kill at any moment leaves one that opens the token.

Order: the new PIN to ``<file>.new``, C_SetPIN, a login with the new PIN, the rename. Which PIN the token has is found by
logging in: at most two tries, and two only where no wrong try stands in the token's flags.
"""

from __future__ import annotations

import dataclasses
import os

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..common.state import StateDirectory
from . import resting
from .apart import apart
from .cryptoki import CkError
from .errors import ckr_name, error_from_ckr
from .initialize import LOCK_WAIT, refuse_factory_pin
from .library import Library, load
from .refused import RefusedPins
from .registry import Registry
from .resting import Resting
from .token import TokenAccess, TokenInfo, User, check_pin_length, find, session_on, token_in
from .trying import Trying

_WORDS = {"user": "user PIN", "so": "SO PIN"}


@dataclasses.dataclass(frozen=True)
class PinWish:
    """A PIN as it shall be.

    :param access: the token; its ``pin`` is the present PIN, None to take it from ``pin_file``.
    :param user: whose PIN.
    :param pin_file: absolute path of the file where the PIN rests, None if it rests nowhere.
    """

    access: TokenAccess
    user: User
    new_pin: Secret
    pin_file: str | None = None


def candidates(new: Secret, old: Secret | None, rest: Resting, *, clean: bool) -> list[Secret]:
    """The PINs that the token may have, in the order in which they are tried.

    :param old: the present PIN as the caller knows it.
    :param clean: no wrong try stands in the token's flags; otherwise one PIN is all that is tried.
    """
    order: list[Secret | None]
    if rest.coming is not None:
        # A change was interrupted: the token has one of the two at rest.
        order = [rest.coming, rest.settled, old, new]
    elif rest.settled is not None and rest.settled != new:
        order = [old, rest.settled, new]
    else:
        order = [new, old]
    if not clean and rest.coming is None:
        order = [old, *order]
    found: list[Secret] = []
    for pin in order:
        if pin is not None and pin not in found:
            found.append(pin)
    return found[: 2 if clean else 1]


def decide(wish: PinWish, current: Secret, rest: Resting, leftovers: bool) -> Plan:
    """The steps from the PIN that the token has, and what lies at rest, to the wish.

    :param current: the PIN that opened the token.
    :param leftovers: a killed run left temporary files.
    """
    who = f"{_WORDS[wish.user]} of {wish.access.selector}"
    steps: Plan = []
    path = wish.pin_file
    coming, settled = rest
    if path and leftovers:
        steps.append(Step("remove_leftovers", f"PIN file {path}", "a run was killed while it wrote the file"))
    if path and coming is not None and coming != wish.new_pin:
        if coming == current:
            steps.append(
                Step("replace_pin_file", f"PIN file {path}", "an earlier change was interrupted after it reached the token")
            )
            settled = coming
        else:
            steps.append(Step("discard_new_pin_file", f"PIN file {path}.new", "an earlier change did not reach the token"))
        coming = None
    if path and coming is None and (current != wish.new_pin or settled != wish.new_pin):
        steps.append(Step("write_new_pin_file", f"PIN file {path}.new", "both PINs must be at rest while the token changes"))
        coming = wish.new_pin
    if current != wish.new_pin:
        steps.append(Step("set_pin", who, "the token has the former PIN"))
        steps.append(Step("verify_pin", who, "the new PIN is proved before the former one goes"))
    if path and coming is not None:
        steps.append(Step("replace_pin_file", f"PIN file {path}", "the token has the new PIN"))
    return steps


@dataclasses.dataclass
class Outcome:
    """What :func:`change` did, or would do."""

    plan: Plan
    before: TokenInfo
    after: TokenInfo


def change(wish: PinWish, state: StateDirectory, *, check_mode: bool = False, locked: bool = False) -> Outcome:
    """Change a PIN.

    Check mode logs in as well, for it has no other way to know which PIN the token has.

    :param locked: the caller holds the state directory's lock.
    :raises TdeError: as :func:`.token.open_session`; ``pin_is_factory``; ``pin_file_damaged`` and what reading the file raises.
    """
    if wish.pin_file is not None and not os.path.isabs(wish.pin_file):
        raise TdeError("invalid_option", "must be an absolute path", obj=f"option pin_file {wish.pin_file!r}")
    if check_mode or locked:
        return _change(wish, state, act=not check_mode)
    with state.locked(LOCK_WAIT):
        return _change(wish, state, act=True)


def _change(wish: PinWish, state: StateDirectory, *, act: bool) -> Outcome:
    library = load(wish.access.library)
    info = find(library, wish.access.selector, Registry(state))
    check_pin_length(info, wish.new_pin, f"new {_WORDS[wish.user]}")
    refuse_factory_pin(info, wish.new_pin, f"new {_WORDS[wish.user]}")
    rest, leftovers = Resting(None, None), []
    if wish.pin_file:
        rest, leftovers = resting.at_rest(wish.pin_file, of_anybody=True), resting.leftovers(wish.pin_file)
    current = _current(library, info, wish, rest, state)
    plan = decide(wish, current, rest, bool(leftovers))
    if act and plan:
        _Runner(library, info, wish, current, state).run(plan)
    return Outcome(plan, info, token_in(library, info.slot_id))


def _current(library: Library, info: TokenInfo, wish: PinWish, rest: Resting, state: StateDirectory) -> Secret:
    """The PIN that opens the token.

    :raises TdeError: of the last one tried.
    """
    if wish.user == "user" and "login_required" not in info.flags:
        raise TdeError("pkcs11_unsupported", "asks for no login, so it has no PIN to change", obj=str(info))
    if wish.access.pin is None and rest == Resting(None, None):
        raise TdeError("pin_missing", f"the present {_WORDS[wish.user]} was not given", obj=str(info), kept="No try was made.")
    note = Trying(state, info.label, info.serial, wish.user)
    wrong = [word for word in ("count_low", "final_try", "locked") if f"{wish.user}_pin_{word}" in info.flags]
    order = candidates(wish.new_pin, wish.access.pin, rest, clean=not wrong)
    allow_first = wish.access.allow_low_pin_count
    if wrong == ["count_low"]:
        both = candidates(wish.new_pin, wish.access.pin, rest, clean=True)
        others = [pin for pin in both if not note.was(pin)]
        if others and others != both:
            # The wrong try is that of a run of ours, killed between the two.
            order, allow_first = others, True
    if len(order) > 1:
        note.begin(order[0])
    try:
        for number, pin in enumerate(order, 1):
            # After a first wrong try of ours the flags say so; they were clean before.
            allow_low = allow_first or number > 1
            try:
                with session_on(library, info, state, user=wish.user, pin=pin, rw=False, allow_low=allow_low):
                    return pin
            except TdeError as exc:
                if exc.code not in ("pin_refused", "pin_refused_before", "pin_length") or number == len(order):
                    raise
    finally:
        note.end()
    raise AssertionError("at least one PIN is tried")


class _Runner:
    """Carries a plan out."""

    def __init__(self, library: Library, info: TokenInfo, wish: PinWish, current: Secret, state: StateDirectory) -> None:
        self._library, self._info, self._wish, self._current, self._state = library, info, wish, current, state
        self._path = wish.pin_file or ""
        self._journal = Journal(state.journal)

    def run(self, plan: Plan) -> None:
        planning.run(
            plan,
            {
                "remove_leftovers": lambda step: resting.remove_leftovers(self._path),
                "discard_new_pin_file": lambda step: resting.discard_coming(self._path),
                "write_new_pin_file": lambda step: resting.write_coming(self._path, self._wish.new_pin),
                "replace_pin_file": lambda step: resting.settle(self._path),
                "set_pin": self._set_pin,
                "verify_pin": self._verify,
            },
            self._record,
        )

    def _record(self, step: Step) -> None:
        if step.action == "set_pin":
            self._journal.append("change_pin", step.obj, user=self._wish.user, serial=self._info.serial)

    def _set_pin(self, step: Step) -> None:
        wish, info = self._wish, self._info

        def act() -> None:
            with session_on(
                self._library, info, self._state, user=wish.user, pin=self._current, rw=True, allow_low=True
            ) as session:
                # Before the act: killed right after it, the next run must be free to try the new PIN.
                RefusedPins(self._state).forget(info.label, info.serial, wish.user)
                try:
                    self._library.set_pin(session.handle, self._current, wish.new_pin)
                except CkError as exc:
                    error = error_from_ckr(ckr_name(exc.rv), str(info), kept=f"The {_WORDS[wish.user]} is as it was.")
                    if error.cause == "unreachable":
                        # The change may have reached the token: both PINs stay at rest.
                        error.kept = "It is not known whether the change reached the token; run again."
                    elif self._path:
                        resting.discard_coming(self._path)
                    raise error from None

        apart(self._library, act, str(info))

    def _verify(self, step: Step) -> None:
        with session_on(
            self._library, self._info, self._state, user=self._wish.user, pin=self._wish.new_pin, rw=False, allow_low=False
        ):
            pass
