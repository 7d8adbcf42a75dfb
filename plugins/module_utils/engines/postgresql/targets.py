# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The places and files that a proof looks at."""

from __future__ import annotations

import os
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...keystore.store import KeyStore
from ...storage.proof import ProofTarget, relation_files
from ..base import ProofWish
from ..keyfacts import read_keys
from . import look, sql
from .plan import CLUSTER_KEY, tablespace_key

if t.TYPE_CHECKING:
    import psycopg

    from .engine import Postgresql

#: A relation's own files, its indexes and its TOAST with that one's index: their first segments under the data directory.
_FILES = """
WITH RECURSIVE parts(oid) AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
    UNION SELECT i.inhrelid FROM parts p JOIN pg_inherits i ON i.inhparent = p.oid
), members(oid) AS (
    SELECT oid FROM parts
    UNION SELECT c.reltoastrelid FROM parts p JOIN pg_class c ON c.oid = p.oid WHERE c.reltoastrelid <> 0
)
SELECT pg_relation_filepath(m.oid) FROM (
    SELECT oid FROM members UNION SELECT i.indexrelid FROM members m JOIN pg_index i ON i.indrelid = m.oid) m
 WHERE pg_relation_filepath(m.oid) IS NOT NULL ORDER BY 1
"""


def proof_targets(engine: Postgresql, wish: ProofWish) -> list[ProofTarget]:
    """The places of a wish; a server that answers brings its memory to the disk first.

    :raises TdeError: ``tablespace_absent``, ``relation_absent``, ``database_absent``, ``invalid_option``,
        ``server_foreign``, ``server_not_local``.
    """
    identifiers = {key.key_id: key.check_value for key in read_keys(KeyStore(engine.request.state, engine.request.cluster))}
    server = look.server(engine.request.connection, engine.options)
    notes: list[str] = []
    if server.misplaced:
        raise established(server.error, "the error")
    if server.answer is None:
        said = server.error.message if server.error else ""
        notes.append(f"The server {said}, so there was no CHECKPOINT: what it had in memory only was not looked at.")
    else:
        with sql.connect(server.access) as connection:
            sql.checkpoint(connection)
    targets = []
    if wish.data_directory:
        if not server.data_directory:
            raise TdeError("invalid_option", "is not known while the server is down", obj="option data_directory")
        directory = os.path.realpath(server.data_directory)
        links = (os.path.join(directory, "pg_tblspc"),)
        targets.append(ProofTarget("data directory", directory, identifiers.get(CLUSTER_KEY), notes=tuple(notes), links=links))
    for name in wish.tablespaces:
        targets.append(_tablespace(engine, server, name, identifiers, tuple(notes)))
    for name in wish.relations:
        targets.append(_relation(server, name, identifiers))
    return targets


def _tablespace(
    engine: Postgresql, server: look.Server, name: str, identifiers: t.Mapping[str, str], notes: tuple[str, ...]
) -> ProofTarget:
    identifier = identifiers.get(tablespace_key(name))
    if server.answer is not None:
        found = server.answer.tablespace(name)
        if found is None:
            raise TdeError("tablespace_absent", "does not exist", obj=f"tablespace {name}")
        if found.location:
            return ProofTarget(name, os.path.realpath(found.location), identifier, notes=notes)
        inner = os.path.join(server.answer.data_directory, {"pg_global": "global"}.get(name, "base"))
        return ProofTarget(name, os.path.realpath(inner), identifiers.get(CLUSTER_KEY), notes=notes)
    recorded = engine.record.place(tablespace_key(name)) if engine.record else None
    if recorded is None:
        raise TdeError("tablespace_absent", "has no record, and the server does not answer", obj=f"tablespace {name}")
    return ProofTarget(name, recorded.path, identifier, notes=notes)


def _relation(server: look.Server, name: str, identifiers: t.Mapping[str, str]) -> ProofTarget:
    parts = name.split(".")
    if len(parts) != 3 or not all(parts):
        raise TdeError("invalid_option", "must be DATABASE.SCHEMA.NAME", obj=f"relation {name!r}")
    if server.answer is None:
        raise established(server.error, "the error")
    database, schema, relation = parts
    if server.answer.database(database) is None:
        raise TdeError("database_absent", "does not exist", obj=f"database {database}")
    with sql.connect(server.access, database) as connection:
        paths, tablespace = relation_paths(connection, schema, relation)
    if not paths:
        raise TdeError("relation_absent", "does not exist, or holds nothing", obj=f"relation {name}")
    files: list[str] = []
    for path in paths:
        files += relation_files(os.path.realpath(os.path.join(server.answer.data_directory, path)))
    identifier = identifiers.get(tablespace_key(tablespace)) or identifiers.get(CLUSTER_KEY)
    return ProofTarget(name, os.path.dirname(files[0]), identifier, files=tuple(files))


def relation_paths(connection: psycopg.Connection[t.Any], schema: str, relation: str) -> tuple[list[str], str]:
    """First segments' paths, and the tablespace in effect."""
    paths = [row[0] for row in connection.execute(_FILES, (schema, relation)).fetchall()]
    row = connection.execute(
        "SELECT coalesce(s.spcname, (SELECT t.spcname FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace"
        " WHERE d.datname = current_database()))"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace"
        " WHERE n.nspname = %s AND c.relname = %s",
        (schema, relation),
    ).fetchone()
    return paths, row[0] if row else ""
