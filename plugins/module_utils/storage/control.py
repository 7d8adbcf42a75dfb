# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files in the clear, which a proof must be able to see on the device, and a canary's files.

A proof that finds no plain text shows something only if the same reading finds plain text where there is some.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error, remove_leftovers_of, write_atomic
from .blocks import inode_encrypted
from .mounts import mount_of

#: A file in the clear beside the encrypted places, which a proof must find on the device (see :func:`write_control`).
CONTROL_NAME = "hsm-tde.control"
_CONTROL_BYTES = 64 << 10
_CONTROL_TEXT = (
    b"hsm.tde: this file is in the clear on purpose. A proof that could not see it on the device would prove nothing.\n"
)

#: How many entries of a file system are seen in search of a file in the clear.
_MOST_ENTRIES = 5000


def write_control(directory: str) -> bool:
    """Put the file in the clear beside the places, once.

    :param directory: root's own folder on the file system, not encrypted.
    :returns: whether it was written now.
    :raises TdeError: as :func:`write_atomic`.
    """
    path = os.path.join(directory, CONTROL_NAME)
    if os.path.lexists(path):
        return False
    remove_leftovers_of(path)
    write_atomic(path, control_content(), mode=0o644)
    return True


def control_content() -> bytes:
    """What a file in the clear holds."""
    # Text by chance: a file system that compresses, or finds equal blocks, would hide what repeats.
    return _CONTROL_TEXT + secrets.token_hex((_CONTROL_BYTES - len(_CONTROL_TEXT)) // 2).encode()


def candidates(directory: str) -> t.Iterator[str]:
    """Files in the clear on the file system of a directory: our own, then others of at least one page."""
    device = os.stat(directory).st_dev
    mount_point = mount_of(directory).mount_point
    for folder in dict.fromkeys((os.path.dirname(directory), mount_point)):
        if os.path.isfile(os.path.join(folder, CONTROL_NAME)):
            yield os.path.join(folder, CONTROL_NAME)
    seen = 0
    for folder, folders, names in os.walk(mount_point):
        seen += len(folders) + len(names)
        if seen > _MOST_ENTRIES:
            return
        folders[:] = [name for name in folders if _in_the_clear(os.path.join(folder, name), device)]
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                info = os.lstat(path)
                if stat.S_ISREG(info.st_mode) and info.st_dev == device and info.st_size >= os.sysconf("SC_PAGE_SIZE"):
                    yield path


def clear_ancestor(directory: str) -> str:
    """The nearest folder above that is not encrypted, on the same file system.

    :raises TdeError: ``file_absent`` if there is none.
    """
    device = os.stat(directory).st_dev
    above = os.path.dirname(directory)
    while os.stat(above).st_dev == device:
        if _in_the_clear(above, device):
            return above
        above = os.path.dirname(above)
    raise TdeError(
        "file_absent", "no folder above it on this file system is in the clear, so there is no place for a control", obj=directory
    )


def _in_the_clear(folder: str, device: int) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_dev == device and not inode_encrypted(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def temporary_file(folder: str, content: bytes) -> t.Iterator[str]:
    """A file with this content, written to the disk, of the folder's owner; removed at the end.

    :raises TdeError: ``disk_full``, ``permission_denied``, ``io_error``.
    """
    path = os.path.join(folder, f".hsm-tde-canary.{secrets.token_hex(6)}")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise os_error(exc, path) from None
    try:
        try:
            with os.fdopen(fd, "wb") as handle:
                owner = os.stat(folder)
                # A backup that the database's user takes meanwhile must be able to read it.
                os.fchown(fd, owner.st_uid, owner.st_gid)
                handle.write(content)
                handle.flush()
                os.fsync(fd)
        except OSError as exc:
            raise os_error(exc, path) from None
        yield path
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
