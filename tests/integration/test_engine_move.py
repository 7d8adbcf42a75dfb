# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Moving every kind of relation, on a real server."""

from __future__ import annotations

import os
import shutil
import threading
import time
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection, MoveWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import move, sql
from ansible_collections.hsm.tde.tests.integration import postgres

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not postgres.programs(), reason="needs root and PostgreSQL"),
]

OBJECTS = """
CREATE SCHEMA app; CREATE SCHEMA other;
CREATE TABLE app.plain (id int PRIMARY KEY, body text, UNIQUE (body));
INSERT INTO app.plain SELECT g, repeat(md5(g::text), 200) FROM generate_series(1, 50) g;
CREATE INDEX "odd ""name" ON app.plain (lower(body) text_pattern_ops) WHERE id > 10;
CREATE TABLE app."Mixed Case" (id int);
CREATE TABLE app.part (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE app.part_1 PARTITION OF app.part FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE other.part_2 PARTITION OF app.part FOR VALUES FROM ('2026-02-01') TO ('2026-03-01') PARTITION BY LIST (id);
CREATE TABLE other.part_2_x PARTITION OF other.part_2 DEFAULT;
INSERT INTO app.part SELECT g, '2026-01-15'::date + g FROM generate_series(1, 40) g;
CREATE VIEW app.seen AS SELECT id, body FROM app.plain;
CREATE MATERIALIZED VIEW other.summary AS SELECT count(*) FROM app.seen;
CREATE UNLOGGED TABLE app.scratch AS SELECT g FROM generate_series(1, 10) g;
CREATE TABLE other.stays (id int PRIMARY KEY);
"""


@pytest.fixture(scope="module")
def server() -> t.Iterator[postgres.Server]:
    with postgres.folder() as home, postgres.server(home) as made:
        for name in ("vault", "second"):
            (home / name).mkdir()
            shutil.chown(home / name, "postgres", "postgres")
            made.psql(f"CREATE TABLESPACE {name} LOCATION '{home / name}'")
        yield made


@pytest.fixture
def database(server: postgres.Server) -> t.Iterator[str]:
    server.psql("CREATE DATABASE shop")
    server.psql(OBJECTS, "shop")
    yield "shop"
    server.psql("DROP DATABASE IF EXISTS shop WITH (FORCE)")


def access(server: postgres.Server) -> sql.Access:
    return sql.access(Connection(unix_socket=str(server.socket)), "postgres")


def catalog_of(server: postgres.Server, name: str) -> move.Catalog:
    with sql.connect(access(server), name) as connection:
        return move.read_catalog(connection)


def state_of(server: postgres.Server, name: str) -> move.DatabaseState:
    with sql.connect(access(server)) as connection:
        found = sql.inspect(connection).database(name)
    assert found
    return move.DatabaseState(found.tablespace, found.default_setting, found.connections)


def decide(server: postgres.Server, wish: MoveWish, target: str = "vault", **more: t.Any) -> move.Moves:
    return move.decide(catalog_of(server, "shop"), state_of(server, "shop"), target, wish, **more)


def carry_out(server: postgres.Server, moves: move.Moves, target: str = "vault", seconds: float = 5) -> move.Mover:
    with move.Mover(access(server), seconds) as mover:
        apply(mover, moves, target)
    return mover


def apply(mover: move.Mover, moves: move.Moves, target: str) -> None:
    for relation in moves.relations:
        mover.move_relation(moves.database, relation, target)
    if moves.large_objects:
        mover.move_large_objects(moves.database, target)
    if moves.default:
        mover.set_default(moves.database, target)


def outside(server: postgres.Server, target: str = "vault") -> set[str]:
    return {one.label for one in catalog_of(server, "shop").relations if one.tablespace != target and one.schema != "pg_catalog"}


def content(server: postgres.Server) -> str:
    return server.psql(
        "SELECT md5(string_agg(p::text, '' ORDER BY id)) FROM app.plain p; SELECT md5(string_agg(p::text, '' ORDER BY id)) FROM app.part p;"
        "SELECT * FROM other.summary; SELECT count(*) FROM app.scratch",
        "shop",
    )


def test_a_schema_takes_indexes_partitions_toast_and_dependent_views_along(server: postgres.Server, database: str) -> None:
    before = content(server)
    moves = decide(server, MoveWish(schemas=("app",), database=database))
    mover = carry_out(server, moves)
    assert outside(server) == {"other.stays", "other.stays_pkey"}
    assert content(server) == before
    toast = server.psql("SELECT t.spcname FROM pg_class c JOIN pg_class o ON o.oid = c.reltoastrelid JOIN pg_tablespace t"
                        " ON t.oid = o.reltablespace WHERE c.relname = 'plain'", database)  # fmt: skip
    assert toast == "vault"
    assert {row["object"] for row in mover.progress.rows} >= {
        'app.odd "name',
        "app.Mixed Case",
        "other.part_2_x",
        "other.summary",
    }
    assert all(row["attempts"] == 1 for row in mover.progress.rows)
    # The second look finds nothing to do, and a partition of the future lands in the tablespace.
    assert not decide(server, MoveWish(schemas=("app",), database=database)).any
    server.psql("CREATE TABLE app.part_3 PARTITION OF app.part FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')", database)
    assert outside(server) == {"other.stays", "other.stays_pkey"}


def test_a_named_table_moves_alone_with_what_belongs_to_it(server: postgres.Server, database: str) -> None:
    carry_out(server, decide(server, MoveWish(tables=("app.plain",), database=database)))
    assert {one.label for one in catalog_of(server, database).relations if one.tablespace == "vault"} == {
        "app.plain", "app.plain_pkey", "app.plain_body_key", 'app.odd "name', "other.summary",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        (MoveWish(tables=("app.plain", "app.nosuch"), database="shop"), "relation_absent"),
        (MoveWish(schemas=("app", "nosuch"), database="shop"), "schema_absent"),
    ],
)
def test_a_misspelt_name_stops_before_anything_moves(server: postgres.Server, database: str, wish: MoveWish, code: str) -> None:
    with pytest.raises(TdeError) as caught:
        decide(server, wish)
    assert caught.value.code == code


def test_a_database_without_connections_moves_whole(server: postgres.Server, database: str) -> None:
    server.psql("ALTER TABLE other.stays SET TABLESPACE second", database)
    before = content(server)
    moves = decide(server, MoveWish(databases=(database,)))
    assert moves.whole
    assert [one.label for one in moves.relations] == ["other.stays"]
    with move.Mover(access(server), 5) as mover:
        assert mover.move_database(database, "vault", "pg_default")
        apply(mover, moves, "vault")
    assert outside(server) == set()
    assert content(server) == before
    assert not decide(server, MoveWish(databases=(database,))).any


def test_a_database_in_use_moves_relation_by_relation_with_its_large_objects(server: postgres.Server, database: str) -> None:
    server.psql("SELECT lo_from_bytea(4711, decode(repeat('ab', 5000), 'hex'))", database)
    before = content(server)
    session = server.popen("psql", "-X", "-d", database, "-c", "SELECT pg_sleep(60)")
    try:
        deadline = time.monotonic() + 10
        while not state_of(server, database).connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        moves = decide(server, MoveWish(databases=(database,)))
        assert not moves.whole
        assert moves.large_objects
        assert moves.default
        carry_out(server, moves)
        # A connection that came after the decision is no failure either.
        assert not move.Mover(access(server), 1).move_database(database, "second", "pg_default")
        assert not decide(server, MoveWish(databases=(database,))).any
    finally:
        session.kill()
        session.wait()
    assert outside(server) == set()
    assert content(server) == before
    assert server.psql("SELECT md5(lo_get(4711)) = md5(decode(repeat('ab', 5000), 'hex'))", database) == "t"
    assert {one.tablespace for one in catalog_of(server, database).relations if one.schema == "pg_catalog"} == {"vault"}
    # What comes later goes there by default.
    server.psql("CREATE TABLE app.later (id int PRIMARY KEY)", database)
    assert outside(server) == set()


def test_a_database_leaves_alone_what_is_encrypted_elsewhere_or_named_for_elsewhere(
    server: postgres.Server, database: str
) -> None:
    carry_out(server, decide(server, MoveWish(tables=("other.stays",), database=database), "second"), "second")
    other = MoveWish(tables=("app.Mixed Case",), database=database)
    moves = decide(server, MoveWish(databases=(database,)), others=(other,), encrypted=("vault", "second"))
    labels = {one.label for one in moves.relations}
    assert not labels & {"other.stays", "other.stays_pkey", "app.Mixed Case"}
    # By name it moves from one encrypted tablespace to the other.
    assert decide(server, MoveWish(tables=("other.stays",), database=database), encrypted=("vault", "second")).relations


def test_a_locked_table_is_tried_again_and_given_up_with_what_was_done(server: postgres.Server, database: str) -> None:
    holder = server.popen("psql", "-X", "-d", database, "-c", "BEGIN; LOCK app.plain IN SHARE MODE; SELECT pg_sleep(60)")
    try:
        deadline = time.monotonic() + 10
        while (
            server.psql("SELECT count(*) FROM pg_locks WHERE relation = 'app.plain'::regclass AND mode = 'ShareLock'", database)
            == "0"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pauses: list[float] = []
        moves = decide(server, MoveWish(tables=("app.Mixed Case", "app.plain"), database=database))
        with pytest.raises(TdeError) as caught, move.Mover(access(server), 0.05, pauses.append) as mover:
            apply(mover, moves, "vault")
        assert caught.value.code == "move_blocked"
        assert [row["object"] for row in caught.value.details["moved"]] == ["app.Mixed Case"]
        assert len(pauses) == move.ATTEMPTS - 1
        assert max(pauses) <= move.PAUSE_SECONDS
        # Freed while it waits, it moves on, and what had moved does not move again.
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK%'"
        threading.Timer(0.5, server.psql, (end,)).start()
        mover = carry_out(
            server, decide(server, MoveWish(tables=("app.Mixed Case", "app.plain"), database=database)), seconds=0.2
        )
        assert mover.progress.rows[0]["object"] == "app.plain"
        assert mover.progress.rows[0]["attempts"] > 1
    finally:
        holder.kill()
        holder.wait()


def test_a_database_without_an_encoding_moves_too(server: postgres.Server) -> None:
    server.psql("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII'")
    server.psql('CREATE TABLE "t\u00e9" AS SELECT 1', "ascii")
    catalog = catalog_of(server, "ascii")
    assert "public.t\u00e9" in {one.label for one in catalog.relations}
    wish = MoveWish(schemas=("public",), database="ascii")
    carry_out(server, move.decide(catalog, state_of(server, "ascii"), "vault", wish))
    assert not move.decide(catalog_of(server, "ascii"), state_of(server, "ascii"), "vault", wish).any


def test_nothing_fails_for_users_while_their_tables_move(server: postgres.Server, database: str) -> None:
    setup = server.popen("pgbench", "-i", "-q", "-s", "1", database)
    assert setup.wait(60) == 0
    server.psql("CREATE SCHEMA bench; ALTER TABLE pgbench_accounts SET SCHEMA bench; ALTER TABLE pgbench_branches SET SCHEMA bench;"
                "ALTER TABLE pgbench_tellers SET SCHEMA bench; ALTER TABLE pgbench_history SET SCHEMA bench;"
                "ALTER DATABASE shop SET search_path = bench", database)  # fmt: skip
    load = server.popen("pgbench", "-n", "-c", "4", "-T", "6", database)
    time.sleep(1)
    for target in ("vault", "second", "vault"):
        carry_out(server, decide(server, MoveWish(schemas=("bench",), database=database), target), target)
    output = load.communicate(timeout=60)[0]
    done, failed = postgres.pgbench_failures(output)
    assert load.returncode == 0, output
    assert done > 100
    assert failed == 0
    assert {one.tablespace for one in catalog_of(server, database).relations if one.schema == "bench"} == {"vault"}
