#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nshield_softcard
short_description: An nShield softcard and its passphrase
version_added: 0.1.0
description:
  - Makes a softcard with C(ppmk), or gives an existing one another passphrase. Passphrases are typed at the command's prompt on a
    terminal of its own, and are nowhere else.
  - Which passphrase a softcard has is found by C(ppmk --check), which changes nothing; nShield counts no wrong tries.
  - A name or passphrase that Oracle would not take is refused before anything is made. Oracle takes a credential that the HSM's
    library does not recognise for a module passphrase, without a word.
  - Other clients of the Security World go on with the old passphrase until they have the softcard's new file. See
    M(hsm.tde.nshield_client).
author:
  - The hsm.tde authors (@hsm-tde)
options:
  name:
    description: The softcard's name. Names can repeat; then give O(hash). One of the two is needed.
    type: str
  hash:
    description: The hash of an existing softcard, as M(hsm.tde.nshield_info) shows it.
    type: str
  passphrase:
    description: The passphrase that the softcard shall have. Always in quotes.
    type: str
    required: true
  old_passphrase:
    description: The passphrase that it has, to change it.
    type: str
  acs_passphrase:
    description:
      - The passphrase of the administrator cards. A FIPS 140 level 3 Security World asks for an operator card, which needs none, or for
        administrator cards in slots.
    type: str
  recoverable:
    description: Whether a new softcard is made so that the administrator cards can replace its passphrase.
    type: bool
    default: false
  rules:
    description: Which rules name and passphrase must obey.
    type: str
    choices:
      oracle: Those of Oracle's credential, 30 characters for passphrase, separator and name together, and fewer symbols.
      nshield: Those of nShield alone, 254 characters each.
    default: oracle
extends_documentation_fragment:
  - hsm.tde.nshield
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. Passphrases are tried with C(ppmk --check).
    support: full
  diff_mode:
    description: Shows the softcard's public facts; never a passphrase.
    support: full
seealso:
  - module: hsm.tde.nshield_info
  - module: hsm.tde.nshield_key_protection
"""

EXAMPLES = r"""
- name: A softcard for the database
  hsm.tde.nshield_softcard:
    name: oracle-tde
    passphrase: "{{ vault_softcard_passphrase }}"

- name: Another passphrase for it
  hsm.tde.nshield_softcard:
    name: oracle-tde
    passphrase: "{{ vault_softcard_passphrase }}"
    old_passphrase: "{{ vault_softcard_passphrase_before }}"
"""

RETURN = r"""
softcard:
  description: The softcard; null in check mode where it would be made.
  returned: success
  type: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: oracle-tde
    hash:
      description: Its hash, by which it is known.
      type: str
      sample: aa6bfaa5f222407b10fea9b30b68129d6fb7a3e4
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done - V(create_softcard) or V(change_softcard_passphrase).
      type: str
      sample: create_softcard
    object:
      description: The softcard.
      type: str
      sample: softcard oracle-tde
    why:
      description: Why it is needed.
      type: str
      sample: there is none of that name
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.check import established
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_cards
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import Nshield, nshield_options


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the softcard to the wished state; the result as RETURN says."""
    params = module.params
    wish = nshield_cards.SoftcardWish(
        name=params["name"],
        hash=params["hash"],
        passphrase=established(secret_from_option("passphrase", params["passphrase"]), "passphrase"),
        old_passphrase=secret_from_option("old_passphrase", params["old_passphrase"]),
        acs_passphrase=secret_from_option("acs_passphrase", params["acs_passphrase"]),
        recoverable=params["recoverable"],
        rules=params["rules"],
    )
    outcome = nshield_cards.softcard(
        Nshield.of_options(params), wish, StateDirectory(params["state_directory"]), check_mode=module.check_mode
    )
    found = outcome.softcard
    shown = {"name": found.name, "hash": found.hash} if found else None
    made = any(step.action == "create_softcard" for step in outcome.plan)
    changed = any(step.action == "change_softcard_passphrase" for step in outcome.plan)
    after = {"name": params["name"] or (found.name if found else None), "hash": found.hash if found else None}
    return {
        "changed": bool(outcome.plan),
        "softcard": shown,
        "plan": planning.public(outcome.plan),
        "diff": {
            "before": {} if made else {**after, **({"passphrase": "the old one"} if changed else {})},
            "after": {**after, **({"passphrase": "the new one"} if changed else {})},
        },
    }


def main() -> None:
    run_module(
        act,
        {
            "name": {"type": "str"},
            "hash": {"type": "str"},
            "passphrase": {"type": "str", "required": True, "no_log": True},
            "old_passphrase": {"type": "str", "no_log": True},
            "acs_passphrase": {"type": "str", "no_log": True},
            "recoverable": {"type": "bool", "default": False},
            "rules": {"type": "str", "choices": ["oracle", "nshield"], "default": "oracle"},
            **nshield_options(),
        },
        required_one_of=[("name", "hash")],
    )


if __name__ == "__main__":
    main()
