# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The acts that the engine's plans order, beside those on the store's keys."""

from __future__ import annotations

import os
import time
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import remove_leftovers_of
from ...common.journal import Journal
from ...common.plan import Handlers, Step
from .. import bootpin, memory
from .. import record as records
from ..base import Request
from ..keyring import Keyring
from ..postgresql import sql as postgres
from . import keyfile, sql
from .keyfile import DATA_KEY
from .options import Options
from .provider import KeyProvider
from .sql import DEFAULT, SERVER

#: Tries to have a table's lock, and the pause after the first, doubled after each.
_TRIES, _PAUSE_SECONDS = 6, 0.5
#: Seconds that building a table anew may take.
_REWRITE_SECONDS = 24 * 3600
#: SQLSTATEs: lock_not_available, deadlock_detected; undefined_table, undefined_object.
_BUSY, _GONE = ("55P03", "40P01"), ("42P01", "42704")
#: What keeps the journal from being written and no database closed at boot.
_NO_NOTE = ("disk_full", "busy")

_SET: dict[str, str] = {DEFAULT: "set_default_key_using_global_key_provider", SERVER: "set_server_key_using_global_key_provider"}
_KINDS = {"r": "TABLE", "m": "MATERIALIZED VIEW"}


class Acts:
    """Acts on one cluster. Each can be killed at any moment: the next plan goes on from what is there.

    :ivar access: the server's address; :ivar lock_seconds: how long one try waits for a table.
    :ivar progress: the tables that were built anew.
    """

    def __init__(self, request: Request, options: Options, keyring: Keyring, providers: t.Sequence[KeyProvider]) -> None:
        self.request = request
        self.options = options
        self.keyring = keyring
        self.providers = list(providers)
        self.provider = self.providers[0]
        self.sealed = keyfile.Sealed(request.state, request.cluster)
        self.journal = Journal(request.state.journal)
        self.access: postgres.Access | None = None
        self.lock_seconds = postgres.LOCK_SECONDS
        self.progress: list[dict[str, t.Any]] = []

    def handlers(self) -> Handlers:
        """One act a step."""
        return {
            "write_record": self._write_record,
            "write_pin_source": self._write_pin_source,
            "mount_key_directory": lambda step: memory.mount(self.options.key_directory, self.options.os_user),
            "write_key_file": lambda step: self._write_key_file(),
            "give_files": lambda step: self._give_files(),
            "seal_keys": lambda step: self._seal(),
            "close_key_directory": lambda step: self._close(),
            "alter_system": self._alter_system,
            "create_extension": self._create_extension,
            "add_provider": lambda step: self._provider("add", step),
            "change_provider": lambda step: self._provider("change", step),
            "create_key": self._create_key,
            "set_key": self._set_key,
            "encrypt_table": self._encrypt_table,
            "set_default_method": self._set_default_method,
        }

    def _write_record(self, step: Step) -> None:
        path = self.request.state.cluster_record(self.request.cluster)
        records.write(self.request.state, records.parse(step.data["record"], path))

    def _write_pin_source(self, step: Step) -> None:
        bootpin.write_pin(step.data["path"], established(bootpin.boot_pin(self.keyring), "the PIN for the boot"))

    # --- in memory and on the disk

    def _write_key_file(self) -> None:
        """Never over another: the server adds keys to it."""
        if self.provider.key_file() is not None:
            return
        head = self.sealed.head()
        content = self.sealed.content(self.keyring.data_key(DATA_KEY).reveal()) if head else b""
        account = self.options.account()
        memory.give(self.options.key_file, content, uid=account.pw_uid, gid=account.pw_gid, mode=0o600)
        self._note("give_keys", self.options.key_file, names=list(head.names) if head else [])

    def _give_files(self) -> None:
        account = self.options.account()
        for name, content in [item for one in self.providers for item in one.given().items()]:
            path = os.path.join(self.options.key_directory, name)
            memory.give(path, content, uid=0, gid=account.pw_gid, mode=0o440)

    def _seal(self) -> None:
        content = self.provider.key_file()
        if content is None:
            raise TdeError("place_closed", "is not there", obj=self.options.key_file, next_step="Open the keystore first.")
        remove_leftovers_of(self.sealed.path)
        key = self.keyring.data_key(DATA_KEY).reveal()
        # By the keys themselves: the server's user can write the file, and one made anew may have the former one's name.
        if self.sealed.head() and not keyfile.keys(self.sealed.content(key)) <= keyfile.keys(content):
            raise TdeError(
                "keystore_foreign",
                "lacks keys that are sealed on the disk, or has others under their names",
                obj=self.options.key_file,
                kept="The sealed keys stay as they are.",
                next_step="Find out who changed it; then close and open the keystore.",
            )
        self.sealed.write(content, key)

    def _close(self) -> None:
        memory.unmount(self.options.key_directory)
        self._note("take_keys", f"keys in {self.options.key_directory}")

    def _note(self, action: str, obj: str, **facts: t.Any) -> None:
        try:
            self.journal.append(action, obj, cluster=self.request.cluster, **facts)
        except TdeError as exc:
            if exc.code not in _NO_NOTE:
                raise
            self.keyring.warnings.append(f"{obj}: done, and the journal does not say so: {exc}")

    # --- the server

    def _server(self) -> postgres.Access:
        return established(self.access, "the server's address")

    def _database(self, connection: t.Any, name: str) -> sql.Database:
        """The database as its functions are called; read anew, for the steps before may have made the extension."""
        row = connection.execute(
            "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = %s",
            (self.options.extension,),
        ).fetchone()
        return sql.Database(name, established(row, f"extension {self.options.extension} in database {name}")[0])

    def _call(self, step: Step, function: str, arguments: t.Mapping[str, t.Any], *, cipher: bool = False) -> None:
        name = step.data["database"]
        with sql.connect(self._server(), name) as connection:
            if cipher:
                sql.use_cipher(connection, self.options.extension, self.options.cipher)
            database = self._database(connection, name)
            sql.call(connection, database, f"{self.options.extension}_{function}", arguments, step.obj)

    def _alter_system(self, step: Step) -> None:
        with sql.connect(self._server()) as connection:
            sql.alter_system(connection, step.data["name"], step.data["values"])
        self.journal.append("alter_system", step.obj, cluster=self.request.cluster, values=step.data["values"])

    def _create_extension(self, step: Step) -> None:
        from psycopg import sql as quoted

        with sql.connect(self._server(), step.data["database"]) as connection:
            connection.execute(
                quoted.SQL("CREATE EXTENSION IF NOT EXISTS {} SCHEMA public").format(quoted.Identifier(self.options.extension))
            )

    def _provider(self, verb: str, step: Step) -> None:
        kind, scope = self.options.provider, step.data["scope"]
        fields = step.data["options"]
        # A CA path is an argument of the function even where there is none.
        arguments: dict[str, t.Any] = {
            one: fields.get(field, "") for one, field in sql.ARGUMENTS[kind].items() if field in fields or field != "namespace"
        }
        if "kmip_port" in arguments:
            arguments["kmip_port"] = int(arguments["kmip_port"])
        arguments = {"provider_name": self.options.provider_name, **arguments}
        self._call(step, f"{verb}_{scope}_key_provider_{kind.replace('-', '_')}", arguments)
        self._note(f"{verb}_key_provider", step.obj, type=kind, options=dict(fields))

    def _create_key(self, step: Step) -> None:
        name, scope = step.data["name"], step.data["scope"]
        arguments = {"key_name": name, "provider_name": self.options.provider_name}
        with self.provider.making(name) as absent:
            if absent:
                self._note("create_key", step.obj, result="begun", key=name)
                self._call(step, f"create_key_using_{scope}_key_provider", arguments, cipher=True)
        self._note("create_key", step.obj, key=name)

    def _set_key(self, step: Step) -> None:
        """Set a key that is at its provider and on the disk, and have the server verify it."""
        data = step.data
        whose, name = data["whose"], data["name"]
        self._safe(name)
        function = _SET.get(whose, f"set_key_using_{data['scope']}_key_provider")
        self._note("set_key", step.obj, result="begun", key=name)
        self._call(step, function, {"key_name": name, "provider_name": self.options.provider_name})
        self._call(step, f"verify_{whose}key", {})
        self._note("set_key", step.obj, key=name, provider=self.options.provider_name)

    def _safe(self, name: str) -> None:
        """Refuse to set a key that a reboot would lose.

        :raises TdeError: ``keystore_foreign``, ``provider_without_key``.
        """
        if self.options.provider == "file":
            self.sealed.confirm()
            head = self.sealed.head()
            if head is None or name.lower() not in (one.lower() for one in head.names):
                raise TdeError(
                    "keystore_foreign",
                    "is not sealed on the disk",
                    obj=f"key {name}",
                    kept="It was not set.",
                    next_step="Run again.",
                )
        elif not self.provider.has(name):
            raise TdeError(
                "provider_without_key",
                "is not there",
                obj=f"key {name} at provider {self.options.provider_name}",
                next_step="Run again.",
            )

    # --- tables

    def _set_default_method(self, step: Step) -> None:
        from psycopg import sql as quoted

        name = step.data["database"]
        with sql.connect(self._server(), name) as connection:
            connection.execute(
                quoted.SQL("ALTER DATABASE {} SET default_table_access_method = {}").format(
                    quoted.Identifier(name), quoted.Literal(sql.TDE_HEAP)
                )
            )

    def _encrypt_table(self, step: Step) -> None:
        """Build a table anew under the access method, with a bounded number of tries for its lock."""
        import psycopg
        from psycopg import sql as quoted

        data = step.data
        statement = quoted.SQL("ALTER {} {} SET ACCESS METHOD {}").format(
            quoted.SQL(_KINDS[data["kind"]]), postgres.qualified(data["schema"], data["table"]), quoted.Identifier(sql.TDE_HEAP)
        )
        began, pause = time.monotonic(), _PAUSE_SECONDS
        for attempt in range(1, _TRIES + 1):
            try:
                with sql.connect(self._server(), data["database"], lock_seconds=self.lock_seconds) as connection:
                    sql.use_cipher(connection, self.options.extension, self.options.cipher)
                    connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{_REWRITE_SECONDS}s",))
                    try:
                        connection.execute(statement)
                    except psycopg.Error as exc:
                        if exc.sqlstate in _GONE:
                            # Dropped or renamed meanwhile.
                            return
                        if exc.sqlstate in _BUSY and attempt < _TRIES:
                            time.sleep(pause)
                            pause *= 2
                            continue
                        if exc.sqlstate in _BUSY:
                            raise TdeError(
                                "move_blocked",
                                f"stayed locked by others through {_TRIES} tries of {self.lock_seconds:g} seconds",
                                obj=step.obj,
                                kept=f"{len(self.progress)} tables were converted and stay so.",
                                next_step="Run again when the long transactions have ended, or with a longer lock_timeout.",
                            ) from None
                        raise
                    name = f"{data['schema']}.{data['table']}"
                    row = connection.execute(
                        "SELECT pg_table_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                        " WHERE n.nspname = %s AND c.relname = %s",
                        (data["schema"], data["table"]),
                    ).fetchone()
            except TdeError as exc:
                if exc.code == "move_blocked" or attempt == _TRIES or exc.code != "lock_timeout":
                    raise
                continue
            self.progress.append(
                {
                    "database": data["database"],
                    "object": name,
                    "kind": _KINDS[data["kind"]].lower(),
                    "from": "heap",
                    "to": sql.TDE_HEAP,
                    "bytes": row[0] if row and row[0] else 0,
                    "seconds": round(time.monotonic() - began, 3),
                    "attempts": attempt,
                }
            )
            return
