# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which relations move: several wishes at once settle, whatever the catalog, and never pull at one table."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.engines.base import MoveWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import move
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql.move import Catalog, DatabaseState, Relation
from hypothesis import given, settings
from hypothesis import strategies as st

SCHEMAS = ("app", "log", "hr")
TARGETS = ("one", "two")


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    relations: list[Relation] = []
    partitions, feeds = [], []
    spaces = st.sampled_from(["pg_default", "old", *TARGETS])
    for oid in range(1, draw(st.integers(1, 12)) + 1):
        kind = draw(st.sampled_from(["r", "r", "p", "m"]))
        relations.append(Relation(oid, draw(st.sampled_from(SCHEMAS)), f"t{oid}", kind, draw(spaces)))
        parents = [one.oid for one in relations[:-1] if one.kind == "p"]
        if kind in ("r", "p") and parents and draw(st.booleans()):
            partitions.append((oid, draw(st.sampled_from(parents))))
        if kind == "m" and len(relations) > 1:
            feeds.append((draw(st.integers(1, oid - 1)), oid))
        if draw(st.booleans()):
            relations.append(Relation(100 + oid, relations[-1].schema, f"i{oid}", "I" if kind == "p" else "i", draw(spaces), oid))
    large = Relation(999, "pg_catalog", "pg_largeobject", "r", draw(spaces))
    return Catalog("shop", (*relations, large), SCHEMAS, tuple(partitions), tuple(feeds))


@st.composite
def wishes(draw: st.DrawFn, catalog: Catalog) -> list[MoveWish]:
    """Two wishes that name nothing twice, as the module demands."""
    names = [one.label for one in catalog.relations if one.kind in "rpm" and one.schema != "pg_catalog"]
    tables = draw(st.lists(st.sampled_from(names), unique=True, max_size=4))
    schemas = draw(st.lists(st.sampled_from(SCHEMAS), unique=True))
    cut, cut_schemas = draw(st.integers(0, len(tables))), draw(st.integers(0, len(schemas)))
    whole = draw(st.sampled_from([None, 0, 1]))
    return [
        MoveWish(tuple(tables[:cut]), tuple(schemas[:cut_schemas]), ("shop",) if whole == 0 else (), "shop"),
        MoveWish(tuple(tables[cut:]), tuple(schemas[cut_schemas:]), ("shop",) if whole == 1 else (), "shop"),
    ]


class World:
    """A database that moves are carried out in."""

    def __init__(self, catalog: Catalog, connections: int) -> None:
        self.catalog = catalog
        self.state = DatabaseState("pg_default", "", connections)

    def decide(self, wishes_: t.Sequence[MoveWish]) -> list[move.Moves]:
        return [
            move.decide(self.catalog, self.state, target, wish, others=[wishes_[1 - number]], encrypted=TARGETS)
            for number, (target, wish) in enumerate(zip(TARGETS, wishes_, strict=True))
        ]

    def apply(self, moves: move.Moves, target: str, stop: int) -> None:
        here = {one.oid for one in moves.relations[:stop]}
        if moves.whole and stop:
            here |= {one.oid for one in self.catalog.relations if one.tablespace == self.state.tablespace}
            self.state = dataclasses.replace(self.state, tablespace=target)
        if moves.large_objects and stop > len(moves.relations):
            here.add(999)
        if moves.default and stop > len(moves.relations):
            self.state = dataclasses.replace(self.state, default_setting=target)
        relations = tuple(
            dataclasses.replace(one, tablespace=target) if one.oid in here else one for one in self.catalog.relations
        )
        self.catalog = dataclasses.replace(self.catalog, relations=relations)


@settings(max_examples=300)
@given(st.data(), st.integers(0, 1), st.lists(st.integers(0, 30), max_size=4))
def test_two_wishes_settle_and_stay_settled(data: st.DataObject, connections: int, kills: list[int]) -> None:
    catalog = data.draw(catalogs())
    pair = data.draw(wishes(catalog))
    world = World(catalog, connections)
    for stop in [*kills, 1000, 1000, 1000]:
        # As the engine does: both decided on one catalog, then carried out in turn.
        for moves, target in zip(world.decide(pair), TARGETS, strict=True):
            world.apply(moves, target, stop)
    assert not any(moves.any for moves in world.decide(pair))
    by_label = {one.label: one for one in world.catalog.relations}
    for wish, target in zip(pair, TARGETS, strict=True):
        assert all(by_label[name].tablespace == target for name in wish.tables)
        if wish.databases:
            left = [one for one in world.catalog.relations if one.tablespace not in TARGETS and one.oid != 999]
            assert left == []
            assert target in (world.state.tablespace, world.state.default_setting)
    # An index lies where its table lies, if that moved by name.
    for one in world.catalog.relations:
        for wish, target in zip(pair, TARGETS, strict=True):
            if one.table and any(by_label[name].oid == one.table for name in wish.tables):
                assert one.tablespace == target


def test_what_future_partitions_inherit_from_moves_first() -> None:
    parent = Relation(1, "app", "part", "p", "pg_default")
    child = Relation(2, "log", "part_1", "r", "pg_default")
    indexes = (Relation(3, "app", "pk", "I", "pg_default", 1), Relation(4, "log", "pk_1", "i", "pg_default", 2))
    catalog = Catalog("shop", (indexes[1], child, indexes[0], parent), SCHEMAS, ((2, 1),))
    moves = move.decide(catalog, DatabaseState("pg_default", "", 0), "one", MoveWish(tables=("app.part",), database="shop"))
    assert [one.name for one in moves.relations] == ["part", "pk", "part_1", "pk_1"]


def test_a_wish_for_another_database_means_nothing_here() -> None:
    catalog = Catalog("shop", (Relation(1, "app", "t", "r", "pg_default"),), SCHEMAS)
    wish = MoveWish(tables=("app.nosuch",), schemas=("nosuch",), databases=("crm",), database="crm")
    assert not move.decide(catalog, DatabaseState("pg_default", "", 0), "one", wish).any
