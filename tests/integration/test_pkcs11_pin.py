# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PINs changed in the token and at rest, on real SoftHSM and openCryptoki."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import resting
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.pins import PinWish, change
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, TokenSelector, open_session
from ansible_collections.hsm.tde.tests.integration.support import Installation, OpenCryptoki, SoftHsm, run_module_file

NEW = "newpin-1"
WITH_FILE = ["write_new_pin_file", "set_pin", "verify_pin", "replace_pin_file"]


@pytest.fixture(params=["softhsm", "opencryptoki"])
def token(request: pytest.FixtureRequest) -> Installation:
    """The token demo of each kind."""
    return t.cast(Installation, request.getfixturevalue(request.param))


def changed(
    token: Installation,
    state: StateDirectory,
    new: str = NEW,
    old: str | None = "",
    *,
    user: t.Any = "user",
    pin_file: str | None = None,
    check: bool = False,
    allow_low: bool = False,
) -> list[str]:
    """Change a PIN in a child; the actions of the plan."""
    present = (token.pin if user == "user" else token.so_pin) if old == "" else old

    def act() -> list[str]:
        secret = None if present is None else Secret(present)
        access = TokenAccess(token.library_access(), TokenSelector(label="demo"), secret, allow_low)
        outcome = change(PinWish(access, user, Secret(new), pin_file), state, check_mode=check)
        return [step.action for step in outcome.plan]

    return token.run(act)


def opens(token: Installation, state: StateDirectory, pin: str, user: t.Any = "user") -> bool:
    def act() -> bool:
        with open_session(token.access(pin=pin), state, user=user):
            return True

    return token.run(act)


def flags(token: Installation, state: StateDirectory) -> tuple[str, ...]:
    def act() -> tuple[str, ...]:
        with open_session(token.access(), state, user=None) as session:
            return session.token.flags

    return token.run(act)


def failure(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def test_in_the_token_only(token: Installation, state: StateDirectory) -> None:
    assert changed(token, state, check=True) == ["set_pin", "verify_pin"]
    assert opens(token, state, token.pin), "check mode changed nothing"
    assert changed(token, state) == ["set_pin", "verify_pin"]
    assert opens(token, state, NEW)
    assert "user_pin_count_low" not in flags(token, state)
    assert changed(token, state) == []
    assert failure(lambda: opens(token, state, token.pin)) == "pin_refused"
    assert [entry["action"] for entry in Journal(state.journal).entries()] == ["change_pin"]


def test_and_back_again(token: Installation, state: StateDirectory) -> None:
    """Refusals of a PIN before it was set must not stand in its way."""
    changed(token, state)
    assert changed(token, state, token.pin, NEW) == ["set_pin", "verify_pin"]
    assert opens(token, state, token.pin)
    assert changed(token, state) == ["set_pin", "verify_pin"]
    assert opens(token, state, NEW)


def test_the_officers_pin(token: Installation, state: StateDirectory) -> None:
    assert changed(token, state, user="so") == ["set_pin", "verify_pin"]
    assert changed(token, state, user="so") == []
    assert opens(token, state, NEW, "so")
    assert opens(token, state, token.pin)


def test_where_it_rests(token: Installation, state: StateDirectory, tmp_path: Path) -> None:
    path = tmp_path / "boot" / "pin"
    path.parent.mkdir()
    assert changed(token, state, token.pin, pin_file=str(path)) == ["write_new_pin_file", "replace_pin_file"]
    assert changed(token, state, pin_file=str(path), old=None) == WITH_FILE, "the present PIN comes from the file"
    assert changed(token, state, pin_file=str(path)) == []
    assert path.read_bytes() == f"{NEW}\n".encode()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["pin"]
    assert opens(token, state, NEW)


def test_with_a_file_no_try_is_wasted(token: Installation, state: StateDirectory, tmp_path: Path) -> None:
    path = str(tmp_path / "pin")
    changed(token, state, token.pin, pin_file=path)
    changed(token, state, pin_file=path)
    assert not os.path.exists(state.refused), "no wrong PIN was tried"


def test_neither_pin_opens_the_token(token: Installation, state: StateDirectory) -> None:
    assert failure(lambda: changed(token, state, "wrong-1", "wrong-2")) == "pin_refused"
    # Both were tried once; neither is tried again, and the officer's word is asked for a third.
    assert failure(lambda: changed(token, state, "wrong-1", "wrong-2", allow_low=True)) == "pin_refused_before"
    assert failure(lambda: changed(token, state, "wrong-1", "wrong-3")) == "pin_tries_low"
    assert "user_pin_locked" not in flags(token, state)


def test_one_try_only_where_the_flags_are_low(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    assert failure(lambda: opens(opencryptoki, state, "wrong-1")) == "pin_refused"
    assert failure(lambda: changed(opencryptoki, state)) == "pin_tries_low"
    # Allowed, the PIN that the caller calls the present one is tried, not the new one.
    assert changed(opencryptoki, state, allow_low=True) == ["set_pin", "verify_pin"]
    assert failure(lambda: opens(opencryptoki, state, "wrong-2")) == "pin_refused"
    assert failure(lambda: changed(opencryptoki, state, "third-1", "wrong-3", allow_low=True)) == "pin_refused"
    assert "user_pin_locked" not in flags(opencryptoki, state)


@pytest.mark.parametrize("new", ["123", "x" * 300])
def test_a_new_pin_of_impossible_length(token: Installation, state: StateDirectory, tmp_path: Path, new: str) -> None:
    path = tmp_path / "pin"
    assert failure(lambda: changed(token, state, new, pin_file=str(path))) == "pin_length"
    assert not path.exists()
    assert opens(token, state, token.pin)


def test_a_new_pin_that_the_token_refuses(opencryptoki: OpenCryptoki, state: StateDirectory, tmp_path: Path) -> None:
    path = str(tmp_path / "pin")
    changed(opencryptoki, state, opencryptoki.pin, pin_file=path)
    assert failure(lambda: changed(opencryptoki, state, opencryptoki.factory_pin, pin_file=path)) == "pin_is_factory"
    assert resting.at_rest(path) == (None, Secret(opencryptoki.pin))


def test_no_present_pin(token: Installation, state: StateDirectory, tmp_path: Path) -> None:
    assert failure(lambda: changed(token, state, old=None)) == "pin_missing"
    assert failure(lambda: changed(token, state, old=None, pin_file=str(tmp_path / "pin"))) == "pin_missing"
    assert "user_pin_count_low" not in flags(token, state)


def test_a_pin_file_that_others_can_read(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    path = tmp_path / "pin"
    path.write_text(softhsm.pin)
    path.chmod(0o644)
    assert failure(lambda: changed(softhsm, state, pin_file=str(path))) == "file_not_private"
    assert failure(lambda: changed(softhsm, state, pin_file="pin")) == "invalid_option"
    assert failure(lambda: changed(softhsm, state, pin_file=str(tmp_path / "missing" / "pin"))) == "file_absent"
    assert opens(softhsm, state, softhsm.pin)


def test_an_interrupted_change_to_yet_another_pin(token: Installation, state: StateDirectory, tmp_path: Path) -> None:
    """<file>.new holds a third PIN: whether it reached the token or not, the next change goes on from there."""
    path = str(tmp_path / "pin")
    changed(token, state, token.pin, pin_file=path)
    resting.write_coming(path, Secret("third-1"))
    assert changed(token, state, pin_file=path, old=None) == ["discard_new_pin_file", *WITH_FILE]
    resting.write_coming(path, Secret("third-1"))
    # As if the kill came after C_SetPIN: the token has the third PIN, the file still the one before.
    changed(token, state, "third-1", NEW)
    assert changed(token, state, "fourth-1", None, pin_file=path) == ["replace_pin_file", *WITH_FILE]
    assert resting.resting_pins(path) == [Secret("fourth-1")]
    assert opens(token, state, "fourth-1")


def test_a_database_that_is_logged_in_goes_on(token: Installation, state: StateDirectory) -> None:
    def act() -> int:
        with open_session(token.access(), state, rw=True) as session:
            import pkcs11

            key = session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label="k")
            pid = os.fork()
            if pid == 0:
                os._exit(0 if _change_in_new_process(token, state) else 1)
            _pid, status = os.waitpid(pid, 0)
            assert status == 0
            return len(key.encrypt(b"x" * 16, mechanism=pkcs11.Mechanism.AES_CBC_PAD, mechanism_param=bytes(16)))

    def _change_in_new_process(token: Installation, state: StateDirectory) -> bool:
        access = TokenAccess(token.library_access(), TokenSelector(label="demo"), Secret(token.pin))
        return bool(change(PinWish(access, "user", Secret(NEW)), state).plan)

    assert token.run(act) == 32
    assert opens(token, state, NEW)


def test_module_pin(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    path = str(tmp_path / "pin")
    options = softhsm.options(
        token_label="demo", pin=softhsm.pin, new_pin="marker-new", pin_file=path, state_directory=state.path
    )
    foreseen = run_module_file("pkcs11_pin", options, check=True, diff=True)
    assert foreseen["changed"]
    assert not os.path.exists(path)
    done = run_module_file("pkcs11_pin", options, diff=True)
    assert done["plan"] == foreseen["plan"]
    again = run_module_file("pkcs11_pin", options)
    assert not again["changed"]
    # The group's default pin is never a try of the officer's.
    officer = run_module_file("pkcs11_pin", {**options, "user_type": "so", "new_pin": "marker-so", "pin_file": None})
    assert officer["error_code"] == "pin_missing"
    misspelt = run_module_file("pkcs11_pin", {**options, "new_pni": "marker-misspelt"})
    assert misspelt["failed"]
    assert "marker" not in json.dumps([foreseen, done, again, officer, misspelt])
    assert not any(b"marker" in entry.read_bytes() for entry in Path(state.path).rglob("*") if entry.is_file())
