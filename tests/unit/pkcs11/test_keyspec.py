# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is done about a key, decided without a token."""

from __future__ import annotations

import base64
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.attributes import USAGE
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import KeyInfo
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import (
    Found,
    KeySpec,
    Wish,
    check_spec,
    id_of,
    parse_id,
    plan_key,
    secret_value,
)
from hypothesis import given
from hypothesis import strategies as st

ID = b"\x01"


def key(
    label: str = "a", id: bytes = ID, cls: str = "secret", type: str = "aes", size: int | None = 256, **flags: bool
) -> KeyInfo:
    own = {"token": True, "sensitive": True, "extractable": False, "modifiable": True, "encrypt": True, "decrypt": True, **flags}
    return KeyInfo(1, label, id, cls, type, size, None, None, own)


def wish(state: str = "present", regenerate: str = "fail", confirm: str | None = None, lost: bool = False, **spec: t.Any) -> Wish:
    return Wish(KeySpec(**{"label": "a", "id": None, "type": "aes", **spec}), state, regenerate, confirm, lost)


def actions(wished: Wish, found: Found) -> list[str]:
    return [step.action for step in plan_key(wished, found)]


def refused(wished: Wish, found: Found) -> str:
    with pytest.raises(TdeError) as caught:
        plan_key(wished, found)
    return caught.value.code


def test_a_missing_key_is_made_and_an_existing_one_left() -> None:
    assert actions(wish(), Found([])) == ["generate_key"]
    assert actions(wish(value=Secret(bytes(32))), Found([])) == ["import_key"]
    assert actions(wish(), Found([key()])) == []
    assert actions(wish(size=256, id=ID, usage={"encrypt": True}), Found([key()], [ID])) == []
    assert actions(wish("absent"), Found([])) == []


def test_a_remembered_key_that_does_not_show_is_never_made_anew() -> None:
    for state in ("present", "absent"):
        for regenerate in ("fail", "never", "partial_idempotence", "always"):
            for listed in ([], [key(id=b"\x02")]):
                assert refused(wish(state, regenerate, "a"), Found(listed, [ID])) == "key_unreachable"
    assert actions(wish(lost=True), Found([], [ID])) == ["forget_key", "generate_key"]
    assert actions(wish("absent", lost=True), Found([], [ID])) == ["forget_key"]
    # Another id is wished: the remembered one is none of this item's business.
    assert actions(wish(id=b"\x02"), Found([], [ID])) == ["generate_key"]


def test_a_lost_key_that_a_keystore_needs_is_not_forgotten() -> None:
    assert refused(wish(lost=True), Found([], [ID], {ID: ["keyslot primary"]})) == "key_in_use"


@pytest.mark.parametrize(
    "there",
    [
        key(size=128),
        key(type="hmac"),
        key(cls="private", type="rsa"),
        key(sensitive=False, modifiable=False),
        key(encrypt=False, modifiable=False),
    ],
)
def test_what_cannot_be_changed_is_an_error_by_default(there: KeyInfo) -> None:
    wished = {"size": 256, "usage": {"encrypt": True}}
    assert refused(wish(**wished), Found([there])) == "key_mismatch"
    assert actions(wish(regenerate="never", **wished), Found([there])) == []
    assert refused(wish(regenerate="partial_idempotence", **wished), Found([there])) == "destroy_unconfirmed"
    assert actions(wish(regenerate="partial_idempotence", confirm="a", **wished), Found([there])) == [
        "destroy_key",
        "generate_key",
    ]


def test_another_value_is_a_mismatch_and_an_unknown_one_is_not() -> None:
    value = Secret(bytes(32))
    assert refused(wish(value=value), Found([key()], same_value=False)) == "key_mismatch"
    assert actions(wish(value=value), Found([key()], same_value=None)) == []
    assert actions(wish(value=value), Found([key()], same_value=True)) == []


def test_attributes_change_in_place_towards_protection_only() -> None:
    open_key = key(sensitive=False, extractable=True)
    [step] = plan_key(wish(), Found([open_key]))
    assert (step.action, step.data["changes"]) == ("change_key", {"sensitive": True, "extractable": False})
    assert refused(wish(sensitive=False), Found([key()])) == "key_mismatch"
    assert refused(wish(extractable=True), Found([key()])) == "key_mismatch"


def test_suspension_changes_the_flags_that_are_named() -> None:
    [step] = plan_key(wish(usage={"encrypt": False, "decrypt": False}), Found([key()]))
    assert step.data["changes"] == {"encrypt": False, "decrypt": False}


def test_a_pair_is_compared_in_both_halves() -> None:
    halves = [
        key(cls="private", type="rsa", size=2048, sign=True),
        KeyInfo(2, "a", ID, "public", "rsa", 2048, None, None, {"verify": True, "encrypt": False}),
    ]
    assert actions(wish(type="rsa", usage={"sign": True, "verify": True}), Found(halves)) == []
    [step] = plan_key(wish(type="rsa", usage={"verify": False}), Found(halves))
    assert step.data["changes"] == {"verify": False}


def test_regenerate_always_needs_the_confirmation_too() -> None:
    assert refused(wish(regenerate="always"), Found([key()])) == "destroy_unconfirmed"
    assert refused(wish(regenerate="always", confirm="b"), Found([key()])) == "destroy_unconfirmed"
    plan = plan_key(wish(regenerate="always", confirm="a"), Found([key()]))
    assert [(step.action, step.data["id"]) for step in plan] == [("destroy_key", "01"), ("generate_key", "01")]


def test_two_keys_of_a_label_are_told_apart_by_id() -> None:
    both = Found([key(), key(id=b"\x02")])
    assert refused(wish(), both) == "key_ambiguous"
    assert refused(wish("absent", confirm="a"), both) == "key_ambiguous"
    assert actions(wish(id=b"\x02"), both) == []
    assert refused(wish(id=b"\x03"), both) == "key_mismatch"
    assert [step.data["id"] for step in plan_key(wish("absent", confirm="a", id=b"\x02"), both)] == ["02"]


def test_what_a_kill_left_without_a_value_goes_without_a_confirmation() -> None:
    dead = Found([key(local=False)], begun=[ID], unfinished=[ID])
    dead_goes, made = plan_key(wish(), dead)
    assert (dead_goes.action, dead_goes.data, made.action) == ("destroy_unfinished_key", {"id": "01"}, "generate_key")
    assert actions(wish(value=Secret(bytes(32))), dead) == ["destroy_unfinished_key", "import_key"]
    assert actions(wish("absent"), dead) == ["destroy_unfinished_key"]
    # A whole key of the label stays, and is the one that was meant.
    beside = Found([key(local=False), key(id=b"\x02", local=True)], begun=[ID], unfinished=[ID])
    assert actions(wish(), beside) == ["destroy_unfinished_key"]
    assert refused(wish("absent"), beside) == "destroy_unconfirmed"


def test_what_a_keystore_names_does_not_go_even_without_a_value() -> None:
    assert refused(wish(), Found([key(local=False)], (), {ID: ["keyslot primary"]}, None, [ID], [ID])) == "key_in_use"


@pytest.mark.parametrize("there", [key(local=False), key(cls="private", type="rsa", size=2048, local=False)])
def test_what_a_kill_left_and_may_have_a_value_is_an_error_until_confirmed(there: KeyInfo) -> None:
    left = Found([there], begun=[ID])
    wished = {"type": there.type}
    assert refused(wish(**wished), left) == "key_mismatch"
    assert refused(wish("absent", **wished), left) == "destroy_unconfirmed"
    assert refused(wish(regenerate="partial_idempotence", **wished), left) == "destroy_unconfirmed"
    assert actions(wish(regenerate="partial_idempotence", confirm="a", **wished), left) == ["destroy_key", "generate_key"]


def test_a_key_that_a_killed_run_had_made_is_taken() -> None:
    assert actions(wish(), Found([key(local=True)], begun=[ID])) == []
    # What is imported is never generated in the token, and compared by its value.
    assert actions(wish(value=Secret(bytes(32))), Found([key(local=False)], same_value=True, begun=[ID])) == []


def test_a_public_key_alone_is_no_key_pair() -> None:
    alone = Found([KeyInfo(2, "a", ID, "public", "rsa", 2048, None, None, {})])
    assert refused(wish(type="rsa"), alone) == "key_mismatch"
    assert actions(wish("absent", type="rsa", confirm="a"), alone) == ["destroy_key"]


def test_a_needed_key_is_not_destroyed_even_if_confirmed() -> None:
    needed = Found([key()], [ID], {ID: ["keyslot primary of data key cluster"]})
    assert refused(wish("absent", confirm="a"), needed) == "key_in_use"
    assert refused(wish(regenerate="always", confirm="a"), needed) == "key_in_use"
    assert refused(wish(regenerate="partial_idempotence", confirm="a", size=128), needed) == "key_in_use"
    # Suspending is not destroying.
    assert actions(wish(usage={"encrypt": False}), needed) == ["change_key"]


def test_no_plan_holds_a_secret() -> None:
    secret = Secret(b"0123456789abcdef" * 2)
    plan = plan_key(wish(value=secret), Found([]))
    assert "0123456789abcdef" not in repr(plan) + str(plan[0].public())


def test_a_new_key_may_do_what_was_named_or_what_its_type_is_for() -> None:
    assert {use for use, on in KeySpec("a", None, "aes").new_usage("secret").items() if on} == {"encrypt", "decrypt"}
    assert {use for use, on in KeySpec("a", None, "aes", usage={"wrap": True}).new_usage("secret").items() if on} == {"wrap"}
    assert {use for use, on in KeySpec("a", None, "aes", usage={"encrypt": False}).new_usage("secret").items() if on} == {
        "decrypt"
    }
    assert {use for use, on in KeySpec("a", None, "rsa").new_usage("private").items() if on} == {"sign"}
    assert {use for use, on in KeySpec("a", None, "rsa").new_usage("public").items() if on} == {"verify"}


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"size": 100}, "invalid_option"),
        ({"type": "rsa", "size": 1024}, "invalid_option"),
        ({"type": "hmac", "size": 64}, "invalid_option"),
        ({"type": "ec", "size": 256}, "invalid_option"),
        ({"type": "rsa", "curve": "secp256r1"}, "invalid_option"),
        ({"type": "ec", "usage": {"encrypt": True}}, "invalid_option"),
        ({"type": "rsa", "value": Secret(b"x" * 32)}, "invalid_option"),
        ({"private_key": Secret("x")}, "invalid_option"),
        ({"passphrase": Secret("x")}, "invalid_option"),
        ({"label": ""}, "invalid_option"),
        ({"label": "a\nb"}, "invalid_option"),
        ({"label": "x" * 256}, "invalid_option"),
        ({"value": Secret(b"short")}, "key_value_invalid"),
        ({"value": Secret(b"x" * 32), "size": 128}, "key_value_invalid"),
        ({"type": "hmac", "value": Secret(b"x")}, "key_value_invalid"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_token_is_asked(spec: dict[str, t.Any], code: str) -> None:
    with pytest.raises(TdeError) as caught:
        check_spec(KeySpec(**{"label": "a", "id": None, "type": "aes", **spec}))
    assert caught.value.code == code


def test_a_value_is_base64_and_the_error_does_not_show_it() -> None:
    value = secret_value("a", Secret(base64.b64encode(bytes(32)).decode()))
    assert value is not None
    assert value.reveal() == bytes(32)
    for wrong in ("not base64 at all", "", "QUJD\nQUJD"):
        with pytest.raises(TdeError) as caught:
            secret_value("a", Secret(wrong))
        assert not wrong or wrong not in str(caught.value)


def test_ids() -> None:
    assert parse_id("a", "0aFF") == b"\x0a\xff"
    assert parse_id("a", None) is None
    for wrong in ("", "1", "0x01", "zz", "00" * 65, "01 "):
        with pytest.raises(TdeError):
            parse_id("a", wrong)
    # Part of the documentation: it must never change.
    assert id_of("app-data").hex() == "eb39da42ea3582900aa323278fe85a6a"


infos = st.lists(
    st.builds(
        key,
        id=st.sampled_from([b"\x01", b"\x02"]),
        cls=st.sampled_from(["secret", "private", "public"]),
        type=st.sampled_from(["aes", "hmac", "rsa", "ec"]),
        size=st.sampled_from([None, 128, 256]),
        sensitive=st.booleans(),
        extractable=st.booleans(),
        modifiable=st.booleans(),
        encrypt=st.booleans(),
    ),
    max_size=3,
)
wishes = st.builds(
    wish,
    st.sampled_from(["present", "absent"]),
    st.sampled_from(["fail", "never", "partial_idempotence", "always"]),
    st.sampled_from([None, "a", "b"]),
    st.booleans(),
    id=st.sampled_from([None, b"\x01"]),
    type=st.sampled_from(["aes", "rsa"]),
    size=st.sampled_from([None, 128]),
    usage=st.dictionaries(st.sampled_from(USAGE), st.booleans(), max_size=2),
)


@given(wishes, infos, st.sets(st.sampled_from([b"\x01", b"\x02"])), st.sets(st.sampled_from([b"\x01", b"\x02"])))
def test_no_plan_destroys_unasked_unconfirmed_or_needed(
    wished: Wish, keys: list[KeyInfo], remembered: set[bytes], needed: set[bytes]
) -> None:
    found = Found(keys, sorted(remembered), {id_: ["somebody"] for id_ in needed})
    try:
        plan = plan_key(wished, found)
    except TdeError:
        return
    destroyed = [step for step in plan if step.action == "destroy_key"]
    made = [step for step in plan if step.action in ("generate_key", "import_key")]
    for step in destroyed:
        assert wished.confirm_destroy == "a"
        assert wished.state == "absent" or wished.regenerate in ("always", "partial_idempotence")
        assert bytes.fromhex(step.data["id"]) not in needed
    lost = {id_ for id_ in remembered if id_ not in {info.id for info in keys}} & (
        {wished.spec.id} if wished.spec.id else remembered
    )
    if lost:
        assert wished.replace_lost
        assert not lost & needed
    assert not made or wished.state == "present"
    # Never a second key beside one: what is made replaces what is destroyed, or there was nothing.
    assert len(made) <= 1
    assert not made or destroyed or not keys


def test_half_an_imported_pair_is_completed_where_it_is_the_one_to_import() -> None:
    private, public = key(cls="private", type="ec", size=None), key(cls="public", type="ec", size=None)
    wished = wish(type="ec", private_key=Secret("pem"))
    assert actions(wished, Found([private], same_value=True)) == ["import_public_half"]
    assert actions(wished, Found([private, public], same_value=True)) == []
    assert actions(wished, Found([private])) == []
    assert refused(wished, Found([private], same_value=False)) == "key_mismatch"
    assert actions(wish(type="ec"), Found([private])) == []
