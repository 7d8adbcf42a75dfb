# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine oracle: Transparent Data Encryption with a software keystore, or with master keys in an nShield HSM."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import os
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.files import lock
from ...common.plan import Plan, Step
from ...common.secret import Secret
from ...hsm import nshield_changes
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, Request, SlotWish, TablespacesWish
from . import memo as memos
from . import plan, recovery, sql
from .act import Acts, Credentials, compose
from .facts import Facts, Guard
from .memo import Memo
from .options import Options, complete
from .plan import Decision, Wish

#: Times that a plan is made and carried out before the run gives up; a change takes some ten.
_ROUNDS = 40

#: What a change leaves behind, by its kind.
_BACKUPS = {
    plan.PASSPHRASE: "Backups of the Security World from before {until} open with the former passphrase of {words}: keep it as long as them.",
    plan.TRANSFER: "Backups of the Security World from before {until} have the keys under {words}: keep its passphrase as long as them.",
}
_BACKUP = "Backups of the database from before {until} need the master keys under {words}: keep these, and the credential."


class Oracle(Engine):
    """See the module."""

    name = "oracle"
    algorithms = ("AES128", "AES256")
    refuses = {
        "move": "Oracle encrypts a tablespace where it is: name it, and nothing to move.",
        "proof": "This collection reads no data files of Oracle: the server's word in V$ENCRYPTED_TABLESPACES is no proof.",
    }
    protections = ("passphrase", "module", "softcard", "ocs")
    opens_after_start = True

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.options: Options = complete(request.options, self.record.options if self.record else {}, request.connection.database)

    def opened_with(self) -> str:
        return "nothing"

    def locked(self, check: bool) -> contextlib.AbstractContextManager[t.Any]:
        """One run a cluster at a time; its own lock, for nShield's tools take the host's."""
        if check:
            return contextlib.nullcontext()
        self.request.state.create()
        path = memos.path(self.request.state, self.request.cluster)
        return lock(os.path.join(self.request.state.path, f"{os.path.basename(path)}.oracle.lock"), 10)

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        with self.locked(check):
            return Work(self, wish.slots if wish.update or not self.record else None, check).keystore(wish)

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        with self.locked(check):
            return Work(self, None, check).master_key(wish)

    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        from .tablespaces import tablespaces

        with self.locked(check):
            return tablespaces(Work(self, wish.slots, check), wish)

    def info(self) -> dict[str, t.Any]:
        from .info import collect

        return collect(self)


class Work:
    """One task's work.

    :param slots: the keyslot wished for; None for the guard that is remembered.
    """

    def __init__(self, engine: Oracle, slots: t.Sequence[SlotWish] | None, check: bool) -> None:
        self.engine, self.check = engine, check
        self.request, self.options = engine.request, engine.options
        memo = memos.read(self.request.state, self.request.cluster)
        guard, slot = self._guard(slots, memo)
        source = memo.change.source if memo.change else memo.guard or guard
        new = slot.passphrase if slot and slot.passphrase else self.request.passphrase
        old = self.request.passphrase or (new if source == guard else None)
        software = self.options.software_passphrase
        if not guard.hsm or not source.hsm:
            software = software or (new if not guard.hsm else old)
        self.acts = Acts(self.request, self.options, Credentials(guard, new, source, old, software), memo)
        self.guard = guard
        self._checked: list[tuple[Guard, Secret | None]] = []

    def _guard(self, slots: t.Sequence[SlotWish] | None, memo: Memo) -> tuple[Guard, SlotWish | None]:
        """What is to guard the master keys.

        :raises TdeError: ``engine_unsupported``, ``invalid_option``, ``oracle_change_unfinished``, ``cluster_unknown``.
        """
        if slots is None:
            if memo.change:
                raise TdeError(
                    "oracle_change_unfinished",
                    f"a change from {memo.change.source.words} to {memo.change.target.words} was begun",
                    obj="keystore",
                    next_step="Run tde_keystore with state=present and the keyslot of that change, which goes on.",
                )
            if memo.guard is None:
                raise TdeError(
                    "cluster_unknown",
                    f"has no keystore that {self.request.state.path} remembers",
                    obj=f"cluster {self.request.cluster}",
                    next_step="Make its keystore first (tde_keystore with state=present, and its keyslot).",
                )
            return memo.guard, None
        if len(slots) != 1 or slots[0].name != "primary" or slots[0].protection not in Oracle.protections:
            raise TdeError(
                "engine_unsupported",
                "Oracle has one keystore: list the keyslot primary alone, with protection passphrase, module, softcard or ocs.",
                obj="engine oracle, option keyslots",
            )
        slot = slots[0]
        named = slot.protection in ("softcard", "ocs")
        if named != (slot.token_name is not None):
            raise TdeError(
                "invalid_option",
                "a softcard or card set is named in token_label" if named else f"protection {slot.protection} has no token_label",
                obj="keyslot primary",
            )
        return Guard(slot.protection, slot.token_name), slot

    # --- looking and deciding

    def wish(self, memo: Memo) -> Wish:
        """The wish, with what is known of the credential.

        :raises TdeError: ``credential_missing``, ``passphrase_refused``.
        """
        given, options = self.acts.given, self.options
        root = options.wallet_root
        if root is None:
            raise TdeError("invalid_option", "is needed the first time", obj="option oracle.wallet_root")
        fresh = False
        secret = external = True
        if given.new is not None:
            composed = compose(given.guard, given.new, options)
            if memo.change is None and memo.credential:
                fresh = not memos.same(composed, memo.credential)
                self._known(memo, fresh)
            elif memo.change is None and given.old is not None and given.old_guard == given.guard:
                fresh = given.old != given.new
            secret = not (options.auto_login and given.guard.hsm) or memos.same(composed, memo.secret)
            external = not options.external_store or memos.same(composed, memo.external)
        return Wish(
            guard=given.guard,
            wallet_root=root,
            containers=options.containers,
            auto_login=options.auto_login,
            external_store=options.external_store,
            transfer=options.transfer_keys,
            round_trip=options.safe_way_round,
            new_credential=fresh,
            secret_current=secret,
            external_current=external,
            software_made=memo.software,
            keyed=memo.keyed,
        )

    def _known(self, memo: Memo, fresh: bool) -> None:
        """For another credential the present one must be given, and be the one that opened the keystore."""
        given = self.acts.given
        if not fresh or given.old_guard != given.guard:
            # Another guard has another credential; the present one is judged with the change.
            return
        old = compose(given.old_guard, given.old, self.options)
        if not memos.same(old, memo.credential):
            raise TdeError(
                "passphrase_refused",
                f"neither the wished credential nor the present one is that which opened the keystore last ({given.old_guard.words})",
                obj="keystore",
                kept="None was tried.",
                next_step="Give the present one as passphrase, the new one in the keyslot.",
            )

    def rounds(self, decide: t.Callable[[Facts, Wish], Decision]) -> tuple[Outcome, Facts]:
        """Look, decide and act until nothing is left, or a restart is needed.

        :raises TdeError: ``unfinished``, and what the acts meet.
        """
        acts = self.acts
        done: Plan = []
        before: dict[str, t.Any] | None = None
        with sql.connect(self.request.connection, self.options) as database:
            acts.database = database
            for dummy in range(_ROUNDS):
                facts = database.facts(ask=not self.check)
                acts.facts = facts
                decision = decide(facts, self.wish(acts.memo))
                before = before if before is not None else self.public(facts)
                steps = [*self._record_step(), *decision.now]
                if steps:
                    self._judge(decision)
                if self.check:
                    # A step after the restart is a change all the same.
                    outcome = self._outcome([*steps, *decision.later], before, facts, decision)
                    if not facts.asked:
                        outcome.warnings.append(
                            "The keystore was not looked at: with auto-login that opens it. It is taken to be open."
                        )
                    return outcome, facts
                if not steps:
                    if not decision.restart and decision.change is None:
                        self._opened(facts)
                    return self._outcome(done, before, facts, decision), facts
                if decision.change and acts.memo.change is None:
                    acts.remember(change=decision.change)
                try:
                    plans.run(steps, acts.handlers(), acts.done)
                except TdeError as error:
                    error.after([step.action for step in done])
                    raise
                done += steps
        raise TdeError(
            "unfinished",
            f"{_ROUNDS} rounds were made, and there is still to do: {steps[0].obj} ({steps[0].action})",
            obj=f"cluster {self.request.cluster}",
            kept="What was done stays done.",
            next_step="Run again; run with --check to see what is left.",
        )

    def _judge(self, decision: Decision) -> None:
        """The credentials, each once and before the first statement that holds it."""
        given, change = self.acts.given, decision.change
        if change is None:
            needs = ("open_keystore", "close_keystore", "set_key", "use_key", "write_secret", "write_external")
            if any(step.action in needs for step in decision.now):
                self._check(given.guard, given.new)
            return
        compose(given.guard, given.new, self.options)
        compose(change.source, given.old, self.options)
        if change.kind in (plan.ROUND_TRIP, plan.MIGRATE, plan.REVERSE) or self.options.auto_login:
            self.acts.software()
        # With a credential that the HSM does not know the keystore would open under module protection, and show no key.
        before = change.kind == plan.PASSPHRASE and change.phase == plan.BEGUN
        if before or change.leg_name == "reverse":
            self._check(change.source, given.old)
        if change.kind != plan.PASSPHRASE or change.phase == plan.TOKEN:
            self._check(given.guard, given.new)

    def _check(self, guard: Guard, passphrase: Secret | None) -> None:
        if (guard, passphrase) not in self._checked:
            self.acts.check_credential(guard, passphrase)
            self._checked.append((guard, passphrase))

    def _opened(self, facts: Facts) -> None:
        """Note which credential the open keystore has."""
        given = self.acts.given
        if given.new is None or not facts.opened(1, given.guard.hsm):
            return
        composed = compose(given.guard, given.new, self.options)
        if not memos.same(composed, self.acts.memo.credential):
            self.acts.remember(guard=given.guard, credential=memos.fingerprint(composed))

    def _record_step(self) -> Plan:
        record = self.engine.record or records.Record(self.request.cluster, "oracle")
        wished = dataclasses.replace(record, options={**record.options, **self.options.given})
        if wished == self.engine.record and self.acts.memo.guard is not None:
            return []
        if not self.check:
            self.engine.record = wished
        path = self.request.state.cluster_record(self.request.cluster)
        return [Step("write_record", path, "the host remembers the keystore", {"record": wished.public()})]

    # --- telling

    def public(self, facts: Facts) -> dict[str, t.Any]:
        """Public facts, for the difference."""
        memo = self.acts.memo
        return {
            "guard": memo.guard.words if memo.guard else None,
            "change": f"{memo.change.kind}: {memo.change.leg_name}, {memo.change.phase}" if memo.change else None,
            "WALLET_ROOT": facts.wallet_root,
            "TDE_CONFIGURATION": facts.configuration,
            "keystores": {f"{facts.container(one.con_id)} {one.type}": one.status for one in facts.wallets},
            "master_keys": {
                one.name: f"{key.tag or key.key_id} ({key.keystore})"
                for one in facts.containers
                if (key := facts.active(one.con_id))
            },
            "tablespaces": {
                f"{facts.container(one.con_id)}.{one.name}": f"{one.algorithm} {one.status}"
                for one in facts.spaces
                if one.algorithm
            },
        }

    def _outcome(self, steps: Plan, before: dict[str, t.Any], facts: Facts, decision: Decision) -> Outcome:
        after = copy.deepcopy(before) if self.check else self.public(facts)
        if self.check and steps:
            after["planned"] = [f"{step.action}: {step.obj}" for step in steps]
        outcome = Outcome(steps, before, after)
        outcome.facts["restart_required"] = bool(decision.restart)
        outcome.warnings += [*self.acts.warnings, *decision.restart]
        return outcome

    def behind(self, facts: Facts) -> list[str]:
        """What was left behind, in sentences."""
        shut = [one.name for one in plan.chosen(facts, self.options.containers) if not one.open]
        return [f"PDB {name} is closed, so its keystore was left as it is: run this again when it is open." for name in shut]

    def cards(self) -> list[str]:
        """Cards of the set that have yet to get its new passphrase, in a sentence: left in a slot, such a card opens nothing."""
        started = nshield_changes.load(self.request.state)["cards"] if self.guard.protection == "ocs" else {}
        if not started:
            return []
        done = started.get(self.options.tools().inspect().find_token("ocs", self.guard.name or "").hash, [])
        if not done:
            return []
        numbers = ", ".join(str(number) for number in done)
        return [
            f"The new passphrase of {self.guard.words} is on its cards {numbers} alone: give it to the others (nshield_cardset)."
        ]

    # --- services

    def keystore(self, wish: KeystoreWish) -> Outcome:
        """Present and open lead to the same end: what a restart leaves is opened by either."""
        acts = self.acts
        if wish.state == "closed":
            outcome, facts = self.rounds(plan.closed)
        else:
            acts.warnings += recovery.judge(self.guard, self.options, acts.memo)
            outcome, facts = self.rounds(lambda facts, wished: plan.present(facts, wished, acts.memo.guard, acts.memo.change))
            if not self.check and not outcome.plan and self.guard.hsm and not outcome.facts["restart_required"]:
                with sql.connect(self.request.connection, self.options) as database:
                    acts.database = database
                    acts.verify()
        outcome.warnings += [*self.behind(facts), *self.cards()]
        outcome.facts.update(
            cluster=self.request.cluster,
            data_keys={},
            master_keys=[
                f"{key.tag or key.key_id} of {one.name}" for one in facts.containers if (key := facts.active(one.con_id))
            ],
            backups_need=backups_need(acts.memo),
        )
        return outcome

    def master_key(self, wish: MasterKeyWish) -> Outcome:
        """Set or rotate; the tag tells whether it was done."""
        cluster, tag = self.request.cluster, wish.tag if wish.state == "rotated" else None
        today = datetime.datetime.now(datetime.timezone.utc)

        def decide(facts: Facts, wished: Wish) -> Decision:
            chosen = tag
            if wish.state == "rotated" and wish.max_age is not None:
                ages = [age for one in facts.containers if (age := age_days(facts, one.con_id, today)) is not None]
                chosen = f"{today:%Y%m%d}" if ages and max(ages) > wish.max_age else None
            return Decision(plan.master_keys(facts, wished, cluster, chosen, self.acts.memo.keyed))

        outcome, facts = self.rounds(decide)
        if not self.check and not outcome.plan and self.guard.hsm:
            with sql.connect(self.request.connection, self.options) as database:
                self.acts.database = database
                self.acts.verify()
        active = facts.active(1)
        outcome.facts.update(
            cluster=cluster,
            master_key=active.tag or active.key_id if active else plan.tag_of(cluster, tag),
            age_days=age_days(facts, 1, today),
            data_keys={},
        )
        return outcome


def age_days(facts: Facts, con_id: int, today: t.Any) -> int | None:
    """Days since a container's master key came into use; None if there is none."""
    active = facts.active(con_id)
    if active is None:
        return None
    since = datetime.datetime.fromisoformat(active.activated)
    since = since if since.tzinfo else since.replace(tzinfo=datetime.timezone.utc)
    return max(0, int((today - since).days))


def backups_need(memo: Memo) -> list[str]:
    """Which former credentials backups still need, in sentences."""
    return [
        _BACKUPS.get(one["kind"], _BACKUP).format(until=one["until"], words=Guard(one["protection"], one["name"]).words)
        for one in memo.former
    ]
