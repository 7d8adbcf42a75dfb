# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""On hosts of their own, under systemd: Debian 12's openCryptoki 3.8 and PostgreSQL 15, Debian 13's 3.23 and 17."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ansible_collections.hsm.tde.tests.integration.support import ROOT

_SKIPPED = 77

pytestmark = pytest.mark.slow


def run(script: str, suite: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/hosts" / script), "--suite", suite],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=1500,
    )
    if done.returncode == _SKIPPED:
        pytest.skip(done.stdout[-500:])
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_tests_of_tokens_and_of_engine_fep_on_debian_13() -> None:
    run("suite.py", "trixie")


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_role_on_hosts_of_their_own(suite: str) -> None:
    run("roles.py", suite)


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_scenario_fep_on_hosts_of_their_own(suite: str) -> None:
    run("fep.py", suite)
