# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A cluster that is encrypted wholly: made, opened, closed, rotated, re-protected; on a real token, image and server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import typing as t

import pytest
from ansible_collections.hsm.tde.tests.integration import postgres
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS, Estate, estate, usable

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

MARKER = "hsmtde-marker-4711"


@pytest.fixture(scope="module")
def host() -> t.Iterator[Estate]:
    """A cluster with a row in it; its server runs."""
    with estate(coverage="cluster", data_directory="{home}/mnt/data", create_cluster=True) as made:
        made.refused("tde_keystore", "recovery_keyslot_missing", keyslots=SLOTS[:1])
        assert not made.state.joinpath("store").exists()
        planned = made.run_file("tde_keystore", check=True, keyslots=SLOTS)
        assert planned["changed"]
        assert not made.image.exists()
        pin = {"kind": "file", "path": str(made.home / "etc/pin")}
        result = made.run("tde_keystore", keyslots=SLOTS, pin_source=pin)
        assert [step["action"] for step in result["plan"]] == [step["action"] for step in planned["plan"]] + ["write_pin_source"]
        assert result["start_required"]
        assert made.hsm.pin not in json.dumps(result)
        assert PASSPHRASE not in json.dumps(result)
        assert (made.home / "etc/pin").read_text() == made.hsm.pin + "\n"
        assert (made.home / "etc/pin").stat().st_mode & 0o777 == 0o600
        made.server.start()
        made.server.psql(f"CREATE TABLE t AS SELECT g, '{MARKER} ' || g AS body FROM generate_series(1, 2000) g")
        made.server.psql("CREATE INDEX ON t (body); ANALYZE t; CHECKPOINT")
        yield made


def rows(host: Estate) -> str:
    return host.server.psql(f"SELECT count(*) FROM t WHERE body LIKE '{MARKER}%'")


def test_a_second_run_changes_nothing_and_needs_no_secret(host: Estate) -> None:
    assert not host.run_file("tde_keystore", keyslots=SLOTS)["changed"]
    assert not host.run("tde_keystore", keyslots=SLOTS, update_keyslots="on_create")["changed"]
    assert not host.run("tde_keystore", library=None, pin=None, token_label=None)["changed"]
    assert not host.run("tde_master_key")["changed"]
    assert not host.run("tde_keystore", state="open", pin=None, token_label=None)["changed"]


def test_nothing_of_the_cluster_stands_in_the_image(host: Estate) -> None:
    host.server.psql(
        "SET work_mem = '64kB'; SELECT count(*) FROM (SELECT body FROM t, generate_series(1, 20) ORDER BY body) s; CHECKPOINT"
    )
    # The control beside the places shows that the search would find plain text.
    assert host.raw("hsm.tde: this file is in the clear on purpose") == 1
    assert host.raw(MARKER) == 0
    assert host.raw("pg_catalog") == 0


def test_the_journal_tells_who_did_what_to_which_key(host: Estate) -> None:
    entries = host.journal()
    identifier = host.run("tde_info")["data_keys"][0]["check_value"]
    acts = {(entry["action"], entry["key_id"], entry["kcv"]) for entry in entries if entry["result"] == "done"}
    for action in ("create_data_key", "add_kernel_key", "make_place"):
        assert (action, "cluster", identifier) in acts
    assert any(entry["action"] == "generate_kek" and entry["kcv"] for entry in entries)
    assert all(entry["actor"] and entry["time"] for entry in entries)


def test_closing_is_refused_under_a_running_server_and_locks_a_stopped_one(host: Estate) -> None:
    host.refused("tde_keystore", "server_running", state="closed")
    host.refused("tde_keystore", "server_running", state="closed", check=True)
    host.server.stop()
    holder = subprocess.Popen(["sleep", "30"], cwd=host.server.data)
    try:
        host.refused("tde_keystore", "place_in_use", state="closed")
    finally:
        holder.kill()
        holder.wait()
    assert host.run("tde_keystore", state="closed")["changed"]
    assert not host.run("tde_keystore", state="closed")["changed"]
    assert not (host.server.data / "PG_VERSION").exists()
    assert host.server.start(check=False).returncode != 0
    info = host.run("tde_info")
    assert info["places"][0]["kernel_key"] == "absent"
    assert any("is closed" in gap for gap in info["gaps"])
    # "present" neither opens it nor takes the closed place for an empty one.
    assert not host.run("tde_keystore", keyslots=SLOTS, update_keyslots="on_create")["changed"]
    assert host.run("tde_keystore", state="open", check=True, pin=None)["changed"]
    assert host.run("tde_keystore", state="open")["changed"]
    host.server.start()
    assert rows(host) == "2000"


def test_after_a_reboot_the_recovery_keyslot_opens_it_where_the_token_is_missing(host: Estate) -> None:
    host.server.stop()
    host.unmount()
    with host.token_moved_away():
        host.refused("tde_keystore", "token_unreachable", state="open")
        host.refused("tde_keystore", "token_unreachable", keyslots=SLOTS)
        host.refused("tde_keystore", "token_unreachable", keyslots=SLOTS, update_keyslots="on_create")
        host.refused("tde_master_key", "token_unreachable", state="rotated", tag="lost")
        host.refused("tde_keystore", "token_unreachable", check=True, keyslots=SLOTS)
        host.refused(
            "tde_keystore", "passphrase_refused", state="open", library=None, token_label=None, pin=None, passphrase="wrong " * 4
        )
        assert not os.path.ismount(host.mount)
        result = host.run("tde_keystore", state="open", library=None, token_label=None, pin=None, passphrase=PASSPHRASE)
        assert [step["action"] for step in result["plan"]][:: len(result["plan"]) - 1] == ["mount_image", "add_kernel_key"]
        host.server.start()
        assert rows(host) == "2000"
    assert not host.run("tde_keystore", state="open")["changed"]


def test_after_a_reboot_present_mounts_the_storage_and_leaves_the_place_as_it_is(host: Estate) -> None:
    host.server.stop()
    host.unmount()
    result = host.run("tde_keystore", keyslots=SLOTS)
    assert {step["action"] for step in result["plan"]} <= {"mount_image", "prepare_root"}
    assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
    assert host.run("tde_keystore", state="open")["changed"]
    host.server.start()
    assert rows(host) == "2000"


def test_a_crashed_server_whose_mount_is_gone_writes_no_plain_text(host: Estate) -> None:
    host.server.psql(f"INSERT INTO t SELECT g, '{MARKER} ' || g FROM generate_series(2001, 2010) g")
    host.server.kill()
    host.unmount()
    below = {path.name for path in host.mount.iterdir()}
    assert host.server.start(check=False).returncode != 0
    assert {path.name for path in host.mount.iterdir()} == below == set()
    # Nor does any run of ours make something there.
    info = host.run("tde_info")
    assert any("does not show" in gap for gap in info["gaps"])
    host.run("tde_keystore", state="open")
    host.server.start()
    assert rows(host) == "2010"
    host.server.psql("DELETE FROM t WHERE g > 2000")


def test_a_lost_image_store_or_journal_is_unreachable_and_nothing_is_made_in_its_place(host: Estate) -> None:
    host.server.stop()
    host.unmount()
    for path, code in ((host.image, "image_absent"), (host.state / "store", "keystore_unreachable")):
        aside = host.home / "aside"
        path.rename(aside)
        try:
            host.refused("tde_keystore", code, keyslots=SLOTS)
            host.refused("tde_keystore", code, state="open")
        finally:
            aside.rename(path)
    record = host.state / "clusters/main.json"
    content = record.read_text()
    record.unlink()
    try:
        # The journal remembers the place.
        host.refused(
            "tde_keystore", "image_absent", keyslots=SLOTS, postgresql={**host.options, "image": str(host.home / "other")}
        )
    finally:
        record.write_text(content)
        record.chmod(0o600)
    host.run("tde_keystore", state="open")
    host.server.start()


def test_rotation_is_online_keeps_the_former_master_key_and_is_done_once(host: Estate) -> None:
    assert host.server.popen("pgbench", "-i", "-q", "-s", "1", "postgres").wait(60) == 0
    started = host.server.psql("SELECT pg_postmaster_start_time()")
    load = host.server.popen("pgbench", "-n", "-c", "4", "-T", "4", "postgres")
    time.sleep(0.5)
    result = host.run("tde_master_key", state="rotated", tag="2")
    assert result["changed"]
    assert result["master_key"] == "hsm-tde.main.2"
    assert not host.run("tde_master_key", state="rotated", tag="2")["changed"]
    assert not host.run("tde_master_key", state="rotated", max_age=1)["changed"]
    output = load.communicate(timeout=60)[0]
    done, failed = postgres.pgbench_failures(output)
    assert (load.returncode, failed) == (0, 0), output
    assert done > 100
    assert host.server.psql("SELECT pg_postmaster_start_time()") == started
    assert [len(host.in_token(label)) for label in ("hsm-tde.main", "hsm-tde.main.2")] == [1, 1]
    assert any(entry["action"] == "rotate_master_key" and entry["detail"]["tag"] == "2" for entry in host.journal())
    host.refused("tde_master_key", "rotation_unsupported", state="rotated", tag="3", keyslot="recovery")


def test_a_passphrase_and_a_token_are_changed_by_adding_proving_removing(host: Estate) -> None:
    new = "another horse battery"
    changed = {**RECOVERY, "passphrase": new}
    result = host.run("tde_keystore", keyslots=[SLOTS[0], changed])
    assert [step["action"] for step in result["plan"]] == ["add_keyslot", "prove_keyslot", "remove_keyslot"]
    assert not host.run("tde_keystore", keyslots=[SLOTS[0], changed])["changed"]
    host.run("tde_keystore", keyslots=[SLOTS[0], RECOVERY])
    # To the second token, opened by the first; the file for the boot follows.
    second = {"name": "primary", "token_label": "second", "pin": host.hsm.pin}
    result = host.run("tde_keystore", keyslots=[second, RECOVERY])
    assert result["data_keys"]["cluster"]["keyslots"]["primary"] == "hsm-tde.main.2 in token second"
    assert not host.run("tde_keystore", keyslots=[second, RECOVERY])["changed"]
    # Back, the first token alone being named, the passphrase opening it.
    result = host.run("tde_keystore", keyslots=[SLOTS[0], RECOVERY], passphrase=PASSPHRASE)
    assert result["data_keys"]["cluster"]["keyslots"]["primary"] == "hsm-tde.main.2 in token demo"
    host.refused("tde_keystore", "recovery_keyslot_missing", keyslots=[SLOTS[0]], keyslots_exclusive=True)
    third = {**RECOVERY, "name": "third"}
    assert set(host.run("tde_keystore", keyslots=[*SLOTS, third])["data_keys"]["cluster"]["keyslots"]) == {
        "primary",
        "recovery",
        "third",
    }
    host.run("tde_keystore", keyslots=SLOTS, keyslots_exclusive=True)
    info = host.run("tde_info")
    assert {slot["name"] for slot in info["data_keys"][0]["keyslots"]} == {"primary", "recovery"}
    assert "hsm-tde.main.2 in token second" in info["data_keys"][0]["formerly"]


def test_wrong_credentials_change_nothing_and_a_wrong_pin_is_tried_once(host: Estate) -> None:
    host.refused("tde_keystore", "pin_refused", keyslots=SLOTS, pin="wrong-pin")
    host.refused("tde_keystore", "pin_refused_before", keyslots=SLOTS, pin="wrong-pin")
    # The token counts it; one right login resets that.
    host.refused("tde_keystore", "pin_tries_low", keyslots=SLOTS)
    assert not host.run("tde_keystore", keyslots=SLOTS, allow_low_pin_count=True)["changed"]
    host.refused("tde_keystore", "credential_missing", keyslots=[*SLOTS, {"name": "more", "protection": "passphrase"}])
    host.refused("tde_keystore", "invalid_option", keyslots=[*SLOTS, SLOTS[0]])
    host.refused("tde_keystore", "token_absent", keyslots=SLOTS, token_label="nosuch")
    host.refused(
        "tde_keystore", "invalid_option", keyslots=SLOTS, postgresql={**host.options, "data_directory": str(host.mount / "other")}
    )
    host.refused("tde_keystore", "image_shrink", keyslots=SLOTS, postgresql={**host.options, "image_size": "100M"})
    host.refused("tde_keystore", "os_user_absent", keyslots=SLOTS, postgresql={**host.options, "os_user": "nosuchuser"})
    host.refused("tde_keystore", "cluster_unknown", cluster="unknown", state="open")


def test_a_forged_directory_or_a_foreign_key_is_not_opened(host: Estate) -> None:
    host.server.stop()
    host.run("tde_keystore", state="closed")
    data = host.server.data
    data.rename(host.mount / "aside")
    try:
        host.refused("tde_keystore", "place_unreachable", state="open")
        host.refused("tde_keystore", "place_unreachable", keyslots=SLOTS)
        data.mkdir(mode=0o700)
        shutil.chown(data, "postgres", "postgres")
        try:
            host.refused("tde_keystore", "place_unreachable", state="open")
            host.refused("tde_keystore", "place_unreachable", keyslots=SLOTS)
        finally:
            data.rmdir()
    finally:
        (host.mount / "aside").rename(data)
    host.run("tde_keystore", state="open")
    host.server.start()
    assert rows(host) == "2000"
