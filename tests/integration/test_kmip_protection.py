# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Data keys of a cluster under a KMIP server: from a passphrase to a token to the server and back, killed at random moments."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command.main import main
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
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt
from ansible_collections.hsm.tde.tests.integration import killing, support
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, Estate, estate, usable
from ansible_collections.hsm.tde.tests.integration.kmip import OWN_PASSPHRASE, WAYS, KmipServer

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

FEW, MANY = 3, 50
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))

#: Each to each other.
ROUND = ("token", "kmip", "passphrase", "kmip", "token", "passphrase")


class House:
    """A cluster with one encrypted place, whose data key begins under a passphrase. :ivar key: the data key, as it must stay."""

    def __init__(self, host: Estate, server: KmipServer) -> None:
        self.host, self.server = host, server
        self.client = server.client(host.home.name)
        self.options = server.options(self.client)
        self.way = "passphrase"
        host.run("tde_keystore", **self.wish("passphrase"))
        self.key = self.opened("passphrase")["cluster"]
        self.sound()

    def wish(self, way: str) -> dict[str, t.Any]:
        """The options of ``tde_keystore`` that bring the keyslot ``primary`` under a protection."""
        slot = dict(WAYS[way])
        if way == "token":
            slot["pin"] = self.host.hsm.pin
        return {"keyslots": [slot, RECOVERY], "passphrase": PASSPHRASE, **self.options}

    def credential(self, way: str) -> Credential:
        if way == "kmip":
            access = kmip_access(self.options)
            assert access
            return KmipCredential(access)
        if way == "token":
            return TokenCredential(self.host.hsm.access())
        return PassphraseCredential(Secret(OWN_PASSPHRASE))

    def opened(self, *ways: str) -> dict[str, bytes]:
        recovery = PassphraseCredential(Secret(PASSPHRASE))
        return killing.opened(self.host.state, *([self.credential(way)] for way in ways), [recovery])

    def slots(self) -> list[dict[str, t.Any]]:
        return t.cast("list[dict[str, t.Any]]", KeyStore(StateDirectory(str(self.host.state)), "main").describe()[0]["keyslots"])

    def sound(self) -> None:
        """The wished keyslots and no others, proved; each opens the same data key, which is that of the place."""
        assert sorted(slot["name"] for slot in self.slots()) == ["primary", "recovery"]
        assert all(slot["proved"] for slot in self.slots())
        assert {slot["protection"] for slot in self.slots() if slot["name"] == "primary"} == {self.way}
        assert self.opened(self.way) == {"cluster": self.key}
        policy = fscrypt.policy(str(self.host.mount / "data"))
        assert policy
        assert policy["identifier"] == fscrypt.identifier(self.key)
        killing.no_leftovers(self.host.home)
        with Client(t.cast(t.Any, kmip_access(self.options))) as client:
            assert len(client.locate("hsm-tde.main")) <= 1, "a KEK was made twice"

    def move(self, way: str) -> dict[str, t.Any]:
        self.way = way
        return self.host.run("tde_keystore", **self.wish(way))


@pytest.fixture
def house(kmip_server: KmipServer) -> t.Iterator[House]:
    with estate(coverage="cluster", data_directory="{home}/mnt/data", image_size="32M") as host:
        yield House(host, kmip_server)


def actions(result: dict[str, t.Any]) -> list[str]:
    return [step["action"] for step in result["plan"]]


def test_from_a_passphrase_to_a_token_to_kmip_and_back(house: House) -> None:
    for number, way in enumerate(("token", "kmip", "token", "passphrase")):
        planned = house.host.run("tde_keystore", check=True, **house.wish(way))
        result = house.move(way)
        assert actions(result) == actions(planned)
        assert actions(result)[-3:] == ["add_keyslot", "prove_keyslot", "remove_keyslot"]
        # Its master key is made once, however often it is come back to.
        assert ("create_kek" in actions(result)) == (number < 2)
        house.sound()
        assert not house.host.run("tde_keystore", **house.wish(way))["changed"]
    proved = [entry["action"] for entry in house.host.journal() if entry["action"] in ("prove_keyslot", "remove_keyslot")]
    assert proved.index("prove_keyslot") < proved.index("remove_keyslot")


def test_who_writes_the_store_does_not_choose_whom_root_believes(house: House) -> None:
    house.move("kmip")
    stored = (house.host.state / "store/main/cluster.json").read_text()
    for secret in (house.server.address, str(house.server.port), str(house.server.ca.path), str(house.client.path)):
        assert secret not in stored
    record = json.loads((house.host.state / "clusters/main.json").read_text())
    assert record["kmip"][0]["servers"] == [house.server.address]
    slot = next(slot for slot in house.slots() if slot["name"] == "primary")
    assert (slot["kmip_service"], slot["kek_label"], slot["kek_leaves_server"]) == ("kmip", "hsm-tde.main", "no")
    info = house.host.run("tde_info", token_label=None, pin=None)
    assert info["kmip"] == record["kmip"]
    assert info["master_keys"][-1]["kmip_service"] == "kmip"
    assert any(str(house.client.key) in gap for gap in info["gaps"])


def test_a_new_master_key_at_the_server(house: House) -> None:
    house.move("kmip")
    rotated = {"state": "rotated", "tag": "2026", "token_label": None, "pin": None}
    # Servers and certificates are those of the record: nothing of them is named again.
    result = house.host.run("tde_master_key", **rotated)
    assert (result["changed"], result["master_key"]) == (True, "hsm-tde.main.2026")
    assert not house.host.run("tde_master_key", **rotated)["changed"]
    house.sound()
    with Client(t.cast(t.Any, kmip_access(house.options))) as client:
        assert [len(client.locate(name)) for name in ("hsm-tde.main", "hsm-tde.main.2026")] == [1, 1], "the former one stays"


def test_from_one_service_to_another(house: House, tmp_path: Path) -> None:
    """Also what shows that the record's services are used, whichever of them the keyslots name."""
    house.move("kmip")
    second = KmipServer(tmp_path / "second")
    try:
        there = {name.removeprefix("kmip_"): value for name, value in second.options().items()}
        slot = {"name": "primary", "protection": "kmip", "kmip": {"service": "second", **there}}
        moved = house.host.run("tde_keystore", keyslots=[slot, RECOVERY], passphrase=PASSPHRASE)
        assert moved["data_keys"]["cluster"]["keyslots"]["primary"] == "hsm-tde.main at KMIP service second"
        assert not house.host.run("tde_keystore", keyslots=[slot, RECOVERY], passphrase=PASSPHRASE)["changed"]
        house.server.stop()
        # The former one is not needed any more, and neither module nor command is told of the new one.
        for way in ("module", "command"):
            house.host.unmount()
            if way == "module":
                assert house.host.run("tde_keystore", state="open", token_label=None, pin=None)["changed"]
            else:
                assert command("--state-directory", str(house.host.state), "open", "main") == 0
            assert fscrypt.key_status(str(house.host.mount), fscrypt.identifier(house.key)) == "present"
        short = {"name": "primary", "protection": "kmip", "kmip": {"service": "second"}}
        assert not house.host.run("tde_keystore", keyslots=[short, RECOVERY], passphrase=PASSPHRASE)["changed"]
    finally:
        second.close()
        house.server.start()


def command(*arguments: str) -> int:
    return support.in_child(lambda: main(list(arguments)))


def test_the_boot_needs_nobody(house: House) -> None:
    house.move("kmip")
    house.host.unmount()
    here = ("--state-directory", str(house.host.state))
    assert command(*here, "open", "main") == 0
    assert fscrypt.key_status(str(house.host.mount), fscrypt.identifier(house.key)) == "present"
    assert command(*here, "self-test", "main") == 0
    house.host.unmount()
    house.server.stop()
    try:
        assert command(*here, "open", "main") != 0
        # The recovery keyslot asks no server.
        opened = house.host.run("tde_keystore", state="open", token_label=None, pin=None, passphrase=PASSPHRASE)
        assert opened["changed"]
        assert (house.host.mount / "data").is_dir()
    finally:
        house.server.start()


def test_a_server_that_is_down_or_strange_changes_nothing(house: House, tmp_path: Path) -> None:
    house.server.stop()
    try:
        house.host.refused("tde_keystore", "kmip_unreachable", **house.wish("kmip"))
    finally:
        house.server.start()
    strange = house.server.ca.issue("localhost", ["localhost"])
    options = {**house.wish("kmip"), "kmip_ca": str(strange.path)}
    house.host.refused("tde_keystore", "kmip_ca_mismatch", **options)
    house.move("kmip")
    # Another KMIP service under the name, without the key: nothing is made in its place.
    with Client(t.cast(t.Any, kmip_access(house.options))) as client:
        uid = client.locate("hsm-tde.main")[0]
        client.revoke(uid, compromised=False)
        client.destroy(uid)
    house.host.refused("tde_keystore", "key_unreachable", **house.wish("kmip"))
    # The recovery passphrase brings it back under a token.
    house.move("token")
    house.sound()


def kill_and_finish(house: House, count: int) -> None:
    kills = killing.AtRandom("migration", SEED)
    try:
        while kills.killed < count:
            before, house.way = house.way, ROUND[kills.killed % len(ROUND)]
            work = killing.task("tde_keystore", house.host.arguments(**house.wish(house.way)))
            kills.begin(work)
            # At every moment what opened it before, or what opens it then, opens it.
            ways = [house.credential(before), house.credential(house.way)]
            assert killing.opened(house.host.state, ways)["cluster"] == house.key
            kills.finish(work)
            house.sound()
            assert not killing.run(work)["changed"]
    finally:
        print(kills)


def test_killed_at_a_few_random_moments(house: House) -> None:
    killing.preload()
    kill_and_finish(house, FEW)


@pytest.mark.slow
def test_killed_at_many_random_moments(house: House) -> None:
    killing.preload()
    kill_and_finish(house, MANY)
