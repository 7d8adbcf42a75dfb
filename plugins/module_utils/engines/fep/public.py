# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The facts that a diff shows, and what a plan makes of them: pure."""

from __future__ import annotations

import copy
import typing as t

from ...common.plan import Plan
from . import look
from .options import Options

Facts = t.Dict[str, t.Any]


def facts(options: Options, state: look.State) -> Facts:
    """A cluster's public facts."""
    return {
        "keystore": {
            "kind": options.keystore,
            "location": options.keystore_location,
            "made": state.made,
            "open": "yes" if state.known_open else "not known",
            "automatic": look.AUTO_OPEN in state.location.files or state.files.pin != look.ABSENT,
        },
        "settings": dict(state.files.settings) if state.files.settings is not None else None,
        "pin_at_rest": state.files.pin != look.ABSENT,
        "master_key": {"tag": state.key.tag, "set": state.key.since[:10], "key_id": state.key.key_id} if state.key else None,
        "tablespaces": {},
    }


def expected(before: Facts, steps: Plan) -> Facts:
    """The facts after a plan, as far as it tells them."""
    after = copy.deepcopy(before)
    keystore = after.setdefault("keystore", {})
    for step in steps:
        data = step.data
        if step.action in ("write_include_file", "take_pin_out"):
            after["settings"] = {name.lower(): value for name, value in data["settings"].items()}
            after["pin_at_rest"] = data["with_pin"]
        elif step.action in ("set_master_key", "declare_master_key", "rotate_master_key"):
            keystore.update(made=True, open="yes")
            after["master_key"] = {"tag": data.get("tag", ""), "set": "new", "key_id": data.get("key_id", "")}
        elif step.action == "open_keystore":
            keystore["open"] = "yes"
        elif step.action in ("enable_auto_open", "disable_auto_open"):
            keystore["automatic"] = step.action == "enable_auto_open"
        elif step.action in ("create_tablespace", "set_algorithm", "set_tablespace_owner"):
            shown = after.setdefault("tablespaces", {}).setdefault(data["name"], {})
            names = {"path": "location", "owner": "owner", "algorithm": "algorithm"}
            shown.update({words: data[name] for name, words in names.items() if data.get(name)})
    return after
