# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who listens at a TCP port of this host: while a server is down, anybody may take its port, ask for the password and be believed.

Servers ask for a password in the clear where their configuration says so, and neither libpq nor PyMySQL refuses. The kernel
says whose the listening socket is (proc_pid_net(5), the column ``uid`` of ``tcp`` and ``tcp6``).
"""

from __future__ import annotations

import ipaddress
import pwd
import socket
import struct
import typing as t

from ..common.errors import TdeError

#: State TCP_LISTEN (include/net/tcp_states.h).
_LISTEN = "0A"
NET = "/proc/net"


def check(host: str, port: int, os_user: str, net: str = NET) -> None:
    """Refuse a port of this host at which another user's program listens; root may hold it for the server (socket activation).

    :param os_user: the server's user. :param net: where procfs tells of the network.
    :raises TdeError: ``server_foreign``.
    """
    try:
        trusted = {0, pwd.getpwnam(os_user).pw_uid}
    except KeyError:
        trusted = {0}
    for address in filter(_is_ours, _addresses(host)):
        for listening, uid in _listeners(port, net):
            if _answers(listening, address) and uid not in trusted:
                raise TdeError(
                    "server_foreign",
                    f"a program of user id {uid} listens there, not one of {os_user}",
                    obj=f"server at {host}:{port}",
                    kept="It was sent nothing.",
                    next_step="Find out whose it is, and start the server; or correct login_host, login_port and the engine's os_user.",
                )


def is_here(host: str) -> bool:
    """Whether a host's name or address is one of this host."""
    return any(map(_is_ours, _addresses(host)))


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        # Connecting tells what is wrong.
        return []
    return [ipaddress.ip_address(one) for one in sorted(found)]


def _is_ours(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is an address of this host: only such a one can be bound."""
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def _listeners(port: int, net: str) -> t.Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """The addresses at which somebody listens, and the user's id."""
    for name in ("tcp", "tcp6"):
        try:
            with open(f"{net}/{name}", encoding="ascii") as handle:
                rows = [line.split() for line in handle.readlines()[1:]]
        except OSError:
            continue
        for row in rows:
            place, dummy, number = row[1].partition(":")
            if row[3] == _LISTEN and int(number, 16) == port:
                # Each word of 32 bits is in the host's order.
                raw = b"".join(struct.pack("=I", int(place[at : at + 8], 16)) for at in range(0, len(place), 8))
                yield ipaddress.ip_address(raw), int(row[7])


def _answers(
    listening: ipaddress.IPv4Address | ipaddress.IPv6Address, address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> bool:
    """Whether who listens there gets connections to an address."""
    mapped = listening.ipv4_mapped if isinstance(listening, ipaddress.IPv6Address) else None
    return address in (listening, mapped) or (int(listening) == 0 and listening.version >= address.version)
