# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which mount and which block device lie under a path; read only.

Sources: proc_pid_mountinfo(5), proc_pid_fdinfo(5) (``mnt_id``), sysfs (``/sys/dev/block``,
``slaves``, ``dm/uuid``, ``loop/backing_file``).
"""

from __future__ import annotations

import glob
import os
import re
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error

#: File systems whose FIEMAP answers are byte offsets on the block device that carries them.
_RAW_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs"})

#: Why the others cannot be looked at from below.
_NOT_RAW = {
    "btrfs": "btrfs reports logical addresses, not places on the device",
    "overlay": "overlay has no blocks of its own: name the directory under its upper layer",
    "tmpfs": "tmpfs lies in memory and in swap space",
    "ramfs": "ramfs lies in memory",
}

_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(t.NamedTuple):
    """A line of mountinfo."""

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: str
    mount_point: str
    options: tuple[str, ...]
    filesystem: str
    source: str
    super_options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


class RawDevice(t.NamedTuple):
    """What lies under a file system.

    :ivar number: major and minor.
    :ivar node: the device node, or None if its blocks cannot be looked at; ``reason`` then says why.
    :ivar layers: from the file system's device downwards, in words.
    :ivar crypt: the first dm-crypt device among them (it, or the file system's own, shows plain text that the
        disk does not hold), or None.
    :ivar crypt_whole: every way down to a disk leads through dm-crypt: one leg of a mirror or volume group is not enough.
    """

    number: tuple[int, int]
    node: str | None
    layers: tuple[str, ...] = ()
    crypt: str | None = None
    reason: str = ""
    crypt_whole: bool = False


def _unescape(field: str) -> str:
    """Octal escapes as the kernel's mangle() writes them: space, tab, newline, backslash, hash."""
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), field)


def parse(text: str) -> list[Mount]:
    """The mounts in the text of a mountinfo file, in its order.

    :raises TdeError: ``mount_table_unreadable``: a line that is not understood could be the one that matters.
    """
    # Not splitlines(): a mount point may hold a form feed or another separator that the kernel does not escape.
    return [_parse_line(line) for line in text.split("\n") if line]


def _parse_line(line: str) -> Mount:
    try:
        fields = line.split(" ")
        mount_id, parent_id, device, root, mount_point, options = fields[:6]
        # Optional fields, as many as there are, end with a hyphen; one further to the left is a name.
        filesystem, source, super_options = fields[fields.index("-", 6) + 1 :][:3]
        major, minor = device.split(":")
        return Mount(
            int(mount_id),
            int(parent_id),
            (int(major), int(minor)),
            _unescape(root),
            _unescape(mount_point),
            tuple(options.split(",")),
            filesystem,
            _unescape(source),
            tuple(super_options.split(",")),
        )
    except ValueError:
        raise TdeError("mount_table_unreadable", "has a line that is not understood", obj="/proc/self/mountinfo") from None


def mounts() -> list[Mount]:
    """All mounts that this process sees.

    :raises TdeError: ``mount_table_unreadable``.
    """
    path = "/proc/self/mountinfo"
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as handle:
            return parse(handle.read())
    except OSError as exc:
        raise TdeError("mount_table_unreadable", os.strerror(exc.errno or 0), obj=path) from None


def mount_of(path: str) -> Mount:
    """The mount that a path lies on; symbolic links are followed.

    The kernel is asked for the mount's number, so a mount over another, or one whose name is a prefix, is not mistaken.

    :raises TdeError: ``file_absent``, ``permission_denied``, ``mount_table_unreadable``.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        raise os_error(exc, path) from None
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as handle:
            fields = dict(line.split(":", 1) for line in handle if ":" in line)
        mount_id = int(fields["mnt_id"])
    except (OSError, KeyError, ValueError):
        raise TdeError("mount_table_unreadable", "the kernel does not say which mount it lies on", obj=path) from None
    finally:
        os.close(fd)
    for mount in mounts():
        if mount.mount_id == mount_id:
            return mount
    raise TdeError("mount_table_unreadable", "lies on a mount that this process does not see", obj=path)


def mounted_at(path: str) -> Mount | None:
    """The topmost mount whose mount point is exactly this path, None if nothing is mounted there or it does not exist.

    :raises TdeError: ``permission_denied``, ``mount_table_unreadable``.
    """
    if not os.path.lexists(path):
        return None
    mount = mount_of(path)
    return mount if mount.mount_point == os.path.realpath(path) else None


def raw_device(path: str, sysfs: str = "/sys") -> RawDevice:
    """The block device on which the blocks of the files at a path can be read.

    :param sysfs: where sysfs is mounted.
    :raises TdeError: as :func:`mount_of`.
    """
    mount = mount_of(path)
    status = os.stat(path)
    number = (os.major(status.st_dev), os.minor(status.st_dev))
    if mount.filesystem not in _RAW_FILE_SYSTEMS:
        default = f"{mount.filesystem} does not tell where on a block device its files lie"
        return RawDevice(number, None, reason=_NOT_RAW.get(mount.filesystem, default))
    if number != mount.device:
        return RawDevice(number, None, reason=f"the files at {path} carry another device number than their mount")
    return device_layers(number, sysfs)


def device_layers(number: tuple[int, int], sysfs: str = "/sys") -> RawDevice:
    """A block device and what it lies on."""
    node = _device_node(number, sysfs)
    if node is None:
        return RawDevice(number, None, reason=f"sysfs does not know the block device {number[0]}:{number[1]}")
    layers: list[str] = []
    crypt, whole = _descend(number, sysfs, layers, {})
    return RawDevice(number, node, tuple(layers), crypt, crypt_whole=whole)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as handle:
            return handle.read().rstrip("\n")
    except OSError:
        return None


def _device_node(number: tuple[int, int], sysfs: str) -> str | None:
    for line in (_read(f"{sysfs}/dev/block/{number[0]}:{number[1]}/uevent") or "").split("\n"):
        if line.startswith("DEVNAME="):
            return "/dev/" + line[len("DEVNAME=") :]
    return None


def _descend(
    number: tuple[int, int], sysfs: str, layers: list[str], seen: dict[tuple[int, int], bool]
) -> tuple[str | None, bool]:
    """Note a device and those under it; :returns: the first dm-crypt device met, and whether every way down meets one."""
    if number in seen:
        return None, seen[number]
    seen[number] = False
    folder = os.path.realpath(f"{sysfs}/dev/block/{number[0]}:{number[1]}")
    node = _device_node(number, sysfs) or f"{number[0]}:{number[1]}"
    backing = _read(f"{folder}/loop/backing_file")
    crypt = node if (_read(f"{folder}/dm/uuid") or "").startswith("CRYPT-") else None
    layers.append(f"{node} (dm-crypt)" if crypt else f"{node} (loop on {backing})" if backing else node)
    if os.path.exists(f"{folder}/partition"):
        under = [os.path.dirname(folder)]
    else:
        under = sorted(glob.glob(f"{glob.escape(folder)}/slaves/*"))
    below = []
    for device in under:
        major, dummy, minor = (_read(f"{device}/dev") or "").partition(":")
        if major.isdigit() and minor.isdigit():
            below.append((int(major), int(minor)))
    if backing and os.path.exists(backing):
        below.append(mount_of(backing).device)
    deeper = [_descend(one, sysfs, layers, seen) for one in below]
    seen[number] = crypt is not None or (bool(deeper) and all(whole for _found, whole in deeper))
    return crypt or next((found for found, _whole in deeper if found), None), seen[number]
