# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The journal: every act on a key, one JSON object a line, each chained to the one before by SHA-256.

An entry's ``hash`` is SHA-256 over its canonical JSON (sorted keys, no white space, UTF-8) without
``hash``; ``prev`` is the hash of the entry before, 64 zeros for the first. The last entry's number and
hash also stand in ``journal.jsonl.head``, so that entries cut off the end are noticed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import typing as t

from .errors import TdeError
from .files import lock, make_private_directory, os_error, read_private, remove_leftovers_of, write_atomic

_FIRST = "0" * 64
#: A journal is read whole; above this it is rotated by the administrator.
_MAX_BYTES = 256 << 20


def _digest(entry: dict[str, t.Any]) -> str:
    body = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def actor() -> str:
    """Who acts: the login user behind the process (audit login id, else SUDO_USER), and the effective user id."""
    user = os.environ.get("SUDO_USER", "")
    try:
        with open("/proc/self/loginuid", encoding="ascii") as handle:
            login = int(handle.read())
        if login not in (-1, 0xFFFFFFFF):
            user = user or f"uid {login}"
    except (OSError, ValueError):
        pass
    return f"{user} as uid {os.geteuid()}" if user else f"uid {os.geteuid()}"


class Journal:
    """A host's journal.

    :param path: the file; it is created by the first act, mode 0600.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> list[dict[str, t.Any]]:
        """All entries, oldest first, after the chain has been checked.

        :raises TdeError: ``journal_damaged``.
        """
        # Before the entries: one that is appended meanwhile, by somebody whose lock a reader does not wait for, is no entry missing.
        head = self._head()
        try:
            raw = read_private(self.path, max_bytes=_MAX_BYTES)
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
            raw = b""
        lines = raw.split(b"\n")
        # A kill during the append can leave a last line without its end; it was never acknowledged.
        lines.pop()
        found: list[dict[str, t.Any]] = []
        previous = _FIRST
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                sound = entry["seq"] == number and entry["prev"] == previous and entry["hash"] == _digest(entry)
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise self._damaged(f"entry {number} does not fit the chain")
            previous = entry["hash"]
            found.append(entry)
        if head and (len(found) < head["seq"] or found[head["seq"] - 1]["hash"] != head["hash"]):
            raise self._damaged(f"entry {head['seq']} was written once and is missing or different")
        return found

    def last(self, **match: t.Any) -> dict[str, t.Any] | None:
        """The newest entry whose fields equal ``match``, or None."""
        found = (entry for entry in reversed(self.entries()) if all(entry.get(key) == value for key, value in match.items()))
        return next(found, None)

    def append(
        self,
        action: str,
        obj: str,
        *,
        result: str = "done",
        cluster: str = "",
        key: str = "",
        key_id: str = "",
        kcv: str = "",
        **detail: t.Any,
    ) -> dict[str, t.Any]:
        """Write one act and bring it to the disk.

        :param action: a verb in snake case (``generate_key``, ``add_keyslot`` …).
        :param obj: the object acted on, in words.
        :param result: ``done``, ``refused`` or ``failed``.
        :param cluster: the cluster's name, if one is concerned.
        :param key: the data key's or HSM key's label; :param key_id: its CKA_ID in hex or the data key's identifier.
        :param kcv: its check value in hex.
        :param detail: further public facts. Never a secret.
        """
        make_private_directory(os.path.dirname(self.path))
        with lock(self.path + ".lock", wait_seconds=10):
            remove_leftovers_of(self.path + ".head")
            before = self.entries()
            entry: dict[str, t.Any] = {
                "seq": len(before) + 1,
                "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
                "host": socket.gethostname(),
                "actor": actor(),
                "action": action,
                "object": obj,
                "result": result,
                "cluster": cluster,
                "key": key,
                "key_id": key_id,
                "kcv": kcv,
                "detail": detail,
                "prev": before[-1]["hash"] if before else _FIRST,
            }
            entry["hash"] = _digest(entry)
            self._write(entry)
        return entry

    def _write(self, entry: dict[str, t.Any]) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "r+b") as handle:
                content = handle.read()
                # Drop what a kill or a full disk left of an unacknowledged line.
                handle.seek(content.rfind(b"\n") + 1)
                handle.truncate()
                handle.write(json.dumps(entry, sort_keys=True, ensure_ascii=False).encode() + b"\n")
                handle.flush()
                os.fsync(fd)
        except OSError as exc:
            raise os_error(exc, self.path) from None
        write_atomic(self.path + ".head", json.dumps({"seq": entry["seq"], "hash": entry["hash"]}).encode())

    def _head(self) -> dict[str, t.Any] | None:
        try:
            head: dict[str, t.Any] = json.loads(read_private(self.path + ".head"))
            return head
        except TdeError as exc:
            if exc.code == "file_absent":
                return None
            raise
        except ValueError:
            raise self._damaged("its head file is not valid") from None

    def _damaged(self, reason: str) -> TdeError:
        return TdeError(
            "journal_damaged",
            reason,
            obj=self.path,
            next_step="Compare it with the copy that your log collector holds; move it aside only with the auditor's consent.",
        )
