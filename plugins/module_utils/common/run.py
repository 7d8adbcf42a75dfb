# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Run another program: list argv, C locale, a time-out, secrets on standard input only."""

from __future__ import annotations

import os
import pwd
import subprocess
import typing as t

from .errors import TdeError

#: Where root's programs are, whatever the caller's PATH says.
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def identity(user: str | None) -> dict[str, t.Any]:
    """What :class:`subprocess.Popen` is given to become a user of the operating system; nothing for who already is."""
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    if entry.pw_uid == os.geteuid():
        return {}
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}


def run_program(
    argv: t.Sequence[str],
    *,
    stdin: bytes = b"",
    user: str | None = None,
    timeout: float = 60,
    ok: t.Collection[int] = (0,),
    environment: t.Mapping[str, str] | None = None,
    inherit: t.Collection[int] = (),
) -> subprocess.CompletedProcess[bytes]:
    """Run a program and wait for it.

    :param argv: program and arguments; never a secret, every user of the host can read them.
    :param stdin: what the program reads; the place for a secret.
    :param user: the operating system's user to become.
    :param timeout: seconds.
    :param ok: exit codes that are no error.
    :param inherit: descriptors that it and its children get, such as that of a lock.
    :raises TdeError: ``command_missing``, ``command_failed``, ``timeout``.
    """
    env = {"PATH": _PATH, "LC_ALL": "C", **(environment or {})}
    if user is not None:
        env["HOME"] = pwd.getpwnam(user).pw_dir
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=env,
            cwd="/",
            check=False,
            pass_fds=tuple(inherit),
            **identity(user),
        )
    except FileNotFoundError:
        raise TdeError("command_missing", "is not installed", obj=argv[0]) from None
    except subprocess.TimeoutExpired:
        raise TdeError("timeout", f"did not end within {timeout:g} seconds", obj=argv[0], kept="It was ended.") from None
    if done.returncode not in ok:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()[-500:]
        raise TdeError(
            "command_failed",
            f"exit code {done.returncode}: {said}",
            obj=" ".join(argv[:3]),
            kept="What it had done by then stays.",
        )
    return done
