# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Fixtures that integration tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.tests.integration import filesystems, kmip, support


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    """A state directory that does not exist yet."""
    return support.new_state(tmp_path / "state")


@pytest.fixture
def empty_softhsm(tmp_path: Path) -> support.SoftHsm:
    """A private SoftHSM without a token."""
    if not support.softhsm_library():
        pytest.skip("SoftHSM is not installed")
    return support.SoftHsm(tmp_path / "softhsm")


@pytest.fixture
def softhsm(empty_softhsm: support.SoftHsm) -> support.SoftHsm:
    """A private SoftHSM with the token ``demo`` (PINs: its attributes ``pin`` and ``so_pin``)."""
    empty_softhsm.add_token("demo")
    return empty_softhsm


@pytest.fixture
def two_tokens(softhsm: support.SoftHsm) -> support.SoftHsm:
    """A private SoftHSM with the tokens ``demo`` and ``second``."""
    softhsm.add_token("second")
    return softhsm


@pytest.fixture
def factory_opencryptoki(tmp_path: Path) -> support.OpenCryptoki:
    """A private openCryptoki whose soft token is as it comes from the factory; acts inside ``.run(fn)``."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mount namespaces and pkcsslotd")
    if not support.opencryptoki_library():
        pytest.skip("openCryptoki is not installed")
    return support.OpenCryptoki(tmp_path / "opencryptoki")


@pytest.fixture
def opencryptoki(factory_opencryptoki: support.OpenCryptoki) -> support.OpenCryptoki:
    """A private openCryptoki with the token ``demo``; acts inside ``.run(fn)``."""
    factory_opencryptoki.add_token("demo")
    return factory_opencryptoki


@pytest.fixture
def encrypted_mount(tmp_path: Path) -> Iterator[Path]:
    """The mount point of a new ext4 file system with the encrypt feature, 48 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root: loop devices and mounts")
    with filesystems.mounted(tmp_path) as point:
        yield point


@pytest.fixture(scope="module")
def kmip_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmip.KmipServer]:
    """A key management server that speaks KMIP, one a test module."""
    server = kmip.KmipServer(tmp_path_factory.mktemp("kmip") / "server")
    yield server
    server.close()
