# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A file's blocks as the disk holds them, compared with what the file says; read only.

Sources: ``linux/fiemap.h`` and ``Documentation/filesystems/fiemap.rst``, ``linux/stat.h`` and statx(2), open(2) on O_DIRECT.

Three things that gave false proofs shape it: blocks of zeros prove nothing, on either side (what was not
written yet is zeros on the disk); a buffered read of the device stays stale even after fsync, so reads are
direct; ext4 sets no FIEMAP flag for fscrypt, so the inode is asked by statx and by its policy.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import random
import stat
import struct
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error
from . import fscrypt
from .ioctl import READ, WRITE, number
from .mounts import RawDevice

_FIEMAP_HEAD = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
#: FS_IOC_FIEMAP of linux/fs.h.
_FIEMAP = number(READ | WRITE, "f", 11, _FIEMAP_HEAD.size)
_FIEMAP_FLAG_SYNC = 0x1
_MAX_OFFSET = (1 << 64) - 1
#: Extents asked for in one call.
_EXTENTS_A_CALL = 256

_LAST = 0x1
_UNWRITTEN = 0x800
#: FIEMAP_EXTENT_UNKNOWN, _DELALLOC: no place on the device yet; it may have one a moment later.
_PENDING = 0x2 | 0x4
#: Places that do not hold the file's bytes as such, by flag.
_UNREADABLE = {
    0x8: "is compressed or otherwise encoded",
    0x100: "does not begin at a block",
    0x200: "lies inside the inode",
    0x400: "shares a block with other files",
}

#: statx(2): AT_EMPTY_PATH, STATX_BASIC_STATS, STATX_ATTR_ENCRYPTED; size of struct statx, offsets of stx_attributes and _mask.
_AT_EMPTY_PATH, _STATX_BASIC, _STATX_ATTR_ENCRYPTED = 0x1000, 0x7FF, 0x800
_STATX_BYTES, _STATX_ATTRIBUTES, _STATX_MASK = 256, 8, 56

#: Fewer bytes than this can be equal by chance.
_LEAST_BYTES = 16
#: Length in bytes of a stretch that is read at once; a whole number of blocks of every file system.
WINDOW = 256 << 10
#: How often a file that changes while it is mapped is mapped again.
_TRIES = 3


class Extent(t.NamedTuple):
    """A stretch of a file on its device; offsets and length in bytes."""

    logical: int
    physical: int
    length: int
    flags: int


@dataclasses.dataclass
class FileFacts:
    """What was seen of one file. Counts are of blocks, but for ``bytes_read`` and the markers.

    :ivar encrypted: what the kernel says of the inode; None if this file system cannot say.
    :ivar identifier: the key identifier of its policy, None without policy.
    :ivar equal: of ``examined``, how many stand on the device as they are in the file.
    :ivar zero: all zeros in the file, no evidence; ``device_zero``: zeros on the device only, no evidence either.
    :ivar holes: not allocated or not written; ``pending``: not placed yet; ``moved``: moved meanwhile; ``short``: under 16 bytes.
    :ivar sampled: not the whole file was read.
    :ivar gone: it was removed meanwhile.
    :ivar problem: why it could not be examined.
    """

    path: str
    size: int = 0
    encrypted: bool | None = None
    identifier: str | None = None
    bytes_read: int = 0
    examined: int = 0
    equal: int = 0
    zero: int = 0
    device_zero: int = 0
    holes: int = 0
    pending: int = 0
    moved: int = 0
    short: int = 0
    marker_in_file: int = 0
    marker_on_device: int = 0
    sampled: bool = False
    gone: bool = False
    problem: str = ""


class Reader:
    """Direct reads of a block device. Made by :func:`open_device`."""

    def __init__(self, device: RawDevice, fd: int) -> None:
        self.device = device
        self._fd = fd
        # Memory of its own mapping begins at a page, which O_DIRECT asks for.
        self._buffer = mmap.mmap(-1, WINDOW)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the device as the disk holds them. :raises OSError: also if the device ends before."""
        view = memoryview(self._buffer)[:length]
        if os.preadv(self._fd, [view], offset) != length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bytes(view)


@contextlib.contextmanager
def open_device(device: RawDevice) -> t.Iterator[Reader]:
    """Open a device for direct reading.

    :raises TdeError: ``device_unreadable``.
    """
    if device.node is None:
        raise TdeError("device_unreadable", device.reason, obj="the device below")
    try:
        fd = os.open(device.node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        raise TdeError("device_unreadable", f"cannot be read: {os.strerror(exc.errno or 0)}", obj=device.node) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISBLK(info.st_mode) or (os.major(info.st_rdev), os.minor(info.st_rdev)) != device.number:
            raise TdeError("device_unreadable", f"is not the block device {device.number[0]}:{device.number[1]}", obj=device.node)
        yield Reader(device, fd)
    finally:
        os.close(fd)


def inode_encrypted(fd: int) -> bool | None:
    """What statx says of an open file; None if its file system does not tell.

    :raises OSError: if statx fails.
    """
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:  # glibc before 2.28
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_BASIC, buffer) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    attributes, mask = (struct.unpack_from("=Q", buffer.raw, offset)[0] for offset in (_STATX_ATTRIBUTES, _STATX_MASK))
    return bool(attributes & _STATX_ATTR_ENCRYPTED) if mask & _STATX_ATTR_ENCRYPTED else None


def extents(fd: int) -> list[Extent]:
    """All extents of an open file, written back first.

    :raises OSError: the file system does not map files.
    """
    found: list[Extent] = []
    start = 0
    while True:
        request = bytearray(_FIEMAP_HEAD.size + _EXTENTS_A_CALL * _FIEMAP_EXTENT.size)
        _FIEMAP_HEAD.pack_into(request, 0, start, _MAX_OFFSET - start, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_CALL, 0)
        fcntl.ioctl(fd, _FIEMAP, request)
        mapped = _FIEMAP_HEAD.unpack_from(request)[3]
        for index in range(mapped):
            found.append(Extent(*_FIEMAP_EXTENT.unpack_from(request, _FIEMAP_HEAD.size + index * _FIEMAP_EXTENT.size)))
        if not mapped or found[-1].flags & _LAST:
            return found
        start = found[-1].logical + found[-1].length


def unreadable(mapped: t.Iterable[Extent]) -> str:
    """Why a file with these extents cannot be examined; empty if it can."""
    for extent in mapped:
        for flag, reason in _UNREADABLE.items():
            if extent.flags & flag:
                return f"the stretch at byte {extent.logical} {reason}"
    return ""


def windows(size: int, budget: int, rng: random.Random) -> list[tuple[int, int]]:
    """Which stretches of a file are read: all, or the first, the last and others by chance.

    :param budget: bytes to read at most; at least two windows are read.
    :returns: (offset, length) in bytes, ascending, apart from one another.
    """
    count = -(-size // WINDOW)
    wanted = max(2, budget // WINDOW)
    chosen: t.Iterable[int] = range(count)
    if size > budget and count > wanted:
        chosen = sorted({0, count - 1, *rng.sample(range(1, count - 1), wanted - 2)})
    return [(index * WINDOW, min(WINDOW, size - index * WINDOW)) for index in chosen]


class _Places:
    """Where each block of a file lies, from its extents."""

    def __init__(self, mapped: list[Extent]) -> None:
        self._extents = mapped
        self._starts = [extent.logical for extent in mapped]

    def at(self, offset: int) -> tuple[str, int]:
        """``("written", place)``, or ``("hole", 0)`` or ``("pending", 0)``, of the block at a byte offset."""
        index = bisect.bisect_right(self._starts, offset) - 1
        if index < 0:
            return "hole", 0
        extent = self._extents[index]
        if offset >= extent.logical + extent.length or extent.flags & _UNWRITTEN:
            return "hole", 0
        if extent.flags & _PENDING:
            return "pending", 0
        return "written", extent.physical + offset - extent.logical


def _runs(blocks: list[tuple[int, int]], size: int) -> t.Iterator[tuple[int, int, int]]:
    """Neighbouring blocks joined: (offset in the window, place on the device, length)."""
    run: tuple[int, int, int] | None = None
    for offset, place in blocks:
        if run and offset == run[0] + run[2] and place == run[1] + run[2]:
            run = (run[0], run[1], run[2] + size)
            continue
        if run:
            yield run
        run = (offset, place, size)
    if run:
        yield run


def compare(facts: FileFacts, content: bytes, device: bytes, blocks: t.Iterable[int], block_size: int) -> None:
    """Count the blocks of a window; pure.

    :param content: the window as the file gives it, to the file's end and no further.
    :param device: the same window from the device, zeros where nothing was read, whole blocks.
    :param blocks: offsets in the window of the blocks that were read.
    """
    for offset in blocks:
        mine = content[offset : offset + block_size]
        disk = device[offset : offset + len(mine)]
        if not any(mine):
            facts.zero += 1
        elif len(mine) < _LEAST_BYTES:
            facts.short += 1
        elif mine == disk:
            facts.examined += 1
            facts.equal += 1
        elif not any(disk):
            facts.device_zero += 1
        else:
            facts.examined += 1


def look_at_inode(path: str) -> FileFacts:
    """Size, encryption and key identifier of a file; its blocks are not read."""
    facts = FileFacts(path)
    with _opened(path, facts):
        pass
    return facts


def examine(path: str, reader: Reader, *, marker: bytes | None = None, budget: int, rng: random.Random) -> FileFacts:
    """Compare a file with its blocks on the device.

    :param marker: text to be counted in the file and on the device.
    :param budget: bytes to read at most of the file; larger files are sampled.
    """
    facts = FileFacts(path)
    with _opened(path, facts) as fd:
        if fd is None:
            return facts
        try:
            _examine(fd, facts, reader, marker, budget, rng)
        except OSError as exc:
            facts.problem = (
                "the file system does not map files to blocks" if exc.errno in _NOT_MAPPED else os.strerror(exc.errno or 0)
            )
    return facts


_NOT_MAPPED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADR)


@contextlib.contextmanager
def _opened(path: str, facts: FileFacts) -> t.Iterator[int | None]:
    """The open file with its inode's facts filled in; None, with the reason in the facts, if it cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        facts.gone = exc.errno == errno.ENOENT
        facts.problem = (
            "" if facts.gone else "the kernel does not hold its key" if exc.errno == errno.ENOKEY else os.strerror(exc.errno or 0)
        )
        yield None
        return
    try:
        info = os.fstat(fd)
        facts.size = info.st_size
        if not stat.S_ISREG(info.st_mode):
            facts.problem = "is not a regular file"
            yield None
            return
        try:
            facts.encrypted = inode_encrypted(fd)
            found = fscrypt.policy_of_descriptor(fd, path)
            facts.identifier = found["identifier"] if found else None
        except OSError as exc:
            facts.problem = os_error(exc, path).message
        except TdeError as exc:
            # A file system without fscrypt: its files have no policy, and can still be shown to be plain.
            if exc.code != "fscrypt_unsupported":
                facts.problem = exc.message
        yield fd
    finally:
        os.close(fd)


def _examine(fd: int, facts: FileFacts, reader: Reader, marker: bytes | None, budget: int, rng: random.Random) -> None:
    info = os.fstat(fd)
    if (os.major(info.st_dev), os.minor(info.st_dev)) != reader.device.number:
        facts.problem = "lies on another file system than its place"
        return
    block_size = os.fstatvfs(fd).f_bsize
    chosen = windows(info.st_size, budget, rng)
    facts.sampled = sum(length for dummy, length in chosen) < info.st_size
    os.fsync(fd)
    for dummy in range(_TRIES):
        mapped = extents(fd)
        if not any(extent.flags & _PENDING for extent in mapped):
            break
    facts.problem = unreadable(mapped)
    if facts.problem:
        return
    before = _Places(mapped)
    read = [_read_window(fd, facts, reader, before, window, block_size) for window in chosen]
    # What moved or was freed while it was read is no evidence: its former place may hold another file by now.
    after = _Places(extents(fd))
    for (start, dummy), (content, device, blocks) in zip(chosen, read, strict=True):
        stayed = [offset for offset in blocks if before.at(start + offset) == after.at(start + offset)]
        facts.moved += len(blocks) - len(stayed)
        compare(facts, content, device, stayed, block_size)
        facts.bytes_read += len(content)
        if marker:
            facts.marker_in_file += content.count(marker)
            facts.marker_on_device += device[: len(content)].count(marker)


def _read_window(
    fd: int, facts: FileFacts, reader: Reader, places: _Places, window: tuple[int, int], block_size: int
) -> tuple[bytes, bytes, list[int]]:
    """A window's content, the same from the device, and the offsets in it of the blocks that were read there."""
    start, length = window
    content = os.pread(fd, length, start)
    written = []
    for offset in range(0, len(content), block_size):
        kind, place = places.at(start + offset)
        if kind == "written":
            written.append((offset, place))
        elif kind == "hole":
            facts.holes += 1
        else:
            facts.pending += 1
    device = bytearray(-(-length // block_size) * block_size)
    for offset, place, count in _runs(written, block_size):
        device[offset : offset + count] = reader.read(place, count)
    return content, bytes(device), [offset for offset, dummy in written]
