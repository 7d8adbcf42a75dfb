# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the interface decides for all engines."""

from __future__ import annotations

import types
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Engine, SlotWish


@pytest.mark.parametrize(
    ("opened_with", "protections", "needs"),
    [
        ("keyslot", ["passphrase", "passphrase"], False),
        ("keyslot", ["token", "passphrase"], True),
        ("keyslot", ["kmip"], True),
        ("keyslot", None, True),
        *((own, ["passphrase"], True) for own in ("token", "passphrase", "nothing")),
    ],
)
def test_a_passphrase_derives_the_master_key_of_our_store_alone(
    opened_with: str, protections: list[str] | None, needs: bool
) -> None:
    engine = t.cast(Engine, types.SimpleNamespace(opened_with=lambda: opened_with))
    slots = None if protections is None else [SlotWish(str(number), one) for number, one in enumerate(protections)]
    assert Engine.needs_master_key(engine, slots) is needs
