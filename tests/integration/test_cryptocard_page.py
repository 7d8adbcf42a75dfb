# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The adapters' section of docs/from-a-bare-linuxone-host.md: its commands as they stand, on hosts that have such adapters.

The adapters are a sysfs tree mounted over /sys, seen by the commands alone.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.tests.integration.support import ROOT
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree

pytestmark = [pytest.mark.root]

PAGE = (ROOT / "docs/from-a-bare-linuxone-host.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## The adapters") :].split("\n## ")[0]
COMMANDS = re.findall(r"```shell\n(.*?)\n```", SECTION, re.DOTALL)


def run(home: Path, cards: dict[int, tree.Card], command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in ``home`` on a host with these cards."""
    (playbook,) = re.findall(r"`(adapters\.yml)`:\n\n```yaml\n(.*?)```", SECTION, re.DOTALL)
    (home / playbook[0]).write_text(playbook[1], encoding="utf-8")
    (home / "hosts").write_text("[hsm_tde]\nlinuxone1 ansible_connection=local\n", encoding="utf-8")
    system = tree.build(home / "sys", tree.bus(), cards)
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount --rbind '{system}' /sys && {command}"],
        cwd=home,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def cards(second: str) -> dict[int, tree.Card]:
    return {
        2: tree.card("ep11", {5: tree.queue(tree.ep11())}, generation=8),
        3: tree.card("ep11", {5: tree.queue(second)}, generation=8),
    }


def test_the_page_has_three_commands() -> None:
    assert len(COMMANDS) == 3


def test_what_is_there(tmp_path: Path) -> None:
    done = run(tmp_path, cards(tree.ep11()), COMMANDS[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"present": true' in done.stdout
    assert "Cards: 2. Queues: 2, 2 of them online. Default domain: 0005." in done.stdout


def test_which_master_key(tmp_path: Path) -> None:
    done = run(tmp_path, cards(tree.ep11()), COMMANDS[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"/sys/bus/ap/devices/02.0005/mkvps <==\nWK CUR: valid 0x{tree.WK}\n" in done.stdout


def test_the_check_passes(tmp_path: Path) -> None:
    done = run(tmp_path, cards(tree.ep11()), COMMANDS[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ready: 02.0005, 03.0005." in done.stdout


def test_the_check_stops_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, cards(tree.ep11(tree.OTHER_WK)), COMMANDS[2])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "02.0005 holds the expected wrapping key" in done.stdout
    assert "failures that come and go" in done.stdout
