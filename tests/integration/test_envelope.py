# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Wrapping under a KEK in real tokens: AES-GCM on SoftHSM, AES-CBC with HMAC on openCryptoki."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import make
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.blob import CBC_HMAC, GCM
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.envelope import COMPANION, kcv, unwrap, wrap
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.kek import create_kek
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import KeyRef, find, handle_of
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import KeySpec
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import Session, open_session
from ansible_collections.hsm.tde.tests.integration.support import ChildFailed, Installation

CONTEXT = b"cluster demo, key cluster"
DATA_KEY = bytes(range(64))
LABEL = "hsm-tde.demo"
MECHANISM = {"softhsm": GCM, "opencryptoki": CBC_HMAC}

T = t.TypeVar("T")


@pytest.fixture(params=["softhsm", "opencryptoki"])
def token(request: pytest.FixtureRequest) -> Installation:
    return t.cast(Installation, request.getfixturevalue(request.param))


class Bench:
    """One token, and acts in sessions on it, each in a child."""

    def __init__(self, token: t.Any, state: StateDirectory) -> None:
        self.token, self.state = token, state
        self.registry, self.journal = Registry(state), Journal(state.journal)

    def act(self, fn: t.Callable[[Session], T]) -> T:
        def inside() -> T:
            with open_session(self.token.access(), self.state, rw=True) as session:
                return fn(session)

        return t.cast(T, self.token.run(inside))

    def create(self, session: Session, label: str = LABEL, **more: t.Any) -> KeyRef:
        return create_kek(session, label, cluster="demo", registry=self.registry, journal=self.journal, **more)


@pytest.fixture
def bench(token: Installation, state: StateDirectory) -> Bench:
    return Bench(token, state)


def code(fn: t.Callable[[], t.Any]) -> str:
    """The error code that a call ends with, "" if it does not."""
    try:
        fn()
    except TdeError as exc:
        return exc.code
    return ""


def test_a_data_key_comes_back_and_nothing_else_opens_it(bench: Bench, request: pytest.FixtureRequest) -> None:
    def act(session: Session) -> dict[str, t.Any]:
        kek = bench.create(session)
        blob = wrap(session, kek, DATA_KEY, CONTEXT)
        answers: dict[str, t.Any] = {"blob": blob, "right": unwrap(session, blob, CONTEXT), "kcv": kcv(session, kek)}
        answers["context"] = code(lambda: unwrap(session, blob, CONTEXT + b"!"))
        for name, value in blob.items():
            answers[name] = code(lambda name=name, value=value: unwrap(session, {**blob, name: tampered(name, value)}, CONTEXT))
        long = os.urandom(32768)
        answers["long"] = unwrap(session, wrap(session, kek, long, CONTEXT), CONTEXT) == long
        answers["twice"] = wrap(session, kek, DATA_KEY, CONTEXT)["ciphertext"] != blob["ciphertext"]
        answers["too long"] = code(lambda: wrap(session, kek, bytes(32769), CONTEXT))
        answers["flags"] = find(session, LABEL)[0].flags
        return answers

    def tampered(name: str, value: t.Any) -> t.Any:
        if name == "version":
            return 2
        if name == "mechanism":
            return GCM if value == CBC_HMAC else CBC_HMAC
        if name == "kek_label":
            return value + "x"
        if name.startswith("kek") or name == "mac_kcv":
            return ("0" if value[0] != "0" else "1") + value[1:]
        raw = bytearray(base64.b64decode(value))
        raw[-1] ^= 1
        return base64.b64encode(raw).decode()

    got = bench.act(act)
    blob = got["blob"]
    mechanism = MECHANISM[request.node.callspec.params["token"]]
    assert got["right"] == DATA_KEY
    assert blob["mechanism"] == mechanism
    assert blob["kek_kcv"] == got["kcv"]
    assert got["context"] == "envelope_damaged"
    assert got["long"]
    assert got["twice"]
    assert got["too long"] == "invalid_option"
    assert got["version"] == "envelope_newer"
    # A blob that claims the other mechanism lacks or has fields too many.
    assert got["mechanism"] == "envelope_invalid"
    assert got["kek_label"] == got["kek_id"] == "key_unreachable"
    # With a check value edited as well, nothing tells an edited blob from another KEK: it is not opened, that is what counts.
    assert got["kek_kcv"] == "kek_mismatch"
    assert got["iv"] == got["ciphertext"] == "envelope_damaged"
    if mechanism == CBC_HMAC:
        assert got["mac"] == "envelope_damaged"
        assert got["mac_kcv"] == "kek_mismatch"
    flags = got["flags"]
    assert {name for name, on in flags.items() if on} == {
        "token",
        "private",
        "sensitive",
        "always_sensitive",
        "never_extractable",
        "local",
        "modifiable",
        "encrypt",
        "decrypt",
    }


def test_a_blob_of_the_other_mechanism_is_refused(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Also where it is well-formed: no downgrade, no use of a KEK in two modes."""

    def act(session: Session) -> str:
        blob = wrap(session, bench.create(session), DATA_KEY, CONTEXT)
        if blob["mechanism"] == GCM:
            other = {**blob, "mechanism": CBC_HMAC, "iv": b64(16), "ciphertext": b64(96), "mac_kcv": "000000", "mac": b64(32)}
        else:
            other = {name: value for name, value in blob.items() if name not in ("mac", "mac_kcv")}
            other.update(mechanism=GCM, iv=b64(12))
        return code(lambda: unwrap(session, other, CONTEXT))

    def b64(length: int) -> str:
        return base64.b64encode(bytes(length)).decode()

    # On SoftHSM the blob says that there is a companion key, and there is none.
    expected = {"softhsm": "key_unreachable", "opencryptoki": "envelope_damaged"}
    assert bench.act(act) == expected[request.node.callspec.params["token"]]


def test_a_kek_that_is_gone_or_another_is_told_from_a_damaged_blob(bench: Bench) -> None:
    def act(session: Session) -> dict[str, t.Any]:
        ref = bench.create(session)
        blob = wrap(session, ref, DATA_KEY, CONTEXT)
        make.destroy(session, ref.label, ref.id)
        answers = {"gone": code(lambda: unwrap(session, blob, CONTEXT)), "never again": code(lambda: bench.create(session))}
        make.generate(session, KeySpec(ref.label, ref.id, "aes", size=256, usage={"encrypt": True, "decrypt": True}))
        answers["another"] = code(lambda: unwrap(session, blob, CONTEXT))
        if blob["mechanism"] == CBC_HMAC:
            make.destroy(session, ref.label + COMPANION, ref.id)
            answers["companion gone"] = code(lambda: unwrap(session, blob, CONTEXT))
            make.generate(session, KeySpec(ref.label + COMPANION, ref.id, "hmac", size=256))
            answers["both others"] = code(lambda: unwrap(session, blob, CONTEXT))
        return answers

    got = bench.act(act)
    assert got.pop("gone") == "key_unreachable"
    assert got.pop("never again") == "key_unreachable"
    assert got.pop("companion gone", "key_unreachable") == "key_unreachable"
    assert set(got.values()) == {"kek_mismatch"}


def test_only_the_companion_replaced(bench: Bench, request: pytest.FixtureRequest) -> None:
    def act(session: Session) -> str:
        ref = bench.create(session)
        blob = wrap(session, ref, DATA_KEY, CONTEXT)
        if blob["mechanism"] == GCM:
            # A companion that appears makes the KEK one of the other mechanism: the old blob is refused, not opened both ways.
            make.generate(session, KeySpec(ref.label + COMPANION, ref.id, "hmac", size=256))
            return code(lambda: unwrap(session, blob, CONTEXT))
        make.destroy(session, ref.label + COMPANION, ref.id)
        make.generate(session, KeySpec(ref.label + COMPANION, ref.id, "hmac", size=256))
        return code(lambda: unwrap(session, blob, CONTEXT))

    expected = {"softhsm": "envelope_damaged", "opencryptoki": "kek_mismatch"}
    assert bench.act(act) == expected[request.node.callspec.params["token"]]


def test_suspension_stops_use_and_is_told_apart(bench: Bench) -> None:
    def act(session: Session) -> list[t.Any]:
        ref = bench.create(session)
        blob = wrap(session, ref, DATA_KEY, CONTEXT)
        answers: list[t.Any] = []
        for changes in ({"encrypt": False}, {"decrypt": False}, {"encrypt": True, "decrypt": True}):
            make.change(session, ref.label, ref.id, changes)
            answers.append((code(lambda: wrap(session, ref, DATA_KEY, CONTEXT)), code(lambda: unwrap(session, blob, CONTEXT))))
        return answers

    # Deactivated (no new wrapping, old blobs open), suspended, active again.
    assert bench.act(act) == [("key_suspended", ""), ("key_suspended", "key_suspended"), ("", "")]


def test_a_key_that_can_leave_the_token_protects_nothing(bench: Bench) -> None:
    def act(session: Session) -> list[str]:
        both = {"encrypt": True, "decrypt": True}
        weak = [
            KeySpec("readable", b"1", "aes", size=256, usage=both, sensitive=False, extractable=True),
            KeySpec("short", b"1", "aes", size=128, usage=both),
            KeySpec("mac", b"1", "hmac", size=256),
        ]
        answers = []
        for spec in weak:
            ref = make.generate(session, spec).ref
            answers.append(code(lambda ref=ref: wrap(session, ref, DATA_KEY, CONTEXT)))
        return answers

    assert bench.act(act) == ["kek_unfit"] * 3


def test_the_same_kek_every_time_and_no_foreign_one(bench: Bench) -> None:
    first = bench.act(bench.create)
    assert bench.act(bench.create) == first
    labels = {entry["label"] for entry in bench.registry.keys()}  # noqa: SIM118 - no mapping
    assert LABEL in labels
    assert {entry["cluster"] for entry in bench.registry.keys()} == {"demo"}  # noqa: SIM118

    def foreign(session: Session) -> str:
        make.generate(session, KeySpec("hsm-tde.other", b"x", "aes", size=256))
        return code(lambda: bench.create(session, "hsm-tde.other"))

    assert bench.act(foreign) == "key_foreign"


def test_replace_lost_is_the_only_way_to_a_second_kek(bench: Bench) -> None:
    def act(session: Session) -> tuple[KeyRef, str, KeyRef, list[str]]:
        first = bench.create(session)
        make.destroy(session, first.label, first.id)
        with contextlib.suppress(TdeError):
            make.destroy(session, first.label + COMPANION, first.id)
        refused = code(lambda: bench.create(session))
        second = bench.create(session, replace_lost=True)
        return first, refused, second, [info.id.hex() for info in find(session, LABEL)]

    first, refused, second, listed = bench.act(act)
    assert refused == "key_unreachable"
    assert first.id != second.id
    assert listed == [second.id.hex()]
    assert [row["id"] for row in bench.registry.keys() if row["label"] == LABEL] == [second.id.hex()]  # noqa: SIM118


@pytest.mark.parametrize("moment", ["journal", "generated", "registered", "probed"])
def test_a_kill_while_the_kek_is_made_leaves_one(bench: Bench, moment: str) -> None:
    def killed(session: Session) -> None:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import kek as room

        def die(*_args: t.Any, **_more: t.Any) -> t.NoReturn:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        if moment == "journal":
            room.make.generate = die  # type: ignore[assignment]
        elif moment == "generated":
            bench.registry.remember_key = die  # type: ignore[method-assign]
        elif moment == "registered":
            room._gcm_works = die
        else:
            room.load_kek = die
            room.Kek.kcv = die  # type: ignore[method-assign]
        bench.create(session)

    with pytest.raises(ChildFailed):
        bench.act(killed)

    def again(session: Session) -> tuple[KeyRef, int, bytes]:
        ref = bench.create(session)
        return ref, len(find(session, LABEL)), unwrap(session, wrap(session, ref, DATA_KEY, CONTEXT), CONTEXT)

    ref, count, data = bench.act(again)
    assert (count, data) == (1, DATA_KEY)
    ids = {(entry["key_id"], entry["result"]) for entry in bench.journal.entries() if entry["action"] == "generate_kek"}
    assert ids == {(ref.id.hex(), "begun"), (ref.id.hex(), "done")}


def test_a_kek_put_in_place_by_somebody_during_a_kill_is_refused(bench: Bench) -> None:
    def killed(session: Session) -> None:
        bench.registry.remember_token = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        bench.create(session)

    with pytest.raises(ChildFailed):
        bench.act(killed)

    def swapped(session: Session) -> str:
        [mine] = find(session, LABEL)
        make.destroy(session, LABEL, mine.id)
        make.import_key(
            session, KeySpec(LABEL, mine.id, "aes", usage={"encrypt": True, "decrypt": True}, value=Secret(bytes(32)))
        )
        return code(lambda: bench.create(session))

    assert bench.act(swapped) == "kek_unfit"


def test_the_mac_is_judged_before_anything_is_decrypted(opencryptoki: Installation, state: StateDirectory) -> None:
    bench = Bench(opencryptoki, state)

    def act(session: Session) -> tuple[str, list[str]]:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.envelope import Kek

        blob = wrap(session, bench.create(session), DATA_KEY, CONTEXT)
        decrypted: list[str] = []
        Kek.decrypt = lambda *_args: decrypted.append("!")  # type: ignore[method-assign,assignment]
        return code(lambda: unwrap(session, blob, b"another context")), decrypted

    assert bench.act(act) == ("envelope_damaged", [])


def test_a_token_that_leaves_the_key_readable_is_refused(bench: Bench) -> None:
    def act(session: Session) -> tuple[str, int]:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import make as room
        from pkcs11 import Attribute

        def ignoring(_spec: KeySpec) -> dict[t.Any, bool]:
            return {Attribute.PRIVATE: True, Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}

        room._guarded = ignoring
        return code(lambda: bench.create(session)), len(find(session, LABEL))

    assert bench.act(act) == ("key_not_protected", 0)


def test_two_keys_of_one_label_and_id_are_not_guessed_between(bench: Bench) -> None:
    def act(session: Session) -> tuple[str, str]:
        ref = bench.create(session)
        blob = wrap(session, ref, DATA_KEY, CONTEXT)
        twin = make.generate(session, KeySpec(ref.label, b"twin", "aes", size=256))
        from pkcs11 import Attribute

        handle_of(session, twin)[Attribute.ID] = ref.id
        return code(lambda: unwrap(session, blob, CONTEXT)), code(lambda: wrap(session, ref, DATA_KEY, CONTEXT))

    assert bench.act(act) == ("key_ambiguous", "key_ambiguous")
