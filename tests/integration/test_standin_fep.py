# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The stand-in for Fujitsu Enterprise Postgres answers as its README says: what an engine's tests stand on."""

from __future__ import annotations

import os
import shutil
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.tests.integration import fep, postgres, support
from ansible_collections.hsm.tde.tests.integration.fep import FepServer, TokenHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not postgres.programs(), reason="needs root and PostgreSQL")

PASSPHRASE, NEXT_PASSPHRASE = "correct horse", "battery staple"
CLOSED = "the keystore is not open"
ENCRYPTED = "WITH (tablespace_encryption_algorithm = 'AES256')"


def call(function: str, *secrets: str) -> str:
    return f"SELECT {function}({', '.join(repr(secret) for secret in secrets)})"


def state(server: FepServer, statement: str) -> str:
    """The SQLSTATE with which a statement is refused."""
    refusal = server.psql(f"\\set VERBOSITY verbose\n{statement}", check=False)
    return refusal.split("ERROR:  ")[1][:5] if "ERROR:  " in refusal else ""


def location(server: FepServer, name: str) -> Path:
    path = server.home / name
    path.mkdir(mode=0o700)
    shutil.chown(path, postgres.USER, postgres.USER)
    return path


# ---- the keystore in a file ----


@pytest.fixture(scope="module")
def server() -> t.Iterator[FepServer]:
    with postgres.folder() as home:
        made = FepServer(home)
        made.initdb()
        made.configure(keystore_location=str(made.keystore))
        made.start()
        yield made
        made.stop()


@pytest.fixture
def opened(server: FepServer) -> FepServer:
    """The server with a keystore of :data:`PASSPHRASE`, open, and without ``keystore.aks``."""
    for path in server.keystore.iterdir():
        path.unlink()
    server.psql(call("pgx_set_master_key", PASSPHRASE))
    return server


def test_it_says_that_it_encrypts_nothing_and_it_is_true(opened: FepServer) -> None:
    assert "ENCRYPTS NOTHING" in opened.said()
    assert "ENCRYPTS NOTHING" in opened.psql("SELECT what FROM fep_standin")
    place = location(opened, "plain")
    opened.psql(f"CREATE TABLESPACE plain LOCATION '{place}' {ENCRYPTED}")
    opened.psql("CREATE TABLE plain (a text) TABLESPACE plain; INSERT INTO plain VALUES ('canary-4711'); CHECKPOINT")
    assert any(b"canary-4711" in path.read_bytes() for path in place.rglob("*") if path.is_file())
    opened.psql("DROP TABLE plain; DROP TABLESPACE plain")


def test_who_may_call_and_when(opened: FepServer) -> None:
    opened.psql("CREATE ROLE dba")
    assert state(opened, f"SET ROLE dba; {call('pgx_open_keystore', PASSPHRASE)}") == "42501"
    for function in ("pgx_set_master_key", "pgx_open_keystore"):
        assert state(opened, f"BEGIN; {call(function, PASSPHRASE)}") == "25001"
    assert state(opened, f"BEGIN; {call('pgx_set_keystore_passphrase', PASSPHRASE, NEXT_PASSPHRASE)}") == "25001"
    opened.psql("DROP ROLE dba")


def test_the_length_of_a_passphrase(opened: FepServer) -> None:
    for wrong in ("1234567", "x" * 201, "é" * 101):
        for statement in (call("pgx_set_master_key", wrong), call("pgx_set_keystore_passphrase", PASSPHRASE, wrong)):
            refusal = opened.psql(statement, check=False)
            assert refusal.endswith("ERROR:  passphrase is too short or too long"), refusal
    opened.psql(call("pgx_set_keystore_passphrase", PASSPHRASE, "x" * 200))


def test_opened_once_a_start_and_never_twice(opened: FepServer) -> None:
    assert "already open" in opened.psql(call("pgx_open_keystore", PASSPHRASE), check=False)
    opened.restart()
    assert not opened.is_open()
    assert "ERROR" in opened.psql(call("pgx_open_keystore", NEXT_PASSPHRASE), check=False)
    assert not opened.is_open()
    opened.psql(call("pgx_open_keystore", PASSPHRASE))
    assert opened.is_open()


def test_setting_the_master_key_again_rotates_it_and_opens(opened: FepServer) -> None:
    keystore = opened.keystore / "keystore.ks"
    assert (keystore.stat().st_mode & 0o777, keystore.owner()) == (0o600, postgres.USER)
    first = keystore.read_text()
    opened.restart()
    assert "ERROR" in opened.psql(call("pgx_set_master_key", NEXT_PASSPHRASE), check=False)
    assert keystore.read_text() == first
    opened.psql(call("pgx_set_master_key", PASSPHRASE))
    assert keystore.read_text().splitlines()[1] != first.splitlines()[1]
    assert opened.is_open()


def test_the_passphrase_changes_on_a_closed_keystore(opened: FepServer) -> None:
    opened.restart()
    assert "ERROR" in opened.psql(call("pgx_set_keystore_passphrase", NEXT_PASSPHRASE, PASSPHRASE), check=False)
    opened.psql(call("pgx_set_keystore_passphrase", PASSPHRASE, NEXT_PASSPHRASE))
    assert not opened.is_open()
    assert "ERROR" in opened.psql(call("pgx_open_keystore", PASSPHRASE), check=False)
    opened.psql(call("pgx_open_keystore", NEXT_PASSPHRASE))


def test_opening_at_start_on_this_machine_only(opened: FepServer) -> None:
    command = (f"{opened.bin}/pgx_keystore", "--enable-auto-open", str(opened.keystore / "keystore.ks"))
    assert opened.run(*command, stdin=f"{NEXT_PASSPHRASE}\n", check=False).returncode == 1
    done = opened.run(*command, stdin=f"{PASSPHRASE}\n")
    assert done.stdout.endswith("Automatic opening of the keystore is now enabled\n")
    automatic = opened.keystore / "keystore.aks"
    assert (automatic.stat().st_mode & 0o777, automatic.owner()) == (0o600, postgres.USER)
    opened.restart()
    assert opened.is_open()

    first = automatic.read_text()
    opened.psql(call("pgx_set_master_key", PASSPHRASE))
    second = automatic.read_text()
    assert first.splitlines()[1] != second.splitlines()[1]
    opened.psql(call("pgx_set_keystore_passphrase", PASSPHRASE, NEXT_PASSPHRASE))
    opened.restart()
    assert opened.is_open()

    automatic.write_text(second.replace("machine ", "machine 0"))
    opened.restart()
    assert not opened.is_open()
    assert "another machine" in opened.said()
    automatic.unlink()


def test_pg_ctl_asks_for_the_passphrase_and_keeps_it_to_itself(opened: FepServer) -> None:
    assert "Enter the passphrase: " in opened.restart(True, "--keystore-passphrase", secret=PASSPHRASE).stderr
    assert opened.is_open()
    pid = (opened.data / "postmaster.pid").read_text().split()[0]
    for name in ("cmdline", "environ"):
        assert PASSPHRASE.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert opened.restart(False, "--keystore-passphrase", secret=NEXT_PASSPHRASE).returncode == 1
    opened.start()
    assert not opened.is_open()


def test_a_crash_closes_the_keystore(opened: FepServer) -> None:
    opened.psql("SELECT pg_terminate_backend(pg_backend_pid())", check=False)
    assert opened.is_open()
    backend = opened.popen("psql", "-X", "-d", "postgres", "-Atc", "SELECT pg_backend_pid()", "-c", "SELECT pg_sleep(60)")
    assert backend.stdout
    before = len(opened.said())
    os.kill(int(backend.stdout.readline()), 9)
    backend.communicate()
    deadline = time.monotonic() + 10
    while "reinitializing" not in opened.said()[before:] or opened.psql("SELECT 1", check=False) != "1":
        assert time.monotonic() < deadline, "the server did not come back"
        time.sleep(0.05)
    assert not opened.is_open()


# ---- tablespaces ----


def test_tablespaces_and_their_algorithms(opened: FepServer) -> None:
    algorithms = "SELECT spcname, spcencalgo FROM pgx_tablespaces JOIN pg_tablespace ON oid = spctablespace ORDER BY 1"
    a, b, c = (location(opened, name) for name in "abc")
    opened.psql(f"SET tablespace_encryption_algorithm = 'AES128'; CREATE TABLESPACE a LOCATION '{a}' {ENCRYPTED}")
    opened.psql(f"SET tablespace_encryption_algorithm = 'AES128'; CREATE TABLESPACE b LOCATION '{b}'")
    opened.psql(f"CREATE TABLESPACE c LOCATION '{c}' WITH (seq_page_cost = 2)")
    assert opened.psql(algorithms).split() == ["a|AES256", "b|AES128", "c|none", "pg_default|none", "pg_global|none"]

    # An unquoted word comes in small letters; what is not ours goes on to PostgreSQL.
    opened.psql("ALTER TABLESPACE c SET (tablespace_encryption_algorithm=AES256, random_page_cost=3)")
    assert opened.psql("SELECT spcoptions FROM pg_tablespace WHERE spcname = 'c'") == "{seq_page_cost=2,random_page_cost=3}"
    opened.psql("ALTER TABLESPACE b RESET (tablespace_encryption_algorithm)")
    assert opened.psql(algorithms).split()[:3] == ["a|AES256", "b|none", "c|AES256"]
    for wrong in ("AES192", "''"):
        assert state(opened, f"ALTER TABLESPACE c SET (tablespace_encryption_algorithm = {wrong})") == "22023"

    opened.psql("CREATE TABLE t (a int) TABLESPACE a")
    for change in ("SET (tablespace_encryption_algorithm = AES128)", "RESET (tablespace_encryption_algorithm)"):
        assert "not empty" in opened.psql(f"ALTER TABLESPACE a {change}", check=False)
    opened.psql("DROP TABLE t")
    opened.psql("ALTER TABLESPACE a SET (tablespace_encryption_algorithm = AES128)")
    for name in ("pg_default", "pg_global"):
        assert "ERROR" in opened.psql(f"ALTER TABLESPACE {name} SET (tablespace_encryption_algorithm = AES128)", check=False)
    assert opened.psql(algorithms).split() == ["a|AES128", "b|none", "c|AES256", "pg_default|none", "pg_global|none"]
    for name in "abc":
        opened.psql(f"DROP TABLESPACE {name}")


def test_what_a_closed_keystore_refuses(opened: FepServer) -> None:
    place, other = location(opened, "shut"), location(opened, "more")
    opened.psql(f"CREATE TABLESPACE shut LOCATION '{place}' {ENCRYPTED}")
    opened.psql("CREATE TABLE inside (a int) TABLESPACE shut; CREATE TABLE outside (a int); INSERT INTO inside VALUES (7)")
    opened.psql("CREATE TABLE indexed (a int); CREATE INDEX ON indexed (a) TABLESPACE shut")
    opened.restart()
    refused = [
        "TABLE inside", "INSERT INTO inside VALUES (1)", "COPY inside TO stdout", "TABLE indexed", "SELECT count(*) FROM outside, inside",
        "CREATE TABLE x (a int) TABLESPACE shut", "CREATE INDEX ON outside (a) TABLESPACE shut", "CREATE TABLE x TABLESPACE shut AS SELECT 1",
        "ALTER TABLE outside SET TABLESPACE shut", "CREATE DATABASE x TABLESPACE shut", f"CREATE TABLESPACE x LOCATION '{other}' {ENCRYPTED}",
        f"SET tablespace_encryption_algorithm = AES128; CREATE TABLESPACE x LOCATION '{other}'",
    ]  # fmt: skip
    for statement in refused:
        assert CLOSED in opened.psql(statement, check=False), statement
    opened.psql(f"TABLE outside; CREATE TABLESPACE x LOCATION '{other}'; DROP TABLESPACE x")
    opened.psql(call("pgx_open_keystore", PASSPHRASE))
    assert opened.psql("TABLE inside") == "7"
    opened.psql("DROP TABLE inside, outside, indexed; DROP TABLESPACE shut")


def test_a_standby_has_the_algorithm_and_opens_by_itself(opened: FepServer) -> None:
    place = location(opened, "streamed")
    opened.psql(f"CREATE TABLESPACE streamed LOCATION '{place}' {ENCRYPTED}")
    home = opened.home / "standby"
    home.mkdir()
    standby = FepServer(home)
    copy = [
        "-D",
        str(standby.data),
        "-R",
        "-X",
        "stream",
        "-c",
        "fast",
        "--no-sync",
        f"--tablespace-mapping={place}={home}/place",
    ]
    home.chmod(0o777)
    opened.run(f"{opened.bin}/pg_basebackup", "-h", str(opened.socket), *copy)
    standby.configure(keystore_location=str(standby.keystore))
    shutil.copy(opened.keystore / "keystore.ks", standby.keystore)
    shutil.chown(standby.keystore / "keystore.ks", postgres.USER, postgres.USER)
    standby.start()
    try:
        assert not standby.is_open()
        standby.psql(call("pgx_open_keystore", PASSPHRASE))
        assert state(standby, call("pgx_set_master_key", PASSPHRASE)) == "25006"
        assert standby.psql("SELECT spcencalgo FROM pgx_tablespaces WHERE spcencalgo <> 'none'") == "AES256"
    finally:
        standby.stop()
    opened.psql("DROP TABLESPACE streamed")


# ---- tde_z ----


@pytest.fixture(scope="module")
def token_host() -> t.Iterator[TokenHost]:
    if not support.opencryptoki_library():
        pytest.skip("openCryptoki is not installed")
    with postgres.folder() as home:
        opencryptoki = support.OpenCryptoki(home)
        opencryptoki.add_token("demo")
        with TokenHost(opencryptoki) as host:
            yield host


@pytest.fixture(scope="module")
def token_server(token_host: TokenHost) -> t.Iterator[FepServer]:
    with postgres.folder() as home:
        made = FepServer(home, token_host)
        made.initdb()
        made.configure(keystore_location=str(made.keystore), shared_preload_libraries="tde_z", tde_z__SLOT_ID="0")
        made.start()
        yield made
        made.stop()


@pytest.fixture
def tokened(token_server: FepServer) -> t.Iterator[FepServer]:
    """The server with a master key in the token, open; its parameters are put back."""
    conf = token_server.data / "postgresql.conf"
    kept = conf.read_text()
    if not token_server.is_open():
        # Perhaps with parameters that were put back.
        token_server.restart()
        token_server.psql(call("pgx_set_master_key", support.OCK_PIN))
    yield token_server
    conf.write_text(kept)


def key_labels(host: TokenHost, pin: str = support.OCK_PIN) -> list[str]:
    """Labels of the keys in the token."""

    def look() -> list[str]:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load

        token = load(host.opencryptoki.library_access()).raw.get_token(token_label="demo")
        with token.open(user_pin=pin) as session:
            return [key.label for key in list(session.get_objects())]

    return host.run(look)


def set_user_pin(host: TokenHost, old: str, new: str) -> None:
    """Change the user PIN, or with an empty ``old`` unlock it."""

    def act() -> None:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load

        token = load(host.opencryptoki.library_access()).raw.get_token(token_label="demo")
        if old:
            with token.open(rw=True, user_pin=old) as session:
                session.set_pin(old, new)
            return
        with token.open(rw=True, so_pin=support.OCK_SO_PIN) as session:
            session.init_pin(host.opencryptoki.factory_pin)
        with token.open(rw=True, user_pin=host.opencryptoki.factory_pin) as session:
            session.set_pin(host.opencryptoki.factory_pin, new)

    host.run(act)


def test_the_master_key_is_in_the_token(token_host: TokenHost, tokened: FepServer) -> None:
    before = key_labels(token_host)
    assert set(before) == {"FEP_MASTER_KEY"}
    tokened.psql(call("pgx_set_master_key", support.OCK_PIN))
    assert len(key_labels(token_host)) == len(before) + 1
    assert "already open" in tokened.psql(call("pgx_open_keystore", support.OCK_PIN), check=False)
    tokened.restart()
    assert not tokened.is_open()
    tokened.psql(call("pgx_open_keystore", support.OCK_PIN))
    place = location(tokened, "place")
    tokened.psql(f"CREATE TABLESPACE e LOCATION '{place}' {ENCRYPTED}; CREATE TABLE e (a int) TABLESPACE e")
    tokened.psql("DROP TABLE e; DROP TABLESPACE e")


def test_a_pin_that_is_changed_while_the_server_runs(token_host: TokenHost, tokened: FepServer) -> None:
    set_user_pin(token_host, support.OCK_PIN, "7654321")
    assert tokened.is_open()
    tokened.configure(tde_z__USER_PIN="7654321")
    tokened.restart()
    assert tokened.is_open()
    set_user_pin(token_host, "7654321", support.OCK_PIN)
    assert tokened.is_open()


def test_each_start_with_a_wrong_pin_spends_a_try(token_host: TokenHost, tokened: FepServer) -> None:
    kept = (tokened.data / "postgresql.conf").read_text()
    tokened.configure(tde_z__USER_PIN="9999999")
    for dummy in range(3):
        tokened.restart()
        assert not tokened.is_open()
    (tokened.data / "postgresql.conf").write_text(kept)
    tokened.restart()
    assert "CKR_PIN_LOCKED" in tokened.psql(call("pgx_open_keystore", support.OCK_PIN), check=False)
    set_user_pin(token_host, "", support.OCK_PIN)
    tokened.psql(call("pgx_open_keystore", support.OCK_PIN))


def test_pg_ctl_u(tokened: FepServer) -> None:
    tokened.restart(True, "-u", support.OCK_PIN)
    assert tokened.is_open()
    assert f"-u{support.OCK_PIN}".encode() not in _command_line(tokened)


def _command_line(server: FepServer) -> bytes:
    pid = (server.data / "postmaster.pid").read_text().split()[0]
    return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


def test_a_token_that_cannot_be_reached(token_host: TokenHost, tokened: FepServer) -> None:
    token_host.stop_daemon()
    try:
        tokened.restart()
        assert "C_Initialize failed" in tokened.psql(call("pgx_open_keystore", support.OCK_PIN), check=False)
    finally:
        token_host.start_daemon()
    token_host.member(False)
    try:
        assert "C_Initialize failed" in tokened.psql(call("pgx_open_keystore", support.OCK_PIN), check=False)
    finally:
        token_host.member(True)
    tokened.psql(call("pgx_open_keystore", support.OCK_PIN))
    tokened.configure(tde_z__SLOT_ID="4")
    tokened.restart()
    assert "CKR_TOKEN_NOT_PRESENT" in tokened.psql(call("pgx_open_keystore", support.OCK_PIN), check=False)


def test_the_keystore_of_a_file_is_not_taken(tokened: FepServer) -> None:
    tokened.configure(shared_preload_libraries="")
    tokened.stop()
    # Without the library its parameters are only words with a dot.
    tokened.start()
    assert "tde_z" in tokened.psql(call("pgx_open_keystore", PASSPHRASE), check=False)
    tokened.stop()


# ---- tde_kms ----

PLUGIN = """#!/bin/sh
echo "$(id -un) $*" >> "$(dirname "$0")/calls"
[ "$TDE_KMS_SECRET" = sesame ] || { echo "the secret is wrong" >&2; exit 3; }
case $1 in
    validate-key) [ "$3" != absent ] || { echo "no such key" >&2; exit 4; } ;;
    encrypt) printf '%s:' "$3"; cat ;;
    decrypt) dd bs=1 skip=$((${#3} + 1)) status=none ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture(scope="module")
def kms_server() -> t.Iterator[FepServer]:
    with postgres.folder() as home:
        made = FepServer(home)
        made.initdb()
        plugin = made.plugins / "plugin"
        plugin.write_text(PLUGIN)
        plugin.chmod(0o755)
        (made.data / "kms.conf").write_text(
            "# the first is not imitated\nkmip far far.example.com 5696 cert sslcert=a\n"
            f"custom one plugin arg=--profile arg=user1\ncustom two plugin kms-secret-obf={made.plugins}/two.obf\n"
        )
        made.configure(
            shared_preload_libraries="tde_kms", tde_kms__kms_conninfo_file="kms.conf", tde_kms__plugin_path=str(made.plugins)
        )
        made.start()
        made.psql("CREATE EXTENSION tde_kms")
        yield made
        made.stop()


def declare(kms_name: str, key_id: str, secret: str = "sesame") -> str:
    arguments = f"kms_name => '{kms_name}', key_id => '{key_id}', kms_secret => '{secret}'"
    return f"SELECT pgx_declare_external_master_key({arguments})"


def reopen(secret: str = "sesame") -> str:
    return f"SELECT pgx_open_keystore(kms_secret => '{secret}')"


def test_a_master_key_of_a_plugin(kms_server: FepServer) -> None:
    calls = kms_server.plugins / "calls"
    assert "no master encryption key" in kms_server.psql(reopen(), check=False)
    for wish, why in (
        (declare("far", "k"), "kmip"), (declare("none", "k"), 'no key management system "none"'),
        (declare("one", "k", "wrong"), "the secret is wrong"), (declare("one", "absent"), "no such key"),
        (call("pgx_set_master_key", PASSPHRASE), "declared"), (call("pgx_open_keystore", PASSPHRASE), "arguments"),
    ):  # fmt: skip
        assert why in kms_server.psql(wish, check=False)
    assert state(kms_server, f"BEGIN; {declare('one', 'k')}") == "25001"
    assert not kms_server.is_open()
    calls.unlink()

    kms_server.psql(declare("one", "k1"))
    assert kms_server.is_open()
    assert calls.read_text().splitlines() == [
        f"{postgres.USER} {verb} --keyid k1 --profile user1" for verb in ("validate-key", "encrypt", "validate-key", "decrypt")
    ]
    kms_server.psql(reopen())
    assert "the secret is wrong" in kms_server.psql(reopen("wrong"), check=False)
    assert kms_server.is_open()
    kms_server.restart()
    assert not kms_server.is_open()
    # Changing needs what the old master key wraps.
    assert CLOSED in kms_server.psql(declare("two", "k2"), check=False)
    kms_server.psql(reopen())
    kms_server.psql(declare("two", "k2"))


def test_opening_at_start_with_a_remembered_or_a_typed_secret(kms_server: FepServer) -> None:
    if not kms_server.is_open():
        kms_server.psql(reopen())
    kms_server.psql(declare("two", "k3"))
    remembered = kms_server.plugins / "two.obf"
    assert remembered.stat().st_mode & 0o777 == 0o600
    kms_server.restart()
    assert kms_server.is_open()
    remembered.unlink()
    kms_server.restart()
    assert not kms_server.is_open()
    kms_server.restart(True, "--kms-secret", secret="sesame")
    assert kms_server.is_open()
    assert kms_server.restart(False, "--kms-secret", secret="wrong").returncode == 1
    kms_server.start()


def test_a_file_keystore_and_a_kms_exclude_each_other(kms_server: FepServer) -> None:
    conf = kms_server.data / "postgresql.conf"
    kept = conf.read_text()
    kms_server.configure(keystore_location=str(kms_server.keystore))
    assert kms_server.restart(False).returncode == 1
    assert "exclude each other" in kms_server.said()
    conf.write_text(kept)
    kms_server.start()


def test_the_build_leaves_the_systems_server_as_it_is() -> None:
    built = fep.tree()
    system = postgres.programs()
    assert system
    assert b"fep_shim" not in Path(system, "postgres").read_bytes()
    assert b"fep_shim" in (built / "bin/postgres").read_bytes()
    stamp = (built / "stamp").stat().st_mtime_ns
    fep.tree.cache_clear()
    assert fep.tree() == built
    assert (built / "stamp").stat().st_mtime_ns == stamp
