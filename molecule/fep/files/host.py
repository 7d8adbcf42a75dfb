#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The scenario's private openCryptoki and the stand-in's programs: host.py up|down FOLDER

``up`` builds the programs, and leaves a process behind that keeps the daemon in a mount namespace; FOLDER/python runs
this interpreter inside it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import fep, support


def up(folder: Path) -> None:
    """Start it; a second time it is there."""
    (folder / "tree").unlink(missing_ok=True)
    (folder / "tree").symlink_to(fep.tree())
    pids = folder / "host.pid"
    if pids.exists():
        return
    if os.fork() == 0:
        os.setsid()
        with open(os.devnull, "r+b") as nowhere:
            for number in range(3):
                os.dup2(nowhere.fileno(), number)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        with fep.TokenHost(support.OpenCryptoki(folder / "opencryptoki")) as host:
            new = folder / "host.pid.new"
            new.write_text(f"{os.getpid()} {host.pid}\n")
            new.rename(pids)
            signal.sigwait([signal.SIGTERM])
        os._exit(0)
    deadline = time.monotonic() + 20
    while not pids.exists():
        if time.monotonic() > deadline:
            sys.exit("the private openCryptoki did not start")
        time.sleep(0.05)
    inside = int(pids.read_text().split()[1])
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec nsenter --target={inside} --mount --ipc -- {sys.executable} "$@"\n')
    python.chmod(0o755)


def down(folder: Path) -> None:
    """End it, by the ids that it wrote down."""
    pids = folder / "host.pid"
    if pids.exists():
        keeper = int(pids.read_text().split()[0])
        if b"host.py" in Path(f"/proc/{keeper}/cmdline").read_bytes() if Path(f"/proc/{keeper}").exists() else False:
            os.kill(keeper, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while Path(f"/proc/{keeper}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        pids.unlink()


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]](Path(sys.argv[2]))
