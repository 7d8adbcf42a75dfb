# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine in other surroundings: Debian's packaged clusters, a directory as storage, openCryptoki, an initdb that was killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import server as servers
from ansible_collections.hsm.tde.tests.integration import estate as estates
from ansible_collections.hsm.tde.tests.integration import postgres, support
from ansible_collections.hsm.tde.tests.integration.estate import SLOTS, Estate, estate, usable

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]


@pytest.mark.skipif(not shutil.which("pg_createcluster"), reason="needs Debian's postgresql-common")
def test_a_packaged_cluster_is_created_started_by_its_own_tools_and_closed() -> None:
    version = (postgres.programs() or "").split("/")[-2]
    name = f"hsmtde{os.getpid()}"
    more = {
        "coverage": "cluster",
        "data_directory": "{home}/mnt/data",
        "create_cluster": True,
        "debian_cluster": f"{version}/{name}",
    }
    with estate(**more) as host:
        try:
            result = host.run("tde_keystore", keyslots=SLOTS, login_unix_socket=None)
            assert "pg_createcluster" in {step["why"] for step in result["plan"]}
            assert result["start_required"]
            assert not host.run("tde_keystore", keyslots=SLOTS, login_unix_socket=None)["changed"]
            subprocess.run(["pg_ctlcluster", version, name, "start"], check=True, timeout=60)
            # Port and socket are found without being named.
            info = host.run("tde_info", login_unix_socket=None)
            assert info["server"]["answers"]
            assert info["data_directory"]["encryption"] == "ours"
            assert info["encrypted"]
            host.refused("tde_keystore", "server_running", state="closed", login_unix_socket=None)
            wish = {**host.options, "data_directory": str(host.mount / "other")}
            host.refused("tde_keystore", "cluster_exists", keyslots=SLOTS, cluster="another", postgresql=wish)
            subprocess.run(["pg_ctlcluster", version, name, "stop"], check=True, timeout=60)
            assert host.run("tde_keystore", state="closed", login_unix_socket=None)["changed"]
            host.run("tde_keystore", state="open", login_unix_socket=None)
        finally:
            subprocess.run(["pg_dropcluster", "--stop", version, name], check=False, capture_output=True, timeout=60)


def test_a_cluster_whose_creation_was_killed_is_created_anew_and_one_that_ran_is_not() -> None:
    with estate(coverage="cluster", data_directory="{home}/mnt/data", create_cluster=True) as host:
        found = support.in_child(lambda: _killed_initdb(host))
        assert found == "killed"
        assert (host.server.data / "global").exists()
        result = host.run("tde_keystore", keyslots=SLOTS)
        assert [step["action"] for step in result["plan"]][:2] == ["clear_place", "create_cluster"]
        host.server.start()
        assert host.server.psql("SELECT 1") == "1"
        assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
        # A record that was not brought to its end does not make a cluster that has run disappear.
        record = host.state / "clusters/main.json"
        record.write_text(record.read_text().replace('"filled": true', '"filled": false'))
        assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
        assert host.server.psql("SELECT 1") == "1"


def _killed_initdb(host: Estate) -> str:
    """Make the keystore, and end the run within initdb."""
    from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import act

    def killed(argv: t.Sequence[str], **_more: t.Any) -> None:
        path = Path(argv[argv.index("--pgdata") + 1])
        (path / "global").mkdir()
        (path / "PG_VERSION").write_text("15\n")
        raise KeyboardInterrupt

    act.run_program = killed  # type: ignore[assignment]
    try:
        estates.act("tde_keystore", host.arguments(keyslots=SLOTS), False)
    except KeyboardInterrupt:
        return "killed"
    return "ended"


def test_a_directory_as_storage_and_another_file_system_in_its_stead() -> None:
    with estate() as host:
        disk = host.home / "disk.img"
        subprocess.run(["truncate", "-s", "64M", str(disk)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-O", "encrypt", str(disk)], check=True)
        outer = host.home / "outer"
        outer.mkdir()
        mount = ["mount", "-o", "loop", str(disk), str(outer)]
        options: dict[str, t.Any] = {
            "mount_point": str(outer / "tde"),
            "coverage": "cluster",
            "data_directory": str(outer / "tde/data"),
        }
        host.options = {**options, "mount_point": str(host.home / "plain"), "data_directory": str(host.home / "plain/data")}
        result = host.refused("tde_keystore", "fscrypt_unsupported", keyslots=SLOTS)
        assert "tune2fs -O encrypt" in result["next_step"]
        host.options = options
        subprocess.run(mount, check=True)
        try:
            host.run("tde_keystore", keyslots=SLOTS)
            assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
            subprocess.run(["umount", str(outer)], check=True)
            # The same folder, root's own, on the file system below: nothing is made there.
            (outer / "tde").mkdir()
            host.refused("tde_keystore", "place_unreachable", state="open")
            answer = estates.answer("tde_keystore", host.arguments(keyslots=SLOTS), False)
            assert answer["error_code"] in ("place_unreachable", "fscrypt_unsupported"), answer
            (outer / "tde").rmdir()
            host.refused("tde_keystore", "place_unreachable", state="open")
            answer = estates.answer("tde_keystore", host.arguments(keyslots=SLOTS), False)
            assert answer["error_code"] in ("mount_point_absent", "place_unreachable"), answer
            assert list(outer.iterdir()) == []
            subprocess.run(mount, check=True)
            assert host.run("tde_keystore", state="open")["changed"]
        finally:
            subprocess.run(["umount", str(outer)], check=False, capture_output=True)


def test_check_mode_where_the_tasks_before_were_only_planned() -> None:
    with estate() as host:
        host.server.initdb()
        host.server.start()
        nowhere = {"check": True, "token_label": "later"}
        planned = host.run("tde_keystore", keyslots=SLOTS, **nowhere)
        assert "create_kek" in [step["action"] for step in planned["plan"]]
        assert any("an earlier task will make" in warning for warning in planned["warnings"])
        assert host.run("tde_master_key", **nowhere)["changed"]
        assert host.run("tde_keystore", state="open", **nowhere)["changed"]
        planned = host.run("tde_tablespace", tablespaces=[{"name": "sealed"}], keyslots=SLOTS, **nowhere)
        assert planned["plan"][-1]["action"] == "create_tablespace"
        assert not host.state.exists()
        assert not host.image.exists()


def test_a_wrong_pin_is_found_out_before_anything_is_made() -> None:
    with estate() as host:
        host.refused("tde_keystore", "pin_refused", keyslots=SLOTS, pin="wrong-pin")
        assert not host.image.exists()
        assert not (host.state / "store").exists()


def test_two_clusters_do_not_share_a_master_key_by_their_names() -> None:
    with estate() as host:
        host.run("tde_keystore", keyslots=SLOTS, cluster="a.b")
        other = {**host.options, "mount_point": str(host.home / "two"), "image": str(host.home / "two.img")}
        try:
            host.run("tde_keystore", keyslots=SLOTS, cluster="a", postgresql=other)
            host.refused("tde_master_key", "invalid_option", cluster="a", state="rotated", tag="b")
            assert len(host.in_token("hsm-tde.a.b")) == 1
        finally:
            subprocess.run(["umount", str(host.home / "two")], check=False, capture_output=True)


def test_a_second_run_at_the_same_time_is_told_and_changes_nothing() -> None:
    with estate() as host:
        host.run("tde_keystore", keyslots=SLOTS)
        state = support.new_state(host.state)
        with state.locked():
            host.refused("tde_keystore", "busy", keyslots=SLOTS)
            host.refused("tde_master_key", "busy", state="rotated", tag="2")
            assert not host.run("tde_info")["changed"]


def test_a_token_that_has_no_gcm_and_no_serial_number(opencryptoki: support.OpenCryptoki) -> None:
    """openCryptoki's soft token: CBC with an HMAC, and every token has the serial number 123."""
    with estate(coverage="cluster", data_directory="{home}/mnt/data") as host:
        token = opencryptoki.options(token_label="demo", pin=opencryptoki.pin)

        def run(module: str, **more: t.Any) -> dict[str, t.Any]:
            arguments = host.arguments(**{**token, "library_environment": {}, **more})
            result = estates.answer(module, arguments, False)
            assert not result.get("failed"), result
            return result

        def story() -> list[t.Any]:
            changed = [run("tde_keystore", keyslots=SLOTS)["changed"], run("tde_keystore", keyslots=SLOTS)["changed"]]
            rotated = run("tde_master_key", state="rotated", tag="2")
            changed += [rotated["changed"], run("tde_master_key", state="rotated", tag="2")["changed"]]
            changed.append(run("tde_keystore", state="closed")["changed"])
            changed.append(run("tde_keystore", state="open")["changed"])
            subprocess.run(["umount", str(host.mount)], check=True)
            return [changed, rotated["data_keys"]["cluster"]["keyslots"]["primary"]]

        assert opencryptoki.run(story) == [[True, False, True, False, True, True], "hsm-tde.main.2 in token demo"]


def test_a_process_of_the_server_is_found_by_what_it_does_not_by_its_lock_file(tmp_path: Path) -> None:
    with postgres.folder() as home, postgres.server(home) as running:
        found = servers.postmaster(str(running.data))
        assert found
        assert str(found.pid) == (running.data / "postmaster.pid").read_text().split()[0]
        assert found.socket == str(running.socket)
        assert found.pid in {one.pid for one in servers.holders(str(home))}
        # A lock file that a crash left, naming a process that is another's.
        stale = tmp_path / "data"
        stale.mkdir()
        (stale / "postmaster.pid").write_text(f"{os.getpid()}\n{stale}\n0\n5432\n/tmp\n")
        assert servers.postmaster(str(stale)) is None
        # An administrator's shell in the data directory is no server.
        shell = subprocess.Popen(["sleep", "20"], cwd=stale)
        try:
            assert servers.postmaster(str(stale)) is None
            assert [one.name for one in servers.holders(str(stale))] == ["sleep"]
        finally:
            shell.kill()
            shell.wait()


def test_what_one_server_holds_is_never_said_of_another() -> None:
    """Two servers, and the address of the one in a task about the other."""
    with estate() as host, postgres.folder() as home:
        host.server.initdb()
        host.server.start()
        host.run("tde_keystore", keyslots=SLOTS)
        host.run("tde_tablespace", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)
        other = postgres.Server(home)
        other.initdb()
        other.start()
        try:
            there = other.options()
            for module, more in (
                ("tde_proof", {"tablespaces": ["sealed"]}),
                ("tde_proof", {"data_directory": True}),
                ("tde_tablespace", {"tablespaces": [{"name": "sealed"}]}),
            ):
                said = host.refused(module, "server_foreign", **{**there, **more})
                assert str(other.data) in said["msg"]
                assert str(host.server.data) in said["msg"]
            found = host.run("tde_info", **there)
            assert not found["encrypted"]
            assert any("works on" in sentence for sentence in found["gaps"])
        finally:
            other.stop()
