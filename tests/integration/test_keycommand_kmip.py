# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A server's key under a KMIP server, asked for by the server's own user: made, rotated, moved, copied, killed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
import subprocess
import time
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess, kmip_access
from ansible_collections.hsm.tde.plugins.module_utils.kmip.client import Client
from ansible_collections.hsm.tde.tests.integration import killing, postgres, support
from ansible_collections.hsm.tde.tests.integration.keycommand import (
    RECOVERY,
    RECOVERY_PASSPHRASE,
    SLOTS,
    Cluster,
    cheap_passphrases,
)
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or not support.softhsm_library() or not postgres.programs(),
        reason="needs root, SoftHSM and a user postgres",
    ),
]

FEW, MANY = 3, 50
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))
NO_TOKEN: dict[str, t.Any] = {"library": None, "library_environment": {}, "token_label": None, "pin": None}
AT_KMIP = [{"name": "primary", "protection": "kmip"}, RECOVERY]


class Edb(Cluster):
    """A cluster of the stand-in for EDB's server, with a certificate for the KMIP server."""

    def __init__(self, home: t.Any, server: KmipServer, name: str = "") -> None:
        super().__init__(home, "edb")
        self.name = name or home.name
        self.kmip = self.host.kmip(server, self.name)
        #: The same client, by files that root reads.
        self.client = t.cast(KmipAccess, kmip_access(server.options(self.name)))

    def initdb(self, made: t.Mapping[str, t.Any]) -> None:
        done = self.server("initdb", *made["initdb_options"])
        assert done.returncode == 0, done.stderr

    def keks(self, *labels: str) -> list[int]:
        with Client(self.client) as client:
            return [len(client.locate(label)) for label in labels]

    def slots(self) -> dict[str, str]:
        """What the keyslots of ``key.bin`` are under; each proved, and one of each name."""
        slots = json.loads(self.key.read_text())["keyslots"]
        assert all(slot["proved"] for slot in slots)
        assert len({slot["name"] for slot in slots}) == len(slots)
        return {slot["name"]: slot["protection"] for slot in slots}


@pytest.fixture
def edb(kmip_server: KmipServer) -> t.Iterator[Edb]:
    with cheap_passphrases(), postgres.folder() as home:
        yield Edb(home, kmip_server)


def test_edb_s_key_is_made_under_kmip_rotated_and_moved_to_a_token_and_back(edb: Edb) -> None:
    none = {"pin_source": {"kind": "none"}, **NO_TOKEN}
    made = edb.keystore(**edb.kmip, keyslots=AT_KMIP, **none)
    assert "create_kek" in [step["action"] for step in made["plan"]]
    edb.initdb(made)
    assert (edb.slots(), edb.keks("hsm-tde.main")) == ({"primary": "kmip"}, [1])
    assert edb.starts()
    added = edb.keystore(keyslots=AT_KMIP, **none)
    assert [step["action"] for step in added["plan"]] == ["add_keyslot", "prove_keyslot"]
    assert not edb.keystore(keyslots=AT_KMIP, **none)["changed"]

    edb.key.chmod(0o640)
    backup = edb.data.with_name("backup")
    subprocess.run(["cp", "-a", str(edb.data), str(backup)], check=True)
    planned = edb.rotate("2", check=True, **NO_TOKEN)
    rotated = edb.rotate("2", **NO_TOKEN)
    assert rotated["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main.2 at KMIP service kmip", rotated
    assert [step["action"] for step in rotated["plan"]] == [step["action"] for step in planned["plan"]]
    assert not edb.rotate("2", **NO_TOKEN)["changed"]
    assert edb.keks("hsm-tde.main", "hsm-tde.main.2") == [1, 1]

    tokened = edb.keystore(**edb.kmip)
    assert tokened["data_keys"]["main"]["keyslots"]["primary"] == "hsm-tde.main.2 in token demo", tokened
    assert edb.starts()
    assert not edb.keystore(**edb.kmip)["changed"]
    edb.keystore(**edb.kmip, keyslots=AT_KMIP)
    assert edb.slots() == {"primary": "kmip", "recovery": "passphrase"}
    info = edb.key.stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode), os.listdir(edb.key.parent)) == (edb.host.user.pw_uid, 0o640, ["key.bin"])
    assert edb.starts()
    # The base backup from before it all: its key is still at the server.
    assert edb.starts(backup)
    acts = (edb.host.home / "state/journal.jsonl").read_text()
    assert '"as_user":' in acts.replace(": ", ":")


@pytest.mark.slow
def test_a_keyslot_of_each_and_either_gives_the_key(edb: Edb, kmip_server: KmipServer) -> None:
    slots = [*AT_KMIP, {"name": "near", "protection": "token"}]
    edb.initdb(edb.keystore(**edb.kmip, keyslots=slots))
    # What initdb wraps lies where the keyslot primary is wished.
    assert edb.slots() == {"primary": "kmip"}
    edb.keystore(**edb.kmip, keyslots=slots)
    assert edb.slots() == {"primary": "kmip", "recovery": "passphrase", "near": "token"}
    published = json.loads((edb.host.home / "state.users/clusters/main.json").read_text())
    assert (len(published["tokens"]), len(published["kmip"])) == (1, 1)
    # A second data directory gets its key where the first one's is.
    second = edb.data.with_name("second")
    assert edb.server("initdb", *edb.keystore(**edb.kmip, keyslots=slots)["initdb_options"], data=second).returncode == 0
    assert json.loads((second / "pg_encryption/key.bin").read_text())["keyslots"][0]["protection"] == "kmip"
    kmip_server.stop()
    try:
        assert edb.starts()
        assert not edb.starts(second)
    finally:
        kmip_server.start()
    edb.host.pin_file.write_text("wrong-4711\n")
    shutil.rmtree(edb.host.softhsm.tokendir)
    edb.host.softhsm.tokendir.mkdir()
    edb.host.give(edb.host.softhsm.tokendir)
    assert edb.starts()
    edb.host.pin_file.unlink()
    assert edb.starts()


@pytest.mark.slow
def test_a_standby_takes_the_master_key_that_the_first_node_made(edb: Edb, kmip_server: KmipServer) -> None:
    """The second node: its own state and files, the same client of the service, the primary's data directory."""
    edb.initdb(edb.keystore(**edb.kmip, keyslots=AT_KMIP))
    edb.keystore(keyslots=AT_KMIP)
    with postgres.folder() as home:
        standby = Edb(home, kmip_server, edb.name)
        subprocess.run(["cp", "-a", str(edb.data), str(standby.data)], check=True)
        conf = standby.data / "postgresql.conf"
        conf.write_text(conf.read_text().replace(str(edb.host.command), str(standby.host.command)))
        standby.keystore(keyslots=None, **standby.kmip, **NO_TOKEN)
        assert standby.starts()
        assert edb.rotate("2", **NO_TOKEN)["changed"]
        before = standby.key.read_bytes()
        refused = standby.rotate("2", **NO_TOKEN)
        assert (refused["error_code"], standby.key.read_bytes()) == ("key_foreign", before), refused
        adopting = {"keycommand": {"adopt_master_key": True}, **NO_TOKEN}
        planned = standby.rotate("2", check=True, **adopting)
        rotated = standby.rotate("2", **adopting)
        actions = [step["action"] for step in rotated["plan"]]
        assert actions == ["adopt_kek", "add_keyslot", "prove_keyslot", "remove_keyslot"], rotated
        assert actions == [step["action"] for step in planned["plan"]]
        assert standby.starts()
        assert edb.starts()
        assert not standby.rotate("2", **NO_TOKEN)["changed"]
    assert edb.keks("hsm-tde.main", "hsm-tde.main.2") == [1, 1]


# --- killed


class Patient(killing.AtRandom):
    """The user's child of a killed task holds the lock for as long as it works: the next task begins after it."""

    def _begin(self, work: killing.Task) -> bool:
        deadline = time.monotonic() + 60
        while True:
            try:
                return super()._begin(work)
            except TdeError as exc:
                if exc.code != "busy" or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def preload() -> None:
    killing.preload()
    ours = "ansible_collections.hsm.tde.plugins.module_utils"
    for name in ("engines.keycommand.engine", "engines.keycommand.info", "keystore.kmip", "kmip.client"):
        importlib.import_module(f"{ours}.{name}")


def kill_and_finish(edb: Edb, count: int) -> None:
    """Between token and KMIP server, and at each of them a rotation; at every moment the server would start."""
    slots = {"kmip": AT_KMIP, "token": SLOTS}
    source = {"kind": "file", "path": str(edb.host.pin_file)}
    edb.initdb(edb.keystore())
    edb.keystore()
    kills, number, way = Patient("migration of key.bin", SEED), 0, "token"
    labels = {"token": "hsm-tde.main", "kmip": "hsm-tde.main"}
    try:
        while kills.killed < count:
            number += 1
            if number % 4:
                way = "kmip" if way == "token" else "token"
                work = killing.task("tde_keystore", edb.arguments(**edb.kmip, keyslots=slots[way], pin_source=source))
            else:
                labels[way] = f"hsm-tde.main.{number}"
                work = killing.task("tde_master_key", edb.arguments(state="rotated", tag=str(number)))
            kills.begin(work)
            assert edb.starts(), number
            kills.finish(work)
            again = killing.run(work)
            assert not again["changed"], again["plan"]
            assert edb.slots() == {"primary": way, "recovery": "passphrase"}
            assert again["data_keys"]["main"]["keyslots"]["primary"].startswith(f"{labels[way]} ")
            killing.no_leftovers(edb.host.home)
            assert max(edb.keks(labels["kmip"], "hsm-tde.main")) <= 1, "a KEK was made twice"
            record = json.loads((edb.host.home / "state.users/clusters/main.json").read_text())
            assert (len(record["tokens"]), len(record["kmip"])) == ((0, 1) if way == "kmip" else (1, 0))
        assert edb.starts()
        killing.no_secret([RECOVERY_PASSPHRASE.encode()], edb.host.home)
    finally:
        print(kills)
    assert len(kills.found) > 1, "every kill left the same to do"


def test_killed_at_a_few_random_moments(edb: Edb) -> None:
    preload()
    kill_and_finish(edb, FEW)


@pytest.mark.slow
def test_killed_at_many_random_moments(edb: Edb) -> None:
    preload()
    kill_and_finish(edb, MANY)
