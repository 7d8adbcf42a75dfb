# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How a key management service is reached: its servers in order of priority, who it is believed from, who we are."""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import typing as t

from ..common.errors import TdeError
from ..common.files import read_private
from ..common.state import check_name

if t.TYPE_CHECKING:
    import ssl

#: The port that IANA registered for KMIP.
PORT = 5696

_SERVER = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+))(?::(?P<port>\d{1,5}))?")

Params = t.Mapping[str, t.Any]


@dataclasses.dataclass(frozen=True)
class KmipAccess:
    """A service and a client of it; no secret: the client's key lies in a file of mode 0600.

    :param service: the name under which keyslots, the registry and the record know it.
    :param servers: ``host`` or ``host:port`` (``[address]:port`` for IPv6), the first to be used first.
    :param ca: file with the certificates (PEM) of the authorities that are trusted for these servers, no others.
    :param certificate: the client's certificate, with its chain (PEM); :param key: its key (PEM, not encrypted).
    :param timeout: seconds for a connection and for each request.
    """

    service: str
    servers: tuple[str, ...]
    ca: str
    certificate: str
    key: str
    timeout: float = 10.0

    def words(self) -> str:
        """The service as messages name it."""
        return f"KMIP service {self.service}"

    def stored(self) -> dict[str, t.Any]:
        """The access as a cluster's record holds it."""
        return {**dataclasses.asdict(self), "servers": list(self.servers)}


def from_record(content: Params) -> KmipAccess:
    """The access that :meth:`KmipAccess.stored` gave. :raises KeyError, TypeError: it is something else."""
    return KmipAccess(**{**content, "servers": tuple(content["servers"])})


def host_and_port(server: str) -> tuple[str, int]:
    """A server's name and port.

    :raises TdeError: ``invalid_option``.
    """
    found = _SERVER.fullmatch(server)
    port = int(found["port"] or PORT) if found else 0
    if not found or not 0 < port < 65536:
        raise TdeError("invalid_option", "must be host or host:port ([address]:port for IPv6)", obj=f"KMIP server {server!r}")
    return found["v6"] or found["host"], port


def kmip_access(params: Params, default: KmipAccess | None = None) -> KmipAccess | None:
    """The service of the shared options ``kmip_*`` (fragment ``hsm.tde.kmip``).

    :param default: gives what they leave out; the one that the cluster's record names.
    :returns: None if no server is named.
    :raises TdeError: ``invalid_option``.
    """
    named = {
        name: params.get(f"kmip_{name}") for name in ("service", "servers", "ca", "certificate", "certificate_key", "timeout")
    }
    return service_of(named, default)


def service_of(named: Params, default: KmipAccess | None) -> KmipAccess | None:
    """As :func:`kmip_access`, from option values without the prefix."""
    given = {"key" if name == "certificate_key" else name: value for name, value in named.items() if value is not None}
    if not given.get("servers") and default is None:
        if any(name in given for name in ("ca", "certificate", "key")):
            raise TdeError("invalid_option", "no server is named", obj="option kmip_servers")
        return None
    fields = {**(default.stored() if default else {"service": "kmip", "timeout": 10.0}), **given}
    missing = [name for name in ("ca", "certificate", "key") if not fields.get(name)]
    if missing:
        option = "certificate_key" if missing[0] == "key" else missing[0]
        raise TdeError("invalid_option", "is needed to reach a KMIP server", obj=f"option kmip_{option}")
    for server in fields["servers"]:
        host_and_port(server)
    if not 0 < fields["timeout"] <= 600:
        raise TdeError("invalid_option", "must be more than 0 and at most 600 seconds", obj="option kmip_timeout")
    check_name("KMIP service", fields["service"])
    return KmipAccess(**{**fields, "servers": tuple(fields["servers"]), "timeout": float(fields["timeout"])})


def tls_context(access: KmipAccess) -> ssl.SSLContext:
    """TLS 1.2 or newer, certificate and host name verified against the service's own authorities and nobody else's.

    :raises TdeError: ``kmip_ca_invalid``, ``kmip_client_certificate_invalid``, ``kmip_client_certificate_expired`` and what
        reading private files raises.
    """
    import ssl

    # Certificate required and host name checked are this protocol's defaults, and it loads no system authorities.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=read_private(access.ca, forbidden_mode=0o022).decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError):
        raise TdeError("kmip_ca_invalid", "holds no certificate in PEM", obj=access.ca) from None
    _check_own(access)
    _check_key(access.key)

    def no_terminal() -> str:
        raise ValueError

    try:
        context.load_cert_chain(access.certificate, access.key, no_terminal)
    except ValueError:
        raise _unusable(access, "its key is encrypted: nobody is there to type the passphrase") from None
    except ssl.SSLError:
        raise _unusable(access, "its key is not PEM, or does not belong to it") from None
    return context


def _check_key(path: str) -> None:
    """Whoever reaches the server is the owner of the key to the certificate, and nobody else reads it."""
    try:
        read_private(path)
    except TdeError as exc:
        if exc.code in ("permission_denied", "file_not_private") and os.geteuid() != 0:
            user = pwd.getpwuid(os.geteuid()).pw_name
            exc.next_step = f"Give user {user}, who reaches the server, a certificate whose key is that user's own, mode 0400."
        raise


def _unusable(access: KmipAccess, reason: str) -> TdeError:
    return TdeError("kmip_client_certificate_invalid", reason, obj=access.certificate)


def _check_own(access: KmipAccess) -> None:
    """A certificate that is over is told here: the server's refusal often says less."""
    import datetime

    from cryptography import x509

    try:
        own = x509.load_pem_x509_certificates(read_private(access.certificate, forbidden_mode=0o022))[0]
    except ValueError:
        raise _unusable(access, "holds no certificate in PEM") from None
    if own.not_valid_after_utc < datetime.datetime.now(datetime.timezone.utc):
        raise TdeError(
            "kmip_client_certificate_expired", f"was valid until {own.not_valid_after_utc:%Y-%m-%d}", obj=access.certificate
        )
