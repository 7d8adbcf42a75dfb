# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Engine fep with its keystore in a file, on a standby, and behind a plugin; the stand-in for the server encrypts nothing."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import units, zipapp
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection
from ansible_collections.hsm.tde.plugins.module_utils.engines.fep import sql
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import server as servers
from ansible_collections.hsm.tde.tests.integration import fep, fepestate, postgres, support, userhost
from ansible_collections.hsm.tde.tests.integration.fepestate import NEW_PASSPHRASE, PASSPHRASE, FepEstate

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not support.softhsm_library() or not postgres.programs(), reason="needs root, SoftHSM and PostgreSQL"
)

SLOTS = [{"name": "primary", "protection": "passphrase", "passphrase": PASSPHRASE}]
NEW_SLOTS = [{"name": "primary", "protection": "passphrase", "passphrase": NEW_PASSPHRASE}]
TOKEN_SLOTS = [{"name": "primary"}]


@pytest.fixture(scope="module")
def file_cluster() -> t.Iterator[FepEstate]:
    """A cluster with a keystore in a file, made and open, and one encrypted tablespace."""
    with postgres.folder() as home, fepestate.file_estate(home) as cluster:
        first = cluster.run("tde_keystore", keyslots=SLOTS)
        assert first["restart_required"]
        cluster.restart()
        # A passphrase that the manual does not allow is refused before the server is asked.
        short = [{**SLOTS[0], "passphrase": "2short"}]
        cluster.refused("tde_keystore", "passphrase_length", keyslots=short)
        assert cluster.steps("tde_keystore", keyslots=SLOTS) == ["set_master_key"]
        cluster.run("tde_tablespace", tablespaces=[{"name": "sealed"}])
        yield cluster


def key(cluster: FepEstate) -> str:
    """What identifies the master key in the stand-in's file."""
    return next(line for line in (cluster.home / "keystore-data/keystore.ks").read_text().splitlines() if line.startswith("key "))


def test_the_passphrase_changes_and_the_key_stays(file_cluster: FepEstate) -> None:
    cluster, before = file_cluster, key(file_cluster)
    assert cluster.steps("tde_keystore", keyslots=SLOTS) == []
    # The role configures again with the first passphrase: an existing keystore is left as it is.
    assert cluster.steps("tde_keystore", passphrase=PASSPHRASE, keyslots=NEW_SLOTS, update_keyslots="on_create") == []
    cluster.refused("tde_keystore", "credential_missing", keyslots=NEW_SLOTS)
    wrong = "no passphrase of this keystore"
    cluster.refused("tde_keystore", "passphrase_change_refused", passphrase=wrong, keyslots=NEW_SLOTS)
    changed = cluster.run("tde_keystore", passphrase=PASSPHRASE, keyslots=NEW_SLOTS)
    assert [step["action"] for step in changed["plan"]] == ["change_passphrase"]
    assert "back the keystore up now" in changed["warnings"][0]
    assert cluster.steps("tde_keystore", passphrase=PASSPHRASE, keyslots=NEW_SLOTS) == []
    assert key(cluster) == before
    cluster.restart()
    cluster.refused("tde_keystore", "keystore_not_opened", state="open", passphrase=PASSPHRASE)
    cluster.refused("tde_keystore", "credential_missing", state="open")
    assert cluster.steps("tde_keystore", state="open", passphrase=NEW_PASSPHRASE) == ["open_keystore"]
    cluster.run("tde_keystore", passphrase=NEW_PASSPHRASE, keyslots=SLOTS)
    assert cluster.secrets_shown(PASSPHRASE, NEW_PASSPHRASE, wrong) == []


def test_what_the_boot_unit_may_do_is_enough_to_see_the_server(file_cluster: FepEstate) -> None:
    """Of another user's process the kernel shows the working directory to CAP_SYS_PTRACE only."""
    bounds = re.findall(
        r"^CapabilityBoundingSet=(.*)$", units.template("/usr/local/sbin/hsm-tde", "/var/lib/hsm-tde"), re.MULTILINE
    )
    kept = ",".join("+" + word.removeprefix("CAP_").lower() for line in bounds for word in line.split())
    code = f"from {servers.__name__} import postmaster; print(postmaster({str(file_cluster.server.data)!r}).pid)"
    argv = ["setpriv", f"--bounding-set=-all,{kept}", sys.executable, "-c", code]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == (file_cluster.server.data / "postmaster.pid").read_text().split()[0], done.stderr


def test_a_task_waits_while_the_unit_opens_it(file_cluster: FepEstate) -> None:
    """After a restart by the role both come at once."""
    with subprocess.Popen(["flock", str(file_cluster.state / "lock"), "sleep", "2"]):
        time.sleep(0.2)
        assert file_cluster.steps("tde_keystore", keyslots=SLOTS) == []


def test_it_opens_by_itself_where_that_is_wished(file_cluster: FepEstate) -> None:
    cluster = file_cluster
    automatic = {**cluster.options, "auto_open": True}
    assert cluster.steps("tde_keystore", keyslots=SLOTS, fep=automatic) == ["write_record", "enable_auto_open"]
    assert cluster.steps("tde_keystore", keyslots=SLOTS, fep=automatic) == []
    cluster.restart()
    assert cluster.server.is_open()
    assert cluster.steps("tde_keystore", state="open", check=True) == []
    assert cluster.steps("tde_keystore", state="open", passphrase=PASSPHRASE) == []
    cluster.run("tde_master_key", state="rotated", tag="2", passphrase=PASSPHRASE)
    cluster.restart()
    assert cluster.server.is_open(), "keystore.aks follows the master key"
    manual = {**cluster.options, "auto_open": False}
    assert cluster.steps("tde_keystore", keyslots=SLOTS, fep=manual) == ["write_record", "disable_auto_open"]
    cluster.restart()
    assert not cluster.server.is_open()
    assert (cluster.home / "keystore-data/keystore.ks").exists()
    cluster.run("tde_keystore", state="open", passphrase=PASSPHRASE)


def test_one_kind_of_keystore_never_becomes_another(file_cluster: FepEstate) -> None:
    plugin = {**file_cluster.options, "keystore": "plugin", "plugin_directory": str(file_cluster.server.plugins)}
    with postgres.folder() as home:
        token = support.SoftHsm(home)
        token.add_token("demo")
        result = file_cluster.refused(
            "tde_keystore", "protection_unchangeable", fep=plugin, **token.options(token_label="demo", pin=token.pin)
        )
    assert "not supported by Fujitsu Enterprise Postgres" in result["msg"]


def test_data_moves_into_it_as_on_stock_postgresql(file_cluster: FepEstate) -> None:
    cluster = file_cluster
    cluster.server.psql(
        "CREATE SCHEMA app; CREATE TABLE app.people (id int PRIMARY KEY, said text); INSERT INTO app.people VALUES (1, 'x')"
    )
    wish = [{"name": "sealed", "move": {"schemas": ["app"]}}]
    assert cluster.steps("tde_tablespace", tablespaces=wish) == ["move_relation", "move_relation"]
    assert cluster.steps("tde_tablespace", tablespaces=wish) == []
    lies = "SELECT spcname FROM pg_class c JOIN pg_tablespace s ON s.oid = c.reltablespace WHERE relname = 'people_pkey'"
    assert cluster.server.psql(lies) == "sealed"


def test_others_cannot_slip_a_function_under_its_name(file_cluster: FepEstate) -> None:
    """Anybody may make a function of that name; the passphrase goes to superusers' functions only."""
    cluster = file_cluster
    trap = (
        "CREATE ROLE mallory; CREATE SCHEMA trap AUTHORIZATION mallory; CREATE TABLE trap.got (p text); ALTER TABLE trap.got OWNER TO mallory;"
        "SET ROLE mallory; CREATE FUNCTION trap.pgx_set_masterkey(p text) RETURNS void LANGUAGE sql AS 'INSERT INTO trap.got VALUES ($1)';"
        "CREATE FUNCTION trap.pgx_open_keystore(p text) RETURNS void LANGUAGE sql AS 'INSERT INTO trap.got VALUES ($1)'"
    )
    cluster.server.psql(trap)
    cluster.restart()
    cluster.run("tde_keystore", state="open", passphrase=PASSPHRASE)
    cluster.run("tde_master_key", state="rotated", tag="after-the-trap", passphrase=PASSPHRASE)
    rename = "SET allow_system_table_mods = on; ALTER FUNCTION pg_catalog.{}(text) RENAME TO {}"
    cluster.server.psql(rename.format("pgx_set_master_key", "away"))
    try:
        cluster.refused("tde_master_key", "server_other_product", state="rotated", tag="trapped", passphrase=PASSPHRASE)
    finally:
        cluster.server.psql(rename.format("away", "pgx_set_master_key"))
    assert cluster.server.psql("SELECT count(*) FROM trap.got") == "0"


def test_libraries_that_log_are_silent_in_the_session_that_sends_a_secret(file_cluster: FepEstate) -> None:
    """pgaudit with log_parameter, and auto_explain of PostgreSQL 16, wrote the passphrase to the server's log."""
    server = file_cluster.server
    access = sql.access(Connection(), postgres.USER, socket=str(server.socket), port=None)
    port = server.psql("SHOW port")
    with sql.quiet(dataclasses.replace(access, port=int(port))) as session:
        shown = {
            name: session.execute("SELECT current_setting(%s)", (name,)).fetchone()
            for name in ("pgaudit.log", "pgaudit.log_parameter", "auto_explain.log_min_duration")
        }
    assert shown == {"pgaudit.log": ("none",), "pgaudit.log_parameter": ("off",), "auto_explain.log_min_duration": ("-1",)}


def test_an_older_spelling_of_the_function_is_used_where_it_is_the_one(file_cluster: FepEstate) -> None:
    cluster, before = file_cluster, key(file_cluster)
    cluster.server.psql(
        "SET allow_system_table_mods = on; ALTER FUNCTION pg_catalog.pgx_set_master_key(text) RENAME TO pgx_set_masterkey"
    )
    cluster.run("tde_master_key", state="rotated", tag="spelling", passphrase=PASSPHRASE)
    assert key(cluster) != before


@pytest.fixture(scope="module")
def standby(file_cluster: FepEstate) -> t.Iterator[FepEstate]:
    """A streaming standby, configured, with a keystore folder of its own, which is empty."""
    primary = file_cluster
    made = FepEstate(primary.home, keystore="file", name="standby")
    for path in (made.server.data, made.spaces, made.server.socket.with_name("other"), made.server.log.with_name("otherlog")):
        path.mkdir(exist_ok=True)
        shutil.chown(path, postgres.USER, postgres.USER)
    made.server.socket, made.server.log = made.server.socket.with_name("other"), made.server.log.with_name("otherlog")
    mapping = [f"--tablespace-mapping={path}={made.spaces / path.name}" for path in primary.spaces.iterdir()]
    argv = [
        f"{primary.server.bin}/pg_basebackup",
        "-h",
        str(primary.server.socket),
        "-D",
        str(made.server.data),
        "-R",
        "-c",
        "fast",
    ]
    primary.server.run(*argv, *mapping)
    made.server.data.chmod(0o700)
    made.server.start()
    try:
        # The copied postgresql.conf includes the primary's file, which no other host has; here it is on the same one.
        assert made.run("tde_keystore", keyslots=SLOTS)["restart_required"]
        made.restart()
        yield made
    finally:
        made.server.stop()


@pytest.mark.slow
def test_a_standby_is_supplied_and_promoted(file_cluster: FepEstate, standby: FepEstate) -> None:
    """It makes no keystore of its own; a copied keystore.ks serves it, a copied keystore.aks does not."""
    primary = file_cluster
    primary.run("tde_keystore", keyslots=SLOTS, fep={**primary.options, "auto_open": True})
    result = standby.refused("tde_keystore", "standby_unsupplied", keyslots=SLOTS)
    assert "never keystore.aks" in result["msg"]

    own = Path(standby.options["keystore_location"])
    for name in ("keystore.ks", "keystore.aks"):
        shutil.copy2(Path(primary.options["keystore_location"]) / name, own / name)
    # Copied as root: only the server's user may read it.
    assert (
        standby.steps("tde_keystore", keyslots=SLOTS, fep={**standby.options, "auto_open": True}, check=True)[0]
        == "protect_keystore"
    )
    for name in ("keystore.ks", "keystore.aks"):
        shutil.chown(own / name, postgres.USER, postgres.USER)
    # The copied file says another machine; here both are one.
    aks = own / "keystore.aks"
    aks.write_text(
        "".join("machine elsewhere\n" if line.startswith("machine") else line for line in aks.read_text().splitlines(True))
    )
    standby.restart()
    assert not standby.server.is_open()
    gaps = " ".join(standby.run("tde_info")["gaps"])
    for words in ("keystore.aks was not made on this host", "This is a standby", "a copied keystore.aks opens nothing"):
        assert words in gaps
    assert standby.steps("tde_keystore", state="open", passphrase=PASSPHRASE) == ["open_keystore"]
    standby.refused("tde_master_key", "server_is_standby", state="rotated", tag="x", passphrase=PASSPHRASE)
    standby.refused("tde_tablespace", "server_is_standby", tablespaces=[{"name": "own"}])
    standby.restart()
    standby.server.run(f"{standby.server.bin}/pg_ctl", "-D", str(standby.server.data), "-w", "promote")
    # Promoted with a copied .aks: the keystore is closed, and no tablespace is made before it is open.
    standby.refused("tde_tablespace", "keystore_closed", tablespaces=[{"name": "own"}])
    standby.refused("tde_keystore", "credential_missing", state="open")
    assert standby.steps("tde_keystore", state="open", passphrase=PASSPHRASE) == ["open_keystore"]
    automatic = {**standby.options, "auto_open": True}
    assert standby.steps("tde_keystore", keyslots=SLOTS, fep=automatic) == ["write_record", "enable_auto_open"]
    standby.restart()
    assert standby.server.is_open()
    primary.run("tde_keystore", keyslots=SLOTS, fep={**primary.options, "auto_open": False})


# --- tde_kms with the plugin that hsm-tde answers


@pytest.fixture(scope="module")
def plugin_cluster() -> t.Iterator[FepEstate]:
    """A cluster whose master key is a key of a SoftHSM token, by the plugin; declared and open."""
    with postgres.folder() as home:
        host = userhost.UserHost(home)
        cluster = FepEstate(
            home, installation=host.softhsm, keystore="plugin", plugin_directory=str(home / "plugins"), command=str(host.command)
        )
        del cluster.options["keystore_location"]
        host.command.write_bytes(zipapp.build(sys.executable, str(cluster.state)))
        cluster.server.initdb()
        cluster.server.start()
        try:
            assert cluster.run("tde_keystore", keyslots=TOKEN_SLOTS, pin_source=source(cluster))["restart_required"]
            cluster.restart()
            steps = cluster.steps("tde_keystore", keyslots=TOKEN_SLOTS, pin_source=source(cluster))
            assert steps == ["create_extension", "make_key", "declare_master_key"]
            yield cluster
        finally:
            cluster.server.stop()


def source(cluster: FepEstate) -> dict[str, str]:
    return {"kind": "file", "path": str(cluster.home / "plugin.pin")}


def test_the_master_key_lies_in_any_token(plugin_cluster: FepEstate) -> None:
    cluster = plugin_cluster
    for dummy in range(2):
        assert cluster.steps("tde_keystore", keyslots=TOKEN_SLOTS, pin_source=source(cluster)) == []
        assert cluster.steps("tde_master_key") == []
        assert cluster.steps("tde_keystore", state="open") == []
        cluster.run("tde_tablespace", tablespaces=[{"name": "sealed"}])
        cluster.restart()
        assert not cluster.server.is_open()
        assert cluster.steps("tde_keystore", state="open", pin=None, library=None, token_label=None) == ["open_keystore"]
        assert cluster.server.is_open()
    assert cluster.algorithms() == {"sealed": "AES256"}
    assert cluster.run("tde_info", pin=None)["master_keys"][0]["label"] == "hsm-tde.main"
    assert cluster.secrets_shown(cluster.pin) == []


def test_its_key_changes_under_a_new_name(plugin_cluster: FepEstate) -> None:
    cluster = plugin_cluster
    steps = ["write_connection_file", "reload_server", "make_key", "declare_master_key"]
    assert cluster.steps("tde_master_key", state="rotated", tag="2") == steps
    assert cluster.steps("tde_master_key", state="rotated", tag="2") == []
    assert cluster.run("tde_master_key")["master_key"] == "hsm-tde.main.2"
    lines = (cluster.server.data / "hsm-tde-kms.conf").read_text().splitlines()
    assert lines[1:] == ["custom hsm-tde hsm-tde arg=--cluster arg=main", "custom hsm-tde.2 hsm-tde arg=--cluster arg=main"]
    cluster.restart()
    assert cluster.steps("tde_keystore", state="open") == ["open_keystore"]
    assert cluster.server.is_open()


def test_a_plugin_that_refuses_is_told(plugin_cluster: FepEstate) -> None:
    """The token is away: the server says what its plugin said, and nothing is called absent or made anew."""
    cluster = plugin_cluster
    assert isinstance(cluster.installation, support.SoftHsm)
    tokens = cluster.installation.tokendir
    aside = cluster.home / "aside"
    cluster.restart()
    tokens.rename(aside)
    tokens.mkdir()
    shutil.chown(tokens, postgres.USER, postgres.USER)
    try:
        result = cluster.refused("tde_keystore", "keystore_not_opened", state="open")
        assert "the plug-in of" in result["msg"]
        cluster.refused("tde_keystore", "token_unreachable", keyslots=TOKEN_SLOTS, pin_source=source(cluster))
        assert list(tokens.iterdir()) == []
    finally:
        tokens.rmdir()
        aside.rename(tokens)
    assert cluster.steps("tde_keystore", state="open") == ["open_keystore"]


def test_the_boot_opens_it_without_a_pin_of_root_s(plugin_cluster: FepEstate) -> None:
    cluster = plugin_cluster
    cluster.restart()
    argv = [cluster.options["command"], "open", "main", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert cluster.server.is_open()
    told = subprocess.run([*argv[:1], "self-test", "main"], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout
    assert fep.STANDIN.exists()


# --- what must not be taken for something else


def test_another_server_is_sent_nothing(file_cluster: FepEstate, plugin_cluster: FepEstate) -> None:
    """Fleets have the same paths on every host: a login to another one must not set or rotate its master key."""
    other = {"passphrase": PASSPHRASE, "login_unix_socket": str(plugin_cluster.server.socket)}
    for module, wish in (
        ("tde_keystore", {"keyslots": SLOTS}),
        ("tde_keystore", {"state": "open"}),
        ("tde_master_key", {"state": "rotated", "tag": "elsewhere"}),
        ("tde_tablespace", {"tablespaces": [{"name": "sealed", "move": {"databases": ["postgres"]}}]}),
    ):
        file_cluster.refused(module, "server_foreign", **other, **wish)


def test_what_does_not_show_is_not_made_anew(file_cluster: FepEstate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is not mounted, another folder named by mistake: no second cluster, no second master key."""
    cluster, data = file_cluster, file_cluster.server.data
    creating = {**cluster.options, "create_cluster": True}
    moved = {**cluster.options, "keystore_location": str(cluster.home / "keystore-moved")}
    cluster.refused("tde_keystore", "keystore_unreachable", keyslots=SLOTS, fep=moved)
    # A host whose journal knows nothing: the keystore was made by hand.
    monkeypatch.setattr(cluster, "state", cluster.home / "state-adopting")
    result = cluster.refused("tde_keystore", "keystore_unreachable", keyslots=SLOTS, fep=moved)
    assert cluster.options["keystore_location"] in result["msg"]
    assert cluster.steps("tde_keystore", passphrase=PASSPHRASE, keyslots=SLOTS) == ["write_record"]
    cluster.refused("tde_keystore", "keystore_unreachable", keyslots=SLOTS, fep=moved)
    assert not Path(moved["keystore_location"]).exists()

    cluster.server.stop()
    away = data.with_name("away")
    data.rename(away)
    data.mkdir(mode=0o700)
    shutil.chown(data, postgres.USER, postgres.USER)
    try:
        cluster.refused("tde_keystore", "place_unreachable", keyslots=SLOTS, fep=creating)
        assert list(data.iterdir()) == []
    finally:
        data.rmdir()
        away.rename(data)
        cluster.server.start()
    assert cluster.steps("tde_keystore", state="open", passphrase=PASSPHRASE) == ["open_keystore"]
