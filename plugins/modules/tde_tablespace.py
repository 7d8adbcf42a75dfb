#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_tablespace
short_description: Create encrypted tablespaces, and move tables, schemas and databases into them
version_added: 0.1.0
description:
  - Each tablespace is a directory of its own that the kernel encrypts under a data key of its own; the data key is wrapped under all
    keyslots and proved before the directory is made.
  - Existing data is encrypted by moving it into such a tablespace while the server runs. Indexes, TOAST, partitions, materialized views that
    show the moved tables and, with a whole database, large objects come along.
  - Each relation is moved in a transaction of its own, with a lock time-out and a bounded number of tries. An interrupted run is resumed
    by the next; what has moved does not move again.
  - A tablespace that exists and is not encrypted is never encrypted in place.
  - The server must run on the target, as a primary.
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.database
  - hsm.tde.kmip
  - hsm.tde.pkcs11
  - hsm.tde.state
  - hsm.tde.database.keyslots
options:
  tablespaces:
    description: The tablespaces.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Its name, 1 to 52 of C(A-Z a-z 0-9 _ . -), beginning with a letter or digit. With O(engine=pg_tde) it is V(tde_heap).
        type: str
        required: true
      location:
        description:
          - Its directory, empty or not there yet, in a folder that belongs to root and that nobody else can write to, outside of the data directory.
          - Without it a directory of its name under O(postgresql.mount_point) or O(fep.tablespace_directory).
          - With O(engine=fep) its folder may also belong to the server's user.
        type: path
      owner:
        description: The role that owns it. Without it the role that creates it; that of an existing one stays.
        type: str
      algorithm:
        description:
          - The cipher. With O(engine=postgresql), V(AES256) is AES-256-XTS for contents and AES-256-CTS for names.
          - With O(engine=fep) the server encrypts, and both are possible. That of a tablespace that holds anything cannot change.
          - With O(engine=pg_tde) it is that of O(pg_tde.cipher).
        type: str
        choices: [AES128, AES256]
        default: AES256
      state:
        description: The tablespace is there.
        type: str
        choices: [present]
        default: present
      move:
        description:
          - What is to lie in it. Two tablespaces of one task never pull at one table. Its own name counts more than its schema, its schema
            more than its database.
        type: dict
        suboptions:
          tables:
            description: Tables and materialized views, as V(schema.table).
            type: list
            elements: str
          schemas:
            description: Schemas, with all tables in them.
            type: list
            elements: str
          database:
            description: The database of O(tablespaces[].move.tables) and O(tablespaces[].move.schemas). Without it O(login_db).
            type: str
          databases:
            description:
              - Whole databases. One without connections moves with its catalogs by C(ALTER DATABASE); from one that is in use the tables,
                indexes and large objects move one by one, and tables to come go to the tablespace by the database's setting
                C(default_tablespace).
              - What lies in another encrypted tablespace stays there.
            type: list
            elements: str
  keyslots:
    description:
      - They are for new data keys only. Without it, the same as those of the data keys that there are, with the task's PIN and O(passphrase).
  lock_timeout:
    description: Seconds that one try to move a relation waits for its lock. Others queue behind it meanwhile.
    type: float
    default: 10
  no_recovery:
    description: Go without a second keyslot, on purpose. If the only one is lost, so is the data.
    type: bool
    default: false
attributes:
  check_mode:
    description: Returns the plan and changes nothing.
    support: full
  diff_mode:
    description: Shows public facts before and after, in check mode as the plan expects them.
    support: full
seealso:
  - module: hsm.tde.tde_keystore
  - module: hsm.tde.tde_proof
"""

EXAMPLES = r"""
- name: Two encrypted tablespaces, one of them with a schema and a table
  hsm.tde.tde_tablespace:
    engine: postgresql
    cluster: main
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keyslots:
      - name: primary
      - name: recovery
        protection: passphrase
        passphrase: "{{ vault_recovery_passphrase }}"
    tablespaces:
      - name: sealed
        owner: app
        move:
          database: shop
          schemas: [customers]
          tables: [public.orders]
      - name: archive

- name: A whole database, nothing needed of the token because the tablespace is there
  hsm.tde.tde_tablespace:
    engine: postgresql
    cluster: main
    tablespaces:
      - name: sealed
        move:
          databases: [shop]
"""

RETURN = r"""
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: move_relation
    object:
      description: What it is done to.
      type: str
      sample: table public.orders in database shop
    why:
      description: Why it is needed.
      type: str
      sample: from pg_default to sealed
cluster:
  description: The cluster's name.
  returned: success
  type: str
  sample: main
tablespaces:
  description: The tablespaces of the task.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
      sample: sealed
    location:
      description: Its directory.
      type: str
      sample: /srv/tde/sealed
    key_id:
      description: Name of its data key in the store. Null where the server has the data keys.
      type: str
      sample: tablespace.sealed
    check_value:
      description: The data key's check value, which is the key identifier that the kernel shows. Null while there is no data key in the store.
      type: str
      sample: 8699c2c53707405da5aba5ae4d8583c0
    algorithm:
      description: The cipher.
      type: str
      sample: AES256
moved:
  description: What was moved by this run.
  returned: success
  type: list
  elements: dict
  sample:
    - database: shop
      object: public.orders
      kind: table
      from: pg_default
      to: sealed
      bytes: 8192
      seconds: 0.021
      attempts: 1
notes:
  description: What the reader should know of what was done, such as what moving leaves behind.
  returned: success
  type: list
  elements: str
  sample: []
restart_required:
  description: Whether the server must be restarted for it.
  returned: success
  type: bool
  sample: false
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options, keyslots_option, load
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import request, tablespaces_wish

SPEC: dict[str, t.Any] = {
    **database_options(),
    "tablespaces": {
        "type": "list",
        "elements": "dict",
        "required": True,
        "options": {
            "name": {"type": "str", "required": True},
            "location": {"type": "path"},
            "owner": {"type": "str"},
            "algorithm": {"type": "str", "choices": ["AES128", "AES256"], "default": "AES256"},
            "state": {"type": "str", "choices": ["present"], "default": "present"},
            "move": {
                "type": "dict",
                "options": {
                    "tables": {"type": "list", "elements": "str"},
                    "schemas": {"type": "list", "elements": "str"},
                    "database": {"type": "str"},
                    "databases": {"type": "list", "elements": "str"},
                },
            },
        },
    },
    "keyslots": keyslots_option(),
    "lock_timeout": {"type": "float", "default": 10},
    "no_recovery": {"type": "bool", "default": False},
}


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the tablespaces to the wish; the result as RETURN says."""
    engine = load(module.params["engine"])(request(module.params))
    wish = tablespaces_wish(module.params)
    engine.require("tablespaces")
    engine.require_algorithms(wish)
    result = engine.tablespaces(wish, check=module.check_mode).result()
    for warning in result.pop("warnings"):
        module.warn(warning)
    return result


def main() -> None:
    run_module(act, SPEC, libraries=("cryptography", "pkcs11", "psycopg"))


if __name__ == "__main__":
    main()
