# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where ``hsm-tde`` takes a PIN or passphrase from: a descriptor, the cluster's PIN source, or the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import os
import typing as t

from ..common.errors import TdeError
from ..common.files import read_private
from ..common.run import run_program
from ..common.secret import Secret
from ..engines.record import Record, Token
from ..keystore.store import KmipCredential, PassphraseCredential, TokenCredential
from ..pkcs11.library import LibraryAccess
from ..pkcs11.registry import same_serial
from ..pkcs11.resting import resting_pins
from ..pkcs11.token import TokenAccess, TokenSelector

#: Longer than any PIN or passphrase that a person or a password safe gives.
_MAX_BYTES = 64 << 10


if t.TYPE_CHECKING:
    from ..kmip.access import KmipAccess


class TokenName(t.NamedTuple):
    """A token as a keyslot names it."""

    label: str
    serial: str


@dataclasses.dataclass(frozen=True)
class Given:
    """What the command line said about credentials.

    :param ask_passphrase: ask for a passphrase, not for a PIN.
    :param token: label of the token to use; None for the one of the keyslots.
    """

    pin: Secret | None = None
    passphrase: Secret | None = None
    ask_passphrase: bool = False
    token: str | None = None
    allow_low_pin_count: bool = False


@dataclasses.dataclass(frozen=True)
class Credential:
    """One try: a token with its PIN, a passphrase, a KMIP service, or several of them."""

    access: TokenAccess | None = None
    passphrase: Secret | None = None
    kmip: KmipAccess | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`given` reads."""
    parser.add_argument("--pin-fd", type=int, metavar="N", help="read the token's PIN from file descriptor N")
    parser.add_argument("--passphrase-fd", type=int, metavar="N", help="read a keyslot's passphrase from file descriptor N")
    parser.add_argument("--passphrase", action="store_true", help="ask for a keyslot's passphrase, instead of the token's PIN")
    parser.add_argument("--token", metavar="LABEL", help="the token, where keyslots are on more than one")
    parser.add_argument("--allow-low-pin-count", action="store_true", help="try although the token counts wrong tries")


def given(arguments: argparse.Namespace) -> Given:
    """The options' values; secrets are read from their descriptors."""
    return Given(
        pin=None if arguments.pin_fd is None else read_descriptor(arguments.pin_fd),
        passphrase=None if arguments.passphrase_fd is None else read_descriptor(arguments.passphrase_fd),
        ask_passphrase=arguments.passphrase,
        token=arguments.token,
        allow_low_pin_count=arguments.allow_low_pin_count,
    )


def one_line(raw: bytes, obj: str) -> Secret:
    """The one line that a secret is, without its end.

    :raises TdeError: ``invalid_option``.
    """
    line = raw[:-1] if raw.endswith(b"\n") else raw
    if not line or b"\n" in line or b"\0" in line or len(raw) > _MAX_BYTES:
        raise TdeError("invalid_option", "must hold one line that is not empty", obj=obj, kept="Nothing was tried.")
    return Secret(line)


def read_descriptor(number: int) -> Secret:
    """A secret from an inherited file descriptor, read to its end.

    :raises TdeError: ``terminal_refused``, ``invalid_option``.
    """
    obj = f"file descriptor {number}"
    try:
        if os.isatty(number):
            raise TdeError("terminal_refused", "is a terminal, which would show the secret", obj=obj, kept="Nothing was read.")
        with os.fdopen(os.dup(number), "rb") as handle:
            raw = handle.read(_MAX_BYTES + 1)
    except OSError:
        raise TdeError("invalid_option", "is not open for reading", obj=obj) from None
    return one_line(raw, obj)


def choose_token(record: Record, on: t.Sequence[TokenName], label: str | None) -> Token | None:
    """The token to log in to, with its library from the cluster's record.

    :param on: the tokens of the keyslots, the first to be used first.
    :param label: the one asked for.
    :returns: None where no keyslot is on a token.
    :raises TdeError: ``invalid_option``, ``record_damaged``.
    """
    wanted = [token for token in on if label in (None, token.label)]
    if not wanted:
        if label is not None:
            raise TdeError("invalid_option", "no keyslot is on it", obj=f"token {label}")
        return None
    for token in record.tokens:
        if token.label == wanted[0].label and same_serial(token.serial, wanted[0].serial):
            return token
    raise TdeError(
        "record_damaged",
        f"a keyslot is on token {wanted[0].label} (serial {wanted[0].serial or 'none'}), whose library it does not name",
        obj=f"record of cluster {record.cluster}",
        next_step="Run the play with tde_keystore again.",
    )


def tries(
    record: Record, on: t.Sequence[TokenName], stated: Given, *, services: t.Sequence[str] = (), may_ask: bool = True
) -> list[Credential]:
    """The credentials to try, in order; more than one only while a PIN change is unfinished.

    A KMIP service needs no secret but the client's key, a file of this host: where keyslots are at one that the record
    names, nobody is asked for anything.

    :param on: as :func:`choose_token` takes them; :param services: the KMIP services of the keyslots, likewise.
    :param may_ask: somebody at a terminal may be asked.
    :raises TdeError: ``pin_source_missing``, those of reading the source.
    """
    passphrase = stated.passphrase
    if passphrase is None and stated.ask_passphrase:
        passphrase = _ask(f"Passphrase for cluster {record.cluster}: ", record, may_ask)
    if passphrase is not None and stated.pin is None:
        return [Credential(passphrase=passphrase)]
    kmip = next((found for found in map(record.service, services) if found), None)
    token = choose_token(record, on, stated.token)
    if (
        kmip
        and stated.pin is None
        and stated.token is None
        and (token is None or record.pin_source.get("kind", "none") == "none")
    ):
        return [Credential(kmip=kmip)]
    if token is None:
        if stated.pin is not None:
            raise TdeError(
                "invalid_option", "no keyslot is on a token", obj=f"cluster {record.cluster}", kept="The PIN was not tried."
            )
        return [Credential(passphrase=_ask(f"Passphrase for cluster {record.cluster}: ", record, may_ask))]
    # The source's PIN is that of the first token; for another one somebody is asked.
    pins = [stated.pin] if stated.pin is not None else from_source(record) if stated.token is None else []
    if not pins:
        pins = [_ask(f"PIN of token {token.label} for cluster {record.cluster}: ", record, may_ask)]
    library = LibraryAccess(token.library, token.environment)
    selector = TokenSelector(label=token.label, serial=token.serial or None)
    return [
        # After a refused try the token counts it; the second PIN of an unfinished change is the one it had before.
        Credential(
            TokenAccess(library, selector, pin, allow_low_pin_count=stated.allow_low_pin_count or number > 0), passphrase, kmip
        )
        for number, pin in enumerate(pins)
    ]


def passphrases(record: Record, stated: Given, *, may_ask: bool = True) -> list[Credential]:
    """The passphrases to try on a database's own keystore; the cluster's source holds them as it holds PINs for a token.

    :raises TdeError: ``invalid_option``, ``pin_source_missing``, those of reading the source.
    """
    if stated.pin is not None:
        raise TdeError(
            "invalid_option", "its keystore is under a passphrase", obj=f"cluster {record.cluster}", kept="The PIN was not tried."
        )
    found = [stated.passphrase] if stated.passphrase is not None else [] if stated.ask_passphrase else from_source(record)
    if not found:
        found = [_ask(f"Passphrase for cluster {record.cluster}: ", record, may_ask)]
    return [Credential(passphrase=one) for one in found]


def from_source(record: Record) -> list[Secret]:
    """The PINs of the cluster's source, none where it has none.

    :raises TdeError: those of reading the source.
    """
    kind = record.pin_source.get("kind", "none")
    if kind == "file":
        return resting_pins(record.pin_source["path"])
    if kind != "credential":
        return []
    sealed = record.pin_source["path"]
    name = os.path.basename(sealed)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder:
        raw = read_private(os.path.join(folder, name))
    else:
        # Not started by systemd: an operator, or the self-test, who sees what the next boot will.
        read_private(sealed, forbidden_mode=0o022)
        raw = run_program(["systemd-creds", f"--name={name}", "decrypt", sealed, "-"], timeout=60).stdout
    return [one_line(raw, f"credential {name}")]


def source_words(record: Record, stated: Given, found: t.Sequence[Credential] = ()) -> str:
    """Where the credentials that were found came from."""
    if found and found[0].kmip and found[0].access is None:
        return f"{found[0].kmip.words()} takes this host's certificate {found[0].kmip.certificate}; nobody needs to be asked"
    if stated.pin is not None or stated.passphrase is not None:
        return "given on a file descriptor"
    return f"{record.pin_source.get('kind')} {record.pin_source.get('path', '')} can be read"


def has_terminal() -> bool:
    """Whether somebody can be asked."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _ask(prompt: str, record: Record, may_ask: bool) -> Secret:
    if not may_ask or not has_terminal():
        raise TdeError(
            "pin_source_missing",
            "the host keeps nothing that opens it",
            obj=f"cluster {record.cluster}",
            kept="Nothing was tried.",
            next_step=f"Open it on a terminal (hsm-tde open {record.cluster}), then start the database.",
        )
    return one_line(getpass.getpass(prompt).encode(), "what was typed")


def ask(prompt: str, obj: str) -> Secret:
    """A secret from whoever sits at the terminal.

    :param obj: what it is for, if there is nobody.
    :raises TdeError: ``pin_source_missing``.
    """
    if not has_terminal():
        raise TdeError(
            "pin_source_missing",
            "nothing that opens it was given",
            obj=obj,
            kept="Nothing was tried.",
            next_step="Give --pin-fd or --passphrase-fd, or run it on a terminal.",
        )
    return one_line(getpass.getpass(prompt).encode(), "what was typed")


def for_keystore(credential: Credential) -> list[TokenCredential | KmipCredential | PassphraseCredential]:
    """A credential as the keystore takes it: the token first, for it may be nearer than a service."""
    found: list[TokenCredential | KmipCredential | PassphraseCredential] = []
    if credential.access is not None:
        found.append(TokenCredential(credential.access))
    if credential.kmip is not None:
        found.append(KmipCredential(credential.kmip))
    if credential.passphrase is not None:
        found.append(PassphraseCredential(credential.passphrase))
    return found
