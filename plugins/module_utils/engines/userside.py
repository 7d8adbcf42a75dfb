# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a database asks a command for, answered as the database's own user: a state directory, a record and a PIN of that user's.

Root makes the user's state directory, publishes a copy of the cluster's record that the user reads and cannot write (so
the library that is loaded is root's choice) and hands over the PIN. From then on it only acts *as* the user, in a
child (:func:`common.isolate.isolated`): who can write that store chooses nothing that root loads or reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import (
    leftovers_of,
    make_owned_directory,
    make_shared_directory,
    read_private,
    remove_leftovers_of,
    write_atomic,
)
from ..common.isolate import isolated
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..pkcs11.resting import at_rest
from . import record as records

#: A PIN that a user reads and nobody writes.
_PIN_MODE = 0o400


@dataclasses.dataclass(frozen=True)
class UserSide:
    """A cluster's command side.

    :param state: root's state directory. :param user: the operating system's user whom the database runs as.
    """

    state: StateDirectory
    cluster: str
    user: pwd.struct_passwd

    @property
    def own(self) -> StateDirectory:
        """The user's state directory."""
        return self.state.of_user(self.user.pw_name)

    def run(self, act: t.Callable[[], t.Any]) -> t.Any:
        """Act as the user, in a child; gives and raises what ``act`` does. :param act: gives JSON's kinds of value."""
        return isolated(act, user=None if os.geteuid() == self.user.pw_uid else self.user)

    def plan(self, record: records.Record, pin: Secret | None) -> Plan:
        """The steps that make what the user's commands need. Pure but for looking.

        :param record: the cluster's record as it shall be published; its ``pin_source`` says where the PIN lies.
        :param pin: the token's PIN, written to that file if it holds another or none.
        """
        steps: Plan = []
        if not self._has_state():
            steps.append(Step("make_user_state", self.own.path, f"the state directory of user {self.user.pw_name}"))
        path = self.state.published_record(self.cluster)
        if _published(path) != record or leftovers(path):
            why = f"what commands of user {self.user.pw_name} may load"
            steps.append(Step("publish_record", path, why, {"record": record.public()}))
        source = record.pin_source
        if (
            source.get("kind") == "file"
            and pin is not None
            and (self._at_rest(source["path"]) != pin or leftovers(source["path"]))
        ):
            why = f"what commands of user {self.user.pw_name} open the token with"
            steps.append(Step("write_user_pin", source["path"], why, {"path": source["path"]}))
        return steps

    def handlers(self, pin: Secret | None) -> dict[str, t.Callable[[Step], None]]:
        """The acts of the steps."""
        return {
            "make_user_state": lambda step: self._make_state(),
            "publish_record": self._publish,
            "write_user_pin": lambda step: self._write_pin(step.data["path"], pin),
        }

    def _has_state(self) -> bool:
        """Whether the user's state directory is there, and the user's alone.

        :raises TdeError: ``file_not_private``.
        """
        try:
            info = os.lstat(self.own.path)
        except FileNotFoundError:
            return False
        if info.st_uid == 0 and self.user.pw_uid != 0:
            # A run was killed before it gave the folder away; making it judges what is in it.
            return False
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != self.user.pw_uid or info.st_mode & 0o077:
            raise TdeError(
                "file_not_private",
                f"is not a folder of user {self.user.pw_name} alone (user id {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o})",
                obj=self.own.path,
                next_step="Find out who changed it before you correct owner and mode.",
            )
        return True

    def _make_state(self) -> None:
        make_shared_directory(self.state.users)
        make_shared_directory(os.path.dirname(self.own.path))
        make_owned_directory(self.own.path, self.user.pw_uid, self.user.pw_gid)

    def _publish(self, step: Step) -> None:
        path = self.state.published_record(self.cluster)
        make_shared_directory(self.state.users)
        make_shared_directory(os.path.dirname(path))
        remove_leftovers_of(path)
        write_atomic(path, (json.dumps(step.data["record"], indent=1, sort_keys=True) + "\n").encode(), mode=0o644)

    def _write_pin(self, path: str, pin: Secret | None) -> None:
        if pin is None:
            return
        make_shared_directory(os.path.dirname(path))
        remove_leftovers_of(path)
        write_atomic(path, pin.reveal() + b"\n", mode=_PIN_MODE, uid=self.user.pw_uid, gid=self.user.pw_gid)

    def _at_rest(self, path: str) -> Secret | None:
        if not os.path.lexists(path):
            return None
        pin = at_rest(path, of_anybody=True).settled
        return pin if os.lstat(path).st_uid == self.user.pw_uid else None


def leftovers(path: str) -> list[str]:
    """Temporary files of a killed write; none where the folder is still to be made."""
    return leftovers_of(path) if os.path.isdir(os.path.dirname(path)) else []


def _published(path: str) -> records.Record | None:
    """The published record, which only root may have written; None if there is none."""
    try:
        raw = read_private(path, owners=(0,), forbidden_mode=0o022)
    except TdeError as exc:
        if exc.code == "file_absent":
            return None
        raise
    try:
        content = json.loads(raw)
    except ValueError:
        content = None
    return records.parse(content, path)


def is_published(state: StateDirectory, cluster: str) -> bool:
    """Whether a cluster's commands run as its own user."""
    return os.path.lexists(state.published_record(cluster))


def entered(state: StateDirectory, cluster: str) -> tuple[records.Record, StateDirectory]:
    """A cluster's published record and its user's state directory, for a command that runs as this user.

    :raises TdeError: ``cluster_unknown``, ``command_of_other_user``, ``file_not_private``, ``record_damaged``.
    """
    record = _published(state.published_record(cluster))
    if record is None:
        raise TdeError(
            "cluster_unknown",
            f"has no record in {state.users}",
            obj=f"cluster {cluster}",
            next_step="Make its keystore first (tde_keystore with state=present).",
        )
    name = str(record.options.get("os_user", ""))
    try:
        expected = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise TdeError("os_user_absent", "does not exist on this host", obj=f"user {name}") from None
    if expected != os.geteuid():
        raise TdeError(
            "command_of_other_user",
            f"runs as user {name}, not as user id {os.geteuid()}",
            obj=f"command of cluster {cluster}",
            next_step=f"Run it as that user: runuser -u {name} -- hsm-tde …",
        )
    return record, state.of_user(name)
