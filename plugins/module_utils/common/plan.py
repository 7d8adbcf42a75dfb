# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Decide, then act: a plan is a list of steps as plain data; a runner carries them out one by one."""

from __future__ import annotations

import dataclasses
import typing as t

from .errors import TdeError


@dataclasses.dataclass(frozen=True)
class Step:
    """One act.

    :param action: what is done, in snake case; names the runner's handler.
    :param obj: the object acted on, in words, as the user reads it.
    :param why: why it is needed, one clause.
    :param data: public facts that the handler needs. Never a secret: check mode prints them.
    """

    action: str
    obj: str
    why: str = ""
    data: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)

    def public(self) -> dict[str, t.Any]:
        """The step as check mode prints it."""
        return {"action": self.action, "object": self.obj, "why": self.why}


Plan = t.List[Step]

Handlers = t.Mapping[str, t.Callable[[Step], None]]


def run(plan: Plan, handlers: Handlers, done: t.Callable[[Step], None] | None = None) -> None:
    """Carry out a plan in order.

    :param handlers: one callable an action; looked up for the whole plan before the first act.
    :param done: called after each step (progress, journal).
    :raises TdeError: what a step raised, saying which steps were done before it.
    """
    acts = [(step, handlers[step.action]) for step in plan]
    finished: list[str] = []
    try:
        for step, act in acts:
            act(step)
            finished.append(step.action)
            if done:
                done(step)
    except TdeError as error:
        error.after(finished)
        raise


def public(plan: Plan) -> list[dict[str, t.Any]]:
    """The plan as a module returns it."""
    return [step.public() for step in plan]
