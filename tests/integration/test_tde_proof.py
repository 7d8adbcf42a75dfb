# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The module tde_proof against a real server: what a user sees of an encrypted and of a plain tablespace."""

from __future__ import annotations

import dataclasses
import os
import shutil
import typing as t
from pathlib import Path

import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.passphrase import PassphraseSlot
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore
from ansible_collections.hsm.tde.plugins.module_utils.storage import control, fscrypt
from ansible_collections.hsm.tde.plugins.modules import tde_proof
from ansible_collections.hsm.tde.tests.integration import filesystems, postgres
from ansible_collections.hsm.tde.tests.integration.support import run_module_file

pytestmark = pytest.mark.root

CLUSTER = "proof"


@pytest.fixture(scope="module")
def home() -> t.Iterator[Path]:
    if os.geteuid() != 0 or not postgres.programs():
        pytest.skip("needs root and PostgreSQL")
    with postgres.folder() as path:
        yield path


@pytest.fixture(scope="module")
def state(home: Path) -> StateDirectory:
    return StateDirectory(str(home / "state"))


@pytest.fixture(scope="module")
def disk(home: Path) -> t.Iterator[Path]:
    with filesystems.mounted(home, mebibytes=192) as mount:
        mount.chmod(0o755)
        control.write_control(str(mount))
        yield mount


@pytest.fixture(scope="module")
def server(home: Path, disk: Path, state: StateDirectory) -> t.Iterator[postgres.Server]:
    """A plain cluster with the tablespaces ``sealed``, under a data key of the store, and ``plain``; a table in each."""
    slot = PassphraseSlot("primary", Secret("a passphrase for this test"))
    key = KeyStore(state, CLUSTER).create_key("tablespace.sealed", fscrypt.KEY_BYTES, [slot], fscrypt.identifier)
    identifier = fscrypt.add_key(str(disk), key.reveal())
    for name in ("sealed", "plain"):
        (disk / name).mkdir()
        if name == "sealed":
            fscrypt.set_policy(str(disk / name), identifier)
        shutil.chown(disk / name, postgres.USER, postgres.USER)
    made = postgres.Server(home, disk / "data")
    made.initdb()
    made.start()
    try:
        for name in ("sealed", "plain"):
            made.psql(f"CREATE TABLESPACE {name} LOCATION '{disk / name}'")
            made.psql(
                f"CREATE TABLE {name}_rows (id int PRIMARY KEY USING INDEX TABLESPACE {name}, note text) TABLESPACE {name};"
                f"INSERT INTO {name}_rows SELECT n, md5(n::text) FROM generate_series(1, 5000) n"
            )
        yield made
    finally:
        made.stop()


def options(server: postgres.Server, state: StateDirectory, **more: t.Any) -> dict[str, t.Any]:
    return server.options(engine="postgresql", cluster=CLUSTER, state_directory=state.path, **more)


@dataclasses.dataclass
class Module:
    """What the act sees of Ansible's module; a process a call would cost a second each."""

    params: dict[str, t.Any]
    check_mode: bool
    warnings: list[str] = dataclasses.field(default_factory=list)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


def prove(server: postgres.Server, state: StateDirectory, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
    validated = ArgumentSpecValidator(tde_proof.SPEC).validate(options(server, state, **more))
    assert not validated.error_messages
    module = Module(validated.validated_parameters, check)
    try:
        result = tde_proof.act(t.cast(t.Any, module))
    except TdeError as error:
        return {"failed": True, **error.result()}
    return {**result, "warnings": module.warnings}


def verdicts(result: dict[str, t.Any]) -> dict[str, str]:
    assert not result.get("failed"), result
    assert result["changed"] is False
    return {proof["place"]: proof["verdict"] for proof in result["proofs"]}


def test_tablespaces_as_they_are_with_all_that_is_in_memory_only(server: postgres.Server, state: StateDirectory) -> None:
    """No checkpoint was made since the rows came: the proof makes its own."""
    result = prove(server, state, tablespaces=["sealed", "plain", "pg_default"], data_directory=True)
    assert verdicts(result) == {"sealed": "encrypted", "plain": "plain", "pg_default": "plain", "data directory": "plain"}
    assert result["all_encrypted"] is False
    sealed = next(proof for proof in result["proofs"] if proof["place"] == "sealed")
    assert sealed["examined"]["blocks"] > 50
    assert sealed["examined"]["blocks_equal"] == 0


def test_one_encrypted_tablespace_and_what_that_leaves_out(server: postgres.Server, state: StateDirectory) -> None:
    result = prove(server, state, tablespaces=["sealed"])
    assert result["all_encrypted"] is True
    assert any("write-ahead log" in sentence for sentence in result["not_covered"])
    assert any("Freed blocks" in sentence for sentence in result["not_covered"])


def test_relations_with_their_indexes(server: postgres.Server, state: StateDirectory) -> None:
    names = ["postgres.public.sealed_rows", "postgres.public.plain_rows"]
    result = prove(server, state, relations=names)
    assert verdicts(result) == {names[0]: "encrypted", names[1]: "plain"}
    # The index of an encrypted table that stayed behind is what a reader must hear of.
    server.psql("ALTER INDEX sealed_rows_pkey SET TABLESPACE pg_default")
    assert verdicts(prove(server, state, relations=names[:1])) == {names[0]: "plain"}
    server.psql("ALTER INDEX sealed_rows_pkey SET TABLESPACE sealed")


def test_canary_and_check_mode(server: postgres.Server, state: StateDirectory, disk: Path) -> None:
    proofs = prove(server, state, tablespaces=["sealed"], canary=True)
    assert proofs["proofs"][0]["examined"]["marker_in_files"] == 2048
    assert verdicts(proofs) == {"sealed": "encrypted"}
    checked = prove(server, state, check=True, tablespaces=["sealed"], canary=True)
    assert "marker_in_files" not in checked["proofs"][0]["examined"]
    assert any("check mode" in str(warning) for warning in checked["warnings"])
    assert [name for name in os.listdir(disk / "sealed") if not name.startswith("PG_")] == []


def test_as_ansible_runs_it(server: postgres.Server, state: StateDirectory) -> None:
    result = run_module_file("tde_proof", options(server, state, tablespaces=["sealed", "plain"]))
    assert verdicts(result) == {"sealed": "encrypted", "plain": "plain"}


def test_nothing_asked_for(server: postgres.Server, state: StateDirectory) -> None:
    assert "one of the following is required" in run_module_file("tde_proof", options(server, state))["msg"]
    empty = prove(server, state, tablespaces=[])
    assert (empty["proofs"], empty["all_encrypted"]) == ([], False)


def test_what_does_not_exist(server: postgres.Server, state: StateDirectory) -> None:
    assert prove(server, state, tablespaces=["none"])["error_code"] == "tablespace_absent"
    assert prove(server, state, relations=["postgres.public.none"])["error_code"] == "relation_absent"


def test_a_closed_keystore_is_unknown(server: postgres.Server, state: StateDirectory, disk: Path) -> None:
    """Last: the server is stopped, the key goes and comes back."""
    slot = PassphraseSlot("primary", Secret("a passphrase for this test"))
    key = KeyStore(state, CLUSTER).open_key("tablespace.sealed", [slot])
    server.stop()
    assert fscrypt.remove_key(str(disk), fscrypt.identifier(key.reveal()))["status"] == "absent"
    server.start()
    result = prove(server, state, tablespaces=["sealed"])
    assert verdicts(result) == {"sealed": "unknown"}
    assert "open the keystore" in result["proofs"][0]["reasons"][0]
    fscrypt.add_key(str(disk), key.reveal())
    assert verdicts(prove(server, state, tablespaces=["sealed"])) == {"sealed": "encrypted"}
