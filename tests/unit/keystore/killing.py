# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Kill the running code at its n-th change of the disk, cheaply.

Every call of ``os`` that changes the disk is a point, and every write is two, so that half of it can be there. At the
chosen point :class:`Killed` is raised, and from then on every such call raises it again: no handler can tidy up, and
nothing that was buffered gets out, as after SIGKILL. Locks are gone with their descriptors, as then.
"""

from __future__ import annotations

import contextlib
import os
import typing as t

_CHANGES = ("rename", "unlink", "mkdir", "rmdir", "fsync", "fchmod", "fchown", "replace", "link", "ftruncate")


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


class _Handle:
    """What os.fdopen gives: unbuffered, each write in two halves with a point between."""

    def __init__(self, kill: Kill, raw: t.Any) -> None:
        self._kill, self._raw, self._waiting = kill, raw, b""

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def flush(self) -> None:
        data, self._waiting = self._waiting, b""
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            if part:
                self._kill.point()
                self._raw.write(part)

    def truncate(self) -> None:
        self._kill.point()
        self._raw.truncate()

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self._raw, name)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self._kill.dead:
                self.flush()
        finally:
            self._raw.close()


class Kill:
    """The one who counts and kills.

    :param at: the point, from 1; None counts only. :param act: what killing is; by default the simulation.
    :ivar points: how many were passed.
    """

    def __init__(self, at: int | None = None, act: t.Callable[[], None] | None = None) -> None:
        self.at, self.act, self.points, self.dead = at, act, 0, False

    def point(self) -> None:
        self.points += 1
        if self.dead or self.points == self.at:
            if self.act and not self.dead:
                self.act()
            self.dead = True
            raise Killed

    @contextlib.contextmanager
    def __call__(self) -> t.Iterator[Kill]:
        """Within it the disk's changes are points; ends quietly when killed."""
        real = {name: getattr(os, name) for name in (*_CHANGES, "open", "fdopen")}

        def changing(name: str) -> t.Callable[..., t.Any]:
            def call(*args: t.Any, **kwargs: t.Any) -> t.Any:
                self.point()
                return real[name](*args, **kwargs)

            return call

        def opening(path: t.Any, flags: int, *args: t.Any, **kwargs: t.Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.point()
            return t.cast(int, real["open"](path, flags, *args, **kwargs))

        def fdopening(fd: int, mode: str = "r", *args: t.Any, **kwargs: t.Any) -> t.Any:
            if mode in ("wb", "r+b"):
                return _Handle(self, real["fdopen"](fd, mode, buffering=0))
            return real["fdopen"](fd, mode, *args, **kwargs)

        try:
            for name in _CHANGES:
                setattr(os, name, changing(name))
            os.open, os.fdopen = opening, fdopening  # type: ignore[assignment]
            with contextlib.suppress(Killed):
                yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)
