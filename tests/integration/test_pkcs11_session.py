# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Finding tokens and logging in, on real tokens: nothing guessed, one try, no trace left."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import (
    TokenAccess,
    TokenSelector,
    find,
    open_session,
    tokens,
)
from ansible_collections.hsm.tde.tests.integration.support import Installation, OpenCryptoki, SoftHsm


def flags(token: Installation) -> set[str]:
    """The flags of the token demo as they are now."""
    return set(token.run(lambda: next(info.flags for info in tokens(load(token.library_access())) if info.label == "demo")))


def use(token: Installation, state: StateDirectory, pin: str | None = None, **more: t.Any) -> t.Any:
    """Open and close a session in a child; the token's label."""
    user = more.pop("user", "user")

    def act() -> str:
        with open_session(token.access(pin=pin, **more), state, user=user) as session:
            return session.token.label

    return token.run(act)


def failure(act: t.Callable[[], t.Any]) -> TdeError:
    with pytest.raises(TdeError) as caught:
        act()
    assert "wrong-" not in f"{caught.value} {caught.value.result()}", "an error repeats the PIN"
    return caught.value


@pytest.fixture(params=["softhsm", "opencryptoki"])
def token(request: pytest.FixtureRequest) -> Installation:
    """The token demo of each kind."""
    return t.cast(Installation, request.getfixturevalue(request.param))


def test_a_login_leaves_nobody_logged_in(token: Installation, state: StateDirectory) -> None:
    def act() -> tuple[int, int]:
        import pkcs11

        with open_session(token.access(), state, rw=True) as session:
            session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label="k")
            seen = len(list(session.raw.get_objects()))
        raw = load(token.library_access()).raw.get_token(token_label="demo").open()
        return seen, len(list(raw.get_objects()))

    assert token.run(act) == (1, 0)
    assert not state.exists(), "reading leaves nothing on the host"


def test_a_wrong_pin_is_tried_once_ever(token: Installation, state: StateDirectory) -> None:
    first = failure(lambda: use(token, state, "wrong-1"))
    assert (first.code, first.details["ckr"]) == ("pin_refused", "CKR_PIN_INCORRECT")
    assert "user_pin_count_low" in flags(token)
    for _again in range(3):
        assert failure(lambda: use(token, state, "wrong-1", allow_low_pin_count=True)).code == "pin_refused_before"
    # Another PIN, even the right one, waits for a word while the token says that wrong ones were entered.
    assert failure(lambda: use(token, state)).code == "pin_tries_low"
    assert "user_pin_final_try" not in flags(token), "only one try was spent"
    assert use(token, state, allow_low_pin_count=True) == "demo"
    assert use(token, state) == "demo"


def test_a_refusal_that_cannot_be_remembered_is_a_refusal_all_the_same(softhsm: SoftHsm, state: StateDirectory) -> None:
    state.create()
    Path(state.path, "refused.json.lock").mkdir()
    error = failure(lambda: use(softhsm, state, "wrong-1"))
    assert error.code == "pin_refused"
    assert "could not be remembered" in error.kept


def test_the_security_officers_pin_has_its_own_memory(token: Installation, state: StateDirectory) -> None:
    assert failure(lambda: use(token, state, "wrong-1", user="so")).code == "pin_refused"
    assert failure(lambda: use(token, state, "wrong-1", user="so")).code == "pin_refused_before"
    assert "so_pin_final_try" not in flags(token)
    assert use(token, state) == "demo"
    assert use(token, state, token.so_pin, user="so", allow_low_pin_count=True) == "demo"


def test_after_a_refusal_the_token_is_free_for_the_officer(token: Installation, state: StateDirectory) -> None:
    """python-pkcs11 leaks a session when a login fails; a leaked one makes the officer's login impossible."""

    def act() -> str:
        with pytest.raises(TdeError):
            with open_session(token.access(pin="wrong-1"), state):
                pass
        with open_session(token.access(pin=token.so_pin), state, user="so") as session:
            return session.token.label

    assert token.run(act) == "demo"


def test_a_locked_pin_is_not_tried(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    for number in range(3):
        assert failure(lambda n=number: use(opencryptoki, state, f"wrong-{n}", allow_low_pin_count=True)).code == "pin_refused"  # type: ignore[misc]
    assert "user_pin_locked" in flags(opencryptoki)
    error = failure(lambda: use(opencryptoki, state, allow_low_pin_count=True))
    assert (error.code, error.kept) == ("pin_locked", "No try was made.")


@pytest.mark.parametrize("pin", ["123", "x" * 300])
def test_a_pin_of_impossible_length_is_not_tried(token: Installation, state: StateDirectory, pin: str) -> None:
    before = flags(token)
    assert failure(lambda: use(token, state, pin)).code == "pin_length"
    assert flags(token) == before


def test_no_pin(token: Installation, state: StateDirectory) -> None:
    access = TokenAccess(token.library_access(), TokenSelector(label="demo"), None)

    def act() -> None:
        with open_session(access, state):
            pass

    assert failure(lambda: token.run(act)).code == "pin_missing"


def test_a_token_without_user_pin(empty_softhsm: SoftHsm, state: StateDirectory) -> None:
    def initialise() -> None:
        library = load(empty_softhsm.library_access())
        library.init_token(library.slots()[0], Secret(empty_softhsm.so_pin), "demo")

    empty_softhsm.run(initialise)
    assert failure(lambda: use(empty_softhsm, state)).code == "token_not_ready"


def test_a_second_session_within_the_first(softhsm: SoftHsm, state: StateDirectory) -> None:
    def act() -> None:
        with open_session(softhsm.access(), state):
            with open_session(softhsm.access(), state):
                pass

    assert failure(lambda: softhsm.run(act)).code == "session_open"


def test_sessions_on_two_tokens_at_once(two_tokens: SoftHsm, state: StateDirectory) -> None:
    def act() -> list[str]:
        with open_session(two_tokens.access("demo"), state) as one, open_session(two_tokens.access("second"), state) as two:
            return [one.token.label, two.token.label]

    assert two_tokens.run(act) == ["demo", "second"]


# --- finding


def look(token: Installation, state: StateDirectory, **selector: t.Any) -> str:
    """Find a token in a child; its label."""
    return token.run(lambda: find(load(token.library_access()), TokenSelector(**selector), Registry(state)).label)


def test_no_token(softhsm: SoftHsm, state: StateDirectory) -> None:
    assert failure(lambda: look(softhsm, state, label="other")).code == "token_absent"
    assert failure(lambda: look(softhsm, state, uri="pkcs11:token=demo;model=other")).code == "token_absent"
    assert failure(lambda: look(softhsm, state)).code == "invalid_option"
    assert failure(lambda: look(softhsm, state, uri="pkcs11:")).code == "invalid_option"


def test_two_tokens_with_the_label(softhsm: SoftHsm, state: StateDirectory) -> None:
    softhsm.add_token("demo")
    error = failure(lambda: look(softhsm, state, label="demo"))
    assert error.code == "token_ambiguous"
    one = error.details["tokens"][0]
    assert look(softhsm, state, label="demo", serial=one["serial"]) == "demo"
    assert look(softhsm, state, label="demo", slot_id=one["slot_id"]) == "demo"
    assert look(softhsm, state, uri=f"pkcs11:serial={one['serial']}") == "demo"


def remember(token: Installation, state: StateDirectory) -> None:
    """Enter the token demo into the registry."""

    def act() -> None:
        info = find(load(token.library_access()), TokenSelector(label="demo"), None)
        Registry(state).remember_token(info.label, info.serial, token.library)

    token.run(act)


def test_an_unmounted_folder_is_no_absent_token(softhsm: SoftHsm, state: StateDirectory) -> None:
    remember(softhsm, state)
    away = softhsm.tokendir.with_name("away")
    softhsm.tokendir.rename(away)
    softhsm.tokendir.mkdir()
    error = failure(lambda: look(softhsm, state, label="demo"))
    assert (error.code, error.cause) == ("token_unreachable", "unreachable")
    # Another token of the same label in the empty folder is not the one that is missing.
    softhsm.add_token("demo")
    assert failure(lambda: look(softhsm, state, label="demo")).code == "token_unreachable"
    assert failure(lambda: use(softhsm, state)).code == "token_unreachable"
    softhsm.tokendir.rename(softhsm.tokendir.with_name("replacement"))
    away.rename(softhsm.tokendir)
    assert use(softhsm, state) == "demo"
