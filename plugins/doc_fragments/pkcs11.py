# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  library:
    description:
      - Absolute path on the target of the token's PKCS#11 library.
      - Root loads it, so it and every folder above it must be root's own, writable by nobody else.
    type: path
  library_environment:
    description:
      - Environment variables from which the library reads its configuration, such as E(SOFTHSM2_CONF).
      - They are shown in output and logs; put no secret in them.
    type: dict
    default: {}
  token_uri:
    description:
      - The token as a PKCS#11 URI (RFC 7512), for example V(pkcs11:token=demo;serial=8a4f0e).
      - Counts beside the other O(token_label), O(token_serial) and O(slot_id); all that is given must match.
      - A URI with a PIN, the source of a PIN or a module in it is refused.
    type: str
  token_label:
    description:
      - Label of the token. Two tokens with the same label are an error; then name O(token_serial) or O(slot_id) as well.
    type: str
  token_serial:
    description:
      - Serial number of the token.
    type: str
  slot_id:
    description:
      - Id of the slot. Slot ids may change when a token is initialised or the library is configured anew; prefer O(token_label).
    type: int
  pin:
    description:
      - The user PIN. Always in quotes, since YAML reads digits alone as a number.
      - It is tried once. A PIN that the token refused before is not tried again.
    type: str
  allow_low_pin_count:
    description:
      - Make one try although the token says that wrong PINs were entered since the last login.
      - Without it the task stops there, because a few more wrong tries lock the PIN for everybody.
    type: bool
    default: false
requirements:
  - Python 3.10 or newer on the target
  - python-pkcs11 0.10 or newer on the target; the role P(hsm.tde.prerequisites#role) installs it
notes:
  - Run with pipelining, otherwise Ansible leaves the arguments, PINs among them, in a file of the remote temporary folder for a moment.
"""
