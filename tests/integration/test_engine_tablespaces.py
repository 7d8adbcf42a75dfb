# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Encrypted tablespaces on a server that runs: made, filled, killed at any moment; and what is refused."""

from __future__ import annotations

import os
import shutil
import time
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt
from ansible_collections.hsm.tde.tests.integration import estate as estates
from ansible_collections.hsm.tde.tests.integration import postgres
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS, Estate, estate, moments, usable

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

MARKER = "hsmtde-marker-0815"
PLAIN = "hsmtde-in-the-clear-0815"


@pytest.fixture(scope="module")
def host() -> t.Iterator[Estate]:
    """A plain cluster with data, its server running, and a keystore without data keys."""
    with estate() as made:
        made.server.initdb()
        made.server.start()
        made.server.psql("CREATE DATABASE shop; CREATE ROLE app")
        made.server.psql(
            "CREATE SCHEMA app; CREATE TABLE app.orders (id int PRIMARY KEY, body text);"
            f"INSERT INTO app.orders SELECT g, '{MARKER} ' || g FROM generate_series(1, 1000) g; CREATE INDEX ON app.orders (body)",
            "shop",
        )
        made.refused("tde_tablespace", "cluster_unknown", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)
        result = made.run("tde_keystore", keyslots=SLOTS)
        assert result["data_keys"] == {}
        assert result["master_keys"] == ["hsm-tde.main in token demo"]
        yield made


def where(host: Estate, name: str = "orders") -> str:
    return host.server.psql(f"SELECT coalesce(spcname, 'default') FROM pg_class LEFT JOIN pg_tablespace t ON t.oid = reltablespace"
                            f" WHERE relname = '{name}'", "shop")  # fmt: skip


def test_the_first_look_at_an_estate_that_is_not_ours(host: Estate) -> None:
    info = host.run(
        "tde_info", cluster="never", state_directory=str(host.home / "nostate"), library=None, token_label=None, pin=None
    )
    assert not info["managed"]
    assert not info["encrypted"]
    assert info["server"]["answers"]
    assert info["data_directory"]["encryption"] == "plain"
    assert {one["name"]: one["encryption"] for one in info["tablespaces"]} == {"pg_default": "plain", "pg_global": "plain"}
    assert any(gap.startswith("The data directory") and gap.endswith("is in the clear.") for gap in info["gaps"])
    assert not (host.home / "nostate").exists()


def test_a_tablespace_is_made_filled_and_left_alone(host: Estate) -> None:
    wish = [{"name": "sealed", "owner": "app", "move": {"database": "shop", "schemas": ["app"]}}, {"name": "archive"}]
    host.refused("tde_tablespace", "recovery_keyslot_missing", tablespaces=wish, keyslots=SLOTS[:1])
    planned = host.run("tde_tablespace", check=True, tablespaces=wish, keyslots=SLOTS)
    assert host.keys() == []
    result = host.run_file("tde_tablespace", tablespaces=wish, keyslots=SLOTS)
    assert [step["action"] for step in result["plan"]] == [step["action"] for step in planned["plan"]]
    assert {row["object"] for row in result["moved"]} == {"app.orders", "app.orders_pkey", "app.orders_body_idx"}
    assert any("freed" in note or "before keep their plain text" in note for note in result["notes"])
    assert PASSPHRASE not in str(result)
    assert where(host) == "sealed"
    place = host.mount / "sealed"
    assert (place.owner(), place.stat().st_mode & 0o777) == ("postgres", 0o700)
    policy = fscrypt.policy(str(place))
    assert policy
    assert policy["identifier"] == result["tablespaces"][0]["check_value"]
    assert host.server.psql("SELECT pg_get_userbyid(spcowner) FROM pg_tablespace WHERE spcname = 'sealed'") == "app"
    again = host.run("tde_tablespace", tablespaces=wish, keyslots=SLOTS)
    assert not again["changed"]
    # A database administrator without any secret changes nothing and moves what is new.
    no_secret = {"pin": None, "library": None, "token_label": None}
    assert not host.run("tde_tablespace", tablespaces=wish, **no_secret)["changed"]
    host.server.psql("CREATE TABLE app.later AS SELECT 1 AS x", "shop")
    assert [row["object"] for row in host.run("tde_tablespace", tablespaces=wish, **no_secret)["moved"]] == ["app.later"]
    host.run("tde_tablespace", tablespaces=[{**wish[0], "owner": "postgres"}], **no_secret)
    info = host.run("tde_info", **no_secret)
    assert {one["name"]: one["encryption"] for one in info["tablespaces"]}["sealed"] == "ours"
    assert any("write-ahead log is in the clear" in gap for gap in info["gaps"])
    assert any("is software" in gap for gap in info["gaps"])


def test_the_raw_image_holds_none_of_it(host: Estate) -> None:
    host.server.psql("CHECKPOINT")
    assert host.raw("hsm.tde: this file is in the clear on purpose") == 1
    assert host.raw(MARKER) == 0
    plain = host.mount / "plain"
    plain.mkdir()
    shutil.chown(plain, "postgres", "postgres")
    host.server.psql(f"CREATE TABLESPACE plain LOCATION '{plain}'")
    host.server.psql(
        f"CREATE TABLE app.open TABLESPACE plain AS SELECT '{PLAIN} ' || g FROM generate_series(1, 50) g; CHECKPOINT", "shop"
    )
    assert host.raw(PLAIN) == 50
    assert host.raw(MARKER) == 0
    # A tablespace that is in use in the clear is never taken for encrypted, nor encrypted in place.
    host.refused("tde_tablespace", "place_plain", tablespaces=[{"name": "plain"}], keyslots=SLOTS)
    host.refused(
        "tde_tablespace", "place_plain", tablespaces=[{"name": "plain", "location": str(plain)}], keyslots=SLOTS, check=True
    )
    info = host.run("tde_info")
    assert {one["name"]: one["encryption"] for one in info["tablespaces"]}["plain"] == "plain"
    host.server.psql("DROP TABLE app.open", "shop")
    host.server.psql("DROP TABLESPACE plain")
    plain.rmdir()


def test_a_new_key_gets_the_keyslots_of_its_siblings_and_their_passphrase(host: Estate) -> None:
    host.refused("tde_tablespace", "credential_missing", tablespaces=[{"name": "third"}])
    host.refused("tde_tablespace", "passphrase_refused", tablespaces=[{"name": "third"}], passphrase="mistyped horse battery")
    host.run("tde_tablespace", tablespaces=[{"name": "third"}], passphrase=PASSPHRASE)
    slots = {key["key_id"]: sorted(slot["name"] for slot in key["keyslots"]) for key in host.run("tde_info")["data_keys"]}
    assert slots["tablespace.third"] == slots["tablespace.sealed"] == ["primary", "recovery"]


@pytest.fixture
def folders(host: Estate) -> t.Iterator[t.Callable[..., str]]:
    """Makes directories in the mount, and takes them away."""
    made = []

    def make(name: str, owner: str = "root", mode: int = 0o755) -> str:
        path = host.mount / name
        path.mkdir(mode=mode)
        path.chmod(mode)
        shutil.chown(path, owner, owner)
        made.append(path)
        return str(path)

    yield make
    for path in reversed(made):
        shutil.rmtree(path, ignore_errors=True)


def test_what_cannot_be_a_place_is_refused(host: Estate, folders: t.Callable[..., str]) -> None:
    def refuse(code: str, location: str, **more: t.Any) -> None:
        wish = [{"name": "bad", "location": location}]
        host.refused("tde_tablespace", code, tablespaces=wish, keyslots=SLOTS, **more)
        assert host.server.psql("SELECT count(*) FROM pg_tablespace WHERE spcname = 'bad'") == "0"

    # The file system below the mount has no such feature in these tests; the image has it.
    refuse("fscrypt_unsupported", "/dev/shm/bad")
    refuse("place_inside_data_directory", str(host.server.data / "bad"))
    refuse("place_inside_data_directory", str(host.home))
    refuse("invalid_option", "relative/path")
    folders("full")
    (host.mount / "full/file").write_text("in the clear")
    refuse("place_not_empty", str(host.mount / "full"))
    folders("theirs", owner="postgres")
    refuse("place_parent_unsafe", str(host.mount / "theirs/bad"))
    folders("everybodys", mode=0o1777)
    refuse("place_parent_unsafe", str(host.mount / "everybodys/bad"))
    os.symlink("full", host.mount / "link")
    try:
        refuse("place_not_directory", str(host.mount / "link"))
    finally:
        (host.mount / "link").unlink()
    (host.mount / "file").write_text("")
    refuse("place_not_directory", str(host.mount / "file"))
    (host.mount / "file").unlink()
    refuse("tablespace_elsewhere", str(host.mount / "sealed"))
    host.refused(
        "tde_tablespace", "tablespace_elsewhere", tablespaces=[{"name": "sealed", "location": str(host.mount / "other")}]
    )
    # A directory under a key of elsewhere.
    folders("foreign")
    key = os.urandom(64)
    fscrypt.add_key(str(host.mount), key)
    fscrypt.set_policy(str(host.mount / "foreign"), fscrypt.identifier(key))
    refuse("place_foreign", str(host.mount / "foreign"))
    fscrypt.remove_key(str(host.mount), fscrypt.identifier(key))
    refuse("place_foreign", str(host.mount / "foreign"))


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ([{"name": "pg_mine"}], "tablespace_name_reserved"),
        ([{"name": "no/slash"}], "invalid_option"),
        ([{"name": "x" * 53}], "invalid_option"),
        ([{"name": "a"}, {"name": "a"}], "invalid_option"),
        ([{"name": "a", "move": {"schemas": ["app"], "database": "shop"}}, {"name": "b", "move": {"schemas": ["app"], "database": "shop"}}],
         "invalid_option"),
        ([{"name": "sealed", "move": {"tables": ["app.nosuch"], "database": "shop"}}], "relation_absent"),
        ([{"name": "sealed", "move": {"schemas": ["nosuch"], "database": "shop"}}], "schema_absent"),
        ([{"name": "sealed", "move": {"databases": ["nosuch"]}}], "database_absent"),
        ([{"name": "sealed", "move": {"databases": ["template0"]}}], "database_absent"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_met_is_refused_whole(host: Estate, wish: list[dict[str, t.Any]], code: str) -> None:
    host.refused("tde_tablespace", code, tablespaces=[*wish, {"name": "fine"}], keyslots=SLOTS)


def test_a_server_that_is_down_not_ours_or_not_willing(host: Estate) -> None:
    wish = [{"name": "fourth"}]
    host.refused("tde_tablespace", "server_down", tablespaces=wish, keyslots=SLOTS, login_unix_socket=str(host.home))
    host.refused("tde_tablespace", "server_refused", tablespaces=wish, keyslots=SLOTS, login_user="nobody")
    host.refused("tde_tablespace", "server_refused", tablespaces=wish, keyslots=SLOTS, login_db="nosuch")
    host.server.psql("ALTER ROLE app LOGIN; ALTER SYSTEM SET listen_addresses = ''")
    hba = host.server.data / "pg_hba.conf"
    content = hba.read_text()
    hba.write_text("local all all trust\n")
    host.server.psql("SELECT pg_reload_conf()")
    try:
        host.refused("tde_tablespace", "server_privilege_missing", tablespaces=wish, keyslots=SLOTS, login_user="app")
    finally:
        hba.write_text(content)
        host.server.psql("SELECT pg_reload_conf()")


def test_a_standby_is_refused(host: Estate) -> None:
    home = host.home / "standby"
    home.mkdir()
    standby = postgres.Server(home)
    (home / "data").mkdir()
    shutil.chown(home / "data", "postgres", "postgres")
    os.chmod(home / "data", 0o700)
    mapping = [f"--tablespace-mapping={host.mount / name}={home / name}" for name in ("sealed", "archive", "third")]
    done = host.server.popen("pg_basebackup", "-D", str(home / "data"), "-R", "-c", "fast", *mapping)
    for name in ("sealed", "archive", "third"):
        (home / name).mkdir()
        shutil.chown(home / name, "postgres", "postgres")
    output = done.communicate(timeout=60)[0]
    assert done.returncode == 0, output
    standby.start()
    try:
        more = {"login_unix_socket": str(standby.socket)}
        fourth = [{"name": "fourth"}]
        # The same system and the same catalogs, but not the server whose files the record names.
        host.refused("tde_tablespace", "server_foreign", tablespaces=fourth, keyslots=SLOTS, **more)
        more["postgresql"] = {**host.options, "data_directory": str(standby.data)}
        host.refused("tde_tablespace", "server_is_standby", tablespaces=fourth, keyslots=SLOTS, **more)
        deadline = time.monotonic() + 10
        while host.run("tde_info")["server"]["standbys_attached"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        planned = host.run("tde_tablespace", check=True, tablespaces=[{"name": "fourth"}], keyslots=SLOTS)
        assert any("standby" in warning for warning in planned["warnings"])
    finally:
        standby.stop()


def test_a_mount_that_is_gone_is_unreachable_and_a_crashed_server_writes_no_plain_text(host: Estate) -> None:
    host.server.psql(f"INSERT INTO app.orders SELECT g, '{MARKER}' FROM generate_series(2001, 2010) g", "shop")
    host.server.kill()
    host.unmount()
    assert host.server.start(check=False).returncode != 0
    assert list(host.mount.iterdir()) == []
    host.refused("tde_tablespace", "server_down", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)
    with host.token_moved_away():
        host.refused("tde_keystore", "token_unreachable", state="open")
        host.refused("tde_keystore", "token_unreachable", keyslots=SLOTS)
    # Mounted, and its keys absent: still nothing in plain text, and the server still does not start.
    host.run("tde_keystore", state="open")
    host.run("tde_keystore", state="closed")
    assert host.server.start(check=False).returncode != 0
    assert host.raw(MARKER) == 0
    host.run("tde_keystore", state="open")
    host.server.start()
    assert host.server.psql("SELECT count(*) FROM app.orders", "shop") == "1010"


def test_a_clean_server_started_without_its_keys_is_told_as_closed_and_healed_by_opening(host: Estate) -> None:
    host.server.stop()
    host.run("tde_keystore", state="closed")
    host.server.start()
    move = [{"name": "sealed", "move": {"database": "shop", "schemas": ["app"]}}]
    host.server.psql("CREATE TABLE app.newest AS SELECT 1 AS x", "shop")
    host.refused("tde_tablespace", "place_closed", tablespaces=move, keyslots=SLOTS)
    assert not host.run("tde_tablespace", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)["changed"]
    assert any("is closed" in gap for gap in host.run("tde_info")["gaps"])
    host.run("tde_keystore", state="open")
    assert host.server.psql("SELECT count(*) FROM app.orders", "shop") == "1010"
    assert host.run("tde_tablespace", tablespaces=move, keyslots=SLOTS)["changed"]


def test_a_forced_close_under_a_running_server_is_healed_by_opening(host: Estate) -> None:
    host.refused("tde_keystore", "server_running", state="closed")
    host.server.psql("CHECKPOINT")
    # The server's processes may keep files of it open; then the kernel says so, and the keys are gone all the same.
    answer = estates.answer("tde_keystore", host.arguments(state="closed", force=True), False)
    assert answer.get("error_code", "place_in_use") == "place_in_use", answer
    assert host.run("tde_keystore", state="open")["changed"]
    assert host.server.psql("SELECT count(*) FROM app.orders", "shop") == "1010"


def test_killed_at_any_moment_the_second_run_makes_one_place_under_one_key(host: Estate) -> None:
    host.server.psql("CREATE DATABASE crm")
    began = time.monotonic()
    host.run("tde_tablespace", tablespaces=[{"name": "timed"}], keyslots=SLOTS)
    longest = time.monotonic() - began
    for number, moment in enumerate(moments(6, longest)):
        host.server.psql(
            f"CREATE TABLE m{number} AS SELECT g FROM generate_series(1, 100) g; CREATE INDEX ON m{number} (g)", "crm"
        )
        wish = [{"name": f"k{number}", "move": {"database": "crm", "tables": [f"public.m{number}"]}}]
        host.killed("tde_tablespace", moment, tablespaces=wish, keyslots=SLOTS)
        host.run("tde_tablespace", tablespaces=wish, keyslots=SLOTS)
        assert not host.run("tde_tablespace", tablespaces=wish, keyslots=SLOTS)["changed"]
        made = [
            entry
            for entry in host.journal()
            if entry["action"] == "create_data_key" and entry["key_id"] == f"tablespace.k{number}"
        ]
        assert len({entry["kcv"] for entry in made if entry["result"] == "done"}) == 1
        policy = fscrypt.policy(str(host.mount / f"k{number}"))
        assert policy
        assert policy["identifier"] == made[-1]["kcv"]
        assert host.server.psql(f"SELECT count(*) FROM m{number}", "crm") == "100"
    assert len(host.in_token("hsm-tde.main")) == 1
    left = [path for path in host.state.rglob("*") if path.name.endswith(".tmp") or ".candidate" in path.name]
    assert left == []


def test_rotation_re_wraps_every_key_online_and_a_killed_one_is_finished(host: Estate) -> None:
    count = len(host.keys())
    assert count > 8
    host.killed("tde_master_key", 0.3, state="rotated", tag="2")
    result = host.run("tde_master_key", state="rotated", tag="2")
    assert {slots["keyslots"]["primary"] for slots in result["data_keys"].values()} == {"hsm-tde.main.2 in token demo"}
    assert not host.run("tde_master_key", state="rotated", tag="2")["changed"]
    assert len(result["data_keys"]) == count
    assert host.server.psql("SELECT count(*) FROM app.orders", "shop") == "1010"
    second = {"name": "primary", "token_label": "second", "pin": host.hsm.pin}
    result = host.run("tde_keystore", keyslots=[second, RECOVERY])
    assert {slots["keyslots"]["primary"] for slots in result["data_keys"].values()} == {"hsm-tde.main.2 in token second"}
    assert len(host.in_token("hsm-tde.main.2", second=True)) == 1
