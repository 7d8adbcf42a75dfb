# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""OpenCryptoki's list of objects, put together again after a kill, on folders that only look like a token's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import copies, opencryptoki

LIBRARY = "/usr/lib/opencryptoki/libopencryptoki.so.0"


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a token's objects, two of them."""
    monkeypatch.setattr(opencryptoki, "STORE", str(tmp_path))
    folder = tmp_path / "swtok/TOK_OBJ"
    folder.mkdir(parents=True)
    (folder.parent / "NVTOK.DAT").write_bytes(bytes(232))
    for name in ("00000000", "10000000"):
        (folder / name).write_bytes(name.encode() * 1000)
    (folder / "OBJ.IDX").write_bytes(b"00000000\n10000000\n")
    return folder


def lost(objects: Path) -> None:
    """A changer ended without a word: its copy is there and nobody has it locked."""
    with copies.objects_kept(LIBRARY):
        os.link(objects.parent / "objects.copy", objects.parent / "kept")
    (objects.parent / "kept").rename(objects.parent / "objects.copy")


@pytest.mark.parametrize(
    ("left", "whole"),
    [
        (b"", b"00000000\n10000000\n"),
        (b"10000000\n0000", b"10000000\n00000000\n"),
        # Made meanwhile, and nothing lost.
        (b"20000000\n00000000\n10000000\n", b"20000000\n00000000\n10000000\n"),
    ],
)
def test_a_list_cut_short(left: bytes, whole: bytes, objects: Path) -> None:
    lost(objects)
    (objects / "OBJ.IDX").write_bytes(left)
    (objects / "10000000").write_bytes(b"1")
    copies.mend(LIBRARY)
    assert (objects / "OBJ.IDX").read_bytes() == whole
    assert (objects / "10000000").read_bytes() == b"10000000" * 1000
    assert sorted(os.listdir(objects.parent)) == ["NVTOK.DAT", "TOK_OBJ"]


def test_a_destroyed_object_is_not_listed_again(objects: Path) -> None:
    lost(objects)
    (objects / "OBJ.IDX").write_bytes(b"10000000\n")
    (objects / "00000000").unlink()
    copies.mend(LIBRARY)
    assert (objects / "OBJ.IDX").read_bytes() == b"10000000\n"
    assert not (objects / "00000000").exists()


def test_two_do_not_change_keys_of_a_token_at_once(objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with copies.objects_kept(LIBRARY):
        copies.mend(LIBRARY)
        monkeypatch.setattr(copies, "_KEPT", set())  # as in another process
        with pytest.raises(TdeError) as caught:
            with copies.objects_kept(LIBRARY):
                pass
        assert (objects.parent / "objects.copy").exists()
    assert caught.value.code == "busy"
    assert not (objects.parent / "objects.copy").exists()


def test_an_act_within_another_has_its_copies(objects: Path) -> None:
    with copies.objects_kept(LIBRARY):
        with copies.objects_kept(LIBRARY):
            assert (objects.parent / "objects.copy").exists()
        assert (objects.parent / "objects.copy").exists()
    assert not (objects.parent / "objects.copy").exists()


def test_what_cannot_be_copied_is_not_changed(objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fchown", full)
    done = []
    with pytest.raises(TdeError) as caught:
        with copies.objects_kept(LIBRARY):
            done.append("changed")
    assert (caught.value.code, done) == ("disk_full", [])
    assert sorted(os.listdir(objects.parent)) == ["NVTOK.DAT", "TOK_OBJ"]


def test_names_in_a_copy_lead_nowhere_else(objects: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    lost(objects)
    copy = objects.parent / "objects.copy"
    name = b"../../elsewhere"
    copy.write_bytes(copies._HEAD.pack(len(name), 4) + name + b"evil" + copy.read_bytes())
    (objects / "10000000").unlink()
    (objects / "10000000").symlink_to(tmp_path / "elsewhere")
    (objects / "00000000").write_bytes(b"")
    copies.mend(LIBRARY)
    assert (tmp_path / "elsewhere").read_bytes() == b""
    assert (objects / "00000000").read_bytes() == b"00000000" * 1000
    assert copy.exists(), "not all is as it was"
