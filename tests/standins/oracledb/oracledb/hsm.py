# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The HSM behind the PKCS#11 library: a list of tokens and keys of its own, or the stand-in for nShield."""

from __future__ import annotations

import base64
import pathlib
import sys
import typing as t

Json = t.Dict[str, t.Any]

#: Where keys come to lie that nobody's token protects.
MODULE = "module"


class LoginRefused(Exception):
    """No slot takes the credential."""


class Hsm:
    """The HSM of a database's state, as one instance of the database has it.

    :param state: ``homes``: the nShield software of each instance's host; without it ``tokens`` and ``keys``.
    """

    def __init__(self, state: Json, instance: str) -> None:
        self.state = state
        self.home = state["homes"].get(instance)

    def _client(self) -> t.Any:
        folder = str(pathlib.Path(__file__).resolve().parents[2] / "nshield")
        if folder not in sys.path:
            sys.path.append(folder)
        import world

        return world.Client(self.home)

    def login(self, credential: str) -> str:
        """The token that a credential opens. One that is not known is taken for a module passphrase, silently (seed).

        :raises OSError: the HSM does not answer.
        """
        if self.state.get("down"):
            raise OSError("no module answers")
        if self.home:
            client = self._client()
            try:
                session = client.login(credential)
            except Exception as exc:
                if type(exc).__name__ == "LoginRefused":
                    raise LoginRefused from None
                raise
            return session.token or MODULE
        separator = min((at for at in (credential.find("|"), credential.find(":")) if at >= 0), default=-1)
        if separator < 0:
            return MODULE
        passphrase, name = credential[:separator], credential[separator + 1 :]
        token = self.state["tokens"].get(name)
        if token and base64.b64decode(token["passphrase"]).decode() == passphrase:
            return name
        return MODULE

    def _session(self, token: str | None) -> t.Any:
        import world

        client = self._client()
        identifier = None if token == MODULE else token
        protection = "module" if identifier is None else "softcard" if identifier in client.softcards() else "ocs"
        return world.Session(client, protection, identifier)

    def has(self, token: str | None, label: str) -> bool:
        """Whether a login shows a key."""
        if token is None:
            return False
        if self.home:
            self._client()
            return self._session(token).find(label) is not None
        return bool(self.state["keys"].get(label) == token)

    def make(self, token: str, label: str) -> None:
        """Make a key; :raises OSError: the HSM does not answer."""
        if self.state.get("down"):
            raise OSError("no module answers")
        if self.home:
            self._client()
            self._session(token).create_key(label)
        else:
            self.state["keys"][label] = token

    def protection(self, label: str) -> tuple[str, str | None]:
        """Of a key of the own list, as ``nfkminfo`` would tell."""
        token = self.state["keys"][label]
        return (MODULE, None) if token == MODULE else (self.state["tokens"][token]["protection"], token)
