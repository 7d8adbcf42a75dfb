# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a benchmark works as root: a folder of its own on the disk, of which nothing is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

from keys import ROOT

#: The role prerequisites asks for a path that only root can change; a folder of temporary files is often in memory.
ABOVE = "/var/lib"
#: Of the working copy, what the collection is for a benchmark.
PARTS = ("meta", "playbooks", "plugins", "roles", "tests")


@contextlib.contextmanager
def place() -> t.Iterator[Path]:
    """A folder on the disk with a copy of the collection, importable: an edit meanwhile is no change that a run must make.

    On every exit, Ctrl-C and SIGTERM too, it is removed with the servers, mounts and loop devices that lie in it.
    """
    if os.geteuid() != 0:
        sys.exit("this benchmark mounts images and needs root")
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(128 + signal.SIGTERM))
    home = Path(tempfile.mkdtemp(prefix="hsm-tde-bench.", dir=ABOVE))
    home.chmod(0o755)  # the server's user must pass through
    try:
        for part in PARTS:
            shutil.copytree(ROOT / part, copy(home) / part, ignore=shutil.ignore_patterns("__pycache__", "output"))
        sys.path.insert(0, str(home / "collections"))
        yield home
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        clear(home)


def copy(home: Path) -> Path:
    """Where the copy of the collection is."""
    return home / "collections" / "ansible_collections" / "hsm" / "tde"


def clear(home: Path, seconds: float = 20) -> None:
    """Stop, unmount, detach and remove all in a folder; what still uses it gets some seconds to end."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(FileNotFoundError):
        server = int((home / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(server, signal.SIGQUIT)
        while os.path.exists(f"/proc/{server}") and time.monotonic() < deadline:
            time.sleep(0.1)
    while (busy := mounts(home)) and time.monotonic() < deadline:
        for mount in busy:
            subprocess.run(["umount", mount], check=False, capture_output=True)
        time.sleep(0.1)
    if busy:
        sys.exit(f"left behind, because they are in use: {', '.join(busy)}")
    listed = subprocess.run(["losetup", "-n", "-O", "NAME,BACK-FILE"], check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        device, _space, backing = line.partition(" ")
        if backing.strip().startswith(f"{home}/"):
            subprocess.run(["losetup", "--detach", device], check=False)
    shutil.rmtree(home)


def mounts(home: Path) -> list[str]:
    """What is mounted in a folder, the innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [mount for mount in (line.split()[1] for line in reversed(lines)) if mount.startswith(f"{home}/")]
