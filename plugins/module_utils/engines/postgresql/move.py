# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Moving tables, schemas and databases into a tablespace while the server runs.

What moves is decided by pure functions over a :class:`Catalog`; the mover carries it out relation by relation,
each in a transaction of its own with a lock time-out and bounded retry, and reads the catalog again. An
interrupted run is resumed by the next: what has moved is where it should be.
"""

from __future__ import annotations

import dataclasses
import random
import time
import typing as t

from ...common.errors import TdeError
from ..base import MoveWish
from . import sql

if t.TYPE_CHECKING:
    import psycopg

#: Times that a relation is tried while others hold its lock, and the longest pause between two tries in seconds.
ATTEMPTS = 12
PAUSE_SECONDS = 5.0
#: Seconds that the copy of one relation may take.
COPY_SECONDS = 24 * 3600
#: Times that the catalog is read again for what was created meanwhile.
PASSES = 5

#: ALTER … SET TABLESPACE by pg_class.relkind (PostgreSQL manual, 53.11). A table takes its TOAST along, its
#: indexes do not follow; a partitioned table or index has no storage and keeps the tablespace of its future
#: partitions. Sequences, views and foreign tables have no tablespace that could be set.
STATEMENTS: dict[str, t.LiteralString] = {
    "r": "ALTER TABLE {} SET TABLESPACE {}",
    "p": "ALTER TABLE {} SET TABLESPACE {}",
    "m": "ALTER MATERIALIZED VIEW {} SET TABLESPACE {}",
    "i": "ALTER INDEX {} SET TABLESPACE {}",
    "I": "ALTER INDEX {} SET TABLESPACE {}",
}
KINDS = {"r": "table", "p": "partitioned table", "m": "materialized view", "i": "index", "I": "partitioned index"}

#: System tables that hold users' data and may be moved with allow_system_table_mods; mapped ones may not.
LARGE_OBJECTS = "pg_largeobject"

#: SQLSTATEs after which a relation is tried again: lock_not_available, deadlock_detected.
_RETRY = ("55P03", "40P01")
#: undefined_table, undefined_object: dropped or renamed meanwhile.
_GONE = ("42P01", "42704")
#: object_in_use, object_not_in_prerequisite_state: a connection came, or a relation lies in the target already.
_DATABASE_BUSY = ("55006", "55000")


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation that can be moved, or a view that stands between two.

    :param kind: pg_class.relkind.
    :param tablespace: the tablespace in effect, the database's own where none is set.
    :param table: the table of an index, else 0.
    """

    oid: int
    schema: str
    name: str
    kind: str
    tablespace: str
    table: int = 0

    @property
    def label(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Catalog:
    """A database's relations.

    :param partitions: (child, parent) of partitions and of partitioned indexes.
    :param feeds: (source, view) where a view or materialised view reads a relation.
    """

    database: str
    relations: tuple[Relation, ...]
    schemas: tuple[str, ...] = ()
    partitions: tuple[tuple[int, int], ...] = ()
    feeds: tuple[tuple[int, int], ...] = ()


def _system(relation: Relation) -> bool:
    return relation.schema.startswith("pg_") or relation.schema == "information_schema"


def _closure(start: t.Iterable[int], edges: t.Iterable[tuple[int, int]]) -> set[int]:
    """All that is reached from ``start`` over (from, to)."""
    after: dict[int, list[int]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
    found: set[int] = set()
    todo = list(start)
    while todo:
        oid = todo.pop()
        if oid not in found:
            found.add(oid)
            todo.extend(after.get(oid, ()))
    return found


def selected(catalog: Catalog, tables: t.Collection[str] = (), schemas: t.Collection[str] = ()) -> set[int]:
    """The tables and materialised views that names and schemas mean: partitions and dependent materialised views too.

    :raises TdeError: ``relation_absent``, ``schema_absent``: nothing is begun on a misspelt name.
    """
    kinds = ("r", "p", "m")
    named = {relation.label: relation.oid for relation in catalog.relations if relation.kind in kinds}
    for name in tables:
        if name not in named:
            raise TdeError("relation_absent", "is not a table or materialized view", obj=f"{name} in database {catalog.database}")
    for name in schemas:
        if name not in catalog.schemas:
            raise TdeError("schema_absent", "does not exist", obj=f"schema {name} in database {catalog.database}")
    chosen = {named[name] for name in tables}
    chosen |= {one.oid for one in catalog.relations if one.kind in kinds and one.schema in schemas}
    edges = [(parent, child) for child, parent in catalog.partitions] + list(catalog.feeds)
    reached = _closure(chosen, edges)
    return {one.oid for one in catalog.relations if one.oid in reached and one.kind in kinds}


def with_indexes(catalog: Catalog, tables: set[int]) -> list[Relation]:
    """Tables and their indexes, in the order in which they move: what future partitions inherit from comes first."""
    order = {"p": 0, "I": 1, "r": 2, "m": 3, "i": 4}
    members = [one for one in catalog.relations if one.oid in tables or (one.kind in "iI" and one.table in tables)]
    return sorted(members, key=lambda one: (order[one.kind], one.schema, one.name))


@dataclasses.dataclass(frozen=True)
class DatabaseState:
    """What decides how a whole database moves.

    :param tablespace: its default; :param default_setting: what its setting default_tablespace names.
    :param connections: sessions of others in it.
    """

    tablespace: str
    default_setting: str
    connections: int


@dataclasses.dataclass(frozen=True)
class Moves:
    """What is left to do in one database for one tablespace.

    :param whole: move the database's default tablespace, nobody being connected.
    :param large_objects: move pg_largeobject and its index.
    :param default: set the database's default_tablespace, for tables to come.
    """

    database: str
    relations: tuple[Relation, ...] = ()
    whole: bool = False
    large_objects: bool = False
    default: bool = False

    @property
    def any(self) -> bool:
        return bool(self.relations) or self.whole or self.large_objects or self.default


def decide(
    catalog: Catalog,
    state: DatabaseState,
    target: str,
    wish: MoveWish,
    *,
    elsewhere: t.Collection[int] = (),
    encrypted: t.Collection[str] = (),
) -> Moves:
    """What must move from ``catalog`` into ``target``.

    A whole database leaves alone what lies in another encrypted tablespace and what the same task sends
    elsewhere by name: two wishes never pull at one table.

    :param elsewhere: tables that the same task names for another tablespace.
    :param encrypted: the names of all encrypted tablespaces.
    """
    named = catalog.database == wish.database
    direct = selected(catalog, wish.tables, ()) if named and wish.tables else set()
    by_schema = selected(catalog, (), wish.schemas) - set(elsewhere) if named and wish.schemas else set()
    tables = direct | by_schema
    whole_database = catalog.database in wish.databases
    spared: set[int] = set()
    if whole_database:
        user = {one.oid for one in catalog.relations if one.kind in ("r", "p", "m") and not _system(one)}
        tables |= user - set(elsewhere)
        spared = user - direct - by_schema
    others = set(encrypted) - {target}
    left = [
        one
        for one in with_indexes(catalog, tables)
        if one.tablespace != target and not ((one.table or one.oid) in spared and one.tablespace in others)
    ]
    if not whole_database:
        return Moves(catalog.database, tuple(left))
    if state.tablespace == target:
        return Moves(catalog.database, tuple(left))
    large = next((one for one in catalog.relations if one.schema == "pg_catalog" and one.name == LARGE_OBJECTS), None)
    in_target = any(one.tablespace == target for one in catalog.relations)
    if state.connections == 0 and not in_target:
        return Moves(catalog.database, tuple(one for one in left if one.tablespace != state.tablespace), whole=True)
    return Moves(
        catalog.database,
        tuple(left),
        large_objects=large is not None and large.tablespace != target,
        default=state.default_setting != target,
    )


_RELATIONS = """
SELECT c.oid::bigint, n.nspname, c.relname, c.relkind::text, coalesce(s.spcname, d.spcname), coalesce(i.indrelid::bigint, 0)
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_index i ON i.indexrelid = c.oid
  LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
 CROSS JOIN (SELECT t.spcname FROM pg_database b JOIN pg_tablespace t ON t.oid = b.dattablespace
              WHERE b.datname = current_database()) d
 WHERE c.relkind IN ('r', 'p', 'm', 'i', 'I') AND c.relpersistence <> 't'
   AND (n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' OR c.oid IN ('pg_largeobject'::regclass, 'pg_largeobject_loid_pn_index'::regclass))
"""

_PARTITIONS = """
SELECT i.inhrelid::bigint, i.inhparent::bigint FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent WHERE p.relkind IN ('p', 'I')
"""

# A view's rule depends on what it reads (PostgreSQL manual, 53.18: pg_depend; 53.45: pg_rewrite).
_FEEDS = """
SELECT DISTINCT d.refobjid::bigint, r.ev_class::bigint
  FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
 WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class AND r.oid >= 16384
"""


def read_catalog(connection: psycopg.Connection[t.Any]) -> Catalog:
    """The relations of the database that the connection is in."""
    return Catalog(
        database=connection.info.dbname,
        relations=tuple(Relation(*row) for row in connection.execute(_RELATIONS).fetchall()),
        partitions=tuple(connection.execute(_PARTITIONS).fetchall()),
        schemas=tuple(name for (name,) in connection.execute("SELECT nspname FROM pg_namespace").fetchall()),
        feeds=tuple(connection.execute(_FEEDS).fetchall()),
    )


@dataclasses.dataclass
class Progress:
    """What was moved so far: one row a relation, as the result shows it."""

    rows: list[dict[str, t.Any]] = dataclasses.field(default_factory=list)

    def add(self, database: str, obj: str, kind: str, tablespace: str, target: str, size: int, seconds: float, attempts: int) -> None:
        self.rows.append(
            {
                "database": database,
                "object": obj,
                "kind": kind,
                "from": tablespace,
                "to": target,
                "bytes": size,
                "seconds": round(seconds, 3),
                "attempts": attempts,
            }
        )


class Mover:
    """Carries moves out.

    :param where: the server.
    :param lock_seconds: how long one try waits for a lock, while others queue behind it.
    :param pause: waits between two tries (seconds); a test passes its own.
    """

    def __init__(self, where: sql.Access, lock_seconds: float, pause: t.Callable[[float], None] = time.sleep) -> None:
        self.where = where
        self.lock_seconds = lock_seconds
        self.pause = pause
        self.progress = Progress()

    def move_relations(self, moves: Moves, target: str) -> None:
        """Move relations, large objects and the default for tables to come, in the database that they are in.

        :raises TdeError: ``move_blocked`` with what was moved and what is left.
        """
        with sql.connect(self.where, moves.database, lock_seconds=self.lock_seconds) as connection:
            for number, relation in enumerate(moves.relations):
                self._move(connection, relation, target, left=len(moves.relations) - number)
            if moves.large_objects:
                # Superusers only; for this session only.
                connection.execute("SET allow_system_table_mods = on")
                for relation in read_catalog(connection).relations:
                    if relation.schema == "pg_catalog" and relation.tablespace != target:
                        self._move(connection, relation, target, left=1)
            if moves.default:
                self._default(connection, moves.database, target)

    def _default(self, connection: psycopg.Connection[t.Any], database: str, target: str) -> None:
        from psycopg import sql as quoted

        statement = quoted.SQL("ALTER DATABASE {} SET default_tablespace = {}")
        connection.execute(statement.format(quoted.Identifier(database), quoted.Literal(target)))

    def _move(self, connection: psycopg.Connection[t.Any], relation: Relation, target: str, left: int) -> None:
        import psycopg
        from psycopg import sql as quoted

        statement = quoted.SQL(STATEMENTS[relation.kind]).format(sql.qualified(relation.schema, relation.name), quoted.Identifier(target))
        began = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with connection.transaction():
                    connection.execute("SELECT set_config('statement_timeout', %s, true)", (f"{COPY_SECONDS}s",))
                    connection.execute(statement)
                    size = connection.execute("SELECT pg_table_size(%s::oid)", (relation.oid,)).fetchone()
            except psycopg.Error as exc:
                if exc.sqlstate in _GONE:
                    return
                if exc.sqlstate not in _RETRY:
                    raise
                if attempt < ATTEMPTS:
                    self.pause(min(PAUSE_SECONDS, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                continue
            self.progress.add(
                connection.info.dbname,
                relation.label,
                KINDS[relation.kind],
                relation.tablespace,
                target,
                size[0] if size and size[0] else 0,
                time.monotonic() - began,
                attempt,
            )
            return
        raise TdeError(
            "move_blocked",
            f"{ATTEMPTS} times no lock within {self.lock_seconds:g} seconds",
            obj=f"{relation.label} in database {connection.info.dbname}",
            kept=f"{len(self.progress.rows)} objects were moved and stay moved; {left} are left here.",
            next_step="Run again when the long transactions have ended, or with a longer lock_timeout.",
            details={"moved": self.progress.rows, "left": left},
        )

    def move_database(self, name: str, target: str, tablespace: str) -> bool:
        """Move a database's default tablespace with all that lies in it.

        :param tablespace: the former one.
        :returns: False if somebody was connected after all, or part of it lies in the target; nothing was done then.
        """
        import psycopg
        from psycopg import sql as quoted

        # The database itself must have no connection, ours included.
        other = "template1" if self.where.connection.database == name else self.where.connection.database
        began = time.monotonic()
        statement = quoted.SQL("ALTER DATABASE {} SET TABLESPACE {}").format(quoted.Identifier(name), quoted.Identifier(target))
        with sql.connect(self.where, other, lock_seconds=self.lock_seconds) as connection:
            connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{COPY_SECONDS}s",))
            try:
                # Not possible inside a transaction block.
                connection.execute(statement)
            except psycopg.Error as exc:
                if exc.sqlstate in (*_DATABASE_BUSY, *_RETRY):
                    return False
                raise
            size = connection.execute("SELECT pg_database_size(%s)", (name,)).fetchone()
            self.progress.add(name, name, "database", tablespace, target, size[0] if size else 0, time.monotonic() - began, 1)
            return True
