# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""HSMs and clients of the stand-in for nShield (tests/standins/nshield), in memory."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import support

STANDIN = support.ROOT / "tests/standins/nshield"
if str(STANDIN) not in sys.path:
    sys.path.insert(0, str(STANDIN))
world = importlib.import_module("world")

PASSPHRASE = "Softcard-1"
ACS_PASSPHRASE = "Admin-card-1"
#: The label that Oracle gives its master keys, before a number.
MASTER = "ORACLE.TDE.HSM.MK."


class Site:
    """One Security World: HSMs, and clients by name.

    :ivar hsm: the hardware; :ivar clients: the hosts; :ivar a: the first, on which the world was made.
    """

    def __init__(self, base: Path, *, clients: t.Sequence[str] = ("a",), modules: int = 1, slots: int = 2, **more: t.Any) -> None:
        self.base = base
        self.hsm = world.Hsm.create(base / "hsm", modules=modules, slots=slots)
        self.clients = {name: world.Client.install(base / name, self.hsm, name) for name in clients}
        self.a = self.clients[clients[0]]
        self.a.create_world(acs_passphrase=ACS_PASSPHRASE, **more)
        for client in self.clients.values():
            (client.home / "cknfastrc").write_text("# made by the installer\nCKNFAST_LOADSHARING=1\n")
            if client is not self.a:
                world.copy_world(self.a, client)

    def options(self, client: t.Any = None, **more: t.Any) -> dict[str, t.Any]:
        """A module's options that concern where things are; each client has a state directory of its own."""
        home = (client or self.a).home
        return {"nfast_home": str(home), "state_directory": str(home.with_suffix(".state")), "timeout": 20, **more}

    def run(
        self, module: str, client: t.Any = None, *, check: bool = False, diff: bool = False, **options: t.Any
    ) -> dict[str, t.Any]:
        """Run a module on a client."""
        return support.run_module(module, self.options(client, **options), check=check, diff=diff)

    def commands(self, name: str) -> list[list[str]]:
        """The arguments of a command's runs, in order."""
        return [entry["arguments"] for entry in self.hsm.journal() if entry.get("command") == name]


@contextlib.contextmanager
def site(**more: t.Any) -> t.Iterator[Site]:
    """A new world, gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="hsm-tde-nshield-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    base.chmod(0o755)
    try:
        yield Site(base, **more)
    finally:
        shutil.rmtree(base)
