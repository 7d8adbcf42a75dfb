# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""An act in a child process of its own.

A PKCS#11 library reads its environment once a process, some stay broken after a first failure, and a network HSM
can let a call hang for ever: a child each gives every cluster and every new try a fresh library, and an end in time.
A child may also act as another user, so that root itself reads nothing that this user could have written.
"""

from __future__ import annotations

import json
import os
import pwd
import select
import signal
import sys
import time
import traceback
import typing as t

from .errors import TdeError
from .files import os_error
from .secret import harden_process

#: Seconds for one act: a login, a scrypt derivation and a few mounts take under five; an HSM that is busy, longer.
SECONDS = 90.0

#: What a defect leaves as it was, as far as anybody can say.
_JOURNALLED = "What was done before it is in the journal."


def isolated(act: t.Callable[[], t.Any], seconds: float = SECONDS, *, user: pwd.struct_passwd | None = None) -> t.Any:
    """Run ``act`` in a child and give its result, which is JSON's kinds of value.

    :param user: whom the child becomes for good before it acts, groups and all; the caller must be root.

    :raises TdeError: the one that ``act`` raised; ``timeout`` after ``seconds``; ``internal_error``.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(act, writer, user)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        raw = _read_until(pipe.fileno(), time.monotonic() + seconds)
    if raw is None:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if raw is None:
        raise TdeError(
            "timeout",
            f"no answer within {seconds:g} seconds",
            obj="token or file system",
            kept="The act was ended; run it again to see what is left to do.",
        )
    return _answer(raw, status)


def _child(act: t.Callable[[], t.Any], writer: int, user: pwd.struct_passwd | None) -> t.NoReturn:
    answer: dict[str, t.Any]
    try:
        if user is not None:
            _become(user)
        # Locked memory is not inherited.
        harden_process()
        answer = {"result": act()}
    except TdeError as error:
        answer = {"error": {**error.result(), "message": error.message}}
    except OSError as exc:
        failed = os_error(exc, exc.filename if isinstance(exc.filename, str) else "the command", kept=_JOURNALLED)
        answer = {"error": {**failed.result(), "message": failed.message}}
    except BaseException as exc:
        # The text of a foreign exception may hold a value; its type and place do not.
        place = traceback.extract_tb(exc.__traceback__)[-1]
        said = f"{type(exc).__name__} in {os.path.basename(place.filename)}:{place.lineno} ({place.name})"
        answer = {"error": {**TdeError("internal_error", said, obj="the command", kept=_JOURNALLED).result(), "message": said}}
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(answer).encode())
    # No finaliser of a library runs: what it had open ends with the process.
    os._exit(0)


def _become(user: pwd.struct_passwd) -> None:
    # The caller's folder may be closed to this user, and libraries look for their files in HOME.
    os.chdir("/")
    os.environ.update({"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name})
    os.initgroups(user.pw_name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def _read_until(fd: int, deadline: float) -> bytes | None:
    """All that comes until the other end closes; None if it does not in time."""
    parts: list[bytes] = []
    while True:
        ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            return None
        part = os.read(fd, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _answer(raw: bytes, status: int) -> t.Any:
    if not raw:
        said = f"the child ended with signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the child gave no answer"
        raise TdeError("internal_error", f"{said}; a PKCS#11 library may have crashed", obj="the command", kept=_JOURNALLED)
    answer = json.loads(raw)
    if "error" not in answer:
        return answer["result"]
    error = answer["error"]
    raise TdeError(
        error["error_code"],
        error["message"],
        obj=error["object"],
        kept=error["kept"],
        next_step=error["next_step"],
        details=error["details"],
    )
