# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PKCS#11 URIs (RFC 7512, with slot-id and its kind from section 2.3): parsed and written, nothing looked up."""

from __future__ import annotations

import dataclasses
import re
import typing as t
import urllib.parse

from ..common.errors import TdeError

#: RFC 7512 section 2.3: pk11-res-avail and "&", allowed unescaped in the path beside RFC 3986's unreserved.
_PATH_SAFE = ":[]@!$'()*+,=&"
_PATH_VALUE = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*")
#: pk11-query-res-avail adds "/", "?" and "|"; "&" separates.
_QUERY_ITEM = re.compile(r"[A-Za-z0-9_-]+=(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{2})*")

#: pk11-type in RFC 7512 section 2.3.
TYPES = ("public", "private", "cert", "secret-key", "data")

#: Query attributes that would make a URI carry a PIN or choose the code that root loads.
_FORBIDDEN = ("pin-value", "pin-source", "module-name", "module-path")

#: Longer than any URI of all attributes percent-encoded at their greatest length.
_MAX_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Uri:
    """The path attributes of a URI; None where the URI does not name one (then anything matches).

    ``object`` is CKA_LABEL, ``id`` CKA_ID; ``library_version`` is (major, minor).
    """

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    slot_manufacturer: str | None = None
    slot_description: str | None = None
    slot_id: int | None = None
    library_manufacturer: str | None = None
    library_description: str | None = None
    library_version: tuple[int, int] | None = None
    object: str | None = None
    type: str | None = None
    id: bytes | None = None


#: Attribute name in the URI -> field, in the order in which they are written.
_FIELDS: dict[str, str] = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(Uri)}


def _invalid(reason: str) -> TdeError:
    # The text of the URI is not repeated: somebody may have put a PIN into it.
    return TdeError(
        "uri_invalid", reason, obj="PKCS#11 URI", next_step="Write it as pkcs11:token=LABEL;serial=NUMBER (RFC 7512)."
    )


def parse(text: str) -> Uri:
    """A URI's attributes.

    A vendor's path attribute would match nothing that can be looked up (RFC 7512 section 2.5), so it is an
    error; unknown query attributes are ignored, as that section says.

    :raises TdeError: ``uri_invalid``, ``uri_forbidden`` (PIN, PIN source or module in the query).
    """
    if len(text) > _MAX_LENGTH:
        raise _invalid(f"is longer than {_MAX_LENGTH} characters")
    if text[:7].lower() != "pkcs11:":
        raise _invalid("does not begin with pkcs11:")
    path, has_query, query = text[7:].partition("?")
    if has_query:
        _check_query(query)
    values: dict[str, t.Any] = {}
    for part in path.split(";") if path else []:
        name, equals, raw = part.partition("=")
        field = _FIELDS.get(name)
        if not equals or not re.fullmatch(r"[a-z-]{1,40}", name):
            raise _invalid("has a malformed attribute")
        if field is None:
            raise _invalid(f"has the unknown attribute {name}")
        if field in values:
            raise _invalid(f"names {name} twice")
        if not _PATH_VALUE.fullmatch(raw):
            raise _invalid(f"has a character in {name} that must be percent-encoded")
        values[field] = _value(name, urllib.parse.unquote_to_bytes(raw))
    return Uri(**values)


def _check_query(query: str) -> None:
    for part in query.split("&"):
        if not _QUERY_ITEM.fullmatch(part):
            raise _invalid("has a malformed query")
        name = part.partition("=")[0]
        if name in _FORBIDDEN:
            raise TdeError(
                "uri_forbidden",
                f"names {name}; who can write a URI must not choose the PIN or the code that root loads",
                obj="PKCS#11 URI",
                next_step="Use the options library and pin.",
            )


def _value(name: str, raw: bytes) -> t.Any:
    if name == "id":
        return raw
    try:
        value = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid(f"has a value of {name} that is not UTF-8") from None
    if name == "slot-id":
        if not re.fullmatch(r"[0-9]{1,20}", value):
            raise _invalid("has a slot-id that is not a decimal number")
        return int(value)
    if name == "library-version":
        match = re.fullmatch(r"([0-9]{1,3})(?:\.([0-9]{1,3}))?", value)
        if match is None:
            raise _invalid("has a library-version that is not MAJOR or MAJOR.MINOR")
        return int(match[1]), int(match[2] or 0)
    if name == "type" and value not in TYPES:
        raise _invalid(f"has a type other than {', '.join(TYPES)}")
    return value


def format_uri(uri: Uri) -> str:
    """The URI as text; ``parse(format_uri(uri)) == uri``.

    CKA_ID is written percent-encoded throughout, as RFC 7512 section 2.3 recommends.
    """
    parts = []
    for name, field in _FIELDS.items():
        value = getattr(uri, field)
        if value is None:
            continue
        if isinstance(value, bytes):
            text = "".join(f"%{byte:02X}" for byte in value)
        elif isinstance(value, tuple):
            text = f"{value[0]}.{value[1]}"
        else:
            text = urllib.parse.quote(str(value), safe=_PATH_SAFE)
        parts.append(f"{name}={text}")
    return "pkcs11:" + ";".join(parts)
