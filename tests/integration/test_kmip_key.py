# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The modules kmip_key and kmip_key_info on a real server."""

from __future__ import annotations

import multiprocessing
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import refusals, support
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer

pytestmark = pytest.mark.root

Run = t.Callable[..., dict[str, t.Any]]


@pytest.fixture
def options(kmip_server: KmipServer, tmp_path: Path) -> dict[str, t.Any]:
    """A client of its own each: it sees its own keys only."""
    return {**kmip_server.options(tmp_path.name), "state_directory": str(tmp_path / "state")}


@pytest.fixture
def run(options: dict[str, t.Any]) -> Run:
    def act(*keys: dict[str, t.Any], check: bool = False) -> dict[str, t.Any]:
        result = support.run_module("kmip_key", {**options, "keys": list(keys)}, check=check, diff=True)
        assert not result.get("failed"), result
        return result

    return act


def refused(options: dict[str, t.Any], code: str, *keys: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    result = support.run_module("kmip_key", {**options, **more, "keys": list(keys)})
    refusals.clear(result, code, secrets=[])
    return result


def info(options: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    result = support.run_module("kmip_key_info", {**options, **more})
    assert not result.get("failed"), result
    return result


def actions(result: dict[str, t.Any]) -> list[str]:
    return [step["action"] for step in result["plan"]]


def test_the_whole_life_in_lists(run: Run, options: dict[str, t.Any]) -> None:
    wishes = [
        {"name": "data"},
        {"name": "later", "state": "present", "length": 128},
        {"name": "wrap", "usage": ["wrap_key", "unwrap_key"]},
    ]
    planned = run(*wishes, check=True)
    assert actions(planned) == ["create_key", "activate_key", "create_key", "create_key", "activate_key"]
    assert planned["diff"]["after"] == {"data": "active", "later": "pre_active", "wrap": "active"}
    assert info(options)["kmip_keys"] == []
    made = run(*wishes)
    assert made["plan"] == planned["plan"]
    assert made["diff"] == planned["diff"]
    assert [(one["name"], one["state"], one["length"]) for one in made["kmip_keys"]] == [
        ("data", "active", 256),
        ("later", "pre_active", 128),
        ("wrap", "active", 256),
    ]
    assert made["kmip_keys"][2]["usage"] == ["wrap_key", "unwrap_key"]
    assert not run(*wishes)["changed"]
    assert actions(run({"name": "data", "state": "deactivated"}, {"name": "later", "state": "compromised", "length": 128})) == [
        "deactivate_key",
        "compromise_key",
    ]
    gone = run(
        {"name": "data", "state": "absent", "confirm_destroy": "data"},
        {"name": "wrap", "state": "absent", "confirm_destroy": "wrap"},
    )
    assert actions(gone) == ["destroy_key", "deactivate_key", "destroy_key"]
    assert [(one["name"], one["state"]) for one in info(options)["kmip_keys"]] == [("later", "compromised")]
    assert not run({"name": "data", "state": "absent"})["changed"]
    acts = [entry["action"] for entry in Journal(options["state_directory"] + "/journal.jsonl").entries()]
    assert acts.count("create_kmip_key") == 3
    assert acts.count("destroy_kmip_key") == 2


def test_what_is_refused_changes_nothing(run: Run, options: dict[str, t.Any]) -> None:
    made = run({"name": "kept"})["kmip_keys"]
    for code, wish in (
        ("destroy_unconfirmed", {"name": "kept", "state": "absent"}),
        ("destroy_unconfirmed", {"name": "kept", "state": "absent", "confirm_destroy": "other"}),
        ("key_mismatch", {"name": "kept", "length": 128}),
        ("key_mismatch", {"name": "kept", "usage": ["encrypt"]}),
        ("kmip_key_absent", {"name": "nowhere", "state": "deactivated"}),
        ("kmip_key_absent", {"name": "nowhere", "id": "999999"}),
        ("key_mismatch", {"name": "other", "id": made[0]["id"]}),
        ("invalid_option", {"name": " "}),
    ):
        # The first wish would be met; nothing of it is done.
        refused(options, code, {"name": "new"}, wish)
    assert info(options)["kmip_keys"] == made
    run({"name": "kept", "state": "deactivated"})
    refused(options, "kmip_key_state", {"name": "kept"})
    refused(options, "invalid_option", {"name": "x"}, {"name": "x"})
    refused(options, "invalid_option", {"name": "x"}, kmip_servers=["a b"])
    refused(options, "invalid_option", {"name": "x"}, kmip_servers=[])


def test_a_key_that_was_lost_is_not_made_anew(run: Run, options: dict[str, t.Any], kmip_server: KmipServer) -> None:
    uid = run({"name": "gone"})["kmip_keys"][0]["id"]
    access = kmip_access(options)
    assert access
    with Client(access) as client:
        client.revoke(uid, compromised=False)
        client.destroy(uid)
    error = refused(options, "key_unreachable", {"name": "gone"})
    assert uid in error["msg"]
    assert info(options)["kmip_keys"] == []
    assert actions(run({"name": "gone", "replace_lost": True})) == ["forget_key", "create_key", "activate_key"]
    assert not run({"name": "gone"})["changed"]


def test_two_of_one_name_are_told_apart_by_id(run: Run, options: dict[str, t.Any], kmip_server: KmipServer) -> None:
    access = kmip_access(options)
    assert access
    with Client(access) as client:
        uids = [client.create("twin", "aes", 256, ["encrypt", "decrypt"]) for dummy in range(2)]
        for uid in uids:
            client.activate(uid)
    error = refused(options, "key_ambiguous", {"name": "twin"})
    assert sorted(error["details"]["ids"]) == sorted(uids)
    run({"name": "twin", "id": uids[0], "state": "absent", "confirm_destroy": "twin"})
    assert not run({"name": "twin"})["changed"]
    assert info(options, name="twin")["kmip_keys"][0]["id"] == uids[1]


def _racer(options: dict[str, t.Any], barrier: t.Any, answers: t.Any) -> None:
    barrier.wait()
    result = support.run_module("kmip_key", {**options, "keys": [{"name": "raced"}]})
    answers.put((result.get("msg"), result.get("changed"), [one["id"] for one in result.get("kmip_keys", ())]))


def test_eight_tasks_at_once_make_one_key(options: dict[str, t.Any]) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(8), fork.Queue()
    racers = [fork.Process(target=_racer, args=({**options, "kmip_timeout": 30}, barrier, answers)) for dummy in range(8)]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=90) for dummy in racers]
    for racer in racers:
        racer.join(10)
    listed = [one["id"] for one in info(options)["kmip_keys"]]
    assert len(listed) == 1
    assert all(message is None and ids == listed for message, dummy, ids in found), found
    assert [changed for dummy, changed, ids in found].count(True) == 1


def test_the_list_and_its_filters(run: Run, options: dict[str, t.Any], kmip_server: KmipServer) -> None:
    run({"name": "one"}, {"name": "two", "state": "present"}, {"name": "three"})
    everything = info(options)
    assert [one["name"] for one in everything["kmip_keys"]] == ["one", "two", "three"]
    assert (everything["server"], everything["version"], everything["more"]) == (kmip_server.address, "1.4", False)

    def names(**more: t.Any) -> list[str]:
        return [one["name"] for one in info(options, **more)["kmip_keys"]]

    assert names(name="two") == ["two"]
    assert names(state="active") == ["one", "three"]
    assert names(state="pre_active", name="three") == []
    uid = everything["kmip_keys"][0]["id"]
    assert names(id=uid) == ["one"]
    assert names(id=uid, name="two") == []
    assert (len(names(limit=2)), info(options, limit=2)["more"]) == (2, True)
    missing = support.run_module("kmip_key_info", {**options, "id": "999999"})
    assert missing["error_code"] == "kmip_key_absent"
    stranger = {**kmip_server.options("a stranger"), "state_directory": options["state_directory"]}
    assert info(stranger)["kmip_keys"] == []
    assert support.run_module("kmip_key_info", {**stranger, "id": uid})["error_code"] == "kmip_permission_denied"


def test_through_ansible_s_own_start(options: dict[str, t.Any]) -> None:
    result = support.run_module_file("kmip_key", {**options, "keys": [{"name": "file"}]}, diff=True)
    assert not result.get("failed"), result
    assert result["kmip_keys"][0]["state"] == "active"
