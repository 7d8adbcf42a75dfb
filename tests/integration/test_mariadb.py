# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine mariadb on real servers, from data in the clear to a replica with keys of its own. The tests build on each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import PassphraseCredential, TokenCredential
from ansible_collections.hsm.tde.tests.integration import killing, mariadb
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, SLOTS
from ansible_collections.hsm.tde.tests.integration.mariadb import MARKER, Host

pytestmark = [pytest.mark.root, pytest.mark.skipif(not mariadb.usable(), reason="needs root, MariaDB's server and SoftHSM")]

RAW = MARKER.encode()
#: Everything of shop under the default key, one table under a key of its own.
TABLESPACES = [
    {"name": "default", "move": {"databases": ["shop"]}},
    {"name": "sealed", "move": {"tables": ["other.secret"]}},
]
QUERY = "SELECT COUNT(*), MD5(GROUP_CONCAT(MD5(body) ORDER BY id)) FROM shop.parts; SELECT * FROM other.secret; SELECT COUNT(*) > 4999 FROM shop.orders"


@pytest.fixture(scope="module")
def home() -> t.Iterator[Path]:
    """A folder of the tests' own."""
    mariadb.preload()
    with mariadb.folder() as path:
        yield path


@pytest.fixture(scope="module")
def host(home: Path) -> t.Iterator[Host]:
    """A server with data in the clear."""
    with mariadb.host(home / "one") as made:
        mariadb.fill(made.server)
        yield made


@pytest.fixture(scope="module")
def rows(host: Host) -> str:
    """What must be read at any time."""
    return host.server.sql(QUERY)


def verdicts(host: Host, **what: t.Any) -> dict[str, str]:
    """The verdict on each place."""
    return {proof["place"]: proof["verdict"] for proof in host.run("tde_proof", **what)["proofs"]}


def temporary(host: Host) -> bool:
    """Whether the marker stands in temporary files: of a table and of a transaction too large for its cache."""
    import pymysql

    connection = pymysql.connect(unix_socket=str(host.server.socket), user="root", database="shop")
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE kept ENGINE = Aria ROW_FORMAT = PAGE AS SELECT * FROM orders")
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO other.secret SELECT id + 10, body FROM orders LIMIT 3000")
        names = host.server.files(RAW)
        found = any(name.startswith("tmp/") for name in names)
        pid = (host.server.run / "pid").read_text().strip()
        for entry in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{entry}"
            if "deleted" in os.readlink(link) and str(host.server.home) in os.readlink(link):
                found = RAW in Path(link).read_bytes() or found
        connection.rollback()
    return found


def test_before(host: Host, rows: str) -> None:
    """The controls: without encryption each of these looks finds the marker."""
    host.server.sql("FLUSH TABLES shop.orders FOR EXPORT; UNLOCK TABLES")
    found = host.server.files(RAW)
    assert {"data/bin.000001", "data/ib_logfile0", "data/shop/orders.ibd"} <= set(found)
    assert temporary(host)
    info = host.run("tde_info")
    assert info["encrypted"] is False
    assert any("redo log is in the clear" in gap for gap in info["gaps"])
    assert verdicts(host, relations=["shop.orders"], data_directory=True) == {"data directory": "plain", "shop.orders": "plain"}


def test_keystore(host: Host, rows: str) -> None:
    planned = host.run("tde_keystore", keyslots=SLOTS, check=True)
    for module, more in (
        ("tde_keystore", {"state": "open"}),
        ("tde_tablespace", {"tablespaces": TABLESPACES, "keyslots": SLOTS}),
        ("tde_master_key", {"state": "rotated", "tag": "2"}),
    ):
        assert host.run(module, check=True, **more)["changed"], module
    assert not host.state.exists()
    host.refused("tde_keystore", "recovery_keyslot_missing")
    made = host.run("tde_keystore", keyslots=SLOTS)
    assert [step["action"] for step in made["plan"]] == [step["action"] for step in planned["plan"]]
    assert sorted(made["data_keys"]) == ["key.1.system", "key.2.temporary", "key.3.default"]
    # The server's settings are not touched before its keys are there.
    assert os.listdir(host.server.include) == []
    host.server.restart()
    assert host.run("tde_keystore", state="open", check=True)["changed"]
    # As at boot.
    umask = os.umask(0o077)
    try:
        opened = host.run("tde_keystore", state="open")
    finally:
        os.umask(umask)
    assert opened["restart_required"] is True
    again = host.run("tde_keystore", state="open")
    assert (again["changed"], again["restart_required"]) == (False, True)
    host.server.restart()
    for more in ({"keyslots": SLOTS}, {"state": "open"}):
        result = host.run("tde_keystore", **more)
        assert (result["changed"], result["restart_required"]) == (False, False)
    master = host.run("tde_master_key")
    assert (master["changed"], master["master_key"]) == (False, "hsm-tde.main")
    assert (host.keys / "keys").stat().st_mode & 0o777 == 0o440
    assert (
        subprocess.run(["findmnt", "-no", "FSTYPE", str(host.keys)], capture_output=True, text=True, check=True).stdout
        == "ramfs\n"
    )
    assert host.server.sql(QUERY) == rows


def test_tablespaces(host: Host, rows: str) -> None:
    planned = host.run("tde_tablespace", tablespaces=TABLESPACES, check=True)
    tables = [step["object"] for step in planned["plan"] if step["action"] == "encrypt_table"]
    assert tables == ["table shop.a.b é#P# x", "table shop.orders", "table shop.parts", "table shop.words", "table other.secret"]
    with mariadb.Load(host.server) as load:
        first = host.run("tde_tablespace", tablespaces=TABLESPACES)
    assert load.failures == []
    assert load.done > 20
    # A new key is known to the server after a restart only; all else was done.
    assert first["restart_required"] is True
    assert len(first["moved"]) == 4
    assert any("shop.old is of MyISAM" in note for note in first["notes"])
    host.server.restart()
    second = host.run("tde_tablespace", tablespaces=TABLESPACES)
    assert [row["object"] for row in second["moved"]] == ["other.secret"]
    third = host.run("tde_tablespace", tablespaces=TABLESPACES)
    assert (third["changed"], third["restart_required"]) == (False, False)
    spaces = host.spaces()
    assert spaces["other/secret"] == "4"
    assert {spaces[name] for name in ("shop/orders", "shop/words", "shop/parts#P#p0", "shop/parts#P#p1")} == {"3"}
    assert host.server.sql(QUERY) == rows


def test_proof_on_the_disk(host: Host) -> None:
    """Old binary logs are what is left; nothing else holds the marker, temporary files neither."""
    assert verdicts(host, tablespaces=["default", "sealed"], relations=["shop.orders"]) == dict.fromkeys(
        ("default", "sealed", "shop.orders"), "encrypted"
    )
    info = host.run("tde_info")
    old = [path for path, state in info["server"]["binary_logs"].items() if state == "plain"]
    assert old
    host.server.sql(f"FLUSH BINARY LOGS; PURGE BINARY LOGS TO '{Path(host.server.sql('SHOW MASTER STATUS').split()[0]).name}'")
    deadline = time.monotonic() + 20
    while host.server.files(RAW) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert host.server.files(RAW) == []
    assert not temporary(host)
    info = host.run("tde_info")
    assert info["server"]["redo_log"] == "encrypted"
    assert set(info["server"]["binary_logs"].values()) == {"encrypted"}
    assert {one["encryption"] for one in info["tablespaces"]} == {"ours"}
    # What was free in the system tablespace when it was encrypted is found, and said.
    assert any("free when it was encrypted" in gap for gap in info["gaps"])


def test_no_key_rests_in_the_clear(host: Host) -> None:
    keys = killing.opened(host.state, [TokenCredential(host.hsm.access())], [PassphraseCredential(Secret(PASSPHRASE))])
    assert len(keys) == 4
    killing.no_secret([*keys.values(), host.hsm.pin.encode()], host.home, but=[host.keys])
    killing.no_leftovers(host.home)


def test_master_key_rotates_while_the_server_works(host: Host) -> None:
    before = host.spaces()
    with mariadb.Load(host.server) as load:
        result = host.run("tde_master_key", state="rotated", tag="2")
    assert load.failures == []
    assert (result["changed"], result["restart_required"], result["master_key"]) == (True, False, "hsm-tde.main.2")
    assert not host.run("tde_master_key", state="rotated", tag="2")["changed"]
    assert host.spaces() == before


def test_data_keys_rotate_under_load(host: Host, rows: str) -> None:
    host.refused(
        "tde_master_key",
        "credential_missing",
        state="rotated",
        tag="3",
        mariadb={**host.options, "reencrypt": True},
        passphrase=None,
    )
    planned = host.rotate("3", check=True)
    assert sum(step["action"] == "encrypt_table" for step in planned["plan"]) == 5
    first = host.rotate("3")
    assert first["restart_required"] is True
    assert sorted(first["data_keys"])[-2:] == ["key.5.default", "key.6.sealed"]
    assert not host.rotate("3")["changed"]
    host.server.restart()
    with mariadb.Load(host.server) as load:
        second = host.rotate("3")
    assert load.failures == []
    assert load.done > 20
    assert (second["changed"], second["restart_required"]) == (True, False)
    assert not host.rotate("3")["changed"]
    spaces = host.spaces()
    assert {spaces[name] for name in ("shop/orders", "shop/words", "shop/parts#P#p0")} == {"5"}
    assert spaces["other/secret"] == "6"
    host.server.sql("CREATE TABLE other.late (id INT PRIMARY KEY)")
    assert host.spaces()["other/late"] == "5"
    assert verdicts(host, tablespaces=["default", "sealed"]) == {"default": "encrypted", "sealed": "encrypted"}
    assert host.server.sql(QUERY) == rows
    assert host.refused("tde_master_key", "tag_superseded", state="rotated", tag="2")


def test_protection_changes(host: Host, rows: str) -> None:
    on_second = [{"name": "primary", "token_label": "second", "pin": host.hsm.pin}, SLOTS[1]]
    by_passphrase = [{"name": "primary", "protection": "passphrase", "passphrase": "primary passphrase"}, SLOTS[1]]
    for wish, credential in (
        (on_second, {"token_label": "second"}),
        (by_passphrase, {"passphrase": "primary passphrase", "token_label": None, "pin": None}),
        (SLOTS, {}),
    ):
        assert host.run("tde_keystore", keyslots=wish, keyslots_exclusive=True)["changed"]
        assert not host.run("tde_keystore", keyslots=wish, keyslots_exclusive=True)["changed"]
        host.server.stop()
        host.run("tde_keystore", state="closed")
        host.run("tde_keystore", state="open", **credential)
        host.server.start()
        assert host.server.sql(QUERY) == rows


def test_keys_in_memory_that_the_store_lacks_are_the_only_copy(host: Host) -> None:
    """The state directory is lost, or not mounted: a new store's keys took the place of the server's in memory."""
    slots = [{"name": name, "protection": "passphrase", "passphrase": f"{PASSPHRASE} {name}"} for name in ("primary", "recovery")]
    content, away = (host.keys / "keys").read_bytes(), host.state.with_name("away")
    host.state.rename(away)
    try:
        host.refused("tde_keystore", "keystore_unreachable", keyslots=slots)
        assert not (host.state / "store").exists()
    finally:
        shutil.rmtree(host.state, ignore_errors=True)
        away.rename(host.state)
    assert (host.keys / "keys").read_bytes() == content
    # As if the store were of before the last key was made.
    (host.keys / "keys").write_bytes(content + b"# since 1.000\n99;" + b"ab" * 32 + b"\n")
    host.refused("tde_keystore", "keystore_unreachable", state="open")
    host.refused("tde_keystore", "keystore_unreachable", state="closed", force=True)
    (host.keys / "keys").write_bytes(content)
    assert not host.run("tde_keystore", state="open")["changed"]


def test_a_missing_or_wrong_key_stops_the_start(host: Host, rows: str) -> None:
    host.refused("tde_keystore", "server_running", state="closed")
    host.server.stop()
    assert host.run("tde_keystore", state="closed")["changed"]
    assert not host.run("tde_keystore", state="closed")["changed"]
    assert not host.server.start(check=False)
    host.run("tde_keystore", state="open")
    key_file = host.keys / "keys"
    right = key_file.read_text()
    lines = right.splitlines()
    key_file.write_text("\n".join(line[:-4] + "0000" if line.startswith("1;") else line for line in lines) + "\n")
    assert not host.server.start(check=False)
    # A wrong line is noticed without a credential, and put right.
    assert host.run("tde_keystore", state="open")["changed"]
    assert sorted(key_file.read_text().splitlines()[1::2]) == sorted(lines[1::2])
    host.server.start()
    assert host.server.sql(QUERY) == rows
    # The server starts without the key of a table, which is out of reach then and harmed by nothing.
    right = key_file.read_text()
    key_file.write_text(re.sub("(?m)^5;....", "5;0000", right))
    host.server.restart()
    assert "ERROR" in host.server.sql("SELECT COUNT(*) FROM shop.parts", check=False)
    assert host.run("tde_keystore", state="open")["changed"]
    host.server.restart()
    assert host.server.sql(QUERY) == rows


def test_a_server_under_other_keys_is_left_alone(home: Path) -> None:
    with mariadb.host(home / "foreign") as other:
        keys = home / "foreign/other-keys"
        keys.write_text(f"1;{'ab' * 32}\n")
        shutil.chown(keys, "mysql")
        (other.server.include / "theirs.cnf").write_text(
            f"[mariadb]\nplugin_load_add=file_key_management\nfile_key_management_filename={keys}\n"
        )
        other.server.restart()
        other.refused("tde_keystore", "encryption_foreign", keyslots=SLOTS)
        assert not list(other.state.glob("store/*/*"))
        assert os.listdir(other.server.include) == ["theirs.cnf"]
        # A file of another cluster in the same folder is never taken over, and a server that reads no include file is told from one to restart.
        (other.server.include / "theirs.cnf").unlink()
        other.server.restart()
        other.run("tde_keystore", keyslots=SLOTS)
        other.server.conf.write_text(other.server.conf.read_text().replace("!includedir", "#"))
        assert other.run("tde_keystore", state="open")["restart_required"]
        time.sleep(2.2)
        other.server.restart()
        other.refused("tde_keystore", "setting_ineffective", state="open")


@pytest.fixture(scope="module")
def port() -> int:
    """A TCP port that is free now."""
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_a_replica_has_keys_of_its_own(home: Path, host: Host, port: int) -> None:
    with (
        mariadb.host(
            home / "primary", skip_networking="0", bind_address="127.0.0.1", port=str(port), binlog_format="ROW"
        ) as primary,
        mariadb.host(home / "replica", server_id="2") as replica,
    ):
        primary.server.sql(
            "CREATE USER r@'127.0.0.1' IDENTIFIED BY 'r'; GRANT REPLICATION SLAVE ON *.* TO r@'127.0.0.1'; RESET MASTER"
        )
        for one in (primary, replica):
            one.configure()
        connect = (
            f"CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='r', MASTER_PASSWORD='r', "
            "MASTER_CONNECT_RETRY=1, MASTER_USE_GTID=slave_pos"
        )
        replica.server.sql(f"{connect}; START SLAVE")
        primary.server.sql(
            f"CREATE DATABASE app; CREATE TABLE app.t (id INT PRIMARY KEY, b TEXT); INSERT INTO app.t VALUES (1, '{MARKER}')"
        )
        wish = [{"name": "default", "move": {"databases": ["app"]}}]
        caught_up(replica, "SELECT COUNT(*) FROM app.t", "1")
        # The replica first: what the primary then makes under a new key finds one of that number.
        for one in (replica, primary):
            one.run("tde_tablespace", tablespaces=wish)
            one.rotate("2")
            one.server.restart()
            one.rotate("2")
            assert one.spaces()["app/t"] == "4"
        primary.server.sql(f"INSERT INTO app.t VALUES (2, '{MARKER}'); CREATE TABLE app.copy AS SELECT * FROM app.t")
        caught_up(replica, "SELECT COUNT(*) FROM app.copy", "2")
        # What builds the tables anew stays on its server.
        for log in primary.server.sql("SHOW BINARY LOGS").splitlines():
            assert "ALTER" not in primary.server.sql(f"SHOW BINLOG EVENTS IN '{log.split()[0]}'")
        ways = ([TokenCredential(one.hsm.access())] for one in (primary, replica))
        first, second = (killing.opened(one.state, way) for one, way in zip((primary, replica), ways, strict=True))
        assert not set(first.values()) & set(second.values())
        assert any("replicas receive the binary log" in gap for gap in primary.run("tde_info")["gaps"])
        assert [name for name in replica.server.files(RAW) if "relay" in name] == []


def caught_up(replica: Host, query: str, answer: str) -> None:
    """Wait until a replica gives an answer."""
    deadline = time.monotonic() + 20
    while replica.server.sql(query, check=False) != answer:
        assert time.monotonic() < deadline, replica.server.sql("SHOW SLAVE STATUS\\G", check=False)
        time.sleep(0.1)
