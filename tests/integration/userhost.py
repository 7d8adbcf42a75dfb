# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host on which a database's own user reaches a token: private folders, the command, and what the user runs."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.plugins.module_utils.command import zipapp
from ansible_collections.hsm.tde.plugins.module_utils.common import plan as plans
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines import record as records
from ansible_collections.hsm.tde.plugins.module_utils.engines.userside import UserSide
from ansible_collections.hsm.tde.tests.integration import kmip, postgres, support

Done = subprocess.CompletedProcess[bytes]


class UserHost:
    """A host. The user's token ``demo`` lies in SoftHSM files of the user's own.

    :param home: a folder that everybody may pass through (``postgres.folder``).
    """

    def __init__(self, home: Path, user: str = postgres.USER) -> None:
        self.home = home
        self.user = pwd.getpwnam(user)
        self.softhsm = support.SoftHsm(home / "softhsm")
        self.softhsm.add_token("demo")
        (home / "softhsm").chmod(0o755)
        self.give(self.softhsm.tokendir)
        self.state = support.new_state(home / "state")
        self.command = home / "hsm-tde"
        self.pin_file = home / "pin"
        self.command.write_bytes(zipapp.build(sys.executable, self.state.path))
        self.command.chmod(0o755)

    def give(self, folder: Path) -> None:
        """Make a folder and all in it the user's."""
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def kmip(self, server: kmip.KmipServer, client: kmip.Certificate | str = "") -> dict[str, t.Any]:
        """The options ``kmip_*`` with which the user reaches a server: its certificate and key are the user's own.

        :param client: by default one of this host's name.
        """
        one = server.client(client or self.home.name) if isinstance(client, str) else client
        folder = self.home / "kmip"
        folder.mkdir(exist_ok=True)
        options = server.options(one)
        for name, mode in (("kmip_ca", 0o644), ("kmip_certificate", 0o644), ("kmip_certificate_key", 0o400)):
            copy = folder / Path(options[name]).name
            copy.unlink(missing_ok=True)
            copy.write_bytes(Path(options[name]).read_bytes())
            copy.chmod(mode)
            if name == "kmip_certificate_key":
                os.chown(copy, self.user.pw_uid, self.user.pw_gid)
            options[name] = str(copy)
        return options

    @property
    def side(self) -> UserSide:
        return UserSide(self.state, "main", self.user)

    def publish(self, engine: str = "fep", source: t.Mapping[str, str] | None = None, **options: t.Any) -> None:
        """What an engine does for the commands of its server's user: state directory, record, PIN."""
        serial = self.softhsm.run(self._serial)
        token = records.Token(self.softhsm.library, self.softhsm.environment, "demo", serial)
        source = source or {"kind": "file", "path": str(self.pin_file)}
        record = records.Record("main", engine, {"os_user": self.user.pw_name, **options}, tokens=(token,), pin_source=source)
        pin = Secret(self.softhsm.pin)
        plans.run(self.side.plan(record, pin), self.side.handlers(pin))

    def _serial(self) -> str:
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import find

        return find(load(self.softhsm.library_access()), self.softhsm.access().selector, None).serial

    def run(
        self, *arguments: str, stdin: bytes = b"", root: bool = False, cwd: str = "/", user: str = "", **environment: str
    ) -> Done:
        """The command as the server runs it: as the user, without a terminal."""
        entry = pwd.getpwnam(user) if user else self.user
        identity: dict[str, t.Any] = {} if root else {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        return subprocess.run(
            [str(self.command), *arguments], cwd=cwd, env=environment, input=stdin, capture_output=True, timeout=60, check=False,
            start_new_session=True, **identity,
        )  # fmt: skip
