# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A list of keys brought to the wished state in one login: inspected whole, planned whole, then acted on."""

from __future__ import annotations

import dataclasses
import functools
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.state import StateDirectory
from . import copies, make, unfinished
from .apart import apart
from .envelope import COMPANION
from .keys import KeyInfo, check_value, find
from .keyspec import Found, Wish, check_spec, main_keys, plan_key, public_half
from .library import load
from .registry import Registry
from .token import Session, TokenAccess, TokenInfo, open_session

#: Who needs the keys of a token: reasons in words, by label and CKA_ID.
Uses = t.Mapping[t.Tuple[str, bytes], t.Sequence[str]]

#: In check mode, what an earlier task of the play may have yet to make.
_NOT_YET = ("library_absent", "token_absent")


@dataclasses.dataclass
class Outcome:
    """What was, what is (in check mode: what would be), and the steps between.

    :ivar keys: facts of each key that is present at the end, in the order of the wishes.
    :ivar before: facts by label and id; :ivar after: the same at the end.
    """

    plan: Plan
    keys: list[dict[str, t.Any]]
    before: dict[str, t.Any]
    after: dict[str, t.Any]
    warnings: list[str]


def check_wishes(wishes: t.Sequence[Wish]) -> None:
    """Refuse a list that cannot be meant.

    :raises TdeError: ``invalid_option``, ``key_value_invalid``.
    """
    for number, wish in enumerate(wishes):
        check_spec(wish.spec)
        for other in wishes[:number]:
            if wish.spec.label == other.spec.label and (None in (wish.spec.id, other.spec.id) or wish.spec.id == other.spec.id):
                raise TdeError("invalid_option", "stands twice in the list", obj=f"key {wish.spec.label!r}")


def apply(
    access: TokenAccess,
    state: StateDirectory,
    wishes: t.Sequence[Wish],
    *,
    uses: t.Callable[[TokenInfo], Uses],
    check_mode: bool = False,
) -> Outcome:
    """Bring a token's keys to the wished state. Unless in check mode, call it with the state directory locked.

    Every step is planned before the first is taken, so that an error in the last item changes nothing of the first.

    :param uses: who needs the token's keys, beside what registry and journal say; asked only if a key may have to go.
    :raises TdeError: as :func:`check_wishes`, :func:`.keyspec.plan_key`, :func:`.token.open_session`, :mod:`.make`.
    """
    check_wishes(wishes)
    try:
        return _apply(access, state, wishes, uses, check_mode)
    except TdeError as exc:
        if check_mode and exc.code in _NOT_YET:
            return _on_nothing(wishes, exc)
        raise


def _on_nothing(wishes: t.Sequence[Wish], reason: TdeError) -> Outcome:
    """What would be done on a token that earlier tasks of a play in check mode only said they would make."""
    plans = [plan_key(wish, Found([])) for wish in wishes]
    keys = [dict(step.data) for plan in plans for step in plan]
    words = f"{reason.obj}: {reason.message}; this is what would be done once it is there"
    return Outcome([step for plan in plans for step in plan], keys, {}, {_name(facts): facts for facts in keys}, [words])


def _apply(
    access: TokenAccess, state: StateDirectory, wishes: t.Sequence[Wish], uses: t.Callable[[TokenInfo], Uses], check_mode: bool
) -> Outcome:
    registry, journal = Registry(state), Journal(state.journal)
    with open_session(access, state, rw=not check_mode) as session:
        needed = functools.cache(lambda: _uses(session.token, registry, journal, uses))
        begun = functools.cache(lambda: unfinished.begun(journal, session.token))
        found = [_inspect(session, wish, registry, begun, needed) for wish in wishes]
        plans = [plan_key(wish, there) for wish, there in zip(wishes, found, strict=True)]
        before = _facts(there.keys for there in found)
        warnings = [
            words for wish, there, plan in zip(wishes, found, plans, strict=True) for words in _warnings(wish, there, plan)
        ]
        whole = [step for plan in plans for step in plan]
        if check_mode:
            pairs = zip(wishes, found, plans, strict=True)
            keys = [facts for wish, there, plan in pairs for facts in [_foreseen(wish, there, plan)] if facts]
            return Outcome(whole, keys, before, {_name(facts): facts for facts in keys}, warnings)
        change = functools.partial(_carry_out, registry=registry, journal=journal, wishes=wishes, plans=plans)
        done = functools.partial(_outcome, registry=registry, wishes=wishes, plan=whole, before=before, warnings=warnings)
        path = session.library.path
        if not any(step.action in copies.rewriting(path) for step in whole):
            change(session)
            return done(session)

    def rewrite() -> None:
        with copies.objects_kept(path), open_session(access, state, rw=True) as own:
            change(own)

    apart(load(access.library), rewrite, str(session.token))
    with open_session(access, state, rw=True) as session:
        return done(session)


def _carry_out(
    session: Session, *, registry: Registry, journal: Journal, wishes: t.Sequence[Wish], plans: t.Sequence[Plan]
) -> None:
    runner = _Runner(session, registry, journal)
    finished: list[str] = []
    for wish, plan in zip(wishes, plans, strict=True):
        try:
            runner.run(wish, plan)
        except TdeError as error:
            error.after(finished)
            raise
        finished += [step.action for step in plan]


def _outcome(
    session: Session,
    *,
    registry: Registry,
    wishes: t.Sequence[Wish],
    plan: Plan,
    before: dict[str, t.Any],
    warnings: list[str],
) -> Outcome:
    now = [find(session, wish.spec.label, id=wish.spec.id) for wish in wishes]
    present = [main_keys(listed, wish.spec)[0] for wish, listed in zip(wishes, now, strict=True) if wish.state == "present"]
    for info in present:
        make.remember(session, registry, info)
    return Outcome(plan, [info.public() for info in present], before, _facts(now), warnings)


def _may_destroy(wish: Wish) -> bool:
    return wish.state == "absent" or wish.replace_lost or wish.regenerate in ("partial_idempotence", "always")


def _uses(
    token: TokenInfo, registry: Registry, journal: Journal, more: t.Callable[[TokenInfo], Uses]
) -> dict[tuple[str, bytes], list[str]]:
    needed = {key: list(reasons) for key, reasons in more(token).items()}
    for row in registry.keys():  # noqa: SIM118 - a list, not a mapping
        if row["cluster"] and registry.is_in(row, token.label, token.serial):
            needed.setdefault((row["label"], bytes.fromhex(row["id"])), []).append(f"the keystore of cluster {row['cluster']}")
    for entry in journal.entries():
        if entry["action"] == "generate_kek" and entry["detail"].get("token_label") == token.label:
            key = (entry["key"], bytes.fromhex(entry["key_id"]))
            needed.setdefault(key, ["what was wrapped under it: it was made as a KEK"])
    for (label, id_), reasons in list(needed.items()):
        needed.setdefault((label + COMPANION, id_), reasons)
    return needed


def _inspect(
    session: Session,
    wish: Wish,
    registry: Registry,
    begun: t.Callable[[], t.Collection[tuple[str, bytes]]],
    needed: t.Callable[[], Uses],
) -> Found:
    """:param begun: as :func:`.unfinished.begun`, asked only if there is a key that the registry does not name."""
    spec = wish.spec
    keys = find(session, spec.label)
    remembered = [bytes.fromhex(row["id"]) for row in make.registered(registry, session.token, spec.label)]
    new = sorted({info.id for info in keys if spec.id in (None, info.id)}.difference(remembered))
    killed = [id_ for id_ in new if (spec.label, id_) in begun()]
    dead = [id_ for id_ in killed if unfinished.proved(session, spec.label, id_)]
    same = [info for info in main_keys(keys, spec) if info.id not in dead]
    compared = make.same_value(session, same[0], spec) if wish.state == "present" and spec.imported and len(same) == 1 else None
    uses = needed() if dead or _may_destroy(wish) else {}
    return Found(
        keys=keys,
        remembered=remembered,
        uses={id_: reasons for (label, id_), reasons in uses.items() if label == spec.label},
        same_value=compared,
        begun=killed,
        unfinished=dead,
    )


def _warnings(wish: Wish, found: Found, plan: Plan) -> t.Iterator[str]:
    if wish.state == "present" and wish.spec.imported and not plan and found.same_value is None:
        yield f"key {wish.spec.label!r}: the token cannot tell whether its value is the one to import (its usage flags forbid to try)"
        if wish.spec.pair and public_half(found.whole, main_keys(found.whole, wish.spec)[0]) is None:
            yield f"key {wish.spec.label!r}: the token has its private half alone"
    flags = {**wish.spec.usage, **next((step.data.get("changes", {}) for step in plan), {})}
    if wish.state == "present" and flags.get("wrap") and flags.get("decrypt"):
        yield f"key {wish.spec.label!r} may wrap and decrypt: whoever may use it reads every key that it can wrap"


def _name(facts: t.Mapping[str, t.Any]) -> str:
    return f"{facts['label']} ({facts['id']})"


def _facts(found: t.Iterable[t.Sequence[KeyInfo]]) -> dict[str, t.Any]:
    """Keys by label and id; a pair by its private half."""
    facts: dict[str, t.Any] = {}
    for keys in found:
        for info in sorted(keys, key=lambda info: info.cls != "public"):
            facts[_name(info.public())] = info.public()
    return facts


def _foreseen(wish: Wish, found: Found, plan: Plan) -> dict[str, t.Any] | None:
    if wish.state == "absent":
        return None
    for step in plan:
        if step.action in ("generate_key", "import_key"):
            return dict(step.data)
    changes: dict[str, t.Any] = next((step.data["changes"] for step in plan if step.action == "change_key"), {})
    return {**main_keys(found.whole, wish.spec)[0].public(), **changes}


class _Runner:
    """Carries out plans in one session, with each step in the journal."""

    def __init__(self, session: Session, registry: Registry, journal: Journal) -> None:
        self._session, self._registry, self._journal = session, registry, journal
        self._token = session.token

    def run(self, wish: Wish, plan: Plan) -> None:
        """One item's steps."""

        def make_key(step: Step) -> None:
            spec = dataclasses.replace(wish.spec, id=bytes.fromhex(step.data["id"]))
            made = (make.import_key if spec.imported else make.generate)(self._session, spec)
            make.remember(self._session, self._registry, made)

        def import_public_half(step: Step) -> None:
            make.import_public_half(self._session, dataclasses.replace(wish.spec, id=bytes.fromhex(step.data["id"])))

        def change_key(step: Step) -> None:
            make.change(self._session, wish.spec.label, bytes.fromhex(step.data["id"]), step.data["changes"])

        def destroy_key(step: Step) -> None:
            # Struck out first: a kill in between leaves a key that a second run destroys, not one that seems lost.
            self._forget(wish, step)
            make.destroy(self._session, wish.spec.label, bytes.fromhex(step.data["id"]))

        acts: planning.Handlers = {
            "generate_key": make_key,
            "import_key": make_key,
            "import_public_half": import_public_half,
            "change_key": change_key,
            "destroy_key": destroy_key,
            "forget_key": lambda step: self._forget(wish, step),
            unfinished.ACTION: lambda step: unfinished.destroy(self._session, wish.spec.label, bytes.fromhex(step.data["id"])),
        }
        planning.run(plan, {name: self._journalled(wish, act) for name, act in acts.items()})

    def _forget(self, wish: Wish, step: Step) -> None:
        self._registry.forget_key(self._token.label, self._token.serial, wish.spec.label, step.data["id"])

    def _journalled(self, wish: Wish, act: t.Callable[[Step], None]) -> t.Callable[[Step], None]:
        def write(step: Step, result: str, **facts: t.Any) -> None:
            self._journal.append(
                step.action,
                f"{step.obj} in {self._token}",
                result=result,
                key=wish.spec.label,
                key_id=step.data["id"],
                token_label=self._token.label,
                token_serial=self._token.serial,
                **facts,
            )

        def run(step: Step) -> None:
            write(step, "begun", why=step.why)
            try:
                act(step)
            except TdeError as exc:
                write(step, "failed", error_code=exc.code)
                raise
            write(step, "done", kcv=self._kcv(wish, step))

        return run

    def _kcv(self, wish: Wish, step: Step) -> str:
        if step.action not in ("generate_key", "import_key"):
            return ""
        made = main_keys(find(self._session, wish.spec.label, id=bytes.fromhex(step.data["id"])), wish.spec)
        return (check_value(self._session, made[0]) or b"").hex() if made else ""
