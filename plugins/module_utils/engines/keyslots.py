# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which keyslots must be added, proved and removed: pure functions for every engine whose data keys are wrapped by us.

A change is always: add the new keyslot, prove it, remove the old one. Two keyslots of one name are told apart by
their ``uid``; after a crash between any two of these steps the next plan does what is left.
"""

from __future__ import annotations

import dataclasses
import datetime
import typing as t

from ..common.errors import TdeError
from ..common.plan import Plan, Step
from ..pkcs11.registry import same_serial

TOKEN = "token"  # noqa: S105 - the name of a protection
PASSPHRASE = "passphrase"  # noqa: S105 - the name of a protection
KMIP = "kmip"


@dataclasses.dataclass(frozen=True)
class Token:
    """Where master keys lie, by what a key file names it: a PKCS#11 token, or a KMIP service by its name (no serial number).

    Made by :meth:`of` or :meth:`service`, so that two can be compared. :param protection: of the keyslots under such a key.
    """

    label: str
    serial: str
    protection: str = TOKEN

    @classmethod
    def of(cls, label: str, serial: str) -> Token:
        """The token of a label and a serial number; one that identifies nothing counts as none."""
        return cls(label, "" if same_serial(serial, "") else serial)

    @classmethod
    def service(cls, name: str) -> Token:
        """The KMIP service of a name."""
        return cls(name, "", KMIP)

    @property
    def where(self) -> str:
        """The place in words."""
        return f"in token {self.label}" if self.protection == TOKEN else f"at KMIP service {self.label}"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A keyslot as it stands in a key file.

    :param created: UTC, ISO 8601; :param proved: when it first gave the data key back, None if it has not.
    :param token: where its KEK lies, and which one; None and empty under a passphrase.
    :param kek_leaves_server: its KEK is got from a KMIP server for each use.
    :param opens: whether the credential given for it opens it; None if none was tried.
    """

    name: str
    uid: str
    protection: str
    created: str
    proved: str | None = None
    token: Token | None = None
    kek_label: str = ""
    kek_id: str = ""
    kek_kcv: str = ""
    kek_leaves_server: bool = False
    opens: bool | None = None


@dataclasses.dataclass(frozen=True)
class Key:
    """A data key's public facts.

    :param slots: in the order in which they were added.
    :param formerly: keyslots that were removed: the key was once under them.
    :param last: whether its file is the one that this host wrote last, as far as the journal knows.
    """

    key_id: str
    check_value: str
    slots: tuple[Slot, ...]
    formerly: tuple[Slot, ...] = ()
    last: bool = True

    def named(self, name: str) -> list[Slot]:
        """The keyslots of a name, the newest first."""
        return [slot for slot in reversed(self.slots) if slot.name == name]


@dataclasses.dataclass(frozen=True)
class Kek:
    """A master key that the host remembers in a token; :param since: UTC, ISO 8601; :param id: its CKA_ID in hex.

    A sequence of them is in the order in which they were made: two in one second are told apart by it.
    """

    token: Token
    label: str
    since: str
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A keyslot wished for.

    :param token: where its KEK lies, None under a passphrase or where the task names no token: any will do.
    :param kek_label: which KEK, empty if none is meant.
    """

    name: str
    protection: str
    token: Token | None = None
    kek_label: str = ""


def kek_label(cluster: str, tag: str = "") -> str:
    """The label of a cluster's master key; a rotation names it by a tag."""
    return f"hsm-tde.{cluster}.{tag}" if tag else f"hsm-tde.{cluster}"


def _labels_on(keys: t.Iterable[Key], keks: t.Sequence[Kek], token: Token | None) -> list[str]:
    """The labels of the master keys that keyslots name in a token (None: in any), the oldest first."""
    made = [kek.label for kek in keks if token is None or kek.token == token]
    slots = [slot for key in keys for slot in key.slots if slot.token and token in (None, slot.token)]
    ranked = sorted(slots, key=lambda slot: (made.index(slot.kek_label) if slot.kek_label in made else -1, slot.created))
    return list(dict.fromkeys(slot.kek_label for slot in ranked))


def current_label(cluster: str, token: Token, keys: t.Sequence[Key], keks: t.Sequence[Kek]) -> str:
    """Which master key a new keyslot in a token is wrapped under.

    The newest that a keyslot names there; else the newest that the host remembers there for the cluster; else, in a
    token that is new to the cluster, one with the label of the newest elsewhere, so that its tag is kept.
    """
    there = [kek.label for kek in keks if kek.token == token]
    for labels in (_labels_on(keys, keks, token), there, _labels_on(keys, keks, None)):
        if labels:
            return labels[-1]
    return kek_label(cluster)


def remembered(label: str, token: Token, keys: t.Sequence[Key], keks: t.Sequence[Kek]) -> bool:
    """Whether a master key must exist in a token: the registry or a keyslot names it. Such a one is never made anew."""
    return any(kek.token == token and kek.label == label for kek in keks) or label in _labels_on(keys, keks, token)


def in_use(kek: Kek, keys: t.Sequence[Key], keks: t.Sequence[Kek]) -> bool:
    """Whether keyslots are under a master key; before there are any, whether the first ones will be."""
    if not any(key.slots for key in keys):
        return kek.label == [one.label for one in keks if one.token == kek.token][-1]
    return any(slot.token == kek.token and slot.kek_label == kek.label for key in keys for slot in key.slots)


def create_kek(label: str, token: Token, slot: str, why: str) -> Step:
    """The step that makes a master key for a keyslot."""
    data = {
        "kek_label": label,
        "name": slot,
        "token_label": token.label,
        "token_serial": token.serial,
        "protection": token.protection,
    }
    return Step("create_kek", f"master key {label} {token.where}", why, data)


def master_keys(keys: t.Sequence[Key], keks: t.Sequence[Kek], wanted: t.Sequence[Wanted], plan: Plan) -> Plan:
    """The steps that make the master keys which a plan's new keyslots need, or a new keystore will need."""
    needed = {name for step in plan for name in (step.data.get("slots", ()) if step.action == "create_data_key" else ())}
    needed |= {step.data["name"] for step in plan if step.action == "add_keyslot"}
    steps: dict[str, Step] = {}
    for one in wanted:
        if one.token and (one.name in needed or not keys) and not remembered(one.kek_label, one.token, keys, keks):
            step = create_kek(one.kek_label, one.token, one.name, "the cluster has no master key there")
            steps.setdefault(step.obj, step)
    return list(steps.values())


def _words(slot: Wanted | Slot) -> str:
    return f"under {slot.kek_label} {slot.token.where}" if slot.token else "under a passphrase"


def add(key_id: str, wanted: Wanted, why: str) -> Plan:
    """The steps that add and prove a keyslot."""
    prove = _prove(key_id, wanted)
    return [Step("add_keyslot", prove.obj, why, prove.data), prove]


def _prove(key_id: str, wanted: Wanted) -> Step:
    data = {"key_id": key_id, "name": wanted.name, "kek_label": wanted.kek_label}
    return Step("prove_keyslot", f"keyslot {wanted.name} of data key {key_id}", "before anything rests on it", data)


def remove(key_id: str, slot: Slot, why: str) -> Step:
    """The step that removes a keyslot."""
    return Step(
        "remove_keyslot", f"keyslot {slot.name} of data key {key_id}", why, {"key_id": key_id, "name": slot.name, "uid": slot.uid}
    )


def _fits(slot: Slot, wanted: Wanted) -> bool:
    return slot.protection == wanted.protection and slot.opens is not False and wanted.token in (None, slot.token)


def _best(slots: t.Sequence[Slot]) -> Slot | None:
    """The one to keep of several that would do, the newest first: one that was proved, if there is one."""
    return next((slot for slot in slots if slot.proved), slots[0] if slots else None)


def change(keys: t.Sequence[Key], wanted: t.Sequence[Wanted], *, exclusive: bool, no_recovery: bool) -> Plan:
    """The steps that bring the keyslots of existing keys to the wish: all additions and proofs, then the removals.

    :param exclusive: remove keyslots that are not wished for.
    :raises TdeError: ``recovery_keyslot_missing`` if the plan would take keyslots of other names away and leave a single one.
    """
    additions: Plan = []
    removals: Plan = []
    names = {one.name for one in wanted}
    for key in keys:
        gone: list[Slot] = []
        kept: Plan = []
        for one in wanted:
            there = key.named(one.name)
            keep = _best([slot for slot in there if _fits(slot, one)])
            if keep is None:
                why = f"is {_words(there[0])}, wished {_words(one)}" if there else f"wished {_words(one)}"
                additions += add(key.key_id, one, why)
                # What was never proved gives way to the addition by itself.
                gone += [slot for slot in there if slot.proved]
                continue
            (additions if keep.proved is None else kept).append(
                _prove(key.key_id, dataclasses.replace(one, kek_label=keep.kek_label))
            )
            gone += [slot for slot in there if slot.uid != keep.uid]
        removals += [remove(key.key_id, slot, "another of its name takes its place") for slot in gone]
        if exclusive:
            others = [slot for slot in key.slots if slot.name not in names]
            removals += [remove(key.key_id, slot, "is not listed and keyslots_exclusive is set") for slot in others]
            # What was proved once may open nothing by now: its KEK may be gone, its passphrase forgotten.
            additions += kept if others else []
            # Whether there was more than one before cannot be asked: an interrupted run may have added the one wished for.
            if others and len(names) == 1 and not no_recovery:
                raise recovery_missing(f"data key {key.key_id}", "only one keyslot would be left")
    return additions + removals


def recovery_missing(obj: str, reason: str) -> TdeError:
    """The refusal to go on with one keyslot."""
    return TdeError(
        "recovery_keyslot_missing",
        reason,
        obj=obj,
        next_step="List a second keyslot (a passphrase kept off the host, or a second token), or set no_recovery to go without on purpose.",
    )


def demand_recovery(wanted: t.Sequence[Wanted], no_recovery: bool, obj: str) -> None:
    """Refuse to make a data key that a single keyslot opens.

    :raises TdeError: ``recovery_keyslot_missing``, ``invalid_option``.
    """
    if not wanted:
        raise TdeError("invalid_option", "no keyslot is listed", obj=f"keyslots of {obj}")
    if len({one.name for one in wanted}) != len(wanted):
        raise TdeError("invalid_option", "two keyslots of one name are listed", obj=f"keyslots of {obj}")
    if len(wanted) < 2 and not no_recovery:
        raise recovery_missing(obj, "its only keyslot would be the only way to the data")


def rotate(
    cluster: str,
    keys: t.Sequence[Key],
    keks: t.Sequence[Kek],
    *,
    slot: str,
    token: Token,
    tag: str | None = None,
    max_age: int | None = None,
    today: datetime.date,
) -> Plan:
    """The steps that put every data key under one master key: the tag's, a due one's, or the current one.

    The former master keys stay in the token.

    :param slot: the keyslot's name; :param token: where its master key lies.
    :param tag: names the new master key; :param max_age: days after which the current one is replaced.
    :param today: the day of the run, UTC.
    :raises TdeError: ``rotation_unsupported``, ``keyslot_on_other_token``, ``tag_superseded``, ``keyslot_absent``.
    """
    _check_rotatable(keys, slot, token)
    current = current_label(cluster, token, keys, keks)
    target = current
    if tag is not None:
        target = kek_label(cluster, tag)
        _check_not_superseded(target, current, keys, keks, token)
    elif max_age is not None and age(current, token, keys, keks, today) > max_age:
        target = kek_label(cluster, today.strftime("%Y%m%d"))
    plan: Plan = []
    if not remembered(target, token, keys, keks):
        plan.append(create_kek(target, token, slot, "rotation" if target != current else "the cluster has no master key there"))
    for key in keys:
        there = key.named(slot)
        keep = _best([one for one in there if one.kek_label == target])
        wanted = Wanted(slot, token.protection, token, target)
        if keep is None:
            plan += add(key.key_id, wanted, f"is {_words(there[0])}")
            there = [one for one in there if one.proved]
        elif keep.proved is None:
            plan.append(add(key.key_id, wanted, "")[1])
        plan += [remove(key.key_id, one, f"re-wrapped under {target}") for one in there if keep is None or one.uid != keep.uid]
    return plan


def _check_rotatable(keys: t.Sequence[Key], slot: str, token: Token) -> None:
    for key in keys:
        there = key.named(slot)
        obj = f"keyslot {slot} of data key {key.key_id}"
        if not there:
            raise TdeError("keyslot_absent", "does not exist", obj=obj)
        if any(one.protection == PASSPHRASE for one in there):
            raise TdeError(
                "rotation_unsupported",
                "is under a passphrase, which has no master key to rotate",
                obj=obj,
                next_step="Change the passphrase instead: tde_keystore with the new one in keyslots and the old one in passphrase.",
            )
        elsewhere = next((one.token for one in there if one.token != token), None)
        if elsewhere:
            raise TdeError(
                "keyslot_on_other_token",
                f"lies {elsewhere.where}, not {token.where}",
                obj=obj,
                next_step="Name that one; or move the keyslot first, with tde_keystore and keyslots.",
            )


def _check_not_superseded(target: str, current: str, keys: t.Sequence[Key], keks: t.Sequence[Kek], token: Token) -> None:
    if target == current:
        return
    made = [kek.label for kek in keks if kek.token == token]
    formerly = any(slot.kek_label == target and slot.token == token for key in keys for slot in key.formerly)
    if formerly or (target in made and current in made and made.index(target) < made.index(current)):
        raise TdeError(
            "tag_superseded",
            f"was replaced by {current}",
            obj=f"master key {target}",
            next_step="Rotate under a new tag.",
        )


def age(label: str, token: Token, keys: t.Sequence[Key], keks: t.Sequence[Kek], today: datetime.date) -> int:
    """A master key's age in days: from the registry, else from the oldest keyslot under it; 0 if nothing is known."""
    times = [kek.since for kek in keks if kek.token == token and kek.label == label]
    if not times:
        times = [
            slot.created
            for key in keys
            for slot in (*key.slots, *key.formerly)
            if slot.kek_label == label and slot.token == token
        ]
    if not times:
        return 0
    return (today - datetime.date.fromisoformat(min(times)[:10])).days
