# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What Enterprise Postgres has beside PostgreSQL: functions, parameters and a view, asked and called.

Operation Guide, chapters 5 and 6, appendix B.2. The functions cannot run inside a transaction block, so the settings that
keep secrets out of the server's log are the session's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import typing as t

from ...common.errors import TdeError
from ...common.secret import Secret
from ..postgresql import sql

if t.TYPE_CHECKING:
    import psycopg

#: Seconds that an act on the keystore may take: an HSM is asked.
ACT_SECONDS = 120
#: Seconds until a server that was told to has read its files again.
_RELOAD_SECONDS = 15.0

#: The names under which manuals and the vendor's articles know each function, the manuals' first; and its arguments.
FUNCTIONS = {
    "set_master_key": (("pgx_set_master_key", "pgx_set_masterkey"), 1),
    "open_keystore": (("pgx_open_keystore",), 1),
    "set_passphrase": (("pgx_set_keystore_passphrase",), 2),
    # The extension tde_kms brings these; all their arguments but the first two of declare have defaults.
    "declare": (("pgx_declare_external_master_key",), 4),
    "open_kms": (("pgx_open_keystore",), 2),
}

#: What the running server says of its parameters. The value of tde_z.USER_PIN is never fetched.
_SETTINGS = (
    "config_file",
    "shared_preload_libraries",
    "keystore_location",
    "tablespace_encryption_algorithm",
    "tde_z.slot_id",
    "tde_kms.plugin_path",
    "tde_kms.kms_conninfo_file",
)

#: A statement, a slow one, and one that fails must not show a secret in the server's log; messages in a known language.
_QUIET = (
    "SET log_statement = 'none'",
    "SET log_min_duration_statement = -1",
    "SET log_min_duration_sample = -1",
    "SET log_min_error_statement = 'panic'",
    "SET log_parameter_max_length = 0",
    "SET log_parameter_max_length_on_error = 0",
    "SET debug_print_parse = off",
    "SET debug_print_rewritten = off",
    "SET debug_print_plan = off",
    "SET track_activities = off",
    "SET lc_messages = 'C'",
    # Libraries that many servers load, and which log values whatever the server's own parameters say (pgaudit's manual; auto_explain since 16).
    "SET pgaudit.log = 'none'",
    "SET pgaudit.log_parameter = off",
    "SET auto_explain.log_min_duration = -1",
)

#: undefined_object, what an older server answers to a parameter that it does not know, and to one that a library does not have.
_UNKNOWN_SETTING = ("42704", "22023", "42602")


@dataclasses.dataclass(frozen=True)
class Facts:
    """A running Enterprise Postgres.

    :param functions: the functions of FUNCTIONS that are there, by their key: schema and name.
    :param settings: the parameters of _SETTINGS that it knows.
    :param coming: the same as its files have them for the next start: every assignment with its file, the last one counts.
    :param pin_in_memory: whether tde_z.USER_PIN has a value.
    :param algorithms: the encrypted tablespaces' algorithms by name; None if the view could not be read.
    :param life: identifies this life of the server's memory: it changes at each start and each crash.
    :param kms_extension: whether the extension tde_kms is installed in the database of the connection.
    """

    functions: t.Mapping[str, tuple[str, str]]
    settings: t.Mapping[str, str]
    coming: t.Mapping[str, t.Sequence[tuple[str, str]]]
    pin_in_memory: bool
    algorithms: t.Mapping[str, str] | None
    life: str
    kms_extension: bool

    @property
    def enterprise(self) -> bool:
        """Whether it is Enterprise Postgres at all."""
        return "open_keystore" in self.functions


def inspect(connection: psycopg.Connection[t.Any]) -> Facts:
    """The facts, by a superuser."""

    def rows(query: t.LiteralString, *parameters: t.Any) -> list[tuple[t.Any, ...]]:
        return connection.execute(query, parameters).fetchall()

    settings = dict(rows("SELECT lower(name), setting FROM pg_settings WHERE lower(name) = ANY (%s)", list(_SETTINGS)))
    # The files as they are now, by the server's own reading of them.
    coming: dict[str, list[tuple[str, str]]] = {}
    for name, setting, file in rows(
        "SELECT lower(name), setting, sourcefile FROM pg_file_settings WHERE lower(name) = ANY (%s) ORDER BY seqno",
        list(_SETTINGS),
    ):
        coming.setdefault(name, []).append((setting or "", file or ""))
    pin = rows("SELECT setting <> '' FROM pg_settings WHERE lower(name) = 'tde_z.user_pin'")
    ((start, checkpointer),) = rows(
        "SELECT pg_postmaster_start_time()::text,"
        " coalesce((SELECT max(backend_start)::text FROM pg_stat_activity WHERE backend_type = 'checkpointer'), '')"
    )
    return Facts(
        functions=_functions(connection),
        settings=settings,
        coming=coming,
        pin_in_memory=bool(pin and pin[0][0]),
        algorithms=_algorithms(connection),
        # After a crash of a backend the postmaster goes on, with a new checkpointer and new shared memory.
        life=f"{start}/{checkpointer}",
        kms_extension=bool(rows("SELECT 1 FROM pg_extension WHERE extname = 'tde_kms'")),
    )


def _functions(connection: psycopg.Connection[t.Any]) -> dict[str, tuple[str, str]]:
    """The functions, of whom only superusers' count: anybody may make one of such a name, and would be sent the secret."""
    names = [name for names, dummy in FUNCTIONS.values() for name in names]
    rows = connection.execute(
        "SELECT n.nspname::text, p.proname::text, p.pronargs FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
        " JOIN pg_roles r ON r.oid = p.proowner WHERE r.rolsuper AND p.proname = ANY (%s) ORDER BY n.nspname <> 'pg_catalog'",
        (names,),
    ).fetchall()
    found: dict[str, tuple[str, str]] = {}
    for key, (wanted, arguments) in FUNCTIONS.items():
        there = [(schema, name) for name in wanted for schema, one, count in rows if one == name and count == arguments]
        if there:
            found[key] = there[0]
    return found


def _algorithms(connection: psycopg.Connection[t.Any]) -> dict[str, str] | None:
    """The tablespaces' algorithms from the view pgx_tablespaces, whose first column names a tablespace by oid or by name."""
    import psycopg

    try:
        kind = connection.execute(
            "SELECT a.atttypid::regtype::text FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
            " WHERE c.relname = 'pgx_tablespaces' AND a.attname = 'spctablespace' AND pg_table_is_visible(c.oid)"
        ).fetchone()
        if kind is None:
            return None
        found = connection.execute(
            "SELECT s.spcname::text, v.spcencalgo::text FROM pgx_tablespaces v JOIN pg_tablespace s ON s.oid = v.spctablespace"
            if kind[0] == "oid"
            else "SELECT v.spctablespace::text, v.spcencalgo::text FROM pgx_tablespaces v"
        ).fetchall()
    except psycopg.Error as exc:
        if exc.sqlstate is None or connection.closed:
            raise
        return None
    return {name: algorithm.upper() for name, algorithm in found if algorithm and algorithm.lower() != "none"}


@contextlib.contextmanager
def quiet(access: sql.Access) -> t.Iterator[psycopg.Connection[t.Any]]:
    """A session whose statements the server writes down nowhere.

    :raises TdeError: ``server_privilege_missing`` to anybody but a superuser, before a secret was sent.
    """
    import psycopg

    with sql.connect(access) as connection:
        for statement in _QUIET:
            try:
                connection.execute(statement)  # type: ignore[call-overload]
            except psycopg.Error as exc:
                # Added to PostgreSQL over the years; a server that does not know one does not do what it switches off.
                if exc.sqlstate not in _UNKNOWN_SETTING:
                    raise
        connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{ACT_SECONDS}s",))
        yield connection


class Refused(Exception):
    """The server refused an act on the keystore. :ivar said: its own words, without the secrets that were sent."""

    def __init__(self, said: str, sqlstate: str) -> None:
        super().__init__(said)
        self.said = said
        self.sqlstate = sqlstate


def call(access: sql.Access, function: tuple[str, str], *secrets: Secret, **named: str) -> None:
    """Call a function in a session of its own.

    :param function: schema and name. :param secrets: arguments by position; :param named: public arguments by name.
    :raises Refused: the server's answer; the statement's text is in neither.
    :raises TdeError: those of connecting.
    """
    import psycopg
    from psycopg import sql as quoted

    places: list[quoted.Composable] = [quoted.SQL("%s::text")] * len(secrets)
    places += [quoted.SQL("{} => %s::text").format(quoted.Identifier(name)) for name in named]
    statement = quoted.SQL("SELECT {}({})").format(quoted.Identifier(*function), quoted.SQL(", ").join(places))
    values = [*(secret.text() for secret in secrets), *named.values()]
    with quiet(access) as connection:
        try:
            # psycopg sends values apart from the statement: no text with them is there that a server could write down.
            connection.execute(statement, values)
        except psycopg.Error as exc:
            said = " ".join(part for part in (exc.diag.message_primary, exc.diag.message_detail) if part) or type(exc).__name__
            state = exc.sqlstate or ""
            if not state or state.startswith(("08", "57P")) or state == "42501":
                raise
            for secret in secrets:
                said = said.replace(secret.text(), "***")
            raise Refused(said, state) from None


def create_tablespace(connection: psycopg.Connection[t.Any], name: str, location: str, owner: str | None, algorithm: str) -> None:
    """CREATE TABLESPACE … WITH (tablespace_encryption_algorithm = …) at an empty directory that the server owns."""
    from psycopg import sql as quoted

    by = quoted.SQL(" OWNER {}").format(quoted.Identifier(owner)) if owner else quoted.SQL("")
    connection.execute(
        quoted.SQL("CREATE TABLESPACE {}{} LOCATION {} WITH (tablespace_encryption_algorithm = {})").format(
            quoted.Identifier(name), by, quoted.Literal(location), quoted.Literal(algorithm)
        )
    )


def set_algorithm(connection: psycopg.Connection[t.Any], name: str, algorithm: str) -> None:
    """ALTER TABLESPACE … SET (tablespace_encryption_algorithm = …); the server refuses it for one that holds anything."""
    from psycopg import sql as quoted

    connection.execute(
        quoted.SQL("ALTER TABLESPACE {} SET (tablespace_encryption_algorithm = {})").format(
            quoted.Identifier(name), quoted.Literal(algorithm)
        )
    )


def create_extension(access: sql.Access) -> None:
    """CREATE EXTENSION tde_kms in the database of the connection."""
    with sql.connect(access) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS tde_kms")


def reload(access: sql.Access) -> None:
    """Let the server read its files again, and wait until sessions to come see them.

    :raises TdeError: ``timeout``.
    """

    def loaded() -> t.Any:
        with sql.connect(access) as connection:
            row = connection.execute("SELECT pg_conf_load_time()").fetchone()
        return row[0] if row else None

    before = loaded()
    with sql.connect(access) as connection:
        connection.execute("SELECT pg_reload_conf()")
    deadline = time.monotonic() + _RELOAD_SECONDS
    while loaded() == before:
        if time.monotonic() > deadline:
            raise TdeError("timeout", "did not read its files again", obj=f"server at {access.where}")
        time.sleep(0.05)


def access(connection: t.Any, os_user: str, *, socket: str | None, port: int | None) -> sql.Access:
    """The server's address; its defaults are /tmp and 27500 (Installation and Setup Guide for Server)."""
    return sql.access(connection, os_user, socket=socket or "/tmp", port=port or 27500)  # noqa: S108 - the server's default


def not_enterprise(access: sql.Access, function: str = "pgx_open_keystore") -> TdeError:
    """The server has not the function."""
    return TdeError(
        "server_other_product",
        f"has no function {function} of a superuser's: it is not Fujitsu Enterprise Postgres, or an edition without encryption",
        obj=f"server at {access.where}",
        next_step="Name its socket and port, or choose the engine postgresql.",
    )
