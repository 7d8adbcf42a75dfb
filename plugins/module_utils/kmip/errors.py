# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A server's refusals as ours, by KMIP's result reason (KMIP 1.4, section 9.1.3.2.29; 2.0, section 11.45)."""

from __future__ import annotations

from ..common.errors import TdeError

#: Our code by the result reason's name; every other reason is a request that was malformed or contradictory.
_CODES = {
    **dict.fromkeys(("ITEM_NOT_FOUND", "OBJECT_NOT_FOUND", "OBJECT_DESTROYED"), "kmip_key_absent"),
    **dict.fromkeys(("AUTHENTICATION_NOT_SUCCESSFUL", "ATTESTATION_REQUIRED", "ATTESTATION_FAILED"), "kmip_login_refused"),
    **dict.fromkeys(("PERMISSION_DENIED", "NOT_AUTHORISED", "SENSITIVE", "NOT_EXTRACTABLE"), "kmip_permission_denied"),
    **dict.fromkeys(
        ("ILLEGAL_OPERATION", "WRONG_KEY_LIFECYCLE_STATE", "INCOMPATIBLE_CRYPTOGRAPHIC_USAGE_MASK"), "kmip_key_state"
    ),
    **dict.fromkeys(("OBJECT_ARCHIVED", "USAGE_LIMIT_EXCEEDED"), "kmip_key_locked"),
    **dict.fromkeys(
        ("GENERAL_FAILURE", "INTERNAL_SERVER_ERROR", "PROTECTION_STORAGE_UNAVAILABLE", "SERVER_LIMIT_EXCEEDED"),
        "kmip_server_failed",
    ),
    **dict.fromkeys(
        (
            "OPERATION_NOT_SUPPORTED",
            "FEATURE_NOT_SUPPORTED",
            "KEY_FORMAT_TYPE_NOT_SUPPORTED",
            "KEY_COMPRESSION_TYPE_NOT_SUPPORTED",
            "KEY_WRAP_TYPE_NOT_SUPPORTED",
            "UNSUPPORTED_CRYPTOGRAPHIC_PARAMETERS",
            "UNSUPPORTED_PROTOCOL_VERSION",
            "UNSUPPORTED_ATTRIBUTE",
        ),
        "kmip_unsupported",
    ),
    "CRYPTOGRAPHIC_FAILURE": "kmip_cryptographic_failure",
    **dict.fromkeys(("OBJECT_ALREADY_EXISTS", "NON_UNIQUE_NAME_ATTRIBUTE"), "kmip_name_taken"),
}


def refused(reason: str, message: str, operation: str, obj: str) -> TdeError:
    """A failed operation.

    :param reason: KMIP's result reason by its name, or ``""``; :param message: the server's words.
    :param operation: KMIP's name of what was asked for; :param obj: the server, or the key.
    """
    words = reason.lower().replace("_", " ") or "no reason given"
    # The server's own words may be long, or hold what acts on a terminal.
    said = "".join(one for one in message if one.isprintable())[:200].rstrip(".")
    return TdeError(
        _CODES.get(reason, "kmip_request_refused"),
        f"the server answered {words} to {operation}{': ' + said if said else ''}",
        obj=obj,
        details={"result_reason": reason, "operation": operation},
    )
