#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_keystore
short_description: Make, open or close a cluster's keystore, and change its keyslots
version_added: 0.1.0
description:
  - With O(state=present) makes whatever is missing of the wrapped-key store, the storage, the master key in the token, and, for a cluster
    that is encrypted wholly, its data key, its encrypted directory and the new cluster in it.
  - Brings the keyslots of existing data keys to the wish, one at a time. The new one is added, then proved, then the old one is removed.
    Data is not encrypted anew and the server runs on.
  - With O(state=open) mounts the storage and gives the kernel the keys of all places; with O(state=closed) takes them away.
  - With O(engine=fep) the server has a keystore of its own. V(present) writes its settings, and once the server runs with them sets the master key,
    which makes the keystore; V(open) opens it in the running server, as is needed after each start. The one keyslot V(primary) says what protects
    it, V(token) or V(passphrase). Its C(pin) or C(passphrase) is the wished one, where O(pin) or O(passphrase) is the present one.
  - A changed PIN is first taken out of the server's settings if it rests there, then changed in the token and proved, then written anew. No start in
    between tries a wrong PIN.
  - A token, store or place that the target remembers and that does not show is an error. Nothing is created in its place.
  - A run that was killed is finished by the next one.
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.database
  - hsm.tde.kmip
  - hsm.tde.pkcs11
  - hsm.tde.state
  - hsm.tde.database.keyslots
options:
  state:
    description: The wished state.
    type: str
    choices:
      present: The keystore is made and its keyslots are as wished. A keystore that is closed stays closed.
      open: Its storage is mounted and the kernel holds the keys of all its places; with O(engine=fep) the server has opened it.
      closed: The kernel holds none of its keys. Not possible with O(engine=fep), whose server keeps it open until it stops.
    default: present
  keyslots:
    description:
      - Without it, the keyslots of existing data keys stay as they are, and a new data key gets the keyslot V(primary) in the task's token.
  update_keyslots:
    description: When the keyslots of existing data keys are brought to O(keyslots).
    type: str
    choices:
      always: On each run. The passphrases that are given are tried on the keyslots of their names, about half a second each.
      on_create: Only when a data key is made; those of an existing one are left as they are.
    default: always
  keyslots_exclusive:
    description:
      - Remove the keyslots that are not listed, after those listed were proved.
      - It is no revocation. An old copy of the store with the old secret still opens the data keys.
    type: bool
    default: false
  no_recovery:
    description:
      - Go without a second keyslot, on purpose. If the only one is lost, so is the data.
      - Otherwise a data key is not made, and a second keyslot not removed, if only one keyslot would be left.
    type: bool
    default: false
  force:
    description:
      - With O(state=closed), take the keys away although the server runs. B(It will crash), and recover only once the keystore is open again.
    type: bool
    default: false
  pin_source:
    description: Where the command C(hsm-tde) finds the token's PIN at boot. Without it, as it is recorded.
    type: dict
    suboptions:
      kind:
        description: The kind of source.
        type: str
        required: true
        choices:
          none: An operator opens the keystore after each boot.
          file: A file of root's, mode 0600, at O(pin_source.path). It is written from the PIN if it is missing, or if the keyslot V(primary)
            lies in a token of another PIN.
          credential: The systemd credential with the name O(pin_source.path).
      path:
        description: The file's path, or the credential's name.
        type: path
attributes:
  check_mode:
    description: Returns the plan and changes nothing. It logs in to the token, which spends a try if the PIN is wrong.
    support: full
  diff_mode:
    description: Shows public facts before and after, in check mode as the plan expects them.
    support: full
seealso:
  - module: hsm.tde.tde_master_key
  - module: hsm.tde.tde_tablespace
  - module: hsm.tde.tde_info
"""

EXAMPLES = r"""
- name: A keystore for encrypted tablespaces in an image
  hsm.tde.tde_keystore:
    engine: postgresql
    cluster: main
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    postgresql:
      storage: image
      mount_point: /srv/tde
      image: /var/lib/hsm-tde/main.img
      image_size: 2G
    keyslots:
      - name: primary
      - name: recovery
        protection: passphrase
        passphrase: "{{ vault_recovery_passphrase }}"
    pin_source:
      kind: file
      path: /etc/hsm-tde/main.pin

- name: A new cluster, encrypted wholly, in Debian's packaging
  hsm.tde.tde_keystore:
    engine: postgresql
    cluster: payroll
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    postgresql:
      coverage: cluster
      mount_point: /srv/payroll
      data_directory: /srv/payroll/data
      create_cluster: true
      debian_cluster: 15/payroll
    keyslots:
      - name: primary
      - name: recovery
        protection: passphrase
        passphrase: "{{ vault_recovery_passphrase }}"

- name: Move the keyslot primary to a KMIP server; the token opens the data keys for it
  hsm.tde.tde_keystore:
    engine: postgresql
    cluster: main
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    keyslots:
      - name: primary
        protection: kmip
      - name: recovery
        protection: passphrase
        passphrase: "{{ vault_recovery_passphrase }}"

- name: Move the keyslot primary to a second token; the first one opens the data keys for it
  hsm.tde.tde_keystore:
    engine: postgresql
    cluster: main
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keyslots:
      - name: primary
        token_label: second
        pin: "{{ vault_second_pin }}"

- name: Enterprise Postgres with its master key in a slot of openCryptoki; the server is restarted by whoever may
  hsm.tde.tde_keystore:
    engine: fep
    cluster: main
    library: /usr/lib64/opencryptoki/libopencryptoki.so
    token_label: fujitsu_enterprise
    pin: "{{ vault_pin }}"
    fep:
      keystore: hsm
      keystore_location: /var/lib/fep/mek_keystore
      data_directory: /var/lib/fep/data
    keyslots:
      - name: primary

- name: Its PIN changed, in the token and wherever it rests
  hsm.tde.tde_keystore:
    engine: fep
    cluster: main
    library: /usr/lib64/opencryptoki/libopencryptoki.so
    token_label: fujitsu_enterprise
    pin: "{{ vault_pin }}"
    keyslots:
      - name: primary
        pin: "{{ vault_new_pin }}"

- name: Oracle with its master keys under a softcard, opened by itself after each start
  hsm.tde.tde_keystore:
    engine: oracle
    cluster: main
    login_host: db1.example.com
    login_user: sys
    login_password: "{{ vault_sys_password }}"
    passphrase: "{{ vault_softcard_passphrase }}"
    oracle:
      service: CDB1
      wallet_root: /etc/oracle/wallet
      auto_login: true
      software_passphrase: "{{ vault_wallet_passphrase }}"
    keyslots:
      - name: primary
        protection: softcard
        token_label: tde

- name: The softcard's passphrase changed; run again after the restart that this asks for
  hsm.tde.tde_keystore:
    engine: oracle
    cluster: main
    login_host: db1.example.com
    login_user: sys
    login_password: "{{ vault_sys_password }}"
    passphrase: "{{ vault_softcard_passphrase }}"
    oracle:
      software_passphrase: "{{ vault_wallet_passphrase }}"
    keyslots:
      - name: primary
        protection: softcard
        token_label: tde
        passphrase: "{{ vault_new_softcard_passphrase }}"

- name: Open it after a boot
  hsm.tde.tde_keystore:
    engine: postgresql
    cluster: main
    state: open
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
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
      sample: create_data_key
    object:
      description: What it is done to.
      type: str
      sample: data key cluster
    why:
      description: Why it is needed.
      type: str
      sample: under keyslots primary, recovery
cluster:
  description: The cluster's name.
  returned: success
  type: str
  sample: main
data_keys:
  description: The data keys by name, each with its check value and, by name, what its keyslots are under.
  returned: with O(state=present)
  type: dict
  sample:
    cluster:
      check_value: 8699c2c53707405da5aba5ae4d8583c0
      keyslots:
        primary: hsm-tde.main in token demo
        recovery: passphrase
master_keys:
  description: The master keys that the target remembers for the cluster, the oldest first.
  returned: with O(state=present)
  type: list
  elements: str
  sample:
    - hsm-tde.main in token demo
needs_master_key:
  description:
    - Whether M(hsm.tde.tde_master_key) has a master key to set before data is encrypted. Not so where all keyslots of the wrapped-key store
      are under passphrases, from which the key is derived.
  returned: with O(state=present)
  type: bool
  sample: true
parameters:
  description: The server's parameters with the command lines to be configured. Nothing is written to the server's configuration.
  returned: with O(engine=keycommand) and O(state=present)
  type: dict
  sample:
    ssl_passphrase_command: /usr/local/sbin/hsm-tde unwrap --cluster main
    ssl_passphrase_command_supports_reload: 'on'
initdb_options:
  description: The options with which the server's C(initdb) makes its encrypted data directory.
  returned: with O(engine=keycommand) and O(state=present)
  type: list
  elements: str
  sample: []
start_required:
  description: Whether a cluster was created whose server does not run.
  returned: with O(state=present)
  type: bool
  sample: true
backups_need:
  description: What of former credentials backups still need, in plain sentences.
  returned: with O(engine=oracle)
  type: list
  elements: str
  sample: []
restart_required:
  description: Whether the running server must be restarted before it works as wished. Then this is run again.
  returned: with engines whose server reads its keystore's settings when it starts
  type: bool
  sample: false
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options, keyslots_option, load
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import keystore_wish, request

SPEC: dict[str, t.Any] = {
    **database_options(),
    "state": {"type": "str", "choices": ["present", "open", "closed"], "default": "present"},
    "keyslots": keyslots_option(),
    "update_keyslots": {"type": "str", "choices": ["always", "on_create"], "default": "always"},
    "keyslots_exclusive": {"type": "bool", "default": False},
    "no_recovery": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
    "pin_source": {
        "type": "dict",
        "options": {
            "kind": {"type": "str", "choices": ["none", "file", "credential"], "required": True},
            "path": {"type": "path"},
        },
        "required_if": [("kind", "file", ["path"]), ("kind", "credential", ["path"])],
    },
}


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the keystore to the wished state; the result as RETURN says."""
    engine = load(module.params["engine"])(request(module.params))
    wish = keystore_wish(module.params)
    engine.require({"present": "keystore", "open": "open", "closed": "close"}[wish.state])
    result = engine.keystore(wish, check=module.check_mode).result()
    if wish.state == "present":
        result["needs_master_key"] = engine.needs_master_key(wish.slots)
    for warning in result.pop("warnings"):
        module.warn(warning)
    return result


def main() -> None:
    run_module(act, SPEC, libraries=("cryptography", "pkcs11", "psycopg"))


if __name__ == "__main__":
    main()
