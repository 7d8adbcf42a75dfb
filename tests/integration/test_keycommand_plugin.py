# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde encrypt|decrypt|validate-key``, the plugin that tde_kms runs as the database's own user, on a real token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.kek import create_kek
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration import postgres, support
from ansible_collections.hsm.tde.tests.integration.userhost import UserHost

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not support.softhsm_library() or not postgres.programs(),
    reason="needs root, SoftHSM and a user postgres",
)

KEY = "hsm-tde.main"
DATA = os.urandom(32)


def make_key(host: UserHost, label: str) -> None:
    def act() -> None:
        own = host.side.own
        with own.locked(), open_session(host.softhsm.access(), own, rw=True) as session:
            create_kek(session, label, cluster="main", registry=Registry(own), journal=Journal(own.journal))

    host.side.run(act)


@pytest.fixture(scope="module")
def made() -> t.Iterator[UserHost]:
    with postgres.folder() as home:
        host = UserHost(home)
        host.publish()
        make_key(host, KEY)
        make_key(host, f"{KEY}.2")
        yield host


@pytest.fixture
def host(made: UserHost) -> t.Iterator[UserHost]:
    """The host; tokens, PIN and the user's state are put back after the test."""
    kept = made.home / "kept"
    kept.mkdir()
    places = (made.softhsm.tokendir, made.home / "state.users")
    for number, place in enumerate(places):
        subprocess.run(["cp", "-a", str(place), str(kept / str(number))], check=True)
    yield made
    for number, place in enumerate(places):
        shutil.rmtree(place, ignore_errors=True)
        shutil.move(kept / str(number), place)
    kept.rmdir()
    made.publish()


def test_the_key_never_leaves_the_token_and_the_same_data_comes_back(host: UserHost) -> None:
    assert host.run("validate-key", "--keyid", KEY, "--cluster", "main").returncode == 0
    done = host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert DATA not in done.stdout
    assert len(done.stdout) < 8192
    back = host.run("decrypt", "--keyid", KEY, "--cluster", "main", stdin=done.stdout)
    assert (back.returncode, back.stdout, back.stderr) == (0, DATA, b"")
    assert host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA).stdout != done.stdout


def test_the_longest_data_and_what_is_longer(host: UserHost) -> None:
    longest = os.urandom(4096)
    done = host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=longest)
    assert done.returncode == 0
    assert len(done.stdout) <= 8192
    assert host.run("decrypt", "--keyid", KEY, "--cluster", "main", stdin=done.stdout).stdout == longest
    assert host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=longest + b"x").returncode == 2


def test_the_kms_secret_is_the_pin_and_shows_nowhere(host: UserHost) -> None:
    host.pin_file.unlink()
    arguments = ("encrypt", "--keyid", KEY, "--cluster", "main")
    assert host.run(*arguments, stdin=DATA).returncode == 3
    assert host.run(*arguments, stdin=DATA, TDE_KMS_SECRET=host.softhsm.pin).returncode == 0
    refused = [host.run(*arguments, stdin=DATA, TDE_KMS_SECRET="wrong-4711") for dummy in range(2)]
    assert [done.returncode for done in refused] == [4, 4]
    assert b"pin_refused)" in refused[0].stderr
    assert b"pin_refused_before" in refused[1].stderr
    assert b"".join(done.stdout for done in refused) == b""
    for secret in (b"wrong-4711", host.softhsm.pin.encode()):
        assert all(secret not in done.stderr for done in refused)
        kept = [path.read_bytes() for path in (host.home / "state.users").rglob("*") if path.is_file()]
        assert all(secret not in content for content in kept)


def test_a_key_that_is_not_the_one_is_told_apart(host: UserHost) -> None:
    other = host.run("encrypt", "--keyid", f"{KEY}.2", "--cluster", "main", stdin=DATA).stdout
    swapped = host.run("decrypt", "--keyid", KEY, "--cluster", "main", stdin=other)
    assert (swapped.returncode, swapped.stdout) == (6, b"")
    assert b"kek_mismatch" in swapped.stderr
    absent = host.run("encrypt", "--keyid", "nothing", "--cluster", "main", stdin=DATA)
    assert (absent.returncode, absent.stdout) == (3, b"")
    assert b"key_absent" in absent.stderr
    blob = json.loads(other)
    for damaged in (b"", b"[]", b"no", other[:-9], json.dumps({**blob, "iv": blob["iv"][::-1]}).encode()):
        done = host.run("decrypt", "--keyid", f"{KEY}.2", "--cluster", "main", stdin=damaged)
        assert (done.returncode, done.stdout) == (8, b""), done.stderr
        assert done.stderr.count(b"\n") == 1


def test_without_the_token_nothing_is_called_absent(host: UserHost) -> None:
    wrapped = host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA).stdout
    shutil.rmtree(host.softhsm.tokendir)
    host.softhsm.tokendir.mkdir()
    host.give(host.softhsm.tokendir)
    done = host.run("decrypt", "--keyid", KEY, "--cluster", "main", stdin=wrapped)
    assert (done.returncode, done.stdout) == (6, b""), done.stderr
    assert b"token_unreachable" in done.stderr
    assert list(host.softhsm.tokendir.iterdir()) == []


def test_a_key_that_was_used_once_is_missing_when_it_does_not_show(host: UserHost) -> None:
    """One that root made and that nobody registered as this user."""
    options = host.softhsm.options(token_label="demo", pin=host.softhsm.pin, state_directory=host.state.path)
    made = support.run_module(
        "pkcs11_key", {**options, "keys": [{"label": "fep-1", "type": "aes", "size": 256, "encrypt": True, "decrypt": True}]}
    )
    assert not made.get("failed"), made
    host.give(host.softhsm.tokendir)
    wrapped = host.run("encrypt", "--keyid", "fep-1", "--cluster", "main", stdin=DATA)
    assert wrapped.returncode == 0, wrapped.stderr
    gone = support.run_module(
        "pkcs11_key", {**options, "keys": [{"label": "fep-1", "state": "absent", "confirm_destroy": "fep-1"}]}
    )
    assert gone["changed"], gone
    done = host.run("decrypt", "--keyid", "fep-1", "--cluster", "main", stdin=wrapped.stdout)
    assert (done.returncode, done.stdout) == (6, b"")
    assert b"key_unreachable" in done.stderr


def test_who_may_run_it_and_with_what(host: UserHost) -> None:
    """Root keeps off what the user can write, another user gets nothing, and the user names no library."""
    for how in ({"root": True}, {"user": "nobody"}):
        done = host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA, **how)  # type: ignore[arg-type]
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"command_of_other_user" in done.stderr
    assert host.run("status").returncode == 4
    library = host.run("wrap", "--library", host.softhsm.library, "--token", "demo", str(host.home / "x"), stdin=b"s")
    assert library.returncode == 2
    assert b"--library" in library.stderr

    record = host.home / "state.users/clusters/main.json"
    assert (record.stat().st_uid, record.stat().st_mode & 0o777) == (0, 0o644)
    assert (host.pin_file.stat().st_uid, host.pin_file.stat().st_mode & 0o777) == (host.user.pw_uid, 0o400)
    os.chown(record, host.user.pw_uid, -1)
    forged = host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA)
    assert forged.returncode == 4
    assert b"file_not_private" in forged.stderr


def test_a_credential_that_systemd_hands_to_the_server_is_the_pin(host: UserHost) -> None:
    host.publish(source={"kind": "credential", "path": "/etc/credstore.encrypted/hsm-tde.main.pin"})
    folder = host.home / "credentials"
    folder.mkdir()
    (folder / "hsm-tde.main.pin").write_text(host.softhsm.pin)
    host.give(folder)
    (folder / "hsm-tde.main.pin").chmod(0o400)
    arguments = ("validate-key", "--keyid", KEY, "--cluster", "main")
    assert host.run(*arguments, CREDENTIALS_DIRECTORY=str(folder)).returncode == 0
    without = host.run(*arguments)
    assert without.returncode != 0
    assert without.stderr.count(b"\n") == 1
    shutil.rmtree(folder)


def test_it_is_called_through_a_link_in_the_folder_of_plugins(host: UserHost) -> None:
    plugins = host.home / "plugins"
    plugins.mkdir()
    (plugins / "hsm-tde").symlink_to(host.command)
    done = postgres.as_postgres(str(plugins / "hsm-tde"), "validate-key", "--keyid", KEY, "--cluster", "main", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_encryption_stands_in_the_user_s_journal(host: UserHost) -> None:
    host.run("encrypt", "--keyid", KEY, "--cluster", "main", stdin=DATA)
    entries = host.side.run(lambda: Journal(host.side.own.journal).entries())
    assert (entries[-1]["action"], entries[-1]["key"], entries[-1]["cluster"]) == ("kms_encrypt", KEY, "main")
