# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folder above the encrypted places on the machine: what is there, and the acts that ``image.plan`` orders.

Each act can be killed at any moment: the next look at the machine leads to a plan that goes on from there.

Sources: ``Documentation/filesystems/ext4/super.rst`` (the superblock), mkfs.ext4(8), resize2fs(8), mount(8).
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
import typing as t

from ..common.errors import TdeError
from ..common.files import check_parents, make_private_directory, os_error, trusted_directory
from ..common.plan import Handlers
from ..common.run import run_program
from . import fscrypt
from .control import CONTROL_NAME, write_control
from .image import BLOCK_SIZE, LABEL, DirectoryState, ImageState, StorageState, StorageWish, Superblock
from .loops import Loop, attach, attached
from .mounts import Mount, mounted_at, mounts

#: Formatting and growing write tables in proportion to the size; seconds.
_LONG = 900
#: mkfs.ext4(8): give no space back, and leave no tables to be zeroed later, which the kernel does by punching holes.
_KEEP_SPACE = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
#: mount(8), ext4(5): nor those of groups that came with growth.
_MOUNT_OPTIONS = "nosuid,nodev,noinit_itable"
#: e2fsck(8): operational error; here, that it could not have the device for itself.
_IN_USE = 8
_WAIT_SECONDS = 5.0


def parse_superblock(head: bytes) -> Superblock | None:
    """The superblock in the first 2048 bytes of a device; None if it is not one of ext2, ext3 or ext4."""
    block = head[1024:2048]
    if len(block) < 1024 or block[0x38:0x3A] != b"\x53\xef":
        return None
    low, log_size, incompatible = (struct.unpack_from("<I", block, offset)[0] for offset in (0x4, 0x18, 0x60))
    high = struct.unpack_from("<I", block, 0x150)[0] if incompatible & 0x80 else 0
    block_size = 1024 << min(log_size, 6)
    label = block[0x78:0x88].split(b"\0")[0].decode("utf-8", "replace")
    return Superblock(label, block_size, (high << 32 | low) * block_size, bool(incompatible & 0x10000))


def _temporary(image: str) -> str:
    """The name under which an image is made."""
    return os.path.join(os.path.dirname(image), f".{os.path.basename(image)}.hsm-tde.new")


def inspect(wish: StorageWish) -> StorageState:
    """What is there now.

    :raises TdeError: ``file_not_private`` (somebody else could replace a parent), ``mount_table_unreadable``,
        ``loop_unavailable``, ``permission_denied``, ``io_error``.
    """
    image, leftover, free = None, False, 0
    if wish.image is not None:
        folder = _existing(os.path.dirname(wish.image))
        check_parents(os.path.join(folder, "x"))
        room = os.statvfs(folder)
        free = room.f_bfree * room.f_frsize
        image = _inspect_image(wish.image)
        leftover = os.path.lexists(_temporary(wish.image))
    support = None if wish.image else fscrypt.supported(_existing(wish.mount_point))
    return StorageState(image, leftover, free, _inspect_directory(wish.mount_point), support)


def _existing(path: str) -> str:
    """The path itself, or the nearest folder above it that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _inspect_image(path: str) -> ImageState | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise os_error(exc, path) from None
    regular = stat.S_ISREG(info.st_mode)
    loops: tuple[Loop, ...] = ()
    mounted: tuple[Mount, ...] = ()
    superblock = None
    if regular:
        with attached(path) as held:
            loops = tuple(one.loop for one in held)
            # While it is attached, the device's cache is newer than the file.
            superblock = _read_superblock(held[0].fd, path) if held else _read_file(path)
            mounted = tuple(mount for mount in mounts() if mount.device in {loop.number for loop in loops})
    # A run that was ended between giving the final name and taking the first one away left two.
    links = info.st_nlink - _same_file(_temporary(path), info)
    return ImageState(regular, links, info.st_uid, stat.S_IMODE(info.st_mode), info.st_size, superblock, loops, mounted)


def _same_file(path: str, info: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), info)
    except FileNotFoundError:
        return False


def _read_file(path: str) -> Superblock | None:
    try:
        with open(path, "rb", buffering=0) as handle:
            return _read_superblock(handle.fileno(), path)
    except OSError as exc:
        raise os_error(exc, path) from None


def _read_superblock(fd: int, path: str) -> Superblock | None:
    try:
        return parse_superblock(os.pread(fd, 2048, 0))
    except OSError as exc:
        raise os_error(exc, path) from None


def _inspect_directory(path: str) -> DirectoryState | None:
    try:
        with trusted_directory(os.path.dirname(path)):
            info = os.lstat(path)
            if not stat.S_ISDIR(info.st_mode):
                raise TdeError("place_not_directory", "is a link or not a directory", obj=path)
            # Whatever mkfs made does not count as content.
            names = set(os.listdir(path)) - {"lost+found", CONTROL_NAME}
    except FileNotFoundError:
        return None
    except TdeError as exc:
        if exc.code == "file_absent":
            return None
        raise
    except OSError as exc:
        raise os_error(exc, path) from None
    control = os.path.lexists(os.path.join(path, CONTROL_NAME))
    return DirectoryState(info.st_uid, stat.S_IMODE(info.st_mode), not names, control, mounted_at(path))


def handlers(wish: StorageWish) -> Handlers:
    """The acts of :func:`plan`'s steps."""
    return {
        "remove_leftover": lambda step: _remove_leftover(step.obj),
        "create_image": lambda step: _create_image(step.obj, step.data["size"]),
        "extend_image": lambda step: _extend_image(step.obj, step.data["size"]),
        "make_mount_point": lambda step: _make_directory(step.obj),
        "secure_mount_point": lambda step: _secure(step.obj),
        "mount_image": lambda step: _mount_image(t.cast(str, wish.image), step.obj),
        "prepare_root": lambda step: _prepare(step.obj),
        "write_control": lambda step: _control(step.obj),
        "resize_filesystem": lambda step: _resize(step.obj, step.data["online"]),
    }


def _control(path: str) -> None:
    write_control(os.path.dirname(path))


def _remove_leftover(image: str) -> None:
    with trusted_directory(os.path.dirname(image)) as folder, contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.basename(_temporary(image)), dir_fd=folder)


def _create_image(image: str, size: int) -> None:
    """All space is taken now, so that the database never meets a full host disk inside a file system that has room."""
    folder_path, name = os.path.split(image)
    make_private_directory(folder_path)
    temporary = os.path.basename(_temporary(image))
    with trusted_directory(folder_path) as folder:
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                os.posix_fallocate(fd, 0, size)
                options = ["-O", "encrypt", "-b", str(BLOCK_SIZE), "-L", LABEL, "-m", "1", "-E", _KEEP_SPACE]
                run_program(["mkfs.ext4", "-q", "-F", *options, _temporary(image)], timeout=_LONG)
                os.fsync(fd)
                # link() and not rename(): it refuses to replace a file that appeared meanwhile.
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(fd)
                os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
        except FileExistsError:
            raise TdeError(
                "image_foreign", "appeared while the image was being made", obj=f"image {image}", kept="It was left alone."
            ) from None
        except OSError as exc:
            raise os_error(exc, f"image {image}") from None


def _extend_image(image: str, size: int) -> None:
    with trusted_directory(os.path.dirname(image)) as folder:
        try:
            fd = os.open(os.path.basename(image), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                before = os.fstat(fd).st_size
                try:
                    os.posix_fallocate(fd, before, size - before)
                except OSError:
                    # What a full disk gave is handed back; the loop device has not seen it yet.
                    os.ftruncate(fd, before)
                    raise
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise os_error(exc, f"image {image}", kept="It has its former size.") from None


def _make_directory(path: str) -> None:
    make_private_directory(path, 0o755)
    _secure(path)


def _secure(path: str) -> None:
    with trusted_directory(os.path.dirname(path)) as folder:
        try:
            fd = os.open(os.path.basename(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                os.fchown(fd, 0, 0)
                os.fchmod(fd, 0o755)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as exc:
            raise os_error(exc, path) from None


def _prepare(path: str) -> None:
    _secure(path)
    write_control(path)


def _mount_image(image: str, mount_point: str) -> None:
    with attach(image) as held:
        try:
            run_program(["mount", "-t", "ext4", "-o", _MOUNT_OPTIONS, held.loop.node, mount_point], timeout=120)
        except TdeError:
            # The mount of a run that was ended may have come first; the kernel refuses a second one at the same place.
            mount = mounted_at(mount_point)
            if mount is None or mount.device != held.loop.number:
                raise


def _resize(image: str, online: bool) -> None:
    """Let the file system grow to the file's size; run again after an end in between, it goes on.

    Always through the loop device, never on the file: the programs open it for themselves alone, so that two cannot
    write at once when a run was ended and its program goes on.

    :param online: while it is mounted, which the kernel allows to CAP_SYS_RESOURCE only (root in a container may lack it).
    """
    with attach(image) as held:
        held.refresh()
        if not online:
            _check_file_system(held.loop.node, image)
        try:
            run_program(["resize2fs", held.loop.node], timeout=_LONG)
        except TdeError as exc:
            if online and "Permission denied" in exc.message:
                raise TdeError(
                    "resize_refused",
                    "the kernel does not let this process grow a mounted file system (CAP_SYS_RESOURCE is missing)",
                    obj=f"image {image}",
                    kept="The file is larger now, its file system has its former size and goes on working.",
                    next_step="Stop the database, close the keystore, unmount the image and run again: it then grows before it is mounted.",
                ) from None
            raise
        _take_space(image)


def _check_file_system(node: str, image: str) -> None:
    """What resize2fs asks for first. A mount that is just going away, also in another mount namespace, is waited for.

    :raises TdeError: ``resize_refused``, ``command_failed``.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while run_program(["e2fsck", "-f", "-p", node], timeout=_LONG, ok=(0, 1, _IN_USE)).returncode == _IN_USE:
        if time.monotonic() >= deadline:
            raise TdeError(
                "resize_refused",
                "is in use by another program, or mounted where this process does not see it",
                obj=f"image {image}",
                kept="The file is larger now, its file system has its former size.",
                next_step="Wait for a run that still grows it, or unmount it there; then run again.",
            )
        time.sleep(0.2)


def _take_space(image: str) -> None:
    """Fill the holes that growing punched where it zeroed tables; contents stay."""
    try:
        fd = os.open(image, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    except OSError as exc:
        raise os_error(exc, f"image {image}", kept="It has grown, and parts of it take no space on the disk yet.") from None
