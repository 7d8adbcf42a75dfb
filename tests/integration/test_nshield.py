# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""nShield's modules on a stand-in: softcards, keys that slip to module protection, transfers that are killed, two clients."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import typing as t
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import Nshield
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield_cards import check_credential
from ansible_collections.hsm.tde.tests.integration import nshield, support
from ansible_collections.hsm.tde.tests.integration.nshield import ACS_PASSPHRASE, MASTER, PASSPHRASE, Site

pytestmark = pytest.mark.skipif(not support.softhsm_library(), reason="SoftHSM is not installed")

NEW = "Softcard-2"


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """A world that tests only read: softcard ``one`` with a key, card set ``cards`` with a key, a key that slipped."""
    with nshield.site() as site:
        site.a.create_softcard("one", PASSPHRASE)
        cardset = site.a.create_cardset("cards", PASSPHRASE)
        site.hsm.insert(f"{cardset}:1")
        site.a.login(f"{PASSPHRASE}|one").create_key(MASTER + "01")
        site.a.login(f"{PASSPHRASE}|cards").create_key(MASTER + "02")
        site.a.login(f"{PASSPHRASE}|onne").create_key(MASTER + "03")
        yield site


@pytest.fixture(scope="module")
def pair() -> Iterator[Site]:
    """A world of two clients and a remote file system, with an administrator card in a slot."""
    with nshield.site(clients=("a", "b", "rfs")) as site:
        site.hsm.insert("acs:1", slot=1)
        yield site


def softcard(site: Site, name: str) -> str:
    return next(identifier for identifier, card in site.a.softcards().items() if card["name"] == name)


# nshield_info


def test_info_tells_what_really_protects_each_key(shared: Site) -> None:
    result = shared.run("nshield_info")
    assert {key["name"]: (key["protection"], key["token_name"]) for key in result["nshield_keys"]} == {
        MASTER + "01": ("softcard", "one"),
        MASTER + "02": ("ocs", "cards"),
        MASTER + "03": ("module", None),
    }
    assert result["differences"] == []
    assert (result["world"]["usable"], result["world"]["fips_level"], result["world"]["recovery"]) == (True, 2, True)
    (cardset,) = result["cardsets"]
    assert (cardset["quorum"], cardset["present"], cardset["in_every_module"]) == (
        [1, 2],
        [{"module": 1, "slot": 0, "card": 1}],
        True,
    )
    assert result["modules"][0]["slots"][1]["state"] == "empty"


def test_info_answers_whether_access_recovers_by_itself(shared: Site) -> None:
    told = {"protection": "ocs", "token": "cards", "auto_login": True, "remote_administration": False, "persistent_only": False}
    open_question = shared.run("nshield_info", keys=False, recovery=told)["recovery"]
    assert (open_question["automatic"], [item["code"] for item in open_question["unknown"]]) == (None, ["same_passphrase"])
    yes = shared.run("nshield_info", keys=False, recovery={**told, "same_passphrase": True})["recovery"]
    assert (yes["cell"], yes["automatic"]) == ("fips2.ocs.stand_alone", True)
    cluster = shared.run(
        "nshield_info", keys=False, recovery={**told, "same_passphrase": True, "auto_login": False, "cluster": True}
    )
    assert [item["code"] for item in cluster["recovery"]["missing"]] == ["auto_login"]


def test_info_of_a_level_3_cluster_with_a_card_in_one_hsm_only() -> None:
    with nshield.site(fips_level=3, modules=2) as site:
        cardset = site.a.create_cardset("fips", PASSPHRASE, quorum=(2, 3))
        site.a.create_softcard("one", PASSPHRASE)
        site.hsm.insert(f"{cardset}:1", module=1)
        told = {
            "protection": "softcard",
            "token": "one",
            "auto_login": True,
            "remote_administration": False,
            "persistent_only": False,
        }
        one = site.run("nshield_info", keys=False, recovery=told)["recovery"]
        assert (one["cell"], [item["code"] for item in one["missing"]]) == ("fips3.softcard.cluster", ["fips_card_in_slot"])
        site.hsm.insert(f"{cardset}:2", module=2)
        assert site.run("nshield_info", keys=False, recovery=told)["recovery"]["automatic"] is True
        # Without any card in a slot, a softcard is not even begun.
        site.hsm.remove(module=1)
        site.hsm.remove(module=2)
        result = site.run("nshield_softcard", name="two", passphrase=PASSPHRASE)
        assert result["error_code"] == "nshield_authorisation_missing"
        # Administrator cards do, with their passphrase; an operator card needs none.
        site.hsm.insert("acs:1")
        result = site.run("nshield_softcard", name="two", passphrase=PASSPHRASE)
        assert result["error_code"] == "nshield_authorisation_missing"
        assert site.commands("ppmk") == []
        assert site.run("nshield_softcard", name="two", passphrase=PASSPHRASE, acs_passphrase=ACS_PASSPHRASE)["changed"]


# nshield_key_protection: verified


def test_keys_under_the_expected_softcard_are_verified(shared: Site) -> None:
    result = shared.run("nshield_key_protection", keys=[MASTER + "01"], protection="softcard", token="one")
    assert (result["changed"], result["nshield_keys"][0]["as_expected"], result["nshield_keys"][0]["token_name"]) == (
        False,
        True,
        "one",
    )


def test_a_mistyped_credential_s_key_is_caught_by_the_verification_after(shared: Site) -> None:
    result = shared.run("nshield_key_protection", keys=[MASTER + "03"], protection="softcard", token="one")
    assert (result["failed"], result["error_code"]) == (True, "nshield_key_slipped")
    assert MASTER + "03" in result["msg"]
    assert result["details"]["nshield_keys"][0]["protection"] == "module"


def test_one_slipped_key_among_many_is_named(shared: Site) -> None:
    result = shared.run("nshield_key_protection", keys=[MASTER + "*"], protection="softcard", token="one")
    assert result["error_code"] == "nshield_key_slipped"
    assert result["object"] == f"keys {MASTER}03"


@pytest.mark.parametrize(
    ("keys", "protection", "token", "code"),
    [
        ([MASTER + "01"], "ocs", "cards", "nshield_key_elsewhere"),
        ([MASTER + "02"], "softcard", "one", "nshield_key_elsewhere"),
        ([MASTER + "04"], "softcard", "one", "key_absent"),
        ([MASTER + "01"], "softcard", "none", "token_absent"),
        ([MASTER + "01"], "module", "one", "invalid_option"),
    ],
)
def test_anything_else_than_expected_fails(shared: Site, keys: list[str], protection: str, token: str, code: str) -> None:
    assert shared.run("nshield_key_protection", keys=keys, protection=protection, token=token)["error_code"] == code


@pytest.mark.parametrize(
    ("source", "protection", "token"), [("cards", "softcard", "one"), ("one", "ocs", "cards"), (None, "softcard", "one")]
)
def test_pairs_that_the_vendor_does_not_allow_are_refused(shared: Site, source: str | None, protection: str, token: str) -> None:
    keys = [MASTER + {"one": "01", "cards": "02", None: "03"}[source]]
    result = shared.run("nshield_key_protection", state="transferred", protection=protection, token=token, keys=keys)
    assert result["error_code"] == "nshield_transfer_forbidden"
    assert shared.commands("rocs") == [[]] * len(shared.commands("rocs"))


def test_module_protection_is_no_target(shared: Site) -> None:
    result = shared.run("nshield_key_protection", state="transferred", protection="module", keys=[MASTER + "01"])
    assert result["error_code"] == "nshield_transfer_forbidden"


# nshield_softcard


def test_a_softcard_is_made_once_and_its_passphrase_changed() -> None:
    with nshield.site() as site:
        planned = site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE, check=True, diff=True)
        assert (planned["changed"], planned["softcard"], site.a.softcards()) == (True, None, {})
        made = site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE, diff=True)
        assert made["changed"]
        assert site.a.login(f"{PASSPHRASE}|tde").protection == "softcard"
        assert not site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE)["changed"]
        # Another passphrase: never without the present one.
        assert site.run("nshield_softcard", name="tde", passphrase=NEW)["error_code"] == "nshield_passphrase_refused"
        wrong = site.run("nshield_softcard", name="tde", passphrase=NEW, old_passphrase="Softcard-0")
        assert wrong["error_code"] == "nshield_passphrase_refused"
        assert site.run("nshield_softcard", name="tde", passphrase=NEW, old_passphrase=PASSPHRASE, check=True)["changed"]
        assert site.a.login(f"{PASSPHRASE}|tde").protection == "softcard"
        changed = site.run("nshield_softcard", name="tde", passphrase=NEW, old_passphrase=PASSPHRASE)
        assert [step["action"] for step in changed["plan"]] == ["change_softcard_passphrase"]
        assert site.a.login(f"{NEW}|tde").protection == "softcard"
        assert site.a.login(f"{PASSPHRASE}|tde").protection == "module"
        assert not site.run("nshield_softcard", name="tde", passphrase=NEW, old_passphrase=PASSPHRASE)["changed"]
        entries = Journal(str(site.a.home.with_suffix(".state") / "journal.jsonl")).entries()
        assert [entry["action"] for entry in entries] == ["create_softcard", "change_softcard_passphrase"]


@pytest.mark.parametrize("act", ["create", "change"])
def test_a_ppmk_that_was_killed_after_its_work_is_found_done(act: str) -> None:
    with nshield.site() as site:
        if act == "change":
            site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE)
        site.hsm.fault("die", "ppmk")
        wish = {"name": "tde", "passphrase": PASSPHRASE if act == "create" else NEW, "old_passphrase": PASSPHRASE}
        assert site.run("nshield_softcard", **wish)["failed"]
        site.hsm.fault("die", None)
        again = site.run("nshield_softcard", **wish)
        assert (again.get("failed"), again["changed"]) == (None, False)
        assert len(site.a.softcards()) == 1


def test_names_repeat_and_hashes_do_not(shared: Site) -> None:
    with nshield.site() as site:
        first, second = site.a.create_softcard("tde", PASSPHRASE), site.a.create_softcard("tde", NEW)
        assert site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE)["error_code"] == "token_ambiguous"
        assert not site.run("nshield_softcard", hash=second, passphrase=NEW)["changed"]
        assert [card["name_unique"] for card in site.run("nshield_info", keys=False)["softcards"]] == [False, False]
        assert first != second
        # A credential knows no hash, so a name that repeats is no credential for a database.
        site.a.create_cardset("unique", PASSPHRASE)
        site.a.create_softcard("unique", PASSPHRASE)
        with pytest.raises(TdeError) as caught:
            check_credential(Nshield(str(site.a.home), timeout=20), "softcard", "unique", Secret(PASSPHRASE))
        assert caught.value.code == "token_ambiguous"


def test_what_oracle_would_not_take_is_refused_before_anything_is_made(shared: Site) -> None:
    before = len(shared.hsm.journal())
    for name, passphrase, rule in (
        ("soft card", PASSPHRASE, "name_characters"),
        ("n" * 25, PASSPHRASE, "total_length"),
        ("tde", "Pass|word", "passphrase_separator"),
    ):
        result = shared.run("nshield_softcard", name=name, passphrase=passphrase)
        assert (result["error_code"], result["details"]["rules"]) == ("credential_forbidden", [rule])
        assert passphrase not in json.dumps(result)
    assert len(shared.hsm.journal()) == before


def test_a_command_that_hangs_is_ended() -> None:
    with nshield.site() as site:
        site.a.create_softcard("tde", PASSPHRASE)
        site.hsm.fault("hang", "ppmk")
        begun = time.monotonic()
        result = support.run_module("nshield_softcard", {**site.options(), "name": "tde", "passphrase": NEW, "timeout": 1.0})
        assert (result["error_code"], time.monotonic() - begun < 15) == ("timeout", True)


# nshield_cardset


def test_every_card_of_a_set_gets_the_passphrase_slot_by_slot() -> None:
    with nshield.site() as site:
        cardset = site.a.create_cardset("cards", PASSPHRASE, quorum=(1, 3))
        for slot in (0, 1):
            site.hsm.insert(f"{cardset}:{slot + 1}", slot=slot)
        wish = {"name": "cards", "passphrase": NEW, "old_passphrase": PASSPHRASE}
        first = site.run("nshield_cardset", **wish, diff=True)
        assert (first["changed"], first["with_passphrase"], first["unseen"]) == (True, [1, 2], [3])
        assert site.a.login(f"{NEW}|cards").protection == "ocs"
        site.hsm.insert(f"{cardset}:3", slot=0)
        second = site.run("nshield_cardset", **wish)
        assert (second["changed"], second["unseen"]) == (True, [])
        assert not site.run("nshield_cardset", **wish)["changed"]


def test_at_fips_level_3_a_card_s_passphrase_needs_an_administrator_card() -> None:
    with nshield.site(fips_level=3) as site:
        cardset = site.a.create_cardset("cards", PASSPHRASE)
        site.hsm.insert(f"{cardset}:1")
        wish = {"name": "cards", "passphrase": NEW, "old_passphrase": PASSPHRASE}
        assert site.run("nshield_cardset", **wish)["error_code"] == "nshield_authorisation_missing"
        site.hsm.insert("acs:1", slot=1)
        refused = site.run("nshield_cardset", **wish, acs_passphrase="Admin-card-0")
        assert refused["error_code"] == "nshield_passphrase_refused"
        assert site.run("nshield_cardset", **wish, acs_passphrase=ACS_PASSPHRASE)["changed"]


# A database's credential, before a key is made with it


def test_a_mistyped_credential_is_caught_before_any_key_is_made(shared: Site) -> None:
    tools = Nshield(str(shared.a.home), timeout=20)
    assert check_credential(tools, "softcard", "one", Secret(PASSPHRASE)) in shared.a.softcards()
    assert check_credential(tools, "ocs", "cards", Secret(PASSPHRASE)) in shared.a.cardsets()
    assert check_credential(tools, "module", None, Secret(PASSPHRASE)) is None
    for protection, name, passphrase, code in (
        ("softcard", "onne", PASSPHRASE, "token_absent"),
        ("softcard", "one", "Softcard-l", "nshield_passphrase_refused"),
        ("ocs", "one", PASSPHRASE, "token_absent"),
        ("ocs", "cards", "Softcard-l", "nshield_passphrase_refused"),
    ):
        with pytest.raises(TdeError) as caught:
            check_credential(tools, protection, name, Secret(passphrase))
        assert caught.value.code == code


# Transfers


def transfer_options(source: str, token: str, **more: t.Any) -> dict[str, t.Any]:
    return {
        "state": "transferred",
        "source": source,
        "protection": "softcard",
        "token": token,
        "passphrase": NEW,
        "acs_passphrase": ACS_PASSPHRASE,
        **more,
    }


def test_a_transfer_keeps_the_key_and_moves_its_protection(pair: Site) -> None:
    pair.a.create_softcard("from1", PASSPHRASE)
    target = pair.a.create_softcard("to1", NEW)
    old = pair.a.login(f"{PASSPHRASE}|from1")
    names = [MASTER + "11", MASTER + "12"]
    wrapped = {name: old.wrap(old.create_key(name), name.encode()) for name in names}
    wish = transfer_options("from1", "to1")
    planned = pair.run("nshield_key_protection", **wish, check=True, diff=True)
    assert [step["action"] for step in planned["plan"]] == ["back_up_world", "transfer_keys"]
    done = pair.run("nshield_key_protection", **wish, diff=True)
    assert {key["name"]: key["token"] for key in done["nshield_keys"]} == dict.fromkeys(names, target)
    assert {path.name for path in Path(done["backup"]).iterdir()} >= {"world", f"softcard_{target}"}
    new = pair.a.login(f"{NEW}|to1")
    for name, blob in wrapped.items():
        assert new.unwrap(t.cast(str, new.find(name)), blob) == name.encode()
    assert pair.a.login(f"{PASSPHRASE}|from1").keys() == {}
    assert len(done["other_clients_need"]) == 3
    again = pair.run("nshield_key_protection", **wish)
    assert (again["changed"], again["plan"]) == (False, [])
    assert pair.run("nshield_key_protection", keys=names, protection="softcard", token="to1")["nshield_keys"][0]["as_expected"]


@pytest.mark.parametrize("moment", [0.5, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 1.5))])
def test_rocs_killed_half_way_with_a_second_client_holding_old_key_files(pair: Site, moment: float) -> None:
    tag = str(moment).replace(".", "")
    source, target = f"from{tag}k", f"to{tag}k"
    old_token = pair.a.create_softcard(source, PASSPHRASE)
    pair.a.create_softcard(target, NEW)
    old = pair.a.login(f"{PASSPHRASE}|{source}")
    names = [f"{MASTER}{tag}A", f"{MASTER}{tag}B"]
    wrapped = {name: old.wrap(old.create_key(name), name.encode()) for name in names}
    b = pair.clients["b"]
    nshield.world.copy_world(pair.a, b)
    pair.hsm.fault("rocs_dies_after", moment)
    killed = pair.run("nshield_key_protection", **transfer_options(source, target))
    pair.hsm.fault("rocs_dies_after", None)
    if moment < 1.5:
        # A clear state: which keys are where, and that the next run goes on.
        assert killed["error_code"] == "nshield_transfer_unfinished"
        assert sorted(killed["details"]["transferred"] + killed["details"]["left"]) == names
    else:
        # Only an old file was left, which the run itself puts aside.
        assert killed["plan"][-1]["action"] == "retire_key_file"
    mended = pair.run("nshield_key_protection", keys=names, **{**transfer_options(source, target)})
    assert {(key["token_name"], tuple(key["copies"])) for key in mended["nshield_keys"]} == {(target, ())}
    assert not pair.run("nshield_key_protection", keys=names, **transfer_options(source, target))["changed"]
    assert [key for key in pair.a.keys().values() if key["token"] == old_token] == []
    new = pair.a.login(f"{NEW}|{target}")
    assert {name: new.unwrap(t.cast(str, new.find(name)), blob) for name, blob in wrapped.items()} == {
        name: name.encode() for name in names
    }
    # The second client: the new files come, the old ones stay until its own run puts them aside.
    nshield.world.copy_world(pair.a, b)
    assert len([key for key in b.keys().values() if key["token"] == old_token]) == 2
    told = pair.run("nshield_key_protection", b, keys=names, protection="softcard", token=target)
    assert [copy["token"] for key in told["nshield_keys"] for copy in key["copies"]] == [old_token, old_token]
    tidied = pair.run("nshield_key_protection", b, keys=names, **transfer_options(source, target))
    assert [step["action"] for step in tidied["plan"]] == ["back_up_world", "retire_key_file", "retire_key_file"]
    assert tidied["other_clients_need"] == []
    assert [key for key in b.keys().values() if key["token"] == old_token] == []
    assert b.login(f"{NEW}|{target}").find(names[0])
    assert not pair.run("nshield_key_protection", b, keys=names, **transfer_options(source, target))["changed"]


def test_what_rocs_will_ask_for_is_looked_at_before(pair: Site) -> None:
    pair.a.create_softcard("from2", PASSPHRASE)
    pair.a.create_softcard("to2", NEW)
    pair.a.login(f"{PASSPHRASE}|from2").create_key(MASTER + "21")
    wish = transfer_options("from2", "to2")
    runs = len(pair.commands("rocs"))
    assert pair.run("nshield_key_protection", **{**wish, "passphrase": PASSPHRASE})["error_code"] == "nshield_passphrase_refused"
    without = {name: value for name, value in wish.items() if name != "acs_passphrase"}
    assert pair.run("nshield_key_protection", **without)["error_code"] == "credential_missing"
    pair.hsm.remove(slot=1)
    assert pair.run("nshield_key_protection", **wish)["error_code"] == "nshield_authorisation_missing"
    pair.hsm.insert("acs:1", slot=1)
    assert len(pair.commands("rocs")) == runs
    # A wrong passphrase of the administrator card shows in rocs itself, and nothing has moved.
    wrong = pair.run("nshield_key_protection", **{**wish, "acs_passphrase": "Admin-card-0"})
    assert wrong["error_code"] == "nshield_passphrase_refused"
    assert pair.a.login(f"{PASSPHRASE}|from2").find(MASTER + "21")


def test_between_card_sets_a_card_of_the_new_set_is_in_a_slot() -> None:
    with nshield.site(slots=3) as site:
        sets = [site.a.create_cardset(name, PASSPHRASE) for name in ("ocs1", "ocs2")]
        site.hsm.insert("acs:1", slot=2)
        site.hsm.insert(f"{sets[0]}:1", slot=0)
        site.a.login(f"{PASSPHRASE}|ocs1").create_key(MASTER + "31")
        wish = {**transfer_options("ocs1", "ocs2"), "protection": "ocs", "passphrase": PASSPHRASE}
        assert site.run("nshield_key_protection", **wish)["error_code"] == "nshield_authorisation_missing"
        site.hsm.insert(f"{sets[1]}:2", slot=1)
        assert site.run("nshield_key_protection", **wish)["nshield_keys"][0]["token_name"] == "ocs2"


def test_a_world_without_recovery_transfers_nothing() -> None:
    with nshield.site(recovery=False) as site:
        site.a.create_softcard("from", PASSPHRASE)
        site.a.create_softcard("to", NEW)
        site.hsm.insert("acs:1")
        site.a.login(f"{PASSPHRASE}|from").create_key(MASTER + "41")
        assert site.run("nshield_key_protection", **transfer_options("from", "to"))["error_code"] == "nshield_not_recoverable"


# nshield_client


def test_variables_are_set_in_place_and_the_environment_wins() -> None:
    with nshield.site() as site:
        wish = [{"name": "CKNFAST_NO_ACCELERATOR_SLOTS", "setting": "1"}, {"name": "CKNFAST_DEBUG", "state": "absent"}]
        sleeper = subprocess.Popen(["/bin/sleep", "60"], env={"CKNFAST_LOADSHARING": "0"})
        try:
            # The kernel shows an environment a moment after the program has started.
            while not Path(f"/proc/{sleeper.pid}/environ").read_bytes():
                time.sleep(0.01)
            result = site.run("nshield_client", variables=wish, processes_of=["root"], diff=True)
        finally:
            sleeper.kill()
            sleeper.wait()
        assert (result["changed"], result["restart_required"]) == (True, True)
        assert (site.a.home / "cknfastrc").read_text() == (
            "# made by the installer\nCKNFAST_LOADSHARING=1\nCKNFAST_NO_ACCELERATOR_SLOTS=1\n"
        )
        ours = next(item for item in result["overridden"] if sleeper.pid in item["processes"])
        assert (ours["variable"], ours["file"], ours["environment"]) == ("CKNFAST_LOADSHARING", "1", "0")
        again = site.run("nshield_client", variables=wish)
        assert (again["changed"], again["restart_required"]) == (False, False)
        # With that slot hidden, a mistyped credential is refused instead of slipping.
        site.a.create_softcard("tde", PASSPHRASE)
        with pytest.raises(nshield.world.LoginRefused):
            site.a.login(f"{PASSPHRASE}|tdee")
        assert site.run("nshield_client", variables=[{"name": "CKNFAST_LOADSHARE", "setting": "1"}])["warnings"]


def test_a_hardserver_that_is_down_is_told(shared: Site) -> None:
    with nshield.site() as site:
        assert site.run("nshield_client")["hardserver"] == {"running": True, "message": ""}
        site.a.set(hardserver=False)
        assert site.run("nshield_client")["hardserver"]["running"] is False
        assert site.run("nshield_info")["error_code"] == "nshield_hardserver_down"


def test_keys_reach_the_other_client_and_who_lacks_what_is_remembered() -> None:
    with nshield.site(clients=("a", "b", "rfs")) as site:
        b, rfs = site.clients["b"], site.clients["rfs"]
        server = {"kind": "rfs_server", "gang_clients": ["a", "b"], "authenticate": False}
        assert site.run("nshield_client", rfs, distribution=server)["changed"]
        assert not site.run("nshield_client", rfs, distribution=server)["changed"]
        way = {"kind": "rfs_client", "address": "rfs", "authenticate": False}
        site.run("nshield_client", clients=["b"])
        site.run("nshield_softcard", name="tde", passphrase=PASSPHRASE)
        site.a.login(f"{PASSPHRASE}|tde").create_key(MASTER + "51")
        first = site.run("nshield_client", distribution={**way, "sync": "commit"})
        assert [step["action"] for step in first["plan"]] == ["set_up_sync", "commit_to_rfs"]
        assert first["clients_behind"][0]["name"] == "b"
        assert "softcard tde was made" in first["clients_behind"][0]["needs"][0]
        assert not site.run("nshield_client", distribution={**way, "sync": "commit"})["changed"]
        # The other client: behind, then not.
        digest = first["world_digest"]
        assert site.run("nshield_client", b, world_digest=digest)["error_code"] == "nshield_client_behind"
        fetched = site.run("nshield_client", b, distribution={**way, "sync": "update"}, world_digest=digest)
        assert fetched["changed"]
        assert b.login(f"{PASSPHRASE}|tde").find(MASTER + "51")
        assert not site.run("nshield_client", b, distribution={**way, "sync": "update"}, world_digest=digest)["changed"]
        assert site.run("nshield_client", supplied=["b"])["clients_behind"] == []
        site.hsm.fault("rfs", "down")
        assert site.run("nshield_client", b, distribution={**way, "sync": "update"})["error_code"] == "command_failed"


@pytest.mark.slow
def test_a_module_that_is_killed_while_rocs_asks_is_run_again(pair: Site) -> None:
    pair.a.create_softcard("from3", PASSPHRASE)
    pair.a.create_softcard("to3", NEW)
    pair.a.login(f"{PASSPHRASE}|from3").create_key(MASTER + "71")
    pair.hsm.fault("hang", "rocs")
    wish = transfer_options("from3", "to3", keys=[MASTER + "71"])
    content = json.dumps({"ANSIBLE_MODULE_ARGS": {**pair.options(), **wish}})
    module = subprocess.Popen(
        [sys.executable, str(support.ROOT / "plugins/modules/nshield_key_protection.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={"PYTHONPATH": str(support.ROOT / ".collections")},
        text=True,
    )
    t.cast(t.IO[str], module.stdin).write(content)
    t.cast(t.IO[str], module.stdin).close()
    journal = Journal(str(pair.a.home.with_suffix(".state") / "journal.jsonl"))
    deadline = time.monotonic() + 60
    while (journal.last(action="transfer_keys") or {}).get("result") != "begun":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    module.kill()
    module.wait()
    pair.hsm.fault("hang", None)
    assert pair.a.login(f"{PASSPHRASE}|from3").find(MASTER + "71")
    assert pair.run("nshield_key_protection", **wish)["nshield_keys"][0]["token_name"] == "to3"


def test_a_folder_beside_the_common_store_is_an_error(shared: Site, tmp_path: Path) -> None:
    way = {"kind": "common_store", "store": str(tmp_path)}
    assert shared.run("nshield_client", distribution=way)["error_code"] == "nshield_store_not_common"
    # The worlds of these tests are in memory, which stands for the store here.
    assert not shared.run("nshield_client", distribution={**way, "store": "/dev/shm"}).get("failed")
    # /proc is mounted, and the folder is not below it.
    assert shared.run("nshield_client", distribution={**way, "store": "/proc"})["error_code"] == "nshield_store_not_common"


# What the stand-in itself is relied on for


def test_tokens_are_softhsm_s_and_their_pins_the_passphrases(shared: Site) -> None:
    where = {
        "library": support.softhsm_library(),
        "library_environment": {"SOFTHSM2_CONF": str(shared.hsm.path / "softhsm2.conf")},
        "state_directory": str(shared.a.home.with_suffix(".state")),
    }
    labels = [token["label"] for token in support.run_module("pkcs11_token_info", where)["tokens"]]
    assert sorted(label for label in labels if label) == ["cards", "loadshared accelerator", "one"]
    found = support.run_module("pkcs11_key_info", {**where, "token_label": "one", "pin": PASSPHRASE})
    assert [key["label"] for key in found["pkcs11_keys"]] == [MASTER + "01"]
    wrong = support.run_module("pkcs11_key_info", {**where, "token_label": "one", "pin": NEW})
    assert wrong["error_code"] == "pin_refused"


def test_a_session_sees_keys_that_others_made_when_it_connects_anew_or_scans() -> None:
    with nshield.site() as site:
        site.a.create_softcard("tde", PASSPHRASE)
        caching, maker = site.a.login(f"{PASSPHRASE}|tde"), site.a.login(f"{PASSPHRASE}|tde")
        site.run("nshield_client", variables=[{"name": "CKNFAST_ASSUME_SINGLE_PROCESS", "setting": "0"}])
        scanning = site.a.login(f"{PASSPHRASE}|tde")
        maker.create_key(MASTER + "81")
        assert maker.find(MASTER + "81")
        assert caching.find(MASTER + "81") is None
        assert scanning.find(MASTER + "81")
        assert site.a.login(f"{PASSPHRASE}|tde").find(MASTER + "81")


# Secrets


def test_no_secret_on_any_argv_in_any_output_or_journal(tmp_path: Path) -> None:
    """strace sees every program that is started, with arguments and environment."""
    with nshield.site() as site:
        site.hsm.insert("acs:1")
        site.run("nshield_softcard", name="from", passphrase=PASSPHRASE)
        site.run("nshield_softcard", name="to", passphrase=PASSPHRASE)
        site.a.login(f"{PASSPHRASE}|from").create_key(MASTER + "61")
        trace = tmp_path / "trace"
        prefix = ["strace", "-f", "--seccomp-bpf", "-v", "-s", "400", "-e", "trace=execve", "-o", str(trace)]
        outputs = []
        for module, options in (
            ("nshield_softcard", {"name": "to", "passphrase": NEW, "old_passphrase": PASSPHRASE}),
            ("nshield_key_protection", transfer_options("from", "to")),
        ):
            outputs.append(support.run_module_file(module, {**site.options(), **options}, prefix=prefix, diff=True))
            outputs[-1].pop("failed", None)
            assert outputs[-1]["changed"], outputs[-1]
            seen = trace.read_text()
            assert "ppmk" in seen
            for secret in (PASSPHRASE, NEW, ACS_PASSPHRASE):
                assert secret not in seen
        places = [json.dumps(outputs), (site.hsm.path / "journal.jsonl").read_text()]
        places += [path.read_text() for path in site.a.home.with_suffix(".state").rglob("*") if path.is_file()]
        for secret in (PASSPHRASE, NEW, ACS_PASSPHRASE):
            assert not [place for place in places if secret in place]


def test_what_is_not_understood_is_an_error_and_not_an_empty_list(shared: Site) -> None:
    with nshield.site() as site:
        site.hsm.fault("garbage", "nfkminfo")
        assert site.run("nshield_info")["error_code"] == "nshield_answer_unknown"
