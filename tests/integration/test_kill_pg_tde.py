# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Rotations and migrations of pg_tde's keys, killed at random moments: a reboot loses nothing, a second run ends them."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
import typing as t

import pytest
from ansible_collections.hsm.tde.tests.integration import estate, killing, pgtde, postgres
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer
from ansible_collections.hsm.tde.tests.integration.pgtde import Host, Vault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(not estate.usable() or not postgres.programs(), reason="needs root, PostgreSQL and SoftHSM"),
]

ROWS = "SELECT count(*), md5(string_agg(body, ',' ORDER BY id)) FROM orders"
#: Kills of each kind of work.
KILLS = 50


@pytest.fixture
def host() -> t.Iterator[Host]:
    with pgtde.host() as made:
        made.present()
        made.run("tde_tablespace", tablespaces=[{"name": "tde_heap", "move": {"databases": ["shop"]}}])
        yield made


def outage(host: Host, rows: str) -> None:
    """The power fails right after the kill, and the boot opens the keystore: every row is readable."""
    host.server.kill()
    # The call of a killed task's orphan may have the folder open for a moment.
    deadline = time.monotonic() + 10
    while os.path.ismount(host.keys) and time.monotonic() < deadline:
        subprocess.run(["umount", str(host.keys)], check=False, capture_output=True)
    killing.run(killing.task("tde_keystore", host.arguments(state="open")))
    host.server.start()
    assert host.server.psql(ROWS, "shop") == rows


def test_killed_rotations(host: Host) -> None:
    rows = host.server.psql(ROWS, "shop")
    seed = random.randrange(1 << 32)
    kills = killing.AtRandom("rotation of pg_tde's keys", seed)
    number = 0
    while kills.killed < KILLS:
        number += 1
        work = killing.task("tde_master_key", host.arguments(state="rotated", tag=f"t{number}"))
        kills.begin(work)
        if number % 3 == 0:
            outage(host, rows)
        kills.finish(work)
        assert set(host.set_keys().values()) == {f"hsm-tde.main.t{number} of hsm-tde-file"}
        assert host.server.psql(ROWS, "shop") == rows
    outage(host, rows)
    killing.no_leftovers(host.state)
    print(kills)


def test_killed_migrations(host: Host, kmip_server: KmipServer) -> None:
    rows = host.server.psql(ROWS, "shop")
    seed = random.randrange(1 << 32)
    kills = killing.AtRandom("migration of pg_tde's keys", seed)
    host.more = kmip_server.options()
    with Vault(host.home) as vault:
        vault.token.chmod(0o600)
        ways: list[tuple[dict[str, t.Any], dict[str, t.Any]]] = [
            ({"provider": "kmip"}, {"keyslots": [{"name": "primary", "protection": "kmip"}]}),
            ({"provider": "vault-v2", "vault_url": vault.url, "vault_mount_path": "tde", "vault_token": str(vault.token)}, {}),
            ({"provider": "file"}, {"keyslots": estate.SLOTS}),
        ]
        for number in itertools.count():
            if kills.killed >= KILLS:
                break
            if number % 3 == 0:
                host.run("tde_master_key", state="rotated", tag=f"m{number}")
            options, more = ways[number % 3]
            work = killing.task("tde_keystore", host.arguments(pg_tde={**host.options, **options}, **more))
            kills.begin(work)
            if number % 4 == 0:
                outage(host, rows)
            kills.finish(work)
            assert set(host.set_keys().values()) == {f"hsm-tde.main.m{number - number % 3} of hsm-tde-{options['provider']}"}
            assert host.server.psql(ROWS, "shop") == rows
        assert all(len(versions) == 1 for versions in vault.keys.values())
        outage(host, rows)
    print(kills)
