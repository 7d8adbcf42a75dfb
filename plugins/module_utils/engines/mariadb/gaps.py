# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a server leaves in the clear, or protects weakly, in plain words: a pure function of ``info``'s facts."""

from __future__ import annotations

import typing as t

from ..telling import ALWAYS, host_gaps, keyslot_gaps

Facts = t.Mapping[str, t.Any]

#: Settings that encrypt something, and what is in the clear without.
SETTINGS = {
    "encrypt_binlog": "Binary and relay logs are written in the clear",
    "encrypt_tmp_files": "Temporary files of sorts are in the clear",
    "encrypt_tmp_disk_tables": "Temporary tables on the disk are in the clear",
    "innodb_encrypt_log": "The redo log is in the clear",
    "innodb_encrypt_temporary_tables": "InnoDB's temporary tables are in the clear",
    "aria_encrypt_tables": "Aria tables are made in the clear",
    "innodb_encrypt_tables": "InnoDB tables are made in the clear",
}

#: What no setting reaches (MariaDB's manual, "Data-at-Rest Encryption Overview", limitations; the cipher was read off real pages).
LIMITS = (
    "The Aria log, Aria and MyISAM tables made before, the table definitions (.frm), the buffer pool's list, error, general, slow and "
    "audit logs are in the clear.",
    "Pages of the system tablespace that were free when it was encrypted keep what they held, old values of changed rows among them: "
    "only a new data directory is rid of them.",
    "Key 1 cannot be replaced: redo log, binary logs, the system tablespace, full-text indexes and the tables of database mysql stay under it.",
    "InnoDB derives a key of 128 bits for each tablespace from the data key of 256 bits: pages are under AES-128.",
)


def covered(facts: Facts) -> bool:
    """Whether every tablespace, the redo log and every binary log are encrypted, and what is to come will be."""
    server = facts["server"]
    return (
        bool(facts["tablespaces"])
        and server["answers"]
        and all(one["encryption"] == "ours" for one in facts["tablespaces"])
        and server["redo_log"] == "encrypted"
        and all(one == "encrypted" for one in server["binary_logs"].values())
        and not any(True for dummy in _settings(server))
    )


def sentences(facts: Facts) -> list[str]:
    """One sentence a gap, the widest first."""
    return [*facts["problems"], *_server(facts), *keyslot_gaps(facts), *host_gaps(facts), *ALWAYS]


def _server(facts: Facts) -> t.Iterator[str]:
    if not facts["managed"]:
        yield "This host has no record of the cluster: nothing here is encrypted by this collection."
    server = facts["server"]
    if not server["answers"]:
        yield f"The server at {server['address']} {server['problem'] or 'was not asked'}, so its tables are not known."
        return
    if server["restart_required"]:
        yield f"The server must be restarted. {' '.join(server['restart_required'])}"
    for words, kind in (
        ("in the clear", "plain"),
        ("being encrypted by the server's threads", "encrypting"),
        ("encrypted with a key that this host's store does not hold", "unknown_key"),
    ):
        names = [one["name"] for one in facts["tablespaces"] if one["encryption"] == kind]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"{len(names)} InnoDB tablespaces are {words}: {', '.join(names[:3])}{more}."
    others = server["tables_of_other_engines"]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield (
            f"{len(others)} tables of users are not InnoDB's ({', '.join(others[:3])}{more}): Aria's are encrypted if they were made "
            "with its setting on, others never."
        )
    if server["redo_log"] == "plain":
        yield "The redo log is in the clear, with every change in it."
    plain = sorted(name for name, state in server["binary_logs"].items() if state != "encrypted")
    if plain:
        yield f"{len(plain)} binary logs from before are in the clear, the first {plain[0]}: PURGE BINARY LOGS once no replica needs them."
    yield from _settings(server)
    yield from _access(server)
    if facts["managed"]:
        yield from LIMITS
    yield from _former(server["former_key_file"])


def _former(file: Facts | None) -> t.Iterator[str]:
    """What the key file from before ours leaves behind."""
    if file is None:
        return
    if file["there"]:
        how = "encrypted under a password that the server's settings tell" if file["encrypted"] else "in the clear"
        yield (
            f"The former key file {file['path']} lies there, {how}, with keys that still encrypt the server's files: remove it "
            "(former_key_file=remove) when nothing needs it any more; the store keeps its keys for backups."
        )
    if file["keys_in_use"]:
        numbers = ", ".join(map(str, file["keys_in_use"]))
        yield (
            f"Keys {numbers} come from the former key file {file['path']}: whoever has a copy of it reads what they encrypt, until the "
            "tables are under new keys (reencrypt). Key 1 cannot be replaced."
        )


def _settings(server: Facts) -> t.Iterator[str]:
    for name, words in SETTINGS.items():
        if server["settings"].get(name, "OFF").upper() in ("OFF", "0"):
            yield f"{words} ({name} is off)."


def _access(server: Facts) -> t.Iterator[str]:
    settings = server["settings"]
    if not settings.get("secure_file_priv"):
        yield "Accounts with the privilege FILE can read the key file with LOAD DATA INFILE: set secure_file_priv to a directory of its own."
    if settings.get("general_log", "OFF").upper() == "ON" or settings.get("slow_query_log", "OFF").upper() == "ON":
        yield "The general or the slow query log is on: it holds statements with their values, in the clear."
    if server["replicas_attached"]:
        yield (
            f"{server['replicas_attached']} replicas receive the binary log, decrypted: it needs TLS on the way, "
            "and each replica must be encrypted on its own, with keys of the same numbers."
        )
