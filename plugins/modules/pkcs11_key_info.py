#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pkcs11_key_info
short_description: List the keys of a PKCS#11 token
version_added: 0.1.0
description:
  - Returns the public attributes of the keys in one token. A key pair shows as two keys, private and public.
  - Without O(pin) nobody is logged in, and a token does not show private and secret keys then. RV(private_visible) says so;
    an empty list means nothing in that case.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  label:
    description: Only keys with exactly this label.
    type: str
  id:
    description: Only keys with this identifier (C(CKA_ID)), in hexadecimal.
    type: str
  class:
    description: Only keys of this class.
    type: str
    choices: [secret, private, public]
  type:
    description: Only keys of this type; V(hmac) is a generic secret.
    type: str
    choices: [aes, des, des2, des3, dh, dsa, ec, ec_edwards, ec_montgomery, hmac, rsa]
  fields:
    description:
      - The attributes to return; all of them by default. The label and the identifier are always among them.
      - With thousands of keys, name the few that you need. Ansible itself takes seconds for a large result.
    type: list
    elements: str
    choices:
      - label
      - id
      - class
      - type
      - size
      - curve
      - token
      - private
      - sensitive
      - extractable
      - always_sensitive
      - never_extractable
      - local
      - modifiable
      - encrypt
      - decrypt
      - wrap
      - unwrap
      - sign
      - verify
      - derive
  limit:
    description: Return no more than this many keys. RV(more) says whether there are others.
    type: int
  check_values:
    description:
      - Add C(check_value), the first three bytes of AES-ECB of zero bytes in hexadecimal, by which two copies of a key are compared.
      - Where the token does not store it, it is one more call to the token for each key.
    type: bool
    default: false
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Changes nothing, in check mode or otherwise.
    support: full
  diff_mode:
    description: There is nothing to differ.
    support: none
seealso:
  - module: hsm.tde.pkcs11_key
"""

EXAMPLES = r"""
- name: All keys of a token
  hsm.tde.pkcs11_key_info:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
  register: inventory

- name: No key may be taken out
  ansible.builtin.assert:
    that: inventory.pkcs11_keys | rejectattr("class", "eq", "public") | selectattr("extractable") | length == 0

- name: The check value of one key, to compare it with its copy in another token
  hsm.tde.pkcs11_key_info:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    label: app-data
    fields: [type]
    check_values: true
"""

RETURN = r"""
pkcs11_keys:
  description:
    - The keys. An attribute that a key does not have, or that the token does not tell, is null.
    - C(check_value) is there with O(check_values) only.
  returned: success
  type: list
  elements: dict
  sample:
    - label: app-data
      id: eb39da42ea3582900aa323278fe85a6a
      class: secret
      type: aes
      size: 256
      curve: null
      token: true
      private: true
      sensitive: true
      extractable: false
      modifiable: true
      local: true
      always_sensitive: true
      never_extractable: true
      encrypt: true
      decrypt: true
      sign: false
      verify: false
      wrap: false
      unwrap: false
      derive: false
      check_value: 1f2e3d
private_visible:
  description: Whether private and secret keys show. If not, no key can be called absent.
  returned: success
  type: bool
more:
  description: Whether O(limit) left keys out.
  returned: success
  type: bool
skipped:
  description: How many objects of vendors' own classes were passed over.
  returned: success
  type: int
unreachable:
  description:
    - Keys that the target remembers in this token, that fit the filters, and that the token does not list.
    - Null where that cannot be said, because nobody is logged in, O(limit) left keys out, or O(type) is given.
  returned: success
  type: list
  elements: dict
  sample:
    - label: hsm-tde.payroll
      id: 8d1f
      class: secret
      cluster: payroll
token:
  description: The token's public facts, as M(hsm.tde.pkcs11_token_info) returns them.
  returned: success
  type: dict
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.options import pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.attributes import TYPES
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import DEFAULT_FIELDS, list_keys
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import parse_id
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.options import token_access
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session


def act(module: TdeModule) -> dict[str, t.Any]:
    """Read the keys; the result as RETURN says."""
    params = module.params
    if params["limit"] is not None and params["limit"] < 0:
        raise TdeError("invalid_option", "must not be negative", obj="option limit")
    state = StateDirectory(params["state_directory"])
    access = token_access(params, params["pin"])
    key_id = parse_id(params["label"] or "", params["id"])
    asked = params["fields"] if params["fields"] is not None else DEFAULT_FIELDS
    fields = [name for name in DEFAULT_FIELDS if name in ("label", "id", *asked)]
    with open_session(access, state, user="user" if access.pin else None) as session:
        listing = list_keys(
            session,
            fields=fields,
            label=params["label"],
            id=key_id,
            cls=params["class"],
            type=params["type"],
            limit=params["limit"],
            check_values=params["check_values"],
        )
    if not listing.private_visible:
        module.warn("Nobody is logged in, so that private and secret keys do not show: a key that is missing here may exist.")
    unreachable = None
    if listing.private_visible and not listing.more and params["type"] is None:
        there = {(key["label"], key["id"]) for key in listing.keys}
        registry = Registry(state)
        unreachable = [
            {"label": row["label"], "id": row["id"], "class": row["cls"].removesuffix("_key"), "cluster": row["cluster"]}
            for row in registry.keys()  # noqa: SIM118 - a list, not a mapping
            if registry.is_in(row, session.token.label, session.token.serial)
            and (row["label"], row["id"]) not in there
            and params["label"] in (None, row["label"])
            and (key_id is None or key_id.hex() == row["id"])
            and params["class"] in (None, row["cls"].removesuffix("_key"))
        ]
    return {
        "changed": False,
        "pkcs11_keys": listing.keys,
        "private_visible": listing.private_visible,
        "more": listing.more,
        "skipped": listing.skipped,
        "unreachable": unreachable,
        "token": session.token.public(),
    }


def main() -> None:
    run_module(
        act,
        {
            "label": {"type": "str"},
            "id": {"type": "str"},
            "class": {"type": "str", "choices": ["secret", "private", "public"]},
            "type": {"type": "str", "choices": sorted(TYPES.values())},
            "fields": {"type": "list", "elements": "str", "choices": list(DEFAULT_FIELDS)},
            "limit": {"type": "int"},
            "check_values": {"type": "bool", "default": False},
            **pkcs11_options(),
        },
        libraries=("pkcs11",),
        read_only=True,
    )


if __name__ == "__main__":
    main()
