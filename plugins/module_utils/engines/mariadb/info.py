# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All that can be told of a MariaDB server without a secret, ours or not: read only, and every failure is a fact."""

from __future__ import annotations

import os
import typing as t

from ...common.errors import TdeError
from ..telling import of_store, same_disk, tried
from . import conf, gaps, keyfile, logs, look, plan, sql

if t.TYPE_CHECKING:
    from .engine import MariaDb

Facts = t.Dict[str, t.Any]

#: Settings that are told, beside those of :data:`gaps.SETTINGS`.
_TOLD = (
    "innodb_encryption_threads", "innodb_default_encryption_key_id", "file_key_management_filename", "secure_file_priv", "log_bin",
    "general_log", "slow_query_log",
)  # fmt: skip


def collect(engine: MariaDb) -> Facts:
    """Everything; nothing is changed, nothing is needed but root."""
    problems: list[str] = []
    request, record, options = engine.request, engine.record, engine.options
    keys, found = of_store(engine, problems)
    names: list[keyfile.Name] = tried(problems, lambda: keyfile.names(key.key_id for key in keys), [])
    state: look.State | None = tried(problems, engine.state, None)
    answer = state.answer if state else None
    spaces = _spaces(state, names) if state and answer else []
    found |= {
        "coverage": "cluster" if record else None,
        "places": [],
        "server": _server(engine, state, names, problems),
        "data_directory": {"path": state.data_directory} if state and state.data_directory else None,
        "elsewhere": [],
        "tablespaces": spaces,
        "databases": _databases(answer, names) if answer else [],
    }
    if record and state and not state.mounted:
        problems.append(f"The keystore is closed: {options.key_directory} is not mounted, and the server would not start.")
    found["same_disk"] = same_disk(request.state.path, found)
    found["gaps"] = gaps.sentences(found)
    found["encrypted"] = gaps.covered(found)
    return found


def _spaces(state: look.State, names: t.Sequence[keyfile.Name]) -> list[Facts]:
    """Every InnoDB tablespace; whether its key is ours tells the key file that the server names."""
    answer = t.cast(sql.Server, state.answer)
    by_number = {name.number: name.key_id for name in names}
    ours = conf.PLUGIN in answer.plugins and state.keys is not None
    found = []
    for space in answer.spaces:
        if space.encrypted:
            kind = "ours" if ours and space.key in by_number else "unknown_key"
        else:
            kind = "plain" if space.share is None else "encrypting"
        found.append(
            {
                "name": space.name,
                "owner": None,
                "path": os.path.normpath(os.path.join(answer.data_directory, space.path)),
                "encryption": kind,
                "identifier": str(space.key) if kind != "plain" else None,
                "key_id": by_number.get(space.key) if kind == "ours" else None,
                "kernel_key": None,
                "mount": None,
                "problem": None if space.share is None else f"{space.share:.0%} of its pages are done",
            }
        )
    return found


def _databases(answer: sql.Server, names: t.Sequence[keyfile.Name]) -> list[Facts]:
    """Each database with the tablespaces that its tables are in."""
    found: dict[str, set[str]] = {name: set() for name in answer.databases}
    for table in plan.own(answer):
        if any(space.encrypted for space in answer.spaces_of(table)):
            found.setdefault(table.database, set()).add(plan.tablespace_of(table, answer, names))
    return [
        {"name": name, "tablespace": ", ".join(sorted(found[name])), "default_tablespace": keyfile.DEFAULT}
        for name in sorted(found)
    ]


def _server(engine: MariaDb, state: look.State | None, names: t.Sequence[keyfile.Name], problems: list[str]) -> Facts:
    answer = state.answer if state else None
    error = state.error if state else None
    told = (*gaps.SETTINGS, *_TOLD)
    reasons: list[str] = []
    if state and answer and engine.record:
        reasons = tried(problems, lambda: plan.restart_reasons(engine.options, state, names), [])
    return {
        "address": state.access.where if state else "?",
        "running": bool(state and (state.process or answer)),
        "pid": state.process.pid if state and state.process else None,
        "data_directory": (state.data_directory or None) if state else None,
        "answers": answer is not None,
        "problem": error.message if error else None,
        "error_code": error.code if error else None,
        "version": answer.version if answer else None,
        "replicas_attached": answer.replicas if answer else 0,
        "settings": {name: answer.variables[name] for name in told if name in answer.variables} if answer else {},
        "keystore_open": bool(state and state.keys),
        "restart_required": reasons,
        "former_key_file": _former(engine, state),
        "redo_log": _head(os.path.join(answer.data_directory, "ib_logfile0"), logs.redo_encrypted) if answer else None,
        "binary_logs": {path: _head(path, logs.binlog_encrypted) for path in answer.logs} if answer else {},
        "tables_of_other_engines": [
            table.words for table in answer.tables if table.engine != "InnoDB" and table.database not in sql.SYSTEM_DATABASES
        ]
        if answer
        else [],
    }


def _former(engine: MariaDb, state: look.State | None) -> Facts | None:
    """The key file from before ours."""
    taken = engine.options.former
    if taken is None:
        return None
    lying = state.former if state else None
    numbers = {name.number for key_id in taken.keys for name in [keyfile.parse_name(key_id)] if name}
    used = {space.key for space in state.answer.spaces if space.encrypted} if state and state.answer else numbers
    return {
        "path": taken.path,
        "there": lying is not None,
        "encrypted": bool(lying and lying.encrypted),
        "keys_in_use": sorted(numbers & used),
    }


def _head(path: str, judge: t.Callable[[bytes], bool | None]) -> str:
    """``encrypted``, ``plain`` or ``unknown``, by a file's own beginning."""
    try:
        return {True: "encrypted", False: "plain", None: "unknown"}[judge(logs.beginning(path))]
    except TdeError:
        return "unknown"
