# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The keystore of a server: made, opened (keys into memory, the include file beside the server's own), closed."""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from .. import bootpin, keyslots
from .. import record as records
from ..base import KeystoreWish, Outcome
from ..keyfacts import kek_words, key_facts
from ..keyring import Keyring, default_wish
from ..keyslots import Wanted
from ..rounds import Decision
from . import former, keyfile, look, plan
from .act import Acts
from .engine import Facts, MariaDb, reached
from .options import REFUSE, REMOVE, Former, Options


class Keystore:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: MariaDb, wish: KeystoreWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        self.taken: former.Taken | None = None
        self.store = former.TakingStore(engine.request.state, engine.request.cluster)

    @property
    def options(self) -> Options:
        """The engine's, which the taking of a former key file changes."""
        return self.engine.options

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        outcome = {"present": self._present, "open": self._open, "closed": self._close}[self.wish.state]()
        outcome.facts["cluster"] = self.engine.request.cluster
        return outcome

    def _present(self) -> Outcome:
        wish, engine = self.wish, self.engine
        self.options.account()
        wishes = wish.slots if wish.slots is not None else [default_wish(engine.request)]
        ring = engine.keyring(wishes, self.check)
        ring.store = self.store
        acts = Acts(engine.request, self.options, ring)
        ring.log_in(ring.wanted())
        state: look.State | None = None

        def decide() -> tuple[Decision, Facts]:
            nonlocal state
            engine.reread()
            ring.look()
            state = engine.state()
            acts.access = state.access
            # Before keys are made that are not the server's.
            plan.check_memory(engine.request.cluster, state, ring.keys)
            self._take(ring, state)
            update = wish.slots is not None and wish.update
            if update:
                ring.probe(ring.keys)
            wanted = ring.wanted()
            steps: Plan = []
            if not ring.store.exists():
                steps.append(Step("create_keystore", ring.store.path, "the folder of the wrapped data keys"))
            steps += self._record_step(ring, state)
            later: Plan = []
            if update:
                later = keyslots.change(ring.keys, wanted, exclusive=wish.exclusive, no_recovery=wish.no_recovery)
            names = ", ".join(one.name for one in wanted)
            later += self._data_keys(ring, wanted, f"under keyslots {names}")
            source = wish.pin_source if wish.pin_source is not None else engine.record.pin_source if engine.record else {}
            later = bootpin.before_removals(later, bootpin.pin_steps(ring, source))
            steps += keyslots.master_keys(ring.keys, ring.keks, wanted, later) + later
            restart = plan.restart_reasons(self.options, state, keyfile.names(key.key_id for key in ring.keys))
            return Decision(steps, restart=restart), engine.facts(ring, state)

        outcome = engine.rounds(decide, ring, acts, check=self.check)
        if self.taken and not self.check and any(step.action == "create_data_key" for step in outcome.plan):
            acts.note_taken(self.taken.former)
        ring.look()
        running = state is not None and (state.process is not None or state.answer is not None)
        outcome.facts.update(
            {
                "data_keys": key_facts(ring.keys),
                "master_keys": kek_words(ring.keks),
                "start_required": not running,
            }
        )
        return outcome

    def _take(self, ring: Keyring, state: look.State) -> None:
        """Read the key file of a server that is encrypted already; a server that is not to be taken is refused before keys are made."""
        engine = self.engine
        missing = engine.options.former and not {*engine.options.former.keys} <= {key.key_id for key in ring.keys}
        if state.answer is None and (missing or (engine.options.former_key_file != REFUSE and not ring.keys)):
            # What it is encrypted with is not known: keys made now could never become its own.
            raise state.error or TdeError("server_down", "does not answer", obj="MariaDB")
        taken = former.begin(engine.options, state.access, state.answer)
        if taken:
            former.check_store(taken, {key.key_id: key.check_value for key in ring.keys})
            engine.options = dataclasses.replace(engine.options, former=taken.former)
            self.store.taken = taken.keys
            self.taken = taken
        elif missing:
            raise former.lost(t.cast(Former, engine.options.former))
        if state.include is None and state.answer is not None:
            plan.check_ours(engine.options, state.answer)

    def _data_keys(self, ring: Keyring, wanted: t.Sequence[Wanted], why: str) -> Plan:
        """The steps that make what the store lacks: the keys of a former key file, then those of our own."""
        recovery = self.wish.no_recovery
        taken = [
            name for key_id in (self.options.former.keys if self.options.former else ()) if (name := keyfile.parse_name(key_id))
        ]
        there = [name for key in ring.keys if (name := keyfile.parse_name(key.key_id))]
        steps = []
        if self.options.former:
            path = self.options.former.path
            steps = plan.data_keys(taken, ring.keys, wanted, no_recovery=recovery, why=f"as it is in {path}, {why}")
        new = keyfile.first(sorted({*taken, *there}))
        return steps + plan.data_keys(new, ring.keys, wanted, no_recovery=recovery, why=why)

    def _record_step(self, ring: Keyring, state: look.State) -> Plan:
        engine = self.engine
        before = engine.record or records.Record(engine.request.cluster, engine.name)
        source = dict(before.pin_source)
        if self.wish.pin_source is not None:
            source = {name: value for name, value in self.wish.pin_source.items() if value is not None}
        given = {**self.options.given, "data_directory": self.options.data_directory or state.data_directory or None}
        kept = {name: value for name, value in before.options.items() if name not in given}
        after = dataclasses.replace(reached(before, ring), options={**kept, **given}, pin_source=source)
        return engine.record_step(after, "what the next boot needs to know")

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
        acts = Acts(engine.request, self.options, ring)

        def decide() -> tuple[Decision, Facts]:
            engine.reread()
            ring.look()
            state = engine.state()
            acts.access = state.access
            if self.wish.boot and state.include is None and state.process is None:
                # Its settings do not name our keys yet: what is begun here could not be ended, and would keep it from its start.
                return Decision([]), engine.facts(ring, state)
            if not ring.keys:
                raise TdeError(
                    "data_key_absent",
                    "has no data keys",
                    obj=f"cluster {engine.request.cluster}",
                    next_step="Make them (tde_keystore).",
                )
            names = keyfile.names(key.key_id for key in ring.keys)
            steps = plan.mount(self.options, state)
            steps += plan.delivery(self.options, engine.request.cluster, state, ring.keys)
            if self.options.former_key_file == REMOVE:
                steps += plan.removal(self.options, state)
            return Decision(steps, restart=plan.restart_reasons(self.options, state, names)), engine.facts(ring, state)

        return engine.rounds(decide, ring, acts, check=self.check)

    def _close(self) -> Outcome:
        engine = self.engine
        engine.known()
        ring = engine.keyring([], self.check)
        acts = Acts(engine.request, self.options, ring)

        def decide() -> tuple[Decision, Facts]:
            ring.look()
            state = engine.state(ask=False)
            steps: Plan = []
            if state.mounted:
                plan.check_memory(engine.request.cluster, state, ring.keys)
                if state.process and not self.wish.force:
                    raise TdeError(
                        "server_running",
                        f"the server runs (process {state.process.pid})",
                        obj="the keystore",
                        kept="It stays open.",
                        next_step="Stop the server first. force closes it anyhow: the server runs on, and does not start again.",
                    )
                data = {"path": self.options.key_directory}
                steps.append(Step("close_key_directory", self.options.key_directory, "the keys leave the memory", data))
            return Decision(steps), engine.facts(ring, state)

        return engine.rounds(decide, ring, acts, check=self.check)
