# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a database asks a command for, as its own user: a secret wrapped or unwrapped, data encrypted by a key of the token.

The library, the token and the source of its PIN stand in a record that root published (``engines/userside.py``); the
user's own state directory holds what the user remembers. Whatever is refused is said in one line on standard
error, which becomes the server's log, before the server loses its patience.

The plugin of Fujitsu's ``tde_kms`` (Installation and Setup Guide for Server, M.4 and M.5) is called as
``encrypt|decrypt|validate-key --keyid ID [arguments of the connection file]``, data as is from standard input to standard
output, the KMS secret in the environment (:data:`_KMS_SECRET`), exit code 0 for success.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import typing as t

from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..engines import keyslots, userside
from ..engines.keycommand.secret import secret_file, secret_path, travels
from ..engines.keyfacts import read_keks
from ..engines.record import Record
from ..keystore.secretfile import SecretFile
from ..keystore.secretfile import unwrap as open_secret
from ..keystore.store import KmipCredential, KmipSlot, PassphraseSlot, Slot, TokenSlot
from ..kmip import kek as kmip_kek
from ..kmip.access import KmipAccess
from ..kmip.client import Client
from ..pkcs11 import envelope
from ..pkcs11.kek import create_kek
from ..pkcs11.keys import KeyRef, find
from ..pkcs11.registry import Registry
from ..pkcs11.token import Session, TokenAccess, open_session
from . import credentials, keystores
from .exits import DONE
from .output import Output
from .streams import STDOUT, no_terminal, read_secret, write_out

#: Seconds for one try. pg_ctl waits 60 for a server to start (PostgreSQL manual, pg_ctl, PGCTLTIMEOUT); the server's log
#: shall say what it was by then.
SECONDS = 25.0
#: Seconds of these for KMIP servers to take a connection, all together.
_SERVERS_SECONDS = 16.0
#: Where tde_kms passes the KMS secret (Installation and Setup Guide for Server, M.4). It has no other way.
_KMS_SECRET = "TDE_KMS_SECRET"  # noqa: S105 - the name of a variable
#: tde_kms takes at most 8192 bytes from a key management system; this many come to 6000 when they are wrapped.
_MAX_DATA = 4096


@dataclasses.dataclass(frozen=True)
class Own:
    """A command that runs as a database's own user.

    :param record: the cluster's record as root published it. :param state: the user's state directory.
    """

    record: Record
    state: StateDirectory

    @property
    def cluster(self) -> str:
        return self.record.cluster

    def token(self) -> credentials.TokenName:
        """The token whose keys are used, or that new secrets go to."""
        if not self.record.tokens:
            raise TdeError("invalid_option", "names no token", obj=f"record of cluster {self.cluster}")
        return credentials.TokenName(self.record.tokens[0].label, self.record.tokens[0].serial)

    def services(self, at: t.Collection[str]) -> list[KmipAccess]:
        """The record's KMIP services for keyslots at some; if it names none of these, a service may go by another name here.

        All their servers together get less time than the command has, so that one that is slow is said to be.
        """
        found = [one for one in self.record.kmip if one.service in at] or [one for one in self.record.kmip if at]
        count = sum(len(one.servers) for one in found)
        return [dataclasses.replace(one, timeout=min(one.timeout, _SERVERS_SECONDS / count)) for one in found]

    def tries(
        self, on: t.Sequence[credentials.TokenName], stated: credentials.Given, services: t.Sequence[KmipAccess] = ()
    ) -> list[credentials.Credential]:
        """The credentials to try, beside the services, which need no PIN; nobody is asked.

        :raises TdeError: ``pin_source_missing`` and those of reading the source.
        """
        if services and (not on or self.record.pin_source.get("kind", "none") == "none"):
            return [credentials.Credential()]
        if stated.pin is None and stated.passphrase is None and self.record.pin_source.get("kind", "none") == "none":
            raise TdeError(
                "pin_source_missing",
                "this user has no PIN to open it with",
                obj=f"cluster {self.cluster}",
                kept="Nothing was tried.",
                next_step="Set pin_source in tde_keystore.",
            )
        try:
            return credentials.tries(self.record, on, stated, may_ask=False)
        except TdeError:
            # That a PIN cannot be had is no reason not to ask a service.
            if services:
                return [credentials.Credential()]
            raise


def enter(arguments: argparse.Namespace) -> Own:
    """Who asks, and with what.

    :raises TdeError: ``invalid_option``, and as :func:`userside.entered`.
    """
    if getattr(arguments, "library", None):
        raise TdeError(
            "invalid_option",
            "is not taken from a user: the library is the one that root published",
            obj="--library",
            next_step="Name the cluster with --cluster.",
        )
    if not arguments.cluster:
        raise TdeError("invalid_option", "is missing", obj="--cluster", next_step="Name the cluster whose record root published.")
    return Own(*userside.entered(arguments.state, arguments.cluster))


def _file(own: Own, given: str | None) -> tuple[SecretFile, bool]:
    """The wrapped secret that is meant, and whether it travels.

    A server names it relative to its data directory (EDB's %p); links above it are the user's own affair.
    """
    if given is None:
        path = secret_path(own.record.options, own.state, own.cluster)
        carried = travels(own.record.options["kind"])
    else:
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(given))), os.path.basename(given))
        carried = True
    return secret_file(own.state, path, own.cluster, carried=carried), carried


def wrap(arguments: argparse.Namespace, secret: Secret, output: Output) -> int:
    """``hsm-tde wrap --cluster NAME FILE``: wrap the secret under the cluster's master key."""
    own = enter(arguments)
    if arguments.file is None:
        raise TdeError("invalid_option", "is missing", obj="FILE", next_step="Name the file that the wrapped secret goes to.")
    file, carried = _file(own, arguments.file)
    stated = credentials.given(arguments)

    def act(one: credentials.Credential) -> None:
        with own.state.locked(wait_seconds=10):
            slots: list[Slot] = [_primary(own, one)]
            if stated.passphrase is not None:
                slots.append(PassphraseSlot("recovery", stated.passphrase))
            # A data directory that was given up took its file with it; one that shows is never replaced.
            file.create(secret, slots, replace_lost=carried)

    service = _new_at(own)
    tries = [credentials.Credential(kmip=service)]
    if service is None:
        tries = own.tries([own.token()], dataclasses.replace(stated, passphrase=None))
    keystores.try_each(tries, act, SECONDS)
    if stated.passphrase is None:
        output.warn(f"{file.path} has one keyslot: the {'KMIP service' if service else 'token'} is the only way to the secret")
    return DONE


def _new_at(own: Own) -> KmipAccess | None:
    """The KMIP service that a new secret goes to, None if it goes to the token.

    A record that names both is one of a secret that is there: its newest keyslot ``primary`` tells.
    """
    at = {one.service for one in own.record.kmip}
    if at and own.record.tokens:
        with contextlib.suppress(TdeError):
            slots = [slot for slot in _file(own, None)[0].file.judged().document.keyslots if slot.name == "primary"]
            at = {slot.target.get("kmip_service", "") for slot in slots[-1:]} & at
    return next(iter(own.services(at)), None)


def _primary(own: Own, one: credentials.Credential) -> Slot:
    """The keyslot of a new secret, under the cluster's current master key, which is made if there is none."""
    registry, journal = Registry(own.state), Journal(own.state.journal)
    if one.kmip:
        label = _label(own, keyslots.Token.service(one.kmip.service))
        with Client(one.kmip) as client:
            made = kmip_kek.create_kek(client, label, cluster=own.cluster, registry=registry, journal=journal, state=own.state)
        return KmipSlot("primary", one.kmip, made)
    access = t.cast(TokenAccess, one.access)
    with open_session(access, own.state, rw=True) as session:
        token = keyslots.Token.of(session.token.label, session.token.serial)
        ref = create_kek(session, _label(own, token), cluster=own.cluster, registry=registry, journal=journal)
    return TokenSlot("primary", access, ref)


def _label(own: Own, token: keyslots.Token) -> str:
    return keyslots.current_label(own.cluster, token, [], read_keks(Registry(own.state), own.cluster))


def unwrap(arguments: argparse.Namespace) -> int:
    """``hsm-tde unwrap --cluster NAME [FILE]``: the secret to standard output, and nothing else."""
    own = enter(arguments)
    file, dummy = _file(own, arguments.file)
    stated = credentials.given(arguments)
    slots = file.file.judged().document.keyslots
    on = [
        credentials.TokenName(slot.target["token_label"], slot.target["token_serial"])
        for slot in slots
        if slot.protection == keyslots.TOKEN
    ]
    # The PIN source is that of the record's first token. A keyslot may be on one that this host does not reach.
    order = [token.label for token in own.record.tokens]
    on = sorted((token for token in on if token.label in order), key=lambda token: order.index(token.label)) or on
    # Whoever names a credential means that one.
    named = stated.pin is not None or stated.passphrase is not None or stated.token is not None
    at = set() if named else {slot.target["kmip_service"] for slot in slots if slot.protection == keyslots.KMIP}
    services = own.services(at)

    def act(one: credentials.Credential) -> None:
        write_out(open_secret(file, [*credentials.for_keystore(one), *map(KmipCredential, services)]))

    keystores.try_each(own.tries(on, stated, services), act, SECONDS)
    return DONE


def plugin_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``encrypt``, ``decrypt`` or ``validate-key`` as the plugin of tde_kms."""
    # Taken out of the environment before anything else is started.
    secret = os.environ.pop(_KMS_SECRET, "")
    if os.geteuid() == 0:
        userside.entered(arguments.state, arguments.cluster or "")
    own = enter(arguments)
    act = {"encrypt": _encrypt, "decrypt": _decrypt, "validate-key": _validate}[arguments.act]
    data = b"" if act is _validate else read_secret(_MAX_DATA if act is _encrypt else 2 * _MAX_DATA).reveal()
    if act is not _validate:
        no_terminal(STDOUT, False, "standard output", "It is not for the eye.")
    stated = credentials.Given(pin=Secret(secret) if secret else None)

    def run(one: credentials.Credential) -> None:
        with open_session(t.cast(TokenAccess, one.access), own.state) as session:
            act(session, own, arguments.keyid, data)

    keystores.try_each(own.tries([own.token()], stated), run, SECONDS)
    return DONE


def _context(keyid: str) -> bytes:
    """What a blob is bound to. The server names nothing but the key, and a standby or a restore is another cluster."""
    return b"hsm-tde 1 kms plugin\0" + keyid.encode()


def _key(session: Session, own: Own, keyid: str) -> KeyRef:
    """The key that the server means by its id: the one key of that label.

    :raises TdeError: ``key_absent``, ``key_unreachable``, ``key_ambiguous``.
    """
    found = [info for info in find(session, keyid, cls="secret") if info.type == "aes"]
    obj = f"key {keyid!r} in {session.token}"
    if len(found) > 1:
        raise TdeError(
            "key_ambiguous", f"{len(found)} keys have this label", obj=obj, next_step="Give each key a label of its own."
        )
    if not found:
        known = Registry(own.state).names_key(session.token.label, session.token.serial, keyid)
        raise TdeError(
            "key_unreachable" if known else "key_absent",
            "this host used it before, and it does not show" if known else "no AES key of the token has this label",
            obj=obj,
            next_step="Declare the label of a key that the token has.",
        )
    return KeyRef(found[0].label, found[0].id)


def _encrypt(session: Session, own: Own, keyid: str, data: bytes) -> None:
    ref = _key(session, own, keyid)
    blob = envelope.wrap(session, ref, data, _context(keyid))
    # Data is now under this key: from here on it, or its token, is missing when it does not show, never absent.
    token, registry = session.token, Registry(own.state)
    registry.remember_token(token.label, token.serial, session.library.path)
    registry.remember_key(token.label, token.serial, ref.label, ref.id.hex(), "secret_key", cluster=own.cluster)
    _note(own, "encrypt", ref, kcv=blob["kek_kcv"])
    write_out(json.dumps(blob, separators=(",", ":")).encode())


def _decrypt(session: Session, own: Own, keyid: str, data: bytes) -> None:
    try:
        blob = json.loads(data)
    except ValueError:
        raise TdeError("envelope_invalid", "is not what encrypt gives", obj="standard input") from None
    ref = _key(session, own, keyid)
    if isinstance(blob, dict) and (blob.get("kek_label"), blob.get("kek_id")) != (ref.label, ref.id.hex()):
        raise TdeError(
            "kek_mismatch",
            "the data is under another key",
            obj=f"key {ref}",
            next_step="Name the key that it was encrypted under.",
        )
    write_out(Secret(envelope.unwrap(session, blob, _context(keyid))))


def _validate(session: Session, own: Own, keyid: str, data: bytes) -> None:
    ref = _key(session, own, keyid)
    context = _context(keyid)
    probe = os.urandom(32)
    if envelope.unwrap(session, envelope.wrap(session, ref, probe, context), context) != probe:
        raise TdeError("mechanism_unsupported", "did not give back what was encrypted", obj=f"key {ref}")


def _note(own: Own, action: str, ref: KeyRef, **facts: t.Any) -> None:
    Journal(own.state.journal).append(
        f"kms_{action}", f"key {ref}", cluster=own.cluster, key=ref.label, key_id=ref.id.hex(), **facts
    )
