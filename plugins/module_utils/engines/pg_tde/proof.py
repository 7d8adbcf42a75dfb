# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a proof finds in the files of encrypted tables: the server's word is not taken."""

from __future__ import annotations

import os
import typing as t

from ...common.errors import TdeError
from ...storage import pages
from ...storage.proof import relation_files
from ..base import ProofWish
from ..fep.proof import held_values, plain_control, prove_relation
from ..postgresql import sql as postgres
from ..postgresql.targets import relation_paths
from . import sql

if t.TYPE_CHECKING:
    from .engine import PgTde

Facts = t.Dict[str, t.Any]


def proofs(engine: PgTde, wish: ProofWish) -> list[Facts]:
    """The proofs of a wish; the server brings its memory to the disk first.

    :raises TdeError: ``server_down`` and its kind, ``tablespace_absent``, ``relation_absent``, ``database_absent``, ``invalid_option``.
    """
    state = engine.state()
    answer, facts = state.server.answer, state.facts
    if answer is None or facts is None:
        raise state.error or TdeError("server_down", "does not answer", obj="PostgreSQL")
    access = state.server.access
    with postgres.connect(access) as connection:
        postgres.checkpoint(connection)
    plain = plain_control(access, answer)
    found = []
    if wish.data_directory:
        base = os.path.join(answer.data_directory, "base")
        judged = pages.read(
            sorted(os.path.join(folder, one) for folder, dummy, names in os.walk(base) for one in names if one[:1].isdigit())
        )
        judged.control = plain
        notes = [
            "The databases' files were judged, catalogs included, which pg_tde leaves in the clear; not the write-ahead log."
        ]
        found.append(pages.told("data directory", answer.data_directory, judged, notes))
    for name in wish.tablespaces:
        if name != sql.TDE_HEAP:
            raise TdeError("tablespace_absent", f"is not {sql.TDE_HEAP}, the only one of this engine", obj=f"tablespace {name}")
        found.append(_encrypted(access, answer, facts, plain))
    found += [prove_relation(access, answer, name, plain) for name in wish.relations]
    return found


def _encrypted(access: postgres.Access, answer: postgres.Server, facts: sql.Facts, plain: int) -> Facts:
    """Every table under the access method, with its indexes and its TOAST."""
    files: list[str] = []
    known: set[bytes] = set()
    for database in facts.databases.values():
        encrypted = [one for one in database.tables if one.encrypted]
        if not encrypted:
            continue
        with postgres.connect(access, database.name) as connection:
            for one in encrypted:
                paths, dummy = relation_paths(connection, one.schema, one.name)
                for path in paths:
                    files += relation_files(os.path.realpath(os.path.join(answer.data_directory, path)))
                row = connection.execute("SELECT to_regclass(%s)::oid::bigint", (f'"{one.schema}"."{one.name}"',)).fetchone()
                if row and row[0]:
                    known |= held_values(connection, oid=row[0])
    judged = pages.read(sorted(set(files)), known)
    judged.control, judged.may_be_empty = plain, True
    return pages.told(sql.TDE_HEAP, answer.data_directory, judged, [])
