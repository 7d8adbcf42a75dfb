# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who is sent a database's password."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
import threading
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection
from ansible_collections.hsm.tde.plugins.module_utils.engines.mariadb import sql as mariadb
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import sql

PASSWORD = "Database-Password-1"


def test_a_password_is_not_sent_to_another_users_socket(tmp_path: Path) -> None:
    """The server here is another user's (root's): it asks for a password in the clear."""
    heard = b""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / ".s.PGSQL.5432"))
        listener.listen()
        listener.settimeout(20)

        def ask() -> None:
            nonlocal heard
            peer, _address = listener.accept()
            with peer:
                heard = peer.recv(1024)
                # AuthenticationCleartextPassword (PostgreSQL manual, "Message Formats").
                with contextlib.suppress(ConnectionError):
                    peer.sendall(b"R" + struct.pack(">II", 8, 3))
                    heard += peer.recv(1024)

        server = threading.Thread(target=ask, daemon=True)
        server.start()
        connection = Connection(None, None, str(tmp_path), "postgres", Secret(PASSWORD), "postgres")
        with pytest.raises(TdeError), sql.connect(sql.access(connection, "nobody")):
            pass
        server.join(20)
    assert PASSWORD.encode() not in heard


def greeting(peer: socket.socket) -> None:
    """MariaDB's first packet (its manual, "Connection"), then AuthSwitchRequest to a password in the clear."""
    first = b"\x0a10.11.6-MariaDB\0" + struct.pack("<I", 7) + b"a" * 8 + b"\0" + struct.pack("<HBHH", 0xF7FF, 45, 2, 0x8)
    first += bytes([21]) + bytes(10) + b"b" * 12 + b"\0mysql_native_password\0"
    peer.sendall(struct.pack("<I", len(first))[:3] + b"\0" + first)
    number = peer.recv(4096)[3] + 1
    switch = b"\xfemysql_clear_password\0"
    peer.sendall(struct.pack("<I", len(switch))[:3] + bytes([number]) + switch)


def challenge(peer: socket.socket) -> None:
    """PostgreSQL's AuthenticationCleartextPassword, to whom it refused TLS and GSSAPI."""
    while struct.unpack(">II", peer.recv(4096)[:8])[1] in (80877103, 80877104):
        peer.sendall(b"N")
    peer.sendall(b"R" + struct.pack(">II", 8, 3))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's port")
@pytest.mark.parametrize("engine", ["postgresql", "mariadb"])
@pytest.mark.parametrize("owner", ["nobody", "root"])
def test_a_password_is_not_sent_to_another_users_port(engine: str, owner: str) -> None:
    """While the server is down anybody may listen at its port, and ask for the password in the clear. Root may for the server."""
    heard = b""
    os.seteuid(pwd.getpwnam(owner).pw_uid)
    try:
        listener = socket.socket()
    finally:
        os.seteuid(0)
    with listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(5)

        def ask() -> None:
            nonlocal heard
            with contextlib.suppress(OSError, IndexError, struct.error):
                peer, _address = listener.accept()
                with peer:
                    (challenge if engine == "postgresql" else greeting)(peer)
                    heard = peer.recv(4096)

        server = threading.Thread(target=ask, daemon=True)
        server.start()
        connection = Connection("127.0.0.1", listener.getsockname()[1], None, "admin", Secret(PASSWORD), "postgres")
        where = (
            mariadb.access(connection, "daemon", path=None, user=None)
            if engine == "mariadb"
            else sql.access(connection, "daemon")
        )
        connecting = mariadb.connect(where) if engine == "mariadb" else sql.connect(where)
        with pytest.raises(TdeError) as raised, contextlib.ExitStack() as stack:
            stack.enter_context(connecting)
        if owner == "nobody":
            assert raised.value.code == "server_foreign"
    server.join(6)
    assert (PASSWORD.encode() in heard) == (owner == "root"), "the test's own server does ask"
