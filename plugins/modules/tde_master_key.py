#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_master_key
short_description: Set or rotate the master key of a cluster
version_added: 0.1.0
description:
  - A cluster's master key (KEK) lies in the token, not extractable, or at a KMIP server, and wraps every data key of the cluster.
  - A rotation makes a new one and wraps every data key under it, one at a time. The new keyslot is added, proved, then the old one is
    removed. Data is not encrypted anew and the server runs on without a restart.
  - The former master key stays there, since older copies of the store need it.
  - A rotation that was interrupted is finished by the next run, whatever its O(state).
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.database
  - hsm.tde.kmip
  - hsm.tde.pkcs11
  - hsm.tde.state
options:
  state:
    description: The wished state.
    type: str
    choices:
      present: The cluster has a master key.
      rotated: It is the one of O(tag), or not older than O(max_age).
    default: present
  tag:
    description:
      - Names the new master key, whose label becomes C(hsm-tde.CLUSTER.TAG). With the tag of the current one nothing changes.
      - The tag of a former one is refused.
    type: str
  max_age:
    description: Cryptoperiod in days. An older master key is replaced by one whose tag is the day of the run, as C(YYYYMMDD) in UTC.
    type: int
  keyslot:
    description: The keyslot whose master key is meant. One under a passphrase has none; change the passphrase with M(hsm.tde.tde_keystore).
    type: str
    default: primary
attributes:
  check_mode:
    description: Returns the plan and changes nothing. It logs in to the token, which spends a try if the PIN is wrong.
    support: full
  diff_mode:
    description: Shows public facts before and after, in check mode as the plan expects them.
    support: full
seealso:
  - module: hsm.tde.tde_keystore
"""

EXAMPLES = r"""
- name: Rotate the master key
  hsm.tde.tde_master_key:
    engine: postgresql
    cluster: main
    state: rotated
    tag: "2"
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"

- name: Rotate it when it is older than a year
  hsm.tde.tde_master_key:
    engine: postgresql
    cluster: main
    state: rotated
    max_age: 365
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
"""

RETURN = r"""
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: add_keyslot
    object:
      description: What it is done to.
      type: str
      sample: keyslot primary of data key cluster
    why:
      description: Why it is needed.
      type: str
      sample: is under hsm-tde.main in token demo
cluster:
  description: The cluster's name.
  returned: success
  type: str
  sample: main
master_key:
  description:
    - Label of the current master key. With O(engine=fep) the server tells its name to nobody, and this is made of cluster and tag,
      but with a plugin.
  returned: success
  type: str
  sample: hsm-tde.main.2
age_days:
  description: Its age. Null where this host did not set it.
  returned: success
  type: int
  sample: 0
data_keys:
  description: The data keys by name, each with its check value and, by name, what its keyslots are under.
  returned: success
  type: dict
  sample:
    cluster:
      check_value: 8699c2c53707405da5aba5ae4d8583c0
      keyslots:
        primary: hsm-tde.main.2 in token demo
        recovery: passphrase
restart_required:
  description: Whether the server must be restarted for it.
  returned: success
  type: bool
  sample: false
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options, load
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import master_key_wish, request

SPEC: dict[str, t.Any] = {
    **database_options(),
    "state": {"type": "str", "choices": ["present", "rotated"], "default": "present"},
    "tag": {"type": "str"},
    "max_age": {"type": "int"},
    "keyslot": {"type": "str", "default": "primary", "no_log": False},
}


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the master key to the wished state; the result as RETURN says."""
    engine = load(module.params["engine"])(request(module.params))
    wish = master_key_wish(module.params)
    engine.require("rotate")
    result = engine.master_key(wish, check=module.check_mode).result()
    for warning in result.pop("warnings"):
        module.warn(warning)
    return result


def main() -> None:
    run_module(act, SPEC, libraries=("cryptography", "pkcs11", "psycopg"), mutually_exclusive=[("tag", "max_age")])


if __name__ == "__main__":
    main()
