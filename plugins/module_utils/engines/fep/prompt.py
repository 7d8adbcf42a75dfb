# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A program that asks for a secret on its terminal and takes it nowhere else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import pwd
import select
import subprocess
import termios
import time
import typing as t

from ...common.errors import TdeError
from ...common.secret import Secret

#: Seconds until it asks, and for all of its work.
_ASK_SECONDS = 20.0
_SECONDS = 120.0
#: An end of what it says at which it waits: a prompt ends so.
_PROMPT = b":"


def answer_prompt(argv: t.Sequence[str], secret: Secret, *, user: str) -> None:
    """Run a program on a terminal of its own and type the secret when it asks.

    :param argv: program and arguments; never a secret.
    :param user: the operating system's user to become.
    :raises TdeError: ``command_failed`` with what it said, ``timeout``.
    """
    entry = pwd.getpwnam(user)
    leader, terminal = pty.openpty()
    said = b""
    try:
        _no_echo(terminal)

        def take() -> None:
            # A password is read from /dev/tty, the controlling terminal, wherever there is one (getpass(3)).
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        child = subprocess.Popen(
            list(argv),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=take,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": entry.pw_dir},
            **({} if entry.pw_uid == os.geteuid() else _identity(user, entry)),
        )
        os.close(terminal)
        terminal = -1
        typed = False
        deadline = time.monotonic() + _ASK_SECONDS
        while True:
            if not select.select([leader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                child.kill()
                child.wait()
                raise TdeError("timeout", "did not ask" if not typed else "did not end", obj=argv[0], kept="It was ended.")
            try:
                part = os.read(leader, 4096)
            except OSError:
                # EIO: the other end is closed.
                break
            if not part:
                break
            said += part
            if not typed and said.rstrip().endswith(_PROMPT):
                os.write(leader, secret.reveal() + b"\n")
                typed, deadline = True, time.monotonic() + _SECONDS
        code = child.wait(timeout=_SECONDS)
    except OSError as exc:
        raise TdeError("command_missing", os.strerror(exc.errno or 0), obj=argv[0]) from None
    finally:
        os.close(leader)
        if terminal >= 0:
            os.close(terminal)
    if code:
        text = said.replace(secret.reveal(), b"***").decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise TdeError("command_failed", f"exit code {code}: {lines[-1] if lines else 'it said nothing'}", obj=" ".join(argv[:3]))


def _no_echo(terminal: int) -> None:
    with contextlib.suppress(termios.error):
        modes = termios.tcgetattr(terminal)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSANOW, modes)


def _identity(user: str, entry: pwd.struct_passwd) -> dict[str, t.Any]:
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}
