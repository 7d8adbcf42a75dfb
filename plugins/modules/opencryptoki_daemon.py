#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: opencryptoki_daemon
short_description: Start, stop or restart openCryptoki's daemon pkcsslotd, under systemd or without it
version_added: 0.1.0
description:
  - Sees to it that exactly one C(pkcsslotd) serves the host. A second one would take the first one's socket away, and programs
    that are connected to the first one would count their sessions alone.
  - Where systemd runs and has the service, it is the one that starts and stops it; elsewhere the daemon is started as it is.
  - A restart, or a stop, takes the daemon from under the programs that use openCryptoki. It is refused while there are any,
    unless O(force) is set.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  state:
    description: What the daemon shall be.
    type: str
    choices:
      started: One daemon runs. Two of them, or one beside the system's service, are an error.
      restarted: All that run are ended and one is started, on each run, unless O(only_if_required) is set.
      stopped: None runs.
    default: started
  only_if_required:
    description:
      - With O(state=restarted), restart only if C(opencryptoki.conf) was written after the daemon's start, or if not exactly the
        one daemon runs that should. Otherwise it is left alone, or started.
    type: bool
    default: false
  force:
    description: Stop or restart it although programs use openCryptoki. They have to be restarted afterwards.
    type: bool
    default: false
extends_documentation_fragment:
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing.
    support: full
  diff_mode:
    description: Shows the daemon before and after.
    support: full
seealso:
  - module: hsm.tde.opencryptoki_config
  - module: hsm.tde.opencryptoki_info
"""

EXAMPLES = r"""
- name: One daemon runs
  hsm.tde.opencryptoki_daemon:

- name: The daemon reads a changed configuration
  hsm.tde.opencryptoki_daemon:
    state: restarted
    only_if_required: true
"""

RETURN = r"""
daemon:
  description: The daemon after the run.
  returned: success
  type: dict
  contains:
    running:
      description: Whether at least one serves this host.
      type: bool
      sample: true
    pids:
      description: The process ids of all that do.
      type: list
      elements: int
      sample: [812]
    systemd:
      description: Whether systemd runs here and has the service.
      type: bool
      sample: true
    of_the_unit:
      description: Whether the one that runs is the service's.
      type: bool
      sample: true
programs:
  description: Programs that used the library when the run began.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: Process id.
      type: int
      sample: 4711
    name:
      description: Its name.
      type: str
      sample: postgres
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: start_daemon
    object:
      description: The daemon.
      type: str
      sample: pkcsslotd
    why:
      description: Why it is needed.
      type: str
      sample: it does not run
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import state_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_daemon


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the daemon to the wished state; the result as RETURN says."""
    params = module.params
    outcome = opencryptoki_daemon.ensure(
        params["state"],
        StateDirectory(params["state_directory"]),
        when_stale=params["only_if_required"],
        force=params["force"],
        check_mode=module.check_mode,
    )
    return {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "daemon": outcome.after.public(),
        "programs": [{"pid": pid, "name": name} for pid, name in outcome.programs],
        "diff": {"before": outcome.before.public(), "after": outcome.after.public()},
    }


def main() -> None:
    run_module(
        act,
        {
            "state": {"type": "str", "choices": ["started", "restarted", "stopped"], "default": "started"},
            "only_if_required": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
            **state_options(),
        },
        libraries=("pkcs11",),
    )


if __name__ == "__main__":
    main()
