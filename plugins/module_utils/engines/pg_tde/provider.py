# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine's own look at a provider: whether a key is there, which pg_tde's functions do not always tell.

At a KMIP server that does not answer, the server calls a key absent that is there; where Vault's GET fails, it writes
over the key. So nothing is made before this look has said that the name is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t

from ...common.errors import TdeError
from ...common.files import read_private
from ...common.state import StateDirectory
from ...kmip import keys as kmip_keys
from ...kmip.access import KmipAccess, host_and_port
from ...kmip.client import Client
from . import keyfile
from .options import FILE, KMIP, Options

#: Seconds for an answer of Vault.
_TIMEOUT = 15
#: Larger than any answer of it about a key.
_MAX_ANSWER = 1 << 20


class KeyProvider:
    """Where a cluster's keys are to be. Making the object touches nothing.

    :param service: the KMIP service, for the provider ``kmip``.
    """

    def __init__(self, options: Options, state: StateDirectory, service: KmipAccess | None) -> None:
        self.options = options
        self.state = state
        self._service = service

    @property
    def service(self) -> KmipAccess:
        """The KMIP service.

        :raises TdeError: ``credential_missing``.
        """
        if self._service is None:
            raise TdeError(
                "credential_missing",
                "no KMIP server was named",
                obj="provider kmip",
                next_step="Set kmip_servers, kmip_ca, kmip_certificate and kmip_certificate_key.",
            )
        return self._service

    def wished(self) -> dict[str, str]:
        """The options that the server is to have."""
        options = self.options
        if options.provider == FILE:
            return {"path": options.key_file}
        if options.provider == KMIP:
            host, port = host_and_port(self.service.servers[0])
            return {
                "host": host,
                "port": str(port),
                "certPath": self._file("certificate.pem"),
                "keyPath": self._file("key.pem"),
                "caPath": self._file("ca.pem"),
            }
        return {
            "url": str(options.vault_url),
            "mountPath": str(options.vault_mount_path),
            "tokenPath": self._file("token"),
            **({"caPath": self._file("ca.pem")} if options.vault_ca else {}),
            **({"namespace": options.vault_namespace} if options.vault_namespace else {}),
        }

    def _file(self, name: str) -> str:
        return os.path.join(self.options.key_directory, f"{self.options.provider_name}.{name}")

    def given(self) -> dict[str, bytes]:
        """What the server is given beside keys of our own: by the name in the folder in memory.

        :raises TdeError: what reading private files raises.
        """
        options = self.options
        if options.provider == FILE:
            return {}
        if options.provider == KMIP:
            service = self.service
            return {
                f"{options.provider_name}.certificate.pem": read_private(service.certificate, forbidden_mode=0o022),
                f"{options.provider_name}.key.pem": read_private(service.key),
                f"{options.provider_name}.ca.pem": read_private(service.ca, forbidden_mode=0o022),
            }
        found = {f"{options.provider_name}.token": read_private(str(options.vault_token))}
        if options.vault_ca:
            found[f"{options.provider_name}.ca.pem"] = read_private(options.vault_ca, forbidden_mode=0o022)
        return found

    def has(self, name: str) -> bool:
        """Whether a key is there.

        :raises TdeError: that it cannot be told: ``place_closed``, ``kmip_unreachable`` and its kind, ``key_ambiguous``,
            ``vault_unreachable``, ``vault_refused``.
        """
        if self.options.provider == FILE:
            return name.lower() in (one.lower() for one in keyfile.names(self.key_file() or b""))
        if self.options.provider == KMIP:
            with Client(self.service) as client:
                found = kmip_keys.find(client, name)
                if len(found) > 1:
                    raise kmip_keys.ambiguous(client, name, found)
                return bool(found)
        return self._vault(name)

    @contextlib.contextmanager
    def making(self, name: str) -> t.Iterator[bool]:
        """Whether a key is to be made now: nobody else of this host makes one meanwhile, and it is not there.

        :raises TdeError: as :meth:`has`; ``key_ambiguous`` if another host made one of the name meanwhile: pg_tde could use neither.
        """
        lock = kmip_keys.one_at_a_time(self.state) if self.options.provider == KMIP else contextlib.nullcontext()
        with lock:
            yield not self.has(name)
            if not self.has(name):
                raise TdeError(
                    "provider_without_key",
                    "was made, and the provider does not have it",
                    obj=f"key {name} at provider {self.options.provider_name}",
                    kept="It was not set.",
                    next_step="Look at the provider's log, then run again.",
                )

    def key_file(self) -> bytes | None:
        """The content of the key file in memory, None if there is none."""
        uid = self.options.account().pw_uid
        try:
            return read_private(self.options.key_file, owners=(0, uid))
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
            return None

    def _vault(self, name: str) -> bool:
        return self.ask_vault(f"{self.options.vault_mount_path}/data/{name}") == 200

    def ask_vault(self, path: str) -> int:
        """The status of a GET, 200 or 404; what it says of a key is read to its end and dropped.

        :raises TdeError: ``vault_unreachable``, ``vault_refused``.
        """
        import http.client
        import ssl
        import urllib.parse

        obj = f"Vault at {self.options.vault_url}"
        parts = urllib.parse.urlsplit(str(self.options.vault_url))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TdeError("invalid_option", "must begin with https:// or http://", obj=f"vault_url {self.options.vault_url!r}")
        lines = read_private(str(self.options.vault_token)).decode("ascii", "replace").split()
        headers = {"X-Vault-Token": lines[0] if lines else ""}
        if self.options.vault_namespace:
            headers["X-Vault-Namespace"] = self.options.vault_namespace
        try:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT)
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=self.options.vault_ca)
                connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT, context=context)
            with contextlib.closing(connection):
                connection.request("GET", f"{parts.path}/v1/{urllib.parse.quote(path)}", headers=headers)
                answer = connection.getresponse()
                body = answer.read(_MAX_ANSWER)
            if answer.status == 200:
                json.loads(body)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            # Neither the token nor an answer stands in these texts.
            said = exc.strerror or type(exc).__name__ if isinstance(exc, OSError) else type(exc).__name__
            raise TdeError("vault_unreachable", f"does not answer as Vault does: {said}", obj=obj) from None
        if answer.status not in (200, 404):
            raise TdeError(
                "vault_refused",
                f"answers with HTTP status {answer.status}",
                obj=obj,
                next_step="Check the token and its policy: it needs read and create on the mount, and read on sys/mounts.",
            )
        return answer.status
