# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""File systems for tests, made and mounted by the system's own programs, and always unmounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import typing as t
from pathlib import Path

ENCRYPT = ("mkfs.ext4", "-q", "-F", "-O", "encrypt", "-b", "4096", "-E", "nodiscard")
PLAIN = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard")
XFS = ("mkfs.xfs", "-q", "-f")
BTRFS = ("mkfs.btrfs", "-q", "-f")


def run(*argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(one) for one in argv], capture_output=True, text=True, check=check, timeout=60)


def unmount(point: Path) -> None:
    """Unmount all that is mounted at a directory; in the way of nothing, even if something is still open."""
    while point.is_mount():
        if run("umount", point, check=False).returncode:
            run("umount", "-l", point)


def reboot(point: Path) -> None:
    """Unmount as a reboot does: the kernel's keys are gone, too.

    A mount name space that another test made meanwhile has a copy of the mount and holds the file system, with its keys, as long as
    that test lasts.
    """
    device = os.stat(point).st_dev
    living = Path(f"/sys/fs/ext4/{Path(f'/sys/dev/block/{os.major(device)}:{os.minor(device)}').resolve().name}")
    run("umount", point)
    deadline = time.monotonic() + 60
    while living.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"another mount name space holds {point}")
        time.sleep(0.05)


def make(image: Path, mkfs: t.Sequence[str] = ENCRYPT, mebibytes: int = 48) -> Path:
    """A file with a file system."""
    if not shutil.which(mkfs[0], path="/usr/sbin:/sbin:/usr/bin:/bin"):
        raise AssertionError(f"{mkfs[0]} is not installed; the tests need e2fsprogs, xfsprogs and btrfs-progs")
    with open(image, "wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, mebibytes << 20)
    image.chmod(0o600)
    run(*mkfs, image)
    return image


@contextlib.contextmanager
def mounted(home: Path, mkfs: t.Sequence[str] = ENCRYPT, mebibytes: int = 48, name: str = "fs") -> t.Iterator[Path]:
    """A new file system in an image under ``home``, mounted beside it."""
    image = make(home / f"{name}.img", mkfs, mebibytes)
    point = home / name
    point.mkdir()
    try:
        run("mount", "-o", "loop", image, point)
        yield point
    finally:
        unmount(point)
        image.unlink()


@contextlib.contextmanager
def mounted_virtual(point: Path, *argv: str) -> t.Iterator[Path]:
    """A file system without a device: ``argv`` as for mount(8)."""
    point.mkdir()
    try:
        run("mount", *argv, "none", point)
        yield point
    finally:
        unmount(point)


def overlay(home: Path, over: Path, name: str = "overlay") -> t.ContextManager[Path]:
    """An overlay whose upper layer lies on the file system at ``over``."""
    layers = [over / f"{name}-{layer}" for layer in ("lower", "upper", "work")]
    for layer in layers:
        layer.mkdir()
    lower, upper, work = layers
    return mounted_virtual(home / name, "-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}")
