# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether redo log and binary logs are encrypted, by their own headers: pure functions and the reading of a file's beginning."""

from __future__ import annotations

from ...common.files import os_error

#: Bytes of a file's beginning that hold all that is looked for.
HEAD_BYTES = 4096

#: The redo log's format, its first four bytes (storage/innobase/include/log0log.h): of MariaDB 10.8, of that encrypted as a server
#: of 10.11.19 writes it, and of 10.5, whose highest bit tells.
_REDO, _REDO_ENCRYPTED, _REDO_10_5 = 0x50687973, 0xF09F979D, 0x50485953
_ENCRYPTED_BIT = 1 << 31
#: Where the format of 10.8 has its encryption's parameters, zeros without one (LOG_HEADER_CREATOR_END in the same file).
_REDO_PARAMETERS = 48

#: A binary log's first bytes, the length of an event's header and the events looked for
#: (MariaDB's "Replication Protocol": Event Header, FORMAT_DESCRIPTION_EVENT, START_ENCRYPTION_EVENT).
_BINLOG_MAGIC = b"\xfebin"
_EVENT_HEADER = 19
_FORMAT_DESCRIPTION, _START_ENCRYPTION = 15, 164


def redo_encrypted(head: bytes) -> bool | None:
    """Whether a redo log is encrypted, None if its format is not known."""
    if len(head) < _REDO_PARAMETERS + 4:
        return None
    number, parameters = (int.from_bytes(head[place : place + 4], "big") for place in (0, _REDO_PARAMETERS))
    if number == _REDO:
        return bool(parameters)
    return {_REDO_ENCRYPTED: True, _REDO_10_5: False, _REDO_10_5 | _ENCRYPTED_BIT: True}.get(number)


def binlog_encrypted(head: bytes) -> bool | None:
    """Whether a binary log is encrypted after its first event; None if it is no binary log.

    A log that ends with its first event is not: the event that says so comes second.
    """
    if not head.startswith(_BINLOG_MAGIC) or len(head) < 4 + _EVENT_HEADER or head[8] != _FORMAT_DESCRIPTION:
        return None
    second = 4 + int.from_bytes(head[13:17], "little")
    return len(head) > second + 4 and head[second + 4] == _START_ENCRYPTION


def beginning(path: str, size: int = HEAD_BYTES) -> bytes:
    """A file's beginning.

    :raises TdeError: ``file_absent``, ``permission_denied``, ``io_error``.
    """
    try:
        with open(path, "rb") as handle:
            return handle.read(size)
    except OSError as exc:
        raise os_error(exc, path) from None
