# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The plan for the folder above the places, held against a model of the machine that can be ended after any step."""

from __future__ import annotations

import dataclasses
import struct
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step
from ansible_collections.hsm.tde.plugins.module_utils.storage import image, image_acts
from ansible_collections.hsm.tde.plugins.module_utils.storage.image import (
    DirectoryState,
    ImageState,
    StorageState,
    StorageWish,
    Superblock,
)
from ansible_collections.hsm.tde.plugins.module_utils.storage.loops import Loop
from ansible_collections.hsm.tde.plugins.module_utils.storage.mounts import Mount
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
POINT, FILE = "/srv/tde", "/var/img/a.img"
LOOP = Loop("/dev/loop0", (7, 0), True)


def mount(point: str = POINT, device: tuple[int, int] = (7, 0), options: str = "rw", root: str = "/") -> Mount:
    return Mount(50, 20, device, root, point, (options,), "ext4", "/dev/loop0", ("rw",))


def superblock(size: int = 64 * MIB, label: str = image.LABEL, encrypt: bool = True) -> Superblock:
    return Superblock(label, 4096, size, encrypt)


def an_image(**values: t.Any) -> ImageState:
    return dataclasses.replace(ImageState(True, 1, 0, 0o600, 64 * MIB, superblock()), **values)


def a_directory(**values: t.Any) -> DirectoryState:
    return dataclasses.replace(DirectoryState(0, 0o755, True, False), **values)


MOUNTED = an_image(loops=(LOOP,), mounted=(mount(),))
MET = StorageState(MOUNTED, False, 1 << 40, a_directory(control=True, mount=mount()), None)
NOTHING = StorageState(None, False, 1 << 40, None, None)
WISH = StorageWish(POINT, FILE, 64 * MIB)


def actions(wish: StorageWish, state: StorageState, **more: t.Any) -> list[str]:
    return [step.action for step in image.plan(wish, state, **more)]


def refused(wish: StorageWish, state: StorageState, **more: t.Any) -> str:
    with pytest.raises(TdeError) as caught:
        image.plan(wish, state, **more)
    return caught.value.code


def test_from_nothing_and_met() -> None:
    assert actions(WISH, NOTHING) == ["create_image", "make_mount_point", "mount_image", "prepare_root"]
    assert actions(WISH, MET) == []
    assert actions(WISH, MET, known=True) == []
    assert actions(WISH._replace(size=None), MET) == []


def act(step: Step, state: StorageState) -> StorageState:
    """What a step does to the machine, as far as the plan looks at it."""
    machine, directory = state.image, state.directory
    if step.action == "remove_leftover":
        return dataclasses.replace(state, leftover=False)
    if step.action == "create_image":
        assert machine is None, "an image that is there would be formatted"
        size = step.data["size"]
        return dataclasses.replace(state, image=an_image(size=size, superblock=superblock(size)), free=state.free - size)
    if step.action == "make_mount_point":
        assert directory is None
        return dataclasses.replace(state, directory=a_directory())
    if step.action == "secure_mount_point":
        assert directory
        return dataclasses.replace(state, directory=dataclasses.replace(directory, uid=0, mode=0o755))
    assert machine is not None
    if step.action == "extend_image":
        assert step.data["size"] > machine.size
        return dataclasses.replace(state, image=dataclasses.replace(machine, size=step.data["size"]))
    if step.action == "resize_filesystem":
        assert step.data["online"] == bool(directory and directory.mount)
        assert machine.superblock is not None
        grown = machine.superblock._replace(size=machine.size)
        return dataclasses.replace(state, image=dataclasses.replace(machine, superblock=grown))
    assert directory is not None
    if step.action == "mount_image":
        # The root of a file system that was there before can be anybody's.
        shown = DirectoryState(1000, 0o777, True, False, mount())
        return dataclasses.replace(state, image=dataclasses.replace(machine, loops=(LOOP,), mounted=(mount(),)), directory=shown)
    assert step.action == "prepare_root", step.action
    assert directory.mount
    return dataclasses.replace(state, directory=dataclasses.replace(directory, uid=0, mode=0o755, control=True))


SIZES = st.sampled_from([32 * MIB, 64 * MIB, 100 * MIB])
IMAGES = st.none() | st.builds(
    lambda size, filesystem, attached: an_image(
        size=size, superblock=superblock(min(filesystem, size)), loops=(LOOP,) if attached else ()
    ),
    SIZES,
    SIZES,
    st.booleans(),
)
DIRECTORIES = st.none() | st.builds(
    DirectoryState, st.sampled_from([0, 1000]), st.sampled_from([0o755, 0o700, 0o777, 0o775]), st.booleans(), st.booleans()
)


@st.composite
def states(draw: st.DrawFn) -> StorageState:
    machine, directory = draw(IMAGES), draw(DIRECTORIES)
    if machine and directory and draw(st.booleans()):
        machine = dataclasses.replace(machine, loops=(LOOP,), mounted=(mount(),))
        directory = dataclasses.replace(directory, mount=mount())
    return StorageState(machine, draw(st.booleans()), draw(st.sampled_from([0, 40 * MIB, 1 << 40])), directory, None)


@settings(deadline=None)
@given(states(), SIZES | st.none(), st.booleans(), st.data())
def test_a_run_ended_after_any_step_goes_on_to_the_wish(
    state: StorageState, size: int | None, known: bool, data: st.DataObject
) -> None:
    wish = WISH._replace(size=size)
    try:
        steps = image.plan(wish, state, known=known)
    except TdeError:
        return
    if known:
        assert "create_image" not in [step.action for step in steps]
    for step in steps[: data.draw(st.integers(0, len(steps)), label="ended after")]:
        state = act(step, state)
    for step in image.plan(wish, state, known=known):
        state = act(step, state)
    assert image.plan(wish, state, known=known) == []
    assert image.plan(wish, state, known=True) == []
    assert state.image
    assert state.image.superblock
    assert state.directory
    assert state.image.size >= (size or 0)
    assert state.image.size - state.image.superblock.size < 16 * MIB
    assert (state.directory.uid, state.directory.mode, state.directory.control) == (0, 0o755, True)
    assert state.directory.mount == mount()


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (dataclasses.replace(NOTHING, free=63 * MIB), "disk_full"),
        (dataclasses.replace(MET, image=an_image(superblock=None)), "image_foreign"),
        (dataclasses.replace(MET, image=an_image(superblock=superblock(label="data"))), "image_foreign"),
        (dataclasses.replace(MET, image=an_image(superblock=superblock(encrypt=False))), "fscrypt_unsupported"),
        (dataclasses.replace(MET, image=an_image(regular=False)), "image_not_private"),
        (dataclasses.replace(MET, image=an_image(links=2)), "image_not_private"),
        (dataclasses.replace(MET, image=an_image(uid=1000)), "image_not_private"),
        (dataclasses.replace(MET, image=an_image(mode=0o644)), "image_not_private"),
        (dataclasses.replace(MET, image=an_image(loops=(LOOP._replace(whole=False),))), "image_not_private"),
        (dataclasses.replace(MET, image=an_image(size=65 * MIB)), "image_shrink"),
        (dataclasses.replace(MET, image=an_image(size=32 * MIB), free=31 * MIB), "disk_full"),
        (dataclasses.replace(MET, directory=a_directory(mount=mount(device=(8, 1)))), "mount_point_taken"),
        (dataclasses.replace(MET, directory=a_directory(mount=mount(root="/sub"))), "mount_point_taken"),
        (dataclasses.replace(MET, directory=a_directory(mount=mount(options="ro"))), "mounted_read_only"),
        (dataclasses.replace(MET, image=an_image(), directory=a_directory(empty=False)), "mount_point_not_empty"),
        (
            dataclasses.replace(MET, image=an_image(loops=(LOOP,), mounted=(mount("/mnt"),)), directory=None),
            "mounted_elsewhere",
        ),
    ],
)
def test_what_stands_in_the_way(state: StorageState, code: str) -> None:
    assert refused(WISH, state) == code


def test_what_the_host_remembers_is_never_made_anew() -> None:
    assert refused(WISH, NOTHING, known=True) == "image_absent"
    assert refused(StorageWish(POINT), NOTHING, known=True) == "mount_point_absent"


def test_an_image_without_a_size_is_not_made() -> None:
    assert refused(WISH._replace(size=None), NOTHING) == "invalid_option"


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        (None, ["make_mount_point", "write_control"]),
        (a_directory(mode=0o700), ["secure_mount_point", "write_control"]),
        (a_directory(uid=1000, control=True), ["secure_mount_point"]),
        (a_directory(empty=False, control=True), []),
        (a_directory(empty=False), ["write_control"]),
    ],
)
def test_a_directory_of_the_host(directory: DirectoryState | None, expected: list[str]) -> None:
    assert actions(StorageWish(POINT), dataclasses.replace(NOTHING, directory=directory)) == expected


@pytest.mark.parametrize("values", [{"uid": 1000}, {"mode": 0o775}, {"mode": 0o777}, {"mode": 0o700}])
def test_a_directory_in_use_is_not_changed_over_its_owner(values: dict[str, int]) -> None:
    state = dataclasses.replace(NOTHING, directory=a_directory(empty=False, **values))
    assert refused(StorageWish(POINT), state) == "mount_point_unsafe"


def test_a_directory_that_cannot_be_encrypted() -> None:
    support: t.Any = {"supported": False, "reason": "xfs has no file encryption (fscrypt)", "how_to_enable": "Use storage=image."}
    state = dataclasses.replace(NOTHING, support=support)
    with pytest.raises(TdeError, match="storage=image") as caught:
        image.plan(StorageWish(POINT), state)
    assert caught.value.code == "fscrypt_unsupported"


@pytest.mark.parametrize(
    ("text", "size"),
    [("2G", 2 << 30), ("768M", 768 * MIB), ("40000K", 40000 << 10), ("1t", 1 << 40), ("64 MiB", 64 * MIB), ("33333K", 34131968)],
)
def test_sizes(text: str, size: int) -> None:
    assert image.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "0G", "-1G", "2.5G", "2X", "31M", "1G1", "G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(TdeError) as caught:
        image.parse_size(text)
    assert caught.value.code == "invalid_option"


@pytest.mark.parametrize(
    ("point", "file"), [("srv", None), ("/", None), ("/srv", "a.img"), ("/srv", "/srv/a.img"), ("/srv/..", None), ("/a", "/a")]
)
def test_paths_that_cannot_be(point: str, file: str | None) -> None:
    with pytest.raises(TdeError) as caught:
        image.storage_wish(point, file)
    assert caught.value.code == "invalid_option"


def test_a_wish_from_options() -> None:
    assert image.storage_wish("/srv/tde/", "/srv/tde2/a.img", "64M") == StorageWish("/srv/tde", "/srv/tde2/a.img", 64 * MIB)
    assert image.storage_wish("/srv/tde", None, "64M") == StorageWish("/srv/tde")


def block(**fields: tuple[str, int, t.Any]) -> bytes:
    head = bytearray(2048)
    struct.pack_into("<H", head, 1024 + 0x38, 0xEF53)
    for layout, offset, value in fields.values():
        struct.pack_into(layout, head, 1024 + offset, value)
    return bytes(head)


def test_superblock_of_more_than_32_bits() -> None:
    head = block(
        low=("<I", 0x4, 5),
        high=("<I", 0x150, 2),
        log=("<I", 0x18, 2),
        features=("<I", 0x60, 0x10080),
        label=("16s", 0x78, b"hsm-tde"),
    )
    assert image_acts.parse_superblock(head) == Superblock("hsm-tde", 4096, (2 << 32 | 5) * 4096, True)


def test_superblock_of_an_old_file_system() -> None:
    head = block(low=("<I", 0x4, 8192), junk=("<I", 0x150, 9))
    assert image_acts.parse_superblock(head) == Superblock("", 1024, 8192 * 1024, False)


@settings(deadline=None)
@given(st.binary(max_size=2048))
def test_no_superblock_in_anything(head: bytes) -> None:
    found = image_acts.parse_superblock(head)
    assert found is None or head[0x438:0x43A] == b"\x53\xef"
