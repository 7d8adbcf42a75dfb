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
from .. import listener
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyfacts import expect, kek_words, key_facts, record_facts
from ..keyring import Keyring
from ..rounds import Decision, rounds
from . import keyfile, look, plan
from .act import Acts
from .options import Options, complete

Facts = t.Dict[str, t.Any]
Decide = t.Callable[[], t.Tuple[Decision, Facts]]


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

        :raises TdeError: ``server_foreign``, ``server_not_local``: another server answers than the one whose files lie here.
        """
        state = look.look(self.request.connection, self.options, ask=ask)
        if state.answer is None:
            return state
        said = state.answer.data_directory
        if os.path.realpath(said) != os.path.realpath(state.data_directory):
            raise TdeError(
                "server_foreign", f"works on {said}, not on {state.data_directory}", obj=f"MariaDB at {state.access.where}"
            )
        # Fleets have the same paths on every host, so that a server works there here says nothing of the one that answers.
        if state.process is None or (state.access.host and not listener.is_here(state.access.host)):
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
            "data_keys": key_facts(ring.keys),
            "master_keys": kek_words(ring.keks),
            "record": record_facts(self.record),
        }
        if state:
            shown["key_directory"] = "mounted" if state.mounted else "absent"
            shown["keys_in_memory"] = sorted(state.keys.checks) if state.keys else []
            if state.former:
                shown["former_key_file"] = self.options.former.path if self.options.former else None
            shown["include"] = state.include.decode("utf-8", "replace") if state.include is not None else None
        return shown

    def rounds(self, decide: Decide, ring: Keyring, acts: Acts, *, check: bool, first: t.Container[str] = ()) -> Outcome:
        """Look, decide and act until there is nothing left that can be done.

        :param decide: looks, and gives what is to be done and the public facts; raises before anything is done.
        :param first: actions after which the next look comes before all others.
        :raises TdeError: ``unfinished``.
        """

        def run(steps: Plan) -> Plan:
            steps = [step for step in steps if step.action in first] or steps
            ring.ready(steps)
            if any(step.action in ("write_key_file", "remove_former_key_file") for step in steps):
                # A credential that opens nothing is told before the first step.
                ring.unlock([key.key_id for key in ring.keys])
            plans.run(steps, {**ring.handlers(), **acts.handlers()})
            return steps

        outcome = rounds(self.request.cluster, decide, run, _expected, check=check)
        outcome.warnings += ring.warnings
        return outcome

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


def _expected(before: Facts, steps: Plan) -> Facts:
    """The facts after a plan, as far as it tells them."""
    after = copy.deepcopy(before)
    expect(after, steps)
    for step in steps:
        data = step.data
        if step.action == "mount_key_directory":
            after["key_directory"] = "mounted"
        elif step.action == "close_key_directory":
            after["key_directory"] = "absent"
        elif step.action == "remove_former_key_file":
            after.pop("former_key_file", None)
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
