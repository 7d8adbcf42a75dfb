# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A task in a process of its own that is killed, and the look at the host afterwards.

The process is a fork of the test's, which has imported everything (:func:`preload`) and loaded no PKCS#11 library: it
begins to work at once, so that random moments fall into the work and not into Python's start.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import time
import types
import typing as t
from pathlib import Path

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import Credential, KeyStore
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import find
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, open_session
from ansible_collections.hsm.tde.tests.integration import support

#: What a task does; gives its public result.
Task = t.Callable[[], dict[str, t.Any]]

#: The orphans of a killed task may still be at work: these answers say so, and that it must be run again.
_WAIT_CODES = ("busy", "place_in_use")
_WAIT_SECONDS = 30.0


def preload() -> None:
    """Import what the tasks import when they come to it."""
    ours = "ansible_collections.hsm.tde.plugins.module_utils"
    for name in (
        *("psycopg", "psycopg.sql", "psycopg.conninfo", "pkcs11", "pkcs11.mechanisms", "pkcs11.exceptions"),
        *(f"cryptography.hazmat.primitives.{one}" for one in ("ciphers.aead", "kdf.scrypt", "kdf.hkdf", "asymmetric.ec")),
        *(f"{ours}.engines.postgresql.{one}" for one in ("engine", "keystore", "tablespaces")),
        *(f"{ours}.keystore.{one}" for one in ("passphrase", "token")),
    ):
        importlib.import_module(name)


def task(module: str, arguments: t.Mapping[str, t.Any], *, check: bool = False) -> Task:
    """A module's work on its options, validated as Ansible does; without Ansible around it."""
    found = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{module}")
    validated = ArgumentSpecValidator(found.SPEC).validate(dict(arguments))
    assert not validated.error_messages, validated.error_messages
    stub = types.SimpleNamespace(params=validated.validated_parameters, check_mode=check, warn=lambda text: None)
    return lambda: t.cast("dict[str, t.Any]", found.act(stub))


class Process:
    """A forked process at a task.

    :param traced: wait for :meth:`go`.
    """

    def __init__(self, work: Task, *, traced: bool = False) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._answer, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        gate, self._gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _child(work, writer, gate)
        # A group of its own: the processes that a kill of all takes with it.
        os.setpgid(self.pid, self.pid)
        os.close(writer)
        os.close(gate)
        self._fd = os.pidfd_open(self.pid)
        if not traced:
            self.go()

    def go(self) -> None:
        os.write(self._gate, b"g")

    def ended(self, seconds: float) -> bool:
        """Wait for its end; :returns: whether it has ended."""
        return bool(select.select([self._fd], [], [], max(0.0, seconds))[0])

    def kill(self, group: bool) -> None:
        """SIGKILL; :param group: to the programs that it has started, too."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def result(self) -> dict[str, t.Any] | None:
        """What it answered, None if it was killed. What it raised is raised."""
        self.ended(120)
        # Its orphans hold the pipe open: only what is there is read.
        os.set_blocking(self._answer, False)
        raw = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._answer, 1 << 20):
                raw += part
        for fd in (self._answer, self._gate, self._fd):
            os.close(fd)
        _pid, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        kind, value = pickle.loads(raw)  # noqa: S301 - written by our own child
        if kind == "tde":
            raise TdeError(value.pop("code"), value.pop("message"), **value)
        assert kind == "result", value
        return t.cast("dict[str, t.Any]", value)


def _child(work: Task, writer: int, gate: int) -> t.NoReturn:
    code = 1
    try:
        os.read(gate, 1)
        try:
            answer: tuple[str, t.Any] = ("result", work())
        except TdeError as exc:
            fields = ("code", "message", "obj", "kept", "next_step", "details")
            answer = ("tde", {field: getattr(exc, field) for field in fields})
        except BaseException:
            import traceback

            answer = ("other", traceback.format_exc())
        os.write(writer, pickle.dumps(answer))
        code = 0
    finally:
        os._exit(code)


def run(work: Task) -> dict[str, t.Any]:
    """Run a task to its end; while orphans of a killed one are at work, wait for them."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            done = Process(work).result()
        except TdeError as exc:
            if exc.code not in _WAIT_CODES or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        assert done is not None
        return done


class Kills:
    """Tasks of one workflow, each begun, killed and finished by a second run.

    :ivar found: how many second runs began with which act: what the kills left to do.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.killed = self.ended = 0
        self.found: dict[str, int] = {}

    def begin(self, work: Task) -> None:
        """Begin a task and kill it."""
        if self._begin(work):
            self.killed += 1
        else:
            self.ended += 1

    def _begin(self, work: Task) -> bool:
        """:returns: whether it was killed before its end."""
        raise NotImplementedError

    def finish(self, work: Task) -> None:
        """The second run."""
        result = run(work)
        first = result["plan"][0]["action"] if result["plan"] else "nothing"
        self.found[first] = self.found.get(first, 0) + 1

    def __str__(self) -> str:
        found = ", ".join(f"{action} {count}" for action, count in sorted(self.found.items(), key=lambda one: -one[1]))
        return f"{self.name}: {self.killed} killed, {self.ended} ended before; second runs began with: {found}"


#: How often a run that finishes a killed one is killed, too.
_AGAIN = 0.2


class AtRandom(Kills):
    """Killed at a random moment of the time that a run takes, some once more; the first one is measured."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(f"{name}, seed {seed}")
        self._chance = random.Random(seed)
        self._seconds = 0.0

    def begin(self, work: Task) -> None:
        super().begin(work)
        while self._chance.random() < _AGAIN:
            super().begin(work)

    def _begin(self, work: Task) -> bool:
        moment, group = self._chance.uniform(0, self._seconds) if self._seconds else 120.0, self._chance.random() < 0.5
        began = time.monotonic()
        process = Process(work)
        if not process.ended(moment):
            process.kill(group)
        if process.result() is None:
            return True
        # It was quicker than it was thought to be.
        self._seconds = time.monotonic() - began
        return False

    def finish(self, work: Task) -> None:
        began = time.monotonic()
        super().finish(work)
        self._seconds = max(self._seconds, time.monotonic() - began)


#: What changes something, or asks a server to: before each of them is a moment of its own.
CALLS = (
    "write",
    "fsync",
    "ftruncate",
    "fallocate",
    "renameat",
    "linkat",
    "unlinkat",
    "fchown",
    "fchmod",
    "sendto",
    "clone",
    "vfork",
)


class AtCalls(Kills):
    """Killed before every n-th of each of :data:`CALLS`, from the first to the last of it.

    :param first: which one to begin with.
    :ivar over: every call was met.
    """

    def __init__(self, name: str, every: int, first: int) -> None:
        super().__init__(f"{name}, before one in {every} of its calls")
        self._every, self._first = every, first
        self._left = list(CALLS)
        self._number = first

    @property
    def over(self) -> bool:
        return not self._left

    def _begin(self, work: Task) -> bool:
        if killed_before(work, self._left[0], self._number):
            self._number += self._every
            return True
        # There are fewer of it: the next one's turn.
        self._left.pop(0)
        self._number = self._first
        return False


def killed_before(work: Task, call: str, number: int) -> bool:
    """Kill a task before its n-th call; :returns: False if it ended before that."""
    return _traced(work, "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}") is None


def killed_at_write(work: Task, path: Path) -> bool:
    """Kill whichever process of a task first writes to a file, before it does; :returns: False if the task ended well.

    A child that is killed for the task is an error of the task's (``token_act_lost``).
    """
    try:
        return (
            _traced(work, "-f", "-o", "/dev/null", "-P", str(path), "-e", "trace=write", "-e", "inject=write:signal=KILL:when=1")
            is None
        )
    except TdeError as exc:
        if exc.code != "token_act_lost":
            raise
        return True


def calls(work: Task, call: str, log: Path) -> list[str]:
    """Run a task to its end; :returns: its calls, as strace writes them, with the paths of files.

    :param log: a file for them.
    """
    assert _traced(work, "-y", "-o", str(log), "-e", f"trace={call}") is not None
    return [line for line in log.read_text().splitlines() if line.startswith(call)]


def _traced(work: Task, *options: str) -> dict[str, t.Any] | None:
    """Run a task under strace; :returns: as :meth:`Process.result`."""
    process = Process(work, traced=True)
    argv = ["strace", "-qq", *options, "-p", str(process.pid)]
    tracer = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text():
            assert tracer.poll() is None, "strace could not attach"
            time.sleep(0.002)
        process.go()
        return process.result()
    finally:
        tracer.wait(30)


# --- the look from outside


def opened(state: Path, *ways: t.Sequence[Credential]) -> dict[str, bytes]:
    """Every data key of the cluster ``main``, which each way opens alike, in a fresh process.

    :param ways: each some credentials, of which one opens a key.
    """

    def act() -> list[dict[str, bytes]]:
        store = KeyStore(StateDirectory(str(state)), "main")
        key_ids = store.key_ids()
        return [{name: key.reveal() for name, key in store.open_keys(key_ids, way).items()} for way in ways]

    found = support.in_child(act)
    assert all(one == found[0] for one in found)
    return found[0]


def in_token(access: TokenAccess, state: Path, labels: t.Sequence[str]) -> list[int]:
    """How many keys of each label a token has."""

    def act() -> list[int]:
        with open_session(access, StateDirectory(str(state))) as session:
            return [len(find(session, label)) for label in labels]

    return support.in_child(act)


def no_leftovers(*folders: Path) -> None:
    """No temporary or half-made file is anywhere in the folders."""
    found = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".new")) or ".candidate." in path.name
    ]
    assert found == []


def no_secret(secrets: t.Iterable[bytes], folder: Path, *, but: t.Collection[Path] = ()) -> None:
    """No secret stands in a file of a folder, as it is, in hex or in base64.

    :param but: files that hold one on purpose, and folders that are not looked into.
    """
    needles = forms(secrets)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and not any(one == path or one in path.parents for one in but):
            no_needle(needles, path)


def forms(secrets: t.Iterable[bytes]) -> list[bytes]:
    """Secrets as they would stand in a file."""
    return [form for one in secrets for form in (one, one.hex().encode(), base64.b64encode(one).rstrip(b"="))]


def no_needle(needles: t.Sequence[bytes], path: Path) -> None:
    """None of some byte strings stands in a file."""
    content = path.read_bytes()
    assert not any(needle in content for needle in needles), f"{path} holds a secret"


def detached(image: Path) -> None:
    """The image has no loop device.

    A container that was started meanwhile has a copy of every mount, for as long as it lives: then the kernel must
    be told to take the device away after it.
    """
    for device, autoclear in loop_devices(image, 0).items():
        assert autoclear, f"{device} stays for good"
        assert mounted_elsewhere(device) or device not in loop_devices(image, 0), f"{device} is mounted nowhere and still there"


def loop_devices(image: Path, count: int) -> dict[str, bool]:
    """The loop devices of an image, and whether each goes away by itself when nobody uses it any more.

    :param count: how many it should have; programs that ask all devices may hold one for a moment.
    """
    deadline = time.monotonic() + 5
    while True:
        argv = ["losetup", "-nO", "NAME,AUTOCLEAR", "-j", str(image)]
        lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
        if len(lines) == count or time.monotonic() > deadline:
            return {line.split()[0]: line.split()[1] == "1" for line in lines}
        time.sleep(0.05)


def mounted_elsewhere(device: str) -> bool:
    """Whether the file system on a device is mounted, and not here.

    A container need not show it: of mounts outside its root, no process of it tells. The kernel lists what is mounted
    anywhere (ext4's sysfs).
    """
    here = [line.split()[0] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return device not in here and Path("/sys/fs/ext4", Path(device).name).exists()


def mounted_once(image: Path) -> None:
    """The image is attached once, and mounted once."""
    found = loop_devices(image, 1)
    assert len(found) == 1, found
    device = next(iter(found))
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[0] == device]
    assert len(mounts) == 1, mounts
