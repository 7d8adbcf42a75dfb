# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The command as one file: equal builds, complete, run isolated."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from ansible_collections.hsm.tde.plugins.module_utils.command import main, zipapp
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.tests.unit.command.closure import archive, missing_imports

ROOT = Path(__file__).resolve().parents[3]


def build(python: str = sys.executable, state: str = "/var/lib/hsm-tde") -> bytes:
    return zipapp.build(python, state)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    path = tmp_path / "hsm-tde"
    path.write_bytes(build(state=str(tmp_path / "state")))
    path.chmod(0o755)
    return path


def test_two_builds_are_equal_whatever_the_files_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = zipapp.sources()
    monkeypatch.setattr(zipapp, "sources", lambda: found)
    first = build()
    monkeypatch.setattr(zipapp, "sources", lambda: dict(reversed(found.items())))
    assert build() == first
    with zipfile.ZipFile(io.BytesIO(first)) as opened:
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_every_relative_import_is_in_the_file() -> None:
    assert missing_imports(archive(build())) == []


def test_it_needs_no_ansible() -> None:
    tree = archive(build())
    assert "hsm_tde/common/bridge.py" not in tree
    assert [name for name, source in tree.items() if re.search(rb"^\s*(from|import) ansible", source, re.MULTILINE)] == []


def test_it_runs_from_anywhere_and_nothing_beside_it_is_imported(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "hsm_tde").mkdir()
    (tmp_path / "hsm_tde" / "__init__.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "argparse.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        [str(installed), "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "argparse.py")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hsm-tde {main.VERSION}\n", "")


def test_its_state_directory_is_the_one_that_it_was_installed_for(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run([str(installed), "--help"], capture_output=True, text=True, timeout=30, check=True)
    assert str(tmp_path / "state") in re.sub(r"\s+", "", done.stdout)


def test_the_version_is_the_collection_s() -> None:
    assert yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"] == main.VERSION


@pytest.mark.parametrize("path", ["relative/python", "/opt/a b/python", "/opt/py\nthon", "/opt/%h/python", "/" + "x" * 130])
def test_an_interpreter_that_a_first_line_cannot_name_is_refused(path: str) -> None:
    with pytest.raises(TdeError) as caught:
        build(path)
    assert caught.value.code == "invalid_option"


def test_the_tree_is_found_in_a_zip_as_ansible_sends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ansible sends module_utils as a zip file that is on sys.path."""
    found = zipapp.sources()
    monkeypatch.setattr(zipapp, "sources", lambda: found)
    sent = tmp_path / "sent.zip"
    base = "ansible_collections/hsm/tde/plugins/module_utils"
    with zipfile.ZipFile(sent, "w") as opened:
        for folder in [
            "ansible_collections",
            "ansible_collections/hsm",
            "ansible_collections/hsm/tde",
            f"{base[: -len('/module_utils')]}",
            base,
        ]:
            opened.writestr(f"{folder}/__init__.py", "")
        folders = {os.path.dirname(path) for path in zipapp.sources()} - {""}
        for path, source in zipapp.sources().items():
            opened.writestr(f"{base}/{path}", source)
        for folder in sorted(folders):
            if f"{folder}/__init__.py" not in zipapp.sources():
                opened.writestr(f"{base}/{folder}/__init__.py", "")
    code = (
        f"import sys; sys.path.insert(0, {str(sent)!r})\n"
        "from ansible_collections.hsm.tde.plugins.module_utils.command import zipapp\n"
        f"sys.stdout.buffer.write(zipapp.build({sys.executable!r}, '/var/lib/hsm-tde'))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, timeout=30, check=True)
    assert done.stdout == build()
