# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The keystore of a cluster: configured, made, opened, its credential changed."""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ...common.secret import Secret
from ...pkcs11 import opencryptoki, pins, resting
from ...pkcs11.token import TokenAccess, TokenInfo, open_session
from .. import record as records
from ..base import KeystoreWish, Outcome, SlotWish
from ..rounds import Decision
from . import look, plan, public
from .options import FILE, HSM, PLUGIN, check_present

if t.TYPE_CHECKING:
    from .engine import Fep

Facts = t.Dict[str, t.Any]


class Task:
    """What all tasks on the keystore share.

    :param engine: the cluster; :param check: check mode.
    :ivar present: the PIN or passphrase that the keystore has now, as far as was given. :ivar wished: the one it shall have.
    """

    def __init__(self, engine: Fep, check: bool) -> None:
        self.engine = engine
        self.options = engine.options
        self.request = engine.request
        self.check = check
        self.acts = engine.acts()
        self.warnings: list[str] = []
        self.token: TokenInfo | None = None
        self._verified = False
        #: A plugin finds its token itself, but for what is made for it.
        self.uses_token = self.options.keystore == HSM
        access = self.request.access
        self.present: Secret | None = self.request.passphrase if self.options.keystore == FILE else access.pin if access else None
        self.wished: Secret | None = self.present
        if not check:
            engine.settle()

    def find_token(self) -> int | None:
        """The token's slot; without a login.

        :raises TdeError: ``token_absent`` and its kind.
        """
        if not self.uses_token or self.request.access is None:
            return None
        if self.token is None:
            try:
                self.token = look.token(self.request.access, self.request.state)
            except TdeError as exc:
                if not (self.check and exc.code == "token_absent" and self.engine.record is None):
                    raise
                said = f"{exc.obj}: {exc.message} yet: an earlier task will make it."
                self.warnings = [said]
                return None
        return self.token.slot_id

    def verify(self, steps: Plan) -> None:
        """One login with the PIN that is to be handed to the server or written down, before anything is done with it.

        :raises TdeError: those of the login: ``pin_refused``, ``pin_length``, ``pin_locked`` …
        """
        uses = any(step.action in plan.USES_PIN or step.data.get("with_pin") for step in steps)
        uses = uses or any(step.action in ("write_user_pin", "write_pin_source") for step in steps)
        if any(step.action == "change_pin" for step in steps):
            # It proves the new PIN itself, once the token has it.
            return
        if self.options.keystore == FILE or not uses or self._verified or self.token is None or self.wished is None:
            return
        access = dataclasses.replace(t.cast(TokenAccess, self.request.access), pin=self.wished)
        with open_session(access, self.request.state):
            self._verified = True

    def credential(self) -> plan.Credential:
        """What a plan may know of the secrets."""
        memory = look.memory(self.engine.record)
        known = None
        if self.options.keystore == FILE and self.wished is not None:
            known = look.passphrase_known(memory, self.request.cluster, self.wished)
        changes = self.present is not None and self.wished is not None and self.present != self.wished
        return plan.Credential(self.wished is not None, changes, known, self.present is not None)

    def hand_over(self) -> None:
        """Give the acts their secrets."""
        self.acts.record = self.engine.record or self.acts.record
        self.acts.wished = self.wished
        known = self.credential().known
        self.acts.secret = self.wished if known or self.present is None or self.options.keystore != FILE else self.present

    def seen(self) -> look.State:
        """The state, with what it says given to the acts."""
        self.engine.reread()
        self.hand_over()
        return self.engine.state(self.acts, slot_id=self.find_token())

    def run(self, steps: Plan) -> Plan:
        """Carry a plan out."""
        from .engine import run_steps

        self.hand_over()
        run_steps(self.acts, steps)
        return steps

    def finish(self, outcome: Outcome, state: look.State) -> Outcome:
        """The outcome with what all tasks return."""
        outcome.warnings += self.warnings
        outcome.facts.update(
            {"cluster": self.request.cluster, "restart_required": not plan.ready(self.options, state), "data_keys": {}}
        )
        return outcome

    def master_key_words(self, key: look.MasterKey | None) -> str:
        """The master key's name: the plugin's key, or cluster and tag, for the server names its own to nobody."""
        if self.options.keystore == PLUGIN:
            return key.key_id if key else ""
        return f"fep.{self.request.cluster}" + (f".{key.tag}" if key and key.tag else "")


class Keystore(Task):
    """One task of ``tde_keystore``."""

    def __init__(self, engine: Fep, wish: KeystoreWish, check: bool) -> None:
        super().__init__(engine, check)
        self.wish = wish

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        return {"present": self._present, "open": self._open}[self.wish.state]()

    # --- present

    def _wish_credential(self, state: look.State) -> None:
        slot = plan.check_slots(self.options, self.wish.slots)
        if slot is None or (state.made and not self.wish.update):
            return
        if self.options.keystore == FILE:
            self.wished = slot.passphrase or self.wished
        else:
            self._check_same_token(slot)
            self.wished = slot.access.pin if slot.access and slot.access.pin else self.wished
        if self.present is None:
            self.present = None if self.options.keystore == FILE else self.wished

    def _check_same_token(self, slot: SlotWish) -> None:
        top, own = self.request.access, slot.access
        if top and own and (top.selector, top.library) != (own.selector, own.library):
            raise TdeError(
                "engine_unsupported",
                "Enterprise Postgres describes no way to take a master key from one token to another",
                obj=f"keyslot {slot.name}",
                next_step="Name the token of the task; for a standby's token, run the task on the standby.",
            )

    def _pin_plan(self) -> Plan:
        """The steps of a change of the token's PIN, found by logging in where both PINs were given."""
        access = self.request.access
        if self.options.keystore != HSM or self.present is None or self.wished is None or self.present == self.wished:
            return []
        wish = pins.PinWish(t.cast(TokenAccess, access), "user", self.wished, self._source_path())
        self.acts.pin_wish = wish
        found = pins.change(wish, self.request.state, check_mode=True).plan
        return [Step("change_pin", step.obj, step.why) for step in found[:1]]

    def _source(self) -> t.Mapping[str, t.Any]:
        recorded = self.engine.record.pin_source if self.engine.record else {"kind": "none"}
        given = self.wish.pin_source
        return {name: value for name, value in given.items() if value is not None} if given else recorded

    def _source_path(self) -> str | None:
        return str(self._source()["path"]) if self._source().get("kind") == "file" else None

    def _source_steps(self) -> Plan:
        """The step that writes the PIN or passphrase where ``hsm-tde`` finds it at boot."""
        path = self._source_path()
        if path is None or self.options.keystore == PLUGIN:
            return []
        at_rest = resting.Resting(None, None)
        try:
            at_rest = resting.at_rest(path)
            left = resting.leftovers(path)
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
            left = []
        there = [one for one in at_rest if one is not None]
        if not there and self.wished is None:
            raise TdeError(
                "credential_missing", "there is no such file, and nothing was given to write it", obj=f"pin_source {path}"
            )
        if self.wished is None or (there == [self.wished] and not left):
            return []
        return [Step("write_pin_source", path, "so that the keystore opens at boot", {"path": path})]

    def _record(self, state: look.State) -> records.Record:
        memory = look.memory(self.engine.record)
        if state.made and state.key is None:
            # The journal knows nothing of it; where it does not show later, none is made in its place.
            memory["adopted"] = True
        connection = self.request.connection
        login = {"user": connection.user, "database": connection.database if connection.database != "postgres" else None}
        login = {name: value for name, value in login.items() if value is not None} or memory.get("login", {})
        memory = {**memory, "login": login}
        access, token = self.request.access, self.token
        tokens: tuple[records.Token, ...] = self.engine.record.tokens if self.engine.record else ()
        if token is not None and access is not None:
            tokens = (records.Token(access.library.path, dict(access.library.environment), token.label, token.serial),)
        return records.Record(
            cluster=self.request.cluster,
            engine=self.engine.name,
            options={**self.options.given, "memory": memory},
            tokens=() if self.options.keystore == FILE else tokens,
            pin_source=dict(self._source()),
        )

    def _record_steps(self, state: look.State) -> Plan:
        record = self._record(state)
        if record == self.engine.record:
            return []
        path = self.request.state.cluster_record(record.cluster)
        why = "it is new" if self.engine.record is None else "its options, token or PIN source are others"
        return [Step("write_record", path, why, {"record": record.public()})]

    def _present(self) -> Outcome:
        check_present(self.options)
        self.options.account()
        if self.options.keystore != FILE and self.request.access is None:
            raise TdeError("invalid_option", "no token was named", obj="options library and token_label")
        self.uses_token = self.options.keystore != FILE
        first = True
        state = self.seen()

        def decide() -> tuple[Decision, Facts]:
            nonlocal state, first
            if first:
                self._wish_credential(state)
                first = False
            state = self.seen()
            self.engine.usable(state)
            recorded = str(self.engine.record.options.get("keystore")) if self.engine.record else None
            plan.check_kind(self.options, recorded, state)
            self._check_group()
            plan.check_coming(self.options, state)
            steps = self._steps(state)
            self.verify(steps)
            return Decision(steps), public.facts(self.options, state)

        outcome = self.engine.rounds(decide, self.run, check=self.check)
        if any(step.action == "change_passphrase" for step in outcome.plan):
            outcome.warnings.append(
                "The passphrase changed: back the keystore up now (Operation Guide, section 5.6.2), for older copies open with the former one."
            )
        outcome = self.finish(outcome, state)
        made = [self.master_key_words(state.key)] if state.made else []
        created = any(step.action == "create_cluster" for step in outcome.plan)
        outcome.facts.update({"master_keys": made, "start_required": created and state.server.process is None})
        return outcome

    def _check_group(self) -> None:
        """Refuse a server that openCryptoki would answer nothing but FunctionFailed.

        :raises TdeError: ``opencryptoki_user_outside_group``.
        """
        access = self.request.access
        if self.options.keystore != HSM or access is None or not opencryptoki.is_opencryptoki(access.library.path):
            return
        named = opencryptoki.members()
        if named is not None and self.options.os_user not in named:
            raise TdeError(
                "opencryptoki_user_outside_group",
                f"is not a member of the group {opencryptoki.GROUP}, so the server could not reach the token",
                obj=f"user {self.options.os_user}",
                next_step="Make it one (the role hsm.tde.opencryptoki, opencryptoki_users), then restart the server.",
            )

    def _steps(self, state: look.State) -> Plan:
        options = self.options
        if not state.files.data:
            if not options.create_cluster:
                raise TdeError(
                    "file_absent",
                    "has no database cluster",
                    obj=f"data directory {options.data_directory}",
                    next_step="Create it (initdb), or set create_cluster.",
                )
            if state.remembered:
                raise TdeError(
                    "place_unreachable",
                    "has no database cluster, and this host knows of its master key",
                    obj=f"data directory {options.data_directory}",
                    kept="None was created there.",
                    next_step="Mount the file system that it is on, or restore it from a backup.",
                )
            why = "there is no database cluster"
            return [*self._record_steps(state), Step("create_cluster", f"data directory {options.data_directory}", why)]
        pin_steps = self._pin_plan()
        pin_wished = bool(options.auto_open) and options.keystore == HSM
        configured = plan.configuration(options, state, pin_wished=pin_wished, pin_given=self.wished is not None)
        steps = [*plan.strip_pin(state), *pin_steps] if pin_steps else []
        steps += [*configured, *self._record_steps(state)]
        credential = self.credential()
        if options.keystore == PLUGIN:
            # What the host remembers of the server changes at each of its starts, and is none of the plugin's business.
            published = dataclasses.replace(self._record(state), options=self.options.given)
            steps += self.acts.userside().plan(published, self.wished)
        if plan.ready(options, state):
            made = plan.master_key(options, state, credential)
            if made and options.keystore == FILE:
                plan.check_length(len(self.wished or b""))
            changed = plan.passphrase(options, credential) if not made else []
            if changed:
                plan.check_length(len(self.wished or b""))
            steps += made + changed
            if not made:
                steps += plan.auto_open(options, state, credential)
        if not (options.keystore == HSM and pin_steps):
            steps += self._source_steps()
        return steps

    # --- open

    def _open(self) -> Outcome:
        cluster = self.request.cluster
        if self.engine.record is None and self.check:
            outcome = Outcome([Step("open_keystore", f"cluster {cluster}", "once it is made")], {}, {})
            outcome.facts.update({"cluster": cluster, "restart_required": False})
            outcome.warnings.append(f"Cluster {cluster} has no record yet: an earlier task will make it.")
            return outcome
        self.engine.known()
        state = self.seen()
        confirmed = False

        def decide() -> tuple[Decision, Facts]:
            nonlocal state, confirmed
            state = self.seen()
            self._check_server(state)
            steps: Plan = []
            if plan.ready(self.options, state):
                by_itself = plan.opens_by_itself(self.options, state)
                # Who asks without a credential only wants to know; the keystore that opens by itself is not doubted then.
                credential = self.credential()
                if not (by_itself and (self.check or not credential.given)):
                    steps = plan.opening(self.options, state, plan.Credential(True) if self.check else credential)
                confirmed = bool(steps) and by_itself
                if not self.check:
                    self.verify(steps)
            return Decision(steps), public.facts(self.options, state)

        outcome = self.engine.rounds(decide, self.run, check=self.check)
        if self.acts.found_open:
            outcome.plan, outcome.before = [], outcome.after
        elif outcome.plan and confirmed:
            outcome.warnings.append(
                "The keystore ought to have opened by itself when the server started, and had not: see the server's log."
            )
        outcome = self.finish(outcome, state)
        del outcome.facts["data_keys"]
        return outcome

    def _check_server(self, state: look.State) -> None:
        """Opening needs the server, once there is something to open.

        :raises TdeError: ``server_down`` and its kind.
        """
        if state.server.process is None and state.made and state.server.error is not None:
            raise state.server.error
        self.engine.usable(state)
