# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Encrypted tablespaces: made by the server, and filled with what is to move, while it runs."""

from __future__ import annotations

import contextlib
import os
import stat
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import check_parents, os_error
from ...common.plan import Handlers, Plan, Step
from ..base import Outcome, TablespacesWish, TablespaceWish
from ..postgresql import move
from ..postgresql import sql as postgres
from ..postgresql.tablespaces import FREED, MOVES, PG_UPGRADE, check_wishes, plan_moves
from ..rounds import Decision
from . import look, plan, public, sql

if t.TYPE_CHECKING:
    from .engine import Fep

Facts = t.Dict[str, t.Any]


class Tablespaces:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: Fep, wish: TablespacesWish, check: bool) -> None:
        self.engine = engine
        self.options = engine.options
        self.wish = wish
        self.check = check
        check_wishes(wish.items)
        plan.check_slots(engine.options, wish.slots)
        self.acts = engine.acts()
        self.warnings: list[str] = []
        self.progress: list[Facts] = []
        self._state: look.State | None = None

    @property
    def state(self) -> look.State:
        return established(self._state, "the state")

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        if self.engine.record is None and not self.check:
            self.engine.known()
        outcome = self.engine.rounds(self._coming if self._fresh() else self._decide, self._run, check=self.check)
        outcome.warnings += self.warnings
        notes = []
        if self.progress or (self.check and any(step.action in MOVES for step in outcome.plan)):
            notes.append(FREED)
        if any(row["object"].startswith("pg_catalog.pg_largeobject") for row in self.progress):
            notes.append(PG_UPGRADE)
        outcome.facts.update(
            {
                "cluster": self.engine.request.cluster,
                "tablespaces": [
                    {
                        "name": item.name,
                        "location": self._location(item),
                        "key_id": None,
                        "check_value": None,
                        "algorithm": item.algorithm,
                    }
                    for item in self.wish.items
                ],
                "moved": self.progress,
                "notes": notes,
            }
        )
        return outcome

    def _fresh(self) -> bool:
        """Whether earlier tasks, which check mode does not carry out, will make what the tablespaces need."""
        if not self.check or (self.engine.record is not None and self._has_cluster()):
            return False
        self._warn(f"Cluster {self.engine.request.cluster} is not there yet: earlier tasks will make it.")
        return True

    def _has_cluster(self) -> bool:
        return os.path.lexists(os.path.join(self.options.data_directory or "/nonexistent", "PG_VERSION"))

    def _coming(self) -> tuple[Decision, Facts]:
        """The tablespaces that are to come."""
        self._state = self.engine.state(self.acts)
        steps = [
            Step(
                "create_tablespace",
                f"tablespace {item.name}",
                "once there is a keystore",
                {"name": item.name, "path": self._location(item), "owner": item.owner, "algorithm": item.algorithm},
            )
            for item in self.wish.items
        ]
        return Decision(steps), public.facts(self.options, self.state)

    # --- deciding

    def _decide(self) -> tuple[Decision, Facts]:
        self.engine.reread()
        self._state = state = self.engine.state(self.acts)
        self.engine.usable(state)
        answer = self._answer(state)
        steps: Plan = []
        facts = public.facts(self.options, state)
        for item in self.wish.items:
            steps += self._tablespace(item, answer)
            found = answer.tablespace(item.name)
            if found:
                facts["tablespaces"][item.name] = {
                    "location": found.location,
                    "owner": found.owner,
                    "algorithm": self._algorithm(item.name),
                }
        if any(step.action in ("create_tablespace", "set_algorithm") for step in steps):
            self._check_open(state)
            if answer.standbys:
                self._warn(
                    f"{answer.standbys} standbys are attached: each stops replaying until the same directory is there, and its own keystore is open."
                )
        algorithms = established(state.server.facts, "the server's facts").algorithms or {}
        steps += plan_moves(state.server.access, answer, self.wish.items, list(algorithms))
        return Decision(steps), facts

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _answer(self, state: look.State) -> postgres.Server:
        """The server's facts, if tablespaces can be made on it.

        :raises TdeError: ``server_down``, ``server_is_standby``.
        """
        answer = state.server.answer
        if answer is None:
            raise established(state.server.error, "the error")
        if answer.standby:
            raise TdeError(
                "server_is_standby",
                "is a standby",
                obj=f"server at {state.server.access.where}",
                next_step="Run this on the primary.",
            )
        if established(state.server.facts, "the server's facts").algorithms is None:
            raise TdeError(
                "server_other_product",
                "has no view pgx_tablespaces, so nothing tells what is encrypted",
                obj=f"server at {state.server.access.where}",
                next_step="Name the socket and port of an Enterprise Postgres with encryption.",
            )
        return answer

    def _check_open(self, state: look.State) -> None:
        """Refuse before anything is made what the server would refuse after.

        :raises TdeError: ``keystore_closed``.
        """
        if state.known_open or (plan.ready(self.options, state) and state.made and plan.opens_by_itself(self.options, state)):
            return
        if not plan.ready(self.options, state):
            said = "the server runs without the keystore's settings; it must be restarted"
        elif not state.made:
            said = "there is no master key yet"
        else:
            said = "it is not known to have been opened since the server's start"
        if self.check:
            self._warn(f"The keystore is not open ({said}): an earlier task must open it.")
            return
        raise TdeError("keystore_closed", said, obj=f"keystore of cluster {self.engine.request.cluster}")

    def _algorithm(self, name: str) -> str:
        return (established(self.state.server.facts, "the server's facts").algorithms or {}).get(name, "none")

    def _location(self, item: TablespaceWish) -> str:
        answer = self.state.server.answer
        found = answer.tablespace(item.name) if answer else None
        if item.location:
            location = item.location
        elif found:
            location = found.location
        elif self.options.tablespace_directory:
            location = os.path.join(self.options.tablespace_directory, item.name)
        else:
            raise TdeError(
                "invalid_option", "needs a location, for there is no tablespace_directory", obj=f"tablespace {item.name}"
            )
        if not os.path.isabs(location):
            raise TdeError("invalid_option", "must be an absolute path", obj=f"location {location!r}")
        return os.path.normpath(location)

    def _tablespace(self, item: TablespaceWish, answer: postgres.Server) -> Plan:
        location, found = self._location(item), answer.tablespace(item.name)
        obj = f"tablespace {item.name}"
        data = {"name": item.name, "path": location, "owner": item.owner, "algorithm": item.algorithm}
        if found is None:
            return [
                *self._directory(item, location, answer),
                Step("create_tablespace", obj, f"it is not there, {item.algorithm}", data),
            ]
        if os.path.realpath(found.location) != os.path.realpath(location):
            raise TdeError(
                "tablespace_elsewhere",
                f"was made at {found.location}",
                obj=obj,
                next_step="Leave location out, or name that one.",
            )
        steps: Plan = []
        algorithm = self._algorithm(item.name)
        if algorithm != item.algorithm:
            held = holds(found.location)
            if held:
                raise TdeError(
                    "tablespace_not_empty",
                    f"its algorithm is {algorithm}, and it holds {held} files",
                    obj=obj,
                    next_step=f"Create a tablespace with {item.algorithm} of another name and move the data there.",
                )
            steps.append(Step("set_algorithm", obj, f"it has {algorithm} and is empty", data))
        if item.owner and found.owner != item.owner:
            steps.append(Step("set_tablespace_owner", obj, f"it belongs to {found.owner}", data))
        return steps

    def _directory(self, item: TablespaceWish, location: str, answer: postgres.Server) -> Plan:
        """The step that makes the directory; one that is there must be the server's user's and empty.

        :raises TdeError: ``place_not_directory``, ``place_not_empty``, ``place_inside_data_directory``, ``file_not_private``.
        """
        obj = f"location {location}"
        data = os.path.realpath(answer.data_directory)
        here = os.path.realpath(location)
        if f"{here}/".startswith(f"{data}/") or f"{data}/".startswith(f"{here}/"):
            raise TdeError(
                "place_inside_data_directory", f"overlaps the data directory {data}", obj=obj, next_step="Choose another place."
            )
        taken = next((one.name for one in answer.tablespaces if one.location == location), "")
        if taken:
            raise TdeError("place_not_empty", f"is that of tablespace {taken}", obj=obj, next_step="Choose another location.")
        uid = self.options.account().pw_uid
        try:
            info = os.lstat(location)
        except FileNotFoundError:
            parent = os.path.dirname(location)
            if os.path.lexists(parent):
                check_parents(location, [uid])
            return [Step("make_tablespace_directory", location, "it is missing", {"path": location})]
        except OSError as exc:
            raise os_error(exc, location) from None
        if not stat.S_ISDIR(info.st_mode):
            raise TdeError("place_not_directory", "is a symbolic link or not a directory", obj=obj)
        if os.listdir(location):
            raise TdeError("place_not_empty", "is not empty", obj=obj, next_step="Find out what is in it, and move it away.")
        if info.st_uid != uid or stat.S_IMODE(info.st_mode) != 0o700:
            return [Step("make_tablespace_directory", location, "it is not the server's user's own", {"path": location})]
        return []

    # --- acting

    def _run(self, steps: Plan) -> Plan:
        from .engine import run_steps

        self.acts.record = self.engine.known()
        access = self.state.server.access
        with move.Mover(access, self.wish.lock_timeout) as mover:
            try:
                run_steps(self.acts, steps, {**self._handlers(access), **_moves(mover)})
            finally:
                self.progress += mover.progress.rows
        return steps

    def _handlers(self, access: postgres.Access) -> Handlers:
        return {
            "make_tablespace_directory": self.acts.make_directory,
            "create_tablespace": lambda step: self._create(access, step),
            "set_algorithm": lambda step: self._alter(access, step),
            "set_tablespace_owner": lambda step: self._owner(access, step),
        }

    def _create(self, access: postgres.Access, step: Step) -> None:
        data = step.data
        try:
            with postgres.connect(access) as connection:
                sql.create_tablespace(connection, data["name"], data["path"], data["owner"], data["algorithm"])
        except TdeError as exc:
            # Nothing was put into it.
            with contextlib.suppress(OSError):
                os.rmdir(data["path"])
            raise self._refused(exc, step) from None
        self.acts.note("create_tablespace", step.obj, algorithm=data["algorithm"], path=data["path"])

    def _alter(self, access: postgres.Access, step: Step) -> None:
        try:
            with postgres.connect(access) as connection:
                # What was dropped or moved away leaves its files until the next checkpoint.
                postgres.checkpoint(connection)
                sql.set_algorithm(connection, step.data["name"], step.data["algorithm"])
        except TdeError as exc:
            raise self._refused(exc, step) from None
        self.acts.note("set_algorithm", step.obj, algorithm=step.data["algorithm"])

    def _refused(self, exc: TdeError, step: Step) -> TdeError:
        """A refusal by a server whose keystore is not known to be open: its answer is documented nowhere."""
        if exc.code != "server_failed" or self.state.known_open:
            return exc
        return TdeError(
            "keystore_closed",
            f"the server refused, and the keystore is not known to be open: {exc.message}",
            obj=step.obj,
            details=exc.details,
        )

    def _owner(self, access: postgres.Access, step: Step) -> None:
        with postgres.connect(access) as connection:
            postgres.set_owner(connection, step.data["name"], step.data["owner"])


def holds(location: str) -> int:
    """How many files with content lie in a tablespace, by its directory.

    :raises TdeError: ``io_error`` and its kind.
    """

    def failed(exc: OSError) -> None:
        raise os_error(exc, location)

    count = 0
    for folder, dummy, names in os.walk(location, onerror=failed):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                count += os.lstat(os.path.join(folder, name)).st_size > 0 and name != "PG_VERSION"
    return count


def _moves(mover: move.Mover) -> Handlers:
    def database(step: Step) -> None:
        # If somebody came in meanwhile nothing happened; the next plan moves relation by relation.
        mover.move_database(step.data["database"], step.data["target"], step.data["from"])

    return {
        "move_database": database,
        "move_relation": lambda step: mover.move_relation(
            step.data["database"], move.Relation(**step.data["relation"]), step.data["target"]
        ),
        "move_large_objects": lambda step: mover.move_large_objects(step.data["database"], step.data["target"]),
        "set_default_tablespace": lambda step: mover.set_default(step.data["database"], step.data["target"]),
    }
