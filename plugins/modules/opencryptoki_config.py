#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: opencryptoki_config
short_description: Configure openCryptoki's slots and the files of its EP11 and CCA tokens
version_added: 0.1.0
description:
  - Edits C(opencryptoki.conf), and the files of EP11 and CCA tokens, in place. Comments, order and white space elsewhere stay
    byte for byte.
  - Judges the new files by the grammar of the version that is installed, 3.8 to 3.27, and names the line of what it would not
    take. The older daemons drop a slot without a word where the file has a comment within its braces.
  - Before a file is replaced, a daemon of its own is started on the new files, in name spaces of its own and on empty folders,
    and its library is asked. A slot that was asked for and is not listed, or that was listed and is not any more, is an error,
    and the files stay as they were. The host's daemon is neither asked nor disturbed.
  - The folder of the token of each slot that was asked for is opened to its group where the group cannot write in it. In the
    folders that Debian's package brings, nobody but root can make a key.
  - The host's daemon reads the new file at its next start only. See RV(restart_required) and M(hsm.tde.opencryptoki_daemon).
author:
  - The hsm.tde authors (@hsm-tde)
options:
  slots:
    description: Slots, as they shall be. Those that are not named stay as they are, unless O(exclusive) is set.
    type: list
    elements: dict
    default: []
    suboptions:
      number:
        description: The slot's number, also its id in PKCS#11.
        type: int
        required: true
      state:
        description: Whether it is there.
        type: str
        choices:
          present: It is there. Of its keys, those that are given are set, those that are an empty text are removed, all others stay.
          absent: It is not there. The token's folder and what is in it stay.
        default: present
      stdll:
        description: The library of the token, such as C(libpkcs11_sw.so), C(libpkcs11_ep11.so) or C(libpkcs11_cca.so).
        type: str
      tokname:
        description:
          - The name of the token's folder. Needed where two slots have the same O(slots[].stdll).
        type: str
      tokversion:
        description: The format of the token's folder, C(3.12) for the one that is fit for FIPS. From openCryptoki 3.12 on.
        type: str
      usergroup:
        description: The group whose members see the token. From openCryptoki 3.24 on.
        type: str
      confname:
        description: The token's own configuration file.
        type: str
      description:
        description: The slot's description, 64 bytes at most.
        type: str
      manufacturer:
        description: The slot's manufacturer, 32 bytes at most.
        type: str
      hwversion:
        description: The version of its hardware, such as C(2.32).
        type: str
      firmwareversion:
        description: The version of its firmware, such as C(1.0).
        type: str
  exclusive:
    description: Slots that O(slots) does not name are removed.
    type: bool
    default: false
  disable_event_support:
    description: Whether openCryptoki takes no notice of changes of the adapters. From openCryptoki 3.17 on.
    type: bool
  statistics:
    description: What openCryptoki counts. From openCryptoki 3.18 on.
    type: list
    elements: str
    choices: ["on", "off", implicit, internal]
  ep11:
    description: Files of EP11 tokens.
    type: list
    elements: dict
    default: []
    suboptions:
      file:
        description: The file's name in C(/etc/opencryptoki), the slot's O(slots[].confname).
        type: str
        default: ep11tok.conf
      apqns:
        description:
          - The adapters and domains that the token uses, as C(CARD.DOMAIN) in hexadecimal, as C(lszcrypt) shows them. C(any) for all.
        type: list
        elements: str
      expected_wkvp:
        description:
          - The verification pattern of the wrapping key that all of them must have, 16 bytes in hexadecimal. Empty for none.
          - From openCryptoki 3.20 on.
        type: str
      modes:
        description: The modes that are on; all others are off.
        type: list
        elements: str
        choices:
          - FORCE_SENSITIVE
          - STRICT_MODE
          - VHSM_MODE
          - OPTIMIZE_SINGLE_PART_OPERATIONS
          - USE_PRANDOM
          - FIPS_SESSION_MODE
      pkey_mode:
        description: When keys are also kept as protected keys, for speed.
        type: str
        choices: [DISABLED, DEFAULT, ENABLE4NONEXTR, ENABLE4EXTR, ENABLE4ALL]
  cca:
    description: Files of CCA tokens. From openCryptoki 3.20 on.
    type: list
    elements: dict
    default: []
    suboptions:
      file:
        description: The file's name in C(/etc/opencryptoki), the slot's O(slots[].confname).
        type: str
        default: ccatok.conf
      expected_mkvps:
        description:
          - The verification patterns that the master keys of all adapters must have, 8 bytes in hexadecimal each.
            Those that are not given are not checked.
        type: dict
        required: true
        suboptions:
          sym:
            description: Of the master key SYM.
            type: str
          aes:
            description: Of the master key AES.
            type: str
          apka:
            description: Of the master key APKA.
            type: str
  backup:
    description: Keep a copy of each file that is replaced, beside it.
    type: bool
    default: false
extends_documentation_fragment:
  - hsm.tde.state
attributes:
  check_mode:
    description:
      - Returns the plan and changes nothing. The new files are tried out as they are without check mode.
      - Where openCryptoki is not installed yet, it warns, and tells a change.
    support: full
  diff_mode:
    description: Shows the files before and after, and of folders group and mode.
    support: full
notes:
  - Trying out needs the right to make name spaces. In a container without C(CAP_SYS_ADMIN) the files are judged by their grammar
    only, with a warning.
seealso:
  - module: hsm.tde.opencryptoki_daemon
  - module: hsm.tde.opencryptoki_info
  - module: hsm.tde.opencryptoki_migrate
"""

EXAMPLES = r"""
- name: A soft token for trials and an EP11 token for the database
  hsm.tde.opencryptoki_config:
    slots:
      - number: 3
        stdll: libpkcs11_sw.so
      - number: 4
        stdll: libpkcs11_ep11.so
        confname: ep11tok.conf
        description: The database's keys
    ep11:
      - apqns: ["03.0011", "0a.0011"]
        expected_wkvp: "{{ wrapping_key_pattern }}"
    backup: true
  register: opencryptoki

- name: The daemon reads it
  hsm.tde.opencryptoki_daemon:
    state: restarted
  when: opencryptoki.restart_required
"""

RETURN = r"""
version:
  description: Version of openCryptoki.
  returned: when openCryptoki is installed
  type: str
  sample: "3.23"
slots:
  description: The slots that the library lists with the new files, each with a token in it.
  returned: when they could be tried out
  type: list
  elements: dict
  contains:
    number:
      description: The slot's number.
      type: int
      sample: 3
    description:
      description: Its description.
      type: str
      sample: Linux
    model:
      description: The model of its token.
      type: str
      sample: Soft
not_listed:
  description: Slots that were not asked for and are not listed, neither before nor after, such as those of the package's own file.
  returned: when they could be tried out
  type: list
  elements: dict
  contains:
    number:
      description: The slot's number.
      type: int
      sample: 1
    reason:
      description: Why it is not listed.
      type: str
      sample: libpkcs11_ica.so is not installed
tried_out:
  description: Whether a daemon of its own was asked.
  returned: when openCryptoki is installed
  type: bool
  sample: true
restart_required:
  description: Whether the daemon that runs has yet to read C(opencryptoki.conf).
  returned: when openCryptoki is installed
  type: bool
  sample: true
backup_files:
  description: The copies that were made.
  returned: success
  type: list
  elements: str
  sample: [/etc/opencryptoki/opencryptoki.conf.20260312T081500Z.4711]
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: write_file
    object:
      description: The file or folder.
      type: str
      sample: /etc/opencryptoki/opencryptoki.conf
    why:
      description: Why it is needed.
      type: str
      sample: slot 4 is not there
"""

import os
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.options import state_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_config as config
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_daemon as daemon
from ansible_collections.hsm.tde.plugins.module_utils.hsm.opencryptoki_api import CONF_DIR, library_path
from ansible_collections.hsm.tde.plugins.module_utils.hsm.opencryptoki_rules import EP11_MODES, PKEY_MODES, SLOT_KEYS


def _wish(params: dict[str, t.Any]) -> config.ConfigWish:
    return config.wish_of(
        slots=params["slots"],
        exclusive=params["exclusive"],
        disable_event_support=params["disable_event_support"],
        statistics=params["statistics"],
        ep11=params["ep11"],
        cca=params["cca"],
        backup=params["backup"],
    )


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the configuration to the wished state; the result as RETURN says."""
    wish = _wish(module.params)
    if module.check_mode:
        try:
            library_path()
        except TdeError as exc:
            module.warn(f"{exc} What this task would change cannot be told before that.")
            return {"changed": True, "plan": [], "backup_files": [], "diff": {"before": {}, "after": {}}}
    outcome = config.configure(wish, StateDirectory(module.params["state_directory"]), check_mode=module.check_mode)
    for warning in outcome.warnings:
        module.warn(warning)
    result: dict[str, t.Any] = {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "version": "{}.{}".format(*outcome.version),
        "tried_out": outcome.answer is not None,
        "restart_required": daemon.restart_required(any(step.data.get("name") == config.MAIN for step in outcome.plan)),
        "backup_files": outcome.backups,
        "diff": [
            {
                "before": before,
                "after": after,
                "before_header": os.path.join(CONF_DIR, name),
                "after_header": os.path.join(CONF_DIR, name),
            }
            for name, (before, after) in outcome.texts.items()
            if before != after
        ]
        + [
            {
                "before": f"{step.data['before']}\n",
                "after": f"{step.data['after']}\n",
                "before_header": step.obj,
                "after_header": step.obj,
            }
            for step in outcome.plan
            if step.action == "open_folder"
        ],
    }
    if outcome.answer is not None:
        result["slots"] = [
            {"number": number, "description": slot.description, "model": slot.model}
            for number, slot in sorted(outcome.answer.slots.items())
        ]
        result["not_listed"] = [{"number": number, "reason": reason} for number, reason in sorted(outcome.not_listed.items())]
    return result


def main() -> None:
    run_module(
        act,
        {
            "slots": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "number": {"type": "int", "required": True},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                    **{key: {"type": "str"} for key in SLOT_KEYS},
                },
            },
            "exclusive": {"type": "bool", "default": False},
            "disable_event_support": {"type": "bool"},
            "statistics": {"type": "list", "elements": "str", "choices": ["on", "off", "implicit", "internal"]},
            "ep11": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "file": {"type": "str", "default": "ep11tok.conf"},
                    "apqns": {"type": "list", "elements": "str"},
                    "expected_wkvp": {"type": "str"},
                    "modes": {"type": "list", "elements": "str", "choices": list(EP11_MODES)},
                    "pkey_mode": {"type": "str", "choices": list(PKEY_MODES)},
                },
            },
            "cca": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "file": {"type": "str", "default": "ccatok.conf"},
                    "expected_mkvps": {
                        "type": "dict",
                        "required": True,
                        "options": {"sym": {"type": "str"}, "aes": {"type": "str"}, "apka": {"type": "str"}},
                    },
                },
            },
            "backup": {"type": "bool", "default": False},
            **state_options(),
        },
        libraries=("pkcs11",),
    )


if __name__ == "__main__":
    main()
