# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine keycommand: a server's key or passphrase, wrapped under a key in the token or at a KMIP service, given by ``hsm-tde``
when it asks.

Root prepares what the server's user needs (``userside``); everything with a token, a KMIP service or the user's store is done
by a child that has become that user (``work``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Plan, Step
from ...common.secret import Secret, secret_from_option
from ...keystore.store import KeyStore
from ...kmip import kek
from ...pkcs11.library import LibraryAccess
from ...pkcs11.registry import Registry
from ...pkcs11.token import TokenAccess, TokenSelector
from .. import keyslots
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, SlotWish, TablespacesWish
from ..keyring import default_wish
from ..userside import UserSide
from .options import Options, complete
from .work import Work, opens

if t.TYPE_CHECKING:
    pass

Facts = t.Dict[str, t.Any]

#: A label and an id as a registry takes them from a child that ran as the user; a KMIP server's ids are any text.
_LABEL = re.compile(r"[A-Za-z0-9_.:-]{1,160}")
_ID = {keyslots.TOKEN: re.compile(r"(?:[0-9a-f]{2}){1,64}"), keyslots.KMIP: re.compile(r"[\x20-\x7e]{1,255}")}


class Keycommand(Engine):
    """See the module."""

    name = "keycommand"
    asks_command = True
    refuses: t.ClassVar[t.Mapping[str, str]] = {
        "close": "nothing is held open: the server asks the command at each start, and keeps the key in its own memory until it stops",
        "tablespaces": "the server encrypts its whole data directory or nothing: that was decided when initdb made it",
        "move": "the server encrypts its whole data directory or nothing: that was decided when initdb made it",
    }

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.given = secret_from_option("secret", request.options.get("secret"))

    # --- what all services share

    @functools.cached_property
    def options(self) -> Options:
        """The task's dictionary, completed.

        :raises TdeError: ``invalid_option``.
        """
        recorded = self.record.options if self.record else {}
        return complete({key: value for key, value in self.request.options.items() if key != "secret"}, recorded)

    def side(self) -> UserSide:
        """The command side of the cluster."""
        return UserSide(self.request.state, self.request.cluster, self.options.account())

    def own_request(self, side: UserSide) -> Request:
        """The task's request on the user's own state directory."""
        return dataclasses.replace(self.request, state=side.own, options=self.options.given)

    def _locked(self, check: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if check else self.request.state.locked()

    def _work(
        self, side: UserSide, wishes: t.Sequence[SlotWish], act: t.Callable[[Work], Facts], check: bool
    ) -> tuple[Plan, Facts]:
        """Work as the user: the steps, and what came of them."""
        request, services = self.own_request(side), self.record.kmip if self.record else ()
        facts = side.run(lambda: act(Work(request, self.options, wishes, services, given=self.given, check=check)))
        steps = [Step(**step) for step in facts.pop("plan")]
        if not check:
            self._remember(side, steps, facts)
        return steps, facts

    def _remember(self, side: UserSide, steps: Plan, facts: Facts) -> None:
        """Root's own memory of what was done as the user: who would destroy a key asks it."""
        registry, journal = Registry(self.request.state), Journal(self.request.state.journal)
        # Empty: the store is the user's. Where the registry names a cluster's key and no store shows, one is lost.
        KeyStore(self.request.state, self.request.cluster).create()
        for protection, place, serial, label, key_id in facts["keks"]:
            if _LABEL.fullmatch(label) and _ID[protection].fullmatch(key_id):
                if protection == keyslots.KMIP:
                    registry.remember_key(place, kek.SERIAL, label, key_id, kek.CLASS, self.request.cluster)
                else:
                    registry.remember_key(place, serial, label, key_id, "secret_key", self.request.cluster)
        for step in steps:
            journal.append(step.action, step.obj, cluster=self.request.cluster, as_user=side.user.pw_name)

    def _outcome(self, steps: Plan, facts: Facts, before: records.Record | None, after: records.Record | None) -> Outcome:
        shown = [
            {**facts[when], "record": record.public() if record else None}
            for when, record in (("before", before), ("after", after))
        ]
        return Outcome(steps, shown[0], shown[1], warnings=facts["warnings"])

    # --- the services

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        self.require({"present": "keystore", "open": "open", "closed": "close"}[wish.state])
        if wish.state == "open":
            return self._open(check)
        with self._locked(check):
            return self._present(wish, check)

    def _present(self, wish: KeystoreWish, check: bool) -> Outcome:
        side = self.side()
        wishes = wish.slots if wish.slots is not None else (default_wish(self.request),)
        before = self.record
        # The user's side may not be mounted: root's own journal tells that there must be a secret.
        made = any(
            (entry["action"], entry["cluster"]) == ("create_data_key", self.request.cluster)
            for entry in Journal(self.request.state.journal).entries()
        )
        first = [step for step in side.plan(records.Record("", ""), None) if step.action == "make_user_state"]
        if first and not check:
            # What would be refused is refused before the first step.
            self._work(side, wishes, lambda work: work.keystore(wish, removing=True, made=made), True)
            plans.run(first, side.handlers(None))
        steps, facts = self._work(side, wishes, lambda work: work.keystore(wish, removing=check, made=made), check)
        # The record and the PIN come once they are known to be right, and before anything is taken away.
        steps += self._settle(side, wish, wishes, facts, check)
        if not check and wish.slots is not None and wish.update:
            removals, after = self._work(side, wishes, lambda work: work.keystore(wish, removing=True, made=made), check)
            steps += [*removals, *self._settle(side, wish, wishes, after, check)]
            facts = {**after, "before": facts["before"], "warnings": facts["warnings"]}
        record = self._recorded(wish, wishes, facts)
        outcome = self._outcome([*first, *steps], facts, before, record)
        parameters, initdb = self.options.lines(self.request.cluster)
        outcome.facts = {
            "cluster": self.request.cluster,
            "data_keys": facts["data_keys"],
            "master_keys": facts["master_keys"],
            "parameters": parameters,
            "initdb_options": initdb,
            "start_required": False,
        }
        if record.pin_source.get("kind", "none") == "none" and not record.kmip:
            outcome.warnings.append("No pin_source is set: the command has no PIN, and the server will not get its secret.")
        return outcome

    def _settle(self, side: UserSide, wish: KeystoreWish, wishes: t.Sequence[SlotWish], facts: Facts, check: bool) -> Plan:
        """Bring record, published record and PIN to what the keyslots are now; the steps."""
        record = self._recorded(wish, wishes, facts)
        pin = self._pin(wishes, facts, record)
        steps = [step for step in side.plan(record, pin) if step.action != "make_user_state"]
        if record != self.record:
            path = self.request.state.cluster_record(self.request.cluster)
            steps.append(Step("write_record", path, "what this host must know of the cluster", {"record": record.public()}))
        if not check:
            plans.run(steps, {**side.handlers(pin), "write_record": lambda step: records.write(self.request.state, record)})
            self.record = record
        return steps

    def _reached(self, wishes: t.Sequence[SlotWish], facts: Facts) -> list[tuple[TokenAccess, records.Token]]:
        """The tokens of this task, as the child found them."""
        accesses = [access for access in (self.request.access, *(one.access for one in wishes)) if access]
        return [
            (access, records.Token(access.library.path, dict(access.library.environment), label, serial))
            for access, (label, serial) in zip(accesses, facts["tokens"], strict=True)
        ]

    def _recorded(self, wish: KeystoreWish, wishes: t.Sequence[SlotWish], facts: Facts) -> records.Record:
        """The record: of tokens and KMIP services those that the secret's keyslots are at, the one to be asked first before the others.

        Before there is a secret it is where the first keyslot is to be, for a server's own initdb may make that.
        """
        before = self.record or records.Record(self.request.cluster, self.name)
        primary = next((one for one in wishes if one.name == "primary"), None)
        reached = sorted(self._reached(wishes, facts), key=lambda one: primary is None or one[0] is not primary.access)
        known = {(token.label, token.serial): token for token in (*before.tokens, *(token for dummy, token in reached))}
        given = [one for one in (self.request.kmip, *(one.kmip for one in wishes)) if one]
        services = {one.service: one for one in (*before.kmip, *given)}
        wanted, at = [(name[0], name[1]) for name in facts["slots"]], list(facts["services"])
        if not facts["data_keys"] and primary and primary.kmip:
            at = [primary.kmip.service]
        elif not facts["data_keys"]:
            wanted = [(one.label, one.serial) for dummy, one in reached]
        tokens = tuple(known[name] for name in dict.fromkeys(wanted) if name in known)
        kmip = tuple(services[name] for name in dict.fromkeys(at) if name in services)
        if not tokens and not kmip:
            tokens, kmip = before.tokens, before.kmip
        source = dict(before.pin_source)
        if wish.pin_source is not None:
            source = {name: value for name, value in wish.pin_source.items() if value is not None}
        return dataclasses.replace(before, options=self.options.given, tokens=tokens, kmip=kmip, pin_source=source)

    def _pin(self, wishes: t.Sequence[SlotWish], facts: Facts, record: records.Record) -> Secret | None:
        """The PIN of the token that the command asks first, if this task gave it."""
        found = [access.pin for access, token in self._reached(wishes, facts) if record.tokens and token == record.tokens[0]]
        return next((pin for pin in found if pin is not None), None)

    def _open(self, check: bool) -> Outcome:
        """Nothing is opened for a server that asks by itself; it is seen that the answer would be right."""
        outcome = Outcome([], {}, {}, facts={"cluster": self.request.cluster})
        if check:
            return outcome
        record, side = self.known(), self.side()
        tokens = [
            TokenAccess(LibraryAccess(one.library, one.environment), TokenSelector(label=one.label, serial=one.serial or None))
            for one in record.tokens
        ]
        request = self.own_request(side)
        services = list(dict.fromkeys([*([request.kmip] if request.kmip else []), *record.kmip]))
        if not side.run(lambda: opens(request, self.options, record.pin_source, tokens, services)):
            outcome.warnings.append("There is no wrapped key yet: initdb makes it, with the options that tde_keystore returns.")
        return outcome

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        with self._locked(check):
            if not check:
                self.known()
            steps, facts = self._work(self.side(), (), lambda work: work.master_key(wish), check)
            outcome = self._outcome(steps, facts, self.record, self.record)
            outcome.facts = {
                "cluster": self.request.cluster,
                "master_key": facts["master_key"],
                "age_days": facts["age_days"],
                "data_keys": facts["data_keys"],
                "restart_required": False,
            }
            return outcome

    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        raise TdeError("engine_unsupported", self.refuses["tablespaces"], obj=f"engine {self.name}")

    def info(self) -> Facts:
        from .info import collect

        return collect(self)

    def proofs(self, wish: ProofWish, *, canary: bool) -> list[Facts]:
        from .proof import proofs

        return proofs(self, wish)
