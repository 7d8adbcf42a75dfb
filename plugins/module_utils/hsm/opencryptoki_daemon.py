# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki's daemon: under systemd or without it, never two, restarted only where nobody is in its way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.plan import Plan, Step
from ..common.run import run_program
from ..common.state import StateDirectory
from ..pkcs11 import opencryptoki as base
from . import opencryptoki_api as api
from . import opencryptoki_store as store

UNIT = "pkcsslotd.service"
#: Files that a daemon leaves, with its sockets: since 3.21, and before (usr/include/slotmgr.h).
_PID_FILES = ("/run/opencryptoki/pkcsslotd.pid", "/run/pkcsslotd.pid")
_ADMIN_SOCKET = "/run/opencryptoki/pkcsslotd.admin.socket"
#: Seconds: systemd's whole act, the end after SIGTERM (3.8.1 sometimes ignores it), and until the daemon listens.
_SYSTEMCTL, _END, _LISTEN = 100, 3.0, 10.0

State = t.Literal["started", "stopped", "restarted"]


@dataclasses.dataclass(frozen=True)
class Daemon:
    """The daemon as it is.

    :ivar pids: all that serve this host; :ivar unit: systemd runs here and has its unit.
    :ivar unit_pid: the unit's process, 0 if it has none.
    :ivar started: seconds since 1970 at which the youngest was started; 0.0 if none runs.
    """

    pids: tuple[int, ...]
    unit: bool
    unit_pid: int
    started: float

    def public(self) -> dict[str, t.Any]:
        return {
            "running": bool(self.pids),
            "pids": list(self.pids),
            "systemd": self.unit,
            "of_the_unit": bool(self.pids) and self.unit_pid in self.pids,
        }


def look() -> Daemon:
    """The daemon now."""
    pids = tuple(base.daemons())
    unit, unit_pid = False, 0
    if os.path.isdir("/run/systemd/system"):
        shown = run_program(["systemctl", "show", "--property=LoadState,MainPID", UNIT], timeout=_SYSTEMCTL).stdout.decode()
        facts = dict(line.partition("=")[::2] for line in shown.splitlines())
        unit = facts.get("LoadState") == "loaded"
        unit_pid = int(facts.get("MainPID") or 0)
    return Daemon(pids, unit, unit_pid, max((_started(pid) for pid in pids), default=0.0))


def _started(pid: int) -> float:
    """When a process was started (proc(5): field 22 of stat, in clock ticks since boot)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            ticks = int(handle.read().rpartition(") ")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def stale(daemon: Daemon) -> bool:
    """Whether a daemon runs that was started before its configuration was written."""
    try:
        return bool(daemon.pids) and os.stat(api.CONF).st_mtime > daemon.started
    except FileNotFoundError:
        return False


def restart_required(changed: bool) -> bool:
    """Whether a daemon runs that has yet to read its configuration.

    :param changed: the configuration was changed just now, or, in check mode, would be.
    """
    daemon = look()
    return bool(daemon.pids) and (changed or stale(daemon))


def decide(daemon: Daemon, wished: State) -> Plan:
    """The steps from the daemon as it is to the wish. Pure."""
    steps: Plan = []
    numbers = ", ".join(map(str, daemon.pids))
    if daemon.pids and wished != "started":
        steps.append(
            Step(
                "stop_daemon",
                f"pkcsslotd ({numbers})",
                "it is to read its configuration anew" if wished == "restarted" else "it is not wished",
            )
        )
    if wished == "restarted" or (wished == "started" and not daemon.pids):
        steps.append(Step("start_daemon", "pkcsslotd", "it does not run" if not daemon.pids else "one daemon serves the host"))
    return steps


def check(daemon: Daemon, wished: State, plan: Plan, programs: t.Sequence[tuple[int, str]], force: bool) -> None:
    """Refuse what would do harm, before the first act.

    :param programs: those that use the library.
    :raises TdeError: ``opencryptoki_daemons``, ``opencryptoki_in_use``.
    """
    foreign = daemon.unit and daemon.pids and daemon.unit_pid not in daemon.pids
    if wished == "started" and (len(daemon.pids) > 1 or foreign):
        what = f"{len(daemon.pids)} daemons run" if len(daemon.pids) > 1 else "a daemon runs that is not the service's"
        raise TdeError("opencryptoki_daemons", f"{what}: {', '.join(map(str, daemon.pids))}", obj="pkcsslotd")
    if programs and not force and any(step.action == "stop_daemon" for step in plan):
        raise TdeError(
            "opencryptoki_in_use",
            f"programs use it: {store.named(programs)}",
            obj="pkcsslotd",
            next_step="Stop them first, or allow it with force: they then need a restart of their own.",
            details={"programs": [{"pid": pid, "name": name} for pid, name in programs]},
        )


@dataclasses.dataclass
class Outcome:
    """What :func:`ensure` did, or would do."""

    plan: Plan
    before: Daemon
    after: Daemon
    programs: list[tuple[int, str]]


def ensure(
    wished: State, state: StateDirectory, *, when_stale: bool = False, force: bool = False, check_mode: bool = False
) -> Outcome:
    """Bring the daemon to the wished state.

    :param when_stale: restart it only where its configuration was written after its start, or where it is not the one it should be.
    :raises TdeError: ``opencryptoki_missing``, ``opencryptoki_daemon_failed`` and what :func:`check` raises.
    """
    if check_mode:
        return _ensure(wished, when_stale, force, act=False)
    with state.locked(2.0):
        return _ensure(wished, when_stale, force, act=True)


def _ensure(wished: State, when_stale: bool, force: bool, *, act: bool) -> Outcome:
    before = look()
    sound = len(before.pids) == 1 and (not before.unit or before.unit_pid in before.pids)
    if wished == "restarted" and when_stale and sound and not stale(before):
        wished = "started"
    plan, programs = decide(before, wished), store.users()
    check(before, wished, plan, programs, force)
    if act and plan and not os.path.exists(api.PROGRAM):
        raise TdeError("opencryptoki_missing", f"{api.PROGRAM} is not there", obj="openCryptoki")
    if act and plan:
        planning.run(plan, {"stop_daemon": lambda step: _stop(before), "start_daemon": lambda step: _start(before)})
    return Outcome(plan, before, look() if act and plan else before, programs)


def _stop(daemon: Daemon) -> None:
    if daemon.unit and daemon.unit_pid in daemon.pids:
        run_program(["systemctl", "stop", UNIT], timeout=_SYSTEMCTL)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in base.daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if _wait(lambda: not base.daemons(), _END):
            break
    else:
        raise TdeError("opencryptoki_daemon_failed", f"does not end: {base.daemons()}", obj="pkcsslotd", kept="It still runs.")
    # A daemon that was ended leaves them; the next one and pkcstok_migrate take them for a daemon that runs.
    for path in (*_PID_FILES, *base.SOCKETS, _ADMIN_SOCKET):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _start(daemon: Daemon) -> None:
    said = ""
    if daemon.unit:
        run_program(["systemctl", "reset-failed", UNIT], timeout=_SYSTEMCTL, ok=range(256))
        run_program(["systemctl", "start", UNIT], timeout=_SYSTEMCTL)
    else:
        said = _start_alone()
    if not _wait(lambda: len(base.daemons()) == 1 and any(os.path.exists(path) for path in base.SOCKETS), _LISTEN):
        running = base.daemons()
        message = f"{len(running)} daemons run" if len(running) != 1 else "it does not listen"
        raise TdeError(
            "opencryptoki_daemon_failed", f"{message}. It said: {said or 'nothing'}", obj="pkcsslotd", kept="See above."
        )


def _start_alone() -> str:
    """Start it where nobody supervises it; what it wrote. It becomes a daemon by itself."""
    try:
        # Not its pipe's end but its own is waited for: the daemon keeps what it was given open (3.8.1).
        with subprocess.Popen(
            [api.PROGRAM],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={"LC_ALL": "C"},
        ) as started:
            code = started.wait(_LISTEN)
            os.set_blocking(t.cast(t.IO[bytes], started.stderr).fileno(), False)
            said = (t.cast(t.IO[bytes], started.stderr).read() or b"").decode("utf-8", "replace").strip()[:2000]
    except subprocess.TimeoutExpired:
        raise TdeError("opencryptoki_daemon_failed", "it did not become a daemon", obj="pkcsslotd") from None
    if code:
        raise TdeError("opencryptoki_daemon_failed", f"exit code {code}: {said or 'it said nothing'}", obj="pkcsslotd")
    return said


def _wait(done: t.Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
