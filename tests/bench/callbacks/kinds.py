# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What kinds of tasks a playbook ran, for a playbook that does nothing in as many."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: kinds
type: aggregate
short_description: writes the kinds of tasks to the file that the environment's BENCH_KINDS names
description: One list a play, of module (it ran on the target), controller and skipped; and the names of the tasks that changed something.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "kinds"

    def __init__(self) -> None:
        super().__init__()
        self.plays: list[list[str]] = []
        self.changed: list[str] = []

    def v2_playbook_on_play_start(self, play: t.Any) -> None:
        self.plays.append([])

    def v2_runner_on_ok(self, result: t.Any) -> None:
        if result._result.get("changed"):
            self.changed.append(result._task.get_name())
        if not result._task.action.endswith("gather_facts"):
            # A module's answer repeats its options; what the controller does by itself has none.
            self.plays[-1].append("module" if "invocation" in result._result else "controller")

    def v2_runner_on_skipped(self, result: t.Any) -> None:
        self.plays[-1].append("skipped")

    def v2_playbook_on_stats(self, stats: t.Any) -> None:
        Path(os.environ["BENCH_KINDS"]).write_text(json.dumps({"plays": self.plays, "changed": self.changed}))
