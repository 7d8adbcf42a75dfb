# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Each change of Oracle's keystore, killed before and right after each of its acts, and then run again. On stand-ins.

The acts are those of a run that nothing disturbed, as the stand-ins journal them, and each write of what the host remembers.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.tests.integration import nshield, oracle
from ansible_collections.hsm.tde.tests.integration.oracle import NEW, OLD, SOFTWARE, Site, Slot

pytestmark = pytest.mark.root

AUTO: dict[str, t.Any] = {"auto_login": True, "software_passphrase": SOFTWARE}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Site]:
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path / "oracle"))
    oracle.quick(monkeypatch)
    with oracle.site(tmp_path) as found:
        yield found


class Change(t.NamedTuple):
    """A change of an encrypted database with auto-login.

    :ivar former: what the report must say of the credential before.
    """

    before: Slot
    old: str
    target: Slot
    options: dict[str, t.Any]
    former: str


CARDS = "cards"
CHANGES = {
    "softcard_passphrase": Change(
        ("softcard", "one", None), OLD, ("softcard", "one", NEW), {}, "former passphrase of softcard one"
    ),
    "cards_passphrase": Change(("ocs", CARDS, None), OLD, ("ocs", CARDS, NEW), {}, "former passphrase of card set cards"),
    "module_passphrase": Change(("module", None, None), "Module-1", ("module", None, "Module-2"), {}, "former passphrase of module protection"),
    "transfer": Change(
        ("softcard", "one", None),
        OLD,
        ("softcard", "two", NEW),
        {"transfer_keys": True, "acs_passphrase": nshield.ACS_PASSPHRASE},
        "have the keys under softcard one",
    ),
    "way_round": Change(
        ("softcard", "one", None), OLD, ("ocs", CARDS, "Cards-3"), {"safe_way_round": True}, "need the master keys under softcard one"
    ),
}  # fmt: skip


def prepared(site: Site, change: Change) -> Site:
    """Encrypted under the guard before, a softcard, a card set and an administrator card at hand."""
    site.hsm.a.create_softcard("two", NEW)
    cards = site.hsm.a.create_cardset(CARDS, OLD if change.before[0] == "ocs" else "Cards-3", quorum=(1, 1))
    site.hsm.hsm.insert(f"{cards}:1")
    site.hsm.hsm.insert("acs:1", slot=2)
    site.encrypted(change.before, change.old, **AUTO)
    # A PDB that is closed is to be opened first.
    site.database.close_pdb("PDB1")
    return site


def changed(site: Site, change: Change, log: Path, deadly: tuple[int, bool] | None) -> None:
    """The change in processes of their own, with a restart whenever one is asked for.

    :raises oracle.Killed: as ordered.
    """
    options = {**AUTO, **change.options}
    for dummy in range(4):
        if not oracle.in_process(
            lambda: bool(site.keystore(change.target, change.old, **options).facts["restart_required"]), log, deadly
        ):
            return
        site.database.bounce()
    raise AssertionError("still to be restarted")


def sound(site: Site, change: Change, keys_before: t.Mapping[str, t.Any], name: str) -> None:
    """The wished state, the same data, the right protection, one set of keys, the former credential named."""
    options = {**AUTO, **change.options}
    protection, token, passphrase = change.target
    memo = memos.read(site.state, "main")
    assert (memo.change, memo.guard.public() if memo.guard else None) == (None, {"protection": protection, "name": token})
    again = site.keystore(change.target, change.old, **options)
    assert not again.changed
    assert [change.former in sentence for sentence in again.facts["backups_need"]] == [True]
    assert not site.keystore(None, passphrase, state="open", **AUTO).changed
    assert not site.master_key(str(passphrase)).changed
    assert site.read() == "content"
    keys = site.hsm.a.keys()
    used = {key["token"] for key in keys.values() if key["name"] not in {one["name"] for one in keys_before.values()}}
    if name == "way_round":
        # The former keys stay where they are, and each container has one more, under the new credential.
        assert {ident: key for ident, key in keys.items() if ident in keys_before} == keys_before
        assert (len(keys), used) == (2 * len(keys_before), set(site.hsm.a.cardsets()))
    else:
        assert sorted(key["name"] for key in keys.values()) == sorted(key["name"] for key in keys_before.values())
        right = [one for one, content in {**site.hsm.a.softcards(), **site.hsm.a.cardsets()}.items() if content["name"] == token]
        assert {key["token"] for key in keys.values()} == set(right or [None])
    assert {key["protection"] for key in keys.values() if name != "way_round"} <= {protection}
    # An unplanned restart: nobody opens anything, but the PDBs.
    site.database.bounce()
    site.open_pdbs()
    assert site.read() == "content"


#: The guide's order for a passphrase, with auto-login out of the way and arranged again around it.
ORDER = [
    "CDB$ROOT: ALTER PLUGGABLE DATABASE ALL OPEN",
    "CDB$ROOT: ALTER SYSTEM SET TDE_CONFIGURATION = 'KEYSTORE_CONFIGURATION=HSM' SCOPE = BOTH SID = '*'",
    'CDB$ROOT: SET KEYSTORE CLOSE IDENTIFIED BY "***" CONTAINER = ALL',
    "<token tool>",
    "-- bounce",
    "CDB$ROOT: ALTER PLUGGABLE DATABASE ALL OPEN",
    'CDB$ROOT: SET KEYSTORE OPEN IDENTIFIED BY "***" CONTAINER = ALL',
    "CDB$ROOT: UPDATE SECRET '***' FOR CLIENT 'HSM_PASSWORD' FORCE KEYSTORE IDENTIFIED BY \"***\" WITH BACKUP",
    'CDB$ROOT: CREATE AUTO_LOGIN KEYSTORE FROM KEYSTORE IDENTIFIED BY "***"',
    "CDB$ROOT: ALTER SYSTEM SET TDE_CONFIGURATION = 'KEYSTORE_CONFIGURATION=HSM|FILE' SCOPE = BOTH SID = '*'",
]


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("softcard_passphrase", "ppmk --change"),
        pytest.param("cards_passphrase", "cardpp -m", marks=pytest.mark.slow),
        pytest.param("module_passphrase", None, marks=pytest.mark.slow),
    ],
)
def test_a_passphrase_change_runs_the_guides_order_exactly(site: Site, tmp_path: Path, name: str, tool: str | None) -> None:
    change = CHANGES[name]
    prepared(site, change)
    keys, since = site.hsm.a.keys(), site.database.entries()[-1]["time"]
    changed(site, change, tmp_path / "log", None)
    found = site.journal(since)
    wanted = [line for line in ORDER if tool or line != "<token tool>"]
    assert [("<token tool>" if tool and line.startswith(tool) else line) for line in found] == wanted
    sound(site, change, keys, name)


def _points(site: Site, change: Change, log: Path) -> list[str]:
    """The acts of a run that nothing disturbs, held against the stand-ins' own journals."""
    since = site.database.entries()[-1]["time"]
    changed(site, change, log, None)
    acts = oracle.Acts(log, None).words()
    told = [line for line in site.journal(since) if line != "-- bounce"]
    mine = [line.partition(" ")[2].replace("ADMINISTER KEY MANAGEMENT ", "") for line in acts if line.startswith(("sql", "tool"))]
    assert [line for line in mine if line != "rocs"] == told
    return acts


def _killed_everywhere(site: Site, tmp_path: Path, name: str, *, every: int = 1, power_cut: bool = False) -> None:
    """Killed before and after each act, each time run to its end.

    :param power_cut: the database is restarted, too, by nobody's plan.
    """
    change = CHANGES[name]
    prepared(site, change)
    keys = site.hsm.a.keys()
    saved = oracle.Saved(site, tmp_path / "saved")
    acts = _points(site, change, tmp_path / "log")
    moments = [(number, after) for number in range(len(acts)) for after in (False, True)][::every]
    for number, after in moments:
        saved.back()
        log = tmp_path / f"log.{number}.{after}"
        with pytest.raises(oracle.Killed):
            changed(site, change, log, (number, after))
        try:
            if power_cut:
                site.database.bounce()
            site.until_done(change.target, change.old, **AUTO, **change.options)
            # As with SAVE STATE: the change may have been over before the restart.
            site.open_pdbs()
            sound(site, change, keys, name)
            changes = [line for line in site.journal() if line.startswith(("ppmk --change", "cardpp"))]
            assert len(changes) == (1 if name in ("softcard_passphrase", "cards_passphrase") else 0)
        except Exception as exc:
            raise AssertionError(
                f"killed {'after' if after else 'before'} {number} {acts[number]}: {exc!r}\n" + "\n".join(site.journal()[-30:])
            ) from exc
    print(f"{name}: {len(acts)} acts, {len(moments)} kills{', each with a restart of the database' if power_cut else ''}")


@pytest.mark.slow
@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_killed_before_and_after_each_act_is_ended_by_the_next_run(
    site: Site, tmp_path: Path, name: str, power_cut: bool
) -> None:
    _killed_everywhere(site, tmp_path, name, power_cut=power_cut)


def _set_up(site: Site, log: Path, deadly: tuple[int, bool] | None) -> None:
    """From nothing to an encrypted tablespace under a second master key, as the roles go.

    :raises oracle.Killed: as ordered.
    """

    def work() -> bool:
        if site.keystore(oracle.SOFT, **AUTO).facts["restart_required"]:
            return True
        site.master_key()
        site.tablespace("PDB1.USERS")
        site.master_key(tag="2")
        return False

    while oracle.in_process(work, log, deadly):
        site.database.bounce()
        site.open_pdbs()


@pytest.mark.slow
def test_setting_up_and_a_rotation_killed_before_and_after_each_act(site: Site, tmp_path: Path) -> None:
    site.database.add_tablespace("PDB1", "USERS", "content")
    site.state.create()
    saved = oracle.Saved(site, tmp_path / "saved")
    _set_up(site, tmp_path / "log", None)
    acts = oracle.Acts(tmp_path / "log", None).words()
    moments = [(number, after) for number in range(len(acts)) for after in (False, True)]
    for number, after in moments:
        saved.back()
        with pytest.raises(oracle.Killed):
            _set_up(site, tmp_path / f"log.{number}.{after}", (number, after))
        try:
            _set_up(site, tmp_path / "rest", None)
            # Each of the two containers has a key a tag, and not one more.
            assert len(site.hsm.a.keys()) == 4
            assert site.protections() == {"softcard"}
            assert not site.keystore(oracle.SOFT, **AUTO).changed
            assert not site.master_key(tag="2").changed
            site.database.bounce()
            site.open_pdbs()
            assert site.read() == "content"
        except Exception as exc:
            raise AssertionError(f"killed {'after' if after else 'before'} {number} {acts[number]}: {exc!r}") from exc
    print(f"setting up: {len(acts)} acts, {len(moments)} kills")
