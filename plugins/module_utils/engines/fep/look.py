# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is there: files, token and server as plain data. Reads only; a PIN that is read is compared and not kept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import os_error, read_private
from ...common.secret import Secret
from ...common.state import StateDirectory
from ...pkcs11.library import load
from ...pkcs11.refused import pin_fingerprint
from ...pkcs11.registry import Registry
from ...pkcs11.token import TokenAccess, TokenInfo, find
from .. import record as records
from ..base import Connection
from ..postgresql import look as postgres_look
from ..postgresql import server as servers
from ..postgresql import sql as postgres
from . import conf, sql
from .options import Options

#: The keystore's file, and the copy that opens by itself (Operation Guide, section 5.6.3).
KEYSTORE, AUTO_OPEN = "keystore.ks", "keystore.aks"
#: The journal's words.
SET, ROTATE, DECLARE, ENABLE = "set_master_key", "rotate_master_key", "declare_master_key", "enable_auto_open"

#: How the PIN in the include file compares with the one that is wished there.
ABSENT, RIGHT, OTHER = "absent", "right", "other"

Entries = t.Sequence[t.Mapping[str, t.Any]]


@dataclasses.dataclass(frozen=True)
class MasterKey:
    """What the journal knows of the master key in use.

    :param tag: of its rotation, "" of the first. :param since: UTC, ISO 8601.
    :param kms_name: and :param key_id: of a plugin's.
    """

    tag: str
    since: str
    kms_name: str = ""
    key_id: str = ""


@dataclasses.dataclass(frozen=True)
class Unsettled:
    """An act on the master key that began and of which the journal does not know the end: its task was killed.

    :param took: whether the keystore's file says that it was done; :param unseen: it does not show, so it says nothing.
    """

    action: str
    key: MasterKey
    took: bool
    unseen: bool = False


@dataclasses.dataclass(frozen=True)
class Location:
    """The keystore's folder.

    :param private: folder and files belong to the server's user, and nobody else reads them.
    :param digest: of keystore.ks, "" without one. :param files: the names of the keystore's files.
    """

    exists: bool = False
    private: bool = True
    files: tuple[str, ...] = ()
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Files:
    """The server's configuration on the disk.

    :param data: whether there is a database cluster. :param config: path of postgresql.conf; :param include: of our include file.
    :param included: it ends with our line. :param text: what it says, for the libraries that it loads.
    :param settings: our include file's, the PIN aside; None without one. :param pin: ABSENT, RIGHT or OTHER.
    :param private: our include file is the server's user's own, mode 0600.
    :param kms: lines of the connection file by name; None without one.
    """

    data: bool
    config: str
    include: str
    included: bool = False
    text: str = ""
    settings: t.Mapping[str, str] | None = None
    pin: str = ABSENT
    private: bool = True
    kms: t.Mapping[str, str] | None = None

    @property
    def kms_file(self) -> str:
        """Path of our connection file."""
        return os.path.join(os.path.dirname(self.config), conf.KMS_NAME)


@dataclasses.dataclass(frozen=True)
class Server:
    """The server on the data directory.

    :param process: None: no server runs on it. :param answer: and :param facts: what it says, None if it was not asked.
    """

    access: postgres.Access
    process: servers.Postmaster | None
    answer: postgres.Server | None = None
    facts: sql.Facts | None = None
    error: TdeError | None = None


@dataclasses.dataclass(frozen=True)
class State:
    """All that a plan is made from.

    :param slot_id: the token's slot, None without a token. :param plugin: what the plugin's link leads to, "" without one.
    :param auto_open_here: keystore.aks was made on this host. :param life: the life of the server in which the keystore was known to be open.
    :param adopted: the record knows a keystore that this host did not make.
    :param elsewhere: another folder with a keystore, with which the server works or will, "" if there is none.
    """

    cluster: str
    files: Files
    location: Location
    server: Server
    plugin: str = ""
    slot_id: int | None = None
    key: MasterKey | None = None
    auto_open_here: bool = False
    life: str = ""
    adopted: bool = False
    elsewhere: str = ""

    @property
    def remembered(self) -> bool:
        """Whether this host knows of a master key, shown or not."""
        return self.key is not None or self.adopted

    @property
    def made(self) -> bool:
        """Whether there is a master key, as far as this host can tell."""
        return KEYSTORE in self.location.files or bool(self.key and self.key.key_id)

    @property
    def standby(self) -> bool:
        return bool(self.server.answer and self.server.answer.standby)

    @property
    def known_open(self) -> bool:
        """Whether the keystore is known to be open: it was opened in this life of the server."""
        return bool(self.server.facts and self.life and self.life == self.server.facts.life)


def plugin(options: Options) -> str:
    """What the link in the plugin's folder leads to, "" if there is none.

    :raises TdeError: ``file_foreign``.
    """
    path = os.path.join(options.plugin_directory or "/nonexistent", conf.PLUGIN_NAME)
    if not os.path.lexists(path):
        return ""
    if not os.path.islink(path):
        raise TdeError("file_foreign", "is no link to the command", obj=path, next_step="Move it away, then run again.")
    return os.readlink(path)


def config_path(options: Options) -> str:
    """postgresql.conf, which lies in the data directory (initdb)."""
    return os.path.join(established(options.data_directory, "the data directory"), "postgresql.conf")


def _text(path: str, uid: int, forbidden: int = 0o022) -> str | None:
    """A configuration file's text; None if it does not exist."""
    try:
        return read_private(path, owners=[uid], forbidden_mode=forbidden).decode("utf-8", "surrogateescape")
    except TdeError as exc:
        if exc.code == "file_absent":
            return None
        raise


def files(options: Options, wished_pin: Secret | None) -> Files:
    """The configuration as it is.

    :param wished_pin: the one that the include file ought to hold, if any.
    :raises TdeError: ``file_not_private``, ``file_foreign`` where a file under our name is not ours, and what reading raises.
    """
    config = config_path(options)
    include = os.path.join(options.keystore_location or os.path.dirname(config), conf.NAME)
    uid = options.account().pw_uid
    data = os.path.dirname(config)
    try:
        there = os.path.lexists(os.path.join(data, "PG_VERSION"))
        names = set(os.listdir(data)) if os.path.isdir(data) else set()
    except OSError as exc:
        raise os_error(exc, data) from None
    if not there:
        if names - {"lost+found"}:
            raise TdeError(
                "data_directory_foreign", "is not empty and no database cluster", obj=data, next_step="Correct data_directory."
            )
        return Files(False, config, include)
    text = _text(config, uid, forbidden=0o022)
    if text is None:
        raise TdeError("file_absent", "does not exist", obj=config)
    found = Files(True, config, include, conf.includes(text, include), text)
    ours = _text(found.include, uid)
    kms = _text(found.kms_file, uid)
    for path, content in ((found.include, ours), (found.kms_file, kms)):
        if content is not None and not content.startswith(conf.MARK):
            raise TdeError(
                "file_foreign", "was not written by this collection", obj=path, next_step="Move it away, then run again."
            )
    if ours is not None:
        info = os.lstat(found.include)
        settings = conf.parse(ours)
        pin = settings.pop(conf.PIN.lower(), None)
        rest = ABSENT if pin is None else RIGHT if wished_pin and Secret(pin) == wished_pin else OTHER
        private = info.st_uid == uid and stat.S_IMODE(info.st_mode) == 0o600
        found = dataclasses.replace(found, settings=settings, pin=rest, private=private)
    return dataclasses.replace(found, kms=conf.kms_names(kms) if kms is not None else None)


def read_config(path: str, uid: int) -> str:
    """postgresql.conf.

    :raises TdeError: ``file_absent``, ``file_not_private``.
    """
    return established(_text(path, uid), path)


def location(options: Options) -> Location:
    """The keystore's folder as it is.

    :raises TdeError: ``place_not_directory`` and what looking raises.
    """
    path = options.keystore_location
    if path is None:
        return Location()
    uid = options.account().pw_uid
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return Location()
    except OSError as exc:
        raise os_error(exc, path) from None
    if not stat.S_ISDIR(info.st_mode):
        raise TdeError("place_not_directory", "is a symbolic link or not a directory", obj=f"keystore_location {path}")
    private = info.st_uid == uid and stat.S_IMODE(info.st_mode) == 0o700
    try:
        names = tuple(sorted(name for name in os.listdir(path) if name in (KEYSTORE, AUTO_OPEN)))
        for name in names:
            one = os.lstat(os.path.join(path, name))
            if not stat.S_ISREG(one.st_mode):
                raise TdeError("file_not_private", "is no regular file", obj=os.path.join(path, name))
            private = private and one.st_uid == uid and stat.S_IMODE(one.st_mode) == 0o600
    except OSError as exc:
        raise os_error(exc, path) from None
    return Location(True, private, names, digest(options))


def digest(options: Options) -> str:
    """SHA-256 of keystore.ks, "" without one: tells after a kill whether the master key was changed."""
    path = os.path.join(options.keystore_location or "/nonexistent", KEYSTORE)
    try:
        # Root follows nothing, and waits for nothing, that the server's user may put there.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as handle:
            return hashlib.sha256(handle.read(1 << 20)).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise os_error(exc, path) from None


def elsewhere(options: Options, files: Files, server: Server) -> str:
    """Another folder with a keystore, with which the server works, or will at its next start; "" if there is none."""
    settings = server.facts.settings if server.facts else conf.parse(files.text)
    path = settings.get("keystore_location", "")
    if not path or os.path.realpath(path) == os.path.realpath(options.keystore_location or "/nonexistent"):
        return ""
    return path if os.path.lexists(os.path.join(path, KEYSTORE)) else ""


def token(access: TokenAccess, state: StateDirectory) -> TokenInfo:
    """The token that is meant, found without a login."""
    return find(load(access.library), access.selector, Registry(state))


def server(options: Options, connection: Connection, recorded: t.Mapping[str, t.Any]) -> Server:
    """The server on the data directory: that one or none, whoever else answers at the default socket.

    :param recorded: the record's ``login``.
    """
    process = servers.postmaster(options.data_directory) if options.data_directory else None
    login = {name: value for name, value in recorded.items() if getattr(connection, name, None) in (None, "postgres")}
    access = sql.access(
        dataclasses.replace(connection, **login),
        options.os_user,
        socket=process.socket.split(",")[0] if process and process.socket else None,
        port=process.port if process and process.port else None,
    )
    if process is None and options.data_directory:
        error = TdeError("server_down", "does not run", obj=f"server on {options.data_directory}")
        return Server(access, None, error=error)
    try:
        with postgres.connect(access) as opened:
            answer = postgres.inspect(opened)
            # Before anything is believed of it, or sent to it: fleets have the same paths on every host.
            postgres_look.works_on(opened.info.backend_pid, answer, access, options.data_directory or "")
            facts = sql.inspect(opened) if answer.superuser else None
    except TdeError as exc:
        return Server(access, process, error=exc)
    return Server(access, process, answer, facts)


def master_key(entries: Entries, cluster: str, digest: str) -> tuple[MasterKey | None, Unsettled | None]:
    """What the journal knows of the master key.

    :param digest: of keystore.ks now; the journal has the one before each act.
    """
    current: MasterKey | None = None
    begun: tuple[str, MasterKey, str] | None = None
    for entry in entries:
        action, result = str(entry.get("action")), entry.get("result")
        if entry.get("cluster") != cluster or action not in (SET, ROTATE, DECLARE):
            continue
        detail = t.cast("t.Mapping[str, t.Any]", entry.get("detail") or {})
        key = MasterKey(
            str(detail.get("tag") or ""), str(entry["time"]), str(detail.get("kms_name") or ""), str(entry.get("key_id") or "")
        )
        current = key if result == "done" else current
        begun = (action, key, str(detail.get("before") or "")) if result == "begun" else None
    if begun is None:
        return current, None
    action, key, before = begun
    # Declaring the same key again does no harm, so it is done again; another rotation would make one key too many.
    took = action != DECLARE and bool(digest) and digest != before
    return key if took else current, Unsettled(action, key, took, unseen=bool(before) and not digest)


def tags(entries: Entries, cluster: str) -> set[str]:
    """The tags of all master keys that this host set for a cluster."""
    return {
        str((entry.get("detail") or {}).get("tag") or "")
        for entry in entries
        if entry.get("cluster") == cluster and entry.get("action") in (SET, ROTATE, DECLARE) and entry.get("result") == "done"
    }


def enabled_here(entries: Entries, cluster: str) -> bool:
    """Whether this host's journal knows that keystore.aks was made here: a copied one opens nothing."""
    return any(entry.get("cluster") == cluster and entry.get("action") == ENABLE for entry in entries)


def passphrase_known(memory: t.Mapping[str, t.Any], cluster: str, passphrase: Secret) -> bool | None:
    """Whether a passphrase is the keystore's, by the record's fingerprint; None if it has none."""
    kept = memory.get("passphrase")
    if not isinstance(kept, dict):
        return None
    return bool(kept.get("fingerprint") == pin_fingerprint(str(kept["salt"]), "keystore", cluster, "user", passphrase))


def memory(record: records.Record | None) -> dict[str, t.Any]:
    """What the record keeps beside the options: ``life``, ``passphrase``, ``login``, ``adopted``."""
    kept = record.options.get("memory") if record else None
    return dict(kept) if isinstance(kept, dict) else {}
