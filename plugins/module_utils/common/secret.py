# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Secrets in memory: a value that cannot be printed by accident, and a process that cannot be dumped."""

from __future__ import annotations

import ctypes
import resource
import typing as t

from .errors import TdeError

#: prctl(2), linux/prctl.h: PR_SET_DUMPABLE.
_PR_SET_DUMPABLE = 4
#: mlockall(2), asm-generic/mman.h: MCL_CURRENT | MCL_FUTURE.
_MCL_CURRENT_FUTURE = 1 | 2


class Secret:
    """A PIN, passphrase or key. ``repr``, ``str`` and ``format`` show nothing; ``reveal()`` gives the bytes.

    :param value: the secret; text is taken as UTF-8.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str | bytes) -> None:
        self._value = value.encode("utf-8") if isinstance(value, str) else bytes(value)

    def reveal(self) -> bytes:
        """The secret's bytes."""
        return self._value

    def text(self) -> str:
        """The secret as text (UTF-8)."""
        return self._value.decode("utf-8")

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        import hmac

        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        raise TypeError("a secret is not hashable")

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __reduce__(self) -> t.NoReturn:
        raise TypeError("a secret is not pickled")


def secret_from_option(name: str, value: t.Any) -> Secret | None:
    """The secret of an option, refusing what YAML did not read as text.

    :param name: the option's name, for the message.
    :param value: the raw value as it came from the play, before any conversion.
    :raises TdeError: ``secret_not_text``.
    """
    if value is None:
        return None
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str):
        raise TdeError(
            "secret_not_text",
            f"was read as a {type(value).__name__}, not as text, so it may not be the value that was typed",
            obj=f"option {name}",
            kept="It was not tried.",
            next_step=f'Quote the value: {name}: "…".',
        )
    return Secret(value)


def no_core_dumps() -> bool:
    """A crash, of a vendor's library for one, leaves no image of the memory on the disk. :returns: whether the process is undumpable."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The limit alone does not hold where the kernel pipes core dumps to a program (core(5)).
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def harden_process() -> list[str]:
    """Core dumps off, not dumpable, memory locked as far as the host allows.

    :returns: a sentence for each protection that could not be had (containers often lack the right).
    """
    warnings = []
    libc = ctypes.CDLL(None, use_errno=True)
    if not no_core_dumps():
        warnings.append("the process could not be made undumpable")
    if not _unlimited() or libc.mlockall(_MCL_CURRENT_FUTURE) != 0:
        warnings.append("memory could not be locked: secrets may reach swap space")
    return warnings


def _unlimited() -> bool:
    """Whether as much memory may be locked as the process comes to need.

    A process that becomes another user for a while (seteuid to the database's) loses CAP_IPC_LOCK meanwhile; with future
    memory locked, an allocation above the limit then fails (mlock(2), "Limits and permissions").
    """
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (OSError, ValueError):
        return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    return True
