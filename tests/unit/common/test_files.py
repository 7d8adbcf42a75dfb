"""Files that decide over keys: whoever could have put them there is judged before they are read."""

from __future__ import annotations

import os

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.files import (
    lock,
    make_private_directory,
    read_private,
    remove_leftovers,
    write_atomic,
)


@pytest.fixture
def folder(tmp_path):
    make_private_directory(str(tmp_path / "a" / "b"))
    return tmp_path / "a" / "b"


def code(call, *args, **kwargs):
    with pytest.raises(TdeError) as caught:
        call(*args, **kwargs)
    return caught.value.code


def test_what_is_written_is_read_and_private(folder):
    write_atomic(str(folder / "f"), b"one")
    write_atomic(str(folder / "f"), b"two")
    assert read_private(str(folder / "f")) == b"two"
    assert (folder / "f").stat().st_mode & 0o777 == 0o600
    assert os.listdir(folder) == ["f"]


def test_a_missing_file_is_absent(folder):
    assert code(read_private, str(folder / "nothing")) == "file_absent"


def test_a_file_behind_a_link_is_not_read(folder):
    write_atomic(str(folder / "f"), b"x")
    (folder / "link").symlink_to("f")
    assert code(read_private, str(folder / "link")) == "file_not_private"


def test_a_folder_behind_a_link_is_not_walked(folder, tmp_path):
    write_atomic(str(folder / "f"), b"x")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert code(read_private, str(tmp_path / "elsewhere" / "f")) == "file_not_private"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_reach_is_not_read(folder, mode):
    write_atomic(str(folder / "f"), b"x")
    (folder / "f").chmod(mode)
    assert code(read_private, str(folder / "f")) == "file_not_private"


def test_a_second_link_is_refused(folder):
    write_atomic(str(folder / "f"), b"x")
    os.link(folder / "f", folder / "g")
    assert code(read_private, str(folder / "f")) == "file_not_private"


def test_a_pipe_is_refused_without_waiting(folder):
    os.mkfifo(folder / "p", 0o600)
    assert code(read_private, str(folder / "p")) == "file_not_private"


def test_a_large_file_is_refused(folder):
    write_atomic(str(folder / "f"), b"x" * 101)
    assert code(read_private, str(folder / "f"), max_bytes=100) == "file_too_large"


def test_a_folder_that_others_can_write_is_refused(folder):
    write_atomic(str(folder / "f"), b"x")
    folder.chmod(0o777)
    assert code(read_private, str(folder / "f")) == "file_not_private"
    assert code(write_atomic, str(folder / "f"), b"y") == "file_not_private"


def test_a_relative_path_is_refused():
    assert code(read_private, "some/file") == "invalid_option"


def test_a_failed_write_leaves_the_former_file_and_no_other(folder, monkeypatch):
    write_atomic(str(folder / "f"), b"former")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert code(write_atomic, str(folder / "f"), b"new") == "disk_full"
    monkeypatch.undo()
    assert read_private(str(folder / "f")) == b"former"
    assert os.listdir(folder) == ["f"]


def test_leftovers_of_a_kill_are_removed(folder):
    write_atomic(str(folder / "f"), b"x")
    (folder / ".f.0123456789ab.tmp").write_bytes(b"half")
    assert remove_leftovers(str(folder)) == [".f.0123456789ab.tmp"]
    assert os.listdir(folder) == ["f"]


def test_a_second_run_at_the_same_time_is_told(folder):
    with lock(str(folder / "lock")):
        assert code(lock(str(folder / "lock")).__enter__) == "busy"
    with lock(str(folder / "lock")):
        pass
