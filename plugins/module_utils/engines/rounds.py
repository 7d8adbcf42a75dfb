# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Look, decide, act, and look again, until nothing is left that can be done."""

from __future__ import annotations

import dataclasses
import typing as t

from ..common.errors import TdeError
from ..common.plan import Plan
from .base import Outcome

#: Times that a plan is made and carried out before a run gives up: mounting shows what was hidden, a table is created while its
#: schema moves, a connection comes into a database that was to move whole.
ROUNDS = 6

Facts = t.Dict[str, t.Any]


@dataclasses.dataclass
class Decision:
    """What a look led to.

    :param now: steps that can be done; :param later: those that need the server, or its restart, first.
    :param restart: why the server must be restarted, a sentence each; empty if it need not.
    """

    now: Plan
    later: Plan = dataclasses.field(default_factory=list)
    restart: list[str] = dataclasses.field(default_factory=list)


def rounds(
    cluster: str,
    decide: t.Callable[[], tuple[Decision, Facts]],
    run: t.Callable[[Plan], Plan],
    expected: t.Callable[[Facts, Plan], Facts],
    *,
    check: bool,
) -> Outcome:
    """Bring a cluster to the wish, or in check mode tell what would.

    :param decide: looks, and gives what is to be done and the public facts; raises before anything is done.
    :param run: carries a plan out, or as much of it as can be done before another look, and says how much.
    :param expected: the public facts after a plan, as far as it tells them.
    :returns: the outcome, ``restart_required`` among its facts.
    :raises TdeError: ``unfinished``, and what looking and acting raise, with the steps that were done.
    """
    decision, before = decide()
    if check:
        steps = [*decision.now, *decision.later]
        return _told(Outcome(steps, before, expected(before, steps)), decision)
    done: Plan = []
    after = before
    for dummy in range(ROUNDS):
        if not decision.now:
            return _told(Outcome(done, before, after), decision)
        try:
            done += run(decision.now)
            decision, after = decide()
        except TdeError as error:
            error.after([step.action for step in done])
            raise
    if decision.now:
        raise TdeError(
            "unfinished",
            f"{ROUNDS} rounds were made, and there is still to do: {decision.now[0].obj} ({decision.now[0].action})",
            obj=f"cluster {cluster}",
            kept="What was done stays done.",
            next_step="Run again; run with --check to see what is left.",
        )
    return _told(Outcome(done, before, after), decision)


def _told(outcome: Outcome, decision: Decision) -> Outcome:
    outcome.facts["restart_required"] = bool(decision.restart)
    if decision.restart:
        left = f" Left for then: {len(decision.later)}, the first one {decision.later[0].obj}." if decision.later else ""
        outcome.warnings.append(f"The server must be restarted. {' '.join(decision.restart)}{left} Then run this again.")
    return outcome
