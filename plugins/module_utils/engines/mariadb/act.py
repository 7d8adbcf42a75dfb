# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The acts that the engine's plans order, beside those on keys: keys in memory, the include file, tables built anew."""

from __future__ import annotations

import os
import time
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import make_private_directory, os_error, remove_leftovers_of, trusted_directory, write_atomic
from ...common.journal import Journal
from ...common.plan import Handlers, Step
from .. import bootpin, memory
from .. import record as records
from ..base import Request
from ..keyring import Keyring
from . import former, keyfile, look, sql
from .options import Former, Options

#: Tries to have a table's lock, and the pause after the first, doubled after each.
_TRIES, _PAUSE_SECONDS = 6, 0.5
#: What keeps the journal from being written and no database closed at boot.
_NO_NOTE = ("disk_full", "busy")


class Acts:
    """Acts on one cluster. Each can be killed at any moment: the next plan goes on from what is there.

    :ivar access: the server's address; :ivar lock_seconds: how long one try waits for a table.
    :ivar progress: the tables that were built anew.
    """

    def __init__(self, request: Request, options: Options, keyring: Keyring) -> None:
        self.request = request
        self.options = options
        self.keyring = keyring
        self.journal = Journal(request.state.journal)
        self.access: sql.Access | None = None
        self.lock_seconds = 10.0
        self.progress: list[dict[str, t.Any]] = []

    def handlers(self) -> Handlers:
        """One act a step."""
        return {
            "write_record": self._write_record,
            "write_pin_source": self._write_pin_source,
            "mount_key_directory": lambda step: memory.mount(self.options.key_directory, self.options.os_user),
            "write_key_file": lambda step: self._write_key_file(),
            "write_include": self._write_include,
            "remove_former_key_file": self._remove_former,
            "close_key_directory": lambda step: self._close(),
            "set_variable": self._set_variable,
            "encrypt_table": self._encrypt_table,
        }

    def _write_record(self, step: Step) -> None:
        path = self.request.state.cluster_record(self.request.cluster)
        records.write(self.request.state, records.parse(step.data["record"], path))

    def _write_pin_source(self, step: Step) -> None:
        bootpin.write_pin(step.data["path"], established(bootpin.boot_pin(self.keyring), "the PIN for the boot"))

    # --- keys in memory

    def _write_key_file(self) -> None:
        ring, path = self.keyring, self.options.key_file
        # The steps before may have made keys.
        ring.look()
        names = keyfile.names(key.key_id for key in ring.keys)
        ring.unlock([name.key_id for name in names])
        mounted, before = look.key_file(self.options)
        if not mounted:
            raise TdeError("place_closed", "is not mounted", obj=self.options.key_directory, next_step="Open the keystore first.")
        keys = {name.number: ring.data_key(name.key_id) for name in names}
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        known = before.checks if before else {}
        since = {
            number: before.since[number] if before and known.get(number) == key.check_value else now
            for number, key in keys.items()
        }
        content = keyfile.render({number: key.reveal() for number, key in keys.items()}, since)
        memory.give(path, content, uid=0, gid=self.options.account().pw_gid, mode=0o440)
        for name in names:
            if known.get(name.number) != keys[name.number].check_value:
                self._note("give_key", f"key {name.number} of the server", name.key_id, keys[name.number].check_value)

    def _remove_former(self, step: Step) -> None:
        """Remove it once a credential has opened every one of its keys in the store, and it still is what was taken."""
        path, ring = step.data["path"], self.keyring
        ring.unlock(step.data["keys"])
        lying = former.lying(self.options)
        if lying is None or not self.options.former or lying.check != self.options.former.check:
            raise TdeError(
                "file_foreign",
                "was changed since its keys were taken",
                obj=path,
                kept="It was not removed.",
                next_step="Find out what it is, and remove it yourself.",
            )
        with trusted_directory(os.path.dirname(path), former.owners(self.options)) as folder:
            try:
                os.unlink(os.path.basename(path), dir_fd=folder)
                os.fsync(folder)
            except OSError as exc:
                raise os_error(exc, path) from None
        self.journal.append("remove_former_key_file", path, cluster=self.request.cluster, keys=step.data["keys"], path=path)

    def note_taken(self, taken: Former) -> None:
        """Say in the journal where keys came from."""
        self.journal.append("take_key_file", taken.path, cluster=self.request.cluster, keys=list(taken.keys), path=taken.path)

    def _close(self) -> None:
        path = self.options.key_directory
        memory.unmount(path)
        self._note("take_keys", f"keys in {path}", "", "")

    def _note(self, action: str, obj: str, key_id: str, kcv: str) -> None:
        try:
            self.journal.append(
                action, obj, cluster=self.request.cluster, key=key_id, key_id=key_id, kcv=kcv, path=self.options.key_file
            )
        except TdeError as exc:
            if exc.code not in _NO_NOTE:
                raise
            self.keyring.warnings.append(f"{obj}: done, and the journal does not say so: {exc}")

    # --- the server

    def _write_include(self, step: Step) -> None:
        make_private_directory(os.path.dirname(step.data["path"]), 0o755)
        remove_leftovers_of(step.data["path"])
        write_atomic(step.data["path"], step.data["text"].encode(), mode=0o644)

    def _server(self) -> sql.Access:
        return established(self.access, "the server's address")

    def _set_variable(self, step: Step) -> None:
        with sql.connect(self._server()) as connection:
            sql.set_variable(connection, step.data["name"], step.data["value"])

    def _encrypt_table(self, step: Step) -> None:
        """Build a table anew, with a bounded number of tries for its lock."""
        data = step.data
        table = sql.Table(data["database"], data["table"], "InnoDB", data["file"], data["size"])
        began, pause = time.monotonic(), _PAUSE_SECONDS
        for attempt in range(1, _TRIES + 1):
            try:
                with sql.connect(self._server(), read_seconds=sql.REBUILD_SECONDS) as connection:
                    if sql.is_under(connection, table, data["key"]):
                        return
                    online = sql.rebuild(connection, table, data["key"], self.lock_seconds)
                break
            except TdeError as exc:
                if exc.code == "relation_absent":
                    # Dropped meanwhile.
                    return
                if exc.code != "lock_timeout":
                    raise
                if attempt == _TRIES:
                    raise TdeError(
                        "move_blocked",
                        f"stayed locked by others through {_TRIES} tries of {self.lock_seconds:g} seconds",
                        obj=step.obj,
                        next_step="Run again when its transactions are shorter, or raise lock_timeout.",
                    ) from None
                time.sleep(pause)
                pause *= 2
        self.progress.append(
            {
                "database": table.database,
                "object": table.words,
                "kind": "table" if online else "table, not written to meanwhile",
                "from": f"key {data['from']}",
                "to": f"key {data['key']} ({data['tablespace']})",
                "bytes": table.size,
                "seconds": round(time.monotonic() - began, 3),
                "attempts": attempt,
            }
        )
