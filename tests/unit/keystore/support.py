# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Cheap keyslots, and edits as somebody makes them who can write a file and holds no key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.keystore.passphrase import PassphraseCredential, PassphraseSlot, Scrypt
from ansible_collections.hsm.tde.tests.unit.keystore import stranger

CHEAP = Scrypt(log_n=10, r=1)


def slot(name: str, passphrase: str = "") -> PassphraseSlot:
    return PassphraseSlot(name, Secret(passphrase or f"passphrase of {name}"), CHEAP)


def credential(passphrase: str) -> PassphraseCredential:
    return PassphraseCredential(Secret(passphrase))


@contextlib.contextmanager
def refused(code: str) -> t.Iterator[None]:
    with pytest.raises(TdeError) as caught:
        yield
    assert caught.value.code == code, str(caught.value)


def edited(raw: bytes, change: t.Callable[[dict[str, t.Any]], None]) -> bytes:
    """A file after somebody changed it and put the checksum right, without the data key."""
    content = json.loads(raw)
    change(content)
    text = (stranger.spell(content) + "\n").encode()[:-68]
    return text + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'
