# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The role prerequisites: a real environment from the package index, with the hashes that the collection ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.tests.integration import support

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the environment is root's")


def play(tmp_path: Path, *flags: str, pip: t.Mapping[str, str] | None = None) -> tuple[str, int]:
    """Run the role; :returns: what it said and how many tasks changed something (-1: the play failed).

    :param pip: pip's own settings, in the environment.
    """
    book = tmp_path / "play.yml"
    book.write_text("- hosts: localhost\n  gather_facts: false\n  roles:\n    - role: hsm.tde.prerequisites\n")
    given = {"ansible_python_interpreter": "/usr/bin/python3", "prerequisites_venv": f"{tmp_path}/made/venv"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local", *flags]
        + [part for name, value in given.items() for part in ("-e", f"{name}={value}")]
        + [str(book)],
        cwd=support.ROOT,
        env={**os.environ, **(pip or {}), "ANSIBLE_COLLECTIONS_PATH": str(support.ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    changed = re.search(r"changed=(\d+)", done.stdout)
    return done.stdout + done.stderr, int(changed.group(1)) if changed and done.returncode == 0 else -1


@pytest.mark.slow
def test_made_once_remade_when_broken_and_never_left_without(tmp_path: Path) -> None:
    said, changed = play(tmp_path, "--check")
    assert changed == 1, said
    assert f"make {tmp_path}/made/venv" in said
    assert not (tmp_path / "made").exists()

    said, changed = play(tmp_path)
    assert changed > 0, said
    python = tmp_path / "made/venv/bin/python"
    subprocess.run(
        [str(python), "-I", "-c", "import pkcs11, cryptography, psycopg, pymysql, kmip, oracledb"], check=True, timeout=30
    )
    others = [
        path
        for path in (tmp_path / "made").rglob("*")
        if path.lstat().st_uid or (path.lstat().st_mode & 0o22 and not path.is_symlink())
    ]
    assert others == []

    said, changed = play(tmp_path)
    assert changed == 0, said

    # As after an upgrade that took a library away; and the index cannot be reached: what is there stays.
    broken = next((tmp_path / "made/venv").glob("lib/python3*/site-packages/psycopg"))
    broken.rename(broken.with_name("gone"))
    said, changed = play(tmp_path, pip={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)})
    assert changed == -1, said
    assert python.exists()

    said, changed = play(tmp_path)
    assert changed > 0, said
    subprocess.run(
        [str(python), "-I", "-c", "import pkcs11, cryptography, psycopg, pymysql, kmip, oracledb"], check=True, timeout=30
    )
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["venv"]


def test_an_environment_that_somebody_else_could_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made").chmod(0o777)
    said, changed = play(tmp_path, "--check")
    assert changed == -1
    assert "is writable for others" in re.sub(r"\s+", " ", said)
    assert list((tmp_path / "made").iterdir()) == []
