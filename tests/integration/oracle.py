# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host with a database of the stand-in for Oracle, and the stand-in for nShield (tests/standins)."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import shutil
import signal
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import base
from ansible_collections.hsm.tde.plugins.module_utils.engines import record as records
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle.engine import Oracle
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_cards, nshield_changes, nshield_world
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import Nshield
from ansible_collections.hsm.tde.tests.integration import nshield, support

STANDIN = str(support.ROOT / "tests/standins/oracledb")
if STANDIN not in sys.path:
    sys.path.insert(0, STANDIN)

OLD, NEW, SOFTWARE = "Softcard-1", "Softcard-2", "Software-1"
SECRETS = (OLD, NEW, SOFTWARE, "Sys-Password-1")

Slot = t.Tuple[str, t.Optional[str], t.Optional[str]]
SOFT: Slot = ("softcard", "one", None)

#: A program that restarts a database, its PDBs open but for the seed; the database's folder is to be filled in.
BOUNCE = """
import pathlib
from oracledb.database import Database
database = Database(pathlib.Path(%r))
database.bounce()
with database.change() as state:
    for number, one in state["containers"].items():
        one["open"] = number != "2"
"""


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
        try:
            cursor.execute(f"ALTER SESSION SET CONTAINER = {container}")
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

    def journal(self, since: float = 0.0) -> list[str]:
        """What changed something at the database or in the HSM, in order of time, as short as a guide writes it; tools that failed are left out."""
        entries = [
            (entry["time"], entry["statement"].replace("ADMINISTER KEY MANAGEMENT ", "")) for entry in self.database.entries()
        ]
        for entry in self.hsm.hsm.journal():
            if entry.get("command") and entry["exit"] == 0 and changing([entry["command"], *entry["arguments"]]):
                entries.append((entry["time"], " ".join([entry["command"], *entry["arguments"]])))
        return [text for when, text in sorted(entries) if when > since]


def changing(argv: t.Sequence[str]) -> bool:
    """Whether one of nShield's commands changes something; of rocs it is not told by its arguments."""
    return "--change" in argv or "--new" in argv


def quick(patch: pytest.MonkeyPatch) -> None:
    """For walks of hundreds of runs: nfkminfo, which only tells, is run within this process, and fingerprints cost nothing."""
    patch.setattr(memos, "_N", 2)
    ordinary = Nshield.run

    def run(self: Nshield, name: str, *arguments: str) -> str:
        before = sys.argv, list(sys.path)
        printed = io.StringIO()
        code: t.Any = None
        with pytest.MonkeyPatch.context() as within:
            for variable, value in self.environment.items():
                within.setenv(variable, value)
            sys.argv = [name, *arguments]
            try:
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                    runpy.run_path(self.command(name))
            except SystemExit as end:
                code = end.code
            finally:
                sys.argv, sys.path[:] = before
        # What failed is run again, so that it fails as it does in life.
        return printed.getvalue() if code == 0 and name == "nfkminfo" else ordinary(self, name, *arguments)

    patch.setattr(Nshield, "run", run)


# --- kills: a process that is killed before or right after one of its acts


class Acts:
    """Counts the acts of processes, and kills the process at one of them.

    An act is a statement that changes something, a command of nShield's that does, or a write of what the host remembers.

    :param log: a file with a line an act, which all processes of a change share; :ivar deadly: number of the act (from 0) and
        whether the kill comes after it; None for no kill.
    """

    def __init__(self, log: Path, deadly: tuple[int, bool] | None) -> None:
        self.log, self.deadly = log, deadly

    def words(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wrapped(self, fn: t.Callable[..., t.Any], words: t.Callable[..., str | None]) -> t.Callable[..., t.Any]:
        def act(*args: t.Any, **more: t.Any) -> t.Any:
            name = words(*args)
            if name is None:
                return fn(*args, **more)
            number = len(self.words())
            with self.log.open("a") as handle:
                handle.write(name + "\n")
            if self.deadly == (number, False):
                os.kill(os.getpid(), signal.SIGKILL)
            result = fn(*args, **more)
            if self.deadly == (number, True):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return act

    def watch(self) -> None:
        """From now on, in this process."""
        standin = importlib.import_module("oracledb.database")

        def statement(dummy: t.Any, text: str, *more: t.Any) -> str | None:
            return "sql " + standin.redacted(f"{more[1]}: {text}") if standin.changes(text) else None

        def command(argv: t.Sequence[str], answers: t.Sequence[t.Any], **dummy: t.Any) -> str | None:
            name = os.path.basename(argv[0])
            saves = any(answer.reply == "save" for answer in answers)
            return f"tool {' '.join([name, *argv[1:]])}" if saves or changing(argv) else None

        standin.Database.execute = self.wrapped(standin.Database.execute, statement)
        nshield_cards.converse = self.wrapped(nshield_cards.converse, command)
        for module, name in (
            (memos, "write"),
            (records, "write"),
            (nshield_changes, "save"),
            (nshield_world, "back_up"),
            (nshield_world, "put_aside"),
        ):
            words = f"file {module.__name__.rpartition('.')[2]}.{name}"
            setattr(module, name, self.wrapped(getattr(module, name), lambda *dummy, words=words: words))


class Killed(Exception):
    """The process was killed where it was to be."""


def in_process(work: t.Callable[[], bool], log: Path, deadly: tuple[int, bool] | None) -> bool:
    """Run in a process of its own, which counts its acts.

    :raises Killed: as ordered.
    """

    def run() -> bool:
        Acts(log, deadly).watch()
        return work()

    try:
        return support.in_child(run)
    except support.ChildFailed as failed:
        if "status 9 " in str(failed):
            raise Killed from None
        raise


class Saved:
    """A site as it was, to which it can be brought back."""

    def __init__(self, one: Site, folder: Path) -> None:
        self._copies = [
            (path, folder / str(number)) for number, path in enumerate((one.hsm.base, one.database.path, Path(one.state.path)))
        ]
        for path, copy in self._copies:
            shutil.copytree(path, copy)

    def back(self) -> None:
        for path, copy in self._copies:
            shutil.rmtree(path)
            shutil.copytree(copy, path)


@contextlib.contextmanager
def site(path: Path, **more: t.Any) -> t.Iterator[Site]:
    """A host with a softcard ``one``, its database not configured; the variable ORACLEDB_STANDIN is the caller's to set.

    :param more: as :class:`nshield.Site` takes it.
    """
    with nshield.site(slots=3, **more) as hsm:
        hsm.a.create_softcard("one", OLD)
        yield Site(path, hsm)
