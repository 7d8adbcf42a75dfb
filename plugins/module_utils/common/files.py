# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files that decide over keys: opened without following links, judged by descriptor, written atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
import typing as t

from .errors import TdeError

#: Larger than any file of ours; a bound on what is read before it is parsed.
MAX_BYTES = 1 << 20


def os_error(exc: OSError, obj: str, kept: str = "Nothing was changed.") -> TdeError:
    """The operating system's refusal as one of ours, by errno.

    :param obj: what was being read or written.
    """
    code = {
        errno.ENOENT: "file_absent",
        errno.EACCES: "permission_denied",
        errno.EPERM: "permission_denied",
        errno.ENOSPC: "disk_full",
        errno.EDQUOT: "disk_full",
    }.get(exc.errno or 0, "io_error")
    name = errno.errorcode.get(exc.errno or 0, "?")
    return TdeError(code, f"{os.strerror(exc.errno or 0)} ({name})", obj=obj, kept=kept)


def _not_private(path: str, reason: str) -> TdeError:
    return TdeError(
        "file_not_private",
        reason,
        obj=path,
        kept="It was not read or written.",
        next_step="Find out who changed it before you correct owner and mode.",
    )


def _trusted(owners: t.Collection[int] | None) -> set[int]:
    return {0, *((os.geteuid(),) if owners is None else owners)}


def _check_directory(path: str, info: os.stat_result, owners: t.Collection[int]) -> None:
    if not stat.S_ISDIR(info.st_mode):
        raise _not_private(path, "is a link or not a directory")
    if info.st_uid not in owners:
        raise _not_private(path, f"belongs to user id {info.st_uid}")
    # A sticky directory such as /tmp lets nobody rename what others own; all else must not be writable.
    if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
        raise _not_private(path, f"is writable for others (mode {stat.S_IMODE(info.st_mode):04o})")


@contextlib.contextmanager
def trusted_directory(path: str, owners: t.Collection[int] | None = None) -> t.Iterator[int]:
    """Walk to a directory from ``/`` with O_NOFOLLOW, judging every component; yields its descriptor.

    Every component must be a real directory, owned by root or one of ``owners``, that nobody else can write.

    :param owners: user ids trusted beside root; the caller's own if not given.

    :raises TdeError: ``file_not_private``, ``file_absent``, ``permission_denied``.
    """
    if not os.path.isabs(path):
        raise TdeError("invalid_option", "must be an absolute path", obj=path)
    allowed = _trusted(owners)
    walked = "/"
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in [part for part in os.path.normpath(path).split("/") if part]:
            walked = os.path.join(walked, name)
            try:
                child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError as exc:
                if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise _not_private(walked, "is a link or not a directory") from None
                raise os_error(exc, walked) from None
            os.close(fd)
            fd = child
            _check_directory(walked, os.fstat(fd), allowed)
        yield fd
    finally:
        os.close(fd)


def check_parents(path: str, owners: t.Collection[int] | None = None) -> None:
    """Refuse a path one of whose parents somebody else could replace.

    :raises TdeError: as :func:`trusted_directory`.
    """
    with trusted_directory(os.path.dirname(os.path.normpath(path)), owners):
        pass


def read_private(
    path: str, *, owners: t.Collection[int] | None = None, forbidden_mode: int = 0o077, max_bytes: int = MAX_BYTES
) -> bytes:
    """Read a private file: regular, of one of ``owners``, one link, no bit of ``forbidden_mode`` set.

    The same descriptor is judged and read; no link is followed anywhere on the path.

    :param forbidden_mode: mode bits that must be clear (0o077: nobody but the owner; 0o022: others may read).
    :param max_bytes: size in bytes above which the file is not read.
    :raises TdeError: ``file_absent``, ``file_not_private``, ``file_too_large``, ``permission_denied``, ``io_error``.
    """
    with trusted_directory(os.path.dirname(os.path.normpath(path)), owners) as folder:
        try:
            fd = os.open(os.path.basename(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise _not_private(path, "is a symbolic link") from None
            raise os_error(exc, path) from None
        with os.fdopen(fd, "rb") as handle:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _not_private(path, "is not a regular file")
            if info.st_uid not in _trusted(owners):
                raise _not_private(path, f"belongs to user id {info.st_uid}")
            if info.st_mode & forbidden_mode:
                raise _not_private(path, f"has mode {stat.S_IMODE(info.st_mode):04o}")
            if info.st_nlink != 1:
                raise _not_private(path, f"has {info.st_nlink} links")
            if info.st_size > max_bytes:
                raise TdeError("file_too_large", f"has {info.st_size} bytes; at most {max_bytes} are read", obj=path)
            try:
                # Not max_bytes: a buffer of that size would be filled with pages where memory is locked.
                return handle.read(min(max_bytes, info.st_size))
            except OSError as exc:
                raise os_error(exc, path) from None


def write_atomic(
    path: str, data: bytes, *, mode: int = 0o600, uid: int = -1, gid: int = -1, owners: t.Collection[int] | None = None
) -> None:
    """Replace a file so that a crash leaves the former or the new content, never a part.

    Temporary file in the same folder, fsync, rename, fsync of the folder; on any error the temporary file goes.

    :param mode: permission bits of the new file.
    :param uid: owner, -1 for the caller; :param gid: group, -1 for the caller's.
    :raises TdeError: ``disk_full``, ``permission_denied``, ``file_not_private``, ``io_error``.
    """
    name = os.path.basename(path)
    temporary = f".{name}.{secrets.token_hex(6)}.tmp"
    with trusted_directory(os.path.dirname(os.path.normpath(path)), owners) as folder:
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                with os.fdopen(fd, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fchown(fd, uid, gid)
                    os.fchmod(fd, mode)
                    os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            os.fsync(folder)
        except OSError as exc:
            raise os_error(exc, path, kept="The former content, if any, is in place.") from None


def remove_leftovers(folder: str, owners: t.Collection[int] | None = None) -> list[str]:
    """Remove the temporary files that a killed :func:`write_atomic` left. Call it with the lock held.

    :returns: the names removed.
    """
    removed = []
    with trusted_directory(folder, owners) as fd:
        for name in os.listdir(fd):
            if name.startswith(".") and name.endswith(".tmp"):
                os.unlink(name, dir_fd=fd)
                removed.append(name)
    return removed


def leftovers_of(path: str) -> list[str]:
    """The temporary files (absolute paths) that a killed :func:`write_atomic` of this file left, and of no other file."""
    ours = re.compile(rf"\.{re.escape(os.path.basename(path))}\.[0-9a-f]{{12}}\.tmp")
    folder = os.path.dirname(os.path.normpath(path))
    with trusted_directory(folder) as fd:
        return [os.path.join(folder, name) for name in os.listdir(fd) if ours.fullmatch(name)]


def remove_leftovers_of(path: str) -> None:
    """Remove them. Call it with the lock held that guards the file."""
    for leftover in leftovers_of(path):
        with trusted_directory(os.path.dirname(leftover)) as fd:
            os.unlink(os.path.basename(leftover), dir_fd=fd)


def make_private_directory(path: str, mode: int = 0o700) -> bool:
    """Create a directory and its missing parents, root's own. Existing components are judged, never changed.

    :returns: whether it was created.
    """
    created = False
    parts = [part for part in os.path.normpath(path).split("/") if part]
    for depth in range(1, len(parts) + 1):
        here = "/" + "/".join(parts[:depth])
        with trusted_directory(os.path.dirname(here)) as folder:
            try:
                os.mkdir(os.path.basename(here), mode if depth == len(parts) else 0o755, dir_fd=folder)
                os.fsync(folder)
                created = depth == len(parts)
            except FileExistsError:
                pass
            except OSError as exc:
                raise os_error(exc, here) from None
    with trusted_directory(path):
        return created


def make_shared_directory(path: str) -> bool:
    """Create a directory of root's own that everybody may look into, whatever the umask. :returns: whether it was created."""
    created = make_private_directory(path, 0o755)
    with trusted_directory(path) as folder:
        if created:
            os.fchmod(folder, 0o755)
    return created


def make_owned_directory(path: str, uid: int, gid: int) -> bool:
    """Create a directory of another user's, mode 0700, in a folder of root's own; an existing one is judged, never changed.

    What lies in it is that user's: root never reads it, and :func:`trusted_directory` refuses to walk into it as root.

    :returns: whether it was created.
    :raises TdeError: ``file_not_private`` where it is another's, or open for others.
    """
    name = os.path.basename(path)
    with trusted_directory(os.path.dirname(path), owners=()) as folder:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
            created = True
        except FileExistsError:
            created = False
        except OSError as exc:
            raise os_error(exc, path) from None
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            raise _not_private(path, "is a link or not a directory") from None
        try:
            # A kill between making it and giving it away leaves an empty one of root's.
            if os.fstat(fd).st_uid == 0 and not os.listdir(fd):
                os.fchown(fd, uid, gid)
            info = os.fstat(fd)
            if info.st_uid != uid:
                raise _not_private(path, f"belongs to user id {info.st_uid}, not {uid}")
            if info.st_mode & 0o077:
                raise _not_private(path, f"has mode {stat.S_IMODE(info.st_mode):04o}")
            os.fsync(folder)
        finally:
            os.close(fd)
    return created


@contextlib.contextmanager
def lock(path: str, wait_seconds: float = 0.0) -> t.Iterator[int]:
    """Hold an exclusive lock on a file of its own (never on one that is renamed); yields its descriptor.

    A program that inherits the descriptor holds the lock as well, until it has ended (flock(2)).

    :param wait_seconds: how long to wait for another run to end.
    :raises TdeError: ``busy``.
    """
    deadline = time.monotonic() + wait_seconds
    with trusted_directory(os.path.dirname(path)) as folder:
        try:
            fd = os.open(os.path.basename(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as exc:
            raise os_error(exc, path) from None
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TdeError(
                        "busy", "another run holds the lock", obj=path, next_step="Wait for it to end, then run again."
                    ) from None
                time.sleep(0.05)
        yield fd
    finally:
        os.close(fd)
