# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a key's attributes are called, how they lie in memory, and how they are read in one C call a key.

Numbers are those of PKCS#11 v2.40, pkcs11t.h. Nothing here talks to a token.
"""

from __future__ import annotations

import ctypes
import struct
import typing as t

from .cryptoki import CK_ULONG

#: What a token answers as the length of an attribute that it does not have or does not tell (CK_UNAVAILABLE_INFORMATION).
UNAVAILABLE = CK_ULONG(-1).value

#: Object classes that are keys (CKO_), and the words for them.
CLASSES = {0x2: "public", 0x3: "private", 0x4: "secret"}
#: First number of the vendors' own classes (CKO_VENDOR_DEFINED), and the last of the standard's (v3.1: CKO_TRUST).
_VENDOR_CLASS = 0x80000000
_LAST_CLASS = 0xB

#: Key types (CKK_), and the words for them. A generic secret is what HMAC works with.
TYPES = {
    0x00: "rsa",
    0x01: "dsa",
    0x02: "dh",
    0x03: "ec",
    0x10: "hmac",
    0x13: "des",
    0x14: "des2",
    0x15: "des3",
    0x1F: "aes",
    0x40: "ec_edwards",
    0x41: "ec_montgomery",
}

#: CKK_AES.
AES = 0x1F

#: Curves by their object identifier in DER (SEC 2; RFC 5639 for brainpool): name and bits.
CURVES = {
    bytes.fromhex("06082a8648ce3d030107"): ("secp256r1", 256),
    bytes.fromhex("06052b81040022"): ("secp384r1", 384),
    bytes.fromhex("06052b81040023"): ("secp521r1", 521),
    bytes.fromhex("06052b8104000a"): ("secp256k1", 256),
    bytes.fromhex("06092b2403030208010107"): ("brainpoolP256r1", 256),
    bytes.fromhex("06092b240303020801010b"): ("brainpoolP384r1", 384),
    bytes.fromhex("06092b240303020801010d"): ("brainpoolP512r1", 512),
}

#: Bytes of a check value (PKCS#11 v2.40, 4.10.2).
KCV_BYTES = 3

#: What a key may be used for, in the order in which it is shown.
USAGE = ("encrypt", "decrypt", "wrap", "unwrap", "sign", "verify", "derive")
#: Which of them an object of a class has (PKCS#11 v2.40, 4.8 to 4.10).
USAGE_OF = {
    "secret": USAGE,
    "private": ("decrypt", "unwrap", "sign", "derive"),
    "public": ("encrypt", "wrap", "verify"),
}


class Attribute(t.NamedTuple):
    """One attribute: its CKA_ number, struct code of its value (``s`` bytes, ``Q`` CK_ULONG, ``?`` CK_BBOOL), bytes kept for it."""

    number: int
    code: str
    room: int


#: Attributes by the name used in options and results. A longer value than ``room`` is read on its own.
ATTRIBUTES: dict[str, Attribute] = {
    "label": Attribute(0x003, "s", 256),
    "id": Attribute(0x102, "s", 64),
    "ec_params": Attribute(0x180, "s", 512),
    "modulus": Attribute(0x120, "s", 1024),
    "ec_point": Attribute(0x181, "s", 160),
    "check_value": Attribute(0x090, "s", 8),
    "allowed_mechanisms": Attribute(0x40000600, "s", 512),
    "class": Attribute(0x000, "Q", 8),
    "type": Attribute(0x100, "Q", 8),
    "value_len": Attribute(0x161, "Q", 8),
    "modulus_bits": Attribute(0x121, "Q", 8),
    "token": Attribute(0x001, "?", 1),
    "private": Attribute(0x002, "?", 1),
    "sensitive": Attribute(0x103, "?", 1),
    "extractable": Attribute(0x162, "?", 1),
    "always_sensitive": Attribute(0x165, "?", 1),
    "never_extractable": Attribute(0x164, "?", 1),
    "local": Attribute(0x163, "?", 1),
    "modifiable": Attribute(0x170, "?", 1),
    "encrypt": Attribute(0x104, "?", 1),
    "decrypt": Attribute(0x105, "?", 1),
    "wrap": Attribute(0x106, "?", 1),
    "unwrap": Attribute(0x107, "?", 1),
    "sign": Attribute(0x108, "?", 1),
    "verify": Attribute(0x10A, "?", 1),
    "derive": Attribute(0x10C, "?", 1),
}

#: The facts about a key that :func:`facts` makes, and the attributes each is made of.
FACTS: dict[str, tuple[str, ...]] = {
    "label": ("label",),
    "id": ("id",),
    "class": ("class",),
    "type": ("type",),
    "size": ("value_len", "modulus_bits", "modulus", "ec_params"),
    "curve": ("ec_params",),
    **{name: (name,) for name, attribute in ATTRIBUTES.items() if attribute.code == "?"},
    "check_value": ("check_value", "type"),
}


class CkAttribute(ctypes.Structure):
    """CK_ATTRIBUTE (PKCS#11 v2.40, 3.4; natural alignment on Unix)."""

    _fields_ = [("type", CK_ULONG), ("value", ctypes.c_void_p), ("length", CK_ULONG)]


def template(values: t.Mapping[str, bytes | int | bool]) -> tuple[t.Any, list[t.Any]]:
    """A C array of attributes with values, for a search; the second part must live as long as the first is used.

    :param values: by the names of :data:`ATTRIBUTES`.
    """
    array = (CkAttribute * len(values))()
    kept = []
    for slot, (name, value) in zip(array, values.items(), strict=True):
        attribute = ATTRIBUTES[name]
        raw = value if isinstance(value, bytes) else struct.pack("=" + attribute.code, value)
        buffer = ctypes.create_string_buffer(raw, len(raw) or 1)
        slot.type, slot.value, slot.length = attribute.number, ctypes.addressof(buffer), len(raw)
        kept.append(buffer)
    return array, kept


class Layout:
    """Memory for some attributes of one key, filled by one C_GetAttributeValue and decoded by two unpackings.

    :param names: keys of :data:`ATTRIBUTES`.
    """

    def __init__(self, names: t.Iterable[str]) -> None:
        # Values of varying length first, so that the lengths of the others form one tuple that repeats from key to key.
        self.names = sorted(names, key=lambda name: ATTRIBUTES[name].code != "s")
        chosen = [ATTRIBUTES[name] for name in self.names]
        self.count = len(chosen)
        self._varying = [(place, name) for place, name in enumerate(self.names) if ATTRIBUTES[name].code == "s"]
        self._fixed = self.names[len(self._varying) :]
        self._buffer = ctypes.create_string_buffer(sum(attribute.room for attribute in chosen))
        self.array = (CkAttribute * self.count)()
        address = ctypes.addressof(self._buffer)
        for slot, attribute in zip(self.array, chosen, strict=True):
            slot.type, slot.value, slot.length = attribute.number, address, attribute.room
            address += attribute.room
        self._pristine = bytes(self.array)
        self._lengths = struct.Struct("=" + "16xQ" * self.count).unpack_from
        self._values = struct.Struct("=" + "".join(f"{a.room}s" if a.code == "s" else a.code for a in chosen)).unpack_from
        self._blank: dict[tuple[int, ...], tuple[str, ...]] = {}

    def reset(self) -> None:
        """Make ready for the next key."""
        ctypes.memmove(self.array, self._pristine, len(self._pristine))

    def decode(self) -> dict[str, t.Any]:
        """The values after the call: bytes, int or bool; None for what the key does not have or the token does not tell."""
        lengths = self._lengths(self.array)
        values = self._values(self._buffer)
        found = dict(zip(self.names, values, strict=True))
        for place, name in self._varying:
            length = lengths[place]
            found[name] = None if length == UNAVAILABLE else values[place][:length]
        tail = lengths[len(self._varying) :]
        blank = self._blank.get(tail)
        if blank is None:
            blank = self._blank[tail] = tuple(
                name for name, length in zip(self._fixed, tail, strict=True) if length != ATTRIBUTES[name].room
            )
        for name in blank:
            found[name] = None
        return found


def is_vendor_class(number: int | None) -> bool:
    """Whether an object's class is outside the standard."""
    return number is None or number >= _VENDOR_CLASS or number > _LAST_CLASS


def size_of(raw: t.Mapping[str, t.Any]) -> int | None:
    """A key's size in bits, or None where the token does not tell."""
    if raw.get("value_len"):
        return t.cast(int, raw["value_len"]) * 8
    if raw.get("modulus_bits"):
        return t.cast(int, raw["modulus_bits"])
    if raw.get("modulus"):
        return int.from_bytes(raw["modulus"], "big").bit_length()
    if raw.get("ec_params"):
        return CURVES.get(raw["ec_params"], ("", None))[1]
    return None


def curve_of(raw: t.Mapping[str, t.Any]) -> str | None:
    """A curve's name; its DER in hex if it is none of ours."""
    params = raw.get("ec_params")
    return None if not params else CURVES.get(params, (params.hex(), 0))[0]


def facts(raw: dict[str, t.Any], names: t.Collection[str]) -> dict[str, t.Any]:
    """Decoded attributes as a user reads them.

    :param raw: what :meth:`Layout.decode` answered.
    :param names: keys of :data:`FACTS`; also their order.
    :returns: ``label`` text, ``id`` and ``check_value`` hex, ``class`` and ``type`` words, ``size`` bits, the rest as decoded.
    """
    shown: dict[str, t.Any] = {name: raw.get(name) for name in names}
    if "label" in shown:
        shown["label"] = (raw["label"] or b"").decode("utf-8", "replace")
    if "id" in shown:
        shown["id"] = (raw["id"] or b"").hex()
    if "class" in shown:
        shown["class"] = CLASSES[raw["class"]]
    if "type" in shown:
        shown["type"] = type_word(raw["type"])
    if "size" in shown:
        shown["size"] = size_of(raw)
    if "curve" in shown:
        shown["curve"] = curve_of(raw)
    if "check_value" in shown:
        # For other secret keys it is a hash of the value itself (PKCS#11 v2.40, 4.10.2): nothing to show around.
        shown["check_value"] = raw["check_value"].hex() if raw["check_value"] and raw["type"] == AES else None
    return shown


def type_word(number: int | None) -> str:
    """The word for a key type; ``0x…`` for one that has none here."""
    return "unknown" if number is None else TYPES.get(number) or f"0x{number:x}"


def unpack(name: str, value: bytes) -> t.Any:
    """One attribute's value from its bytes; None if they have not the length of its kind."""
    attribute = ATTRIBUTES[name]
    if attribute.code == "s":
        return value
    return struct.unpack("=" + attribute.code, value)[0] if len(value) == attribute.room else None
