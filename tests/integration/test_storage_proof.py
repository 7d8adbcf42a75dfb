# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Proof on real file systems, and each way in which a proof was seen to be false."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import random
import secrets
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.storage import blocks, control, fscrypt, mounts, proof
from ansible_collections.hsm.tde.plugins.module_utils.storage.proof import ProofTarget
from ansible_collections.hsm.tde.tests.integration import filesystems

pytestmark = pytest.mark.root

KEY, OTHER_KEY = bytes(range(64)), bytes(range(1, 65))
MARKER = b"HSMTDE-MARKER"
PAGE = 4096


def rows(pages: int = 20) -> bytes:
    """Pages as a table has them: text by chance with a marker, the rest of the page zeros."""
    return b"".join((MARKER + secrets.token_hex(500).encode()).ljust(PAGE, b"\0") for dummy in range(pages))


@dataclasses.dataclass
class Disk:
    """A file system with an encrypted and a plain directory, a file in each, and our control."""

    mount: Path
    identifier: str

    def target(self, name: str = "sealed", **more: t.Any) -> ProofTarget:
        values: dict[str, t.Any] = {"key_identifier": self.identifier, **more}
        return ProofTarget(name, str(self.mount / name), **values)

    def prove(self, name: str = "sealed", **more: t.Any) -> dict[str, t.Any]:
        return proof.prove(self.target(name, **more))


@pytest.fixture
def disk(encrypted_mount: Path) -> Disk:
    identifier = fscrypt.add_key(str(encrypted_mount), KEY)
    for name in ("sealed", "plain"):
        (encrypted_mount / name).mkdir()
    fscrypt.set_policy(str(encrypted_mount / "sealed"), identifier)
    for name in ("sealed", "plain"):
        (encrypted_mount / name / "1").write_bytes(rows())
    assert control.write_control(str(encrypted_mount))
    assert not control.write_control(str(encrypted_mount))
    return Disk(encrypted_mount, identifier)


def because(found: dict[str, t.Any], verdict: str, reason: str) -> None:
    assert found["verdict"] == verdict, found
    assert any(reason in one for one in found["reasons"]), found["reasons"]


def test_encrypted_and_plain_side_by_side(disk: Disk) -> None:
    sealed = disk.prove(marker=MARKER)
    because(sealed, "encrypted", "0 of 20 blocks")
    assert sealed["examined"] == {
        "files": 1,
        "files_read": 1,
        "blocks": 20,
        "blocks_equal": 0,
        "blocks_zero": 0,
        "bytes": 20 * PAGE,
        "marker_in_files": 20,
        "marker_on_device": 0,
        "control_blocks_equal": 16,
    }
    plain = disk.prove("plain", key_identifier=None, marker=MARKER)
    because(plain, "plain", "20 of 20 blocks")
    assert plain["examined"]["marker_on_device"] == 20
    assert "(loop on " in plain["how"]
    assert (plain["place"], plain["path"]) == ("plain", str(disk.mount / "plain"))
    # What ought to be encrypted and is not at all is found as well.
    because(disk.prove("plain"), "plain", "20 of 20 blocks")


def test_nothing_is_written_by_a_proof(disk: Disk) -> None:
    filesystems.run("mount", "-o", "remount,ro", disk.mount)
    because(disk.prove(), "encrypted", "0 of 20 blocks")


def test_zeros_prove_nothing(disk: Disk) -> None:
    """What is allocated and never written is zeros on the disk of a plain table as well."""
    for name in ("sealed", "plain"):
        with open(disk.mount / name / "1", "wb") as handle:
            handle.write(bytes(8 * PAGE))
            os.posix_fallocate(handle.fileno(), 8 * PAGE, 8 * PAGE)
            handle.truncate(40 * PAGE)
    because(disk.prove(), "unknown", "nothing to compare")
    because(disk.prove("plain", key_identifier=None), "unknown", "nothing to compare")


def test_a_marker_that_is_not_in_the_file_proves_nothing(disk: Disk) -> None:
    because(disk.prove(marker=b"never written"), "unknown", "does not stand in what was read")


def test_without_a_file_in_the_clear_it_is_not_shown_that_one_would_be_seen(disk: Disk) -> None:
    (disk.mount / control.CONTROL_NAME).unlink()
    (disk.mount / "plain/1").unlink()
    because(disk.prove(), "unknown", "No file in the clear")
    # Any other plain file will do,
    (disk.mount / "plain/other").write_bytes(rows())
    because(disk.prove(), "encrypted", "0 of 20 blocks")
    # but not one that only pretends to be plain,
    because(disk.prove(control=str(disk.mount / "sealed/1")), "unknown", "No file in the clear")
    # nor one that is empty on the disk.
    (disk.mount / "plain/other").write_bytes(bytes(8 * PAGE))
    because(disk.prove(), "unknown", "No file in the clear")


def test_a_reading_of_the_wrong_device_is_noticed(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filesystems.mounted(tmp_path, filesystems.PLAIN, name="other") as other:
        wrong = mounts.raw_device(str(other))
        (other / "filler").write_bytes(secrets.token_bytes(30 << 20))
        os.sync()
        right = os.stat(disk.mount).st_dev
        monkeypatch.setattr(proof, "raw_device", lambda path, sysfs: wrong)
        because(disk.prove(), "unknown", "another file system")
        # Even if the numbers are made to fit:
        lying = wrong._replace(number=(os.major(right), os.minor(right)))
        monkeypatch.setattr(proof, "raw_device", lambda path, sysfs: lying)
        because(disk.prove(), "unknown", "is not the block device")
        reader = blocks.Reader(lying, os.open(str(wrong.node), os.O_RDONLY | os.O_DIRECT))
        seen = blocks.examine(str(disk.mount / control.CONTROL_NAME), reader, budget=1 << 20, rng=random.Random(1))
        assert (seen.equal, seen.examined > 0) == (0, True), "a control would fail on it"
        os.close(reader._fd)


def test_only_our_key_counts(disk: Disk) -> None:
    other = fscrypt.identifier(OTHER_KEY)
    because(disk.prove(key_identifier=other), "unknown", "under another key")
    because(disk.prove(key_identifier=None), "unknown", "No key of ours")


def test_a_locked_place_is_unknown_and_says_why(disk: Disk) -> None:
    assert fscrypt.remove_key(str(disk.mount), disk.identifier)["status"] == "absent"
    found = disk.prove()
    because(found, "unknown", "open the keystore")
    assert len(found["reasons"]) == 1
    fscrypt.add_key(str(disk.mount), KEY)
    with open(disk.mount / "sealed/1", "rb"):
        fscrypt.remove_key(str(disk.mount), disk.identifier, wait_seconds=0)
        because(disk.prove(), "unknown", "while files were open")


def test_one_plain_file_among_the_named_ones(disk: Disk) -> None:
    files = (str(disk.mount / "sealed/1"), str(disk.mount / "plain/1"))
    because(disk.prove(files=files), "plain", "20 of 40 blocks")
    # Also where its blocks say nothing:
    (disk.mount / "plain/1").write_bytes(bytes(PAGE))
    because(disk.prove(files=files), "unknown", "1 of 2 files are not encrypted")


def test_a_file_that_is_dropped_meanwhile(disk: Disk) -> None:
    files = (str(disk.mount / "sealed/1"), str(disk.mount / "sealed/dropped"))
    because(disk.prove(files=files), "encrypted", "0 of 20 blocks")
    because(disk.prove(files=files[1:]), "unknown", "nothing to compare")


def test_links_and_pipes_are_not_followed(disk: Disk) -> None:
    os.mkfifo(disk.mount / "sealed/pipe")
    (disk.mount / "sealed/link").symlink_to(disk.mount / "plain/1")
    because(disk.prove(), "unknown", "leads out of the place")
    found = disk.prove(links=(str(disk.mount / "sealed"),))
    because(found, "encrypted", "0 of 20 blocks")
    assert any("leads out of the place" in note for note in found["notes"])
    because(disk.prove(files=(str(disk.mount / "sealed/link"),)), "unknown", "link: Too many levels")
    because(disk.prove(files=(str(disk.mount / "sealed/pipe"),)), "unknown", "not a regular file")


def test_an_empty_file_system_mounted_inside_is_not_covered(disk: Disk) -> None:
    inside = disk.mount / "sealed/pgsql_tmp"
    inside.mkdir()
    because(disk.prove(), "encrypted", "0 of 20 blocks")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(inside)], check=True, timeout=60)
    try:
        because(disk.prove(), "unknown", f"Another file system is mounted on {inside}")
    finally:
        subprocess.run(["umount", str(inside)], check=True, timeout=60)


def test_canary(disk: Disk) -> None:
    (disk.mount / control.CONTROL_NAME).unlink()
    (disk.mount / "plain/1").unlink()
    (disk.mount / "sealed/1").unlink()
    os.chown(disk.mount / "sealed", 65534, 65534)
    because(disk.prove(), "empty", "holds nothing yet")
    because(disk.prove("plain", key_identifier=None), "unknown", "No key of ours")
    (disk.mount / "sealed/empty").touch()
    because(disk.prove(), "empty", "holds nothing yet")
    (disk.mount / "sealed/empty").unlink()
    found = proof.prove(disk.target(), canary=True)
    because(found, "encrypted", "The marker stands 2048 times in the files and not on the device")
    assert found["examined"]["control_blocks_equal"] == 16
    plain = proof.prove(disk.target("plain", key_identifier=None), canary=True)
    because(plain, "plain", "The marker stands 2048 times on the device")
    assert os.listdir(disk.mount / "sealed") == []
    assert os.listdir(disk.mount / "plain") == []
    assert sorted(os.listdir(disk.mount)) == ["lost+found", "plain", "sealed"]


def test_a_canary_is_readable_for_a_backup_that_runs_meanwhile(disk: Disk) -> None:
    os.chown(disk.mount / "sealed", 65534, 65533)
    with control.temporary_file(str(disk.mount / "sealed"), b"x") as path:
        info = os.stat(path)
        assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (65534, 65533, 0o600)


def test_large_files_and_many_files_are_sampled_and_it_is_said(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk.mount / "sealed/1").write_bytes(rows(2048))
    for number in range(30):
        (disk.mount / f"sealed/small{number}").write_bytes(rows(1))
    monkeypatch.setattr(proof, "FILE_BUDGET", 1 << 20)
    monkeypatch.setattr(proof.choose, "__defaults__", (None, 8))
    found = disk.prove()
    because(found, "encrypted", f"0 of {256 + 7} blocks")
    assert (found["examined"]["files"], found["examined"]["files_read"]) == (31, 8)
    assert any("Of 31 files the blocks of 8 were read" in note for note in found["notes"])
    assert any("1 files were read in part" in note for note in found["notes"])
    (disk.mount / "plain/1").write_bytes(rows(2048))
    because(disk.prove("plain", key_identifier=None), "plain", "256 of 256 blocks")


def test_fragments_and_holes(disk: Disk) -> None:
    """Every other page is there: many extents, more than one call gives."""
    for name in ("sealed", "plain"):
        with open(disk.mount / name / "1", "wb") as handle:
            for page in range(0, 1000, 2):
                handle.seek(page * PAGE)
                handle.write(rows(1))
    found = disk.prove("plain", key_identifier=None)
    because(found, "plain", "500 of 500 blocks")
    because(disk.prove(), "encrypted", "0 of 500 blocks")


def test_a_last_page_in_part_is_compared_to_the_files_end(disk: Disk) -> None:
    for name in ("sealed", "plain"):
        (disk.mount / name / "1").write_bytes(b"x" * (PAGE + 100))
        (disk.mount / name / "2").write_bytes(b"short")
    because(disk.prove("plain", key_identifier=None), "plain", "2 of 2 blocks")
    because(disk.prove(), "encrypted", "0 of 2 blocks")


def test_what_was_just_written_is_brought_to_the_disk_first(disk: Disk) -> None:
    with open(disk.mount / "plain/1", "r+b") as handle:
        handle.write(rows())
        handle.flush()
        because(disk.prove("plain", key_identifier=None), "plain", "20 of 20 blocks")


def test_blocks_that_move_meanwhile_are_left_out(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = blocks.Reader.read
    path = disk.mount / "plain/1"

    def moving(self: blocks.Reader, offset: int, length: int) -> bytes:
        data = real(self, offset, length)
        os.truncate(path, 5 * PAGE)
        return data

    monkeypatch.setattr(blocks.Reader, "read", moving)
    with blocks.open_device(mounts.raw_device(str(disk.mount))) as reader:
        seen = blocks.examine(str(path), reader, budget=1 << 20, rng=random.Random(1))
    assert (seen.moved, seen.examined, seen.equal) == (15, 5, 5)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [(0x8, "encoded"), (0x100, "does not begin at a block"), (0x200, "inside the inode"), (0x400, "shares a block")],
)
def test_extents_that_do_not_hold_the_bytes(disk: Disk, monkeypatch: pytest.MonkeyPatch, flag: int, reason: str) -> None:
    real = blocks.extents
    monkeypatch.setattr(blocks, "extents", lambda fd: [one._replace(flags=one.flags | flag) for one in real(fd)])
    because(disk.prove(), "unknown", reason)


@pytest.mark.parametrize("flag", [0x2, 0x4, 0x800])
def test_extents_that_are_not_on_the_disk_yet(disk: Disk, monkeypatch: pytest.MonkeyPatch, flag: int) -> None:
    real = blocks.extents
    monkeypatch.setattr(blocks, "extents", lambda fd: [one._replace(flags=one.flags | flag) for one in real(fd)])
    because(disk.prove(), "unknown", "nothing to compare")


def test_a_device_that_cannot_be_read(disk: Disk, tmp_path: Path) -> None:
    number = os.stat(disk.mount).st_dev
    folder = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    folder.mkdir(parents=True)
    (folder / "uevent").write_text("DEVNAME=none/here\n")
    found = proof.prove(disk.target(), sysfs=str(tmp_path / "sys"))
    because(found, "unknown", "/dev/none/here: cannot be read")
    assert len(found["reasons"]) == 1
    assert found["examined"]["files"] == 1
    (folder / "uevent").write_text("DEVNAME=null\n")
    because(proof.prove(disk.target(), sysfs=str(tmp_path / "sys")), "unknown", "/dev/null")


def test_plain_text_above_dm_crypt_is_not_called_plain(disk: Disk, tmp_path: Path) -> None:
    number = os.stat(disk.mount).st_dev
    node = mounts.raw_device(str(disk.mount)).node
    assert node
    folder = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    (folder / "dm").mkdir(parents=True)
    (folder / "uevent").write_text(f"DEVNAME={Path(node).name}\n")
    (folder / "dm/uuid").write_text("CRYPT-LUKS2-0-x\n")
    sysfs = str(tmp_path / "sys")
    because(proof.prove(disk.target("plain", key_identifier=None), sysfs=sysfs), "unknown", "is a dm-crypt device")
    # Our own layer is proved above it all the same.
    because(proof.prove(disk.target(), sysfs=sysfs), "encrypted", "0 of 20 blocks")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("btrfs", "logical addresses"), ("tmpfs", "lies in memory"), ("overlay", "no blocks of its own"), ("proc", "does not tell")],
)
def test_where_it_cannot_look(disk: Disk, tmp_path: Path, kind: str, reason: str) -> None:
    there: t.ContextManager[Path]
    if kind == "btrfs":
        there = filesystems.mounted(tmp_path, filesystems.BTRFS, 128, "other")
    elif kind == "overlay":
        there = filesystems.overlay(tmp_path, disk.mount)
    else:
        there = filesystems.mounted_virtual(tmp_path / "other", "-t", kind)
    with there as mount:
        place = mount
        if kind != "proc":
            place = mount / "place"
            place.mkdir()
            (place / "1").write_bytes(rows())
        files = (str(place / "version"),) if kind == "proc" else ()
        for key in (None, disk.identifier):
            because(proof.prove(ProofTarget("x", str(place), key, files)), "unknown", reason)


def test_xfs_is_looked_at(tmp_path: Path, encrypted_mount: Path) -> None:
    with filesystems.mounted(tmp_path, filesystems.XFS, 320, "xfs") as mount:
        (mount / "1").write_bytes(rows())
        because(proof.prove(ProofTarget("x", str(mount), None)), "plain", "20 of 20 blocks")
        because(proof.prove(ProofTarget("x", str(mount), fscrypt.identifier(KEY))), "plain", "20 of 20 blocks")
        (mount / "1").write_bytes(bytes(PAGE))
        because(proof.prove(ProofTarget("x", str(mount), fscrypt.identifier(KEY))), "unknown", "xfs has no file encryption")


def test_a_place_that_is_not_there(disk: Disk) -> None:
    because(disk.prove("gone"), "unknown", "does not exist")


def test_a_relation_by_its_first_file(disk: Disk) -> None:
    base = disk.mount / "sealed/16384"
    for name in ("16384", "16384.1", "16384_vm"):
        base.with_name(name).write_bytes(rows(2))
    found = disk.prove(files=tuple(proof.relation_files(str(base))))
    assert found["examined"]["files"] == 3
    because(found, "encrypted", "0 of 6 blocks")


def test_the_kernel_says_of_an_inode(disk: Disk) -> None:
    answers = {}
    for name in ("sealed/1", "plain/1"):
        with open(disk.mount / name, "rb") as handle:
            answers[name] = blocks.inode_encrypted(handle.fileno())
            assert fcntl.fcntl(handle.fileno(), fcntl.F_GETFD) is not None
    assert answers == {"sealed/1": True, "plain/1": False}
