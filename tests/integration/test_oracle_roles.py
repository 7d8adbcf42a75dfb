# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The roles with engine oracle, as a playbook runs them, on the stand-ins for Oracle and nShield (tests/standins)."""

from __future__ import annotations

import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible_collections.hsm.tde.tests.integration import nshield, oracle, support
from ansible_collections.hsm.tde.tests.integration.oracle import NEW, OLD, SOFT, SOFTWARE, Site

pytestmark = pytest.mark.root


class Play:
    """Runs roles on a site; the database's restart and what is paused are files of tasks, as a user has them.

    :ivar marks: what those for pausing and resuming leave behind: their name and how many statements the database had by then.
    """

    def __init__(self, home: Path, site: Site) -> None:
        self.home, self.site = home, site
        self.marks = home / "marks"
        journal = site.database.path / "journal.jsonl"
        python = home / "python"
        python.write_text(
            f'#!/bin/sh\nexport ORACLEDB_STANDIN={site.database.path} PYTHONPATH={oracle.STANDIN}\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        (home / "bounce.py").write_text(oracle.BOUNCE % str(site.database.path))
        self._tasks("restart", {"argv": [str(python), str(home / "bounce.py")]})
        for name in ("pause", "resume"):
            self._tasks(name, {"argv": ["sh", "-c", f"echo {name} $(wc -l < {journal}) >> {self.marks}"]})

    def _tasks(self, name: str, command: dict[str, t.Any]) -> None:
        task = {"name": f"Do {name}", "ansible.builtin.command": command, "changed_when": False}
        (self.home / f"{name}.yml").write_text(yaml.safe_dump([task]))

    def run(self, role: str, **variables: t.Any) -> tuple[int, str, int]:
        """:returns: exit code, output in one line, how many tasks changed something."""
        play = {
            "name": "A role",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "any_errors_fatal": True,
            "vars": {
                "ansible_python_interpreter": str(self.home / "python"),
                "hsm_tde_engine": "oracle",
                "hsm_tde_cluster": "main",
                "hsm_tde_state_directory": self.site.state.path,
                "hsm_tde_command_path": str(self.home / "hsm-tde"),
                "hsm_tde_units": "never",
                "hsm_tde_login_host": "db",
                "hsm_tde_login_user": "sys",
                "hsm_tde_login_password": "Sys-Password-1",
                "hsm_tde_restart": True,
                "hsm_tde_restart_tasks": str(self.home / "restart.yml"),
                **variables,
            },
            "roles": [{"role": f"hsm.tde.{role}"}],
        }
        (self.home / "play.yml").write_text(yaml.safe_dump([play]))
        argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(self.home / "play.yml")]
        done = subprocess.run(argv, cwd=support.ROOT, capture_output=True, text=True, timeout=300, check=False)
        changed = re.search(r"changed=(\d+)", done.stdout)
        return done.returncode, " ".join(done.stdout.split()), int(changed.group(1)) if changed else -1

    def marked(self) -> list[tuple[str, int]]:
        """The marks since the last look."""
        lines = self.marks.read_text().splitlines() if self.marks.exists() else []
        self.marks.unlink(missing_ok=True)
        return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.fixture
def hsm() -> t.Iterator[nshield.Site]:
    with nshield.site(slots=3, fips_level=3) as found:
        found.a.create_softcard("one", OLD)
        yield found


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hsm: nshield.Site) -> Play:
    monkeypatch.setenv("ORACLEDB_STANDIN", str(tmp_path / "oracle"))
    return Play(tmp_path, Site(tmp_path, hsm))


def test_configure_tde_sets_the_master_key_of_a_software_keystore_too(play: Play) -> None:
    wish = {
        "hsm_tde_keyslots": [{"name": "primary", "protection": "passphrase"}],
        "hsm_tde_passphrase": SOFTWARE,
        "hsm_tde_oracle": play.site.options,
    }
    code, said, dummy = play.run("configure_tde", **wish)
    assert code == 0, said
    told = play.site.engine(None).info()
    assert [key["label"] for key in told["master_keys"]] == ["hsm-tde.main"] * 2
    assert SOFTWARE not in said


def test_configure_tde_fails_by_name_where_an_hsm_would_not_recover_by_itself(play: Play) -> None:
    wish = {
        "hsm_tde_keyslots": [{"name": "primary", "protection": "softcard", "token_label": "one"}],
        "hsm_tde_passphrase": OLD,
        "hsm_tde_oracle": {**play.site.options, "auto_login": True, "software_passphrase": SOFTWARE},
    }
    code, said, changed = play.run("configure_tde", **wish)
    assert (code, changed) == (2, 0)
    assert "nshield_recovery_attended" in said
    assert "fips_card_in_slot" in said
    assert play.site.statements() == []


def test_change_protection_pauses_around_the_change_and_resumes_though_it_fails(play: Play) -> None:
    site = play.site.encrypted()
    wish = {
        "hsm_tde_passphrase": OLD,
        "hsm_tde_oracle": site.options,
        "change_protection_keyslots": [{"name": "primary", "protection": "softcard", "token_label": "one", "passphrase": NEW}],
        "hsm_tde_pause_tasks": str(play.home / "pause.yml"),
        "hsm_tde_resume_tasks": str(play.home / "resume.yml"),
    }
    # A world of FIPS level 3 without a card in a slot: the softcard's passphrase cannot be changed.
    before = len(site.statements())
    code, said, dummy = play.run("change_protection", **wish)
    assert code == 2
    assert "nshield_authorisation_missing" in said
    failed = play.marked()
    assert [name for name, dummy in failed] == ["pause", "resume"]
    assert failed[0][1] == before

    site.hsm.hsm.insert(f"{site.hsm.a.create_cardset('cards', OLD)}:1")
    code, said, dummy = play.run("change_protection", **wish)
    assert code == 0, said
    paused, resumed = play.marked()
    assert (paused[0], resumed[0]) == ("pause", "resume")
    assert paused[1] == failed[1][1]
    assert resumed[1] == len(site.statements()) > paused[1]
    assert site.read() == "content"

    # Again there is nothing to pause for; what a killed run left paused goes on.
    code, said, changed = play.run("change_protection", **{**wish, "hsm_tde_passphrase": NEW})
    assert (code, changed) == (0, 0), said
    assert [name for name, dummy in play.marked()] == ["resume"]


@pytest.mark.slow
def test_rotate_keys_pauses_around_a_rotation_alone(play: Play) -> None:
    site = play.site.encrypted()
    wish = {
        "hsm_tde_passphrase": OLD,
        "hsm_tde_oracle": site.options,
        "hsm_tde_tag": "2",
        "hsm_tde_pause_tasks": str(play.home / "pause.yml"),
        "hsm_tde_resume_tasks": str(play.home / "resume.yml"),
    }
    before = len(site.statements())
    for expected in (["pause", "resume"], ["resume"]):
        code, said, dummy = play.run("rotate_keys", **wish)
        assert code == 0, said
        marks = play.marked()
        assert [name for name, dummy in marks] == expected
        assert marks[0][1] == before
        assert marks[-1][1] == (before := len(site.statements()))
    assert SOFT[0] in site.protections()
