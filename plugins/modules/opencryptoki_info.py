#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: opencryptoki_info
short_description: Show openCryptoki's version, slots, tokens, daemon, group and token folders
version_added: 0.1.0
description:
  - Shows what openCryptoki's configuration says and what its library answers, side by side, without a PIN.
  - Where the library answers nothing, it tells why. Without the daemon and for a user outside the group C(pkcs11) the library
    itself gives the same answer.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  users:
    description: Users, such as the database's, of whom to tell whether they may use openCryptoki.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Changes nothing in any mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.opencryptoki_config
  - module: hsm.tde.opencryptoki_daemon
  - module: hsm.tde.pkcs11_token_info
"""

EXAMPLES = r"""
- name: Look at openCryptoki, and whether the database may use it
  hsm.tde.opencryptoki_info:
    users: [postgres]
  register: opencryptoki

- name: Stop where a configured slot has no token
  ansible.builtin.assert:
    that: opencryptoki.slots | selectattr('configured') | rejectattr('listed') | length == 0
"""

RETURN = r"""
installed:
  description: Whether library and daemon are installed.
  returned: success
  type: bool
  sample: true
library:
  description: Path of the PKCS#11 library, empty if it is not installed.
  returned: success
  type: str
  sample: /usr/lib/s390x-linux-gnu/opencryptoki/libopencryptoki.so.0
version:
  description: Version of openCryptoki, null if it is not installed.
  returned: success
  type: str
  sample: "3.23"
api:
  description: Whether the library answers to root, and if not, why.
  returned: success
  type: dict
  contains:
    answers:
      description: Whether it does.
      type: bool
      sample: false
    error_code:
      description: Why not, as a code of docs/error-codes.md; empty if it does.
      type: str
      sample: opencryptoki_daemon_down
    message:
      description: The same in a sentence.
      type: str
      sample: its daemon pkcsslotd does not run
    next_step:
      description: What helps.
      type: str
      sample: Start it.
slots:
  description: The slots of opencryptoki.conf and of the library, by number.
  returned: success
  type: list
  elements: dict
  contains:
    number:
      description: The slot's number, also its id in PKCS#11.
      type: int
      sample: 3
    configured:
      description: Whether it is in opencryptoki.conf.
      type: bool
      sample: true
    listed:
      description: Whether the library lists it with a token in it.
      type: bool
      sample: true
    reason:
      description: Why the two differ; empty if they do not, or if the library does not answer.
      type: str
      sample: libpkcs11_ica.so is not installed
    stdll:
      description: The library of its token.
      type: str
      sample: libpkcs11_sw.so
    tokversion:
      description: The configured format of the token's folder; empty where none is given.
      type: str
      sample: "3.12"
    confname:
      description: The token's own configuration file.
      type: str
      sample: ep11tok.conf
    usergroup:
      description: The group whose members see the token.
      type: str
      sample: pkcs11
    description:
      description: The slot's description.
      type: str
      sample: Linux
    label:
      description: The token's label.
      type: str
      sample: payroll
    model:
      description: The token's model.
      type: str
      sample: Soft
    flags:
      description: The token's flags in words, as M(hsm.tde.pkcs11_token_info) returns them.
      type: list
      elements: str
      sample: [rng, login_required, user_pin_initialized, token_initialized]
    store:
      description: The folder with the token's objects; null where it is not known.
      type: dict
      sample:
        path: /var/lib/opencryptoki/swtok
        exists: true
        owner: root
        group: pkcs11
        format: "3.12"
configuration_problems:
  description: What the version that is installed would not take in opencryptoki.conf, by line.
  returned: success
  type: list
  elements: dict
  contains:
    line:
      description: The line, counted from 1; 0 for the file as a whole.
      type: int
      sample: 12
    reason:
      description: Why.
      type: str
      sample: slot 3 is there twice, first on line 4
daemon:
  description: The daemon pkcsslotd.
  returned: success
  type: dict
  contains:
    running:
      description: Whether at least one serves this host.
      type: bool
      sample: true
    pids:
      description: The process ids of all that do. More than one is a fault.
      type: list
      elements: int
      sample: [812]
    systemd:
      description: Whether systemd runs here and has the service.
      type: bool
      sample: true
    of_the_unit:
      description: Whether the one that runs is the service's.
      type: bool
      sample: true
    restart_required:
      description: Whether opencryptoki.conf was written after its start.
      type: bool
      sample: false
programs:
  description: Programs that use the library now.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: Process id.
      type: int
      sample: 4711
    name:
      description: Its name.
      type: str
      sample: postgres
group:
  description: openCryptoki's group.
  returned: success
  type: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: pkcs11
    exists:
      description: Whether it exists.
      type: bool
      sample: true
    members:
      description: The users that it names.
      type: list
      elements: str
      sample: [root, postgres]
users:
  description: The users of the option, in its order.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The user's name.
      type: str
      sample: postgres
    exists:
      description: Whether there is such a user.
      type: bool
      sample: true
    member:
      description: Whether the group names the user. That it is the user's primary group does not count for openCryptoki.
      type: bool
      sample: true
    may_use:
      description: Whether openCryptoki lets the user in.
      type: bool
      sample: true
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki


def act(module: TdeModule) -> dict[str, t.Any]:
    """The facts, as RETURN says."""
    return {"changed": False, **opencryptoki.gather(module.params["users"])}


def main() -> None:
    run_module(act, {"users": {"type": "list", "elements": "str", "default": []}}, libraries=("pkcs11",), read_only=True)


if __name__ == "__main__":
    main()
