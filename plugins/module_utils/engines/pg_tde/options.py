# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``pg_tde`` of a task, completed from the cluster's record."""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ...common.errors import TdeError
from ...common.state import NAME
from ..options import OfServer, absolute_path, with_recorded

FILE, VAULT, KMIP = "file", "vault-v2", "kmip"
GLOBAL, DATABASE = "global", "database"
#: The bits of a cipher's keys, by the names that tablespaces' algorithms have.
CIPHERS = {"aes_128": "AES128", "aes_256": "AES256"}


@dataclasses.dataclass(frozen=True)
class Options(OfServer):
    """What the engine works with.

    :param data_directory: None until it is given or a running server named it.
    :param databases: where the extension is to be, beside those that have it.
    :param enforce_encryption: None: left as it is.
    """

    extension: str
    data_directory: str | None
    os_user: str
    key_directory: str
    provider: str
    provider_name: str
    scope: str
    databases: tuple[str, ...]
    wal_encrypt: bool
    enforce_encryption: bool | None
    cipher: str
    vault_url: str | None
    vault_mount_path: str | None
    vault_token: str | None
    vault_ca: str | None
    vault_namespace: str | None
    #: For the functions that this engine shares with the engine postgresql.
    debian_cluster: str | None = None

    @property
    def given(self) -> dict[str, t.Any]:
        """What the record keeps."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "debian_cluster"}

    @property
    def key_file(self) -> str:
        return os.path.join(self.key_directory, "keys")


def complete(cluster: str, given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any], database: str) -> Options:
    """Options of a task; what it leaves out is taken from the record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    :param database: the database that the task connects to.
    :raises TdeError: ``invalid_option``.
    """
    kept = dict(recorded)
    if given.get("provider") not in (None, recorded.get("provider")):
        # Another provider has another name, unless the task gives it one.
        kept.pop("provider_name", None)
    merged = with_recorded(given, kept)
    provider = merged.get("provider") or FILE
    if provider == VAULT:
        missing = [name for name in ("vault_url", "vault_mount_path", "vault_token") if not merged.get(name)]
        if missing:
            raise TdeError("invalid_option", "is needed with provider vault-v2", obj=f"option {missing[0]}")
    name = merged.get("provider_name") or f"hsm-tde-{provider}"
    if not NAME.fullmatch(name):
        # Files that the server is given are named by it.
        raise TdeError("invalid_option", "must be 1 to 63 of A-Z a-z 0-9 _ . -", obj=f"provider_name {name!r}")
    databases = tuple(dict.fromkeys(merged.get("databases") or (database,)))
    for one in databases:
        if not NAME.fullmatch(one):
            # It becomes part of a key's name, which Vault has in a URL.
            raise TdeError("invalid_option", "must be 1 to 63 of A-Z a-z 0-9 _ . -", obj=f"database {one!r}")
    wal = merged.get("wal_encrypt")
    return Options(
        extension=merged.get("extension") or "pg_tde",
        data_directory=absolute_path("data_directory", merged.get("data_directory")),
        os_user=merged.get("os_user") or "postgres",
        key_directory=absolute_path("key_directory", merged.get("key_directory")) or f"/run/hsm-tde/{cluster}",
        provider=provider,
        provider_name=name,
        scope=merged.get("scope") or GLOBAL,
        databases=databases,
        wal_encrypt=True if wal is None else bool(wal),
        enforce_encryption=merged.get("enforce_encryption"),
        cipher=merged.get("cipher") or "aes_256",
        vault_url=(merged.get("vault_url") or "").rstrip("/") or None,
        vault_mount_path=(merged.get("vault_mount_path") or "").strip("/") or None,
        vault_token=absolute_path("vault_token", merged.get("vault_token")),
        vault_ca=absolute_path("vault_ca", merged.get("vault_ca")),
        vault_namespace=merged.get("vault_namespace"),
    )
