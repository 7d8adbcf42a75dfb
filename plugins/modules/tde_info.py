#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_info
short_description: What is encrypted, by what, and what is in the clear
version_added: 0.1.0
description:
  - Reports a cluster's keystore, master keys, keyslots with their ages and check values, encrypted places, server, tablespaces and databases,
    and in RV(gaps) what is in the clear or weakly protected, in plain words.
  - Works on any running PostgreSQL, also on a host where this collection never did anything. Each tablespace is judged by what the
    kernel says of its directory.
  - Needs root on the target, and no PIN. What cannot be established is named as a gap, never left out.
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.database
  - hsm.tde.kmip
  - hsm.tde.pkcs11
  - hsm.tde.state
attributes:
  check_mode:
    description: Changes nothing in any mode.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.tde_proof
"""

EXAMPLES = r"""
- name: A first look at a server
  hsm.tde.tde_info:
    engine: postgresql
    cluster: main
  register: tde

- name: What is in the clear
  ansible.builtin.debug:
    var: tde.gaps
"""

RETURN = r"""
cluster:
  description: The cluster's name.
  returned: success
  type: str
  sample: main
engine:
  description: The engine.
  returned: success
  type: str
  sample: postgresql
managed:
  description: Whether the target has a record of the cluster.
  returned: success
  type: bool
  sample: true
encrypted:
  description:
    - Whether the data directory, the parts of it that lie elsewhere and every tablespace are encrypted, by whatever means.
    - Never true of a cluster that is closed, for then nothing tells what lies elsewhere.
  returned: success
  type: bool
  sample: false
coverage:
  description: The coverage, null if the cluster is not managed.
  returned: success
  type: str
  sample: tablespaces
gaps:
  description: What is in the clear or weakly protected, one sentence each.
  returned: success
  type: list
  elements: str
  sample:
    - The write-ahead log is in the clear, with every change of the encrypted tablespaces in it, and so is its archive.
problems:
  description: What could not be established.
  returned: success
  type: list
  elements: str
  sample: []
master_keys:
  description: The master keys that the target remembers for the cluster, the oldest first.
  returned: success
  type: list
  elements: dict
  sample:
    - label: hsm-tde.main
      id: 8d1f
      token_label: demo
      token_serial: 4f5a0f7d70dcd6a3
      kmip_service: null
      age_days: 12
      current: true
data_keys:
  description: The data keys with their keyslots, and what they were once under.
  returned: success
  type: list
  elements: dict
  sample:
    - key_id: tablespace.sealed
      check_value: 8699c2c53707405da5aba5ae4d8583c0
      formerly: []
      keyslots:
        - name: primary
          protection: token
          proved: true
          age_days: 12
          token_label: demo
          token_serial: 4f5a0f7d70dcd6a3
          kmip_service: null
          kek_leaves_server: null
          master_key: hsm-tde.main
          master_key_check_value: 1f2e3d
places:
  description: The encrypted directories, and whether the kernel holds their keys.
  returned: success
  type: list
  elements: dict
  sample:
    - key_id: tablespace.sealed
      path: /srv/tde/sealed
      exists: true
      encrypted: true
      made: true
      kernel_key: present
      mount_point: /srv/tde
tokens:
  description: How the tokens are reached.
  returned: success
  type: list
  elements: dict
  sample:
    - label: demo
      serial: 4f5a0f7d70dcd6a3
      library: /usr/lib/softhsm/libsofthsm2.so
      environment: {}
kmip:
  description: How the KMIP services are reached. The client's key is a file on the target.
  returned: success
  type: list
  elements: dict
  sample:
    - service: kmip
      servers: [kms1.example.com]
      ca: /etc/hsm-tde/kmip-ca.pem
      certificate: /etc/hsm-tde/kmip.pem
      key: /etc/hsm-tde/kmip.key
      timeout: 10.0
pin_source:
  description: Where the PIN comes from at boot, null if the cluster is not managed.
  returned: success
  type: dict
  sample:
    kind: none
same_disk:
  description: Whether the PIN's file and the store lie on one file system.
  returned: success
  type: bool
  sample: false
server:
  description: What can be told of the server.
  returned: success
  type: dict
  sample:
    address: /var/run/postgresql/.s.PGSQL.5432
    running: true
    pid: 4711
    data_directory: /var/lib/postgresql/15/main
    answers: true
    problem: null
    error_code: null
    version: 150014
    standby: false
    standbys_attached: 0
    settings:
      archive_mode: 'off'
data_directory:
  description: The data directory, as an entry of RV(tablespaces) without name and owner; null if it is not known.
  returned: success
  type: dict
  sample:
    path: /var/lib/postgresql/15/main
    encryption: plain
    identifier: null
    key_id: null
    kernel_key: null
    problem: null
    mount:
      mount_point: /
      filesystem: ext4
      source: /dev/vda1
adopted:
  description: The data keys whose file this host took as it found it, having no journal of it; a roll-back before that was not noticed.
  returned: success
  type: list
  elements: str
  sample: []
elsewhere:
  description: The parts of the data directory that a link or a mount puts elsewhere, such as the write-ahead log, each as RV(tablespaces) has it.
  returned: success
  type: list
  elements: dict
  sample: []
tablespaces:
  description:
    - Every tablespace. RV(tablespaces[].encryption) is V(ours), V(unknown_key) (encrypted by the kernel, not by this host's store),
      V(dm_crypt), V(engine) (encrypted by the database server, as it says), V(plain) or V(unknown).
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: sealed
    owner:
      description: Its owner.
      type: str
      sample: postgres
    path:
      description: Its directory, links resolved.
      type: str
      sample: /srv/tde/sealed
    encryption:
      description: How it is encrypted.
      type: str
      sample: ours
    algorithm:
      description: The cipher of a server that encrypts itself, with O(engine=fep).
      type: str
      sample: AES256
    identifier:
      description: Identifier of the kernel's key.
      type: str
      sample: 8699c2c53707405da5aba5ae4d8583c0
    key_id:
      description: Name of the data key in the store.
      type: str
      sample: tablespace.sealed
    kernel_key:
      description: Whether the kernel holds the key.
      type: str
      sample: present
    mount:
      description: Mount point, file system and device.
      type: dict
      sample:
        mount_point: /srv/tde
        filesystem: ext4
        source: /dev/loop0
    problem:
      description: Why its encryption is unknown.
      type: str
      sample: null
keystore:
  description: The server's own keystore, as far as can be told without its PIN or passphrase.
  returned: with O(engine=fep)
  type: dict
  sample:
    kind: hsm
    location: /var/lib/fep/keystore
    made: true
    open: true
    opens_by_itself: false
    pin_at_rest: false
    slot_id: 5
    tag: "2"
    set: '2026-11-22'
databases:
  description: The databases, with the tablespace that they lie in and the one that tables to come go to.
  returned: success
  type: list
  elements: dict
  sample:
    - name: shop
      tablespace: pg_default
      default_tablespace: sealed
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options, load
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import request

SPEC: dict[str, t.Any] = database_options()


def act(module: TdeModule) -> dict[str, t.Any]:
    """Look; the result as RETURN says."""
    engine = load(module.params["engine"])(request(module.params))
    return {"changed": False, **engine.info()}


def main() -> None:
    run_module(act, SPEC, libraries=("cryptography", "pkcs11", "psycopg"), read_only=True)


if __name__ == "__main__":
    main()
