# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Engine fep with tde_z: the real openCryptoki, and the stand-in for the server, which encrypts nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import typing as t
from unittest import mock

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import zipapp
from ansible_collections.hsm.tde.plugins.module_utils.engines.fep.act import Acts
from ansible_collections.hsm.tde.tests.integration import estate, fep, postgres, support
from ansible_collections.hsm.tde.tests.integration.fepestate import NEW_PIN, FepEstate

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not support.opencryptoki_library() or not postgres.programs(),
    reason="needs root, openCryptoki and PostgreSQL",
)

SLOTS = [{"name": "primary"}]
SPACE = [{"name": "sealed", "move": {"tables": ["public.people"]}}]


@pytest.fixture(scope="module")
def made() -> t.Iterator[FepEstate]:
    """A cluster that the engine created and configured, its server started: what the walk's first half leaves."""
    with postgres.folder() as home:
        token = support.OpenCryptoki(home / "opencryptoki")
        token.add_token("demo")
        with fep.TokenHost(token) as host:
            cluster = FepEstate(home, installation=token, host=host, keystore="hsm", create_cluster=True)
            planned = cluster.steps("tde_keystore", check=True, keyslots=SLOTS)
            assert planned == ["write_record", "create_cluster"]
            assert not cluster.server.data.exists()
            first = cluster.run("tde_keystore", keyslots=SLOTS)
            assert (first["restart_required"], first["start_required"], first["master_keys"]) == (True, True, [])
            # What comes next in a play has nothing to do yet, and says so.
            assert cluster.run("tde_keystore", state="open")["restart_required"]
            assert cluster.run("tde_master_key")["restart_required"]
            cluster.server.configure(fsync="off", autovacuum="off", log_statement="all", log_min_error_statement="debug5")
            cluster.server.start()
            try:
                yield cluster
            finally:
                cluster.server.stop()


@pytest.fixture
def cluster(made: FepEstate) -> FepEstate:
    """The cluster with its master key set, its keystore open, one encrypted tablespace and a table in it."""
    if not (made.home / "keystore-data/keystore.ks").exists():
        # The line that includes our file must stay the last, and the test appended settings.
        assert made.steps("tde_keystore", keyslots=SLOTS) == ["include_settings", "set_master_key"]
        made.server.psql(
            "CREATE TABLE people AS SELECT g AS id, 'a value that is known ' || g AS said FROM generate_series(1, 500) g"
        )
        made.run("tde_tablespace", tablespaces=SPACE)
    made.run("tde_keystore", state="open")
    return made


def master_keys(cluster: FepEstate) -> int:
    """How many master keys the server made in the token."""
    from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import find
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session

    installation, host = cluster.installation, cluster.host
    assert installation
    assert host
    access = installation.access(pin=cluster.pin)

    def count() -> int:
        with open_session(access, StateDirectory(str(cluster.home / "state-count"))) as session:
            return len(find(session, "FEP_MASTER_KEY", cls="secret"))

    return host.run(count)


def test_the_walk_is_done_once_and_again_after_a_restart(cluster: FepEstate) -> None:
    def nothing_to_do() -> None:
        assert cluster.steps("tde_keystore", keyslots=SLOTS) == []
        assert cluster.steps("tde_keystore", state="open") == []
        assert cluster.steps("tde_master_key") == []
        assert cluster.steps("tde_tablespace", tablespaces=SPACE) == []

    assert cluster.algorithms() == {"sealed": "AES256"}
    nothing_to_do()
    assert master_keys(cluster) == 1
    cluster.restart()
    assert not cluster.server.is_open()
    assert cluster.steps("tde_keystore", check=True, state="open") == ["open_keystore"]
    assert not cluster.server.is_open()
    assert cluster.steps("tde_keystore", state="open") == ["open_keystore"]
    assert cluster.server.is_open()
    nothing_to_do()
    assert master_keys(cluster) == 1
    assert cluster.secrets_shown(cluster.pin) == []


def test_a_keystore_that_somebody_else_opened_is_no_error(cluster: FepEstate) -> None:
    cluster.restart()
    cluster.server.psql(f"SET log_statement = 'none'; SELECT pgx_open_keystore('{cluster.pin}')")
    assert cluster.steps("tde_keystore", state="open") == []
    # Not asked again: it is known now.
    assert cluster.steps("tde_keystore", state="open", check=True) == []


def test_a_crash_of_the_server_closes_the_keystore_and_is_noticed(cluster: FepEstate) -> None:
    """The postmaster goes on and its start time stays: what was remembered must not be believed."""
    backend = cluster.server.popen("psql", "-XAtc", "SELECT pg_backend_pid(), pg_sleep(60)", "postgres")
    row = ""
    while not row:
        row = cluster.server.psql("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()")
    os.kill(int(row), 9)
    backend.wait()
    deadline = time.monotonic() + 20
    while cluster.server.psql("SELECT 1", check=False) != "1":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not cluster.server.is_open()
    assert cluster.steps("tde_keystore", state="open") == ["open_keystore"]
    assert cluster.server.is_open()


def test_what_the_stand_in_writes_is_plain_and_the_proof_says_so(cluster: FepEstate) -> None:
    proof = cluster.run("tde_proof", tablespaces=["sealed"], relations=["postgres.public.people"])
    assert [one["verdict"] for one in proof["proofs"]] == ["plain", "plain"]
    assert "20 of 20 values of its tables stand in the files as they are." in proof["proofs"][0]["reasons"]
    assert not proof["all_encrypted"]


def test_info_tells_without_a_pin_what_there_is_and_what_is_weak(cluster: FepEstate) -> None:
    info = cluster.run("tde_info", pin=None)
    keystore = info["keystore"]
    assert (keystore["kind"], keystore["made"], keystore["open"], keystore["pin_at_rest"]) == ("hsm", True, True, False)
    assert {one["name"]: one["encryption"] for one in info["tablespaces"]}["sealed"] == "engine"
    gaps = " ".join(info["gaps"])
    for words in ("recovery after a crash", "the server says"):
        assert words in gaps
    # On an overlay, as a container's root is, it does not show what is below.
    below = {one["encryption"] for one in info["tablespaces"] if one["name"] == "pg_default"}
    words = "in the clear: pg_default, pg_global" if below == {"plain"} else "encrypted below the server: pg_default, pg_global"
    assert words in gaps
    assert not info["encrypted"]


def test_rotated_by_a_tag_and_by_nothing_else(cluster: FepEstate) -> None:
    before = master_keys(cluster)
    tag = f"t{before}"
    assert cluster.steps("tde_master_key", check=True, state="rotated", tag=tag) == ["rotate_master_key"]
    assert master_keys(cluster) == before
    done = cluster.run("tde_master_key", state="rotated", tag=tag)
    assert done["master_key"] == f"fep.main.{tag}"
    assert cluster.steps("tde_master_key", state="rotated", tag=tag) == []
    assert cluster.steps("tde_master_key", state="rotated", max_age=1) == []
    assert master_keys(cluster) == before + 1
    assert cluster.steps("tde_master_key", state="rotated", tag=f"{tag}.b") == ["rotate_master_key"]
    cluster.refused("tde_master_key", "tag_superseded", state="rotated", tag=tag)
    cluster.restart()
    cluster.run("tde_keystore", state="open")
    assert cluster.server.is_open()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_rotation_that_was_killed_is_done_once(cluster: FepEstate, after: bool) -> None:
    """Before the server was asked it is done by the next run; after it, the keystore's file says that it was done."""
    tag, before = f"killed-{after}", master_keys(cluster)
    arguments = cluster.arguments(state="rotated", tag=tag)
    call = Acts._call

    def killed(self: Acts, *arguments: t.Any, **named: t.Any) -> None:
        if after:
            call(self, *arguments, **named)
        os._exit(9)

    def act() -> t.Any:
        with mock.patch.object(Acts, "_call", killed):
            return estate.act("tde_master_key", arguments, False)

    assert cluster.host
    with pytest.raises(support.ChildFailed):
        cluster.host.run(act)
    assert cluster.steps("tde_master_key", state="rotated", tag=tag) == ([] if after else ["rotate_master_key"])
    assert master_keys(cluster) == before + 1
    assert cluster.run("tde_master_key")["master_key"] == f"fep.main.{tag}"


def test_the_pin_changes_while_the_database_is_in_use(cluster: FepEstate) -> None:
    """No transaction fails, and the next start opens the keystore with the new PIN by itself."""
    options = {**cluster.options, "auto_open": True}
    former = cluster.pin
    fill = cluster.host.inside(f"{cluster.server.bin}/pgbench", "-h", str(cluster.server.socket), "-iq", "postgres")  # type: ignore[union-attr]
    subprocess.run(fill, check=True, capture_output=True)
    bench = cluster.server.popen("pgbench", "-c", "3", "-T", "4", "postgres")
    try:
        assert cluster.steps("tde_keystore", keyslots=SLOTS, fep=options) == ["write_include_file", "write_record"]
        assert f"tde_z.USER_PIN = '{former}'" in cluster.include()
        slots = [{"name": "primary", "pin": NEW_PIN}]
        steps = ["take_pin_out", "change_pin", "write_include_file"]
        assert cluster.steps("tde_keystore", check=True, keyslots=slots) == steps
        assert cluster.steps("tde_keystore", keyslots=slots) == steps
        cluster.pin = NEW_PIN
        assert cluster.steps("tde_keystore", keyslots=slots) == []
    finally:
        report = bench.communicate(timeout=60)[0]
    done, failed = postgres.pgbench_failures(report)
    assert (done > 100, failed) == (True, 0)
    path = cluster.home / "keystore-data/hsm-tde.conf"
    assert (path.stat().st_mode & 0o777, path.owner()) == (0o600, postgres.USER)
    assert former not in path.read_text()
    cluster.restart()
    assert cluster.server.is_open()
    assert cluster.steps("tde_keystore", state="open") == []
    assert cluster.secrets_shown(former, NEW_PIN) == []
    gaps = " ".join(cluster.run("tde_info", pin=None)["gaps"])
    assert "user PIN rests" in gaps


@pytest.mark.slow
def test_no_start_tries_a_wrong_pin_wherever_a_change_is_killed(cluster: FepEstate) -> None:
    """After each step that a kill may follow, the include file has no PIN, or one that the token takes."""
    cluster.run("tde_keystore", keyslots=SLOTS, fep={**cluster.options, "auto_open": True})
    pins = [cluster.pin, "24681357"]
    for stop in ("take_pin_out", "change_pin", "write_include_file"):
        arguments = cluster.arguments(keyslots=[{"name": "primary", "pin": pins[1]}])
        handlers = Acts.handlers

        def killed(self: Acts, stop: str = stop, handlers: t.Any = handlers) -> t.Any:
            found = dict(handlers(self))
            act = found[stop]

            def last(step: t.Any) -> None:
                act(step)
                os._exit(9)

            return {**found, stop: last}

        def act(killed: t.Any = killed, arguments: t.Any = arguments) -> t.Any:
            with mock.patch.object(Acts, "handlers", killed):
                return estate.act("tde_keystore", arguments, False)

        assert cluster.host
        with pytest.raises(support.ChildFailed):
            cluster.host.run(act)
        cluster.restart()
        at_rest = [pin for pin in pins if pin in cluster.include()]
        assert cluster.server.is_open() == bool(at_rest), f"killed after {stop}: a start tried a PIN that the token refused"
        cluster.run("tde_keystore", keyslots=[{"name": "primary", "pin": pins[1]}])
        cluster.pin = pins[1]
        assert pins[1] in cluster.include()
        pins.reverse()
    cluster.run("tde_keystore", keyslots=SLOTS, fep={**cluster.options, "auto_open": False})
    assert "USER_PIN" not in cluster.include()


def test_the_pin_that_other_means_changed_is_brought_up_to_date_where_it_rests(cluster: FepEstate) -> None:
    cluster.run("tde_keystore", keyslots=SLOTS, fep={**cluster.options, "auto_open": True})
    former, cluster.pin = cluster.pin, "11223344"
    assert cluster.host
    installation = cluster.installation
    assert installation
    arguments = {
        "new_pin": cluster.pin,
        "state_directory": str(cluster.state),
        **installation.options(token_label="demo", pin=former),
    }
    result = cluster.host.run(lambda: support.run_module("pkcs11_pin", arguments))
    assert result["changed"], result
    # A PIN is never written unproved.
    cluster.refused("tde_keystore", "pin_refused", keyslots=[{"name": "primary", "pin": "99999999"}], pin="99999999")
    assert cluster.steps("tde_keystore", keyslots=SLOTS, allow_low_pin_count=True) == ["write_include_file"]
    assert cluster.pin in cluster.include()
    cluster.run("tde_keystore", keyslots=SLOTS, fep={**cluster.options, "auto_open": False})


def test_the_boot_opens_it_with_the_pin_of_its_source(cluster: FepEstate) -> None:
    """hsm-tde open, without Ansible: after a start, and again nothing; and it says before whether it would work."""
    path = cluster.home / "boot.pin"
    source = {"kind": "file", "path": str(path)}
    assert "write_pin_source" in cluster.steps("tde_keystore", keyslots=SLOTS, pin_source=source)
    assert cluster.steps("tde_keystore", keyslots=SLOTS, pin_source=source) == []
    command = cluster.home / "hsm-tde"
    command.write_bytes(zipapp.build(sys.executable, str(cluster.state)))
    command.chmod(0o755)
    assert cluster.host

    def run(*arguments: str) -> tuple[int, t.Any]:
        argv = [str(command), *arguments, "--json"]
        done = cluster.host.run(lambda: subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False))  # type: ignore[union-attr]
        return done.returncode, json.loads(done.stdout)["clusters"]["main"]

    code, told = run("self-test", "main")
    assert code == 0, told
    assert {row["check"]: row["verdict"] for row in told["checks"]}["PIN"] == "ok"
    cluster.server.stop()
    code, told = run("open", "main")
    assert (code, told["error_code"]) == (6, "server_down")
    cluster.server.start()
    assert run("status", "main")[1]["open"] is False
    code, told = run("open", "main")
    assert (code, told["changed"]) == (0, True), told
    assert cluster.server.is_open()
    assert run("open", "main")[1]["changed"] is False


def test_bad_input_is_told_apart_and_changes_nothing(cluster: FepEstate) -> None:
    """Each its own error."""
    refused = cluster.refused
    refused("tde_keystore", "pin_length", keyslots=[{"name": "primary", "pin": "123456789"}])
    refused("tde_keystore", "engine_unsupported", keyslots=[*SLOTS, {"name": "recovery", "protection": "passphrase"}])
    refused(
        "tde_keystore", "engine_unsupported", keyslots=[{"name": "primary", "protection": "passphrase", "passphrase": "x" * 12}]
    )
    refused("tde_keystore", "token_unreachable", slot_id=7)
    refused("tde_keystore", "engine_unsupported", state="closed")
    file = {**cluster.options, "keystore": "file"}
    refused("tde_keystore", "protection_unchangeable", fep=file, passphrase="correct horse", keyslots=None)
    plugin = {**cluster.options, "auto_open": False, "keystore": "plugin", "plugin_directory": str(cluster.home / "plugins")}
    result = refused("tde_keystore", "protection_unchangeable", fep=plugin, keyslots=SLOTS)
    assert "not supported by Fujitsu Enterprise Postgres" in result["msg"]
    inside = {**cluster.options, "keystore_location": f"{cluster.server.data}/keystore"}
    refused("tde_keystore", "invalid_option", fep=inside, keyslots=SLOTS)
    refused("tde_keystore", "os_user_absent", fep={**cluster.options, "os_user": "nobody-here"}, keyslots=SLOTS)
    refused("tde_keystore", "server_refused", login_user="nobody", keyslots=SLOTS)
    refused("tde_master_key", "engine_unsupported", keyslot="recovery")
    assert cluster.host
    cluster.host.member(False)
    try:
        refused("tde_keystore", "opencryptoki_user_outside_group", keyslots=SLOTS)
    finally:
        cluster.host.member(True)


def test_tablespaces_that_cannot_be(cluster: FepEstate) -> None:
    refused = cluster.refused

    def space(**more: t.Any) -> list[dict[str, t.Any]]:
        return [{"name": "other", **more}]

    refused("tde_tablespace", "tablespace_not_empty", tablespaces=[{"name": "sealed", "algorithm": "AES128"}])
    refused("tde_tablespace", "tablespace_elsewhere", tablespaces=[{"name": "sealed", "location": "/srv/elsewhere"}])
    refused("tde_tablespace", "place_inside_data_directory", tablespaces=space(location=f"{cluster.server.data}/space"))
    refused("tde_tablespace", "place_not_empty", tablespaces=space(location=str(cluster.spaces / "sealed")))
    refused("tde_tablespace", "tablespace_name_reserved", tablespaces=[{"name": "pg_own"}])
    refused("tde_tablespace", "relation_absent", tablespaces=space(move={"tables": ["public.none"]}))
    cluster.restart()
    refused("tde_tablespace", "keystore_closed", tablespaces=space())
    assert "not known" in " ".join(cluster.run("tde_info")["gaps"])


def test_an_empty_tablespace_changes_its_algorithm(cluster: FepEstate) -> None:
    assert cluster.steps("tde_tablespace", tablespaces=[{"name": "small", "algorithm": "AES128"}])[-1] == "create_tablespace"
    assert cluster.steps("tde_tablespace", tablespaces=[{"name": "small"}]) == ["set_algorithm"]
    assert cluster.steps("tde_tablespace", tablespaces=[{"name": "small"}]) == []
    assert cluster.algorithms()["small"] == "AES256"


def test_what_sets_the_keystore_beside_us_is_named(cluster: FepEstate) -> None:
    cluster.server.psql("ALTER SYSTEM SET keystore_location = '/elsewhere'")
    try:
        result = cluster.refused("tde_keystore", "setting_overridden", keyslots=SLOTS)
        assert "postgresql.auto.conf" in result["msg"]
    finally:
        cluster.server.psql("ALTER SYSTEM RESET keystore_location")


def test_a_keystore_that_does_not_show_is_not_made_anew(cluster: FepEstate) -> None:
    """An unmounted folder looks like an empty one; setting a master key there would lose the data."""
    location = cluster.home / "keystore-data"
    aside = cluster.home / "aside"
    location.rename(aside)
    try:
        before = master_keys(cluster)
        cluster.refused("tde_keystore", "keystore_unreachable", keyslots=SLOTS)
        assert not location.exists()
        assert master_keys(cluster) == before
    finally:
        aside.rename(location)


def test_the_daemon_is_down(cluster: FepEstate) -> None:
    assert cluster.host
    cluster.restart()
    cluster.host.stop_daemon()
    try:
        result = cluster.answer("tde_keystore", state="open")
        assert result.get("cause") == "unreachable", result
        assert not cluster.server.is_open()
    finally:
        cluster.host.start_daemon()
    assert cluster.steps("tde_keystore", state="open") == ["open_keystore"]
