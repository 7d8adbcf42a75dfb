# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Installing the command and its units: by content, idempotent, nothing of anybody else's touched."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import install, zipapp
from ansible_collections.hsm.tde.plugins.module_utils.command.install import Cluster, Wish
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError

MAIN = Cluster("main", ("postgresql@15-main.service",), "/etc/credstore.encrypted/main.pin")


@pytest.fixture
def wish(tmp_path: Path) -> Wish:
    (tmp_path / "sbin").mkdir()
    return Wish(
        present=True,
        path=str(tmp_path / "sbin/hsm-tde"),
        python=sys.executable,
        state_directory="/var/lib/hsm-tde",
        unit_directory=str(tmp_path / "units"),
        with_units=True,
        clusters=(MAIN, Cluster("other")),
    )


@pytest.fixture(autouse=True)
def systemctl(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A host that systemd runs, with its calls recorded; ``stale`` units are answered where the test says so."""
    calls: list[list[str]] = []

    def run_program(argv: t.Sequence[str], **_: t.Any) -> t.Any:
        calls.append(list(argv))
        return type("Done", (), {"stdout": b"yes\n" if os.environ.get("TEST_STALE") else b"no\n"})

    monkeypatch.setattr(install, "run_program", run_program)
    monkeypatch.setattr(install.units, "booted", lambda: True)
    return calls


def tree(wish: Wish) -> dict[str, str]:
    root = Path(wish.unit_directory).parent
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes().hex()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def ensure(wish: Wish, *, check: bool = False, **changes: t.Any) -> dict[str, t.Any]:
    return install.ensure(dataclasses.replace(wish, **changes), check=check)


def test_installed_once_and_then_unchanged(wish: Wish, systemctl: list[list[str]]) -> None:
    first = ensure(wish)
    assert first["changed"]
    assert systemctl[-1] == ["systemctl", "daemon-reload"]
    assert sorted(tree(wish)) == [
        "sbin/hsm-tde",
        "units/hsm-tde@.service",
        "units/hsm-tde@main.service.d/hsm-tde.conf",
        "units/multi-user.target.wants/hsm-tde@other.service",
        "units/postgresql@15-main.service.d/hsm-tde-main.conf",
    ]
    info = os.stat(wish.path)
    assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o755, os.geteuid())
    before = tree(wish)
    del systemctl[:]
    second = ensure(wish)
    assert (second["changed"], second["plan"]) == (False, [])
    assert ["systemctl", "daemon-reload"] not in systemctl
    assert tree(wish) == before
    assert second["sha256"] == first["sha256"]


def test_check_mode_tells_the_plan_and_writes_nothing(wish: Wish) -> None:
    planned = ensure(wish, check=True)
    assert planned["changed"]
    assert tree(wish) == {}
    assert ensure(wish)["plan"] == planned["plan"]


def test_the_diff_shows_each_file_before_and_after(wish: Wish) -> None:
    diff = ensure(wish)["diff"]
    assert diff["before"][wish.path] == "absent"
    assert "mode 0755" in diff["after"][wish.path]
    assert "SHA-256" in diff["after"][wish.path]


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(zipapp.build("/usr/bin/python3", "/x")), lambda p: p.chmod(0o700)])
def test_another_version_or_mode_is_put_right(wish: Wish, spoil: t.Callable[[Path], None]) -> None:
    ensure(wish)
    before = tree(wish)
    spoil(Path(wish.path))
    again = ensure(wish)
    assert [step["object"] for step in again["plan"]] == [wish.path]
    assert tree(wish) == before
    assert stat.S_IMODE(os.stat(wish.path).st_mode) == 0o755


def test_a_database_that_moves_to_another_unit_leaves_no_drop_in_behind(wish: Wish) -> None:
    ensure(wish)
    ensure(wish, clusters=(Cluster("main", ("postgresql@16-main.service",)),))
    assert sorted(tree(wish))[1:] == [
        "units/hsm-tde@.service",
        "units/hsm-tde@main.service.d/hsm-tde.conf",
        # Not asked for in the second call, so left alone.
        "units/multi-user.target.wants/hsm-tde@other.service",
        "units/postgresql@16-main.service.d/hsm-tde-main.conf",
    ]


def test_a_cluster_s_ties_to_the_boot_can_be_taken_away(wish: Wish) -> None:
    ensure(wish)
    ensure(wish, clusters=(dataclasses.replace(MAIN, enabled=False), Cluster("other", enabled=False)))
    assert sorted(tree(wish)) == ["sbin/hsm-tde", "units/hsm-tde@.service"]


def test_absent_removes_all_of_ours_and_nothing_else(wish: Wish) -> None:
    ensure(wish)
    own = Path(wish.unit_directory, "postgresql@15-main.service.d", "own.conf")
    own.write_text("[Service]\n")
    look_alike = Path(wish.unit_directory, "postgresql@15-main.service.d", "hsm-tde-mine.conf")
    look_alike.write_text("[Service]\n")
    assert ensure(wish, present=False, clusters=())["changed"]
    assert sorted(tree(wish)) == [
        "units/postgresql@15-main.service.d/hsm-tde-mine.conf",
        "units/postgresql@15-main.service.d/own.conf",
    ]
    assert not ensure(wish, present=False, clusters=())["changed"]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("which", ["sbin/hsm-tde", "units/hsm-tde@.service"])
def test_what_is_not_ours_is_neither_overwritten_nor_removed(wish: Wish, present: bool, which: str) -> None:
    path = Path(wish.unit_directory).parent / which
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    if not present and which.startswith("units"):
        ensure(wish, present=False)
    else:
        with pytest.raises(TdeError) as caught:
            ensure(wish, present=present)
        assert caught.value.code == "file_foreign"
    assert tree(wish) == {which: b"#!/bin/sh\n".hex()}


def test_a_command_that_others_can_write_is_refused(wish: Wish) -> None:
    ensure(wish)
    Path(wish.path).chmod(0o777)
    with pytest.raises(TdeError) as caught:
        ensure(wish)
    assert caught.value.code == "file_not_private"


def test_a_folder_that_others_can_write_is_refused(wish: Wish) -> None:
    Path(wish.path).parent.chmod(0o777)
    with pytest.raises(TdeError) as caught:
        ensure(wish)
    assert caught.value.code == "file_not_private"
    assert tree(wish) == {}


def test_an_interpreter_that_others_can_replace_is_refused(wish: Wish, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    ensure(wish, python=str(tmp_path / "bin/python"), with_units=False)
    (tmp_path / "bin").chmod(0o777)
    with pytest.raises(TdeError) as caught:
        ensure(wish, python=str(tmp_path / "bin/python"))
    assert caught.value.code == "file_not_private"


def test_a_missing_interpreter_names_the_role(wish: Wish, tmp_path: Path) -> None:
    with pytest.raises(TdeError) as caught:
        ensure(wish, python=str(tmp_path / "python"))
    assert caught.value.code == "file_absent"
    assert "prerequisites" in str(caught.value)
    assert tree(wish) == {}


def test_a_run_that_ended_before_systemd_read_the_units_is_finished(
    wish: Wish, systemctl: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(wish)
    del systemctl[:]
    monkeypatch.setenv("TEST_STALE", "1")
    assert [step["action"] for step in ensure(wish)["plan"]] == ["reload_systemd"]
    assert systemctl[-1] == ["systemctl", "daemon-reload"]


def test_without_units_only_the_command_is_there_and_systemd_is_not_asked(wish: Wish, systemctl: list[list[str]]) -> None:
    ensure(wish, with_units=False)
    assert sorted(tree(wish)) == ["sbin/hsm-tde"]
    assert systemctl == []


def test_auto_says_where_there_is_no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.units_wished("auto")[0]
    monkeypatch.setattr(install.units, "booted", lambda: False)
    wished, reason = install.units_wished("auto")
    assert not wished
    assert "no units were written" in reason
    assert install.units_wished("always")[0]
    assert not install.units_wished("never")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "sbin/hsm-tde"},
        {"path": "/usr/local/s bin/hsm-tde"},
        {"state_directory": "/var/lib/%i"},
        {"clusters": (Cluster("../x"),)},
        {"clusters": (Cluster("main", ("postgresql",)),)},
        {"clusters": (Cluster("main", (), "/etc/a\nUser=x"),)},
    ],
)
def test_what_a_unit_could_misread_is_refused(wish: Wish, changes: dict[str, t.Any]) -> None:
    with pytest.raises(TdeError) as caught:
        ensure(wish, **changes)
    assert caught.value.code == "invalid_option"
    assert tree(wish) == {}
