# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Loading PKCS#11 libraries: each that cannot be loaded has its own error, and one that can survives forks and threads."""

from __future__ import annotations

import os
import shutil
import struct
import threading
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import LibraryAccess, load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration.support import OpenCryptoki, SoftHsm, in_child

_NOBODY = 65534


def refused(path: str | Path, env: t.Mapping[str, str] | None = None, before: t.Callable[[], None] | None = None) -> TdeError:
    """The error of loading a library in a child."""
    with pytest.raises(TdeError) as caught:
        in_child(lambda: load(LibraryAccess(str(path), env or {})) and None, before=before)
    return caught.value


def elf(path: Path, cls: int, machine: int) -> Path:
    """The header of a shared object (elf(5)): ET_DYN for a class (1: 32, 2: 64 bits) and machine."""
    path.write_bytes(b"\x7fELF" + bytes([cls, 1, 1]) + bytes(9) + struct.pack("<HHI", 3, machine, 1) + bytes(40))
    return path


def test_no_library(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.so").code == "library_absent"
    assert refused(tmp_path / "x" / "y").code == "library_absent"


def test_a_relative_path(tmp_path: Path) -> None:
    assert refused("libsofthsm2.so").code == "invalid_option"


def test_what_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "empty.so").write_text("")
    assert refused(tmp_path / "text.so").code == "library_not_pkcs11"
    assert refused(tmp_path / "empty.so").code == "library_not_pkcs11"
    assert refused(tmp_path).code == "library_not_pkcs11"


def test_a_shared_library_of_another_kind(softhsm: SoftHsm) -> None:
    maps = Path("/proc/self/maps").read_text().split()
    libc = next(word for word in maps if "libc.so" in word or "libc-" in word)
    assert refused(libc).code == "library_not_pkcs11"


@pytest.mark.parametrize(("cls", "machine"), [(1, 3), (2, 183), (2, 22)], ids=["i386", "aarch64", "s390x"])
def test_another_architecture(tmp_path: Path, cls: int, machine: int) -> None:
    if os.uname().machine != "x86_64" and cls == 2:
        machine = 62
    error = refused(elf(tmp_path / "lib.so", cls, machine))
    assert (error.code, error.cause) == ("library_wrong_architecture", "unsupported")


def test_a_library_that_does_not_link(tmp_path: Path) -> None:
    assert refused(elf(tmp_path / "lib.so", 2, 62)).code == "library_not_loaded"


def test_a_library_that_others_can_replace(softhsm: SoftHsm, tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    copy = folder / "libsofthsm2.so"
    shutil.copy(softhsm.library, copy)
    assert in_child(lambda: load(LibraryAccess(str(copy), softhsm.environment)).path) == str(copy)
    copy.chmod(0o664)
    assert refused(copy).code == "library_not_trusted"
    copy.chmod(0o644)
    os.chown(copy, _NOBODY, -1)
    assert refused(copy).code == "library_not_trusted"
    os.chown(copy, 0, -1)
    folder.chmod(0o777)
    assert refused(copy).code == "library_not_trusted"
    # A link from a safe place does not make it safe.
    (tmp_path / "link.so").symlink_to(copy)
    assert refused(tmp_path / "link.so").code == "library_not_trusted"


def test_an_unreadable_library(softhsm: SoftHsm) -> None:
    folder = Path("/var/tmp/hsm-tde-test-unreadable")  # unlike pytest's folders, another user reaches it
    folder.mkdir(mode=0o755)
    try:
        copy = folder / "libsofthsm2.so"
        shutil.copy(softhsm.library, copy)
        copy.chmod(0o600)
        assert refused(copy, before=lambda: os.setuid(_NOBODY)).code == "library_unreadable"
    finally:
        shutil.rmtree(folder)


def test_a_library_that_does_not_start(softhsm: SoftHsm, tmp_path: Path) -> None:
    error = refused(softhsm.library, {"SOFTHSM2_CONF": str(tmp_path / "missing.conf")})
    assert error.code == "library_not_started"
    assert "missing.conf" in error.next_step
    assert error.details["ckr"].startswith("CKR_")


def test_opencryptoki_without_its_service(opencryptoki: OpenCryptoki) -> None:
    with pytest.raises(TdeError) as caught:
        opencryptoki.run(lambda: load(opencryptoki.library_access()) and None, daemon=False)
    assert caught.value.code == "opencryptoki_daemon_down"
    assert "pkcsslotd does not run" in caught.value.message


@pytest.mark.parametrize("daemon", [True, False])
def test_opencryptoki_for_a_user_outside_its_group(opencryptoki: OpenCryptoki, daemon: bool) -> None:
    """The library gives the same answer as without the daemon; the two are told apart."""

    def act() -> None:
        os.setgroups([])
        os.setuid(_NOBODY)
        load(opencryptoki.library_access())

    with pytest.raises(TdeError) as caught:
        opencryptoki.run(act, daemon=daemon)
    assert caught.value.code == "opencryptoki_user_outside_group"
    assert "nobody" in caught.value.message


def test_one_environment_a_process(softhsm: SoftHsm, tmp_path: Path) -> None:
    other = SoftHsm(tmp_path / "other")

    def act() -> bool:
        first = load(softhsm.library_access())
        same = load(LibraryAccess(os.path.realpath(softhsm.library), softhsm.environment)) is first
        load(other.library_access())
        return same

    with pytest.raises(TdeError) as caught:
        in_child(act)
    assert caught.value.code == "library_environment_conflict"


def test_a_path_through_a_link_is_the_same_library(softhsm: SoftHsm, tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(softhsm.library)
    assert in_child(lambda: load(softhsm.library_access()) is load(LibraryAccess(str(link), softhsm.environment)))


def test_two_libraries_in_one_process(softhsm: SoftHsm, opencryptoki: OpenCryptoki) -> None:
    def act() -> list[int]:
        return [len(load(one.library_access()).slots()) for one in (softhsm, opencryptoki)]

    assert opencryptoki.run(act) == [2, 1]


@pytest.mark.parametrize("kind", ["softhsm", "opencryptoki"])
def test_a_forked_child_works_and_so_does_its_parent(kind: str, state: StateDirectory, request: pytest.FixtureRequest) -> None:
    token = request.getfixturevalue(kind)

    def use() -> int:
        with open_session(token.access(), state) as session:
            return len(session.raw.generate_random(128))

    def act() -> list[int]:
        return [use(), in_child(use), use()]

    assert token.run(act) == [16, 16, 16]


@pytest.mark.parametrize("kind", ["softhsm", "opencryptoki"])
def test_threads(kind: str, state: StateDirectory, request: pytest.FixtureRequest) -> None:
    """python-pkcs11 starts libraries without locking and lets other threads run during calls: that crashed both tokens."""
    token = request.getfixturevalue(kind)

    def act() -> int:
        import pkcs11

        with open_session(token.access(), state, rw=True) as session:
            done = []

            def work() -> None:
                raw = session.raw.token.open(rw=True)
                for _round in range(40):
                    key = raw.generate_key(pkcs11.KeyType.AES, 256)
                    data = key.encrypt(b"x" * 64, mechanism=pkcs11.Mechanism.AES_CBC_PAD, mechanism_param=bytes(16))
                    done.append(len(data))

            threads = [threading.Thread(target=work) for _number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return len(done)

    assert token.run(act) == 160
