# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""SoftHSM empties token.object at each login; a kill at that moment must not cost the token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration.support import SoftHsm


def objects(softhsm: SoftHsm, state: StateDirectory, make: bool = False) -> int:
    """How many objects a session sees, after it made one more if asked to."""

    def act() -> int:
        import pkcs11

        with open_session(softhsm.access(), state, rw=True) as session:
            if make:
                session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label="k")
            return len(list(session.raw.get_objects()))

    return softhsm.run(act)


def folder_of(softhsm: SoftHsm) -> Path:
    return next(softhsm.tokendir.iterdir())


def test_an_emptied_token_comes_back_with_its_keys(softhsm: SoftHsm, state: StateDirectory) -> None:
    assert objects(softhsm, state, make=True) == 1
    token = folder_of(softhsm) / "token.object"
    assert os.stat(token.with_name("token.copy")).st_mode & 0o777 == os.stat(token).st_mode & 0o777 == 0o600
    os.truncate(token, 0)
    assert objects(softhsm, state) == 1
    assert token.stat().st_size > 0


def test_without_a_copy_it_stays_lost_and_nothing_is_made_up(softhsm: SoftHsm, state: StateDirectory) -> None:
    token = folder_of(softhsm) / "token.object"
    os.truncate(token, 0)
    with pytest.raises(TdeError) as caught:
        objects(softhsm, state)
    assert caught.value.code == "token_absent"
    assert token.stat().st_size == 0


def test_a_copy_behind_a_link_is_neither_read_nor_written(softhsm: SoftHsm, state: StateDirectory, tmp_path: Path) -> None:
    folder = folder_of(softhsm)
    (tmp_path / "elsewhere").write_bytes(b"untouched")
    (folder / "token.copy").symlink_to(tmp_path / "elsewhere")
    objects(softhsm, state)
    assert (tmp_path / "elsewhere").read_bytes() == b"untouched"


def test_softhsm_killed_while_it_writes(softhsm: SoftHsm, state: StateDirectory) -> None:
    """strace kills a login between truncating the file and writing it; the next run has token and key."""
    import shutil
    import subprocess
    import sys

    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    objects(softhsm, state, make=True)
    script = (
        "import sys\n"
        "from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret\n"
        "from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import LibraryAccess, load\n"
        "library = load(LibraryAccess(sys.argv[1], {'SOFTHSM2_CONF': sys.argv[2]}))\n"
        "raw = library.raw.get_token(token_label='demo').open()\n"
        "library.login(raw.handle, 'user', Secret(sys.stdin.read()))\n"
    )
    token = folder_of(softhsm) / "token.object"
    strace = ["strace", "-qq", "-f", "-P", str(token), "-e", "trace=write", "-e", "inject=write:signal=KILL:when=1"]
    done = subprocess.run(
        [*strace, sys.executable, "-c", script, softhsm.library, str(softhsm.conf)],
        input=softhsm.pin,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert token.stat().st_size == 0, "the kill came at another moment: the test shows nothing"
    assert objects(softhsm, state) == 1
