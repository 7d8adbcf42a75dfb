# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine postgresql: stock PostgreSQL on directories that the kernel encrypts with our data keys."""

from __future__ import annotations

import datetime
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Plan
from ...storage import fscrypt
from .. import keyslots
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyfacts import key_facts
from ..keyring import Keyring
from ..rounds import Decision, rounds
from . import look, plan, public
from .act import Acts
from .options import Options, complete

if t.TYPE_CHECKING:
    from ...storage.proof import ProofTarget

Facts = t.Dict[str, t.Any]


class Postgresql(Engine):
    """See the module."""

    name = "postgresql"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.options: Options = complete(request.options, self.record.options if self.record else {})

    # --- what all services share

    def keyring(self, wishes: t.Sequence[SlotWish], check: bool) -> Keyring:
        """The cluster's data keys, looked at."""
        ring = Keyring(self.request, wishes, length=fscrypt.KEY_BYTES, check=fscrypt.identifier, dry=check)
        ring.look()
        return ring

    def acts(self, ring: Keyring) -> Acts:
        """The acts on this cluster."""
        record = self.record or records.Record(self.request.cluster, self.name)
        return Acts(self.request, self.options, record, ring)

    def places(self, ring: Keyring, *, pending: t.Container[str] = ()) -> list[plan.PlaceFacts]:
        """Every place that the record or the journal names.

        :param pending: mount points at which nothing can be seen yet.
        """
        made = self.made()
        named = {place.key_id: place for place in self.record.places} if self.record else {}
        found = []
        for key_id in sorted({*named, *made}):
            place = named.get(key_id)
            path = place.path if place else made[key_id]
            hidden = bool(place and place.mount_point in pending)
            found.append(look.place(key_id, path, ring.key(key_id), place, journalled=made.get(key_id, ""), pending=hidden))
        return found

    def rounds(self, decide: t.Callable[[], tuple[Decision, Facts]], run: t.Callable[[Plan], Plan], *, check: bool) -> Outcome:
        """Look, decide and act until there is nothing left to do; see :func:`engines.rounds.rounds`."""
        return rounds(self.request.cluster, decide, run, public.expected, check=check)

    def same_file_system(self, storage: look.Storage) -> None:
        """Refuse to work beside a file system that is not mounted.

        :raises TdeError: ``place_unreachable``.
        """
        record = self.record
        if (
            record is None
            or not record.file_system
            or not storage.mounted
            or record.options.get("mount_point") != storage.wish.mount_point
        ):
            return
        found = look.file_system(storage.wish.mount_point)
        if found != record.file_system and record.options.get("image") == storage.wish.image:
            raise TdeError(
                "place_unreachable",
                "another file system lies there than when the keystore was made",
                obj=storage.wish.mount_point,
                kept="Nothing was created in its place.",
                next_step="Mount the file system with the encrypted places, then run again.",
                details={"recorded": record.file_system, "found": found},
            )

    def made(self) -> dict[str, str]:
        return look.made_places(Journal(self.request.state.journal).entries(), self.request.cluster)

    # --- the services

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        from .keystore import Keystore

        with self.locked(check):
            self.reread()
            return Keystore(self, wish, check).outcome()

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        with self.locked(check):
            self.reread()
            if self.record is None and not check:
                self.known()
            ring = self.keyring([], check)
            token = ring.rotate_in(wish.keyslot)
            ring.log_in(ring.wanted())
            rotated = wish.state == "rotated"
            today = datetime.datetime.now(datetime.timezone.utc).date()

            def decide() -> tuple[Decision, Facts]:
                ring.look()
                steps = keyslots.rotate(
                    self.request.cluster,
                    ring.keys,
                    ring.keks,
                    slot=wish.keyslot,
                    token=token,
                    tag=wish.tag if rotated else None,
                    max_age=wish.max_age if rotated else None,
                    today=today,
                )
                return Decision(steps), public.facts(ring.keys, ring.keks, [], self.record)

            def note(result: str) -> None:
                if rotated:
                    obj = f"keyslot {wish.keyslot} {token.where}"
                    keys = [key.key_id for key in ring.keys]
                    ring.journal.append(
                        "rotate_master_key",
                        obj,
                        result=result,
                        cluster=self.request.cluster,
                        tag=wish.tag,
                        max_age=wish.max_age,
                        keys=keys,
                    )

            def run(steps: Plan) -> Plan:
                ring.ready(steps)
                note("begun")
                plans.run(steps, ring.handlers())
                note("done")
                return steps

            outcome = self.rounds(decide, run, check=check)
            current = keyslots.current_label(self.request.cluster, token, ring.keys, ring.keks)
            outcome.warnings += ring.warnings
            outcome.facts.update(
                {
                    "cluster": self.request.cluster,
                    "master_key": current,
                    "age_days": keyslots.age(current, token, ring.keys, ring.keks, today),
                    "data_keys": key_facts(ring.keys),
                }
            )
            return outcome

    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        from .tablespaces import Tablespaces

        with self.locked(check):
            self.reread()
            return Tablespaces(self, wish, check).outcome()

    def info(self) -> Facts:
        from .info import collect

        return collect(self)

    def proof_targets(self, wish: ProofWish) -> list[ProofTarget]:
        from .targets import proof_targets

        return proof_targets(self, wish)
