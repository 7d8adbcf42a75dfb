# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a proof finds in the files of a server that encrypts its pages itself: its word is not taken."""

from __future__ import annotations

import os
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...storage import pages
from ...storage.proof import relation_files
from ..base import ProofWish
from ..postgresql import sql as postgres
from ..postgresql.targets import relation_paths

if t.TYPE_CHECKING:
    import psycopg

    from .engine import Fep

Facts = t.Dict[str, t.Any]

#: How many tables of a place are asked for values, and how many values of each: short ones, which are never compressed.
_TABLES, _VALUES = 8, 20
_SHORT, _LONG = 8, 60

#: Tables with columns of text in a tablespace (0: the database's own), the largest first.
_COLUMNS: t.LiteralString = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text, a.attname::text
  FROM (SELECT * FROM pg_class WHERE relkind IN ('r', 'm') AND relpersistence = 'p' AND relpages >= 0
           AND CASE WHEN %(oid)s::bigint > 0 THEN oid = %(oid)s::bigint
                    ELSE reltablespace = %(space)s::bigint AND relnamespace <> 'pg_catalog'::regnamespace END
         ORDER BY pg_relation_size(oid) DESC LIMIT %(tables)s) c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE a.atttypid IN ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype)
"""


def proofs(engine: Fep, wish: ProofWish) -> list[Facts]:
    """The proofs of a wish; the server brings its memory to the disk first.

    :raises TdeError: ``server_down`` and its kind, ``tablespace_absent``, ``relation_absent``, ``database_absent``, ``invalid_option``.
    """
    state = engine.state(engine.acts())
    engine.usable(state)
    answer = state.server.answer
    if answer is None:
        raise established(state.server.error, "the error")
    access = state.server.access
    with postgres.connect(access) as connection:
        postgres.checkpoint(connection)
    control = plain_control(access, answer)
    found = []
    if wish.data_directory:
        links = os.path.join(answer.data_directory, "pg_tblspc")
        files = [path for path in _files(os.path.join(answer.data_directory, "base")) if not path.startswith(links)]
        facts = pages.read(files)
        facts.control = control
        note = "Of the data directory the databases' files were judged; its write-ahead log has no pages of this kind."
        found.append(pages.told("data directory", answer.data_directory, facts, [note]))
    for name in wish.tablespaces:
        found.append(_tablespace(access, answer, name, control))
    for name in wish.relations:
        found.append(prove_relation(access, answer, name, control))
    return found


def _files(directory: str) -> list[str]:
    """The relations' files under a directory: their names are numbers."""
    return sorted(
        os.path.join(folder, name) for folder, dummy, names in os.walk(directory) for name in names if name[:1].isdigit()
    )


def plain_control(access: postgres.Access, answer: postgres.Server) -> int:
    """Plain pages in a file that no tablespace encrypts: the catalog of relations."""
    with postgres.connect(access) as connection:
        row = connection.execute("SELECT pg_relation_filepath('pg_class'::regclass)").fetchone()
    facts = pages.read([os.path.join(answer.data_directory, row[0])] if row else [])
    return facts.pages[pages.PLAIN]


def held_values(connection: psycopg.Connection[t.Any], *, space: int = 0, oid: int = 0) -> set[bytes]:
    """Values that the tables of a place hold, or those of one table."""
    from psycopg import sql as quoted

    rows = connection.execute(_COLUMNS, {"oid": oid, "space": space, "tables": _TABLES}).fetchall()
    found: set[bytes] = set()
    for dummy, schema, table, column in rows:
        name = quoted.Identifier(column)
        statement = quoted.SQL("SELECT {0}::text FROM {1} WHERE octet_length({0}) BETWEEN {2} AND {3} LIMIT {4}").format(
            name, postgres.qualified(schema, table), _SHORT, _LONG, _VALUES
        )
        found |= {value.encode() for (value,) in connection.execute(statement).fetchall() if value.strip()}
    return found


def _tablespace(access: postgres.Access, answer: postgres.Server, name: str, control: int) -> Facts:
    space = answer.tablespace(name)
    if space is None:
        raise TdeError("tablespace_absent", "does not exist", obj=f"tablespace {name}")
    inner = os.path.join(answer.data_directory, {"pg_global": "global"}.get(name, "base"))
    directory = os.path.realpath(space.location or inner)
    known: set[bytes] = set()
    for database in answer.databases:
        if database.connects and not database.template and space.location:
            with postgres.connect(access, database.name) as connection:
                known |= held_values(connection, space=space.oid)
                if database.tablespace == name:
                    known |= held_values(connection)
    facts = pages.read(_files(directory), known)
    facts.control, facts.may_be_empty = control, True
    return pages.told(name, directory, facts, [])


def prove_relation(access: postgres.Access, answer: postgres.Server, name: str, control: int) -> Facts:
    parts = name.split(".")
    if len(parts) != 3 or not all(parts):
        raise TdeError("invalid_option", "must be DATABASE.SCHEMA.NAME", obj=f"relation {name!r}")
    database, schema, relation = parts
    if answer.database(database) is None:
        raise TdeError("database_absent", "does not exist", obj=f"database {database}")
    with postgres.connect(access, database) as connection:
        paths, dummy = relation_paths(connection, schema, relation)
        row = connection.execute(
            "SELECT c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
            (schema, relation),
        ).fetchone()
        known = held_values(connection, oid=row[0]) if row else set()
    if not paths:
        raise TdeError("relation_absent", "does not exist, or holds nothing", obj=f"relation {name}")
    files = [file for path in paths for file in relation_files(os.path.realpath(os.path.join(answer.data_directory, path)))]
    facts = pages.read(files, known)
    facts.control = control
    return pages.told(name, os.path.dirname(files[0]), facts, [])
