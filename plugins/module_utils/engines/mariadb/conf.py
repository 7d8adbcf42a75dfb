# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The include file that makes the server encrypt: pure functions from wishes to its text, and from variables to differences.

Sources: MariaDB's manual, "Data-at-Rest Encryption" (options) and "Configuring MariaDB with Option Files" (groups).
"""

from __future__ import annotations

import typing as t

#: Its first line; a file without it is not ours.
MARK = "# Written by hsm.tde for the cluster "
#: Read after the distribution's own files: an option's last value counts.
NAME = "zz-hsm-tde.cnf"
PLUGIN = "file_key_management"

#: Read at the server's start only.
_AT_START = {
    "innodb_encrypt_log": "ON",
    "encrypt_binlog": "ON",
    "encrypt_tmp_files": "ON",
    "innodb_encrypt_temporary_tables": "ON",
}


class Wish(t.NamedTuple):
    """What the server is to do.

    :param tables: ``on`` or ``force``; :param threads: that encrypt in the background; :param default: key of new tables.
    :param algorithm: of pages; :param former: it was encrypted with another key file before.
    """

    key_file: str
    tables: str
    threads: int
    default: int
    algorithm: str = "AES_CTR"
    former: bool = False

    @property
    def at_start(self) -> dict[str, str]:
        """Variables that need a restart."""
        return {
            **_AT_START,
            "file_key_management_encryption_algorithm": self.algorithm,
            "file_key_management_filename": self.key_file,
        }

    @property
    def dynamic(self) -> dict[str, str]:
        """Variables that can be set while the server runs."""
        return {
            "innodb_default_encryption_key_id": str(self.default),
            "innodb_encrypt_tables": self.tables.upper(),
            "innodb_encryption_threads": str(self.threads),
            "aria_encrypt_tables": "ON",
            "encrypt_tmp_disk_tables": "ON",
        }


def render(cluster: str, wish: Wish) -> bytes:
    """The include file's content."""
    lines = [
        f"{MARK}{cluster}: the next run takes changes back.",
        "[mariadb]",
        f"plugin_load_add = {PLUGIN}",
        "# A missing or wrong key stops the start; without this the server would run and call its tables corrupted.",
        f"{PLUGIN} = FORCE_PLUS_PERMANENT",
        *(f"{name} = {value}" for name, value in {**wish.at_start, **wish.dynamic}.items()),
    ]
    if wish.former:
        lines += [
            "# Of the former key file, which was encrypted under a password or not; this one is not.",
            f"{PLUGIN}_filekey =",
        ]
    return ("\n".join(lines) + "\n").encode()


def owner(content: bytes) -> str | None:
    """The cluster whose include file this is, None if it is not one of ours."""
    first = content.decode("utf-8", "replace").splitlines()[:1]
    if not first or not first[0].startswith(MARK):
        return None
    return first[0][len(MARK) :].partition(":")[0]


def differences(wished: t.Mapping[str, str], found: t.Mapping[str, str]) -> dict[str, str]:
    """The variables whose value is another, with the wished one; one that the server does not know differs."""
    return {name: value for name, value in wished.items() if found.get(name, "").upper() != value.upper()}
