# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Folders of tests, which a test that is killed leaves behind with mounts, loop devices and servers: the next one takes them away.

A folder is in use as long as somebody holds the lock of a file in it: the test, or a process that it has forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import filesystems

_LOCK = ".in-use"
_SHARED_MEMORY = Path("/dev/shm")
#: Seconds within which a segment may belong to a server that is just starting.
_YOUNG = 5.0


@contextlib.contextmanager
def folder(prefix: str, parent: str | None = None) -> t.Iterator[Path]:
    """A folder that other users may pass through, gone at the end with everything that goes on in it.

    :param prefix: of its name; folders of this name that nobody uses any more go first.
    """
    for old in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        clear(old)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    segments = _segments()
    with _claimed(path):
        try:
            yield path
        finally:
            empty(path)
            _remove_segments(_segments() - segments)
            shutil.rmtree(path)


@contextlib.contextmanager
def _claimed(path: Path) -> t.Iterator[None]:
    """Locked before it has the name by which it is looked for."""
    new = path / f"{_LOCK}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        new.rename(path / _LOCK)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def alone(lock: Path) -> t.Iterator[None]:
    """Hold a lock of its own file, which nobody else may hold."""
    fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        assert _locked(fd), f"the same tests are at work: {lock} is locked"
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def clear(path: Path) -> None:
    """Take away a folder that a killed test left; one that is in use, or none of :func:`folder`, stays."""
    try:
        fd = os.open(path / _LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _locked(fd):
            empty(path)
            shutil.rmtree(path)
    finally:
        os.close(fd)


def empty(path: Path) -> None:
    """End the processes that work in a folder, unmount what is mounted there, detach its images."""
    for pid in working_in(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while working_in(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    for point in reversed(mounts(path)):
        filesystems.unmount(Path(point))
    devices = subprocess.run(["losetup", "-nlO", "NAME,BACK-FILE"], check=True, capture_output=True, text=True).stdout
    for line in devices.splitlines():
        device, dummy, image = line.partition(" ")
        if Path(image.strip()).is_relative_to(path):
            # Somebody else may hold it for a moment; then the kernel takes it away afterwards.
            subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


def mounts(path: Path) -> list[str]:
    """What is mounted below a folder, in the order of mounting."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(path)]


def working_in(path: Path) -> list[int]:
    """Processes whose working directory is in a folder: a server's is its data directory."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(entry) != os.getpid() and Path(os.readlink(f"/proc/{entry}/cwd")).is_relative_to(path):
                found.append(int(entry))
    return found


def _segments() -> set[Path]:
    """PostgreSQL's shared memory, which a killed server or initdb leaves."""
    return set(_SHARED_MEMORY.glob("PostgreSQL.*"))


def _remove_segments(segments: set[Path]) -> None:
    """Remove those that no process uses any more, nor is about to."""
    used = ""
    for entry in os.listdir("/proc") if segments else ():
        with contextlib.suppress(OSError):
            if entry.isdigit():
                used += Path("/proc", entry, "maps").read_text()
    for segment in segments:
        with contextlib.suppress(FileNotFoundError):
            if f"{segment}\n" not in used and time.time() - segment.stat().st_mtime > _YOUNG:
                segment.unlink()
