# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Soft tokens empty a key's file before they write it anew; a kill at that moment must not cost the key."""

from __future__ import annotations

import os
import shutil
import time
import typing as t
from pathlib import Path
from unittest import mock

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import copies, keylist, make
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import check_value, find, handle_of
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keyspec import KeySpec, Wish
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration import killing
from ansible_collections.hsm.tde.tests.integration.support import Installation, OpenCryptoki, SoftHsm


class Keys:
    """A token with the keys ``a`` and ``b``.

    :ivar folder: of its files, as this process sees it; :ivar seen: as the token does.
    """

    def __init__(self, token: Installation, state: StateDirectory) -> None:
        if not shutil.which("strace"):
            pytest.skip("strace is not installed")
        self.token, self.state = token, state
        if isinstance(token, OpenCryptoki):
            self.folder, self.seen, pattern = token.home / "var/swtok", Path("/var/lib/opencryptoki/swtok"), "TOK_OBJ/????????"
        else:
            self.folder = self.seen = next(t.cast(SoftHsm, token).tokendir.iterdir())
            pattern = "*-*.object"
        self.apply(Wish(KeySpec("b", None, "aes")))
        others = set(self.folder.glob(pattern))
        self.apply(Wish(KeySpec("a", None, "aes")))
        [self.file] = set(self.folder.glob(pattern)) - others
        self.kcvs = self.values()

    def work(self, *wishes: Wish) -> list[str]:
        with self.state.locked(10):
            outcome = keylist.apply(self.token.access(), self.state, wishes, uses=lambda token: {})
        return [step.action for step in outcome.plan]

    def apply(self, *wishes: Wish) -> list[str]:
        return self.token.run(lambda: self.work(*wishes))

    def values(self) -> dict[str, list[bytes | None]]:
        """Check values of the keys by label, whatever registry and journal say."""

        def look() -> dict[str, list[bytes | None]]:
            with open_session(self.token.access(), self.state) as session:
                return {label: [check_value(session, info) for info in find(session, label)] for label in ("a", "b")}

        return self.token.run(look)

    def power_cut(self, work: t.Callable[[], t.Any], path: str) -> None:
        """Let the work end before its first writing to a file, with nobody left to put anything right."""

        def task() -> dict[str, t.Any]:
            with mock.patch.object(copies, "mend", return_value=[]):
                work()
            return {}

        assert self.token.run(lambda: killing.killed_at_write(task, self.seen / path)), "nothing was written"
        assert (self.folder / path).stat().st_size == 0, "the kill came at another moment: the test shows nothing"
        if isinstance(self.token, OpenCryptoki):
            # It has the list of objects in memory, too.
            for segment in (self.token.home / "shm").iterdir():
                segment.unlink()


def stopped() -> Wish:
    # It may encrypt, so that its check value can be had.
    return Wish(KeySpec("a", None, "aes", usage={"decrypt": False}))


@pytest.fixture(params=["softhsm", "opencryptoki"])
def keys(request: pytest.FixtureRequest, state: StateDirectory) -> Keys:
    return Keys(request.getfixturevalue(request.param), state)


def test_a_change_killed_while_the_token_writes(keys: Keys) -> None:
    """The process that writes is killed; the key is there when the task ends, and the next run changes it."""

    def task() -> dict[str, t.Any]:
        keys.work(stopped())
        return {}

    inside = keys.seen / keys.file.relative_to(keys.folder)
    assert keys.token.run(lambda: killing.killed_at_write(task, inside))
    assert keys.values() == keys.kcvs
    assert keys.apply(stopped()) == ["change_key"]
    assert keys.apply(stopped()) == []
    assert keys.values() == keys.kcvs
    assert not list(keys.folder.rglob("objects.copy*"))


def test_a_power_cut_while_a_key_is_changed(keys: Keys) -> None:
    keys.power_cut(lambda: keys.work(stopped()), str(keys.file.relative_to(keys.folder)))
    if isinstance(keys.token, SoftHsm):
        # A large file is written in two parts.
        keys.file.write_bytes(b"\0" * 9)
    assert keys.apply(stopped()) == ["change_key"]
    assert keys.apply(stopped()) == []
    assert keys.values() == keys.kcvs
    assert not list(keys.folder.rglob("objects.copy*"))


def test_a_power_cut_while_one_key_is_destroyed_leaves_the_others(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    """OpenCryptoki writes the list of all objects anew without the one."""
    keys = Keys(opencryptoki, state)
    gone = Wish(KeySpec("a", None, "aes"), "absent", confirm_destroy="a")
    keys.power_cut(lambda: keys.work(gone), "TOK_OBJ/OBJ.IDX")
    assert keys.values()["b"] == keys.kcvs["b"]
    assert keys.apply(gone) == ["destroy_key"]
    assert keys.values() == {"a": [], "b": keys.kcvs["b"]}
    assert not keys.file.exists()


def test_a_power_cut_while_a_new_key_is_taken_away_again_leaves_the_others(
    opencryptoki: OpenCryptoki, state: StateDirectory
) -> None:
    """As at an import of which the token refused the second half."""
    keys = Keys(opencryptoki, state)

    def take_away() -> None:
        with open_session(keys.token.access(), keys.state, rw=True) as session:
            make._destroy_all(session, [handle_of(session, info) for info in find(session, "a")])

    keys.power_cut(take_away, "TOK_OBJ/OBJ.IDX")
    assert keys.values()["b"] == keys.kcvs["b"]
    assert keys.token.run(take_away) is None
    assert keys.values() == {"a": [], "b": keys.kcvs["b"]}
    assert not list(keys.folder.rglob("objects.copy*"))


def test_a_power_cut_while_somebody_logs_in(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    keys = Keys(opencryptoki, state)

    def login() -> None:
        with open_session(keys.token.access(), keys.state):
            pass

    keys.power_cut(login, "NVTOK.DAT")
    assert keys.values() == keys.kcvs


def test_what_was_destroyed_is_not_put_back(softhsm: SoftHsm, state: StateDirectory) -> None:
    keys = Keys(softhsm, state)
    keys.power_cut(lambda: keys.work(stopped()), str(keys.file.relative_to(keys.folder)))
    keys.file.unlink()
    assert keys.values() == {"a": [], "b": keys.kcvs["b"]}
    assert not keys.file.exists()
    assert not list(keys.folder.rglob("objects.copy*"))


def test_a_change_is_ended_though_its_task_is_killed(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    keys, began = Keys(softhsm, state), tmp_path / "began"
    change = make.change

    def slow(*args: t.Any) -> None:
        began.touch()
        time.sleep(0.3)
        change(*args)

    def task() -> dict[str, t.Any]:
        with mock.patch.object(make, "change", slow):
            keys.work(stopped())
        return {}

    process = killing.Process(task)
    deadline = time.monotonic() + 10
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, 9)
    assert process.result() is None
    # It waits for the lock that the orphan holds.
    assert keys.apply(stopped()) == []
    assert keys.values() == keys.kcvs


def test_a_living_changers_copy_is_left_alone(softhsm: SoftHsm, state: StateDirectory) -> None:
    keys = Keys(softhsm, state)

    def look() -> bool:
        with mock.patch.dict(os.environ, softhsm.environment), copies.objects_kept(softhsm.library):
            keys.values()
            return (keys.folder / "objects.copy").exists()

    assert softhsm.run(look)
    assert not (keys.folder / "objects.copy").exists()
