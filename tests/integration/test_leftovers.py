# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a killed test leaves, the next one takes away."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.tests.integration import filesystems, leftovers

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loop devices and mounts")]


def begin(parent: Path) -> tuple[int, Path]:
    """Another test at work: a file system is mounted in its folder, and a program works on it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with leftovers.folder("leftover.", str(parent)) as path:
                filesystems.run("mount", "-o", "loop", filesystems.make(path / "image", mebibytes=16), mounted(path))
                subprocess.Popen(["sleep", "60"], cwd=path / "mnt", stdin=subprocess.DEVNULL)
                os.write(writer, str(path).encode())
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    path = Path(os.read(reader, 4096).decode())
    os.close(reader)
    return pid, path


def mounted(path: Path) -> Path:
    (path / "mnt").mkdir()
    return path / "mnt"


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_is_in_use_stays_and_what_was_left_goes(tmp_path: Path) -> None:
    pid, path = begin(tmp_path)
    try:
        assert leftovers.mounts(path) == [str(path / "mnt")]
        with leftovers.folder("leftover.", str(tmp_path)) as other:
            assert leftovers.mounts(path), "it was in use"
        assert not other.exists()
    finally:
        end(pid)
    assert leftovers.mounts(path)
    with leftovers.folder("leftover.", str(tmp_path)):
        assert not path.exists()
        assert leftovers.mounts(tmp_path) == []
        assert leftovers.working_in(tmp_path) == []


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    foreign = tmp_path / "leftover.foreign"
    foreign.mkdir()
    with leftovers.folder("leftover.", str(tmp_path)):
        assert foreign.exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    def second() -> None:
        with leftovers.alone(tmp_path / "lock"):
            pass

    with leftovers.alone(tmp_path / "lock"), pytest.raises(AssertionError):
        second()
    second()
