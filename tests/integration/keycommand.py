# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A cluster of the stand-in that asks a command for its key as EDB's and CYBERTEC's servers do."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path
from unittest import mock

from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.tests.integration import postgres, support
from ansible_collections.hsm.tde.tests.integration.userhost import UserHost

_STANDIN = support.ROOT / "tests/standins/keycommand/server"
RECOVERY_PASSPHRASE = "kept off the host 4711"
RECOVERY = {"name": "recovery", "protection": "passphrase", "passphrase": RECOVERY_PASSPHRASE}
SLOTS = [{"name": "primary"}, RECOVERY]


def cheap_passphrases() -> contextlib.AbstractContextManager[t.Any]:
    """Half a second of scrypt for each look at a keyslot would be most of the tests' time."""
    return mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10))


class Cluster:
    """A cluster of the stand-in on a host of its own."""

    def __init__(self, home: Path, kind: str) -> None:
        self.host, self.kind = UserHost(home), kind
        (home / "srv").mkdir()
        self.host.give(home / "srv")
        self.data = home / "srv/data"
        self.standin = home / "server"
        shutil.copy(_STANDIN, self.standin)

    def arguments(self, **options: t.Any) -> dict[str, t.Any]:
        engine = {
            "kind": self.kind,
            "command": str(self.host.command),
            "data_directory": str(self.data),
            **options.pop("keycommand", {}),
        }
        return {
            "engine": "keycommand", "cluster": "main", "state_directory": self.host.state.path, "keycommand": engine,
            **self.host.softhsm.options(token_label="demo", pin=self.host.softhsm.pin), **options,
        }  # fmt: skip

    def module(self, name: str, *, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        return support.run_module(name, self.arguments(**options), check=check)

    def keystore(self, **options: t.Any) -> dict[str, t.Any]:
        made = self.module(
            "tde_keystore", **{"keyslots": SLOTS, "pin_source": {"kind": "file", "path": str(self.host.pin_file)}, **options}
        )
        assert not made.get("failed"), made
        return made

    def rotate(self, tag: str, **options: t.Any) -> dict[str, t.Any]:
        return self.module("tde_master_key", state="rotated", tag=tag, **options)

    def server(self, *arguments: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(self.standin), self.kind, arguments[0], "-D", str(data or self.data), *arguments[1:]]
        return postgres.as_postgres(*argv, check=False)

    def starts(self, data: Path | None = None) -> bool:
        done = self.server("start", data=data)
        started = done.returncode == 0 and "ready to accept" in done.stderr
        if not started:
            print(done.stderr)
        return started

    @property
    def key(self) -> Path:
        return self.data / "pg_encryption/key.bin"
