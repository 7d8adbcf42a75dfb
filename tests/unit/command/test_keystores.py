# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which token the next boot logs in to."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import keystores
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines.bootpin import before_removals
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore

OLD, NEW, OTHER = ("primary", "old"), ("primary", "new"), ("recovery", "other")
PAPER = ("recovery", None)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([[OLD, PAPER], [OLD, PAPER]], ["old"]),
        ([[OTHER, OLD], [OTHER, OLD]], ["old", "other"]),
        ([[OLD, PAPER, NEW], [OLD, PAPER]], ["old", "new"]),
        ([[OLD, PAPER, NEW], [OLD, PAPER, NEW]], ["old", "new"]),
        ([[PAPER, NEW], [OLD, PAPER, NEW]], ["new", "old"]),
        ([[OTHER, NEW], [OLD, OTHER, NEW]], ["new", "other", "old"]),
        ([[PAPER], [PAPER]], []),
        ([], []),
    ],
)
def test_it_is_one_that_opens_every_data_key(
    monkeypatch: pytest.MonkeyPatch, keys: list[list[tuple[str, str | None]]], expected: list[str]
) -> None:
    def slot(number: int, name: str, token: str | None) -> dict[str, t.Any]:
        protection = "token" if token else "passphrase"
        return {"name": name, "protection": protection, "created": str(number), "token_label": token, "token_serial": "1"}

    facts = [
        {"key_id": str(number), "keyslots": [slot(place, *one) for place, one in enumerate(slots)]}
        for number, slots in enumerate(keys)
    ]
    monkeypatch.setattr(KeyStore, "describe", lambda self: facts)
    assert [name.label for name in keystores.keyslot_tokens(StateDirectory("/nowhere"), "main")] == expected


def test_the_file_with_the_pin_changes_before_the_first_keyslot_goes() -> None:
    add, prove, remove, pin = (
        Step(action, "") for action in ("add_keyslot", "prove_keyslot", "remove_keyslot", "write_pin_source")
    )
    assert before_removals([add, prove, remove, remove], [pin]) == [add, prove, pin, remove, remove]
    assert before_removals([add, prove], [pin]) == [add, prove, pin]
    assert before_removals([], []) == []
