# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The acts that the engine's plans order, beside those on keys: directories, kernel keys, clusters, tablespaces."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import check_parents, lock, os_error, trusted_directory
from ...common.journal import Journal
from ...common.plan import Handlers, Step
from ...common.run import run_program
from ...storage import fscrypt
from .. import bootpin
from .. import record as records
from ..base import Request
from ..keyring import Keyring
from . import look, sql
from . import server as servers
from .move import Mover, Relation
from .options import Options
from .plan import PLACE_MODE

#: Seconds that initdb may take, the syncing of its files included.
_INITDB_SECONDS = 900
#: Seconds that an initdb is waited for whose task was killed.
_ORPHAN_SECONDS = 120
#: Where Debian keeps the configuration of its packaged clusters: a folder a version, in it one a cluster.
DEBIAN_CONFIGURATION = "/etc/postgresql"
#: What keeps the journal from being written and no database closed at boot: as in ``SealedFile.settle``, opening goes on.
_NO_NOTE = ("disk_full", "busy")


class Acts:
    """Acts on one cluster. Each can be killed at any moment: the next plan goes on from what is there.

    :param record: the cluster's record as it was read, or a new one; rewritten by the acts that add to it.
    """

    def __init__(self, request: Request, options: Options, record: records.Record, keyring: Keyring) -> None:
        self.request = request
        self.options = options
        self.record = record
        self.keyring = keyring
        self.journal = Journal(request.state.journal)
        self.access: sql.Access | None = None
        self.mover: Mover | None = None

    def handlers(self) -> Handlers:
        """One act a step."""
        return {
            "write_record": self._write_record,
            "write_pin_source": self._write_pin_source,
            "add_kernel_key": self._add_kernel_key,
            "remove_kernel_key": self._remove_kernel_key,
            "make_directory": self._make_directory,
            "set_policy": self._set_policy,
            "hand_over": self._hand_over,
            "record_place": self._record_place,
            "clear_place": self._clear_place,
            "create_cluster": self._create_cluster,
            "create_tablespace": self._create_tablespace,
            "set_tablespace_owner": self._set_tablespace_owner,
            "move_database": self._move_database,
            "move_relation": self._move_relation,
            "move_large_objects": lambda step: self._mover().move_large_objects(step.data["database"], step.data["target"]),
            "set_default_tablespace": lambda step: self._mover().set_default(step.data["database"], step.data["target"]),
        }

    def note(self, action: str, obj: str, key_id: str, kcv: str, path: str, result: str = "done") -> None:
        """Write an act on a data key into the journal; :param kcv: its check value."""
        cluster = self.request.cluster
        self.journal.append(action, obj, result=result, cluster=cluster, key=key_id, key_id=key_id, kcv=kcv, path=path)

    # --- the record

    def save(self, record: records.Record) -> None:
        """Write the record, if it says something new."""
        if record != self.record or records.read(self.request.state, record.cluster) is None:
            records.write(self.request.state, record)
        self.record = record

    def _write_record(self, step: Step) -> None:
        self.save(records.parse(step.data["record"], self.request.state.cluster_record(self.request.cluster)))

    def _write_pin_source(self, step: Step) -> None:
        bootpin.write_pin(step.data["path"], established(bootpin.boot_pin(self.keyring), "the PIN for the boot"))

    # --- kernel keys

    def _add_kernel_key(self, step: Step) -> None:
        path = look.existing(step.data["path"])
        data_key = self.keyring.data_key(step.data["key_id"])
        policy = fscrypt.policy(path) if path == step.data["path"] else None
        if policy and policy["identifier"] != data_key.check_value:
            raise TdeError(
                "place_foreign",
                f"is encrypted with {policy['identifier']}; the store's key is {data_key.check_value}",
                obj=path,
                kept="The kernel was given no key.",
            )
        fscrypt.add_key(path, data_key.reveal())
        try:
            self.note("add_kernel_key", step.obj, step.data["key_id"], data_key.check_value, step.data["path"])
        except TdeError as exc:
            if exc.code not in _NO_NOTE:
                raise
            self.keyring.warnings.append(f"{step.obj} was given to the kernel, and the journal does not say so: {exc}")

    def _remove_kernel_key(self, step: Step) -> None:
        path = step.data["path"]
        key = self.keyring.key(step.data["key_id"])
        policy = fscrypt.policy(path)
        identifier = policy["identifier"] if policy else key.check_value if key else ""
        # By its parent folder: a descriptor on the place itself would keep the key in use.
        left = fscrypt.remove_key(os.path.dirname(path), identifier)
        if left["status"] != "absent":
            users = ", ".join(f"{one.name} ({one.pid})" for one in servers.holders(path))
            self.note("remove_kernel_key", step.obj, step.data["key_id"], identifier, path, "failed")
            raise TdeError(
                "place_in_use",
                left["reason"] or f"the kernel says: {left['status']}",
                obj=path,
                kept=f"The key's status is {left['status']}." + (f" In use by {users}." if users else ""),
                next_step="End these processes, then close again.",
            )
        self.note("remove_kernel_key", step.obj, step.data["key_id"], identifier, path)

    # --- places

    def _make_directory(self, step: Step) -> None:
        path = step.data["path"]
        check_parents(path)
        with trusted_directory(os.path.dirname(path)) as folder:
            try:
                os.mkdir(os.path.basename(path), PLACE_MODE, dir_fd=folder)
                os.fsync(folder)
            except OSError as exc:
                raise os_error(exc, path) from None

    def _set_policy(self, step: Step) -> None:
        data_key = self.keyring.data_key(step.data["key_id"])
        fscrypt.set_policy(step.data["path"], data_key.check_value)

    def _hand_over(self, step: Step) -> None:
        user = self.options.account()
        path = step.data["path"]
        with trusted_directory(os.path.dirname(path)) as folder:
            try:
                fd = os.open(os.path.basename(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    os.fchown(fd, user.pw_uid, user.pw_gid)
                    os.fchmod(fd, PLACE_MODE)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as exc:
                raise os_error(exc, path) from None

    def _record_place(self, step: Step) -> None:
        path, key_id = step.data["path"], step.data["key_id"]
        policy = established(fscrypt.policy(path), "the policy")
        below = self.options.mount_point is not None and path.startswith(self.options.mount_point + "/")
        place = records.Place(
            key_id=key_id,
            path=path,
            mount_point=self.options.mount_point if below and self.options.mount_point else os.path.dirname(path),
            image=self.options.image if below else None,
            file_system=look.file_system(path),
            made=True,
        )
        self.note(look.MADE, f"place {path}", key_id, policy["identifier"], path)
        self.save(self.record.with_place(place))

    # --- a database cluster in its place

    def _filling(self, key_id: str, **change: bool) -> None:
        place = established(self.record.place(key_id), "the place's record")
        self.save(self.record.with_place(dataclasses.replace(place, **change)))  # type: ignore[arg-type]

    def _initdb_lock(self, wait_seconds: float = 0) -> contextlib.AbstractContextManager[int]:
        """Held by initdb and the programs that it starts: they outlive a task that is killed."""
        return lock(self.request.state.cluster_record(self.request.cluster) + ".lock", wait_seconds)

    def _clear_place(self, step: Step) -> None:
        """Take away what an interrupted initdb left; never what a server has run on."""
        with self._initdb_lock(_ORPHAN_SECONDS):
            self._clear(step.data["path"])

    def _clear(self, path: str) -> None:
        users = servers.holders(path)
        if users or os.path.lexists(os.path.join(path, "postmaster.opts")):
            raise TdeError(
                "place_in_use",
                f"is in use by {', '.join(f'{one.name} ({one.pid})' for one in users)}" if users else "a server has run on it",
                obj=path,
                next_step="Wait until they have ended, then run again.",
            )
        try:
            for name in os.listdir(path):
                inner = os.path.join(path, name)
                if os.path.isdir(inner) and not os.path.islink(inner):
                    shutil.rmtree(inner)
                else:
                    os.unlink(inner)
            if self.options.debian_cluster:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(os.path.join(DEBIAN_CONFIGURATION, *servers.split_cluster(self.options.debian_cluster)))
        except OSError as exc:
            raise os_error(exc, path, kept="What is left there will be cleared by the next run.") from None

    def _create_cluster(self, step: Step) -> None:
        path, key_id = step.data["path"], step.data["key_id"]
        if os.listdir(path):
            raise TdeError("place_not_empty", "is not empty", obj=path, next_step="Find out what is in it, and move it away.")
        self._filling(key_id, begun=True)
        with self._initdb_lock() as held:
            self._initdb(path, held)
        self._filling(key_id, filled=True)

    def _initdb(self, path: str, held: int) -> None:
        options = self.options
        if options.debian_cluster:
            version, name = servers.split_cluster(options.debian_cluster)
            # Its own options come first; authentication is peer and scram-sha-256 by its default.
            argv = [
                "pg_createcluster",
                "--user",
                options.os_user,
                "--datadir",
                path,
                version,
                name,
                "--",
                *options.initdb_options,
            ]
            run_program(argv, timeout=_INITDB_SECONDS, inherit=[held])
        else:
            initdb = os.path.join(servers.bin_directory(options.bin_directory), "initdb")
            argv = [initdb, "--pgdata", path, "--auth-local=peer", "--auth-host=scram-sha-256", *options.initdb_options]
            run_program(argv, user=options.os_user, timeout=_INITDB_SECONDS, inherit=[held])

    # --- tablespaces and moves

    def _connected(self) -> sql.Access:
        return established(self.access, "the server's address")

    def _create_tablespace(self, step: Step) -> None:
        with sql.connect(self._connected()) as connection:
            sql.create_tablespace(connection, step.data["name"], step.data["path"], step.data["owner"] or None)

    def _set_tablespace_owner(self, step: Step) -> None:
        with sql.connect(self._connected()) as connection:
            sql.set_owner(connection, step.data["name"], step.data["owner"])

    def _mover(self) -> Mover:
        return established(self.mover, "the mover")

    def _move_database(self, step: Step) -> None:
        # If somebody came in meanwhile nothing happened; the next plan moves relation by relation.
        self._mover().move_database(step.data["database"], step.data["target"], step.data["from"])

    def _move_relation(self, step: Step) -> None:
        self._mover().move_relation(step.data["database"], Relation(**step.data["relation"]), step.data["target"])
