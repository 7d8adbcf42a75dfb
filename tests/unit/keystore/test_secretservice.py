# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What wrapped_secret decides and does, under passphrases; tokens are in tests/integration."""

from __future__ import annotations

import itertools
import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.plugins.module_utils.keystore.format import SECRET, Document, Identity, Keyslot
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import (
    MAX_SECRET,
    SecretFile,
    describe_secrets,
    unwrap_secret,
)
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretservice import (
    Destination,
    Facts,
    SecretService,
    SlotWish,
    Wish,
    plan,
)
from ansible_collections.hsm.tde.tests.unit.keystore.killing import Kill
from ansible_collections.hsm.tde.tests.unit.keystore.support import CHEAP, credential, edited, refused

A, B, R = (
    SlotWish(name, Secret(f"passphrase {letter} of twelve"))
    for name, letter in zip(["primary", "primary", "recovery"], "abr", strict=True)
)
ONE, OTHER = Secret("the one secret"), Secret("the other secret")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrase, "default_kdf", lambda: CHEAP)


class Bench:
    def __init__(self, home: Path) -> None:
        self.folder = home / "secrets"
        self.folder.mkdir(mode=0o700)
        self.path = self.folder / "app.key"
        self.state = StateDirectory(str(home / "state"))

    def file(self, path: Path | None = None, name: str | None = None) -> SecretFile:
        return SecretFile(self.state, str(path or self.path), name)

    def service(
        self, state: str = "present", *slots: SlotWish, check: bool = False, file: SecretFile | None = None, **wish: t.Any
    ) -> SecretService:
        return SecretService(file or self.file(), Wish(state, slots, **wish), self.state, check=check)

    def run(self, state: str = "present", *slots: SlotWish, **wish: t.Any) -> list[str]:
        return [step.action for step in self.service(state, *slots, **wish).run()]

    def value(self, text: str = "passphrase a of twelve") -> Secret:
        return unwrap_secret(str(self.path), [credential(text)], self.state)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_secret_is_wrapped_once(bench: Bench) -> None:
    assert bench.run("present", A, R, secret=ONE, check=True) == ["create_secret"]
    assert not bench.path.exists()
    assert bench.run("present", A, R, secret=ONE) == ["create_secret"]
    for again in ({"secret": ONE}, {"generate": 43}, {}):
        assert bench.run("present", A, **again) == []
    assert bench.run("present", credentials=(R,)) == []
    assert bench.value() == ONE
    assert ONE.reveal() not in bench.path.read_bytes()


def test_a_generated_secret(bench: Bench) -> None:
    bench.run("present", A, generate=43)
    assert len(bench.value().text()) == 43
    assert bench.value().text().isalnum()
    with refused("invalid_option"):
        bench.run("present", A, file=bench.file(bench.folder / "second.key"))
    with refused("invalid_option"):
        bench.run("present", secret=ONE, file=bench.file(bench.folder / "second.key"))


@pytest.mark.parametrize("length", [0, MAX_SECRET + 1])
def test_bounds_of_a_secret(bench: Bench, length: int) -> None:
    with refused("keystore_too_large"):
        bench.file().create(Secret(b"x" * length), [])
    bench.run("present", A, secret=Secret(b"\0\xff\n" * (MAX_SECRET // 3)))
    assert len(bench.value()) == MAX_SECRET // 3 * 3


def test_another_secret_only_when_it_is_asked_for(bench: Bench) -> None:
    bench.run("present", A, R, secret=ONE)
    old = bench.path.read_bytes()
    service = bench.service("present", A, R, secret=OTHER)
    assert service.run() == []
    assert "holds another secret" in service.warnings[0]
    with refused("invalid_option"):
        bench.run("present", A, secret=OTHER, update=True)
    assert bench.path.read_bytes() == old
    assert bench.run("present", A, R, secret=OTHER, update=True) == ["replace_secret"]
    assert bench.run("present", A, R, secret=OTHER, update=True) == []
    assert bench.value() == OTHER
    assert bench.run("present", A, secret=ONE, update=True, exclusive=True) == ["replace_secret"]
    facts = bench.service("present", A).facts()
    assert [slot["name"] for slot in facts["keyslots"]] == ["primary"]
    assert len(facts["history"]) == 4
    bench.path.write_bytes(old)
    with refused("keystore_rolled_back"):
        bench.run("present", A)


def test_keyslots_are_brought_to_the_wish(bench: Bench) -> None:
    bench.run("present", A, secret=ONE)
    wish = {"credentials": (A,)}
    assert bench.run("rewrapped", B, R, check=True, **wish) == ["add_keyslot", "prove_keyslot"] * 2 + ["remove_keyslot"]
    assert bench.run("rewrapped", B, R, **wish) == ["add_keyslot", "prove_keyslot"] * 2 + ["remove_keyslot"]
    assert bench.run("rewrapped", B, R) == []
    with refused("passphrase_refused"):
        bench.run("present", A)
    assert bench.run("rewrapped", R) == []
    assert bench.run("rewrapped", R, exclusive=True) == ["remove_keyslot"]
    assert bench.value("passphrase r of twelve") == ONE
    with refused("invalid_option"):
        bench.run("rewrapped", credentials=(R,))
    with refused("data_key_absent"):
        bench.run("rewrapped", A, file=bench.file(bench.folder / "second.key"))


def test_a_file_in_anothers_place_and_a_lost_one(bench: Bench) -> None:
    bench.run("present", A, secret=ONE)
    moved = bench.folder / "other.key"
    bench.path.rename(moved)
    with refused("keystore_foreign"):
        bench.run("present", A, file=bench.file(moved))
    assert bench.run("present", A, file=bench.file(moved, "app.key")) == []
    for act in (
        lambda: bench.run("present", A, secret=ONE),
        lambda: bench.run("rewrapped", A, replace_lost=True),
        bench.value,
    ):
        with refused("keystore_unreachable"):
            act()
    assert not bench.path.exists()
    assert bench.run("present", A, secret=OTHER, replace_lost=True) == ["create_secret"]
    assert bench.value() == OTHER
    for path in ("relative.key", str(bench.folder / ".hidden"), str(bench.folder / "sp ace")):
        with refused("invalid_option"):
            SecretFile(bench.state, path)


def test_a_payload_of_another_secret_is_noticed(bench: Bench) -> None:
    bench.run("present", A, secret=ONE)
    elsewhere = bench.folder.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    other = Bench(elsewhere)
    other.run("present", A, secret=OTHER)
    payload = json.loads(other.path.read_bytes())["payload"]
    bench.path.write_bytes(edited(bench.path.read_bytes(), lambda content: content.update(payload=payload)))
    with refused("keystore_edited"):
        bench.value()


def test_delivery(bench: Bench, tmp_path: Path) -> None:
    bench.run("present", A, secret=ONE)
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    target = Destination(str(folder / "key"), os.geteuid(), os.getegid())

    def deliver() -> list[str]:
        return bench.run("unwrapped", destination=target, credentials=(A,))

    assert bench.run("unwrapped", destination=target, credentials=(A,), check=True) == ["write_destination"]
    assert os.listdir(folder) == []
    assert deliver() == ["write_destination"]
    assert Path(target.path).read_bytes() == ONE.reveal()
    assert Path(target.path).stat().st_mode & 0o7777 == 0o600
    assert deliver() == []
    for spoil in (
        lambda: Path(target.path).chmod(0o644),
        lambda: Path(target.path).write_text("other"),
        lambda: os.unlink(target.path),
    ):
        spoil()
        assert deliver() == ["write_destination"]
    os.unlink(target.path)
    os.symlink("/dev/null", target.path)
    with refused("file_not_private"):
        deliver()
    os.unlink(target.path)
    folder.chmod(0o777)
    with refused("file_not_private"):
        deliver()


def test_no_secret_is_left_beside_the_destination(bench: Bench, tmp_path: Path) -> None:
    """Killed at every change of the disk while it is delivered; the second run leaves the destination and nothing else."""
    bench.run("present", A, secret=ONE)
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    target = Destination(str(folder / "key"), os.geteuid(), os.getegid())
    for point in itertools.count(1):
        kill = Kill(point)
        with kill():
            bench.run("unwrapped", destination=target, credentials=(A,))
        bench.run("unwrapped", destination=target, credentials=(A,))
        assert os.listdir(folder) == ["key"]
        assert Path(target.path).read_bytes() == ONE.reveal()
        os.unlink(target.path)
        if not kill.dead:
            break
    assert point > 10


def test_every_secret_of_the_host_is_known(bench: Bench) -> None:
    assert describe_secrets(bench.state) == []
    bench.run("present", A, secret=ONE)
    second = bench.folder / "second.key"
    bench.run("present", A, R, secret=OTHER, file=bench.file(second))
    bench.value()
    facts = describe_secrets(bench.state)
    assert [(each["path"], each["key_id"], len(each["keyslots"])) for each in facts] == [
        (str(bench.path), "app.key", 1),
        (str(second), "second.key", 2),
    ]
    second.unlink()
    with refused("keystore_unreachable"):
        describe_secrets(bench.state)


def _slot(name: str, uid: str, proved: bool = True) -> Keyslot:
    when = "2026-01-02T03:04:05Z"
    return Keyslot(name, uid * 32, "passphrase", when, when if proved else None, {}, {})


@pytest.mark.parametrize("proved", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("fits", [None, "a", "b"])
def test_the_plan_finishes_what_a_killed_run_began(proved: bool, exclusive: bool, fits: str | None) -> None:
    """Two keyslots of one name: what is kept is proved first, and what goes is named by its uid."""
    slots = (_slot("primary", "a"), _slot("other", "c"), _slot("primary", "b", proved))
    document = Document(Identity(SECRET, "", "x"), 32, "", 1, None, slots)
    facts = Facts(document, {"primary": fits * 32 if fits else None})
    steps = plan(facts, Wish("rewrapped", (A,), exclusive=exclusive), "secret x")
    actions = [step.action for step in steps]
    assert ("add_keyslot" in actions) == (fits is None)
    assert ("prove_keyslot" in actions) == (fits is None or (fits == "b" and not proved))
    gone = {step.data["uid"][0] for step in steps if step.action == "remove_keyslot"}
    assert gone == ({"a", "b"} - {fits}) | ({"c"} if exclusive else set())
    assert actions == sorted(actions, key=["add_keyslot", "prove_keyslot", "remove_keyslot"].index)


def test_errors_show_no_secret(bench: Bench) -> None:
    bench.run("present", A, secret=ONE)
    with pytest.raises(TdeError) as caught:
        bench.run("present", B, R)
    shown = str(caught.value) + str(caught.value.result())
    assert "of twelve" not in shown
    assert [each["error_code"] for each in caught.value.details["tried"]] == ["passphrase_refused"] * 2
