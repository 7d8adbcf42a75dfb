# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A MariaDB server's work killed at random moments, then run again: the wished state, every row, no key at rest.

The rotation of its data keys, before and after the restart that it needs; the server, too, is killed while tables are built
anew. What its keys are protected by: from the token to KMIP, to a passphrase and back, with an outage and a boot in between. And the
way from a key file of its own into the store.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import (
    Credential,
    KeyStore,
    KmipCredential,
    PassphraseCredential,
    TokenCredential,
)
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import killing, mariadb
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS
from ansible_collections.hsm.tde.tests.integration.kmip import OWN_PASSPHRASE, WAYS, KmipServer
from ansible_collections.hsm.tde.tests.integration.mariadb import FORMER, FormerHost, Host

pytestmark = [pytest.mark.root, pytest.mark.skipif(not mariadb.usable(), reason="needs root, MariaDB's server and SoftHSM")]

#: Kills of each half of a rotation.
FEW, MANY = 2, 25
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))


#: Rotations of one host: each keeps the former keys, and all of them are wrapped anew by the next.
ROTATIONS = 4


@pytest.fixture(scope="module")
def home() -> t.Iterator[Path]:
    """A folder in memory."""
    killing.preload()
    mariadb.preload()
    with mariadb.folder() as path:
        yield path


@contextlib.contextmanager
def encrypted(home: Path) -> t.Iterator[Host]:
    """A server whose tables are under the default key."""
    with mariadb.host(home) as made:
        mariadb.fill(made.server, 20000)
        made.configure()
        made.run("tde_tablespace", tablespaces=[{"name": "default", "move": {"databases": ["shop"]}}])
        yield made
    subprocess.run(["umount", str(made.keys)], check=True)


def rotation(host: Host, number: int) -> killing.Task:
    """The task of a tag."""
    arguments = host.arguments(state="rotated", tag=str(number), mariadb={**host.options, "reencrypt": True})
    return killing.task("tde_master_key", arguments)


def sound(host: Host, work: killing.Task, number: int) -> None:
    """What holds after the last run of a rotation."""
    done = killing.run(work)
    assert (done["changed"], done["restart_required"], done["master_key"]) == (False, False, f"hsm-tde.main.{number}")
    host.journal()
    keys = killing.opened(host.state, [TokenCredential(host.hsm.access())], [PassphraseCredential(Secret(PASSPHRASE))])
    numbers = sorted(int(name.split(".")[1]) for name in keys)
    # No key was made twice, and none in vain.
    assert numbers == list(range(1, number + 3))
    spaces = {name: key for name, key in host.spaces().items() if name.startswith("shop/") and "FTS_" not in name}
    assert set(spaces.values()) == {str(numbers[-1])}, spaces
    assert len(spaces) == 5
    killing.no_leftovers(host.home)
    killing.no_secret([host.hsm.pin.encode(), PASSPHRASE.encode(), *keys.values()], host.state)


def server_dies_under(host: Host, work: killing.Task, seconds: float) -> None:
    """The server is killed while a task is at work, and started again; the task says what it lost."""
    process = killing.Process(work)
    process.ended(seconds)
    host.server.kill()
    with contextlib.suppress(TdeError):
        process.result()
    host.server.start()


def rotate(host: Host, number: int, first: killing.Kills, second: killing.Kills | None, seconds: float) -> None:
    """One rotation, killed before and after the restart; :param second: None: then the server dies, after some seconds."""
    expected = mariadb.rows(host)
    work = rotation(host, number)
    first.begin(work)
    assert mariadb.rows(host) == expected
    first.finish(work)
    assert killing.run(work)["restart_required"]
    host.server.restart()
    if second:
        second.begin(work)
    else:
        server_dies_under(host, work, seconds)
    assert mariadb.rows(host) == expected
    (second or first).finish(work)
    sound(host, work, number)
    assert mariadb.rows(host) == expected


@pytest.mark.parametrize("count", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
def test_a_rotation_killed_at_random_moments(home: Path, count: int) -> None:
    first = killing.AtRandom("rotation, before the restart", SEED)
    second = killing.AtRandom("rotation, after the restart", SEED + 1)
    chance = random.Random(SEED)
    hosts = 0
    try:
        while min(first.killed, second.killed) < count:
            hosts += 1
            with encrypted(home / f"{count}.{hosts}") as host:
                for number in range(2, 2 + min(ROTATIONS, count)):
                    dies = number == 1 + ROTATIONS
                    rotate(host, number, first, None if dies else second, chance.uniform(0.1, 0.6))
                keys = killing.opened(host.state, [TokenCredential(host.hsm.access())])
                killing.no_secret(keys.values(), host.home, but=[host.keys])
    finally:
        print(first, second, f"{hosts} hosts", sep="\n")
    assert len(first.found) > 1, "every kill left the same to do"


# --- what the keys are protected by

#: From the token: each to each other.
ROUND = ("kmip", "passphrase", "token", "passphrase", "kmip", "token")
#: Kills on the way to each.
SOME, ALL = 1, 50


class Protected:
    """A server whose keys' protection changes. :ivar way: it now; :ivar keys: the data keys, as they must stay."""

    def __init__(self, host: Host, service: KmipServer) -> None:
        self.host, self.service = host, service
        self.options = service.options(host.home.name.replace(".", "-"))
        self.way = "token"
        self.pin_file = host.home / "etc/pin"
        host.run("tde_keystore", keyslots=SLOTS, pin_source={"kind": "file", "path": str(self.pin_file)})
        self.keys = self.opened("token")
        self.rows = mariadb.rows(host)
        self.boots = 0

    def task(self, way: str) -> killing.Task:
        """What brings the keyslot ``primary`` under a protection."""
        slot = dict(WAYS[way])
        if way == "token":
            slot["pin"] = self.host.hsm.pin
        # Each key is opened by what it is under: the credentials of before and of then are the task's.
        arguments = self.host.arguments(keyslots=[slot, RECOVERY], **self.options)
        return killing.task("tde_keystore", arguments)

    def credential(self, way: str) -> Credential:
        if way == "kmip":
            access = kmip_access(self.options)
            assert access
            return KmipCredential(access)
        if way == "token":
            return TokenCredential(self.host.hsm.access())
        return PassphraseCredential(Secret(OWN_PASSPHRASE))

    def opened(self, way: str) -> dict[str, bytes]:
        """All data keys, which the protection and the recovery passphrase open alike."""
        return killing.opened(self.host.state, [self.credential(way)], [PassphraseCredential(Secret(PASSPHRASE))])

    def boot(self, *ways: str) -> None:
        """An outage, the boot with what one of the protections asks for, and every row."""
        self.boots += 1
        self.host.server.kill()
        assert any(self.host.boots(OWN_PASSPHRASE if way == "passphrase" else None) for way in ways), "no way opens it"
        self.host.server.start()
        assert mariadb.rows(self.host) == self.rows

    def sound(self, work: killing.Task) -> None:
        """What holds after the last run of a migration."""
        done = killing.run(work)
        assert (done["changed"], done["restart_required"]) == (False, False)
        assert self.opened(self.way) == self.keys
        for key in KeyStore(StateDirectory(str(self.host.state)), "main").describe():
            assert sorted(slot["name"] for slot in key["keyslots"]) == ["primary", "recovery"]
            assert all(slot["proved"] for slot in key["keyslots"])
            assert {slot["protection"] for slot in key["keyslots"] if slot["name"] == "primary"} == {self.way}
        access = kmip_access(self.options)
        assert access
        with Client(access) as client:
            assert len(client.locate("hsm-tde.main")) <= 1, "a KEK was made twice"
        assert killing.in_token(self.host.hsm.access(), self.host.state, ["hsm-tde.main"]) == [1]
        self.host.journal()
        killing.no_leftovers(self.host.home)
        secrets = [self.host.hsm.pin.encode(), PASSPHRASE.encode(), OWN_PASSPHRASE.encode(), *self.keys.values()]
        killing.no_secret(secrets, self.host.home, but=[self.host.keys, self.pin_file])


@pytest.mark.parametrize("count", [pytest.param(SOME, id="few"), pytest.param(ALL, id="many", marks=pytest.mark.slow)])
def test_migrations_killed_at_random_moments(home: Path, kmip_server: KmipServer, count: int) -> None:
    """Each to each other, so many kills on the way to each; the server boots after each, and often right after the kill."""
    kills = {way: killing.AtRandom(f"migration to {way}", SEED + number) for number, way in enumerate(WAYS)}
    hosts = number = boots = 0
    try:
        while min(one.killed for one in kills.values()) < count:
            # Anew each time: with its journal grows what a run takes, and the kills are to fall into the work.
            hosts += 1
            with encrypted(home / f"migrations.{count}.{hosts}") as host:
                protected = Protected(host, kmip_server)
                for way in ROUND * 2:
                    before, protected.way = protected.way, way
                    work = protected.task(way)
                    kills[way].begin(work)
                    if number % 5 < 2:
                        protected.boot(before, way)
                    kills[way].finish(work)
                    protected.sound(work)
                    protected.boot(way)
                    number += 1
                    if min(one.killed for one in kills.values()) >= count:
                        break
                boots += protected.boots
    finally:
        print(*kills.values(), f"{number} migrations of {hosts} hosts, {boots} boots", sep="\n")
    if count > SOME:
        assert all(len(one.found) > 1 for one in kills.values()), "every kill left the same to do"


# --- from a key file of the server's own into the store

#: Kills of the whole way, in its three parts.
ONCE, OFTEN = 1, 50


def way(host: FormerHost, state: str, what: str) -> killing.Task:
    """One of the tasks that lead from the former key file to ours."""
    more = {"keyslots": SLOTS} if state == "present" else {}
    arguments = host.arguments(state=state, mariadb={**host.options, "former_key_file": what}, **more)
    return killing.task("tde_keystore", arguments)


def outage(host: FormerHost, rows: list[str]) -> None:
    """The server dies and the memory is empty; the boot opens the keystore, if there is one yet that the server asks for."""
    host.server.kill()
    assert host.boots(PASSPHRASE) or not (host.state / "clusters/main.json").exists()
    host.server.start()
    assert mariadb.rows(host, "under_seven") == rows


def from_the_file(host: FormerHost, rows: list[str], parts: t.Sequence[killing.Kills], chance: random.Random) -> None:
    """The whole way once, each part killed and run again."""
    for part, state, what in zip(parts, ("present", "open", "open"), ("take", "take", "remove"), strict=True):
        work = way(host, state, what)
        part.begin(work)
        if chance.random() < 0.5:
            outage(host, rows)
        part.finish(work)
        done = killing.run(work)
        assert done["restart_required"] == (not done["changed"] and state == "open" and what == "take" and not ours(host))
        assert not done["changed"]
        assert mariadb.rows(host, "under_seven") == rows
        assert host.former.exists() == (what != "remove")
        if state == "open" and not ours(host):
            host.server.restart()
            assert mariadb.rows(host, "under_seven") == rows
    keys = killing.opened(host.state, [TokenCredential(host.hsm.access())], [PassphraseCredential(Secret(PASSPHRASE))])
    assert {int(name.split(".")[1]): key for name, key in keys.items() if name.split(".")[1] in map(str, FORMER)} == {
        number: bytes.fromhex(key) for number, key in FORMER.items()
    }
    assert sorted(int(name.split(".")[1]) for name in keys) == [1, 2, 3, 5, 7]
    host.journal()
    killing.no_leftovers(host.home)
    killing.no_secret([host.hsm.pin.encode(), PASSPHRASE.encode(), *keys.values()], host.home, but=[host.keys])
    host.server.kill()
    assert host.boots(PASSPHRASE)
    host.server.start()
    assert mariadb.rows(host, "under_seven") == rows


def ours(host: Host) -> bool:
    """Whether the server works with our key file."""
    return host.server.sql("SELECT @@file_key_management_filename") == str(host.keys / "keys")


@pytest.mark.parametrize("count", [pytest.param(ONCE, id="few"), pytest.param(OFTEN, id="many", marks=pytest.mark.slow)])
def test_the_way_from_a_key_file_killed_at_random_moments(home: Path, count: int) -> None:
    names = ("keys taken", "keys given", "file removed")
    parts = [killing.AtRandom(f"from a key file, {name}", SEED + number) for number, name in enumerate(names)]
    chance = random.Random(SEED)
    hosts = 0
    with mariadb.formerly(home / f"file.{count}") as host:
        rows = mariadb.rows(host, "under_seven")
        host.server.stop()
        again = home / f"template.{count}"
        subprocess.run(["cp", "-a", str(host.home), str(again)], check=True)
        try:
            while sum(part.killed for part in parts) < count:
                hosts += 1
                host.server.start()
                from_the_file(host, rows, parts, chance)
                host.server.stop()
                subprocess.run(["umount", str(host.keys)], check=True)
                shutil.rmtree(host.home)
                subprocess.run(["cp", "-a", str(again), str(host.home)], check=True)
        finally:
            print(*parts, f"{hosts} hosts", sep="\n")
