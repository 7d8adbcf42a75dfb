# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host for tests of the engine fep: a token, a state directory and a server of the stand-in, which encrypts nothing."""

from __future__ import annotations

import contextlib
import hashlib
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.tests.integration import estate, fep, postgres, refusals, support
from ansible_collections.hsm.tde.tests.integration.documented import documented

#: PINs and passphrases that no log and no answer may show.
NEW_PIN = "87651234"
PASSPHRASE = "correct horse battery"
NEW_PASSPHRASE = "staple of the new year"

Facts = t.Dict[str, t.Any]


class FepEstate:
    """One cluster on one host.

    :param installation: the token's; None with a keystore in a file. :param host: runs it, if it is openCryptoki.
    :ivar options: the engine's dictionary. :ivar pin: the token's present PIN.
    """

    def __init__(
        self,
        home: Path,
        *,
        installation: support.Installation | None = None,
        host: fep.TokenHost | None = None,
        name: str = "data",
        **options: t.Any,
    ) -> None:
        self.home = home
        self.host = host
        self.installation = installation
        self.pin = installation.pin if installation else ""
        self.state = home / f"state-{name}"
        self.spaces = home / f"spaces-{name}"
        self.spaces.mkdir()
        self.server = fep.FepServer(home, host, data=home / name)
        self.options: Facts = {
            "data_directory": str(self.server.data), "keystore_location": str(home / f"keystore-{name}"),
            "bin_directory": str(self.server.bin), "os_user": postgres.USER, "tablespace_directory": str(self.spaces), **options,
        }  # fmt: skip

    def arguments(self, **more: t.Any) -> Facts:
        """A task's options; one that is None is left out."""
        token = self.installation.options(token_label="demo", pin=self.pin) if self.installation else {}
        arguments = {
            "engine": "fep", "cluster": "main", "state_directory": str(self.state), "fep": self.options, **token, **more,
        }  # fmt: skip
        return {name: value for name, value in arguments.items() if value is not None}

    def answer(self, module: str, *, check: bool = False, **more: t.Any) -> Facts:
        """What a module answers."""
        arguments = self.arguments(**more)

        def act() -> Facts:
            return estate.act(module, arguments, check)

        result = self.host.run(act) if self.host else support.in_child(act)
        documented(module, result)
        return result

    def run(self, module: str, *, check: bool = False, **more: t.Any) -> Facts:
        """Run a module, which must succeed."""
        result = self.answer(module, check=check, **more)
        assert not result.get("failed"), result
        return result

    def steps(self, module: str, *, check: bool = False, **more: t.Any) -> list[str]:
        """What a module that succeeds does, by its steps."""
        return [step["action"] for step in self.run(module, check=check, **more)["plan"]]

    def refused(self, module: str, code: str, *, check: bool = False, **more: t.Any) -> Facts:
        """Run a module, which must fail with an error code and a message that helps, and leave everything as it was."""
        before = self.fingerprint()
        result = self.answer(module, check=check, **more)
        refusals.clear(result, code, secrets=[PASSPHRASE, NEW_PASSPHRASE, NEW_PIN, self.pin or PASSPHRASE])
        assert self.fingerprint() == before
        return result

    def fingerprint(self) -> str:
        """What must not change when a run is refused: state (but for refused PINs and notes of failed acts), settings, keystore, folders of tablespaces."""
        digest = hashlib.sha256()
        kept = ("refused.json", "trying.json", "journal.jsonl", "journal.jsonl.head")
        for folder in (self.state, Path(self.options.get("keystore_location", "/nonexistent"))):
            for path in sorted(folder.rglob("*")) if folder.exists() else []:
                if path.is_file() and not path.name.endswith("lock") and path.name not in kept:
                    digest.update(str(path).encode() + path.read_bytes())
        for name in ("postgresql.conf", "hsm-tde-kms.conf"):
            path = self.server.data / name
            digest.update(path.read_bytes() if path.exists() else b"-")
        digest.update(repr(sorted(str(path) for path in self.spaces.rglob("*"))).encode())
        return digest.hexdigest()

    def include(self) -> str:
        """What the include file says."""
        return (Path(self.options["keystore_location"]) / "hsm-tde.conf").read_text()

    def journal(self) -> list[Facts]:
        """The journal, its chain checked."""
        return Journal(str(self.state / "journal.jsonl")).entries()

    def restart(self) -> None:
        """Restart the server, as the user does when a result says so."""
        self.server.restart()

    def algorithms(self) -> dict[str, str]:
        """The tablespaces' algorithms as the server says them."""
        rows = self.server.psql(
            "SELECT spcname, spcencalgo FROM pgx_tablespaces v JOIN pg_tablespace s ON s.oid = v.spctablespace"
        )
        return dict(row.split("|") for row in rows.splitlines() if not row.startswith("pg_"))

    def secrets_shown(self, *secrets: str) -> list[str]:
        """The secrets that stand in the server's log."""
        said = self.server.said()
        return [secret for secret in secrets if secret in said]


@contextlib.contextmanager
def file_estate(home: Path, **options: t.Any) -> t.Iterator[FepEstate]:
    """An estate with a keystore in a file, its server initialised and started."""
    made = FepEstate(home, keystore="file", **options)
    made.server.initdb()
    made.server.configure(log_statement="all", log_min_duration_statement="0", log_min_error_statement="debug5")
    made.server.start()
    try:
        yield made
    finally:
        made.server.stop()
