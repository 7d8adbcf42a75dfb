# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde wrap`` and ``unwrap``: a user's own secret from a pipe to a wrapped file, and from it to a pipe."""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing as t

from ..common.errors import TdeError
from ..common.files import check_parents
from ..common.journal import Journal
from ..common.state import StateDirectory
from ..engines.userside import entered, is_published
from ..keystore.secretfile import MAX_SECRET, SecretFile, unwrap_secret
from ..keystore.store import KmipSlot, PassphraseSlot, Slot, TokenSlot
from ..kmip import kek as kmip_kek
from ..kmip.access import KmipAccess, kmip_access
from ..kmip.client import Client
from ..pkcs11.kek import create_kek
from ..pkcs11.library import LibraryAccess
from ..pkcs11.registry import Registry
from ..pkcs11.token import TokenAccess, TokenSelector, open_session
from . import credentials, keycommands, keystores
from .exits import DONE
from .output import Output
from .streams import STDIN, STDOUT, no_terminal, read_secret, write_out

#: Label of the KEK that wraps secrets which are no cluster's.
_KEK_LABEL = "hsm-tde.secrets"


def add_arguments(parser: argparse.ArgumentParser, *, wrapping: bool) -> None:
    """The options that say which token, KMIP service or passphrase."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--cluster", metavar="NAME", help="take token and PIN source, or the KMIP service, from this cluster's record"
    )
    which.add_argument("--library", metavar="PATH", help="the token's PKCS#11 library")
    which.add_argument(
        "--kmip-server", action="append", metavar="HOST[:PORT]", help="a server of the KMIP service; again for the next one"
    )
    parser.add_argument("--kmip-service", metavar="NAME", help="the service's name on this host (kmip)")
    parser.add_argument("--kmip-ca", metavar="FILE", help="the authorities that its servers' certificates come from")
    parser.add_argument("--kmip-certificate", metavar="FILE", help="this host's certificate")
    parser.add_argument("--kmip-certificate-key", metavar="FILE", help="and its key")
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        type=_variable,
        metavar="NAME=VALUE",
        help="what the library reads; no secret",
    )
    if wrapping:
        parser.add_argument(
            "--kek",
            default=_KEK_LABEL,
            metavar="LABEL",
            help="the key in the token or at the KMIP server; made if missing (%(default)s)",
        )
    credentials.add_arguments(parser)


def _variable(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise ValueError(text)
    return name, value


def wrap_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``wrap``. Every byte of standard input is the secret, an end of line too."""
    no_terminal(STDIN, arguments.force, "standard input", "The secret would show while it is typed.")
    if os.geteuid() != 0:
        return keycommands.wrap(arguments, read_secret(MAX_SECRET), output)
    check_parents(_path(arguments))
    state: StateDirectory = arguments.state
    stated = credentials.given(arguments)
    secret = read_secret(MAX_SECRET)
    passphrase = stated.passphrase or (
        credentials.ask(f"Passphrase for {arguments.file}: ", arguments.file) if stated.ask_passphrase else None
    )
    tries = _tries(arguments, stated) if _names_kek(arguments) else [credentials.Credential()]
    if passphrase is None and tries[0] == credentials.Credential():
        passphrase = credentials.ask(f"Passphrase for {arguments.file}: ", arguments.file)

    def act(one: credentials.Credential) -> int:
        with state.locked(wait_seconds=10):
            slots: list[Slot] = []
            if one.access:
                slots.append(_token_slot(state, one.access, arguments.kek))
            elif one.kmip:
                slots.append(_kmip_slot(state, one.kmip, arguments.kek))
            if passphrase is not None:
                slots.append(PassphraseSlot("recovery" if slots else "primary", passphrase))
            SecretFile(state, arguments.file).create(secret, slots)
            return len(slots)

    if keystores.try_each(tries, act) < 2:
        output.warn(f"{arguments.file} has one keyslot, which is the only way to the secret")
    return DONE


def unwrap_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``unwrap``. Nothing but the secret goes to standard output."""
    no_terminal(STDOUT, arguments.force, "standard output", "The secret would show.")
    if os.geteuid() != 0:
        return keycommands.unwrap(arguments)
    _path(arguments)
    state: StateDirectory = arguments.state
    stated = credentials.given(arguments)
    if stated.passphrase is not None or stated.ask_passphrase or not _names_kek(arguments):
        passphrase = stated.passphrase or credentials.ask(f"Passphrase for {arguments.file}: ", arguments.file)
        tries = [credentials.Credential(passphrase=passphrase)]
    else:
        tries = _tries(arguments, stated)

    def act(one: credentials.Credential) -> None:
        write_out(unwrap_secret(arguments.file, credentials.for_keystore(one), state))

    keystores.try_each(tries, act)
    return DONE


def _path(arguments: argparse.Namespace) -> str:
    if arguments.file is None:
        raise TdeError("invalid_option", "is missing", obj="FILE", next_step="Name the wrapped file by its absolute path.")
    return t.cast(str, arguments.file)


def _names_kek(arguments: argparse.Namespace) -> bool:
    return bool(arguments.cluster or arguments.library or arguments.kmip_server)


def _tries(arguments: argparse.Namespace, stated: credentials.Given) -> list[credentials.Credential]:
    """The token and the KMIP service of a cluster, or what the command line names."""
    stated = dataclasses.replace(stated, passphrase=None, ask_passphrase=False)
    if arguments.cluster:
        if is_published(arguments.state, arguments.cluster):
            # Root never works with what the database's own user can write.
            entered(arguments.state, arguments.cluster)
        record = keystores.read_record(arguments.state, arguments.cluster)
        on = keystores.keyslot_tokens(arguments.state, arguments.cluster)
        services = keystores.keyslot_services(arguments.state, arguments.cluster)
        if not on and not services:
            raise TdeError("invalid_option", "has no keyslot on a token or at a KMIP service", obj=f"cluster {arguments.cluster}")
        return credentials.tries(record, on, stated, services=services)
    if arguments.kmip_server:
        named = ("service", "ca", "certificate", "certificate_key")
        options = {f"kmip_{name}": getattr(arguments, f"kmip_{name}") for name in named}
        return [credentials.Credential(kmip=kmip_access({**options, "kmip_servers": arguments.kmip_server}))]
    if not stated.token:
        raise TdeError("invalid_option", "is missing", obj="--token", next_step="Name the token's label.")
    access = TokenAccess(
        LibraryAccess(arguments.library, dict(arguments.environment)),
        TokenSelector(label=stated.token),
        stated.pin or credentials.ask(f"PIN of token {stated.token}: ", arguments.file),
        allow_low_pin_count=stated.allow_low_pin_count,
    )
    return [credentials.Credential(access)]


def _token_slot(state: StateDirectory, access: TokenAccess, label: str) -> TokenSlot:
    with open_session(access, state, rw=True) as session:
        kek = create_kek(session, label, cluster="", registry=Registry(state), journal=Journal(state.journal))
    return TokenSlot("primary", access, kek)


def _kmip_slot(state: StateDirectory, access: KmipAccess, label: str) -> KmipSlot:
    with Client(access) as client:
        registry, journal = Registry(state), Journal(state.journal)
        kek = kmip_kek.create_kek(client, label, cluster="", registry=registry, journal=journal, state=state)
    return KmipSlot("primary", access, kek)
