# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is there: places, storage and server as plain data. Reads only.

A key that is absent, a mount that is missing, a server that is down are states; what cannot be established is an error.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import typing as t

from ...common.errors import TdeError
from ...common.files import check_parents, os_error
from ...storage import fscrypt, image, image_acts
from .. import record as records
from ..base import Connection
from ..keyslots import Key
from . import server as servers
from . import sql
from .plan import CLUSTER_KEY, PlaceFacts

Entries = t.Sequence[t.Mapping[str, t.Any]]

#: The journal's word for a place that was made; its detail ``path`` says where.
MADE = "make_place"


def file_system(path: str) -> str:
    """The identifier of the file system that an existing path lies on, in hex.

    ext4 and f2fs derive it from what lies on the device, so it stays the same over reboots (statfs(2)).
    """
    try:
        return f"{os.statvfs(path).f_fsid:x}"
    except OSError as exc:
        raise os_error(exc, path) from None


def existing(path: str) -> str:
    """The path itself, or the nearest folder above it that exists."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def made_places(entries: Entries, cluster: str) -> dict[str, str]:
    """The places that the journal says were made: data key and path."""
    return {
        str(entry["key_id"]): str(entry["detail"].get("path", ""))
        for entry in entries
        if entry.get("action") == MADE and entry.get("cluster") == cluster and isinstance(entry.get("detail"), dict)
    }


def _parent(path: str) -> tuple[bool, str]:
    """Whether the parent folder is there, and what is wrong with it."""
    parent = os.path.dirname(path)
    try:
        check_parents(path)
        info = os.lstat(parent)
    except TdeError as exc:
        return exc.code != "file_absent", f"{exc.obj} {exc.message}" if exc.code != "file_absent" else ""
    # A sticky folder such as /tmp would let the server's user make the place anew while it is not mounted.
    if info.st_uid != 0 or info.st_mode & 0o022:
        return True, f"{parent} belongs to user id {info.st_uid} with mode {stat.S_IMODE(info.st_mode):04o}"
    return True, ""


def _overlaps(path: str, data_directory: str | None) -> bool:
    if not data_directory:
        return False
    one, other = os.path.realpath(path), os.path.realpath(data_directory)
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as exc:
        raise os_error(exc, path) from None


def place(
    key_id: str,
    path: str,
    key: Key | None,
    recorded: records.Place | None,
    *,
    journalled: str = "",
    data_directory: str | None = None,
    pending: bool = False,
) -> PlaceFacts:
    """A place as it is.

    :param recorded: the record's; :param journalled: the path that the journal gives, "" if none.
    :param data_directory: the server's, for a tablespace.
    :param pending: the storage above it is still to be made or mounted, so nothing can be seen there yet.
    :raises TdeError: ``permission_denied``, ``io_error`` and what else keeps a state from being established.
    """
    made = bool(recorded and recorded.made and recorded.path == path) or journalled == path
    facts = PlaceFacts(
        key_id,
        path,
        made=made,
        recorded=bool(recorded and recorded.made),
        overlaps=key_id != CLUSTER_KEY and _overlaps(path, data_directory),
        filled=bool(recorded and recorded.filled),
        begun=bool(recorded and recorded.begun and not recorded.filled),
    )
    if pending:
        return facts
    parent_exists, parent = _parent(path)
    nearest = existing(path)
    if os.path.islink(nearest) or not os.path.isdir(nearest):
        nearest = os.path.dirname(nearest)
    support = fscrypt.supported(nearest)
    facts = dataclasses.replace(
        facts,
        parent=parent,
        parent_exists=parent_exists,
        unsupported=support["reason"],
        kernel_key=_key_status(nearest, key, support),
    )
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return facts
    except OSError as exc:
        raise os_error(exc, path) from None
    directory = stat.S_ISDIR(info.st_mode)
    facts = dataclasses.replace(facts, exists=True, directory=directory, owner=info.st_uid, mode=stat.S_IMODE(info.st_mode))
    if not directory:
        return facts
    same = not (recorded and recorded.file_system) or file_system(path) == recorded.file_system
    policy = None if support["reason"] else fscrypt.policy(path)
    identifier = policy["identifier"] if policy else ""
    status = facts.kernel_key
    if identifier and (key is None or identifier != key.check_value):
        status = fscrypt.key_status(path, identifier)
    facts = dataclasses.replace(facts, same_file_system=same, policy=identifier, kernel_key=status)
    if not identifier or facts.open:
        names = _names(path)
        started = key_id == CLUSTER_KEY and "postmaster.opts" in names
        # Whoever began to create the cluster was stopped; a server that has started since says that it was good.
        begun = facts.begun and not started
        filled = facts.filled or (key_id == CLUSTER_KEY and "PG_VERSION" in names and not begun)
        facts = dataclasses.replace(facts, empty=not names, begun=begun, filled=filled)
    return facts


def _key_status(directory: str, key: Key | None, support: fscrypt.Support) -> str:
    if key is None or support["reason"]:
        return ""
    return fscrypt.key_status(directory, key.check_value)


@dataclasses.dataclass(frozen=True)
class Storage:
    """The storage above the places: wish, state and what is to be done about it."""

    wish: image.StorageWish
    state: image.StorageState

    @property
    def mounted(self) -> bool:
        """Whether the folder above the places is there: for an image, that it is the image which is mounted."""
        if self.wish.image is None:
            return self.state.directory is not None
        found = self.state.image
        return found is not None and any(mount.mount_point == self.wish.mount_point for mount in found.mounted)


def storage(wish: image.StorageWish) -> Storage:
    """The storage as it is."""
    return Storage(wish, image_acts.inspect(wish))


@dataclasses.dataclass(frozen=True)
class Server:
    """What can be told of the server.

    :param access: its address; :param data_directory: "" if nothing tells it.
    :param postmaster: its process, if it runs on this host.
    :param answer: its catalogs' facts, or :param error: why there are none.
    """

    access: sql.Access
    data_directory: str
    postmaster: servers.Postmaster | None
    answer: sql.Server | None
    error: TdeError | None

    @property
    def misplaced(self) -> bool:
        """Whether another server answers than the one whose files are looked at."""
        return self.error is not None and self.error.code in ("server_foreign", "server_not_local")


class Named(t.Protocol):
    """What tells which server is meant; engines that build on this one have options of their own."""

    @property
    def data_directory(self) -> str | None: ...

    @property
    def debian_cluster(self) -> str | None: ...

    @property
    def os_user(self) -> str: ...


def data_directory(options: Named) -> str:
    """The data directory, as far as options, record or Debian's tools tell it without the server."""
    if options.data_directory:
        return options.data_directory
    if options.debian_cluster:
        found = servers.debian_cluster(options.debian_cluster)
        if found:
            return found.data_directory
    return ""


def server(connection: Connection, options: Named, *, ask: bool = True) -> Server:
    """The server, asked if it answers.

    :param ask: connect to it; without, its processes are looked at only.
    """
    directory = data_directory(options)
    process = servers.postmaster(directory) if directory else None
    access = sql.access(
        connection,
        options.os_user,
        socket=process.socket.split(",")[0] if process and process.socket else None,
        port=process.port if process and process.port else None,
    )
    if not ask:
        return Server(access, directory, process, None, None)
    try:
        with sql.connect(access) as opened:
            answer = sql.inspect(opened)
            answer = dataclasses.replace(answer, data_directory=works_on(opened.info.backend_pid, answer, access, directory))
    except TdeError as exc:
        return Server(access, directory, process, None, exc)
    if not directory:
        directory = answer.data_directory
        process = servers.postmaster(directory)
    return Server(access, directory, process, answer, None)


def works_on(pid: int, answer: sql.Server, access: sql.Access, directory: str) -> str:
    """The data directory of the server that answers, told by the kernel: what is said of one server's files must never be
    read off another's.

    :param pid: of the process that serves the connection; :param directory: the one meant, "" if none is.
    :raises TdeError: ``server_not_local``, ``server_foreign``.
    """
    obj = f"PostgreSQL at {access.where}"
    found = servers.working_directory(pid)
    if found is None or (answer.data_directory and not _same(found, answer.data_directory)):
        said = f" works on {answer.data_directory}, which" if answer.data_directory else " has a data directory that"
        raise TdeError("server_not_local", f"{said.strip()} is not on this host", obj=obj)
    if directory and not _same(found, directory):
        raise TdeError("server_foreign", f"works on {found}, not on {directory}", obj=obj)
    return answer.data_directory or found


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
