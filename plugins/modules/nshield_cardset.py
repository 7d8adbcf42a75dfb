#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nshield_cardset
short_description: The passphrase of the cards of an nShield operator card set
version_added: 0.1.0
description:
  - Gives each card of an operator card set (OCS) that is in a slot the same passphrase, with C(cardpp). Passphrases are typed at
    the command's prompt on a terminal of its own, and are nowhere else.
  - A database opens its keystore after an outage by itself only if all cards of the set have one passphrase. Cards that are in no
    slot are in RV(unseen); a person puts each into a slot and runs the task again.
  - In a FIPS 140 level 3 Security World changing a card's passphrase needs an administrator card in a slot, and O(acs_passphrase).
  - Card sets are made by a person, with C(createocs); there are cards to be put in.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  name:
    description: Name or hash of the card set.
    type: str
    required: true
  passphrase:
    description: The passphrase that its cards shall have. Always in quotes.
    type: str
    required: true
  old_passphrase:
    description: The passphrase that they have, to change it.
    type: str
  acs_passphrase:
    description: The passphrase of the administrator cards, where they are asked for.
    type: str
extends_documentation_fragment:
  - hsm.tde.nshield
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. Passphrases are tried with C(cardpp --check).
    support: full
  diff_mode:
    description: Shows which cards have the passphrase; never a passphrase.
    support: full
seealso:
  - module: hsm.tde.nshield_softcard
  - module: hsm.tde.nshield_info
"""

EXAMPLES = r"""
- name: One passphrase for the cards of the set
  hsm.tde.nshield_cardset:
    name: oracle-ocs
    passphrase: "{{ vault_ocs_passphrase }}"
    old_passphrase: "{{ vault_ocs_passphrase_before }}"
  register: cards

- name: Which cards are still to be done?
  ansible.builtin.debug:
    msg: "Put each of these cards into a slot and run this again: {{ cards.unseen }}"
  when: cards.unseen | length > 0
"""

RETURN = r"""
with_passphrase:
  description: Cards in slots that have the passphrase, by their numbers; in check mode those that have it already.
  returned: success
  type: list
  elements: int
  sample: [1, 2]
unseen:
  description: Cards of the set that were in no slot, in this run or earlier ones of the same change.
  returned: success
  type: list
  elements: int
  sample: [3]
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done - V(change_card_passphrase).
      type: str
      sample: change_card_passphrase
    object:
      description: The card.
      type: str
      sample: card 1 of card set oracle-ocs, module 1 slot 0
    why:
      description: Why it is needed.
      type: str
      sample: it has another passphrase
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
    """Bring the cards to the wished passphrase; the result as RETURN says."""
    params = module.params
    outcome = nshield_cards.cardset_passphrase(
        Nshield.of_options(params),
        params["name"],
        established(secret_from_option("passphrase", params["passphrase"]), "passphrase"),
        secret_from_option("old_passphrase", params["old_passphrase"]),
        secret_from_option("acs_passphrase", params["acs_passphrase"]),
        StateDirectory(params["state_directory"]),
        check_mode=module.check_mode,
    )
    after = sorted({*outcome.right, *outcome.changed})
    return {
        "changed": bool(outcome.plan),
        "with_passphrase": sorted(outcome.right) if module.check_mode else after,
        "unseen": list(outcome.unseen),
        "plan": planning.public(outcome.plan),
        "diff": {"before": {"with_passphrase": sorted(outcome.right)}, "after": {"with_passphrase": after}},
    }


def main() -> None:
    run_module(
        act,
        {
            "name": {"type": "str", "required": True},
            "passphrase": {"type": "str", "required": True, "no_log": True},
            "old_passphrase": {"type": "str", "no_log": True},
            "acs_passphrase": {"type": "str", "no_log": True},
            **nshield_options(),
        },
    )


if __name__ == "__main__":
    main()
