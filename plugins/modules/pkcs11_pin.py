#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pkcs11_pin
short_description: Change the user PIN or the SO PIN of a PKCS#11 token, also where it rests
version_added: 0.1.0
description:
  - Changes a PIN in the token and, with O(pin_file), in the file from which the host takes it at boot.
  - The new PIN is written beside the file, the token is changed, a login proves the new PIN, and only then is the file
    replaced. A run that is killed at any moment leaves a PIN at rest that opens the token, and the next run finishes.
  - Databases that are logged in go on working; they need the new PIN at their next login.
  - Which PIN the token has is found by logging in. At most two PINs are tried, and two only if the token's flags tell of no
    wrong try before. A PIN that the token refused before is not tried again.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  user_type:
    description: Whose PIN is changed.
    type: str
    choices:
      user: The user PIN. The present one is O(pin), or the one in O(pin_file).
      so: The security officer's PIN. The present one is O(so_pin), or the one in O(pin_file).
    default: user
  so_pin:
    description: The security officer's present PIN, for O(user_type=so).
    type: str
  new_pin:
    description: The PIN that the token shall have. Always in quotes.
    type: str
    required: true
  pin_file:
    description:
      - File in which the PIN rests, one line, root's own, mode 0600. It is created if it does not exist.
      - While a change is under way, the new PIN is in a file of the same name with C(.new) at its end; C(hsm-tde) knows both.
    type: path
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing. It logs in to learn which PIN the token has, which may spend a try.
    support: full
  diff_mode:
    description: Shows the token's public facts before and after; never a PIN.
    support: full
seealso:
  - module: hsm.tde.pkcs11_token
"""

EXAMPLES = r"""
- name: Change the user PIN, also where the host finds it at boot
  hsm.tde.pkcs11_pin:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    new_pin: "{{ vault_new_pin }}"
    pin_file: /etc/hsm-tde/demo.pin

- name: Change the security officer's PIN
  hsm.tde.pkcs11_pin:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    user_type: so
    so_pin: "{{ vault_so_pin }}"
    new_pin: "{{ vault_new_so_pin }}"
"""

RETURN = r"""
token:
  description: The token's public facts after the run, as M(hsm.tde.pkcs11_token_info) returns them.
  returned: success
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
      sample: set_pin
    object:
      description: The PIN or the file.
      type: str
      sample: user PIN of token label 'demo'
    why:
      description: Why it is needed.
      type: str
      sample: the token has the former PIN
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import pins
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.options import token_access


def act(module: TdeModule) -> dict[str, t.Any]:
    """Change the PIN; the result as RETURN says."""
    params = module.params
    user = params["user_type"]
    # The group's default for pin is the user PIN; it must never become a try of the security officer's.
    access = token_access(params, params["pin"] if user == "user" else params["so_pin"])
    wish = pins.PinWish(access, user, Secret(params["new_pin"]), params["pin_file"])
    outcome = pins.change(wish, StateDirectory(params["state_directory"]), check_mode=module.check_mode)
    return {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "token": outcome.after.public(),
        "diff": {"before": outcome.before.public(), "after": outcome.after.public()},
    }


def main() -> None:
    run_module(
        act,
        {
            "user_type": {"type": "str", "choices": ["user", "so"], "default": "user"},
            "so_pin": {"type": "str", "no_log": True},
            "new_pin": {"type": "str", "no_log": True, "required": True},
            "pin_file": {"type": "path"},
            **pkcs11_options(),
        },
        libraries=("pkcs11",),
    )


if __name__ == "__main__":
    main()
