# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What integration tests share: acts in child processes, modules run as files, private tokens.

A PKCS#11 library and its environment cannot change within a process, so a test never loads one itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import grp
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.tests.integration.documented import documented

T = t.TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
_MODULES = ROOT / "plugins" / "modules"

SO_PIN = "so-87659"
PIN = "user-1234"
#: openCryptoki's soft token takes 4 to 8 bytes.
OCK_SO_PIN = "76543210"
OCK_PIN = "01234567"

#: Before openCryptoki 3.21, and since.
_DAEMON_PID = ("/run/pkcsslotd.pid", "/run/opencryptoki/pkcsslotd.pid")
_DAEMON_SOCKET = ("/run/pkcsslotd.socket", "/run/opencryptoki/pkcsslotd.socket")

_CLONE_NEWNS = 0x00020000
#: The daemon counts sessions in System V shared memory, one segment a host: two tests at once would count together.
_CLONE_NEWIPC = 0x08000000
_PR_SET_CHILD_SUBREAPER = 36
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18


class ChildFailed(AssertionError):
    """A child ended with an exception that is none of ours; its text is the child's traceback."""


def in_child(fn: t.Callable[[], T], env: t.Mapping[str, str] | None = None, *, before: t.Callable[[], None] | None = None) -> T:
    """Run ``fn`` in a forked child and give its (picklable) result; a TdeError is raised again here.

    :param env: added to the child's environment.
    :param before: run in the child first (namespaces, other users).
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            os.environ.update(env or {})
            try:
                if before:
                    before()
                answer: tuple[str, t.Any] = ("result", fn())
            except TdeError as exc:
                answer = ("tde", (exc.code, exc.message, exc.obj, exc.kept, exc.next_step, exc.details))
            except BaseException:
                answer = ("other", traceback.format_exc())
            with os.fdopen(writer, "wb") as handle:
                handle.write(pickle.dumps(answer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as handle:
        raw = handle.read()
    _pid, status = os.waitpid(pid, 0)
    if not raw:
        raise ChildFailed(f"the child ended with status {status} and no answer")
    kind, value = pickle.loads(raw)  # noqa: S301 - written by our own child
    if kind == "result":
        return t.cast(T, value)
    if kind == "tde":
        code_, message, obj, kept, next_step, details = value
        raise TdeError(code_, message, obj=obj, kept=kept, next_step=next_step, details=details)
    raise ChildFailed(value)


def run_module_file(
    name: str, args: t.Mapping[str, t.Any], *, check: bool = False, diff: bool = False, prefix: t.Sequence[str] = ()
) -> dict[str, t.Any]:
    """Run a module's file as Ansible does, with the arguments on standard input.

    :param prefix: a command to run it under (strace, unshare …).
    :returns: what it printed; ``failed`` is set when it failed.
    """
    content = {
        "ANSIBLE_MODULE_ARGS": {**args, "_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": "/tmp"}
    }
    done = subprocess.run(
        [*prefix, sys.executable, str(_MODULES / f"{name}.py")],
        input=json.dumps(content),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / ".collections")},
    )
    try:
        result = t.cast("dict[str, t.Any]", json.loads(done.stdout))
    except ValueError:
        raise ChildFailed(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}") from None
    documented(name, result, diff=diff)
    return result


def run_module(name: str, args: t.Mapping[str, t.Any], *, check: bool = False, diff: bool = False) -> dict[str, t.Any]:
    """As :func:`run_module_file`, without the start of a Python of its own: the module's ``main`` in a forked child."""
    content = {
        "ANSIBLE_MODULE_ARGS": {**args, "_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": "/tmp"}
    }
    module = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{name}")

    def act() -> str:
        from ansible.module_utils import _internal, basic

        # Tests of plugins make this process a controller, which shows warnings instead of returning them.
        _internal.is_controller = False
        basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = json.dumps(content).encode(), "legacy"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main()
        return printed.getvalue()

    result = t.cast("dict[str, t.Any]", json.loads(in_child(act)))
    documented(name, result, diff=diff)
    return result


def softhsm_library() -> str | None:
    """SoftHSM's library on this host (Debian, RedHat, SUSE)."""
    places = (
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib64/pkcs11/libsofthsm2.so",
        "/usr/lib64/softhsm/libsofthsm2.so",
    )
    return next((place for place in places if os.path.exists(place)), None)


def opencryptoki_library() -> str | None:
    """openCryptoki's library on this host, if its daemon is there too."""
    places = (*glob.glob("/usr/lib/*/opencryptoki/libopencryptoki.so.0"), "/usr/lib64/opencryptoki/libopencryptoki.so.0")
    found = next((place for place in places if os.path.exists(place)), None)
    return found if found and shutil.which("pkcsslotd", path="/usr/sbin:/sbin") else None


class Installation:
    """A private PKCS#11 installation.

    :ivar library: path; :ivar environment: for ``LibraryAccess``; :ivar pin: of tokens made by ``add_token``.
    """

    library: str
    environment: dict[str, str]
    so_pin: str
    pin: str

    def run(self, fn: t.Callable[[], T]) -> T:
        """Run ``fn`` in a child that sees this installation; its result."""
        return in_child(fn)

    def options(self, **more: t.Any) -> dict[str, t.Any]:
        """The shared options of a module that reach this library."""
        return {"library": self.library, "library_environment": self.environment, **more}

    def library_access(self) -> t.Any:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import LibraryAccess

        return LibraryAccess(self.library, self.environment)

    def access(self, label: str = "demo", pin: str | None = None, **more: t.Any) -> t.Any:
        """A ``TokenAccess`` with the right PIN, or another."""
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, TokenSelector

        return TokenAccess(self.library_access(), TokenSelector(label=label), Secret(self.pin if pin is None else pin), **more)


class SoftHsm(Installation):
    """A private SoftHSM: configuration and folder of tokens under one directory.

    :ivar tokendir: where the tokens are.
    """

    so_pin, pin = SO_PIN, PIN

    def __init__(self, home: Path) -> None:
        library = softhsm_library()
        assert library, "SoftHSM is not installed"
        self.library = library
        self.tokendir = home / "tokens"
        self.tokendir.mkdir(parents=True)
        self.conf = home / "softhsm2.conf"
        self.conf.write_text(f"directories.tokendir = {self.tokendir}\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environment = {"SOFTHSM2_CONF": str(self.conf)}

    def add_token(self, label: str = "demo") -> None:
        """Initialise one more token with this label, :attr:`so_pin` and :attr:`pin`, in a child."""
        self.run(lambda: _add_token(self.library_access(), label, self.so_pin, self.pin))


def _add_token(access: t.Any, label: str, so_pin: str, pin: str) -> None:
    """A token made by C calls alone, so that tests do not stand on the code that they test."""
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load

    library = load(access)
    slot = next(slot for slot in library.slots() if not library.token_info(slot).flags & 0x400)
    library.init_token(slot, Secret(so_pin), label)
    # SoftHSM moves the token to another slot.
    token = next(token for token in library.raw.get_tokens(token_label=label) if not token.flags & 0x8)
    with token.open(rw=True, so_pin=so_pin) as session:
        session.init_pin(pin)


class OpenCryptoki(Installation):
    """A private openCryptoki with one soft token: folders under ``home``, a daemon a call.

    ``run`` enters a mount namespace of its own, so that nothing of the host's installation is touched.
    """

    so_pin, pin = OCK_SO_PIN, OCK_PIN
    factory_so_pin, factory_pin = "87654321", "12345678"

    def __init__(self, home: Path, tokens: t.Sequence[str] = ("swtok",)) -> None:
        library = opencryptoki_library()
        assert library, "openCryptoki is not installed"
        self.library = library
        self.environment = {}
        self.home = home
        group = grp.getgrnam("pkcs11").gr_gid
        slots = "".join(
            f"slot {number}\n{{\nstdll = libpkcs11_sw.so\ntokname = {name}\n}}\n" for number, name in enumerate(tokens)
        )
        folders = ["etc", "shm", "log", "run"]
        private = ["var", "run/lock", "run/lock/opencryptoki"]
        for name in tokens:
            private += [f"var/{name}", f"var/{name}/TOK_OBJ", f"run/lock/opencryptoki/{name}"]
        for folder in [*folders, *private]:
            (home / folder).mkdir(parents=True)
        for folder in private:
            os.chown(home / folder, 0, group)
            (home / folder).chmod(0o770)
        (home / "etc/opencryptoki.conf").write_text("version opencryptoki-3.8\n" + slots)
        # Without it newer versions do not start.
        if os.path.exists("/etc/opencryptoki/strength.conf"):
            shutil.copy2("/etc/opencryptoki/strength.conf", home / "etc")
            os.chown(home / "etc/strength.conf", 0, group)

    def enter(self, *, daemon: bool = True) -> None:
        """Make the calling process see the private folders; start the daemon."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC):
            raise OSError(ctypes.get_errno(), "unshare")
        mounts = [("none", "/", _MS_REC | _MS_PRIVATE)]
        mounts += [
            (str(self.home / name), place, _MS_BIND)
            for name, place in (
                ("etc", "/etc/opencryptoki"),
                ("var", "/var/lib/opencryptoki"),
                ("shm", "/dev/shm"),
                ("log", "/var/log"),
            )
        ]
        mounts.append((str(self.home / "run"), "/run", _MS_BIND))
        for source, place, flags in mounts:
            if libc.mount(source.encode(), place.encode(), None, flags, None):
                raise OSError(ctypes.get_errno(), f"mount {place}")
        if daemon:
            self.start_daemon()

    def start_daemon(self) -> None:
        """Start the daemon, as a child of the calling process, which sees the private folders."""
        for stale in (*_DAEMON_PID, *_DAEMON_SOCKET):
            Path(stale).unlink(missing_ok=True)
        # The daemon forks twice; as its new parent this process can wait for its end.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with open("/run/pkcsslotd.said", "wb") as said:
            code = subprocess.run(["/usr/sbin/pkcsslotd"], check=False, timeout=10, stdout=said, stderr=said).returncode
        assert code == 0, f"exit {code}: {Path('/run/pkcsslotd.said').read_text()}"
        _wait_for(lambda: any(map(os.path.exists, _DAEMON_SOCKET)) and any(map(os.path.exists, _DAEMON_PID)))

    def stop_daemon(self) -> None:
        """End the daemon; the caller is the process that started it."""
        _end(int(Path(next(filter(os.path.exists, _DAEMON_PID))).read_text()))

    def run(self, fn: t.Callable[[], T], *, daemon: bool = True) -> T:
        """Run ``fn`` in a child inside the private installation."""

        def act() -> T:
            try:
                # A child of its own, so that the daemon outlives the library's finaliser.
                return in_child(fn)
            finally:
                if daemon:
                    self.stop_daemon()

        return in_child(act, before=lambda: self.enter(daemon=daemon))

    def add_token(self, label: str = "demo") -> None:
        """Initialise the (one) factory token with this label, :attr:`so_pin` and :attr:`pin`."""

        def act() -> None:
            from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load

            library = load(self.library_access())
            slot = next(slot for slot in library.slots() if not library.token_info(slot).flags & 0x400)
            library.init_token(slot, Secret(self.factory_so_pin), label)
            token = library.raw.get_token(token_label=label)
            with token.open(rw=True, so_pin=self.factory_so_pin) as session:
                session.set_pin(self.factory_so_pin, self.so_pin)
            with token.open(rw=True, so_pin=self.so_pin) as session:
                session.init_pin(self.factory_pin)
            with token.open(rw=True, user_pin=self.factory_pin) as session:
                session.set_pin(self.factory_pin, self.pin)

        self.run(act)


def _end(pid: int, seconds: float = 2) -> None:
    """End a child of ours; the daemon sometimes takes SIGTERM for nothing."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.005)


def _wait_for(condition: t.Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def new_state(path: Path) -> StateDirectory:
    """A state directory that does not exist yet."""
    return StateDirectory(str(path))
