#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cryptocard_info
short_description: Crypto Express adapters of IBM Z and LinuxONE, and whether they hold the master key this host needs
version_added: 0.1.0
description:
  - Reads cards, queues, domains and the master keys' verification patterns from sysfs, and answers one question - does the
    default domain hold the key this host needs, on every card?
  - A queue (an adapter and a domain, C(CARD.DOMAIN)) has master keys of its own. Programs' requests go to whichever queue is free.
    Where one queue holds another key than the others, keys work now and fail the next time; RV(default_domain.reasons) and
    RV(usage_domains.reasons) name such queues first.
  - C(lszcrypt) of the package s390-tools is asked too where it is installed. It fills in what sysfs does not tell; where the two
    differ, sysfs is right, and the difference is in RV(lszcrypt.differences).
  - On a machine without the bus, or without a card, it does not fail; RV(present) and RV(message) say so. A play that needs the
    adapters asserts that RV(default_domain.ready) is true.
  - Root is not needed. The patterns are not secret.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  mode:
    description:
      - The mode of the cards that this host's programs use. Cards of another mode are listed and not judged.
      - By default the modes that O(expected) has a key for are judged, or both modes without O(expected).
    type: str
    choices:
      cca: Common Cryptographic Architecture; used by openCryptoki's CCA token.
      ep11: Enterprise PKCS#11; used by openCryptoki's EP11 token.
  expected:
    description:
      - The verification patterns that the current master keys must have, in hexadecimal with or without C(0x), always in quotes
        (YAML takes some for numbers). They are on the key officers' protocol of the key ceremony, or in the attribute C(mkvps) of a
        queue that is known to be right.
      - Without it, a master key must be set (CCA's AES, EP11's wrapping key), and all queues must hold the same keys.
      - CCA's DES master key (SYM) cannot be expected here; the kernel does not show it.
    type: dict
    suboptions:
      aes:
        description: Pattern of CCA's AES master key, 16 digits.
        type: raw
      apka:
        description: Pattern of CCA's APKA master key (for ECC and AES-protected RSA keys), 16 digits.
        type: raw
      asym:
        description: Pattern of CCA's asymmetric master key (for RSA), 32 digits. Older kernels do not show it.
        type: raw
      wk:
        description: Pattern of EP11's wrapping key, 32 digits as in C(EXPECTED_WKVP) of C(ep11tok.conf), or the 64 that the kernel shows.
        type: raw
  lszcrypt:
    description: Path of C(lszcrypt). By default it is looked for where root's programs are, and done without if it is not there.
    type: path
  sysfs_root:
    description: Where sysfs is mounted.
    type: path
    default: /sys
attributes:
  check_mode:
    description: Changes nothing in either mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.pkcs11_token_info
  - name: lszcrypt
    description: The program's own documentation.
    link: https://github.com/ibm-s390-linux/s390-tools
"""

EXAMPLES = r"""
- name: What adapters are there?
  hsm.tde.cryptocard_info:
  register: adapters

- name: Does the default domain hold our EP11 wrapping key on every card?
  hsm.tde.cryptocard_info:
    expected:
      wk: '8ad5a7d8ba8aebbd3a1f2c7c0f1b2a4d'
  register: adapters

- name: Stop if not, and say why
  ansible.builtin.assert:
    that: adapters.default_domain.ready
    fail_msg: "{{ adapters.default_domain.reasons | join(' ') }}"

- name: The same for a token that takes any domain (APQN_ANY)
  ansible.builtin.assert:
    that: adapters.usage_domains.ready
    fail_msg: "{{ adapters.usage_domains.reasons | join(' ') }}"

- name: The AES and APKA master keys of CCA
  hsm.tde.cryptocard_info:
    mode: cca
    expected:
      aes: '0x2d6f1a5be9c08347'
      apka: '0x90c17be24d358f6a'
"""

RETURN = r"""
present:
  description: Whether the host has the AP bus.
  returned: success
  type: bool
  sample: true
message:
  description: What there is, or why there is nothing, in a sentence or two.
  returned: success
  type: str
  sample: 'Cards: 2. Queues: 4, 4 of them online. Default domain: 0005.'
default_domain:
  description: Whether the default domain holds the key this host needs, on every card of the mode.
  returned: success
  type: dict
  contains: &verdict
    queues:
      description: The queues that were judged.
      type: list
      elements: str
      sample: ['00.0005', '01.0005']
    ready:
      description: Whether each of them is online and holds the key.
      type: bool
      sample: false
    codes:
      description: >-
        A stable word for each reason - V(bus_absent), V(no_card), V(no_coprocessor), V(default_domain_unset),
        V(default_domain_unavailable), V(no_queue_online), V(card_absent), V(card_offline), V(card_deconfigured), V(card_checkstopped),
        V(card_unbound), V(card_unknown), V(queue_absent), V(queue_offline), V(queue_deconfigured), V(queue_checkstopped),
        V(queue_reserved), V(queue_unbound), V(queue_unknown), V(queue_other_mode), V(functions_restricted), V(queue_not_bound),
        V(queue_not_associated), V(master_keys_differ), V(master_key_unknown), V(master_key_missing), V(master_key_not_set),
        V(master_key_changed) or V(master_key_other).
      type: list
      elements: str
      sample: [master_keys_differ, master_key_other]
    reasons:
      description: Why it is not ready, in plain sentences, one a code.
      type: list
      elements: str
      sample:
        - 'Queue 01.0005: the AES master key has the pattern 77e1f0a2b3c4d596, not the expected pattern 2d6f1a5be9c08347.'
usage_domains:
  description: The same of every queue that is online and that a program can get, for programs that take any domain.
  returned: success
  type: dict
  contains: *verdict
bus:
  description: Attributes of the bus. Domains are four hexadecimal digits.
  returned: success
  type: dict
  contains:
    default_domain:
      description: The default domain, null if none is set.
      type: str
      sample: '0005'
    max_domain:
      description: The highest domain that the machine can have, null if it does not tell.
      type: str
      sample: '0054'
    usage_domains:
      description: The domains whose keys this partition or guest may use, null if the machine does not tell.
      type: list
      elements: str
      sample: ['0005', '0006']
    control_domains:
      description: The domains that this partition may administer, null if the machine does not tell.
      type: list
      elements: str
      sample: ['0005', '0006']
    features:
      description: Features of the bus, as the kernel names them. Older kernels name none.
      type: list
      elements: str
      sample: [APSC, APXA, QACT, RC8A]
cards:
  description: The cards.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Number of the card, two hexadecimal digits.
      type: str
      sample: '00'
    type:
      description: Type of the card, null if no driver knows it. The last letter is C for CCA, P for EP11, A for accelerators.
      type: str
      sample: CEX8P
    mode:
      description: V(cca), V(ep11), V(accelerator) or V(unknown). An accelerator holds no master key.
      type: str
      sample: ep11
    status:
      description: V(online), V(offline), V(deconfigured), V(checkstopped), V(unbound) without a driver, or V(unknown).
      type: str
      sample: online
    restricted:
      description: Whether the hypervisor lets this guest use clear keys only, null if the card does not tell.
      type: bool
      sample: false
    hwtype:
      description: Number of the hardware type, 13 for CEX7, 14 for CEX8; null if the card does not tell.
      type: int
      sample: 14
    requests:
      description: Requests since the last reset, null if the card does not tell.
      type: int
      sample: 4711
    driver:
      description: The kernel's driver, null without one.
      type: str
      sample: cex4card
    serial:
      description: Serial number, null if the card is not online or does not tell.
      type: str
      sample: 93AABEE8
queues:
  description: The queues.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: Card and domain, C(CARD.DOMAIN).
      type: str
      sample: '00.0005'
    card:
      description: Number of the card.
      type: str
      sample: '00'
    domain:
      description: The domain.
      type: str
      sample: '0005'
    type:
      description: Type of the card, null if no driver knows it.
      type: str
      sample: CEX8P
    mode:
      description: Mode of the card.
      type: str
      sample: ep11
    status:
      description: As a card's, or V(reserved) for KVM guests of this host (driver C(vfio_ap)).
      type: str
      sample: online
    requests:
      description: Requests since the last reset, null if the queue does not tell.
      type: int
      sample: 815
    driver:
      description: The kernel's driver, null without one.
      type: str
      sample: cex4queue
    se_bind:
      description: State of binding to a Secure Execution guest, null elsewhere.
      type: str
      sample: bound
    se_associate:
      description: State of association with a secret of a Secure Execution guest, null elsewhere.
      type: str
      sample: associated 0
    master_keys:
      description:
        - The registers of the master keys C(aes), C(apka) and C(asym) (CCA) or C(wk) (EP11), as far as the kernel shows them - C(new),
          C(current) and C(old), each with its C(state) in the kernel's word or V(unknown), and the C(pattern), null without a key.
        - Empty if the queue is not online. What kernels show of a queue that is offline is what they last saw.
      type: dict
      sample:
        wk:
          current:
            state: valid
            pattern: 8ad5a7d8ba8aebbd3a1f2c7c0f1b2a4d1d2e3f405162738495a6b7c8d9eafb0c
          new:
            state: empty
            pattern: null
unreadable:
  description: Attributes that are there and could not be read, or for which a card did not answer in time.
  returned: success
  type: list
  elements: dict
  contains:
    attribute:
      description: The device and the attribute.
      type: str
      sample: 00.0005/mkvps
    reason:
      description: What the operating system says.
      type: str
      sample: Input/output error
lszcrypt:
  description: What the second source adds.
  returned: success
  type: dict
  contains:
    path:
      description: The program that was asked, null if none was.
      type: str
      sample: lszcrypt
    message:
      description: Why it was not asked, or what it complained of; empty if all is well.
      type: str
      sample: ''
    warnings:
      description: Its warnings.
      type: list
      elements: str
      sample: ['Warning: Default domain 0x05 is not available.']
    differences:
      description: Where it says something else than sysfs.
      type: list
      elements: str
      sample: ['Card 0b: sysfs says status deconfigured, lszcrypt says online.']
    filled:
      description: What sysfs did not tell and it did.
      type: list
      elements: str
      sample: []
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.hsm import cryptocard
from ansible_collections.hsm.tde.plugins.module_utils.hsm.cryptocard_verdict import PATTERN_DIGITS, expected_patterns


def act(module: TdeModule) -> dict[str, t.Any]:
    """Read and judge; the result as RETURN says."""
    params = module.params
    expected = expected_patterns(params["expected"] or {}, params["mode"])
    return {"changed": False, **cryptocard.gather(params["sysfs_root"], params["lszcrypt"], expected, params["mode"])}


def main() -> None:
    spec: dict[str, t.Any] = {
        "mode": {"type": "str", "choices": ["cca", "ep11"]},
        "expected": {"type": "dict", "options": {name: {"type": "raw"} for name in PATTERN_DIGITS}},
        "lszcrypt": {"type": "path"},
        "sysfs_root": {"type": "path", "default": "/sys"},
    }
    run_module(act, spec, read_only=True)


if __name__ == "__main__":
    main()
