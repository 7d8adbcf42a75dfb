#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: wrapped_secret
short_description: Keep a secret in a file that only a token, a KMIP server or a passphrase opens
version_added: 0.1.0
description:
  - Wraps a secret of your own, such as a key or passphrase for C(pgcrypto), to a file on the target, under one or more keyslots.
  - A keyslot is a key-encryption key in a PKCS#11 token or at a KMIP server, or one that is derived from a passphrase and verified before it is used.
  - The secret is never returned. It comes out to a file of mode 0600 on the target with O(state=unwrapped), or to a pipe with
    the command C(hsm-tde unwrap).
  - The file names no library, no PIN, no PIN's source and no server. It can be copied, and opened wherever one of its keyslots can be. A file
    that was changed, rolled back, or put in another's place is refused.
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.kmip
  - hsm.tde.state
options:
  path:
    description:
      - Absolute path of the file. Its folder must exist, and like every folder above it be root's own.
    type: path
    required: true
  name:
    description:
      - Name of the secret, bound into the file, so that one secret's file cannot stand in for another's.
      - The last component of O(path) by default. Give it if the file was renamed.
    type: str
  state:
    description: The wished state.
    type: str
    choices:
      present: The file exists and opens with O(credentials) or O(keyslots). Its keyslots stay as they are.
      rewrapped:
        The keyslots listed exist and were proved. A keyslot of a listed name that is another is replaced, by adding the
        new one, proving it, then removing the old one. The secret stays the same.
      unwrapped: O(destination) holds the secret.
    default: present
  keyslots:
    description:
      - The keyslots wished for. Each holds the same secret under one protection, and any one of them opens it.
      - Needed for a new file, for another secret, and for O(state=rewrapped). They are also tried to open the file.
    type: list
    elements: dict
    suboptions: &slots
      name:
        description: The keyslot's name; of O(credentials), the one that is likeliest to open.
        type: str
        default: primary
      protection:
        description: What the keyslot is under.
        type: str
        choices:
          token: A key in a PKCS#11 token.
          passphrase: A passphrase.
          kmip: A key at a KMIP server, which encrypts and decrypts itself where it speaks KMIP 1.4; else the key is got for each use.
        default: token
      passphrase:
        description: The passphrase, in quotes, at least 12 characters.
        type: str
      token_label:
        description: Label of the token, if it is not the task's own.
        type: str
      token_serial:
        description: Serial number of the token, if it is not the task's own.
        type: str
      slot_id:
        description: Slot of the token, if it is not the task's own.
        type: int
      pin:
        description: User PIN of the token, if it is not the task's own.
        type: str
      library:
        description: The token's PKCS#11 library, if it is not the task's own.
        type: path
      kmip:
        description: The key management service, with V(kmip). What is left out is the task's own, O(kmip_servers) and its kind.
        type: dict
        suboptions:
          service:
            description: As O(kmip_service).
            type: str
          servers:
            description: As O(kmip_servers).
            type: list
            elements: str
          ca:
            description: As O(kmip_ca).
            type: path
          certificate:
            description: As O(kmip_certificate).
            type: path
          certificate_key:
            description: As O(kmip_certificate_key).
            type: path
          timeout:
            description: As O(kmip_timeout).
            type: float
  credentials:
    description:
      - What opens the file now, where it is not one of O(keyslots), for example the old passphrase.
      - They are tried first, in order, each under a name of its own.
      - A token or KMIP service that is not named is the task's own.
    type: list
    elements: dict
    suboptions: *slots
  kek_label:
    description:
      - Label of the key-encryption key in the token or at the KMIP server, for every such keyslot that is made. The key is made if this host
        has not made it yet.
      - Hosts that show a KMIP server the same certificate need a label each.
      - With O(state=rewrapped) another label puts the keyslots under another key, which is how the key-encryption key is rotated.
    type: str
    default: hsm-tde.secrets
  secret:
    description:
      - The secret, as text of at most 64 KiB.
      - Needed for a new file, unless O(generate_length) is given.
    type: str
  generate_length:
    description:
      - Make the secret of a new file by chance, of this many letters and digits, 16 to 1024. 43 of them are as good as a key of 256 bits.
      - Nobody sees it. An existing file keeps its secret.
    type: int
  update:
    description: What to do about an existing file that holds another secret than O(secret).
    type: str
    choices:
      on_create: Leave it, and warn. What was encrypted under it can still be decrypted.
      always: Write the file anew, with the new secret and the keyslots listed.
    default: on_create
  keyslots_exclusive:
    description:
      - Remove the keyslots that are not listed, after those listed were proved.
      - It is no revocation. An old copy of the file with the old passphrase, token or key at a KMIP server still gives the secret.
    type: bool
    default: false
  replace_lost:
    description:
      - The file that the target's journal remembers, and that does not show, is lost for good. Make another in its place.
    type: bool
    default: false
  destination:
    description:
      - Absolute path on the target of the file that the secret is written to, exactly as it is, without an end of line added.
      - Its folder must be writable by nobody but root and O(owner). It lies in the clear there; a folder in C(/run) does not outlive a boot.
    type: path
  owner:
    description: Owner of O(destination), by name or number. Root by default.
    type: str
  group:
    description: Group of O(destination), by name or number. The owner's by default.
    type: str
attributes:
  check_mode:
    description:
      - Opens an existing file, logs in to the token where a new key would be made, asks the KMIP server where a keyslot would be made, and returns
        the plan. If the PIN is wrong that spends a try.
      - Nothing is wrapped, written or made in a token or at a server.
    support: full
  diff_mode:
    description: Shows the file's public facts before and after, never the secret.
    support: full
seealso:
  - module: hsm.tde.tde_keystore
  - module: hsm.tde.kmip_key
"""

EXAMPLES = r"""
- name: Make a key for pgcrypto, under the token and a passphrase that is kept off the host
  hsm.tde.wrapped_secret:
    path: /etc/app/pgcrypto.key
    generate_length: 43
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keyslots:
      - name: primary
      - name: recovery
        protection: passphrase
        passphrase: "{{ vault_recovery_passphrase }}"

- name: Hand it to the application, until the next boot
  hsm.tde.wrapped_secret:
    path: /etc/app/pgcrypto.key
    state: unwrapped
    destination: /run/app/pgcrypto.key
    owner: app
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    credentials:
      - name: primary

- name: Wrap an existing secret under a passphrase alone
  hsm.tde.wrapped_secret:
    path: /etc/app/report.key
    secret: "{{ vault_report_key }}"
    keyslots:
      - protection: passphrase
        passphrase: "{{ vault_passphrase }}"

- name: Change the passphrase
  hsm.tde.wrapped_secret:
    path: /etc/app/report.key
    state: rewrapped
    keyslots:
      - protection: passphrase
        passphrase: "{{ vault_new_passphrase }}"
    credentials:
      - protection: passphrase
        passphrase: "{{ vault_passphrase }}"

- name: Move it from the passphrase to the token
  hsm.tde.wrapped_secret:
    path: /etc/app/report.key
    state: rewrapped
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keyslots:
      - protection: token
    credentials:
      - protection: passphrase
        passphrase: "{{ vault_new_passphrase }}"

- name: Move it from the token to a key management service
  hsm.tde.wrapped_secret:
    path: /etc/app/report.key
    state: rewrapped
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    library: /usr/lib/softhsm/libsofthsm2.so
    token_label: demo
    pin: "{{ vault_pin }}"
    keyslots:
      - protection: kmip
    credentials:
      - protection: token
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
  sample: /etc/app/pgcrypto.key
owner:
  description: Owner of RV(path).
  returned: when the file exists
  type: str
  sample: root
group:
  description: Group of RV(path).
  returned: when the file exists
  type: str
  sample: root
uid:
  description: User id of RV(path).
  returned: when the file exists
  type: int
  sample: 0
gid:
  description: Group id of RV(path).
  returned: when the file exists
  type: int
  sample: 0
mode:
  description: Mode of RV(path).
  returned: when the file exists
  type: str
  sample: '0600'
size:
  description: Size of RV(path) in bytes.
  returned: when the file exists
  type: int
  sample: 2048
state:
  description: Kind of RV(path).
  returned: when the file exists
  type: str
  sample: file
destination:
  description: The file that holds the secret in the clear.
  returned: O(state=unwrapped)
  type: str
  sample: /run/app/pgcrypto.key
generation:
  description: How many times the file was written. In check mode as it is.
  returned: when the file exists
  type: int
  sample: 1
wrapped_keyslots:
  description: The file's keyslots, in the order in which they were added. In check mode as they are. What a protection does not have is null.
  returned: when the file exists
  type: list
  elements: dict
  sample:
    - name: primary
      uid: 0f3c5b0a6d1e4f7c8a9b0c1d2e3f4a5b
      protection: token
      created: '2026-01-02T03:04:05Z'
      proved: '2026-01-02T03:04:05Z'
      state: proved
      token_label: demo
      token_serial: 8a4f0e
      kmip_service: null
      kek_label: hsm-tde.secrets
      kek_id: 5d41402abc4b2a76b9719d911017c592
      kek_kcv: 5c2d3b
      kek_leaves_server: null
history:
  description:
    - Keyslots that were removed, with C(removed), the time. An old copy of the file still opens with them, so if one of their secrets
      is known to somebody, change the secret itself.
  returned: when the file exists
  type: list
  elements: dict
  sample: []
plan:
  description: The steps, done or in check mode to be done.
  returned: success
  type: list
  elements: dict
  contains:
    action:
      description: What is done.
      type: str
      sample: create_secret
    object:
      description: The object acted on.
      type: str
      sample: secret pgcrypto.key
    why:
      description: Why it is needed.
      type: str
      sample: does not exist
"""

import contextlib
import grp
import os
import pwd
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common import plan as planning
from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.options import kmip_options, pkcs11_options
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import secret_slots_option
from ansible_collections.hsm.tde.plugins.module_utils.engines.keyslots import KMIP, TOKEN
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import slots
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import SecretFile
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretservice import (
    DEFAULT_KEK,
    MAX_GENERATED,
    MIN_GENERATED,
    Destination,
    SecretService,
    SlotWish,
    Wish,
)

SPEC: dict[str, t.Any] = {
    "path": {"type": "path", "required": True},
    "name": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "rewrapped", "unwrapped"], "default": "present"},
    "keyslots": secret_slots_option(),
    "credentials": secret_slots_option(),
    "kek_label": {"type": "str", "default": DEFAULT_KEK},
    "secret": {"type": "str", "no_log": True},
    "generate_length": {"type": "int"},
    "update": {"type": "str", "choices": ["on_create", "always"], "default": "on_create"},
    "keyslots_exclusive": {"type": "bool", "default": False},
    "replace_lost": {"type": "bool", "default": False},
    "destination": {"type": "path"},
    "owner": {"type": "str"},
    "group": {"type": "str"},
    **pkcs11_options(),
    **kmip_options(),
}


def slot_wishes(params: t.Mapping[str, t.Any], option: str) -> tuple[SlotWish, ...]:
    """The keyslots of an option, each with what opens it.

    :raises TdeError: ``invalid_option``, ``credential_missing``.
    """
    found = []
    for number, wish in enumerate(slots({**params, "keyslots": params[option]}) or ()):
        where = f"option {option}[{number}]"
        if wish.protection == TOKEN:
            if wish.access is None:
                raise TdeError(
                    "credential_missing", "no token was named", obj=where, next_step="Set library, token_label and pin."
                )
            found.append(SlotWish(wish.name, access=wish.access))
        elif wish.protection == KMIP:
            if wish.kmip is None:
                raise TdeError(
                    "credential_missing",
                    "no KMIP server was named",
                    obj=where,
                    next_step="Set kmip_servers, kmip_ca, kmip_certificate and kmip_certificate_key.",
                )
            found.append(SlotWish(wish.name, kmip=wish.kmip))
        elif wish.passphrase is None:
            raise TdeError("credential_missing", "its passphrase was not given", obj=where, next_step="Set passphrase.")
        else:
            found.append(SlotWish(wish.name, passphrase=wish.passphrase))
    return tuple(found)


def destination_of(params: t.Mapping[str, t.Any]) -> Destination | None:
    """Where the secret goes.

    :raises TdeError: ``invalid_option``.
    """
    path = params["destination"]
    if path is None:
        return None
    if not os.path.isabs(path) or os.path.normpath(path) == os.path.normpath(params["path"]):
        raise TdeError("invalid_option", "must be an absolute path, and not that of the wrapped file", obj="option destination")
    uid, gid = os.geteuid(), os.getegid()
    try:
        if params["owner"] is not None:
            user = pwd.getpwuid(int(params["owner"])) if params["owner"].isdigit() else pwd.getpwnam(params["owner"])
            uid, gid = user.pw_uid, user.pw_gid
        if params["group"] is not None:
            gid = (grp.getgrgid(int(params["group"])) if params["group"].isdigit() else grp.getgrnam(params["group"])).gr_gid
    except KeyError:
        raise TdeError("invalid_option", "the target has no such user or group", obj="options owner and group") from None
    return Destination(os.path.normpath(path), uid, gid)


def wish_of(params: t.Mapping[str, t.Any]) -> Wish:
    """The options as a wish.

    :raises TdeError: ``invalid_option``, ``credential_missing``, ``secret_not_text``.
    """
    length = params["generate_length"]
    if length is not None and not MIN_GENERATED <= length <= MAX_GENERATED:
        raise TdeError("invalid_option", f"must be {MIN_GENERATED} to {MAX_GENERATED}", obj="option generate_length")
    return Wish(
        state=params["state"],
        slots=slot_wishes(params, "keyslots"),
        credentials=slot_wishes(params, "credentials"),
        secret=secret_from_option("secret", params["secret"]),
        generate=length,
        update=params["update"] == "always",
        exclusive=params["keyslots_exclusive"],
        replace_lost=params["replace_lost"],
        kek_label=params["kek_label"],
        destination=destination_of(params),
    )


def act(module: TdeModule) -> dict[str, t.Any]:
    """Bring the file to the wished state; the result as RETURN says."""
    params = module.params
    state = StateDirectory(params["state_directory"])
    service = SecretService(SecretFile(state, params["path"], params["name"]), wish_of(params), state, check=module.check_mode)
    with contextlib.nullcontext() if module.check_mode else state.locked():
        before = service.facts()
        steps = service.run()
        after = service.facts()
    for warning in service.warnings:
        module.warn(warning)
    if len(after.get("keyslots", ())) == 1:
        module.warn(f"{params['path']} has one keyslot, which is the only way to the secret.")
    public = planning.public(steps)
    result: dict[str, t.Any] = {
        "changed": bool(steps),
        "path": service.file.path,
        "plan": public,
        "diff": {"before": before, "after": after},
    }
    if module.check_mode:
        result["diff"]["after"] = {**before, "plan": public} if steps else before
    if after:
        result.update(generation=after["generation"], wrapped_keyslots=after["keyslots"], history=after["history"])
    if service.wish.state == "unwrapped" and service.wish.destination:
        result["destination"] = service.wish.destination.path
    return result


def main() -> None:
    run_module(
        act,
        SPEC,
        libraries=("cryptography", "pkcs11"),
        required_if=[("state", "unwrapped", ("destination",))],
        mutually_exclusive=[("secret", "generate_length")],
    )


if __name__ == "__main__":
    main()
