# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What goes wrong around a change of Oracle's keystore ends in a clear state that the next run mends. On stand-ins."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.tests.integration import nshield, oracle
from ansible_collections.hsm.tde.tests.integration.oracle import NEW, OLD, SOFT, SOFTWARE, Site, Slot

pytestmark = pytest.mark.root

AUTO: dict[str, t.Any] = {"auto_login": True, "software_passphrase": SOFTWARE}
CHANGED: Slot = ("softcard", "one", NEW)
TRANSFER: dict[str, t.Any] = {"transfer_keys": True, "acs_passphrase": nshield.ACS_PASSPHRASE}


class Made(t.NamedTuple):
    """A host with an encrypted database under softcard ``one``; softcard ``two``, a card set and an administrator card are at hand.

    :ivar plain: it as it is without auto-login; :ivar auto: with it.
    """

    site: Site
    plain: oracle.Saved
    auto: oracle.Saved


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Made]:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORACLEDB_STANDIN", str(folder / "oracle"))
        oracle.quick(patch)
        with oracle.site(folder, clients=("a", "b")) as site:
            site.hsm.a.create_softcard("two", NEW)
            cards = site.hsm.a.create_cardset("cards", NEW, quorum=(1, 2))
            site.hsm.hsm.insert(f"{cards}:1")
            site.hsm.hsm.insert("acs:1", slot=2)
            site.encrypted()
            plain = oracle.Saved(site, folder / "plain")
            site.until_done(SOFT, **AUTO)
            yield Made(site, plain, oracle.Saved(site, folder / "auto"))


@pytest.fixture
def plain(made: Made) -> Site:
    """Without auto-login."""
    made.plain.back()
    return made.site


@pytest.fixture
def site(made: Made) -> Site:
    """With auto-login."""
    made.auto.back()
    return made.site


def refused(run: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        run()
    assert caught.value.next_step
    return str(caught.value.code)


def change_until_it_fails(site: Site, slot: Slot = CHANGED, **options: t.Any) -> str:
    """A change that a fault ends; :returns: the error's code."""
    return refused(lambda: site.until_done(slot, **AUTO, **options))


def mended(site: Site, slot: Slot = CHANGED, **options: t.Any) -> None:
    """The next run ends it: everything as wished, and again after a restart that nobody planned."""
    site.until_done(slot, **AUTO, **options)
    assert memos.read(site.state, "main").change is None
    assert not site.keystore(slot, **AUTO, **options).changed
    assert site.read() == "content"
    site.database.bounce()
    site.open_pdbs()
    assert site.read() == "content"


# A PDB that closes while a statement for all containers runs


@pytest.mark.parametrize("statement", ["SET KEYSTORE CLOSE", "SET KEYSTORE OPEN"])
def test_a_pdb_that_closes_during_a_change_s_container_all_is_brought_along(site: Site, statement: str) -> None:
    site.database.fault("closes", {"at": statement, "pdb": "PDB1"})
    mended(site)
    opened = [line for line in site.statements() if "ALL OPEN" in line]
    assert site.database.state()["faults"]["closes"] is None
    assert opened


def test_a_pdb_that_closes_while_all_are_opened_is_named_and_opened_by_the_next_run(plain: Site) -> None:
    plain.database.bounce()
    plain.open_pdbs()
    plain.database.fault("closes", {"at": "SET KEYSTORE OPEN", "pdb": "PDB1"})
    behind = plain.keystore(None, state="open")
    assert any("PDB1 is closed" in warning for warning in behind.warnings)
    assert plain.read() == "ORA-01109"
    plain.open_pdbs()
    assert [step.obj for step in plain.keystore(None, state="open").plan] == ["HSM keystore of PDB PDB1"]
    assert plain.read() == "content"


def test_a_pdb_that_closes_while_master_keys_are_set_gets_its_own_by_the_next_run(plain: Site) -> None:
    keys = len(plain.hsm.a.keys())
    plain.database.fault("closes", {"at": "SET KEY USING", "pdb": "PDB1"})
    assert refused(lambda: plain.master_key(tag="2")) == "oracle_containers_behind"
    assert refused(lambda: plain.master_key(tag="2")) == "oracle_containers_behind"
    plain.open_pdbs()
    plain.keystore(None, state="open")
    assert [step.obj for step in plain.master_key(tag="2").plan][:1] == ["master key hsm-tde.main.2 of PDB1"]
    assert len(plain.hsm.a.keys()) == keys + 2
    assert plain.read() == "content"


@pytest.mark.parametrize("statement", [pytest.param("REVERSE MIGRATE", marks=pytest.mark.slow), "KEYSTORE MIGRATE USING"])
def test_a_pdb_that_closes_while_its_master_key_goes_the_safe_way_round(site: Site, statement: str) -> None:
    """The root's goes first, and the PDB closes at that moment."""
    target: Slot = ("ocs", "cards", NEW)
    site.database.fault("closes", {"at": statement, "pdb": "PDB1"})
    assert change_until_it_fails(site, target, safe_way_round=True) == "oracle_containers_behind"
    mended(site, target, safe_way_round=True)
    assert {key["protection"] for key in site.hsm.a.keys().values()} == {"softcard", "ocs"}


def test_what_is_encrypted_in_a_closed_pdb_is_not_lost_by_a_change_without_transfer(plain: Site) -> None:
    """A closed PDB shows none of its tablespaces."""
    plain.database.close_pdb("PDB1")
    target: Slot = ("softcard", "two", NEW)
    assert [step.action for step in plain.keystore(target, check=True).plan] == ["open_pdbs"]
    assert refused(lambda: plain.keystore(target)) == "oracle_change_refused"
    plain.keystore(None, state="open")
    assert plain.read() == "content"


# A restart in the midst of ENCRYPTING


def test_a_restart_in_the_midst_of_encrypting_under_an_hsm_is_finished_by_the_next_run(site: Site) -> None:
    site.database.add_tablespace("PDB1", "MORE", "more content")
    site.database.fault("bounce_while_encrypting", True)
    assert refused(lambda: site.tablespace("PDB1.MORE")) == "server_down"
    site.open_pdbs()
    told = site.engine(OLD).info()
    assert any("MORE is ENCRYPTING" in gap for gap in told["gaps"])
    # What is half encrypted is encrypted to a change.
    assert refused(lambda: site.keystore(("module", None, "Module-1"), **AUTO)) == "oracle_change_refused"
    assert "broken off" in site.tablespace("PDB1.MORE").plan[0].why
    assert not site.tablespace("PDB1.MORE").changed
    assert (site.read(name="MORE"), site.read()) == ("more content", "content")


# rocs killed half-way, with a second client that holds old key files


@pytest.mark.parametrize("moment", [0.5, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 1.5))])
def test_rocs_killed_half_way_during_a_transfer(site: Site, moment: float) -> None:
    old, new = (one for name in ("one", "two") for one, card in site.hsm.a.softcards().items() if card["name"] == name)
    b = site.hsm.clients["b"]
    nshield.world.copy_world(site.hsm.a, b)
    names = sorted(key["name"] for key in site.hsm.a.keys().values())
    site.hsm.hsm.fault("rocs_dies_after", moment)
    target: Slot = ("softcard", "two", NEW)
    if moment < 1.5:
        assert change_until_it_fails(site, target, **TRANSFER) == "nshield_transfer_unfinished"
        site.hsm.hsm.fault("rocs_dies_after", None)
    mended(site, target, **TRANSFER)
    # One file a key, under the new softcard: the former credential opens nothing here any more.
    assert [(key["name"], key["token"]) for key in sorted(site.hsm.a.keys().values(), key=lambda key: key["name"])] == [
        (name, new) for name in names
    ]
    # The second client gets the new files; its old ones are told, and go by its own run.
    nshield.world.copy_world(site.hsm.a, b)
    wish = {"keys": names, "protection": "softcard", "token": "two"}
    told = site.hsm.run("nshield_key_protection", b, **wish)
    assert [copy["token"] for key in told["nshield_keys"] for copy in key["copies"]] == [old, old]
    more = {"source": "one", "passphrase": NEW, "acs_passphrase": nshield.ACS_PASSPHRASE}
    assert site.hsm.run("nshield_key_protection", b, **wish, **more, state="transferred")["changed"]
    assert {key["token"] for key in b.keys().values()} == {new}


# An HSM that does not answer

STATEMENTS = (
    "ALTER PLUGGABLE DATABASE ALL OPEN",
    "KEYSTORE_CONFIGURATION=HSM'",
    "SET KEYSTORE CLOSE",
    "SET KEYSTORE OPEN",
    "UPDATE SECRET",
    "CREATE AUTO_LOGIN",
    "KEYSTORE_CONFIGURATION=HSM.FILE'",
)
QUICK = ("SET KEYSTORE OPEN",)


@pytest.mark.parametrize("fault", ["hang", "lost"])
@pytest.mark.parametrize("statement", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in STATEMENTS])
def test_packets_are_dropped_at_a_statement_of_a_change(site: Site, statement: str, fault: str) -> None:
    """``hang``: the statement never comes to its end; ``lost``: it does, and its answer is lost."""
    site.database.close_pdb("PDB1")
    site.database.fault("hang_seconds", 0)
    site.database.fault(fault, statement)
    assert change_until_it_fails(site) == "timeout"
    site.database.fault(fault, None)
    mended(site)


@pytest.mark.parametrize("fault", ["hang", "lost"])
def test_packets_are_dropped_while_a_master_key_is_made(plain: Site, fault: str) -> None:
    keys = len(plain.hsm.a.keys())
    plain.database.fault("hang_seconds", 0)
    plain.database.fault(fault, "SET KEY USING")
    assert refused(lambda: plain.master_key(tag="2")) == "timeout"
    plain.database.fault(fault, None)
    plain.master_key(tag="2")
    assert not plain.master_key(tag="2").changed
    # One for each of the two containers, none twice.
    assert len(plain.hsm.a.keys()) == keys + 2
    assert plain.read() == "content"


def test_looking_at_the_keystore_is_waited_for_no_longer_than_allowed(plain: Site) -> None:
    plain.database.fault("hang_seconds", 0)
    plain.database.fault("hang", r"FROM V\$ENCRYPTION_WALLET")
    assert refused(lambda: plain.keystore(SOFT)) == "timeout"
    plain.database.fault("hang", None)
    assert not plain.keystore(SOFT).changed


def test_the_hsm_s_own_tool_gets_no_answer_in_a_change(site: Site) -> None:
    site.hsm.hsm.fault("hang", "ppmk")
    assert refused(lambda: site.keystore(CHANGED, call_timeout=1.0, **AUTO)) == "timeout"
    site.hsm.hsm.fault("hang", None)
    mended(site)


def test_no_module_answers_after_the_restart_of_a_change(site: Site) -> None:
    assert site.keystore(CHANGED, **AUTO).facts["restart_required"]
    site.database.bounce()
    with site.database.change() as state:
        state["hsm"]["down"] = True
    assert change_until_it_fails(site) == "oracle_hsm_failed"
    with site.database.change() as state:
        state["hsm"]["down"] = False
    mended(site)


# Credentials that are mistyped when a change goes on


def test_a_new_passphrase_that_is_mistyped_when_the_change_goes_on_opens_nothing(site: Site) -> None:
    """Oracle would open the keystore under module protection with it, and show no key."""
    assert site.keystore(CHANGED, **AUTO).facts["restart_required"]
    site.database.bounce()
    before = site.database.state()["login"]
    assert refused(lambda: site.keystore(("softcard", "one", "Softcard-9"), **AUTO)) == "nshield_passphrase_refused"
    assert site.database.state()["login"] == before
    mended(site)


@pytest.mark.parametrize("target", [("ocs", "cards", NEW), ("passphrase", None, SOFTWARE)])
def test_a_present_passphrase_that_is_mistyped_takes_no_key_out_of_the_hsm(plain: Site, target: Slot) -> None:
    plain.database.bounce()
    plain.open_pdbs()

    def wrong() -> t.Any:
        return plain.keystore(target, "Softcard-9", safe_way_round=True, software_passphrase=SOFTWARE)

    assert refused(wrong) == "nshield_passphrase_refused"
    assert memos.read(plain.state, "main").change is None
    plain.until_done(target, safe_way_round=True, software_passphrase=SOFTWARE)
    assert plain.read() == "content"


def test_a_credential_that_shows_no_key_ends_a_change_before_it_is_believed(plain: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The credential's check is taken away, as where another softcard of that name came up after it."""
    assert plain.keystore(CHANGED).facts["restart_required"]
    plain.database.bounce()
    with monkeypatch.context() as patched:
        patched.setattr(
            "ansible_collections.hsm.tde.plugins.module_utils.engines.oracle.act.Acts.check_credential", lambda *dummy: None
        )
        assert refused(lambda: plain.keystore(("softcard", "one", "Softcard-9"))) == "oracle_master_key_unreachable"
    assert memos.read(plain.state, "main").change is not None
    plain.database.bounce()
    plain.until_done(CHANGED)
    assert plain.read() == "content"


def test_a_keystore_with_auto_login_is_closed_and_stays_so_until_it_is_opened(site: Site) -> None:
    assert site.keystore(None, state="closed", **AUTO).changed
    assert not site.keystore(None, state="closed", **AUTO).changed
    assert site.read() in ("ORA-28365", "ORA-28374")
    site.keystore(None, state="open", **AUTO)
    assert site.read() == "content"
    only_one = {**AUTO, "containers": ["PDB1"]}
    assert refused(lambda: site.keystore(None, state="closed", **only_one)) == "invalid_option"


def test_a_secret_that_is_there_already_is_replaced(site: Site) -> None:
    """Killed between the statement and its memory, or put there by hand."""
    site.until_done(SOFT, external_store=True, **AUTO)
    memo = memos.read(site.state, "main")
    memos.write(site.state, "main", memo.__class__(**{**memo.__dict__, "external": "", "secret": ""}))
    site.keystore(SOFT, external_store=True, **AUTO)
    assert not site.keystore(SOFT, external_store=True, **AUTO).changed
    assert site.read() == "content"
