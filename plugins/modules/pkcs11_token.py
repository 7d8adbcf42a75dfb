#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pkcs11_token
short_description: Initialise a PKCS#11 token, set its PINs, unlock it
version_added: 0.1.0
description:
  - Brings a token to the wished state, initialised with a label, an SO PIN and a user PIN, and remembers it on the target.
  - A token that is initialised is never initialised again without O(force_reinitialize).
  - A token that the target remembers and that its library does not list is an error, since an unmounted folder of tokens
    looks exactly like an empty slot. Nothing is created in its place without O(replace_lost).
  - Where O(pin) is given and the token has a user PIN, it is verified by one login, in check mode too. Let one host a
    token do so before many hosts use the PIN.
  - A run that was killed is finished by the next one.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  state:
    description: The token is initialised and has its PINs.
    type: str
    choices: [present]
    default: present
  so_pin:
    description:
      - The security officer's PIN, set when the token is initialised, and needed to set the user PIN or to unlock it.
      - Not needed where there is nothing for the security officer to do.
      - The PINs that openCryptoki's tokens have from the factory are replaced by O(so_pin) and O(pin); give the new ones only.
    type: str
  unlock_user_pin:
    description: Where the user PIN is locked after wrong tries, the security officer sets it to O(pin). The keys stay.
    type: bool
    default: false
  force_reinitialize:
    description:
      - Initialise the token although it is initialised. B(Every key in it is destroyed), on each run with this option.
      - Check mode says in RV(lost) what would be lost.
      - Refused for tokens of openCryptoki before 3.23 once their SO PIN was changed, because they are unusable after it.
    type: bool
    default: false
  replace_lost:
    description:
      - The token of this label that the target remembers is lost for good; initialise another, or accept the one with
        its label that is there now.
      - Whatever was encrypted under the lost token's keys opens by a recovery keyslot only.
    type: bool
    default: false
  slot_id:
    description:
      - Id of the slot. With O(token_label), the slot in which the token is initialised if it does not exist yet; a token
        that exists is looked for by its label first, since initialising may move it to another slot.
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. It verifies O(pin), which spends a try if it is wrong.
    support: full
  diff_mode:
    description: Shows the token's public facts before and after.
    support: full
seealso:
  - module: hsm.tde.pkcs11_pin
  - module: hsm.tde.pkcs11_token_info
"""

EXAMPLES = r"""
- name: A SoftHSM token
  hsm.tde.pkcs11_token:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    so_pin: "{{ vault_so_pin }}"
    pin: "{{ vault_pin }}"

- name: An openCryptoki soft token in slot 3, its factory PINs replaced
  hsm.tde.pkcs11_token:
    library: /usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0
    slot_id: 3
    token_label: payroll
    so_pin: "{{ vault_so_pin }}"
    pin: "{{ vault_pin }}"

- name: Unlock the user PIN
  hsm.tde.pkcs11_token:
    library: /usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0
    token_label: payroll
    so_pin: "{{ vault_so_pin }}"
    pin: "{{ vault_pin }}"
    unlock_user_pin: true
"""

RETURN = r"""
token:
  description: The token's public facts after the run, as M(hsm.tde.pkcs11_token_info) returns them.
  returned: when the token exists
  type: dict
  sample:
    slot_id: 1893524131
    label: demo
    serial: 4f5a0f7d70dcd6a3
    model: SoftHSM v2
    initialized: true
    flags: [rng, login_required, user_pin_initialized, token_initialized]
    pin_min: 4
    pin_max: 255
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: initialize_token
    object:
      description: The token.
      type: str
      sample: token 'demo'
    why:
      description: Why it is needed.
      type: str
      sample: slot 0 holds a token that is not initialised
lost:
  description: What initialising again destroyed or, in check mode, would destroy.
  returned: with O(force_reinitialize), if the token was initialised
  type: dict
  contains:
    objects:
      description: How many objects were seen.
      type: int
      sample: 3
    labels:
      description: Their labels, each once.
      type: list
      elements: str
      sample: [hsm-tde.payroll]
    private_objects_seen:
      description: Whether O(pin) showed the private objects too. If not, there may be more.
      type: bool
      sample: true
    registered_keys:
      description: Keys that the target remembers in this token, each with the cluster that needs it.
      type: list
      elements: dict
      sample:
        - label: hsm-tde.payroll
          id: 8d1f
          cluster: payroll
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import initialize
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.options import library_access, token_selector
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenInfo


def _shown(info: TokenInfo | None) -> dict[str, t.Any]:
    return info.public() if info else {}


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the token to the wished state; the result as RETURN says."""
    params = module.params
    wish = initialize.TokenWish(
        library=library_access(params),
        selector=token_selector(params),
        so_pin=secret_from_option("so_pin", params["so_pin"]),
        pin=secret_from_option("pin", params["pin"]),
        unlock_user_pin=params["unlock_user_pin"],
        force_reinitialize=params["force_reinitialize"],
        replace_lost=params["replace_lost"],
        allow_low_pin_count=params["allow_low_pin_count"],
    )
    outcome = initialize.ensure(wish, StateDirectory(params["state_directory"]), check_mode=module.check_mode)
    for warning in outcome.warnings:
        module.warn(warning)
    result: dict[str, t.Any] = {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "diff": {"before": _shown(outcome.before), "after": _shown(outcome.after)},
    }
    if outcome.after:
        result["token"] = outcome.after.public()
    if outcome.lost is not None:
        result["lost"] = outcome.lost
    return result


def main() -> None:
    run_module(
        act,
        {
            "state": {"type": "str", "choices": ["present"], "default": "present"},
            "so_pin": {"type": "str", "no_log": True},
            "unlock_user_pin": {"type": "bool", "default": False},
            "force_reinitialize": {"type": "bool", "default": False},
            "replace_lost": {"type": "bool", "default": False},
            **pkcs11_options(),
        },
        libraries=("pkcs11",),
    )


if __name__ == "__main__":
    main()
