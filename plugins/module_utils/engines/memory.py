# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A folder in memory, never swapped out, through which a server is given what it must have in a file."""

from __future__ import annotations

import os
import stat

from ..common.errors import TdeError
from ..common.files import make_private_directory, os_error, remove_leftovers_of, write_atomic
from ..common.run import run_program
from ..storage.mounts import mounted_at

#: The file system that is never written to swap space (kernel's Documentation/filesystems/ramfs-rootfs-initramfs.rst).
RAMFS = "ramfs"


def mounted(path: str) -> bool:
    """Whether the folder is one in memory.

    :raises TdeError: ``mount_point_taken``: something else is mounted there.
    """
    mount = mounted_at(path)
    if mount is None:
        return False
    if mount.filesystem != RAMFS:
        raise TdeError(
            "mount_point_taken",
            f"a {mount.filesystem} is mounted there, which may be written to a disk",
            obj=path,
            next_step="Name another key_directory.",
        )
    return True


def mount(path: str, user: str) -> None:
    """Make the folder one in memory; what is there is never hidden.

    :param user: the server's user, who must be able to pass to it.
    :raises TdeError: ``mount_point_not_empty``, ``permission_denied``.
    """
    _make_way(path, user)
    if os.listdir(path):
        raise TdeError(
            "mount_point_not_empty", "has entries", obj=path, next_step="Move them away, or name another key_directory."
        )
    # Options of ramfs: mode alone (same document).
    run_program(["mount", "-t", RAMFS, "-o", "mode=0700,nosuid,nodev,noexec", "hsm-tde", path])


def _make_way(path: str, user: str) -> None:
    """Make the folder and those above it that are missing. The server's user must pass through them, whatever the umask is:
    at boot it lets nobody."""
    umask = os.umask(0o022)
    try:
        make_private_directory(path, 0o755)
    finally:
        os.umask(umask)
    folder = os.path.dirname(path)
    while folder != "/":
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            raise TdeError(
                "permission_denied",
                f"does not let {user} pass",
                obj=folder,
                next_step=f"Let others pass through it (chmod o+x {folder}), or name another key_directory.",
            )
        folder = os.path.dirname(folder)


def unmount(path: str) -> None:
    """Take the folder away with all that is in it."""
    if mounted(path):
        run_program(["umount", path])


def give(path: str, content: bytes, *, uid: int, gid: int, mode: int) -> None:
    """Write a file into a mounted folder; its group may read the folder and change nothing in it."""
    folder = os.path.dirname(path)
    try:
        os.chown(folder, 0, gid)
        os.chmod(folder, 0o750)  # noqa: S103 - its files are readable for the group, too
    except OSError as exc:
        raise os_error(exc, folder) from None
    remove_leftovers_of(path)
    write_atomic(path, content, mode=mode, uid=uid, gid=gid)
