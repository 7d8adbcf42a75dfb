# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""SIGKILL before each act on a file or a token, then a second run: the wished state, and no PIN left lying about."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import cryptoki, refused, resting
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.apart import apart
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.initialize import TokenWish, ensure
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.pins import PinWish, change
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, TokenSelector, open_session
from ansible_collections.hsm.tde.tests.integration.support import ChildFailed, Installation, OpenCryptoki, SoftHsm

#: Acts on files beside their creation, and C functions that change a token or spend a try. What lies between two of
#: them leaves nothing behind, so a moment before each, and one after the last, are all moments.
_FILE_ACTS = ("rename", "unlink")
_TOKEN_ACTS = ("C_Login", "C_InitToken", "C_InitPIN", "C_SetPIN")


def die_at(point: int, files: bool) -> None:
    """Make this process, or the child that acts on the token for it, kill itself before the point-th act.

    :param files: acts on files count too.
    """
    # Shared with the child that acts on the token, so that each moment of either has a number of its own.
    moments = mmap.mmap(-1, 8)

    def moment() -> None:
        number = int.from_bytes(moments[:], "big") + 1
        moments[:] = number.to_bytes(8, "big")
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def act(*args: t.Any, **kwargs: t.Any) -> t.Any:
            moment()
            return function(*args, **kwargs)

        return act

    for name in _FILE_ACTS if files else ():
        setattr(os, name, around(getattr(os, name)))
    plain_open = os.open
    creating = around(plain_open)

    def open_file(path: t.Any, flags: int, *args: t.Any, **kwargs: t.Any) -> int:
        return (creating if files and flags & os.O_CREAT else plain_open)(path, flags, *args, **kwargs)  # type: ignore[no-any-return]

    os.open = open_file
    plain = cryptoki.FunctionList.function

    def function(self: cryptoki.FunctionList, name: str, *argtypes: t.Any) -> t.Callable[..., int]:
        found = plain(self, name, *argtypes)
        return around(found) if name in _TOKEN_ACTS else found

    cryptoki.FunctionList.function = function  # type: ignore[method-assign]


def killed_at(point: int, token: Installation, act: t.Callable[[], t.Any]) -> bool:
    """Run ``act`` in a child that dies at the point; False if it ended before.

    What is done with files is the same for every token: on SoftHSM, the quicker one, it counts.
    """

    def dying() -> None:
        die_at(point, files=isinstance(token, SoftHsm))
        act()

    try:
        token.run(dying)
    except ChildFailed:
        return True
    except TdeError as exc:
        if exc.code != "token_act_lost":
            raise
        return True
    return False


def leftovers(*folders: Path) -> list[str]:
    """Temporary files anywhere in the folders; the journal's, without a secret, go with its next entry."""
    found = [path for folder in folders for path in folder.rglob("*") if path.name.endswith((".tmp", ".new"))]
    return [str(path) for path in found if not path.name.startswith(".journal.jsonl.head.")]


class Change:
    """A PIN that goes back and forth between two values, at rest in a file."""

    def __init__(self, token: Installation, state: StateDirectory, folder: Path) -> None:
        folder.mkdir()
        self.token, self.state, self.path = token, state, folder / "pin"
        self.old, self.new = token.pin, "newpin-1"
        resting.write_coming(str(self.path), Secret(self.old))
        resting.settle(str(self.path))

    def act(self) -> list[str]:
        access = TokenAccess(self.token.library_access(), TokenSelector(label="demo"), Secret(self.old))
        return [step.action for step in change(PinWish(access, "user", Secret(self.new), str(self.path)), self.state).plan]

    def finished(self) -> None:
        """A second run leads to the wish; then the values change places."""
        for pin in resting.resting_pins(str(self.path)):
            assert pin in (Secret(self.old), Secret(self.new))
        self.token.run(self.act)
        assert resting.resting_pins(str(self.path)) == [Secret(self.new)]
        assert leftovers(self.path.parent, Path(self.state.path)) == []
        assert self.token.run(self.act) == [], "the token has the new PIN"
        Journal(self.state.journal).entries()
        self.old, self.new = self.new, self.old


@pytest.mark.parametrize("kind", ["softhsm", "opencryptoki"])
def test_pin_change_killed_at_each_act(kind: str, state: StateDirectory, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    token = t.cast(Installation, request.getfixturevalue(kind))
    work = Change(token, state, tmp_path / "boot")
    for point in itertools.count(1):
        killed = killed_at(point, token, work.act)
        work.finished()
        if not killed:
            break
    assert point > {"softhsm": 12, "opencryptoki": 3}[kind], "the points are not where the code acts"


@pytest.mark.parametrize("kind", ["softhsm", "opencryptoki"])
def test_pin_change_without_a_file_killed_at_each_act(
    kind: str, state: StateDirectory, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the try of the new PIN, which the token counts, and before that of the present one."""
    token = t.cast(Installation, request.getfixturevalue(kind))
    # A fingerprint costs as much as all else.
    monkeypatch.setattr(refused, "_ITERATIONS", 10)
    old, new = token.pin, "newpin-1"
    for point in itertools.count(1):
        access = TokenAccess(token.library_access(), TokenSelector(label="demo"), Secret(old))
        wish = PinWish(access, "user", Secret(new))

        def act(wish: PinWish = wish) -> list[str]:
            return [step.action for step in change(wish, state).plan]

        killed = killed_at(point, token, act)
        token.run(act)
        assert token.run(act) == [], "the token has the new PIN"
        assert leftovers(Path(state.path)) == []
        assert not os.path.exists(os.path.join(state.path, "trying.json"))
        old, new = new, old
        if not killed:
            break
    assert point > {"softhsm": 8, "opencryptoki": 3}[kind], "the points are not where the code acts"


def test_pin_change_killed_at_random_moments(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    work = Change(softhsm, state, tmp_path / "boot")
    began = time.monotonic()
    softhsm.run(work.act)
    length = time.monotonic() - began
    work.finished()
    moments = random.Random(1)
    for _moment in range(50):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(TdeError):
                work.act()
            os._exit(0)
        time.sleep(moments.random() * length)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        work.finished()


@pytest.mark.parametrize("kind", ["softhsm", "opencryptoki"])
def test_initialising_killed_at_each_act(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue({"softhsm": "empty_softhsm", "opencryptoki": "factory_opencryptoki"}[kind])
    for point in itertools.count(1):
        home = tmp_path / str(point)
        token: Installation = SoftHsm(home) if kind == "softhsm" else OpenCryptoki(home)
        state = StateDirectory(str(home / "state"))
        wish = TokenWish(token.library_access(), TokenSelector(label="demo"), Secret(token.so_pin), Secret(token.pin))
        killed = killed_at(point, token, lambda w=wish, s=state: ensure(w, s))  # type: ignore[misc]
        token.run(lambda w=wish, s=state: bool(ensure(w, s)))  # type: ignore[misc]
        assert token.run(lambda w=wish, s=state: ensure(w, s).plan) == []  # type: ignore[misc]

        def opens(token: Installation = token, state: StateDirectory = state) -> bool:
            with open_session(token.access(pin=token.so_pin), state, user="so"):
                return True

        assert token.run(opens)
        assert leftovers(Path(state.path)) == []
        if not killed:
            break
    assert point > {"softhsm": 12, "opencryptoki": 5}[kind], "the points are not where the code acts"


def test_an_act_on_a_token_outlives_whoever_asked_for_it(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    """The whole process group of the task is killed in the midst of the act: it is ended all the same, under the lock."""
    began, done = tmp_path / "began", tmp_path / "done"

    def act() -> None:
        began.touch()
        time.sleep(0.5)
        done.touch()

    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with state.locked():
            apart(load(softhsm.library_access()), act, "token")
        os._exit(0)
    deadline = time.monotonic() + 10
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not done.exists()
    with pytest.raises(TdeError) as caught:
        with state.locked():
            pass
    assert caught.value.code == "busy"
    with state.locked(10):
        assert done.exists()


def test_an_act_that_is_ended_itself_is_said(softhsm: SoftHsm) -> None:
    def run() -> None:
        apart(load(softhsm.library_access()), lambda: os.kill(os.getpid(), signal.SIGKILL), "token")

    with pytest.raises(TdeError) as caught:
        softhsm.run(run)
    assert caught.value.code == "token_act_lost"


def test_an_error_of_an_act_passes_without_foreign_text(softhsm: SoftHsm) -> None:
    def fail(exc: Exception) -> None:
        raise exc

    def run(exc: Exception) -> None:
        apart(load(softhsm.library_access()), lambda: fail(exc), "token")

    ours = TdeError("pin_refused", "message", obj="object", kept="kept", next_step="next", details={"a": 1})
    with pytest.raises(TdeError) as caught:
        softhsm.run(lambda: run(ours))
    assert caught.value.result() == ours.result()
    with pytest.raises(TdeError) as caught:
        softhsm.run(lambda: run(ValueError("marker-secret")))
    assert caught.value.code == "internal_error"
    assert "marker" not in str(caught.value)
