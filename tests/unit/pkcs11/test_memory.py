# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the host remembers: the registry, refused PINs, PINs at rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import resting
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.refused import RefusedPins
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(str(tmp_path / "state"))


def test_registry_reads_nothing_and_creates_nothing(state: StateDirectory) -> None:
    assert Registry(state).names_token(label="demo") is None
    assert Registry(state).keys() == []
    assert not state.exists()


def test_registry_remembers_until_told_to_forget(state: StateDirectory) -> None:
    registry = Registry(state)
    assert registry.remember_token("demo", "a1", "/lib.so") is True
    assert registry.remember_token("demo", "a1", "/lib.so") is False
    assert registry.remember_key("demo", "a1", "kek", "0a", "secret", "main") is True
    assert registry.remember_key("demo", "a1", "kek", "0a", "secret", "main") is False
    assert registry.remember_key("demo", "b2", "kek", "0a", "secret", "main") is True
    again = Registry(state)
    assert again.names_token(label="demo", serial="a1") is not None
    assert again.names_token(serial="a1") is not None
    assert again.names_token(label="demo", serial="b2") is None
    assert again.names_token() is None
    assert again.names_key("demo", "a1", "kek") is not None
    assert again.names_key("demo", "a1", "kek", "0b") is None
    again.forget_token("demo", "a1")
    assert again.names_token(label="demo") is None
    assert [key["token_serial"] for key in again.keys()] == ["b2"]  # noqa: SIM118
    again.forget_key("demo", "b2", "kek", "0a")
    assert Registry(state).keys() == []
    assert os.stat(state.registry).st_mode & 0o777 == 0o600


def test_serial_numbers_that_tell_nothing_are_one(state: StateDirectory) -> None:
    """openCryptoki's soft tokens all say 123, and nothing from 3.23 on: an upgrade must not make them unreachable."""
    registry = Registry(state)
    registry.remember_token("demo", "123", "/lib.so")
    assert registry.names_token(label="demo", serial="") is not None
    assert registry.names_token(label="demo", serial="a1") is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2, "tokens": [], "keys": []}', '{"version": 1, "tokens": [{}], "keys": []}']
)
def test_a_damaged_registry_is_an_error_not_an_empty_one(state: StateDirectory, content: str) -> None:
    Registry(state).remember_token("demo", "a1", "/lib.so")
    Path(state.registry).write_text(content)
    with pytest.raises(TdeError) as caught:
        Registry(state).names_token(label="demo")
    assert caught.value.code == "registry_damaged"


def test_a_refused_pin_is_known_by_token_and_user_until_it_is_set_anew(state: StateDirectory) -> None:
    refused = RefusedPins(state)
    assert not refused.knows("demo", "a1", "user", Secret("1234"))
    refused.remember("demo", "a1", "user", Secret("1234"))
    refused.remember("demo", "a1", "user", Secret("1234"))
    assert refused.knows("demo", "a1", "user", Secret("1234"))
    assert refused.count("demo", "a1", "user") == 1
    assert not refused.knows("demo", "a1", "user", Secret("12345"))
    assert not refused.knows("demo", "a1", "so", Secret("1234"))
    assert not refused.knows("demo", "a2", "user", Secret("1234"))
    refused.forget("demo", "a1", "so")
    assert refused.knows("demo", "a1", "user", Secret("1234"))
    refused.forget("demo", "a1", "user")
    assert not refused.knows("demo", "a1", "user", Secret("1234"))


def test_refused_pins_are_salted_by_host_and_root_only(tmp_path: Path) -> None:
    fingerprints = []
    for name in ("one", "two"):
        state = StateDirectory(str(tmp_path / name))
        RefusedPins(state).remember("demo", "a1", "user", Secret("1234-marker"))
        text = Path(state.refused).read_text()
        assert "1234-marker" not in text
        assert os.stat(state.refused).st_mode & 0o777 == 0o600
        fingerprints.append(json.loads(text)["refused"][0]["fingerprint"])
    assert fingerprints[0] != fingerprints[1]


def test_a_damaged_list_of_refused_pins_stops_the_try(state: StateDirectory) -> None:
    RefusedPins(state).remember("demo", "a1", "user", Secret("1234"))
    Path(state.refused).write_text('{"version": 1, "refused": [{}], "salt": ""}')
    with pytest.raises(TdeError) as caught:
        RefusedPins(state).knows("demo", "a1", "user", Secret("1234"))
    assert caught.value.code == "refused_pins_damaged"


def test_resting_pins_newest_first(tmp_path: Path) -> None:
    path = str(tmp_path / "pin")
    with pytest.raises(TdeError) as caught:
        resting.resting_pins(path)
    assert caught.value.code == "file_absent"
    resting.write_coming(path, Secret("one"))
    assert resting.resting_pins(path) == [Secret("one")]
    resting.settle(path)
    assert resting.resting_pins(path) == [Secret("one")]
    resting.write_coming(path, Secret("two"))
    assert resting.resting_pins(path) == [Secret("two"), Secret("one")]
    resting.discard_coming(path)
    assert resting.at_rest(path) == (None, Secret("one"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["pin"]
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        ("", 0o600, "pin_file_damaged"),
        ("\n", 0o600, "pin_file_damaged"),
        ("one\ntwo\n", 0o600, "pin_file_damaged"),
        ("one\n", 0o640, "file_not_private"),
        ("one\n", 0o604, "file_not_private"),
        ("x" * 2000, 0o600, "file_too_large"),
    ],
)
def test_a_pin_file_that_may_not_be_used(tmp_path: Path, content: str, mode: int, code: str) -> None:
    path = tmp_path / "pin"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(TdeError) as caught:
        resting.resting_pins(str(path))
    assert caught.value.code == code


def test_a_pin_file_behind_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("one\n")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "pin").symlink_to(tmp_path / "real")
    with pytest.raises(TdeError) as caught:
        resting.resting_pins(str(tmp_path / "pin"))
    assert caught.value.code == "file_not_private"


def test_leftovers_are_ours_only(tmp_path: Path) -> None:
    path = str(tmp_path / "pin")
    for name in (".pin.0123456789ab.tmp", ".pin.new.0123456789ab.tmp", ".other.0123456789ab.tmp", ".pin.tmp", "pin"):
        (tmp_path / name).write_text("x")
    assert sorted(os.path.basename(name) for name in resting.leftovers(path)) == [
        ".pin.0123456789ab.tmp",
        ".pin.new.0123456789ab.tmp",
    ]
    resting.remove_leftovers(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.0123456789ab.tmp", ".pin.tmp", "pin"]
