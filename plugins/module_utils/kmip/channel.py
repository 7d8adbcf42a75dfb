# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One TLS connection to one server: what keeps it from being made, each as an error of its own; a deadline for each call."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
import typing as t

from ..common.errors import TdeError
from .access import host_and_port

#: Answers after which the next server is asked: nobody there, or nobody who answers in time.
FAIL_OVER = ("kmip_unreachable", "kmip_timeout")

#: A message's header: tag (3 bytes), type (1), length (4) (KMIP 1.4, section 9.1.1).
_HEADER = 8
#: Tag and type of a response message (KMIP 1.4, section 9.1.3.1: 42007B; section 9.1.1.2: 01, a structure).
_RESPONSE = bytes.fromhex("42007b01")
#: Longer than any answer to what is asked here; a list of 20,000 keys has less.
_MOST = 1 << 20

#: Seconds in which a server says that it refuses a certificate.
_LISTEN = 2.0

#: OpenSSL's verification results (x509_vfy.h, X509_V_ERR_*), by what is the matter.
_EXPIRED = (9, 10)  # not yet valid, has expired
_WRONG_HOST = (62, 64)  # host name, IP address
_UNKNOWN_AUTHORITY = (2, 7, 18, 19, 20, 21, 27)  # issuer not there, signature, self-signed, not trusted

#: Alerts by which a server refuses the client's certificate (RFC 8446, section 6.2), as OpenSSL names them.
_REFUSALS = (
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_REQUIRED",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
    "DECRYPT_ERROR",  # its signature is not the authority's
    "HANDSHAKE_FAILURE",
)


class Channel:
    """A connection. :param server: as the options name it; :param timeout: seconds, for the connection and each call."""

    def __init__(self, server: str, context: ssl.SSLContext, timeout: float) -> None:
        self.server = server
        self._context = context
        self._timeout = timeout
        self._heard = False
        self._deadline = time.monotonic() + timeout
        host, port = host_and_port(server)
        with self._translated(), contextlib.ExitStack() as stack:
            plain = stack.enter_context(self._connected(host, port))
            self._socket = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            self._socket.settimeout(self._left())
            self._socket.do_handshake()
            self._version = self._socket.version()
            stack.pop_all()

    def _connected(self, host: str, port: int) -> socket.socket:
        """A connection to the first of the host's addresses that takes one; all of them share the time there is."""
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for left, (family, kind, protocol, dummy, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            made = socket.socket(family, kind, protocol)
            try:
                made.settimeout(self._left() / left)
                made.connect(address)
                return made
            except OSError:
                made.close()
                if left == 1:
                    raise
        raise ConnectionRefusedError

    def call(self, request: bytes) -> bytes:
        """Send a message and give the answer's.

        :raises TdeError: ``kmip_unreachable``, ``kmip_timeout``, ``kmip_client_certificate_refused``, ``kmip_answer_invalid``.
        """
        try:
            return self._call(request)
        except TdeError as exc:
            if exc.code == "kmip_unreachable" and not self._heard and self._version == "TLSv1.3":
                raise self._refusal() or exc from None
            raise

    def _call(self, request: bytes) -> bytes:
        self._deadline = time.monotonic() + self._timeout
        with self._translated():
            self._socket.settimeout(self._left())
            self._socket.sendall(request)
            header = self._read(_HEADER)
            self._heard = True
            length = int.from_bytes(header[4:], "big")
            if header[:4] != _RESPONSE or length > _MOST:
                raise TdeError("kmip_answer_invalid", "does not answer as a KMIP server does", obj=self._words())
            return header + self._read(length)

    def _refusal(self) -> TdeError | None:
        """Why a server ends a connection of TLS 1.3 at the first request: perhaps it refuses the client's certificate.

        There a client has shaken hands before its certificate is judged, and a request on its way may cost it the alert (RFC 8446,
        section 6.2). So one more connection is made, on which nothing is sent.
        """
        try:
            other = Channel(self.server, self._context, self._timeout)
        except TdeError as exc:
            return exc
        try:
            with other._translated():
                other._socket.settimeout(min(self._timeout, _LISTEN))
                other._socket.recv(1)
        except TdeError as exc:
            return exc if exc.code not in FAIL_OVER else None
        finally:
            other.close()
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def _words(self) -> str:
        return f"KMIP server {self.server}"

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            # Each part with what is left of the time: a server that drips its answer is slow as well.
            self._socket.settimeout(self._left())
            part = self._socket.recv(length - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    @contextlib.contextmanager
    def _translated(self) -> t.Iterator[None]:
        try:
            yield
        except ssl.SSLCertVerificationError as exc:
            raise self._not_verified(exc) from None
        except TimeoutError:
            raise TdeError("kmip_timeout", f"did not answer within {self._timeout:g} seconds", obj=self._words()) from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
            raise TdeError("kmip_unreachable", "refused or ended the connection", obj=self._words()) from None
        except ssl.SSLError as exc:
            raise self._no_tls(exc) from None
        except OSError as exc:
            raise TdeError("kmip_unreachable", exc.strerror or "cannot be reached", obj=self._words()) from None

    def _not_verified(self, exc: ssl.SSLCertVerificationError) -> TdeError:
        code = next(
            (
                code
                for numbers, code in (
                    (_EXPIRED, "kmip_certificate_expired"),
                    (_WRONG_HOST, "kmip_host_name_mismatch"),
                    (_UNKNOWN_AUTHORITY, "kmip_ca_mismatch"),
                )
                if exc.verify_code in numbers
            ),
            "kmip_certificate_invalid",
        )
        details = {"verify_code": exc.verify_code}
        return TdeError(
            code, f"its certificate was refused: {exc.verify_message.rstrip('.')}", obj=self._words(), details=details
        )

    def _no_tls(self, exc: ssl.SSLError) -> TdeError:
        reason = exc.reason or ""
        if "ALERT" in reason and reason.endswith(_REFUSALS):
            return TdeError(
                "kmip_client_certificate_refused",
                f"refused the client's certificate ({reason.lower().replace('_', ' ')})",
                obj=self._words(),
                details={"alert": reason},
            )
        return TdeError("kmip_tls_failed", f"no TLS 1.2 or newer came about ({reason or 'no reason given'})", obj=self._words())
