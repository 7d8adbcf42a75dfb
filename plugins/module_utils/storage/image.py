# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folder above the encrypted places: a directory of the host, or an ext4 file system in an image file.

The wish, the state as plain data, and the pure :func:`plan`; looking and acting is ``image_acts``. An image gets its
name only when it holds a complete file system, so what stands under that name is never formatted, whatever it is.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ..common.check import established
from ..common.errors import TdeError
from ..common.plan import Plan, Step
from .control import CONTROL_NAME
from .fscrypt import Support
from .loops import Loop
from .mounts import Mount

#: The volume label of our images: what says that a file system was made here.
LABEL = "hsm-tde"
#: The block size that mkfs is told: the page size of nearly all hosts, which fscrypt asked for before Linux 5.5.
BLOCK_SIZE = 4096
#: Under this an ext4 journal and its tables leave next to nothing.
SMALLEST_IMAGE = 32 << 20
#: ext4 leaves out a last block group that would hold little more than its own tables: up to this many bytes stay unused.
_UNUSED_TAIL = 16 << 20
_SIZE = re.compile(r"([1-9][0-9]*) ?([KMGT])(?:i?B)?", re.IGNORECASE)


class StorageWish(t.NamedTuple):
    """Where encrypted places are to lie; made by :func:`storage_wish`.

    :param mount_point: root's own folder above the places.
    :param image: the image file mounted there; None: the mount point is a directory of a file system that encrypts.
    :param size: the image's size in bytes, None: as it is.
    """

    mount_point: str
    image: str | None = None
    size: int | None = None


class Superblock(t.NamedTuple):
    """What an ext2, ext3 or ext4 superblock says; sizes in bytes."""

    label: str
    block_size: int
    size: int
    encrypt: bool


@dataclasses.dataclass(frozen=True)
class ImageState:
    """An image file as it was found; ``superblock`` is None if it holds no ext file system."""

    regular: bool
    links: int
    uid: int
    mode: int
    size: int
    superblock: Superblock | None
    loops: tuple[Loop, ...] = ()
    mounted: tuple[Mount, ...] = ()


@dataclasses.dataclass(frozen=True)
class DirectoryState:
    """The mount point as it shows: what is mounted there, or the bare directory."""

    uid: int
    mode: int
    empty: bool
    control: bool
    mount: Mount | None = None

    @property
    def root_only(self) -> bool:
        """Nobody but root can write, and everybody can pass through to the places."""
        return self.uid == 0 and not self.mode & 0o022 and bool(self.mode & 0o001)


@dataclasses.dataclass(frozen=True)
class StorageState:
    """All that :func:`plan` looks at.

    :ivar image: None if there is no such file; ``leftover``: a kill left an image that was being made.
    :ivar free: bytes free on the file system that holds the image.
    :ivar directory: None if the mount point does not exist.
    :ivar support: whether encryption works at the mount point, of a directory; None for an image.
    """

    image: ImageState | None
    leftover: bool
    free: int
    directory: DirectoryState | None
    support: Support | None


def storage_wish(mount_point: str, image: str | None = None, size: str | None = None) -> StorageWish:
    """A wish from a user's options.

    :param size: as :func:`parse_size` reads it.
    :raises TdeError: ``invalid_option``.
    """
    for name, path in (("mount_point", mount_point), ("image", image)):
        if path is not None and (not os.path.isabs(path) or os.path.normpath(path) in ("/", "//")):
            raise TdeError("invalid_option", "must be an absolute path other than /", obj=f"{name} {path!r}")
    mount_point = os.path.normpath(mount_point)
    if image is None:
        return StorageWish(mount_point)
    image = os.path.normpath(image)
    if f"{image}/".startswith(f"{mount_point}/"):
        raise TdeError(
            "invalid_option", f"lies under the mount point {mount_point}, which its mount would hide", obj=f"image {image!r}"
        )
    return StorageWish(mount_point, image, None if size is None else parse_size(size))


def parse_size(text: str) -> int:
    """Bytes of a size such as ``2G`` or ``768M`` (powers of 1024), a whole number of blocks.

    :raises TdeError: ``invalid_option``.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise TdeError("invalid_option", "must be a number and K, M, G or T, as in 2G", obj=f"image_size {text!r}")
    size = int(match.group(1)) << {"K": 10, "M": 20, "G": 30, "T": 40}[match.group(2).upper()]
    if size < SMALLEST_IMAGE:
        raise TdeError("invalid_option", f"is less than {SMALLEST_IMAGE >> 20} MiB", obj=f"image_size {text!r}")
    return size - size % BLOCK_SIZE


def facts(wish: StorageWish, state: StorageState) -> dict[str, t.Any]:
    """The state as a diff shows it: public, and the same after a second look."""
    shown: dict[str, t.Any] = {
        "mount_point": None
        if state.directory is None
        else {"path": wish.mount_point, "owner": state.directory.uid, "mode": f"{state.directory.mode:04o}"}
    }
    if wish.image is not None:
        image = state.image
        mounted = [mount.mount_point for mount in image.mounted] if image else []
        shown["image"] = (
            None if image is None else {"path": wish.image, "size": image.size, "mounted": wish.mount_point in mounted}
        )
    return shown


def plan(wish: StorageWish, state: StorageState, *, known: bool = False) -> Plan:
    """The steps from a state to the wish; pure.

    Carried out by ``plan.run(steps, image_acts.handlers(wish))``.

    :param known: the host remembers this storage: what is missing is unreachable, and nothing is made in its place.
    :raises TdeError: what stands in the way, as the codes ``image_*``, ``mount*``, ``fscrypt_unsupported``, ``disk_full`` say.
    """
    if wish.image is None:
        return _plan_directory(wish, state, known)
    steps: Plan = []
    grow = False
    if state.leftover:
        steps.append(Step("remove_leftover", wish.image, "an earlier run was ended while it made the image"))
    if state.image is None:
        _check_creation(wish, state, known)
        steps.append(Step("create_image", wish.image, "there is none", {"size": wish.size}))
    else:
        _check_image(wish, state.image)
        grow = _grows(wish, state, state.image, steps)
    mount = _plan_mount(wish, state)
    if not grow:
        return steps + mount
    online = bool(state.directory and state.directory.mount)
    resize = Step("resize_filesystem", wish.image, "the file is larger than its file system", {"online": online})
    return steps + ([*mount, resize] if online else [resize, *mount])


def _plan_directory(wish: StorageWish, state: StorageState, known: bool) -> Plan:
    directory = state.directory
    if directory is None and known:
        raise _unreachable_mount_point(wish.mount_point)
    if state.support and not state.support["supported"]:
        raise TdeError(
            "fscrypt_unsupported", state.support["reason"], obj=wish.mount_point, next_step=state.support["how_to_enable"]
        )
    if directory is None:
        return [_make_mount_point(wish), _write_control(wish)]
    if directory.mount and directory.mount.read_only:
        raise _read_only(wish)
    steps: Plan = []
    if not directory.root_only:
        if not directory.empty:
            raise _unsafe(wish, directory)
        steps.append(_secure_mount_point(wish))
    return steps if directory.control else [*steps, _write_control(wish)]


def _check_creation(wish: StorageWish, state: StorageState, known: bool) -> None:
    if known:
        raise TdeError(
            "image_absent",
            "the host remembers this image, and there is no such file",
            obj=f"image {wish.image}",
            next_step="Mount the file system that holds it, or restore it from a backup.",
        )
    if wish.size is None:
        raise TdeError("invalid_option", "there is no such image, and to make one its size is needed", obj="image_size")
    if state.free < wish.size:
        raise _no_room(wish, wish.size, state.free)


def _no_room(wish: StorageWish, needed: int, free: int) -> TdeError:
    return TdeError(
        "disk_full",
        f"needs {needed >> 20} MiB more on the disk, and {free >> 20} MiB are free",
        obj=f"image {wish.image}",
        next_step="Make room, or choose a smaller image_size.",
    )


def _check_image(wish: StorageWish, image: ImageState) -> None:
    obj = f"image {wish.image}"
    wrong = ""
    if not image.regular:
        wrong = "is not a regular file"
    elif image.links != 1:
        wrong = f"has {image.links} links"
    elif image.uid != 0 or image.mode & 0o077:
        wrong = f"belongs to user id {image.uid} with mode {image.mode:04o}; it must be root's alone (0600)"
    elif not all(loop.whole for loop in image.loops):
        wrong = "is attached to a loop device in part only"
    if wrong:
        raise TdeError("image_not_private", wrong, obj=obj, next_step="Find out who changed it before you correct it.")
    if image.superblock is None or image.superblock.label != LABEL:
        held = "no ext4 file system" if image.superblock is None else f"a file system labelled {image.superblock.label!r}"
        step = "Choose another path for the image."
        if image.superblock:
            step += f" If it is to be used as it is, hand it over: e2label {wish.image} {LABEL}."
        raise TdeError("image_foreign", f"holds {held}, which was not made here; it is never formatted", obj=obj, next_step=step)
    if not image.superblock.encrypt:
        raise TdeError(
            "fscrypt_unsupported",
            "its file system has no encrypt feature",
            obj=obj,
            next_step=f"Unmount it and run, as root: tune2fs -O encrypt {wish.image}.",
        )


def _grows(wish: StorageWish, state: StorageState, image: ImageState, steps: Plan) -> bool:
    """Add the growing of the file to the steps; :returns: whether its file system must follow, now or from an ended run."""
    if wish.size is not None and wish.size < image.size:
        raise TdeError(
            "image_shrink",
            f"has {image.size >> 20} MiB, more than the {wish.size >> 20} MiB wished for; it is never shrunk",
            obj=f"image {wish.image}",
            next_step="Leave image_size out or set it to what it is.",
        )
    if wish.size is not None and wish.size > image.size:
        if state.free < wish.size - image.size:
            raise _no_room(wish, wish.size - image.size, state.free)
        steps.append(Step("extend_image", t.cast(str, wish.image), "it is smaller than wished", {"size": wish.size}))
        return True
    return image.size - established(image.superblock, "the superblock").size >= _UNUSED_TAIL


def _plan_mount(wish: StorageWish, state: StorageState) -> Plan:
    directory, image = state.directory, state.image
    steps: Plan = []
    mounted_here = image is not None and any(mount.mount_point == wish.mount_point for mount in image.mounted)
    if directory and directory.mount:
        if image is None or directory.mount.device not in {loop.number for loop in image.loops} or directory.mount.root != "/":
            raise TdeError(
                "mount_point_taken",
                f"{directory.mount.source} ({directory.mount.filesystem}) is mounted there",
                obj=wish.mount_point,
                next_step="Choose another mount_point, or unmount it.",
            )
        if directory.mount.read_only:
            raise _read_only(wish)
    elif mounted_here:
        raise TdeError(
            "mount_point_taken", "something hides the image's mount", obj=wish.mount_point, next_step="Unmount what lies over it."
        )
    if directory is None:
        steps.append(_make_mount_point(wish))
    elif directory.mount is None:
        if not directory.empty:
            raise TdeError(
                "mount_point_not_empty",
                "nothing is mounted there and it has entries, which the mount would hide: perhaps files in the clear "
                "that a server made while the image was not mounted",
                obj=wish.mount_point,
                next_step="Look at them and move them away.",
            )
        if directory.uid != 0 or directory.mode & 0o022:
            steps.append(_secure_mount_point(wish))
    if not (directory and directory.mount):
        steps += _mount(wish, image)
    elif directory.uid != 0 or directory.mode != 0o755 or not directory.control:
        steps.append(_prepare_root(wish, "it is not as it must be"))
    return steps


def _mount(wish: StorageWish, image: ImageState | None) -> Plan:
    if image and image.mounted:
        raise TdeError(
            "mounted_elsewhere",
            f"is mounted at {image.mounted[0].mount_point}",
            obj=f"image {wish.image}",
            next_step="Unmount it there, or name that mount_point.",
        )
    return [
        Step("mount_image", wish.mount_point, "the image is not mounted"),
        _prepare_root(wish, "only root may write beside the places"),
    ]


def _make_mount_point(wish: StorageWish) -> Step:
    return Step("make_mount_point", wish.mount_point, "there is none")


def _secure_mount_point(wish: StorageWish) -> Step:
    return Step("secure_mount_point", wish.mount_point, "only root may write above the places")


def _prepare_root(wish: StorageWish, why: str) -> Step:
    return Step("prepare_root", wish.mount_point, why)


def _write_control(wish: StorageWish) -> Step:
    return Step("write_control", os.path.join(wish.mount_point, CONTROL_NAME), "a proof needs a file in the clear")


def _unreachable_mount_point(path: str) -> TdeError:
    return TdeError(
        "mount_point_absent",
        "the host remembers encrypted places there, and there is no such directory",
        obj=path,
        next_step="Mount the file system that holds it, or restore it from a backup.",
    )


def _read_only(wish: StorageWish) -> TdeError:
    return TdeError(
        "mounted_read_only",
        "is mounted read-only",
        obj=wish.mount_point,
        next_step="Look into the kernel's log: after an error the kernel does so itself. Repair it with fsck.ext4.",
    )


def _unsafe(wish: StorageWish, directory: DirectoryState) -> TdeError:
    return TdeError(
        "mount_point_unsafe",
        f"belongs to user id {directory.uid} with mode {directory.mode:04o} and is not empty; it must be root's, writable for nobody else, "
        "and open to pass through (0755)",
        obj=wish.mount_point,
        next_step="Choose a folder of its own, or run chown root and chmod 0755 on it after looking at what is inside.",
    )
