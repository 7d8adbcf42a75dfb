# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Servers of the stand-in for pg_tde (tests/standins/pg_tde), which encrypts nothing; a small Vault."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import typing as t
from pathlib import Path
from unittest import mock

from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase
from ansible_collections.hsm.tde.tests.integration import estate, killing, postgres, support

STANDIN = support.ROOT / "tests/standins/pg_tde"
#: Where the private tree is built: other users run its programs, so the folder is root's and no temporary one.
TREES = Path("/var/cache/hsm-tde-tests")


@functools.cache
def tree(extension: str = "pg_tde") -> Path:
    """The private tree of programs, one for each state of its sources: others may be in use; its ``bin`` is a server's."""
    programs = postgres.programs()
    assert programs, "PostgreSQL is not installed"
    major = Path(programs).parent.name
    TREES.mkdir(mode=0o755, exist_ok=True)
    sources = b"".join(path.read_bytes() for path in sorted(STANDIN.iterdir())) + sys.executable.encode()
    built = TREES / f"{extension}-{major}-{hashlib.sha256(sources).hexdigest()[:12]}"
    subprocess.run([str(STANDIN / "build"), str(built), sys.executable, major, extension], check=True, timeout=120)
    return built


class PgTdeServer(postgres.Server):
    """A private server of the stand-in."""

    def __init__(self, home: Path, data: Path | None = None, extension: str = "pg_tde") -> None:
        super().__init__(home, data)
        self.extension = extension
        self.bin = str(tree(extension) / "bin")

    def initdb(self) -> None:
        """Create the data directory, the library loaded at start; without fsync and with a quiet log."""
        super().initdb()
        self.configure(shared_preload_libraries=self.extension, fsync="off", autovacuum="off", log_checkpoints="off")

    def configure(self, **settings: str) -> None:
        """Append parameters to postgresql.conf; two underscores stand for a dot."""
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                conf.write(f"{name.replace('__', '.')} = '{value}'\n")

    def restart(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Stop and start it."""
        self.stop()
        return self.start(check)

    def said(self) -> str:
        """The server's log."""
        return (self.log / "server.log").read_text()


class Vault:
    """What a key/value engine of version 2 answers, over HTTP on localhost; ``with`` it.

    :ivar keys: versions of each key; :ivar failing: HTTP status that a GET of a key answers instead, None for none.
    """

    TOKEN = "s.test-token-of-a-vault"

    def __init__(self, home: Path) -> None:
        self.keys: dict[str, list[str]] = {}
        self.failing: int | None = None
        self.token = home / "vault-token"
        self.token.write_text(self.TOKEN + "\n")
        self.token.chmod(0o644)
        self._server: http.server.ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        vault = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_args: t.Any) -> None:
                pass

            def answer(self, status: int, body: t.Any = None) -> None:
                raw = json.dumps(body or {}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                if self.headers.get("X-Vault-Token") != vault.TOKEN:
                    return self.answer(403, {"errors": ["permission denied"]})
                if self.path == "/v1/sys/mounts/tde":
                    return self.answer(200, {"type": "kv", "options": {"version": "2"}})
                name = self.path.removeprefix("/v1/tde/data/")
                if vault.failing:
                    return self.answer(vault.failing)
                if name == self.path or name not in vault.keys:
                    return self.answer(404)
                return self.answer(
                    200, {"data": {"data": {"key": vault.keys[name][-1]}, "metadata": {"version": len(vault.keys[name])}}}
                )

            def do_POST(self) -> None:
                if self.headers.get("X-Vault-Token") != vault.TOKEN:
                    return self.answer(403, {"errors": ["permission denied"]})
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = self.path.removeprefix("/v1/tde/data/")
                versions = vault.keys.setdefault(name, [])
                cas = body.get("options", {}).get("cas")
                if cas is not None and cas != len(versions):
                    return self.answer(400, {"errors": ["check-and-set parameter did not match the current version"]})
                versions.append(body["data"]["key"])
                return self.answer(200, {"data": {"version": len(versions)}})

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Down; what it had stays, and so does its port."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Vault:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Host:
    """A server of the stand-in with a token, a state directory and a folder in memory of its own."""

    def __init__(self, home: Path, extension: str = "pg_tde") -> None:
        self.home = home
        self.hsm = support.SoftHsm(home / "hsm")
        self.hsm.add_token("demo")
        self.hsm.add_token("second")
        self.state = home / "state"
        self.keys = home / "keys"
        self.server = PgTdeServer(home, extension=extension)
        self.options: dict[str, t.Any] = {
            "key_directory": str(self.keys),
            "databases": ["shop", "postgres"],
            "extension": extension,
        }
        #: Options at top level that every task is given, such as those of a KMIP service.
        self.more: dict[str, t.Any] = {}

    def arguments(self, **more: t.Any) -> dict[str, t.Any]:
        """A task's options; one that is None is left out."""
        arguments = {
            "engine": "pg_tde", "cluster": "main", "state_directory": str(self.state), "pg_tde": self.options,
            **self.server.options(), **self.hsm.options(token_label="demo", pin=self.hsm.pin), **self.more, **more,
        }  # fmt: skip
        return {name: value for name, value in arguments.items() if value is not None}

    def run(self, module: str, *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
        """Run a module, which must succeed."""
        result = support.run_module(module, self.arguments(**more), check=check, diff=True)
        assert not result.get("failed"), result
        return result

    def refused(self, module: str, code: str, **more: t.Any) -> dict[str, t.Any]:
        """Run a module, which must fail with an error code."""
        result = support.run_module(module, self.arguments(**more), diff=True)
        assert result.get("error_code") == code, result
        return result

    def journal(self) -> list[dict[str, t.Any]]:
        """The journal, its chain checked."""
        return Journal(StateDirectory(str(self.state)).journal).entries()

    def present(self, **more: t.Any) -> dict[str, t.Any]:
        """The keystore made, the server restarted as often as it says."""
        for dummy in range(3):
            result = self.run("tde_keystore", **{"keyslots": estate.SLOTS, **more})
            if not result["restart_required"]:
                return result
            self.server.restart()
        raise AssertionError(result)

    def set_keys(self) -> dict[str, str]:
        """The keys that are set, with their providers."""
        e = self.options["extension"]
        call = "SELECT key_name || ' of ' || provider_name FROM {}()"
        found = {"default": call.format(f"{e}_default_key_info"), "server": call.format(f"{e}_server_key_info")}
        return {
            **{name: self.server.psql(query) for name, query in found.items()},
            "shop": self.server.psql(call.format(f"{e}_key_info"), "shop"),
        }

    def reboot(self) -> None:
        """What a reboot takes away, and what the boot does with the credentials at hand."""
        self.server.stop()
        if os.path.ismount(self.keys):
            subprocess.run(["umount", str(self.keys)], check=True)
        self.run("tde_keystore", state="open")
        self.server.start()


@contextlib.contextmanager
def host(loaded: bool = True, extension: str = "pg_tde") -> t.Iterator[Host]:
    """A host whose server runs, with a database ``shop`` in the clear.

    :param loaded: the server has loaded the library.
    """
    preload()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    home = Path(tempfile.mkdtemp(prefix="hsm-tde-pgtde.", dir=base))
    home.chmod(0o755)
    cheap = mock.patch.object(passphrase, "default_kdf", return_value=passphrase.Scrypt(log_n=10))
    made = Host(home, extension)
    try:
        with cheap:
            made.server.initdb()
            if not loaded:
                made.server.configure(shared_preload_libraries="")
            made.server.start()
            made.server.psql("CREATE DATABASE shop")
            made.server.psql(
                f"CREATE TABLE orders (id int PRIMARY KEY, body text); INSERT INTO orders SELECT g, '{MARKER} ' || g FROM generate_series(1, 500) g;"
                "CREATE SCHEMA old; CREATE TABLE old.parts (id int, body text) PARTITION BY RANGE (id);"
                "CREATE TABLE old.parts_1 PARTITION OF old.parts FOR VALUES FROM (0) TO (100); INSERT INTO old.parts VALUES (1, 'one')",
                "shop",
            )
            yield made
    finally:
        made.server.stop()
        subprocess.run(["umount", str(made.keys)], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def preload() -> None:
    """Import what the tasks import when they come to it."""
    ours = "ansible_collections.hsm.tde.plugins.module_utils.engines.pg_tde"
    for name in (*(f"{ours}.{one}" for one in ("engine", "keystore", "tablespaces", "info")), "kmip.core.messages.payloads"):
        importlib.import_module(name)
    killing.preload()


MARKER = "hsmtde-marker-7041"
