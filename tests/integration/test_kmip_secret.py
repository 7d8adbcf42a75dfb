# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A user's own secret under a KMIP server: from a passphrase to a token to the server and back, killed at random moments."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path
from unittest import mock

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command.main import main
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import record as records
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import SecretFile
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import (
    Credential,
    KeyStore,
    KmipCredential,
    KmipSlot,
    PassphraseCredential,
    TokenCredential,
)
from ansible_collections.hsm.tde.plugins.module_utils.kmip import kek
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess, kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.tests.integration import killing, refusals, support
from ansible_collections.hsm.tde.tests.integration.kmip import Authority, KmipServer, create_seen_by_all, free_port

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or not support.softhsm_library(), reason="needs root and SoftHSM"),
]

FEW, MANY = 3, 50
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))

SECRET = "marker-of-the-wrapped-secret"
PASSPHRASE, RECOVERY_PASSPHRASE = "marker-of-the-passphrase", "marker-of-the-recovery"
RECOVERY = {"name": "recovery", "protection": "passphrase", "passphrase": RECOVERY_PASSPHRASE}
WAYS: dict[str, dict[str, t.Any]] = {
    "passphrase": {"protection": "passphrase", "passphrase": PASSPHRASE},
    "token": {"protection": "token"},
    "kmip": {"protection": "kmip"},
}
#: Each to each other.
ROUND = ("token", "kmip", "passphrase", "kmip", "token", "passphrase")


class Bench:
    """One wrapped secret, a token, and a client of the server. :ivar way: what its keyslot ``primary`` is under."""

    def __init__(self, home: Path, hsm: support.SoftHsm, server: KmipServer) -> None:
        self.home, self.hsm, self.server = home, hsm, server
        (home / "secrets").mkdir(mode=0o700)
        self.path = home / "secrets/app.key"
        self.state = StateDirectory(str(home / "state"))
        self.way = "passphrase"
        self.kmip = server.options(home.name)

    def arguments(self, way: str = "", **more: t.Any) -> dict[str, t.Any]:
        """The options of a task; :param way: what the keyslot ``primary`` shall be under."""
        return {
            "path": str(self.path), "state_directory": self.state.path, **self.hsm.options(token_label="demo", pin=self.hsm.pin), **self.kmip,
            **({"state": "rewrapped", "keyslots": [WAYS[way], RECOVERY]} if way else {}), **more,
        }  # fmt: skip

    def run(self, way: str = "", *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        result = support.run_module("wrapped_secret", self.arguments(way, **more), check=check, diff=True)
        assert not result.get("failed"), result
        for marker in (SECRET, PASSPHRASE, RECOVERY_PASSPHRASE, self.hsm.pin):
            assert marker not in json.dumps(result)
        return result

    def refused(self, code: str, way: str = "", *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """The module says no, with the code, and leaves everything as it was."""
        with refusals.unchanged(self.home / "secrets", self.home / "state"):
            result = support.run_module("wrapped_secret", self.arguments(way, **more), check=check)
            refusals.clear(result, code, secrets=[SECRET, PASSPHRASE, RECOVERY_PASSPHRASE, self.hsm.pin])
        return result

    @property
    def access(self) -> KmipAccess:
        found = kmip_access(self.kmip)
        assert found
        return found

    def credential(self, way: str) -> Credential:
        if way == "kmip":
            return KmipCredential(self.access)
        return TokenCredential(self.hsm.access()) if way == "token" else PassphraseCredential(Secret(PASSPHRASE))

    def opened(self, *ways: str) -> str:
        """The secret, as one of the ways opens it."""
        file = SecretFile(self.state, str(self.path))
        credentials = [self.credential(way) for way in ways]

        def act() -> str:
            return file.open(credentials)[1].text()

        return support.in_child(act)

    def keks(self, label: str = "hsm-tde.secrets") -> list[str]:
        with Client(self.access) as client:
            return client.locate(label)


@pytest.fixture
def bench(tmp_path: Path, softhsm: support.SoftHsm, kmip_server: KmipServer) -> t.Iterator[Bench]:
    with mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10)):
        yield Bench(tmp_path, softhsm, kmip_server)


def actions(result: t.Mapping[str, t.Any]) -> list[str]:
    return [step["action"] for step in result["plan"]]


def under(result: t.Mapping[str, t.Any]) -> dict[str, str]:
    return {slot["name"]: slot["protection"] for slot in result["wrapped_keyslots"]}


def command(*arguments: str, stdin: bytes = b"") -> tuple[int, bytes]:
    """``hsm-tde`` with a pipe at both ends: exit code and what it wrote."""

    def act() -> tuple[int, bytes]:
        reader, writer = os.pipe()
        os.write(writer, stdin)
        os.close(writer)
        os.dup2(reader, 0)
        back, out = os.pipe()
        os.dup2(out, 1)
        os.close(out)
        code = main(list(arguments))
        os.dup2(2, 1)
        return code, os.read(back, 1 << 16)

    return support.in_child(act)


def test_from_a_passphrase_to_a_token_to_kmip_and_back(bench: Bench, tmp_path: Path) -> None:
    bench.run(secret=SECRET, keyslots=[WAYS["passphrase"], RECOVERY])
    for number, way in enumerate(("token", "kmip", "token", "kmip", "passphrase")):
        credentials = [WAYS[bench.way]]
        before = bench.path.read_bytes()
        planned = bench.run(way, check=True, credentials=credentials)
        assert bench.path.read_bytes() == before
        if number < 2:
            assert bench.keks() == []
        moved = bench.run(way, credentials=credentials)
        assert actions(moved) == actions(planned)
        # Its KEK is made once, however often it is come back to.
        assert actions(moved) == [*(["create_kek"] if number < 2 else []), "add_keyslot", "prove_keyslot", "remove_keyslot"]
        assert under(moved) == {"primary": way, "recovery": "passphrase"}
        assert moved["diff"]["before"]["keyslots"] != moved["diff"]["after"]["keyslots"]
        assert not bench.run(way)["changed"]
        assert bench.opened(way) == SECRET
        bench.way = way
    assert len(bench.keks()) == 1


def test_a_new_secret_under_kmip_alone_and_out_of_it(bench: Bench, tmp_path: Path) -> None:
    none = {"library": None, "library_environment": {}, "token_label": None, "pin": None}
    wish = {"generate_length": 43, "keyslots": [WAYS["kmip"]], **none}
    assert actions(bench.run(check=True, **wish)) == ["create_kek", "create_secret"]
    assert not os.path.exists(bench.state.path)
    made = bench.run(**wish)
    slot = made["wrapped_keyslots"][0]
    assert (slot["kmip_service"], slot["kek_label"], slot["kek_id"]) == ("kmip", "hsm-tde.secrets", bench.keks()[0])
    assert slot["kek_leaves_server"] == "no"
    assert "one keyslot" in json.dumps(made["warnings"])
    assert not bench.run(**wish)["changed"]
    # Who writes the file does not choose whom root believes.
    stored = bench.path.read_text()
    for public in (bench.server.address, str(bench.server.port), str(bench.server.ca.path), bench.kmip["kmip_certificate"]):
        assert public not in stored
    destination = tmp_path / "run" / "app.key"
    destination.parent.mkdir(mode=0o755)
    out = {"state": "unwrapped", "destination": str(destination), "credentials": [WAYS["kmip"]], **none}
    assert bench.run(check=True, **out)["changed"]
    assert not destination.exists()
    assert bench.run(**out)["changed"]
    assert not bench.run(**out)["changed"]
    assert len(destination.read_text()) == 43
    # Another KEK at the server, by its label; the former one stays.
    rotate = {"state": "rewrapped", "keyslots": [WAYS["kmip"]], "kek_label": "hsm-tde.secrets.2", **none}
    assert actions(bench.run(**rotate)) == ["create_kek", "add_keyslot", "prove_keyslot", "remove_keyslot"]
    assert not bench.run(**rotate)["changed"]
    assert [len(bench.keks(label)) for label in ("hsm-tde.secrets", "hsm-tde.secrets.2")] == [1, 1]
    assert bench.opened("kmip") == destination.read_text()


def test_a_service_of_a_keyslot_s_own(bench: Bench, tmp_path: Path) -> None:
    """Two services at once: the task's own, and one that a keyslot names."""
    second = KmipServer(tmp_path / "second")
    try:
        there = {name.removeprefix("kmip_"): value for name, value in second.options().items()}
        slots = [WAYS["kmip"], {"name": "other", "protection": "kmip", "kmip": {"service": "second", **there}}]
        made = bench.run(secret=SECRET, keyslots=slots)
        assert [slot["kmip_service"] for slot in made["wrapped_keyslots"]] == ["kmip", "second"]
        bench.server.stop()
        # Either opens it; one that is down does not keep the other from it.
        assert not bench.run(credentials=slots)["changed"]
    finally:
        bench.server.start()
        second.close()


def test_what_keeps_the_server_from_answering_is_said_and_nothing_is_changed(bench: Bench, tmp_path: Path) -> None:
    bench.run(secret=SECRET, keyslots=[WAYS["passphrase"], RECOVERY])
    over = bench.server.ca.issue(tmp_path.name, days=-1)
    stranger = Authority(tmp_path / "stranger", "another authority")
    for check in (True, False):
        for code, options in (
            ("kmip_unreachable", {"kmip_servers": [f"localhost:{free_port()}"]}),
            ("kmip_ca_mismatch", {"kmip_ca": str(stranger.path)}),
            ("kmip_client_certificate_expired", bench.server.options(over)),
            ("kmip_host_name_mismatch", {"kmip_servers": [f"127.0.0.1:{bench.server.port}"]}),
            ("credential_missing", dict.fromkeys(bench.kmip)),
            ("invalid_option", {"kmip_ca": None}),
        ):
            bench.refused(code, "kmip", check=check, **options)
        bench.server.pause()
        try:
            bench.refused("kmip_timeout", "kmip", check=check, kmip_timeout=0.5)
        finally:
            bench.server.resume()
    assert bench.keks() == []
    assert bench.opened("passphrase") == SECRET
    # The same once it is under the server: the recovery passphrase needs nobody.
    bench.run("kmip")
    bench.server.stop()
    try:
        bench.refused("kmip_unreachable", credentials=[WAYS["kmip"]])
        bench.refused("kmip_unreachable", "kmip")
        assert not bench.run(credentials=[RECOVERY])["changed"]
        # It goes where it can be opened while the server is gone for good.
        assert bench.run("passphrase", credentials=[RECOVERY])["changed"]
    finally:
        bench.server.start()
    assert bench.opened("passphrase") == SECRET


def test_a_server_whose_certificate_is_over(bench: Bench, tmp_path: Path) -> None:
    late = bench.server.ca.issue("server", ["localhost"], days=-1)
    second = KmipServer(tmp_path / "second", ca=bench.server.ca, certificate=late)
    try:
        bench.refused("kmip_certificate_expired", secret=SECRET, keyslots=[WAYS["kmip"]], kmip_servers=[second.address])
    finally:
        second.close()
    assert not bench.path.exists()


def test_keys_of_the_name_that_are_others_are_not_taken(bench: Bench) -> None:
    wish = {"secret": SECRET, "keyslots": [WAYS["kmip"], RECOVERY]}
    with Client(bench.access) as client:
        twins = [client.create("twice", "aes", 256, ["encrypt", "decrypt"]) for dummy in range(2)]
        for uid in twins:
            client.activate(uid)
    with Client(t.cast(KmipAccess, kmip_access(bench.server.options("other")))) as other:
        create_seen_by_all(other, f"seen.{bench.home.name}")
    for check in (True, False):
        # Made by this certificate, though not by this host.
        error = bench.refused("key_foreign", kek_label="twice", check=check, **wish)
        assert all(uid in error["msg"] for uid in twins)
        bench.refused("kmip_key_foreign", kek_label=f"seen.{bench.home.name}", check=check, **wish)
    assert bench.run(**wish)["changed"]
    mine = bench.keks()
    # One that another host makes of this name later is not mistaken for it.
    with Client(bench.access) as client:
        client.activate(client.create("hsm-tde.secrets", "aes", 256, ["encrypt", "decrypt"]))
    assert not bench.run("kmip")["changed"]
    assert bench.opened("kmip") == SECRET
    # Gone at the server: never made anew in its place.
    with Client(bench.access) as client:
        client.revoke(mine[0], compromised=False)
        bench.refused("kmip_key_state", credentials=[WAYS["kmip"]])
        client.destroy(mine[0])
    bench.refused("key_unreachable", credentials=[WAYS["kmip"]])
    bench.refused("key_unreachable", "kmip", credentials=[RECOVERY])


def test_the_key_under_a_secret_is_not_destroyed(bench: Bench) -> None:
    bench.run(secret=SECRET, keyslots=[WAYS["kmip"], RECOVERY])
    for state in ("absent", "deactivated"):
        wish = {"name": "hsm-tde.secrets", "state": state, "confirm_destroy": "hsm-tde.secrets"}
        refused = support.run_module("kmip_key", {**bench.kmip, "state_directory": bench.state.path, "keys": [wish]})
        refusals.clear(refused, "key_in_use", f"wrapped secret {bench.path}")
    assert bench.opened("kmip") == SECRET


def test_the_command_wraps_and_gives_it(bench: Bench) -> None:
    given = bench.kmip
    here = (
        *("--kmip-server", f"localhost:{free_port()}", "--kmip-server", given["kmip_servers"][0]),
        *("--kmip-ca", given["kmip_ca"], "--kmip-certificate", given["kmip_certificate"]),
        *("--kmip-certificate-key", given["kmip_certificate_key"]),
    )
    state = ("--state-directory", bench.state.path)
    assert command(*state, "wrap", str(bench.path), *here, stdin=SECRET.encode()) == (0, b"")
    assert command(*state, "unwrap", str(bench.path), *here) == (0, SECRET.encode())
    assert bench.opened("kmip") == SECRET
    assert not bench.run(keyslots=[WAYS["kmip"]])["changed"]
    assert command(*state, "unwrap", str(bench.path), *here[:2], *here[4:]) == (6, b"")


def test_the_command_takes_the_service_of_a_cluster_s_record(bench: Bench) -> None:
    state, registry, journal = bench.state, Registry(bench.state), Journal(bench.state.journal)
    store = KeyStore(state, "main")
    store.create()
    with Client(bench.access) as client:
        ref = kek.create_kek(client, "hsm-tde.main", cluster="main", registry=registry, journal=journal, state=state)
    store.create_key("cluster", 64, [KmipSlot("primary", bench.access, ref)])
    records.write(state, records.Record("main", "postgresql", kmip=(bench.access,)))
    here = ("--state-directory", state.path)
    assert command(*here, "wrap", str(bench.path), "--cluster", "main", stdin=SECRET.encode()) == (0, b"")
    assert command(*here, "unwrap", str(bench.path), "--cluster", "main") == (0, SECRET.encode())
    assert [len(bench.keks(label)) for label in ("hsm-tde.main", "hsm-tde.secrets")] == [1, 1]


# --- killed


def kill_and_finish(bench: Bench, count: int) -> None:
    bench.run(secret=SECRET, keyslots=[WAYS["passphrase"], RECOVERY])
    kills = killing.AtRandom("rewrap", SEED)
    try:
        while kills.killed < count:
            before, bench.way = bench.way, ROUND[kills.killed % len(ROUND)]
            work = killing.task("wrapped_secret", bench.arguments(bench.way, credentials=[WAYS[before]]))
            kills.begin(work)
            # At every moment what opened it before, or what opens it then, opens it.
            assert bench.opened(before, bench.way) == SECRET
            kills.finish(work)
            assert bench.opened(bench.way) == SECRET
            again = killing.run(work)
            assert not again["changed"]
            assert under(again) == {"primary": bench.way, "recovery": "passphrase"}
            assert all(slot["proved"] for slot in again["wrapped_keyslots"])
            killing.no_leftovers(bench.home)
            killing.no_secret([text.encode() for text in (SECRET, PASSPHRASE, RECOVERY_PASSPHRASE, bench.hsm.pin)], bench.home)
            assert len(bench.keks()) <= 1, "a KEK was made twice"
    finally:
        print(kills)
    assert len(kills.found) > 1, "every kill left the same to do"


def test_killed_at_a_few_random_moments(bench: Bench) -> None:
    killing.preload()
    kill_and_finish(bench, FEW)


@pytest.mark.slow
def test_killed_at_many_random_moments(bench: Bench) -> None:
    killing.preload()
    kill_and_finish(bench, MANY)
