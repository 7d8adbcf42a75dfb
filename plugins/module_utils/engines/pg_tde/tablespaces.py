# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tables under the access method ``tde_heap``, which is what a tablespace is with pg_tde: converted while the server runs."""

from __future__ import annotations

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..base import MoveWish, Outcome, TablespacesWish, TablespaceWish
from ..postgresql import move
from ..postgresql import sql as postgres
from ..postgresql.tablespaces import FREED
from ..rounds import Decision
from . import plan, sql
from .engine import Facts, PgTde

#: What no table option changes.
STATISTICS = "ANALYZE keeps values of the encrypted tables in pg_statistic, which is in the clear."


class Tablespaces:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: PgTde, wish: TablespacesWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        for item in wish.items:
            _check(item, engine)
        if len(wish.items) > 1:
            raise TdeError("invalid_option", "is listed twice", obj=f"tablespace {sql.TDE_HEAP}")
        if engine.record is None and not check:
            engine.known()
        self.ring = engine.keyring((), check)
        self.acts = engine.acts(self.ring)
        self.acts.lock_seconds = wish.lock_timeout
        self.directory: str | None = None

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        outcome = self.engine.rounds(self._decide, self.ring, self.acts, check=self.check)
        if self.engine.record is None:
            outcome.warnings.append(f"Cluster {self.engine.request.cluster} has no record yet: an earlier task will make it.")
        converted = any(step.action == "encrypt_table" for step in outcome.plan)
        outcome.facts.update(
            {
                "cluster": self.engine.request.cluster,
                "tablespaces": [
                    {
                        "name": item.name,
                        "location": self.directory,
                        "key_id": None,
                        "check_value": None,
                        "algorithm": plan.cipher_of(self.engine.options),
                    }
                    for item in self.wish.items
                ],
                "moved": self.acts.progress,
                "notes": [FREED, STATISTICS] if converted else [],
            }
        )
        return outcome

    def _decide(self) -> tuple[Decision, Facts]:
        engine = self.engine
        engine.reread()
        self.ring.look()
        state = engine.state()
        facts = engine.answered(state)
        self.acts.access = state.server.access
        self.directory = state.server.data_directory
        if engine.options.extension not in sql.preloaded(facts.running):
            if self.check:
                return Decision([], restart=plan.restart_reasons(engine.options, facts)), engine.facts(self.ring, state)
            raise TdeError(
                "keystore_closed",
                f"the server has not loaded {engine.options.extension}",
                obj=f"cluster {engine.request.cluster}",
                next_step="Make the keystore (tde_keystore), and restart the server.",
            )
        steps: Plan = []
        for item in self.wish.items:
            for name in _databases(item.move):
                if name not in facts.databases:
                    raise TdeError("database_absent", "does not exist, or takes no connections", obj=f"database {name}")
                steps += self._database(state.server.access, facts.databases[name], item, facts)
        return Decision(steps, restart=plan.restart_reasons(engine.options, facts)), engine.facts(self.ring, state)

    def _database(self, access: postgres.Access, database: sql.Database, item: TablespaceWish, facts: sql.Facts) -> Plan:
        name = database.name
        steps: Plan = []
        if database.schema is None:
            obj = f"extension {self.engine.options.extension} in database {name}"
            steps.append(Step("create_extension", obj, "it is not there", {"database": name}))
        if facts.default_key.name is None and database.key.name is None and not self.check:
            raise TdeError(
                "keystore_closed",
                "no key is set for it" + (f": {database.key.problem}" if database.key.problem else ""),
                obj=f"database {name}",
                next_step="Set one (tde_master_key); with scope database, list it in databases.",
            )
        with postgres.connect(access, name) as connection:
            catalog = move.read_catalog(connection)
        certain, showing = move.selected(catalog, item.move)
        whole = name in item.move.databases
        wished = {one.label for one in catalog.relations if one.oid in certain | showing}
        for table in database.tables:
            if (whole or table.label in wished) and not table.encrypted:
                data = {"database": name, "schema": table.schema, "table": table.name, "kind": table.kind}
                obj = f"{move.KINDS[table.kind]} {table.label} in database {name}"
                steps.append(Step("encrypt_table", obj, f"from heap to {sql.TDE_HEAP}", data))
        if whole and database.default_method != sql.TDE_HEAP:
            obj, why = f"database {name}", f"tables to come are made under {sql.TDE_HEAP}"
            steps.append(Step("set_default_method", obj, why, {"database": name}))
        return steps


def _databases(wish: MoveWish) -> list[str]:
    named = [wish.database] if wish.tables or wish.schemas else []
    return list(dict.fromkeys([*named, *wish.databases]))


def _check(item: TablespaceWish, engine: PgTde) -> None:
    """Refuse what means nothing here.

    :raises TdeError: ``engine_unsupported``.
    """
    reason = ""
    if item.name != sql.TDE_HEAP:
        reason = f"Its only place of encrypted tables is the access method {sql.TDE_HEAP}, in whatever tablespace they are."
    elif item.location or item.owner:
        reason = "It has neither location nor owner: its tables stay where they are."
    elif item.algorithm != plan.cipher_of(engine.options):
        reason = f"The server encrypts with {plan.cipher_of(engine.options)}, by pg_tde.cipher."
    if reason:
        raise TdeError("engine_unsupported", reason, obj=f"engine {engine.name}, tablespace {item.name}")
