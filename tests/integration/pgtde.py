# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Servers of the stand-in for pg_tde (tests/standins/pg_tde), which encrypts nothing; a small Vault."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration import postgres, support

STANDIN = support.ROOT / "tests/standins/pg_tde"
#: Where the private tree is built: other users run its programs, so the folder is root's and no temporary one.
TREES = Path("/var/cache/hsm-tde-tests")


@functools.cache
def tree(extension: str = "pg_tde") -> Path:
    """The private tree of programs, built if its sources have changed; its ``bin`` is a server's."""
    programs = postgres.programs()
    assert programs, "PostgreSQL is not installed"
    major = Path(programs).parent.name
    TREES.mkdir(mode=0o755, exist_ok=True)
    built = TREES / f"{extension}-{major}"
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
