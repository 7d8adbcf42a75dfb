# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is to be done, decided from plain facts: pure functions.

The order is what makes a kill harmless: a key is wrapped and proved in the store, then it comes into the key file, then the
include file may name it, then the server is restarted, then a table is built anew under it.
"""

from __future__ import annotations

import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..base import MoveWish, TablespaceWish
from ..keyslots import Key, Wanted, demand_recovery
from . import conf, former, keyfile, sql
from .keyfile import DEFAULT, FIRST, Name
from .look import State
from .options import Options

#: Storage engines whose tables InnoDB's keys do not reach.
_INNODB = "InnoDB"
#: A mark in the cluster's record: the tag's data keys have higher numbers than all before.
MARK = "reencryption"


def data_keys(
    wished: t.Iterable[Name], there: t.Iterable[Key], slots: t.Sequence[Wanted], *, no_recovery: bool, why: str
) -> Plan:
    """The steps that make data keys which the store lacks.

    :raises TdeError: ``recovery_keyslot_missing``, ``invalid_option``.
    """
    known = {key.key_id for key in there}
    missing = [name for name in wished if name.key_id not in known]
    plan: Plan = []
    for name in missing:
        demand_recovery(slots, no_recovery, f"data key {name.key_id}")
        data = {"key_id": name.key_id, "slots": [one.name for one in slots]}
        plan.append(Step("create_data_key", f"data key {name.key_id}", why, data))
    return plan


def include_wish(options: Options, keys: t.Iterable[Name]) -> conf.Wish:
    """What the server is to do, with the keys that the store has."""
    default = keyfile.current(keys).get(DEFAULT, max(FIRST))
    return conf.Wish(
        options.key_file,
        "force" if options.refuse_plain_tables else "on",
        options.encryption_threads,
        default,
        options.algorithm,
        options.former is not None,
    )


def mount(options: Options, state: State) -> Plan:
    """The step that makes the key directory a place in memory."""
    if state.mounted:
        return []
    data = {"path": options.key_directory}
    return [Step("mount_key_directory", options.key_directory, "a file system in memory that is never swapped out", data)]


def check_memory(cluster: str, state: State, keys: t.Sequence[Key]) -> None:
    """Refuse to replace, or take away, keys in memory that the store does not have: they are the only copy.

    One that differs from the store's where others are its own is a damaged line, which is put right.

    :raises TdeError: ``keystore_unreachable``.
    """
    there = state.keys.checks if state.keys else {}
    stored = {name.number: key.check_value for key in keys if (name := keyfile.parse_name(key.key_id))}
    missing = sorted({*there} - {*stored} if {*there.items()} & {*stored.items()} else there)
    if missing:
        raise TdeError(
            "keystore_unreachable",
            f"lacks key {', '.join(map(str, missing))}, which the server was given: it is in memory only",
            obj=f"store of cluster {cluster}",
            kept="The keys in memory stay as they are.",
            next_step="Mount the state directory's file system, or restore it from a backup; until then neither stop the host nor close the keystore.",
        )


def delivery(options: Options, cluster: str, state: State, keys: t.Sequence[Key], coming: t.Sequence[Name] = ()) -> Plan:
    """The steps that give the server its keys and settings, the key directory being mounted.

    :param coming: data keys that the steps before make.
    :raises TdeError: ``keystore_unreachable``; ``server_down``, ``encryption_foreign``, ``file_foreign``, ``engine_unsupported``:
        before the server's settings are ours it must say that nobody else encrypts it.
    """
    plan: Plan = []
    check_memory(cluster, state, keys)
    names = keyfile.names([*(key.key_id for key in keys), *(name.key_id for name in coming)])
    wished = {name.number: key.check_value for key in keys for name in [keyfile.parse_name(key.key_id)] if name}
    if options.former and former.works_with(state.answer) == options.former.path:
        former.check_taken(options.former, state.former, {key.key_id for key in keys})
    if coming or state.keys is None or state.keys.checks != wished:
        numbers = ", ".join(str(name.number) for name in names)
        plan.append(Step("write_key_file", options.key_file, f"keys {numbers}, in memory only", {"path": options.key_file}))
    text = conf.render(cluster, include_wish(options, names))
    if state.include != text:
        check_first(options, cluster, state)
        path = f"{options.include_directory}/{conf.NAME}"
        why = "the server reads it when it starts"
        plan.append(Step("write_include", path, why, {"path": path, "text": text.decode()}))
    if state.answer and state.answer.plugins.get(conf.PLUGIN):
        wish = include_wish(options, names)
        for name, value in conf.differences(wish.dynamic, state.answer.variables).items():
            if name != "innodb_default_encryption_key_id" or state.has_loaded(int(value)):
                obj = f"variable {name}"
                plan.append(
                    Step(
                        "set_variable",
                        obj,
                        f"is {state.answer.variables.get(name)}, wished {value}",
                        {"name": name, "value": value},
                    )
                )
    return plan


def check_first(options: Options, cluster: str, state: State) -> None:
    """Before the server's settings become ours."""
    owner = conf.owner(state.include) if state.include is not None else cluster
    if owner != cluster:
        raise TdeError(
            "file_foreign",
            f"is the file of cluster {owner}" if owner else "was not written by this collection",
            obj=f"{options.include_directory}/{conf.NAME}",
            next_step="Name another include_directory for this server.",
        )
    if state.include is not None:
        return
    if state.answer is None:
        if state.error is not None:
            raise state.error
        raise TdeError("server_down", "was not asked", obj="MariaDB")
    check_ours(options, state.answer)


def check_ours(options: Options, answer: sql.Server) -> None:
    """Refuse a server that somebody else's keys encrypt already: with ours in their place its tables would not open.

    :raises TdeError: ``encryption_foreign``, ``engine_unsupported``.
    """
    others = [name for name in answer.plugins if name != conf.PLUGIN]
    file = former.works_with(answer)
    if others or file not in (None, options.key_file, options.former.path if options.former else None):
        way = "Have its keys taken into the store (former_key_file=take), or take" if not others else "Take"
        raise TdeError(
            "encryption_foreign",
            f"encrypts with {others[0] if others else f'the key file {file}'}",
            obj="the server",
            next_step=f"{way} its encryption back first (innodb_encrypt_tables=OFF, and wait until every table is plain), or leave it to its keys.",
        )
    if answer.variables.get("wsrep_on", "OFF").upper() == "ON":
        raise TdeError(
            "engine_unsupported",
            "Galera copies tables between nodes in ways that this engine does not guard.",
            obj="engine mariadb",
        )


def removal(options: Options, state: State) -> Plan:
    """The step that removes the former key file, once the server works with ours.

    :raises TdeError: ``file_foreign``: it is not what was taken.
    """
    if options.former is None or state.former is None or former.works_with(state.answer) != options.key_file:
        return []
    if state.former.check != options.former.check:
        raise TdeError(
            "file_foreign",
            state.former.problem or "was changed since its keys were taken",
            obj=options.former.path,
            kept="It was not removed.",
            next_step="Find out what it is, and remove it yourself.",
        )
    data = {"path": options.former.path, "keys": list(options.former.keys)}
    return [Step("remove_former_key_file", options.former.path, "asked for; its keys are in the store", data)]


def restart_reasons(options: Options, state: State, names: t.Sequence[Name]) -> list[str]:
    """Why a running server must be restarted, in sentences.

    :raises TdeError: ``setting_ineffective``.
    """
    answer = state.answer
    if answer is None or state.include is None or conf.owner(state.include) is None:
        return []
    found = []
    wrong = sorted(conf.differences(include_wish(options, names).at_start, answer.variables))
    if answer.plugins.get(conf.PLUGIN) != "FORCE_PLUS_PERMANENT":
        found.append(f"It has not loaded {conf.PLUGIN}.")
    elif wrong:
        found.append(f"It has other values of {', '.join(wrong)}.")
    if found and state.process and state.process_age + 2 < state.include_age:
        raise TdeError(
            "setting_ineffective",
            f"was started after {options.include_directory}/{conf.NAME} was written. {found[0]}",
            obj="the server",
            next_step="See that it reads that directory (my_print_defaults --mysqld), and that its command line says nothing else.",
        )
    missing = [number for number in keyfile.current(names).values() if not state.has_loaded(number)]
    if not found and missing:
        found.append(f"It has not read key {', '.join(map(str, sorted(missing)))}.")
    return found


# --- tables


def own(answer: sql.Server) -> list[sql.Table]:
    """The tables of users that have a tablespace of their own."""
    return [one for one in answer.tables if one.engine == _INNODB and one.database not in sql.SYSTEM_DATABASES]


def tablespace_of(table: sql.Table, answer: sql.Server, names: t.Sequence[Name]) -> str:
    """The tablespace whose key a table is under: the default one, if it is plain or under the server's own key.

    A table between two keys belongs to the one named, so that an interrupted change ends where it began to go.
    """
    by_number = {name.number: name.tablespace for name in names}
    found = {by_number.get(space.key, DEFAULT) for space in answer.spaces_of(table)} - {
        keyfile.SYSTEM,
        keyfile.TEMPORARY,
        DEFAULT,
    }
    return min(found, default=DEFAULT)


def wishes(items: t.Sequence[TablespaceWish], answer: sql.Server, names: t.Sequence[Name]) -> dict[sql.Table, str]:
    """The tablespace of each table that is named by itself or by its database; the closest name counts.

    :raises TdeError: ``relation_absent``, ``database_absent``, ``engine_unsupported``, ``invalid_option``.
    """
    tables = {table.words: table for table in answer.tables if table.database not in sql.SYSTEM_DATABASES}
    found: dict[sql.Table, str] = {}
    for item in items:
        for database in databases(item.move):
            if database in sql.SYSTEM_DATABASES:
                raise TdeError("invalid_option", "belongs to the server; its tables stay under key 1", obj=f"database {database}")
            if database not in answer.databases:
                raise TdeError("database_absent", "does not exist", obj=f"database {database}")
            for table in own(answer):
                if table.database == database and tablespace_of(table, answer, names) in (item.name, DEFAULT):
                    found[table] = item.name
    for item in items:
        for name in item.move.tables:
            if "." not in name:
                raise TdeError("invalid_option", "must be DATABASE.TABLE", obj=f"table {name!r}")
            if name not in tables:
                raise TdeError(
                    "relation_absent", "does not exist", obj=f"table {name}", next_step="Correct its name (DATABASE.TABLE)."
                )
            if tables[name].engine != _INNODB:
                raise TdeError(
                    "engine_unsupported",
                    f"Tables of {tables[name].engine} have no key of their own: change it to InnoDB first.",
                    obj=f"table {name}",
                )
            found[tables[name]] = item.name
    return found


def databases(move: MoveWish) -> tuple[str, ...]:
    """Databases of a wish; a schema is a database here."""
    return tuple(dict.fromkeys((*move.schemas, *move.databases)))


def left_out(move_databases: t.Container[str], answer: sql.Server) -> list[sql.Table]:
    """Tables of databases wished for that this engine cannot encrypt."""
    return [one for one in answer.tables if one.database in move_databases and one.engine != _INNODB]


def tables(wished: t.Mapping[sql.Table, str], answer: sql.Server, keys: t.Mapping[str, int]) -> Plan:
    """The steps that put tables under the current keys of their tablespaces.

    :param keys: the number of each tablespace's current key.
    """
    plan: Plan = []
    for table, tablespace in sorted(wished.items(), key=lambda one: (one[0].database, one[0].name)):
        key = keys[tablespace]
        spaces = answer.spaces_of(table)
        if spaces and all(space.encrypted and space.key == key for space in spaces):
            continue
        before = sorted({str(space.key) if space.encrypted else "plain" for space in spaces})
        why = f"from {'key ' if before != ['plain'] else ''}{' and '.join(before) or 'the system tablespace'} to key {key} of tablespace {tablespace}"
        data = {"database": table.database, "table": table.name, "file": table.file, "size": table.size, "key": key,
                "tablespace": tablespace, "from": ", ".join(before)}  # fmt: skip
        plan.append(Step("encrypt_table", f"table {table.words}", why, data))
    return plan


def new_generation(names: t.Sequence[Name], above: int) -> list[Name]:
    """The data keys that a re-encryption makes: one for each tablespace whose current key is from before.

    The server's own two cannot be replaced: redo log, binary log and system tablespace know key 1 alone.
    """
    following = max((name.number for name in names), default=0) + 1
    old = [tablespace for tablespace, number in keyfile.current(names).items() if number <= above]
    rotated = sorted(tablespace for tablespace in old if tablespace not in (keyfile.SYSTEM, keyfile.TEMPORARY))
    return [Name(following + number, tablespace) for number, tablespace in enumerate(rotated)]
