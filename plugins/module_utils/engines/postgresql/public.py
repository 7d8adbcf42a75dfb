# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The facts that a diff shows, and what a plan makes of them: pure."""

from __future__ import annotations

import copy
import typing as t

from ...common.plan import Plan, Step
from ...storage import image
from .. import record as records
from ..keyfacts import expect, kek_words, key_facts, record_facts
from ..keyslots import Kek, Key
from .look import Storage
from .plan import PlaceFacts

Facts = t.Dict[str, t.Any]


def place_facts(place: PlaceFacts) -> Facts:
    """A place as a result shows it."""
    return {
        "path": place.path,
        "encrypted": bool(place.policy),
        "made": place.made,
        "kernel_key": place.kernel_key or "absent",
    }


def facts(
    keys: t.Sequence[Key],
    keks: t.Sequence[Kek],
    places: t.Sequence[PlaceFacts],
    record: records.Record | None,
    storage: Storage | None = None,
) -> Facts:
    """A cluster's public facts."""
    shown: Facts = {
        "data_keys": key_facts(keys),
        "master_keys": kek_words(keks),
        "places": {place.key_id: place_facts(place) for place in places if place.exists},
        "record": record_facts(record),
    }
    if storage:
        shown["storage"] = image.facts(storage.wish, storage.state)
    return shown


def expected(before: Facts, plan: Plan) -> Facts:
    """The facts after a plan, as far as it tells them."""
    after = copy.deepcopy(before)
    expect(after, plan)
    for step in plan:
        _apply(after, step)
    return after


def _apply(after: Facts, step: Step) -> None:
    data, places = step.data, after.setdefault("places", {})
    if step.action == "record_place":
        places[data["key_id"]] = {"path": data["path"], "encrypted": True, "made": True, "kernel_key": "present"}
    elif step.action in ("add_kernel_key", "remove_kernel_key") and data["key_id"] in places:
        places[data["key_id"]]["kernel_key"] = "present" if step.action == "add_kernel_key" else "absent"
    elif step.action == "create_tablespace":
        after.setdefault("tablespaces", {})[data["name"]] = {"location": data["path"], "owner": data["owner"] or "login_user"}
    elif step.action == "set_tablespace_owner":
        after["tablespaces"][data["name"]]["owner"] = data["owner"]
    elif step.action in ("make_mount_point", "create_image", "mount_image", "extend_image"):
        after.setdefault("storage", {})[step.action] = step.obj
