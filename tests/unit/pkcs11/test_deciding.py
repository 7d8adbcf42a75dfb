# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The pure parts: which token is meant, which PIN is tried first, which steps lead to the wish."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import initialize, options, pins, token
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.initialize import Found, TokenWish
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import Library, LibraryAccess
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.resting import Resting
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, TokenInfo, TokenSelector
from hypothesis import given
from hypothesis import strategies as st

READY = ("login_required", "user_pin_initialized", "token_initialized")
ACCESS = LibraryAccess("/lib.so")


def info(**changes: t.Any) -> TokenInfo:
    facts: dict[str, t.Any] = {
        "slot_id": 1,
        "slot_description": "slot",
        "label": "demo",
        "serial": "a1",
        "manufacturer": "SoftHSM project",
        "model": "SoftHSM v2",
        "flags": READY,
        "pin_min": 4,
        "pin_max": 8,
        "hardware_version": "1.0",
        "firmware_version": "1.0",
    }
    return TokenInfo(**{**facts, **changes})


def test_flags_in_words() -> None:
    assert token.flag_words(0) == ()
    assert token.flag_words(0x40D) == ("rng", "login_required", "user_pin_initialized", "token_initialized")
    assert token.flag_words(0x70000) == ("user_pin_count_low", "user_pin_final_try", "user_pin_locked")
    assert token.flag_words(0x8000_0000_0001) == ("rng", "0x800000000000")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (TokenSelector(label="demo"), True),
        (TokenSelector(label="Demo"), False),
        (TokenSelector(serial="a1"), True),
        (TokenSelector(label="demo", serial="a2"), False),
        (TokenSelector(slot_id=1), True),
        (TokenSelector(slot_id=0), False),
        (TokenSelector(uri="pkcs11:token=demo;model=SoftHSM%20v2"), True),
        (TokenSelector(uri="pkcs11:manufacturer=IBM"), False),
        (TokenSelector(label="other", uri="pkcs11:token=demo"), False),
        (TokenSelector(), True),
    ],
)
def test_all_that_is_named_must_match(selector: TokenSelector, expected: bool) -> None:
    assert token.matches(info(), selector) is expected


@pytest.mark.parametrize(
    ("flags", "allow", "code"),
    [
        ((), False, None),
        (("user_pin_count_low",), False, "pin_tries_low"),
        (("user_pin_count_low",), True, None),
        (("user_pin_final_try",), False, "pin_tries_low"),
        (("user_pin_final_try",), True, None),
        (("user_pin_locked",), True, "pin_locked"),
        (("so_pin_locked", "so_pin_final_try"), False, None),
    ],
)
def test_flags_stop_a_try_before_it_is_spent(flags: tuple[str, ...], allow: bool, code: str | None) -> None:
    if code is None:
        token.check_flags(info(flags=(*READY, *flags)), "user", allow)
        return
    with pytest.raises(TdeError) as caught:
        token.check_flags(info(flags=(*READY, *flags)), "user", allow)
    assert caught.value.code == code
    assert caught.value.kept == "No try was made."


@pytest.mark.parametrize(
    ("pin", "fits"), [("123", False), ("1234", True), ("12345678", True), ("123456789", False), ("ééééé", False)]
)
def test_pin_length_is_in_bytes(pin: str, fits: bool) -> None:
    if fits:
        token.check_pin_length(info(), Secret(pin), "PIN")
    else:
        with pytest.raises(TdeError) as caught:
            token.check_pin_length(info(), Secret(pin), "PIN")
        assert caught.value.code == "pin_length"
        assert pin not in str(caught.value)


def test_a_token_without_sane_limits_has_none() -> None:
    token.check_pin_length(info(pin_min=0, pin_max=0), Secret("x" * 200), "PIN")


# --- which PIN is tried

NEW, OLD, COMING = Secret("new-1"), Secret("old-1"), Secret("coming")


@pytest.mark.parametrize(
    ("old", "rest", "clean", "expected"),
    [
        (OLD, Resting(None, None), True, [NEW, OLD]),
        (OLD, Resting(None, OLD), True, [OLD, NEW]),
        (None, Resting(None, OLD), True, [OLD, NEW]),
        (OLD, Resting(None, NEW), True, [NEW, OLD]),
        (OLD, Resting(NEW, OLD), True, [NEW, OLD]),
        (None, Resting(NEW, None), True, [NEW]),
        (OLD, Resting(COMING, OLD), True, [COMING, OLD]),
        (OLD, Resting(None, None), False, [OLD]),
        (OLD, Resting(None, NEW), False, [OLD]),
        (OLD, Resting(NEW, OLD), False, [NEW]),
        (None, Resting(None, OLD), False, [OLD]),
    ],
)
def test_candidates(old: Secret | None, rest: Resting, clean: bool, expected: list[Secret]) -> None:
    assert pins.candidates(NEW, old, rest, clean=clean) == expected


_pins = st.sampled_from([NEW, OLD, COMING, Secret("fourth")])


@given(_pins, st.none() | _pins, st.none() | _pins, st.none() | _pins, st.booleans())
def test_never_more_than_two_tries_and_one_if_flags_are_low(
    new: Secret, old: Secret, coming: Secret, settled: Secret, clean: bool
) -> None:
    order = pins.candidates(new, old, Resting(coming, settled), clean=clean)
    assert 1 <= len(order) <= (2 if clean else 1)
    if coming is not None:
        assert order[0] == coming


@given(_pins, _pins, st.none() | _pins, st.none() | _pins, st.booleans())
def test_each_plan_ends_with_the_wish_and_never_leaves_the_token_without_its_pin(
    new: Secret, current: Secret, coming: Secret | None, settled: Secret | None, leftovers: bool
) -> None:
    """Acted out on a model: after each step some file at rest holds the token's PIN, if one did before."""
    wish = pins.PinWish(TokenAccess(ACCESS, TokenSelector(label="demo")), "user", new, "/pin")
    plan = pins.decide(wish, current, Resting(coming, settled), leftovers)
    token_pin = current
    known = current in (coming, settled)
    for step in plan:
        if step.action == "write_new_pin_file":
            coming = new
        elif step.action == "discard_new_pin_file":
            coming = None
        elif step.action == "replace_pin_file":
            assert coming is not None
            coming, settled = None, coming
        elif step.action == "set_pin":
            assert coming == new
            token_pin = new
            known = True
        assert not known or token_pin in (coming, settled)
    assert (token_pin, coming, settled) == (new, None, new)
    assert pins.decide(wish, new, Resting(None, new), False) == []


def test_without_a_file_only_the_token_changes() -> None:
    wish = pins.PinWish(TokenAccess(ACCESS, TokenSelector(label="demo")), "so", NEW)
    plan = pins.decide(wish, OLD, Resting(None, None), False)
    assert [step.action for step in plan] == ["set_pin", "verify_pin"]
    assert "SO PIN" in plan[0].obj


# --- a token's steps


def steps(found: Found, **wish: t.Any) -> list[str]:
    given = {"selector": TokenSelector(label="demo"), "so_pin": Secret("12345"), "pin": Secret("54321"), **wish}
    return [step.action for step in initialize.decide(found, TokenWish(ACCESS, **given))]


FREE = info(label="", serial="", flags=("so_pin_locked", "so_pin_to_be_changed"))
IBM = {"manufacturer": "IBM Corp.", "model": "IBM SoftTok", "serial": "123"}


def test_a_token_as_wished_needs_nothing() -> None:
    assert steps(Found(info(), None, remembered=True, lost=False)) == []


def test_a_new_token() -> None:
    assert steps(Found(None, FREE, False, False)) == ["initialize_token", "set_user_pin", "remember_token"]
    assert steps(Found(None, FREE, False, False), pin=None) == ["initialize_token", "remember_token"]


def test_the_factory_so_pin_is_replaced() -> None:
    factory = info(label="IBM OS PKCS#11", flags=("so_pin_to_be_changed", "user_pin_to_be_changed"), **IBM)
    assert steps(Found(None, factory, False, False)) == ["initialize_token", "set_so_pin", "set_user_pin", "remember_token"]


def test_what_a_kill_left_is_finished() -> None:
    half = info(flags=("token_initialized", "so_pin_to_be_changed", "user_pin_to_be_changed"), **IBM)
    assert steps(Found(half, None, False, False)) == ["set_so_pin", "set_user_pin", "remember_token"]
    assert steps(Found(info(flags=("token_initialized",)), None, False, False)) == ["set_user_pin", "remember_token"]
    assert steps(Found(info(), None, False, False)) == ["remember_token"]


def test_unlocking_is_on_request_and_where_needed() -> None:
    locked = Found(info(flags=(*READY, "user_pin_locked")), None, True, False)
    assert steps(locked) == []
    assert steps(locked, unlock_user_pin=True) == ["unlock_user_pin"]
    assert steps(Found(info(), None, True, False), unlock_user_pin=True) == []


def test_a_replacement_forgets_the_lost_one_first() -> None:
    assert steps(Found(None, FREE, False, True), replace_lost=True) == [
        "forget_lost_token",
        "initialize_token",
        "set_user_pin",
        "remember_token",
    ]
    assert steps(Found(info(serial="b2"), None, False, True), replace_lost=True) == ["forget_lost_token", "remember_token"]


def test_destruction_is_in_the_plan_in_words() -> None:
    contents = {
        "objects": 3,
        "labels": ["k"],
        "private_objects_seen": False,
        "registered_keys": [{"label": "hsm-tde.main", "id": "00", "cluster": "main"}],
    }
    found = Found(info(), info(), True, False, contents)
    wish = TokenWish(ACCESS, TokenSelector(label="demo"), Secret("12345"), Secret("54321"), force_reinitialize=True)
    plan = initialize.decide(found, wish)
    assert [step.action for step in plan] == ["initialize_token", "set_user_pin", "remember_token"]
    assert "DESTROYS 3 objects" in plan[0].why
    assert "unseen" in plan[0].why
    assert "main" in plan[0].why


@pytest.mark.parametrize(
    ("found", "wish", "code"),
    [
        (Found(None, FREE, False, False), {"so_pin": None}, "pin_missing"),
        (Found(None, FREE, False, False), {"so_pin": Secret("123")}, "pin_length"),
        (Found(None, FREE, False, False), {"pin": Secret("123456789")}, "pin_length"),
        (
            Found(info(flags=(*READY, "user_pin_locked")), None, True, False),
            {"unlock_user_pin": True, "pin": None},
            "pin_missing",
        ),
        (
            Found(info(flags=(*READY, "user_pin_locked", "so_pin_final_try")), None, True, False),
            {"unlock_user_pin": True},
            "pin_tries_low",
        ),
        (
            Found(info(flags=(*READY, "user_pin_locked", "so_pin_locked")), None, True, False),
            {"unlock_user_pin": True, "allow_low_pin_count": True},
            "pin_locked",
        ),
        # openCryptoki 3.8: initialising again after the SO PIN was changed leaves a token that nobody can open.
        (
            Found(info(**IBM), info(**IBM), True, False, {"objects": 0, "private_objects_seen": True, "registered_keys": []}),
            {},
            "token_reinitialize_unsafe",
        ),
        (Found(None, info(label="IBM OS PKCS#11", flags=(), **IBM), False, False), {}, "token_reinitialize_unsafe"),
        (
            Found(None, info(flags=("so_pin_to_be_changed",), **IBM), False, False),
            {"so_pin": Secret("87654321")},
            "pin_is_factory",
        ),
        (Found(None, info(flags=("so_pin_to_be_changed",), **IBM), False, False), {"pin": Secret("12345678")}, "pin_is_factory"),
    ],
)
def test_refused_before_the_first_act(found: Found, wish: dict[str, t.Any], code: str) -> None:
    full = TokenWish(
        ACCESS, **{"selector": TokenSelector(label="demo"), "so_pin": Secret("12345"), "pin": Secret("54321"), **wish}
    )
    with pytest.raises(TdeError) as caught:
        initialize.check(found, full, initialize.decide(found, full))
    assert caught.value.code == code


def test_an_so_pin_that_nobody_needs_is_not_asked_for() -> None:
    wish = TokenWish(ACCESS, TokenSelector(label="demo"), None, Secret("54321"))
    found = Found(info(), None, False, False)
    initialize.check(found, wish, initialize.decide(found, wish))


# --- options


def test_the_environment_of_a_library_is_text() -> None:
    assert options.library_access({"library": "/lib.so", "library_environment": {"A": 1, "B": "x"}}) == (
        "/lib.so",
        {"A": "1", "B": "x"},
    )
    for bad in (True, 1.5, ["x"], None):
        with pytest.raises(TdeError) as caught:
            options.library_access({"library": "/lib.so", "library_environment": {"A": bad}})
        assert caught.value.code == "invalid_option"
    with pytest.raises(TdeError):
        options.library_access({"library": None})


def test_token_access_takes_the_pin_as_text_only() -> None:
    params = {"library": "/lib.so", "library_environment": {}, "token_label": "demo", "allow_low_pin_count": False}
    assert options.token_access(params, "1234").pin == Secret("1234")
    assert options.token_access(params, None).pin is None
    with pytest.raises(TdeError) as caught:
        options.token_access(params, 1234)
    assert caught.value.code == "secret_not_text"


def test_empty_text_names_no_token() -> None:
    """A role passes on what its user left empty."""
    assert options.token_selector({"token_label": "demo", "token_serial": "", "slot_id": 0, "token_uri": ""}) == TokenSelector(
        "demo", None, 0
    )


def test_a_library_that_cannot_lock_is_started_without() -> None:
    calls = []

    class Functions:
        def function(self, name: str, *types: t.Any) -> t.Callable[[t.Any], int]:
            return lambda arguments: calls.append(arguments) or (0x0A if arguments else 0)  # type: ignore[func-returns-value]

    library = Library.__new__(Library)
    library.functions = t.cast(t.Any, Functions())
    library._initialize()
    assert [bool(arguments) for arguments in calls] == [True, False]
