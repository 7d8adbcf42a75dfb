# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A copy of SoftHSM's ``token.object``, because SoftHSM empties that file at each login.

SoftHSM 2.6.1 counts wrong tries in ``token.object``: every C_Login, right or wrong, truncates it, unlocks it, and then writes it.
A kill or a power cut in between leaves no bytes, and with them goes the key under which all keys of the token are
encrypted. So a copy is kept beside it, refreshed before each login of ours, and put back where the file is empty. The copy
holds nothing that the file did not, and SoftHSM ignores it. PINs change in it (``C_SetPIN``), the key in it never.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import syslog
import time
import typing as t

_OBJECT, _COPY = "token.object", "token.copy"
_TEMPORARY = ".token.copy.tmp"
#: The file begins with a counter of its writes (SoftHSM, ObjectFile.cpp).
_COUNTER_BYTES = 8
#: A token.object has some hundred bytes.
_MAX_BYTES = 1 << 16
#: Seconds after which an empty file is not one that somebody is about to write.
_SETTLED = 0.5


def is_softhsm(path: str) -> bool:
    """Whether a library is SoftHSM, by its file's name."""
    return os.path.basename(path).startswith("libsofthsm2")


def configuration() -> str:
    """The file that SoftHSM reads in this process's environment (softhsm2.conf(5))."""
    return os.environ.get("SOFTHSM2_CONF") or "/etc/softhsm/softhsm2.conf"


def keep() -> None:
    """Refresh the copies. What cannot be copied is left: a login must not fail for it."""
    for folder in _token_folders():
        with contextlib.suppress(OSError), _opened(folder) as fd:
            content, info = _read(fd, _OBJECT)
            if info is not None and content and content[_COUNTER_BYTES:] != _read(fd, _COPY)[0][_COUNTER_BYTES:]:
                _write_copy(fd, content, info)


def mend() -> list[str]:
    """Fill empty files from their copies. To be called before SoftHSM reads them.

    :returns: the tokens' folders.
    """
    empty = [folder for folder in _token_folders() if _is_empty(folder)]
    if not empty:
        return []
    time.sleep(_SETTLED)
    mended = []
    for folder in empty:
        with contextlib.suppress(OSError), _opened(folder) as fd:
            copy, info = _read(fd, _COPY)
            if info is not None and copy and _fill(fd, copy, info):
                mended.append(folder)
                syslog.syslog(syslog.LOG_WARNING, f"hsm-tde: SoftHSM left {folder}/{_OBJECT} empty; its copy was put back")
    return mended


def _fill(folder: int, copy: bytes, owner: os.stat_result) -> bool:
    """Write the copy into the file, if it is still empty and of the same owner; whether it was written."""
    # In place: whoever has the file open goes on with the same one.
    fd = os.open(_OBJECT, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(fd, "wb") as handle:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_size or info.st_uid != owner.st_uid:
            return False
        handle.write(copy)
        handle.flush()
        os.fsync(fd)
    return True


def _token_folders() -> list[str]:
    try:
        with open(configuration(), encoding="utf-8", errors="replace") as handle:
            found = re.findall(r"^\s*directories\.tokendir\s*=\s*(\S.*?)\s*$", handle.read(_MAX_BYTES), re.MULTILINE)
        return sorted(entry.path for entry in os.scandir(found[-1]) if entry.is_dir(follow_symlinks=False)) if found else []
    except OSError:
        return []


@contextlib.contextmanager
def _opened(folder: str) -> t.Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_empty(folder: str) -> bool:
    try:
        return os.lstat(os.path.join(folder, _OBJECT)).st_size == 0
    except OSError:
        return False


def _read(folder: int, name: str) -> tuple[bytes, os.stat_result | None]:
    """A regular file's content and facts, of one descriptor; nothing and None for one that does not exist."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return b"", None
    with os.fdopen(fd, "rb") as handle:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise OSError(f"{name} is not one regular file")
        return handle.read(_MAX_BYTES), info


def _write_copy(folder: int, content: bytes, owner: os.stat_result) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_TEMPORARY, dir_fd=folder)
    fd = os.open(_TEMPORARY, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(fd, "wb") as handle:
        handle.write(content)
        handle.flush()
        # Whoever owns the token owns the copy; others never get more than they had.
        os.fchown(fd, owner.st_uid, owner.st_gid)
        os.fchmod(fd, owner.st_mode & 0o660)
        os.fsync(fd)
    os.rename(_TEMPORARY, _COPY, src_dir_fd=folder, dst_dir_fd=folder)
