# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The command, installed by Ansible itself from the zip that it sends to a target, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import main
from ansible_collections.hsm.tde.tests.integration import support
from ansible_collections.hsm.tde.tests.unit.command.closure import archive, missing_imports

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the command is root's")


def ansible(arguments: t.Mapping[str, t.Any], *flags: str) -> dict[str, t.Any]:
    """The module as ``ansible localhost`` runs it, through AnsiballZ."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ansible"), "localhost", "-i", "localhost,", "-c", "local", *flags),
            *("-e", f"ansible_python_interpreter={sys.executable}"),
            *("-m", "hsm.tde.tde_command", "-a", json.dumps(arguments)),
        ],
        cwd=support.ROOT,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(support.ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    head, dummy, body = done.stdout.partition("=>")
    assert body, done.stdout + done.stderr
    return {"head": head, **json.loads(body)}


@pytest.fixture
def wish(tmp_path: Path) -> dict[str, t.Any]:
    (tmp_path / "sbin").mkdir()
    return {
        "path": str(tmp_path / "sbin/hsm-tde"),
        "state_directory": str(tmp_path / "state"),
        "units": "always",
        "unit_directory": str(tmp_path / "units"),
        "clusters": [{"name": "main", "database_units": ["postgresql@15-main.service"]}],
    }


def hsm_tde(wish: t.Mapping[str, t.Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([wish["path"], *arguments], cwd="/", env={}, capture_output=True, text=True, timeout=30, check=False)


def test_what_ansible_installs_runs_without_ansible(wish: dict[str, t.Any]) -> None:
    installed = ansible(wish)
    assert "CHANGED" in installed["head"]
    assert len(installed["plan"]) == 4

    # Ansible sent what the module imports, and that is all that the command imports.
    assert missing_imports(archive(Path(wish["path"]).read_bytes())) == []
    assert hsm_tde(wish, "--version").stdout == f"hsm-tde {main.VERSION}\n"
    assert "self-test" in hsm_tde(wish, "--help").stdout
    for command in ("open", "close", "status", "self-test", "journal"):
        assert hsm_tde(wish, command, "--help").returncode == 0, command
    status = hsm_tde(wish, "status", "--json")
    assert (status.returncode, json.loads(status.stdout)["clusters"]) == (0, {})
    unknown = hsm_tde(wish, "open", "main")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    assert "cluster_unknown" in unknown.stderr
    assert hsm_tde(wish, "journal", "verify").returncode == 0
    assert not Path(wish["state_directory"]).exists()

    again = ansible(wish)
    assert "SUCCESS" in again["head"]
    assert not again["changed"]
    assert again["sha256"] == installed["sha256"]


def test_check_mode_writes_nothing_and_the_units_are_skipped_in_so_many_words(wish: dict[str, t.Any], tmp_path: Path) -> None:
    planned = support.run_module_file("tde_command", {**wish, "units": "never"}, check=True, diff=True)
    assert planned["changed"]
    assert planned["diff"]["before"] == {wish["path"]: "absent"}
    assert list(tmp_path.rglob("*.service")) == []
    assert not Path(wish["path"]).exists()
    if not os.path.isdir("/run/systemd/system"):
        done = support.run_module_file("tde_command", {**wish, "units": "auto"})
        assert not done["units_written"]
        assert "systemd does not run this host" in done["units_reason"]
        assert list(tmp_path.rglob("*.service")) == []


def test_a_foreign_file_fails_with_its_code(wish: dict[str, t.Any]) -> None:
    Path(wish["path"]).write_text("#!/bin/sh\n")
    failed = support.run_module_file("tde_command", wish)
    assert (failed["failed"], failed["error_code"], failed["cause"]) == (True, "file_foreign", "refused")
