#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pkcs11_key
short_description: Generate, import, suspend and destroy keys in a PKCS#11 token
version_added: 0.1.0
description:
  - Brings a list of keys in one token to the wished state, in one login. Where a key in SoftHSM or openCryptoki is changed, or one
    in openCryptoki destroyed, it takes three, since that is done by a process of its own, which a kill of the task does not reach.
  - Every step for every key is planned before the first is taken. An error in the last item changes nothing of the first.
  - A key that the target remembers and that the token does not list is an error, since an unmounted folder of tokens looks
    exactly like an empty token. Nothing is generated in its place without O(keys[].replace_lost).
  - A key that a keystore needs is not destroyed.
  - A run that is killed while SoftHSM makes a secret key leaves an object that shows like a key and has no value. Where the
    target's journal says that it began to generate that key, and it is certain that there is no value, the next run destroys
    the object, without O(keys[].confirm_destroy), and generates the key.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  keys:
    description:
      - The keys. A key pair is one item.
    type: list
    elements: dict
    required: true
    suboptions:
      label:
        description: The key's label (C(CKA_LABEL)). It is never changed.
        type: str
        required: true
      id:
        description:
          - The key's identifier (C(CKA_ID)) in hexadecimal.
          - With it, label and identifier together name the key, so that several keys may have one label. Without it the label
            alone must name one.
          - A new key gets, if this is not given, 16 bytes made from its label by SHA-256. It is the same on every host, and the same
            for both halves of a pair.
        type: str
      state:
        description: Whether the key is there.
        type: str
        choices:
          present: The key is generated or imported if it is not there; attributes that can be changed are.
          absent: The key is destroyed, whatever its type, both halves of a pair. This needs O(keys[].confirm_destroy).
        default: present
      type:
        description: Type of the key.
        type: str
        choices:
          aes: A secret key for AES.
          hmac: A generic secret, with which tokens do HMAC.
          rsa: A key pair for RSA.
          ec: A key pair on an elliptic curve.
        default: aes
      size:
        description:
          - Size in bits. For an existing key, any size if this is not given.
          - 'A new key has by default: AES and HMAC 256, RSA 3072. RSA keys have at least 2048.'
        type: int
      curve:
        description: Curve of a key of type V(ec). A new key is on V(secp256r1) by default; for an existing key, any curve.
        type: str
        choices: [secp256r1, secp384r1, secp521r1, secp256k1, brainpoolP256r1, brainpoolP384r1, brainpoolP512r1]
      encrypt:
        description:
          - Whether the key may encrypt.
          - Of this and the six options below, those that are given are set, in a key that exists too. Setting them all to V(false)
            suspends a key; setting O(keys[].encrypt) to V(false) alone deactivates it, so that it opens what is old and protects nothing new.
          - If none is V(true), a new key may do what its type is mostly for. V(aes) may encrypt and decrypt; the others may sign and verify.
          - If one is V(true), a new key may do what is named only.
        type: bool
      decrypt:
        description: Whether the key may decrypt.
        type: bool
      wrap:
        description: Whether the key may wrap other keys. A key that may wrap and decrypt reads every key that it can wrap.
        type: bool
      unwrap:
        description: Whether the key may unwrap other keys.
        type: bool
      sign:
        description: Whether the key may sign, or make MACs.
        type: bool
      verify:
        description: Whether the key may verify signatures or MACs.
        type: bool
      derive:
        description: Whether other keys may be derived from the key.
        type: bool
      sensitive:
        description: Whether the key's value is hidden. A key that is hidden stays so; V(false) is for new keys.
        type: bool
        default: true
      extractable:
        description: Whether the key can be taken out of the token, wrapped. A key that cannot stays so; V(true) is for new keys.
        type: bool
        default: false
      value:
        description:
          - Import this secret key instead of generating one. Base64, on one line.
          - It is compared with the value of an existing key by encrypting or signing with both, not by reading it.
        type: str
      private_key:
        description:
          - Import this private key of type V(rsa) or V(ec), in PEM, and its public half.
          - Where the token has this private key alone, which a kill can leave, the public half is added.
        type: str
      private_key_passphrase:
        description: Passphrase of O(keys[].private_key).
        type: str
      regenerate:
        description:
          - What to do about an existing key that is not what is wished and cannot be changed to it.
          - Whatever destroys a key needs O(keys[].confirm_destroy) as well.
        type: str
        choices:
          fail: End with an error, nothing changed.
          never: Leave it as it is; change what can be changed.
          partial_idempotence: Destroy it and make a new one.
          always: Destroy it and make a new one, on every run, also where it is as wished.
        default: fail
      confirm_destroy:
        description: Must be the key's label for a key to be destroyed. What it encrypted can never be read again.
        type: str
      replace_lost:
        description:
          - The key that the target remembers is lost for good. With O(keys[].state=present) another is made, with
            O(keys[].state=absent) it is forgotten.
        type: bool
        default: false
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Logs in, returns the plan and changes nothing. Where the token does not exist yet, says what would be done in a new one.
    support: full
  diff_mode:
    description: Shows the keys' public attributes before and after.
    support: full
seealso:
  - module: hsm.tde.pkcs11_key_info
  - module: hsm.tde.tde_master_key
"""

EXAMPLES = r"""
- name: Keys of an application
  hsm.tde.pkcs11_key:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keys:
      - label: app-data
      - label: app-mac
        type: hmac
      - label: app-signing
        type: ec
        curve: secp384r1

- name: Suspend a key
  hsm.tde.pkcs11_key:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keys:
      - label: app-data
        encrypt: false
        decrypt: false

- name: Import a key pair
  hsm.tde.pkcs11_key:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keys:
      - label: legacy
        type: rsa
        decrypt: true
        private_key: "{{ vault_legacy_pem }}"
        private_key_passphrase: "{{ vault_legacy_passphrase }}"

- name: Destroy a key
  hsm.tde.pkcs11_key:
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keys:
      - label: app-mac
        type: hmac
        state: absent
        confirm_destroy: app-mac
"""

RETURN = r"""
pkcs11_keys:
  description:
    - The keys that are present at the end, or in check mode would be, in the order of the list. A pair by its private half.
    - Attributes that the token does not tell are missing.
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
      always_sensitive: true
      never_extractable: true
      local: true
      modifiable: true
      encrypt: true
      decrypt: true
      wrap: false
      unwrap: false
      sign: false
      verify: false
      derive: false
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: generate_key
    object:
      description: The key.
      type: str
      sample: key 'app-data'
    why:
      description: Why it is needed.
      type: str
      sample: the token has no such aes 256 key
"""

import os
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import NAME, StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import describe_secrets
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import keylist
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.attributes import USAGE
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import (
    CURVE_NAMES,
    TYPES,
    KeySpec,
    Wish,
    parse_id,
    secret_value,
)
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.options import token_access
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry, same_serial
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenInfo


def keyslots_on(state: StateDirectory, token: TokenInfo) -> keylist.Uses:
    """The keys of a token that keyslots of this host's keystores and wrapped secrets name.

    A keystore or secret that cannot be read is an error: then nobody can say that a key is not needed.
    """
    store = os.path.join(state.path, "store")
    clusters = {row["cluster"] for row in Registry(state).keys() if row["cluster"]}  # noqa: SIM118 - a list, not a mapping
    clusters.update(name for name in (os.listdir(store) if os.path.isdir(store) else []) if NAME.fullmatch(name))
    wrapped = [
        (slot, f"data key {key['key_id']} of cluster {cluster}")
        for cluster in sorted(clusters)
        for key in KeyStore(state, cluster).describe()
        for slot in key["keyslots"]
    ]
    wrapped += [(slot, f"wrapped secret {secret['path']}") for secret in describe_secrets(state) for slot in secret["keyslots"]]
    uses: dict[tuple[str, bytes], list[str]] = {}
    for slot, obj in wrapped:
        if slot["token_label"] == token.label and same_serial(slot["token_serial"], token.serial):
            uses.setdefault((slot["kek_label"], bytes.fromhex(slot["kek_id"])), []).append(f"keyslot {slot['name']} of {obj}")
    return uses


def wish_of(item: t.Mapping[str, t.Any]) -> Wish:
    """One item of the option ``keys``."""
    label = item["label"]
    return Wish(
        spec=KeySpec(
            label=label,
            id=parse_id(label, item["id"]),
            type=item["type"],
            size=item["size"],
            curve=item["curve"],
            usage={use: item[use] for use in USAGE if item[use] is not None},
            sensitive=item["sensitive"],
            extractable=item["extractable"],
            value=secret_value(label, secret_from_option("value", item["value"])),
            private_key=secret_from_option("private_key", item["private_key"]),
            passphrase=secret_from_option("private_key_passphrase", item["private_key_passphrase"]),
        ),
        state=item["state"],
        regenerate=item["regenerate"],
        confirm_destroy=item["confirm_destroy"],
        replace_lost=item["replace_lost"],
    )


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the keys to the wished state; the result as RETURN says."""
    params = module.params
    state = StateDirectory(params["state_directory"])
    wishes = [wish_of(item) for item in params["keys"]]
    access = token_access(params, params["pin"])

    def apply() -> keylist.Outcome:
        return keylist.apply(access, state, wishes, uses=lambda token: keyslots_on(state, token), check_mode=module.check_mode)

    if module.check_mode:
        outcome = apply()
    else:
        with state.locked():
            outcome = apply()
    for warning in outcome.warnings:
        module.warn(warning)
    return {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "pkcs11_keys": outcome.keys,
        "diff": {"before": outcome.before, "after": outcome.after},
    }


def main() -> None:
    flag = {"type": "bool"}
    run_module(
        act,
        {
            "keys": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "no_log": False,
                "options": {
                    "label": {"type": "str", "required": True},
                    "id": {"type": "str"},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                    "type": {"type": "str", "choices": list(TYPES), "default": "aes"},
                    "size": {"type": "int"},
                    "curve": {"type": "str", "choices": list(CURVE_NAMES)},
                    **{use: flag for use in USAGE},
                    "sensitive": {"type": "bool", "default": True},
                    "extractable": {"type": "bool", "default": False},
                    "value": {"type": "str", "no_log": True},
                    "private_key": {"type": "str", "no_log": True},
                    "private_key_passphrase": {"type": "str", "no_log": True},
                    "regenerate": {
                        "type": "str",
                        "choices": ["fail", "never", "partial_idempotence", "always"],
                        "default": "fail",
                    },
                    "confirm_destroy": {"type": "str"},
                    "replace_lost": {"type": "bool", "default": False},
                },
            },
            **pkcs11_options(),
        },
        libraries=("pkcs11", "cryptography"),
    )


if __name__ == "__main__":
    main()
