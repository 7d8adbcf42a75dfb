# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The rotation of a MariaDB server's data keys killed at random moments, before and after the restart that it needs, then run
again: the wished state, every row, no key at rest. The server, too, is killed while tables are built anew."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import PassphraseCredential, TokenCredential
from ansible_collections.hsm.tde.tests.integration import killing, mariadb
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE
from ansible_collections.hsm.tde.tests.integration.mariadb import Host

pytestmark = [pytest.mark.root, pytest.mark.skipif(not mariadb.usable(), reason="needs root, MariaDB's server and SoftHSM")]

#: Kills of each half of a rotation.
FEW, MANY = 2, 25
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))
ROWS = "SELECT COUNT(*), MD5(GROUP_CONCAT(MD5(body) ORDER BY id)) FROM shop.{}"


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


def rows(host: Host) -> list[str]:
    """Count and checksum of each table."""
    host.server.sql("SET GLOBAL group_concat_max_len = 100000000")
    return [host.server.sql(ROWS.format(table)) for table in ("orders", "parts", "words", "`a.b é#P# x`")]


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
    expected = rows(host)
    work = rotation(host, number)
    first.begin(work)
    assert rows(host) == expected
    first.finish(work)
    assert killing.run(work)["restart_required"]
    host.server.restart()
    if second:
        second.begin(work)
    else:
        server_dies_under(host, work, seconds)
    assert rows(host) == expected
    (second or first).finish(work)
    sound(host, work, number)
    assert rows(host) == expected


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
