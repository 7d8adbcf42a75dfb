# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the engine oracle decides, from plain facts."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import plan, sql
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle.facts import (
    Container,
    Facts,
    Guard,
    MasterKey,
    Space,
    Wallet,
)

FILE, MODULE, SOFT, OTHER = Guard("passphrase"), Guard("module"), Guard("softcard", "one"), Guard("softcard", "two")
CARD, CARD2 = Guard("ocs", "cards"), Guard("ocs", "others")
CONTAINERS = (
    Container(1, "CDB$ROOT", True),
    Container(2, "PDB$SEED", False),
    Container(3, "PDB1", True),
    Container(4, "PDB2", True),
)


def facts(hsm: bool = True, opened: t.Sequence[int] = (1, 3, 4), **more: t.Any) -> Facts:
    kind, keystore = ("HSM", "HSM") if hsm else ("FILE", "SOFTWARE KEYSTORE")
    given: dict[str, t.Any] = {
        "startup": "1",
        "wallet_root": "/w",
        "wallet_root_next": "/w",
        "configuration": kind,
        "configuration_next": kind,
        "containers": CONTAINERS,
        "wallets": tuple(Wallet(n, "OPEN" if n in opened else "CLOSED", kind, "SINGLE", "UNITED") for n in (1, 3, 4)),
        "keys": tuple(MasterKey(n, f"k{n}", "hsm-tde.main", "1", "2", keystore) for n in (1, 3, 4)),
    }
    return Facts(**{**given, **more})


def wish(guard: Guard = SOFT, **more: t.Any) -> plan.Wish:
    return plan.Wish(guard, "/w", **more)


ENCRYPTED = {"spaces": (Space(3, "USERS", "AES256", "NORMAL", 0),)}


def actions(steps: t.Sequence[t.Any]) -> list[str]:
    return [step.action for step in steps]


def test_a_keystore_that_is_as_wished_needs_nothing() -> None:
    assert plan.present(facts(), wish(), SOFT, None) == plan.Decision([])


def test_the_roots_keystore_opens_first_and_then_each_pdb_that_was_left_behind() -> None:
    first = plan.present(facts(opened=()), wish(), SOFT, None).now
    assert [step.data for step in first] == [{"container": "CDB$ROOT", "all": True, "hsm": True}]
    behind = plan.present(facts(opened=(1, 3)), wish(), SOFT, None).now
    assert [step.data["container"] for step in behind] == ["PDB2"]


def test_named_pdbs_alone_are_opened() -> None:
    named = wish(containers=("pdb2",))
    assert [step.data["all"] for step in plan.opening(facts(opened=()), named, hsm=True)] == [False]
    assert [step.data["container"] for step in plan.opening(facts(opened=(1,)), named, hsm=True)] == ["PDB2"]
    with pytest.raises(TdeError) as caught:
        plan.chosen(facts(), ("NOPE",))
    assert caught.value.code == "database_absent"


def test_the_seed_is_never_touched() -> None:
    assert all(one.con_id != 2 for one in plan.chosen(facts(), None))


def test_wallet_root_asks_for_a_restart_before_anything_else() -> None:
    fresh = facts(wallet_root="", wallet_root_next="", configuration="", configuration_next="", wallets=(), keys=())
    first = plan.present(fresh, wish(auto_login=True, secret_current=False, software_made=False), None, None)
    assert [step.data["scope"] for step in first.now] == ["SPFILE", "SPFILE"]
    assert first.now[1].data["value"] == "FILE"
    assert "restart_database" in actions(first.later)
    after = dataclasses.replace(fresh, wallet_root_next="/w", configuration_next="FILE")
    assert plan.present(after, wish(auto_login=True, secret_current=False), None, None).restart


def test_auto_login_is_arranged_under_file_before_the_hsm_is_named() -> None:
    fresh = facts(hsm=False, keys=(), wallets=())
    asked = wish(auto_login=True, secret_current=False)
    assert actions(plan.present(fresh, dataclasses.replace(asked, software_made=False), None, None).now) == ["create_keystore"]
    opened = facts(hsm=False, keys=())
    assert actions(plan.present(opened, asked, None, None).now) == ["write_secret", "create_auto_login"]
    steps = plan.present(opened, dataclasses.replace(asked, secret_current=True), None, None).now
    assert [step.data["value"] for step in steps] == ["HSM|FILE"]


@pytest.mark.parametrize(
    ("current", "target", "more", "kind"),
    [
        (SOFT, SOFT, {}, None),
        (SOFT, SOFT, {"new_credential": True}, "passphrase"),
        (MODULE, MODULE, {"new_credential": True}, "passphrase"),
        (SOFT, OTHER, {"transfer": True}, "transfer"),
        (CARD, CARD2, {"transfer": True}, "transfer"),
        (SOFT, OTHER, {"round_trip": True}, "round_trip"),
        (MODULE, SOFT, {"round_trip": True}, "round_trip"),
        (SOFT, CARD, {"round_trip": True}, "round_trip"),
        (FILE, SOFT, {}, "migrate"),
        (SOFT, FILE, {}, "reverse"),
        (None, SOFT, {"new_credential": True}, None),
    ],
)
def test_kinds_of_change(current: Guard | None, target: Guard, more: dict[str, t.Any], kind: str | None) -> None:
    assert plan.kind_of(current, wish(target, **more), facts(**ENCRYPTED)) == kind


@pytest.mark.parametrize(("current", "target"), [(SOFT, OTHER), (SOFT, CARD), (MODULE, SOFT), (CARD, MODULE), (CARD, CARD2)])
def test_without_transfer_it_is_refused_while_anything_is_encrypted(current: Guard, target: Guard) -> None:
    for state in (facts(**ENCRYPTED), facts(columns=1)):
        with pytest.raises(TdeError) as caught:
            plan.present(state, wish(target), current, None)
        assert caught.value.code == "oracle_change_refused"
        assert "safe_way_round" in caught.value.next_step
    assert plan.kind_of(current, wish(target), facts()) == "replace"


@pytest.mark.parametrize(("current", "target"), [(SOFT, CARD), (CARD, SOFT), (MODULE, SOFT), (SOFT, MODULE)])
def test_a_transfer_between_methods_is_refused(current: Guard, target: Guard) -> None:
    with pytest.raises(TdeError) as caught:
        plan.kind_of(current, wish(target, transfer=True), facts())
    assert caught.value.code == "nshield_transfer_forbidden"


def test_a_passphrase_change_goes_the_guides_way_through_its_phases() -> None:
    asked = wish(new_credential=True, auto_login=True, secret_current=False)
    shut = (*CONTAINERS[:3], Container(4, "PDB2", False))
    first = plan.present(facts(containers=shut), asked, SOFT, None)
    assert actions(first.now) == ["open_pdbs", "close_keystore"]
    assert first.now[1].data["all"]
    assert actions(first.later) == [
        "mark_closed",
        "change_token_passphrase",
        "restart_database",
        "open_pdbs",
        "open_keystore",
        "write_secret",
        "create_auto_login",
        "verify_protection",
        "finish_change",
    ]
    change = plan.Change("passphrase", SOFT, SOFT)
    assert actions(plan.present(facts(opened=()), asked, SOFT, change).now) == ["mark_closed"]
    change = dataclasses.replace(change, phase="closed")
    assert actions(plan.present(facts(opened=()), asked, SOFT, change).now) == ["change_token_passphrase"]
    change = dataclasses.replace(change, phase="token", startup="1")
    waiting = plan.present(facts(opened=()), asked, SOFT, change)
    assert (waiting.now, len(waiting.restart)) == ([], 1)
    bounced = facts(opened=(), startup="2", containers=shut)
    assert actions(plan.present(bounced, asked, SOFT, change).now) == ["open_pdbs"]
    assert actions(plan.present(facts(opened=(), startup="2"), asked, SOFT, change).now) == ["open_keystore"]
    assert actions(plan.present(facts(startup="2"), asked, SOFT, change).now) == ["write_secret", "create_auto_login"]
    current = dataclasses.replace(asked, secret_current=True)
    assert [step.data["value"] for step in plan.present(facts(startup="2"), current, SOFT, change).now] == ["HSM|FILE"]
    final = facts(startup="2", configuration="HSM|FILE", configuration_next="HSM|FILE")
    assert actions(plan.present(final, current, SOFT, change).now) == ["verify_protection", "finish_change"]


def test_auto_login_is_out_of_the_way_while_the_credential_changes() -> None:
    """Or it opens the keystore with the former credential whenever somebody looks at it."""
    state = facts(configuration="HSM|FILE", configuration_next="HSM|FILE")
    steps = plan.present(state, wish(new_credential=True, auto_login=True, secret_current=False), SOFT, None).now
    assert actions(steps) == ["alter_system", "close_keystore"]
    assert steps[0].data["value"] == "HSM"


def test_a_master_key_that_does_not_show_is_not_replaced() -> None:
    hidden = facts(keys=(), **ENCRYPTED)
    for keyed in (("CDB$ROOT", "PDB1", "PDB2"), ("PDB1",)):
        with pytest.raises(TdeError) as caught:
            plan.master_keys(hidden, wish(), "main", None, keyed)
        assert caught.value.code == "oracle_master_key_unreachable"


def test_a_change_without_transfer_is_judged_when_every_pdb_shows_what_it_has() -> None:
    shut = facts(containers=(*CONTAINERS[:3], Container(4, "PDB2", False)))
    decision = plan.present(shut, wish(OTHER), SOFT, None)
    assert (actions(decision.now), decision.change) == (["open_pdbs"], None)
    judged = plan.present(facts(), wish(OTHER), SOFT, None).change
    assert judged is not None
    assert judged.kind == "replace"


def test_a_leg_does_not_end_while_a_master_key_does_not_show() -> None:
    both = {
        "configuration": "FILE|HSM",
        "configuration_next": "FILE|HSM",
        "wallets": (*facts().wallets, *facts(hsm=False).wallets),
    }
    change = plan.Change("round_trip", SOFT, CARD)
    for hidden, keyed in ((facts(keys=(), **both, **ENCRYPTED), ()), (facts(keys=(), **both), ("PDB1",))):
        with pytest.raises(TdeError) as caught:
            plan.present(hidden, wish(CARD, round_trip=True, keyed=keyed), SOFT, change)
        assert caught.value.code == "oracle_master_key_unreachable"
    # What nobody knows of has no key that could be lost.
    assert actions(plan.present(facts(keys=(), **both), wish(CARD, round_trip=True), SOFT, change).now) == ["alter_system"]


def test_closing_takes_auto_login_out_of_the_way() -> None:
    state = facts(configuration="HSM|FILE", configuration_next="HSM|FILE")
    assert actions(plan.closed(state, wish(auto_login=True)).now) == ["alter_system", "close_keystore"]
    assert plan.closed(facts(opened=()), wish(auto_login=True)).now == []
    with pytest.raises(TdeError) as caught:
        plan.closed(state, wish(auto_login=True, containers=("PDB1",)))
    assert caught.value.code == "invalid_option"


def test_module_protection_has_no_token_step() -> None:
    change = plan.Change("passphrase", MODULE, MODULE, phase="closed")
    steps = plan.present(facts(opened=()), wish(MODULE, new_credential=True), MODULE, change).now
    assert actions(steps) == ["credential_changed"]


def test_the_safe_way_round_takes_the_keys_out_before_and_back_after() -> None:
    asked = wish(CARD, round_trip=True)
    decision = plan.present(facts(**ENCRYPTED), asked, SOFT, None)
    assert [step.data.get("value") for step in decision.now] == ["FILE|HSM"]
    assert actions(decision.later) == [
        "credential_changed",
        "restart_database",
        "migrate_key",
        "verify_protection",
        "finish_change",
    ]
    both = {"configuration": "FILE|HSM", "configuration_next": "FILE|HSM"}
    change = plan.Change("round_trip", SOFT, CARD)
    wallets = (*facts().wallets, *facts(hsm=False).wallets)
    steps = plan.present(facts(wallets=wallets, **both), asked, SOFT, change).now
    assert [step.data["container"] for step in steps] == ["CDB$ROOT", "PDB1", "PDB2"]
    assert set(actions(steps)) == {"reverse_migrate_key"}
    out = facts(hsm=False, wallets=wallets, **both)
    assert [step.data["value"] for step in plan.present(out, asked, SOFT, change).now] == ["FILE"]
    assert actions(plan.present(facts(hsm=False), asked, SOFT, change).now) == ["finish_leg"]


def test_a_migration_is_believed_only_when_the_far_side_is_open() -> None:
    """A restart after the migration: the software keystore opened by itself, and shows its old key alone."""
    change = plan.Change("migrate", FILE, SOFT)
    both = {"configuration": "HSM|FILE", "configuration_next": "HSM|FILE"}
    steps = plan.present(facts(hsm=False, **both), wish(), FILE, change).now
    assert actions(steps) == ["open_keystore"]
    assert steps[0].data["hsm"]


def test_another_wish_does_not_cross_a_change_that_was_begun() -> None:
    with pytest.raises(TdeError) as caught:
        plan.present(facts(), wish(OTHER), SOFT, plan.Change("passphrase", SOFT, SOFT))
    assert caught.value.code == "oracle_change_unfinished"


def test_a_tag_on_a_key_that_was_never_activated_is_no_rotation() -> None:
    made = tuple(MasterKey(n, f"n{n}", "hsm-tde.main.2", "3", "", "HSM") for n in (1, 3, 4))
    steps = plan.master_keys(facts(keys=(*facts().keys, *made)), wish(), "main", "2")
    assert actions(steps) == ["use_key"] * 3 + ["verify_protection"]


def test_a_rotation_is_done_once_and_missing_containers_catch_up() -> None:
    assert actions(plan.master_keys(facts(), wish(), "main", "2")) == ["set_key"] * 3 + ["verify_protection"]
    new = tuple(MasterKey(n, f"n{n}", "hsm-tde.main.2", "3", "4", "HSM") for n in (1, 3))
    steps = plan.master_keys(facts(keys=(*facts().keys, *new)), wish(), "main", "2")
    assert [step.data.get("container") for step in steps] == ["PDB2", None]
    assert plan.master_keys(facts(), wish(), "main", None) == []


def test_an_older_tag_is_not_set_again() -> None:
    new = tuple(MasterKey(n, f"n{n}", "hsm-tde.main.3", "3", "4", "HSM") for n in (1, 3, 4))
    old = tuple(MasterKey(n, f"o{n}", "hsm-tde.main.2", "3", "3", "HSM") for n in (1, 3, 4))
    with pytest.raises(TdeError) as caught:
        plan.master_keys(facts(keys=(*old, *new)), wish(), "main", "2")
    assert caught.value.code == "tag_superseded"


def test_a_closed_pdb_stops_a_rotation_before_it_begins() -> None:
    shut = (*CONTAINERS[:3], Container(4, "PDB2", False))
    with pytest.raises(TdeError) as caught:
        plan.master_keys(facts(containers=shut), wish(), "main", "2")
    assert caught.value.code == "oracle_containers_behind"
    assert plan.master_keys(facts(containers=shut), wish(containers=("PDB1",)), "main", "2")


@pytest.mark.parametrize("code", [*sql._CODES, "ORA-03113", "ORA-12514", "DPY-6005", "ORA-00600", ""])
def test_an_answer_of_the_server_is_told_by_its_number_and_says_what_to_do(code: str) -> None:
    class Reason:
        full_code = code
        message = 'SET KEYSTORE OPEN IDENTIFIED BY "Geheim-1|one"'

    error = sql.failure(Exception(Reason()), "keystore")
    assert "Geheim" not in f"{error} {error.result()}"
    assert code in str(error)
    assert error.next_step
