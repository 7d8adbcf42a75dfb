# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine postgresql: stock PostgreSQL on directories that the kernel encrypts with our data keys."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import typing as t

from ...common import plan as plans
from ...common.check import established
from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Plan, Step
from ...common.secret import Secret
from ...pkcs11.resting import resting_pins
from ...storage import fscrypt, image, image_acts
from .. import keyslots
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyring import Keyring
from . import look, plan, public
from . import server as servers
from .act import Acts
from .options import Options, check_present, complete

if t.TYPE_CHECKING:
    from ...storage.proof import ProofTarget

#: Times that a plan is made and carried out before the run gives up: mounting shows what was hidden, a connection comes
#: into a database that was to move whole, a table is created while its schema moves.
_ROUNDS = 6

Facts = t.Dict[str, t.Any]


class Postgresql(Engine):
    """See the module."""

    name = "postgresql"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.record = records.read(request.state, request.cluster)
        if self.record and self.record.engine != self.name:
            raise TdeError(
                "invalid_option", f"is a cluster of engine {self.record.engine}", obj=f"cluster {request.cluster}", next_step="Name that engine."
            )
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

    def locked(self, check: bool) -> contextlib.AbstractContextManager[None]:
        """One run at a time; a look needs no lock and leaves nothing behind."""
        return contextlib.nullcontext() if check else self.request.state.locked()

    def reread(self) -> None:
        """Read the record again."""
        self.record = records.read(self.request.state, self.request.cluster)

    def known(self) -> records.Record:
        """The record of a cluster that must have one.

        :raises TdeError: ``cluster_unknown``.
        """
        if self.record is None:
            raise TdeError(
                "cluster_unknown",
                f"has no record in {self.request.state.path}",
                obj=f"cluster {self.request.cluster}",
                next_step="Make its keystore first (tde_keystore with state=present).",
            )
        return self.record

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

    def rounds(
        self,
        decide: t.Callable[[], tuple[Plan, Facts]],
        run: t.Callable[[Plan], Plan],
        *,
        check: bool,
    ) -> Outcome:
        """Look, decide and act until there is nothing left to do.

        :param decide: looks, and gives the plan and the public facts; raises before anything is done.
        :param run: carries a plan out, or as much of it as can be done before another look, and says how much.
        :raises TdeError: ``unfinished``.
        """
        steps, before = decide()
        if check:
            return Outcome(steps, before, public.expected(before, steps))
        done: Plan = []
        left, after = steps, before
        for _round in range(_ROUNDS):
            if not left:
                return Outcome(done, before, after)
            try:
                done += run(left)
                left, after = decide()
            except TdeError as error:
                error.after([step.action for step in done])
                raise
        if left:
            raise TdeError(
                "unfinished",
                f"{_ROUNDS} rounds were made, and there is still to do: {left[0].obj} ({left[0].action})",
                obj=f"cluster {self.request.cluster}",
                kept="What was done stays done.",
                next_step="Run again; run with --check to see what is left.",
            )
        return Outcome(done, before, after)

    # --- keystore

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        with self.locked(check):
            self.reread()
            if wish.state == "present":
                return self._present(wish, check)
            if wish.state == "open":
                return self._open(check)
            return self._close(wish, check)

    def _present(self, wish: KeystoreWish, check: bool) -> Outcome:
        check_present(self.options)
        user = self.options.user()
        wishes = wish.slots if wish.slots is not None else [SlotWish("primary", keyslots.TOKEN, access=self.request.access)]
        ring = self.keyring(wishes, check)
        acts = self.acts(ring)
        ring.log_in(ring.wanted())

        def decide() -> tuple[Plan, Facts]:
            self.reread()
            ring.look()
            update = wish.slots is not None and wish.update
            if update:
                ring.probe(ring.keys)
            wanted = ring.wanted()
            storage = self._storage(sized=True)
            known = self.record is not None or bool(self.made())
            steps = image.plan(storage.wish, storage.state, known=known)
            self.same_file_system(storage)
            pending = {storage.wish.mount_point} if not storage.mounted else set()
            places = self.places(ring, pending=pending)
            for place in places:
                if place.made and not self._hidden(place, pending):
                    plan.check_made(place, ring.key(place.key_id))
            if not ring.store.exists():
                steps.append(Step("create_keystore", ring.store.path, "the folder of the wrapped data keys"))
            steps += self._record_step(ring, wish, storage)
            later: Plan = []
            if update:
                later = keyslots.change(ring.keys, wanted, exclusive=wish.exclusive, no_recovery=wish.no_recovery)
            if self.options.coverage == "cluster":
                place = self._cluster_place(ring, bool(pending))
                # One that was made is judged once its storage is mounted: what hides it tells nothing about it.
                if not (pending and place.made):
                    later += plan.make_place(place, ring.key(plan.CLUSTER_KEY), wanted, owner=user.pw_uid, no_recovery=wish.no_recovery)
                    later += self._fill(place)
            steps += keyslots.master_keys(ring.keys, ring.keks, wanted, later) + later + self._pin_steps(ring, wish)
            return steps, public.facts(ring.keys, ring.keks, places, self.record, storage)

        def run(steps: Plan) -> Plan:
            storage = image_acts.handlers(self._storage(sized=True).wish)
            ring.ready(steps)
            acts.record = self.record or acts.record
            acts.pin = self._boot_pin(ring)
            # What the storage hides is looked at before the next step.
            first = [step for step in steps if step.action in storage] or steps
            plans.run(first, {**storage, **ring.handlers(), **acts.handlers()})
            return first

        outcome = self.rounds(decide, run, check=check)
        outcome.warnings += ring.warnings
        if self.options.coverage == "tablespaces" and len(wishes) < 2 and not ring.keys and not wish.no_recovery:
            outcome.warnings.append("Only one keyslot is listed: the first tablespace will ask for a second one, or for no_recovery.")
        outcome.facts.update(self._keystore_facts(ring))
        return outcome

    def _storage(self, *, sized: bool) -> look.Storage:
        return look.storage(established(self.options.storage_wish(sized=sized), "the wish"))

    def same_file_system(self, storage: look.Storage) -> None:
        """Refuse to work beside a file system that is not mounted.

        :raises TdeError: ``place_unreachable``.
        """
        record = self.record
        if record is None or not record.file_system or not storage.mounted or record.options.get("mount_point") != storage.wish.mount_point:
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

    def _cluster_place(self, ring: Keyring, pending: bool) -> plan.PlaceFacts:
        path = t.cast(str, self.options.data_directory)
        recorded = self.record.place(plan.CLUSTER_KEY) if self.record else None
        made = self.made()
        there = recorded.path if recorded else made.get(plan.CLUSTER_KEY, path)
        if there != path:
            raise TdeError(
                "invalid_option",
                f"the cluster's place is {there}, not {path}",
                obj="option data_directory",
                next_step="Name that one; or take another name for another cluster.",
            )
        return look.place(
            plan.CLUSTER_KEY, path, ring.key(plan.CLUSTER_KEY), recorded, journalled=made.get(plan.CLUSTER_KEY, ""), pending=pending
        )

    def _fill(self, place: plan.PlaceFacts) -> Plan:
        how = "initdb"
        debian = self.options.debian_cluster
        if debian and self.options.create_cluster:
            how = "pg_createcluster"
            found = servers.debian_cluster(debian)
            if found and found.data_directory != place.path:
                raise TdeError(
                    "cluster_exists",
                    f"exists with data directory {found.data_directory}",
                    obj=f"cluster {debian}",
                    next_step="Take another name; an existing cluster is not encrypted in place.",
                )
        return plan.fill_cluster(place, create=self.options.create_cluster, how=how)

    def _record_step(self, ring: Keyring, wish: KeystoreWish, storage: look.Storage) -> Plan:
        """The record comes before the places, so that the next boot knows what hides them."""
        before = self.record or records.Record(self.request.cluster, self.name)
        after = before
        for token in ring.recorded_tokens():
            after = after.with_token(token)
        source = dict(before.pin_source)
        if wish.pin_source is not None:
            source = {name: value for name, value in wish.pin_source.items() if value is not None}
        file_system = look.file_system(storage.wish.mount_point) if storage.mounted else before.file_system
        after = dataclasses.replace(after, options=self.options.given, pin_source=source, file_system=file_system)
        if after == self.record:
            return []
        path = self.request.state.cluster_record(self.request.cluster)
        return [Step("write_record", path, "what the next boot needs to know", {"record": after.public()})]

    def _boot_pin(self, ring: Keyring) -> Secret | None:
        """The PIN that opens the keystore at boot: that of the keyslot ``primary``, else the task's."""
        primary = next((wish.access for wish in ring.wishes if wish.name == "primary"), None)
        access = primary or self.request.access
        return access.pin if access else None

    def _pin_steps(self, ring: Keyring, wish: KeystoreWish) -> Plan:
        """The file with the PIN is written last, once the PIN was proved; a token of another PIN gets the file rewritten."""
        source = wish.pin_source if wish.pin_source is not None else (self.record.pin_source if self.record else {})
        if source.get("kind") != "file":
            return []
        path, pin, there = source["path"], self._boot_pin(ring), _at_rest(source["path"])
        if pin is None and not there:
            raise TdeError("credential_missing", "there is no such file, and no PIN was given to write it", obj=f"pin_source {path}")
        if pin is None or pin in there:
            return []
        return [Step("write_pin_source", path, "so that the keystore opens at boot", {"path": path})]

    def _keystore_facts(self, ring: Keyring) -> Facts:
        ring.look()
        server = look.server(self.request.connection, self.options, ask=False)
        create = self.options.coverage == "cluster" and self.options.create_cluster
        return {
            "cluster": self.request.cluster,
            "data_keys": {key.key_id: public.key_facts(key) for key in ring.keys},
            "master_keys": [f"{kek.label} in token {kek.token.label}" for kek in ring.keks],
            "start_required": create and server.postmaster is None,
        }

    def _open(self, check: bool) -> Outcome:
        if self.record is None and check:
            outcome = Outcome([Step("open_keystore", f"cluster {self.request.cluster}", "once it is made")], {}, {})
            outcome.warnings.append(f"Cluster {self.request.cluster} has no record yet: an earlier task will make it.")
            return outcome
        self.known()
        ring = self.keyring([], check)
        acts = self.acts(ring)
        storage = None

        def decide() -> tuple[Plan, Facts]:
            nonlocal storage
            ring.look()
            steps: Plan = []
            pending = set()
            wish = self.options.storage_wish(sized=False)
            storage = look.storage(wish) if wish and wish.image else None
            if storage and not storage.mounted:
                steps = image.plan(storage.wish, storage.state, known=True)
                pending = {storage.wish.mount_point}
            places = self.places(ring, pending=pending)
            hidden = [place for place in places if self._hidden(place, pending)]
            steps += [plan.add_kernel_key(place) for place in hidden if place.made]
            keys = {key.key_id: key for key in ring.keys}
            steps += plan.open_places([place for place in places if place not in hidden], keys)
            return steps, public.facts(ring.keys, ring.keks, places, self.record)

        def run(steps: Plan) -> Plan:
            ring.ready(steps)
            # What was hidden is judged before it gets its key.
            first = [step for step in steps if step.action != "add_kernel_key"] or steps
            plans.run(first, {**(image_acts.handlers(storage.wish) if storage else {}), **acts.handlers()})
            return first

        outcome = self.rounds(decide, run, check=check)
        outcome.facts["cluster"] = self.request.cluster
        return outcome

    def _hidden(self, place: plan.PlaceFacts, pending: t.Container[str]) -> bool:
        recorded = self.record.place(place.key_id) if self.record else None
        return bool(recorded and recorded.mount_point in pending)

    def _close(self, wish: KeystoreWish, check: bool) -> Outcome:
        self.known()
        ring = self.keyring([], check)
        acts = self.acts(ring)

        def decide() -> tuple[Plan, Facts]:
            places = [place for place in self.places(ring) if place.exists]
            server = look.server(self.request.connection, self.options, ask=not wish.force)
            running = ""
            if server.postmaster:
                running = f"the server runs (process {server.postmaster.pid})"
            elif server.answer and os.path.realpath(server.answer.data_directory) == os.path.realpath(server.data_directory):
                running = f"the server answers at {server.access.where}"
            users = [f"{one.name} ({one.pid})" for place in places for one in servers.holders(place.path)]
            steps = plan.close_places(places, running=running, users=users, force=wish.force)
            return steps, public.facts(ring.keys, ring.keks, places, self.record)

        def run(steps: Plan) -> Plan:
            problem: TdeError | None = None
            for step in steps:
                try:
                    plans.run([step], acts.handlers())
                except TdeError as exc:
                    # One place in use keeps no other from being closed.
                    problem = problem or exc
            if problem:
                raise problem
            return steps

        outcome = self.rounds(decide, run, check=check)
        outcome.facts["cluster"] = self.request.cluster
        return outcome

    # --- master key

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        with self.locked(check):
            self.reread()
            if self.record is None and not check:
                self.known()
            if self.request.access is None:
                raise TdeError("invalid_option", "no token was named", obj="options library and token_label")
            ring = self.keyring([SlotWish(wish.keyslot, keyslots.TOKEN, access=self.request.access)], check)
            token = ring.token(self.request.access)
            ring.log_in(ring.wanted())
            rotated = wish.state == "rotated"
            today = datetime.datetime.now(datetime.timezone.utc).date()

            def decide() -> tuple[Plan, Facts]:
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
                return steps, public.facts(ring.keys, ring.keks, [], self.record)

            def note(result: str) -> None:
                if rotated:
                    obj = f"keyslot {wish.keyslot} in token {token.label}"
                    keys = [key.key_id for key in ring.keys]
                    ring.journal.append(
                        "rotate_master_key", obj, result=result, cluster=self.request.cluster, tag=wish.tag, max_age=wish.max_age, keys=keys
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
                    "data_keys": {key.key_id: public.key_facts(key) for key in ring.keys},
                    "restart_required": False,
                }
            )
            return outcome

    # --- tablespaces, in a file of their own

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


def _at_rest(path: str) -> list[Secret]:
    try:
        return resting_pins(path)
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        return []
