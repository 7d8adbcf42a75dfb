# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is there: folder in memory, sealed keys, server process and its answers as plain data. Reads only."""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ...common.errors import TdeError
from ...common.files import read_private
from ...keystore.format import check_value
from .. import memory
from ..base import Connection
from ..postgresql import look as postgres_look
from . import keyfile, sql
from .options import FILE, Options
from .provider import KeyProvider


@dataclasses.dataclass(frozen=True)
class State:
    """A server and what it is given.

    :param server: its process and catalogs; :param facts: what it says of pg_tde, or :param error: why it says nothing.
    :param mounted: the folder is one in memory; :param content: its key file, None if there is none.
    :param missing: files that the server is to be given and has not, or has otherwise.
    :param sealed: what the sealed file says, None if there is none.
    """

    server: postgres_look.Server
    facts: sql.Facts | None
    error: TdeError | None
    mounted: bool
    content: bytes | None
    missing: tuple[str, ...]
    sealed: keyfile.Head | None

    @property
    def running(self) -> bool:
        """Whether its process was seen."""
        return self.server.postmaster is not None or self.server.answer is not None

    @property
    def unsealed(self) -> bool:
        """Whether the key file in memory has what is on no disk."""
        return self.content is not None and (self.sealed.check if self.sealed else "") != check_value(self.content)


def look(
    connection: Connection, options: Options, providers: t.Sequence[KeyProvider], sealed: keyfile.Sealed, *, ask: bool = True
) -> State:
    """All of it.

    :param providers: whose keys are in use, or are to be.
    :param ask: connect to the server; without, its process is looked at only.
    :raises TdeError: what keeps a state of files and mounts from being established.
    """
    server = postgres_look.server(connection, options, ask=ask)
    facts, error = None, server.error
    if server.answer is not None:
        try:
            names = [one.name for one in server.answer.databases if one.connects and not one.template]
            facts = sql.inspect(server.access, options.extension, names)
        except TdeError as exc:
            error = exc
    mounted = memory.mounted(options.key_directory)
    file = any(one.options.provider == FILE for one in providers)
    content = providers[0].key_file() if mounted and file else None
    missing = []
    for name, wished in [item for one in providers for item in one.given().items()]:
        path = os.path.join(options.key_directory, name)
        if not mounted or not os.path.lexists(path) or read_private(path, forbidden_mode=0o027) != wished:
            missing.append(name)
    if file and content is None:
        missing.append(os.path.basename(options.key_file))
    return State(server, facts, error, mounted, content, tuple(missing), sealed.head())
