# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A database is restarted with permission only, and by the tasks that its owner chose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.hsm.tde.tests.integration import support

#: A user's own way to restart: it leaves a mark.
_TASKS = [{"name": "Leave a mark", "ansible.builtin.copy": {"dest": "{{ mark }}", "content": "restarted", "mode": "0600"}}]


def _play(home: Path, *flags: str, **variables: object) -> subprocess.CompletedProcess[str]:
    (home / "restart.yml").write_text(yaml.safe_dump(_TASKS))
    play = {
        "name": "Restart",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {"mark": str(home / "mark"), "ansible_python_interpreter": sys.executable, **variables},
        "roles": [{"role": "hsm.tde.restart_database"}],
    }
    (home / "play.yml").write_text(yaml.safe_dump([play]))
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", *flags, str(home / "play.yml")]
    return subprocess.run(argv, cwd=support.ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_unasked_it_ends_the_play_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = _play(tmp_path, hsm_tde_restart_tasks=str(tmp_path / "restart.yml"))
    assert done.returncode == 2
    assert "permit it with hsm_tde_restart" in " ".join(done.stdout.split())
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("flags", "restarted"), [((), True), (("--check",), False)])
def test_permitted_it_runs_the_owners_tasks_but_not_in_check_mode(
    tmp_path: Path, flags: tuple[str, ...], restarted: bool
) -> None:
    done = _play(tmp_path, *flags, hsm_tde_restart=True, hsm_tde_restart_tasks=str(tmp_path / "restart.yml"))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "mark").exists() == restarted


def test_permitted_without_a_way_it_names_what_is_missing(tmp_path: Path) -> None:
    done = _play(tmp_path, hsm_tde_restart=True)
    assert done.returncode == 2
    assert "hsm_tde_database_units" in done.stdout
