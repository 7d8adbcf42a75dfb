#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pkcs11_token_info
short_description: Slots, tokens, flags, mechanisms and PIN limits of a PKCS#11 library
version_added: 0.1.0
description:
  - Says what a PKCS#11 library and its tokens show without a PIN. No login is made, so no try is spent.
  - O(token_uri), O(token_label), O(token_serial) and O(slot_id) keep only the tokens that match; without them all are returned.
  - O(pin) and O(allow_low_pin_count) are accepted for the sake of the action group and not used.
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Changes nothing in either mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.pkcs11_token
  - module: hsm.tde.pkcs11_key_info
"""

EXAMPLES = r"""
- name: All tokens of SoftHSM
  hsm.tde.pkcs11_token_info:
    library: /usr/lib/softhsm/libsofthsm2.so
  register: softhsm

- name: Stop before anybody spends another try
  ansible.builtin.assert:
    that: softhsm.tokens | map(attribute='flags') | flatten | intersect(['user_pin_final_try', 'user_pin_locked']) | length == 0
"""

RETURN = r"""
library:
  description: The library.
  returned: success
  type: dict
  sample:
    path: /usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so
    manufacturer: SoftHSM
    description: Implementation of PKCS11
    version: '2.6'
    cryptoki_version: '2.40'
tokens:
  description: The tokens that answer, by slot id, those that are not initialised included.
  returned: success
  type: list
  elements: dict
  contains:
    slot_id:
      description: Id of the slot.
      type: int
      sample: 1893524131
    slot_description:
      description: What the library says about the slot.
      type: str
      sample: SoftHSM slot ID 0x70dcd6a3
    label:
      description: The token's label.
      type: str
      sample: demo
    serial:
      description: The token's serial number; many soft tokens have none, or the same as all others.
      type: str
      sample: 4f5a0f7d70dcd6a3
    manufacturer:
      description: The token's maker.
      type: str
      sample: SoftHSM project
    model:
      description: The token's model.
      type: str
      sample: SoftHSM v2
    initialized:
      description: Whether the token is initialised.
      type: bool
      sample: true
    flags:
      description:
        - The token's flags in words. Bits without a name are in hexadecimal.
        - V(user_pin_count_low), V(user_pin_final_try) and V(user_pin_locked) tell of wrong tries; the same with V(so_pin_) for the
          security officer. A free SoftHSM slot says V(so_pin_locked), which means nothing there.
      type: list
      elements: str
      sample: [rng, login_required, user_pin_initialized, token_initialized]
    pin_min:
      description: The least length of a PIN in bytes; 0 if the token does not tell.
      type: int
      sample: 4
    pin_max:
      description: The greatest length of a PIN in bytes; 0 if the token does not tell.
      type: int
      sample: 255
    hardware_version:
      description: Version of the token's hardware.
      type: str
      sample: '2.6'
    firmware_version:
      description: Version of the token's firmware.
      type: str
      sample: '2.6'
    mechanisms:
      description: Names of the mechanisms that the token lists, vendors' own in hexadecimal. That one is listed does not say that it works.
      type: list
      elements: str
      sample: [AES_GCM, AES_CBC_PAD]
    refused_pins:
      description: How many different PINs this host remembers as refused, for C(user) and C(so).
      type: dict
      sample:
        user: 0
        so: 0
failed_slots:
  description: Slots that did not answer, with the name of the error.
  returned: success
  type: list
  elements: dict
  sample:
    - slot_id: 2
      answer: CKR_FUNCTION_FAILED
missing:
  description: Tokens that the target remembers from this library and that it does not list now.
  returned: success
  type: list
  elements: dict
  sample: []
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import info
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.options import library_access, token_selector


def act(module: TdeModule) -> dict[str, t.Any]:
    """Read; the result as RETURN says."""
    params = module.params
    facts = info.gather(library_access(params), token_selector(params), StateDirectory(params["state_directory"]))
    return {"changed": False, **facts}


def main() -> None:
    run_module(act, pkcs11_options(), libraries=("pkcs11",), read_only=True)


if __name__ == "__main__":
    main()
