# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Encrypted tablespaces: made, and filled with what is to move, while the server runs."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ...common import plan as plans
from ...common.check import established
from ...common.errors import TdeError
from ...common.plan import Plan, Step
from .. import keyslots
from ..base import MoveWish, Outcome, TablespacesWish, TablespaceWish
from ..rounds import Decision
from . import look, move, plan, public, sql

if t.TYPE_CHECKING:
    from .engine import Postgresql

#: Names that become part of a key file's name: ``tablespace.<name>`` has at most 63 characters (common/state.py).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,51}")

#: What a move leaves behind, to be said in so many words.
FREED = (
    "The blocks that the moved data took before keep their plain text until they are written over: run fstrim on the former "
    "file system where its device can, or fill its free space once. Archived WAL and older backups keep theirs for good."
)
PG_UPGRADE = "pg_largeobject was moved, which pg_upgrade does not do for you: move it back before an upgrade with pg_upgrade."

Facts = t.Dict[str, t.Any]


class Tablespaces:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: Postgresql, wish: TablespacesWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        self.options = engine.options
        check_wishes(wish.items)
        self.ring = engine.keyring(wish.slots or (), check)
        if wish.slots is None:
            self.ring.same_as_before()
        self.acts = engine.acts(self.ring)
        self.server: look.Server | None = None
        self.progress: list[Facts] = []
        self.warnings: list[str] = []

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        record = self.engine.record
        if record is None and not self.check:
            self.engine.known()
        if record is None:
            self.warnings.append(f"Cluster {self.engine.request.cluster} has no record yet: an earlier task will make it.")
        outcome = self.engine.rounds(self.decide, self.run, check=self.check)
        outcome.warnings += self.warnings + self.ring.warnings
        outcome.facts.update(self._facts(outcome))
        return outcome

    # --- deciding

    def decide(self) -> tuple[Decision, Facts]:
        """Look at server, places and catalogs, and plan."""
        self.engine.reread()
        self.ring.look()
        server = look.server(self.engine.request.connection, self.options)
        answer = _usable(server)
        self.server = server
        user = self.options.account()
        hidden = self._hidden()
        steps: Plan = []
        shown = []
        # The login and the search for tokens are left out where no data key has to be made.
        wanted: list[keyslots.Wanted] | None = None
        for item in self.wish.items:
            location = self._location(item)
            place = self._place(item, location, server, hidden)
            key = self.ring.key(place.key_id)
            shown.append(place)
            if key is None and not place.made and wanted is None:
                wanted = self.ring.wanted()
            steps += plan.tablespace(
                dataclasses.replace(item, location=location), place, key, _catalog(item, place, answer), wanted or [],
                owner=user.pw_uid, no_recovery=self.wish.no_recovery, moves=item.move.any,
            )  # fmt: skip
        if wanted is not None:
            steps = keyslots.master_keys(self.ring.keys, self.ring.keks, wanted, steps) + steps
        steps += self._moves(server, answer)
        if self.engine.record and not self.options.data_directory:
            # The boot and "close" must know it without asking the server.
            record = dataclasses.replace(
                self.engine.record, options={**self.engine.record.options, "data_directory": server.data_directory}
            )
            if record != self.engine.record and steps:
                path = self.engine.request.state.cluster_record(record.cluster)
                steps.insert(0, Step("write_record", path, "where the server's data directory is", {"record": record.public()}))
        facts = public.facts(self.ring.keys, self.ring.keks, shown, self.engine.record)
        facts["tablespaces"] = {
            one.name: {"location": one.location, "owner": one.owner}
            for one in answer.tablespaces
            if one.name in {item.name for item in self.wish.items}
        }
        return Decision(steps), facts

    def _location(self, item: TablespaceWish) -> str:
        recorded = self.engine.record.place(plan.tablespace_key(item.name)) if self.engine.record else None
        if item.location:
            location = item.location
        elif recorded:
            location = recorded.path
        elif self.options.mount_point:
            location = os.path.join(self.options.mount_point, item.name)
        else:
            raise TdeError("invalid_option", "needs a location, for there is no mount_point", obj=f"tablespace {item.name}")
        if not os.path.isabs(location):
            raise TdeError("invalid_option", "must be an absolute path", obj=f"location {location!r}")
        if recorded and os.path.normpath(location) != recorded.path:
            raise TdeError(
                "tablespace_elsewhere",
                f"was made at {recorded.path}",
                obj=f"tablespace {item.name}",
                next_step="Leave location out, or name that one.",
            )
        return os.path.normpath(location)

    def _hidden(self) -> str:
        """The mount point at which nothing can be seen now, "" if there is none."""
        wish = self.options.storage_wish(sized=False)
        if wish is None:
            return ""
        storage = look.storage(wish)
        if storage.mounted:
            self.engine.same_file_system(storage)
            return ""
        return wish.mount_point

    def _place(self, item: TablespaceWish, location: str, server: look.Server, hidden: str) -> plan.PlaceFacts:
        key_id = plan.tablespace_key(item.name)
        recorded = self.engine.record.place(key_id) if self.engine.record else None
        below = bool(hidden) and location.startswith(hidden + "/")
        if below and not (self.check and self.engine.record is None):
            raise TdeError(
                "place_unreachable",
                "what belongs there is not mounted",
                obj=hidden,
                kept="Nothing was created in its place.",
                next_step="Open the keystore (tde_keystore with state=open, or hsm-tde open), then run again.",
            )
        made = self.engine.made().get(key_id, "")
        return look.place(
            key_id,
            location,
            self.ring.key(key_id),
            recorded,
            journalled=made,
            data_directory=server.data_directory,
            pending=below,
        )

    def _moves(self, server: look.Server, answer: sql.Server) -> Plan:
        encrypted = [one.name for one in answer.tablespaces if self._encrypted(one)]
        return plan_moves(server.access, answer, self.wish.items, encrypted)

    def _encrypted(self, tablespace: sql.Tablespace) -> bool:
        return self.ring.key(plan.tablespace_key(tablespace.name)) is not None

    # --- acting

    def run(self, steps: Plan) -> Plan:
        """Carry a plan out."""
        self.server = established(self.server, "server")
        self.ring.ready(steps)
        self.acts.record = self.engine.known()
        self.acts.access = self.server.access
        with move.Mover(self.server.access, self.wish.lock_timeout) as mover:
            self.acts.mover = mover
            try:
                plans.run(steps, {**self.ring.handlers(), **self.acts.handlers()})
            finally:
                self.progress += mover.progress.rows
        return [step for step in steps if step.action != "move_database" or self._moved(step)]

    def _moved(self, step: Step) -> bool:
        return any(row["kind"] == "database" and row["object"] == step.data["database"] for row in self.progress)

    # --- telling

    def _facts(self, outcome: Outcome) -> Facts:
        notes = []
        if self.progress or (self.check and any(step.action in MOVES for step in outcome.plan)):
            notes.append(FREED)
        if any(row["object"].startswith("pg_catalog.pg_largeobject") for row in self.progress):
            notes.append(PG_UPGRADE)
        answer = self.server.answer if self.server else None
        if answer and answer.standbys and any(step.action == "create_tablespace" for step in outcome.plan):
            self.warnings.append(
                f"{answer.standbys} standbys are attached: each stops replaying until the same place is there, encrypted on its own."
            )
            outcome.warnings += self.warnings[-1:]
        return {
            "cluster": self.engine.request.cluster,
            "tablespaces": [
                {
                    "name": item.name,
                    "location": self._location(item),
                    "key_id": plan.tablespace_key(item.name),
                    "check_value": key.check_value if key else None,
                    "algorithm": "AES256",
                }
                for item in self.wish.items
                for key in [self.ring.key(plan.tablespace_key(item.name))]
            ],
            "moved": self.progress,
            "notes": notes,
        }


#: Actions of moves.
MOVES = ("move_database", "move_relation", "move_large_objects", "set_default_tablespace")


def check_wishes(items: t.Sequence[TablespaceWish]) -> None:
    """Refuse names that cannot be, and two wishes for one thing.

    :raises TdeError: ``invalid_option``, ``tablespace_name_reserved``.
    """
    seen: dict[tuple[str, str], str] = {}
    for item in items:
        obj = f"tablespace {item.name!r}"
        if not _NAME.fullmatch(item.name):
            raise TdeError("invalid_option", "must be 1 to 52 of A-Z a-z 0-9 _ . - and begin with a letter or digit", obj=obj)
        if item.name.startswith("pg_"):
            raise TdeError("tablespace_name_reserved", "names that begin with pg_ belong to the server", obj=obj)
        wishes = [("tablespace", item.name)]
        wishes += [("table", f"{name} in database {item.move.database}") for name in item.move.tables]
        wishes += [("schema", f"{name} in database {item.move.database}") for name in item.move.schemas]
        wishes += [("database", name) for name in item.move.databases]
        if item.location:
            wishes.append(("location", os.path.normpath(item.location)))
        for name in wishes:
            if name in seen:
                raise TdeError("invalid_option", f"is listed for tablespace {seen[name]} and for {item.name}", obj=" ".join(name))
            seen[name] = item.name


def _usable(server: look.Server) -> sql.Server:
    """The server's facts, if tablespaces can be made on it.

    :raises TdeError: ``server_down`` and its kind, ``server_is_standby``,
        ``server_privilege_missing``, ``server_foreign``, ``server_not_local``.
    """
    if server.answer is None:
        raise established(server.error, "the error")
    answer = server.answer
    obj = f"PostgreSQL at {server.access.where}"
    if answer.standby:
        raise TdeError("server_is_standby", "is a standby", obj=obj, next_step="Run this on the primary.")
    if not answer.superuser:
        raise TdeError(
            "server_privilege_missing", f"{answer.user} is no superuser", obj=obj, next_step="Set login_user, or leave it out."
        )
    return answer


def _catalog(item: TablespaceWish, place: plan.PlaceFacts, answer: sql.Server) -> plan.CatalogFacts:
    found = answer.tablespace(item.name)
    taken = next((one.name for one in answer.tablespaces if one.name != item.name and one.location == place.path), "")
    if found is None:
        return plan.CatalogFacts(taken=taken)
    return plan.CatalogFacts(True, found.location, found.owner, taken)


def _databases(wish: MoveWish) -> list[str]:
    named = [wish.database] if wish.tables or wish.schemas else []
    return [*named, *wish.databases]


def plan_moves(access: sql.Access, answer: sql.Server, items: t.Sequence[TablespaceWish], encrypted: t.Sequence[str]) -> Plan:
    """The steps that bring into each tablespace what is wished there.

    :param encrypted: the encrypted tablespaces that there are; those of ``items`` count, too.
    :raises TdeError: ``database_absent``, ``relation_absent``, ``schema_absent``.
    """
    names = [*encrypted, *(item.name for item in items)]
    steps: Plan = []
    for name in sorted({name for item in items for name in _databases(item.move)}):
        found = answer.database(name)
        if found is None or not found.connects:
            raise TdeError(
                "database_absent",
                "takes no connections" if found else "does not exist",
                obj=f"database {name}",
                next_step="Correct its name.",
            )
        with sql.connect(access, name) as connection:
            catalog = move.read_catalog(connection)
        state = move.DatabaseState(found.tablespace, found.default_setting, found.connections)
        for number, item in enumerate(items):
            others = [other.move for other in (*items[:number], *items[number + 1 :])]
            moves = move.decide(catalog, state, item.name, item.move, others=others, encrypted=names)
            steps += _steps(moves, item.name, state)
    return steps


def _steps(moves: move.Moves, target: str, state: move.DatabaseState) -> Plan:
    """The moves as steps."""
    common = {"database": moves.database, "target": target}
    steps: Plan = []
    if moves.whole:
        steps.append(
            Step(
                "move_database",
                f"database {moves.database}",
                f"to tablespace {target}, nobody being connected",
                {**common, "from": state.tablespace},
            )
        )
    for one in moves.relations:
        obj = f"{move.KINDS[one.kind]} {one.label} in database {moves.database}"
        steps.append(
            Step("move_relation", obj, f"from {one.tablespace} to {target}", {**common, "relation": dataclasses.asdict(one)})
        )
    if moves.large_objects:
        steps.append(Step("move_large_objects", f"large objects of database {moves.database}", f"to {target}", common))
    if moves.default:
        steps.append(Step("set_default_tablespace", f"database {moves.database}", f"tables to come go to {target}", common))
    return steps
