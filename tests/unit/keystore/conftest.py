# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the tests of the wrapped-key store share. Keyslots here are under passphrases with the cheapest scrypt allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(str(tmp_path / "state"))


@pytest.fixture
def store(state: StateDirectory) -> KeyStore:
    return KeyStore(state, "main")
