# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tokens brought to the wished state, on real SoftHSM and openCryptoki."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.initialize import TokenWish, ensure
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenSelector, open_session, tokens
from ansible_collections.hsm.tde.tests.integration.support import Installation, OpenCryptoki, SoftHsm, run_module_file

ALL_STEPS = {
    "empty_softhsm": ["initialize_token", "set_user_pin", "remember_token"],
    "factory_opencryptoki": ["initialize_token", "set_so_pin", "set_user_pin", "remember_token"],
}


def wished(
    token: Installation, state: StateDirectory, *, check: bool = False, label: str | None = "demo", **wish: t.Any
) -> dict[str, t.Any]:
    """Ensure the token in a child; plain data of the outcome."""

    def act() -> dict[str, t.Any]:
        selector = TokenSelector(label=label, slot_id=wish.pop("slot_id", None))
        given = {"so_pin": Secret(token.so_pin), "pin": Secret(token.pin), **wish}
        outcome = ensure(TokenWish(token.library_access(), selector, **given), state, check_mode=check)
        return {
            "plan": [step.action for step in outcome.plan],
            "after": outcome.after.public() if outcome.after else None,
            "lost": outcome.lost,
            "warnings": outcome.warnings,
        }

    return token.run(act)


def failure(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def opens(token: Installation, state: StateDirectory, pin: str, user: t.Any = "user") -> bool:
    """Whether the token demo opens with a PIN (a try)."""

    def act() -> bool:
        with open_session(token.access(pin=pin), state, user=user):
            return True

    return token.run(act)


def labels(token: Installation) -> list[str]:
    """Labels of all initialised tokens."""
    return sorted(token.run(lambda: [info.label for info in tokens(load(token.library_access())) if info.initialized]))


def make_key(token: Installation, state: StateDirectory, label: str = "k") -> None:
    def act() -> None:
        import pkcs11

        with open_session(token.access(), state, rw=True) as session:
            session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label=label)

    token.run(act)


def count_keys(token: Installation, state: StateDirectory) -> int:
    def act() -> int:
        with open_session(token.access(), state) as session:
            return len(list(session.raw.get_objects()))

    return token.run(act)


@pytest.mark.parametrize("kind", sorted(ALL_STEPS))
def test_from_nothing_to_ready_and_then_nothing_to_do(kind: str, state: StateDirectory, request: pytest.FixtureRequest) -> None:
    token = t.cast(Installation, request.getfixturevalue(kind))
    foreseen = wished(token, state, check=True)
    assert foreseen["plan"] == ALL_STEPS[kind]
    assert not state.exists(), "check mode creates nothing"
    assert labels(token) == []
    done = wished(token, state)
    assert done["plan"] == foreseen["plan"]
    assert {"token_initialized", "user_pin_initialized"} <= set(done["after"]["flags"])
    assert not {"so_pin_to_be_changed", "user_pin_to_be_changed"} & set(done["after"]["flags"])
    assert done["warnings"] == []
    again = wished(token, state)
    assert again["plan"] == []
    assert again["after"] == done["after"], "the facts returned by the first run are those of the next"
    assert opens(token, state, token.pin)
    assert opens(token, state, token.so_pin, "so")
    assert [entry["action"] for entry in Journal(state.journal).entries()] == ALL_STEPS[kind]


def test_openCryptokis_factory_pins_are_gone(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    wished(factory_opencryptoki, state)
    assert failure(lambda: opens(factory_opencryptoki, state, factory_opencryptoki.factory_pin)) == "pin_refused"
    assert failure(lambda: opens(factory_opencryptoki, state, factory_opencryptoki.factory_so_pin, "so")) == "pin_refused"


def test_an_so_pin_left_at_the_factorys_is_said(factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    def only_initialise() -> None:
        library = load(factory_opencryptoki.library_access())
        library.init_token(0, Secret(factory_opencryptoki.factory_so_pin), "demo")

    factory_opencryptoki.run(only_initialise)
    assert "factory" in wished(factory_opencryptoki, state, so_pin=None, pin=None)["warnings"][0]


def test_an_existing_token_is_adopted_without_the_officer(softhsm: SoftHsm, state: StateDirectory) -> None:
    assert wished(softhsm, state, so_pin=None)["plan"] == ["remember_token"]
    assert wished(softhsm, state, so_pin=None, pin=None)["plan"] == []


def test_a_wrong_pin_is_noticed_and_nothing_changed(softhsm: SoftHsm, state: StateDirectory) -> None:
    assert failure(lambda: wished(softhsm, state, pin=Secret("wrong-1"), check=True)) == "pin_refused"
    assert failure(lambda: wished(softhsm, state, pin=Secret("wrong-1"))) == "pin_refused_before"
    assert Registry(state).tokens() == []


@pytest.mark.parametrize("kind", sorted(ALL_STEPS))
@pytest.mark.parametrize(
    "wish", [{"pin": Secret("123")}, {"so_pin": Secret("123")}, {"pin": Secret("x" * 300)}], ids=["short", "so-short", "long"]
)
def test_a_pin_of_impossible_length(
    kind: str, wish: dict[str, t.Any], state: StateDirectory, request: pytest.FixtureRequest
) -> None:
    token = t.cast(Installation, request.getfixturevalue(kind))
    assert failure(lambda: wished(token, state, **wish)) == "pin_length"
    assert labels(token) == []


def test_a_lost_token_is_not_replaced_by_accident(softhsm: SoftHsm, state: StateDirectory) -> None:
    wished(softhsm, state)
    make_key(softhsm, state)
    away = softhsm.tokendir.with_name("away")
    softhsm.tokendir.rename(away)
    softhsm.tokendir.mkdir()
    assert failure(lambda: wished(softhsm, state, check=True)) == "token_unreachable"
    assert failure(lambda: wished(softhsm, state)) == "token_unreachable"
    assert labels(softhsm) == []
    assert list(softhsm.tokendir.iterdir()) == []
    softhsm.tokendir.rmdir()
    away.rename(softhsm.tokendir)
    assert wished(softhsm, state)["plan"] == []
    assert count_keys(softhsm, state) == 1


def test_a_lost_token_is_replaced_on_request(softhsm: SoftHsm, state: StateDirectory) -> None:
    first = wished(softhsm, state)["after"]["serial"]
    Registry(state).remember_key("demo", first, "kek", "0a", "secret", "main")
    softhsm.tokendir.rename(softhsm.tokendir.with_name("away"))
    softhsm.tokendir.mkdir()
    assert wished(softhsm, state, replace_lost=True)["plan"] == ["forget_lost_token", *ALL_STEPS["empty_softhsm"]]
    assert wished(softhsm, state, replace_lost=True)["plan"] == []
    assert [entry["serial"] != first for entry in Registry(state).tokens()] == [True]
    assert Registry(state).keys() == []


def test_two_tokens_with_the_label(softhsm: SoftHsm, state: StateDirectory) -> None:
    softhsm.add_token("demo")
    assert failure(lambda: wished(softhsm, state)) == "token_ambiguous"
    assert labels(softhsm) == ["demo", "demo"]


def test_a_slot_that_holds_another_token(softhsm: SoftHsm, opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    slot = softhsm.run(lambda: next(info.slot_id for info in tokens(load(softhsm.library_access())) if info.initialized))
    assert failure(lambda: wished(softhsm, state, label="other", slot_id=slot)) == "token_initialized"
    assert failure(lambda: wished(softhsm, state, label="other", slot_id=12345)) == "token_slot_absent"
    assert failure(lambda: wished(opencryptoki, state, label="other")) == "token_slot_absent"
    assert failure(lambda: wished(opencryptoki, state, label="other", slot_id=4)) == "token_slot_absent"
    assert failure(lambda: wished(opencryptoki, state, label=None, slot_id=4)) == "token_slot_absent"
    assert labels(softhsm) == labels(opencryptoki) == ["demo"]


def test_a_wrong_serial_number_makes_no_second_token(softhsm: SoftHsm, state: StateDirectory) -> None:
    def act() -> None:
        wish = TokenWish(softhsm.library_access(), TokenSelector(label="demo", serial="123"), Secret(softhsm.so_pin))
        ensure(wish, state)

    assert failure(lambda: softhsm.run(act)) == "token_initialized"
    assert labels(softhsm) == ["demo"]


def test_a_named_slot_is_where_a_new_token_goes_and_the_token_is_found_again(
    empty_softhsm: SoftHsm, state: StateDirectory
) -> None:
    assert wished(empty_softhsm, state, slot_id=0)["plan"] == ALL_STEPS["empty_softhsm"]
    assert wished(empty_softhsm, state, slot_id=0)["plan"] == []


def test_two_free_slots(tmp_path: Path, factory_opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    two = OpenCryptoki(tmp_path / "two", ("one", "two"))
    assert failure(lambda: wished(two, state)) == "token_ambiguous"
    wished(two, state, slot_id=1)
    wished(two, state, label="second", slot_id=0)
    assert labels(two) == ["demo", "second"]
    assert wished(two, state, slot_id=1)["plan"] == []


@pytest.mark.parametrize("label", ["", "x" * 33, "é" * 17, " demo", "demo ", "a\nb", None])
def test_a_label_that_no_token_can_have(label: str | None, empty_softhsm: SoftHsm, state: StateDirectory) -> None:
    slot = 0 if label is None else None
    assert failure(lambda: wished(empty_softhsm, state, label=label, slot_id=slot)) == "invalid_option"
    assert labels(empty_softhsm) == []


def test_initialising_again_says_what_is_lost(softhsm: SoftHsm, state: StateDirectory) -> None:
    serial = wished(softhsm, state)["after"]["serial"]
    make_key(softhsm, state, "one")
    make_key(softhsm, state, "two")
    Registry(state).remember_key("demo", serial, "one", "", "secret", "main")
    foreseen = wished(softhsm, state, force_reinitialize=True, check=True)
    assert foreseen["plan"] == ALL_STEPS["empty_softhsm"]
    assert foreseen["lost"] == {
        "objects": 2,
        "labels": ["one", "two"],
        "private_objects_seen": True,
        "registered_keys": [{"label": "one", "id": "", "cluster": "main"}],
    }
    assert count_keys(softhsm, state) == 2, "check mode destroys nothing"
    done = wished(softhsm, state, force_reinitialize=True)
    assert done["lost"] == foreseen["lost"]
    assert labels(softhsm) == ["demo"]
    assert count_keys(softhsm, state) == 0
    assert Registry(state).keys() == []
    assert wished(softhsm, state)["plan"] == []


def test_initialising_again_with_the_wrong_so_pin(softhsm: SoftHsm, state: StateDirectory) -> None:
    make_key(softhsm, state)
    for code in ("pin_refused", "pin_refused_before"):
        assert (
            failure(lambda: wished(softhsm, state, so_pin=Secret("wrong-so"), force_reinitialize=True, allow_low_pin_count=True))
            == code
        )
    assert count_keys(softhsm, state) == 1


def test_openCryptoki_is_not_initialised_again_where_that_bricks_it(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    make_key(opencryptoki, state)
    if opencryptoki.run(lambda: load(opencryptoki.library_access()).version) >= (3, 23):
        assert wished(opencryptoki, state, force_reinitialize=True)["lost"]["objects"] == 1
        assert count_keys(opencryptoki, state) == 0
        assert opens(opencryptoki, state, opencryptoki.so_pin, "so")
        return
    assert failure(lambda: wished(opencryptoki, state, force_reinitialize=True, check=True)) == "token_reinitialize_unsafe"
    assert failure(lambda: wished(opencryptoki, state, force_reinitialize=True)) == "token_reinitialize_unsafe"
    assert count_keys(opencryptoki, state) == 1


def test_the_way_out_for_a_token_that_is_not_initialised_again(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """As the error's text says: the folder aside, the shared memory away, and the token is as from the factory."""
    make_key(opencryptoki, state)
    (opencryptoki.home / "var/swtok").rename(opencryptoki.home / "var/aside")
    (opencryptoki.home / "shm/var.lib.opencryptoki.swtok").unlink()
    assert wished(opencryptoki, state)["plan"] == ALL_STEPS["factory_opencryptoki"]
    assert count_keys(opencryptoki, state) == 0


def test_lockout_and_unlock(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    wished(opencryptoki, state)
    make_key(opencryptoki, state)

    def lock() -> None:
        library = load(opencryptoki.library_access())
        for number in range(3):
            raw = library.raw.get_token(token_label="demo").open()
            with pytest.raises(Exception, match="0xA0"):
                library.login(raw.handle, "user", Secret(f"wrong-{number}"))
            library.close_all_sessions(0)

    opencryptoki.run(lock)
    assert failure(lambda: wished(opencryptoki, state)) == "pin_locked"
    assert failure(lambda: wished(opencryptoki, state, unlock_user_pin=True, so_pin=None)) == "pin_missing"
    assert wished(opencryptoki, state, unlock_user_pin=True, check=True)["plan"] == ["unlock_user_pin"]
    assert failure(lambda: wished(opencryptoki, state)) == "pin_locked", "check mode unlocks nothing"
    done = wished(opencryptoki, state, unlock_user_pin=True)
    assert done["plan"] == ["unlock_user_pin"]
    assert "user_pin_locked" not in done["after"]["flags"]
    assert wished(opencryptoki, state, unlock_user_pin=True)["plan"] == []
    assert count_keys(opencryptoki, state) == 1, "the keys stay"


def test_a_pin_refused_before_is_welcome_once_the_officer_set_it(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    wished(opencryptoki, state)
    assert failure(lambda: wished(opencryptoki, state, pin=Secret("newpin-1"))) == "pin_refused"
    for number in (2, 3):
        with pytest.raises(TdeError):
            wished(opencryptoki, state, pin=Secret(f"newpin-{number}"), allow_low_pin_count=True)
    assert wished(opencryptoki, state, pin=Secret("newpin-1"), unlock_user_pin=True)["plan"] == ["unlock_user_pin"]
    assert opens(opencryptoki, state, "newpin-1")


def test_a_second_run_at_the_same_time(softhsm: SoftHsm, state: StateDirectory) -> None:
    with state.locked():
        assert failure(lambda: wished(softhsm, state)) == "busy"


# --- the modules themselves


def test_module_token(empty_softhsm: SoftHsm, state: StateDirectory) -> None:
    options = empty_softhsm.options(token_label="demo", so_pin="marker-so-pin", pin="marker-pin", state_directory=state.path)
    foreseen = run_module_file("pkcs11_token", options, check=True, diff=True)
    assert foreseen["changed"]
    assert foreseen["diff"] == {"before": {}, "after": {}}
    done = run_module_file("pkcs11_token", options, diff=True)
    assert done["changed"]
    assert done["plan"] == foreseen["plan"]
    assert done["diff"]["after"]["label"] == "demo"
    again = run_module_file("pkcs11_token", options)
    assert not again["changed"]
    assert again["token"] == done["token"]
    info = run_module_file("pkcs11_token_info", empty_softhsm.options(token_label="demo", state_directory=state.path))
    assert [one["label"] for one in info["tokens"]] == ["demo"]
    assert "AES_GCM" in info["tokens"][0]["mechanisms"]
    assert info["missing"] == []
    failed = run_module_file("pkcs11_token", {**options, "pin": "marker-wrong"})
    assert failed["failed"]
    assert failed["error_code"] == "pin_refused"
    assert run_module_file("pkcs11_token", {**options, "pin": 1234})["error_code"] == "secret_not_text"
    info = run_module_file("pkcs11_token_info", empty_softhsm.options(state_directory=state.path))
    assert len(info["tokens"]) == 2, "the free slot is listed too"
    assert next(one for one in info["tokens"] if one["initialized"])["refused_pins"] == {"user": 1, "so": 0}
    assert "marker" not in json.dumps([foreseen, done, again, failed, info])
    assert not any(b"marker" in path.read_bytes() for path in Path(state.path).rglob("*") if path.is_file())


def test_module_token_info_on_opencryptoki(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    def act() -> dict[str, t.Any]:
        return run_module_file("pkcs11_token_info", opencryptoki.options(state_directory=state.path))

    info = opencryptoki.run(act)
    assert info["library"]["manufacturer"] == "IBM"
    assert [(one["label"], one["pin_min"], one["pin_max"]) for one in info["tokens"]] == [("demo", 4, 8)]
    assert info["tokens"][0]["serial"] in ("123", ""), "of 3.8, of newer ones"
    assert "AES_CBC_PAD" in info["tokens"][0]["mechanisms"]
    assert info["failed_slots"] == []


def test_module_token_info_names_what_is_missing(softhsm: SoftHsm, state: StateDirectory) -> None:
    wished(softhsm, state)
    softhsm.tokendir.rename(softhsm.tokendir.with_name("away"))
    softhsm.tokendir.mkdir()
    # The registry holds the library's real path, whatever link the task names.
    info = run_module_file("pkcs11_token_info", softhsm.options(state_directory=state.path))
    assert [entry["label"] for entry in info["missing"]] == ["demo"]
