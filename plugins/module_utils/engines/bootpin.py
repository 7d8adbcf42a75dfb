# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The PIN that opens a keystore at boot, where it rests in a file: written once it was proved, changed before a keyslot goes."""

from __future__ import annotations

import os
import typing as t

from ..common.errors import TdeError
from ..common.files import make_private_directory, write_atomic
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..pkcs11.resting import leftovers, remove_leftovers, resting_pins
from .keyring import Keyring


def boot_pin(ring: Keyring) -> Secret | None:
    """The PIN that opens the keystore at boot: that of the keyslot ``primary``, else the task's."""
    primary = next((wish.access for wish in ring.wishes if wish.name == "primary"), None)
    access = primary or ring.request.access
    return access.pin if access else None


def pin_steps(ring: Keyring, source: t.Mapping[str, t.Any]) -> Plan:
    """The step that writes the file, if it is needed; a token of another PIN gets the file rewritten.

    :param source: the source wished for, as a cluster's record has it.
    :raises TdeError: ``credential_missing``.
    """
    if source.get("kind") != "file":
        return []
    path, pin, there = source["path"], boot_pin(ring), _at_rest(source["path"])
    if pin is None and not there:
        raise TdeError("credential_missing", "there is no such file, and no PIN was given to write it", obj=f"pin_source {path}")
    if pin is None or (pin in there and not leftovers(path)):
        return []
    return [Step("write_pin_source", path, "so that the keystore opens at boot", {"path": path})]


def _at_rest(path: str) -> list[Secret]:
    try:
        return resting_pins(path)
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        return []


def write_pin(path: str, pin: Secret) -> None:
    """The act of the step."""
    make_private_directory(os.path.dirname(path))
    remove_leftovers(path)
    write_atomic(path, pin.reveal() + b"\n")


def before_removals(plan: Plan, steps: Plan) -> Plan:
    """Put steps before the first keyslot that goes, or at the end.

    So the file with the PIN changes while every data key is under both tokens: wherever the run is stopped but between it
    and the first removal, the next boot finds all of them under the token whose PIN lies there.
    """
    number = next((number for number, step in enumerate(plan) if step.action == "remove_keyslot"), len(plan))
    return [*plan[:number], *steps, *plan[number:]]
