"""The journal notices whatever was changed, removed or cut off, and survives a kill during an append."""

from __future__ import annotations

import errno
import json
import os

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common import journal as room
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal


@pytest.fixture
def journal(tmp_path):
    journal = Journal(str(tmp_path / "state" / "journal.jsonl"))
    for number in range(5):
        journal.append("generate_key", f"key {number}", key=f"k{number}", key_id="0a", kcv="abcdef", tag=str(number))
    return journal


def lines(journal):
    with open(journal.path, encoding="utf-8") as handle:
        return handle.read().splitlines(keepends=True)


def rewrite(journal, content):
    with open(journal.path, "w", encoding="utf-8") as handle:
        handle.writelines(content)


def test_entries_come_back_in_order_with_who_and_what(journal):
    entries = journal.entries()
    assert [entry["object"] for entry in entries] == [f"key {number}" for number in range(5)]
    assert all(entry["actor"] and entry["host"] and entry["time"].endswith("+00:00") for entry in entries)
    assert journal.last(key="k3")["detail"] == {"tag": "3"}
    assert journal.last(key="nobody") is None


def test_the_file_is_private(journal, tmp_path):
    assert (tmp_path / "state" / "journal.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("place", range(5))
def test_a_changed_entry_is_noticed(journal, place):
    content = lines(journal)
    entry = json.loads(content[place])
    entry["object"] = "another key"
    content[place] = json.dumps(entry) + "\n"
    rewrite(journal, content)
    with pytest.raises(TdeError) as caught:
        journal.entries()
    assert caught.value.code == "journal_damaged"


@pytest.mark.parametrize("place", range(5))
def test_a_removed_entry_is_noticed(journal, place):
    content = lines(journal)
    del content[place]
    rewrite(journal, content)
    with pytest.raises(TdeError) as caught:
        journal.entries()
    assert caught.value.code == "journal_damaged"


def test_an_emptied_journal_is_noticed(journal):
    rewrite(journal, [])
    with pytest.raises(TdeError) as caught:
        journal.append("generate_key", "key")
    assert caught.value.code == "journal_damaged"


def test_a_removed_journal_is_noticed(journal, tmp_path):
    (tmp_path / "state" / "journal.jsonl").unlink()
    with pytest.raises(TdeError) as caught:
        journal.entries()
    assert caught.value.code == "journal_damaged"


def test_half_a_line_left_by_a_kill_is_dropped(journal):
    with open(journal.path, "a", encoding="utf-8") as handle:
        handle.write('{"seq": 6, "acti')
    journal.append("destroy_key", "key 6")
    assert [entry["action"] for entry in journal.entries()][-1] == "destroy_key"
    assert len(journal.entries()) == 6


def test_a_full_disk_is_told_and_leaves_a_sound_journal(journal, monkeypatch):
    journal.append("generate_key", "key a")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TdeError) as caught:
            journal.append("generate_key", "key b")
    assert (caught.value.code, caught.value.kept) == ("disk_full", "Nothing was changed.")
    journal.append("generate_key", "key c")
    assert journal.entries()[-1]["object"] == "key c"


def test_a_whole_line_whose_head_was_not_written_is_kept(journal, tmp_path):
    head = (tmp_path / "state" / "journal.jsonl.head").read_bytes()
    journal.append("destroy_key", "key 6")
    (tmp_path / "state" / "journal.jsonl.head").write_bytes(head)
    (tmp_path / "state" / "journal.jsonl.head").chmod(0o600)
    assert len(journal.entries()) == 6


@pytest.mark.parametrize("after", ["journal.jsonl", "journal.jsonl.head"])
def test_an_entry_appended_while_somebody_reads_is_none_missing(journal, monkeypatch, after):
    """A database that starts reads without the lock that a task holds."""
    read = room.read_private

    def meanwhile(path, **how):
        content = read(path, **how)
        if os.path.basename(path) == after:
            monkeypatch.setattr(room, "read_private", read)
            journal.append("rotate_master_key", "key 5")
        return content

    monkeypatch.setattr(room, "read_private", meanwhile)
    assert len(journal.entries()) in (5, 6)
    assert len(journal.entries()) == 6
