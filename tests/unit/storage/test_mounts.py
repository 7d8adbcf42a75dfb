# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""mountinfo as the kernel writes it, and devices under devices in a made-up sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.storage import mounts
from hypothesis import example, given, settings
from hypothesis import strategies as st

#: proc_pid_mountinfo(5)'s own example, one with two optional fields, and one without any.
EXAMPLES = r"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
40 35 7:0 / /srv/my\040image rw,nosuid,nodev shared:3 master:2 - ext4 /dev/loop0 rw
41 35 0:40 / /srv/a\134b\011c ro - tmpfs none rw
"""

PATHS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)


def escape(text: str) -> str:
    """As the kernel's mangle(): octal for space, tab, newline, backslash and hash."""
    return "".join(f"\\{ord(one):03o}" if one in " \t\n\\#" else one for one in text)


def test_examples() -> None:
    first, second, third = mounts.parse(EXAMPLES)
    assert first == mounts.Mount(
        36, 35, (98, 0), "/mnt1", "/mnt2", ("rw", "noatime"), "ext3", "/dev/root", ("rw", "errors=continue")
    )
    assert (second.mount_point, second.device, second.source, second.read_only) == ("/srv/my image", (7, 0), "/dev/loop0", False)
    assert (third.mount_point, third.read_only) == ("/srv/a\\b\tc", True)


@example("-", "-", "-", ["shared:1"])
@settings(deadline=None)
@given(PATHS, PATHS, PATHS, st.lists(st.sampled_from(["shared:1", "master:2", "unbindable"]), max_size=3))
def test_any_name_survives(root: str, mount_point: str, source: str, optional: list[str]) -> None:
    fields = ["1 2 3:4", escape(root), escape(mount_point), "rw", *optional]
    line = " ".join(fields) + f" - ext4 {escape(source)} rw\n"
    (mount,) = mounts.parse(line)
    assert (mount.root, mount.mount_point, mount.source) == (root, mount_point, source)


@pytest.mark.parametrize(
    "line", ["nonsense", "36 35 98:0 /a /b rw", "x 35 98:0 / /b rw - ext4 a rw", "36 35 98 / /b rw - ext4 a rw"]
)
def test_a_line_not_understood_is_no_empty_answer(line: str) -> None:
    with pytest.raises(TdeError, match="not understood") as caught:
        mounts.parse(f"{EXAMPLES}{line}\n")
    assert caught.value.code == "mount_table_unreadable"


def test_the_kernels_own_table_is_understood() -> None:
    found = mounts.mount_of("/")
    assert found.mount_point == "/"
    assert found in mounts.mounts()


def test_mount_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TdeError) as caught:
        mounts.mount_of(str(tmp_path / "none"))
    assert caught.value.code == "file_absent"
    assert mounts.mounted_at(str(tmp_path / "none")) is None
    assert mounts.mounted_at(str(tmp_path)) is None


class Sysfs:
    """A made-up /sys with block devices."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)

    def add(self, name: str, number: str, *slaves: str, under: str = "", **files: str) -> None:
        folder = self.root / "devices" / under / name
        (folder / "slaves").mkdir(parents=True)
        (folder / "uevent").write_text(f"MAJOR=0\nDEVNAME={name}\n")
        (folder / "dev").write_text(f"{number}\n")
        for slave in slaves:
            (folder / "slaves" / slave).symlink_to(next((self.root / "devices").rglob(slave)))
        for file, content in files.items():
            path = folder / file.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content + "\n")
        (self.root / "dev/block" / number).symlink_to(folder)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


def test_a_partition_has_its_disk_and_no_crypt(sysfs: Sysfs) -> None:
    sysfs.add("sda", "8:0")
    sysfs.add("sda1", "8:1", under="sda", partition="1")
    found = mounts.device_layers((8, 1), str(sysfs.root))
    assert (found.node, found.layers, found.crypt) == ("/dev/sda1", ("/dev/sda1", "/dev/sda"), None)


def test_a_mirror_with_one_leg_in_the_clear_is_not_encrypted(sysfs: Sysfs) -> None:
    for disk, number in (("sda", "8:0"), ("sdb", "8:16")):
        sysfs.add(disk, number)
    sysfs.add("dm-0", "253:0", "sda", dm__uuid="CRYPT-LUKS2-0123-luks")
    sysfs.add("dm-1", "253:1", "sdb", dm__uuid="CRYPT-LUKS2-4567-luks")
    sysfs.add("md0", "9:0", "dm-0", "sdb")
    sysfs.add("md1", "9:1", "dm-0", "dm-1")
    half, both = (mounts.device_layers((9, minor), str(sysfs.root)) for minor in (0, 1))
    assert (half.crypt, half.crypt_whole) == ("/dev/dm-0", False)
    assert (both.crypt, both.crypt_whole) == ("/dev/dm-0", True)


def test_dm_crypt_is_seen_through_lvm_and_partitions(sysfs: Sysfs) -> None:
    sysfs.add("sda", "8:0")
    sysfs.add("sda2", "8:2", under="sda", partition="1")
    sysfs.add("dm-0", "253:0", "sda2", dm__uuid="CRYPT-LUKS2-0123-luks")
    sysfs.add("dm-1", "253:1", "dm-0", dm__uuid="LVM-abc")
    found = mounts.device_layers((253, 1), str(sysfs.root))
    assert found.layers == ("/dev/dm-1", "/dev/dm-0 (dm-crypt)", "/dev/sda2", "/dev/sda")
    assert found.crypt == "/dev/dm-0"


def test_a_partition_on_dm_crypt(sysfs: Sysfs) -> None:
    sysfs.add("sdb", "8:16")
    sysfs.add("dm-0", "253:0", "sdb", dm__uuid="CRYPT-PLAIN-x")
    sysfs.add("dm-0p1", "253:9", under="dm-0", partition="1")
    assert mounts.device_layers((253, 9), str(sysfs.root)).crypt == "/dev/dm-0"


def test_a_loop_names_its_file_even_when_that_is_gone(sysfs: Sysfs) -> None:
    sysfs.add("loop3", "7:3", loop__backing_file="/nowhere/x.img (deleted)")
    assert mounts.device_layers((7, 3), str(sysfs.root)).layers == ("/dev/loop3 (loop on /nowhere/x.img (deleted))",)


def test_a_loop_on_a_loop_of_itself_ends(sysfs: Sysfs, tmp_path: Path) -> None:
    status = os.stat(tmp_path)
    number = (os.major(status.st_dev), os.minor(status.st_dev))
    sysfs.add("loop9", f"{number[0]}:{number[1]}", loop__backing_file=str(tmp_path))
    assert mounts.device_layers(number, str(sysfs.root)).crypt is None


def test_a_device_that_sysfs_does_not_know(sysfs: Sysfs) -> None:
    found = mounts.device_layers((9, 9), str(sysfs.root))
    assert found.node is None
    assert "9:9" in found.reason
