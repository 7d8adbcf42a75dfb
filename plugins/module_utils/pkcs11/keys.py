# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Finding and reading keys, by C calls: one search, then one call a key.

python-pkcs11's search fetches ten attributes and builds a class for each object, breaks off at a vendor's class and
answers an empty list where nobody is logged in; here vendors' objects are counted and a session that cannot see
private keys says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import typing as t

from ..common.errors import TdeError
from . import attributes as attrs
from .cryptoki import CK_ULONG, CkError
from .errors import translated

if t.TYPE_CHECKING:
    from .registry import Registry
    from .token import Session

#: Return values (pkcs11t.h) that leave the other attributes of a call valid (PKCS#11 v2.40, 5.7.5).
_CKR_ATTRIBUTE_SENSITIVE = 0x11
_CKR_ATTRIBUTE_TYPE_INVALID = 0x12
_CKR_BUFFER_TOO_SMALL = 0x150
_PARTIAL = (0, _CKR_ATTRIBUTE_SENSITIVE, _CKR_ATTRIBUTE_TYPE_INVALID, _CKR_BUFFER_TOO_SMALL)
#: Somebody else destroyed the object between the search and the reading.
_CKR_OBJECT_HANDLE_INVALID = 0x82
#: Session states in which a user is logged in: CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS.
_USER_STATES = (1, 3)
#: CKM_AES_ECB, and AES's block in bytes.
_CKM_AES_ECB = 0x1081
_BLOCK = 16
#: Handles asked for in one C_FindObjects.
_BATCH = 1024
#: A label or identifier longer than this is no key's name but an error.
_LONGEST = 65536

#: Attributes that a :class:`KeyInfo` is made of.
_INFO = tuple(name for name in attrs.ATTRIBUTES if name not in ("check_value", "ec_point", "allowed_mechanisms"))
#: Facts of a listing if none are named: all but the check value, which is read on request.
DEFAULT_FIELDS = tuple(name for name in attrs.FACTS if name != "check_value")


@dataclasses.dataclass(frozen=True)
class KeyRef:
    """What names a key in a token: duplicate labels are legal, label and CKA_ID together are not expected twice."""

    label: str
    id: bytes

    def __str__(self) -> str:
        return f"key {self.label!r} (id {self.id.hex() or 'empty'})"


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """One key object as the token shows it.

    :ivar handle: valid in this process's sessions on the token.
    :ivar cls: ``secret``, ``private`` or ``public``; :ivar type: ``aes``, ``hmac``, ``rsa``, ``ec`` …
    :ivar size: bits, None where the token does not tell; :ivar curve: name, None if it has none.
    :ivar flags: the boolean attributes by name; those that the token does not tell are missing.
    """

    handle: int
    label: str
    id: bytes
    cls: str
    type: str
    size: int | None
    curve: str | None
    modulus: bytes | None
    flags: t.Mapping[str, bool]

    @property
    def ref(self) -> KeyRef:
        return KeyRef(self.label, self.id)

    def public(self) -> dict[str, t.Any]:
        """The key's facts as a module returns them."""
        return {
            "label": self.label,
            "id": self.id.hex(),
            "class": self.cls,
            "type": self.type,
            "size": self.size,
            "curve": self.curve,
            **self.flags,
        }


@dataclasses.dataclass
class Listing:
    """What a search for keys found.

    :ivar keys: facts, one dictionary a key.
    :ivar skipped: objects of vendors' own classes, which nobody but the vendor can read.
    :ivar more: there are further keys beyond the limit.
    :ivar private_visible: False if nobody is logged in: then private keys do not show, and none is "absent".
    """

    keys: list[dict[str, t.Any]]
    skipped: int
    more: bool
    private_visible: bool


class _SessionInfo(ctypes.Structure):
    """CK_SESSION_INFO."""

    _fields_ = [("slot_id", CK_ULONG), ("state", CK_ULONG), ("flags", CK_ULONG), ("device_error", CK_ULONG)]


class Reader:
    """Searches and readings in one session.

    :param names: keys of :data:`.attributes.ATTRIBUTES` to read of each object; ``class`` is always read.
    """

    def __init__(self, session: Session, names: t.Iterable[str]) -> None:
        functions = session.library.functions
        pointer = ctypes.c_void_p
        self._session = session.handle
        self._layout = attrs.Layout({"class", *names})
        self._init = functions.function("C_FindObjectsInit", CK_ULONG, pointer, CK_ULONG)
        self._find = functions.function("C_FindObjects", CK_ULONG, pointer, CK_ULONG, pointer)
        self._final = functions.function("C_FindObjectsFinal", CK_ULONG)
        self._get = functions.function("C_GetAttributeValue", CK_ULONG, CK_ULONG, pointer, CK_ULONG)

    def search(self, template: t.Mapping[str, bytes | int | bool]) -> list[int]:
        """Handles of the objects that match; complete before anything else is asked of the session.

        :raises CkError: what the token answered.
        """
        array, _kept = attrs.template(template)
        _check("C_FindObjectsInit", self._init(self._session, ctypes.addressof(array) if template else None, len(template)))
        found: list[int] = []
        batch = (CK_ULONG * _BATCH)()
        count = CK_ULONG()
        try:
            while True:
                _check("C_FindObjects", self._find(self._session, batch, _BATCH, ctypes.addressof(count)))
                if not count.value:
                    return found
                found += batch[: count.value]
        finally:
            self._final(self._session)

    def read(self, handle: int) -> dict[str, t.Any] | None:
        """An object's attributes as :meth:`.attributes.Layout.decode` gives them; None if it is gone.

        :raises CkError: what the token answered.
        """
        layout = self._layout
        layout.reset()
        rv = self._get(self._session, handle, layout.array, layout.count)
        if rv in _PARTIAL:
            raw = layout.decode()
            for name in ("label", "id"):
                # Every key has both; a token says "unavailable" when they are longer than the room for them.
                if name in raw and raw[name] is None:
                    raw[name] = self._read_one(handle, name)
            return raw
        if rv == _CKR_OBJECT_HANDLE_INVALID:
            return None
        # Some tokens fail the whole call for one attribute that an object does not have.
        return {name: self._decode_one(handle, name) for name in layout.names}

    def _read_one(self, handle: int, name: str) -> bytes | None:
        slot = attrs.CkAttribute(attrs.ATTRIBUTES[name].number, None, 0)
        for _attempt in ("length", "value"):
            rv = self._get(self._session, handle, ctypes.addressof(slot), 1)
            if rv in (_CKR_ATTRIBUTE_SENSITIVE, _CKR_ATTRIBUTE_TYPE_INVALID) or slot.length == attrs.UNAVAILABLE:
                return None
            _check("C_GetAttributeValue", rv)
            if slot.length > _LONGEST:
                raise CkError("C_GetAttributeValue", _CKR_BUFFER_TOO_SMALL)
            if not slot.value:
                buffer = ctypes.create_string_buffer(slot.length or 1)
                slot.value = ctypes.addressof(buffer)
        return buffer.raw[: slot.length]

    def _decode_one(self, handle: int, name: str) -> t.Any:
        value = self._read_one(handle, name)
        return None if value is None else attrs.unpack(name, value)


class _Mechanism(ctypes.Structure):
    """CK_MECHANISM."""

    _fields_ = [("mechanism", CK_ULONG), ("parameter", ctypes.c_void_p), ("length", CK_ULONG)]


def aes_block(session: Session, handle: int, block: bytes) -> bytes:
    """One block of 16 bytes encrypted by AES-ECB, for check values and comparisons.

    :raises CkError: what the token answered.
    """
    pointer = ctypes.c_void_p
    start = session.library.functions.function("C_EncryptInit", CK_ULONG, pointer, CK_ULONG)
    encrypt = session.library.functions.function("C_Encrypt", CK_ULONG, ctypes.c_char_p, CK_ULONG, pointer, pointer)
    mechanism = _Mechanism(_CKM_AES_ECB, None, 0)
    result = ctypes.create_string_buffer(2 * _BLOCK)
    length = CK_ULONG(len(result))
    _check("C_EncryptInit", start(session.handle, ctypes.addressof(mechanism), handle))
    _check("C_Encrypt", encrypt(session.handle, block, _BLOCK, result, ctypes.addressof(length)))
    return result.raw[:_BLOCK]


def check_value(session: Session, info: KeyInfo) -> bytes | None:
    """A key's check value; None for a key that has none (another type than AES) or may not encrypt.

    :raises TdeError: what the token answered.
    """
    if info.type != "aes" or not info.flags.get("encrypt"):
        return None
    with translated(str(info.ref)):
        return aes_block(session, info.handle, bytes(_BLOCK))[: attrs.KCV_BYTES]


def _check(function: str, rv: int) -> None:
    if rv:
        raise CkError(function, rv)


def private_visible(session: Session) -> bool:
    """Whether the session shows private objects: a user is logged in, or the token asks nobody to."""
    info = _SessionInfo()
    with translated(f"token {session.token.label}"):
        session.library.functions.call("C_GetSessionInfo", CK_ULONG(session.handle), ctypes.c_void_p(ctypes.addressof(info)))
    return info.state in _USER_STATES or "login_required" not in session.token.flags


def list_keys(
    session: Session,
    *,
    fields: t.Sequence[str] = DEFAULT_FIELDS,
    label: str | None = None,
    id: bytes | None = None,
    cls: str | None = None,
    type: str | None = None,
    limit: int | None = None,
    check_values: bool = False,
) -> Listing:
    """The keys of a token.

    :param fields: facts to read, keys of :data:`.attributes.FACTS`.
    :param check_values: add ``check_value``: as the token stores it, else encrypted, which is one more call a key.
    :param label: with exactly this label; :param id: this CKA_ID; :param cls: this class; :param type: this type, in words.
    :param limit: read no more than this many.
    :raises TdeError: what the token answered.
    """
    template: dict[str, bytes | int | bool] = {}
    if label is not None:
        template["label"] = label.encode()
    if id is not None:
        template["id"] = id
    if cls is not None:
        template["class"] = _number(attrs.CLASSES, cls)
    if type is not None:
        template["type"] = _number(attrs.TYPES, type)
    if check_values:
        fields = (*fields, "check_value")
    names = {name for field in fields for name in attrs.FACTS[field]} | ({"encrypt"} if check_values else set())
    listing = Listing([], 0, False, private_visible(session))
    keys = listing.keys
    classes = attrs.CLASSES
    facts_of = attrs.facts
    with translated(f"token {session.token.label}"):
        reader = Reader(session, names)
        read = reader.read
        for handle in reader.search(template):
            raw = read(handle)
            if raw is None:
                continue
            if raw["class"] not in classes:
                listing.skipped += attrs.is_vendor_class(raw["class"])
                continue
            if limit is not None and len(keys) == limit:
                listing.more = True
                break
            shown = facts_of(raw, fields)
            if check_values and shown["check_value"] is None and raw["type"] == attrs.AES and raw["encrypt"]:
                shown["check_value"] = aes_block(session, handle, bytes(_BLOCK))[: attrs.KCV_BYTES].hex()
            keys.append(shown)
    return listing


def _number(words: t.Mapping[int, str], word: str) -> int:
    return next(number for number, known in words.items() if known == word)


def find(session: Session, label: str, *, id: bytes | None = None, cls: str | None = None) -> list[KeyInfo]:
    """The keys with a label, all of them.

    :raises TdeError: ``pin_missing`` if private keys do not show (then nothing can be said); what the token answered.
    """
    if not private_visible(session):
        raise TdeError(
            "pin_missing",
            "nobody is logged in, so that private keys do not show and none can be called absent",
            obj=f"token {session.token.label}",
            next_step="Give the user PIN.",
        )
    template: dict[str, bytes | int | bool] = {"label": label.encode()}
    if id is not None:
        template["id"] = id
    if cls is not None:
        template["class"] = _number(attrs.CLASSES, cls)
    with translated(f"key {label!r} in token {session.token.label}"):
        reader = Reader(session, _INFO)
        raws = [(handle, reader.read(handle)) for handle in reader.search(template)]
    return [_info(handle, raw) for handle, raw in raws if raw is not None and raw["class"] in attrs.CLASSES]


def _info(handle: int, raw: dict[str, t.Any]) -> KeyInfo:
    shown = attrs.facts(raw, DEFAULT_FIELDS)
    return KeyInfo(
        handle=handle,
        label=shown["label"],
        id=raw["id"] or b"",
        cls=shown["class"],
        type=shown["type"],
        size=shown["size"],
        curve=shown["curve"],
        modulus=raw["modulus"],
        flags={
            name: raw[name] for name, attribute in attrs.ATTRIBUTES.items() if attribute.code == "?" and raw[name] is not None
        },
    )


def find_key(session: Session, key: KeyRef | str, *, cls: str = "secret", registry: Registry | None = None) -> KeyInfo:
    """The one key with a label, or with a label and a CKA_ID.

    :param registry: what must exist on this host; a key that it names and the token does not list is unreachable.
    :raises TdeError: ``key_absent``, ``key_unreachable``, ``key_ambiguous``, ``pin_missing``; what the token answered.
    """
    label, id_ = (key, None) if isinstance(key, str) else (key.label, key.id)
    obj = (f"key {key!r}" if isinstance(key, str) else str(key)) + f" in token {session.token.label}"
    found = find(session, label, id=id_, cls=cls)
    if len(found) == 1:
        return found[0]
    if found:
        raise TdeError(
            "key_ambiguous",
            f"{len(found)} {cls} keys match",
            obj=obj,
            next_step="Name the key by its id as well."
            if id_ is None
            else "Two keys share label and id: set another id on one of them.",
            details={"ids": sorted(info.id.hex() for info in found)},
        )
    if registry and registry.names_key(session.token.label, session.token.serial, label, id_.hex() if id_ is not None else None):
        raise unreachable(obj)
    raise TdeError("key_absent", f"the token lists no {cls} key of this name", obj=obj)


def unreachable(obj: str, who: str = "this host remembers it") -> TdeError:
    """The error for a key that must exist and does not show.

    :param who: who says that it exists.
    """
    return TdeError(
        "key_unreachable",
        f"{who}, and the token does not list it",
        obj=obj,
        next_step="Find out whether the token's storage is mounted and is the right one; nothing is generated in its place.",
    )


def handle_of(session: Session, info: KeyInfo) -> t.Any:
    """python-pkcs11's object for a key, for the operations that it does well.

    :raises TdeError: ``key_absent`` if it has gone meanwhile; what the token answered.
    """
    from pkcs11 import Attribute, ObjectClass

    kinds = {"secret": ObjectClass.SECRET_KEY, "private": ObjectClass.PRIVATE_KEY, "public": ObjectClass.PUBLIC_KEY}
    wanted = {Attribute.CLASS: kinds[info.cls], Attribute.LABEL: info.label, Attribute.ID: info.id}
    with translated(str(info.ref)):
        for found in list(session.raw.get_objects(wanted)):
            if found.handle == info.handle:
                return found
    raise TdeError("key_absent", "was there a moment ago", obj=str(info.ref))


def reread(session: Session, info: KeyInfo) -> KeyInfo:
    """The key as it is now.

    :raises TdeError: ``key_absent`` if it has gone.
    """
    with translated(str(info.ref)):
        raw = Reader(session, _INFO).read(info.handle)
    if raw is None:
        raise TdeError("key_absent", "was there a moment ago", obj=str(info.ref))
    return _info(info.handle, raw)
