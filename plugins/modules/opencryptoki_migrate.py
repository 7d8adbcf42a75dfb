#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: opencryptoki_migrate
short_description: Bring an openCryptoki token's folder to the format that is fit for FIPS
version_added: 0.1.0
description:
  - Runs openCryptoki's own C(pkcstok_migrate) on the folder of one slot's token, and sets C(tokversion = 3.12) in the slot.
  - In the old format the token's master key is encrypted under an MD5 hash of a PIN; in the new one under PBKDF2 and AES-256.
  - The keys and PINs stay as they are. A token that has the new format is left alone.
  - Nobody may use the token meanwhile. The daemon and all programs have to be stopped before.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  slot:
    description: The slot's number in C(opencryptoki.conf).
    type: int
    required: true
  so_pin:
    description: The security officer's PIN. Needed where there is something to migrate. A wrong one spends no try.
    type: str
  pin:
    description: The user PIN. Needed where there is something to migrate. A wrong one spends no try.
    type: str
extends_documentation_fragment:
  - hsm.tde.state
attributes:
  check_mode:
    description: Returns the plan and changes nothing.
    support: full
  diff_mode:
    description: Shows the folder's format before and after.
    support: full
seealso:
  - module: hsm.tde.opencryptoki_config
  - module: hsm.tde.opencryptoki_daemon
"""

EXAMPLES = r"""
- name: Nobody uses the token
  hsm.tde.opencryptoki_daemon:
    state: stopped

- name: The folder is in the new format
  hsm.tde.opencryptoki_migrate:
    slot: 3
    so_pin: "{{ vault_so_pin }}"
    pin: "{{ vault_pin }}"

- name: The daemon serves it
  hsm.tde.opencryptoki_daemon:
    state: started
"""

RETURN = r"""
format:
  description: The folder's format after the run; C(none) where no token was ever started in it.
  returned: success
  type: str
  sample: "3.12"
backup:
  description:
    - The former folder, empty if none was made. It holds the same keys under weaker protection, so take it off the host once
      the token has proved to work.
  returned: success
  type: str
  sample: /var/lib/opencryptoki/swtok_BAK
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: migrate_store
    object:
      description: The folder or the slot.
      type: str
      sample: token folder /var/lib/opencryptoki/swtok
    why:
      description: Why it is needed.
      type: str
      sample: it is in the old format
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import state_options
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_migrate


def act(module: TdeModule) -> dict[str, t.Any]:
    """Migrate the folder; the result as RETURN says."""
    params = module.params
    outcome = opencryptoki_migrate.migrate(
        params["slot"],
        secret_from_option("so_pin", params["so_pin"]),
        secret_from_option("pin", params["pin"]),
        StateDirectory(params["state_directory"]),
        check_mode=module.check_mode,
    )
    return {
        "changed": bool(outcome.plan),
        "plan": planning.public(outcome.plan),
        "format": outcome.after,
        "backup": outcome.backup,
        "diff": {"before": {"format": outcome.before}, "after": {"format": outcome.after}},
    }


def main() -> None:
    run_module(
        act,
        {
            "slot": {"type": "int", "required": True},
            "so_pin": {"type": "str", "no_log": True},
            "pin": {"type": "str", "no_log": True},
            **state_options(),
        },
        libraries=("pkcs11",),
    )


if __name__ == "__main__":
    main()
