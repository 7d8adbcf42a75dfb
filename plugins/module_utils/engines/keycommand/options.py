# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``keycommand`` of a task, completed from the cluster's record, and the lines that a server is given."""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ...common.errors import TdeError
from ..options import OfServer, absolute_path, with_recorded
from .secret import CYBERTEC, EDB, KINDS, SSL, travels

#: Characters that mean nothing to a shell or to PostgreSQL's quoting; the command stands in both.
_PLAIN = re.compile(r"/[A-Za-z0-9_.+/-]*")
#: Characters of a secret that is made by chance: 32 of 62 are 190 bits.
GENERATED = 32
_DEFAULTS = {"os_user": "postgres", "command": "/usr/local/sbin/hsm-tde", "key_bits": 256, "adopt_master_key": False}


@dataclasses.dataclass(frozen=True)
class Options(OfServer):
    """What the engine works with; ``given`` is what the record keeps.

    :param key_bits: of a key made for CYBERTEC's server.
    :param adopt_master_key: take a key of the wished label that the token has as the cluster's: another node made it.
    """

    kind: str
    os_user: str
    data_directory: str | None
    command: str
    key_bits: int
    adopt_master_key: bool

    @property
    def given(self) -> dict[str, t.Any]:
        """The options as plain data."""
        return dataclasses.asdict(self)

    def lines(self, cluster: str) -> tuple[dict[str, str], list[str]]:
        """What is to be configured.

        :returns: the server's parameters, and the arguments of its initdb.
        """
        wrap, unwrap = f"{self.command} wrap --cluster {cluster} %p", f"{self.command} unwrap --cluster {cluster}"
        if self.kind == EDB:
            return (
                {"data_encryption_key_unwrap_command": f"{unwrap} %p"},
                [f"--data-encryption={self.key_bits}", f"--key-wrap-command={wrap}", f"--key-unwrap-command={unwrap} %p"],
            )
        if self.kind == CYBERTEC:
            return {"encryption_key_command": unwrap}, ["-K", unwrap]
        if self.kind == SSL:
            # Without the second one a reload cannot read a key that needs a passphrase (PostgreSQL manual, 20.3.3).
            return {"ssl_passphrase_command": unwrap, "ssl_passphrase_command_supports_reload": "on"}, []
        return {"command": unwrap}, []


def complete(given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any]) -> Options:
    """Options of a task; what it leaves out is taken from the record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    :raises TdeError: ``invalid_option``.
    """
    merged = with_recorded(given, {**_DEFAULTS, **recorded})
    kind = merged.get("kind")
    if kind not in KINDS:
        raise TdeError(
            "invalid_option", "is missing", obj="option kind", next_step=f"Say what asks for the secret: {', '.join(KINDS)}."
        )
    if recorded and recorded.get("kind") != kind:
        raise TdeError(
            "invalid_option",
            f"was {recorded.get('kind')} when the keystore was made",
            obj=f"option kind: {kind}",
            next_step="Take another cluster name for another secret.",
        )
    directory = merged.get("data_directory")
    if travels(kind) and directory is None:
        raise TdeError("invalid_option", "is missing", obj="option data_directory", next_step="The wrapped key lies in it.")
    command = absolute_path("command", merged["command"]) or ""
    if not _PLAIN.fullmatch(command):
        raise TdeError("invalid_option", "must be a path of A-Z a-z 0-9 _ . + - and /", obj=f"command {command!r}")
    return Options(
        kind=kind,
        os_user=merged["os_user"],
        data_directory=absolute_path("data_directory", directory),
        command=command,
        key_bits=merged["key_bits"],
        adopt_master_key=bool(merged["adopt_master_key"]),
    )
