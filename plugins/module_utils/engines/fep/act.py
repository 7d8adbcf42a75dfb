# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The acts that the engine's plans order. Each can be killed at any moment: the next plan goes on from what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import lock, make_private_directory, os_error, remove_leftovers, trusted_directory, write_atomic
from ...common.journal import Journal
from ...common.plan import Handlers, Step
from ...common.run import run_program
from ...common.secret import Secret
from ...common.terminal import Answer, converse
from ...pkcs11 import pins, resting
from ...pkcs11.kek import create_kek
from ...pkcs11.keys import find
from ...pkcs11.refused import SALT_BYTES, pin_fingerprint
from ...pkcs11.registry import Registry
from ...pkcs11.token import open_session
from .. import record as records
from ..base import Request
from ..postgresql import sql as postgres
from ..userside import UserSide
from . import conf, look, sql
from .options import FILE, HSM, PLUGIN, Options

#: Seconds that initdb may take, the syncing of its files included.
_INITDB_SECONDS = 900
#: Seconds that an initdb is waited for whose task was killed.
_ORPHAN_SECONDS = 120
#: What a refused act is called where the server's own words have to do.
_FAILED = {
    "set_passphrase": "passphrase_change_refused",
    "open_keystore": "keystore_not_opened",
}


class Acts:
    """Acts on one cluster.

    :param record: the cluster's record as it was read, or a new one; rewritten by the acts that add to it.
    :param secret: what the server's functions are given now: PIN or passphrase; None with a plugin.
    :param wished: the PIN or passphrase that is wished for.
    """

    def __init__(self, request: Request, options: Options, record: records.Record) -> None:
        self.request = request
        self.options = options
        self.record = record
        self.journal = Journal(request.state.journal)
        self.secret: Secret | None = None
        self.wished: Secret | None = None
        self.pin_wish: pins.PinWish | None = None
        self.server: look.Server | None = None
        #: An open keystore that was to be opened: the server said so.
        self.found_open = False

    def handlers(self) -> Handlers:
        """One act a step."""
        return {
            "create_cluster": self._create_cluster,
            "make_keystore_directory": self.make_directory,
            "protect_keystore": self._protect_keystore,
            "take_pin_out": self._write_include_file,
            "change_pin": self._change_pin,
            "write_include_file": self._write_include_file,
            "write_connection_file": self._write_connection_file,
            "include_settings": self._include_settings,
            "link_plugin": self._link_plugin,
            "make_key": self._make_key,
            **self.userside().handlers(self.wished),
            "write_record": self._write_record,
            "write_pin_source": self._write_pin_source,
            "create_extension": lambda step: self._create_extension(),
            "reload_server": lambda step: sql.reload(self._access()),
            "set_master_key": self._set_master_key,
            "rotate_master_key": self._set_master_key,
            "declare_master_key": self._declare,
            "open_keystore": self._open,
            "change_passphrase": self._change_passphrase,
            "enable_auto_open": self._enable_auto_open,
            "disable_auto_open": self._disable_auto_open,
        }

    def userside(self) -> UserSide:
        """Where the plugin works, as the server's user."""
        return UserSide(self.request.state, self.request.cluster, self.options.account())

    def note(self, action: str, obj: str, result: str = "done", key_id: str = "", **detail: t.Any) -> None:
        """Write an act on the keystore into the journal."""
        self.journal.append(action, obj, result=result, cluster=self.request.cluster, key_id=key_id, **detail)

    # --- the record

    def save(self, record: records.Record) -> None:
        """Write the record, if it says something new."""
        if record != self.record or records.read(self.request.state, record.cluster) is None:
            records.write(self.request.state, record)
        self.record = record

    def remember(self, **memory: t.Any) -> None:
        """Put into the record what the server does not remember."""
        kept = {**look.memory(self.record), **memory}
        self.save(dataclasses.replace(self.record, options={**self.record.options, "memory": kept}))

    def _write_record(self, step: Step) -> None:
        for token in step.data["record"]["tokens"]:
            # From now on a token that does not show is unreachable, never absent.
            Registry(self.request.state).remember_token(token["label"], token["serial"], token["library"])
        self.save(records.parse(step.data["record"], self.request.state.cluster_record(self.request.cluster)))

    def _write_pin_source(self, step: Step) -> None:
        secret = established(self.wished, "the secret for the boot")
        make_private_directory(os.path.dirname(step.data["path"]))
        resting.remove_leftovers(step.data["path"])
        write_atomic(step.data["path"], secret.reveal() + b"\n")

    # --- files of the server's user

    def _create_cluster(self, step: Step) -> None:
        """initdb beside the place, then a rename: what a killed one left is never taken for a cluster."""
        path = established(self.options.data_directory, "the data directory")
        new = f"{path}.hsm-tde-new"
        initdb = self.options.program("initdb")
        # An initdb that outlives its killed task holds the lock.
        with lock(self.request.state.cluster_record(self.request.cluster) + ".lock", _ORPHAN_SECONDS) as held:
            try:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(new)
                self.make_directory(Step("", new, data={"path": new}))
                argv = [initdb, "--pgdata", new, "--auth-local=peer", "--auth-host=scram-sha-256", *self.options.initdb_options]
                run_program(argv, user=self.options.os_user, timeout=_INITDB_SECONDS, inherit=[held])
                os.rename(new, path)
            except OSError as exc:
                raise os_error(exc, path) from None

    def make_directory(self, step: Step) -> None:
        """An empty folder of the server's user; missing parents are root's."""
        path, user = step.data["path"], self.options.account()
        parent = os.path.dirname(path)
        if not os.path.lexists(parent):
            make_private_directory(parent, 0o755)
        with trusted_directory(parent, [user.pw_uid]) as folder:
            name = os.path.basename(path)
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=folder)
                self._own(folder, name, 0o700)
                os.fsync(folder)
            except OSError as exc:
                raise os_error(exc, path) from None

    def _own(self, folder: int, name: str, mode: int) -> None:
        user = self.options.account()
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.fchown(fd, user.pw_uid, user.pw_gid)
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _protect_keystore(self, step: Step) -> None:
        path = step.data["path"]
        uid = self.options.account().pw_uid
        try:
            with trusted_directory(os.path.dirname(path), [uid]) as folder:
                self._own(folder, os.path.basename(path), 0o700)
            with trusted_directory(path, [uid]) as folder:
                for name in (look.KEYSTORE, look.AUTO_OPEN):
                    with contextlib.suppress(FileNotFoundError):
                        self._own(folder, name, 0o600)
        except OSError as exc:
            raise os_error(exc, path) from None

    def _write(self, path: str, text: str, mode: int = 0o600) -> None:
        user = self.options.account()
        remove_leftovers(os.path.dirname(path), [user.pw_uid])
        data = text.encode("utf-8", "surrogateescape")
        write_atomic(path, data, mode=mode, uid=user.pw_uid, gid=user.pw_gid, owners=[user.pw_uid])

    def _write_include_file(self, step: Step) -> None:
        pin = established(self.wished, "the PIN").text() if step.data["with_pin"] else None
        self._write(step.data["path"], conf.render(step.data["settings"], pin))
        if step.data["with_pin"]:
            self.note("write_pin", f"include file {step.data['path']}")

    def _write_connection_file(self, step: Step) -> None:
        self._write(step.data["path"], conf.kms_render(step.data["lines"]))

    def _include_settings(self, step: Step) -> None:
        path = step.data["path"]
        text = look.read_config(path, self.options.account().pw_uid)
        self._write(path, conf.with_include(text, step.data["include"]), os.lstat(path).st_mode & 0o7777)

    def _link_plugin(self, step: Step) -> None:
        path, user = step.data["path"], self.options.account()
        folder_path = os.path.dirname(path)
        if not os.path.lexists(folder_path):
            make_private_directory(folder_path, 0o755)
        with trusted_directory(folder_path, [user.pw_uid]) as folder:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.basename(path), dir_fd=folder)
                os.symlink(self.options.command, os.path.basename(path), dir_fd=folder)
                os.fsync(folder)
            except OSError as exc:
                raise os_error(exc, path) from None

    def _make_key(self, step: Step) -> None:
        """The key that the plugin is asked for, made by the server's user; one that is there is taken."""
        access = established(self.request.access, "the token")
        side, label, cluster = self.userside(), step.data["key_id"], self.request.cluster

        def act() -> None:
            own = side.own
            with own.locked(wait_seconds=10), open_session(access, own, rw=True) as session:
                if not find(session, label, cls="secret"):
                    create_kek(session, label, cluster=cluster, registry=Registry(own), journal=Journal(own.journal))

        side.run(act)

    # --- the keystore

    def _access(self) -> postgres.Access:
        return established(self.server, "the server").access

    def _create_extension(self) -> None:
        server = established(self.server, "the server")
        sql.create_extension(server.access)
        with postgres.connect(server.access) as connection:
            self.server = dataclasses.replace(server, facts=sql.inspect(connection))

    def _function(self, key: str) -> tuple[str, str]:
        facts = established(established(self.server, "the server").facts, "the server's facts")
        if key not in facts.functions:
            raise sql.not_enterprise(self._access(), sql.FUNCTIONS[key][0][0])
        return facts.functions[key]

    def _call(self, key: str, obj: str, *secrets_: Secret, **named: str) -> None:
        try:
            sql.call(self._access(), self._function(key), *secrets_, **named)
        except sql.Refused as refused:
            raise TdeError(
                _FAILED.get(key, "master_key_refused"),
                f"the server said: {refused.said}",
                obj=obj,
                details={"sqlstate": refused.sqlstate},
            ) from None

    def _secrets(self) -> list[Secret]:
        return [] if self.options.keystore == PLUGIN else [established(self.secret, "the credential")]

    def opened(self) -> None:
        """Remember that the keystore is open in this life of the server."""
        with postgres.connect(self._access()) as connection:
            life = sql.inspect(connection).life
        self.remember(life=life)

    def _set_master_key(self, step: Step) -> None:
        before = look.digest(self.options)
        detail = {"tag": step.data.get("tag", ""), "before": before}
        self.note(step.action, step.obj, "begun", **detail)
        try:
            self._call("set_master_key", step.obj, *self._secrets())
        except TdeError:
            if look.digest(self.options) == before:
                self.note(step.action, step.obj, "failed", **detail)
            raise
        self.note(step.action, step.obj, **detail)
        # It opens the keystore, too.
        self.opened()
        self._remember_passphrase()

    def _declare(self, step: Step) -> None:
        names = {"kms_name": step.data["kms_name"], "key_id": step.data["key_id"]}
        detail = {"tag": step.data.get("tag", ""), "kms_name": names["kms_name"]}
        self.note(look.DECLARE, step.obj, "begun", key_id=names["key_id"], **detail)
        self._call("declare", step.obj, **names)
        self.note(look.DECLARE, step.obj, key_id=names["key_id"], **detail)
        self.opened()

    def _open(self, step: Step) -> None:
        opens = "open_kms" if self.options.keystore == PLUGIN else "open_keystore"
        try:
            sql.call(self._access(), self._function(opens), *self._secrets())
        except sql.Refused as refused:
            # Neither text nor SQLSTATE of an open keystore's answer is documented; the token has just taken this PIN.
            if "already" not in refused.said.lower():
                raise self._not_opened(step.obj, refused) from None
            self.found_open = True
        else:
            self.note("open_keystore", step.obj)
            self._remember_passphrase()
        self.opened()

    def _not_opened(self, obj: str, refused: sql.Refused) -> TdeError:
        next_step = {
            HSM: "The token took the PIN, so look at tde_z.SLOT_ID, at pkcsslotd and at the group of the server's user.",
            FILE: "Give the keystore's own passphrase; on a standby, see that keystore.ks is the primary's.",
            PLUGIN: "Run the plugin by hand as the server's user: its message says more.",
        }[self.options.keystore]
        return TdeError(
            "keystore_not_opened",
            f"the server said: {refused.said}",
            obj=obj,
            kept="The keystore is as it was.",
            next_step=next_step,
            details={"sqlstate": refused.sqlstate},
        )

    def _remember_passphrase(self) -> None:
        """Keep a salted, slow fingerprint: only it tells the next run that this passphrase was set."""
        if self.options.keystore != FILE:
            return
        salt = secrets.token_hex(SALT_BYTES)
        found = pin_fingerprint(salt, "keystore", self.request.cluster, "user", established(self.secret, "the passphrase"))
        self.remember(passphrase={"salt": salt, "fingerprint": found})

    def _change_passphrase(self, step: Step) -> None:
        old, new = established(self.secret, "the present passphrase"), established(self.wished, "the new passphrase")
        source = self.record.pin_source
        path = source["path"] if source.get("kind") == "file" else None
        if path:
            # Both are at rest while the server changes it: the boot tries the one and then the other.
            resting.remove_leftovers(path)
            resting.write_coming(path, new)
        try:
            self._call("set_passphrase", step.obj, old, new)
        except TdeError as refused:
            # A run that was killed after the change: the new one is then the present one, and this changes nothing.
            try:
                sql.call(self._access(), self._function("set_passphrase"), new, new)
            except sql.Refused:
                self.note(step.action, step.obj, "failed")
                if path:
                    resting.discard_coming(path)
                raise refused from None
        if path:
            resting.settle(path)
        self.note(step.action, step.obj)
        self.secret = new
        self._remember_passphrase()

    def _change_pin(self, step: Step) -> None:
        pins.change(established(self.pin_wish, "the change of PIN"), self.request.state, locked=True)
        self.secret = self.wished

    def _enable_auto_open(self, step: Step) -> None:
        secret = established(self.secret, "the passphrase")
        keystore = os.path.join(os.path.dirname(step.data["path"]), look.KEYSTORE)
        self._remove(step.data["path"])
        argv = [self.options.program("pgx_keystore"), "--enable-auto-open", keystore]
        said = converse(argv, [Answer(r":", secret)], user=self.options.os_user)
        if said.code or said.asked_again:
            raise TdeError("command_failed", f"exit code {said.code}: {said.last_line}", obj=" ".join(argv[:2]))
        self.note(look.ENABLE, step.obj)

    def _disable_auto_open(self, step: Step) -> None:
        self._remove(step.data["path"])
        self.note("disable_auto_open", step.obj)

    def _remove(self, path: str) -> None:
        with trusted_directory(os.path.dirname(path), [self.options.account().pw_uid]) as folder:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.basename(path), dir_fd=folder)
                os.fsync(folder)
            except OSError as exc:
                raise os_error(exc, path) from None
