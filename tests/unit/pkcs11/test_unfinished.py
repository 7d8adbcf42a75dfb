# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which keys the journal says were begun and never done."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import unfinished

#: What happened to the key, and whether it still is one that was begun and never done.
HISTORIES: list[tuple[list[tuple[str, str]], bool]] = [
    ([], False),
    ([("generate_key", "begun")], True),
    ([("generate_key", "begun"), ("generate_key", "done")], False),
    ([("generate_key", "begun"), ("generate_key", "failed")], False),
    ([("generate_key", "begun"), (unfinished.ACTION, "begun")], True),
    ([("generate_key", "begun"), (unfinished.ACTION, "begun"), (unfinished.ACTION, "failed")], True),
    ([("generate_key", "begun"), (unfinished.ACTION, "begun"), (unfinished.ACTION, "done")], False),
    ([("generate_key", "begun"), (unfinished.ACTION, "done"), ("generate_key", "begun")], True),
    ([("generate_key", "begun"), ("destroy_key", "begun")], False),
    ([("generate_key", "begun"), ("change_key", "begun")], False),
    ([("generate_key", "begun"), ("forget_key", "begun")], False),
    ([("generate_key", "begun"), ("import_key", "begun")], False),
    ([("import_key", "begun")], False),
    ([("generate_kek", "begun")], False),
]


class Token(t.NamedTuple):
    """What is asked of a token."""

    label: str
    serial: str


def write(journal: Journal, acts: t.Iterable[tuple[str, str]], serial: str | None = "b2", key_id: str = "0a") -> None:
    where = {} if serial is None else {"token_label": "demo", "token_serial": serial}
    for action, result in acts:
        journal.append(action, "key 'a'", result=result, key="a", key_id=key_id, **where)


def begun(journal: Journal) -> set[tuple[str, bytes]]:
    return unfinished.begun(journal, t.cast(t.Any, Token("demo", "b2")))


@pytest.mark.parametrize(("acts", "expected"), HISTORIES)
def test_only_a_generation_that_nothing_followed_counts(acts: list[tuple[str, str]], expected: bool, tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.jsonl"))
    write(journal, acts)
    assert begun(journal) == ({("a", b"\x0a")} if expected else set())


def test_what_was_done_elsewhere_says_nothing_of_this_key(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.jsonl"))
    write(journal, [("generate_key", "begun")], serial="another")
    assert begun(journal) == set()
    write(journal, [("generate_key", "begun")])
    write(journal, [("generate_key", "done")], serial="another")
    write(journal, [("generate_key", "done")], key_id="0b")
    assert begun(journal) == {("a", b"\x0a")}
    # An act that names no token may have been on this one.
    write(journal, [("destroy_key", "done")], serial=None)
    assert begun(journal) == set()
