# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Connections to PostgreSQL, and what its catalogs say. The only file of the engine that imports psycopg."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import typing as t

from ...common.errors import TdeError
from .. import listener
from ..base import Connection

if t.TYPE_CHECKING:
    import psycopg
    from psycopg import sql

#: Seconds to wait for a connection (libpq's least is 2).
CONNECT_SECONDS = 10
#: Seconds that a look into the catalogs may take.
READ_SECONDS = 60
#: Seconds that a checkpoint may take.
CHECKPOINT_SECONDS = 600
#: Seconds that a lock is waited for, where the user gave nothing.
LOCK_SECONDS = 10.0


@contextlib.contextmanager
def as_user(name: str) -> t.Iterator[None]:
    """Act with another effective user id, for peer authentication: SO_PEERCRED is taken at connect(2)."""
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise TdeError("os_user_absent", "does not exist on this host", obj=f"user {name}") from None
    before = os.geteuid()
    if before == uid:
        yield
        return
    try:
        os.seteuid(uid)
    except PermissionError:
        raise TdeError("permission_denied", f"only root can act as {name}", obj=f"user {name}") from None
    try:
        yield
    finally:
        os.seteuid(before)


@dataclasses.dataclass(frozen=True)
class Access:
    """A server's address and who asks.

    :param os_user: the operating system's user for peer authentication on the local socket.
    :param host: an absolute path is a folder with a socket.
    """

    os_user: str
    host: str
    port: int
    user: str
    connection: Connection

    @property
    def local(self) -> bool:
        return self.host.startswith("/")

    @property
    def where(self) -> str:
        """The address in words."""
        return f"{self.host}/.s.PGSQL.{self.port}" if self.local else f"{self.host}:{self.port}"

    def parameters(self, database: str | None = None) -> dict[str, t.Any]:
        """libpq's connection parameters, without the password."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "dbname": database or self.connection.database,
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "hsm-tde",
            # In a database of encoding SQL_ASCII names would come as bytes.
            "client_encoding": "utf8",
            # Nothing of the caller's home decides over a connection.
            "passfile": "/nonexistent",
            # Whoever may write the socket's folder while the server is down must not be sent the password, nor be believed.
            **({"requirepeer": self.os_user} if self.local else {}),
        }


def access(connection: Connection, os_user: str, *, socket: str | None = None, port: int | None = None) -> Access:
    """The address from the options.

    :param socket: the socket's folder as the running server names it; :param port: its port.
    """
    return Access(
        os_user=os_user,
        host=connection.host or connection.unix_socket or socket or "/var/run/postgresql",
        port=connection.port or port or 5432,
        user=connection.user or os_user,
        connection=connection,
    )


def _unreached(where: Access, exc: Exception) -> TdeError:
    """Why there is no connection: libpq's ping tells a server that refuses from one that does not answer."""
    from psycopg import pq
    from psycopg.conninfo import make_conninfo

    obj = f"PostgreSQL at {where.where}"
    answer = pq.PGconn.ping(make_conninfo(**where.parameters()).encode())
    if answer == pq.Ping.REJECT:
        return TdeError("server_starting", "is starting, stopping or recovering and takes no connections", obj=obj)
    if answer == pq.Ping.OK:
        said = str(exc).strip().splitlines()[-1] if str(exc).strip() else type(exc).__name__
        return TdeError("server_refused", said, obj=obj, next_step="Check login_user, the password and pg_hba.conf.")
    return TdeError(
        "server_down", "does not answer", obj=obj, next_step="Start it, or check login_host, login_port and login_unix_socket."
    )


@contextlib.contextmanager
def connect(
    where: Access, database: str | None = None, *, lock_seconds: float = LOCK_SECONDS
) -> t.Iterator[psycopg.Connection[t.Any]]:
    """A connection in autocommit mode with ``search_path = pg_catalog`` and time-outs.

    :param database: the database, the options' one if not given.
    :raises TdeError: ``server_down``, ``server_starting``, ``server_refused``, ``server_foreign``, and ``server_failed`` for
        what a statement meets.
    """
    import psycopg

    parameters = where.parameters(database)
    if not where.local:
        listener.check(where.host, where.port, where.os_user)
    if where.connection.password is not None:
        parameters["password"] = where.connection.password.text()
    identity = as_user(where.os_user) if where.local and where.connection.password is None else contextlib.nullcontext()
    try:
        with identity:
            opened = psycopg.connect(**parameters, autocommit=True)
    except psycopg.Error as exc:
        raise _unreached(where, exc) from None
    with contextlib.closing(opened):
        try:
            opened.execute("SET search_path = pg_catalog")
            opened.execute("SELECT set_config('lock_timeout', %s, false)", (f"{int(lock_seconds * 1000)}ms",))
            opened.execute("SELECT set_config('statement_timeout', %s, false)", (f"{READ_SECONDS}s",))
            yield opened
        except psycopg.Error as exc:
            raise failed(exc, f"PostgreSQL at {where.where}") from None


def failed(exc: psycopg.Error, obj: str) -> TdeError:
    """A statement's failure as one of ours, by its SQLSTATE (PostgreSQL manual, appendix A)."""
    state = exc.sqlstate or ""
    said = exc.diag.message_primary or type(exc).__name__
    if state == "42501":
        return TdeError("server_privilege_missing", said, obj=obj, next_step="Connect as a superuser.")
    if state in ("55P03", "57014"):
        return TdeError("lock_timeout", said, obj=obj, kept="What was done before it stays done.", next_step="Run again.")
    if not state or state.startswith(("08", "57P")):
        return TdeError("server_down", f"ended the connection: {said}", obj=obj, kept="What was done before it stays done.")
    return TdeError(
        "server_failed",
        f"{said} (SQLSTATE {state})",
        obj=obj,
        kept="What was done before it stays done.",
        details={"sqlstate": state},
    )


@dataclasses.dataclass(frozen=True)
class Tablespace:
    """A tablespace as the catalog has it; ``location`` is empty for pg_default and pg_global."""

    oid: int
    name: str
    location: str
    owner: str


@dataclasses.dataclass(frozen=True)
class Database:
    """A database; ``tablespace`` is its default, ``default_setting`` what its setting default_tablespace names."""

    name: str
    tablespace: str
    connects: bool
    template: bool
    default_setting: str
    connections: int


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server's facts."""

    version: int
    data_directory: str
    standby: bool
    superuser: bool
    user: str
    tablespaces: tuple[Tablespace, ...]
    databases: tuple[Database, ...]
    standbys: int
    settings: t.Mapping[str, str]

    def tablespace(self, name: str) -> Tablespace | None:
        """The tablespace of that name."""
        return next((one for one in self.tablespaces if one.name == name), None)

    def database(self, name: str) -> Database | None:
        """The database of that name."""
        return next((one for one in self.databases if one.name == name), None)


#: The location of a tablespace whose link the server cannot read.
UNKNOWN_LOCATION = "?"

_SETTINGS = ("temp_tablespaces", "archive_mode", "log_directory", "stats_temp_directory", "wal_level", "unix_socket_directories")

_DATABASES = r"""
SELECT d.datname, s.spcname, d.datallowconn, d.datistemplate,
       coalesce((SELECT substring(c FROM '^default_tablespace=(.*)$')
                   FROM pg_db_role_setting r, unnest(r.setconfig) AS c
                  WHERE r.setdatabase = d.oid AND r.setrole = 0 AND c LIKE 'default\_tablespace=%%' LIMIT 1), ''),
       (SELECT count(*) FROM pg_stat_activity a WHERE a.datid = d.oid AND a.pid <> pg_backend_pid())
  FROM pg_database d JOIN pg_tablespace s ON s.oid = d.dattablespace ORDER BY d.datname
"""


def inspect(connection: psycopg.Connection[t.Any]) -> Server:
    """What the catalogs say. No function that would open a file of a tablespace is called: it may be locked."""

    def rows(query: t.LiteralString, parameters: t.Sequence[t.Any] = ()) -> list[tuple[t.Any, ...]]:
        return connection.execute(query, parameters).fetchall()

    settings = dict(rows("SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", (list(_SETTINGS),)))
    # data_directory is shown to superusers and pg_read_all_settings only.
    directory = rows("SELECT setting FROM pg_settings WHERE name = 'data_directory'")
    tablespaces = rows("SELECT oid::bigint, spcname, pg_get_userbyid(spcowner) FROM pg_tablespace ORDER BY spcname")
    ((standby, superuser, user, standbys),) = rows(
        "SELECT pg_is_in_recovery(), (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), current_user::text,"
        " (SELECT count(*) FROM pg_stat_replication)"
    )
    return Server(
        version=connection.info.server_version,
        data_directory=directory[0][0] if directory else "",
        standby=standby,
        superuser=bool(superuser),
        user=user,
        tablespaces=tuple(Tablespace(oid, name, _location(connection, oid), owner) for oid, name, owner in tablespaces),
        databases=tuple(Database(*row) for row in rows(_DATABASES)),
        standbys=standbys,
        settings=settings,
    )


def _location(connection: psycopg.Connection[t.Any], oid: int) -> str:
    import psycopg

    try:
        row = connection.execute("SELECT pg_tablespace_location(%s::oid)", (oid,)).fetchone()
    except psycopg.Error as exc:
        if exc.sqlstate is None or connection.closed:
            raise
        # Its link in pg_tblspc is missing or broken: one tablespace's trouble, not the server's.
        return UNKNOWN_LOCATION
    return str(row[0]) if row else UNKNOWN_LOCATION


def create_tablespace(connection: psycopg.Connection[t.Any], name: str, location: str, owner: str | None) -> None:
    """CREATE TABLESPACE at an empty directory that the server owns."""
    from psycopg import sql

    by = sql.SQL(" OWNER {}").format(sql.Identifier(owner)) if owner else sql.SQL("")
    connection.execute(
        sql.SQL("CREATE TABLESPACE {}{} LOCATION {}").format(sql.Identifier(name), by, sql.Literal(location)),
    )


def set_owner(connection: psycopg.Connection[t.Any], name: str, owner: str) -> None:
    """ALTER TABLESPACE … OWNER TO."""
    from psycopg import sql

    connection.execute(sql.SQL("ALTER TABLESPACE {} OWNER TO {}").format(sql.Identifier(name), sql.Identifier(owner)))


def checkpoint(connection: psycopg.Connection[t.Any]) -> None:
    """CHECKPOINT: bring what the server has in memory to its files."""
    connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{CHECKPOINT_SECONDS}s",))
    connection.execute("CHECKPOINT")


def qualified(schema: str, name: str) -> sql.Composed:
    """A quoted ``schema.name``."""
    from psycopg import sql

    return sql.SQL("{}.{}").format(sql.Identifier(schema), sql.Identifier(name))
