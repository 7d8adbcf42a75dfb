# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What can be told of a PostgreSQL server from outside: its programs, its processes, Debian's clusters."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import typing as t

from ...common.errors import TdeError
from ...common.run import run_program

#: Debian's and PGDG's layout; the newest version wins.
_PROGRAMS = "/usr/lib/postgresql/*/bin"
#: Folders of processes.
PROC = "/proc"


@dataclasses.dataclass(frozen=True)
class Postmaster:
    """A running postmaster, as its lock file names it and the kernel confirms."""

    pid: int
    port: int
    socket: str


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that has a file, its working directory or its root under a path."""

    pid: int
    name: str


def bin_directory(option: str | None, version: str | None = None) -> str:
    """The folder with PostgreSQL's programs.

    :param option: the user's choice; :param version: the major version that is wanted.
    :raises TdeError: ``command_missing``.
    """
    if option:
        found = [option]
    elif version:
        found = [_PROGRAMS.replace("*", version)]
    else:
        found = sorted(glob.glob(_PROGRAMS), key=lambda path: [int(part) for part in re.findall(r"\d+", path)], reverse=True)
    for path in found:
        if os.access(os.path.join(path, "initdb"), os.X_OK):
            return path
    raise TdeError(
        "command_missing",
        "no initdb found",
        obj=", ".join(found) or _PROGRAMS,
        next_step="Install PostgreSQL, or set bin_directory.",
    )


def _read(path: str) -> str:
    # The server's user may have put a pipe there, which would be waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8", errors="replace") as handle:
        return handle.read()


def _is_under(target: str, path: str) -> bool:
    return target == path or target.startswith(path + "/")


def holders(path: str, proc: str = PROC) -> list[Holder]:
    """The processes that have anything open under a path. Needs root to see others' descriptors."""
    path = os.path.realpath(path)
    found = []
    for entry in os.listdir(proc):
        if not entry.isdigit():
            continue
        base = os.path.join(proc, entry)
        try:
            links = [os.path.join(base, "cwd"), os.path.join(base, "root")]
            links += [os.path.join(base, "fd", name) for name in os.listdir(os.path.join(base, "fd"))]
        except OSError:
            continue
        for link in links:
            try:
                held = _is_under(os.readlink(link), path)
            except OSError:
                continue
            if held:
                try:
                    name = _read(os.path.join(base, "comm")).strip()
                except OSError:
                    break
                found.append(Holder(int(entry), name))
                break
    return sorted(found, key=lambda one: one.pid)


def postmaster(data_directory: str, proc: str = PROC) -> Postmaster | None:
    """The server that runs on a data directory, or None.

    The lock file alone proves nothing (it outlives a kill, its pid may be another's); a process whose working
    directory is the data directory does, even where the lock file cannot be read because the key is absent.
    """
    here = os.path.realpath(data_directory)
    lines: list[str] = []
    with contextlib.suppress(OSError):
        # pid, data directory, start time, port, socket folder, listen address (PostgreSQL manual, 73.1).
        lines = _read(os.path.join(here, "postmaster.pid")).splitlines()
    candidates = []
    for entry in os.listdir(proc):
        if entry.isdigit():
            try:
                base = os.path.join(proc, entry)
                if os.readlink(os.path.join(base, "cwd")) == here and "postgres" in os.path.basename(
                    os.readlink(os.path.join(base, "exe"))
                ):
                    status = _read(os.path.join(proc, entry, "status"))
                    if "\nState:\tZ" not in status:
                        candidates.append((int(entry), int(status.split("\nPPid:")[1].split()[0])))
            except (OSError, IndexError, ValueError):
                continue
    pids = {pid for pid, _parent in candidates}
    # A backend's parent is the postmaster, whose own parent is not of the server.
    first = sorted(pid for pid, parent in candidates if parent not in pids)
    if not first:
        return None
    named = int(lines[0]) if lines and lines[0].strip().isdigit() else first[0]
    port = int(lines[3]) if len(lines) > 3 and lines[3].strip().isdigit() else 0
    socket = lines[4].strip() if len(lines) > 4 else ""
    return Postmaster(named if named in pids else first[0], port, socket)


def working_directory(pid: int, proc: str = PROC) -> str | None:
    """The directory that a server's process works in, its data directory, or None if this host has no such process."""
    try:
        return os.readlink(os.path.join(proc, str(pid), "cwd"))
    except OSError:
        return None


@dataclasses.dataclass(frozen=True)
class DebianCluster:
    """A row of pg_lsclusters."""

    version: str
    name: str
    port: int
    running: bool
    owner: str
    data_directory: str


def parse_clusters(output: str) -> list[DebianCluster]:
    """The rows of ``pg_lsclusters --no-header``: version, name, port, status, owner, data directory, log file."""
    found = []
    for line in output.splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[2].isdigit():
            found.append(DebianCluster(fields[0], fields[1], int(fields[2]), "online" in fields[3], fields[4], fields[5]))
    return found


def split_cluster(option: str) -> tuple[str, str]:
    """Version and name of ``15/main``.

    :raises TdeError: ``invalid_option``.
    """
    parts: t.Sequence[str] = option.split("/")
    if (
        len(parts) != 2
        or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", parts[0])
        or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", parts[1])
    ):
        raise TdeError("invalid_option", "must be VERSION/NAME, such as 15/main", obj=f"debian_cluster {option!r}")
    return parts[0], parts[1]


def debian_cluster(option: str) -> DebianCluster | None:
    """Debian's packaged cluster of that name, or None.

    :raises TdeError: ``command_missing`` where postgresql-common is not installed.
    """
    version, name = split_cluster(option)
    rows = parse_clusters(run_program(["pg_lsclusters", "--no-header"]).stdout.decode("utf-8", "replace"))
    return next((row for row in rows if (row.version, row.name) == (version, name)), None)
