# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine pg_tde on its stand-in: keys in memory, at a real KMIP server and in a small Vault. The tests build on each other."""

from __future__ import annotations

import subprocess
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import estate, killing, pgtde, postgres
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer, Relay
from ansible_collections.hsm.tde.tests.integration.pgtde import Host, Vault

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not estate.usable() or not postgres.programs(), reason="needs root, PostgreSQL and SoftHSM"),
]

WHOLE = [{"name": "tde_heap", "move": {"databases": ["shop"]}}]
ROWS = "SELECT count(*), md5(string_agg(body, ',' ORDER BY id)) FROM orders"


@pytest.fixture(scope="module")
def host() -> t.Iterator[Host]:
    with pgtde.host() as made:
        yield made


@pytest.fixture(scope="module")
def rows(host: Host) -> str:
    return host.server.psql(ROWS, "shop")


def test_file_provider_from_nothing_to_encrypted_wal(host: Host, rows: str) -> None:
    planned = host.run("tde_keystore", keyslots=estate.SLOTS, check=True)
    assert planned["changed"]
    host.refused("tde_keystore", "recovery_keyslot_missing", keyslots=[{"name": "primary"}])
    first = host.run("tde_keystore", keyslots=estate.SLOTS)
    assert first["restart_required"] is True
    actions = [step["action"] for step in first["plan"]]
    assert actions.index("create_key") < actions.index("seal_keys", actions.index("create_key")) < actions.index("set_key")
    assert not host.run("tde_keystore", keyslots=estate.SLOTS)["changed"]
    host.server.restart()
    second = host.run("tde_keystore", keyslots=estate.SLOTS)
    assert (second["changed"], second["restart_required"]) == (False, False)
    assert not host.run("tde_keystore", state="open")["changed"]
    assert not host.run("tde_master_key", state="present")["changed"]
    key = "hsm-tde.main of hsm-tde-file"
    assert host.set_keys() == {"default": key, "server": key, "shop": ""}
    assert host.server.psql("SHOW pg_tde.wal_encrypt") == "on"


def test_tables_are_converted(host: Host, rows: str) -> None:
    host.refused("tde_tablespace", "engine_unsupported", tablespaces=[{"name": "sealed"}])
    host.refused("tde_tablespace", "engine_unsupported", tablespaces=[{"name": "tde_heap", "algorithm": "AES128"}])
    assert host.run("tde_tablespace", tablespaces=WHOLE, check=True)["changed"]
    some = [{"name": "tde_heap", "move": {"database": "shop", "schemas": ["old"]}}]
    assert [row["object"] for row in host.run("tde_tablespace", tablespaces=some)["moved"]] == ["old.parts_1"]
    result = host.run("tde_tablespace", tablespaces=WHOLE)
    assert [row["object"] for row in result["moved"]] == ["public.orders"]
    assert not host.run("tde_tablespace", tablespaces=WHOLE)["changed"]
    assert host.server.psql("SELECT pg_tde_is_encrypted('orders'), pg_tde_is_encrypted('orders_pkey')", "shop") == "t|t"
    host.server.psql("CREATE TABLE late (a int)", "shop")
    assert host.server.psql("SELECT pg_tde_is_encrypted('late')", "shop") == "t"
    assert host.server.psql(ROWS, "shop") == rows
    # The database took the default key for its own.
    assert host.set_keys()["shop"] == "hsm-tde.main of hsm-tde-file"


def test_large_objects_are_never_called_encrypted(host: Host) -> None:
    assert host.run("tde_info")["encrypted"] is True
    number = host.server.psql("SELECT lo_from_bytea(0, 'the plain text')", "shop")
    info = host.run("tde_info")
    assert info["encrypted"] is False
    assert any("Large objects" in gap and "shop" in gap for gap in info["gaps"])
    host.server.psql(f"SELECT lo_unlink({number})", "shop")


def test_the_stand_in_encrypts_nothing_and_the_proof_says_so(host: Host) -> None:
    found = host.run("tde_proof", tablespaces=["tde_heap"], relations=["shop.public.orders"])["proofs"]
    assert [one["verdict"] for one in found] == ["plain", "plain"]
    info = host.run("tde_info")
    assert {one["name"]: one["encryption"] for one in info["tablespaces"]} == {"tde_heap": "engine"}
    assert info["server"]["keys"]["server key"] == "hsm-tde.main of provider hsm-tde-file"


def test_rotation_is_a_new_key(host: Host, rows: str) -> None:
    host.server.psql("SELECT pg_backup_start('test')")  # its session ends at once, so nothing keeps the rotation
    first = host.run("tde_master_key", state="rotated", tag="2")
    assert (first["changed"], first["restart_required"], first["master_key"]) == (True, False, "hsm-tde.main.2")
    assert not host.run("tde_master_key", state="rotated", tag="2")["changed"]
    assert not host.run("tde_master_key", state="rotated", max_age=1)["changed"]
    assert set(host.set_keys().values()) == {"hsm-tde.main.2 of hsm-tde-file"}
    host.run("tde_master_key", state="rotated", tag="3")
    host.refused("tde_master_key", "tag_superseded", state="rotated", tag="2")
    assert (
        host.run("tde_keystore", keyslots=estate.SLOTS)["data_keys"]["keyfile"]["keyslots"]["primary"]
        == "hsm-tde.main.3 in token demo"
    )
    host.reboot()
    assert set(host.set_keys().values()) == {"hsm-tde.main.3 of hsm-tde-file"}
    assert host.server.psql(ROWS, "shop") == rows


def test_not_during_a_base_backup(host: Host) -> None:
    with subprocess.Popen(
        [f"{host.server.bin}/psql", "-X", "-h", str(host.server.socket), "-d", "postgres"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user="postgres", cwd="/",
    ) as backup:  # fmt: skip
        assert backup.stdin
        assert backup.stdout
        backup.stdin.write("SELECT pg_backup_start('test', fast => true);\n")
        backup.stdin.flush()
        while "row)" not in backup.stdout.readline():
            pass
        host.refused("tde_master_key", "backup_running", state="rotated", tag="4")
        backup.stdin.close()


def test_a_closed_keystore(host: Host, rows: str) -> None:
    host.refused("tde_keystore", "server_running", state="closed")
    host.server.stop()
    assert host.run("tde_keystore", state="closed")["changed"]
    assert not host.run("tde_keystore", state="closed")["changed"]
    # Encrypted WAL: no start without the key.
    assert host.server.start(check=False).returncode != 0
    assert host.run("tde_keystore", state="open", pin=None, library=None, token_label=None, passphrase=estate.PASSPHRASE)[
        "changed"
    ]
    host.server.start()
    assert host.server.psql(ROWS, "shop") == rows


def test_sealed_keys_are_the_last_ones_and_never_in_the_clear(host: Host) -> None:
    content = (host.keys / "keys").read_bytes()
    secrets = [content[start + 256 : start + 288] for start in range(0, len(content), 292)]
    assert len(secrets) == 3
    killing.no_secret([*secrets, host.hsm.pin.encode()], host.home, but=[host.keys])
    sealed = host.state / "store/main/keys.sealed"
    new = sealed.read_bytes()
    host.run("tde_master_key", state="rotated", tag="4")
    newer = sealed.read_bytes()
    sealed.write_bytes(new)
    host.refused("tde_keystore", "keystore_rolled_back", keyslots=estate.SLOTS)
    sealed.unlink()
    host.refused("tde_keystore", "keystore_unreachable", keyslots=estate.SLOTS)
    sealed.write_bytes(newer)
    sealed.chmod(0o600)
    assert not host.run("tde_keystore", keyslots=estate.SLOTS)["changed"]


def test_a_key_that_somebody_else_made_is_sealed(host: Host) -> None:
    host.server.psql("SELECT pg_tde_create_key_using_global_key_provider('theirs', 'hsm-tde-file')")
    assert any("memory only" in gap for gap in host.run("tde_info")["gaps"])
    assert [step["action"] for step in host.run("tde_keystore", keyslots=estate.SLOTS)["plan"]] == ["seal_keys"]


def test_a_key_of_the_same_name_never_takes_a_sealed_one_s_place(host: Host) -> None:
    """The server's user emptied the file in memory and made its keys anew: the sealed ones are the only copy."""
    file, sealed = host.keys / "keys", (host.state / "store/main/keys.sealed").read_bytes()
    content = file.read_bytes()
    file.write_bytes(
        b"".join(content[at : at + 256] + b"\1" * 32 + content[at + 288 : at + 292] for at in range(0, len(content), 292))
    )
    host.refused("tde_keystore", "keystore_foreign", keyslots=estate.SLOTS)
    assert (host.state / "store/main/keys.sealed").read_bytes() == sealed
    file.write_bytes(content)
    assert not host.run("tde_keystore", keyslots=estate.SLOTS)["changed"]


def test_from_file_to_kmip(host: Host, rows: str, kmip_server: KmipServer) -> None:
    kmip = {
        "pg_tde": {**host.options, "provider": "kmip"},
        "keyslots": [{"name": "primary", "protection": "kmip"}],
        **kmip_server.options(),
    }
    host.refused("tde_keystore", "engine_unsupported", **{**kmip, "keyslots": estate.SLOTS})
    kmip_server.stop()
    host.refused("tde_keystore", "kmip_unreachable", **kmip)
    kmip_server.start()
    before = host.set_keys()
    assert set(before.values()) == {"hsm-tde.main.4 of hsm-tde-file"}
    assert host.run("tde_keystore", **kmip, check=True)["changed"]
    assert host.run("tde_keystore", **kmip)["changed"]
    assert not host.run("tde_keystore", **kmip)["changed"]
    assert set(host.set_keys().values()) == {"hsm-tde.main.4 of hsm-tde-kmip"}
    # The boot needs nobody's secret now; the former keys stay sealed for backups.
    host.server.stop()
    subprocess.run(["umount", str(host.keys)], check=True)
    host.run("tde_keystore", state="open", pin=None, library=None, token_label=None)
    assert not (host.keys / "keys").exists()
    assert (host.state / "store/main/keys.sealed").exists()
    host.server.start()
    assert host.server.psql(ROWS, "shop") == rows
    host.run("tde_master_key", state="rotated", tag="5")
    assert set(host.set_keys().values()) == {"hsm-tde.main.5 of hsm-tde-kmip"}

    # A key whose server is down is not taken for absent, and nothing is made twice.
    kmip_server.stop()
    host.refused("tde_master_key", "kmip_unreachable", state="rotated", tag="6")
    kmip_server.start()
    host.run("tde_master_key", state="rotated", tag="6")


def test_eight_runs_at_once_make_one_key(host: Host, kmip_server: KmipServer) -> None:
    work = killing.task("tde_master_key", host.arguments(state="rotated", tag="at-once"))
    ends = []
    for process in [killing.Process(work) for _number in range(8)]:
        try:
            ends.append("done" if process.result() else "killed")
        except TdeError as exc:
            ends.append(exc.code)
    assert set(ends) <= {"done", "busy"}
    assert "done" in ends
    assert set(host.set_keys().values()) == {"hsm-tde.main.at-once of hsm-tde-kmip"}
    with Client(kmip_access(kmip_server.options())) as client:
        assert len(client.locate("hsm-tde.main.at-once")) == 1
    host.run("tde_master_key", state="rotated", tag="6b")


def test_a_provider_is_changed_with_its_keys(host: Host, kmip_server: KmipServer) -> None:
    relay = Relay(kmip_server.port)
    try:
        moved = kmip_server.options(kmip_servers=[relay.address])
        result = host.run("tde_keystore", **moved)
        assert "change_provider" in [step["action"] for step in result["plan"]]
        assert (
            host.server.psql("SELECT options ->> 'port' FROM pg_tde_list_all_global_key_providers() WHERE type = 'kmip'")
            in relay.address
        )
        assert host.run("tde_keystore", **kmip_server.options())["changed"]
    finally:
        relay.close()


@pytest.mark.slow
def test_on_to_vault_and_back(host: Host, rows: str, kmip_server: KmipServer) -> None:
    assert set(host.set_keys().values()) == {"hsm-tde.main.6b of hsm-tde-kmip"}
    with Vault(host.home) as vault:
        vault.token.chmod(0o600)
        options = {"provider": "vault-v2", "vault_url": vault.url, "vault_mount_path": "tde", "vault_token": str(vault.token)}
        to_vault = {"pg_tde": {**host.options, **options}, "keyslots": None}
        vault.failing = 500
        host.refused("tde_keystore", "vault_refused", **to_vault)
        assert vault.keys == {}
        vault.failing = None
        assert host.run("tde_keystore", **to_vault)["changed"]
        assert not host.run("tde_keystore", **to_vault)["changed"]
        assert set(host.set_keys().values()) == {"hsm-tde.main.6b of hsm-tde-vault-v2"}
        vault.failing = 503
        host.refused("tde_master_key", "vault_refused", state="rotated", tag="7")
        vault.failing = None
        vault.stop()
        host.refused("tde_master_key", "vault_unreachable", state="rotated", tag="7")
        vault.start()
        host.run("tde_master_key", state="rotated", tag="7")
        assert {name: len(versions) for name, versions in vault.keys.items()} == {"hsm-tde.main.6b": 1, "hsm-tde.main.7": 1}

        with Vault(host.home) as empty:
            empty.token.chmod(0o600)
            elsewhere = {"pg_tde": {**host.options, **options, "vault_url": empty.url}, "keyslots": None}
            host.refused("tde_keystore", "provider_without_key", **elsewhere)
        host.run("tde_keystore", **to_vault)

        back = {"pg_tde": {**host.options, "provider": "file"}, "keyslots": estate.SLOTS}
        assert host.run("tde_keystore", **back)["changed"]
    assert not host.run("tde_keystore", **back)["changed"]
    assert set(host.set_keys().values()) == {"hsm-tde.main.7 of hsm-tde-file"}
    host.reboot()
    assert host.server.psql(ROWS, "shop") == rows


@pytest.mark.slow
def test_another_prefix_and_a_key_for_each_database(rows: str) -> None:
    """The server has not loaded the library, and the extension is open_pg_tde."""
    with pgtde.host(loaded=False, extension="open_pg_tde") as host:
        host.options.update(scope="database", wal_encrypt=False, enforce_encryption=True)
        host.refused("tde_tablespace", "cluster_unknown", tablespaces=WHOLE)
        first = host.run("tde_keystore", keyslots=estate.SLOTS)
        assert first["restart_required"] is True
        host.refused("tde_tablespace", "keystore_closed", tablespaces=WHOLE)
        host.present()
        assert not host.run("tde_keystore", keyslots=estate.SLOTS)["changed"]
        assert host.set_keys() == {"default": "", "server": "", "shop": "hsm-tde.main@shop of hsm-tde-file"}
        host.run("tde_tablespace", tablespaces=WHOLE)
        host.run("tde_master_key", state="rotated", tag="2")
        assert host.set_keys()["shop"] == "hsm-tde.main.2@shop of hsm-tde-file"
        assert "only the tde_heap access method" in host.server.psql("CREATE TABLE x (a int) USING heap", "shop", check=False)
        assert host.server.psql(ROWS, "shop") == rows
