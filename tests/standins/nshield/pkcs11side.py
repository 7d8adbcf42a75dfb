# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The HSM's inside, served by SoftHSM: one act a process, as JSON on standard input. See README.md.

Keys are public, extractable objects: the stand-in, not SoftHSM, decides who may use them.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import sys
import typing as t

LIBRARIES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
)
LIBRARY = next((path for path in LIBRARIES if os.path.exists(path)), LIBRARIES[0])
SO_PIN = "standin-so-pin"


class _Functions(ctypes.Structure):
    _fields_ = [("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * 68)]


def _init_token(label: str) -> None:
    """C_InitToken on the free slot (python-pkcs11 lacks it). Places in the function list: PKCS#11 v2.40, pkcs11f.h."""
    pointer = ctypes.POINTER(_Functions)()
    ctypes.CDLL(LIBRARY).C_GetFunctionList(ctypes.byref(pointer))

    def call(index: int, *arguments: t.Any) -> int:
        kinds = [type(argument) for argument in arguments]
        return int(ctypes.CFUNCTYPE(ctypes.c_ulong, *kinds)(pointer.contents.functions[index])(*arguments))

    slots, count = (ctypes.c_ulong * 256)(), ctypes.c_ulong(256)
    answers = [
        call(0, ctypes.c_void_p(None)),
        call(4, ctypes.c_ubyte(0), ctypes.c_void_p(ctypes.addressof(slots)), ctypes.c_void_p(ctypes.addressof(count))),
        # The last slot is SoftHSM's free one.
        call(
            9,
            ctypes.c_ulong(slots[count.value - 1]),
            ctypes.c_char_p(SO_PIN.encode()),
            ctypes.c_ulong(len(SO_PIN)),
            ctypes.c_char_p(label.encode().ljust(32)),
        ),
        call(1, ctypes.c_void_p(None)),
    ]
    if any(answers):
        raise SystemExit(f"C_InitToken: {answers}")


def act(request: dict[str, t.Any]) -> dict[str, t.Any]:
    """Carry out one request; see its callers in world.py."""
    known = {token.serial for token in _tokens()} if request["act"] == "init" else set()
    if request["act"] == "init":
        _finalize()
        _init_token(request["label"])
    import pkcs11

    tokens = _tokens()
    if request["act"] == "init":
        token = next(token for token in tokens if token.serial not in known and token.flags & pkcs11.TokenFlag.TOKEN_INITIALIZED)
    else:
        token = next(token for token in tokens if token.serial.hex() == request["token"])
    if request["act"] in ("init", "pin"):
        with token.open(rw=True, so_pin=SO_PIN) as session:
            session.init_pin(request["pin"])
        return {"token": token.serial.hex()}
    with token.open(rw=True) as session:
        found = list(session.get_objects({pkcs11.Attribute.ID: bytes.fromhex(request["id"])}))
        if request["act"] == "copy" and not found:
            source = next(other for other in tokens if other.serial.hex() == request["source"])
            with source.open() as from_session:
                key = from_session.get_key(id=bytes.fromhex(request["id"]))
                _import(session, request["id"], key.label, key[pkcs11.Attribute.VALUE])
        elif request["act"] == "generate" and not found:
            _import(session, request["id"], request["label"], os.urandom(32))
        elif request["act"] in ("wrap", "unwrap"):
            return _crypt(found[0], request)
        return {}


def _tokens() -> list[t.Any]:
    import pkcs11

    library = pkcs11.lib(LIBRARY)
    return [slot.get_token() for slot in library.get_slots(token_present=True)]


def _finalize() -> None:
    import pkcs11

    pkcs11.lib(LIBRARY).finalize()


def _import(session: t.Any, identifier: str, label: str, value: bytes) -> None:
    from pkcs11 import Attribute, KeyType, ObjectClass

    session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.TOKEN: True,
            Attribute.PRIVATE: False,
            Attribute.SENSITIVE: False,
            Attribute.EXTRACTABLE: True,
            Attribute.ENCRYPT: True,
            Attribute.DECRYPT: True,
            Attribute.LABEL: label,
            Attribute.ID: bytes.fromhex(identifier),
            Attribute.VALUE: value,
        }
    )


def _crypt(key: t.Any, request: dict[str, t.Any]) -> dict[str, t.Any]:
    from pkcs11 import Mechanism

    data = base64.b64decode(request["data"])
    if request["act"] == "wrap":
        iv = os.urandom(16)
        result = iv + key.encrypt(data, mechanism=Mechanism.AES_CBC_PAD, mechanism_param=iv)
    else:
        result = key.decrypt(data[16:], mechanism=Mechanism.AES_CBC_PAD, mechanism_param=data[:16])
    return {"data": base64.b64encode(result).decode()}


if __name__ == "__main__":
    print(json.dumps(act(json.load(sys.stdin))))
