# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The keystore of a server with pg_tde made, opened and closed; its keys set and rotated."""

from __future__ import annotations

import dataclasses
import datetime

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from .. import bootpin, keyslots
from ..base import KeystoreWish, MasterKeyWish, Outcome, SlotWish
from ..keyfacts import kek_words, key_facts
from ..keyring import Keyring, default_wish
from ..rounds import Decision
from . import look, plan
from .engine import Facts, PgTde
from .keyfile import DATA_KEY
from .options import FILE


class Keystore:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: PgTde, wish: KeystoreWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        self.options = engine.options

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        outcome = {"present": self._present, "open": self._open, "closed": self._close}[self.wish.state]()
        outcome.facts["cluster"] = self.engine.request.cluster
        return outcome

    def _present(self) -> Outcome:
        wish, engine = self.wish, self.engine
        self.options.account()
        engine.check_slots(wish.slots)
        stored = self.options.provider == FILE
        wishes: list[SlotWish] = []
        if stored:
            wishes = list(wish.slots) if wish.slots is not None else [default_wish(engine.request)]
        ring = engine.keyring(wishes, self.check)
        acts = engine.acts(ring)
        ring.log_in(ring.wanted())
        last: list[look.State] = []

        def decide() -> tuple[Decision, Facts]:
            engine.reread()
            ring.look()
            state = engine.state()
            last[:] = [state]
            acts.access = state.server.access
            labels = plan.with_label(engine.labels(), plan.current(engine.labels(), engine.request.cluster), str(engine.today()))
            steps = self._store_steps(ring) if stored else []
            record = engine.recorded(ring, state, labels)
            if wish.pin_source is not None:
                source = {name: value for name, value in wish.pin_source.items() if value is not None}
                record = dataclasses.replace(record, pin_source=source)
            decision = engine.converge(state, labels)
            decision.now = engine.record_step(record, "what the next boot needs to know") + steps + decision.now
            return decision, engine.facts(ring, state)

        outcome = engine.rounds(decide, ring, acts, check=self.check)
        ring.look()
        outcome.facts.update(
            {
                "data_keys": key_facts(ring.keys),
                "master_keys": kek_words(ring.keks),
                "start_required": not last[0].running,
            }
        )
        return outcome

    def _store_steps(self, ring: Keyring) -> Plan:
        """The wrapped-key store, its data key, its keyslots and the PIN for the boot."""
        wish, engine = self.wish, self.engine
        update = wish.slots is not None and wish.update
        if update:
            ring.probe(ring.keys)
        wanted = ring.wanted()
        steps: Plan = []
        if not ring.store.exists():
            steps.append(Step("create_keystore", ring.store.path, "the folder of the wrapped data keys"))
        later: Plan = []
        if update:
            later = keyslots.change(ring.keys, wanted, exclusive=wish.exclusive, no_recovery=wish.no_recovery)
        later += plan.data_key(ring.keys, wanted, no_recovery=wish.no_recovery)
        source = wish.pin_source if wish.pin_source is not None else engine.record.pin_source if engine.record else {}
        later = bootpin.before_removals(later, bootpin.pin_steps(ring, source))
        return steps + keyslots.master_keys(ring.keys, ring.keks, wanted, later) + later

    def _open(self) -> Outcome:
        engine = self.engine
        if engine.record is None and self.check:
            cluster = engine.request.cluster
            outcome = Outcome([Step("open_keystore", f"cluster {cluster}", "once it is made")], {}, {})
            outcome.facts["restart_required"] = False
            outcome.warnings.append(f"Cluster {cluster} has no record yet: an earlier task will make it.")
            return outcome
        engine.known()
        ring = engine.keyring([], self.check)
        acts = engine.acts(ring)

        def decide() -> tuple[Decision, Facts]:
            engine.reread()
            ring.look()
            if engine.uses_store and ring.key(DATA_KEY) is None:
                raise TdeError(
                    "data_key_absent",
                    f"has no data key {DATA_KEY}",
                    obj=f"cluster {engine.request.cluster}",
                    next_step="Make it (tde_keystore).",
                )
            state = engine.state()
            reasons = plan.restart_reasons(self.options, state.facts) if state.facts else []
            return Decision(plan.delivery(self.options, state), restart=reasons), engine.facts(ring, state)

        return engine.rounds(decide, ring, acts, check=self.check)

    def _close(self) -> Outcome:
        engine = self.engine
        engine.known()
        ring = engine.keyring([], self.check)
        acts = engine.acts(ring)

        def decide() -> tuple[Decision, Facts]:
            ring.look()
            state = engine.state(ask=False)
            steps: Plan = []
            if state.mounted:
                if state.unsealed and engine.uses_store:
                    raise TdeError(
                        "unfinished",
                        "has keys that are on no disk",
                        obj=self.options.key_file,
                        kept="It stays open.",
                        next_step="Run tde_keystore with state=present, which seals them.",
                    )
                if state.server.postmaster and not self.wish.force:
                    raise TdeError(
                        "server_running",
                        f"the server runs (process {state.server.postmaster.pid})",
                        obj="the keystore",
                        kept="It stays open.",
                        next_step="Stop the server first. force closes it anyhow: the server runs on, and does not start again.",
                    )
                data = {"path": self.options.key_directory}
                steps.append(Step("close_key_directory", self.options.key_directory, "the keys leave the memory", data))
            return Decision(steps), engine.facts(ring, state)

        return engine.rounds(decide, ring, acts, check=self.check)


class MasterKey:
    """One task's work on the principal keys, and on the master key that wraps their copy.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: PgTde, wish: MasterKeyWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        if engine.record is None and not check:
            engine.known()

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        engine, wish = self.engine, self.wish
        ring = engine.keyring([], self.check)
        acts = engine.acts(ring)
        rotates = wish.state == "rotated"
        if rotates and not self.check:
            self._note(ring, "begun")

        def decide() -> tuple[Decision, Facts]:
            engine.reread()
            ring.look()
            state = engine.state()
            acts.access = state.server.access
            if rotates:
                engine.answered(state)
            before = engine.labels()
            labels = plan.with_label(before, self._label(before), str(engine.today()))
            decision = engine.converge(state, labels)
            steps = engine.record_step(engine.recorded(ring, state, labels), "which key is meant")
            rewrap = self._rewrap(ring) if rotates else []
            decision.now = steps + rewrap + decision.now
            return decision, engine.facts(ring, state)

        outcome = engine.rounds(decide, ring, acts, check=self.check)
        if rotates and not self.check:
            self._note(ring, "done")
        found = engine.labels()
        label = plan.current(found, engine.request.cluster)
        since = next((day for name, day in found if name == label), str(engine.today()))
        outcome.facts.update(
            {
                "cluster": engine.request.cluster,
                "master_key": label,
                "age_days": (engine.today() - datetime.date.fromisoformat(since)).days,
                "data_keys": key_facts(ring.keys),
            }
        )
        return outcome

    def _label(self, before: list[tuple[str, str]]) -> str:
        """The label that is meant."""
        engine, wish = self.engine, self.wish
        current = plan.current(before, engine.request.cluster)
        if wish.state != "rotated":
            return current
        if wish.tag is not None:
            return keyslots.kek_label(engine.request.cluster, wish.tag)
        since = datetime.date.fromisoformat(before[-1][1]) if before else engine.today()
        if (engine.today() - since).days > (wish.max_age or 0):
            return keyslots.kek_label(engine.request.cluster, engine.today().strftime("%Y%m%d"))
        return current

    def _rewrap(self, ring: Keyring) -> Plan:
        """The steps that put the sealed keys under a new master key, too, where there is one and the task names its token."""
        engine, wish = self.engine, self.wish
        slots = [slot for key in ring.keys for slot in key.named(wish.keyslot)]
        if engine.options.provider != FILE or not ring.keys or plan.under_passphrase(slots):
            return []
        if engine.request.access is None and engine.request.kmip is None:
            return []
        return keyslots.rotate(
            engine.request.cluster,
            ring.keys,
            ring.keks,
            slot=wish.keyslot,
            token=ring.rotate_in(wish.keyslot),
            tag=wish.tag,
            max_age=wish.max_age,
            today=engine.today(),
        )

    def _note(self, ring: Keyring, result: str) -> None:
        ring.journal.append(
            "rotate_master_key",
            f"keys at provider {self.engine.options.provider_name}",
            result=result,
            cluster=self.engine.request.cluster,
            tag=self.wish.tag,
            max_age=self.wish.max_age,
        )
