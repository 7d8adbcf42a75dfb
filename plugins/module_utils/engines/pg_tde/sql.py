# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the server says of pg_tde, and the extension's functions.

Sources: the extension's own scripts (pg_tde--1.0.sql, pg_tde--2.0--2.1.sql) and src/pg_tde_guc.c. The functions are not
transactional: each is called on its own, with its arguments by their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing as t

from ...common.errors import TdeError
from ..postgresql import sql as postgres

if t.TYPE_CHECKING:
    import psycopg

    from ..postgresql.sql import Access

#: The access method of encrypted tables.
TDE_HEAP = "tde_heap"
#: What a call may take that asks a provider over the network, in seconds.
CALL_SECONDS = 120
#: Whose key: of the database, of the server's write-ahead log, or of databases without one of their own.
OWN, SERVER, DEFAULT = "", "server_", "default_"

#: The fields of a provider's options, by the arguments of the functions that add and change it.
ARGUMENTS: dict[str, dict[str, str]] = {
    "file": {"file_path": "path"},
    "vault-v2": {
        "vault_url": "url",
        "vault_mount_path": "mountPath",
        "vault_token_path": "tokenPath",
        "vault_ca_path": "caPath",
        "vault_namespace": "namespace",
    },
    "kmip": {
        "kmip_host": "host",
        "kmip_port": "port",
        "kmip_cert_path": "certPath",
        "kmip_key_path": "keyPath",
        "kmip_ca_path": "caPath",
    },
}


@dataclasses.dataclass(frozen=True)
class Provider:
    """A key provider. :param options: without those that are empty, as text."""

    id: int
    name: str
    type: str
    options: t.Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class SetKey:
    """A key that is set.

    :param name: None: none is. :param problem: the server cannot have it; what it says then.
    """

    name: str | None = None
    provider: str | None = None
    provider_id: int | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or materialised view of users. :param kind: pg_class.relkind."""

    schema: str
    name: str
    kind: str
    encrypted: bool

    @property
    def label(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Database:
    """A database. :param schema: where the extension's functions are, None without it. :param large_objects: whether it holds some,
    which are in a system catalog and so never encrypted."""

    name: str
    schema: str | None = None
    key: SetKey = SetKey()
    providers: tuple[Provider, ...] = ()
    tables: tuple[Table, ...] = ()
    default_method: str = ""
    large_objects: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a server says of pg_tde.

    :param running: parameters of the extension and ``shared_preload_libraries``, as they are; :param configured: as its files say.
    :param providers: global ones. :param backups: what takes a base backup now, in words.
    """

    available: bool
    running: t.Mapping[str, str]
    configured: t.Mapping[str, str]
    databases: t.Mapping[str, Database]
    providers: tuple[Provider, ...] = ()
    server_key: SetKey = SetKey()
    default_key: SetKey = SetKey()
    backups: tuple[str, ...] = ()

    @property
    def with_extension(self) -> Database | None:
        """A database from which global providers and keys are reached."""
        return next((one for one in self.databases.values() if one.schema is not None), None)


@contextlib.contextmanager
def connect(access: Access, database: str | None = None, *, lock_seconds: float = postgres.LOCK_SECONDS) -> t.Iterator[t.Any]:
    """A connection whose statements the server does not log."""
    with postgres.connect(access, database, lock_seconds=lock_seconds) as connection:
        for name, value in (
            ("log_statement", "none"),
            ("log_min_duration_statement", "-1"),
            ("log_min_error_statement", "panic"),
            ("statement_timeout", f"{CALL_SECONDS}s"),
        ):
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        yield connection


def inspect(access: Access, extension: str, databases: t.Sequence[str]) -> Facts:
    """All of it. :param databases: those that take connections."""
    with connect(access) as connection:
        rows = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE name = 'shared_preload_libraries' OR starts_with(name, %s)",
            (f"{extension}.",),
        ).fetchall()
        files = connection.execute(
            "SELECT name, setting FROM pg_file_settings WHERE name = 'shared_preload_libraries' OR starts_with(name, %s)"
            " ORDER BY seqno",
            (f"{extension}.",),
        ).fetchall()
        available = connection.execute("SELECT count(*) FROM pg_available_extensions WHERE name = %s", (extension,)).fetchone()
        backups = _backups(connection)
    facts = Facts(bool(available and available[0]), dict(rows), dict(files), {}, backups=backups)
    loaded = extension in preloaded(facts.running)
    found: dict[str, Database] = {}
    for name in databases:
        with connect(access, name) as connection:
            database = _database(connection, name, extension, loaded)
            found[name] = database
            if database.schema is not None and loaded and not any(one.schema for one in list(found.values())[:-1]):
                facts = dataclasses.replace(
                    facts,
                    providers=_providers(connection, database.schema, extension, "global"),
                    server_key=_key(connection, database.schema, extension, SERVER),
                    default_key=_key(connection, database.schema, extension, DEFAULT),
                )
    return dataclasses.replace(facts, databases=found)


def preloaded(settings: t.Mapping[str, str]) -> list[str]:
    """The libraries that a server loads at its start."""
    return [one.strip().strip('"') for one in settings.get("shared_preload_libraries", "").split(",") if one.strip()]


def _backups(connection: psycopg.Connection[t.Any]) -> tuple[str, ...]:
    """Base backups that run, by any tool: the server's own view, and sessions whose last call began one."""
    found = [
        f"process {pid} ({phase})" for pid, phase in connection.execute("SELECT pid, phase FROM pg_stat_progress_basebackup")
    ]
    found += [
        f"session {pid} (pg_backup_start)"
        for (pid,) in connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query ~* 'pg_(backup_start|start_backup)' AND state <> 'disabled'"
        )
    ]
    return tuple(found)


def _database(connection: psycopg.Connection[t.Any], name: str, extension: str, loaded: bool) -> Database:
    row = connection.execute(
        "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = %s", (extension,)
    ).fetchone()
    tables = connection.execute(
        "SELECT n.nspname, c.relname, c.relkind::text, coalesce(a.amname = %s, false) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam"
        " WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
        " ORDER BY 1, 2",
        (TDE_HEAP,),
    ).fetchall()
    default = connection.execute(
        "SELECT coalesce((SELECT substring(c FROM '=(.*)') FROM pg_db_role_setting r, unnest(r.setconfig) c"
        " WHERE r.setrole = 0 AND r.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND starts_with(c, 'default_table_access_method=')), '')"
    ).fetchone()
    found = Database(
        name,
        row[0] if row else None,
        tables=tuple(Table(*one) for one in tables),
        default_method=default[0] if default else "",
        large_objects=connection.execute("SELECT FROM pg_largeobject_metadata LIMIT 1").fetchone() is not None,
    )
    if found.schema is None or not loaded:
        return found
    return dataclasses.replace(
        found,
        key=_key(connection, found.schema, extension, OWN),
        providers=_providers(connection, found.schema, extension, "database"),
    )


def _providers(connection: psycopg.Connection[t.Any], schema: str, extension: str, scope: str) -> tuple[Provider, ...]:
    from psycopg import sql as quoted

    function = quoted.Identifier(schema, f"{extension}_list_all_{scope}_key_providers")
    rows = connection.execute(quoted.SQL("SELECT id, name, type, options FROM {}()").format(function)).fetchall()
    return tuple(Provider(number, name, kind, plain(options)) for number, name, kind, options in rows)


def plain(options: t.Mapping[str, t.Any]) -> dict[str, str]:
    """A provider's options, without those that say nothing."""
    return {name: str(value) for name, value in options.items() if value not in (None, "")}


def _key(connection: psycopg.Connection[t.Any], schema: str, extension: str, whose: str) -> SetKey:
    """A key that is set; one row of NULL says that none is."""
    import psycopg
    from psycopg import sql as quoted

    function = quoted.Identifier(schema, f"{extension}_{whose}key_info")
    try:
        row = connection.execute(quoted.SQL("SELECT key_name, provider_name, provider_id FROM {}()").format(function)).fetchone()
    except psycopg.Error as exc:
        if exc.sqlstate is None or connection.closed:
            raise
        return SetKey(problem=exc.diag.message_primary or exc.sqlstate)
    return SetKey(*row) if row else SetKey()


def call(
    connection: psycopg.Connection[t.Any], database: Database, name: str, arguments: t.Mapping[str, t.Any], obj: str
) -> None:
    """Call one of the extension's functions.

    :param name: in full. :param arguments: by their names.
    :raises TdeError: ``provider_without_key``, and as ``postgres.failed``.
    """
    import psycopg
    from psycopg import sql as quoted

    items = quoted.SQL(", ").join(
        quoted.SQL("{} => {}").format(quoted.Identifier(one), quoted.Placeholder(one)) for one in arguments
    )
    statement = quoted.SQL("SELECT {}({})").format(quoted.Identifier(str(database.schema), name), items)
    try:
        connection.execute(statement, dict(arguments))
    except psycopg.Error as exc:
        if exc.sqlstate == "P0002":
            raise TdeError(
                "provider_without_key",
                exc.diag.message_primary or "does not have a key that is in use",
                obj=obj,
                kept="It is as it was before.",
                next_step="Bring the keys there first; or give the new place another provider_name, and keys are made there.",
            ) from None
        raise postgres.failed(exc, obj) from None


def alter_system(connection: psycopg.Connection[t.Any], name: str, values: t.Sequence[str]) -> None:
    """Write a parameter into the server's own file, and have it read."""
    from psycopg import sql as quoted

    listed = quoted.SQL(", ").join(quoted.Literal(value) for value in values)
    connection.execute(quoted.SQL("ALTER SYSTEM SET {} = {}").format(quoted.Identifier(*name.split(".")), listed))
    connection.execute("SELECT pg_reload_conf()")


def use_cipher(connection: psycopg.Connection[t.Any], extension: str, cipher: str) -> None:
    """What this session makes is under a cipher; versions that have no choice ignore it."""
    if connection.execute("SELECT FROM pg_settings WHERE name = %s", (f"{extension}.cipher",)).fetchone() is not None:
        connection.execute("SELECT set_config(%s, %s, false)", (f"{extension}.cipher", cipher))
