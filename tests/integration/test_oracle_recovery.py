# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Auto-login relies on an HSM whose access comes back by itself: the recovery matrix is asked before a keystore is made on it.

On the stand-ins for Oracle and nShield; the matrix itself has its tests in tests/unit/hsm/test_nshield_recovery.py.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.tests.integration import nshield
from ansible_collections.hsm.tde.tests.integration.oracle import OLD, SOFT, SOFTWARE, Site, Slot

pytestmark = pytest.mark.root

CARDS: Slot = ("ocs", "cards", None)
AUTO: dict[str, t.Any] = {"auto_login": True, "software_passphrase": SOFTWARE}
#: What people know, and the guide asks for.
GOOD = {"same_passphrase": True, "remote_administration": False, "persistent_only": False}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[t.Callable[..., Site]]:
    """Makes a host on a Security World of a level, with softcard ``one`` and card set ``cards``, no card in a slot."""
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path / "oracle"))
    opened = []

    def made(fips_level: int = 2, quorum: tuple[int, int] = (1, 3)) -> Site:
        context = nshield.site(slots=3, fips_level=fips_level)
        hsm = context.__enter__()
        opened.append(context)
        hsm.a.create_softcard("one", OLD)
        hsm.cards = hsm.a.create_cardset("cards", OLD, quorum=quorum)
        return Site(tmp_path, hsm)

    yield made
    for context in opened:
        context.__exit__(None, None, None)


def _insert(site: Site) -> None:
    site.hsm.hsm.insert(f"{site.hsm.cards}:1")  # type: ignore[attr-defined]


def _refused(site: Site, slot: Slot, **options: t.Any) -> list[str]:
    """Wish for it, which must be refused, with nothing made. :returns: the codes of what is missing."""
    before = site.statements()
    with pytest.raises(TdeError) as caught:
        site.keystore(slot, **options)
    assert caught.value.code == "nshield_recovery_attended", caught.value
    assert site.statements() == before
    missing = caught.value.details["recovery"]["missing"]
    assert all(one["sentence"] in caught.value.message for one in missing)
    return [one["code"] for one in missing]


def test_fips3_softcard_without_an_operator_card_is_refused_before_anything_is_made(make: t.Callable[..., Site]) -> None:
    site = make(fips_level=3)
    for check in (True, False):
        assert _refused(site, SOFT, **AUTO, check=check) == ["fips_card_in_slot"]
    assert not Path(site.state.cluster_record("main")).exists()
    _insert(site)
    assert site.keystore(SOFT, **AUTO, recovery=GOOD).warnings == [
        "WALLET_ROOT is read at the start: it is to be /opt/oracle/wallet."
    ]


def test_an_administrator_card_is_no_fips_authorisation_that_comes_back(make: t.Callable[..., Site]) -> None:
    site = make(fips_level=3)
    site.hsm.hsm.insert("acs:1")
    assert _refused(site, SOFT, **AUTO) == ["fips_not_acs", "fips_card_in_slot"]


@pytest.mark.parametrize(
    ("told", "quorum", "code"),
    [
        ({**GOOD, "same_passphrase": False}, (1, 3), "same_passphrase"),
        ({**GOOD, "remote_administration": True}, (1, 3), "no_remote_channel"),
        ({**GOOD, "persistent_only": True}, (1, 3), "not_persistent_only"),
        (GOOD, (2, 3), "quorum_one"),
        ({**GOOD, "cluster": True}, (1, 3), None),
    ],
)
def test_card_set_what_people_tell_decides(
    make: t.Callable[..., Site], told: dict[str, bool], quorum: tuple[int, int], code: str | None
) -> None:
    site = make(quorum=quorum)
    assert "credential_card_in_slot" in _refused(site, CARDS, **AUTO, recovery=GOOD)
    _insert(site)
    if code is not None:
        assert _refused(site, CARDS, **AUTO, recovery=told) == [code]
    else:
        assert site.keystore(CARDS, **AUTO, recovery=told).facts["restart_required"]


def test_what_nobody_told_is_told_and_not_refused(make: t.Callable[..., Site]) -> None:
    site = make()
    _insert(site)
    warnings = site.keystore(CARDS, **AUTO).warnings
    assert any("is not known" in one and "(same_passphrase)" in one and "(no_remote_channel)" in one for one in warnings), (
        warnings
    )


def test_without_auto_login_nobody_relies_on_it(make: t.Callable[..., Site]) -> None:
    site = make(fips_level=3)
    assert site.keystore(SOFT).facts["restart_required"]


def test_a_mistyped_name_is_called_absent_and_not_of_another_world(make: t.Callable[..., Site]) -> None:
    with pytest.raises(TdeError) as caught:
        make().keystore(("softcard", "ohne", None), **AUTO)
    assert caught.value.code == "token_absent"


def test_in_use_a_card_that_was_taken_out_is_told_and_the_keystore_still_opens(make: t.Callable[..., Site]) -> None:
    site = make(fips_level=3)
    _insert(site)
    site.until_done(SOFT, **AUTO, recovery=GOOD)
    site.hsm.hsm.remove()
    site.database.bounce()
    site.open_pdbs()
    outcome = site.keystore(SOFT)
    assert any("does not open by itself" in one and "(fips_card_in_slot)" in one for one in outcome.warnings), outcome.warnings
    assert any("(fips_card_in_slot)" in gap for gap in site.engine(None).info()["gaps"])
    _insert(site)
    assert not any("outage" in gap for gap in site.engine(None).info()["gaps"])


def test_a_change_to_cards_that_would_not_recover_is_refused_before_it_begins(make: t.Callable[..., Site]) -> None:
    site = make(quorum=(2, 3)).encrypted(**AUTO)
    _insert(site)
    assert _refused(site, ("ocs", "cards", OLD), safe_way_round=True, recovery=GOOD) == ["quorum_one"]
    assert site.read() == "content"
