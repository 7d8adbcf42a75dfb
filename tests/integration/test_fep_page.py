# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Enterprise Postgres in docs/from-a-bare-linuxone-host.md: its commands as they stand, in their order, on the stand-in.

What differs from a real host, its paths and how its server is restarted, are variables of the host.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml
from ansible_collections.hsm.tde.tests.integration import fep, postgres, support

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not support.opencryptoki_library() or not postgres.programs(),
        reason="needs root, openCryptoki and PostgreSQL",
    ),
]

PAGE = (support.ROOT / "docs/from-a-bare-linuxone-host.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Enterprise Postgres") :].split("\n## ")[0]
COMMANDS = re.findall(r"```shell\n(.*?)\n```", SECTION, re.DOTALL)
FILES = dict(re.findall(r"`([\w/]+\.yml)`:\n\n```yaml\n(.*?)```", SECTION, re.DOTALL))


def test_every_command_in_its_order() -> None:
    assert len(COMMANDS) == 4
    assert sorted(FILES) == ["group_vars/hsm_tde.yml", "pin.yml"]
    with postgres.folder() as home:
        with fep.TokenHost(support.OpenCryptoki(home / "opencryptoki")) as host:
            server = fep.FepServer(home, host)
            python = home / "python"
            python.write_text(f'#!/bin/sh\nexec nsenter --target={host.pid} --mount --ipc -- {sys.executable} "$@"\n')
            python.chmod(0o755)
            files = {
                **FILES,
                "hosts": f"[hsm_tde]\nlinuxone1 ansible_connection=local ansible_python_interpreter={python}\n",
                "vault.yml": 'vault_so_pin: "76543210"\nvault_pin: "01234567"\nvault_new_pin: "24681357"\n',
                "restart.yml": yaml.safe_dump([{"name": "Restart", "ansible.builtin.command": {"argv": _restart(server)}}]),
                "host_vars/linuxone1.yml": yaml.safe_dump(_differences(server)),
            }
            for name, content in files.items():
                path = home / "play" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            _own_var_lib(host)
            try:
                _walk(server)
            finally:
                server.stop()


def _own_var_lib(host: fep.TokenHost) -> None:
    """The page's commands leave the state directory at its default: inside, /var/lib is a private layer."""
    home = host.opencryptoki.home
    for name in ("upper", "work"):
        (home / name).mkdir()
    layer = f"lowerdir=/var/lib,upperdir={home}/upper,workdir={home}/work"
    mounts = (
        ["mount", "-t", "overlay", "overlay", "-o", layer, "/var/lib"],
        ["mount", "--bind", str(home / "var"), "/var/lib/opencryptoki"],
    )
    host.run(lambda: [subprocess.run(argv, check=True, timeout=20) for argv in mounts] and None)


def _walk(server: fep.FepServer) -> None:
    site, info, pin, rotate = COMMANDS
    first = _run(server, site)
    assert _changed(first) > 0
    assert server.is_open()
    algorithm = (
        "SELECT spcencalgo FROM pgx_tablespaces v JOIN pg_tablespace s ON s.oid = v.spctablespace WHERE spcname LIKE 'sec%'"
    )
    assert server.psql(algorithm) == "AES256"
    assert _changed(_run(server, site)) == 0
    server.restart()
    assert not server.is_open()
    assert "not known to be open since the server's start" in _run(server, info)
    assert _changed(_run(server, site)) == 1
    assert server.is_open()
    assert _changed(_run(server, pin)) == 1
    vault = server.home / "play/vault.yml"
    vault.write_text(vault.read_text().replace("01234567", "24681357"))
    assert _changed(_run(server, rotate)) == 1
    assert _changed(_run(server, rotate)) == 0
    server.restart()
    assert _changed(_run(server, site)) == 1
    assert server.is_open()
    assert not [pin for pin in ("01234567", "24681357") if pin in server.said()]


def _run(server: fep.FepServer, command: str) -> str:
    """A command of the page, in the folder of its files; the libraries are in the interpreter."""
    environment = {
        "ANSIBLE_CONFIG": str(support.ROOT / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "0",
        "ANSIBLE_SKIP_TAGS": "prerequisites",
    }
    environment["ANSIBLE_COLLECTIONS_PATH"] = str(support.ROOT / ".collections")
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=server.home / "play",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    assert "24681357" not in done.stdout
    return done.stdout


def _changed(output: str) -> int:
    return int(re.findall(r"changed=(\d+)", output)[-1])


def _restart(server: fep.FepServer) -> list[str]:
    options = f"-k {server.socket} -c listen_addresses='' -c fsync=off -c log_statement=all"
    pg_ctl = [f"{server.bin}/pg_ctl", "-D", str(server.data), "-l", f"{server.log}/server.log", "-o", options, "-w", "restart"]
    return ["runuser", "-u", postgres.USER, "--", *pg_ctl]


def _differences(server: fep.FepServer) -> dict[str, object]:
    engine = yaml.safe_load(FILES["group_vars/hsm_tde.yml"])["hsm_tde_fep"]
    home = server.home
    paths = {
        "keystore_location": str(server.keystore), "data_directory": str(server.data), "bin_directory": str(server.bin),
        "os_user": postgres.USER, "tablespace_directory": str(home / "spaces"),
    }  # fmt: skip
    (home / "spaces").mkdir()
    return {
        "hsm_tde_library": support.opencryptoki_library(),
        "hsm_tde_pin_source": {"kind": "file", "path": str(home / "main.pin")},
        "hsm_tde_fep": {**engine, **paths},
        "hsm_tde_command_path": str(home / "hsm-tde"),
        "hsm_tde_units": "never",
        "hsm_tde_restart_tasks": str(home / "play/restart.yml"),
        # The stand-in encrypts nothing, and the proof says so.
        "encrypted_tablespaces_prove": False,
    }
