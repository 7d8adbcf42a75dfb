# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Servers of the stand-in for Fujitsu Enterprise Postgres (tests/standins/fep), which encrypts nothing.

A server of ``tde_z`` needs openCryptoki around it: :class:`TokenHost` keeps a private one running, and a server that is
given it runs inside.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import postgres, support

T = t.TypeVar("T")

STANDIN = support.ROOT / "tests/standins/fep"
#: Where the private tree is built: other users run its programs, so the folder is root's and no temporary one.
TREES = Path("/var/cache/hsm-tde-tests")

_MS_BIND = 4096


@functools.cache
def tree(major: int | None = None) -> Path:
    """The private tree of programs, built if its sources have changed; its ``bin`` is the engine's ``bin_directory``."""
    programs = postgres.programs()
    assert programs, "PostgreSQL is not installed"
    number = major or int(Path(programs).parent.name)
    TREES.mkdir(mode=0o755, exist_ok=True)
    built = TREES / f"fep-{number}"
    subprocess.run([str(STANDIN / "build"), str(built), str(number)], check=True, timeout=120)
    return built


class TokenHost:
    """A private openCryptoki whose daemon runs until :meth:`close`; user postgres is in its group.

    Enter it with ``with``; then :meth:`run` acts inside, and a :class:`FepServer` may run inside.
    """

    def __init__(self, opencryptoki: support.OpenCryptoki) -> None:
        self.opencryptoki = opencryptoki
        # PostgreSQL's and the token's shared memory are in the same private folder.
        (opencryptoki.home / "shm").chmod(0o1777)
        self._group = opencryptoki.home / "group"
        self.member(True)
        self.pid = 0

    def __enter__(self) -> TokenHost:
        ours, theirs = os.pipe()
        answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(theirs)
            os.close(answers)
            self._keep(ours, answer)
        os.close(ours)
        os.close(answer)
        self._commands, self._answers = theirs, answers
        self._heard()
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._commands)
        os.close(self._answers)
        os.waitpid(self.pid, 0)

    def member(self, yes: bool) -> None:
        """Have user postgres in group pkcs11, or not; the library reads the file at each start of its own."""
        lines = (_with_member(line) if yes else line for line in Path("/etc/group").read_text().splitlines())
        self._group.write_text("".join(f"{line}\n" for line in lines))

    def stop_daemon(self) -> None:
        """End pkcsslotd."""
        os.write(self._commands, b"-")
        self._heard()

    def start_daemon(self) -> None:
        """Start pkcsslotd again."""
        os.write(self._commands, b"+")
        self._heard()

    def enter(self) -> None:
        """Make the calling process see what is inside."""
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("ipc", "mnt"):
            handle = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY)
            if libc.setns(handle, 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
            os.close(handle)

    def run(self, fn: t.Callable[[], T]) -> T:
        """Run ``fn`` in a child inside, as root; its result."""
        return support.in_child(fn, before=self.enter)

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs a program inside as user postgres."""
        user = ("setpriv", f"--reuid={postgres.USER}", f"--regid={postgres.USER}", "--init-groups", "--")
        return ["nsenter", f"--target={self.pid}", "--mount", "--ipc", "--", *user, *argv]

    def _heard(self) -> None:
        assert os.read(self._answers, 1) == b".", "the private openCryptoki did not start"

    def _keep(self, commands: int, answer: int) -> t.NoReturn:
        """The process that keeps the namespaces and the daemon."""
        code = 1
        try:
            self.opencryptoki.enter(daemon=False)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(str(self._group).encode(), b"/etc/group", None, _MS_BIND, None):
                raise OSError(ctypes.get_errno(), "mount /etc/group")
            running = False
            command = b"+"
            while command:
                if command == b"+":
                    self.opencryptoki.start_daemon()
                else:
                    self.opencryptoki.stop_daemon()
                running = command == b"+"
                os.write(answer, b".")
                command = os.read(commands, 1)
            if running:
                self.opencryptoki.stop_daemon()
            code = 0
        finally:
            os._exit(code)


def _with_member(line: str) -> str:
    """A line of /etc/group, with user postgres in group pkcs11."""
    return f"{line.rstrip(',')}{'' if line.endswith(':') else ','}{postgres.USER}" if line.startswith("pkcs11:") else line


class FepServer(postgres.Server):
    """A private server of the stand-in. ``bin`` is its folder of programs, for ``bin_directory``.

    :param home: a folder that everybody may pass through (``postgres.folder``).
    :param host: the private openCryptoki that it runs in.
    :ivar keystore: an empty folder for ``keystore_location``; :ivar plugins: one for ``tde_kms.plugin_path``.
    """

    def __init__(self, home: Path, host: TokenHost | None = None, data: Path | None = None, major: int | None = None) -> None:
        super().__init__(home, data)
        self.bin = str(tree(major) / "bin")
        self.host = host
        self.keystore = home / "keystore"
        self.plugins = home / "plugins"
        for folder in (self.keystore, self.plugins):
            folder.mkdir(mode=0o700, exist_ok=True)
            shutil.chown(folder, postgres.USER, postgres.USER)

    def run(self, *argv: str, **how: t.Any) -> subprocess.CompletedProcess[str]:
        """Run a program as user postgres; inside the host if there is one."""
        if not self.host:
            return super().run(*argv, **how)
        check, stdin = how.get("check", True), how.get("stdin", "")
        done = subprocess.run(
            self.host.inside(*argv), cwd="/", input=stdin, timeout=how.get("timeout", 60), check=False, capture_output=True,
            text=True, start_new_session=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"},
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done

    def initdb(self) -> None:
        """Create the data directory, without fsync and with a quiet log."""
        super().initdb()
        self.configure(fsync="off", autovacuum="off", log_checkpoints="off")

    def configure(self, **settings: str) -> None:
        """Append parameters to postgresql.conf; two underscores stand for a dot."""
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                quoted = value.replace("'", "''")
                conf.write(f"{name.replace('__', '.')} = '{quoted}'\n")

    def start(self, check: bool = True, *options: str, secret: str = "") -> subprocess.CompletedProcess[str]:
        """Start it.

        :param options: further ones of pg_ctl (``--keystore-passphrase``). :param secret: what is typed at its prompt.
        """
        server = f"-k {self.socket} -c listen_addresses='' -c max_wal_size=128MB -c shared_buffers=16MB -c max_connections=40"
        argv = [*options, "-D", str(self.data), "-w", "-t", "30", "-l", str(self.log / "server.log"), "-o", server, "start"]
        done = self.run(f"{self.bin}/pg_ctl", *argv, check=False, stdin=f"{secret}\n" if secret else "")
        assert not check or done.returncode == 0, f"{done.stdout}{done.stderr}{self.said()[-2000:]}"
        return done

    def restart(self, check: bool = True, *options: str, secret: str = "") -> subprocess.CompletedProcess[str]:
        """Stop and start it."""
        self.stop()
        return self.start(check, *options, secret=secret)

    def said(self) -> str:
        """The server's log."""
        log = self.log / "server.log"
        return log.read_text() if log.exists() else ""

    def is_open(self) -> bool:
        """Whether the keystore is open. No view shows it: an encrypted tablespace without a folder gets past it or does not."""
        wish = "CREATE TABLESPACE probe LOCATION '/nonexistent' WITH (tablespace_encryption_algorithm = 'AES256')"
        return 'directory "/nonexistent" does not exist' in self.psql(wish, check=False)
