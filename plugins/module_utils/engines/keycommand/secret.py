# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped secret of a cluster whose server asks a command for it: where it lies, and as what it is taken.

A secret in the user's own store is judged as every wrapped secret is. One in the data directory travels with it: a
base backup, a standby and a restore bring the file that they have, and a server that does not start on it is no safer.
So such a file is taken as it is found and the journal says so; that it is whole and under which keyslots is checked as ever.
"""

from __future__ import annotations

import os
import stat
import typing as t

from ...common.errors import TdeError
from ...common.state import StateDirectory
from ...keystore import recorded
from ...keystore.format import FORMAT, SECRET, Document, Identity
from ...keystore.keyfile import KeyFile
from ...keystore.sealed import ADOPT, Judged
from ...keystore.secretfile import SecretFile

#: What asks: EDB Postgres TDE, CYBERTEC PostgreSQL, ssl_passphrase_command of a stock PostgreSQL, or anything else.
EDB, CYBERTEC, SSL, PLAIN = "edb", "cybertec", "ssl_passphrase", "secret"
KINDS = (EDB, CYBERTEC, SSL, PLAIN)
#: Where EDB keeps the wrapped data key, below the data directory (EDB TDE manual, "Securing the data encryption key").
_EDB_FILE = os.path.join("pg_encryption", "key.bin")


def travels(kind: str) -> bool:
    """Whether the wrapped secret lies in the data directory, and comes and goes with it."""
    return kind == EDB


def secret_path(options: t.Mapping[str, t.Any], own: StateDirectory, cluster: str) -> str:
    """Where a cluster's wrapped secret lies.

    :param options: the engine's dictionary, complete. :param own: the state directory of the database's own user.
    """
    if travels(options["kind"]):
        return os.path.join(os.path.realpath(options["data_directory"]), _EDB_FILE)
    return os.path.join(own.store(cluster), "secret.json")


class CarriedFile(KeyFile):
    """A wrapped-key file in the data directory."""

    # A data directory may be readable for its group (initdb --allow-group-access); the file is of no use without the token.
    forbidden_mode = 0o037

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def decoded(self, path: str, raw: bytes) -> Document:
        if FORMAT.encode() not in raw:
            raise TdeError(
                "file_foreign",
                "was wrapped by another command, or not at all",
                obj=path,
                kept="It was not touched.",
                next_step="Pipe what the former unwrap command gives into hsm-tde wrap --cluster NAME FILE.new, as the server's user, "
                "see that hsm-tde unwrap gives the same, then rename it.",
            )
        return super().decoded(path, raw)

    def refuse(self, judged: Judged) -> None:
        """Take any generation: see the module."""

    def settle_locked(self, judged: Judged) -> None:
        if judged.verdict in (recorded.ROLLED_BACK, recorded.OTHER):
            self.record(ADOPT, recorded.DONE, judged.document)
        super().settle_locked(judged)

    def _attributes(self) -> tuple[int, int]:
        try:
            info = os.lstat(self.path)
        except FileNotFoundError:
            return super()._attributes()
        return stat.S_IMODE(info.st_mode), info.st_gid


class CarriedSecret(SecretFile):
    """A wrapped secret that travels with the data directory. :param cluster: bound into the file."""

    def __init__(self, own: StateDirectory, path: str, cluster: str) -> None:
        super().__init__(own, path, cluster)
        self.file = CarriedFile(own, self.path, Identity(SECRET, "", cluster), os.path.join(own.path, "secrets.lock"))


def secret_file(own: StateDirectory, path: str, cluster: str, *, carried: bool) -> SecretFile:
    """A cluster's wrapped secret. Making the object touches nothing."""
    return CarriedSecret(own, path, cluster) if carried else SecretFile(own, path, cluster)
