# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is to be done, decided from plain facts: pure functions.

The order is what makes a kill harmless: a key is made at its provider, sealed on the disk where only memory had it, then
set, then verified; and whether it is there is asked before it is made. The record says first which key is meant, so
that any later run ends what one began.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..keyslots import Key, Slot, Wanted, demand_recovery, kek_label
from . import sql
from .keyfile import DATA_KEY
from .look import State
from .options import CIPHERS, FILE, GLOBAL, Options
from .sql import DEFAULT, OWN, SERVER, Facts, SetKey

#: What the record keeps: the labels of the keys that were ever meant, the last one meant now, each with its day (UTC).
LABELS = "labels"
#: What the record keeps, too: the options of the providers whose keys are in use, or are to be.
USING = "using"


@dataclasses.dataclass(frozen=True)
class Target:
    """A key that is to be set.

    :param whose: OWN, SERVER or DEFAULT. :param database: from which, or for which, it is set. :param scope: of its provider.
    """

    whose: str
    database: str
    scope: str
    name: str

    @property
    def obj(self) -> str:
        words = {SERVER: "server key", DEFAULT: "default key"}
        return words.get(self.whose, f"key of database {self.database}")


def labels(options: t.Mapping[str, t.Any]) -> list[tuple[str, str]]:
    """The labels of a record and their days, the one that is meant last."""
    return [(str(name), str(day)) for name, day in options.get(LABELS) or ()]


def with_label(before: t.Sequence[tuple[str, str]], label: str, today: str) -> list[list[str]]:
    """The record's labels with one meant from now on.

    :raises TdeError: ``tag_superseded``.
    """
    names = [name for name, dummy in before]
    if label in names[:-1]:
        raise TdeError(
            "tag_superseded", f"was replaced by {names[-1]}", obj=f"master key {label}", next_step="Rotate under a new tag."
        )
    found = [list(one) for one in before]
    return found if label in names else [*found, [label, today]]


def current(before: t.Sequence[tuple[str, str]], cluster: str) -> str:
    """The label that is meant now."""
    return before[-1][0] if before else kek_label(cluster)


def data_key(there: t.Iterable[Key], slots: t.Sequence[Wanted], *, no_recovery: bool) -> Plan:
    """The step that makes the data key under which the key file is sealed.

    :raises TdeError: ``recovery_keyslot_missing``, ``invalid_option``.
    """
    if any(key.key_id == DATA_KEY for key in there):
        return []
    demand_recovery(slots, no_recovery, f"data key {DATA_KEY}")
    data = {"key_id": DATA_KEY, "slots": [one.name for one in slots]}
    names = ", ".join(one.name for one in slots)
    return [Step("create_data_key", f"data key {DATA_KEY}", f"under keyslots {names}; seals the key file", data)]


def delivery(options: Options, state: State) -> Plan:
    """The steps that give the server what it must have in files."""
    plan: Plan = []
    if not state.mounted:
        data = {"path": options.key_directory}
        plan.append(Step("mount_key_directory", options.key_directory, "a file system in memory that is never swapped out", data))
    key_file = os.path.basename(options.key_file)
    if key_file in state.missing:
        plan.append(Step("write_key_file", options.key_file, "the keys, in memory only", {"path": options.key_file}))
    others = [name for name in state.missing if name != key_file]
    if others:
        plan.append(
            Step("give_files", options.key_directory, f"{', '.join(others)}, readable for the server, in memory only", {})
        )
    return plan


def seal(options: Options, state: State, why: str) -> Plan:
    """The step that brings what is in memory only to the disk."""
    return [Step("seal_keys", options.key_file, why, {})] if state.unsealed else []


def library(options: Options, facts: Facts) -> Plan:
    """The step that has the server load the extension's library.

    :raises TdeError: ``server_other_product``.
    """
    if not facts.available:
        raise TdeError(
            "server_other_product",
            f"has no extension {options.extension}",
            obj="the server",
            next_step="Install the package that has it; pg_tde needs Percona Server for PostgreSQL.",
        )
    configured = facts.configured if "shared_preload_libraries" in facts.configured else facts.running
    there = sql.preloaded(configured)
    if options.extension in (*there, *sql.preloaded(facts.running)):
        return []
    data = {"name": "shared_preload_libraries", "values": [*there, options.extension]}
    return [
        Step("alter_system", "parameter shared_preload_libraries", f"{options.extension} is loaded at the server's start", data)
    ]


def parameters(options: Options, facts: Facts) -> Plan:
    """The steps that bring the extension's parameters to the wish, encryption of the write-ahead log aside."""
    wished = {f"{options.extension}.cipher": options.cipher}
    if options.enforce_encryption is not None:
        wished[f"{options.extension}.enforce_encryption"] = "on" if options.enforce_encryption else "off"
    return [step for name, value in wished.items() if name in facts.running for step in _parameter(facts, name, value)]


def _parameter(facts: Facts, name: str, value: str) -> Plan:
    if facts.configured.get(name, facts.running.get(name)) == value:
        return []
    return [
        Step(
            "alter_system",
            f"parameter {name}",
            f"is {facts.running.get(name)}, wished {value}",
            {"name": name, "values": [value]},
        )
    ]


def wal(options: Options, facts: Facts) -> Plan:
    """The step that has the write-ahead log encrypted; only once the server has a key for it."""
    name = f"{options.extension}.wal_encrypt"
    return _parameter(facts, name, "on" if options.wal_encrypt else "off") if name in facts.running else []


def restart_reasons(options: Options, facts: Facts) -> list[str]:
    """Why a running server must be restarted, in sentences."""
    if options.extension not in sql.preloaded(facts.running):
        return [f"It has not loaded {options.extension}."]
    name = f"{options.extension}.wal_encrypt"
    value = "on" if options.wal_encrypt else "off"
    if facts.running.get(name) != value and facts.configured.get(name) == value:
        return [f"Parameter {name} is {facts.running.get(name)}, wished {value}."]
    return []


def extensions(options: Options, facts: Facts, more: t.Iterable[str] = ()) -> Plan:
    """The steps that create the extension in its databases.

    :param more: further databases.
    :raises TdeError: ``database_absent``.
    """
    plan: Plan = []
    for name in dict.fromkeys((*options.databases, *more)):
        if name not in facts.databases:
            raise TdeError("database_absent", "does not exist, or takes no connections", obj=f"database {name}")
        if facts.databases[name].schema is None:
            obj = f"extension {options.extension} in database {name}"
            plan.append(Step("create_extension", obj, "it is not there", {"database": name}))
    return plan


def providers(options: Options, facts: Facts, wished: t.Mapping[str, str]) -> Plan:
    """The steps that bring the providers to the wish; those of before stay, for backups need them.

    :param wished: the provider's options.
    :raises TdeError: ``invalid_option``.
    """
    plan: Plan = []
    if options.scope == GLOBAL or options.wal_encrypt or facts.server_key.name:
        plan += _provider(options, facts.providers, wished, GLOBAL, options.databases[0])
    if options.scope != GLOBAL:
        for name in options.databases:
            plan += _provider(options, facts.databases[name].providers, wished, options.scope, name)
    return plan


def _provider(options: Options, there: t.Iterable[sql.Provider], wished: t.Mapping[str, str], scope: str, database: str) -> Plan:
    name = options.provider_name
    obj = f"provider {name}" if scope == GLOBAL else f"provider {name} of database {database}"
    data = {"scope": scope, "database": database, "options": dict(wished)}
    found = next((one for one in there if one.name == name), None)
    if found is None:
        return [Step("add_provider", obj, f"of type {options.provider}", data)]
    if found.type != options.provider:
        raise TdeError(
            "invalid_option",
            f"is of type {found.type}",
            obj=obj,
            next_step="Give the new one another provider_name; keys move to it.",
        )
    changed = sorted(one for one in {*wished, *found.options} if wished.get(one) != found.options.get(one))
    if not changed:
        return []
    return [Step("change_provider", obj, f"another {', '.join(changed)}; it must have the keys that are in use", data)]


def targets(options: Options, facts: Facts, label: str, known: t.Container[str]) -> list[Target]:
    """The keys that are not as they are meant.

    :param label: the label meant; :param known: every label that was ever meant. A database whose own key is of none of
        them was given it by somebody else, and keeps it.
    :raises TdeError: ``key_unreachable``: the server cannot get a key that is set.
    """
    first = options.databases[0]
    found = []
    if options.scope == GLOBAL:
        found.append((Target(DEFAULT, first, GLOBAL, label), facts.default_key))
    if options.wal_encrypt or facts.server_key.name or facts.server_key.problem:
        found.append((Target(SERVER, first, GLOBAL, label), facts.server_key))
    for name, database in facts.databases.items():
        own = database.key
        if options.scope != GLOBAL and name in options.databases:
            found.append((Target(OWN, name, options.scope, f"{label}@{name}"), own))
        elif own.problem or (own.name in known and facts.default_key.name is not None):
            # It took the default key for its own, and an interrupted change of that left it behind.
            found.append((Target(OWN, name, GLOBAL, label), own))
    return [target for target, key in found if not _is(target, key, options)]


def _is(target: Target, key: SetKey, options: Options) -> bool:
    if key.problem:
        raise TdeError(
            "key_unreachable",
            f"the server cannot have it: {key.problem}",
            obj=target.obj,
            kept="Nothing was made in its place.",
            next_step="Bring its provider up, or open the keystore (hsm-tde open), then run again.",
        )
    return (
        key.name == target.name
        and key.provider == options.provider_name
        and ((key.provider_id or 0) < 0) == (target.scope == GLOBAL)
    )


def not_during_backup(facts: Facts, wished: t.Sequence[Target]) -> None:
    """Refuse to change keys while a base backup runs: it would have keys and data of two times.

    :raises TdeError: ``backup_running``.
    """
    if wished and facts.backups:
        raise TdeError(
            "backup_running",
            f"a base backup is taken by {', '.join(facts.backups)}",
            obj=wished[0].obj,
            kept="No key was changed.",
            next_step="Wait for its end, then run again.",
        )


def keys(options: Options, wished: t.Sequence[Target], there: t.Mapping[str, bool]) -> Plan:
    """The steps that make and set keys.

    :param there: the names that were looked for, and whether the provider has them.
    """
    plan: Plan = []
    for name in dict.fromkeys(target.name for target in wished):
        target = next(one for one in wished if one.name == name)
        if not there[name]:
            data = {"name": name, "scope": target.scope, "database": target.database}
            plan.append(Step("create_key", f"key {name} at provider {options.provider_name}", f"for the {target.obj}", data))
            if options.provider == FILE:
                plan.append(Step("seal_keys", options.key_file, f"key {name} is in memory only", {}))
    # The server key last: with it the write-ahead log changes.
    order = {DEFAULT: 0, OWN: 1, SERVER: 2}
    for target in sorted(wished, key=lambda one: order[one.whose]):
        data = {"whose": target.whose, "database": target.database, "scope": target.scope, "name": target.name}
        plan.append(Step("set_key", target.obj, f"to {target.name} of provider {options.provider_name}", data))
    return plan


def cipher_of(options: Options) -> str:
    """The cipher as tablespaces name it."""
    return CIPHERS[options.cipher]


def under_passphrase(slots: t.Iterable[Slot]) -> bool:
    """Whether one of some keyslots has no master key that could rotate."""
    return any(slot.protection == "passphrase" for slot in slots)
