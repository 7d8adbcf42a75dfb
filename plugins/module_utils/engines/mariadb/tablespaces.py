# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tables put under the key of a tablespace, which here is a name for a key and the tables under it, while the server runs."""

from __future__ import annotations

import typing as t

from ...common.errors import TdeError
from .. import keyslots
from ..base import Outcome, TablespacesWish, TablespaceWish
from ..rounds import Decision
from . import keyfile, plan, sql
from .act import Acts
from .engine import Facts, MariaDb

#: What building tables anew leaves behind.
FREED = (
    "The blocks that the tables took before keep their former content until they are written over: run fstrim on the file system "
    "where its device can, or fill its free space once. Older binary logs and backups keep theirs for good."
)
#: What no table option changes.
FULL_TEXT = "Full-text indexes lie in tables of their own, which the server keeps under key 1."


class Tablespaces:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: MariaDb, wish: TablespacesWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        _check_wishes(wish.items)
        if engine.record is None and not check:
            engine.known()
        self.ring = engine.keyring(wish.slots or (), check)
        if wish.slots is None:
            self.ring.same_as_before()
        self.acts = Acts(engine.request, engine.options, self.ring)
        self.acts.lock_seconds = wish.lock_timeout
        self.answer: sql.Server | None = None
        self.names: list[keyfile.Name] = []

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        outcome = self.engine.rounds(self._decide, self.ring, self.acts, check=self.check)
        if self.engine.record is None:
            outcome.warnings.append(f"Cluster {self.engine.request.cluster} has no record yet: an earlier task will make it.")
        outcome.facts.update(self._facts(outcome))
        return outcome

    def _decide(self) -> tuple[Decision, Facts]:
        engine, ring, options = self.engine, self.ring, self.engine.options
        engine.reread()
        ring.look()
        state = engine.state()
        if state.answer is None:
            raise state.error or TdeError("server_down", "does not answer", obj="MariaDB")
        self.answer, self.acts.access = state.answer, state.access
        plan.check_ours(options, state.answer)
        self.names = names = keyfile.names(key.key_id for key in ring.keys)
        there = keyfile.current(names)
        following = max([max(keyfile.FIRST), *(name.number for name in names)]) + 1
        missing = [item.name for item in self.wish.items if item.name not in (*there, keyfile.DEFAULT)]
        coming = [keyfile.Name(following + number, name) for number, name in enumerate(missing)]
        if names and not state.mounted and not self.check:
            raise TdeError(
                "place_closed",
                "is not mounted, so the server could not be given its keys",
                obj=options.key_directory,
                next_step="Open the keystore: tde_keystore with state=open, or hsm-tde open.",
            )
        steps = []
        if coming:
            wanted = ring.wanted()
            made = plan.data_keys(
                coming, ring.keys, wanted, no_recovery=self.wish.no_recovery, why="a key for the tables of its tablespace"
            )
            steps = keyslots.master_keys(ring.keys, ring.keks, wanted, made) + made
        if names:
            steps += plan.delivery(options, engine.request.cluster, state, ring.keys, coming)
        # In check mode on a new host: with those that tde_keystore will make.
        first = [] if names else [keyfile.Name(number, name) for number, name in keyfile.FIRST.items()]
        every = sorted([*names, *first, *coming])
        wished = plan.wishes(self.wish.items, state.answer, names)
        tables = plan.tables(wished, state.answer, keyfile.current(every))
        ready = [step for step in tables if state.has_loaded(step.data["key"])]
        later = [step for step in tables if step not in ready]
        restart = plan.restart_reasons(options, state, every)
        if (later or coming) and not restart:
            restart = ["It has not read the keys of these tablespaces."]
        facts = engine.facts(ring, state)
        facts["tables"] = {
            table.words: [f"key {space.key}" if space.encrypted else "plain" for space in state.answer.spaces_of(table)]
            for table in wished
        }
        return Decision(steps + ready, later, restart), facts

    def _facts(self, outcome: Outcome) -> Facts:
        notes = []
        if any(step.action == "encrypt_table" for step in outcome.plan):
            notes += [FREED, FULL_TEXT]
        answer = self.answer
        if answer:
            named = {name for item in self.wish.items for name in plan.databases(item.move)}
            notes += [
                f"Table {table.words} is of {table.engine}, whose tables have no key of their own: change it to InnoDB."
                for table in plan.left_out(named, answer)
            ]
        there = keyfile.current(self.names)
        return {
            "cluster": self.engine.request.cluster,
            "tablespaces": [
                {
                    "name": item.name,
                    "location": answer.data_directory if answer else None,
                    "key_id": name.key_id if name else None,
                    "check_value": key.check_value if key else None,
                    "algorithm": "AES256",
                }
                for item in self.wish.items
                for name in [keyfile.Name(there[item.name], item.name) if item.name in there else None]
                for key in [self.ring.key(name.key_id) if name else None]
            ],
            "moved": self.acts.progress,
            "notes": notes,
        }


def _check_wishes(items: t.Sequence[TablespaceWish]) -> None:
    """Refuse names that cannot be, what means nothing here, and two wishes for one thing.

    :raises TdeError: ``invalid_option``, ``tablespace_name_reserved``, ``engine_unsupported``.
    """
    seen: dict[tuple[str, str], str] = {}
    for item in items:
        obj = f"tablespace {item.name!r}"
        if not keyfile.NAME.fullmatch(item.name):
            raise TdeError("invalid_option", "must be 1 to 45 of A-Z a-z 0-9 _ . - and begin with a letter or digit", obj=obj)
        if item.name in (keyfile.SYSTEM, keyfile.TEMPORARY):
            raise TdeError("tablespace_name_reserved", "is the name of a key of the server's own", obj=obj)
        if item.location or item.owner:
            raise TdeError("engine_unsupported", "It has neither location nor owner: its tables stay where they are.", obj=obj)
        wishes = [("tablespace", item.name)]
        wishes += [("table", name) for name in item.move.tables]
        wishes += [("database", name) for name in plan.databases(item.move)]
        for name in wishes:
            if name in seen:
                raise TdeError("invalid_option", f"is listed for tablespace {seen[name]} and for {item.name}", obj=" ".join(name))
            seen[name] = item.name
