# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who is sent a database's password."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection
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
