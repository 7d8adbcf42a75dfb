# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folders in which openCryptoki keeps its tokens: format, users, shared memory."""

from __future__ import annotations

import contextlib
import grp
import os
import stat
import typing as t

from ..common.files import os_error
from ..common.plan import Step
from ..pkcs11 import opencryptoki as base
from .opencryptoki_api import STORE

#: usr/lib/common/host_defs.h: sizes of TOKEN_DATA_OLD and TOKEN_DATA, by which pkcstok_migrate tells the formats apart.
_SIZES = {232: "old", 592: "3.12"}
#: Of a token's folder and its folder of objects (usr/sbin/pkcsslotd/slotmgr.c, chk_create_tokdir).
FOLDER_MODE = 0o770
#: How the library's file is called where a process has it mapped.
_MAPPED = ("/libopencryptoki.so", "/PKCS11_API.so")


def folder(name: str) -> str:
    """The path of a token's folder."""
    return os.path.join(STORE, name)


def closed_folders(name: str, group: str) -> list[Step]:
    """One step a folder of a token in which members of its group cannot write.

    Debian's package makes the folders of its own tokens root's with mode 0755 (3.8 and 3.23): programs of other users then
    log in, and cannot make a key. A folder that is not there yet is made as it must be by the daemon.

    :param group: of the token's users.
    """
    steps = []
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        return []
    for path in (folder(name), os.path.join(folder(name), "TOK_OBJ")):
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(info.st_mode) and (info.st_gid != gid or info.st_mode & stat.S_IRWXG != stat.S_IRWXG):
            before, after = f"{_group(info.st_gid)} {stat.S_IMODE(info.st_mode):04o}", f"{group} {FOLDER_MODE:04o}"
            why = f"its group and mode are {before}, and shall be {after}"
            steps.append(Step("open_folder", path, why, {"gid": gid, "before": before, "after": after}))
    return steps


def open_folder(step: Step) -> None:
    """Do a step of :func:`closed_folders`; the owner stays.

    :raises TdeError: as :func:`.files.os_error` says.
    """
    try:
        handle = os.open(step.obj, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchown(handle, -1, step.data["gid"])
            os.fchmod(handle, FOLDER_MODE)
        finally:
            os.close(handle)
    except OSError as exc:
        raise os_error(exc, step.obj) from None


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


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
