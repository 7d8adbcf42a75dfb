# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine pg_tde: an extension of the server encrypts tables and write-ahead log, with keys of a provider."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ...keystore.format import check_value
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyfacts import expect, kek_words, key_facts, record_facts
from ..keyring import Keyring
from ..rounds import Decision, rounds
from . import keyfile, look, plan, sql
from .act import Acts
from .options import FILE, KMIP, Options, complete
from .plan import LABELS, USING
from .provider import KeyProvider

Facts = t.Dict[str, t.Any]
Decide = t.Callable[[], t.Tuple[Decision, Facts]]


class PgTde(Engine):
    """See the module."""

    name = "pg_tde"
    algorithms = ("AES128", "AES256")

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        recorded: t.Mapping[str, t.Any] = self.record.options if self.record else {}
        self.options: Options = complete(request.cluster, request.options, recorded, request.connection.database)
        self.service = request.kmip or (self.record.service(recorded.get("service")) if self.record else None)

    # --- what all services share

    @property
    def providers(self) -> list[KeyProvider]:
        """The provider of the wish, and those of before whose keys are still in use."""
        request = self.request
        found = [KeyProvider(self.options, request.state, self.service)]
        for one in self.record.options.get(USING, ()) if self.record else ():
            options = complete(request.cluster, one, {}, request.connection.database)
            if options.provider_name != self.options.provider_name:
                service = self.record.service(one["service"]) if self.record and one.get("service") else None
                found.append(KeyProvider(options, request.state, service))
        return found

    @property
    def uses_store(self) -> bool:
        """Whether keys of our store are in use, or are to be."""
        return any(one.options.provider == FILE for one in self.providers)

    def opened_with(self) -> str:
        return "keyslot" if self.uses_store else "nothing"

    def check_slots(self, slots: t.Sequence[SlotWish] | None) -> None:
        """Refuse keyslots that the provider has no use for.

        :raises TdeError: ``engine_unsupported``.
        """
        others = [one.name for one in slots or () if (one.name, one.protection) != ("primary", KMIP)]
        if self.options.provider != FILE and others:
            raise TdeError(
                "engine_unsupported",
                f"With provider {self.options.provider} that service guards the keys: list no keyslot but primary with protection kmip.",
                obj=f"engine {self.name}, keyslot {others[0]}",
            )

    def keyring(self, wishes: t.Sequence[SlotWish], check: bool) -> Keyring:
        """The cluster's data key, looked at."""
        ring = Keyring(self.request, wishes, length=keyfile.KEY_BYTES, check=check_value, dry=check)
        ring.look()
        return ring

    def acts(self, ring: Keyring) -> Acts:
        """The acts on this cluster."""
        return Acts(self.request, self.options, ring, self.providers)

    def state(self, *, ask: bool = True) -> look.State:
        """The server and what it is given.

        :raises TdeError: ``server_foreign``, ``server_not_local``.
        """
        sealed = keyfile.Sealed(self.request.state, self.request.cluster)
        state = look.look(self.request.connection, self.options, self.providers, sealed, ask=ask)
        if state.server.misplaced and state.error:
            raise state.error
        return state

    def today(self) -> datetime.date:
        return datetime.datetime.now(datetime.timezone.utc).date()

    def labels(self) -> list[tuple[str, str]]:
        """The labels that were ever meant, the present one last."""
        return plan.labels(self.record.options if self.record else {})

    def record_step(self, record: records.Record, why: str) -> Plan:
        """The step that writes the record, if it says something new."""
        if record == self.record:
            return []
        path = self.request.state.cluster_record(record.cluster)
        return [Step("write_record", path, why, {"record": record.public()})]

    def recorded(self, ring: Keyring, state: look.State, labels: t.Sequence[t.Sequence[str]]) -> records.Record:
        """The record as this task means it."""
        record = self.record or records.Record(self.request.cluster, self.name)
        for token in ring.recorded_tokens():
            record = record.with_token(token)
        for service in [*ring.services(), *([self.service] if self.service else [])]:
            record = record.with_service(service)
        given = {**self.options.given, "data_directory": self.options.data_directory or state.server.data_directory or None}
        given["databases"] = list(self.options.databases)
        if self.options.provider == KMIP and self.service:
            given["service"] = self.service.service
        kept = {name: value for name, value in record.options.items() if name not in (*given, LABELS, USING, "service")}
        before = [one for one in record.options.get(USING, ()) if one["provider_name"] != self.options.provider_name]
        if state.facts and state.facts.with_extension:
            used = _used(state.facts)
            before = [one for one in before if one["provider_name"] in used]
        options = {**kept, **given, LABELS: [list(one) for one in labels], USING: [given, *before]}
        return dataclasses.replace(record, options=options)

    def facts(self, ring: Keyring, state: look.State) -> Facts:
        """A cluster's public facts."""
        shown: Facts = {
            "data_keys": key_facts(ring.keys),
            "master_keys": kek_words(ring.keks),
            "record": record_facts(self.record),
            "key_directory": "mounted" if state.mounted else "absent",
            "sealed": list(state.sealed.names) if state.sealed else [],
        }
        facts = state.facts
        if facts:
            shown["parameters"] = dict(facts.configured)
            shown["providers"] = {one.name: dict(one.options) for one in facts.providers}
            shown["keys"] = {
                plan.Target(whose, name, "", "").obj: f"{key.name} of provider {key.provider}"
                for whose, name, key in every_key(facts)
                if key.name
            }
        return shown

    def answered(self, state: look.State) -> sql.Facts:
        """What a server says that must answer, and may be changed.

        :raises TdeError: ``server_down`` and its kind, ``server_privilege_missing``, ``server_is_standby``.
        """
        answer = state.server.answer
        obj = f"PostgreSQL at {state.server.access.where}"
        if answer is None or state.facts is None:
            raise state.error or TdeError("server_down", "does not answer", obj=obj)
        if not answer.superuser:
            raise TdeError(
                "server_privilege_missing",
                f"{answer.user} is no superuser",
                obj=obj,
                next_step="Set login_user, or leave it out.",
            )
        if answer.standby:
            raise TdeError(
                "server_is_standby",
                "is a standby, which gets keys set by its primary",
                obj=obj,
                next_step="Run this on the primary; here, open the keystore before, with the same keys.",
            )
        return state.facts

    def converge(self, state: look.State, labels: t.Sequence[t.Sequence[str]], databases: t.Sequence[str] = ()) -> Decision:
        """What is left to do on the server for the keys that are meant.

        :param databases: that are to have the extension, too.
        """
        options = self.options
        steps = plan.delivery(options, state)
        if state.unsealed:
            steps += plan.seal(options, state, "it is in memory only")
        if state.server.answer is not None and state.server.answer.standby:
            return Decision(steps)
        if state.facts is None:
            if state.error and state.error.code not in ("server_down",):
                raise state.error
            return Decision(steps)
        facts = self.answered(state)
        loading = plan.library(options, facts)
        if options.extension not in sql.preloaded(facts.running):
            return Decision(steps + loading, restart=plan.restart_reasons(options, facts))
        steps += plan.extensions(options, facts, databases) + plan.parameters(options, facts)
        try:
            wished = plan.targets(options, facts, str(labels[-1][0]), [name for name, dummy in labels])
        except TdeError:
            if steps:
                # They may be what the server lacks.
                return Decision(steps)
            raise
        changes = plan.providers(options, facts, self.providers[0].wished())
        plan.not_during_backup(facts, wished)
        there = {target.name: self._has(state, target.name) for target in wished}
        steps += changes + plan.keys(options, wished, there) + plan.wal(options, facts)
        return Decision(steps, restart=plan.restart_reasons(options, facts))

    def _has(self, state: look.State, name: str) -> bool:
        if self.options.provider == FILE and not state.mounted:
            return name in (state.sealed.names if state.sealed else ())
        return self.providers[0].has(name)

    def rounds(self, decide: Decide, ring: Keyring, acts: Acts, *, check: bool) -> Outcome:
        """Look, decide and act until there is nothing left that can be done.

        :param decide: looks, and gives what is to be done and the public facts; raises before anything is done.
        :raises TdeError: ``unfinished``.
        """

        def run(steps: Plan) -> Plan:
            ring.ready(steps)
            sealing = any(step.action in ("seal_keys", "create_key", "write_key_file") for step in steps)
            if sealing and self.uses_store and ring.key(keyfile.DATA_KEY):
                ring.unlock([keyfile.DATA_KEY])
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
        from .keystore import MasterKey

        with self.locked(check):
            self.reread()
            return MasterKey(self, wish, check).outcome()

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


def every_key(facts: sql.Facts) -> list[tuple[str, str, sql.SetKey]]:
    """Each key that the server tells of: whose, of which database, and what it is."""
    first = facts.with_extension
    found = [(sql.DEFAULT, "", facts.default_key), (sql.SERVER, "", facts.server_key)] if first else []
    return [*found, *((sql.OWN, one.name, one.key) for one in facts.databases.values() if one.schema is not None)]


def _used(facts: sql.Facts) -> set[str]:
    """The providers whose keys are set; all of them where the server cannot tell of one."""
    keys = [key for dummy, dummy, key in every_key(facts)]
    if any(key.problem for key in keys):
        return {one.name for database in facts.databases.values() for one in (*facts.providers, *database.providers)}
    return {str(key.provider) for key in keys if key.name}


def _expected(before: Facts, steps: Plan) -> Facts:
    """The facts after a plan, as far as it tells them."""
    after = copy.deepcopy(before)
    expect(after, steps)
    for step in steps:
        data = step.data
        if step.action in ("mount_key_directory", "close_key_directory"):
            after["key_directory"] = "mounted" if step.action == "mount_key_directory" else "absent"
        elif step.action == "alter_system":
            after.setdefault("parameters", {})[data["name"]] = ", ".join(data["values"])
        elif step.action in ("add_provider", "change_provider"):
            after.setdefault("providers", {})[step.obj.removeprefix("provider ")] = data["options"]
        elif step.action == "set_key":
            after.setdefault("keys", {})[step.obj] = data["name"]
        elif step.action == "encrypt_table":
            after.setdefault("tables", {})[step.obj] = sql.TDE_HEAP
    return after
