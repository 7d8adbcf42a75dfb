# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folder above the places, on real images: made, grown, found again, ended in between, and never over something foreign."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common import plan as plans
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Plan
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt, image, image_acts, loops
from ansible_collections.hsm.tde.plugins.module_utils.storage.control import CONTROL_NAME
from ansible_collections.hsm.tde.plugins.module_utils.storage.image import StorageWish
from ansible_collections.hsm.tde.tests.integration import filesystems
from ansible_collections.hsm.tde.tests.integration.support import in_child

pytestmark = pytest.mark.root

MIB = 1 << 20
NOBODY = 65534
#: capabilities(7), linux/capability.h: CAP_SYS_RESOURCE.
CAN_GROW_ONLINE = 1 << 24


@dataclasses.dataclass
class Storage:
    """A wish, carried out as an engine does."""

    wish: StorageWish

    @property
    def point(self) -> Path:
        return Path(self.wish.mount_point)

    @property
    def file(self) -> Path:
        assert self.wish.image
        return Path(self.wish.image)

    def plan(self, *, known: bool = False) -> Plan:
        return image.plan(self.wish, image_acts.inspect(self.wish), known=known)

    def actions(self, *, known: bool = False) -> list[str]:
        return [step.action for step in self.plan(known=known)]

    def run(self, *, known: bool = False, steps: int | None = None) -> list[str]:
        steps_ = self.plan(known=known)[:steps]
        plans.run(steps_, image_acts.handlers(self.wish))
        return [step.action for step in steps_]

    def resized(self, size: int) -> Storage:
        return Storage(self.wish._replace(size=size))

    def unmount(self) -> None:
        filesystems.unmount(self.point)


@pytest.fixture
def storage(tmp_path: Path) -> t.Iterator[Storage]:
    """Nothing yet: an image of 64 MiB and a mount point are wished for."""
    if os.geteuid() != 0:
        pytest.skip("needs root: loop devices and mounts")
    made = Storage(image.storage_wish(str(tmp_path / "srv/tde"), str(tmp_path / "images/a.img"), "64M"))
    try:
        yield made
    finally:
        made.unmount()


def code(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def digest(path: Path) -> str:
    """Of the beginning, where every file system has its first block."""
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.read(4 * MIB)).hexdigest()


def usable(storage: Storage) -> None:
    """The folder is root's, encrypts, and a place in it works."""
    info = storage.point.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (0, 0, 0o755)
    assert storage.point.is_mount()
    key = os.urandom(64)
    identifier = fscrypt.add_key(str(storage.point), key)
    place = storage.point / f"place-{identifier}"
    place.mkdir()
    assert fscrypt.set_policy(str(place), identifier)
    (place / "file").write_text("x")
    assert (storage.point / CONTROL_NAME).stat().st_size > 60000
    assert storage.actions() == []
    assert storage.actions(known=True) == []


def test_made_from_nothing_and_met_the_second_time(storage: Storage) -> None:
    assert storage.run() == ["create_image", "make_mount_point", "mount_image", "prepare_root"]
    usable(storage)
    info = storage.file.stat()
    assert (info.st_uid, info.st_mode & 0o777, info.st_size, info.st_nlink) == (0, 0o600, 64 * MIB, 1)
    # All space is taken: a full host disk must not become a write error inside.
    assert info.st_blocks * 512 >= 64 * MIB
    assert os.listdir(storage.file.parent) == ["a.img"]
    options = filesystems.run("findmnt", "-no", "OPTIONS", storage.point).stdout
    assert "nosuid" in options
    assert "nodev" in options
    assert "noinit_itable" in options  # the kernel would punch holes into the image
    state = image_acts.inspect(storage.wish)
    assert image.facts(storage.wish, state) == {
        "mount_point": {"path": str(storage.point), "owner": 0, "mode": "0755"},
        "image": {"path": str(storage.file), "size": 64 * MIB, "mounted": True},
    }


def test_after_a_restart_it_is_mounted_again(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    assert storage.run(known=True) == ["mount_image", "prepare_root"]
    usable(storage)


def test_what_is_remembered_and_gone_is_not_made_anew(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    storage.file.rename(storage.file.with_name("away"))
    assert code(lambda: storage.run(known=True)) == "image_absent"
    assert os.listdir(storage.file.parent) == ["away"]
    assert not storage.point.is_mount()


def test_while_it_is_not_mounted_nobody_else_can_write_there(storage: Storage) -> None:
    storage.point.mkdir(parents=True)
    os.chown(storage.point, NOBODY, NOBODY)
    storage.point.chmod(0o777)
    assert "secure_mount_point" in storage.run()
    storage.unmount()
    info = storage.point.stat()
    assert (info.st_uid, info.st_mode & 0o7777) == (0, 0o755)

    def write() -> str:
        try:
            os.mkdir("plain")
        except PermissionError:
            return "refused"
        return "written"

    def nobody() -> None:
        os.chdir(storage.point)
        os.setuid(NOBODY)

    assert in_child(write, before=nobody) == "refused"


def test_a_root_directory_that_somebody_took_is_taken_back(storage: Storage) -> None:
    storage.run()
    os.chown(storage.point, NOBODY, 0)
    storage.point.chmod(0o775)
    assert storage.run() == ["prepare_root"]
    usable(storage)


def test_files_under_the_mount_point_are_not_hidden(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    (storage.point / "PG_15_202209061").mkdir()
    with pytest.raises(TdeError, match="files in the clear") as caught:
        storage.run(known=True)
    assert caught.value.code == "mount_point_not_empty"
    assert not storage.point.is_mount()


@pytest.mark.parametrize("owner", ["image", "mount_point"])
def test_a_parent_that_others_can_write_to(storage: Storage, owner: str, tmp_path: Path) -> None:
    parent = (storage.file if owner == "image" else storage.point).parent
    parent.mkdir(parents=True)
    os.chown(parent, NOBODY, NOBODY)
    assert code(storage.plan) == "file_not_private"
    assert not storage.file.exists()
    assert not storage.point.exists()


def fill(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)


@pytest.mark.parametrize("kind", ["blank", "text", "xfs", "ext4", "ext4 of another"])
def test_what_is_foreign_is_never_formatted(storage: Storage, kind: str) -> None:
    fill(storage.file, b"my thesis\n" * 1000 if kind == "text" else b"")
    if kind == "blank":
        os.truncate(storage.file, 64 * MIB)
    elif kind == "xfs":
        filesystems.make(storage.file, filesystems.XFS, 320)
    elif kind == "ext4":
        filesystems.make(storage.file, filesystems.PLAIN, 64)
    elif kind == "ext4 of another":
        filesystems.make(storage.file, (*filesystems.ENCRYPT, "-L", "theirs"), 64)
    before = digest(storage.file)
    assert code(storage.run) == "image_foreign"
    assert digest(storage.file) == before
    assert os.listdir(storage.file.parent) == ["a.img"]
    assert not storage.point.exists()


def test_one_that_is_handed_over_by_its_label_is_used_as_it_is(storage: Storage) -> None:
    storage.file.parent.mkdir()
    filesystems.make(storage.file, filesystems.ENCRYPT, 64)
    with pytest.raises(TdeError) as caught:
        storage.run()
    filesystems.run(*caught.value.next_step.split("hand it over: ")[1].rstrip(".").split(" "))
    assert storage.run() == ["make_mount_point", "mount_image", "prepare_root"]
    usable(storage)


def test_an_image_that_appears_meanwhile_is_left_alone(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def late(fd: int, start: int, length: int) -> None:
        fill(storage.file, b"theirs")
        allocate(fd, start, length)

    monkeypatch.setattr(os, "posix_fallocate", late)
    assert code(storage.run) == "image_foreign"
    assert storage.file.read_bytes() == b"theirs"
    assert os.listdir(storage.file.parent) == ["a.img"]


def test_an_image_that_others_can_read(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    storage.file.chmod(0o644)
    assert code(storage.run) == "image_not_private"


def test_grown_on_request_and_never_shrunk(storage: Storage) -> None:
    storage.run()
    (storage.point / "data").write_bytes(b"kept" * 1000)
    larger = storage.resized(128 * MIB)
    with open("/proc/self/status", encoding="ascii") as handle:
        capabilities = next(int(line.split()[1], 16) for line in handle if line.startswith("CapEff"))
    assert larger.actions() == ["extend_image", "resize_filesystem"]
    if capabilities & CAN_GROW_ONLINE:
        larger.run()
    else:
        with pytest.raises(TdeError, match="unmount the image and run again") as caught:
            larger.run()
        assert caught.value.code == "resize_refused"
        assert (storage.point / "data").read_bytes() == b"kept" * 1000
        larger.unmount()
        assert larger.run() == ["resize_filesystem", "mount_image", "prepare_root"]
    room = os.statvfs(storage.point)
    assert room.f_blocks * room.f_frsize > 100 * MIB
    assert storage.file.stat().st_blocks * 512 >= 128 * MIB
    assert (storage.point / "data").read_bytes() == b"kept" * 1000
    usable(larger)
    assert Storage(storage.wish._replace(size=None)).actions() == []
    assert code(storage.run) == "image_shrink"
    assert storage.file.stat().st_size == 128 * MIB


@pytest.mark.parametrize("size", [80, 100, 129, 130, 257, 300])
def test_a_grown_file_system_of_any_size_is_grown_for_good(storage: Storage, size: int) -> None:
    storage.run()
    storage.unmount()
    larger = storage.resized(size * MIB)
    assert larger.run() == ["extend_image", "resize_filesystem", "mount_image", "prepare_root"]
    assert larger.actions() == []


@pytest.mark.parametrize("host", ["tmpfs", "ext4"])
def test_disk_full_is_clean(tmp_path: Path, host: str) -> None:
    # ext4 gives what it has and then fails, tmpfs all or nothing.
    small: t.ContextManager[Path]
    if host == "tmpfs":
        small = filesystems.mounted_virtual(tmp_path / "small", "-t", "tmpfs", "-o", "size=60M,mode=755")
    else:
        small = filesystems.mounted(tmp_path, filesystems.PLAIN, 64, "small")
    with small as folder:
        before = os.listdir(folder)
        storage = Storage(image.storage_wish(str(tmp_path / "tde"), str(folder / "a.img"), "128M"))
        assert code(storage.plan) == "disk_full"
        # The act itself, when the room went after the plan was made.
        act = image_acts.handlers(storage.wish)["create_image"]
        full = code(lambda: act(plans.Step("create_image", str(storage.file), "", {"size": 128 * MIB})))
        assert full == "disk_full"
        assert os.listdir(folder) == before
        storage = storage.resized(32 * MIB)
        storage.run()
        try:
            (storage.point / "data").write_bytes(b"kept")
            assert code(storage.resized(128 * MIB).plan) == "disk_full"
            act = image_acts.handlers(storage.wish)["extend_image"]
            full = code(lambda: act(plans.Step("extend_image", str(storage.file), "", {"size": 128 * MIB})))
            assert full == "disk_full"
            assert storage.file.stat().st_size == 32 * MIB
            assert storage.actions() == []
            assert (storage.point / "data").read_bytes() == b"kept"
        finally:
            storage.unmount()


def test_another_file_system_at_the_mount_point(storage: Storage, tmp_path: Path) -> None:
    storage.point.parent.mkdir()
    with filesystems.mounted_virtual(storage.point, "-t", "tmpfs", "-o", "mode=755"):
        assert code(storage.run) == "mount_point_taken"
    assert not storage.file.exists()


def test_mounted_at_another_place(storage: Storage, tmp_path: Path) -> None:
    storage.run()
    storage.unmount()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    filesystems.run("mount", "-o", "loop", storage.file, elsewhere)
    try:
        assert code(storage.run) == "mounted_elsewhere"
    finally:
        filesystems.unmount(elsewhere)


def test_mounted_read_only(storage: Storage) -> None:
    storage.run()
    filesystems.run("mount", "-o", "remount,ro", storage.point)
    assert code(storage.run) == "mounted_read_only"


def test_a_loop_device_that_is_there_is_used(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    node = filesystems.run("losetup", "--find", "--show", "--nooverlap", storage.file).stdout.strip()
    try:
        assert storage.run() == ["mount_image", "prepare_root"]
        usable(storage)
        assert filesystems.run("findmnt", "-no", "SOURCE", storage.point).stdout.strip() == node
    finally:
        storage.unmount()
        filesystems.run("losetup", "-d", node)


def test_ended_after_each_step(storage: Storage) -> None:
    for steps in range(4):
        storage.run(steps=steps)
        storage.run()
        usable(storage)
        storage.unmount()
        storage.file.unlink()
        storage.point.rmdir()


def test_ended_between_the_growth_of_the_file_and_of_the_file_system(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    larger = storage.resized(128 * MIB)
    assert larger.run(steps=1) == ["extend_image"]
    assert storage.resized(128 * MIB).run() == ["resize_filesystem", "mount_image", "prepare_root"]
    usable(larger)


def test_killed_at_any_moment(storage: Storage) -> None:
    """SIGKILL while it is made: the second run ends with the wish and nothing is left over."""
    rng = random.Random(7)
    seen = set()
    for dummy in range(12):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                storage.run()
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.05)  # mkfs, its child, ends by itself
        steps = storage.run()
        seen.add(tuple(steps))
        usable(storage)
        assert os.listdir(storage.file.parent) == ["a.img"]
        storage.unmount()
        storage.file.unlink()
        storage.point.rmdir()
    assert len(seen) > 1, "every kill met the same state; choose other moments"


def devices(storage: Storage) -> list[str]:
    return filesystems.run("losetup", "-nO", "NAME", "-j", storage.file).stdout.split()


def assert_freed(storage: Storage) -> None:
    """At once, but for programs that ask all devices whose they are."""
    deadline = time.monotonic() + 3
    while devices(storage):
        assert time.monotonic() < deadline, devices(storage)
        time.sleep(0.02)


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_loop_device_goes_with_its_last_user(storage: Storage, monkeypatch: pytest.MonkeyPatch, old_kernel: bool) -> None:
    if old_kernel:
        monkeypatch.setattr(loops, "_LOOP_CONFIGURE", 0x4CFF)  # a number that no kernel knows
    storage.run()
    assert len(devices(storage)) == 1
    storage.unmount()
    assert_freed(storage)
    with loops.attach(str(storage.file)) as held, loops.attach(str(storage.file)) as again:
        assert held.loop == again.loop
        assert devices(storage) == [held.loop.node]
    assert_freed(storage)


def test_a_loop_device_cannot_become_anothers_between_look_and_use(storage: Storage, tmp_path: Path) -> None:
    """Its mount goes away after it was looked at; the kernel would give the number to the next one who asks."""
    storage.run()
    other = filesystems.make(tmp_path / "other.img", filesystems.PLAIN, 32)
    with loops.attached(str(storage.file)) as (held,):
        storage.unmount()
        taken = filesystems.run("losetup", "--find", "--show", other).stdout.strip()
        try:
            assert taken != held.loop.node
            with loops.attached(str(storage.file)) as (still,):
                assert still.loop == held.loop
        finally:
            filesystems.run("losetup", "-d", taken)


def test_growth_fills_the_holes_that_it_punched(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    larger = storage.resized(128 * MIB)
    larger.run(steps=1)
    filesystems.run("fallocate", "--punch-hole", "-o", str(100 * MIB), "-l", str(8 * MIB), storage.file)
    assert storage.file.stat().st_blocks * 512 < 128 * MIB
    larger.run()
    assert storage.file.stat().st_blocks * 512 >= 128 * MIB


def test_the_mount_of_a_run_that_was_ended_came_first(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    steps = storage.plan()
    storage.run()
    plans.run(steps, image_acts.handlers(storage.wish))
    assert len(filesystems.run("findmnt", "-no", "TARGET", storage.point).stdout.split()) == 1
    usable(storage)


def test_growth_while_another_program_has_the_device(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As resize2fs of a run that was ended: two must not write at once."""
    storage.run()
    storage.unmount()
    larger = storage.resized(128 * MIB)
    larger.run(steps=1)
    monkeypatch.setattr(image_acts, "_WAIT_SECONDS", 0.0)
    with loops.attach(str(storage.file)) as held:
        fd = os.open(held.loop.node, os.O_RDWR | os.O_EXCL)
        assert code(larger.run) == "resize_refused"
        os.close(fd)
    larger.run()
    usable(larger)


def test_two_names_left_by_a_kill(storage: Storage) -> None:
    storage.run()
    storage.unmount()
    os.link(storage.file, storage.file.with_name(".a.img.hsm-tde.new"))
    assert storage.run() == ["remove_leftover", "mount_image", "prepare_root"]
    usable(storage)


def test_a_directory_of_the_host(encrypted_mount: Path, tmp_path: Path) -> None:
    storage = Storage(image.storage_wish(str(encrypted_mount / "tde")))
    assert storage.run() == ["make_mount_point", "write_control"]
    assert storage.actions() == []
    (storage.point / "place").mkdir()
    assert storage.actions(known=True) == []
    os.chown(storage.point, NOBODY, 0)
    assert code(storage.run) == "mount_point_unsafe"
    assert storage.point.stat().st_uid == NOBODY
    with filesystems.mounted(tmp_path, filesystems.PLAIN, name="plain") as plain:
        plainly = Storage(image.storage_wish(str(plain / "a/b")))
        with pytest.raises(TdeError, match="tune2fs -O encrypt") as caught:
            plainly.run()
        assert caught.value.code == "fscrypt_unsupported"
        assert not (plain / "a").exists()
    assert code(lambda: Storage(image.storage_wish(str(encrypted_mount / "gone"))).run(known=True)) == "mount_point_absent"
