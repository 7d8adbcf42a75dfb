# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A key management server of its own: PyKMIP's, with a certificate authority, certificates and clients made here.

::

    server = KmipServer(home)            # a process on a free port of localhost, TLS 1.2, a database of its own
    server.address                       # "localhost:45123"
    server.ca.path                       # the authority's certificate, PEM
    client = server.client("main")       # a certificate and key in files of mode 0600; the name is the owner of its keys
    server.options(client)               # the options kmip_* of a module
    server.stop(); server.start()        # down, and up again with what it had
    server.pause(); server.resume()      # it takes connections and does not answer
    server.close()                       # at the end

The fixture ``kmip_server`` of conftest gives one to a test module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: An operation policy under which everybody finds a key, and only its owner may do anything with it.
SEEN_BY_ALL = "seen-by-all"
_OWNER = ("GET", "GET_ATTRIBUTES", "GET_ATTRIBUTE_LIST", "ACTIVATE", "REVOKE", "DESTROY")

_NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
# Once: each task that a test forks would take half a second for it.
importlib.import_module("kmip.core.messages.payloads")

#: Ways to guard a data key, each as the wish for the keyslot ``primary``.
OWN_PASSPHRASE = "a passphrase of its own"
WAYS: dict[str, dict[str, t.Any]] = {
    "passphrase": {"name": "primary", "protection": "passphrase", "passphrase": OWN_PASSPHRASE},
    "token": {"name": "primary", "token_label": "demo"},
    "kmip": {"name": "primary", "protection": "kmip"},
}

#: It ends with the test process, however that ends: then its standard input does.
_SERVE = """
import os, signal, threading
def last():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=last, daemon=True).start()
from kmip.services.server.server import main
main()
"""


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A certificate and its key. :ivar path: PEM; :ivar key: PEM, not encrypted."""

    name: str
    path: Path
    key: Path


class Authority:
    """A certificate authority. :ivar path: its certificate."""

    def __init__(self, home: Path, name: str = "kmip test authority") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        built = self._builder(self._name, self._key, 1).add_extension(basic, critical=True).sign(self._key, hashes.SHA256())
        self.path = _write(home / "ca.pem", built.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        start = _NOW - datetime.timedelta(days=30)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(_NOW + datetime.timedelta(days=days))
        )

    def issue(self, name: str, hosts: t.Sequence[str] = (), *, days: int = 1) -> Certificate:
        """A certificate for a client, or with ``hosts`` for a server; :param days: of validity, below 0 for one that is over."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, days)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        pem = serialization.Encoding.PEM
        plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        built = builder.sign(self._key, hashes.SHA256())
        stem = self.home / f"{name}-{built.serial_number:x}"
        return Certificate(
            name, _write(stem.with_suffix(".pem"), built.public_bytes(pem)), _write(stem.with_suffix(".key"), plain)
        )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def free_port() -> int:
    """A port of localhost that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class KmipServer:
    """See the module.

    :param home: a folder that does not exist yet.
    :param certificate: its own; by default one for ``localhost`` of :attr:`ca`.
    :ivar ca: signs its certificate and those of its clients.
    """

    def __init__(self, home: Path, *, ca: Authority | None = None, certificate: Certificate | None = None) -> None:
        home.mkdir(parents=True)
        self.home = home
        self.ca = ca or Authority(home / "ca")
        self.certificate = certificate or self.ca.issue("server", ["localhost"])
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: dict[str, Certificate] = {}
        policies = home / "policies"
        policies.mkdir()
        rights = {"LOCATE": "ALLOW_ALL", **dict.fromkeys(_OWNER, "ALLOW_OWNER")}
        (policies / "policy.json").write_text(json.dumps({SEEN_BY_ALL: {"preset": {"SYMMETRIC_KEY": rights}}}))
        (home / "server.conf").write_text(
            "[server]\nhostname=127.0.0.1\n"
            f"port={self.port}\ncertificate_path={self.certificate.path}\nkey_path={self.certificate.key}\n"
            f"ca_path={self.ca.path}\nauth_suite=TLS1.2\npolicy_path={policies}\nenable_tls_client_auth=True\n"
            f"tls_cipher_suites=\nlogging_level=INFO\ndatabase_path={home / 'database'}\n"
        )
        self.start()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert self._process is None
        with open(self.home / "output", "ab") as output:
            argv = [sys.executable, "-c", _SERVE, "-f", str(self.home / "server.conf"), "-l", str(self.home / "server.log")]
            # A group of its own: it has a child for its policies.
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd="/", start_new_session=True
            )
        deadline = time.monotonic() + 30
        while not self._listens():
            assert self._process.poll() is None, (self.home / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _listens(self) -> bool:
        # Looked up, not connected to: a connection that ends at once would be one more line in its log.
        wanted = f"0100007F:{self.port:04X} 00000000:0000 0A"
        return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())

    def stop(self) -> None:
        """End it at once; its database stays."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate(timeout=10)
            self._process = None

    def pause(self) -> None:
        """From now on it takes connections and does not answer."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.stop()

    def client(self, name: str) -> Certificate:
        """A client's certificate, made when it is first asked for. Its name is the owner of what it creates."""
        if name not in self._clients:
            self._clients[name] = self.ca.issue(name)
        return self._clients[name]

    def options(self, client: Certificate | str = "main", **more: t.Any) -> dict[str, t.Any]:
        """The options ``kmip_*`` that reach this server as a client."""
        one = self.client(client) if isinstance(client, str) else client
        return {
            "kmip_servers": [self.address],
            "kmip_ca": str(self.ca.path),
            "kmip_certificate": str(one.path),
            "kmip_certificate_key": str(one.key),
            "kmip_timeout": 5,
            **more,
        }


def create_seen_by_all(client: t.Any, name: str) -> str:
    """Make a key under the operation policy with which everybody finds it, and only its owner may use it. :returns: its id."""
    from kmip.core import enums, objects
    from kmip.core.factories.attributes import AttributeFactory

    make, build = AttributeFactory.create_attribute, objects.TemplateAttribute.__init__

    def shared(self: t.Any, kind: t.Any, value: t.Any, *more: t.Any) -> t.Any:
        # One attribute of the template becomes two.
        made = make(self, kind, value, *more)
        if kind == enums.AttributeType.CRYPTOGRAPHIC_LENGTH:
            return [made, make(self, enums.AttributeType.OPERATION_POLICY_NAME, SEEN_BY_ALL)]
        return made

    def flat(self: t.Any, names: t.Any = None, attributes: t.Any = None, **more: t.Any) -> None:
        build(self, names, [one for item in attributes or () for one in (item if isinstance(item, list) else [item])], **more)

    with (
        mock.patch.object(AttributeFactory, "create_attribute", shared),
        mock.patch.object(objects.TemplateAttribute, "__init__", flat),
    ):
        return str(client.create(name, "aes", 256, ["encrypt", "decrypt"]))


class Relay:
    """Between client and server, to lose answers: what is asked arrives, and what is answered does not once :attr:`deaf` is set.

    :param after: let so many bytes of answers pass first (the handshake's, for example).
    """

    def __init__(self, port: int, after: int | None = None) -> None:
        self.deaf = threading.Event()
        self._left = after
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, dummy = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server, contextlib.suppress(OSError):
            while True:
                for one in select.select([client, server], [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    if one is client:
                        server.sendall(data)
                        continue
                    if self._left is not None:
                        self._left -= len(data)
                        if self._left < 0:
                            self.deaf.set()
                    if not self.deaf.is_set():
                        client.sendall(data)

    def close(self) -> None:
        self._listener.close()
