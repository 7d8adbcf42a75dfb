# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine pg_tde on its stand-in: keys in memory, at a real KMIP server and in a small Vault. The tests build on each other."""

from __future__ import annotations

import subprocess
import typing as t

import pytest
from ansible_collections.hsm.tde.tests.integration import estate, pgtde, postgres, support
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer
from ansible_collections.hsm.tde.tests.integration.pgtde import Host, Vault

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not estate.usable() or not postgres.programs(), reason="needs root, PostgreSQL and SoftHSM"),
]

WHOLE = [{"name": "tde_heap", "move": {"databases": ["shop"]}}]
ROWS = "SELECT count(*), md5(string_agg(body, ',' ORDER BY id)) FROM orders"


@pytest.fixture(scope="module")
def host() -> t.Iterator[Host]:
    with pgtde.host() as made:
        yield made


@pytest.fixture(scope="module")
def rows(host: Host) -> str:
    return host.server.psql(ROWS, "shop")


def test_file_provider_from_nothing_to_encrypted_wal(host: Host, rows: str) -> None:
    planned = host.run("tde_keystore", keyslots=estate.SLOTS, check=True)
    assert planned["changed"]
    host.refused("tde_keystore", "recovery_keyslot_missing", keyslots=[{"name": "primary"}])
    first = host.run("tde_keystore", keyslots=estate.SLOTS)
    assert first["restart_required"] is True
    actions = [step["action"] for step in first["plan"]]
    assert actions.index("create_key") < actions.index("seal_keys", actions.index("create_key")) < actions.index("set_key")
    assert not host.run("tde_keystore", keyslots=estate.SLOTS)["changed"]
    host.server.restart()
    second = host.run("tde_keystore", keyslots=estate.SLOTS)
    assert (second["changed"], second["restart_required"]) == (False, False)
    assert not host.run("tde_keystore", state="open")["changed"]
    assert not host.run("tde_master_key", state="present")["changed"]
    key = "hsm-tde.main of hsm-tde-file"
    assert host.set_keys() == {"default": key, "server": key, "shop": ""}
    assert host.server.psql("SHOW pg_tde.wal_encrypt") == "on"
