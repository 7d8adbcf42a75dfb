# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a PKCS#11 library answered, as one of our errors with the CKR_ name in its details."""

from __future__ import annotations

import contextlib
import re
import typing as t

from ..common.errors import TdeError
from .cryptoki import CkError

#: CKR_ number, name and our code (pkcs11t.h of PKCS#11 v3.0; the causes are ours).
_TABLE: tuple[tuple[int, str, str], ...] = (
    (0x01, "CKR_CANCEL", "pkcs11_refused"),
    (0x02, "CKR_HOST_MEMORY", "pkcs11_unreachable"),
    (0x03, "CKR_SLOT_ID_INVALID", "pkcs11_absent"),
    (0x05, "CKR_GENERAL_ERROR", "pkcs11_unreachable"),
    (0x06, "CKR_FUNCTION_FAILED", "pkcs11_unreachable"),
    (0x07, "CKR_ARGUMENTS_BAD", "pkcs11_client_error"),
    (0x08, "CKR_NO_EVENT", "pkcs11_absent"),
    (0x09, "CKR_NEED_TO_CREATE_THREADS", "pkcs11_unsupported"),
    (0x0A, "CKR_CANT_LOCK", "pkcs11_unsupported"),
    (0x10, "CKR_ATTRIBUTE_READ_ONLY", "pkcs11_refused"),
    (0x11, "CKR_ATTRIBUTE_SENSITIVE", "pkcs11_refused"),
    (0x12, "CKR_ATTRIBUTE_TYPE_INVALID", "pkcs11_unsupported"),
    (0x13, "CKR_ATTRIBUTE_VALUE_INVALID", "pkcs11_client_error"),
    (0x1B, "CKR_ACTION_PROHIBITED", "pkcs11_refused"),
    (0x20, "CKR_DATA_INVALID", "pkcs11_client_error"),
    (0x21, "CKR_DATA_LEN_RANGE", "pkcs11_client_error"),
    (0x30, "CKR_DEVICE_ERROR", "pkcs11_unreachable"),
    (0x31, "CKR_DEVICE_MEMORY", "pkcs11_unreachable"),
    (0x32, "CKR_DEVICE_REMOVED", "pkcs11_unreachable"),
    (0x40, "CKR_ENCRYPTED_DATA_INVALID", "pkcs11_damaged"),
    (0x41, "CKR_ENCRYPTED_DATA_LEN_RANGE", "pkcs11_damaged"),
    (0x50, "CKR_FUNCTION_CANCELED", "pkcs11_refused"),
    (0x51, "CKR_FUNCTION_NOT_PARALLEL", "pkcs11_unsupported"),
    (0x54, "CKR_FUNCTION_NOT_SUPPORTED", "pkcs11_unsupported"),
    (0x60, "CKR_KEY_HANDLE_INVALID", "pkcs11_absent"),
    (0x62, "CKR_KEY_SIZE_RANGE", "pkcs11_unsupported"),
    (0x63, "CKR_KEY_TYPE_INCONSISTENT", "pkcs11_client_error"),
    (0x64, "CKR_KEY_NOT_NEEDED", "pkcs11_client_error"),
    (0x65, "CKR_KEY_CHANGED", "pkcs11_client_error"),
    (0x66, "CKR_KEY_NEEDED", "pkcs11_client_error"),
    (0x67, "CKR_KEY_INDIGESTIBLE", "pkcs11_refused"),
    (0x68, "CKR_KEY_FUNCTION_NOT_PERMITTED", "pkcs11_refused"),
    (0x69, "CKR_KEY_NOT_WRAPPABLE", "pkcs11_refused"),
    (0x6A, "CKR_KEY_UNEXTRACTABLE", "pkcs11_refused"),
    (0x70, "CKR_MECHANISM_INVALID", "pkcs11_unsupported"),
    (0x71, "CKR_MECHANISM_PARAM_INVALID", "pkcs11_unsupported"),
    (0x82, "CKR_OBJECT_HANDLE_INVALID", "pkcs11_absent"),
    (0x90, "CKR_OPERATION_ACTIVE", "pkcs11_client_error"),
    (0x91, "CKR_OPERATION_NOT_INITIALIZED", "pkcs11_client_error"),
    (0xA0, "CKR_PIN_INCORRECT", "pin_refused"),
    (0xA1, "CKR_PIN_INVALID", "pin_refused"),
    (0xA2, "CKR_PIN_LEN_RANGE", "pin_length"),
    (0xA3, "CKR_PIN_EXPIRED", "pin_expired"),
    (0xA4, "CKR_PIN_LOCKED", "pin_locked"),
    (0xB0, "CKR_SESSION_CLOSED", "pkcs11_unreachable"),
    (0xB1, "CKR_SESSION_COUNT", "pkcs11_locked"),
    (0xB3, "CKR_SESSION_HANDLE_INVALID", "pkcs11_unreachable"),
    (0xB4, "CKR_SESSION_PARALLEL_NOT_SUPPORTED", "pkcs11_unsupported"),
    (0xB5, "CKR_SESSION_READ_ONLY", "pkcs11_refused"),
    (0xB6, "CKR_SESSION_EXISTS", "pkcs11_locked"),
    (0xB7, "CKR_SESSION_READ_ONLY_EXISTS", "pkcs11_locked"),
    (0xB8, "CKR_SESSION_READ_WRITE_SO_EXISTS", "pkcs11_locked"),
    (0xC0, "CKR_SIGNATURE_INVALID", "pkcs11_damaged"),
    (0xC1, "CKR_SIGNATURE_LEN_RANGE", "pkcs11_damaged"),
    (0xD0, "CKR_TEMPLATE_INCOMPLETE", "pkcs11_client_error"),
    (0xD1, "CKR_TEMPLATE_INCONSISTENT", "pkcs11_client_error"),
    (0xE0, "CKR_TOKEN_NOT_PRESENT", "pkcs11_absent"),
    (0xE1, "CKR_TOKEN_NOT_RECOGNIZED", "pkcs11_unreachable"),
    (0xE2, "CKR_TOKEN_WRITE_PROTECTED", "pkcs11_refused"),
    (0xF0, "CKR_UNWRAPPING_KEY_HANDLE_INVALID", "pkcs11_absent"),
    (0xF1, "CKR_UNWRAPPING_KEY_SIZE_RANGE", "pkcs11_unsupported"),
    (0xF2, "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", "pkcs11_client_error"),
    (0x100, "CKR_USER_ALREADY_LOGGED_IN", "pkcs11_locked"),
    (0x101, "CKR_USER_NOT_LOGGED_IN", "pkcs11_refused"),
    (0x102, "CKR_USER_PIN_NOT_INITIALIZED", "token_not_ready"),
    (0x103, "CKR_USER_TYPE_INVALID", "pkcs11_unsupported"),
    (0x104, "CKR_USER_ANOTHER_ALREADY_LOGGED_IN", "pkcs11_locked"),
    (0x105, "CKR_USER_TOO_MANY_TYPES", "pkcs11_locked"),
    (0x110, "CKR_WRAPPED_KEY_INVALID", "pkcs11_damaged"),
    (0x112, "CKR_WRAPPED_KEY_LEN_RANGE", "pkcs11_damaged"),
    (0x113, "CKR_WRAPPING_KEY_HANDLE_INVALID", "pkcs11_absent"),
    (0x114, "CKR_WRAPPING_KEY_SIZE_RANGE", "pkcs11_unsupported"),
    (0x115, "CKR_WRAPPING_KEY_TYPE_INCONSISTENT", "pkcs11_client_error"),
    (0x120, "CKR_RANDOM_SEED_NOT_SUPPORTED", "pkcs11_unsupported"),
    (0x121, "CKR_RANDOM_NO_RNG", "pkcs11_unsupported"),
    (0x130, "CKR_DOMAIN_PARAMS_INVALID", "pkcs11_unsupported"),
    (0x140, "CKR_CURVE_NOT_SUPPORTED", "pkcs11_unsupported"),
    (0x150, "CKR_BUFFER_TOO_SMALL", "pkcs11_client_error"),
    (0x160, "CKR_SAVED_STATE_INVALID", "pkcs11_damaged"),
    (0x170, "CKR_INFORMATION_SENSITIVE", "pkcs11_refused"),
    (0x180, "CKR_STATE_UNSAVEABLE", "pkcs11_unsupported"),
    (0x190, "CKR_CRYPTOKI_NOT_INITIALIZED", "pkcs11_unreachable"),
    (0x191, "CKR_CRYPTOKI_ALREADY_INITIALIZED", "pkcs11_client_error"),
    (0x1A0, "CKR_MUTEX_BAD", "pkcs11_unreachable"),
    (0x1A1, "CKR_MUTEX_NOT_LOCKED", "pkcs11_unreachable"),
    (0x1B0, "CKR_NEW_PIN_MODE", "pin_expired"),
    (0x1B1, "CKR_NEXT_OTP", "pkcs11_refused"),
    (0x1B5, "CKR_EXCEEDED_MAX_ITERATIONS", "pkcs11_unreachable"),
    (0x1B6, "CKR_FIPS_SELF_TEST_FAILED", "pkcs11_unreachable"),
    (0x1B7, "CKR_LIBRARY_LOAD_FAILED", "pkcs11_unreachable"),
    (0x1B8, "CKR_PIN_TOO_WEAK", "pkcs11_refused"),
    (0x1B9, "CKR_PUBLIC_KEY_INVALID", "pkcs11_damaged"),
    (0x200, "CKR_FUNCTION_REJECTED", "pkcs11_refused"),
    (0x201, "CKR_TOKEN_RESOURCE_EXCEEDED", "pkcs11_unreachable"),
    (0x202, "CKR_OPERATION_CANCEL_FAILED", "pkcs11_unreachable"),
)
_BY_NUMBER = {number: (name, code) for number, name, code in _TABLE}


def _key(name: str) -> str:
    return name.upper().replace("_", "")


_BY_CLASS = {
    **{_key(name[4:]): name for _number, name, _code in _TABLE},
    # python-pkcs11's spelling where it is not the header's, and what it raises of its own accord.
    "FUNCTIONCANCELLED": "CKR_FUNCTION_CANCELED",
    "TOKENNOTRECOGNISED": "CKR_TOKEN_NOT_RECOGNIZED",
    "ANOTHERUSERALREADYLOGGEDIN": "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    "NOSUCHKEY": "CKR_OBJECT_HANDLE_INVALID",
    "NOSUCHTOKEN": "CKR_TOKEN_NOT_PRESENT",
}
_BY_NAME = {name: (number, code) for number, name, code in _TABLE}


def ckr_name(number: int) -> str:
    """``CKR_PIN_INCORRECT`` for 0xA0; the number in hexadecimal where the header has no name (vendors')."""
    return _BY_NUMBER[number][0] if number in _BY_NUMBER else f"0x{number:X}"


def ckr_of(exc: BaseException) -> str | None:
    """The CKR_ name behind an exception of python-pkcs11 or of our own C calls; None for any other exception.

    python-pkcs11's mapped exceptions have no text; an unmapped one says ``Unmapped error code 0x1b``.
    """
    if isinstance(exc, CkError):
        return ckr_name(exc.rv)
    from pkcs11.exceptions import PKCS11Error

    if not isinstance(exc, PKCS11Error):
        return None
    number = re.search(r"0x([0-9a-fA-F]+)", str(exc))
    if exc.__class__ is PKCS11Error and number:
        return ckr_name(int(number[1], 16))
    return _BY_CLASS.get(_key(type(exc).__name__), type(exc).__name__)


def error_from_ckr(ckr: str, obj: str, *, kept: str = "Nothing was changed.", next_step: str = "") -> TdeError:
    """An answer as our error.

    :param ckr: the name as :func:`ckr_name` or :func:`ckr_of` give it; what the table lacks is ``unreachable``.
    """
    _number, code = _BY_NAME.get(ckr, (0, "pkcs11_unreachable"))
    return TdeError(
        code, f"the token or its library answered {ckr}", obj=obj, kept=kept, next_step=next_step, details={"ckr": ckr}
    )


@contextlib.contextmanager
def translated(obj: str, *, kept: str = "Nothing was changed.") -> t.Iterator[None]:
    """Turn what python-pkcs11 or a C call raises inside into a :class:`TdeError`; all else passes.

    :param obj: the object being acted on, in words.
    :param kept: what stays as it was when the act fails here.
    """
    try:
        yield
    except TdeError:
        raise
    except Exception as exc:
        ckr = ckr_of(exc)
        if ckr is None:
            raise
        raise error_from_ckr(ckr, obj, kept=kept) from None
