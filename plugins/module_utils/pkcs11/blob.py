# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped key as text, pure: fields to bytes and back, and the bytes that are authenticated.

A blob is a flat JSON object::

    version     1
    mechanism   "AES-GCM" or "AES-CBC-PAD+HMAC-SHA256"
    kek_label   text, CKA_LABEL of the KEK
    kek_id      hex, CKA_ID of the KEK
    kek_kcv     hex, 3 bytes: AES-ECB of 16 zero bytes under the KEK
    iv          base64, 12 bytes for GCM, 16 for CBC
    ciphertext  base64; for GCM the tag of 16 bytes is its end
    mac_kcv     hex, 3 bytes: HMAC-SHA256 of "hsm.tde check value" under the MAC key   (CBC only)
    mac         base64, 32 bytes                                                      (CBC only)

Authenticated is, in this order, each field preceded by its length as 4 bytes, big-endian::

    "hsm.tde envelope 1" ‖ mechanism ‖ kek_label ‖ kek_id ‖ kek_kcv ‖ context          the AAD of GCM
    the same ‖ mac_kcv ‖ iv ‖ ciphertext                                               the message of HMAC

where texts are UTF-8 and hex and base64 are decoded. What is encrypted is the plaintext itself for GCM, and
:data:`CONFIRMATION` ‖ plaintext for CBC: CBC tells nothing about the key, and a token may hardly look at the padding.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import typing as t

from ..common.check import is_int
from ..common.errors import TdeError
from .attributes import KCV_BYTES

VERSION = 1
GCM = "AES-GCM"
CBC_HMAC = "AES-CBC-PAD+HMAC-SHA256"

#: Bytes of an IV: NIST SP 800-38D 8.2 for GCM, the block for CBC.
IV_BYTES = {GCM: 12, CBC_HMAC: 16}
#: Bits of GCM's tag, the longest.
TAG_BITS = 128
#: Bytes of HMAC-SHA256, never truncated.
MAC_BYTES = 32
#: One block before the plaintext in CBC: it comes back only under the right KEK.
CONFIRMATION = b"hsm.tde envelope"
#: Most bytes that are wrapped at once: a data key has 64 at most, a user's own secret may be a key file.
MAX_PLAINTEXT = 32768

_DOMAIN = b"hsm.tde envelope 1"
_FIELDS = ("version", "mechanism", "kek_label", "kek_id", "kek_kcv", "iv", "ciphertext")
_CBC_FIELDS = (*_FIELDS, "mac_kcv", "mac")
_HEX = re.compile(r"(?:[0-9a-f]{2}){0,128}")
_MOST_CIPHERTEXT = MAX_PLAINTEXT + len(CONFIRMATION) + 16
_LABEL_CHARACTERS = 255


@dataclasses.dataclass(frozen=True)
class Blob:
    """A wrapped key's fields, decoded. ``mac`` and ``mac_kcv`` are empty for GCM."""

    mechanism: str
    kek_label: str
    kek_id: bytes
    kek_kcv: bytes
    iv: bytes
    ciphertext: bytes
    mac_kcv: bytes = b""
    mac: bytes = b""

    def public(self) -> dict[str, t.Any]:
        """The fields for JSON."""
        fields: dict[str, t.Any] = {
            "version": VERSION,
            "mechanism": self.mechanism,
            "kek_label": self.kek_label,
            "kek_id": self.kek_id.hex(),
            "kek_kcv": self.kek_kcv.hex(),
            "iv": base64.b64encode(self.iv).decode(),
            "ciphertext": base64.b64encode(self.ciphertext).decode(),
        }
        if self.mechanism == CBC_HMAC:
            fields["mac_kcv"] = self.mac_kcv.hex()
            fields["mac"] = base64.b64encode(self.mac).decode()
        return fields

    def associated(self, context: bytes) -> bytes:
        """What GCM authenticates beside the ciphertext."""
        return joined(_DOMAIN, self.mechanism.encode(), self.kek_label.encode(), self.kek_id, self.kek_kcv, context)

    def message(self, context: bytes) -> bytes:
        """What the HMAC authenticates."""
        return self.associated(context) + joined(self.mac_kcv, self.iv, self.ciphertext)


def joined(*fields: bytes) -> bytes:
    """Fields so that no two lists give the same bytes: each after its length, 4 bytes big-endian."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def parse(content: t.Any) -> Blob:
    """A blob's fields from JSON, each judged; there is one spelling of every blob.

    :raises TdeError: ``envelope_invalid``, ``envelope_newer``.
    """
    if not isinstance(content, dict):
        raise invalid("it is not an object")
    version = content.get("version")
    if is_int(version) and version > VERSION:
        raise TdeError("envelope_newer", f"has version {version}; {VERSION} is known here", obj="wrapped key")
    if not is_int(version) or version != VERSION:
        raise invalid("field version")
    mechanism = content.get("mechanism")
    if mechanism not in (GCM, CBC_HMAC):
        raise invalid("field mechanism")
    if set(content) != set(_CBC_FIELDS if mechanism == CBC_HMAC else _FIELDS):
        raise invalid("a field is missing or too many")
    label = content["kek_label"]
    if not isinstance(label, str) or not 0 < len(label) <= _LABEL_CHARACTERS or not label.isprintable():
        raise invalid("field kek_label")
    blob = Blob(
        mechanism=mechanism,
        kek_label=label,
        kek_id=_hex(content, "kek_id"),
        kek_kcv=_hex(content, "kek_kcv", KCV_BYTES),
        iv=_base64(content, "iv"),
        ciphertext=_base64(content, "ciphertext"),
        mac_kcv=_hex(content, "mac_kcv", KCV_BYTES) if mechanism == CBC_HMAC else b"",
        mac=_base64(content, "mac") if mechanism == CBC_HMAC else b"",
    )
    if len(blob.iv) != IV_BYTES[mechanism]:
        raise invalid("field iv")
    if mechanism == CBC_HMAC and len(blob.mac) != MAC_BYTES:
        raise invalid("field mac")
    if not TAG_BITS // 8 <= len(blob.ciphertext) <= _MOST_CIPHERTEXT or (mechanism == CBC_HMAC and len(blob.ciphertext) % 16):
        raise invalid("field ciphertext")
    return blob


def invalid(reason: str) -> TdeError:
    """The error of a blob that is not well-formed."""
    return TdeError(
        "envelope_invalid",
        f"is not well-formed: {reason}",
        obj="wrapped key",
        kept="It was not used.",
        next_step="Restore it from a backup.",
    )


def _hex(content: dict[str, t.Any], name: str, length: int | None = None) -> bytes:
    value = content[name]
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise invalid(f"field {name}")
    raw = bytes.fromhex(value)
    if length is not None and len(raw) != length:
        raise invalid(f"field {name}")
    return raw


def _base64(content: dict[str, t.Any], name: str) -> bytes:
    value = content[name]
    if not isinstance(value, str) or len(value) > 2 * _MOST_CIPHERTEXT:
        raise invalid(f"field {name}")
    try:
        raw = base64.b64decode(value.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        raise invalid(f"field {name}") from None
    if base64.b64encode(raw).decode() != value:
        raise invalid(f"field {name}")
    return raw
