# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Connections to Oracle, its views as plain facts, and the statements. The only file of the engine that imports python-oracledb.

ADMINISTER KEY MANAGEMENT takes no bind variables, so a credential stands in the statement. Nothing of a driver's message is passed
on, for some messages quote the statement; the number of the error is.
"""

from __future__ import annotations

import contextlib
import re
import threading
import typing as t

from ...common.errors import TdeError
from ...common.secret import Secret
from ..base import Connection
from .facts import Container, Facts, MasterKey, Space, Wallet
from .options import Options, word

#: Seconds to wait for a connection.
CONNECT_SECONDS = 20.0
#: Seconds that one tablespace may take to be encrypted: a week.
ENCRYPT_SECONDS = 7 * 86400.0

Rows = t.Sequence[t.Sequence[t.Any]]

#: Numbers of the server's errors, and of the driver's (DPY), as ours (Oracle's Error Messages; python-oracledb, "Error Handling").
_CODES: dict[str, tuple[str, str]] = {
    "ORA-28353": ("keystore_not_opened", "the credential was not accepted, or the HSM did not answer"),
    "ORA-28354": ("keystore_not_opened", "it is open already"),
    "ORA-28365": ("keystore_closed", "the keystore is not open"),
    "ORA-46658": ("keystore_closed", "the keystore is not open in the container"),
    "ORA-28367": ("oracle_keystore_missing", "there is no keystore, or no PKCS#11 library"),
    "ORA-28374": ("oracle_master_key_unreachable", "the master key is not in the open keystore"),
    "ORA-28407": ("oracle_hsm_failed", "the HSM's library failed"),
    "ORA-28414": ("oracle_change_refused", "the keys are in the HSM"),
    "ORA-46718": ("invalid_option", "the seed has no keystore of its own"),
    "ORA-01017": ("server_refused", "user or password were not accepted"),
    "DPY-4001": ("server_refused", "neither user nor password were given, and only thick mode logs in by the operating system"),
    "ORA-01031": ("server_privilege_missing", "the user lacks a privilege"),
    "ORA-65011": ("database_absent", "there is no such PDB"),
    "ORA-00959": ("tablespace_absent", "there is no such tablespace"),
    "ORA-01109": ("oracle_containers_behind", "the PDB is not open"),
    "ORA-01033": ("server_starting", "is starting or stopping"),
    "DPY-4024": ("timeout", "gave no answer in the time allowed, as when packets to the HSM are lost"),
    "DPY-6001": ("server_down", "the listener does not know the service"),
    "DPY-6003": ("server_down", "the listener does not know the service"),
    "ORA-12514": ("server_down", "the listener does not know the service"),
    "DPI-1047": ("oracle_client_missing", "thick mode needs Oracle's client libraries, and they do not load"),
    "DPI-1072": ("oracle_client_missing", "thick mode needs newer client libraries of Oracle"),
}
_DOWN = re.compile(r"ORA-(03113|03114|12\d{3}|01034|01089|00028)|DPY-(4011|60\d\d)")
#: Nothing says where the database is: no such alias, no address, nothing that can be parsed, or the local one, which thin mode knows not.
_NOWHERE = re.compile(r"DPY-(2049|3001|4000|4017|4018|4026|4027)|ORA-12154")
#: Why there is no connection: the driver says DPY-6005 for every reason, and the reason's own number on the next line.
_REASON = re.compile(r"\n(DPY-\d{4}):")


def failure(exc: BaseException, obj: str) -> TdeError:
    """What server or driver answered, by its number alone."""
    reason = exc.args[0] if exc.args else None
    full = str(getattr(reason, "full_code", "") or "")
    if full == "DPY-6005" and (inner := _REASON.search(str(reason))):
        full = inner.group(1)
    then = _NEXT.get(full, "")
    if isinstance(exc, OSError):
        # A name that cannot be resolved; all other trouble of the network comes as the driver's own error.
        code, said = "server_down", "its host is not known"
    elif full in _CODES:
        code, said = _CODES[full]
    elif _DOWN.fullmatch(full):
        code, said = "server_down", "does not answer, or ended the session"
    elif _NOWHERE.fullmatch(full):
        code, said = "invalid_option", "nothing says where it is"
        then = "Give login_host, or in oracle.service a whole connect string."
    else:
        code, said = "server_failed", "the statement failed"
    return TdeError(
        code,
        f"{said} ({full or type(exc).__name__})",
        obj=obj,
        next_step=then,
        kept="What was done before it stays done.",
    )


_NEXT = {
    "ORA-28354": "Run again: it is looked at anew.",
    "ORA-01017": "Check login_user, login_password and oracle.privilege.",
    "ORA-01031": "Use oracle.privilege sysdba; syskm may neither set parameters nor open PDBs.",
    "DPY-4001": "Give login_user and login_password, or use oracle.thick as a user of the group that may.",
    "ORA-28353": "Check the credential (nshield_info tells what there is) and that an HSM answers; after a change of the credential, restart.",
    "DPY-4024": "Check the HSM and the way to it, then run again: it goes on where it stopped.",
    **dict.fromkeys(("DPY-6001", "DPY-6003", "ORA-12514"), "Start the database, or correct oracle.service."),
}


class Database:
    """A session in the root container, with others' containers as it goes.

    :param raw: python-oracledb's connection.
    """

    def __init__(self, raw: t.Any, options: Options, error: type[Exception]) -> None:
        self._raw, self._options, self._error = raw, options, error
        self._container = ""

    def run(self, statement: str, obj: str, *, seconds: float | None = None) -> Rows:
        """One statement. :param obj: in words, for errors.

        :raises TdeError: the server's answer by its number.
        """
        try:
            self._raw.call_timeout = int((seconds or self._options.call_timeout) * 1000)
            with self._raw.cursor() as cursor:
                cursor.execute(statement)
                return t.cast(Rows, cursor.fetchall()) if statement.startswith("SELECT") else []
        except self._error as exc:
            raise failure(exc, obj) from None

    def within(self, container: str) -> None:
        """Work in a container from now on."""
        if container != self._container:
            self.run(
                f"ALTER SESSION SET CONTAINER = {container if container == 'CDB$ROOT' else word('PDB', container)}", container
            )
            self._container = container

    def facts(self, *, ask: bool = True) -> Facts:
        """Everything. :param ask: query V$ENCRYPTION_WALLET even where that may open a keystore by auto-login.

        :raises TdeError: as :meth:`run`.
        """
        self.within("CDB$ROOT")

        def rows(columns: str, view: str, more: str = "") -> Rows:
            # Names of this file.
            return self.run(f"SELECT {columns} FROM {view}{more}", f"view {view}")  # noqa: S608

        named = " WHERE NAME IN ('wallet_root', 'tde_configuration')"
        running = {str(name): str(value or "") for name, value in rows("NAME, VALUE", "V$PARAMETER", named)}
        coming = {str(name): str(value) for name, value in rows("NAME, VALUE", "V$SPPARAMETER", named) if value}
        configuration = running.get("tde_configuration", "").rpartition("=")[2]
        # Auto-login takes a software keystore; where there is none, looking has no effect.
        ask = ask or configuration in ("", "HSM")
        # First what may open the keystore: the keys of closed ones are not shown.
        wallets = rows("CON_ID, STATUS, WALLET_TYPE, WALLET_ORDER, KEYSTORE_MODE", "V$ENCRYPTION_WALLET") if ask else []
        encrypted = {
            (con, number): (str(algorithm), str(status), int(blocks or 0))
            for con, number, algorithm, status, blocks in rows(
                "CON_ID, TS#, ENCRYPTIONALG, STATUS, BLOCKS_ENCRYPTED", "V$ENCRYPTED_TABLESPACES"
            )
        }
        return Facts(
            startup=_text(rows("STARTUP_TIME", "V$INSTANCE")[0][0]),
            wallet_root=running.get("wallet_root", ""),
            wallet_root_next=coming.get("wallet_root", ""),
            configuration=configuration,
            configuration_next=coming.get("tde_configuration", "").rpartition("=")[2],
            containers=tuple(
                Container(int(con), str(name), mode == "READ WRITE" or int(con) == 1)
                for con, name, mode in rows("CON_ID, NAME, OPEN_MODE", "V$CONTAINERS")
            ),
            wallets=tuple(Wallet(int(con), _text(s), _text(k), _text(o), _text(m)) for con, s, k, o, m in wallets),
            keys=tuple(
                MasterKey(int(con), str(key), _text(tag), _text(created), _text(used), _text(keystore))
                for con, key, tag, created, used, keystore in rows(
                    "CON_ID, KEY_ID, TAG, CREATION_TIME, ACTIVATION_TIME, KEYSTORE_TYPE", "V$ENCRYPTION_KEYS"
                )
            ),
            spaces=tuple(
                Space(int(con), str(name), *encrypted.get((con, number), ("", "", 0)))
                for con, number, name in rows("CON_ID, TS#, NAME", "V$TABLESPACE")
            ),
            columns=len(rows("CON_ID, COLUMN_NAME", "CDB_ENCRYPTED_COLUMNS")),
            clients=tuple(str(row[0]) for row in rows("CLIENT", "V$CLIENT_SECRETS")),
            asked=ask,
        )


def _text(value: t.Any) -> str:
    """A column as text; times in a form that sorts."""
    if value is None:
        return ""
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def where(connection: Connection, options: Options) -> str:
    """The database in words."""
    address = f"{connection.host}:{connection.port or 1521}/" if connection.host else ""
    return f"Oracle at {address}{options.service}"


@contextlib.contextmanager
def connect(connection: Connection, options: Options) -> t.Iterator[Database]:
    """A session in the root container.

    :raises TdeError: ``library_missing``, ``oracle_client_missing``, ``credential_missing``, ``invalid_option``, ``server_down``,
        ``server_refused``, ``timeout``.
    """
    try:
        import oracledb
    except ImportError:
        raise TdeError(
            "library_missing",
            "this Python has no oracledb",
            obj="the target's Python",
            next_step="Run the role hsm.tde.prerequisites; where it brings none (not x86_64, not aarch64), install python-oracledb 2 or newer for it.",
        ) from None
    obj = where(connection, options)
    if not options.thick and (connection.user is None or connection.password is None):
        raise TdeError(
            "credential_missing",
            "login_user and login_password were not given, and only thick mode logs in by the operating system",
            obj=obj,
            next_step="Give them. At boot nobody logs in: with oracle.auto_login the keystore opens by itself.",
        )
    modes = {"sysdba": oracledb.AUTH_MODE_SYSDBA, "syskm": oracledb.AUTH_MODE_SYSKMT, "none": oracledb.AUTH_MODE_DEFAULT}
    given: dict[str, t.Any] = {"mode": modes[options.privilege]}
    if connection.host:
        given["dsn"] = f"{connection.host}:{connection.port or 1521}/{options.service}"
    elif connection.user:
        given["dsn"] = options.service
    if connection.user:
        given.update(user=connection.user, password=connection.password.text() if connection.password else None)
    try:
        if options.thick:
            oracledb.init_oracle_client(lib_dir=options.client_directory)
        opened = _limited(lambda: oracledb.connect(tcp_connect_timeout=CONNECT_SECONDS, **given), options.call_timeout, obj)
    except (oracledb.Error, OSError) as exc:
        raise failure(exc, obj) from None
    try:
        yield Database(opened, options, oracledb.Error)
    finally:
        with contextlib.suppress(oracledb.Error):
            opened.close()


def _limited(act: t.Callable[[], t.Any], seconds: float, obj: str) -> t.Any:
    """A login within a time: the driver's own limit ends with the connection to the listener, and a server that takes it and is silent
    would be waited for without end.

    :raises TdeError: ``timeout``; what the act raises.
    """
    found: list[t.Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(act())
        except BaseException as exc:
            failed.append(exc)

    # The process does not wait for it at its end.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TdeError("timeout", f"took the connection and was silent for {seconds:g} seconds", obj=obj)
    return found[0]


# --- statements. A credential was judged before (hsm/credential.py): it holds no quote.


def by(secret: Secret | None) -> str:
    """IDENTIFIED BY a credential; None: the external store has it."""
    return "IDENTIFIED BY EXTERNAL STORE" if secret is None else f'IDENTIFIED BY "{secret.text()}"'


def administer(what: str) -> str:
    """ADMINISTER KEY MANAGEMENT …"""
    return f"ADMINISTER KEY MANAGEMENT {what}"
