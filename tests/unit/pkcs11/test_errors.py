# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every answer of a token becomes an error of ours that names it."""

from __future__ import annotations

import inspect

import pkcs11.exceptions
import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import ERROR_CODES, TdeError
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import errors
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.cryptoki import CkError

_EXCEPTIONS = [
    cls
    for _name, cls in inspect.getmembers(pkcs11.exceptions, inspect.isclass)
    if issubclass(cls, pkcs11.exceptions.PKCS11Error) and cls is not pkcs11.exceptions.PKCS11Error
]
#: Raised by python-pkcs11 itself where a look-up found two; ours never ask it to look up.
_NO_CKR = {"MultipleObjectsReturned", "MultipleTokensReturned"}


@pytest.mark.parametrize("cls", _EXCEPTIONS, ids=lambda cls: cls.__name__)
def test_each_exception_has_its_ckr_name(cls: type[Exception]) -> None:
    ckr = errors.ckr_of(cls())
    if cls.__name__ in _NO_CKR:
        assert ckr == cls.__name__
    else:
        assert ckr is not None
        assert ckr.startswith("CKR_")


def test_each_row_names_a_code_of_the_table() -> None:
    assert {code for _number, _name, code in errors._TABLE} <= set(ERROR_CODES)
    assert (
        len({number for number, _name, _code in errors._TABLE})
        == len({name for _number, name, _code in errors._TABLE})
        == len(errors._TABLE)
    )


@pytest.mark.parametrize(
    ("exc", "code", "cause", "ckr"),
    [
        (pkcs11.exceptions.PinIncorrect(), "pin_refused", "refused", "CKR_PIN_INCORRECT"),
        (pkcs11.exceptions.PinLocked(), "pin_locked", "locked", "CKR_PIN_LOCKED"),
        (pkcs11.exceptions.DeviceRemoved(), "pkcs11_unreachable", "unreachable", "CKR_DEVICE_REMOVED"),
        (pkcs11.exceptions.MechanismInvalid(), "pkcs11_unsupported", "unsupported", "CKR_MECHANISM_INVALID"),
        (pkcs11.exceptions.EncryptedDataInvalid(), "pkcs11_damaged", "damaged", "CKR_ENCRYPTED_DATA_INVALID"),
        (pkcs11.exceptions.PKCS11Error("Unmapped error code 0x1b"), "pkcs11_refused", "refused", "CKR_ACTION_PROHIBITED"),
        (pkcs11.exceptions.PKCS11Error("Unmapped error code 0x80000012"), "pkcs11_unreachable", "unreachable", "0x80000012"),
        (CkError("C_Login", 0xA0), "pin_refused", "refused", "CKR_PIN_INCORRECT"),
        (CkError("C_Login", 0x80000001), "pkcs11_unreachable", "unreachable", "0x80000001"),
    ],
    ids=lambda value: str(value)[:30] or "none",
)
def test_translated(exc: Exception, code: str, cause: str, ckr: str) -> None:
    with pytest.raises(TdeError) as caught, errors.translated("token 'demo'"):
        raise exc
    assert (caught.value.code, caught.value.cause) == (code, cause)
    assert ckr in str(caught.value)
    assert caught.value.details["ckr"] == ckr


def test_what_is_no_answer_of_a_token_passes() -> None:
    with pytest.raises(KeyError), errors.translated("token 'demo'"):
        raise KeyError("x")
