# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Attributes in memory, decoded as a token would leave them."""

from __future__ import annotations

import ctypes
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import attributes as attrs
from hypothesis import given
from hypothesis import strategies as st

values = st.fixed_dictionaries(
    {},
    optional={
        name: st.binary(max_size=attribute.room)
        if attribute.code == "s"
        else st.booleans()
        if attribute.code == "?"
        else st.integers(0, 2**64 - 1)
        for name, attribute in attrs.ATTRIBUTES.items()
    },
)


def answer(layout: attrs.Layout, having: t.Mapping[str, t.Any]) -> None:
    """Fill in as C_GetAttributeValue does: value and length, or "unavailable"."""
    numbers = {attribute.number: name for name, attribute in attrs.ATTRIBUTES.items()}
    for slot in layout.array:
        name = numbers[slot.type]
        if name not in having:
            slot.length = attrs.UNAVAILABLE
            continue
        array, _kept = attrs.template({name: having[name]})
        assert array[0].length <= slot.length
        slot.length = array[0].length
        ctypes.memmove(slot.value, array[0].value, array[0].length)


@given(st.lists(values, min_size=1, max_size=4), st.sets(st.sampled_from(sorted(attrs.ATTRIBUTES)), min_size=1))
def test_what_a_token_writes_is_what_is_read(keys: list[dict[str, t.Any]], names: set[str]) -> None:
    layout = attrs.Layout(names)
    for having in keys:
        layout.reset()
        answer(layout, having)
        # A value of the key before must not show through.
        assert layout.decode() == {name: having.get(name) for name in names}


def test_facts_in_words() -> None:
    raw = dict.fromkeys(attrs.ATTRIBUTES)
    raw.update({"label": b"a", "id": b"\x0a", "class": 3, "type": 3, "ec_params": bytes.fromhex("06052b81040022"), "sign": True})
    shown = attrs.facts(raw, list(attrs.FACTS))
    assert (shown["label"], shown["id"], shown["class"], shown["type"]) == ("a", "0a", "private", "ec")
    assert (shown["curve"], shown["size"], shown["sign"], shown["sensitive"]) == ("secp384r1", 384, True, None)
    assert attrs.type_word(0x80000001) == "0x80000001"


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        ({"value_len": 32}, 256),
        ({"modulus_bits": 3072}, 3072),
        ({"modulus": b"\0" + b"\x80" + bytes(255)}, 2048),
        ({"ec_params": b"\x06\x01\x00"}, None),
        # openCryptoki says 0 for a generic secret that was imported.
        ({"value_len": 0}, None),
        ({}, None),
    ],
)
def test_sizes(raw: dict[str, t.Any], size: int | None) -> None:
    assert attrs.size_of(raw) == size


def test_a_hash_of_a_secret_is_no_check_value_to_show() -> None:
    raw = {"check_value": b"abc", "type": 0x10}
    assert attrs.facts(raw, ["check_value"]) == {"check_value": None}
    assert attrs.facts({**raw, "type": attrs.AES}, ["check_value"]) == {"check_value": "616263"}


@pytest.mark.parametrize(("number", "vendors"), [(0, False), (1, False), (8, False), (0x80000001, True), (None, True)])
def test_vendors_classes(number: int | None, vendors: bool) -> None:
    assert attrs.is_vendor_class(number) is vendors
