# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host with a database of the stand-in for Oracle, and the stand-in for nShield (tests/standins)."""

from __future__ import annotations

import contextlib
import importlib
import sys
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import base
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle.engine import Oracle
from ansible_collections.hsm.tde.tests.integration import nshield, support

STANDIN = str(support.ROOT / "tests/standins/oracledb")
if STANDIN not in sys.path:
    sys.path.insert(0, STANDIN)

OLD, NEW, SOFTWARE = "Softcard-1", "Softcard-2", "Software-1"
SECRETS = (OLD, NEW, SOFTWARE, "Sys-Password-1")

Slot = t.Tuple[str, t.Optional[str], t.Optional[str]]
SOFT: Slot = ("softcard", "one", None)


class Site:
    """A host with an Oracle database, and nShield's software on it."""

    def __init__(self, base_: Path, hsm: nshield.Site, pdbs: t.Sequence[str] = ("PDB1",)) -> None:
        self.hsm = hsm
        self.state = StateDirectory(str(base_ / "state"))
        database = importlib.import_module("oracledb.database").Database
        self.database = database.create(base_ / "oracle", pdbs=pdbs, nfast_home=str(hsm.a.home))
        self.options: dict[str, t.Any] = {
            "wallet_root": "/opt/oracle/wallet",
            "nfast_home": str(hsm.a.home),
            "call_timeout": 20.0,
        }

    def engine(self, passphrase: str | None, **options: t.Any) -> Oracle:
        connection = base.Connection(host="db", user="sys", password=Secret("Sys-Password-1"), database="CDB1")
        given = {**self.options, **options}
        request = base.Request(self.state, "main", given, connection, passphrase=Secret(passphrase) if passphrase else None)
        return Oracle(request)

    def keystore(
        self, slot: Slot | None, passphrase: str | None = OLD, *, state: str = "present", check: bool = False, **options: t.Any
    ) -> base.Outcome:
        slots = None
        if slot:
            protection, name, own = slot
            slots = (base.SlotWish("primary", protection, passphrase=Secret(own) if own else None, token_name=name),)
        return self.engine(passphrase, **options).keystore(base.KeystoreWish(state, slots), check=check)

    def until_done(self, slot: Slot, passphrase: str | None = OLD, **options: t.Any) -> list[str]:
        """Run it, and restart whenever it says so, as the roles do. :returns: all actions."""
        actions = []
        for dummy in range(4):
            outcome = self.keystore(slot, passphrase, **options)
            actions += [step.action for step in outcome.plan]
            if not outcome.facts["restart_required"]:
                return actions
            self.database.bounce()
        raise AssertionError("still to be restarted")

    def master_key(self, passphrase: str = OLD, tag: str | None = None, **more: t.Any) -> base.Outcome:
        wish = base.MasterKeyWish("rotated" if tag else "present", tag)
        return self.engine(passphrase).master_key(wish, **{"check": False, **more})

    def tablespace(self, name: str, passphrase: str = OLD) -> base.Outcome:
        return self.engine(passphrase).tablespaces(base.TablespacesWish((base.TablespaceWish(name),)), check=False)

    def read(self, container: str = "PDB1", name: str = "USERS") -> str:
        """What is in a tablespace, if it can be read."""
        api = importlib.import_module("oracledb")
        connection = api.connect("x", user="sys", password="Sys-Password-1", mode=api.AUTH_MODE_SYSDBA)
        cursor = connection.cursor()
        cursor.execute(f"ALTER SESSION SET CONTAINER = {container}")
        try:
            cursor.execute("SELECT CONTENT FROM STANDIN$TABLESPACE WHERE NAME = :1", [name])
        except api.DatabaseError as exc:
            return str(exc.args[0].full_code)
        return str(cursor.fetchone()[0])

    def protections(self) -> set[str]:
        return {key["protection"] for key in self.hsm.a.keys().values()}

    def encrypted(self, slot: Slot = SOFT, passphrase: str = OLD, **options: t.Any) -> Site:
        """With a master key and an encrypted tablespace."""
        self.database.add_tablespace("PDB1", "USERS", "content")
        self.keystore(slot, passphrase, **options)
        self.database.bounce()
        self.open_pdbs()
        self.keystore(slot, passphrase, **options)
        self.master_key(passphrase)
        self.tablespace("PDB1.USERS", passphrase)
        assert self.read() == "content"
        return self

    def open_pdbs(self) -> None:
        with self.database.change() as state:
            for number, one in state["containers"].items():
                one["open"] = number != "2"

    def statements(self) -> list[str]:
        """Of the journal, as short as a guide writes them."""
        return [line.replace("ADMINISTER KEY MANAGEMENT ", "") for line in self.database.journal()]


@contextlib.contextmanager
def site(path: Path) -> t.Iterator[Site]:
    """A host with a softcard ``one``, its database not configured; the variable ORACLEDB_STANDIN is the caller's to set."""
    with nshield.site(slots=3) as hsm:
        hsm.a.create_softcard("one", OLD)
        yield Site(path, hsm)
