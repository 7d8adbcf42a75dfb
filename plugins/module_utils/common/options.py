# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Argument specs that several modules share; each is documented once, in plugins/doc_fragments."""

from __future__ import annotations

import typing as t

from .state import DEFAULT_PATH


def state_options() -> dict[str, t.Any]:
    """Where the host remembers (fragment ``hsm.tde.state``)."""
    return {"state_directory": {"type": "path", "default": DEFAULT_PATH}}


def kmip_service_options() -> dict[str, t.Any]:
    """How to reach one KMIP service (the dictionary ``kmip`` of a keyslot; with a prefix, :func:`kmip_options`)."""
    return {
        "service": {"type": "str"},
        "servers": {"type": "list", "elements": "str"},
        "ca": {"type": "path"},
        "certificate": {"type": "path"},
        "certificate_key": {"type": "path", "no_log": False},
        "timeout": {"type": "float"},
    }


def kmip_options() -> dict[str, t.Any]:
    """How to reach one KMIP service (fragment ``hsm.tde.kmip``, action group ``hsm.tde.kmip``)."""
    return {**{f"kmip_{name}": option for name, option in kmip_service_options().items()}, **state_options()}


def pkcs11_options() -> dict[str, t.Any]:
    """How to reach one token (fragment ``hsm.tde.pkcs11``, action group ``hsm.tde.pkcs11``)."""
    return {
        "library": {"type": "path"},
        "library_environment": {"type": "dict", "default": {}},
        "token_uri": {"type": "str", "no_log": False},
        "token_label": {"type": "str", "no_log": False},
        "token_serial": {"type": "str", "no_log": False},
        "slot_id": {"type": "int"},
        "pin": {"type": "str", "no_log": True},
        "allow_low_pin_count": {"type": "bool", "default": False},
        **state_options(),
    }
