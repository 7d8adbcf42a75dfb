# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped-key store with keyslots in real tokens: AES-GCM on SoftHSM, AES-CBC with HMAC on openCryptoki."""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore, PassphraseSlot, TokenCredential, TokenSlot
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import make
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.envelope import COMPANION
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.kek import create_kek
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import KeyRef
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import KeySpec
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration.support import Installation, SoftHsm
from ansible_collections.hsm.tde.tests.unit.keystore import stranger
from ansible_collections.hsm.tde.tests.unit.keystore.support import CHEAP, edited, refused

T = t.TypeVar("T")
PASSPHRASE = Secret("a recovery passphrase")
RECOVERY = PassphraseSlot("recovery", PASSPHRASE, CHEAP)


@pytest.fixture(params=["softhsm", "opencryptoki"])
def token(request: pytest.FixtureRequest) -> Installation:
    return t.cast(Installation, request.getfixturevalue(request.param))


class Bench:
    """A store and tokens; every act in a child, so each is a fresh process and a fresh login."""

    def __init__(self, token: t.Any, state: StateDirectory, cluster: str = "main") -> None:
        self.token, self.state = token, state
        self.store = KeyStore(state, cluster)
        self.path = Path(self.store.path, "cluster.json")

    def act(self, fn: t.Callable[[], T]) -> T:
        return t.cast(T, self.token.run(fn))

    def slot(self, kek: KeyRef, name: str = "primary", on: str = "demo") -> TokenSlot:
        return TokenSlot(name, self.token.access(on), kek)

    def credential(self, on: str = "demo", **more: t.Any) -> TokenCredential:
        return TokenCredential(self.token.access(on, **more))

    def kek(self, label: str = "hsm-tde.main", on: str = "demo") -> KeyRef:
        def make_kek() -> KeyRef:
            self.store.create()
            with open_session(self.token.access(on), self.state, rw=True) as session:
                Registry(self.state).remember_token(session.token.label, session.token.serial, self.token.library)
                journal = Journal(self.state.journal)
                return create_kek(session, label, cluster=self.store.cluster, registry=Registry(self.state), journal=journal)

        return self.act(make_kek)

    def create(self, kek: KeyRef) -> bytes:
        return self.act(lambda: self.store.create_key("cluster", 64, [self.slot(kek), RECOVERY]).reveal())

    def open(self, *credentials: t.Any) -> bytes:
        return self.act(lambda: self.store.open_key("cluster", credentials).reveal())


@pytest.fixture
def bench(token: Installation, state: StateDirectory) -> Bench:
    return Bench(token, state)


def test_from_passphrase_to_token_and_to_a_new_kek(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Change of protection, then rotation: the data key stays, both secrets of before no longer open, the file remembers."""
    first, second = bench.kek("hsm-tde.main"), bench.kek("hsm-tde.main.2")
    old = PassphraseSlot("primary", Secret("the first passphrase"), CHEAP)
    key = bench.act(lambda: bench.store.create_key("cluster", 64, [old, RECOVERY]).reveal())

    def replace(wish: TokenSlot, credential: t.Any) -> list[bool]:
        data_key = bench.store.open_key("cluster", [credential])
        gone = [slot["uid"] for slot in bench.store.describe()[0]["keyslots"] if slot["name"] == "primary"]
        answers = [bench.store.add_keyslot("cluster", data_key, wish), bench.store.prove_keyslot("cluster", wish)]
        return answers + [bench.store.remove_keyslot("cluster", data_key, "primary", uid) for uid in gone]

    assert bench.act(lambda: replace(bench.slot(first), old)) == [True, True, True]
    assert bench.open(bench.credential()) == key
    with refused("passphrase_refused"):
        bench.open(old)
    assert bench.act(lambda: replace(bench.slot(second), bench.credential())) == [True, True, True]
    assert bench.open(bench.credential()) == bench.open(RECOVERY) == key
    facts = bench.store.describe()[0]
    recovery, primary = facts["keyslots"]
    assert (recovery["name"], primary["name"], primary["state"]) == ("recovery", "primary", "proved")
    assert (primary["token_label"], primary["kek_label"], primary["kek_id"]) == ("demo", "hsm-tde.main.2", second.id.hex())
    assert [(past["protection"], past["kek_label"]) for past in facts["history"]] == [
        ("passphrase", None),
        ("token", "hsm-tde.main"),
    ]
    mechanism = json.loads(bench.path.read_bytes())["keyslots"][1]["blob"]["mechanism"]
    assert mechanism == ("AES-GCM" if "softhsm" in request.node.callspec.id else "AES-CBC-PAD+HMAC-SHA256")
    # Again: nothing to do.
    again = bench.act(
        lambda: [
            bench.store.add_keyslot("cluster", bench.store.open_key("cluster", [RECOVERY]), bench.slot(second)),
            bench.store.prove_keyslot("cluster", bench.slot(second)),
        ]
    )
    assert again == [False, False]


def test_a_token_that_does_not_show_is_unreachable_and_recovery_opens(bench: Bench, tmp_path: Path) -> None:
    key = bench.create(bench.kek())
    before = bench.path.read_bytes()
    tokens = bench.token.tokendir if isinstance(bench.token, SoftHsm) else bench.token.home / "var"
    empty = tmp_path / "aside"
    tokens.rename(empty)
    shutil.copytree(empty, tokens, ignore=lambda folder, names: [name for name in names if not Path(folder, name).is_dir()])
    if isinstance(bench.token, SoftHsm):
        for folder in tokens.iterdir():
            shutil.rmtree(folder)
    for registered in (True, False):
        if not registered:
            # Without the registry it is still the keyslot that names the token.
            Path(bench.state.registry).unlink()
        with refused("token_unreachable"):
            bench.open(bench.credential())
        with pytest.raises(TdeError) as caught:
            bench.act(lambda: bench.store.create_key("another", 64, [bench.slot(KeyRef("hsm-tde.main", b"\1"))]))
        assert caught.value.code in ("token_unreachable", "token_absent")
    assert bench.open(RECOVERY) == key
    assert (bench.path.read_bytes(), bench.store.key_ids()) == (before, ["cluster"])
    shutil.rmtree(tokens)
    empty.rename(tokens)
    assert bench.open(bench.credential()) == key


def test_wrong_pin_is_refused_once_and_the_next_credential_opens(bench: Bench) -> None:
    key = bench.create(bench.kek())
    wrong = bench.credential(pin="87654321")
    with pytest.raises(TdeError) as caught:
        bench.open(wrong)
    assert caught.value.code == "pin_refused"
    assert "87654321" not in str(caught.value) + str(caught.value.result())
    with refused("pin_refused_before"):
        bench.open(wrong)
    assert bench.open(wrong, RECOVERY) == key
    assert bench.open(TokenCredential(bench.token.access(allow_low_pin_count=True))) == key


def test_a_kek_that_is_gone_is_unreachable(bench: Bench) -> None:
    kek = bench.kek()
    key = bench.create(kek)

    def destroy() -> None:
        with open_session(bench.token.access(), bench.state, rw=True) as session:
            make.destroy(session, kek.label, kek.id)

    bench.act(destroy)
    for act in (
        lambda: bench.open(bench.credential()),
        lambda: bench.act(lambda: bench.store.prove_keyslot("cluster", bench.slot(kek))),
        lambda: bench.act(lambda: bench.store.create_key("another", 64, [bench.slot(kek)])),
    ):
        with refused("key_unreachable"):
            act()
    assert bench.store.key_ids() == ["cluster"]
    assert bench.open(RECOVERY) == key


def test_keyslots_of_other_files_under_the_same_kek_do_not_open(bench: Bench) -> None:
    """Cluster, key id and keyslot are authenticated: whoever may use the KEK still cannot move a wrapped key."""
    kek = bench.kek()
    bench.create(kek)
    other = Bench(bench.token, bench.state, "other")
    other.create(kek)
    bench.act(lambda: bench.store.create_key("tablespace.a", 64, [bench.slot(kek)]).key_id)
    genuine = bench.path.read_bytes()

    def first(path: Path) -> t.Any:
        return json.loads(path.read_bytes())["keyslots"][0]

    for foreign in (first(other.path), first(bench.path.with_name("tablespace.a.json"))):
        for change in (
            lambda content, foreign=foreign: content["keyslots"].append(foreign),
            lambda content, foreign=foreign: content["keyslots"].__setitem__(0, foreign),
            lambda content, foreign=foreign: content["keyslots"][0].update(blob=foreign["blob"]),
        ):
            bench.path.write_bytes(edited(genuine, change))
            with refused("keyslot_foreign"):
                bench.open(bench.credential())
    bench.path.write_bytes(genuine)
    bench.open(bench.credential())


@pytest.mark.parametrize(
    "blob",
    [
        {"version": 2},
        {"version": None},
        {"iv": "AAAA"},
        {"mechanism": "AES-ECB"},
        {"kek_id": "zz"},
        {"kek_label": "other"},
        {"library": "/tmp/evil.so"},
        {"ciphertext": "AAAA"},
    ],
    ids=lambda blob: next(iter(blob)) + "=" + str(next(iter(blob.values()))),
)
def test_a_malformed_wrapped_key_never_reaches_a_token(softhsm: SoftHsm, state: StateDirectory, blob: dict[str, t.Any]) -> None:
    bench = Bench(softhsm, state)
    bench.create(bench.kek())
    bench.path.write_bytes(edited(bench.path.read_bytes(), lambda content: content["keyslots"][0]["blob"].update(blob)))
    shutil.rmtree(softhsm.tokendir)
    expected = "keystore_newer" if blob == {"version": 2} else "keystore_forbidden" if "library" in blob else "keystore_damaged"
    for act in (bench.store.describe, lambda: bench.open(bench.credential())):
        with refused(expected):
            act()


def test_a_second_token_and_a_copy_of_the_kek(two_tokens: SoftHsm, state: StateDirectory) -> None:
    bench = Bench(two_tokens, state)
    here, there = bench.kek(), bench.kek("hsm-tde.main", "second")
    slots = [bench.slot(here), bench.slot(there, "second", "second")]
    key = bench.act(lambda: bench.store.create_key("cluster", 64, slots).reveal())
    for name in ("demo", "second"):
        credential = bench.credential(name)
        opened = bench.act(lambda: bench.store.open_key("cluster", [credential]).keyslot)  # noqa: B023 - called at once
        assert opened == {"demo": "primary", "second": "second"}[name]
    assert bench.open(bench.credential("second")) == key
    # On a standby the token has another name and holds a copy of the KEK.
    two_tokens.add_token("standby")

    def copy() -> bytes:
        value = Secret(bytes(range(32)))
        spec = KeySpec("shared", b"\7", "aes", size=256, usage={"encrypt": True, "decrypt": True}, value=value)
        for name in ("demo", "standby"):
            with open_session(two_tokens.access(name), state, rw=True) as session:
                make.import_key(session, spec)
        shared = KeyRef("shared", b"\7")
        made = bench.store.create_key("copied", 64, [bench.slot(shared)])
        assert bench.store.open_key("copied", [bench.credential("standby")]).reveal() == made.reveal()
        return made.reveal()

    bench.act(copy)


def test_one_login_opens_many_keys(bench: Bench) -> None:
    kek = bench.kek()

    def act() -> tuple[int, int]:
        from ansible_collections.hsm.tde.plugins.module_utils.keystore import token as protection

        made = {name: bench.store.create_key(name, 64, [bench.slot(kek)]).reveal() for name in ("a", "b", "c")}
        logins = []
        real = vars(protection)["open_session"]

        def counting(*args: t.Any, **kwargs: t.Any) -> t.Any:
            logins.append(args)
            return real(*args, **kwargs)

        vars(protection)["open_session"] = counting
        opened = bench.store.open_keys(list(made), [bench.credential()])
        return len(logins), sum(opened[name].reveal() == key for name, key in made.items())

    assert bench.act(act) == (1, 3)


def test_the_stranger_opens_what_a_token_wrapped(bench: Bench) -> None:
    """With KEK and MAC key that a test knows, the second implementation reads the file, and its own file is read."""
    kek, mac_key = bytes(range(100, 132)), bytes(range(200, 232))
    gcm = isinstance(bench.token, SoftHsm)
    ref = KeyRef("hsm-tde.known", b"\x00\xfe")

    def create() -> bytes:
        with open_session(bench.token.access(), bench.state, rw=True) as session:
            usage = {"encrypt": True, "decrypt": True}
            make.import_key(session, KeySpec(ref.label, ref.id, "aes", size=256, usage=usage, value=Secret(kek)))
            if not gcm:
                usage = {"sign": True, "verify": True}
                spec = KeySpec(ref.label + COMPANION, ref.id, "hmac", size=256, usage=usage, value=Secret(mac_key))
                make.import_key(session, spec)
        return bench.store.create_key("cluster", 64, [bench.slot(ref)]).reveal()

    key = bench.act(create)
    raw = bench.path.read_bytes()
    file = stranger.parse(raw)
    stranger.verify(raw, file, key)
    assert stranger.unwrap_token(file, file["keyslots"][0], kek, None if gcm else mac_key) == key

    uid, iv = "ab" * 16, os.urandom(12 if gcm else 16)
    theirs = {**file, "generation": 9}
    for name in ("mac", "checksum"):
        del theirs[name]
    slot = {**theirs["keyslots"][0], "uid": uid}
    slot["blob"] = stranger.token_blob(theirs, uid, key, kek, None if gcm else mac_key, ref.label, ref.id.hex(), iv)
    theirs["keyslots"] = [slot]
    bench.path.write_bytes(stranger.seal(theirs, key))
    for journal in (bench.state.journal, bench.state.journal + ".head"):
        os.unlink(journal)
    assert bench.open(bench.credential()) == key
    assert bench.store.describe()[0]["generation"] == 9
