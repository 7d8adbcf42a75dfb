#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nshield_client
short_description: A client of an nShield Security World, its settings and its copy of the keys
version_added: 0.1.0
description:
  - Sets variables of nShield's PKCS#11 library in C(cknfastrc). Where a process has the same variable in its environment, that one
    counts. O(processes_of) looks for such processes.
  - Says whether the hardserver answers.
  - Distributes the Security World's files, which are the keys, between the clients of a world - by a remote file system (RFS) with
    C(rfs-setup) and C(rfs-sync), or by a common store, which is only looked at.
  - Remembers what changed on this client, and which other clients have not got it. A key that another client cannot see yet makes
    its transactions fail, so keys are distributed before they are used.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  variables:
    description: Variables of C(cknfastrc). Those that are not named stay as they are.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: >-
          The variable, such as C(CKNFAST_LOADSHARING) (softcards need V(1)), C(CKNFAST_ASSUME_SINGLE_PROCESS) (V(0) makes keys that
          others made visible without a reconnect, at the cost of a scan at each use) or C(CKNFAST_NO_ACCELERATOR_SLOTS) (V(1) hides
          the slot that a mistyped credential falls to).
        type: str
        required: true
      setting:
        description: Its value. Needed for O(variables[].state=present).
        type: str
      state:
        description: Whether it is in the file.
        type: str
        choices:
          present: It is there, with this value.
          absent: It is not there.
        default: present
  processes_of:
    description: Users, such as the database's, in whose processes' environments the library's variables are looked for.
    type: list
    elements: str
    default: []
  distribution:
    description: How the Security World's files get to the other clients.
    type: dict
    suboptions:
      kind:
        description: The way.
        type: str
        required: true
        choices:
          rfs_server: This host has the remote file system.
          rfs_client: This host is a client of a remote file system.
          common_store: All clients have the folder on one store. It is only checked that it lies there and is mounted.
      address:
        description: Address of the remote file system, for a client.
        type: str
      port:
        description: Its port.
        type: int
        default: 9004
      authenticate:
        description: Whether the two sides know each other by the hardservers' keys (KNETI). The vendor recommends it.
        type: bool
        default: true
      key_hash:
        description: Hash of the other side's KNETI key, for O(distribution.authenticate).
        type: str
      esn:
        description: Electronic serial number of the module that holds that key, where one does.
        type: str
      gang_clients:
        description: Addresses of the clients that a remote file system lets in.
        type: list
        elements: str
        default: []
      sync:
        description: What is done with the files now.
        type: str
        choices:
          none: Nothing.
          commit: What changed on this client goes to the remote file system.
          update: What changed there comes to this client.
        default: none
      store:
        description: Mount point of the common store.
        type: path
  clients:
    description: The other clients of this Security World, by any name. They are remembered.
    type: list
    elements: str
  supplied:
    description: Other clients that have this client's copy of the world by now, as their RV(world_digest) shows.
    type: list
    elements: str
    default: []
  world_digest:
    description: The RV(world_digest) that this client must have; it fails with V(nshield_client_behind) if it has another.
    type: str
extends_documentation_fragment:
  - hsm.tde.nshield
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. What an update would bring cannot be told before it.
    support: full
  diff_mode:
    description: Shows variables, the copy's digest and the clients that lag behind.
    support: full
seealso:
  - module: hsm.tde.nshield_info
"""

EXAMPLES = r"""
- name: Softcards, new keys without a reconnect, no way for a mistyped credential
  hsm.tde.nshield_client:
    variables:
      - {name: CKNFAST_LOADSHARING, setting: "1"}
      - {name: CKNFAST_ASSUME_SINGLE_PROCESS, setting: "0"}
      - {name: CKNFAST_NO_ACCELERATOR_SLOTS, setting: "1"}
    processes_of: [oracle]

- name: Give the new keys to the remote file system
  hsm.tde.nshield_client:
    distribution: {kind: rfs_client, address: rfs.example.com, key_hash: "{{ rfs_kneti_hash }}", sync: commit}
    clients: [db2.example.com]
  register: first

- name: Fetch them on the other client, and see that it has them
  hsm.tde.nshield_client:
    distribution: {kind: rfs_client, address: rfs.example.com, key_hash: "{{ rfs_kneti_hash }}", sync: update}
    world_digest: "{{ first.world_digest }}"
  delegate_to: db2.example.com

- name: It has got them
  hsm.tde.nshield_client:
    supplied: [db2.example.com]
"""

RETURN = r"""
variables:
  description: All variables of C(cknfastrc).
  returned: success
  type: dict
  sample: {CKNFAST_LOADSHARING: '1'}
overridden:
  description: Processes whose environment has another value than the file. The environment wins.
  returned: success
  type: list
  elements: dict
  contains:
    user:
      description: Whose processes.
      type: str
      sample: oracle
    variable:
      description: The variable.
      type: str
      sample: CKNFAST_LOADSHARING
    file:
      description: Its value in the file, null if it is not there.
      type: str
      sample: '1'
    environment:
      description: The value that counts.
      type: str
      sample: '0'
    processes:
      description: Process ids.
      type: list
      elements: int
      sample: [4711]
restart_required:
  description: Whether variables changed. Applications read them at their start only.
  returned: success
  type: bool
  sample: false
hardserver:
  description: Whether the hardserver answers.
  returned: success
  type: dict
  contains:
    running:
      description: Whether it answers.
      type: bool
      sample: true
    message:
      description: Why not, empty if it does.
      type: str
      sample: ''
world_digest:
  description: A digest of this client's copy of the Security World, equal on clients with equal copies. Null without a world.
  returned: success
  type: str
  sample: 4c0b2a1d5d3f6a2d93d9e1c2b7a8f0e94c0b2a1d5d3f6a2d93d9e1c2b7a8f0e9
clients_behind:
  description: >-
    Other clients that have not got everything that changed on this one, by what this collection did here and by the files of the
    Security World, which tell of keys that a database made.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The client.
      type: str
      sample: db2.example.com
    needs:
      description: What changed since it was supplied, in sentences.
      type: list
      elements: str
      sample: ['2026-03-12T08:15:00+00:00: softcard oracle-tde was made']
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: write_variables
    object:
      description: What it is done to.
      type: str
      sample: /opt/nfast/cknfastrc
    why:
      description: Why it is needed.
      type: str
      sample: variables are others than wished
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_client
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import Nshield, nshield_options


def _wish(params: dict[str, t.Any]) -> nshield_client.ClientWish:
    way = params["distribution"]
    return nshield_client.ClientWish(
        variables={item["name"]: item["setting"] if item["state"] == "present" else None for item in params["variables"]},
        distribution=nshield_client.Distribution(**{**way, "gang_clients": tuple(way["gang_clients"])}) if way else None,
        clients=tuple(params["clients"]) if params["clients"] is not None else None,
        supplied=tuple(params["supplied"]),
        digest=params["world_digest"],
        processes_of=tuple(params["processes_of"]),
    )


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the client to the wished state; the result as RETURN says."""
    outcome = nshield_client.configure(
        Nshield.of_options(module.params),
        _wish(module.params),
        StateDirectory(module.params["state_directory"]),
        check_mode=module.check_mode,
    )
    for warning in outcome.warnings:
        module.warn(warning)
    return {
        "changed": outcome.changed,
        "variables": outcome.variables,
        "overridden": outcome.overridden,
        "restart_required": outcome.restart_required,
        "hardserver": {"running": outcome.hardserver is None, "message": outcome.hardserver or ""},
        "world_digest": outcome.digest,
        "clients_behind": outcome.behind,
        "plan": planning.public(outcome.plan),
        "diff": {"before": outcome.before, "after": outcome.after},
    }


def main() -> None:
    run_module(
        act,
        {
            "variables": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "setting": {"type": "str"},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                },
                "required_if": [("state", "present", ["setting"])],
            },
            "processes_of": {"type": "list", "elements": "str", "default": []},
            "distribution": {
                "type": "dict",
                "options": {
                    "kind": {"type": "str", "required": True, "choices": ["rfs_server", "rfs_client", "common_store"]},
                    "address": {"type": "str"},
                    "port": {"type": "int", "default": nshield_client.RFS_PORT},
                    "authenticate": {"type": "bool", "default": True},
                    "key_hash": {"type": "str", "no_log": False},
                    "esn": {"type": "str"},
                    "gang_clients": {"type": "list", "elements": "str", "default": []},
                    "sync": {"type": "str", "choices": ["none", "commit", "update"], "default": "none"},
                    "store": {"type": "path"},
                },
                "required_if": [("kind", "rfs_client", ["address"]), ("kind", "common_store", ["store"])],
            },
            "clients": {"type": "list", "elements": "str"},
            "supplied": {"type": "list", "elements": "str", "default": []},
            "world_digest": {"type": "str"},
            **nshield_options(),
        },
    )


if __name__ == "__main__":
    main()
