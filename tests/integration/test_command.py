# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde`` on a real token and a real encrypted image: what the next boot does, and what an operator does."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import resource
import select
import shutil
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import zipapp
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret, harden_process
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import load
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import KeystoreWish, Request, SlotWish
from ansible_collections.hsm.tde.tests.integration import filesystems, support

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and kernel keys are root's")

RECOVERY = "kept off the host 4711"


@dataclasses.dataclass
class Host:
    """A host with one cluster, whose place lies in an image, and the command."""

    home: Path
    state: StateDirectory
    softhsm: support.SoftHsm

    @property
    def command(self) -> Path:
        return self.home / "hsm-tde"

    @property
    def data(self) -> Path:
        return self.home / "mnt/data"

    @property
    def pin_file(self) -> Path:
        return self.home / "pin"

    def make(self) -> None:
        access = self.softhsm.access()
        options = {
            "coverage": "cluster",
            "storage": "image",
            "image": str(self.home / "image"),
            "image_size": "64M",
            "mount_point": str(self.data.parent),
            "data_directory": str(self.data),
        }
        slots = (
            SlotWish("primary", "token", access=access),
            SlotWish("recovery", "passphrase", passphrase=Secret(RECOVERY)),
        )
        wish = KeystoreWish("present", slots=slots, pin_source={"kind": "file", "path": str(self.pin_file)})
        support.in_child(
            lambda: load("postgresql")(Request(self.state, "main", options, access=access)).keystore(wish, check=False).changed
        )
        self.command.write_bytes(zipapp.build(sys.executable, self.state.path))
        self.command.chmod(0o755)
        (self.data / "PG_VERSION").write_text("15\n")

    def run(self, *arguments: str, fds: t.Sequence[int] = (), **how: t.Any) -> subprocess.CompletedProcess[str]:
        """The command without a terminal, as systemd runs it."""
        return subprocess.run(
            ["setsid", "--wait", str(self.command), *arguments],
            cwd="/", env={}, capture_output=True, text=True, timeout=60, check=False, pass_fds=fds,
            **{"stdin": subprocess.DEVNULL, **how},
        )  # fmt: skip

    def facts(self, *arguments: str) -> dict[str, t.Any]:
        return t.cast("dict[str, t.Any]", json.loads(self.run(*arguments, "--json").stdout)["clusters"]["main"])

    def unmount(self) -> None:
        """As a reboot does: the keys and the mount are gone."""
        filesystems.reboot(self.data.parent)

    def readable(self) -> bool:
        try:
            return (self.data / "PG_VERSION").read_text() == "15\n"
        except OSError:
            return False


@pytest.fixture
def host(tmp_path: Path, softhsm: support.SoftHsm, state: StateDirectory) -> t.Iterator[Host]:
    made = Host(tmp_path, state, softhsm)
    made.make()
    try:
        yield made
    finally:
        if os.path.ismount(made.data.parent):
            made.unmount()


def descriptor(secret: str) -> int:
    reader, writer = os.pipe()
    os.write(writer, secret.encode())
    os.close(writer)
    return reader


def on_terminal(argv: t.Sequence[str], answers: t.Mapping[str, str]) -> tuple[int, str]:
    """Run on a terminal of its own and type each answer after its prompt; :returns: exit code and all that showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(argv[0], list(argv))  # noqa: S606
    shown, waiting, deadline = "", dict(answers), time.monotonic() + 30
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part.decode()
        for prompt in [one for one in waiting if one in shown]:
            os.write(terminal, waiting.pop(prompt).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_a_reboot_is_survived_and_an_open_keystore_needs_no_token(host: Host) -> None:
    assert host.facts("status")["open"]
    assert host.readable()
    host.unmount()
    status = host.facts("status")
    assert (status["open"], [slot["name"] for slot in status["data_keys"][0]["keyslots"]]) == (False, ["primary", "recovery"])
    assert host.facts("self-test")["ok"], host.run("self-test").stdout
    assert not os.path.ismount(host.data.parent)
    assert not host.readable()

    opened = host.run("open", "--wait", "5", "main")
    assert (opened.returncode, opened.stdout) == (0, "main: opened\n"), opened.stderr
    assert host.readable()

    host.softhsm.tokendir.rename(host.softhsm.tokendir.with_name("away"))
    again = host.run("open", "main")
    assert (again.returncode, again.stdout) == (0, "main: nothing to open\n"), again.stderr
    closed = host.run("close", "main")
    assert (closed.returncode, closed.stdout) == (0, "main: closed\n"), closed.stderr
    assert not host.readable()


def test_a_token_that_is_not_there_is_unreachable_and_the_recovery_passphrase_opens_without_it(host: Host) -> None:
    host.unmount()
    away = host.softhsm.tokendir.with_name("away")
    host.softhsm.tokendir.rename(away)
    host.softhsm.tokendir.mkdir()
    keys_before = sorted(path.name for path in Path(host.state.path).rglob("*.json"))
    for arguments in (["open", "main"], ["self-test", "main"]):
        failed = host.run(*arguments)
        assert failed.returncode == 6, failed.stdout + failed.stderr
        assert "token_unreachable" in failed.stderr or "unreachable" in failed.stdout
    assert list(host.softhsm.tokendir.iterdir()) == []
    assert sorted(path.name for path in Path(host.state.path).rglob("*.json")) == keys_before
    assert not host.readable()

    wrong = descriptor("not the passphrase")
    assert host.run("open", "main", "--passphrase-fd", str(wrong), fds=[wrong]).returncode == 4
    right = descriptor(RECOVERY)
    opened = host.run("open", "main", "--passphrase-fd", str(right), fds=[right])
    assert (opened.returncode, opened.stdout) == (0, "main: opened\n"), opened.stderr
    assert host.readable()
    host.unmount()

    host.softhsm.tokendir.rmdir()
    away.rename(host.softhsm.tokendir)
    assert host.run("open", "main").returncode == 0
    assert host.readable()


def test_a_refused_pin_is_not_tried_again_and_says_so(host: Host) -> None:
    host.unmount()
    host.pin_file.write_text("wrong-1234\n")
    codes = [host.run("open", "--wait", "20", "main") for dummy in range(2)]
    assert [one.returncode for one in codes] == [4, 4]
    assert "(pin_refused)" in codes[0].stderr
    assert "(pin_refused_before)" in codes[1].stderr
    assert not host.readable()
    host.pin_file.write_text(host.softhsm.pin + "\n")
    # The token counts the wrong try, so whoever corrected the PIN says so.
    assert host.run("open", "main").returncode == 5
    assert host.run("open", "--allow-low-pin-count", "main").returncode == 0


def test_a_pin_change_that_was_interrupted_does_not_keep_it_closed(host: Host) -> None:
    host.unmount()
    coming = Path(f"{host.pin_file}.new")
    shutil.copy2(host.pin_file, coming)
    coming.write_text("not-yet-set\n")
    assert "both PINs" in host.run("self-test", "--no-login", "main").stdout
    assert host.run("open", "main").returncode == 0
    assert host.readable()


def test_nobody_is_asked_without_a_terminal_and_an_operator_is(host: Host) -> None:
    host.unmount()
    record = Path(host.state.cluster_record("main"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "pin_source": {"kind": "none"}}))
    unattended = host.run("open", "--wait", "20", "main")
    assert unattended.returncode == 3
    assert "hsm-tde open main" in unattended.stderr
    tested = host.run("self-test", "main")
    assert tested.returncode == 0
    assert "an operator opens it" in tested.stdout

    code, shown = on_terminal([str(host.command), "open", "main"], {"PIN of token demo": host.softhsm.pin})
    assert code == 0, shown
    assert "main: opened" in shown
    assert host.softhsm.pin not in shown
    host.unmount()
    code, shown = on_terminal([str(host.command), "open", "main", "--passphrase"], {"Passphrase for cluster main": RECOVERY})
    assert code == 0, shown
    assert RECOVERY not in shown
    assert host.readable()


def test_the_self_test_names_what_would_fail(host: Host) -> None:
    host.unmount()
    image = host.home / "image"
    image.rename(host.home / "moved")
    tested = host.run("self-test", "main")
    assert tested.returncode == 6
    assert "will NOT open" in tested.stdout
    assert "its image is not there" in tested.stdout
    (host.home / "moved").rename(image)
    host.pin_file.chmod(0o644)
    tested = host.run("self-test", "main")
    assert (tested.returncode, "file_not_private" in json.dumps(host.facts("self-test"))) == (4, True)


def test_a_secret_goes_through_pipes_only(host: Host) -> None:
    secret = "line one\nno end of line, \N{SNOWMAN}"

    def run(what: str, path: str, how: str, **stdin: t.Any) -> subprocess.CompletedProcess[str]:
        if how == "token":
            return host.run(what, path, "--cluster", "main", **stdin)
        number = descriptor(RECOVERY)
        return host.run(what, path, "--passphrase-fd", str(number), fds=[number], **stdin)

    for how in ("token", "passphrase"):
        path = str(host.home / how)
        wrapped = run("wrap", path, how, stdin=None, input=secret)
        assert (wrapped.returncode, wrapped.stdout) == (0, ""), wrapped.stderr
        assert "one keyslot" in wrapped.stderr
        assert "line one" not in Path(path).read_text()
        unwrapped = run("unwrap", path, how)
        assert (unwrapped.returncode, unwrapped.stdout) == (0, secret), unwrapped.stderr

    again = run("wrap", path, "token", stdin=None, input="another")
    assert again.returncode == 2
    assert "key_exists" in again.stderr
    code, shown = on_terminal([str(host.command), "unwrap", str(host.home / "token"), "--cluster", "main"], {})
    assert code == 2
    assert "terminal_refused" in shown
    assert "line one" not in shown


@pytest.mark.skipif(not shutil.which("systemd-creds"), reason="systemd-creds is not installed")
def test_a_sealed_pin_is_tested_as_systemd_will_read_it(host: Host) -> None:
    sealed = host.home / "main.pin"
    record = Path(host.state.cluster_record("main"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "pin_source": {"kind": "credential", "path": str(sealed)}}))
    assert host.run("self-test", "main").returncode == 3
    # The host's own credential key is neither used nor made: the folder that it lies in is a private one.
    (host.home / "systemd").mkdir()
    seal = f"systemd-creds --quiet --name=main.pin encrypt {host.pin_file} {sealed} 2>/dev/null"
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-ec",
            f"mount --bind {host.home}/systemd /var/lib/systemd; {seal}; {host.command} self-test main",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"credential {sealed} can be read" in done.stdout
    assert "1 of 1 data keys open" in done.stdout


def test_no_secret_shows_in_what_is_printed_or_remembered(host: Host) -> None:
    host.unmount()
    calls = (["open", "main", "--json"], ["status"], ["self-test"], ["close", "main"], ["journal", "show", "--json"])
    said = "".join(done.stdout + done.stderr for done in (host.run(*arguments) for arguments in calls))
    kept = b"".join(path.read_bytes() for path in Path(host.state.path).rglob("*") if path.is_file())
    for secret in (host.softhsm.pin, RECOVERY):
        assert secret not in said
        assert secret.encode() not in kept


def test_a_hardened_process_can_work_as_the_database_s_user() -> None:
    """seteuid takes CAP_IPC_LOCK; with future memory locked under a limit, the next allocation failed."""

    def act() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        harden_process()
        os.seteuid(65534)
        return len(bytearray(64 << 20))

    assert support.in_child(act) == 64 << 20
