# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is there: keys in memory, include file, server process and its answers as plain data. Reads only."""

from __future__ import annotations

import dataclasses
import os
import time
import typing as t

from ...common.errors import TdeError
from ...common.files import read_private
from .. import memory
from ..base import Connection
from . import conf, former, keyfile, sql
from .options import Options

#: Names of the server's program: since MariaDB 10.5, and before.
_PROGRAMS = ("mariadbd", "mysqld")
#: Folders of processes.
PROC = "/proc"


@dataclasses.dataclass(frozen=True)
class Process:
    """A running server; :param started: CLOCK_BOOTTIME in seconds, to a hundredth."""

    pid: int
    started: float


@dataclasses.dataclass(frozen=True)
class State:
    """A server and what it is given.

    :param mounted: the key directory is a ramfs; :param keys: its key file, None if there is none.
    :param include: the include file's content, None if there is none; :param include_age: seconds since it was written.
    :param former: the key file from before ours, None if it is gone or there was none.
    :param answer: what the server says, or :param error: why it says nothing.
    """

    access: sql.Access
    data_directory: str
    mounted: bool
    keys: keyfile.KeyFile | None
    include: bytes | None
    include_age: float
    process: Process | None
    answer: sql.Server | None
    error: TdeError | None
    former: former.Lying | None = None

    def has_loaded(self, number: int) -> bool:
        """Whether the running server knows a key: it uses it, or was started after the key came into the file."""
        if self.answer is None or self.answer.plugins.get(conf.PLUGIN) is None:
            return False
        since = self.keys.since.get(number) if self.keys else None
        used = any(space.key == number and space.encrypted for space in self.answer.spaces)
        return used or (self.process is not None and since is not None and self.process.started >= int(since * 100) / 100)

    @property
    def process_age(self) -> float:
        """Seconds since the server was started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.process.started if self.process else 0.0


def process(data_directory: str, proc: str = PROC) -> Process | None:
    """The server that runs in a data directory, which is its working directory, or None."""
    here = os.path.realpath(data_directory)
    for entry in sorted((name for name in os.listdir(proc) if name.isdigit()), key=int):
        base = os.path.join(proc, entry)
        try:
            program = os.path.basename(os.readlink(os.path.join(base, "exe"))).removesuffix(" (deleted)")
            if program not in _PROGRAMS or os.readlink(os.path.join(base, "cwd")) != here:
                continue
            with open(os.path.join(base, "stat"), encoding="utf-8", errors="replace") as handle:
                # Field 22, after the name in parentheses: clock ticks after boot (proc_pid_stat(5)).
                ticks = int(handle.read().rpartition(")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            continue
        return Process(int(entry), ticks / os.sysconf("SC_CLK_TCK"))
    return None


def key_file(options: Options) -> tuple[bool, keyfile.KeyFile | None]:
    """Whether the key directory is mounted, and the key file in it.

    :raises TdeError: ``mount_point_taken``, and what reading a private file raises.
    """
    if not memory.mounted(options.key_directory):
        return False, None
    return True, _or_none(lambda: keyfile.parse(read_private(options.key_file, forbidden_mode=0o027)))


def _or_none(act: t.Callable[[], t.Any]) -> t.Any:
    try:
        return act()
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        return None


def include_path(options: Options) -> str:
    """Where the include file is."""
    return os.path.join(options.include_directory, conf.NAME)


def look(connection: Connection, options: Options, *, ask: bool = True) -> State:
    """All of it.

    :param ask: connect to the server; without, its process is looked at only.
    :raises TdeError: what keeps a state of files and mounts from being established.
    """
    access = sql.access(connection, options.os_user, path=options.socket, user=options.user)
    answer, error = None, None
    directory = options.data_directory or ""
    if ask:
        try:
            with sql.connect(access) as opened:
                answer = sql.inspect(opened)
            directory = directory or answer.data_directory
        except TdeError as exc:
            error = exc
    path = include_path(options)
    include: bytes | None = _or_none(lambda: read_private(path, forbidden_mode=0o022))
    mounted, keys = key_file(options)
    return State(
        access=access,
        data_directory=directory,
        mounted=mounted,
        keys=keys,
        include=include,
        include_age=time.time() - os.stat(path).st_mtime if include is not None else 0.0,
        process=process(directory) if directory else None,
        answer=answer,
        error=error,
        former=former.lying(options),
    )
