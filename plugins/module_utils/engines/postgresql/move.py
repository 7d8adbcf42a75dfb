# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Moving tables, schemas and databases into a tablespace while the server runs.

What moves is decided by pure functions over a :class:`Catalog`; the mover carries it out relation by relation,
each in a transaction of its own with a lock time-out and bounded retry, and reads the catalog again. An
interrupted run is resumed by the next: what has moved is where it should be.
"""

from __future__ import annotations

import contextlib
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


def _closure(start: t.Iterable[int], edges: t.Iterable[tuple[int, int]], stop: t.Collection[int] = ()) -> set[int]:
    """All that is reached from ``start`` over (from, to) without entering ``stop``."""
    after: dict[int, list[int]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
    found: set[int] = set()
    todo = list(start)
    while todo:
        oid = todo.pop()
        if oid not in found and oid not in stop:
            found.add(oid)
            todo.extend(after.get(oid, ()))
    return found


#: What holds rows: tables, partitioned tables, materialised views.
_TABLES = ("r", "p", "m")


def _named(catalog: Catalog, wish: MoveWish) -> tuple[set[int], set[int]]:
    """The tables that a wish names, and those of the schemas that it names.

    :raises TdeError: ``relation_absent``, ``schema_absent``: nothing is begun on a misspelt name.
    """
    if wish.database != catalog.database:
        return set(), set()
    known = {one.label: one.oid for one in catalog.relations if one.kind in _TABLES and not _system(one)}
    for name in wish.tables:
        if name not in known:
            raise TdeError("relation_absent", "is not a table or materialized view", obj=f"{name} in database {catalog.database}")
    for name in wish.schemas:
        if name not in catalog.schemas:
            raise TdeError("schema_absent", "does not exist", obj=f"schema {name} in database {catalog.database}")
    in_schemas = {one.oid for one in catalog.relations if one.kind in _TABLES and one.schema in wish.schemas}
    return {known[name] for name in wish.tables}, in_schemas


def selected(catalog: Catalog, wish: MoveWish, others: t.Sequence[MoveWish] = ()) -> tuple[set[int], set[int]]:
    """The tables that names and schemas mean, with their partitions; and the materialised views that show their rows.

    Two wishes never pull at one table: a table's own name counts more than its schema, its schema more than the
    table that it is a partition of.

    :param others: what goes to other tablespaces in the same task.
    :raises TdeError: as :func:`_named`.
    """
    exact, in_schemas = _named(catalog, wish)
    exact_others: set[int] = set()
    schema_others: set[int] = set()
    for other in others:
        tables, in_others = _named(catalog, other)
        exact_others |= tables
        schema_others |= in_others
    start = exact | (in_schemas - exact_others)
    stop = (exact_others | schema_others) - start
    certain = _closure(start, [(parent, child) for child, parent in catalog.partitions], stop)
    showing = _closure(certain, catalog.feeds, stop) - certain
    views = {one.oid for one in catalog.relations if one.kind == "m"}
    tables = {one.oid for one in catalog.relations if one.kind in _TABLES}
    return certain & tables, showing & views


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
    others: t.Sequence[MoveWish] = (),
    encrypted: t.Collection[str] = (),
) -> Moves:
    """What must move from ``catalog`` into ``target``.

    What is moved because it hangs on something else (a whole database's tables, materialised views of a table that
    moves) stays where it is if that is another encrypted tablespace.

    :param others: what goes to other tablespaces in the same task.
    :param encrypted: the names of all encrypted tablespaces.
    """
    certain, showing = selected(catalog, wish, others)
    whole = catalog.database in wish.databases
    tables = certain | showing
    if whole:
        claimed = {oid for number, other in enumerate(others) for oid in _claims(catalog, other, wish, others, number)}
        tables |= {one.oid for one in catalog.relations if one.kind in _TABLES and not _system(one)} - claimed
    elsewhere = set(encrypted) - {target}
    left = tuple(
        one
        for one in with_indexes(catalog, tables)
        if one.tablespace != target and not ((one.table or one.oid) not in certain and one.tablespace in elsewhere)
    )
    if not whole or state.tablespace == target:
        return Moves(catalog.database, left)
    in_target = any(one.tablespace == target for one in catalog.relations)
    if state.connections == 0 and not in_target:
        return Moves(catalog.database, tuple(one for one in left if one.tablespace != state.tablespace), whole=True)
    large = any(_is_large_objects(one) and one.tablespace != target for one in catalog.relations)
    return Moves(catalog.database, left, large_objects=large, default=state.default_setting != target)


def _claims(catalog: Catalog, other: MoveWish, wish: MoveWish, others: t.Sequence[MoveWish], number: int) -> set[int]:
    """The tables that another wish of the task means by name or schema."""
    return selected(catalog, other, [wish, *others[:number], *others[number + 1 :]])[0]


def _is_large_objects(relation: Relation) -> bool:
    return relation.schema == "pg_catalog"


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

    def add(
        self, database: str, obj: str, kind: str, tablespace: str, target: str, size: int, seconds: float, attempts: int
    ) -> None:
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
    """Carries moves out. A context manager: it holds one connection, to the database that it works in.

    :param where: the server.
    :param lock_seconds: how long one try waits for a lock, while others queue behind it.
    :param pause: waits between two tries (seconds); a test passes its own.
    """

    def __init__(self, where: sql.Access, lock_seconds: float, pause: t.Callable[[float], None] = time.sleep) -> None:
        self.where = where
        self.lock_seconds = lock_seconds
        self.pause = pause
        self.progress = Progress()
        self._stack = contextlib.ExitStack()
        self._connection: psycopg.Connection[t.Any] | None = None

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *raised: t.Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave the database, so that nobody is in it."""
        self._connection = None
        self._stack.close()

    @contextlib.contextmanager
    def _in(self, database: str) -> t.Iterator[psycopg.Connection[t.Any]]:
        import psycopg

        if self._connection is None or self._connection.info.dbname != database:
            self.leave()
            self._connection = self._stack.enter_context(sql.connect(self.where, database, lock_seconds=self.lock_seconds))
        try:
            yield self._connection
        except psycopg.Error as exc:
            raise sql.failed(exc, f"database {database}") from None

    def move_relation(self, database: str, relation: Relation, target: str) -> None:
        """Move one relation.

        :raises TdeError: ``move_blocked`` with what was moved.
        """
        with self._in(database) as connection:
            self._move(connection, relation, target)

    def move_large_objects(self, database: str, target: str) -> None:
        """Move the system table of large objects with its index; only a superuser may, and only with a setting of its own."""
        with self._in(database) as connection:
            connection.execute("SET allow_system_table_mods = on")
            try:
                for relation in read_catalog(connection).relations:
                    if _is_large_objects(relation) and relation.tablespace != target:
                        self._move(connection, relation, target)
            finally:
                connection.execute("RESET allow_system_table_mods")

    def set_default(self, database: str, target: str) -> None:
        """Set the tablespace of tables to come, for sessions to come."""
        from psycopg import sql as quoted

        statement = quoted.SQL("ALTER DATABASE {} SET default_tablespace = {}")
        with self._in(database) as connection:
            connection.execute(statement.format(quoted.Identifier(database), quoted.Literal(target)))

    def _move(self, connection: psycopg.Connection[t.Any], relation: Relation, target: str) -> None:
        import psycopg
        from psycopg import sql as quoted

        statement = quoted.SQL(STATEMENTS[relation.kind]).format(
            sql.qualified(relation.schema, relation.name), quoted.Identifier(target)
        )
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
            kept=f"{len(self.progress.rows)} objects were moved and stay moved.",
            next_step="Run again when the long transactions have ended, or with a longer lock_timeout.",
            details={"moved": self.progress.rows},
        )

    def move_database(self, name: str, target: str, tablespace: str) -> bool:
        """Move a database's default tablespace with all that lies in it.

        :param tablespace: the former one.
        :returns: False if somebody was connected after all, or part of it lies in the target; nothing was done then.
        """
        import psycopg
        from psycopg import sql as quoted

        # The database itself must have no connection, ours included.
        self.leave()
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
