#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_command
short_description: Install the command hsm-tde and the systemd units that open keystores at boot
version_added: 0.1.0
description:
  - Installs C(hsm-tde), one file that opens, closes and checks keystores without Ansible, made of the same code as the modules.
  - Where systemd runs the host, writes C(hsm-tde@.service), and for each cluster in O(clusters) what makes its database's
    units wait for the open keystore, and not start without it.
  - Where there is no systemd, the command is all that is installed; call C(hsm-tde open --all) from what starts the host's services.
  - A file with other content than ours is never overwritten or removed.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  state:
    description:
      - V(present) installs, V(absent) removes the command and, where units are looked after, all units and drop-ins that
        this module wrote.
      - Keystores, keys and records stay as they are.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: Where the command is installed. Its folder and all above it must belong to root.
    type: path
    default: /usr/local/sbin/hsm-tde
  python:
    description:
      - The interpreter that runs the command, with the libraries that the role P(hsm.tde.prerequisites#role) installs.
      - It is run isolated (C(-I)), and it and its folders must belong to root.
      - The one that runs this module, if it is not given.
    type: path
  units:
    description: Whether systemd units are written.
    type: str
    choices:
      auto: Where systemd runs the host; the result says so where it does not.
      always: Also where systemd does not run, as when an image is built.
      never: Units are neither written nor looked at.
    default: auto
  unit_directory:
    description: Where the units are written.
    type: path
    default: /etc/systemd/system
  clusters:
    description:
      - Clusters whose keystore is opened at boot. Those not listed here are left as they are.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The cluster's name, as in M(hsm.tde.tde_keystore).
        type: str
        required: true
      database_units:
        description:
          - Units of the database, such as V(postgresql@15-main.service). Each gets a drop-in, so that it starts after the
            keystore was opened and only if it was. A keystore that is opened in the running server (engine V(fep)) is opened
            after each start of the unit instead.
          - Without any, the keystore is opened at boot on its own account.
        type: list
        elements: str
        default: []
      credential:
        description:
          - Path of the token's PIN as C(systemd-creds encrypt) wrote it. systemd (250 or newer) decrypts it for the command
            alone, under the file's name.
          - The keystore's O(hsm.tde.tde_keystore#module:pin_source.kind) is then V(credential), with the same path.
        type: path
      enabled:
        description: V(false) removes what ties this cluster to the boot.
        type: bool
        default: true
extends_documentation_fragment:
  - hsm.tde.state
attributes:
  check_mode:
    description: Predicts the changes without making them.
    support: full
  diff_mode:
    description: Shows mode, size and SHA-256 of each file before and after.
    support: full
notes:
  - Run as root on the target.
seealso:
  - module: hsm.tde.tde_keystore
"""

EXAMPLES = r"""
- name: Install the command, and let Debian's cluster 15/main wait for its keystore
  hsm.tde.tde_command:
    clusters:
      - name: main
        database_units:
          - postgresql@15-main.service

- name: The PIN is a systemd credential, sealed to this host's TPM
  hsm.tde.tde_command:
    clusters:
      - name: main
        database_units: [postgresql@15-main.service]
        credential: /etc/credstore.encrypted/hsm-tde.main.pin

- name: Remove the command and its units
  hsm.tde.tde_command:
    state: absent
"""

RETURN = r"""
command:
  description: Where the command is.
  returned: success
  type: str
  sample: /usr/local/sbin/hsm-tde
sha256:
  description: SHA-256 of the command as it is wished for; equal on every host with the same release and interpreter path.
  returned: when O(state=present)
  type: str
  sample: 6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b
units_written:
  description: Whether units were looked after.
  returned: success
  type: bool
  sample: true
units_reason:
  description: Why units were, or were not, looked after.
  returned: success
  type: str
  sample: systemd runs this host.
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
      description: The file.
      type: str
      sample: /usr/local/sbin/hsm-tde
    why:
      description: Why it is needed.
      type: str
      sample: missing
"""

import sys
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.command import install
from ansible_collections.hsm.tde.plugins.module_utils.command.keystores import after_start
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.options import state_options
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory


def act(module: TdeModule) -> dict[str, t.Any]:
    """Install or remove; the result as RETURN says."""
    params = module.params
    with_units, reason = install.units_wished(params["units"])
    wish = install.Wish(
        present=params["state"] == "present",
        path=params["path"],
        python=params["python"] or sys.executable,
        state_directory=params["state_directory"],
        unit_directory=params["unit_directory"],
        with_units=with_units,
        clusters=tuple(
            install.Cluster(
                one["name"],
                tuple(one["database_units"]),
                one["credential"],
                one["enabled"],
                after_start(StateDirectory(params["state_directory"]), one["name"]),
            )
            for one in params["clusters"]
        ),
    )
    result = install.ensure(wish, check=module.check_mode)
    return {**result, "units_written": with_units, "units_reason": reason}


def main() -> None:
    run_module(
        act,
        {
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "path": {"type": "path", "default": "/usr/local/sbin/hsm-tde"},
            "python": {"type": "path"},
            "units": {"type": "str", "choices": ["auto", "always", "never"], "default": "auto"},
            "unit_directory": {"type": "path", "default": "/etc/systemd/system"},
            "clusters": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "database_units": {"type": "list", "elements": "str", "default": []},
                    "credential": {"type": "path"},
                    "enabled": {"type": "bool", "default": True},
                },
            },
            **state_options(),
        },
        # The command needs them, and runs under this interpreter if no other is named.
        libraries=("cryptography", "pkcs11", "psycopg"),
    )


if __name__ == "__main__":
    main()
