# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Places, disks, servers and other runs that stand in the way: what is said, and that nothing is begun or nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import exits, zipapp
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.tests.integration import filesystems, support
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS, Estate, estate, usable
from ansible_collections.hsm.tde.tests.integration.refusals import clear, unchanged
from ansible_collections.hsm.tde.tests.integration.support import SoftHsm, run_module

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

COVERED = {"coverage": "cluster", "data_directory": "{home}/mnt/data", "image_size": "64M"}
PAGE = 4096


# --- places of a whole cluster


@pytest.fixture(scope="module")
def bare() -> t.Iterator[Estate]:
    """A host on which nothing was done yet, a file system with encryption on ``enc`` and one without on ``ext4``."""
    with estate(**COVERED) as host, filesystems.mounted(host.home, name="enc"):
        with filesystems.mounted(host.home, filesystems.PLAIN, name="ext4"):
            yield host


def refuse(host: Estate, code: str, *names: str, mount_point: str, data: str = "data") -> None:
    """The keystore of a new cluster in a directory is wished for, and refused before its first step."""
    options = {
        "coverage": "cluster",
        "storage": "directory",
        "mount_point": mount_point,
        "data_directory": f"{mount_point}/{data}",
    }
    for check in (True, False):
        with unchanged(host.home):
            result = run_module("tde_keystore", host.arguments(keyslots=SLOTS, postgresql=options), check=check)
        clear(result, code, *names, secrets=[host.hsm.pin, PASSPHRASE])


def test_a_file_system_that_cannot_encrypt(bare: Estate) -> None:
    refuse(bare, "fscrypt_unsupported", f"{bare.home}/ext4", "tune2fs -O encrypt", mount_point=f"{bare.home}/ext4")
    with filesystems.mounted_virtual(bare.home / "memory", "-t", "tmpfs", "-o", "mode=0755,size=1M") as memory:
        refuse(bare, "fscrypt_unsupported", str(memory), "tmpfs", "storage=image", mount_point=str(memory))


def test_a_directory_that_is_in_use(bare: Estate) -> None:
    mount = bare.home / "enc"
    mount.chmod(0o755)
    data = mount / "data"
    data.mkdir()
    (data / "notes").write_text("in the clear")
    refuse(bare, "place_not_empty", str(data), mount_point=str(mount))
    (data / "notes").rename(data / "PG_VERSION")
    refuse(bare, "place_plain", str(data), "new location", mount_point=str(mount))
    shutil.rmtree(data)
    data.symlink_to(bare.home)
    refuse(bare, "place_not_directory", str(data), mount_point=str(mount))
    data.unlink()


def test_a_parent_that_the_database_s_user_owns(bare: Estate) -> None:
    mount = bare.home / "enc"
    theirs = mount / "theirs"
    theirs.mkdir()
    shutil.chown(theirs, "postgres", "postgres")
    refuse(bare, "place_parent_unsafe", str(theirs), "root", mount_point=str(theirs))
    refuse(bare, "place_parent_unsafe", str(theirs), "root", mount_point=str(mount), data="theirs/data")
    theirs.rmdir()


def test_an_image_over_a_folder_with_files_or_in_a_file_that_is_not_ours(bare: Estate) -> None:
    mount, image = bare.home / "hidden", bare.home / "theirs.img"
    mount.mkdir()
    (mount / "notes").write_text("would be hidden")
    wish = {**bare.options, "mount_point": str(mount), "data_directory": f"{mount}/data"}
    with unchanged(bare.home):
        result = run_module("tde_keystore", bare.arguments(keyslots=SLOTS, postgresql=wish))
    clear(result, "mount_point_not_empty", str(mount))
    (mount / "notes").unlink()
    image.write_bytes(b"a picture" * 5_000_000)
    for mode, code, word in ((0o644, "image_not_private", "0644"), (0o600, "image_foreign", "another path")):
        image.chmod(mode)
        with unchanged(bare.home):
            result = run_module("tde_keystore", bare.arguments(keyslots=SLOTS, postgresql={**wish, "image": str(image)}))
        clear(result, code, str(image), word)


# --- a full disk


class Disk:
    """A file system in memory, of which a file takes all but so many pages."""

    def __init__(self, point: Path) -> None:
        self.point = point

    def leave(self, pages: int) -> None:
        filler = self.point / "filler"
        filler.unlink(missing_ok=True)
        free = os.statvfs(self.point).f_bavail - pages
        filler.write_bytes(bytes(max(0, free) * PAGE))

    def empty(self) -> None:
        (self.point / "filler").unlink(missing_ok=True)


@pytest.fixture
def cramped() -> t.Iterator[tuple[Estate, Disk]]:
    """A host whose state directory lies on a small file system of its own."""
    with estate(**COVERED) as host:
        with filesystems.mounted_virtual(host.state, "-t", "tmpfs", "-o", "mode=0700,size=512k") as point:
            yield host, Disk(point)


def test_a_disk_that_is_full_while_a_key_is_written_loses_none_and_makes_no_second(cramped: tuple[Estate, Disk]) -> None:
    """Each page more lets the run get one write further; what it did stays, and is gone on from."""
    host, disk = cramped
    failed = []
    for pages in range(40):
        disk.leave(pages)
        result = run_module("tde_keystore", host.arguments(keyslots=SLOTS))
        if not result.get("failed"):
            break
        clear(result, "disk_full", str(host.state), "Make room", secrets=[host.hsm.pin, PASSPHRASE])
        failed.append(result["kept"])
    else:
        pytest.fail("it never succeeded")
    assert len(failed) > 3
    assert failed[0].startswith("What was done before it stays done: create_image")
    disk.empty()
    assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
    assert len(host.in_token("hsm-tde.main")) == 1
    assert host.keys() == ["cluster"]
    # A change to what is there: the former content stays, and opens.
    file = host.state / "store/main/cluster.json"
    genuine = file.read_bytes()
    disk.leave(0)
    third = {**RECOVERY, "name": "third"}
    clear(run_module("tde_keystore", host.arguments(keyslots=[*SLOTS, third])), "disk_full", str(host.state), "Make room")
    assert file.read_bytes() == genuine
    clear(run_module("tde_master_key", host.arguments(state="rotated", tag="2")), "disk_full", str(host.state), "Make room")
    assert file.read_bytes() == genuine
    host.unmount()
    # No database stays closed for it: opening needs no room, and says what it could not write down.
    opened = host.run("tde_keystore", state="open")
    assert opened["changed"]
    assert any("the journal does not say so" in warning for warning in opened["warnings"])
    disk.empty()
    assert host.run("tde_master_key", state="rotated", tag="2")["master_key"] == "hsm-tde.main.2"
    assert [len(host.in_token(label)) for label in ("hsm-tde.main", "hsm-tde.main.2")] == [1, 1]


def test_no_key_is_made_that_nobody_would_remember(softhsm: SoftHsm, tmp_path: Path) -> None:
    state, secrets = tmp_path / "state", tmp_path / "secrets"
    options = softhsm.options(token_label="demo", pin=softhsm.pin, state_directory=str(state))
    wrapped = {**options, "path": str(secrets / "app.key"), "secret": "marker of a secret", "keyslots": [RECOVERY]}
    with filesystems.mounted_virtual(state, "-t", "tmpfs", "-o", "mode=0700,size=64k") as point:
        Disk(point).leave(0)
        with unchanged(tmp_path):
            result = run_module("pkcs11_key", {**options, "keys": [{"label": "data"}]})
            clear(result, "disk_full", str(state), "Make room", "Nothing was changed")
        Disk(point).empty()
        assert run_module("pkcs11_key", {**options, "keys": [{"label": "data"}]})["changed"]
        with filesystems.mounted_virtual(secrets, "-t", "tmpfs", "-o", "mode=0700,size=64k") as other:
            assert run_module("wrapped_secret", wrapped)["changed"]
            Disk(other).leave(0)
            with unchanged(secrets):
                result = run_module("wrapped_secret", {**wrapped, "secret": "another secret", "update": "always"})
                clear(result, "disk_full", str(secrets), "Make room", secrets=["another secret", PASSPHRASE])
            Disk(other).empty()
            assert not run_module("wrapped_secret", wrapped)["changed"]


# --- a second run at the same time


@pytest.fixture(scope="module")
def running() -> t.Iterator[Estate]:
    """A server with an encrypted tablespace, and a keystore that is open."""
    with estate(image_size="64M") as host:
        host.server.initdb()
        host.server.start()
        host.server.psql("CREATE DATABASE shop")
        host.run("tde_keystore", keyslots=SLOTS, pin_source={"kind": "file", "path": str(host.home / "pin")})
        host.run("tde_tablespace", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)
        yield host


def changing(host: Estate) -> list[tuple[str, dict[str, t.Any]]]:
    """A task of every module that changes something, with something to do."""
    token = host.hsm.options(token_label="demo", pin=host.hsm.pin, state_directory=str(host.state))
    second = host.hsm.options(token_label="second", pin=host.hsm.pin, state_directory=str(host.state))
    return [
        ("pkcs11_token", {**second, "so_pin": host.hsm.so_pin}),
        ("pkcs11_pin", {**second, "new_pin": "another1"}),
        ("pkcs11_key", {**token, "keys": [{"label": "data"}]}),
        ("tde_keystore", host.arguments(keyslots=[*SLOTS, {**RECOVERY, "name": "third"}])),
        ("tde_keystore", host.arguments(state="open")),
        ("tde_keystore", host.arguments(state="closed", force=True)),
        ("tde_master_key", host.arguments(state="rotated", tag="2")),
        ("tde_tablespace", host.arguments(tablespaces=[{"name": "other"}], keyslots=SLOTS)),
    ]


def test_a_second_run_waits_for_nobody_and_begins_nothing(running: Estate) -> None:
    host = running
    with StateDirectory(str(host.state)).locked():
        with unchanged(host.home, skip=[host.server.data, host.server.log], server=host.server):
            for module, arguments in changing(host):
                clear(run_module(module, arguments), "busy", str(host.state), "Wait for it to end", secrets=[host.hsm.pin])
        # A look needs no lock.
        assert run_module("tde_info", host.arguments())["server"]["answers"]
        assert run_module("tde_master_key", host.arguments(state="rotated", tag="2"), check=True)["changed"]
        command = host.home / "hsm-tde"
        command.write_bytes(zipapp.build(sys.executable, str(host.state)))
        command.chmod(0o755)
        done = subprocess.run([command, "close", "main", "--force", "--json"], capture_output=True, timeout=60, check=False)
        clear(json.loads(done.stdout)["clusters"]["main"], "busy", str(host.state), "Wait for it to end")
        assert done.returncode == exits.BY_CAUSE["locked"]


def test_two_runs_that_start_together_make_one_keystore() -> None:
    with estate(**COVERED) as host:
        content = json.dumps({"ANSIBLE_MODULE_ARGS": {**host.arguments(keyslots=SLOTS), "_ansible_remote_tmp": "/tmp"}})
        argv = [sys.executable, str(support.ROOT / "plugins/modules/tde_keystore.py")]
        env = {**os.environ, "PYTHONPATH": str(support.ROOT / ".collections")}
        runs = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) for _number in range(3)]
        for one in runs:
            assert one.stdin
            one.stdin.write(content)
            one.stdin.close()
        results = [json.loads(one.stdout.read()) for one in runs if one.stdout and one.wait(60) is not None]
        for result in results:
            if result.get("failed"):
                clear(result, "busy", str(host.state))
        assert any(result.get("changed") for result in results)
        assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
        assert (len(host.in_token("hsm-tde.main")), host.keys()) == (1, ["cluster"])


# --- servers


def test_a_token_that_is_not_mounted_leads_to_no_tablespace(running: Estate) -> None:
    host = running
    new = {"tablespaces": [{"name": "new", "move": {"databases": ["shop"]}}], "keyslots": SLOTS}
    tasks: list[tuple[str, dict[str, t.Any]]] = [
        ("tde_tablespace", new), ("tde_keystore", {"keyslots": SLOTS}), ("tde_master_key", {"state": "rotated", "tag": "3"}),
    ]  # fmt: skip
    with host.token_moved_away(), unchanged(host.home, skip=[host.server.data, host.server.log], server=host.server):
        for module, more in tasks:
            for check in (True, False):
                result = run_module(module, host.arguments(**more), check=check)
                clear(result, "token_unreachable", "'demo'", "Mount the token's folder", secrets=[host.hsm.pin, PASSPHRASE])


def test_a_server_that_does_not_answer(running: Estate) -> None:
    host = running
    where = {"login_unix_socket": str(host.home)}
    for module, more in (
        ("tde_tablespace", {"tablespaces": [{"name": "new"}], "keyslots": SLOTS}),
        ("tde_proof", {"relations": ["shop.public.orders"]}),
    ):
        with unchanged(host.home, skip=[host.server.data, host.server.log], server=host.server):
            result = run_module(module, host.arguments(**more, **where))
        clear(result, "server_down", f"{host.home}/.s.PGSQL.5432", "Start it", secrets=[host.hsm.pin])
    info = run_module("tde_info", host.arguments(**where))
    assert info["server"]["error_code"] == "server_down"
    assert any("does not answer" in gap for gap in info["gaps"])
