# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""EDB's and CYBERTEC's key commands, as the stand-in runs them: made, started, rotated, copied, restored, killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.tests.integration import postgres, support
from ansible_collections.hsm.tde.tests.integration.keycommand import SLOTS, Cluster, cheap_passphrases

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not support.softhsm_library() or not postgres.programs(),
    reason="needs root, SoftHSM and a user postgres",
)


@pytest.fixture
def edb() -> t.Iterator[Cluster]:
    with cheap_passphrases(), postgres.folder() as home:
        made = Cluster(home, "edb")
        options = made.keystore()["initdb_options"]
        done = made.server("initdb", *options)
        assert done.returncode == 0, done.stderr
        yield made


def test_edb_initdb_wraps_its_key_and_the_server_starts_on_it(edb: Cluster) -> None:
    assert edb.starts()
    assert b'"format": "hsm-tde wrapped key"' in edb.key.read_bytes()
    assert (edb.key.stat().st_uid, stat.S_IMODE(edb.key.stat().st_mode)) == (edb.host.user.pw_uid, 0o600)
    # The keyslot of the passphrase comes with the next run, and then nothing changes.
    added = edb.keystore()
    assert [step["action"] for step in added["plan"]] == ["add_keyslot", "prove_keyslot"]
    assert set(added["data_keys"]["main"]["keyslots"]) == {"primary", "recovery"}
    again = edb.keystore()
    assert not again["changed"], again["plan"]
    assert edb.starts()
    twice = edb.server("initdb", *added["initdb_options"], data=edb.data.with_name("data2"))
    assert twice.returncode == 0, twice.stderr
    assert edb.starts(edb.data.with_name("data2"))


def test_rotation_keeps_owner_and_mode_and_every_copy_opens(edb: Cluster) -> None:
    edb.key.chmod(0o640)
    os.chown(edb.key, -1, os.stat("/").st_gid)
    os.chown(edb.key, edb.host.user.pw_uid, edb.host.user.pw_gid)
    backup = edb.data.with_name("backup")
    subprocess.run(["cp", "-a", str(edb.data), str(backup)], check=True)
    planned = edb.rotate("2026", check=True)
    assert planned["changed"]
    assert (edb.key.read_bytes()) == (backup / "pg_encryption/key.bin").read_bytes()
    rotated = edb.rotate("2026")
    assert rotated["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main.2026 in token demo", rotated
    info = edb.key.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (edb.host.user.pw_uid, edb.host.user.pw_gid, 0o640)
    assert os.listdir(edb.key.parent) == ["key.bin"]
    assert edb.starts()
    again = edb.rotate("2026")
    assert (again.get("failed"), again["changed"]) == (None, False), again

    # A base backup from before the rotation starts elsewhere and in the place of the cluster; the former key is still there.
    assert edb.starts(backup)
    shutil.rmtree(edb.data)
    subprocess.run(["cp", "-a", str(backup), str(edb.data)], check=True)
    assert edb.starts()
    gaps = edb.module("tde_info")["gaps"]
    assert any("came to this host without its journal" in gap for gap in gaps), gaps
    # The next run with the tag brings it up to date; nothing of the former keys was destroyed.
    assert edb.rotate("2026")["changed"]
    assert edb.starts()


def test_a_standby_on_the_same_hsm_rotates_its_own_copy(edb: Cluster) -> None:
    """The second node: its own state, its own PIN file, the same token, the primary's data directory."""
    with postgres.folder() as home:
        standby = Cluster(home, "edb")
        standby.host.softhsm = edb.host.softhsm
        shutil.rmtree(standby.data, ignore_errors=True)
        subprocess.run(["cp", "-a", str(edb.data), str(standby.data)], check=True)
        conf = standby.data / "postgresql.conf"
        conf.write_text(conf.read_text().replace(str(edb.host.command), str(standby.host.command)))
        standby.keystore(keyslots=None)
        assert standby.starts()
        assert edb.rotate("2")["changed"]
        refused = standby.rotate("2")
        assert refused["error_code"] == "key_foreign"
        assert standby.starts()
        rotated = standby.rotate("2", keycommand={"adopt_master_key": True})
        assert [step["action"] for step in rotated["plan"]][:1] == ["adopt_kek"], rotated
        assert standby.starts()
        assert edb.starts()
        assert not standby.rotate("2")["changed"]


def test_edb_what_is_not_ours_is_not_touched_and_failures_are_said(edb: Cluster) -> None:
    wrapped = edb.key.read_bytes()
    edb.key.write_bytes(os.urandom(96))
    plain = edb.key.read_bytes()
    foreign = edb.rotate("2")
    assert (foreign["failed"], foreign["error_code"]) == (True, "file_foreign"), foreign
    assert edb.key.read_bytes() == plain
    edb.key.write_bytes(wrapped[:-40])
    assert not edb.starts()
    edb.key.write_bytes(wrapped.replace(b'"generation": 1', b'"generation": 7'))
    assert not edb.starts()
    edb.key.write_bytes(wrapped)
    assert edb.starts()
    over = edb.host.run("wrap", "--cluster", "main", "pg_encryption/key.bin", stdin=b"x" * 96, cwd=str(edb.data))
    assert over.returncode == 2
    assert b"key_exists" in over.stderr
    assert edb.key.read_bytes() == wrapped
    shutil.rmtree(edb.host.softhsm.tokendir)
    edb.host.softhsm.tokendir.mkdir()
    edb.host.give(edb.host.softhsm.tokendir)
    done = edb.server("start")
    assert "token_unreachable" in done.stderr
    assert done.stderr.count("hsm-tde: ") == 1


def test_the_module_refuses_what_makes_no_sense(edb: Cluster) -> None:
    tablespace = edb.module("tde_tablespace", tablespaces=[{"name": "sealed"}])
    assert (tablespace["error_code"], "initdb" in tablespace["msg"]) == ("engine_unsupported", True)
    assert edb.module("tde_proof", tablespaces=["sealed"])["error_code"] == "invalid_option"
    tls = edb.module("tde_proof", data_directory=True, cluster="tls", keycommand={"kind": "ssl_passphrase"})
    assert tls["error_code"] == "engine_unsupported"
    other = edb.module("tde_keystore", keycommand={"kind": "ssl_passphrase"})
    assert other["error_code"] == "invalid_option"
    assert edb.module("tde_keystore", keycommand={"os_user": "root"})["error_code"] == "invalid_option"


def test_a_proof_reads_the_pages_and_takes_nobody_s_word(edb: Cluster) -> None:
    def verdict() -> str:
        done = edb.module("tde_proof", data_directory=True)
        assert not done.get("failed"), done
        return str(done["proofs"][0]["verdict"])

    assert verdict() == "unknown", "there is no page to judge"
    # Pages of a real server, which the stand-in did not encrypt.
    real = postgres.Server(edb.host.home, edb.data.with_name("real"))
    real.initdb()
    subprocess.run(["cp", "-a", str(real.data / "base"), str(edb.data / "base")], check=True)
    assert verdict() == "plain"
    for path in (edb.data / "base").rglob("[0-9]*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(os.urandom(path.stat().st_size))
    assert verdict() == "encrypted"


def test_cybertec_gets_its_key_in_hex() -> None:
    with cheap_passphrases(), postgres.folder() as home:
        made = Cluster(home, "cybertec")
        # Check mode on a host on which nothing was done yet, in the order of the role.
        slots = {"keyslots": SLOTS, "pin_source": {"kind": "file", "path": str(made.host.pin_file)}}
        planned = [
            made.module("tde_keystore", check=True, **slots),
            made.module("tde_keystore", check=True, state="open"),
            made.module("tde_master_key", check=True),
        ]
        assert [one["changed"] for one in planned] == [True, False, True], planned
        assert not any(path.name.startswith(("state", "pin")) for path in home.iterdir())
        alone = made.module("tde_keystore", keyslots=[{"name": "primary"}])
        assert alone["error_code"] == "recovery_keyslot_missing"
        assert not any(path.name == "state.users" for path in home.iterdir())
        keystore = made.keystore()
        assert [step["action"] for step in keystore["plan"]] == [step["action"] for step in planned[0]["plan"]]
        done = made.server("initdb", *keystore["initdb_options"])
        assert done.returncode == 0, done.stderr
        assert made.starts()
        assert made.rotate("2")["changed"]
        assert made.starts()
        assert len(made.host.run("unwrap", "--cluster", "main").stdout) == 64
        given = made.module("tde_keystore", keycommand={"secret": "00" * 32})
        assert not given["changed"]
        assert "was left" in json.dumps(given["warnings"])
        assert "00" * 32 not in json.dumps(given)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_rotation_killed_at_any_moment_leaves_a_key_that_opens(edb: Cluster, seed: int) -> None:
    """The task with all its children, ten times at a random moment; the server starts after each, and the tag is reached."""
    chance = random.Random(seed)
    started = time.monotonic()
    assert edb.rotate("full")["changed"]
    whole = time.monotonic() - started
    for number in range(10):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                edb.rotate(f"k{number}")
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.1, whole))
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert edb.starts(), (seed, number)
    last = edb.rotate("last")
    assert last["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main.last in token demo", last
    assert not edb.rotate("last")["changed"]
    assert edb.starts()


def test_a_secret_that_does_not_show_is_not_made_anew() -> None:
    """Another node's master key is taken (adopt_master_key), so only root's memory tells that there was a secret under it."""
    with postgres.folder() as home:
        cluster = Cluster(home, "cybertec")
        cluster.keystore(keycommand={"adopt_master_key": True})
        users, away = Path(cluster.host.state.users), home / "away"
        users.rename(away)
        for check in (True, False):
            result = cluster.module("tde_keystore", keyslots=SLOTS, check=check)
            assert result["error_code"] == "keystore_unreachable", result
        assert not users.exists()
        away.rename(users)
        assert not cluster.module("tde_keystore", keyslots=SLOTS)["changed"]
