# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The kernel's file encryption on real file systems."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt
from ansible_collections.hsm.tde.tests.integration import filesystems
from ansible_collections.hsm.tde.tests.integration.support import in_child

pytestmark = pytest.mark.root

KEY, OTHER_KEY = bytes(range(64)), bytes(range(1, 65))
NOBODY = 65534


def code(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def become_nobody(folder: str) -> None:
    """Stand in a folder that nobody could not reach by its path, as nobody."""
    os.chdir(folder)
    os.setuid(NOBODY)


def place(mount: Path, name: str = "place", key: bytes = KEY) -> tuple[Path, str]:
    """An encrypted directory with a file in it."""
    identifier = fscrypt.add_key(str(mount), key)
    path = mount / name
    path.mkdir()
    assert fscrypt.set_policy(str(path), identifier)
    (path / "file").write_bytes(b"text in the clear\n" * 1000)
    return path, identifier


def test_a_key_comes_stays_and_goes(encrypted_mount: Path) -> None:
    mount = str(encrypted_mount)
    expected = fscrypt.identifier(KEY)
    assert fscrypt.key_status(mount, expected) == "absent"
    assert fscrypt.add_key(mount, KEY) == expected  # the kernel derives the same
    assert fscrypt.add_key(mount, bytearray(KEY)) == expected
    assert fscrypt.key_status(mount, expected) == "present"
    assert fscrypt.remove_key(mount, expected) == {
        "status": "absent",
        "removed": True,
        "files_busy": False,
        "other_users": False,
        "reason": "",
    }
    assert fscrypt.remove_key(mount, expected)["removed"] is False


def test_a_policy_is_set_once_and_read(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    assert fscrypt.policy(str(encrypted_mount)) is None
    for inside in (path, path / "file"):
        assert fscrypt.policy(str(inside)) == {
            "version": 2,
            "identifier": identifier,
            "contents": "AES-256-XTS",
            "names": "AES-256-CTS",
            "flags": 3,
        }
    assert fscrypt.set_policy(str(path), identifier) is False


def test_without_the_key_names_and_contents_are_gone_until_it_is_back(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    assert fscrypt.remove_key(str(encrypted_mount), identifier)["status"] == "absent"
    (locked,) = path.iterdir()
    assert locked.name != "file"
    with pytest.raises(OSError, match="Required key") as caught:
        locked.read_bytes()
    assert caught.value.errno == errno.ENOKEY
    assert fscrypt.policy(str(path)) is not None  # the policy can be read without it
    assert code(lambda: fscrypt.policy(str(locked))) == "fscrypt_key_absent"
    fscrypt.add_key(str(encrypted_mount), KEY)
    assert (path / "file").read_bytes().startswith(b"text")


def test_open_files_stay_readable_until_the_removal_is_repeated(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    mount = str(encrypted_mount)
    with open(path / "file", "rb") as handle:
        busy = fscrypt.remove_key(mount, identifier, wait_seconds=0.1)
        assert (busy["status"], busy["files_busy"]) == ("incompletely_removed", True)
        assert "still open" in busy["reason"]
        assert handle.read(4) == b"text"
    assert fscrypt.key_status(mount, identifier) == "incompletely_removed"
    assert fscrypt.remove_key(mount, identifier)["status"] == "absent"


def test_removal_waits_for_files_that_are_being_closed(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    with open(path / "file", "rb") as handle:
        holder = subprocess.Popen(["sleep", "0.3"], stdin=handle)
    try:
        assert fscrypt.remove_key(str(encrypted_mount), identifier, wait_seconds=10)["status"] == "absent"
    finally:
        holder.wait()


def test_another_users_claim_keeps_the_key(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    mount = str(encrypted_mount)
    in_child(lambda: fscrypt.add_key(".", KEY), before=lambda: become_nobody(mount))
    left = fscrypt.remove_key(mount, identifier)
    assert (left["status"], left["removed"], left["other_users"]) == ("present", True, True)
    assert "Another user" in left["reason"]
    # Now the claim is nobody's alone; ours is gone, and it is still no success.
    again = fscrypt.remove_key(mount, identifier)
    assert (again["status"], again["removed"], again["other_users"]) == ("present", False, True)
    in_child(lambda: fscrypt.remove_key(".", identifier), before=lambda: become_nobody(mount))
    assert fscrypt.key_status(mount, identifier) == "absent"
    assert "file" not in os.listdir(path)


def test_only_an_empty_directory_of_ours_under_a_key_that_is_there(encrypted_mount: Path) -> None:
    path, identifier = place(encrypted_mount)
    other = fscrypt.identifier(OTHER_KEY)
    full = encrypted_mount / "full"
    full.mkdir()
    (full / "file").touch()
    link = encrypted_mount / "link"
    link.symlink_to(path)
    empty = encrypted_mount / "empty"
    empty.mkdir()
    assert code(lambda: fscrypt.set_policy(str(full), identifier)) == "place_not_empty"
    assert code(lambda: fscrypt.set_policy(str(full / "file"), identifier)) == "place_not_directory"
    assert code(lambda: fscrypt.set_policy(str(link), identifier)) == "place_not_directory"
    assert code(lambda: fscrypt.set_policy(str(path), other)) == "fscrypt_policy_other"
    assert code(lambda: fscrypt.set_policy(str(empty), other)) == "fscrypt_key_absent"
    assert code(lambda: fscrypt.set_policy(str(empty / "none"), identifier)) == "file_absent"
    assert fscrypt.policy(str(empty)) is None


def test_a_directory_of_somebody_else(encrypted_mount: Path) -> None:
    identifier = fscrypt.add_key(str(encrypted_mount), KEY)
    empty = encrypted_mount / "empty"
    empty.mkdir()

    def as_nobody() -> None:
        fscrypt.set_policy("empty", identifier)

    with pytest.raises(TdeError, match="belongs to user id 0") as caught:
        in_child(as_nobody, before=lambda: become_nobody(str(encrypted_mount)))
    assert caught.value.code == "permission_denied"
    assert fscrypt.policy(str(empty)) is None


def test_ext4_without_the_feature_says_how_to_have_it_and_that_works(tmp_path: Path) -> None:
    with filesystems.mounted(tmp_path, filesystems.PLAIN) as mount:
        support = fscrypt.supported(str(mount))
        assert support["supported"] is False
        assert (support["filesystem"], support["block_size"]) == ("ext4", 4096)
        assert "no encrypt feature" in support["reason"]
        assert "GRUB" in support["how_to_enable"]
        for act in (
            lambda: fscrypt.add_key(str(mount), KEY),
            lambda: fscrypt.key_status(str(mount), fscrypt.identifier(KEY)),
            lambda: fscrypt.remove_key(str(mount), fscrypt.identifier(KEY)),
            lambda: fscrypt.policy(str(mount)),
            lambda: fscrypt.set_policy(str(mount), fscrypt.identifier(KEY)),
        ):
            with pytest.raises(TdeError, match="tune2fs -O encrypt") as caught:
                act()
            assert (caught.value.code, caught.value.cause) == ("fscrypt_unsupported", "unsupported")
        command = support["how_to_enable"].split(": ", 1)[1].split(". ", 1)[0]
        filesystems.run(*shlex.split(command))
        assert fscrypt.supported(str(mount))["supported"] is True
        place(mount)


def test_file_systems_that_cannot(tmp_path: Path, encrypted_mount: Path) -> None:
    with (
        filesystems.mounted(tmp_path, filesystems.XFS, 320, "xfs") as xfs,
        filesystems.mounted_virtual(tmp_path / "tmpfs", "-t", "tmpfs") as tmpfs,
        filesystems.overlay(tmp_path, encrypted_mount) as overlay,
    ):
        for mount, name in ((xfs, "xfs"), (tmpfs, "tmpfs"), (overlay, "overlay")):
            support = fscrypt.supported(str(mount))
            assert (support["supported"], support["filesystem"]) == (False, name)
            assert "storage=image" in support["how_to_enable"]
            assert code(lambda: fscrypt.add_key(str(mount), KEY)) == "fscrypt_unsupported"  # noqa: B023
            assert code(lambda: fscrypt.policy(str(mount))) == "fscrypt_unsupported"  # noqa: B023
    assert fscrypt.supported(str(encrypted_mount))["supported"] is True
