# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is around the scenario: world.py HOME start|restart|down|up|end

A server of the stand-in with a database, PyKMIP's server and a small Vault. ``start`` leaves a process behind that holds
the services and writes HOME/world.json; ``down`` and ``up`` stop and start the database server alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer
from ansible_collections.hsm.tde.tests.integration.pgtde import PgTdeServer, Vault


def main() -> None:
    """Do it."""
    home, what = Path(sys.argv[1]), sys.argv[2]
    server = PgTdeServer(home / "server") if (home / "server").exists() else None
    if what == "start" and not (home / "world.json").exists():
        start(home)
    elif what in ("restart", "down") and server:
        server.stop()
    if what in ("restart", "up") and server:
        server.start()
    if what == "end":
        if server:
            server.stop()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((home / "world.pid").read_text()), signal.SIGTERM)


def start(home: Path) -> None:
    """Make all of it."""
    (home / "tokens").mkdir(parents=True)
    home.chmod(0o755)
    (home / "softhsm2.conf").write_text(f"directories.tokendir = {home}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    (home / "server").mkdir()
    server = PgTdeServer(home / "server")
    server.initdb()
    server.start()
    server.psql("CREATE DATABASE shop")
    rows = "SELECT g, 'order ' || g FROM generate_series(1, 1000) g"
    server.psql(f"CREATE TABLE orders (id int PRIMARY KEY, body text); INSERT INTO orders {rows}", "shop")
    if os.fork() == 0:
        serve(home)
    while not (home / "world.json").exists():
        time.sleep(0.05)
    print("started")


def serve(home: Path) -> None:
    """Hold the services until the end."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    kmip = KmipServer(home / "kmip")

    def end(*_arguments: object) -> None:
        kmip.close()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    with Vault(home) as vault:
        vault.token.chmod(0o600)
        facts = {"kmip": kmip.options(), "vault": {"url": vault.url, "token": str(vault.token)}}
        (home / "world.pid").write_text(str(os.getpid()))
        (home / "world.new").write_text(json.dumps(facts))
        (home / "world.new").rename(home / "world.json")
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
