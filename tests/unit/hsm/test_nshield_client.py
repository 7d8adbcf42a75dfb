"""A client's settings, and what other clients have yet to get; what needs no HSM."""

from __future__ import annotations

import os

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_changes as changes
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_client as client
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_world as world
from hypothesis import given
from hypothesis import strategies as st

RC = "# a comment with A=1\n\nCKNFAST_LOADSHARING = 0\nCKNFAST_DEBUG=1\nCKNFAST_LOADSHARING=1\n"


def test_a_variable_is_replaced_where_it_stands_and_once():
    assert client.edited(RC, {"CKNFAST_LOADSHARING": "1", "CKNFAST_DEBUG": None, "NEW": "x"}) == (
        "# a comment with A=1\n\nCKNFAST_LOADSHARING=1\nNEW=x\n"
    )
    assert client.edited(RC, {}) == RC
    assert client.variables(RC) == {"CKNFAST_LOADSHARING": "1", "CKNFAST_DEBUG": "1"}


_NAMES = st.sampled_from(["CKNFAST_LOADSHARING", "CKNFAST_DEBUG", "CKNFAST_ASSUME_SINGLE_PROCESS"])
_LINES = st.one_of(st.builds("{}={}".format, _NAMES, st.integers(0, 2)), st.sampled_from(["", "# x", "odd"]))


@given(st.lists(_LINES), st.dictionaries(_NAMES, st.one_of(st.none(), st.sampled_from("012"))))
def test_edited_is_idempotent_and_exactly_what_was_wished(lines, wished):
    text = "".join(f"{line}\n" for line in lines)
    once = client.edited(text, wished)
    assert client.edited(once, wished) == once
    expected = {**client.variables(text), **wished}
    assert client.variables(once) == {name: value for name, value in expected.items() if value is not None}
    others = [line for line in lines if line.partition("=")[0] not in wished]
    assert [line for line in once.splitlines() if line.partition("=")[0] not in wished] == others


@pytest.mark.parametrize(("name", "value"), [("cknfast", "1"), ("A B", "1"), ("A=B", "1"), ("GOOD", "1\nEVIL=2")])
def test_what_would_spoil_the_file_is_refused(name, value):
    with pytest.raises(TdeError):
        client.check_variables({name: value})


def test_a_misspelt_variable_is_told():
    assert client.check_variables({"CKNFAST_LOADSHARING": "1"}) == []
    assert "CKNFAST_LOADSHARE" in client.check_variables({"CKNFAST_LOADSHARE": "1"})[0]


def test_who_lacks_what(tmp_path):
    state = StateDirectory(str(tmp_path / "state"))
    state.create()
    changes.save(state, {**changes.load(state), "clients": {"b": 0, "c": 0}})
    changes.remember(state, "softcard x was made")
    remembered = changes.load(state)
    remembered["clients"]["c"] = remembered["changes"][-1]["number"]
    changes.save(state, remembered)
    changes.remember(state, "keys moved")
    found = changes.behind(changes.load(state), "digest")
    assert [(item["name"], len(item["needs"])) for item in found] == [("b", 2), ("c", 1)]
    assert found[1]["needs"][0].endswith("keys moved")


def test_keys_that_a_database_made_are_lacked_by_others_though_nobody_noted_them(tmp_path):
    state = StateDirectory(str(tmp_path / "state"))
    remembered = {**changes.load(state), "clients": {"b": 0, "c": 0}, "copies": {"b": "old", "c": "new"}}
    assert [item["name"] for item in changes.behind(remembered, "new")] == ["b"]
    assert [item["name"] for item in changes.behind(remembered, "old")] == ["c"]


def test_cards_that_got_the_new_passphrase_are_remembered_until_all_have_it(tmp_path):
    state = StateDirectory(str(tmp_path / "state"))
    state.create()
    assert changes.cards_done(state, "h", 3, {1}, False, write=True) == {1}
    assert changes.cards_done(state, "h", 3, {2}, False, write=True) == {1, 2}
    # A remembered card with another passphrase: a new change has begun.
    assert changes.cards_done(state, "h", 3, {1}, True, write=True) == {1}
    assert changes.cards_done(state, "h", 3, {2, 3}, False, write=True) == {1, 2, 3}
    assert changes.load(state)["cards"] == {}


def test_the_digest_is_of_what_clients_have_in_common():
    files = {"world": b"w", "key_pkcs11_ua1": b"k", "softcard_1": b"s", "module_1": b"m"}
    assert world.digest(files) == world.digest({**files, "module_1": b"other", "module_2": b"x"})
    assert world.digest(files) != world.digest({**files, "softcard_1": b"new"})
    assert world.digest(files) != world.digest({name: data for name, data in files.items() if name != "key_pkcs11_ua1"})


def test_a_backup_is_whole_private_and_not_made_twice(tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    (local / "world").write_bytes(b"w")
    (local / "key_pkcs11_ua1").write_bytes(b"k")
    (local / "key_pkcs11_ua2").symlink_to("/etc/passwd")
    with pytest.raises(TdeError) as caught:
        world.back_up(str(local), str(tmp_path / "backups"))
    assert caught.value.code == "file_not_private"
    (local / "key_pkcs11_ua2").unlink()
    first = world.back_up(str(local), str(tmp_path / "backups"))
    assert sorted(os.listdir(first)) == ["key_pkcs11_ua1", "world"]
    assert os.stat(os.path.join(first, "world")).st_mode & 0o777 == 0o600
    assert world.back_up(str(local), str(tmp_path / "backups")) == first
    # What the backup holds otherwise is not put aside.
    (local / "key_pkcs11_ua1").write_bytes(b"changed")
    with pytest.raises(TdeError):
        world.put_aside(str(local), "key_pkcs11_ua1", first)
    second = world.back_up(str(local), str(tmp_path / "backups"))
    world.put_aside(str(local), "key_pkcs11_ua1", second)
    assert not (local / "key_pkcs11_ua1").exists()
    assert second != first
