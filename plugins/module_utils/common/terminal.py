# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A program that asks on its terminal, and takes a secret nowhere else: run it on a terminal of its own and answer.

An answer is typed only when the prompt that it is meant for stands at the end of what the program said. A prompt that comes
again after its answers are used up means that an answer was refused: the program is ended at once, nothing is tried twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time
import typing as t

from .errors import TdeError
from .run import identity
from .secret import Secret

#: As for other programs, see run.py.
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
#: The terminal would act on these instead of passing them on (termios(3), canonical mode).
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is typed at a prompt.

    :param prompt: regular expression for the end of what the program said since the last answer; may look back over lines.
    :param reply: what is typed, without the line's end.
    :param times: how often.
    """

    prompt: str
    reply: Secret | str
    times: int = 1


class Said(t.NamedTuple):
    """How a conversation ended: the exit code, all that the program said (no secret in it), and whether it asked again."""

    code: int
    text: str
    asked_again: bool

    @property
    def last_line(self) -> str:
        """Its last words, for a message."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1][-300:] if lines else "it said nothing"


def converse(
    argv: t.Sequence[str],
    answers: t.Sequence[Answer],
    *,
    environment: t.Mapping[str, str] | None = None,
    timeout: float = 60,
    user: str | None = None,
) -> Said:
    """Run a program on a terminal of its own, without echo, and answer its prompts.

    The first answer whose prompt fits, and which is not used up, is typed.

    :param argv: program and arguments; never a secret, every user of the host can read them.
    :param timeout: seconds for all of its work.
    :param user: the operating system's user to become.
    :raises TdeError: ``command_missing``; ``timeout`` with what it waited at; ``invalid_option`` for a reply that cannot be typed.
    """
    for answer in answers:
        if _CONTROL.search(_bytes(answer.reply)):
            raise TdeError("invalid_option", "has a control character, which cannot be typed on a terminal", obj="passphrase")
    leader, terminal = pty.openpty()
    try:
        _no_echo(terminal)
        child = _start(argv, terminal, environment, user)
        os.close(terminal)
        terminal = -1
        try:
            said, asked_again = _listen(leader, answers, time.monotonic() + timeout)
        except _Silent as silent:
            _end(child)
            text = _scrubbed(silent.said, answers)
            raise TdeError(
                "timeout",
                f"did not end within {timeout:g} seconds; it waits at: {Said(0, text, False).last_line}",
                obj=argv[0],
                kept="It was ended; what it had done by then stays.",
            ) from None
        if asked_again:
            _end(child)
        return Said(_wait(child), _scrubbed(said, answers), asked_again)
    finally:
        os.close(leader)
        if terminal >= 0:
            os.close(terminal)


class _Silent(Exception):
    def __init__(self, said: bytes) -> None:
        super().__init__()
        self.said = said


def _start(
    argv: t.Sequence[str], terminal: int, environment: t.Mapping[str, str] | None, user: str | None
) -> subprocess.Popen[bytes]:
    def take() -> None:
        # A password is read from /dev/tty, the controlling terminal (getpass(3)).
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    try:
        return subprocess.Popen(
            list(argv),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=take,
            cwd="/",
            env={"PATH": _PATH, "LC_ALL": "C", "TERM": "dumb", **(environment or {})},
            **identity(user),
        )
    except OSError as exc:
        raise TdeError("command_missing", os.strerror(exc.errno or 0), obj=argv[0]) from None


def _listen(leader: int, answers: t.Sequence[Answer], deadline: float) -> tuple[bytes, bool]:
    """Answer until the program ends or asks again. :returns: what it said, and whether it asked again."""
    prompts = [re.compile(answer.prompt.encode() + rb"\s*\Z") for answer in answers]
    left = [answer.times for answer in answers]
    said, heard = b"", 0
    while True:
        if not select.select([leader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise _Silent(said)
        try:
            part = os.read(leader, 4096)
        except OSError:
            # EIO: the program has ended, the other end is closed.
            return said, False
        if not part:
            return said, False
        said += part
        fitting = [number for number, prompt in enumerate(prompts) if prompt.search(said[heard:])]
        ready = [number for number in fitting if left[number]]
        if ready:
            left[ready[0]] -= 1
            heard = len(said)
            os.write(leader, _bytes(answers[ready[0]].reply) + b"\n")
        elif fitting:
            return said, True


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    child.wait()


def _wait(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        # It closed its terminal and goes on without one.
        _end(child)
        return child.returncode


def _bytes(reply: Secret | str) -> bytes:
    return reply.reveal() if isinstance(reply, Secret) else reply.encode()


def _scrubbed(said: bytes, answers: t.Sequence[Answer]) -> str:
    """What it said, should it repeat a secret."""
    for answer in answers:
        if isinstance(answer.reply, Secret) and len(answer.reply) >= 4:
            said = said.replace(answer.reply.reveal(), b"***")
    return said.decode("utf-8", "replace").replace("\r\n", "\n")


def _no_echo(terminal: int) -> None:
    modes = termios.tcgetattr(terminal)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
