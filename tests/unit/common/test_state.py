# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The state directory under its lock."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.files import lock
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory

LEFT = (
    ".registry.json.0123456789ab.tmp",
    ".refused.json.0123456789ab.tmp",
    ".trying.json.0123456789ab.tmp",
    ".journal.jsonl.head.0123456789ab.tmp",
    "clusters/.main.json.0123456789ab.tmp",
)


def test_whoever_holds_the_lock_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    state = StateDirectory(str(tmp_path / "state"))
    (tmp_path / "state/clusters").mkdir(parents=True)
    for name in (*LEFT, ".registry.json.tmp", "registry.json"):
        (tmp_path / "state" / name).write_text("{}")
    with state.locked():
        there = {str(path.relative_to(state.path)) for path in Path(state.path).rglob("*") if not path.name.endswith("lock")}
    assert there == {"clusters", ".registry.json.tmp", "registry.json"}


def test_a_file_that_somebody_writes_is_left_to_him(tmp_path: Path) -> None:
    """A task that does not hold the lock of the directory writes a file under the file's own lock."""
    state = StateDirectory(str(tmp_path / "state"))
    state.create()
    (tmp_path / "state" / LEFT[1]).write_text("{}")
    with lock(state.refused + ".lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", iter(range(0, 1000, 6)).__next__)
        with pytest.raises(TdeError) as caught, state.locked():
            pass
    assert caught.value.code == "busy"
    assert (tmp_path / "state" / LEFT[1]).exists()
