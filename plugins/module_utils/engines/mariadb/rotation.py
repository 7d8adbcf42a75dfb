# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Rotation: of the master key, which wraps the data keys anew; and, if asked for, of the data keys, which encrypts the tables anew.

The second is marked in the cluster's record before it begins, with the master key's label that names it and the highest number
that a data key had by then: all that is left to do follows from the mark, so that any later run ends what one began.
"""

from __future__ import annotations

import datetime
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.plan import Plan
from .. import keyslots
from ..base import MasterKeyWish, Outcome
from ..keyfacts import key_facts
from ..keyring import Keyring
from ..rounds import Decision
from . import keyfile, look, plan
from .act import Acts
from .engine import Facts, MariaDb, with_mark
from .plan import MARK

#: Of the master key and the mark; the data keys come when these are done, so that they are under the new master key.
_FIRST = ("write_record", "create_kek", "add_keyslot", "prove_keyslot", "remove_keyslot")


class Rotation:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: MariaDb, wish: MasterKeyWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check
        if engine.record is None and not check:
            engine.known()
        self.ring: Keyring = engine.keyring([], check)
        self.token = self.ring.rotate_in(wish.keyslot)
        self.today = datetime.datetime.now(datetime.timezone.utc).date()
        self.acts = Acts(engine.request, engine.options, self.ring)
        self.unknown: TdeError | None = None

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        ring, engine = self.ring, self.engine
        ring.log_in(ring.wanted())
        # New data keys have all the keyslots that the others have.
        rotated = ring.wish(self.wish.keyslot)
        ring.same_as_before()
        ring.wishes = [rotated, *(one for one in ring.wishes if one.name != self.wish.keyslot)]
        outcome = engine.rounds(self._decide, ring, self.acts, check=self.check, first=_FIRST)
        if outcome.changed and not self.check:
            self._note()
        if self.unknown:
            outcome.warnings.append(f"Whether the re-encryption that was begun has ended cannot be told: {self.unknown}")
        current = keyslots.current_label(engine.request.cluster, self.token, ring.keys, ring.keks)
        outcome.facts.update(
            {
                "cluster": engine.request.cluster,
                "master_key": current,
                "age_days": keyslots.age(current, self.token, ring.keys, ring.keks, self.today),
                "data_keys": key_facts(ring.keys),
            }
        )
        return outcome

    def _note(self) -> None:
        self.ring.journal.append(
            "rotate_master_key",
            f"keyslot {self.wish.keyslot} {self.token.where}",
            cluster=self.engine.request.cluster,
            tag=self.wish.tag,
            max_age=self.wish.max_age,
            reencrypt=self.engine.options.reencrypt,
            tables=[row["object"] for row in self.acts.progress],
            keys=[key.key_id for key in self.ring.keys],
        )

    def _decide(self) -> tuple[Decision, Facts]:
        engine, ring = self.engine, self.ring
        engine.reread()
        ring.look()
        rotated = self.wish.state == "rotated"
        rewrap = keyslots.rotate(
            engine.request.cluster,
            ring.keys,
            ring.keks,
            slot=self.wish.keyslot,
            token=self.token,
            tag=self.wish.tag if rotated else None,
            max_age=self.wish.max_age if rotated else None,
            today=self.today,
        )
        current = keyslots.current_label(engine.request.cluster, self.token, ring.keys, ring.keks)
        target = next((str(step.data["kek_label"]) for step in rewrap if "kek_label" in step.data), current)
        names = keyfile.names(key.key_id for key in ring.keys)
        mark = engine.record.options.get(MARK) if engine.record else None
        begin: Plan = []
        if rotated and engine.options.reencrypt and names and engine.record and self._due(mark, current, target):
            mark = {"label": target, "above": max(name.number for name in names)}
            begin = engine.record_step(
                with_mark(engine.record, mark), "the re-encryption that the tag names, and where it begins"
            )
        state = engine.state(ask=bool(mark))
        if not mark:
            return Decision(begin + rewrap), engine.facts(ring, state)
        self.unknown = self._not_ready(state)
        if self.unknown and not (rotated and engine.options.reencrypt):
            return Decision(begin + rewrap), engine.facts(ring, state)
        if self.unknown:
            raise self.unknown
        decision = self._reencrypt(state, names, int(mark["above"]))
        decision.now = begin + rewrap + decision.now
        return decision, engine.facts(ring, state)

    def _not_ready(self, state: look.State) -> TdeError | None:
        """Why tables cannot be looked at now, or the server not be given new keys."""
        if state.answer is None:
            return state.error or TdeError("server_down", "does not answer", obj="MariaDB")
        if not state.mounted:
            return TdeError(
                "place_closed",
                "is not mounted, so the server could not be given new keys",
                obj=self.engine.options.key_directory,
                next_step="Open the keystore: tde_keystore with state=open, or hsm-tde open.",
            )
        return None

    def _due(self, mark: t.Mapping[str, t.Any] | None, current: str, target: str) -> bool:
        """Whether a re-encryption begins: with a tag that it has not been done for, or with a master key that is too old."""
        if mark and mark["label"] == target:
            return False
        return self.wish.tag is not None or target != current

    def _reencrypt(self, state: look.State, names: t.Sequence[keyfile.Name], above: int) -> Decision:
        """What is left of a re-encryption."""
        engine, ring, options = self.engine, self.ring, self.engine.options
        coming = plan.new_generation(names, above)
        self.acts.access = state.access
        answer = established(state.answer, "the server's answer")
        plan.check_ours(options, answer)
        steps = plan.data_keys(
            coming, ring.keys, ring.wanted(), no_recovery=True, why="a new key for the tables of its tablespace"
        )
        steps += plan.delivery(options, engine.request.cluster, state, ring.keys, coming)
        every = sorted([*names, *coming])
        wished = {table: plan.tablespace_of(table, answer, names) for table in plan.own(answer)}
        tables = plan.tables(wished, answer, keyfile.current(every))
        restart = plan.restart_reasons(options, state, every)
        # New keys, too, are unknown to the server until it has read them.
        ready = [step for step in tables if state.has_loaded(step.data["key"])]
        later = [step for step in tables if step not in ready]
        if later and not restart:
            restart = [f"It has not read key {', '.join(sorted({str(step.data['key']) for step in later}))}."]
        return Decision(steps + ready, later, restart)
