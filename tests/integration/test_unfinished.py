# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keys that a kill left half made in a real SoftHSM, and all that looks like one and must stay."""

from __future__ import annotations

import dataclasses
import shutil
import typing as t
from pathlib import Path
from unittest import mock

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import keylist, make, unfinished
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.cryptoki import CkError
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.kek import create_kek
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import KeyInfo, Reader, check_value, find
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import KeySpec, Wish, id_of
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import Session, open_session
from ansible_collections.hsm.tde.tests.integration import killing
from ansible_collections.hsm.tde.tests.integration.support import SoftHsm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

T = t.TypeVar("T")

_CKR_MECHANISM_INVALID = 0x70


class Host:
    """A SoftHSM with a state directory, on which makings of keys are killed."""

    def __init__(self, hsm: SoftHsm, state: StateDirectory, folder: Path) -> None:
        self.hsm, self.state, self._log = hsm, state, folder / "calls"
        self.journal = Journal(state.journal)

    def act(self, fn: t.Callable[[Session], T], **how: t.Any) -> T:
        def inside() -> T:
            with open_session(self.hsm.access(), self.state, **{"rw": True, **how}) as session:
                return fn(session)

        return t.cast(T, self.hsm.run(inside))

    def apply(self, wish: Wish, check: bool = False) -> list[str]:
        """What the service below ``pkcs11_key`` does, in words."""
        outcome = self.hsm.run(
            lambda: keylist.apply(self.hsm.access(), self.state, [wish], uses=lambda token: {}, check_mode=check)
        )
        return [step.action for step in outcome.plan]

    def refusal(self, wish: Wish) -> str:
        with pytest.raises(TdeError) as caught:
            self.apply(wish)
        return caught.value.code

    def keys(self, label: str) -> list[KeyInfo]:
        return self.act(lambda session: find(session, label))

    def kcv(self, label: str) -> bytes | None:
        return self.act(lambda session: check_value(session, find(session, label)[0]))

    def kill(self, work: t.Callable[[str], t.Any], label: str) -> None:
        """Kill the making of a key before SoftHSM writes the last part of it.

        :param work: makes a key of the label that it is given; it is done with two other labels before, to count.
        """
        for other in ("first", "second"):
            found = killing.calls(self._task(work, f"{label} {other}"), "ftruncate", self._log)
        last = max(number for number, call in enumerate(found, 1) if ".object>" in call and "token.object>" not in call)
        assert killing.killed_before(self._task(work, label), "ftruncate", last)
        assert [info.flags["local"] for info in self.keys(label) if info.cls != "public"] == [False], (
            "the kill came at another moment: the test shows nothing"
        )

    @staticmethod
    def _task(work: t.Callable[[str], t.Any], label: str) -> killing.Task:
        def act() -> dict[str, t.Any]:
            work(label)
            return {}

        return act

    def kill_generation(self, label: str, type_: str = "aes") -> None:
        """Leave a key that ``pkcs11_key`` began to generate."""

        def work(name: str) -> None:
            keylist.apply(self.hsm.access(), self.state, [wish(name, type_)], uses=lambda token: {})

        self.kill(work, label)


def wish(label: str = "data", type_: str = "aes", state: str = "present", confirm: str | None = None, **spec: t.Any) -> Wish:
    return Wish(KeySpec(label, None, type_, **spec), state, confirm_destroy=confirm)


@pytest.fixture
def host(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> Host:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    return Host(softhsm, state, tmp_path)


@pytest.mark.parametrize("type_", ["aes", "hmac"])
def test_a_second_run_makes_the_key_anew(type_: str, host: Host) -> None:
    host.kill_generation("data", type_)
    [dead] = host.keys("data")
    expected = ["destroy_unfinished_key", "generate_key"]
    assert host.apply(wish("data", type_), check=True) == expected
    assert host.keys("data") == [dead]
    assert host.apply(wish("data", type_)) == expected
    [made] = host.keys("data")
    assert (made.flags["local"], made.id) == (True, id_of("data"))
    value = host.act(lambda session: Reader(session, ["check_value"]).read(find(session, "data")[0].handle))
    assert len(value["check_value"]) == 3
    assert host.apply(wish("data", type_)) == []
    acts = [(entry["action"], entry["result"]) for entry in host.journal.entries() if entry["key"] == "data"]
    assert acts == [("generate_key", "begun")] + [(action, result) for action in expected for result in ("begun", "done")]


def test_a_second_run_makes_the_kek_anew(host: Host) -> None:
    def work(label: str) -> t.Any:
        with open_session(host.hsm.access(), host.state, rw=True) as session:
            return create_kek(session, label, cluster="main", registry=Registry(host.state), journal=host.journal)

    def again() -> t.Any:
        return host.hsm.run(lambda: work("hsm-tde.main"))

    host.kill(work, "hsm-tde.main")
    [dead] = host.keys("hsm-tde.main")
    # The registry knows better than the journal: a key that it names is not touched.
    registry = Registry(host.state)
    token = host.journal.entries()[-1]["detail"]
    where = (token["token_label"], token["token_serial"], dead.label, dead.id.hex())
    registry.remember_key(*where, "secret_key", "main")
    with pytest.raises(TdeError):
        again()
    assert host.keys("hsm-tde.main") == [dead]
    registry.forget_key(*where)
    ref = again()
    [made] = host.keys("hsm-tde.main")
    assert (made.id, ref.id, made.flags["local"]) == (dead.id, dead.id, True)
    assert host.kcv("hsm-tde.main")
    acts = [(entry["action"], entry["result"]) for entry in host.journal.entries() if entry["key"] == "hsm-tde.main"]
    assert acts == [
        ("generate_kek", "begun"),
        (unfinished.ACTION, "begun"),
        (unfinished.ACTION, "done"),
        ("generate_kek", "done"),
    ]


def test_a_key_that_was_made_to_its_end_is_taken(host: Host) -> None:
    """Killed after the token had made it, and before anything was remembered of it."""
    host.apply(wish())
    before = host.kcv("data")
    host.journal.append("generate_key", "key", result="begun", key="data", key_id=id_of("data").hex(), **where(host))
    Path(host.state.registry).unlink()
    assert host.apply(wish()) == []
    assert host.kcv("data") == before


def where(host: Host) -> dict[str, str]:
    last = host.journal.entries()[-1]["detail"]
    return {name: last[name] for name in ("token_label", "token_serial")}


def test_an_imported_key_in_its_place_stays(host: Host) -> None:
    host.kill_generation("data")

    def replace(session: Session) -> None:
        make.destroy(session, "data", id_of("data"))
        make.import_key(session, KeySpec("data", id_of("data"), "aes", value=Secret(b"v" * 32)))

    host.act(replace)
    before = host.kcv("data")
    assert before
    assert host.refusal(wish()) == "key_mismatch"
    assert host.refusal(wish(state="absent")) == "destroy_unconfirmed"
    assert host.kcv("data") == before


def test_what_cannot_be_proved_stays_until_confirmed(host: Host) -> None:
    """An object whose flags forbid the try: no one knows whether it has a value."""
    host.kill_generation("data")
    host.act(lambda session: make.change(session, "data", id_of("data"), {"encrypt": False}))
    assert host.refusal(wish()) == "key_mismatch"
    assert len(host.keys("data")) == 1
    assert host.apply(wish(state="absent", confirm="data")) == ["destroy_key"]


def test_without_the_journals_word_nothing_goes(host: Host) -> None:
    host.kill_generation("data")
    dead = host.keys("data")
    journal = Path(host.state.journal)
    for path in (journal, journal.with_name(journal.name + ".head")):
        path.unlink()
    assert unfinished.ACTION not in host.apply(wish())
    assert host.keys("data") == dead


def test_half_a_pair_stays_until_confirmed(host: Host) -> None:
    host.kill_generation("pair", "ec")
    assert len(host.keys("pair")) == 2
    assert host.refusal(wish("pair", "ec")) == "key_mismatch"
    assert len(host.keys("pair")) == 2
    assert host.apply(wish("pair", "ec", "absent", "pair")) == ["destroy_key"]
    assert host.apply(wish("pair", "ec")) == ["generate_key"]


@pytest.mark.parametrize("type_", ["rsa", "ec"])
def test_an_imported_pair_is_completed(type_: str, host: Host) -> None:
    def pem() -> Secret:
        key: t.Any = rsa.generate_private_key(65537, 2048) if type_ == "rsa" else ec.generate_private_key(ec.SECP256R1())
        none = serialization.NoEncryption()
        return Secret(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none))

    private, other = pem(), pem()

    def work(label: str) -> None:
        keylist.apply(host.hsm.access(), host.state, [wish(label, type_, private_key=private)], uses=lambda token: {})

    for label in ("first", "second"):
        found = killing.calls(host._task(work, label), "ftruncate", host._log)
    files = [call.split("<")[1].split(">")[0] for call in found]
    objects = [file for file in files if file.endswith(".object") and not file.endswith("token.object")]
    public = next(file for file in objects if file != objects[0])
    assert killing.killed_before(host._task(work, "pair"), "ftruncate", files.index(public) + 1)
    assert [info.cls for info in host.keys("pair")] == ["private"]
    assert host.refusal(wish("pair", type_, private_key=other)) == "key_mismatch"
    assert host.apply(wish("pair", type_, private_key=private), check=True) == ["import_public_half"]
    assert host.apply(wish("pair", type_, private_key=private)) == ["import_public_half"]
    assert host.apply(wish("pair", type_, private_key=private)) == []
    assert sorted(info.cls for info in host.keys("pair")) == ["private", "public"]
    assert host.refusal(wish("pair", type_, private_key=other)) == "key_mismatch"


def test_each_mark_is_needed_and_each_other_answer_is_raised(host: Host) -> None:
    host.kill_generation("data")
    id_ = id_of("data")

    def look(session: Session) -> tuple[list[str], list[str], bool]:
        real_find, real_read, real_block = unfinished.find, Reader.read, unfinished.aes_block
        [info] = real_find(session, "data")
        others: dict[str, list[KeyInfo]] = {
            name: [dataclasses.replace(info, flags={**info.flags, name: not value})]
            for name, value in {
                "token": True,
                "local": False,
                "always_sensitive": True,
                "never_extractable": True,
                "encrypt": True,
            }.items()
        }
        others["not told"] = [dataclasses.replace(info, flags={n: v for n, v in info.flags.items() if n != "local"})]
        others |= {"none": [], "two": [info, info], "class": [dataclasses.replace(info, cls="private")]}
        others["type"] = [dataclasses.replace(info, type="des3")]
        proved = []
        for name, found in others.items():
            with mock.patch.object(unfinished, "find", lambda *args, found=found, **how: found):
                proved += [name] if unfinished.proved(session, "data", id_) else []
        for name in ("check_value", "allowed_mechanisms"):
            for value in (None, b"abc"):

                def read(self: Reader, handle: int, name: str = name, value: t.Any = value) -> t.Any:
                    return {**(real_read(self, handle) or {}), name: value}

                with mock.patch.object(Reader, "read", read):
                    proved += [name] if unfinished.proved(session, "data", id_) else []
        answers = []

        def answering(rv: int, key: int | None) -> t.Callable[..., bytes]:
            def block(session: Session, handle: int, data: bytes) -> bytes:
                if key in (None, handle):
                    raise CkError("C_EncryptInit", rv)
                return real_block(session, handle, data)

            return block

        # Errors of device, session, login, use and of anything else; and the right one, where no key at all can be used so.
        for rv, key in [(rv, info.handle) for rv in (0x05, 0x06, 0x30, 0x32, 0x68, 0x90, 0xB3, 0xE0, 0x101)] + [
            (_CKR_MECHANISM_INVALID, None)
        ]:
            with mock.patch.object(unfinished, "aes_block", answering(rv, key)):
                try:
                    unfinished.proved(session, "data", id_)
                except TdeError as exc:
                    answers.append(exc.details["ckr"])
        return proved, answers, unfinished.proved(session, "data", id_)

    proved, answers, truly = host.act(look)
    assert proved == []
    assert answers == [
        "CKR_GENERAL_ERROR", "CKR_FUNCTION_FAILED", "CKR_DEVICE_ERROR", "CKR_DEVICE_REMOVED", "CKR_KEY_FUNCTION_NOT_PERMITTED",
        "CKR_OPERATION_ACTIVE", "CKR_SESSION_HANDLE_INVALID", "CKR_TOKEN_NOT_PRESENT", "CKR_USER_NOT_LOGGED_IN", "CKR_MECHANISM_INVALID",
    ]  # fmt: skip
    assert truly


def test_what_became_a_key_meanwhile_stays(host: Host) -> None:
    host.kill_generation("data")

    def look(session: Session) -> tuple[str, bytes | None, bytes | None]:
        made: list[bytes | None] = []

        def another(seconds: float) -> None:
            make.destroy(session, "data", id_of("data"))
            made.append(check_value(session, make.generate(session, KeySpec("data", id_of("data"), "aes"))))

        with mock.patch.object(unfinished.time, "sleep", another), pytest.raises(TdeError) as caught:
            unfinished.destroy(session, "data", id_of("data"))
        return caught.value.code, made[0], check_value(session, find(session, "data")[0])

    code, before, after = host.act(look)
    assert code == "key_mismatch"
    assert before
    assert before == after
