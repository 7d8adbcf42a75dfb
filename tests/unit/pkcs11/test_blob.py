# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped key as text: one spelling, strict reading, and unambiguous authenticated bytes."""

from __future__ import annotations

import base64
import json
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.blob import CBC_HMAC, GCM, IV_BYTES, Blob, joined, parse
from hypothesis import given
from hypothesis import strategies as st

labels = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=60)


@st.composite
def blobs(draw: st.DrawFn) -> Blob:
    mechanism = draw(st.sampled_from([GCM, CBC_HMAC]))
    blocks = draw(st.integers(1, 6))
    fields: dict[str, t.Any] = {
        "mechanism": mechanism,
        "kek_label": draw(labels),
        "kek_id": draw(st.binary(max_size=64)),
        "kek_kcv": draw(st.binary(min_size=3, max_size=3)),
        "iv": draw(st.binary(min_size=IV_BYTES[mechanism], max_size=IV_BYTES[mechanism])),
        "ciphertext": draw(st.binary(min_size=16 * blocks, max_size=16 * blocks)),
    }
    if mechanism == CBC_HMAC:
        fields |= {"mac_kcv": draw(st.binary(min_size=3, max_size=3)), "mac": draw(st.binary(min_size=32, max_size=32))}
    return Blob(**fields)


@given(blobs())
def test_a_blob_survives_json(blob: Blob) -> None:
    assert parse(json.loads(json.dumps(blob.public()))) == blob


@given(blobs(), blobs(), st.binary(max_size=20), st.binary(max_size=20))
def test_no_two_blobs_or_contexts_authenticate_the_same_bytes(one: Blob, other: Blob, here: bytes, there: bytes) -> None:
    def identity(blob: Blob, context: bytes) -> tuple[t.Any, ...]:
        return (blob.mechanism, blob.kek_label, blob.kek_id, blob.kek_kcv, context)

    assert (one.associated(here) == other.associated(there)) == (identity(one, here) == identity(other, there))
    whole = (*identity(one, here), one.mac_kcv, one.iv, one.ciphertext)
    assert (one.message(here) == other.message(there)) == (
        whole == (*identity(other, there), other.mac_kcv, other.iv, other.ciphertext)
    )


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_fields_do_not_run_into_one_another(one: list[bytes], other: list[bytes]) -> None:
    assert (joined(*one) == joined(*other)) == (one == other)


def good() -> dict[str, t.Any]:
    return Blob(CBC_HMAC, "hsm-tde.demo", b"\x01", b"kcv", bytes(16), bytes(48), b"kcv", bytes(32)).public()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 2}, "envelope_newer"),
        ({"version": 0}, "envelope_invalid"),
        ({"version": True}, "envelope_invalid"),
        ({"version": "1"}, "envelope_invalid"),
        ({"mechanism": "AES-CBC-PAD"}, "envelope_invalid"),
        ({"mechanism": GCM}, "envelope_invalid"),
        ({"mechanism": ["AES-GCM"]}, "envelope_invalid"),
        ({"extra": "x"}, "envelope_invalid"),
        ({"kek_label": ""}, "envelope_invalid"),
        ({"kek_label": "a\nb"}, "envelope_invalid"),
        ({"kek_label": "x" * 256}, "envelope_invalid"),
        ({"kek_id": "AB"}, "envelope_invalid"),
        ({"kek_id": "1"}, "envelope_invalid"),
        ({"kek_id": 1}, "envelope_invalid"),
        ({"kek_kcv": "00"}, "envelope_invalid"),
        ({"iv": base64.b64encode(bytes(12)).decode()}, "envelope_invalid"),
        ({"iv": base64.b64encode(bytes(16)).decode() + "\n"}, "envelope_invalid"),
        ({"iv": "ü"}, "envelope_invalid"),
        ({"iv": None}, "envelope_invalid"),
        ({"ciphertext": base64.b64encode(bytes(47)).decode()}, "envelope_invalid"),
        ({"ciphertext": ""}, "envelope_invalid"),
        ({"ciphertext": base64.b64encode(bytes(32768 + 64)).decode()}, "envelope_invalid"),
        # A truncated MAC would be found by trying.
        ({"mac": base64.b64encode(bytes(4)).decode()}, "envelope_invalid"),
        ({"mac": ""}, "envelope_invalid"),
        ({"mac_kcv": ""}, "envelope_invalid"),
        # The same bytes in another spelling.
        ({"mac": base64.b64encode(bytes(32)).decode()[:-2] + "B="}, "envelope_invalid"),
    ],
)
def test_what_is_not_well_formed_is_refused(change: dict[str, t.Any], code: str) -> None:
    parse(good())
    with pytest.raises(TdeError) as caught:
        parse({**good(), **change})
    assert caught.value.code == code


@pytest.mark.parametrize("name", sorted(good()))
def test_every_field_is_needed(name: str) -> None:
    content = good()
    del content[name]
    with pytest.raises(TdeError, match="not well-formed"):
        parse(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(json_values, st.dictionaries(st.sampled_from(sorted(good())), json_values))
def test_reading_anything_ends_in_a_blob_or_an_error_of_ours(whole: t.Any, changes: dict[str, t.Any]) -> None:
    for content in (whole, {**good(), **changes}):
        codes = ("envelope_invalid", "envelope_newer")
        try:
            read = parse(content)
        except TdeError as exc:
            seen = exc.code
        else:
            seen = codes[0]
            assert read.public() == content
        assert seen in codes
