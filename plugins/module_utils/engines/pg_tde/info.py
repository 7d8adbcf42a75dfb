# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All that can be told of a server with pg_tde without a secret, ours or not: read only, and every failure is a fact."""

from __future__ import annotations

import typing as t

from ..postgresql.info import server_facts
from ..telling import ALWAYS, host_gaps, keyslot_gaps, of_store, same_disk, tried
from . import look, plan, sql
from .engine import every_key
from .options import FILE

if t.TYPE_CHECKING:
    from .engine import PgTde

Facts = t.Dict[str, t.Any]

#: What pg_tde does not encrypt (its manual, "Limitations", and seen on a real one).
LIMITS = (
    "Catalogs and statistics (pg_statistic keeps values of encrypted tables after ANALYZE), temporary files and the server's log are in the clear.",
    "pg_tde does not verify a KMIP server's certificate: whoever can take its place gets the keys that are asked of it.",
)


def collect(engine: PgTde) -> Facts:
    """Everything; nothing is changed, nothing is needed but root."""
    problems: list[str] = []
    request, record, options = engine.request, engine.record, engine.options
    dummy, found = of_store(engine, problems)
    state: look.State | None = tried(problems, engine.state, None)
    facts = state.facts if state else None
    found |= {
        "coverage": options.scope if record else None,
        "places": [],
        "server": _server(engine, state),
        "data_directory": {"path": state.server.data_directory} if state and state.server.data_directory else None,
        "elsewhere": [],
        "tablespaces": _tablespaces(state, facts),
        "databases": _databases(facts),
    }
    if record and state and (not state.mounted or state.missing):
        problems.append(f"The keystore is closed: {options.key_directory} lacks what the server needs at its start.")
    if state and state.unsealed and engine.uses_store:
        problems.append("The server made keys that are in memory only: run tde_keystore with state=present, which seals them.")
    found["same_disk"] = same_disk(request.state.path, found)
    found["encrypted"] = bool(facts and _covered(found, facts, options.extension))
    found["gaps"] = [*problems, *_gaps(found, facts, engine), *keyslot_gaps(found), *host_gaps(found), *ALWAYS]
    return found


def _server(engine: PgTde, state: look.State | None) -> Facts:
    if state is None:
        return {
            **{
                name: None
                for name in ("pid", "data_directory", "problem", "error_code", "version", "standby", "standbys_attached")
            },
            **{
                "address": "?",
                "running": False,
                "answers": False,
                "settings": {},
                "restart_required": [],
                "keys": {},
                "key_providers": [],
            },
        }
    told = server_facts(state.server)
    facts = state.facts
    if facts:
        told["settings"] = {**told["settings"], **facts.running}
    told["restart_required"] = plan.restart_reasons(engine.options, facts) if facts and engine.record else []
    told["keys"] = (
        {
            plan.Target(whose, name, "", "").obj: key.problem or f"{key.name} of provider {key.provider}"
            for whose, name, key in every_key(facts)
            if key.name or key.problem
        }
        if facts
        else {}
    )
    told["key_providers"] = [f"{one.name} ({one.type})" for one in facts.providers] if facts else []
    return told


def _tablespaces(state: look.State | None, facts: sql.Facts | None) -> list[Facts]:
    """The two places that tables are in: under the access method, and not."""
    if state is None or facts is None:
        return []
    found = []
    for name, encrypted in ((sql.TDE_HEAP, True), ("heap", False)):
        if any(one.encrypted == encrypted for database in facts.databases.values() for one in database.tables):
            found.append(
                {
                    "name": name,
                    "owner": None,
                    "path": state.server.data_directory,
                    "encryption": "engine" if encrypted else "plain",
                    "identifier": None,
                    "key_id": None,
                    "kernel_key": None,
                    "mount": None,
                    "problem": None,
                }
            )
    return found


def _databases(facts: sql.Facts | None) -> list[Facts]:
    found = []
    for one in facts.databases.values() if facts else ():
        methods = sorted({sql.TDE_HEAP if table.encrypted else "heap" for table in one.tables})
        found.append({"name": one.name, "tablespace": ", ".join(methods), "default_tablespace": one.default_method or "heap"})
    return found


def _covered(found: Facts, facts: sql.Facts, extension: str) -> bool:
    """Whether no table of users, no large object and no write-ahead log is in the clear, by the server's word."""
    tables = [table for database in facts.databases.values() for table in database.tables]
    if any(database.large_objects for database in facts.databases.values()):
        return False
    return bool(tables) and all(table.encrypted for table in tables) and facts.running.get(f"{extension}.wal_encrypt") == "on"


def _gaps(found: Facts, facts: sql.Facts | None, engine: PgTde) -> t.Iterator[str]:
    if not found["managed"]:
        yield "This host has no record of the cluster: nothing here is encrypted by this collection."
    server = found["server"]
    if facts is None:
        yield f"The server at {server['address']} {server['problem'] or 'was not asked'}, so its tables are not known."
        return
    if server["restart_required"]:
        yield f"The server must be restarted. {' '.join(server['restart_required'])}"
    plain = [
        f"{database.name}.{table.label}"
        for database in facts.databases.values()
        for table in database.tables
        if not table.encrypted
    ]
    if plain:
        more = f" and {len(plain) - 3} more" if len(plain) > 3 else ""
        yield f"{len(plain)} tables are in the clear: {', '.join(plain[:3])}{more}."
    objects = [name for name, database in facts.databases.items() if database.large_objects]
    if objects:
        yield f"Large objects are in a system catalog, which pg_tde leaves in the clear: those of {', '.join(objects)}."
    if facts.running.get(f"{engine.options.extension}.wal_encrypt") != "on":
        yield "The write-ahead log is in the clear, with every change of the encrypted tables in it, and so is its archive."
    for whose, name, key in every_key(facts):
        if key.problem:
            yield f"The server cannot have the {plan.Target(whose, name, '', '').obj}: {key.problem}."
        elif key.name and whose == sql.OWN and key.provider != engine.options.provider_name:
            yield f"Database {name} is under key {key.name} of provider {key.provider}, which this collection does not guard."
    if server["standbys_attached"]:
        yield f"{server['standbys_attached']} standbys are attached: each must reach the providers under the same paths, with every new key before it is set."
    if found["managed"] and engine.options.provider == FILE:
        yield "Who has the server's rights on this host can read the key file in memory; only a provider off the host tells who asked for a key."
    yield from LIMITS
