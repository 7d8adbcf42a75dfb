# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Killed at every change of the disk, and again in the run that finishes: always a file that opens, never a false alarm.

After each kill: the data key opens with one of the credentials at hand and is the same; no content that was reported as
replaced is accepted again; a second run reaches the wish; nothing is left over and nothing holds the key in the clear.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import shutil
import signal
import tempfile
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import SecretFile
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore
from ansible_collections.hsm.tde.tests.unit.keystore.killing import Kill
from ansible_collections.hsm.tde.tests.unit.keystore.support import slot

OLD, NEW, RECOVERY = slot("primary", "the old passphrase"), slot("primary", "the new passphrase"), slot("recovery")
EVERY = [NEW, OLD, RECOVERY]
#: Tries with a kill at two random moments, one after the other; the slow test has more.
TWICE, TWICE_SLOW = 50, 2000


@pytest.fixture
def home(tmp_path: Path) -> t.Iterator[Path]:
    """A folder in memory where there is one: these tests sync by the thousand."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hsm-tde-test-") as folder:
        yield Path(folder)


Job = t.Callable[[KeyStore, t.Callable[[], None]], None]


def create(store: KeyStore, done: t.Callable[[], None]) -> None:
    """What tde_keystore does for a data key."""
    store.create()
    if "cluster" not in store.key_ids():
        store.create_key("cluster", 64, [OLD, RECOVERY])
        done()


def rotate(store: KeyStore, done: t.Callable[[], None]) -> None:
    """What every change of protection and every rotation is: add, prove, remove, by what the file says now."""
    key = store.open_key("cluster", EVERY)
    if store.find_keyslot("cluster", NEW) is None:
        store.add_keyslot("cluster", key, NEW)
        done()
    store.prove_keyslot("cluster", NEW)
    done()
    kept = store.find_keyslot("cluster", NEW)
    for facts in store.describe()[0]["keyslots"]:
        if facts["name"] == "primary" and facts["uid"] != kept:
            store.remove_keyslot("cluster", key, "primary", facts["uid"])
            done()


class Stage:
    """A state directory that is set back before each kill.

    :ivar contents: every content that the key file ever had in this try, oldest first; :ivar reported: how many of
        them were there when a call last returned.
    """

    def __init__(self, home: Path, prepare: Job | None) -> None:
        self.home, self.origin = home / "live", home / "origin"
        self.contents: list[bytes] = []
        self.reported = 0
        self.key: bytes | None = None
        store = KeyStore(StateDirectory(str(self.origin)), "main")
        if prepare:
            prepare(store, lambda: None)
            self.key = store.open_key("cluster", EVERY).reveal()

    def reset(self) -> KeyStore:
        shutil.rmtree(self.home, ignore_errors=True)
        if self.origin.exists():
            shutil.copytree(self.origin, self.home)
        self.contents, self.reported = [], 0
        self.store = KeyStore(StateDirectory(str(self.home)), "main")
        self.path = Path(self.store.path, "cluster.json")
        self.note()
        return self.store

    def note(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            content = self.path.read_bytes()
            if content not in self.contents:
                self.contents.append(content)

    def report(self) -> None:
        self.note()
        self.reported = len(self.contents)

    def run(self, job: Job, kill: Kill) -> None:
        rename = os.rename

        def noting(*args: t.Any, **kwargs: t.Any) -> None:
            rename(*args, **kwargs)
            self.note()

        os.rename = noting
        try:
            with kill():
                job(self.store, self.report)
        finally:
            os.rename = rename

    def check(self) -> None:
        """After a kill."""
        if self.key is None:
            assert self.reported == 0 or self.path.exists()
            if not self.path.exists():
                assert self.store.key_ids() == []
                return
            keys = {self.store.open_key("cluster", [wish]).reveal() for wish in (OLD, RECOVERY)}
            assert len(keys) == 1
            return
        # Whatever was reported as replaced is refused, before anybody has opened the file after the kill.
        for former in self.contents[: max(0, self.reported - 1)]:
            self.refuses(former)
        assert self.store.open_key("cluster", EVERY).reveal() == self.key
        # Once somebody has seen the newest, everything before is refused.
        for former in self.contents[:-1]:
            self.refuses(former)

    def refuses(self, former: bytes) -> None:
        current = self.path.read_bytes()
        if former == current:
            return
        self.path.write_bytes(former)
        with pytest.raises(TdeError) as caught:
            self.store.open_key("cluster", EVERY)
        assert caught.value.code == "keystore_rolled_back", str(caught.value)
        self.path.write_bytes(current)

    def finished(self, job: Job) -> None:
        """After the run that was not killed."""
        key = self.store.open_key("cluster", EVERY).reveal()
        assert self.key in (None, key)
        facts = self.store.describe()[0]
        assert facts["recorded"] == "same"
        names = [(each["name"], each["state"]) for each in facts["keyslots"]]
        if job is create:
            assert names == [("primary", "proved"), ("recovery", "proved")]
        else:
            assert names == [("recovery", "proved"), ("primary", "proved")]
            assert self.store.find_keyslot("cluster", NEW)
            assert [past["name"] for past in facts["history"]].count("primary") >= 1
        for wish in (OLD if job is create else NEW, RECOVERY):
            assert self.store.open_key("cluster", [wish]).reveal() == key
        assert sorted(os.listdir(self.store.path)) == ["cluster.json", "lock"]
        for folder, _folders, names_ in os.walk(self.home):
            for name in names_:
                content = Path(folder, name).read_bytes()
                for spelling in (key, key.hex().encode(), base64.b64encode(key)):
                    assert spelling not in content


def stage_of(home: Path, job: Job) -> Stage:
    return Stage(home, None if job is create else create)


@pytest.mark.parametrize("job", [create, rotate], ids=lambda job: job.__name__)
def test_killed_at_every_change_of_the_disk(home: Path, job: Job) -> None:
    stage = stage_of(home, job)
    stage.reset()
    count = Kill()
    stage.run(job, count)
    stage.check()
    stage.finished(job)
    assert count.points > 40
    for point in range(1, count.points + 1):
        stage.reset()
        kill = Kill(point)
        stage.run(job, kill)
        assert kill.dead
        stage.check()
        stage.run(job, Kill())
        stage.finished(job)


@pytest.mark.parametrize("tries", [TWICE, pytest.param(TWICE_SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("job", [create, rotate], ids=lambda job: job.__name__)
def test_killed_again_in_the_run_that_finishes(home: Path, job: Job, tries: int) -> None:
    stage = stage_of(home, job)
    stage.reset()
    count = Kill()
    stage.run(job, count)
    chance = random.Random(20260102)
    for dummy in range(tries):
        stage.reset()
        for _run in range(2):
            stage.run(job, Kill(chance.randint(1, count.points)))
            if chance.random() < 0.5:
                stage.check()
        stage.check()
        stage.run(job, Kill())
        stage.finished(job)


@pytest.mark.parametrize("job", [create, rotate], ids=lambda job: job.__name__)
def test_real_sigkill(home: Path, job: Job) -> None:
    """The same with processes, so that the simulation is held against what it stands for."""
    stage = stage_of(home, job)
    stage.reset()
    count = Kill()
    stage.run(job, count)
    for point in range(1, count.points + 1, 3):
        stage.reset()
        pid = os.fork()
        if pid == 0:
            try:
                with Kill(point, lambda: os.kill(os.getpid(), signal.SIGKILL))():
                    job(stage.store, lambda: None)
            finally:
                os._exit(0)
        _pid, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        stage.note()
        stage.check()
        stage.run(job, Kill())
        stage.finished(job)


def test_a_secret_survives_kills_while_it_is_replaced(home: Path) -> None:
    """Either the old value or the new one opens, with a credential that is at hand; the second run finishes."""
    origin, home = home / "origin", home / "live"
    os.makedirs(origin / "secrets", 0o700)

    def file() -> SecretFile:
        return SecretFile(StateDirectory(str(home / "state")), str(home / "secrets" / "app.key"))

    def replace() -> None:
        opened, value = file().open(EVERY)
        if value != Secret("the new value"):
            file().create(Secret("the new value"), [NEW, RECOVERY], replace=opened.document)

    def reset() -> None:
        # The journal knows the file by its path: what is made at that path is copied back to it.
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(origin, home)

    reset()
    file().create(Secret("the old value"), [OLD, RECOVERY])
    shutil.rmtree(origin)
    shutil.copytree(home, origin)
    count = Kill()
    with count():
        replace()
    for point in range(1, count.points + 1):
        reset()
        with Kill(point)():
            replace()
        assert file().open(EVERY)[1].text() in ("the old value", "the new value")
        replace()
        opened, value = file().open([NEW])
        assert value.text() == "the new value"
        assert opened.document.generation == 2
        assert os.listdir(home / "secrets") == ["app.key"]
        for content in home.rglob("*"):
            assert content.is_dir() or b" value" not in content.read_bytes()
