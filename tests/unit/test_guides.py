# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the decision guide tells readers to write: variables and options that exist, playbooks and tasks that Ansible can read."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.hsm.tde.plugins.modules import tde_keystore

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/which-protection.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
VARIABLES = [block for block in BLOCKS if not block.lstrip("# ").startswith("/")]
TASKS = [block for block in BLOCKS if block not in VARIABLES]
#: Variables of an inventory that the roles and playbooks read, and one for each engine's dictionary.
KNOWN = {
    name
    for folder, pattern in (("roles", "*/defaults/main.yml"), ("playbooks", "*.yml"))
    for path in (ROOT / folder).glob(pattern)
    for name in re.findall(r"\bhsm_tde_[a-z0-9_]+\b", path.read_text(encoding="utf-8"))
} | {f"hsm_tde_{engine}" for engine in tde_keystore.SPEC["engine"]["choices"]}


def _playbook(block: str) -> str:
    found = re.match(r"# ansible-playbook hsm\.tde\.(\w+)( -e @\w+\.yml)?\n", block)
    assert found, f"the block does not say for which playbook it is:\n{block}"
    return found.group(1)


def _refused(spec: dict[str, t.Any], given: dict[str, t.Any]) -> list[str]:
    return t.cast("list[str]", ArgumentSpecValidator(spec).validate(given).error_messages)


def test_the_guide_has_both_kinds() -> None:
    assert len(VARIABLES) >= 7
    assert TASKS


@pytest.mark.parametrize("block", VARIABLES, ids=range(len(VARIABLES)))
def test_the_variables_exist_and_the_module_takes_them(block: str) -> None:
    given = yaml.safe_load(block)
    assert set(given) - KNOWN == set()
    engine = given.get("hsm_tde_engine", "oracle")
    params: dict[str, t.Any] = {"engine": engine, "cluster": "main"}
    if "hsm_tde_keyslots" in given:
        params["keyslots"] = given["hsm_tde_keyslots"]
    if f"hsm_tde_{engine}" in given:
        params[engine] = given[f"hsm_tde_{engine}"]
    assert _refused(tde_keystore.SPEC, params) == []
    # A secret never stands in the clear.
    for line in block.splitlines():
        for value in re.findall(r"(?:passphrase|password|pin): ([^,}\n]+)", line):
            assert value.startswith('"{{') or value in ("true", "false", "passphrase"), line


@pytest.mark.parametrize("block", TASKS, ids=range(len(TASKS)))
def test_the_tasks_give_options_that_their_modules_have(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = 0
    for task in yaml.safe_load(block):
        for name in [name for name in task if name.startswith("hsm.tde.")]:
            ours += 1
            module = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{name.removeprefix('hsm.tde.')}")
            spec: dict[str, t.Any] = {}
            monkeypatch.setattr(module, "run_module", lambda act, given, spec=spec, **rules: spec.update(given))
            module.main()
            assert _refused(spec, task[name]) == []
    assert ours


def test_ansible_reads_each_playbook_with_these_variables(tmp_path: Path) -> None:
    tasks = []
    for number, block in enumerate(TASKS):
        (tmp_path / f"tasks{number}.yml").write_text(block)
        tasks.append({"name": "These", "ansible.builtin.import_tasks": f"tasks{number}.yml"})
    (tmp_path / "tasks.yml").write_text(yaml.safe_dump([{"name": "Tasks", "hosts": "all", "tasks": tasks}]))
    files: dict[Path, list[str]] = {tmp_path / "tasks.yml": []}
    for number, block in enumerate(VARIABLES):
        (tmp_path / f"variables{number}.yml").write_text(block)
        files.setdefault(ROOT / "playbooks" / f"{_playbook(block)}.yml", []).extend(["-e", f"@{tmp_path}/variables{number}.yml"])
    assert len(files) >= 4
    for playbook, variables in files.items():
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "ansible-playbook"),
                "-i",
                "localhost,",
                "--syntax-check",
                *variables,
                str(playbook),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
