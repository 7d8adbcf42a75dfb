# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A stand-in for python-oracledb and an Oracle database with TDE behind it: as much of both as the engine oracle uses. See README.md.

The database is a folder, which the variable ``ORACLEDB_STANDIN`` names.
"""

from __future__ import annotations

import os
import pathlib
import time
import typing as t

from .database import Database, Refused

__version__ = "0.0+standin"
AUTH_MODE_DEFAULT, AUTH_MODE_SYSDBA, AUTH_MODE_SYSKMT = 0, 2, 524288

_thick = {"on": False}


class Error(Exception):
    """As python-oracledb's: ``args[0]`` has ``code``, ``full_code`` and ``message``."""


class DatabaseError(Error):
    pass


class _Reason:
    def __init__(self, full_code: str, message: str) -> None:
        self.full_code = full_code
        self.code = int(full_code.partition("-")[2]) if full_code.startswith("ORA-") else 0
        self.message = f"{full_code}: {message}"

    def __str__(self) -> str:
        return self.message


def init_oracle_client(lib_dir: str | None = None) -> None:
    """Thick mode."""
    _thick["on"] = True


def is_thin_mode() -> bool:
    return not _thick["on"]


class Cursor:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[tuple[t.Any, ...]] = []

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *dummy: object) -> None:
        pass

    def execute(self, statement: str, parameters: t.Any = None) -> Cursor:
        self._rows = self._connection.run(statement, parameters or {})
        return self

    def fetchall(self) -> list[tuple[t.Any, ...]]:
        return self._rows

    def fetchone(self) -> tuple[t.Any, ...] | None:
        return self._rows[0] if self._rows else None


class Connection:
    """A session.

    :ivar call_timeout: milliseconds that one call may take; 0 for any time.
    """

    def __init__(self, database: Database, life: int, sysdba: bool, instance: str) -> None:
        self.call_timeout = 0
        self._database, self._life, self._sysdba, self._instance = database, life, sysdba, instance
        self._container = "CDB$ROOT"
        self.autocommit = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *dummy: object) -> None:
        self.close()

    def cursor(self) -> Cursor:
        return Cursor(self)

    def close(self) -> None:
        pass

    def run(self, statement: str, parameters: t.Any) -> list[tuple[t.Any, ...]]:
        try:
            rows, self._container = self._database.execute(
                statement, parameters, self._container, self._life, self._sysdba, self._instance
            )
        except Refused as exc:
            if exc.hang:
                # Packets are dropped: nothing is said until the client gives up.
                limit = self.call_timeout / 1000 if self.call_timeout else 30
                time.sleep(min(limit, 30 if exc.seconds is None else exc.seconds))
                raise DatabaseError(_Reason("DPY-4024", f"call timeout of {self.call_timeout} ms exceeded")) from None
            # The real server quotes statements and identifiers in some of its messages.
            raise DatabaseError(_Reason(exc.code, f"{exc.text}: {statement}")) from None
        return rows


def connect(
    dsn: str | None = None,
    *,
    user: str | None = None,
    password: str | None = None,
    mode: int = AUTH_MODE_DEFAULT,
    tcp_connect_timeout: float = 20.0,
    **dummy: t.Any,
) -> Connection:
    """Log in to the root container."""
    path = os.environ.get("ORACLEDB_STANDIN")
    if not path or not pathlib.Path(path, "state.json").exists():
        raise DatabaseError(_Reason("DPY-6005", f"cannot connect to database: {dsn}"))
    if not dsn and is_thin_mode():
        raise DatabaseError(_Reason("DPY-3001", "bequeath is only supported in python-oracledb thick mode"))
    database = Database(pathlib.Path(path))
    state = database.state()
    if not state["up"]:
        unknown = 'DPY-6001: Service "CDB1" is not registered with the listener. (Similar to ORA-12514)'
        raise DatabaseError(_Reason("DPY-6005", f"cannot connect to database (CONNECTION_ID=x).\n{unknown}"))
    by_the_system = dsn is None and user is None
    if not by_the_system and (password is None or not database.knows(user or "", password)):
        raise DatabaseError(_Reason("ORA-01017", f"invalid credential or not authorized; logon denied ({user}/{password})"))
    # Of a cluster: the instance on the host that the address names.
    instance = database.instance((dsn or "").partition(":")[0])
    return Connection(database, state["life"], mode == AUTH_MODE_SYSDBA, instance)
