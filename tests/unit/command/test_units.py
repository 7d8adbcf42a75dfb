# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The units' texts, and systemd's own opinion of them where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import exits, units
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import CAUSES, TdeError

COMMAND, STATE = "/usr/local/sbin/hsm-tde", "/var/lib/hsm-tde"


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z]+)=(.*)$", text, re.MULTILINE))


def test_a_refusal_does_not_start_the_unit_again() -> None:
    text = directives(units.template(COMMAND, STATE))
    assert text["Restart"] == "on-failure"
    never = {int(code) for code in text["RestartPreventExitStatus"].split()}
    for code in ("pin_refused", "pin_refused_before", "pin_locked", "pin_tries_low", "pin_source_missing", "internal_error"):
        assert exits.exit_code(TdeError(code, "")) in never, code
    assert exits.exit_code(TdeError("token_unreachable", "")) not in never


def test_every_cause_has_an_exit_code_of_its_own() -> None:
    assert set(exits.BY_CAUSE) == set(CAUSES)
    codes = [exits.DONE, exits.INTERNAL, *exits.BY_CAUSE.values()]
    assert len(set(codes)) == len(codes)


def test_no_directive_hides_a_mount_from_the_database() -> None:
    """Each of these gives a service a mount name space of its own (systemd.exec(5))."""
    private = (
        r"^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|Private(Tmp|Devices|Mounts|Users)"
    )
    private += r"|ProcSubset|ReadWritePaths|ReadOnlyPaths|InaccessiblePaths|BindPaths|TemporaryFileSystem|RootDirectory|MountFlags|DynamicUser)="
    for text in (units.template(COMMAND, STATE), units.instance(["a.service"], "/etc/x.pin"), units.database("main")):
        assert re.findall(private, text or "", re.MULTILINE) == []


def test_the_database_does_not_start_without_the_open_keystore() -> None:
    text = directives(units.database("main"))
    assert text == {"Requires": "hsm-tde@main.service", "After": "hsm-tde@main.service"}


def test_a_keystore_of_the_running_server_is_opened_after_each_of_its_starts() -> None:
    """The server's start pulls the unit in, and does not wait for it; its end ends the unit, and nothing is left to close."""
    assert directives(units.database("main", after_start=True)) == {"Wants": "hsm-tde@main.service"}
    text = directives(units.instance(["fep.service"], None, after_start=True) or "")
    assert text == {"After": "fep.service", "BindsTo": "fep.service", "PartOf": "fep.service", "ExecStop": ""}


def test_a_cluster_without_units_and_credential_needs_no_drop_in() -> None:
    assert units.instance([], None) is None


def test_a_credential_is_handed_over_under_its_file_s_name() -> None:
    text = units.instance([], "/etc/credstore.encrypted/hsm-tde.main.pin")
    assert directives(text or "")["LoadCredentialEncrypted"] == "hsm-tde.main.pin:/etc/credstore.encrypted/hsm-tde.main.pin"


@pytest.mark.parametrize("name", ["postgresql@15-main.service", "postgresql@.service", "mariadb.service", r"a\x2db.service"])
def test_units_of_databases(name: str) -> None:
    assert units.check_unit(name) == name


@pytest.mark.parametrize(
    "name", ["postgresql", "a b.service", "../a.service", "a/b.service", "a.service\nX=1", "", "a@b@c.service", "x.timer"]
)
def test_what_is_no_service_s_unit_is_refused(name: str) -> None:
    with pytest.raises(TdeError) as caught:
        units.check_unit(name)
    assert caught.value.code == "invalid_option"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("after_start", [False, True])
def test_systemd_finds_no_fault(tmp_path: Path, after_start: bool) -> None:
    command = tmp_path / "hsm-tde"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    (tmp_path / "hsm-tde@.service").write_text(units.template(str(command), str(tmp_path)))
    instance = tmp_path / "hsm-tde@main.service.d"
    instance.mkdir()
    text = units.instance(["db@1.service"], "/etc/credstore.encrypted/hsm-tde.main.pin", after_start)
    (instance / "hsm-tde.conf").write_text(text or "")
    database = tmp_path / "db@1.service.d"
    database.mkdir()
    (tmp_path / "db@.service").write_text("[Service]\nExecStart=/bin/true\n")
    (database / "hsm-tde-main.conf").write_text(units.database("main", after_start))
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "--recursive-errors=no", "verify", "hsm-tde@main.service", "db@1.service"],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
