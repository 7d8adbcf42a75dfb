# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Connections to MariaDB, and what its catalogs say. The only file of the engine that imports PyMySQL."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import socket
import struct
import typing as t

from ...common.errors import TdeError
from .. import listener
from ..base import Connection

if t.TYPE_CHECKING:
    import pymysql

#: Seconds to wait for a connection, and for a look into the catalogs.
CONNECT_SECONDS = 10
READ_SECONDS = 60
#: Seconds that one table may take to be built anew: a week.
REBUILD_SECONDS = 7 * 86400

#: Where distributions put the socket: Debian; RedHat and SUSE.
SOCKETS = ("/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/run/mysql/mysql.sock")

#: Databases of the server itself.
SYSTEM_DATABASES = ("mysql", "information_schema", "performance_schema", "sys")

#: Numbers of the server's errors (MariaDB's manual, "MariaDB Error Codes").
_REFUSED, _PRIVILEGE = (1044, 1045, 1129, 1130, 1698), (1142, 1143, 1227, 1290)
_NOT_HAD, _NOT_ONLINE, _ONLINE_LOG_FULL = (1205, 1317), (1845, 1846), 1799
_NO_TABLE = (1049, 1146)

Rows = t.Sequence[t.Sequence[t.Any]]


@dataclasses.dataclass(frozen=True)
class Access:
    """A server's address and who asks.

    :param os_user: the operating system's user that the server runs as.
    """

    os_user: str
    host: str | None
    port: int
    socket: str
    user: str
    connection: Connection

    @property
    def where(self) -> str:
        """The address in words."""
        return f"{self.host}:{self.port}" if self.host else self.socket


def access(connection: Connection, os_user: str, *, path: str | None, user: str | None) -> Access:
    """The address from the options.

    :param path: the socket, or its folder; :param user: the account, the operating system's user root without it.
    """
    found = path or next((one for one in SOCKETS if os.path.exists(one)), SOCKETS[0])
    if os.path.isdir(found):
        found = os.path.join(found, "mysqld.sock")
    return Access(os_user, connection.host, connection.port or 3306, found, user or "root", connection)


@contextlib.contextmanager
def _as_account(where: Access) -> t.Iterator[None]:
    """Act as the account's user: the plugin unix_socket takes SO_PEERCRED, and that is taken at connect(2)."""
    before = os.geteuid()
    try:
        uid = before if where.host or where.connection.password else pwd.getpwnam(where.user).pw_uid
    except KeyError:
        uid = before
    if uid != before:
        os.seteuid(uid)
    try:
        yield
    finally:
        if uid != before:
            os.seteuid(before)


def _unreached(where: Access, number: int, said: str) -> TdeError:
    obj = f"MariaDB at {where.where}"
    if number in _REFUSED:
        return TdeError("server_refused", said, obj=obj, next_step="Check login_user and the password.")
    return TdeError(
        "server_down", "does not answer", obj=obj, next_step="Start it, or check login_host, login_port and login_unix_socket."
    )


def _number(exc: Exception) -> int:
    return exc.args[0] if exc.args and isinstance(exc.args[0], int) else 0


def _said(exc: Exception) -> str:
    return str(exc.args[1]) if len(exc.args) > 1 else type(exc).__name__


def failure(exc: Exception, obj: str) -> TdeError:
    """What the server answered to a statement, as one of ours. No statement of this engine holds a secret."""
    number = _number(exc)
    if number in _PRIVILEGE:
        return TdeError("server_privilege_missing", _said(exc), obj=obj, next_step="Use an account with all privileges.")
    if number in _NOT_HAD:
        return TdeError("lock_timeout", _said(exc), obj=obj, next_step="Run again when fewer or shorter transactions hold it.")
    if number == _ONLINE_LOG_FULL:
        return TdeError(
            "move_blocked",
            "more was written meanwhile than the online log holds",
            obj=obj,
            next_step="Raise innodb_online_alter_log_max_size, or run again when less is written.",
        )
    if number in _NO_TABLE:
        return TdeError("relation_absent", _said(exc), obj=obj)
    if number in (0, 2006, 2013):
        return TdeError(
            "server_down", "the connection was lost", obj=obj, kept="What the server had begun, it ends or takes back."
        )
    return TdeError("server_failed", f"error {number}: {_said(exc)}", obj=obj)


@contextlib.contextmanager
def connect(where: Access, *, read_seconds: float = READ_SECONDS) -> t.Iterator[pymysql.connections.Connection[t.Any]]:
    """A connection in autocommit mode.

    :raises TdeError: ``library_missing``, ``server_down``, ``server_refused``, ``server_foreign``; what a statement meets.
    """
    try:
        import pymysql
    except ImportError:
        raise TdeError(
            "library_missing",
            "this Python has no pymysql",
            obj="the target's Python",
            next_step="Run the role hsm.tde.prerequisites, or set ansible_python_interpreter to an environment that has it.",
        ) from None
    if where.host:
        listener.check(where.host, where.port, where.os_user)
    password = where.connection.password
    opened = pymysql.connect(
        host=where.host,
        port=where.port,
        user=where.user,
        password=password.text() if password else "",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        write_timeout=READ_SECONDS,
        autocommit=True,
        charset="utf8mb4",
        # No file of the caller's is sent to a server.
        local_infile=False,
        program_name="hsm-tde",
        defer_connect=True,
    )
    try:
        with _as_account(where):
            opened.connect(None if where.host else _socket(where))
    except pymysql.err.MySQLError as exc:
        raise _unreached(where, _number(exc), _said(exc)) from None
    except OSError:
        raise _unreached(where, 0, "") from None
    try:
        yield opened
    except pymysql.err.MySQLError as exc:
        raise failure(exc, f"MariaDB at {where.where}") from None
    finally:
        with contextlib.suppress(Exception):
            opened.close()


def _socket(where: Access) -> socket.socket:
    """The server's socket, which must be its user's own: whoever may write its folder while the server is down must not
    be sent the password, nor be believed.

    :raises TdeError: ``server_foreign``.
    """
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    opened.settimeout(CONNECT_SECONDS)
    try:
        opened.connect(where.socket)
        # pid, user and group of the process that listens (unix(7), SO_PEERCRED).
        uid = struct.unpack("3i", opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in (0, _uid(where.os_user)):
            raise TdeError(
                "server_foreign", f"belongs to a process of user id {uid}, not of {where.os_user}", obj=f"socket {where.socket}"
            )
    except BaseException:
        opened.close()
        raise
    opened.settimeout(None)
    return opened


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise TdeError("os_user_absent", "does not exist on this host", obj=f"user {name}") from None


def query(connection: pymysql.connections.Connection[t.Any], statement: str, values: t.Sequence[t.Any] = ()) -> Rows:
    """Rows of a statement."""
    with connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return t.cast(Rows, cursor.fetchall())


def quoted(name: str) -> str:
    """An identifier in a statement."""
    return "`" + name.replace("`", "``") + "`"


@dataclasses.dataclass(frozen=True)
class Space:
    """An InnoDB tablespace: one file.

    :param name: ``database/table`` as the file is named; :param key: number of its key; :param path: relative to the data directory.
    :param encrypted: whether every page is; one that is being encrypted is not.
    :param share: how much of it is, if it is being encrypted (0 to 1).
    """

    name: str
    path: str
    encrypted: bool
    key: int
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A base table.

    :param file: ``database/table`` as its files are named; :param size: bytes of data and indexes.
    """

    database: str
    name: str
    engine: str
    file: str
    size: int

    @property
    def words(self) -> str:
        return f"{self.database}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Server:
    """What a server says of itself.

    :param variables: global values; :param plugins: encryption plugins that are active, and how they are loaded.
    """

    version: str
    account: str
    data_directory: str
    variables: t.Mapping[str, str]
    plugins: t.Mapping[str, str]
    databases: tuple[str, ...]
    spaces: tuple[Space, ...]
    tables: tuple[Table, ...]
    replicas: int
    logs: tuple[str, ...]

    def spaces_of(self, table: Table) -> list[Space]:
        """A table's tablespaces: one, or one a partition. ``#`` of a name itself is written otherwise in a file's."""
        return [one for one in self.spaces if one.name == table.file or one.name.startswith(table.file + "#P#")]


_VARIABLES = (
    "SELECT LOWER(variable_name), COALESCE(global_value, '') FROM information_schema.system_variables"
    " WHERE variable_name LIKE '%encrypt%' OR (variable_name LIKE 'file_key_management%' AND"
    # It may be a password.
    " variable_name <> 'file_key_management_filekey') OR variable_name IN"
    " ('log_bin', 'log_bin_basename', 'wsrep_on', 'secure_file_priv', 'read_only', 'general_log', 'slow_query_log',"
    " 'innodb_checksum_algorithm', 'have_ssl', 'require_secure_transport', 'innodb_undo_tablespaces', 'relay_log_basename')"
)
_SPACES = (
    "SELECT s.NAME, s.FILENAME, e.ENCRYPTION_SCHEME, e.MIN_KEY_VERSION, e.CURRENT_KEY_ID, e.KEY_ROTATION_PAGE_NUMBER,"
    " e.KEY_ROTATION_MAX_PAGE_NUMBER FROM information_schema.INNODB_SYS_TABLESPACES s"
    " LEFT JOIN information_schema.INNODB_TABLESPACES_ENCRYPTION e ON e.SPACE = s.SPACE"
)
_TABLES = (
    "SELECT TABLE_SCHEMA, TABLE_NAME, ENGINE, COALESCE(DATA_LENGTH, 0) + COALESCE(INDEX_LENGTH, 0),"
    " CAST(CONVERT(CONCAT(TABLE_SCHEMA) USING filename) AS BINARY), CAST(CONVERT(CONCAT(TABLE_NAME) USING filename) AS BINARY)"
    " FROM information_schema.TABLES WHERE TABLE_TYPE IN ('BASE TABLE', 'SYSTEM VERSIONED') AND TABLE_SCHEMA NOT IN"
    " ('information_schema', 'performance_schema') AND ENGINE IS NOT NULL ORDER BY 1, 2"
)


def _space(row: t.Sequence[t.Any]) -> Space:
    name, path, scheme, version, key, done, total = row
    share = int(done or 0) / int(total) if total else None
    # MIN_KEY_VERSION is 0 until the last page is encrypted.
    return Space(_text(name), _text(path), bool(scheme) and int(version or 0) >= 1 and share is None, int(key or 0), share)


def _text(value: t.Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def inspect(connection: pymysql.connections.Connection[t.Any]) -> Server:
    """What the server says."""
    version, account, directory = query(connection, "SELECT VERSION(), CURRENT_USER(), @@datadir")[0]
    plugins = query(
        connection,
        "SELECT PLUGIN_NAME, LOAD_OPTION FROM information_schema.PLUGINS WHERE PLUGIN_TYPE = 'ENCRYPTION' AND PLUGIN_STATUS = 'ACTIVE'",
    )
    variables = {str(name): str(value) for name, value in query(connection, _VARIABLES)}
    # The temporary one is encrypted by a setting of its own, page by page, and made anew at each start.
    found = [_space(row) for row in query(connection, _SPACES + " WHERE s.NAME <> 'innodb_temporary'")]
    spaces = tuple(sorted(found, key=lambda one: one.name))
    tables = tuple(
        Table(_text(database), _text(name), str(engine), f"{_text(first)}/{_text(second)}", int(size))
        for database, name, engine, size, first, second in query(connection, _TABLES)
    )
    databases = query(connection, "SELECT SCHEMA_NAME FROM information_schema.SCHEMATA ORDER BY 1")
    replicas = query(connection, "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE COMMAND = 'Binlog Dump'")
    logs: tuple[str, ...] = ()
    if variables.get("log_bin") == "ON":
        folder = os.path.dirname(variables.get("log_bin_basename", ""))
        logs = tuple(os.path.join(folder, str(row[0])) for row in query(connection, "SHOW BINARY LOGS"))
    return Server(
        version=str(version),
        account=str(account),
        data_directory=os.path.normpath(str(directory)),
        variables=variables,
        plugins={str(name): str(option) for name, option in plugins},
        databases=tuple(_text(row[0]) for row in databases if _text(row[0]) not in SYSTEM_DATABASES),
        spaces=spaces,
        tables=tables,
        replicas=int(replicas[0][0]),
        logs=logs,
    )


def file_key(connection: pymysql.connections.Connection[t.Any]) -> str:
    """What opens the server's key file: a password, or ``FILE:`` and the path of one."""
    return str(query(connection, "SELECT @@file_key_management_filekey")[0][0])


def set_variable(connection: pymysql.connections.Connection[t.Any], name: str, value: str) -> None:
    """Set a global variable; :param name: one of ours."""
    query(connection, f"SET GLOBAL {quoted(name)} = %s", (int(value) if value.isdigit() else value,))


def rebuild(connection: pymysql.connections.Connection[t.Any], table: Table, key: int, lock_seconds: float) -> bool:
    """Build a table anew, encrypted under a key, while others read and write it. The binary log does not get it: each server has its own keys.

    :returns: whether others could write meanwhile; a table with a full-text index lets them only read.
    """
    import pymysql

    query(
        connection,
        "SET SESSION sql_log_bin = 0, system_versioning_alter_history = 'KEEP', lock_wait_timeout = %s",
        (max(1, int(lock_seconds)),),
    )
    statement = (
        f"ALTER TABLE {quoted(table.database)}.{quoted(table.name)} ENCRYPTED = YES, ENCRYPTION_KEY_ID = {int(key)}, FORCE, "
    )
    try:
        query(connection, statement + "ALGORITHM = INPLACE, LOCK = NONE")
        return True
    except pymysql.err.MySQLError as exc:
        if _number(exc) not in _NOT_ONLINE:
            raise failure(exc, f"table {table.words}") from None
    try:
        query(connection, statement + "LOCK = SHARED")
    except pymysql.err.MySQLError as exc:
        raise failure(exc, f"table {table.words}") from None
    return False


def is_under(connection: pymysql.connections.Connection[t.Any], table: Table, key: int) -> bool:
    """Whether a table's tablespaces are under a key by now: a killed task's statement goes on in the server."""
    rows = query(connection, _SPACES + " WHERE s.NAME = %s OR s.NAME LIKE %s", (table.file, _like(table.file) + "#P#%"))
    return bool(rows) and all(space.encrypted and space.key == key for space in map(_space, rows))


def _like(text: str) -> str:
    """A text in a pattern of LIKE."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def flush(connection: pymysql.connections.Connection[t.Any], tables: t.Sequence[Table]) -> list[str]:
    """Bring tables' pages to the disk; each is held still for as long as that takes, and left out if it is not had at once.

    :returns: the tables left out.
    """
    import pymysql

    left = []
    query(connection, "SET SESSION lock_wait_timeout = 1")
    for table in tables:
        try:
            query(connection, f"FLUSH TABLES {quoted(table.database)}.{quoted(table.name)} FOR EXPORT")
            query(connection, "UNLOCK TABLES")
        except (pymysql.err.OperationalError, pymysql.err.ProgrammingError):
            left.append(table.words)
    return left
