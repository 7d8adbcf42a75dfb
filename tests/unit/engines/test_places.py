# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Plans for places: a model of the disk carries them out, is killed anywhere, and may lose its mount or kernel key."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import TablespaceWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.keyslots import PASSPHRASE, Key, Slot, Wanted
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import plan
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql.plan import CatalogFacts, PlaceFacts
from hypothesis import given, settings
from hypothesis import strategies as st

POSTGRES = 101
NOW = "2026-11-21T10:00:00Z"
OURS = "0" * 32
SLOTS = [Wanted("primary", PASSPHRASE), Wanted("recovery", PASSPHRASE)]
KEY = Key("tablespace.sealed", OURS, (Slot("primary", "1", PASSPHRASE, NOW, NOW), Slot("recovery", "2", PASSPHRASE, NOW, NOW)))
NEW = PlaceFacts("tablespace.sealed", "/srv/tde/sealed")
MADE = dataclasses.replace(
    NEW, exists=True, empty=True, owner=POSTGRES, mode=0o700, policy=OURS, kernel_key="present", made=True, recorded=True
)
WISH = TablespaceWish("sealed", "/srv/tde/sealed")


class Disk:
    """A host with one tablespace to be made."""

    def __init__(self) -> None:
        self.place = NEW
        self.key: Key | None = None
        self.catalog = CatalogFacts()
        self.keys_made = 0

    def plan(self) -> list[Step]:
        return plan.tablespace(WISH, self.seen(), self.key, self.catalog, SLOTS, owner=POSTGRES, no_recovery=False, moves=False)

    def seen(self) -> PlaceFacts:
        """The place as a look finds it: without the key nothing tells whether it is empty."""
        place = self.place
        return dataclasses.replace(place, empty=None) if place.policy and not place.open else place

    def apply(self, step: Step) -> None:
        place = self.place
        if step.action == "create_data_key":
            assert self.key is None
            self.key = KEY
            self.keys_made += 1
        elif step.action == "add_kernel_key":
            assert self.key
            self.place = dataclasses.replace(place, kernel_key="present")
        elif step.action == "make_directory":
            assert not place.exists
            self.place = dataclasses.replace(place, exists=True, empty=True, owner=0, mode=0o700)
        elif step.action == "set_policy":
            assert place.exists
            assert place.empty
            assert place.open
            assert place.owner == 0, "the server's user must not have it before it is encrypted"
            self.place = dataclasses.replace(place, policy=OURS)
        elif step.action == "hand_over":
            assert place.policy == OURS
            self.place = dataclasses.replace(place, owner=POSTGRES, mode=0o700)
        elif step.action == "record_place":
            assert place.policy == OURS
            assert place.owner == POSTGRES
            self.place = dataclasses.replace(place, made=True, recorded=True)
        elif step.action == "create_tablespace":
            assert place.made
            assert place.open
            assert place.owner == POSTGRES
            self.catalog = CatalogFacts(True, place.path, "postgres")
            self.place = dataclasses.replace(place, empty=False, filled=True)
        else:
            raise AssertionError(step.action)

    def reboot(self) -> None:
        if self.place.kernel_key:
            self.place = dataclasses.replace(self.place, kernel_key="absent")


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=5))
def test_a_place_is_made_once_whatever_kills_and_reboots_come_between(history: list[tuple[int, bool]]) -> None:
    disk = Disk()
    for count, reboot in history:
        for step in disk.plan()[:count]:
            disk.apply(step)
        if reboot:
            disk.reboot()
    for step in disk.plan():
        disk.apply(step)
    assert disk.plan() == []
    assert disk.keys_made == 1
    assert disk.catalog.exists
    assert disk.place.policy == OURS


@settings(max_examples=300)
@given(st.integers(0, 9), st.sampled_from(["gone", "bare", "other file system", "link"]))
def test_a_place_that_was_made_and_does_not_show_is_never_made_again(count: int, how: str) -> None:
    disk = Disk()
    for step in disk.plan()[:count]:
        disk.apply(step)
    made = disk.place.made
    # The mount is gone: what lies below it shows.
    hidden = {
        "gone": {"exists": False},
        "bare": {"exists": True, "empty": True, "owner": POSTGRES, "policy": ""},
        "other file system": {"same_file_system": False},
        "link": {"exists": True, "directory": False},
    }[how]
    disk.place = dataclasses.replace(disk.place, **hidden)  # type: ignore[arg-type]
    if made:
        with pytest.raises(TdeError) as caught:
            disk.plan()
        assert caught.value.code == "place_unreachable"
        assert caught.value.cause == "unreachable"


@pytest.mark.parametrize(
    ("place", "key", "code"),
    [
        ({"overlaps": True}, None, "place_inside_data_directory"),
        ({"unsupported": "xfs has no file encryption"}, None, "fscrypt_unsupported"),
        ({"parent": "/srv belongs to user id 101"}, None, "place_parent_unsafe"),
        ({"exists": True, "directory": False}, None, "place_not_directory"),
        ({"exists": True, "empty": False}, None, "place_not_empty"),
        ({"exists": True, "empty": False, "filled": True}, None, "place_plain"),
        ({"exists": True, "policy": "ff" * 16, "kernel_key": "absent"}, None, "place_foreign"),
        ({"exists": True, "policy": "ff" * 16, "kernel_key": "absent"}, KEY, "place_foreign"),
        ({}, dataclasses.replace(KEY, slots=KEY.slots[:1]), "recovery_keyslot_missing"),
        ({**dataclasses.asdict(MADE)}, None, "keystore_unreachable"),
        ({**dataclasses.asdict(MADE), "policy": "ff" * 16}, KEY, "place_foreign"),
    ],
)
def test_what_makes_a_place_impossible_is_said_before_the_first_step(place: dict[str, t.Any], key: Key | None, code: str) -> None:
    with pytest.raises(TdeError) as caught:
        plan.make_place(dataclasses.replace(NEW, **place), key, SLOTS, owner=POSTGRES, no_recovery=False)
    assert caught.value.code == code


def test_a_single_keyslot_is_refused_for_a_new_place_unless_on_purpose() -> None:
    with pytest.raises(TdeError) as caught:
        plan.make_place(NEW, None, SLOTS[:1], owner=POSTGRES, no_recovery=False)
    assert caught.value.code == "recovery_keyslot_missing"
    assert plan.make_place(NEW, None, SLOTS[:1], owner=POSTGRES, no_recovery=True)


@pytest.mark.parametrize(
    ("place", "catalog", "moves", "code"),
    [
        (NEW, CatalogFacts(True, "/elsewhere", "postgres"), False, "tablespace_elsewhere"),
        (NEW, CatalogFacts(taken="other"), False, "tablespace_elsewhere"),
        # In the catalog and not on the disk: dropping or making it anew would lose what is on the disk that is not mounted.
        (NEW, CatalogFacts(True, NEW.path, "postgres"), False, "place_unreachable"),
        (dataclasses.replace(NEW, exists=True, empty=False), CatalogFacts(True, NEW.path, "postgres"), False, "place_plain"),
        (
            dataclasses.replace(MADE, kernel_key="absent", empty=None),
            CatalogFacts(True, NEW.path, "postgres"),
            True,
            "place_closed",
        ),
        (dataclasses.replace(MADE, empty=False), CatalogFacts(), False, "place_not_empty"),
    ],
)
def test_a_tablespace_that_is_not_what_it_should_be_is_refused(
    place: PlaceFacts, catalog: CatalogFacts, moves: bool, code: str
) -> None:
    with pytest.raises(TdeError) as caught:
        plan.tablespace(WISH, place, KEY, catalog, SLOTS, owner=POSTGRES, no_recovery=False, moves=moves)
    assert caught.value.code == code


def test_a_closed_tablespace_needs_no_key_where_nothing_moves() -> None:
    closed = dataclasses.replace(MADE, kernel_key="absent", empty=None)
    wish = dataclasses.replace(WISH, owner="app")
    steps = plan.tablespace(
        wish, closed, KEY, CatalogFacts(True, NEW.path, "postgres"), [], owner=POSTGRES, no_recovery=False, moves=False
    )
    assert [step.action for step in steps] == ["set_tablespace_owner"]


def test_opening_judges_every_place_before_the_first_key() -> None:
    closed = dataclasses.replace(MADE, kernel_key="absent", empty=None)
    lost = dataclasses.replace(closed, key_id="tablespace.lost", path="/srv/tde/lost", exists=False)
    keys = {KEY.key_id: KEY, "tablespace.lost": dataclasses.replace(KEY, key_id="tablespace.lost")}
    assert [step.action for step in plan.open_places([closed], keys)] == ["add_kernel_key"]
    assert plan.open_places([MADE], keys) == []
    with pytest.raises(TdeError) as caught:
        plan.open_places([closed, lost], keys)
    assert caught.value.code == "place_unreachable"


@pytest.mark.parametrize("status", ["present", "incompletely_removed"])
def test_closing_is_refused_under_a_server_and_forced_only_on_purpose(status: str) -> None:
    place = dataclasses.replace(MADE, kernel_key=status)
    with pytest.raises(TdeError) as caught:
        plan.close_places([place], running="the server runs (process 1)", users=[], force=False)
    assert caught.value.code == "server_running"
    with pytest.raises(TdeError) as caught:
        plan.close_places([place], running="", users=["psql (7)"], force=False)
    assert caught.value.code == "place_in_use"
    assert len(plan.close_places([place], running="the server runs", users=["postgres (1)"], force=True)) == 1
    # Nothing to close is no reason to fail.
    assert (
        plan.close_places([dataclasses.replace(MADE, kernel_key="absent")], running="the server runs", users=[], force=False)
        == []
    )


def test_creating_a_cluster_is_repeated_only_where_it_was_begun_and_never_ran() -> None:
    data = dataclasses.replace(MADE, key_id="cluster", path="/srv/tde/data")

    def actions(**facts: t.Any) -> list[str]:
        return [step.action for step in plan.fill_cluster(dataclasses.replace(data, **facts), create=True, how="initdb")]

    assert actions() == ["create_cluster"]
    assert actions(filled=True, empty=False) == []
    assert actions(begun=True, empty=False) == ["clear_place", "create_cluster"]
    assert actions(begun=True, empty=None, kernel_key="absent") == ["add_kernel_key", "clear_place", "create_cluster"]
    assert plan.fill_cluster(data, create=False, how="initdb") == []
