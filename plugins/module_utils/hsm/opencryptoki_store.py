# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folders in which openCryptoki keeps its tokens: format, users, shared memory."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ..pkcs11 import opencryptoki as base
from .opencryptoki_api import STORE

#: usr/lib/common/host_defs.h: sizes of TOKEN_DATA_OLD and TOKEN_DATA, by which pkcstok_migrate tells the formats apart.
_SIZES = {232: "old", 592: "3.12"}
#: How the library's file is called where a process has it mapped.
_MAPPED = ("/libopencryptoki.so", "/PKCS11_API.so")


def folder(name: str) -> str:
    """The path of a token's folder."""
    return os.path.join(STORE, name)


def store_format(name: str) -> str:
    """``old`` or ``3.12`` (the FIPS format), ``none`` where no token was ever started in the folder, ``unknown``."""
    try:
        return format_of(os.stat(os.path.join(folder(name), "NVTOK.DAT")).st_size)
    except FileNotFoundError:
        return "none"


def format_of(size: int) -> str:
    """The format that a token's NVTOK.DAT of that many bytes has."""
    return _SIZES.get(size, "unknown")


def wished_format(settings: t.Mapping[str, str]) -> str:
    """The format that a slot's tokversion stands for; without one it is the old one (configuration.h)."""
    major, dummy, minor = settings.get("tokversion", "0.0").partition(".")
    return "3.12" if (int(major), int(minor)) >= (3, 12) else "old"


def shared_memory(name: str) -> str:
    """The token's segment of shared memory (usr/lib/common/shared_memory.c: the folder's path with dots for slashes)."""
    return "/dev/shm/" + folder(name).strip("/").replace("/", ".")  # noqa: S108 - where the library puts it


def users() -> list[tuple[int, str]]:
    """Programs that have openCryptoki's library loaded on this host: process id and name, by id.

    Those of other IPC name spaces (containers) have another daemon, and are left out.
    """
    own, found = os.readlink("/proc/self/ns/ipc"), []
    for process in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        with contextlib.suppress(OSError):
            if int(process) == os.getpid() or os.readlink(f"/proc/{process}/ns/ipc") != own:
                continue
            with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as maps:
                if not any(part in line for line in maps for part in _MAPPED):
                    continue
            with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as handle:
                name = handle.read().strip()
            if name != base.DAEMON:
                found.append((int(process), name))
    return found


def named(programs: t.Sequence[tuple[int, str]]) -> str:
    """Programs in words, the first five of them."""
    shown = ", ".join(f"{name} ({process})" for process, name in programs[:5])
    return shown + (f" and {len(programs) - 5} more" if len(programs) > 5 else "")
