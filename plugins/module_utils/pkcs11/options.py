# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a module's options to a library and a token."""

from __future__ import annotations

import typing as t

from ..common.errors import TdeError
from ..common.secret import secret_from_option
from .library import LibraryAccess
from .token import TokenAccess, TokenSelector


def library_access(params: t.Mapping[str, t.Any]) -> LibraryAccess:
    """The library of the options ``library`` and ``library_environment``.

    :raises TdeError: ``invalid_option``.
    """
    if not params.get("library"):
        raise TdeError(
            "invalid_option", "is missing", obj="option library", next_step="Give the path of the token's PKCS#11 library."
        )
    environment = {}
    for name, value in (params.get("library_environment") or {}).items():
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise TdeError(
                "invalid_option",
                "must be text",
                obj=f"option library_environment, variable {name}",
                next_step="Put the value in quotes.",
            )
        environment[str(name)] = str(value)
    return LibraryAccess(params["library"], environment)


def token_selector(params: t.Mapping[str, t.Any]) -> TokenSelector:
    """The token of the options ``token_label``, ``token_serial``, ``slot_id`` and ``token_uri``; empty text names nothing."""
    return TokenSelector(
        label=params.get("token_label") or None,
        serial=params.get("token_serial") or None,
        slot_id=params.get("slot_id"),
        uri=params.get("token_uri") or None,
    )


def token_access(params: t.Mapping[str, t.Any], raw_pin: t.Any = None) -> TokenAccess:
    """How to open the token of the shared options (``common.options.pkcs11_options``).

    :param raw_pin: the PIN as it came from the play, or a Secret.
    :raises TdeError: ``invalid_option``, ``secret_not_text``.
    """
    return TokenAccess(
        library=library_access(params),
        selector=token_selector(params),
        pin=secret_from_option("pin", raw_pin),
        allow_low_pin_count=bool(params.get("allow_low_pin_count")),
    )
