# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""No credential of an Oracle database comes out: the roles at -vvv, with every process, log and file looked at. On stand-ins."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import memo as memos
from ansible_collections.hsm.tde.tests.integration import nshield, oracle, support

pytestmark = pytest.mark.root

WATCH = support.ROOT / "tests/tools/watch_secrets.py"
#: Every credential of the test, and one that is mistyped; ``acs`` and ``sys`` are what the stand-ins were made with.
NAMES = ("module", "one", "new", "two", "cards", "software", "mistyped", "acs", "sys")


class Host:
    """A host with an Oracle database, all of whose credentials are in files of one folder."""

    def __init__(self, home: Path, hsm: nshield.Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.hsm, self.secrets = home, hsm, home / "secrets"
        for name in ("secrets", "tmp", "remote"):
            (home / name).mkdir(mode=0o700)
        made = {name: f"{name[:3]}-{secrets.token_hex(5)}" for name in NAMES}
        made.update(acs=nshield.ACS_PASSPHRASE, sys="Sys-Password-1")
        for name, value in made.items():
            (self.secrets / name).write_text(value + "\n")
        hsm.a.create_softcard("one", made["one"])
        hsm.a.create_softcard("two", made["two"])
        cards = hsm.a.create_cardset("cards", made["cards"], quorum=(1, 2))
        hsm.hsm.insert(f"{cards}:1")
        hsm.hsm.insert("acs:1", slot=2)
        monkeypatch.setenv("ORACLEDB_STANDIN", str(home / "oracle"))
        self.site = oracle.Site(home, hsm)
        self.site.database.add_tablespace("PDB1", "USERS", "content")
        python = home / "python"
        python.write_text(
            f'#!/bin/sh\nexport ORACLEDB_STANDIN={home}/oracle PYTHONPATH={oracle.STANDIN}\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        (home / "bounce.py").write_text(oracle.BOUNCE % f"{home}/oracle")
        restart = {
            "name": "Restart it",
            "ansible.builtin.command": {"argv": [str(python), f"{home}/bounce.py"]},
            "changed_when": True,
        }
        (home / "restart.yml").write_text(yaml.safe_dump([restart]))

    def secret(self, name: str) -> str:
        return f"{{{{ lookup('ansible.builtin.file', '{self.secrets}/{name}') }}}}"

    def slot(self, protection: str, token: str | None = None, secret: str | None = None) -> list[dict[str, t.Any]]:
        found = {"name": "primary", "protection": protection, "token_label": token}
        return [{**found, "passphrase": self.secret(secret)} if secret else found]

    def play(self, plays: t.Sequence[tuple[str, dict[str, t.Any]]]) -> Path:
        """A playbook of roles, each with its variables; one with ``fails`` is to fail."""
        options = {**self.site.options, "service": "CDB1", "auto_login": True, "software_passphrase": self.secret("software")}
        tasks: list[dict[str, t.Any]] = []
        for role, given in plays:
            variables = {**given, "hsm_tde_oracle": {**options, **given.get("hsm_tde_oracle", {})}}
            fails = variables.pop("fails", False)
            included = {"name": role, "ansible.builtin.include_role": {"name": f"hsm.tde.{role}"}, "vars": variables}
            if fails:
                refused = {"name": "It is to fail", "ansible.builtin.fail": {"msg": "It did not fail"}}
                rescue = {"name": "It failed", "ansible.builtin.debug": {"var": "ansible_failed_result"}}
                right = {
                    "name": "As it was to",
                    "ansible.builtin.assert": {"that": ["'did not fail' not in ansible_failed_result.msg"]},
                }
                tasks.append({"name": f"Refused: {role}", "block": [included, refused], "rescue": [rescue, right]})
            else:
                tasks.append(included)
        common = {
            "ansible_python_interpreter": str(self.home / "python"),
            "ansible_remote_tmp": str(self.home / "remote"),
            "hsm_tde_engine": "oracle",
            "hsm_tde_cluster": "main",
            "hsm_tde_state_directory": self.site.state.path,
            "hsm_tde_command_path": str(self.home / "hsm-tde"),
            "hsm_tde_units": "never",
            "hsm_tde_login_host": "db",
            "hsm_tde_login_user": "sys",
            "hsm_tde_login_password": self.secret("sys"),
            "hsm_tde_restart": True,
            "hsm_tde_restart_tasks": str(self.home / "restart.yml"),
            "encrypted_tablespaces_prove": False,
        }
        play = {
            "name": "Roles",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": common,
            "tasks": tasks,
        }
        (self.home / "play.yml").write_text(yaml.safe_dump([play], sort_keys=False))
        return self.home / "play.yml"


def watched(folder: Path, looks: t.Sequence[Path], argv: t.Sequence[str], **environment: str) -> tuple[int, str]:
    """Run a command under the watcher. :returns: its exit code and what it said."""
    looked = [word for path in looks for word in ("--look", str(path))]
    done = subprocess.run(
        [sys.executable, str(WATCH), "--secrets", str(folder), *looked, "--", *argv],
        cwd=support.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Host]:
    with nshield.site(slots=3) as hsm:
        yield Host(tmp_path, hsm, monkeypatch)


def _plays(host: Host) -> list[tuple[str, dict[str, t.Any]]]:
    """Softcard, tablespace, rotation; changes that are refused by HSM and by server; passphrase, other softcard, card set."""
    one, new = {"hsm_tde_passphrase": host.secret("one")}, {"hsm_tde_passphrase": host.secret("new")}
    transfer = {"transfer_keys": True, "acs_passphrase": host.secret("acs")}
    cards = {"change_protection_keyslots": host.slot("ocs", "cards", "cards"), "hsm_tde_passphrase": host.secret("two")}
    return [
        ("configure_tde", {**one, "hsm_tde_keyslots": host.slot("softcard", "one")}),
        (
            "encrypted_tablespaces",
            {**one, "hsm_tde_keyslots": host.slot("softcard", "one"), "hsm_tde_tablespaces": [{"name": "PDB1.USERS"}]},
        ),
        ("rotate_keys", {**one, "hsm_tde_tag": "2"}),
        (
            "change_protection",
            {
                "fails": True,
                "hsm_tde_passphrase": host.secret("mistyped"),
                "change_protection_keyslots": host.slot("softcard", "one", "new"),
            },
        ),
        ("change_protection", {**one, "change_protection_keyslots": host.slot("softcard", "one", "new")}),
        (
            "change_protection",
            {**new, "change_protection_keyslots": host.slot("softcard", "two", "two"), "hsm_tde_oracle": transfer},
        ),
        # The server's message quotes the statement, with the passphrase in it.
        (
            "change_protection",
            {**cards, "fails": True, "hsm_tde_oracle": {"safe_way_round": True, "software_passphrase": host.secret("mistyped")}},
        ),
        ("change_protection", {**cards, "hsm_tde_oracle": {"safe_way_round": True}}),
    ]


@pytest.mark.slow
def test_no_credential_comes_out_of_the_roles(host: Host) -> None:
    playbook = Path(sys.executable).with_name("ansible-playbook")
    argv = [str(playbook), "-vvv", "-i", "localhost,", str(host.play(_plays(host)))]
    log = host.home / "ansible.log"
    code, said = watched(
        host.secrets,
        [host.home, host.hsm.base],
        argv,
        TMPDIR=str(host.home / "tmp"),
        ANSIBLE_LOCAL_TEMP=str(host.home / "tmp"),
        ANSIBLE_LOG_PATH=str(log),
    )
    failed = host.home / "watched-output.log"
    assert code == 0, said + (failed.read_text()[-4000:] if failed.exists() else "")
    found = re.search(rf"{len(NAMES)} secrets: (\d+) bytes of output, (\d+) looks at all processes", said)
    assert found, said
    assert int(found[1]) > 10_000
    assert int(found[2]) > 100
    # What was looked at did what it says.
    assert host.site.read() == "content"
    guard = memos.read(host.site.state, "main").guard
    assert guard is not None
    assert guard.words == "card set cards"
    ran = {entry["command"] for entry in host.hsm.hsm.journal() if entry.get("command")}
    assert {"ppmk", "cardpp", "rocs", "nfkminfo"} <= ran
    text = log.read_text()
    assert ("passphrase_refused" in text, "ORA-28353" in text) == (True, True)
    assert '"***"' in (host.site.database.path / "journal.jsonl").read_text().replace('\\"', '"')


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("sh -c 'sleep 0.3; true' x {secret}", "a process's cmdline"),
        ("env SECRET={secret} sleep 0.3", "a process's"),
        ("echo {secret}", "the output"),
        ("logger -u /dev/log -f {beside}", "the system log"),
        ("echo {secret} >{looked}/log", "the file"),
    ],
)
def test_the_watch_finds_what_comes_out(tmp_path: Path, command: str, where: str) -> None:
    """Without which the test above would prove nothing."""
    folder, looked, beside = tmp_path / "secrets", tmp_path / "looked", tmp_path / "beside"
    folder.mkdir()
    looked.mkdir()
    (folder / "one").write_text("Softcard-7391\n")
    beside.write_text("Softcard-7391\n")
    script = tmp_path / "script"
    script.write_text(command.format(secret="Softcard-7391", looked=looked, beside=beside) + "\n")
    if "logger" in command and os.path.exists("/dev/log"):
        # The host's own log, or another watch at this moment: there this one does not listen.
        assert watched(folder, [looked], ["sh", str(script)])[0] == 0
        return
    code, said = watched(folder, [looked], ["sh", str(script)])
    assert (code, f"FOUND one in {where}" in said) == (1, True), said
