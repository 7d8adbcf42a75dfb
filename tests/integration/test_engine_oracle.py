# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine oracle, on the stand-ins for Oracle and nShield (tests/standins): no real product was asked."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines import base
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import act
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.tests.integration import oracle, support
from ansible_collections.hsm.tde.tests.integration.oracle import OLD, SECRETS, SOFT, SOFTWARE, Site, Slot

pytestmark = pytest.mark.root

FILE: Slot = ("passphrase", None, None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Site]:
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path / "oracle"))
    oracle.quick(monkeypatch)
    with oracle.site(tmp_path) as found:
        yield found


def test_from_nothing_to_encrypted_tablespaces_and_again_nothing_to_do(site: Site) -> None:
    first = site.keystore(SOFT)
    assert first.facts["restart_required"]
    assert [step.action for step in first.plan] == ["write_record", "alter_system", "alter_system"]
    site.encrypted()
    assert site.protections() == {"softcard"}
    for outcome in (site.keystore(SOFT), site.keystore(None, state="open"), site.master_key(), site.tablespace("PDB1.USERS")):
        assert not outcome.changed
    rotated = site.master_key(tag="2")
    assert [step.action for step in rotated.plan] == ["set_key"] * 2 + ["verify_protection"]
    assert not site.master_key(tag="2").changed
    assert site.read() == "content"


def test_a_mistyped_credential_is_caught_before_any_statement(site: Site) -> None:
    site.keystore(SOFT)
    site.database.bounce()
    for slot, passphrase, code in (
        (SOFT, "Softcard-9", "nshield_passphrase_refused"),
        (("softcard", "ohne", None), OLD, "token_absent"),
        (SOFT, "with|bar", "credential_forbidden"),
    ):
        with pytest.raises(TdeError) as caught:
            site.keystore(slot, passphrase)  # type: ignore[arg-type]
        assert caught.value.code == code
    assert not [line for line in site.statements() if "IDENTIFIED" in line]
    assert site.protections() == set()


def test_a_key_that_slipped_to_module_protection_fails_the_verification_after(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The credential's check is taken away: the database is given one that nobody knows."""
    site.until_done(SOFT)
    site.database.bounce()
    monkeypatch.setattr(act.Acts, "check_credential", lambda *dummy: None)
    monkeypatch.setattr(act.Acts, "hsm_credential", lambda self: Secret("Softcard-9|one"))
    site.open_pdbs()
    site.keystore(None, state="open")
    with pytest.raises(TdeError) as caught:
        site.master_key()
    assert caught.value.code == "nshield_key_slipped"


def test_a_pdb_that_was_closed_is_left_behind_and_the_next_run_mends_it(site: Site, tmp_path: Path) -> None:
    site = Site(tmp_path, site.hsm, ("PDB1", "PDB2"))
    site.until_done(FILE, SOFTWARE)
    site.open_pdbs()
    site.keystore(None, SOFTWARE, state="open")
    site.keystore(None, SOFTWARE, state="closed")
    site.database.close_pdb("PDB2")
    outcome = site.keystore(None, SOFTWARE, state="open")
    assert any("PDB2" in warning for warning in outcome.warnings)
    site.open_pdbs()
    mended = site.keystore(None, SOFTWARE, state="open")
    assert [step.obj for step in mended.plan] == ["software keystore of PDB PDB2"]


def test_an_hsm_that_drops_packets_ends_in_a_clear_state(site: Site) -> None:
    site.until_done(SOFT)
    site.open_pdbs()
    site.keystore(None, state="open")
    site.database.fault("hang", "SET KEY USING")
    with pytest.raises(TdeError) as caught:
        site.engine(OLD, call_timeout=0.2, nfast_home=str(site.hsm.a.home)).master_key(base.MasterKeyWish("present"), check=False)
    assert caught.value.code in ("timeout", "command_failed")
    site.database.fault("hang", None)
    site.engine(OLD, call_timeout=20.0).keystore(base.KeystoreWish("open"), check=False)
    site.master_key()
    assert len(site.hsm.a.keys()) == 2


def test_a_restart_in_the_midst_of_encrypting_is_finished_by_the_next_run(site: Site) -> None:
    site.database.add_tablespace("PDB1", "USERS", "content")
    site.until_done(FILE, SOFTWARE)
    site.open_pdbs()
    site.keystore(None, SOFTWARE, state="open")
    site.master_key(SOFTWARE)
    site.database.fault("bounce_while_encrypting", True)
    with pytest.raises(TdeError) as caught:
        site.tablespace("PDB1.USERS", SOFTWARE)
    assert caught.value.code == "server_down"
    site.open_pdbs()
    site.keystore(None, SOFTWARE, state="open")
    outcome = site.tablespace("PDB1.USERS", SOFTWARE)
    assert "broken off" in outcome.plan[0].why
    assert any("FINISH ENCRYPT" in line for line in site.statements())
    assert site.read() == "content"


def test_nothing_secret_is_told_recorded_or_journaled(site: Site) -> None:
    site.encrypted(auto_login=True, software_passphrase=SOFTWARE)
    told = json.dumps([site.keystore(SOFT, auto_login=True, software_passphrase=SOFTWARE).result(), site.engine(OLD).info()])
    kept = [path for path in Path(site.state.path).rglob("*") if path.is_file()]
    texts = [told, *(path.read_text() for path in kept), (site.database.path / "journal.jsonl").read_text()]
    texts += [json.dumps(site.hsm.hsm.journal())]
    for secret in SECRETS:
        assert not any(secret in text for text in texts), secret
    assert memos.read(site.state, "main").credential


def test_an_errors_text_is_the_number_alone(site: Site) -> None:
    site.until_done(SOFT)
    site.database.stop()
    with pytest.raises(TdeError) as caught:
        site.keystore(SOFT)
    assert caught.value.code == "server_down"
    assert "Sys-Password-1" not in str(caught.value)


def test_the_modules_answer_as_documented_with_a_software_keystore(site: Site) -> None:
    site.database.add_tablespace("PDB1", "USERS", "content")
    common: dict[str, t.Any] = {
        "engine": "oracle",
        "cluster": "main",
        "login_host": "db",
        "login_user": "sys",
        "login_password": "Sys-Password-1",
        "passphrase": SOFTWARE,
        "state_directory": site.state.path,
        "oracle": {"service": "CDB1", "wallet_root": "/opt/oracle/wallet"},
    }
    slots = [{"name": "primary", "protection": "passphrase"}]

    def run(name: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        result = support.run_module(f"tde_{name}", {**common, **more}, check=check, diff=name != "info")
        assert not result.get("failed"), result
        assert SOFTWARE not in json.dumps(result)
        return result

    planned = run("keystore", check=True, keyslots=slots)
    assert planned["changed"]
    assert [step["action"] for step in planned["plan"]][-2:] == ["restart_database", "open_keystore"]
    assert run("keystore", keyslots=slots)["restart_required"]
    site.database.bounce()
    site.open_pdbs()
    assert [step["action"] for step in run("keystore", state="open")["plan"]] == ["create_keystore", "open_keystore"]
    assert run("master_key")["master_key"] == "hsm-tde.main"
    assert run("tablespace", tablespaces=[{"name": "PDB1.USERS"}, {"name": "PDB1.MORE"}])["moved"][0]["object"] == "USERS"
    for name, more in (
        ("keystore", {"keyslots": slots}),
        ("keystore", {"state": "open"}),
        ("master_key", {}),
        ("tablespace", {"tablespaces": [{"name": "PDB1.USERS"}]}),
    ):
        assert not run(name, **more)["changed"]  # type: ignore[arg-type]
    told = run("info")
    assert told["encrypted"]
    assert any("in a file" in gap for gap in told["gaps"])
    refused = support.run_module("tde_keystore", {**common, "keyslots": [{"protection": "token"}]})
    assert refused["error_code"] == "engine_unsupported"
