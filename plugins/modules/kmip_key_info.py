#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: kmip_key_info
short_description: List the keys at a KMIP server
version_added: 0.1.0
description:
  - Lists the symmetric keys that this client sees at a key management service, with their attributes, states and dates.
  - The server filters. It is asked for the attributes of each key that it finds; name what you need where there are thousands.
author:
  - The hsm.tde authors (@hsm-tde)
options:
  name:
    description: Only keys of this name.
    type: str
  id:
    description: Only the key with this unique identifier. It is an error if there is none.
    type: str
  state:
    description: Only keys in this state.
    type: str
    choices: [pre_active, active, deactivated, compromised, destroyed, destroyed_compromised]
  limit:
    description: Return no more than this many keys. RV(more) says whether there are others.
    type: int
extends_documentation_fragment:
  - hsm.tde.kmip
  - hsm.tde.state
attributes:
  check_mode:
    description: Changes nothing, in check mode or otherwise.
    support: full
  diff_mode:
    description: There is nothing to differ.
    support: none
seealso:
  - module: hsm.tde.kmip_key
"""

EXAMPLES = r"""
- name: All keys that this client sees
  hsm.tde.kmip_key_info:
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
  register: inventory

- name: Keys that were made and never activated
  hsm.tde.kmip_key_info:
    kmip_servers: [kms1.example.com, kms2.example.com]
    kmip_ca: /etc/hsm-tde/kmip-ca.pem
    kmip_certificate: /etc/hsm-tde/kmip.pem
    kmip_certificate_key: /etc/hsm-tde/kmip.key
    state: pre_active
"""

RETURN = r"""
kmip_keys:
  description:
    - The keys, the oldest first. What the server does not tell is null.
    - A key that the server lists and does not let this client look at has its identifier only.
  returned: success
  type: list
  elements: dict
  sample:
    - id: "17"
      name: app-data
      names: [app-data]
      type: symmetric_key
      algorithm: aes
      length: 256
      usage: [encrypt, decrypt]
      state: active
      created: "2026-11-22T01:54:33+00:00"
      activated: null
      deactivated: null
      compromised: null
      destroyed: null
      changed: null
      sensitive: false
      extractable: null
      groups: []
      policy: default
more:
  description: Whether O(limit) left keys out.
  returned: success
  type: bool
  sample: false
server:
  description: The server that answered.
  returned: success
  type: str
  sample: kms1.example.com
version:
  description: The version of KMIP that it and this target speak.
  returned: success
  type: str
  sample: "1.4"
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.options import kmip_options
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client, KeyFacts
from ansible_collections.hsm.tde.plugins.module_utils.kmip.keylist import public

STATES = ["pre_active", "active", "deactivated", "compromised", "destroyed", "destroyed_compromised"]

SPEC = {
    "name": {"type": "str"},
    "id": {"type": "str"},
    "state": {"type": "str", "choices": STATES},
    "limit": {"type": "int"},
    **kmip_options(),
}


def look(client: Client, uid: str) -> KeyFacts | None:
    """A key's attributes; its identifier alone if they are hidden, None if it went meanwhile."""
    try:
        return client.attributes(uid)
    except TdeError as exc:
        if exc.code == "kmip_permission_denied":
            return KeyFacts(uid)
        if exc.code == "kmip_key_absent":
            return None
        raise


def act(module: TdeModule) -> dict[str, t.Any]:
    """List the keys; the result as RETURN says."""
    params = module.params
    access = kmip_access(params)
    if access is None:
        raise TdeError("invalid_option", "no server is named", obj="option kmip_servers")
    if params["limit"] is not None and params["limit"] < 1:
        raise TdeError("invalid_option", "must be 1 or more", obj="option limit")
    with Client(access) as client:
        if params["id"] is not None:
            one = client.attributes(params["id"])
            fits = params["name"] in (None, *one.names) and params["state"] in (None, one.state)
            found, more = [one] if fits else [], False
        else:
            uids = client.locate(params["name"], state=params["state"])
            more = params["limit"] is not None and len(uids) > params["limit"]
            found = [facts for facts in (look(client, uid) for uid in uids[: params["limit"]]) if facts]
        server, version = client.server, ".".join(map(str, client.version))
    found.sort(key=lambda one: (one.created or 0, one.uid))
    return {"changed": False, "kmip_keys": [public(one) for one in found], "more": more, "server": server, "version": version}


def main() -> None:
    run_module(act, SPEC, libraries=("kmip", "cryptography"), read_only=True)


if __name__ == "__main__":
    main()
