# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The keystore of a cluster: made with its storage, keyslots and place; opened; closed."""

from __future__ import annotations

import dataclasses
import typing as t

from ...common import plan as plans
from ...common.check import established
from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ...storage import image, image_acts
from .. import bootpin, keyslots
from .. import record as records
from ..base import KeystoreWish, Outcome
from ..keyfacts import kek_words, key_facts
from ..keyring import Keyring, default_wish
from ..rounds import Decision
from . import look, plan, public
from . import server as servers
from .options import check_present

if t.TYPE_CHECKING:
    from .engine import Postgresql

Facts = t.Dict[str, t.Any]


class Keystore:
    """One task's work.

    :param engine: the cluster; :param check: check mode.
    """

    def __init__(self, engine: Postgresql, wish: KeystoreWish, check: bool) -> None:
        self.engine = engine
        self.wish = wish
        self.check = check

    def outcome(self) -> Outcome:
        """Carry the wish out."""
        return {"present": self._present, "open": self._open, "closed": self._close}[self.wish.state]()

    def _present(self) -> Outcome:
        check_present(self.engine.options)
        user = self.engine.options.account()
        wish = self.wish
        wishes = wish.slots if wish.slots is not None else [default_wish(self.engine.request)]
        ring = self.engine.keyring(wishes, self.check)
        acts = self.engine.acts(ring)
        ring.log_in(ring.wanted())

        def decide() -> tuple[Decision, Facts]:
            self.engine.reread()
            ring.look()
            update = wish.slots is not None and wish.update
            if update:
                ring.probe(ring.keys)
            wanted = ring.wanted()
            storage = self._storage(sized=True)
            known = self.engine.record is not None or bool(self.engine.made())
            steps = image.plan(storage.wish, storage.state, known=known)
            self.engine.same_file_system(storage)
            pending = {storage.wish.mount_point} if not storage.mounted else set()
            places = self.engine.places(ring, pending=pending)
            for place in places:
                if place.made and not self._hidden(place, pending):
                    plan.check_made(place, ring.key(place.key_id))
            if not ring.store.exists():
                steps.append(Step("create_keystore", ring.store.path, "the folder of the wrapped data keys"))
            steps += self._record_step(ring, storage)
            later: Plan = []
            if update:
                later = keyslots.change(ring.keys, wanted, exclusive=wish.exclusive, no_recovery=wish.no_recovery)
            if self.engine.options.coverage == "cluster":
                place = self._cluster_place(ring, bool(pending))
                # One that was made is judged once its storage is mounted: what hides it tells nothing about it.
                if not (pending and place.made):
                    later += plan.make_place(
                        place, ring.key(plan.CLUSTER_KEY), wanted, owner=user.pw_uid, no_recovery=wish.no_recovery
                    )
                    later += self._fill(place)
            later = bootpin.before_removals(later, bootpin.pin_steps(ring, self._pin_source()))
            steps += keyslots.master_keys(ring.keys, ring.keks, wanted, later) + later
            return Decision(steps), public.facts(ring.keys, ring.keks, places, self.engine.record, storage)

        def run(steps: Plan) -> Plan:
            storage = image_acts.handlers(self._storage(sized=True).wish)
            ring.ready(steps)
            acts.record = self.engine.record or acts.record
            # What the storage hides is looked at before the next step.
            first = [step for step in steps if step.action in storage] or steps
            plans.run(first, {**storage, **ring.handlers(), **acts.handlers()})
            return first

        outcome = self.engine.rounds(decide, run, check=self.check)
        outcome.warnings += ring.warnings
        if self.engine.options.coverage == "tablespaces" and len(wishes) < 2 and not ring.keys and not wish.no_recovery:
            outcome.warnings.append(
                "Only one keyslot is listed: the first tablespace will ask for a second one, or for no_recovery."
            )
        outcome.facts.update(self._keystore_facts(ring))
        return outcome

    def _storage(self, *, sized: bool) -> look.Storage:
        return look.storage(established(self.engine.options.storage_wish(sized=sized), "the wish"))

    def _cluster_place(self, ring: Keyring, pending: bool) -> plan.PlaceFacts:
        path = t.cast(str, self.engine.options.data_directory)
        recorded = self.engine.record.place(plan.CLUSTER_KEY) if self.engine.record else None
        made = self.engine.made()
        there = recorded.path if recorded else made.get(plan.CLUSTER_KEY, path)
        if there != path:
            raise TdeError(
                "invalid_option",
                f"the cluster's place is {there}, not {path}",
                obj="option data_directory",
                next_step="Name that one; or take another name for another cluster.",
            )
        return look.place(
            plan.CLUSTER_KEY,
            path,
            ring.key(plan.CLUSTER_KEY),
            recorded,
            journalled=made.get(plan.CLUSTER_KEY, ""),
            pending=pending,
        )

    def _fill(self, place: plan.PlaceFacts) -> Plan:
        how = "initdb"
        debian = self.engine.options.debian_cluster
        if debian and self.engine.options.create_cluster:
            how = "pg_createcluster"
            found = servers.debian_cluster(debian)
            if found and found.data_directory != place.path:
                raise TdeError(
                    "cluster_exists",
                    f"exists with data directory {found.data_directory}",
                    obj=f"cluster {debian}",
                    next_step="Take another name; an existing cluster is not encrypted in place.",
                )
        return plan.fill_cluster(place, create=self.engine.options.create_cluster, how=how)

    def _record_step(self, ring: Keyring, storage: look.Storage) -> Plan:
        """The record comes before the places, so that the next boot knows what hides them."""
        before = self.engine.record or records.Record(self.engine.request.cluster, self.engine.name)
        after = before
        for token in ring.recorded_tokens():
            after = after.with_token(token)
        for service in ring.services():
            after = after.with_service(service)
        source = dict(before.pin_source)
        if self.wish.pin_source is not None:
            source = {name: value for name, value in self.wish.pin_source.items() if value is not None}
        file_system = look.file_system(storage.wish.mount_point) if storage.mounted else before.file_system
        after = dataclasses.replace(after, options=self.engine.options.given, pin_source=source, file_system=file_system)
        if after == self.engine.record:
            return []
        path = self.engine.request.state.cluster_record(self.engine.request.cluster)
        return [Step("write_record", path, "what the next boot needs to know", {"record": after.public()})]

    def _pin_source(self) -> t.Mapping[str, t.Any]:
        """Where the PIN for the boot comes from: the task's wish, else as it is recorded."""
        if self.wish.pin_source is not None:
            return self.wish.pin_source
        return self.engine.record.pin_source if self.engine.record else {}

    def _keystore_facts(self, ring: Keyring) -> Facts:
        ring.look()
        server = look.server(self.engine.request.connection, self.engine.options, ask=False)
        create = self.engine.options.coverage == "cluster" and self.engine.options.create_cluster
        return {
            "cluster": self.engine.request.cluster,
            "data_keys": key_facts(ring.keys),
            "master_keys": kek_words(ring.keks),
            "start_required": create and server.postmaster is None,
        }

    def _open(self) -> Outcome:
        if self.engine.record is None and self.check:
            cluster = self.engine.request.cluster
            outcome = Outcome([Step("open_keystore", f"cluster {cluster}", "once it is made")], {}, {}, {"cluster": cluster})
            outcome.warnings.append(f"Cluster {cluster} has no record yet: an earlier task will make it.")
            return outcome
        self.engine.known()
        ring = self.engine.keyring([], self.check)
        acts = self.engine.acts(ring)
        storage = None

        def decide() -> tuple[Decision, Facts]:
            nonlocal storage
            ring.look()
            steps: Plan = []
            pending = set()
            wish = self.engine.options.storage_wish(sized=False)
            storage = look.storage(wish) if wish and wish.image else None
            if storage and not storage.mounted:
                steps = image.plan(storage.wish, storage.state, known=True)
                pending = {storage.wish.mount_point}
            places = self.engine.places(ring, pending=pending)
            hidden = [place for place in places if self._hidden(place, pending)]
            steps += [plan.add_kernel_key(place) for place in hidden if place.made]
            keys = {key.key_id: key for key in ring.keys}
            steps += plan.open_places([place for place in places if place not in hidden], keys)
            return Decision(steps), public.facts(ring.keys, ring.keks, places, self.engine.record)

        def run(steps: Plan) -> Plan:
            ring.ready(steps)
            # What was hidden is judged before it gets its key.
            first = [step for step in steps if step.action != "add_kernel_key"] or steps
            plans.run(first, {**(image_acts.handlers(storage.wish) if storage else {}), **acts.handlers()})
            return first

        outcome = self.engine.rounds(decide, run, check=self.check)
        outcome.warnings += ring.warnings
        outcome.facts["cluster"] = self.engine.request.cluster
        return outcome

    def _hidden(self, place: plan.PlaceFacts, pending: t.Container[str]) -> bool:
        recorded = self.engine.record.place(place.key_id) if self.engine.record else None
        return bool(recorded and recorded.mount_point in pending)

    def _close(self) -> Outcome:
        self.engine.known()
        ring = self.engine.keyring([], self.check)
        acts = self.engine.acts(ring)

        def decide() -> tuple[Decision, Facts]:
            places = [place for place in self.engine.places(ring) if place.exists]
            server = look.server(self.engine.request.connection, self.engine.options, ask=not self.wish.force)
            running = ""
            if server.postmaster:
                running = f"the server runs (process {server.postmaster.pid})"
            elif server.answer:
                running = f"the server answers at {server.access.where}"
            users = [f"{one.name} ({one.pid})" for place in places for one in servers.holders(place.path)]
            steps = plan.close_places(places, running=running, users=users, force=self.wish.force)
            return Decision(steps), public.facts(ring.keys, ring.keks, places, self.engine.record)

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

        outcome = self.engine.rounds(decide, run, check=self.check)
        outcome.facts["cluster"] = self.engine.request.cluster
        return outcome
