#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kmip_key
short_description: Create, activate, revoke and destroy keys at a KMIP server
version_added: 0.1.0
description:
  - Brings a list of AES keys at a key management service to the wished states, over one connection.
  - A key is found by its name. KMIP servers may have several keys of one name; then the task fails and names their identifiers, and
    O(keys[].id) names the one that is meant.
  - Every step for every key is planned before the first is taken.
  - Nothing is created twice. One run of a target creates keys at a time, and a run that meets another host's key of the same name and moment
    takes back its own. A request whose answer is lost is not repeated; the next run looks first.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  keys:
    description: The keys.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The key's name. It is never changed.
        type: str
        required: true
      id:
        description: The server's unique identifier of an existing key, where several have one name.
        type: str
      state:
        description: The state wished for. There is no way back from a later one to an earlier one.
        type: str
        choices:
          present: The key is there, in whatever state; a new one is pre-active, which nothing can use yet.
          active: The key is there and can be used.
          deactivated: The key protects nothing new any more.
          compromised: The key is no longer trusted.
          absent: The key is destroyed, which needs O(keys[].confirm_destroy). An active one is deactivated first.
        default: active
      length:
        description: Length of the AES key in bits.
        type: int
        choices: [128, 192, 256]
        default: 256
      usage:
        description:
          - What the key may be used for. A new one may encrypt and decrypt, if this is not given.
          - An existing key must have exactly this usage, any if this is not given.
        type: list
        elements: str
        choices: [encrypt, decrypt, wrap_key, unwrap_key, mac_generate, mac_verify, sign, verify, derive_key, export]
      confirm_destroy:
        description: Must be the key's name for it to be destroyed. What it encrypted can never be read again.
        type: str
      replace_lost:
        description:
          - The key that the target remembers is lost for good. With another O(keys[].state) than V(absent) another is made, with V(absent)
            it is forgotten.
        type: bool
        default: false
extends_documentation_fragment:
  - hsm.tde.kmip
  - hsm.tde.state
attributes:
  check_mode:
    description: Asks the server, returns the plan and changes nothing.
    support: full
  diff_mode:
    description: Shows the keys' states before and after.
    support: full
seealso:
  - module: hsm.tde.kmip_key_info
  - module: hsm.tde.tde_keystore
"""

EXAMPLES = r"""
- name: A key of an application, ready for use
  hsm.tde.kmip_key:
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    keys:
      - name: app-data

- name: Deactivate what was replaced
  hsm.tde.kmip_key:
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    keys:
      - name: app-data-2025
        state: deactivated

- name: Destroy one of two keys of one name
  hsm.tde.kmip_key:
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    keys:
      - name: app-data
        id: 5b1c2f86-40b1-4c36-9a06-0c9d3c9a2f11
        state: absent
        confirm_destroy: app-data
"""

RETURN = r"""
kmip_keys:
  description:
    - The keys that are there at the end, in check mode those that are there now, in the order of the list.
    - What the server does not tell is null.
  returned: success
  type: list
  elements: dict
  sample:
    - id: "17"
      name: app-data
      names: [app-data]
      type: symmetric_key
      algorithm: aes
      length: 256
      usage: [encrypt, decrypt]
      state: active
      created: "2026-11-22T01:54:33+00:00"
      activated: null
      deactivated: null
      compromised: null
      destroyed: null
      changed: null
      sensitive: false
      extractable: null
      groups: []
      policy: default
server:
  description: The server that answered, null if none was asked.
  returned: success
  type: str
  sample: kms1.example.com
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: create_key
    object:
      description: The key.
      type: str
      sample: key 'app-data'
    why:
      description: Why it is needed.
      type: str
      sample: the server has no such aes 256 key
"""

import os
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.options import kmip_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import NAME, StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines.userside import is_published
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import describe_secrets
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.plugins.module_utils.kmip.kek import SERIAL
from ansible_collections.hsm.tde.plugins.module_utils.kmip.keylist import KeyList, Wish
from ansible_collections.hsm.tde.plugins.module_utils.kmip.keys import Spec
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry

SPEC = {
    "keys": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "no_log": False,
        "options": {
            "name": {"type": "str", "required": True},
            "id": {"type": "str"},
            "state": {
                "type": "str",
                "choices": ["present", "active", "deactivated", "compromised", "absent"],
                "default": "active",
            },
            "length": {"type": "int", "choices": [128, 192, 256], "default": 256},
            "usage": {
                "type": "list",
                "elements": "str",
                "choices": [
                    "encrypt",
                    "decrypt",
                    "wrap_key",
                    "unwrap_key",
                    "mac_generate",
                    "mac_verify",
                    "sign",
                    "verify",
                    "derive_key",
                    "export",
                ],
            },
            "confirm_destroy": {"type": "str"},
            "replace_lost": {"type": "bool", "default": False},
        },
    },
    **kmip_options(),
}


def keyslots_at(state: StateDirectory, service: str) -> dict[str, list[str]]:
    """The keys at a service that keyslots of this host's keystores and wrapped secrets name, by id.

    A keystore or secret that cannot be read is an error: then nobody can say that a key is not needed. What a database's own
    user keeps, root does not read: every master key that was made for it counts as needed.
    """
    store = os.path.join(state.path, "store")
    clusters = sorted(name for name in (os.listdir(store) if os.path.isdir(store) else []) if NAME.fullmatch(name))
    wrapped = [
        (slot, f"data key {key['key_id']} of cluster {cluster}")
        for cluster in clusters
        for key in KeyStore(state, cluster).describe()
        for slot in key["keyslots"]
    ]
    wrapped += [(slot, f"wrapped secret {secret['path']}") for secret in describe_secrets(state) for slot in secret["keyslots"]]
    uses: dict[str, list[str]] = {}
    for slot, obj in wrapped:
        if slot["kmip_service"] == service:
            uses.setdefault(slot["kek_id"], []).append(f"keyslot {slot['name']} of {obj}")
    registry = Registry(state)
    for row in registry.keys():  # noqa: SIM118 - a list, not a mapping
        if row["cluster"] and registry.is_in(row, service, SERIAL) and is_published(state, row["cluster"]):
            uses.setdefault(row["id"], []).append(f"the secret of cluster {row['cluster']}")
    return uses


def wish_of(item: t.Mapping[str, t.Any]) -> Wish:
    """One item of the option ``keys``."""
    if not item["name"].strip() or not item["name"].isprintable():
        raise TdeError("invalid_option", "must be printable and not empty", obj="option name of a key")
    spec = Spec(item["name"], length=item["length"])
    return Wish(
        spec=spec._replace(usage=tuple(item["usage"])) if item["usage"] else spec,
        state=item["state"],
        id=item["id"],
        usage_given=item["usage"] is not None,
        confirm_destroy=item["confirm_destroy"],
        replace_lost=item["replace_lost"],
    )


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the keys to the wished states; the result as RETURN says."""
    params = module.params
    state = StateDirectory(params["state_directory"])
    wishes = [wish_of(item) for item in params["keys"]]
    access = kmip_access(params)
    if access is None:
        raise TdeError("invalid_option", "no server is named", obj="option kmip_servers")
    with Client(access) as client:
        outcome = KeyList(client, state, wishes, keyslots_at(state, access.service), check=module.check_mode).outcome()
        server = client.server if wishes else None
    return {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "kmip_keys": outcome.keys,
        "server": server,
        "diff": {"before": outcome.before, "after": outcome.after},
    }


def main() -> None:
    run_module(act, SPEC, libraries=("kmip", "cryptography"))


if __name__ == "__main__":
    main()
