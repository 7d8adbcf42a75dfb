# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The files of a Security World on this client: their digest, their backup, a copy of a key that is put aside.

Members of the group ``nfast`` write to that folder, so no file in it is opened by a link, and only regular files are read.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import re
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import make_private_directory, os_error, trusted_directory, write_atomic

#: Larger than any file of a Security World (a world is 40 KiB, a key 10).
_MAX_BYTES = 4 << 20
#: What all clients of a world have in common (user guide, "Contents of the kmdata folder"); ``module_*`` differs with the HSM.
_SHARED = re.compile(r"world|key_.*|softcard_.*|cards?_.*")


def files(local: str) -> dict[str, bytes]:
    """The folder's regular files with their content, temporary ones left out.

    :raises TdeError: ``file_absent``, ``permission_denied``, ``io_error``.
    """
    found = {}
    try:
        with os.scandir(local) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        for name in names:
            content = _read(os.path.join(local, name))
            if content is not None:
                found[name] = content
    except OSError as exc:
        raise os_error(exc, local) from None
    return found


def _read(path: str) -> bytes | None:
    """None for what is no regular file, and for what was renamed meanwhile."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno != errno.ELOOP:
            raise
        # Left out, it would be missing from the backup.
        raise TdeError("file_not_private", "is a link", obj=path) from None
    with os.fdopen(fd, "rb") as handle:
        return handle.read(_MAX_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else None


def digest(content: t.Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents of what all clients have in common; equal on two clients with the same copy."""
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(content.items()) if _SHARED.fullmatch(name)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def back_up(local: str, directory: str) -> str:
    """Copy the folder's files to ``<directory>/<time>-<digest>``, root's own; an equal backup is not made twice.

    :returns: the backup's folder, complete and on the disk.
    """
    content = files(local)
    if not content:
        raise TdeError("file_absent", "has no files to back up", obj=local)
    tag = hashlib.sha256(b"".join(name.encode() + b"\0" + data for name, data in content.items())).hexdigest()[:16]
    make_private_directory(directory)
    for name in sorted(os.listdir(directory)):
        if name.endswith(f"-{tag}") and _complete(os.path.join(directory, name), content):
            return os.path.join(directory, name)
    time = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    place = os.path.join(directory, f"{time}-{tag}")
    make_private_directory(place)
    for name, data in content.items():
        write_atomic(os.path.join(place, name), data)
    if not _complete(place, content):
        raise TdeError("io_error", "the backup does not have the content that was written", obj=place)
    return place


def _complete(place: str, content: t.Mapping[str, bytes]) -> bool:
    return all(_read(os.path.join(place, name)) == data for name, data in content.items())


def put_aside(local: str, name: str, backup: str) -> None:
    """Remove a key file that the backup holds byte for byte.

    :raises TdeError: ``unfinished`` where the backup does not hold it.
    """
    path = os.path.join(local, name)
    with trusted_directory(backup):
        if _read(path) is None or _read(path) != _read(os.path.join(backup, name)):
            raise TdeError("unfinished", "is not in the backup as it is now", obj=path, next_step="Run the task again.")
    try:
        os.unlink(path)
        folder = os.open(local, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        raise os_error(exc, path) from None
