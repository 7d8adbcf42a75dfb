# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the store and the registry tell of a cluster's data keys without a credential, and how results show it."""

from __future__ import annotations

import datetime
import typing as t

from ..common.plan import Plan
from ..keystore import recorded
from ..keystore.store import KeyStore
from ..kmip import kek as kmip_kek
from ..pkcs11.envelope import COMPANION
from ..pkcs11.registry import Registry
from . import keyslots
from .keyslots import Kek, Key, Slot, Token
from .record import Record

Facts = t.Dict[str, t.Any]

# --- reading


def read_keys(store: KeyStore) -> list[Key]:
    """Every data key's public facts.

    :raises TdeError: ``keystore_unreachable`` and what makes a file unreadable.
    """
    return [
        Key(
            one["key_id"],
            one["check_value"],
            tuple(map(_slot, one["keyslots"])),
            tuple(map(_slot, one["history"])),
            last=one["recorded"] not in (recorded.ROLLED_BACK, recorded.OTHER),
        )
        for one in store.describe()
    ]


def _slot(facts: t.Mapping[str, t.Any]) -> Slot:
    token = Token.of(facts["token_label"], facts["token_serial"] or "") if facts["token_label"] is not None else None
    if facts["kmip_service"] is not None:
        token = Token.service(facts["kmip_service"])
    return Slot(
        name=facts["name"],
        uid=facts["uid"],
        protection=facts["protection"],
        created=facts["created"],
        proved=facts["proved"],
        token=token,
        kek_label=facts["kek_label"] or "",
        kek_id=facts["kek_id"] or "",
        kek_kcv=facts["kek_kcv"] or "",
        kek_leaves_server=facts["kek_leaves_server"] == "yes",
    )


def read_keks(registry: Registry, cluster: str) -> list[Kek]:
    """The master keys that the host remembers for a cluster, in the order in which they were made."""
    return [
        Kek(token_of(entry), entry["label"], entry["since"], entry["id"])
        for entry in registry.keys()  # noqa: SIM118 - a registry is no dictionary
        if entry["cluster"] == cluster and not entry["label"].endswith(COMPANION)
    ]


def token_of(entry: t.Mapping[str, str]) -> Token:
    """Where the key of a registry's entry lies."""
    if entry["cls"] == kmip_kek.CLASS:
        return Token.service(entry["token_label"])
    return Token.of(entry["token_label"], entry["token_serial"])


# --- showing: what a result has, and its difference


def slot_words(slot: Slot) -> str:
    """What a keyslot is under, in words."""
    return f"{slot.kek_label} {slot.token.where}" if slot.token else slot.protection


def key_facts(keys: t.Iterable[Key]) -> Facts:
    """Data keys by name, as a result shows them."""
    return {
        key.key_id: {"check_value": key.check_value, "keyslots": {slot.name: slot_words(slot) for slot in key.slots}}
        for key in keys
    }


def kek_words(keks: t.Iterable[Kek]) -> list[str]:
    """Master keys, as a result shows them."""
    return [f"{kek.label} {kek.token.where}" for kek in keks]


def record_facts(record: Record | None) -> Facts | None:
    """A cluster's record, as a result shows it."""
    return {name: value for name, value in record.public().items() if name != "places"} if record else None


def expect(after: Facts, steps: Plan) -> None:
    """Carry a plan's steps on keys, keyslots and the record over to the facts of a difference."""
    keys = after.setdefault("data_keys", {})
    for step in steps:
        data = step.data
        if step.action == "create_kek":
            after["master_keys"] = [*after.get("master_keys", []), step.obj.removeprefix("master key ")]
        elif step.action == "create_data_key":
            keys[data["key_id"]] = {"check_value": "new", "keyslots": dict.fromkeys(data["slots"], "new")}
        elif step.action == "add_keyslot" and data["key_id"] in keys:
            keys[data["key_id"]]["keyslots"][data["name"]] = "new"
        elif step.action == "remove_keyslot" and data["key_id"] in keys:
            if keys[data["key_id"]]["keyslots"].get(data["name"]) != "new":
                keys[data["key_id"]]["keyslots"].pop(data["name"], None)
        elif step.action == "write_record":
            after["record"] = {name: value for name, value in data["record"].items() if name != "places"}


# --- telling: what tde_info returns


def describe_keys(keys: t.Iterable[Key], today: datetime.date) -> list[Facts]:
    """Data keys with their keyslots, as ``data_keys`` lists them."""
    return [
        {
            "key_id": key.key_id,
            "check_value": key.check_value,
            "keyslots": [
                {
                    "name": slot.name,
                    "protection": slot.protection,
                    "proved": slot.proved is not None,
                    "age_days": (today - datetime.date.fromisoformat(slot.created[:10])).days,
                    **_where(slot.token),
                    "kek_leaves_server": slot.kek_leaves_server if slot.protection == keyslots.KMIP else None,
                    "master_key": slot.kek_label or None,
                    "master_key_check_value": slot.kek_kcv or None,
                }
                for slot in key.slots
            ],
            "formerly": sorted({slot_words(slot) for slot in key.formerly}),
        }
        for key in keys
    ]


def describe_keks(keys: t.Sequence[Key], keks: t.Sequence[Kek], today: datetime.date) -> list[Facts]:
    """The master keys that the host remembers, as ``master_keys`` lists them."""
    return [
        {
            "label": kek.label,
            "id": kek.id,
            **_where(kek.token),
            "age_days": keyslots.age(kek.label, kek.token, keys, keks, today),
            "current": keyslots.in_use(kek, keys, keks),
        }
        for kek in keks
    ]


def _where(token: Token | None) -> Facts:
    """Where a master key lies; null is what does not apply."""
    service = token.label if token and token.protection == keyslots.KMIP else None
    named = token if token and service is None else None
    return {
        "token_label": named.label if named else None,
        "token_serial": named.serial if named else None,
        "kmip_service": service,
    }
