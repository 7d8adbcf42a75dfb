# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The three changes of Entrust's guide, on the stand-ins for Oracle and nShield: passphrase, token with its keys, and the safe way round."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.tests.integration import nshield, oracle
from ansible_collections.hsm.tde.tests.integration.oracle import NEW, OLD, SOFTWARE, Site, Slot

pytestmark = pytest.mark.root

CHANGED: Slot = ("softcard", "one", NEW)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Site]:
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path / "oracle"))
    oracle.quick(monkeypatch)
    with oracle.site(tmp_path) as found:
        yield found


def _in_order(found: t.Sequence[str], wanted: t.Sequence[str]) -> bool:
    """Whether the wanted beginnings stand in this order among the found."""
    rest = iter(found)
    return all(any(word in line for line in rest) for word in wanted)


def test_check_mode_shows_every_step_and_does_none(site: Site) -> None:
    site.encrypted()
    before = site.database.state()
    plan = site.keystore(CHANGED, check=True).plan
    assert [step.action for step in plan] == [
        "close_keystore",
        "mark_closed",
        "change_token_passphrase",
        "restart_database",
        "open_pdbs",
        "open_keystore",
        "verify_protection",
        "finish_change",
    ]
    assert site.database.state() == before
    assert memos.read(site.state, "main").change is None


@pytest.mark.slow
def test_another_softcard_takes_the_keys_along(site: Site) -> None:
    site.encrypted()
    site.hsm.a.create_softcard("two", NEW)
    site.hsm.hsm.insert("acs:1", slot=2)
    target: Slot = ("softcard", "two", NEW)
    with pytest.raises(TdeError) as caught:
        site.keystore(target)
    assert caught.value.code == "oracle_change_refused"
    assert site.read() == "content"
    options = {"transfer_keys": True, "acs_passphrase": nshield.ACS_PASSPHRASE}
    site.until_done(target, **options)
    assert site.read() == "content"
    assert site.keystore(target, **options).facts["backups_need"]
    assert not site.keystore(target).changed


def test_from_module_protection_to_a_card_set_by_the_safe_way_round(site: Site) -> None:
    site.encrypted(("module", None, None), "Module-1")
    assert site.protections() == {"module"}
    cards = site.hsm.a.create_cardset("cards", NEW, quorum=(1, 2))
    site.hsm.hsm.insert(f"{cards}:1")
    target: Slot = ("ocs", "cards", NEW)
    with pytest.raises(TdeError) as caught:
        site.keystore(target, "Module-1")
    assert caught.value.code == "oracle_change_refused"
    assert site.read() == "content"
    options = {"safe_way_round": True, "software_passphrase": SOFTWARE}
    actions = site.until_done(target, "Module-1", **options)
    assert _in_order(
        actions, ["reverse_migrate_key", "finish_leg", "credential_changed", "finish_leg", "migrate_key", "finish_change"]
    )
    assert site.read() == "content"
    assert site.protections() == {"module", "ocs"}
    again = site.keystore(target, "Module-1", **options)
    assert not again.changed
    assert any("module protection" in line for line in again.facts["backups_need"])


def test_cards_in_no_slot_are_told_of_until_they_have_the_new_passphrase(site: Site) -> None:
    """The guide: all cards of the set must share the same passphrase."""
    cards = site.hsm.a.create_cardset("cards", OLD, quorum=(1, 2))
    site.hsm.hsm.insert(f"{cards}:1")
    site.until_done(("ocs", "cards", None))
    target: Slot = ("ocs", "cards", NEW)
    assert site.keystore(target).facts["restart_required"]
    site.database.bounce()
    for dummy in range(2):
        assert any("is on its cards 1 alone" in warning for warning in site.keystore(target).warnings)
    site.hsm.hsm.insert(f"{cards}:2")
    wish = {"name": "cards", "passphrase": NEW, "old_passphrase": OLD, "state_directory": site.state.path}
    assert site.hsm.run("nshield_cardset", **wish)["changed"]
    again = site.keystore(target)
    assert not again.changed
    assert not [warning for warning in again.warnings if "passphrase" in warning]


def test_a_mistyped_target_ends_the_way_round_before_its_first_leg(site: Site) -> None:
    site.encrypted(("module", None, None), "Module-1")
    before = site.database.state()
    with pytest.raises(TdeError) as caught:
        site.keystore(("softcard", "one", NEW), "Module-1", safe_way_round=True, software_passphrase=SOFTWARE)
    assert caught.value.code == "nshield_passphrase_refused"
    assert site.database.state() == before


def test_from_the_software_keystore_into_the_hsm_and_back(site: Site) -> None:
    site.encrypted(("passphrase", None, None), SOFTWARE)
    target: Slot = ("softcard", "one", OLD)
    site.until_done(target, SOFTWARE)
    assert site.read() == "content"
    assert site.protections() == {"softcard"}
    assert not site.keystore(target, SOFTWARE).changed
    back: Slot = ("passphrase", None, SOFTWARE)
    site.until_done(back, OLD)
    assert site.read() == "content"
    assert not site.keystore(back, OLD).changed


def test_with_the_external_store_the_credential_stands_in_one_statement(site: Site) -> None:
    site.encrypted(external_store=True)
    named = [line for line in site.statements() if "***" in line]
    assert len(named) == 1
    assert "FOR CLIENT 'TDE_WALLET'" in named[0]
    site.until_done(CHANGED, external_store=True)
    site.open_pdbs()
    site.keystore(None, NEW, state="open")
    assert site.read() == "content"
    assert len([line for line in site.statements() if "***" in line]) == 2


def test_where_nothing_is_encrypted_the_credential_is_replaced_and_new_keys_are_made(site: Site) -> None:
    site.until_done(oracle.SOFT)
    site.open_pdbs()
    site.keystore(None, state="open")
    site.master_key()
    site.hsm.a.create_softcard("two", NEW)
    target: Slot = ("softcard", "two", NEW)
    assert "credential_changed" in site.until_done(target)
    assert [step.action for step in site.master_key(NEW).plan] == ["set_key"] * 2 + ["verify_protection"]
    assert {key["token"] for key in site.hsm.a.keys().values()} == set(site.hsm.a.softcards())
    assert not site.keystore(target).changed


@pytest.mark.slow
def test_module_softcard_other_softcard_card_set_one_after_the_other(site: Site) -> None:
    site.encrypted(("module", None, None), "Module-1")
    site.hsm.a.create_softcard("two", NEW)
    cards = site.hsm.a.create_cardset("cards", "Cards-3", quorum=(1, 2))
    site.hsm.hsm.insert(f"{cards}:1")
    site.hsm.hsm.insert("acs:1", slot=2)
    way: dict[str, t.Any] = {"safe_way_round": True, "software_passphrase": SOFTWARE}
    walk: list[tuple[Slot, str, dict[str, t.Any]]] = [
        (("softcard", "one", OLD), "Module-1", way),
        (("softcard", "two", NEW), OLD, {"transfer_keys": True, "acs_passphrase": nshield.ACS_PASSPHRASE}),
        (("ocs", "cards", "Cards-3"), NEW, way),
    ]
    for slot, before, options in walk:
        site.until_done(slot, before, **options)
        assert site.read() == "content", slot
        second = site.keystore(slot, before, **options)
        assert not second.changed, slot
    assert len(second.facts["backups_need"]) == 3
    assert not site.master_key("Cards-3").changed
