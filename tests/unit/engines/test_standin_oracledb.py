# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The stand-in for Oracle (tests/standins/oracledb): the traps that the engine is tried on."""

from __future__ import annotations

import importlib
import sys
import typing as t
from pathlib import Path

import pytest

STANDIN = str(Path(__file__).resolve().parents[2] / "standins" / "oracledb")
AKM = "ADMINISTER KEY MANAGEMENT "
RIGHT = 'IDENTIFIED BY "Pass-1|one"'


class Server:
    def __init__(self, path: Path) -> None:
        self.api = importlib.import_module("oracledb")
        self.database = importlib.import_module("oracledb.database").Database.create(path)
        self.database.token("one", "softcard", "Pass-1")
        with self.database.change() as state:
            state["spfile"] = state["running"] = {"WALLET_ROOT": "/w", "TDE_CONFIGURATION": "KEYSTORE_CONFIGURATION=HSM"}

    def sql(self, *statements: str, container: str = "CDB$ROOT", parameters: t.Any = None) -> list[tuple[t.Any, ...]]:
        connection = self.api.connect("here", user="sys", password="Sys-Password-1", mode=self.api.AUTH_MODE_SYSDBA)
        connection.call_timeout = 200
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER SESSION SET CONTAINER = {container}")
            for one in statements:
                cursor.execute(one, parameters)
            return t.cast("list[tuple[t.Any, ...]]", cursor.fetchall())

    def refused(self, *statements: str, container: str = "CDB$ROOT", parameters: t.Any = None) -> str:
        with pytest.raises(self.api.DatabaseError) as caught:
            self.sql(*statements, container=container, parameters=parameters)
        return str(caught.value.args[0].full_code)

    def read(self, container: str, name: str) -> t.Any:
        return self.sql("SELECT CONTENT FROM STANDIN$TABLESPACE WHERE NAME = :1", container=container, parameters=[name])[0][0]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.syspath_prepend(STANDIN)
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "oracledb"]:
        monkeypatch.delitem(sys.modules, name)
    return Server(tmp_path)


def _open(server: Server, credential: str = RIGHT) -> None:
    server.sql(f"{AKM}SET KEYSTORE OPEN {credential} CONTAINER = ALL")


def _set(server: Server, credential: str = RIGHT) -> None:
    for name in ("CDB$ROOT", "PDB1", "PDB2"):
        server.sql(f"{AKM}SET KEY USING TAG 't' FORCE KEYSTORE {credential}", container=name)


def test_a_mistyped_credential_falls_to_module_protection_without_a_word(server: Server) -> None:
    wrong = 'IDENTIFIED BY "Pass-2|one"'
    _open(server, wrong)
    _set(server, wrong)
    assert set(server.database.state()["hsm"]["keys"].values()) == {"module"}


def test_the_roots_keystore_opens_first_and_a_closed_pdb_is_left_behind(server: Server) -> None:
    assert server.refused(f"{AKM}SET KEYSTORE OPEN {RIGHT}", container="PDB1") == "ORA-46658"
    server.database.close_pdb("PDB2")
    _open(server)
    server.sql("ALTER PLUGGABLE DATABASE ALL OPEN")
    status = dict(server.sql("SELECT CON_ID, STATUS FROM V$ENCRYPTION_WALLET"))
    assert (status[3], status[4]) == ("OPEN_NO_MASTER_KEY", "CLOSED")
    assert server.refused(f"{AKM}SET KEYSTORE OPEN {RIGHT}") == "ORA-28354"


def test_data_are_unreadable_while_their_master_key_is_out_of_reach(server: Server) -> None:
    _open(server)
    _set(server)
    server.database.add_tablespace("PDB1", "USERS", "content")
    server.sql("ALTER TABLESPACE USERS ENCRYPTION ONLINE USING 'AES256' ENCRYPT", container="PDB1")
    assert server.read("PDB1", "USERS") == "content"
    read = "SELECT CONTENT FROM STANDIN$TABLESPACE WHERE NAME = :1"
    server.sql(f"{AKM}SET KEYSTORE CLOSE {RIGHT} CONTAINER = ALL")
    assert server.refused(read, container="PDB1", parameters=["USERS"]) == "ORA-28365"
    server.database.bounce()
    server.sql("ALTER PLUGGABLE DATABASE ALL OPEN")
    _open(server, 'IDENTIFIED BY "Other-1"')
    assert server.refused(read, container="PDB1", parameters=["USERS"]) == "ORA-28374"
    assert server.refused(f"{AKM}SET KEYSTORE CLOSE {RIGHT}") == "ORA-28353"


def test_the_journal_and_no_error_code_hold_a_credential(server: Server) -> None:
    _open(server)
    _set(server)
    text = (server.database.path / "journal.jsonl").read_text()
    assert "Pass-1" not in text
    assert text.count("***") == 4


def test_a_server_that_is_not_answered_by_its_hsm_is_waited_for_no_longer_than_the_call_timeout(server: Server) -> None:
    server.database.fault("hang", "KEYSTORE OPEN")
    assert server.refused(f"{AKM}SET KEYSTORE OPEN {RIGHT}") == "DPY-4024"
