# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine oracle on the real python-oracledb, as far as that goes without a database; and whether the stand-in has its interface.

The stand-in has the library's name, so the library is imported in a process of its own.
"""

from __future__ import annotations

import ast
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STANDIN = ROOT / "tests/standins/oracledb"
SQL = ROOT / "plugins/module_utils/engines/oracle/sql.py"
PASSWORD = "Sys-Password-1"

#: Names of an API: functions with their parameters, classes with their attributes, constants with their values.
_API = """
import inspect, json, oracledb
def attributes(one):
    return sorted(name for name in dir(one) if not name.startswith("_") or name in ("__enter__", "__exit__"))
try:
    oracledb.connect()
except oracledb.Error as exc:
    reason = exc.args[0]
found = {"file": oracledb.__file__, "version": oracledb.__version__, "names": sorted(dir(oracledb)), "reason": attributes(reason)}
found["classes"] = {name: attributes(getattr(oracledb, name)) for name in ("Connection", "Cursor", "Error", "DatabaseError")}
found["parents"] = [one.__name__ for one in oracledb.DatabaseError.__mro__]
found["parameters"] = {
    name: {one.name: one.kind.name for one in inspect.signature(getattr(oracledb, name)).parameters.values()}
    for name in ("connect", "init_oracle_client", "is_thin_mode")
}
found["execute"] = list(inspect.signature(oracledb.Cursor.execute).parameters)
found["modes"] = {name: int(getattr(oracledb, name)) for name in dir(oracledb) if name.startswith("AUTH_MODE_")}
print(json.dumps(found))
"""

#: Logs in with the engine's own function; the wish comes on stdin.
_LOGIN = """
import json, sys
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection
from ansible_collections.hsm.tde.plugins.module_utils.engines.oracle import options, sql
wish = json.load(sys.stdin)
sql.CONNECT_SECONDS = 3.0
connection = Connection(**{**wish["connection"], "password": Secret(wish["password"])})
try:
    with sql.connect(connection, options.complete(wish["options"], {}, "CDB1")):
        print("{}")
except TdeError as exc:
    print(json.dumps({"code": exc.code, "said": str(exc)}))
"""


def _python(script: str, *path: Path, text: str = "") -> dict[str, t.Any]:
    """Run a script in a process with the given folders before the library's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT / ".collections"]))}
    environment.pop("ORACLEDB_STANDIN", None)
    done = subprocess.run(
        [sys.executable, "-c", script], input=text, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return t.cast("dict[str, t.Any]", json.loads(done.stdout))


@pytest.fixture(scope="module")
def real() -> dict[str, t.Any]:
    found = _python(_API)
    assert "standins" not in found["file"]
    return found


@pytest.fixture(scope="module")
def standin() -> dict[str, t.Any]:
    found = _python(_API, STANDIN)
    assert "standins" in found["file"]
    return found


def test_every_name_that_the_engine_uses_is_the_librarys(real: dict[str, t.Any], standin: dict[str, t.Any]) -> None:
    tree = ast.parse(SQL.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "oracledb"
    }
    assert {"connect", "Error", "AUTH_MODE_SYSDBA"} <= used
    assert used <= set(real["names"])
    assert used <= set(standin["names"])


def test_the_stand_in_has_nothing_that_the_library_has_not(real: dict[str, t.Any], standin: dict[str, t.Any]) -> None:
    assert set(standin["reason"]) <= set(real["reason"])
    assert {"full_code", "code", "message", "isrecoverable"} <= set(real["reason"])
    for name in ("Connection", "Cursor", "Error", "DatabaseError"):
        # The stand-in's own way to run a statement.
        assert set(standin["classes"][name]) - {"run"} <= set(real["classes"][name]), name
    for name, parameters in standin["parameters"].items():
        kinds = {one: kind for one, kind in parameters.items() if kind != "VAR_KEYWORD"}
        assert kinds.items() <= real["parameters"][name].items(), name
    assert standin["execute"][:3] == real["execute"][:3]
    assert standin["modes"].items() <= real["modes"].items()
    assert standin["parents"][:2] == real["parents"][:2] == ["DatabaseError", "Error"]


def _login(connection: t.Mapping[str, t.Any] | None = None, **options: t.Any) -> dict[str, t.Any]:
    """Log in with the real library. :returns: the error's code, and what it says."""
    wish = {"connection": {"user": "sys", **(connection or {})}, "password": PASSWORD, "options": options}
    found = _python(_LOGIN, text=json.dumps(wish))
    assert found, "it logged in"
    assert PASSWORD not in found["said"]
    return found


def _listener(answer: t.Callable[[socket.socket], None]) -> int:
    """A port that takes connections. :param answer: what is done with one."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        taken = server.accept()[0]
        server.close()
        answer(taken)
        taken.close()

    threading.Thread(target=serve, daemon=True).start()
    return t.cast(int, server.getsockname()[1])


def _refuse(taken: socket.socket) -> None:
    """A listener's refusal (Oracle Net, packet REFUSE) with ORA-12514."""
    taken.recv(8192)
    data = b"(DESCRIPTION=(TMP=)(VSNNUM=318767104)(ERR=12514)(ERROR_STACK=(ERROR=(CODE=12514)(EMFI=4))))"
    taken.sendall(struct.pack(">HHBBHBBH", 12 + len(data), 0, 4, 0, 0, 1, 0, len(data)) + data)


def test_nobody_listens() -> None:
    found = _login({"host": "127.0.0.1", "port": 1})
    assert found["code"] == "server_down"
    assert "(DPY-6005)" in found["said"]


def test_a_host_that_is_not_known_is_no_defect_of_the_collection() -> None:
    found = _login({"host": "no-such-host.invalid"})
    assert found["code"] == "server_down"
    # Which of the two it is differs between versions of the library.
    assert "(gaierror)" in found["said"] or "(DPY-6005)" in found["said"]


def test_a_listener_that_does_not_know_the_service_is_told_from_one_that_is_down() -> None:
    found = _login({"host": "127.0.0.1", "port": _listener(_refuse)})
    assert found["code"] == "server_down"
    assert "listener does not know the service (DPY-6001)" in found["said"]
    assert "oracle.service" in found["said"]


def test_a_server_that_takes_the_connection_and_is_silent_is_not_waited_for_without_end() -> None:
    began = time.monotonic()
    found = _login({"host": "127.0.0.1", "port": _listener(lambda dummy: time.sleep(30))}, call_timeout=1.0)
    assert found["code"] == "timeout"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("service", ["CDB1", "(DESCRIPTION=(ADDRESS="])
def test_a_service_alone_does_not_say_where(service: str) -> None:
    found = _login(service=service)
    assert found["code"] == "invalid_option"
    assert "login_host" in found["said"]


def test_thick_mode_without_oracles_libraries_says_what_to_install(tmp_path: Path) -> None:
    found = _login({"host": "127.0.0.1", "port": 1}, thick=True, client_directory=str(tmp_path))
    assert found["code"] == "oracle_client_missing"
    assert "(DPI-1047)" in found["said"]
    assert "oracle.client_directory" in found["said"]


@pytest.mark.parametrize("privilege", ["sysdba", "syskm", "none"])
def test_each_privilege_is_one_that_the_library_knows(privilege: str) -> None:
    assert _login({"host": "127.0.0.1", "port": 1}, privilege=privilege)["code"] == "server_down"
