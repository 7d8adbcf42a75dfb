# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The library's own C functions through ctypes, for what python-pkcs11 lacks or does slowly.

One access for the whole room: C_InitToken, C_CloseAllSessions and C_GetSessionInfo are missing in
python-pkcs11 (pyauth/python-pkcs11#110); its search builds a class for each object. The same library
loaded twice in a process is one library: handles of python-pkcs11's sessions are valid here.
"""

from __future__ import annotations

import ctypes
import typing as t

#: CK_ULONG on every platform of ours (PKCS#11 v2.40, 2.1: unsigned long int, at least 32 bits).
CK_ULONG = ctypes.c_ulong

#: Places in CK_FUNCTION_LIST, counted after its version (PKCS#11 v2.40, pkcs11f.h; v3 lists begin with the same).
_INDEX = {
    "C_Initialize": 0,
    "C_Finalize": 1,
    "C_GetInfo": 2,
    "C_GetSlotList": 4,
    "C_GetSlotInfo": 5,
    "C_GetTokenInfo": 6,
    "C_GetMechanismList": 7,
    "C_GetMechanismInfo": 8,
    "C_InitToken": 9,
    "C_InitPIN": 10,
    "C_SetPIN": 11,
    "C_CloseAllSessions": 14,
    "C_GetSessionInfo": 15,
    "C_Login": 18,
    "C_GetAttributeValue": 24,
    "C_FindObjectsInit": 26,
    "C_FindObjects": 27,
    "C_FindObjectsFinal": 28,
    "C_EncryptInit": 29,
    "C_Encrypt": 30,
}
#: How many functions a v2 list has.
_FUNCTIONS = 68


class CkError(Exception):
    """A C function's return value other than CKR_OK.

    :param function: the function's name; :param rv: the CKR_ number (pkcs11t.h).
    """

    def __init__(self, function: str, rv: int) -> None:
        self.function = function
        self.rv = rv
        super().__init__(f"{function} answered 0x{rv:X}")


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_ubyte), ("minor", ctypes.c_ubyte)]


class _List(ctypes.Structure):
    _fields_ = [("version", _Version), ("functions", ctypes.c_void_p * _FUNCTIONS)]


class FunctionList:
    """The C functions of a library that python-pkcs11 has loaded and initialised.

    :param path: the library's path, the same that python-pkcs11 was given.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        pointer = ctypes.POINTER(_List)()
        get = library.C_GetFunctionList
        get.restype = CK_ULONG
        rv = get(ctypes.byref(pointer))
        if rv:
            raise CkError("C_GetFunctionList", rv)
        self._list = pointer.contents
        self._library = library

    def function(self, name: str, *argtypes: t.Any) -> t.Callable[..., int]:
        """A function that answers its CKR_ number.

        :param name: one of those listed in this file.
        :param argtypes: ctypes types of its arguments.
        """
        address = self._list.functions[_INDEX[name]]
        if not address:
            raise CkError(name, 0x54)  # CKR_FUNCTION_NOT_SUPPORTED
        return ctypes.CFUNCTYPE(CK_ULONG, *argtypes)(address)

    def call(self, name: str, *arguments: t.Any) -> None:
        """Call a function with ctypes values once.

        :raises CkError: on every answer but CKR_OK.
        """
        rv = self.function(name, *(type(value) for value in arguments))(*arguments)
        if rv:
            raise CkError(name, rv)
