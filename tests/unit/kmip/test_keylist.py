# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is done to a key at a KMIP server, from every state to every wish; and blobs that are not well-formed."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.kmip import kek
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import KeyFacts
from ansible_collections.hsm.tde.plugins.module_utils.kmip.keylist import ORDER, Wish, decide
from ansible_collections.hsm.tde.plugins.module_utils.kmip.keys import Spec

KEY = KeyFacts("7", ("k",), "symmetric_key", "aes", 256, ("encrypt", "decrypt"), "active")
NEW = ["create_key"]
ACT = {"active": "activate_key", "deactivated": "deactivate_key", "compromised": "compromise_key"}


def actions(wish: Wish, found: KeyFacts | None, lost: t.Sequence[str] = (), uses: t.Mapping[str, t.Any] | None = None) -> t.Any:
    try:
        return [step.action for step in decide(wish, found, lost, uses or {})]
    except TdeError as exc:
        return exc.code


@pytest.mark.parametrize("there", ORDER)
@pytest.mark.parametrize("wished", ["active", "deactivated", "compromised"])
def test_states_go_one_way(there: str, wished: str) -> None:
    found = dataclasses.replace(KEY, state=there)
    expected: t.Any = [] if there == wished else [ACT[wished]]
    if ORDER.index(there) > ORDER.index(wished):
        expected = "kmip_key_state"
    assert actions(Wish(Spec("k"), wished), found) == expected
    assert actions(Wish(Spec("k"), "present"), found) == []
    needed = actions(Wish(Spec("k"), wished), found, uses={"7": ["keyslot primary"]})
    assert needed == ("key_in_use" if wished != "active" and expected == [ACT[wished]] else expected)


def test_what_is_missing_is_made_or_said() -> None:
    assert actions(Wish(Spec("k"), "present"), None) == NEW
    assert actions(Wish(Spec("k")), None) == [*NEW, "activate_key"]
    assert actions(Wish(Spec("k"), "absent"), None) == []
    assert actions(Wish(Spec("k"), "deactivated"), None) == "kmip_key_absent"
    assert actions(Wish(Spec("k"), id="8"), None) == "kmip_key_absent"
    assert actions(Wish(Spec("k")), None, ["7"]) == "key_unreachable"
    assert actions(Wish(Spec("k"), "absent"), None, ["7"]) == "key_unreachable"
    assert actions(Wish(Spec("k"), replace_lost=True), None, ["7"]) == ["forget_key", *NEW, "activate_key"]
    assert actions(Wish(Spec("k"), "absent", replace_lost=True), None, ["7"]) == ["forget_key"]


def test_a_key_is_destroyed_by_name_only_and_never_while_needed() -> None:
    gone = Wish(Spec("k"), "absent", confirm_destroy="k")
    assert actions(gone, KEY) == ["deactivate_key", "destroy_key"]
    assert actions(gone, dataclasses.replace(KEY, state="pre_active")) == ["destroy_key"]
    assert actions(dataclasses.replace(gone, confirm_destroy="K"), KEY) == "destroy_unconfirmed"
    assert actions(dataclasses.replace(gone, confirm_destroy=None), KEY) == "destroy_unconfirmed"
    assert actions(gone, KEY, uses={"7": ["keyslot primary"]}) == "key_in_use"


def test_another_key_of_the_name_is_no_such_key() -> None:
    assert actions(Wish(Spec("k", length=128)), KEY) == "key_mismatch"
    assert actions(Wish(Spec("k")), dataclasses.replace(KEY, algorithm="camellia")) == "key_mismatch"
    assert actions(Wish(Spec("k", usage=("encrypt",))), KEY) == [], "usage was not named"
    assert actions(Wish(Spec("k", usage=("encrypt",)), usage_given=True), KEY) == "key_mismatch"
    assert actions(Wish(Spec("k", usage=("decrypt", "encrypt")), usage_given=True), KEY) == []


BLOB = {
    "version": 1,
    "mechanism": kek.BY_SERVER,
    "kek_label": "hsm-tde.main",
    "kek_id": "7",
    "kek_kcv": "a1b2c3",
    "iv": "AAAAAAAAAAAAAAAA",
    "ciphertext": "AAAAAAAAAAAAAAAAAAAAAAAAAAA=",
}


def test_a_well_formed_blob() -> None:
    kek.check(BLOB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 0),
        ("version", True),
        ("mechanism", "AES-GCM"),
        ("kek_label", ""),
        ("kek_label", "a\nb"),
        ("kek_id", "7" * 256),
        ("kek_id", 7),
        ("kek_kcv", "A1B2C3"),
        ("kek_kcv", "a1b2c3d4"),
        ("iv", "AAAA"),
        ("iv", "AAAAAAAAAAAAAAA"),
        ("ciphertext", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ("ciphertext", ""),
        ("servers", "kms.example.com"),
    ],
)
def test_a_blob_that_is_not_well_formed(field: str, value: t.Any) -> None:
    with pytest.raises(TdeError) as caught:
        kek.check({**BLOB, field: value})
    assert caught.value.code == "envelope_invalid"


def test_a_blob_of_later() -> None:
    with pytest.raises(TdeError) as caught:
        kek.check({**BLOB, "version": 2})
    assert caught.value.code == "envelope_newer"
