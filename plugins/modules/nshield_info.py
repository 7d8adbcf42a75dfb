#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nshield_info
short_description: An nShield Security World, its softcards, card sets and keys, and whether access recovers by itself after an outage
version_added: 0.1.0
description:
  - Reads the Security World, the HSMs and their slots, softcards, card sets and keys with C(nfkminfo), and what protects each key a
    second time from C(rocs). Needs no passphrase and changes nothing.
  - Answers with O(recovery) whether a database's access to its keys comes back by itself after an outage of the HSM, and if not, what
    is missing. The answer is that of the table in the vendor's integration guide for Oracle TDE.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  keys:
    description: Whether keys are listed, and C(rocs) is asked.
    type: bool
    default: true
  recovery:
    description:
      - What the verdict on recovery needs beside what the HSM tells. What is not given is not known, and then neither is the answer
        where it depends on it.
    type: dict
    suboptions:
      protection:
        description: What protects the database's keys.
        type: str
        required: true
        choices: [module, softcard, ocs]
      token:
        description: Name or hash of the softcard or card set that holds the credential.
        type: str
      cluster:
        description: Whether more than one HSM serves the database. By default, if the world has more than one module.
        type: bool
      auto_login:
        description: Whether the database opens its keystore by itself.
        type: bool
      same_passphrase:
        description: Whether all cards of the card set have one passphrase.
        type: bool
      remote_administration:
        description: Whether cards are read through a Remote Administration channel.
        type: bool
      channel_script:
        description: Whether a script makes that channel again.
        type: bool
      persistent_only:
        description: Whether authorisation comes from a persistent card that is not left in a slot.
        type: bool
extends_documentation_fragment:
  - hsm.tde.nshield
  - hsm.tde.state
attributes:
  check_mode:
    description: Changes nothing in either mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.nshield_key_protection
"""

EXAMPLES = r"""
- name: What is there?
  hsm.tde.nshield_info:
  register: nshield

- name: Does the database come back by itself after a power cut?
  hsm.tde.nshield_info:
    recovery:
      protection: ocs
      token: oracle-ocs
      auto_login: true
      same_passphrase: true
      remote_administration: false
      persistent_only: false
  register: nshield

- name: Stop if not, and say why
  ansible.builtin.assert:
    that: nshield.recovery.automatic
    fail_msg: "{{ (nshield.recovery.missing + nshield.recovery.unknown) | map(attribute='sentence') | join(' ') }}"
"""

RETURN = r"""
world:
  description: The Security World.
  returned: success
  type: dict
  contains:
    usable:
      description: Whether it is initialised and at least one module can use it.
      type: bool
      sample: true
    mode:
      description: Its mode in nShield's word, null from software that tells none.
      type: str
      sample: fips1402level3
    fips_level:
      description: V(3) if it asks for FIPS authorisation, V(2) if not, null for a mode that is not known here.
      type: int
      sample: 3
    recovery:
      description: Whether keys can be transferred at all.
      type: bool
      sample: true
    acs_quorum:
      description: How many administrator cards are asked for, and how many there are. Null if it does not tell.
      type: list
      elements: int
      sample: [2, 5]
    created:
      description: When it was made, null if it does not tell.
      type: str
      sample: '2026-01-05 09:30:00'
    identity:
      description: The hash of its security officer's key (HKNSO), equal on all clients of the world. Null if it does not tell.
      type: str
      sample: 59875f07a8b506b0063662c2628956d75960da5f
    flags:
      description: Its state in nShield's words.
      type: list
      elements: str
      sample: [Initialised, Usable, Recovery]
modules:
  description: The HSMs.
  returned: success
  type: list
  elements: dict
  contains:
    number:
      description: Its number.
      type: int
      sample: 1
    esn:
      description: Its electronic serial number, null if it does not tell.
      type: str
      sample: 5F08-02E0-D947
    usable:
      description: Whether it can use the world.
      type: bool
      sample: true
    state:
      description: Its state in nShield's words.
      type: str
      sample: Usable
    slots:
      description: Its slots, each with C(slot), C(state) (V(empty), V(operator), V(admin) or nShield's word), C(cardset) (hash),
        C(cardset_name) and C(card) (number in the set).
      type: list
      elements: dict
      sample: [{slot: 0, state: empty, cardset: null, cardset_name: null, card: null}]
softcards:
  description: The softcards. Names can repeat, hashes do not.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: oracle-tde
    hash:
      description: Its hash.
      type: str
      sample: 925f67e72ea3c354cae4e6797bde3753d24e7744
    name_unique:
      description: Whether no other softcard or card set has its name.
      type: bool
      sample: true
cardsets:
  description: The operator card sets.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: oracle-ocs
    hash:
      description: Its hash.
      type: str
      sample: 38a06dc96028c226c897863f81e6ec4478f6b010
    name_unique:
      description: Whether no other softcard or card set has its name.
      type: bool
      sample: true
    quorum:
      description: How many cards are asked for, and how many there are.
      type: list
      elements: int
      sample: [1, 3]
    persistent:
      description: Whether authorisation lasts when the card is taken out.
      type: bool
      sample: false
    remote:
      description: Whether its cards can be read by another module.
      type: bool
      sample: false
    timeout:
      description: When authorisation ends, in nShield's word.
      type: str
      sample: none
    present:
      description: Its cards that are in slots, each with C(module), C(slot) and C(card).
      type: list
      elements: dict
      sample: [{module: 1, slot: 0, card: 1}]
    in_every_module:
      description: Whether every usable module has one of its cards in a slot.
      type: bool
      sample: true
nshield_keys:
  description: The keys of all applications, with what protects them.
  returned: success and O(keys=true)
  type: list
  elements: dict
  contains:
    application:
      description: Its application.
      type: str
      sample: pkcs11
    ident:
      description: Its ident.
      type: str
      sample: ua114f29785ea013fd5eca7e6cd7614c796bc24a06
    name:
      description: Its name.
      type: str
      sample: ORACLE.TDE.HSM.MK.0661286E
    protection:
      description: What protects it - V(module), V(softcard) or V(ocs).
      type: str
      sample: module
    token:
      description: The hash of its softcard or card set, as its ident tells; null under module protection or if it does not tell.
      type: str
      sample: null
    token_name:
      description: The name of its softcard or card set, null under module protection and where that is gone.
      type: str
      sample: null
differences:
  description: Where C(rocs) says something else of keys than C(nfkminfo), in sentences.
  returned: success and O(keys=true)
  type: list
  elements: str
  sample: []
recovery:
  description: The verdict on recovery after an outage.
  returned: success and O(recovery) given
  type: dict
  contains:
    cell:
      description: The cell of the guide's table, empty if the FIPS level is not known.
      type: str
      sample: fips3.ocs.cluster
    automatic:
      description: Whether access comes back by itself; null if something is not known.
      type: bool
      sample: false
    missing:
      description: What is missing, each with a stable C(code) and a C(sentence).
      type: list
      elements: dict
      sample: [{code: same_passphrase, sentence: All cards of the card set have the same passphrase.}]
    unknown:
      description: What is not known, in the same way.
      type: list
      elements: dict
      sample: []
    advice:
      description: Sentences that do not decide.
      type: list
      elements: str
      sample: []
"""

import collections
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.hsm import nshield_recovery
from ansible_collections.hsm.tde.plugins.module_utils.hsm.nshield import (
    Estate,
    Nshield,
    differences,
    nshield_options,
    recovery_facts,
)


def act(module: TdeModule) -> dict[str, t.Any]:
    """Read everything; the result as RETURN says."""
    tools = Nshield.of_options(module.params)
    estate = tools.inspect()
    result: dict[str, t.Any] = {"changed": False, "world": _world(estate), **_tokens(estate)}
    if module.params["keys"]:
        result["nshield_keys"] = [
            {
                "application": key.application,
                "ident": key.ident,
                "name": key.name,
                "protection": key.protection,
                "token": key.token,
                "token_name": estate.token_name(key.token),
            }
            for key in estate.keys
        ]
        result["differences"] = differences(estate, tools.rocs_keys())
    if module.params["recovery"]:
        facts = recovery_facts(estate, module.params["recovery"])
        result["recovery"] = nshield_recovery.verdict(facts).public()
    return result


def _world(estate: Estate) -> dict[str, t.Any]:
    world = estate.world
    return {
        "usable": world.usable,
        "mode": world.mode,
        "fips_level": world.fips_level,
        "recovery": world.recovery,
        "acs_quorum": list(world.acs_quorum) if world.acs_quorum else None,
        "created": world.created,
        "identity": world.identity,
        "flags": list(world.flags),
    }


def _tokens(estate: Estate) -> dict[str, t.Any]:
    names = collections.Counter(token.name for token in estate.tokens)
    usable = [module for module in estate.world.modules if module.usable]
    return {
        "modules": [
            {
                "number": module.number,
                "esn": module.esn,
                "usable": module.usable,
                "state": module.state,
                "slots": [
                    {
                        "slot": slot.number,
                        "state": slot.state,
                        "cardset": slot.cardset,
                        "cardset_name": estate.token_name(slot.cardset),
                        "card": slot.card,
                    }
                    for slot in module.slots
                ],
            }
            for module in estate.world.modules
        ],
        "softcards": [
            {"name": token.name, "hash": token.hash, "name_unique": names[token.name] == 1} for token in estate.softcards
        ],
        "cardsets": [
            {
                "name": token.name,
                "hash": token.hash,
                "name_unique": names[token.name] == 1,
                "quorum": [token.k, token.n],
                "persistent": token.persistent,
                "remote": token.remote,
                "timeout": token.timeout,
                "present": [
                    {"module": module, "slot": slot.number, "card": slot.card}
                    for module, slot in estate.slots("operator", token.hash)
                ],
                "in_every_module": bool(usable) and estate.modules_with(cardset=token.hash) == len(usable),
            }
            for token in estate.cardsets
        ],
    }


def main() -> None:
    run_module(
        act,
        {
            "keys": {"type": "bool", "default": True},
            "recovery": {
                "type": "dict",
                "options": {
                    "protection": {"type": "str", "required": True, "choices": ["module", "softcard", "ocs"]},
                    "token": {"type": "str", "no_log": False},
                    "auto_login": {"type": "bool"},
                    **nshield_recovery.recovery_options(),
                },
                "required_if": [("protection", "ocs", ["token"]), ("protection", "softcard", ["token"])],
            },
            **nshield_options(),
        },
        read_only=True,
    )


if __name__ == "__main__":
    main()
