# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A list of keys at a KMIP service brought to the wished states: decided for all of them, then done."""

from __future__ import annotations

import dataclasses
import datetime
import typing as t

from ..common import plan as plans
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..pkcs11.registry import Registry
from .client import Client, KeyFacts
from .kek import CLASS, SERIAL
from .keys import Spec, create, find_one, note, one_at_a_time

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory

#: States in the order in which a key goes through them (KMIP 1.4, section 3.22); there is no way back.
ORDER = ("pre_active", "active", "deactivated", "compromised")

#: Who needs a key: words for each keyslot that names it, by the key's id.
Uses = t.Mapping[str, t.Sequence[str]]

Facts = t.Dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class Wish:
    """A key wished for.

    :param spec: what a new one is; of an existing one, usage is compared only if it was given.
    :param state: ``present``, ``active``, ``deactivated``, ``compromised`` or ``absent``.
    :param id: the server's unique identifier, None where the name alone must name one.
    :param usage_given: whether the usage was named.
    """

    spec: Spec
    state: str = "active"
    id: str | None = None
    usage_given: bool = False
    confirm_destroy: str | None = None
    replace_lost: bool = False


@dataclasses.dataclass
class Outcome:
    """What was done, or in check mode would be. :param keys: those that are there at the end, public."""

    plan: Plan
    keys: list[Facts]
    before: Facts
    after: Facts


def decide(wish: Wish, found: KeyFacts | None, lost: t.Sequence[str], uses: Uses, index: int = 0) -> Plan:
    """The steps for one key. Pure.

    :param found: the key that is there; :param lost: ids that this host remembers under the name and that do not show.
    :param index: of the wish, for the steps' data.
    :raises TdeError: ``key_unreachable``, ``kmip_key_absent``, ``key_mismatch``, ``kmip_key_state``, ``key_in_use``,
        ``destroy_unconfirmed``.
    """
    obj = f"key {wish.spec.name!r}"
    if found is None:
        return _missing(wish, lost, obj, index)
    data = {"index": index, "id": found.uid}
    if wish.state == "absent":
        needed = uses.get(found.uid, ())
        if needed:
            raise TdeError(
                "key_in_use", f"is needed by {', '.join(needed)}", obj=obj, next_step="Move these to another key first."
            )
        if wish.confirm_destroy != wish.spec.name:
            raise TdeError(
                "destroy_unconfirmed",
                f"would be destroyed (id {found.uid}), and confirm_destroy does not name it",
                obj=obj,
                next_step="What it encrypted can never be read again. If that is meant, set confirm_destroy to its name.",
            )
        steps = [Step("deactivate_key", obj, "an active key cannot be destroyed", data)] if found.state == "active" else []
        return [*steps, Step("destroy_key", obj, "is not wanted", data)]
    _compare(wish, found, obj)
    if wish.state == "present" or found.state == wish.state:
        return []
    now = ORDER.index(found.state) if found.state in ORDER else len(ORDER)
    if now > ORDER.index(wish.state):
        raise TdeError("kmip_key_state", f"is {found.state}, wished {wish.state}: there is no way back", obj=obj)
    if wish.state != "active" and found.uid in uses:
        raise TdeError(
            "key_in_use", f"is needed by {', '.join(uses[found.uid])}", obj=obj, next_step="Move these to another key first."
        )
    return [_to_state(wish.state, obj, f"is {found.state}", data)]


def _missing(wish: Wish, lost: t.Sequence[str], obj: str, index: int) -> Plan:
    if lost and not wish.replace_lost:
        raise TdeError(
            "key_unreachable",
            f"this host remembers it (id {', '.join(lost)}), and the server does not have it",
            obj=obj,
            kept="Nothing was created in its place.",
            next_step="Name the server that has it; if it is lost for good, set replace_lost.",
        )
    forget = [Step("forget_key", obj, "is lost for good (replace_lost)", {"index": index, "ids": list(lost)})] if lost else []
    if wish.state == "absent":
        return forget
    if wish.state in ("deactivated", "compromised") or wish.id is not None:
        raise TdeError("kmip_key_absent", "does not exist", obj=obj)
    data = {"index": index, "id": ""}
    new = [Step("create_key", obj, f"the server has no such {wish.spec.algorithm} {wish.spec.length} key", data)]
    if wish.state == "active":
        new.append(_to_state("active", obj, "is new", data))
    return [*forget, *new]


def _to_state(state: str, obj: str, why: str, data: Facts) -> Step:
    action = {"active": "activate_key", "deactivated": "deactivate_key", "compromised": "compromise_key"}[state]
    return Step(action, obj, why, data)


def _compare(wish: Wish, found: KeyFacts, obj: str) -> None:
    wished = {"algorithm": wish.spec.algorithm, "length": wish.spec.length}
    if wish.usage_given:
        wished["usage"] = tuple(sorted(wish.spec.usage))
    there = {"algorithm": found.algorithm, "length": found.length, "usage": tuple(sorted(found.usage))}
    for name, value in wished.items():
        if there[name] != value:
            raise TdeError(
                "key_mismatch",
                f"exists (id {found.uid}) with {name} {_words(there[name])}, wished {_words(value)}",
                obj=obj,
                next_step="Take another name, or wish for what it is.",
            )


def _words(value: t.Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def public(facts: KeyFacts) -> Facts:
    """A key as results show it; times in UTC, null where the server does not tell."""
    dates = ("created", "activated", "deactivated", "compromised", "destroyed", "changed")
    shown = dataclasses.asdict(facts)
    shown["id"] = shown.pop("uid")
    shown.update({name: list(shown[name]) for name in ("names", "usage", "groups")})
    shown["name"] = shown["names"][0] if shown["names"] else None
    for name in dates:
        if shown[name] is not None:
            shown[name] = datetime.datetime.fromtimestamp(shown[name], datetime.timezone.utc).isoformat()
    return shown


class KeyList:
    """One task's work. :param check: check mode."""

    def __init__(self, client: Client, state: StateDirectory, wishes: t.Sequence[Wish], uses: Uses, *, check: bool) -> None:
        self.client, self.state, self.wishes, self.uses, self.check = client, state, list(wishes), uses, check
        self.registry = Registry(state)
        self.journal = Journal(state.journal)
        self.found: list[KeyFacts | None] = []

    def outcome(self) -> Outcome:
        """Carry the wishes out.

        :raises TdeError: as :func:`decide`, and what the server answers.
        """
        if self.check:
            return self._run()
        with one_at_a_time(self.state):
            return self._run()

    def _run(self) -> Outcome:
        names = [(wish.spec.name, wish.id) for wish in self.wishes]
        for name, uid in names:
            if names.count((name, uid)) > 1 or (uid is not None and (name, None) in names):
                raise TdeError("invalid_option", "is listed twice", obj=f"key {name!r}")
        self.found = [self._find(wish) for wish in self.wishes]
        steps: Plan = []
        for index, (wish, found) in enumerate(zip(self.wishes, self.found, strict=True)):
            steps += decide(wish, found, self._lost(wish, found), self.uses, index)
        before = self._states()
        if self.check:
            after = dict(before)
            for step in steps:
                after[self.wishes[step.data["index"]].spec.name] = _AFTER.get(step.action, "absent")
            return Outcome(steps, [public(one) for one in self.found if one], before, after)
        plans.run(steps, {action: self._act for action in ("destroy_key", "forget_key", *_AFTER)})
        if steps:
            self.found = [self._find(wish) for wish in self.wishes]
        return Outcome(steps, [public(one) for one in self.found if one], before, self._states())

    def _states(self) -> Facts:
        return {wish.spec.name: found.state if found else "absent" for wish, found in zip(self.wishes, self.found, strict=True)}

    def _find(self, wish: Wish) -> KeyFacts | None:
        if wish.id is None:
            return find_one(self.client, wish.spec.name, self.journal)
        try:
            facts = self.client.attributes(wish.id)
        except TdeError as exc:
            if exc.code == "kmip_key_absent":
                return None
            raise
        if wish.spec.name not in facts.names:
            raise TdeError(
                "key_mismatch",
                f"has the names {', '.join(facts.names) or 'none'}, not {wish.spec.name!r}",
                obj=f"key {wish.id}",
                next_step="Correct its name or its id; hsm.tde.kmip_key_info lists the keys.",
            )
        return None if facts.gone else facts

    def _lost(self, wish: Wish, found: KeyFacts | None) -> list[str]:
        if found:
            return []
        return [
            entry["id"]
            for entry in self.registry.keys()  # noqa: SIM118 - a registry is no dictionary
            if self.registry.is_in(entry, self.client.access.service, SERIAL)
            and entry["label"] == wish.spec.name
            and wish.id in (None, entry["id"])
        ]

    def _act(self, step: Step) -> None:
        wish = self.wishes[step.data["index"]]
        name, service = wish.spec.name, self.client.access.service
        if step.action == "forget_key":
            for uid in step.data["ids"]:
                self.registry.forget_key(service, SERIAL, name, uid)
                note(self.journal, self.client, "forget_key", name, uid, why="replace_lost")
            return
        if step.action == "create_key":
            made = create(self.client, wish.spec, self.journal)
            _compare(wish, made, step.obj)
            self.found[step.data["index"]] = made
            self.registry.remember_key(service, SERIAL, name, made.uid, CLASS)
            return
        found = self.found[step.data["index"]]
        uid = step.data["id"] or (found.uid if found else "")
        if step.action == "activate_key":
            # Another host may have made it at the same moment, and be further.
            if found and found.state == "active":
                return
            self.client.activate(uid)
        elif step.action == "destroy_key":
            self.client.destroy(uid)
            self.registry.forget_key(service, SERIAL, name, uid)
        else:
            self.client.revoke(uid, compromised=step.action == "compromise_key")
        note(self.journal, self.client, f"{step.action.removesuffix('_key')}_kmip_key", name, uid)


#: The state after a step.
_AFTER = {
    "create_key": "pre_active",
    "activate_key": "active",
    "deactivate_key": "deactivated",
    "compromise_key": "compromised",
}
