# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine mariadb: the server encrypts its files, with keys of our store that it reads from memory when it starts."""

from __future__ import annotations

import copy
import dataclasses
import os
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ...keystore.format import check_value
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyring import Keyring
from ..postgresql.public import key_facts
from . import keyfile, look, plan
from .act import Acts
from .options import Options, complete

if t.TYPE_CHECKING:
    pass

#: Times that a plan is made and carried out before the run gives up: a table is created while its database is encrypted.
_ROUNDS = 6

Facts = t.Dict[str, t.Any]
Decide = t.Callable[[], t.Tuple[plan.Decision, Facts]]


class MariaDb(Engine):
    """See the module."""

    name = "mariadb"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        connection = request.connection
        self.options: Options = complete(
            request.cluster,
            request.options,
            self.record.options if self.record else {},
            socket=connection.unix_socket,
            user=connection.user,
        )

    # --- what all services share

    def keyring(self, wishes: t.Sequence[SlotWish], check: bool) -> Keyring:
        """The cluster's data keys, looked at."""
        ring = Keyring(self.request, wishes, length=keyfile.KEY_BYTES, check=check_value, dry=check)
        ring.look()
        return ring

    def state(self, *, ask: bool = True) -> look.State:
        """The server and what it is given.

        :raises TdeError: ``server_foreign``: another server answers than the one whose files lie here.
        """
        state = look.look(self.request.connection, self.options, ask=ask)
        if state.answer is None:
            return state
        said = state.answer.data_directory
        if os.path.realpath(said) != os.path.realpath(state.data_directory):
            raise TdeError(
                "server_foreign", f"works on {said}, not on {state.data_directory}", obj=f"MariaDB at {state.access.where}"
            )
        if state.process is None:
            raise TdeError("server_not_local", f"no server on this host works on {said}", obj=f"MariaDB at {state.access.where}")
        return state

    def record_step(self, record: records.Record, why: str) -> Plan:
        """The step that writes the record, if it says something new."""
        if record == self.record:
            return []
        path = self.request.state.cluster_record(record.cluster)
        return [Step("write_record", path, why, {"record": record.public()})]

    def facts(self, ring: Keyring, state: look.State | None) -> Facts:
        """A cluster's public facts."""
        shown: Facts = {
            "data_keys": {key.key_id: key_facts(key) for key in ring.keys},
            "master_keys": [f"{kek.label} {kek.token.where}" for kek in ring.keks],
            "record": self.record.public() if self.record else None,
        }
        if state:
            shown["key_directory"] = "mounted" if state.mounted else "absent"
            shown["keys_in_memory"] = sorted(state.keys.checks) if state.keys else []
            shown["include"] = state.include.decode("utf-8", "replace") if state.include is not None else None
        return shown

    def rounds(self, decide: Decide, ring: Keyring, acts: Acts, *, check: bool, first: t.Container[str] = ()) -> Outcome:
        """Look, decide and act until there is nothing left that can be done.

        :param decide: looks, and gives what is to be done and the public facts; raises before anything is done.
        :param first: actions after which the next look comes before all others.
        :raises TdeError: ``unfinished``.
        """
        decision, before = decide()
        if check:
            steps = [*decision.now, *decision.later]
            return _told(Outcome(steps, before, _expected(before, steps)), decision, ring)
        done: Plan = []
        after = before
        for _round in range(_ROUNDS):
            if not decision.now:
                return _told(Outcome(done, before, after), decision, ring)
            steps = [step for step in decision.now if step.action in first] or decision.now
            try:
                ring.ready(steps)
                if any(step.action == "write_key_file" for step in steps):
                    # A credential that opens nothing is told before the first step.
                    ring.unlock([key.key_id for key in ring.keys])
                plans.run(steps, {**ring.handlers(), **acts.handlers()})
                done += steps
                decision, after = decide()
            except TdeError as error:
                error.after([step.action for step in done])
                raise
        if decision.now:
            raise TdeError(
                "unfinished",
                f"{_ROUNDS} rounds were made, and there is still to do: {decision.now[0].obj} ({decision.now[0].action})",
                obj=f"cluster {self.request.cluster}",
                kept="What was done stays done.",
                next_step="Run again; run with --check to see what is left.",
            )
        return _told(Outcome(done, before, after), decision, ring)

    # --- the services

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        from .keystore import Keystore

        with self.locked(check):
            self.reread()
            return Keystore(self, wish, check).outcome()

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        from .rotation import Rotation

        with self.locked(check):
            self.reread()
            return Rotation(self, wish, check).outcome()

    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        from .tablespaces import Tablespaces

        with self.locked(check):
            self.reread()
            return Tablespaces(self, wish, check).outcome()

    def info(self) -> Facts:
        from .info import collect

        return collect(self)

    def proofs(self, wish: ProofWish, *, canary: bool) -> list[Facts]:
        from .proof import proofs

        return proofs(self, wish)


def _told(outcome: Outcome, decision: plan.Decision, ring: Keyring) -> Outcome:
    outcome.facts["restart_required"] = bool(decision.restart)
    outcome.warnings += ring.warnings
    if decision.restart:
        left = f" Left for then: {len(decision.later)}, the first one {decision.later[0].obj}." if decision.later else ""
        outcome.warnings.append(f"The server must be restarted. {' '.join(decision.restart)}{left} Then run this again.")
    return outcome


def _expected(before: Facts, steps: Plan) -> Facts:
    """The facts after a plan, as far as it tells them."""
    after = copy.deepcopy(before)
    keys = after["data_keys"]
    for step in steps:
        data = step.data
        if step.action == "create_kek":
            after["master_keys"].append(step.obj.removeprefix("master key "))
        elif step.action == "create_data_key":
            keys[data["key_id"]] = {"check_value": "new", "keyslots": dict.fromkeys(data["slots"], "new")}
        elif step.action == "add_keyslot":
            keys[data["key_id"]]["keyslots"][data["name"]] = "new"
        elif step.action == "remove_keyslot" and keys[data["key_id"]]["keyslots"].get(data["name"]) != "new":
            keys[data["key_id"]]["keyslots"].pop(data["name"], None)
        elif step.action == "write_record":
            after["record"] = data["record"]
        elif step.action == "mount_key_directory":
            after["key_directory"] = "mounted"
        elif step.action == "close_key_directory":
            after["key_directory"] = "absent"
        elif step.action == "write_include":
            after["include"] = data["text"]
        elif step.action == "write_key_file":
            after["keys_in_memory"] = "new"
        elif step.action == "encrypt_table":
            after.setdefault("tables", {})[f"{data['database']}.{data['table']}"] = data["key"]
    return after


def reached(record: records.Record, ring: Keyring) -> records.Record:
    """The record, with how the tokens and services of the task's credentials are reached."""
    for token in ring.recorded_tokens():
        record = record.with_token(token)
    for service in ring.services():
        record = record.with_service(service)
    return record


def with_mark(record: records.Record, mark: t.Mapping[str, t.Any]) -> records.Record:
    """The record with a re-encryption begun."""
    return dataclasses.replace(record, options={**record.options, plan.MARK: dict(mark)})
