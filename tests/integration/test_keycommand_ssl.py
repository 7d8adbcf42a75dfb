# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A stock PostgreSQL whose TLS key needs a passphrase that only the token can open (``ssl_passphrase_command``)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess, kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import postgres, refusals, support
from ansible_collections.hsm.tde.tests.integration.keycommand import cheap_passphrases
from ansible_collections.hsm.tde.tests.integration.kmip import Authority, KmipServer
from ansible_collections.hsm.tde.tests.integration.userhost import UserHost

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not support.softhsm_library() or not postgres.programs(), reason="needs root, SoftHSM and PostgreSQL"
)

RECOVERY = "kept off the host 4711"


class TlsHost:
    """A host with a server that is to speak TLS."""

    def __init__(self, host: UserHost, server: postgres.Server) -> None:
        self.host, self.server = host, server
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]

    def module(self, name: str, *, check: bool = False, pin: str = "", **options: t.Any) -> dict[str, t.Any]:
        engine = {"kind": "ssl_passphrase", "command": str(self.host.command), **options.pop("keycommand", {})}
        args = {
            "engine": "keycommand", "cluster": "main", "state_directory": self.host.state.path, "keycommand": engine,
            **self.host.softhsm.options(token_label="demo", pin=pin or self.host.softhsm.pin), **options,
        }  # fmt: skip
        return support.run_module(name, args, check=check)

    def keystore(self, **options: t.Any) -> dict[str, t.Any]:
        slots = [{"name": "primary"}, {"name": "recovery", "protection": "passphrase", "passphrase": RECOVERY}]
        return self.module(
            "tde_keystore", **{"keyslots": slots, "pin_source": {"kind": "file", "path": str(self.host.pin_file)}, **options}
        )

    def certificate(self) -> None:
        """A TLS key under the wrapped passphrase, made as the server's user from the command's output."""
        data = self.server.data
        script = (
            f"umask 077; cd {data}; openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=db -days 2 -keyout plain.key -out server.crt 2>/dev/null"
            f" && {self.host.command} unwrap --cluster main | openssl pkcs8 -topk8 -in plain.key -out server.key -passout stdin"
            " && rm plain.key"
        )
        postgres.as_postgres("sh", "-ec", script)

    def configure(self, parameters: t.Mapping[str, str]) -> None:
        with (self.server.data / "postgresql.conf").open("a") as handle:
            handle.write("\nssl = on\n" + "".join(f"{name} = '{value}'\n" for name, value in parameters.items()))

    def tls(self) -> str:
        """What the server answers to a connection over TLS only."""
        return subprocess.run(
            [f"{self.server.bin}/psql", "-XAtq", f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres sslmode=require"],
            input="SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", capture_output=True, text=True, timeout=30, check=False,
        ).stdout.strip()  # fmt: skip

    def last_act(self) -> str:
        """The newest act in the user's journal."""
        return (self.host.home / "state.users/state" / postgres.USER / "journal.jsonl").read_text().splitlines()[-1]

    def log(self) -> str:
        return (self.server.log / "server.log").read_text()

    def start(self) -> bool:
        """Start it, on TCP too; whether it came up."""
        log = self.server.log / "server.log"
        log.unlink(missing_ok=True)
        options = f"-k {self.server.socket} -c listen_addresses=127.0.0.1 -c shared_buffers=16MB"
        argv = [
            f"{self.server.bin}/pg_ctl",
            "-D",
            str(self.server.data),
            "-w",
            "-t",
            "30",
            "-l",
            str(log),
            "-o",
            options,
            "start",
        ]
        return postgres.as_postgres(*argv, check=False).returncode == 0


@pytest.fixture(scope="module")
def tls() -> t.Iterator[TlsHost]:
    with cheap_passphrases(), postgres.folder() as home, postgres.server(home, start=False) as server:
        made = TlsHost(UserHost(home), server)
        result = made.keystore()
        assert not result.get("failed"), result
        made.certificate()
        made.configure(result["parameters"])
        with (server.data / "postgresql.conf").open("a") as handle:
            handle.write(f"port = {made.port}\nfsync = off\nlogging_collector = off\n")
        (server.data / "pg_hba.conf").write_text("local all all trust\nhostssl all all 127.0.0.1/32 trust\n")
        yield made


@pytest.fixture
def stopped(tls: TlsHost) -> t.Iterator[TlsHost]:
    """The server down; the user's state and the tokens are put back after the test."""
    host = tls.host
    kept = host.home / "kept"
    kept.mkdir()
    places = (host.softhsm.tokendir, host.home / "state.users", host.home / "state")
    for number, place in enumerate(places):
        subprocess.run(["cp", "-a", str(place), str(kept / str(number))], check=True)
    try:
        yield tls
    finally:
        tls.server.stop()
        shutil.rmtree(host.home / "kmip", ignore_errors=True)
        for number, place in enumerate(places):
            shutil.rmtree(place, ignore_errors=True)
            shutil.move(kept / str(number), place)
        kept.rmdir()
        tls.keystore()


def test_it_starts_with_a_key_that_only_the_token_opens_and_a_second_run_changes_nothing(stopped: TlsHost) -> None:
    assert "ENCRYPTED" in (stopped.server.data / "server.key").read_text()
    assert stopped.start(), stopped.log()
    assert stopped.tls() == "t"
    for again in (stopped.keystore(), stopped.module("tde_keystore", state="open"), stopped.module("tde_master_key")):
        assert (again.get("failed"), again["changed"]) == (None, False), again
    closed = stopped.module("tde_keystore", state="closed")
    assert (closed["failed"], closed["error_code"]) == (True, "engine_unsupported")
    for arguments, says in (
        (("self-test",), b"user postgres gets the secret"),
        (("open", "--all"), b"main: nothing to open"),
        (("status",), b"open"),
    ):
        done = stopped.host.run(*arguments, root=True)
        assert (done.returncode, says in done.stdout) == (0, True), (done.stdout, done.stderr)
    # A reload reads the key anew, with the command.
    postgres.as_postgres(f"{stopped.server.bin}/pg_ctl", "-D", str(stopped.server.data), "reload")
    deadline = time.monotonic() + 15
    while "unwrap_secret" not in stopped.last_act():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert stopped.tls() == "t"
    assert "not reloaded" not in stopped.log()


def test_the_master_key_is_rotated_and_the_server_starts_on_the_new_one(stopped: TlsHost) -> None:
    planned = stopped.module("tde_master_key", state="rotated", tag="2", check=True)
    assert planned["changed"]
    rotated = stopped.module("tde_master_key", state="rotated", tag="2")
    assert rotated["master_key"] == "hsm-tde.main.2", rotated
    assert [step["action"] for step in rotated["plan"]] == [step["action"] for step in planned["plan"]]
    assert rotated["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main.2 in token demo"
    assert stopped.start(), stopped.log()
    assert stopped.tls() == "t"
    again = stopped.module("tde_master_key", state="rotated", tag="2")
    assert not again["changed"], again
    info = stopped.module("tde_info")
    assert [(key["label"], key["current"]) for key in info["master_keys"]] == [("hsm-tde.main", False), ("hsm-tde.main.2", True)]
    assert any("was once under hsm-tde.main in token demo" in gap for gap in info["gaps"])


def test_the_secret_moves_to_another_token_with_a_pin_of_its_own(stopped: TlsHost) -> None:
    host = stopped.host
    host.softhsm.pin = "second-4711"
    host.softhsm.add_token("second")
    host.softhsm.pin = support.PIN
    host.give(host.softhsm.tokendir)
    listed = [{"name": "primary", "token_label": "second", "pin": "second-4711"}]
    moved = stopped.keystore(keyslots=listed)
    assert moved["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main in token second", moved
    actions = [step["action"] for step in moved["plan"]]
    assert actions.index("write_user_pin") < actions.index("remove_keyslot")
    assert host.pin_file.read_text() == "second-4711\n"
    assert stopped.start(), stopped.log()
    assert stopped.tls() == "t"
    again = stopped.keystore(keyslots=listed)
    assert not again["changed"], again["plan"]
    # A task that says nothing of keyslots and names the former token leaves record and PIN as they are.
    assert not stopped.keystore(keyslots=None)["changed"]


NO_TOKEN: dict[str, t.Any] = {"library": None, "library_environment": {}, "token_label": None, "pin": None}
AT_KMIP = [{"name": "primary", "protection": "kmip"}, {"name": "recovery", "protection": "passphrase", "passphrase": RECOVERY}]


def test_the_secret_moves_to_a_kmip_server_is_rotated_there_and_comes_back(stopped: TlsHost, kmip_server: KmipServer) -> None:
    host, secret = stopped.host, stopped.host.run("unwrap", "--cluster", "main").stdout
    options = {**host.kmip(kmip_server), "keyslots": AT_KMIP, "pin_source": {"kind": "none"}}
    planned = stopped.keystore(check=True, **options)
    moved = stopped.keystore(**options)
    assert not moved.get("failed"), moved
    assert moved["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main at KMIP service kmip", moved
    actions = [step["action"] for step in moved["plan"]]
    # Settled twice: with both protections before anything is removed, and with the new one alone.
    assert sorted(set(actions)) == sorted(step["action"] for step in planned["plan"])
    assert actions.index("prove_keyslot") < actions.index("publish_record") < actions.index("remove_keyslot")
    for again in (stopped.keystore(**options), stopped.keystore(keyslots=AT_KMIP, pin_source=None, **NO_TOKEN)):
        assert (again.get("failed"), again["changed"]) == (None, False), again
    record = json.loads((host.home / "state.users/clusters/main.json").read_text())
    assert (record["tokens"], record["kmip"][0]["servers"]) == ([], [kmip_server.address])
    # The token, and what opened it, are not needed any more.
    host.softhsm.tokendir.rename(host.home / "aside")
    host.softhsm.tokendir.mkdir()
    host.pin_file.unlink()
    try:
        # Servers and certificate are those of the record: nothing of them is named again.
        rotated = stopped.module("tde_master_key", state="rotated", tag="2", **NO_TOKEN)
        assert (rotated["changed"], rotated["master_key"]) == (True, "hsm-tde.main.2"), rotated
        assert not stopped.module("tde_master_key", state="rotated", tag="2", **NO_TOKEN)["changed"]
        assert not stopped.module("tde_keystore", state="open", **NO_TOKEN)["changed"]
        assert host.run("self-test", root=True).returncode == 0
        assert host.run("unwrap", "--cluster", "main").stdout == secret
        assert stopped.start(), stopped.log()
        assert stopped.tls() == "t"
        info = stopped.module("tde_info", **NO_TOKEN)
        assert (info["kmip"], info["tokens"]) == (record["kmip"], [])
        assert [key["kmip_service"] for key in info["master_keys"]][-2:] == ["kmip", "kmip"]
        assert any(record["kmip"][0]["key"] in gap for gap in info["gaps"])
        assert not any("No PIN source" in gap for gap in info["gaps"])
    finally:
        host.softhsm.tokendir.rmdir()
        (host.home / "aside").rename(host.softhsm.tokendir)
        stopped.server.stop()
    stopped.keystore(**host.kmip(kmip_server))
    record = json.loads((host.home / "state.users/clusters/main.json").read_text())
    assert (len(record["tokens"]), record["kmip"]) == (1, [])
    assert host.run("unwrap", "--cluster", "main").stdout == secret
    # Root does not take the key away from a user's secret, whichever keyslots it has by now.
    wish = {"name": "hsm-tde.main.2", "state": "absent", "confirm_destroy": "hsm-tde.main.2"}
    root = kmip_server.options(host.home.name)
    refused = support.run_module("kmip_key", {**root, "state_directory": host.state.path, "keys": [wish]})
    assert refused["error_code"] == "key_in_use", refused


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("down", "kmip_unreachable"),
        pytest.param("slow", "kmip_timeout", marks=pytest.mark.slow),
        pytest.param("expired", "kmip_client_certificate_expired", marks=pytest.mark.slow),
        pytest.param("authority", "kmip_ca_mismatch", marks=pytest.mark.slow),
        pytest.param("destroyed", "key_unreachable", marks=pytest.mark.slow),
        pytest.param("unreadable", "permission_denied", marks=pytest.mark.slow),
    ],
)
def test_without_the_kmip_server_the_server_says_why_it_does_not_start(
    stopped: TlsHost, kmip_server: KmipServer, how: str, says: str
) -> None:
    host, name = stopped.host, f"{stopped.host.home.name}.{how}"
    options = host.kmip(kmip_server, name)
    stopped.keystore(**options, keyslots=AT_KMIP)
    key, certificate, authority = (Path(options[f"kmip_{one}"]) for one in ("certificate_key", "certificate", "ca"))
    if how == "down":
        kmip_server.stop()
    elif how == "slow":
        kmip_server.pause()
    elif how == "expired":
        over = kmip_server.ca.issue(name, days=-1)
        certificate.write_bytes(over.path.read_bytes())
        key.write_bytes(over.key.read_bytes())
    elif how == "authority":
        authority.write_bytes(Authority(host.home / "stranger", "another authority").path.read_bytes())
    elif how == "destroyed":
        with Client(t.cast(KmipAccess, kmip_access(kmip_server.options(name)))) as client:
            uid = client.locate("hsm-tde.main")[0]
            client.revoke(uid, compromised=False)
            client.destroy(uid)
    else:
        os.chown(key, 0, 0)
    try:
        assert host.run("self-test", root=True).returncode in (3, 4, 6, 8)
        assert not stopped.start()
        ours = [line for line in stopped.log().splitlines() if line.startswith("hsm-tde: ")]
        assert len(ours) == 1, stopped.log()
        assert says in ours[0], ours
    finally:
        if how == "down":
            kmip_server.start()
        elif how == "slow":
            kmip_server.resume()


@pytest.mark.parametrize("how", ["root's own", pytest.param("readable for others", marks=pytest.mark.slow)])
def test_a_certificate_that_is_not_the_server_user_s_own_is_refused(stopped: TlsHost, kmip_server: KmipServer, how: str) -> None:
    host, options = stopped.host, stopped.host.kmip(kmip_server)
    key = Path(options["kmip_certificate_key"])
    if how == "root's own":
        os.chown(key, 0, 0)
    else:
        key.chmod(0o440)
    with refusals.unchanged(host.home / "state", host.home / "state.users"):
        for check in (True, False):
            refused = stopped.keystore(**options, keyslots=AT_KMIP, check=check)
            code = "permission_denied" if how == "root's own" else "file_not_private"
            refusals.clear(refused, code, str(key), f"user {host.user.pw_name}")


def test_a_changed_pin_is_changed_in_the_user_s_file_too(stopped: TlsHost) -> None:
    host = stopped.host
    options = host.softhsm.options(token_label="demo", state_directory=host.state.path, pin_file=str(host.pin_file))
    done = support.run_module("pkcs11_pin", {**options, "user_type": "user", "new_pin": "another-4711"})
    assert (done.get("failed"), done["changed"]) == (None, True), done
    info = host.pin_file.stat()
    assert (info.st_uid, info.st_mode & 0o777, host.pin_file.read_text()) == (host.user.pw_uid, 0o400, "another-4711\n")
    assert stopped.start(), stopped.log()
    # An unfinished change: the new PIN lies beside and is not in the token yet.
    coming = host.pin_file.with_name("pin.new")
    coming.write_text("yet-another\n")
    coming.chmod(0o400)
    os.chown(coming, info.st_uid, -1)
    stopped.server.stop()
    try:
        assert stopped.start(), stopped.log()
    finally:
        coming.unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("absent", "token_unreachable"),
        pytest.param("other", "token_unreachable", marks=pytest.mark.slow),
        ("wrong_pin", "pin_refused"),
        pytest.param("no_pin", "file_absent", marks=pytest.mark.slow),
        pytest.param("open_pin", "file_not_private", marks=pytest.mark.slow),
        ("damaged", "keystore_"),
    ],
)
def test_without_the_right_token_the_server_says_why_it_does_not_start(stopped: TlsHost, how: str, says: str) -> None:
    host = stopped.host
    if how in ("absent", "other"):
        shutil.rmtree(host.softhsm.tokendir)
        host.softhsm.tokendir.mkdir()
        if how == "other":
            # Another token of the same name in its place.
            host.softhsm.add_token("demo")
        host.give(host.softhsm.tokendir)
    elif how == "wrong_pin":
        host.pin_file.write_text("wrong-4711\n")
    elif how == "no_pin":
        host.pin_file.unlink()
    elif how == "open_pin":
        host.pin_file.chmod(0o444)
    else:
        secret = next((host.home / "state.users").rglob("secret.json"))
        secret.write_text(secret.read_text().replace('"ciphertext": "', '"ciphertext": "AAAA', 1))
    try:
        assert stopped.host.run("self-test", root=True).returncode in (3, 4, 6, 8)
        assert not stopped.start()
        ours = [line for line in stopped.log().splitlines() if line.startswith("hsm-tde: ")]
        assert len(ours) == 1, stopped.log()
        assert says in ours[0]
        for secret_text in ("wrong-4711", host.softhsm.pin, RECOVERY):
            assert secret_text not in stopped.log()
    finally:
        host.pin_file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_token_that_hangs_is_said_before_pg_ctl_gives_up(stopped: TlsHost) -> None:
    """SoftHSM reads its configuration from a pipe into which nobody writes."""
    conf = stopped.host.softhsm.conf
    kept = conf.read_text()
    conf.unlink()
    os.mkfifo(conf, 0o644)
    started = time.monotonic()
    try:
        assert not stopped.start()
        assert time.monotonic() - started < 60
        ours = [line for line in stopped.log().splitlines() if line.startswith("hsm-tde: ")]
        assert len(ours) == 1
        assert "(timeout)" in ours[0]
    finally:
        conf.unlink()
        conf.write_text(kept)
        conf.chmod(0o644)


def test_the_recovery_passphrase_gives_the_secret_without_the_token(stopped: TlsHost) -> None:
    right = stopped.host.run("unwrap", "--cluster", "main").stdout
    shutil.rmtree(stopped.host.softhsm.tokendir)
    reader, writer = os.pipe()
    os.write(writer, RECOVERY.encode())
    os.close(writer)
    user = stopped.host.user
    done = subprocess.run(
        [str(stopped.host.command), "unwrap", "--cluster", "main", "--passphrase-fd", str(reader)],
        capture_output=True, timeout=30, check=False, env={}, pass_fds=[reader], user=user.pw_uid, group=user.pw_gid, extra_groups=[],
    )  # fmt: skip
    os.close(reader)
    assert (done.returncode, done.stdout) == (0, right), done.stderr
    assert len(right) == 32


def test_root_does_not_destroy_the_user_s_master_key(tls: TlsHost) -> None:
    options = tls.host.softhsm.options(token_label="demo", pin=tls.host.softhsm.pin, state_directory=tls.host.state.path)
    done = support.run_module(
        "pkcs11_key", {**options, "keys": [{"label": "hsm-tde.main", "state": "absent", "confirm_destroy": "hsm-tde.main"}]}
    )
    assert (done.get("failed"), done.get("error_code")) == (True, "key_in_use"), done
    tls.host.give(tls.host.softhsm.tokendir)


def test_nothing_secret_is_printed_or_kept_in_the_clear(tls: TlsHost) -> None:
    secret = tls.host.run("unwrap", "--cluster", "main").stdout
    texts = [repr(tls.keystore()), repr(tls.module("tde_info")), repr(tls.module("tde_keystore", state="open"))]
    kept = [
        path.read_bytes() for folder in ("state", "state.users") for path in (tls.host.home / folder).rglob("*") if path.is_file()
    ]
    for one in (secret, tls.host.softhsm.pin.encode(), RECOVERY.encode()):
        assert all(one.decode() not in text for text in texts)
        assert all(one not in content for content in kept)
