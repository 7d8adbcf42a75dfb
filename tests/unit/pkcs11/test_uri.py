# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PKCS#11 URIs: RFC 7512's own examples, round trips, and what is refused."""

from __future__ import annotations

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.uri import TYPES, Uri, format_uri, parse
from hypothesis import given
from hypothesis import strategies as st

# No surrogates: they have no UTF-8.
_texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_uris = st.builds(
    Uri,
    token=_texts,
    manufacturer=_texts,
    serial=_texts,
    model=_texts,
    slot_manufacturer=_texts,
    slot_description=_texts,
    slot_id=st.none() | st.integers(0, 2**64 - 1),
    library_manufacturer=_texts,
    library_description=_texts,
    library_version=st.none() | st.tuples(st.integers(0, 255), st.integers(0, 255)),
    object=_texts,
    type=st.none() | st.sampled_from(TYPES),
    id=st.none() | st.binary(max_size=20),
)


@given(_uris)
def test_what_is_written_is_read_back(uri: Uri) -> None:
    text = format_uri(uri)
    assert text.isascii()
    assert parse(text) == uri


@given(st.text(max_size=80) | st.text(alphabet="pkcs1:;=?&%AFtokenid", max_size=80).map("pkcs11:".__add__))
def test_any_text_is_read_or_refused_by_its_code(text: str) -> None:
    code = ""
    try:
        uri = parse(text)
    except TdeError as exc:
        code = exc.code
    assert code in ("uri_invalid", "uri_forbidden") or parse(format_uri(uri)) == uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        # RFC 7512 section 3, without the queries that we refuse
        ("pkcs11:", Uri()),
        ("pkcs11:object=my-pubkey;type=public", Uri(object="my-pubkey", type="public")),
        (
            "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;object=my-certificate;"
            "type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=",
            Uri(
                token="The Software PKCS#11 Softtoken",
                manufacturer="Snake Oil, Inc.",
                model="1.0",
                serial="",
                object="my-certificate",
                type="cert",
                id=bytes.fromhex("69953e5cf4bdec91"),
            ),
        ),
        (
            "pkcs11:slot-description=Sun%20Metaslot;slot-id=327",
            Uri(slot_description="Sun Metaslot", slot_id=327),
        ),
        (
            "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;library-version=1.23",
            Uri(library_manufacturer="Snake Oil, Inc.", library_description="Soft Token Library", library_version=(1, 23)),
        ),
        ("PKCS11:token=a&b", Uri(token="a&b")),
        ("pkcs11:token=caf%c3%a9", Uri(token="café")),
        ("pkcs11:token=t?vnd-something=/a?b|c", Uri(token="t")),
    ],
)
def test_examples(text: str, uri: Uri) -> None:
    assert parse(text) == uri


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "uri_invalid"),
        ("pkcs12:token=a", "uri_invalid"),
        ("pkcs11:token", "uri_invalid"),
        ("pkcs11:token=a;", "uri_invalid"),
        ("pkcs11:token=a;token=b", "uri_invalid"),
        ("pkcs11:token=a b", "uri_invalid"),
        ("pkcs11:token=a%2", "uri_invalid"),
        ("pkcs11:token=a/b", "uri_invalid"),
        ("pkcs11:token=%FF", "uri_invalid"),
        ("pkcs11:slot-id=0x1", "uri_invalid"),
        ("pkcs11:type=key", "uri_invalid"),
        ("pkcs11:library-version=1.2.3", "uri_invalid"),
        ("pkcs11:x-vendor=1", "uri_invalid"),
        ("pkcs11:token=" + "a" * 5000, "uri_invalid"),
        ("pkcs11:token=a?pin-value=1234", "uri_forbidden"),
        ("pkcs11:token=a?pin-source=file:/etc/pin", "uri_forbidden"),
        ("pkcs11:?module-path=/tmp/evil.so", "uri_forbidden"),
        ("pkcs11:?x=1&module-name=evil", "uri_forbidden"),
    ],
)
def test_refused(text: str, code: str) -> None:
    with pytest.raises(TdeError) as caught:
        parse(text)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "text", ["pkcs11:token=a?pin-value=s3cr3t-pin", "pkcs11:pin=s3cr3t-pin", "pkcs11:s3cr3t-pin=1", "s3cr3t-pin"]
)
def test_an_error_does_not_repeat_what_may_be_a_pin(text: str) -> None:
    with pytest.raises(TdeError) as caught:
        parse(text)
    assert "s3cr3t" not in str(caught.value)
