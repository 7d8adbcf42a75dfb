# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host for tests of the engine: a token, an image, a state directory and a PostgreSQL server, all of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import time
import types
import typing as t
from pathlib import Path
from unittest import mock

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.tests.integration import filesystems, postgres, refusals, support
from ansible_collections.hsm.tde.tests.integration.documented import documented

PASSPHRASE = "correct horse battery"
RECOVERY = {"name": "recovery", "protection": "passphrase", "passphrase": PASSPHRASE}
SLOTS = [{"name": "primary"}, RECOVERY]


def usable() -> bool:
    """Whether this host can run these tests."""
    return (
        os.geteuid() == 0
        and bool(postgres.programs())
        and bool(support.softhsm_library())
        and os.path.exists("/dev/loop-control")
    )


class Estate:
    """One cluster on one host.

    :ivar options: the engine's dictionary; :ivar server: the server, or the one to be.
    """

    def __init__(self, home: Path, **engine: t.Any) -> None:
        self.home = home
        self.hsm = support.SoftHsm(home / "hsm")
        self.hsm.add_token("demo")
        self.hsm.add_token("second")
        self.state = home / "state"
        self.mount = home / "mnt"
        self.image = home / "image"
        self.options: dict[str, t.Any] = {
            "storage": "image", "mount_point": str(self.mount), "image": str(self.image), "image_size": "300M", **engine,
        }  # fmt: skip
        self.server = postgres.Server(home, Path(engine["data_directory"]) if "data_directory" in engine else None)

    def arguments(self, **more: t.Any) -> dict[str, t.Any]:
        """A task's options; one that is None is left out."""
        arguments = {
            "engine": "postgresql", "cluster": "main", "state_directory": str(self.state), "postgresql": self.options,
            **self.hsm.options(token_label="demo", pin=self.hsm.pin), **self.server.options(), **more,
        }  # fmt: skip
        return {name: value for name, value in arguments.items() if value is not None}

    def run_file(self, module: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """Run a module's file as Ansible does, which must succeed."""
        result = support.run_module_file(module, self.arguments(**more), check=check, diff=True)
        assert not result.get("failed"), result
        return result

    def run(self, module: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """Run a module without the start of a Python of its own, which must succeed."""
        result = answer(module, self.arguments(**more), check)
        assert not result.get("failed"), result
        return result

    def refused(self, module: str, code: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """Run a module, which must fail with an error code and a message that helps, and leave everything as it was."""
        before = self.fingerprint()
        result = answer(module, self.arguments(**more), check)
        refusals.clear(result, code, secrets=[PASSPHRASE, self.hsm.pin])
        assert self.fingerprint() == before
        return result

    def killed(self, module: str, after: float, **more: t.Any) -> bool:
        """Run a module and kill it after some seconds; :returns: whether it was killed before its end."""
        arguments = self.arguments(**more)
        pid = os.fork()
        if pid == 0:
            try:
                with open(os.devnull, "w", encoding="ascii") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
                    os.dup2(nowhere.fileno(), 2)
                    act(module, arguments, False)
            finally:
                os._exit(0)
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True

    def fingerprint(self) -> str:
        """What must not change when a run is refused: state (but for notes of failed acts), tokens, places, kernel keys."""
        digest = hashlib.sha256()
        for path in sorted(self.state.rglob("*")):
            if path.is_file() and not path.name.endswith("lock") and path.name != "refused.json":
                digest.update(str(path).encode() + path.read_bytes())
        # A login writes to SoftHSM's token.object; a key is a file of its own.
        names = [sorted(str(path) for path in self.hsm.tokendir.rglob("*.object"))]
        names.append(sorted(os.listdir(self.mount)) if self.mount.exists() else [])
        digest.update(json.dumps([names, self.image.exists(), os.path.ismount(self.mount)]).encode())
        return digest.hexdigest()

    def journal(self) -> list[dict[str, t.Any]]:
        """The journal, its chain checked."""
        return Journal(StateDirectory(str(self.state)).journal).entries()

    def in_token(self, label: str, second: bool = False) -> list[str]:
        """The ids of the keys with a label in token ``demo``, or ``second``."""
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import find
        from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session

        def act() -> list[str]:
            with open_session(self.hsm.access("second" if second else "demo"), StateDirectory(str(self.state))) as session:
                return [key.id.hex() for key in find(session, label)]

        return support.in_child(act)

    def keys(self) -> list[str]:
        """The names of the data keys in the store."""
        return sorted(path.stem for path in (self.state / "store/main").glob("[!.]*.json"))

    def unmount(self) -> None:
        """Take the storage away, as a reboot does, with the kernel keys."""
        if os.path.ismount(self.mount):
            filesystems.reboot(self.mount)

    def raw(self, marker: str) -> int:
        """How often a text stands in the raw image."""
        subprocess.run(["sync", "-f", str(self.mount)], check=True)
        with open(self.image, "rb") as handle:
            count, rest = 0, b""
            while block := handle.read(1 << 22):
                count += (rest + block).count(marker.encode())
                rest = block[-len(marker) + 1 :]
        return count

    @contextlib.contextmanager
    def token_moved_away(self) -> t.Iterator[None]:
        """The folder of the tokens is not mounted: an empty one shows."""
        aside = self.home / "tokens-aside"
        self.hsm.tokendir.rename(aside)
        self.hsm.tokendir.mkdir()
        try:
            yield
        finally:
            assert list(self.hsm.tokendir.iterdir()) == [], "something was created in the token's place"
            self.hsm.tokendir.rmdir()
            aside.rename(self.hsm.tokendir)


def act(module: str, arguments: t.Mapping[str, t.Any], check: bool) -> dict[str, t.Any]:
    """What a module answers: its options validated as Ansible does, its act run in this process."""
    found = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{module}")
    validated = ArgumentSpecValidator(found.SPEC).validate(dict(arguments))
    assert not validated.error_messages, validated.error_messages
    warnings: list[str] = []
    stub = types.SimpleNamespace(params=validated.validated_parameters, check_mode=check, warn=warnings.append)
    try:
        return {**found.act(stub), "warnings": warnings}
    except TdeError as exc:
        return {"failed": True, "msg": str(exc), **exc.result()}


def answer(module: str, arguments: t.Mapping[str, t.Any], check: bool) -> dict[str, t.Any]:
    """As :func:`act`, in a child of this process: a PKCS#11 library cannot be left."""
    result = support.in_child(lambda: act(module, arguments, check))
    documented(module, result)
    return result


@contextlib.contextmanager
def estate(**engine: t.Any) -> t.Iterator[Estate]:
    """An estate that leaves nothing behind; ``{home}`` in the engine's options is its folder."""
    # Half a second of scrypt for each look at a keyslot would be most of the tests' time.
    cheap = mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10))
    with cheap, postgres.folder() as home:
        made = Estate(
            home, **{name: value.format(home=home) if isinstance(value, str) else value for name, value in engine.items()}
        )
        try:
            yield made
        finally:
            made.server.stop()
            deadline = time.monotonic() + 5
            while os.path.ismount(made.mount) and time.monotonic() < deadline:
                subprocess.run(["umount", str(made.mount)], check=False, capture_output=True)
                time.sleep(0.05)


def moments(count: int, longest: float) -> list[float]:
    """Random moments, in seconds; the seed is printed when a test fails."""
    seed = random.randrange(1 << 32)
    print(f"moments of seed {seed}")
    chance = random.Random(seed)
    return sorted(chance.uniform(0.01, longest) for _number in range(count))
