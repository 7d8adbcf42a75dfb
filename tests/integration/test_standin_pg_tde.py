# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The stand-in for pg_tde answers as its source and a real build do: what the engine's tests stand on."""

from __future__ import annotations

import shutil
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import pgtde, postgres
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer
from ansible_collections.hsm.tde.tests.integration.pgtde import PgTdeServer, Vault

pytestmark = [pytest.mark.root, pytest.mark.skipif(not postgres.programs(), reason="needs PostgreSQL")]


@pytest.fixture(scope="module")
def server() -> t.Iterator[PgTdeServer]:
    with postgres.folder() as home:
        made = PgTdeServer(home)
        made.initdb()
        made.start()
        made.psql("CREATE EXTENSION pg_tde; CREATE DATABASE other")
        made.psql("CREATE EXTENSION pg_tde", "other")
        try:
            yield made
        finally:
            made.stop()


def refused(server: PgTdeServer, statement: str, database: str = "postgres") -> str:
    """The SQLSTATE and message of what a statement raises."""
    said = server.psql(f"\\set VERBOSITY verbose\n{statement}", database, check=False)
    line = next(line for line in said.splitlines() if "ERROR:" in line)
    return line.partition("ERROR:")[2].strip()


def add_kmip(kmip: KmipServer, name: str, home: Path) -> str:
    """The call that adds a provider at a KMIP server; the server's user can read the files."""
    client = kmip.client("pg_tde")
    paths = []
    for number, path in enumerate((client.path, client.key, kmip.ca.path)):
        copy = home / f"{name}-{number}.pem"
        shutil.copy(path, copy)
        shutil.chown(copy, "postgres", "postgres")
        paths.append(f"'{copy}'")
    return (
        f"SELECT pg_tde_add_global_key_provider_kmip(provider_name => '{name}', kmip_host => 'localhost', kmip_port => {kmip.port},"
        f" kmip_cert_path => {paths[0]}, kmip_key_path => {paths[1]}, kmip_ca_path => {paths[2]})"
    )


def test_file_provider_answers_and_traps(server: PgTdeServer) -> None:
    home = server.data
    assert server.psql("SELECT * FROM pg_tde_key_info()") == "|||"
    assert refused(server, "CREATE TABLE t (a int) USING tde_heap") == "XX000: principal key not configured"
    server.psql(f"SELECT pg_tde_add_global_key_provider_file('f', '{home}/keys')")
    assert (
        refused(server, f"SELECT pg_tde_add_global_key_provider_file('f', '{home}/keys')")
        == '42710: Key provider "f" already exists.'
    )
    assert refused(server, "SELECT pg_tde_set_key_using_global_key_provider('k1', 'f')") == '22023: key "k1" does not exist'
    assert (
        refused(server, "SELECT pg_tde_create_key_using_global_key_provider('k1', 'x')")
        == '22023: key provider "x" does not exists'
    )
    # What was created survives a rollback.
    server.psql("BEGIN; SELECT pg_tde_create_key_using_global_key_provider('k1', 'f'); ROLLBACK")
    assert "already exists" in refused(server, "SELECT pg_tde_create_key_using_global_key_provider('k1', 'f')")
    server.psql("SELECT pg_tde_set_key_using_global_key_provider('k1', 'f')")
    first = server.psql("SELECT * FROM pg_tde_key_info()")
    assert first.startswith("k1|f|-1|")
    server.psql("SELECT pg_tde_set_key_using_global_key_provider('k1', 'f')")
    assert server.psql("SELECT * FROM pg_tde_key_info()") != first
    assert refused(server, "SELECT pg_tde_delete_global_key_provider('f')").startswith("55006")
    assert refused(server, f"SELECT pg_tde_change_global_key_provider_file('f', '{home}/other-keys')") == (
        'P0002: key "k1" used by database "postgres" not found in modified key provider "f"'
    )
    server.psql("CREATE TABLE t (a int) USING tde_heap; CREATE TABLE plain (a int); ALTER TABLE plain SET ACCESS METHOD tde_heap")
    assert (
        server.psql("SELECT pg_tde_is_encrypted('t'), pg_tde_is_encrypted('plain'), pg_tde_is_encrypted('pg_class')") == "t|t|f"
    )
    assert refused(server, "SET pg_tde.enforce_encryption = on; CREATE TABLE u (a int)").startswith("XX000")
    assert server.psql("SELECT pg_tde_list_all_global_key_providers()").startswith("(-1,f,file,")


def test_default_key_reaches_databases_and_the_server_key(server: PgTdeServer) -> None:
    server.psql("SELECT pg_tde_create_key_using_global_key_provider('d1', 'f')")
    server.psql("SELECT pg_tde_create_key_using_global_key_provider('d2', 'f')")
    server.psql("SELECT pg_tde_set_default_key_using_global_key_provider('d1', 'f')")
    assert server.psql("SELECT key_name FROM pg_tde_server_key_info()") == "d1"
    assert server.psql("SELECT key_name FROM pg_tde_key_info()", "other") == ""
    server.psql("CREATE TABLE t (a int) USING tde_heap", "other")
    assert server.psql("SELECT key_name FROM pg_tde_key_info()", "other") == "d1"
    server.psql("SELECT pg_tde_set_default_key_using_global_key_provider('d2', 'f')")
    assert server.psql("SELECT key_name FROM pg_tde_key_info()", "other") == "d2"
    assert server.psql("SELECT key_name FROM pg_tde_key_info()") == "k1"


def test_keys_are_forgotten_by_a_restart(server: PgTdeServer) -> None:
    aside = server.data / "keys.aside"
    (server.data / "keys").rename(aside)
    server.psql("SELECT * FROM pg_tde_key_info()")
    server.restart()
    assert refused(server, "SELECT * FROM pg_tde_key_info()") == 'P0002: key "k1" not found in key provider "f"'
    server.psql("ALTER SYSTEM SET pg_tde.wal_encrypt = on")
    assert server.restart(check=False).returncode != 0
    aside.rename(server.data / "keys")
    server.start()
    assert server.psql("SHOW pg_tde.wal_encrypt") == "on"
    server.psql("ALTER SYSTEM RESET pg_tde.wal_encrypt")
    server.restart()


def test_kmip_provider_and_its_traps(server: PgTdeServer, kmip_server: KmipServer) -> None:
    server.psql(add_kmip(kmip_server, "k", server.home))
    server.psql("SELECT pg_tde_create_key_using_global_key_provider('m1', 'k')")
    server.psql("SELECT pg_tde_set_key_using_global_key_provider('m1', 'k')", "other")
    kmip_server.stop()
    # The key is there, the server is down.
    assert refused(server, "SELECT pg_tde_set_key_using_global_key_provider('m1', 'k')") == '22023: key "m1" does not exist'
    kmip_server.start()
    server.psql("SELECT pg_tde_verify_key()", "other")


def test_two_creates_at_once_spoil_a_name_at_a_kmip_server(server: PgTdeServer, kmip_server: KmipServer) -> None:
    server.psql("SELECT pg_tde_create_key_using_global_key_provider('twice', 'k')")
    # The other create, which had looked for the name at the same moment and found none.
    access = kmip_access(kmip_server.options("pg_tde"))
    assert access
    with Client(access) as client:
        client.activate(client.create("twice", "aes", 256, ["encrypt", "decrypt"]))
    said = server.psql("SELECT pg_tde_set_key_using_global_key_provider('twice', 'k')", "other", check=False)
    assert "failed to retrieve" in said


def test_vault_provider_and_its_trap(server: PgTdeServer) -> None:
    with Vault(server.home) as vault:
        add = f"SELECT pg_tde_add_global_key_provider_vault_v2('v', '{vault.url}', 'tde', '{vault.token}', '')"
        server.psql(add)
        server.psql("SELECT pg_tde_create_key_using_global_key_provider('v1', 'v')")
        server.psql("SELECT pg_tde_set_key_using_global_key_provider('v1', 'v')")
        # A GET that fails makes create write over the key.
        vault.failing = 500
        server.psql("SELECT pg_tde_create_key_using_global_key_provider('v1', 'v')")
        vault.failing = None
        assert len(vault.keys["v1"]) == 2
        assert refused(server, "SELECT pg_tde_verify_key()").startswith("XX001")


def test_open_pg_tde_has_another_prefix() -> None:
    built = pgtde.tree("open_pg_tde")
    assert list(built.glob("share/postgresql/*/extension/open_pg_tde--2.2.sql"))
