# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Loop devices on an image, each held open from the moment it is known to be the image's until it has been used.

A loop device that nobody holds gives up its file by itself, and its number goes to whoever asks next: a name that
was right a moment ago may be another's file system. Open, it cannot change.

Source: ``linux/loop.h``, loop(4).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error

_LOOP_SET_FD, _LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C00, 0x4C04, 0x4C05
_LOOP_SET_CAPACITY, _LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C07, 0x4C0A, 0x4C82
_AUTOCLEAR = 4
#: struct loop_info64: device, inode, rdevice, offset, sizelimit; lo_flags lies at 52 of its 232 bytes.
_INFO_BYTES, _FLAGS_OFFSET = 232, 52
_INFO = struct.Struct("=QQQQQ")
#: struct loop_config: descriptor, block size, loop_info64, 64 reserved bytes.
_CONFIG = struct.Struct(f"=II{_INFO_BYTES}s64x")

#: How often a free device is asked for, when others take it in between.
_TRIES = 50


class Loop(t.NamedTuple):
    """A loop device on an image. ``whole``: from its first byte to its last."""

    node: str
    number: tuple[int, int]
    whole: bool


class HeldLoop(t.NamedTuple):
    """A loop device and the descriptor that holds it."""

    loop: Loop
    fd: int

    def refresh(self) -> None:
        """Let the device have the size that the file has now.

        :raises TdeError: ``io_error``, ``permission_denied``.
        """
        try:
            fcntl.ioctl(self.fd, _LOOP_SET_CAPACITY)
        except OSError as exc:
            raise os_error(exc, self.loop.node) from None


def _information(fd: int) -> bytearray:
    info = bytearray(_INFO_BYTES)
    fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
    return info


def _loop(fd: int, node: str, image: os.stat_result) -> Loop | None:
    """The device as a loop on the image, None if it is another's. Known by device and inode: a path may have changed."""
    device, inode, dummy, offset, limit = _INFO.unpack_from(_information(fd))
    if (device, inode) != (image.st_dev, image.st_ino):
        return None
    number = os.fstat(fd).st_rdev
    return Loop(node, (os.major(number), os.minor(number)), not offset and not limit)


@contextlib.contextmanager
def attached(path: str, flags: int = os.O_RDONLY) -> t.Iterator[list[HeldLoop]]:
    """The loop devices on a file, held until the end of the block.

    :param flags: how they are opened.
    :raises TdeError: ``loop_unavailable`` (a device that cannot be asked could be one of them), ``file_absent``.
    """
    try:
        image = os.stat(path, follow_symlinks=False)
    except OSError as exc:
        raise os_error(exc, f"image {path}") from None
    with contextlib.ExitStack() as held:
        found = []
        for device in sorted(os.listdir("/sys/block")):
            backing = _backing_file(device)
            if backing is None:
                continue
            node = f"/dev/{device}"
            try:
                fd = os.open(node, flags | os.O_CLOEXEC)
                keep = contextlib.ExitStack()
                keep.callback(os.close, fd)
                with keep:
                    loop = _loop(fd, node, image)
                    if loop:
                        found.append(HeldLoop(loop, fd))
                        held.push(keep.pop_all())
            except OSError as exc:
                # ENXIO: given up meanwhile. A container sees the loop devices of the whole host in /sys, and may open only its own.
                if exc.errno == errno.ENXIO or os.path.basename(backing) != os.path.basename(path):
                    continue
                raise TdeError("loop_unavailable", f"cannot be asked: {os.strerror(exc.errno or 0)}", obj=node) from None
        yield found


def _backing_file(device: str) -> str | None:
    try:
        with open(f"/sys/block/{device}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as handle:
            return handle.read().rstrip("\n")
    except OSError:  # no loop device, or not attached
        return None


@contextlib.contextmanager
def attach(path: str) -> t.Iterator[HeldLoop]:
    """One loop device on a file, held until the end of the block: the one that is there, or a new one.

    Two on one file would be two caches over one file system. A new one gives up the file with its last user: this
    block, a program that was started in it, or a mount.

    :raises TdeError: ``loop_unavailable``, ``permission_denied``, ``io_error``.
    """
    with attached(path, os.O_RDWR) as found:
        if found:
            yield found[0]
            return
        fd, node = _new(path)
        try:
            loop = _loop(fd, node, os.stat(path, follow_symlinks=False))
            if loop is None:
                raise TdeError("io_error", f"{node} was attached and shows another file", obj=f"image {path}")
            yield HeldLoop(loop, fd)
        finally:
            os.close(fd)


def _new(path: str) -> tuple[int, str]:
    with contextlib.ExitStack() as opened:
        image = _open(path, os.O_NOFOLLOW, opened)
        chooser = _open("/dev/loop-control", 0, opened)
        for dummy in range(_TRIES):
            try:
                node = f"/dev/loop{fcntl.ioctl(chooser, _LOOP_CTL_GET_FREE)}"
            except OSError as exc:
                raise _unavailable("/dev/loop-control", exc) from None
            with contextlib.ExitStack() as device:
                fd = _open(node, 0, device)
                try:
                    _configure(fd, image)
                except OSError as exc:
                    if exc.errno == errno.EBUSY:  # somebody else was faster
                        continue
                    raise _unavailable(node, exc) from None
                device.pop_all()
                return fd, node
    raise TdeError("loop_unavailable", "others took every free device", obj="/dev/loop-control", next_step="Run again.")


def _configure(fd: int, image: int) -> None:
    """Attach a file so that the device gives it up with its last user, in one call where the kernel has it (Linux 5.8).

    In two, a run that is ended in between leaves a device behind that nothing frees.

    :raises OSError: EBUSY if somebody else attached a file meanwhile.
    """
    info = bytearray(_INFO_BYTES)
    struct.pack_into("=I", info, _FLAGS_OFFSET, _AUTOCLEAR)
    try:
        fcntl.ioctl(fd, _LOOP_CONFIGURE, bytearray(_CONFIG.pack(image, 0, bytes(info))))
        return
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
    fcntl.ioctl(fd, _LOOP_SET_FD, image)
    fcntl.ioctl(fd, _LOOP_SET_STATUS64, info)


def _open(path: str, flags: int, opened: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except OSError as exc:
        raise (_unavailable(path, exc) if path.startswith("/dev/loop") else os_error(exc, f"image {path}")) from None
    opened.callback(os.close, fd)
    return fd


def _unavailable(node: str, exc: OSError) -> TdeError:
    return TdeError(
        "loop_unavailable",
        os.strerror(exc.errno or 0),
        obj=node,
        next_step="In a container: hand in /dev/loop-control and loop devices. On a host: load the kernel's module loop.",
    )
