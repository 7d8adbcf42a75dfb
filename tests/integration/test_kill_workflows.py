# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whole workflows killed with SIGKILL at random moments, then run again: the wished state, the data, and no secret left.

The tasks run as forked processes (:mod:`killing`); half of the kills take the programs that they started with them,
the others leave these as orphans. What is done to a cluster that is there, is done while pgbench works on it: no
transaction fails.
"""

from __future__ import annotations

import os
import typing as t
from pathlib import Path
from unittest import mock

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.tests.integration import killing, leftovers, postgres
from ansible_collections.hsm.tde.tests.integration.estate import Estate, usable
from ansible_collections.hsm.tde.tests.integration.workflows import (
    Creation,
    Move,
    PinChange,
    ProtectionChange,
    Rotation,
    Town,
    Workflow,
    destroy,
)

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

#: Kills of each workflow.
FEW, MANY = 8, 50
#: Another one meets other moments; it is printed with what was found.
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))
#: The exact moments: each n-th of a workflow's calls, 1 for all, which takes an hour.
EVERY = int(os.environ.get("HSM_TDE_KILL_EVERY", "16"))

WORKFLOWS: list[t.Any] = [Creation, Rotation, PinChange, ProtectionChange, Move]


@pytest.fixture(scope="module")
def home() -> t.Iterator[Path]:
    """A folder in memory where there is one, so that most of the time measured is not the disk's syncing."""
    # Half a second of scrypt for each look at a keyslot would be most of the rest.
    cheap = mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10))
    killing.preload()
    with cheap, leftovers.folder("hsm-tde-kill.", "/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield path


@pytest.fixture(scope="module")
def town(home: Path) -> t.Iterator[Town]:
    """The host of all workflows but the creation."""
    made = Town(home / "town")
    try:
        yield made
        made.reboot()
    finally:
        destroy(made)


@pytest.fixture
def workflow(request: pytest.FixtureRequest, home: Path) -> Workflow:
    """The workflow that the test is about."""
    made: Workflow = Creation(home / "new") if request.param is Creation else request.param(request.getfixturevalue("town"))
    return made


def work_on(workflow: Workflow, kills: killing.Kills, enough: t.Callable[[], bool]) -> None:
    """Kill and finish a workflow's tasks until it is enough, and say what was met."""
    with workflow.load():
        try:
            while not enough():
                workflow.once(kills)
        finally:
            print(kills)
    workflow.end()


@pytest.mark.parametrize("count", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_killed_at_random_moments(workflow: Workflow, count: int) -> None:
    kills = killing.AtRandom(workflow.name, SEED)
    work_on(workflow, kills, lambda: kills.killed >= count)
    assert len(kills.found) > 1, "every kill left the same to do"


@pytest.mark.slow
@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_killed_before_calls_that_change_something(workflow: Workflow) -> None:
    if isinstance(workflow, Creation):
        workflow.fill = False
    kills = killing.AtCalls(workflow.name, EVERY, 1 + SEED % EVERY)
    work_on(workflow, kills, lambda: kills.over)
    assert kills.killed > 1, "no call was met"


def test_an_initdb_that_outlives_its_task_is_waited_for(home: Path) -> None:
    """Two at once in one directory would mix their files."""
    programs = home / "programs"
    programs.mkdir()
    initdb = programs / "initdb"
    # Told apart by their process ids; the file appears when the second run is at work.
    initdb.write_text(f'#!/bin/sh\nsleep 1\n{postgres.programs()}/initdb "$@" >/dev/null && sleep 1 && touch "$2/ended.$$"\n')
    initdb.chmod(0o755)
    workflow = Creation(home / "orphan", bin_directory=str(programs))

    class Once(killing.Kills):
        def _begin(self, work: killing.Task) -> bool:
            process = killing.Process(work)
            record = workflow.home / "state/clusters/main.json"
            while '"begun": true' not in (record.read_text() if record.exists() else ""):
                assert not process.ended(0.01)
            process.ended(0.2)
            process.kill(group=False)
            return process.result() is None

    def at_the_end(host: Estate) -> None:
        assert len(list(host.server.data.glob("ended.*"))) == 1

    workflow.also = at_the_end
    kills = Once("orphan")
    workflow.once(kills)
    assert (kills.killed, kills.found) == (1, {"clear_place": 1})
