#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nshield_key_protection
short_description: Verify what protects keys in an nShield Security World, and transfer them to another softcard or card set
version_added: 0.1.0
description:
  - Verifies that keys are under the protection, and the softcard or card set, that is expected, by what each key's file says of
    itself (C(nfkminfo -k)) and by what C(rocs) lists. It fails where they are not.
  - A credential with a typing error makes keys under module protection, without a word from anybody. So run this after each key
    that a database has made, before anything is encrypted with it. The error is V(nshield_key_slipped) then.
  - With O(state=transferred) it moves keys between softcards, or between card sets, with C(rocs), after a backup of the Security
    World. The vendor allows no other pair, and neither does this module. The key itself stays the same.
  - Every run looks first where each key is. After a run, or C(rocs) itself, that was killed at any moment, the next one goes on with
    the keys that are left.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  keys:
    description:
      - Names or idents of keys; C(*) and C(?) stand for any characters. Each must find a key.
      - Needed to verify. To transfer, all keys of O(source) without it.
    type: list
    elements: str
    default: []
  application:
    description: The application of the keys, in nShield's sense.
    type: str
    default: pkcs11
  protection:
    description: The protection that is expected.
    type: str
    required: true
    choices:
      module: The Security World alone; whoever reaches the HSM can use the key.
      softcard: A softcard's passphrase.
      ocs: A card of an operator card set, and its passphrase.
  token:
    description: Name or hash of the softcard or card set; where names repeat, the hash.
    type: str
  state:
    description: What is wished.
    type: str
    choices:
      verified: The keys are there already; fail if they are not. Changes nothing.
      transferred: Bring them there.
    default: verified
  source:
    description: Name or hash of the softcard or card set that keys come from. Keys that are under neither are an error.
    type: str
  passphrase:
    description: The passphrase of the softcard or card set that the keys come under; needed to transfer.
    type: str
  acs_passphrase:
    description: The passphrase of the administrator cards, which are in slots; needed to transfer.
    type: str
  retire_copies:
    description:
      - Put key files that are left under a former token aside, into the backup, once the same key is under the expected one.
      - A copy is left where C(rocs) was killed, and on the other clients of the world. The former credential still opens it.
    type: bool
    default: true
  backup_directory:
    description: Where backups of the Security World go. By default C(nshield-backups) in O(state_directory).
    type: path
extends_documentation_fragment:
  - hsm.tde.nshield
  - hsm.tde.state
attributes:
  check_mode:
    description:
      - Verifies, or returns the plan of the transfer, and changes nothing. What C(rocs) will ask for is looked at - cards in slots,
        the target's passphrase.
    support: full
  diff_mode:
    description: Shows what protects each key before and after.
    support: full
seealso:
  - module: hsm.tde.nshield_info
  - module: hsm.tde.nshield_client
"""

EXAMPLES = r"""
- name: Is the new master key where it must be?
  hsm.tde.nshield_key_protection:
    keys: ["ORACLE.TDE.HSM.MK.*"]
    protection: softcard
    token: oracle-tde

- name: All keys of one softcard to another
  hsm.tde.nshield_key_protection:
    state: transferred
    source: oracle-tde
    protection: softcard
    token: oracle-tde-2
    passphrase: "{{ vault_new_softcard_passphrase }}"
    acs_passphrase: "{{ vault_acs_passphrase }}"
    timeout: 600
  register: transfer
"""

RETURN = r"""
nshield_keys:
  description: The keys.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name, the label in PKCS#11.
      type: str
      sample: ORACLE.TDE.HSM.MK.0661286E
    ident:
      description: Its ident, by which its file is named.
      type: str
      sample: uc925f67e72ea3c354cae4e6797bde3753d24e7744-4c0b2a1d
    application:
      description: Its application.
      type: str
      sample: pkcs11
    protection:
      description: What protects it - V(module), V(softcard) or V(ocs).
      type: str
      sample: softcard
    token:
      description: The hash of its softcard or card set, null under module protection.
      type: str
      sample: 925f67e72ea3c354cae4e6797bde3753d24e7744
    token_name:
      description: The name of its softcard or card set, null under module protection and where that is gone.
      type: str
      sample: oracle-tde
    recoverable:
      description: Whether it can be transferred.
      type: bool
      sample: true
    as_expected:
      description: Whether it is under the expected protection. In check mode of a transfer, before it.
      type: bool
      sample: true
    copies:
      description: Other files of the same key, each with C(ident), C(protection) and C(token). Their credentials open it, too.
      type: list
      elements: dict
      sample: []
backup:
  description: The folder of the backup of the Security World, null if none was made.
  returned: success
  type: str
  sample: /var/lib/hsm-tde/nshield-backups/20260312T081500Z-9d1e04b7c2a86f53
other_clients_need:
  description: What other clients of the Security World need after a transfer, in sentences.
  returned: success
  type: list
  elements: str
  sample: ["Bring the Security World of every other client up to date, and run this task there."]
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done - V(back_up_world), V(transfer_keys) or V(retire_key_file).
      type: str
      sample: transfer_keys
    object:
      description: The keys.
      type: str
      sample: keys ORACLE.TDE.HSM.MK.0661286E
    why:
      description: Why it is needed.
      type: str
      sample: to softcard oracle-tde-2
"""

import os
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_client, nshield_keys
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import Nshield, nshield_options


def act(module: TdeModule) -> dict[str, t.Any]:
    """Verify or transfer; the result as RETURN says."""
    params = module.params
    tools = Nshield.of_options(params)
    if not params["keys"] and (params["state"] == "verified" or params["source"] is None):
        raise TdeError("invalid_option", "names no key; a transfer may name a source instead", obj="option keys")
    if params["state"] == "verified":
        estate = tools.usable()
        expected = nshield_keys.expectation(estate, params["protection"], params["token"])
        keys = nshield_keys.placed(tools, estate, params["keys"], params["application"], expected)
        nshield_keys.verify(tools, estate, keys, expected)
        shown = [key.public(estate) for key in keys]
        return {
            "changed": False,
            "nshield_keys": shown,
            "backup": None,
            "other_clients_need": [],
            "plan": [],
            "diff": _diff(shown, shown),
        }
    state = StateDirectory(params["state_directory"])
    wish = nshield_keys.TransferWish(
        patterns=tuple(params["keys"]),
        application=params["application"],
        source=params["source"],
        protection=params["protection"],
        token=params["token"],
        passphrase=secret_from_option("passphrase", params["passphrase"]),
        acs_passphrase=secret_from_option("acs_passphrase", params["acs_passphrase"]),
        retire_copies=params["retire_copies"],
        backup_directory=params["backup_directory"] or os.path.join(state.path, "nshield-backups"),
    )
    outcome = nshield_keys.transfer(tools, wish, state, check_mode=module.check_mode)
    shown = [key.public(outcome.estate) for key in outcome.keys]
    return {
        "changed": bool(outcome.plan),
        "nshield_keys": shown,
        "backup": outcome.backup,
        "other_clients_need": nshield_client.needs_after_transfer() if _moved(outcome.plan) else [],
        "plan": planning.public(outcome.plan),
        "diff": _diff([key.public(outcome.estate_before) for key in outcome.keys_before], shown),
    }


def _moved(plan: planning.Plan) -> bool:
    return any(step.action == "transfer_keys" for step in plan)


def _diff(before: t.Sequence[dict[str, t.Any]], after: t.Sequence[dict[str, t.Any]]) -> dict[str, t.Any]:
    def facts(keys: t.Sequence[dict[str, t.Any]]) -> dict[str, t.Any]:
        return {key["name"]: {name: key[name] for name in ("protection", "token", "token_name", "copies")} for key in keys}

    return {"before": facts(before), "after": facts(after)}


def main() -> None:
    run_module(
        act,
        {
            "keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "application": {"type": "str", "default": "pkcs11"},
            "protection": {"type": "str", "required": True, "choices": ["module", "softcard", "ocs"]},
            "token": {"type": "str", "no_log": False},
            "state": {"type": "str", "choices": ["verified", "transferred"], "default": "verified"},
            "source": {"type": "str"},
            "passphrase": {"type": "str", "no_log": True},
            "acs_passphrase": {"type": "str", "no_log": True},
            "retire_copies": {"type": "bool", "default": True},
            "backup_directory": {"type": "path"},
            **nshield_options(),
        },
        required_if=[
            ("protection", "softcard", ["token"]),
            ("protection", "ocs", ["token"]),
        ],
    )


if __name__ == "__main__":
    main()
