# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keys in real tokens, through the modules pkcs11_key and pkcs11_key_info and the service below them."""

from __future__ import annotations

import base64
import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import keylist, make
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.kek import create_kek
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import KeyRef, check_value, find, find_key, handle_of, list_keys
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import KeySpec, Wish, id_of
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import Session, open_session
from ansible_collections.hsm.tde.tests.integration.support import Installation, SoftHsm, run_module_file

T = t.TypeVar("T")

PASSPHRASE = "a passphrase of the PEM"


@pytest.fixture(params=["softhsm", "opencryptoki"])
def token(request: pytest.FixtureRequest) -> Installation:
    return t.cast(Installation, request.getfixturevalue(request.param))


def act_on(token: t.Any, state: StateDirectory, fn: t.Callable[[Session], T], **how: t.Any) -> T:
    def inside() -> T:
        with open_session(token.access(), state, **{"rw": True, **how}) as session:
            return fn(session)

    return t.cast(T, token.run(inside))


def apply(token: t.Any, state: StateDirectory, *wishes: Wish, check: bool = False) -> keylist.Outcome:
    return t.cast(
        keylist.Outcome,
        token.run(lambda: keylist.apply(token.access(), state, wishes, uses=lambda _token: {}, check_mode=check)),
    )


def wish(label: str, type: str = "aes", state: str = "present", **more: t.Any) -> Wish:
    own = {name: more.pop(name) for name in ("regenerate", "confirm_destroy", "replace_lost") if name in more}
    return Wish(KeySpec(label, more.pop("id", None), type, **more), state, **own)


def refusal(fn: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        fn()
    return caught.value.code


@pytest.fixture(scope="session")
def pems() -> dict[str, str]:
    """Private keys by type, encrypted under :data:`PASSPHRASE`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    def pem(key: t.Any) -> str:
        cipher = serialization.BestAvailableEncryption(PASSPHRASE.encode())
        return t.cast(bytes, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)).decode()

    return {
        "rsa": pem(rsa.generate_private_key(65537, 2048)),
        "other rsa": pem(rsa.generate_private_key(65537, 2048)),
        "ec": pem(ec.generate_private_key(ec.SECP384R1())),
        "other ec": pem(ec.generate_private_key(ec.SECP384R1())),
    }


def test_keys_are_made_once_hidden_and_in_the_token(token: Installation, state: StateDirectory) -> None:
    wishes = [wish("data"), wish("mac", "hmac"), wish("pair", "rsa", size=2048)]
    planned = apply(token, state, *wishes, check=True)
    assert not os.path.exists(state.path)
    first = apply(token, state, *wishes)
    assert [step.action for step in planned.plan] == [step.action for step in first.plan] == ["generate_key"] * 3
    for foreseen, made in zip(planned.keys, first.keys, strict=True):
        assert foreseen.items() <= made.items()
        assert made["id"] == id_of(made["label"]).hex()
        assert (made["token"], made["private"], made["sensitive"], made["extractable"]) == (True, True, True, False)
        assert (made["always_sensitive"], made["never_extractable"], made["local"]) == (True, True, True)
    assert apply(token, state, *wishes).plan == []
    done = [entry for entry in Journal(state.journal).entries() if entry["result"] == "done"]
    assert [(entry["action"], entry["key"]) for entry in done] == [("generate_key", label) for label in ("data", "mac", "pair")]
    assert done[0]["kcv"]
    assert {row["label"] for row in Registry(state).keys()} == {"data", "mac", "pair"}  # noqa: SIM118


def test_suspension_is_the_tokens_own(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("data"))

    def use(session: Session) -> bool:
        return check_value(session, find_key(session, "data")) is not None

    assert act_on(token, state, use)
    off = wish("data", usage={"encrypt": False, "decrypt": False})
    assert [step.data["changes"] for step in apply(token, state, off).plan] == [{"encrypt": False, "decrypt": False}]
    assert not act_on(token, state, use)
    # Nothing said about the flags: suspended it stays.
    assert apply(token, state, wish("data")).plan == []
    apply(token, state, wish("data", usage={"encrypt": True, "decrypt": True}))
    assert act_on(token, state, use)


def test_an_imported_key_is_the_one_that_was_given(token: Installation, state: StateDirectory, pems: dict[str, str]) -> None:
    def pair(which: str) -> Wish:
        return wish("pair", "rsa", private_key=Secret(pems[which]), passphrase=Secret(PASSPHRASE))

    wishes = [wish("data", value=Secret(b"v" * 32)), wish("mac", "hmac", value=Secret(b"m" * 32)), pair("rsa")]
    first = apply(token, state, *wishes)
    assert [step.action for step in first.plan] == ["import_key"] * 3
    assert all(made["sensitive"] and not made["extractable"] and not made["local"] for made in first.keys)
    again = apply(token, state, *wishes)
    assert (again.plan, again.warnings) == ([], [])
    for other in (wish("data", value=Secret(b"w" * 32)), wish("mac", "hmac", value=Secret(b"n" * 32)), pair("other rsa")):
        assert refusal(lambda other=other: apply(token, state, other)) == "key_mismatch"
    act_on(token, state, lambda session: handle_of(session, find_key(session, "pair", cls="public")).destroy())
    # Half a pair is completed, and only by its own other half.
    assert refusal(lambda: apply(token, state, pair("other rsa"))) == "key_mismatch"
    assert [step.action for step in apply(token, state, *wishes).plan] == ["import_public_half"]
    assert apply(token, state, *wishes).plan == []
    assert act_on(token, state, lambda session: check_value(session, find_key(session, "data"))) == aes_kcv(b"v" * 32)
    assert b"vvvvvvvv" not in b"".join(path.read_bytes() for path in Path(state.path).rglob("*") if path.is_file())


def aes_kcv(value: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(value), modes.ECB()).encryptor()  # noqa: S305 - a check value
    return encryptor.update(bytes(16))[:3]


def test_elliptic_curves(softhsm: SoftHsm, state: StateDirectory, pems: dict[str, str]) -> None:
    """On SoftHSM only: the soft token of openCryptoki 3.8 has no curves."""
    made = apply(softhsm, state, wish("a", "ec"), wish("b", "ec", curve="secp521r1"))
    assert [key["curve"] for key in made.keys] == ["secp256r1", "secp521r1"]

    def given(which: str) -> Wish:
        return wish("c", "ec", private_key=Secret(pems[which]), passphrase=Secret(PASSPHRASE))

    assert apply(softhsm, state, given("ec")).keys[0]["curve"] == "secp384r1"
    assert apply(softhsm, state, given("ec")).plan == []
    assert refusal(lambda: apply(softhsm, state, given("other ec"))) == "key_mismatch"
    assert refusal(lambda: apply(softhsm, state, wish("a", "ec", curve="secp384r1"))) == "key_mismatch"

    def signature(session: Session) -> bool:
        from pkcs11 import Mechanism

        [private] = find(session, "c", cls="private")
        [public] = find(session, "c", cls="public")
        signed = handle_of(session, private).sign(bytes(48), mechanism=Mechanism.ECDSA)
        return bool(handle_of(session, public).verify(bytes(48), signed, mechanism=Mechanism.ECDSA))

    assert act_on(softhsm, state, signature)


def test_a_mechanism_that_the_token_lacks_is_said_so(opencryptoki: t.Any, state: StateDirectory) -> None:
    assert refusal(lambda: apply(opencryptoki, state, wish("a", "ec"))) == "pkcs11_unsupported"


def test_an_error_in_the_last_item_changes_nothing_of_the_first(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("data"))
    assert refusal(lambda: apply(token, state, wish("new"), wish("data", size=128))) == "key_mismatch"
    assert act_on(token, state, lambda session: len(find(session, "new"))) == 0


def test_destroying_takes_both_halves_and_is_final(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("pair", "rsa", size=2048))
    gone = wish("pair", "rsa", "absent", confirm_destroy="pair")
    assert [step.action for step in apply(token, state, gone, check=True).plan] == ["destroy_key"]
    assert act_on(token, state, lambda session: len(find(session, "pair"))) == 2
    apply(token, state, gone)
    assert act_on(token, state, lambda session: len(find(session, "pair"))) == 0
    assert apply(token, state, gone).plan == []
    # Destroyed on purpose, so it is not missed: a new one may be made.
    assert [step.action for step in apply(token, state, wish("pair", "rsa", size=2048)).plan] == ["generate_key"]


def test_a_remembered_key_that_is_gone_is_not_made_anew(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("data"))
    old = act_on(token, state, lambda session: check_value(session, find_key(session, "data")))
    act_on(token, state, lambda session: make.destroy(session, "data", id_of("data")))
    assert refusal(lambda: apply(token, state, wish("data"))) == "key_unreachable"
    assert refusal(lambda: apply(token, state, wish("data"), check=True)) == "key_unreachable"

    def looked_up(session: Session) -> str:
        return refusal(lambda: find_key(session, "data", registry=Registry(state)))

    assert act_on(token, state, looked_up) == "key_unreachable"
    apply(token, state, wish("data", replace_lost=True))
    assert act_on(token, state, lambda session: check_value(session, find_key(session, "data"))) != old


def test_a_kek_is_not_destroyed_but_may_be_suspended(token: Installation, state: StateDirectory) -> None:
    def new_kek(session: Session) -> KeyRef:
        return create_kek(session, "hsm-tde.demo", cluster="demo", registry=Registry(state), journal=Journal(state.journal))

    ref = act_on(token, state, new_kek)
    labels = {row["label"] for row in Registry(state).keys()}  # noqa: SIM118
    for label in labels:
        gone = wish(label, "hmac" if label.endswith(":mac") else "aes", "absent", confirm_destroy=label)
        assert refusal(lambda gone=gone: apply(token, state, gone)) == "key_in_use"
    anew = wish("hsm-tde.demo", regenerate="always", confirm_destroy="hsm-tde.demo")
    assert refusal(lambda: apply(token, state, anew)) == "key_in_use"
    # Without its registry the host's journal still knows what it was made for.
    os.unlink(state.registry)
    for label in labels:
        gone = wish(label, "hmac" if label.endswith(":mac") else "aes", "absent", confirm_destroy=label)
        assert refusal(lambda gone=gone: apply(token, state, gone)) == "key_in_use"
    assert apply(token, state, wish(ref.label, usage={"encrypt": False})).plan[0].action == "change_key"


def test_nobody_logged_in_is_never_an_absent_key(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("data"), wish("pair", "rsa", size=2048))

    def look(session: Session) -> tuple[list[str], bool, str]:
        listing = list_keys(session)
        return [key["class"] for key in listing.keys], listing.private_visible, refusal(lambda: find_key(session, "data"))

    assert act_on(token, state, look, user=None, rw=False) == (["public"], False, "pin_missing")


def test_listing_filters_limits_and_counts(token: Installation, state: StateDirectory) -> None:
    apply(token, state, wish("a"), wish("b"), wish("c", "hmac"), wish("p", "rsa", size=2048))

    def look(session: Session) -> dict[str, t.Any]:
        def labels(**filters: t.Any) -> list[str]:
            return sorted(key["label"] for key in list_keys(session, **filters).keys)

        two = list_keys(session, limit=2)
        [one] = list_keys(session, fields=("label", "size"), label="a", check_values=True).keys
        return {
            "all": labels(),
            "secret": labels(cls="secret"),
            "aes": labels(type="aes"),
            "private rsa": labels(cls="private", type="rsa"),
            "id": labels(id=id_of("b")),
            "none": labels(label="nobody"),
            "limit": (len(two.keys), two.more, list_keys(session, limit=5).more),
            "one": one,
            "kcv": check_value(session, find_key(session, "a")),
        }

    got = act_on(token, state, look, rw=False)
    assert got["all"] == ["a", "b", "c", "p", "p"]
    assert got["secret"] == ["a", "b", "c"]
    assert got["aes"] == ["a", "b"]
    assert (got["private rsa"], got["id"], got["none"]) == (["p"], ["b"], [])
    assert got["limit"] == (2, True, False)
    assert got["one"] == {"label": "a", "size": 256, "check_value": got["kcv"].hex()}


def test_long_names_and_odd_objects_do_not_stop_a_listing(softhsm: SoftHsm, state: StateDirectory) -> None:
    def look(session: Session) -> tuple[list[tuple[int, int]], int]:
        from pkcs11 import Attribute, KeyType, ObjectClass

        session.raw.generate_key(KeyType.AES, 256, label="l" * 300, id=b"i" * 100, store=True)
        session.raw.generate_key(KeyType.AES, 256, store=True)
        session.raw.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: "data", Attribute.TOKEN: True})
        listing = list_keys(session)
        return sorted((len(key["label"]), len(key["id"])) for key in listing.keys), listing.skipped

    assert act_on(softhsm, state, look) == ([(0, 0), (300, 200)], 0)


def test_a_token_that_fails_a_whole_call_for_one_attribute_is_read_one_by_one(softhsm: SoftHsm, state: StateDirectory) -> None:
    apply(softhsm, state, wish("a"), wish("p", "rsa", size=2048))

    def look(session: Session) -> bool:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import keys

        right = list_keys(session).keys
        keys._PARTIAL = ()
        return list_keys(session).keys == right

    assert act_on(softhsm, state, look, rw=False)


def test_a_vendors_object_is_counted(softhsm: SoftHsm, state: StateDirectory) -> None:
    apply(softhsm, state, wish("a"), wish("m", "hmac"))

    def look(session: Session) -> tuple[int, int]:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import Reader

        read = Reader.read

        def as_a_vendor(self: Reader, handle: int) -> dict[str, t.Any] | None:
            raw = read(self, handle)
            return {**raw, "class": 0x80000042} if raw and raw["label"] == b"m" else raw

        Reader.read = as_a_vendor  # type: ignore[method-assign]
        listing = list_keys(session)
        return len(listing.keys), listing.skipped

    assert act_on(softhsm, state, look, rw=False) == (1, 1)


def options(token: Installation, state: StateDirectory, **more: t.Any) -> dict[str, t.Any]:
    return {**token.options(token_label="demo", pin=token.pin), "state_directory": state.path, **more}


def test_the_modules(softhsm: SoftHsm, state: StateDirectory) -> None:
    value = base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
    items = [{"label": "data"}, {"label": "given", "value": value}]
    made = run_module_file("pkcs11_key", options(softhsm, state, keys=items), diff=True)
    assert made["changed"]
    assert [key["label"] for key in made["pkcs11_keys"]] == ["data", "given"]
    assert made["diff"]["before"] == {}
    assert len(made["diff"]["after"]) == 2
    assert value not in json.dumps(made)
    assert made["invocation"]["module_args"]["keys"][1]["value"] != value
    assert not run_module_file("pkcs11_key", options(softhsm, state, keys=items))["changed"]

    wrong = run_module_file("pkcs11_key", options(softhsm, state, keys=[{"label": "given", "valeu": value}]))
    assert wrong["failed"]
    assert value not in json.dumps(wrong)

    listed = run_module_file("pkcs11_key_info", options(softhsm, state, fields=["type"], check_values=True))
    assert {key["label"]: set(key) for key in listed["pkcs11_keys"]} == {
        label: {"label", "id", "type", "check_value"} for label in ("data", "given")
    }
    assert listed["unreachable"] == []
    blind = run_module_file("pkcs11_key_info", options(softhsm, state, pin=None))
    assert (blind["pkcs11_keys"], blind["private_visible"], blind["unreachable"]) == ([], False, None)
    assert blind["warnings"]

    softhsm.run(lambda: _destroy(softhsm, state, "data"))
    listed = run_module_file("pkcs11_key_info", options(softhsm, state))
    assert [row["label"] for row in listed["unreachable"]] == ["data"]


def test_a_key_that_a_keyslot_names_is_not_destroyed(softhsm: SoftHsm, state: StateDirectory) -> None:
    """Also one that the user made, of which neither registry nor journal knows what it is for."""
    from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore, TokenSlot

    apply(softhsm, state, wish("own"), wish("other"))
    slot = TokenSlot("primary", softhsm.access(), KeyRef("own", id_of("own")))
    softhsm.run(lambda: KeyStore(state, "demo").create_key("cluster", 64, [slot]).check_value)

    def destroy(label: str) -> dict[str, t.Any]:
        item = {"label": label, "state": "absent", "confirm_destroy": label}
        return run_module_file("pkcs11_key", options(softhsm, state, keys=[item]))

    refused = destroy("own")
    assert refused["error_code"] == "key_in_use"
    assert "keyslot primary of data key cluster of cluster demo" in refused["msg"]
    # A store that cannot be read says nothing about who needs what.
    [file] = Path(state.store("demo")).glob("*.json")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert destroy("other")["failed"]
    file.write_bytes(content)
    assert destroy("other")["changed"]


def _destroy(token: Installation, state: StateDirectory, label: str) -> None:
    with open_session(token.access(), state, rw=True) as session:
        make.destroy(session, label, id_of(label))


def test_the_tokens_folder_not_mounted_makes_nothing(softhsm: SoftHsm, state: StateDirectory) -> None:
    run_module_file("pkcs11_key", options(softhsm, state, keys=[{"label": "data"}]))
    away = softhsm.tokendir.with_name("elsewhere")
    softhsm.tokendir.rename(away)
    softhsm.tokendir.mkdir()
    for check in (True, False):
        failed = run_module_file("pkcs11_key", options(softhsm, state, keys=[{"label": "data"}]), check=check)
        assert failed["error_code"] == "token_unreachable"
    assert run_module_file("pkcs11_key_info", options(softhsm, state))["error_code"] == "token_unreachable"
    assert list(softhsm.tokendir.iterdir()) == []
    softhsm.tokendir.rmdir()
    away.rename(softhsm.tokendir)
    assert not run_module_file("pkcs11_key", options(softhsm, state, keys=[{"label": "data"}]))["changed"]


def test_check_mode_before_the_token_exists(empty_softhsm: SoftHsm, state: StateDirectory) -> None:
    foreseen = run_module_file("pkcs11_key", options(empty_softhsm, state, keys=[{"label": "data"}]), check=True)
    assert foreseen["changed"]
    assert foreseen["warnings"]
    failed = run_module_file("pkcs11_key", options(empty_softhsm, state, keys=[{"label": "data"}]))
    assert failed["error_code"] == "token_absent"


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([{"label": "a"}, {"label": "a"}], "invalid_option"),
        ([{"label": "a", "id": "xyz"}], "invalid_option"),
        ([{"label": "a", "value": "no base64"}], "key_value_invalid"),
        ([{"label": "a", "type": "rsa", "private_key": "no PEM"}], "key_value_invalid"),
        ([{"label": "a", "value": 1234567890123456}], "secret_not_text"),
        ([{"label": "a", "type": "ec", "encrypt": True}], "invalid_option"),
    ],
)
def test_bad_input_is_refused_and_not_shown(
    softhsm: SoftHsm, state: StateDirectory, items: list[dict[str, t.Any]], code: str
) -> None:
    failed = run_module_file("pkcs11_key", options(softhsm, state, keys=items))
    assert failed["error_code"] == code
    for secret in ("no base64", "no PEM", "1234567890123456"):
        assert secret not in json.dumps(failed)
    assert act_on(softhsm, state, lambda session: len(list_keys(session).keys)) == 0
