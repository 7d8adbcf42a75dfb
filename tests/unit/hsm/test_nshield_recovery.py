"""The guide's recovery matrix: a test a cell, a test a remark; then that nothing but the stated conditions decides."""

from __future__ import annotations

import dataclasses

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield_recovery import CELLS, REQUIREMENTS, Facts, verdict
from hypothesis import given
from hypothesis import strategies as st

#: All that the guide asks for, at once; each test takes away what it is about.
GOOD = Facts(
    fips_level=2,
    protection="module",
    cluster=False,
    auto_login=True,
    quorum=(1, 3),
    same_passphrase=True,
    same_cardset=True,
    modules=1,
    modules_with_credential_card=1,
    modules_with_fips_card=1,
    fips_authorisation="ocs",
    same_world=True,
    remote_administration=False,
    persistent_only=False,
    cards=3,
)


def facts(fips_level: int, protection: str, cluster: bool, **more: object) -> Facts:
    number = 2 if cluster else 1
    base = {"modules": number, "modules_with_credential_card": number, "modules_with_fips_card": number}
    return dataclasses.replace(GOOD, fips_level=fips_level, protection=protection, cluster=cluster, **{**base, **more})


def automatic(*cell: object, **more: object) -> None:
    found = verdict(facts(*cell, **more))
    assert (found.automatic, found.missing, found.unknown) == (True, (), ())


def missing(code: str, *cell: object, **more: object) -> None:
    found = verdict(facts(*cell, **more))
    assert found.automatic is False
    assert found.missing == (code,)


# The twelve cells.


def test_fips2_module_stand_alone_recovers_automatically():
    automatic(2, "module", False, modules_with_credential_card=0, modules_with_fips_card=0)
    assert verdict(facts(2, "module", False)).cell == "fips2.module.stand_alone"


def test_fips2_module_cluster_recovers_automatically():
    automatic(2, "module", True, modules_with_credential_card=0, modules_with_fips_card=0)


def test_fips2_softcard_stand_alone_recovers_automatically():
    automatic(2, "softcard", False, modules_with_credential_card=0, modules_with_fips_card=0)


def test_fips2_softcard_cluster_recovers_automatically():
    automatic(2, "softcard", True, modules_with_credential_card=0, modules_with_fips_card=0)


def test_fips2_ocs_stand_alone_1_of_n_same_passphrase_one_card_in_the_slot():
    automatic(2, "ocs", False)
    missing("quorum_one", 2, "ocs", False, quorum=(2, 3))
    missing("same_passphrase", 2, "ocs", False, same_passphrase=False)
    missing("credential_card_in_slot", 2, "ocs", False, modules_with_credential_card=0)


def test_fips2_ocs_cluster_1_of_n_same_passphrase_a_card_in_the_slot_of_every_hsm():
    automatic(2, "ocs", True)
    missing("quorum_one", 2, "ocs", True, quorum=(2, 3))
    missing("same_passphrase", 2, "ocs", True, same_passphrase=False)
    missing("credential_card_in_slot", 2, "ocs", True, modules_with_credential_card=1)


def test_fips3_module_stand_alone_an_ocs_card_in_the_slot_for_fips_authorisation():
    automatic(3, "module", False, modules_with_credential_card=0)
    missing("fips_card_in_slot", 3, "module", False, modules_with_fips_card=0)


def test_fips3_module_cluster_an_ocs_card_in_the_slot_of_every_hsm_for_fips_authorisation():
    automatic(3, "module", True, modules_with_credential_card=0)
    missing("fips_card_in_slot", 3, "module", True, modules_with_fips_card=1)


def test_fips3_softcard_stand_alone_an_ocs_card_in_the_slot_for_fips_authorisation():
    automatic(3, "softcard", False, modules_with_credential_card=0)
    missing("fips_card_in_slot", 3, "softcard", False, modules_with_fips_card=0)


def test_fips3_softcard_cluster_an_ocs_card_in_the_slot_of_every_hsm_for_fips_authorisation():
    automatic(3, "softcard", True, modules_with_credential_card=0)
    missing("fips_card_in_slot", 3, "softcard", True, modules_with_fips_card=1)


def test_fips3_ocs_stand_alone_one_card_for_credential_and_fips_authorisation():
    automatic(3, "ocs", False)
    missing("quorum_one", 3, "ocs", False, quorum=(3, 5))
    missing("same_passphrase", 3, "ocs", False, same_passphrase=False)
    missing("credential_card_in_slot", 3, "ocs", False, modules_with_credential_card=0)


def test_fips3_ocs_cluster_a_card_in_the_slot_of_every_hsm_for_both():
    automatic(3, "ocs", True)
    missing("quorum_one", 3, "ocs", True, quorum=(3, 5))
    missing("same_passphrase", 3, "ocs", True, same_passphrase=False)
    missing("credential_card_in_slot", 3, "ocs", True, modules_with_credential_card=1)


# The remarks.


@pytest.mark.parametrize("level", [2, 3])
def test_remark_cards_for_one_credential_are_of_one_card_set(level):
    missing("same_cardset", level, "ocs", True, same_cardset=False)


@pytest.mark.parametrize("level", [2, 3])
def test_remark_every_card_of_the_set_has_the_same_passphrase(level):
    missing("same_passphrase", level, "ocs", False, same_passphrase=False)


@pytest.mark.parametrize("protection", ["module", "softcard"])
@pytest.mark.parametrize("cluster", [False, True])
def test_remark_for_fips_authorisation_only_quorum_and_passphrase_do_not_matter(protection, cluster):
    automatic(3, protection, cluster, quorum=(3, 5), same_passphrase=False, same_cardset=False)


@pytest.mark.parametrize("cell", [(2, "ocs"), (3, "module"), (3, "softcard"), (3, "ocs")])
def test_remark_persistent_cards_are_not_reinstated(cell):
    missing("not_persistent_only", *cell, False, persistent_only=True)


@pytest.mark.parametrize("cell", [(2, "ocs"), (3, "module"), (3, "softcard"), (3, "ocs")])
def test_remark_a_lost_remote_administration_channel_is_not_made_again_by_itself(cell):
    missing("no_remote_channel", *cell, False, remote_administration=True)
    automatic(*cell, False, remote_administration=True, channel_script=True)
    assert "not recommended" in verdict(facts(*cell, False, remote_administration=True, channel_script=True)).advice[0]


@pytest.mark.parametrize("cell", [(level, protection) for level in (2, 3) for protection in ("module", "softcard", "ocs")])
@pytest.mark.parametrize("cluster", [False, True])
def test_remark_auto_login_must_be_set_up(cell, cluster):
    missing("auto_login", *cell, cluster, auto_login=False)


@pytest.mark.parametrize("protection", ["module", "softcard", "ocs"])
def test_remark_acs_cards_never_for_fips_authorisation(protection):
    missing("fips_not_acs", 3, protection, False, fips_authorisation="acs")


@pytest.mark.parametrize("cell", [(2, "softcard"), (2, "ocs"), (3, "module"), (3, "softcard"), (3, "ocs")])
def test_remark_softcards_and_cards_are_of_the_same_security_world(cell):
    missing("same_world", *cell, False, same_world=False)


def test_remark_more_cards_than_hsms():
    assert "no spare" in verdict(facts(2, "ocs", True, cards=2)).advice[0]
    assert verdict(facts(2, "ocs", True, cards=3)).advice == ()


# Nothing else.


def test_what_nobody_has_said_is_unknown_and_not_yes():
    found = verdict(Facts(fips_level=2, protection="ocs", cluster=False))
    assert found.automatic is None
    assert set(found.unknown) == {"auto_login", *CELLS[2, "ocs"]}
    assert verdict(Facts(fips_level=None, protection="ocs", cluster=False)).unknown == ("fips_level",)


def test_the_table_has_the_guide_s_cells_and_every_condition_is_used():
    assert len(CELLS) * 2 == 12
    assert {code for codes in CELLS.values() for code in codes} | {"auto_login", "fips_level"} == set(REQUIREMENTS)


_FACTS = st.builds(
    Facts,
    fips_level=st.sampled_from([2, 3]),
    protection=st.sampled_from(["module", "softcard", "ocs"]),
    cluster=st.booleans(),
    auto_login=st.sampled_from([True, False, None]),
    quorum=st.sampled_from([None, (1, 1), (1, 3), (2, 3)]),
    same_passphrase=st.sampled_from([True, False, None]),
    same_cardset=st.sampled_from([True, False, None]),
    modules=st.sampled_from([None, 1, 2, 3]),
    modules_with_credential_card=st.sampled_from([None, 0, 1, 2, 3]),
    modules_with_fips_card=st.sampled_from([None, 0, 1, 2, 3]),
    fips_authorisation=st.sampled_from([None, "ocs", "acs"]),
    same_world=st.sampled_from([True, False, None]),
    remote_administration=st.sampled_from([True, False, None]),
    channel_script=st.sampled_from([True, False, None]),
    persistent_only=st.sampled_from([True, False, None]),
)


@given(_FACTS)
def test_automatic_means_that_nothing_is_missing_or_unknown(given_facts):
    found = verdict(given_facts)
    assert (found.automatic is True) == (not found.missing and not found.unknown)
    assert (found.automatic is False) == bool(found.missing)
    assert given_facts.auto_login or found.automatic is not True
