# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The verdict as a pure function: each way in which a proof was false once is a doubt by itself."""

from __future__ import annotations

import copy
import random
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.storage import proof
from ansible_collections.hsm.tde.plugins.module_utils.storage.blocks import FileFacts
from hypothesis import given, settings
from hypothesis import strategies as st

OURS, THEIRS = "aa" * 16, "bb" * 16


def sound() -> proof.Facts:
    """Facts that prove a place encrypted."""
    one = FileFacts("/p/1", 8192, True, OURS, 8192, examined=2, marker_in_file=3)
    return proof.Facts(OURS, OURS, "present", [copy.copy(one)], [one], control_equal=16, marker=True)


def test_sound_facts_prove_it() -> None:
    verdict = proof.judge(sound())
    assert verdict.verdict == "encrypted"
    assert any("0 of 2 blocks" in reason for reason in verdict.reasons)


def change(facts: proof.Facts, **values: t.Any) -> None:
    for name, value in values.items():
        for one in [*facts.inodes, *facts.files]:
            setattr(one, name, value)


DOUBTS: dict[str, tuple[t.Callable[[proof.Facts], None], str]] = {
    "no key of ours": (lambda facts: setattr(facts, "expected", None), "No key of ours"),
    "no policy": (lambda facts: setattr(facts, "identifier", None), "no encryption policy"),
    "another policy": (lambda facts: setattr(facts, "identifier", THEIRS), "under another key"),
    "key absent": (lambda facts: setattr(facts, "key_status", "absent"), "does not hold the key"),
    "key half removed": (lambda facts: setattr(facts, "key_status", "incompletely_removed"), "removed from the kernel"),
    "key status not known": (lambda facts: setattr(facts, "key_status", None), "could not be established"),
    "inode not encrypted": (lambda facts: change(facts, encrypted=False), "not encrypted, as the kernel says"),
    "kernel cannot say": (lambda facts: change(facts, encrypted=None), "not encrypted, as the kernel says"),
    "inode under another key": (lambda facts: change(facts, identifier=THEIRS), "under another key"),
    "no control": (lambda facts: setattr(facts, "control_equal", None), "No file in the clear"),
    "control not found": (lambda facts: setattr(facts, "control_equal", 0), "proves nothing"),
    "zeros on the device": (lambda facts: change(facts, device_zero=1), "not written yet"),
    "nothing compared": (lambda facts: change(facts, examined=0), "nothing to compare"),
    "marker not in the files": (lambda facts: change(facts, marker_in_file=0), "does not stand in what was read"),
    "a file that could not be read": (lambda facts: change(facts, problem="is compressed"), "is compressed"),
    "another problem": (lambda facts: facts.problems.append("/dev/x: cannot be read."), "/dev/x"),
    "no files": (lambda facts: facts.files.clear(), "nothing to compare"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_each_doubt_alone_is_enough(doubt: str) -> None:
    facts = sound()
    spoil, reason = DOUBTS[doubt]
    spoil(facts)
    verdict = proof.judge(facts)
    assert verdict.verdict == "unknown"
    assert any(reason in one for one in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda facts: None, "empty"),
        (lambda facts: setattr(facts, "identifier", None), "unknown"),
        (lambda facts: setattr(facts, "key_status", "absent"), "unknown"),
        (lambda facts: facts.problems.append("/p/x could not be read."), "unknown"),
        (lambda facts: setattr(facts, "marker", True), "unknown"),
        (lambda facts: facts.inodes.append(FileFacts("/p/2", 0, False)), "unknown"),
        (lambda facts: facts.inodes.append(FileFacts("/p/2", gone=True)), "unknown"),
    ],
)
def test_a_place_that_holds_nothing_is_empty_if_its_directory_is_encrypted(
    spoil: t.Callable[[proof.Facts], None], word: str
) -> None:
    facts = proof.Facts(OURS, OURS, "present", [FileFacts("/p/1", 0, True, OURS)], [], control_equal=16)
    spoil(facts)
    assert proof.judge(facts).verdict == word


def test_one_file_of_many_spoils_it() -> None:
    facts = sound()
    facts.inodes.append(FileFacts("/p/2", 0, False))
    assert proof.judge(facts).verdict == "unknown"


def test_a_file_that_was_dropped_meanwhile_does_not() -> None:
    facts = sound()
    facts.inodes.append(FileFacts("/p/2", gone=True))
    assert proof.judge(facts).verdict == "encrypted"


@pytest.mark.parametrize("seen", [{"equal": 1}, {"marker_on_device": 1}])
def test_plain_text_on_the_device_is_plain_whatever_else(seen: dict[str, int]) -> None:
    facts = sound()
    change(facts, **seen)
    assert proof.judge(facts).verdict == "plain"
    facts.crypt = "/dev/dm-0"
    verdict = proof.judge(facts)
    assert verdict.verdict == "unknown"
    assert any("dm-crypt" in reason for reason in verdict.reasons)


COUNT = st.integers(0, 3)
FILE = st.builds(
    FileFacts,
    path=st.sampled_from(["/p/1", "/p/2"]),
    size=COUNT,
    encrypted=st.sampled_from([True, True, False, None]),
    identifier=st.sampled_from([OURS, OURS, THEIRS, None]),
    examined=COUNT,
    equal=st.sampled_from([0, 0, 0, 1]),
    device_zero=st.sampled_from([0, 0, 1]),
    marker_in_file=COUNT,
    marker_on_device=st.sampled_from([0, 0, 1]),
    gone=st.sampled_from([False, False, True]),
    problem=st.sampled_from(["", "", "is compressed"]),
)
FACTS = st.builds(
    proof.Facts,
    expected=st.sampled_from([OURS, OURS, None]),
    identifier=st.sampled_from([OURS, OURS, THEIRS, None]),
    key_status=st.sampled_from(["present", "present", "absent", "incompletely_removed", None]),
    inodes=st.lists(FILE, max_size=2),
    files=st.lists(FILE, max_size=2),
    control_equal=st.sampled_from([None, 0, 1, 16]),
    marker=st.booleans(),
    crypt=st.sampled_from([None, None, "/dev/dm-0"]),
    problems=st.lists(st.just("x"), max_size=1),
)


@settings(deadline=None)
@given(FACTS)
def test_never_encrypted_without_all_of_it(facts: proof.Facts) -> None:
    verdict = proof.judge(facts)
    assert verdict.reasons
    plain_text = facts.total("equal") or (facts.marker and facts.total("marker_on_device"))
    assert (verdict.verdict == "plain") == bool(plain_text and not facts.crypt)
    if verdict.verdict == "encrypted":
        assert facts.expected == facts.identifier == OURS
        assert facts.key_status == "present"
        assert facts.total("examined") > 0
        assert not plain_text
        assert facts.control_equal
        assert not facts.problems
        assert all(one.encrypted and one.identifier == OURS for one in facts.inodes if not one.gone)
        if facts.marker:
            assert facts.total("marker_in_file") > 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(4, 20), st.integers())
def test_large_files_and_the_one_named_are_read_in_any_case(sizes: list[int], most: int, seed: int) -> None:
    rows = [FileFacts(f"/p/{index:02}", size) for index, size in enumerate(sizes)]
    first = rows[-1].path if rows and rows[-1].size else None
    chosen = proof.choose(rows, random.Random(seed), first, most)
    assert len(chosen) == min(most, sum(bool(size) for size in sizes))
    assert len({one.path for one in chosen}) == len(chosen)
    if first:
        assert chosen[0].path == first
    if len(chosen) > 1:
        assert max(one.size for one in chosen) == max(sizes)


def test_a_relations_segments_and_forks(tmp_path: Path) -> None:
    names = ["16384", "16384.1", "16384.10", "16384_fsm", "16384_fsm.1", "16384_vm", "16384_init"]
    for name in [*names, "163840", "16384.x", "16384_", "16384_tmp", "16384.1.2", "116384"]:
        (tmp_path / name).touch()
    assert [Path(one).name for one in proof.relation_files(str(tmp_path / "16384"))] == sorted(names)
    with pytest.raises(TdeError) as caught:
        proof.relation_files(str(tmp_path / "none" / "1"))
    assert caught.value.code == "file_absent"


def test_links_that_lead_out_keep_a_place_from_being_called_encrypted(tmp_path: Path) -> None:
    place = tmp_path / "place"
    for folder in ("base", "pg_tblspc"):
        (place / folder).mkdir(parents=True)
    (place / "base/1").write_text("x")
    (place / "inside").symlink_to(place / "base")
    (place / "pg_wal").symlink_to(tmp_path)
    (place / "pg_tblspc/16385").symlink_to(tmp_path)
    files, doubts, notes = proof.walk(str(place), (str(place / "pg_tblspc"),))
    assert files == [str(place / "base/1")]
    (doubt,), (note,) = doubts, notes
    assert "pg_wal leads out of the place" in doubt
    assert "16385 leads out of the place" in note
    target = proof.ProofTarget("data directory", str(place), None, links=(str(place / "pg_tblspc"),))
    assert any("pg_wal" in reason for reason in proof.prove(target)["reasons"])
