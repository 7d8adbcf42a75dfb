#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: opencryptoki_token_copy
short_description: Bring an openCryptoki token from a primary to a standby, unreadable on its way
version_added: 0.1.0
description:
  - A standby needs the token's keys before it needs them for real. Tokens of openCryptoki are folders of files; those of EP11 and
    CCA tokens hold keys wrapped by the adapter, which opens them on the standby if its master keys are the same.
  - In a soft token's folder, the master key lies under a PIN of at most eight bytes. Whoever has the folder has the keys. So the standby
    makes a key pair, the primary encrypts the folder for its public key, and the controller carries what it cannot read.
  - On the standby the folder is replaced in one step, its group is that of the slot, owners are kept by name, and the token's
    segment of shared memory is removed, so that the next program reads the new files.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  state:
    description: Which of the three acts.
    type: str
    required: true
    choices:
      requested: On the standby. Makes its key pair once, and returns the public key and the digest of the token that it has.
      packed: On the primary. Returns the token's folder, encrypted for O(recipient). Changes nothing.
      installed: On the standby. Puts the folder of O(archive) in place, if it differs from the one that is there.
  slot:
    description: The slot's number in C(opencryptoki.conf), the same token folder on both hosts.
    type: int
    required: true
  recipient:
    description: The standby's public key, with O(state=packed).
    type: str
  archive:
    description: What the primary returned, with O(state=installed). Not a secret, but long.
    type: str
  replace:
    description:
      - With O(state=installed), destroy keys that the standby's token has and the primary's has not.
      - Without it, such a token is refused, unless it is as it was installed last.
    type: bool
    default: false
extends_documentation_fragment:
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. V(packed) packs in check mode too, so that V(installed) can compare.
    support: full
  diff_mode:
    description: Shows the digest of the token's folder before and after.
    support: full
seealso:
  - module: hsm.tde.opencryptoki_config
"""

EXAMPLES = r"""
- name: The standby shows its public key
  hsm.tde.opencryptoki_token_copy:
    state: requested
    slot: 3
  register: standby

- name: The primary packs the token for it
  hsm.tde.opencryptoki_token_copy:
    state: packed
    slot: 3
    recipient: "{{ standby.public_key }}"
  delegate_to: db1
  register: primary

- name: The standby has the token
  hsm.tde.opencryptoki_token_copy:
    state: installed
    slot: 3
    archive: "{{ primary.archive }}"
"""

RETURN = r"""
folder:
  description: The name of the token's folder.
  returned: success
  type: str
  sample: swtok
digest:
  description: SHA-256 of the folder's content after the run, empty if it holds no token. Equal on two hosts with the same token.
  returned: success
  type: str
  sample: 3f79bb7b435b05321651daefd374cdc681dc06faa65e374e38337b88ca046dea
public_key:
  description: The standby's public key; empty in check mode, if it has none yet.
  returned: with O(state=requested)
  type: str
  sample: 5Q1vBzOvB3a5mM0lqT1o7c3yV8b2m4n1o9p8q7r6s5Y=
archive:
  description: The folder, encrypted for the standby.
  returned: with O(state=packed)
  type: str
  sample: '{"hsm_tde_token": 1, "folder": "swtok"}'
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: install_token
    object:
      description: The folder or the key.
      type: str
      sample: token folder /var/lib/opencryptoki/swtok
    why:
      description: Why it is needed.
      type: str
      sample: it differs from the primary's
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import state_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_copy


def act(module: TdeModule) -> dict[str, t.Any]:
    """One of the three acts; the result as RETURN says."""
    params = module.params
    state, check = StateDirectory(params["state_directory"]), module.check_mode
    result: dict[str, t.Any] = {}
    if params["state"] == "requested":
        outcome = opencryptoki_copy.request(params["slot"], state, check_mode=check)
        result["public_key"] = outcome.public_key
    elif params["state"] == "packed":
        outcome = opencryptoki_copy.pack(params["slot"], params["recipient"], state, check_mode=check)
        result["archive"] = outcome.archive
    else:
        replace = params["replace"]
        outcome = opencryptoki_copy.install(params["slot"], params["archive"], state, replace=replace, check_mode=check)
    return {
        **result,
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "folder": outcome.folder,
        "digest": outcome.digest,
        "diff": {"before": {"digest": outcome.former}, "after": {"digest": outcome.digest}},
    }


def main() -> None:
    run_module(
        act,
        {
            "state": {"type": "str", "required": True, "choices": ["requested", "packed", "installed"]},
            "slot": {"type": "int", "required": True},
            "recipient": {"type": "str"},
            # Kept out of the system's log, for its length.
            "archive": {"type": "str", "no_log": True},
            "replace": {"type": "bool", "default": False},
            **state_options(),
        },
        libraries=("cryptography", "pkcs11"),
        required_if=[("state", "packed", ["recipient"]), ("state", "installed", ["archive"])],
    )


if __name__ == "__main__":
    main()
