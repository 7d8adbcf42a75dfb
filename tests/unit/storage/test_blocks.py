# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which stretches are read, which extents are refused, and what counts as evidence."""

from __future__ import annotations

import itertools
import random

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.storage import blocks
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4096


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.integers(0, 64 << 20), st.integers())
def test_windows_lie_in_the_file_and_keep_to_the_budget(size: int, budget: int, seed: int) -> None:
    chosen = blocks.windows(size, budget, random.Random(seed))
    assert sum(length for dummy, length in chosen) <= max(budget, 2 * blocks.WINDOW)
    end = 0
    for start, length in chosen:
        assert start >= end
        assert start % blocks.WINDOW == 0
        assert length > 0
        end = start + length
    assert end == size
    if size:
        assert chosen[0][0] == 0
    if size <= budget:
        assert sum(length for dummy, length in chosen) == size


@pytest.mark.parametrize("flag", [0x8, 0x100, 0x200, 0x400])
def test_extents_that_do_not_hold_the_bytes_are_refused(flag: int) -> None:
    good = blocks.Extent(0, 8192, BLOCK, 0x1000)
    assert blocks.unreadable([good]) == ""
    assert "4096" in blocks.unreadable([good, blocks.Extent(BLOCK, 1, BLOCK, flag | 0x1)])


@pytest.mark.parametrize(
    ("offset", "place"),
    [
        (0, ("written", 1 << 20)),
        (BLOCK, ("written", (1 << 20) + BLOCK)),
        (2 * BLOCK, ("hole", 0)),
        (3 * BLOCK, ("hole", 0)),
        (4 * BLOCK, ("pending", 0)),
        (9 * BLOCK, ("hole", 0)),
    ],
)
def test_where_a_block_lies(offset: int, place: tuple[str, int]) -> None:
    places = blocks._Places(
        [
            blocks.Extent(0, 1 << 20, 2 * BLOCK, 0),
            blocks.Extent(3 * BLOCK, 1 << 30, BLOCK, 0x800),
            blocks.Extent(4 * BLOCK, 0, BLOCK, 0x2 | 0x4),
        ]
    )
    assert places.at(offset) == place
    assert blocks._Places([]).at(offset) == ("hole", 0)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["equal", "other", "zero", "device_zero"]), min_size=1, max_size=20),
    st.integers(1, BLOCK),
    st.integers(),
)
def test_only_blocks_with_content_on_both_sides_are_evidence(kinds: list[str], last: int, seed: int) -> None:
    rng = random.Random(seed)
    mine = {kind: b"\x01" + rng.randbytes(BLOCK - 1) for kind in ("equal", "other", "device_zero")} | {"zero": bytes(BLOCK)}
    disk = {
        "equal": mine["equal"],
        "other": b"\x02" + rng.randbytes(BLOCK - 1),
        "zero": bytes(BLOCK),
        "device_zero": bytes(BLOCK),
    }
    content = b"".join(mine[kind] for kind in kinds)[: (len(kinds) - 1) * BLOCK + last]
    device = b"".join(disk[kind] for kind in kinds)
    facts = blocks.FileFacts("x")
    blocks.compare(facts, content, device, range(0, len(device), BLOCK), BLOCK)
    judged = kinds if last >= 16 else kinds[:-1]
    assert facts.equal == judged.count("equal")
    assert facts.examined == judged.count("equal") + judged.count("other")
    assert facts.device_zero == judged.count("device_zero")
    assert facts.zero == kinds.count("zero")
    assert facts.examined + facts.device_zero + facts.zero + facts.short == len(kinds)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=(lambda one: one[0], lambda one: one[1])))
def test_neighbours_are_read_at_once_and_nothing_twice(numbers: list[tuple[int, int]]) -> None:
    wanted = sorted((offset * BLOCK, place * BLOCK) for offset, place in numbers)
    runs = list(blocks._runs(wanted, BLOCK))
    read = [(offset + step, place + step) for offset, place, length in runs for step in range(0, length, BLOCK)]
    assert read == wanted
    for before, after in itertools.pairwise(runs):
        assert (before[0] + before[2], before[1] + before[2]) != after[:2]
