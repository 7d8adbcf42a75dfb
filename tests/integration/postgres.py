# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Private PostgreSQL servers for tests: a data directory, a socket folder and no TCP port each."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import leftovers

USER = "postgres"


def programs() -> str | None:
    """The newest PostgreSQL's folder of programs on this host."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(re.findall(r"\d+", path)[0]))
    return found[-1] if found else None


def as_postgres(*argv: str, check: bool = True, timeout: float = 60, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program as the user postgres."""
    user = pwd.getpwnam(USER)
    done = subprocess.run(
        argv, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", input=stdin, timeout=timeout, check=False,
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done


@contextlib.contextmanager
def folder() -> t.Iterator[Path]:
    """A folder that other users may pass through, which pytest's own is not."""
    with leftovers.folder("hsm-tde-test.") as path:
        yield path


class Server:
    """A private server.

    :ivar data: its data directory; :ivar socket: the folder of its socket.
    """

    def __init__(self, home: Path, data: Path | None = None) -> None:
        self.bin = programs()
        assert self.bin, "PostgreSQL is not installed"
        self.home = home
        self.data = data or home / "data"
        self.socket = home / "socket"
        self.log = home / "log"
        for path in (self.socket, self.log):
            path.mkdir(exist_ok=True)
            shutil.chown(path, USER, USER)

    def run(self, *argv: str, **how: t.Any) -> subprocess.CompletedProcess[str]:
        """Run a program as the server's user, where the server is."""
        return as_postgres(*argv, **how)

    def initdb(self) -> None:
        """Create the data directory."""
        self.data.mkdir(exist_ok=True)
        shutil.chown(self.data, USER, USER)
        self.run(f"{self.bin}/initdb", "-D", str(self.data), "--no-sync", "-A", "peer", "-E", "UTF8", "--locale=C")

    def start(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Start it; :returns: the outcome of pg_ctl."""
        options = f"-k {self.socket} -c listen_addresses='' -c max_wal_size=128MB -c shared_buffers=16MB -c max_connections=40"
        log = self.log / "server.log"
        argv = [f"{self.bin}/pg_ctl", "-D", str(self.data), "-w", "-t", "20", "-l", str(log), "-o", options, "start"]
        done = self.run(*argv, check=False)
        assert not check or done.returncode == 0, f"{done.stdout}{done.stderr}{log.read_text()[-2000:]}"
        return done

    def stop(self) -> None:
        """Stop it if it runs."""
        self.run(f"{self.bin}/pg_ctl", "-D", str(self.data), "-w", "-m", "fast", "stop", check=False)

    def kill(self) -> None:
        """End the server without a shutdown."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        # The backends notice their parent's death and end by themselves.
        deadline = time.monotonic() + 10
        here = str(self.data.resolve())
        while os.path.exists(f"/proc/{pid}") or any(_cwd(entry) == here for entry in os.listdir("/proc") if entry.isdigit()):
            assert time.monotonic() < deadline, "backends outlive the postmaster"
            time.sleep(0.02)

    def psql(self, statement: str, database: str = "postgres", check: bool = True) -> str:
        """Run SQL, one row a line, columns parted by ``|``."""
        argv = [f"{self.bin}/psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", str(self.socket), "-d", database]
        done = self.run(*argv, stdin=statement, check=check)
        return (done.stdout if done.returncode == 0 else done.stderr).strip()

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """Start one of PostgreSQL's programs against the server, as postgres."""
        user = pwd.getpwnam(USER)
        return subprocess.Popen(
            [f"{self.bin}/{argv[0]}", "-h", str(self.socket), *argv[1:]],
            user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip

    def options(self, **more: t.Any) -> dict[str, t.Any]:
        """The connection options of a module."""
        return {"login_unix_socket": str(self.socket), **more}


def _cwd(entry: str) -> str:
    try:
        return os.readlink(f"/proc/{entry}/cwd")
    except OSError:
        return ""


@contextlib.contextmanager
def server(home: Path, start: bool = True) -> t.Iterator[Server]:
    """A running server in a folder."""
    made = Server(home)
    made.initdb()
    try:
        if start:
            made.start()
        yield made
    finally:
        made.stop()


def pgbench_failures(output: str) -> tuple[int, int]:
    """Transactions processed and failed, from pgbench's report."""
    done = re.search(r"number of transactions actually processed: (\d+)", output)
    failed = re.search(r"number of failed transactions: (\d+)", output)
    assert done, output
    assert failed, output
    return int(done[1]), int(failed[1])
