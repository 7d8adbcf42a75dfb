# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``mariadb`` of a task, completed from the cluster's record."""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ...common.errors import TdeError
from ..options import OfServer, absolute_path, with_recorded

#: Where distributions read include files of the server from: Debian and Ubuntu; RedHat and SUSE.
INCLUDES = ("/etc/mysql/mariadb.conf.d", "/etc/my.cnf.d")
#: What becomes of the key file of a server that is encrypted already.
REFUSE, TAKE, REMOVE = "refuse", "take", "remove"


@dataclasses.dataclass(frozen=True)
class Former:
    """The key file that a server was encrypted with before ours.

    :param algorithm: of the server's pages, which stays: the server would take them for corrupted.
    :param check: tells its content, as it was taken, from another; :param keys: the data keys that were taken from it.
    """

    path: str
    algorithm: str
    check: str
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Options(OfServer):
    """What the engine works with.

    :param data_directory: None until it is given or a running server named it.
    :param socket: of the last task, so that the next boot can ask the server.
    """

    data_directory: str | None
    key_directory: str
    include_directory: str
    os_user: str
    refuse_plain_tables: bool
    encryption_threads: int
    reencrypt: bool
    socket: str | None
    user: str | None
    former_key_file: str = REFUSE
    former: Former | None = None

    @property
    def given(self) -> dict[str, t.Any]:
        """What the record keeps."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("reencrypt", "former_key_file")}
        if self.former is None:
            del found["former"]
        else:
            found["former"]["keys"] = list(self.former.keys)
        return found

    @property
    def algorithm(self) -> str:
        """The cipher of the server's pages."""
        return self.former.algorithm if self.former else "AES_CTR"

    @property
    def key_file(self) -> str:
        return os.path.join(self.key_directory, "keys")


def _path(name: str, value: t.Any) -> str | None:
    """A path that can stand in the server's files."""
    if value is not None and any(char in value for char in "\n\r#\"'\\ "):
        raise TdeError("invalid_option", "must be an absolute path without blanks, quotes and #", obj=f"{name} {value!r}")
    return absolute_path(name, value)


def complete(
    cluster: str, given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any], *, socket: str | None, user: str | None
) -> Options:
    """Options of a task; what it leaves out is taken from the record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    :param socket: the task's ``login_unix_socket``; :param user: its ``login_user``.
    :raises TdeError: ``invalid_option``.
    """
    merged = with_recorded(given, recorded)
    threads = merged.get("encryption_threads")
    threads = 4 if threads is None else threads
    if not 1 <= threads <= 255:
        raise TdeError(
            "invalid_option", "must be 1 to 255: without a thread nothing is encrypted that is there", obj="encryption_threads"
        )
    include = merged.get("include_directory") or next((path for path in INCLUDES if os.path.isdir(path)), INCLUDES[0])
    return Options(
        data_directory=_path("data_directory", merged.get("data_directory")),
        key_directory=_path("key_directory", merged.get("key_directory")) or f"/run/hsm-tde/{cluster}",
        include_directory=_path("include_directory", include) or INCLUDES[0],
        os_user=merged.get("os_user") or "mysql",
        refuse_plain_tables=merged.get("refuse_plain_tables") is not False,
        encryption_threads=threads,
        reencrypt=bool(given.get("reencrypt")),
        socket=socket or recorded.get("socket"),
        user=user or recorded.get("user"),
        former_key_file=given.get("former_key_file") or REFUSE,
        former=_former(recorded.get("former")),
    )


def _former(recorded: t.Mapping[str, t.Any] | None) -> Former | None:
    if not recorded:
        return None
    return Former(recorded["path"], recorded["algorithm"], recorded["check"], tuple(recorded["keys"]))
