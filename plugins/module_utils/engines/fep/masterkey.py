# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The master key of a cluster: set once, rotated by a tag or its age."""

from __future__ import annotations

import datetime
import typing as t

from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Plan
from ..base import MasterKeyWish, Outcome
from ..rounds import Decision
from . import look, plan, public
from .keystore import Facts, Task
from .options import PLUGIN

if t.TYPE_CHECKING:
    from .engine import Fep


class MasterKey(Task):
    """One task of ``tde_master_key``."""

    def __init__(self, engine: Fep, wish: MasterKeyWish, check: bool, today: datetime.date) -> None:
        super().__init__(engine, check)
        self.wish = wish
        self.today = today

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        wish = self.wish
        if wish.keyslot != "primary":
            raise TdeError("engine_unsupported", "Enterprise Postgres has one keyslot, primary", obj=f"keyslot {wish.keyslot}")
        if self.engine.record is None and not self.check:
            self.engine.known()
        state = self.seen()

        def decide() -> tuple[Decision, Facts]:
            nonlocal state
            state = self.seen()
            self.engine.usable(state)
            steps: Plan = []
            if plan.ready(self.options, state):
                steps = self._steps(state)
                self.verify(steps)
            return Decision(steps), public.facts(self.options, state)

        outcome = self.engine.rounds(decide, self.run, check=self.check)
        outcome = self.finish(outcome, state)
        if not state.made:
            outcome.warnings.append("There is no master key yet: the server must be started with the keystore's settings first.")
        outcome.facts.update(
            {
                "master_key": self.master_key_words(state.key),
                "age_days": plan.age_days(state.key, self.today),
            }
        )
        return outcome

    def _steps(self, state: look.State) -> Plan:
        wish = self.wish
        steps = plan.master_key(self.options, state, self.credential())
        if steps or wish.state != "rotated":
            return steps
        entries = Journal(self.request.state.journal).entries()
        steps = plan.rotation(
            self.options,
            state,
            tag=wish.tag,
            max_age=wish.max_age,
            tags=look.tags(entries, self.request.cluster),
            today=self.today,
        )
        if steps and self.options.keystore != PLUGIN and self.wished is None:
            raise TdeError("credential_missing", f"the rotation needs the {self.engine.secret_kind()}", obj="master key")
        return steps
