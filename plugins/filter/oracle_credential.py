# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: oracle_credential
short_description: The credential by which Oracle TDE reaches keys in an nShield HSM
version_added: 0.1.0
author: The hsm.tde authors (@hsm-tde)
description:
  - Composes C(passphrase|name) for a softcard or card set, or gives the passphrase alone for module protection, and checks
    every rule of length and characters before.
  - A credential that the HSM's library does not recognise is taken for a module passphrase without a word, and the keys made
    with it come under module protection. So a value that breaks a rule is refused; the message names the rule, never the value.
positional: _input
options:
  _input:
    description: The passphrase. Quote it, if it is digits only.
    type: str
    required: true
  name:
    description: The name of the softcard or card set. Without it the credential is for module protection.
    type: str
  separator:
    description: What stands between passphrase and name.
    type: str
    choices: ["|", ":"]
    default: "|"
  wallet_manager:
    description:
      - Ask for the strength that Oracle Wallet Manager asks for, too - 8 characters at least, letters together with digits or
        special characters.
    type: bool
    default: false
notes:
  - The result is a secret. Set C(no_log) on tasks that show their arguments.
"""

EXAMPLES = r"""
# The credential of the softcard oracle-tde
softcard_credential: "{{ vault_softcard_passphrase | hsm.tde.oracle_credential(name='oracle-tde') }}"

# For module protection
module_credential: "{{ vault_module_passphrase | hsm.tde.oracle_credential }}"
"""

RETURN = r"""
_value:
  description: The credential.
  type: str
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import secret_from_option
from ansible_collections.hsm.tde.plugins.module_utils.hsm.credential import compose


def oracle_credential(passphrase: t.Any, name: t.Any = None, separator: str = "|", wallet_manager: bool = False) -> str:
    """See DOCUMENTATION.

    :raises AnsibleFilterError: which rule broke; never the value.
    """
    problem = ""
    try:
        if name is not None and not isinstance(name, str):
            raise TdeError("invalid_option", "was not read as text; quote it", obj="oracle_credential: name")
        given = secret_from_option("passphrase", passphrase)
        protection = "module" if name is None else "softcard"
        return compose(protection, given, name, separator=separator, wallet_manager=wallet_manager).text()
    except TdeError as error:
        problem = str(error)
    # Outside of the handler: a chained exception is printed with the values that led to it.
    raise AnsibleFilterError(f"hsm.tde.oracle_credential: {problem}")


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"oracle_credential": oracle_credential}
