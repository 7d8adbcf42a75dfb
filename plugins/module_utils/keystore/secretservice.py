# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What ``wrapped_secret`` does: the file's state as facts, a pure plan, and the runner that carries it out."""

from __future__ import annotations

import dataclasses
import os
import secrets
import stat
import string
import typing as t

from ..common.errors import TdeError
from ..common.files import lock, read_private, trusted_directory, write_atomic
from ..common.journal import Journal
from ..common.plan import Plan, Step, run
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..kmip import kek as kmip_kek
from ..kmip.client import Client
from ..pkcs11.kek import check_kek, create_kek
from ..pkcs11.keys import KeyRef
from ..pkcs11.library import load
from ..pkcs11.registry import Registry, same_serial
from ..pkcs11.token import TokenAccess, find, open_session
from .format import Document, Keyslot
from .keyfile import sweep
from .passphrase import check_length
from .secretfile import SecretFile, note_unwrapped
from .store import KmipCredential, KmipSlot, PassphraseSlot, Slot, TokenCredential, TokenSlot, document_facts

if t.TYPE_CHECKING:
    from ..kmip.access import KmipAccess
    from .protection import Credential

#: Label of the KEK for secrets that belong to no cluster.
DEFAULT_KEK = "hsm-tde.secrets"
#: A generated secret: 16 characters of these are 95 bits.
_ALPHABET = string.ascii_letters + string.digits
MIN_GENERATED, MAX_GENERATED = 16, 1024
#: Why a token may not answer on a host where the tasks before this one were only planned.
_NOT_YET = (
    "token_absent",
    "token_slot_absent",
    "token_slot_empty",
    "token_not_ready",
    "library_absent",
    "library_not_started",
    "library_not_loaded",
    "opencryptoki_daemon_down",
    "opencryptoki_missing",
)


@dataclasses.dataclass(frozen=True)
class SlotWish:
    """A keyslot wished for, or what opens one: under a passphrase, in a token, or at a KMIP service."""

    name: str
    passphrase: Secret | None = None
    access: TokenAccess | None = None
    kmip: KmipAccess | None = None


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a secret is unwrapped to, mode 0600. :param uid: owner, :param gid: group."""

    path: str
    uid: int
    gid: int


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is wished for a wrapped secret.

    :param state: ``present``, ``rewrapped`` or ``unwrapped``.
    :param slots: its keyslots; :param credentials: what opens it now, beside them.
    :param secret: its value; :param generate: else so many characters are made by chance.
    :param update: replace the value of an existing one; :param exclusive: remove keyslots that are not listed.
    """

    state: str
    slots: tuple[SlotWish, ...]
    credentials: tuple[SlotWish, ...] = ()
    secret: Secret | None = None
    generate: int | None = None
    update: bool = False
    exclusive: bool = False
    replace_lost: bool = False
    kek_label: str = DEFAULT_KEK
    destination: Destination | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What there is.

    :param document: the file, None if there is none.
    :param fitting: by the name of a keyslot wished for, the uid of the keyslot that is it; None if there is none.
    :param keks_missing: names of the keyslots wished for whose KEK the host has not made yet.
    :param same: whether its value is the one given; None if none was.
    :param delivered: whether the destination holds it.
    """

    document: Document | None
    fitting: t.Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    keks_missing: t.Collection[str] = ()
    same: bool | None = None
    delivered: bool = False

    def named(self, name: str) -> list[Keyslot]:
        """The keyslots of a name."""
        return [slot for slot in (self.document.keyslots if self.document else ()) if slot.name == name]


def plan(facts: Facts, wish: Wish, obj: str) -> Plan:
    """The steps from the facts to the wish. Pure.

    :param obj: the secret in words.
    :raises TdeError: ``data_key_absent``, ``invalid_option``.
    """
    if facts.document is None:
        if wish.state != "present":
            raise TdeError("data_key_absent", "does not exist", obj=obj, next_step="Wrap it first (state=present).")
        _demand_keyslots(wish, obj)
        if (wish.secret is None) == (wish.generate is None):
            raise TdeError("invalid_option", "does not exist; give either secret or generate_length", obj=obj)
        keks = _keks([one.name for one in wish.slots], facts, wish)
        return [*keks, Step("create_secret", obj, "does not exist", {"slots": [one.name for one in wish.slots]})]
    if wish.state == "unwrapped":
        destination = wish.destination.path if wish.destination else ""
        return [] if facts.delivered else [Step("write_destination", destination, f"does not hold {obj}")]
    if wish.state == "rewrapped":
        _demand_keyslots(wish, obj)
        return _rewrap(facts, wish, obj)
    if facts.same is not False or not wish.update:
        return []
    _demand_keyslots(wish, obj)
    left_out = {slot.name for slot in facts.document.keyslots} - {one.name for one in wish.slots}
    if left_out and not wish.exclusive:
        raise TdeError(
            "invalid_option",
            f"another secret needs every keyslot anew, and {', '.join(sorted(left_out))} is not listed",
            obj=obj,
            next_step="List it with its credential, or set keyslots_exclusive to go without.",
        )
    names = [one.name for one in wish.slots]
    return [*_keks(names, facts, wish), Step("replace_secret", obj, "holds another secret", {"slots": names})]


def _demand_keyslots(wish: Wish, obj: str) -> None:
    if not wish.slots:
        raise TdeError("invalid_option", "no keyslot is listed", obj=obj, next_step="List at least one in keyslots.")


def _keks(names: t.Iterable[str], facts: Facts, wish: Wish) -> Plan:
    return [
        Step("create_kek", f"KEK {wish.kek_label} for keyslot {name}", "this host has not made it", {"name": name})
        for name in names
        if name in facts.keks_missing
    ]


def _rewrap(facts: Facts, wish: Wish, obj: str) -> Plan:
    additions: Plan = []
    gone: list[tuple[Keyslot, str]] = []
    for one in wish.slots:
        where = f"keyslot {one.name} of {obj}"
        there, uid = facts.named(one.name), facts.fitting.get(one.name)
        keep = next((slot for slot in there if slot.uid == uid), None)
        if keep is None:
            additions += _keks([one.name], facts, wish)
            additions.append(Step("add_keyslot", where, "is another" if there else "is wished", {"name": one.name}))
        if keep is None or keep.proved is None:
            additions.append(Step("prove_keyslot", where, "before anything rests on it", {"name": one.name}))
        gone += [(slot, "another of its name takes its place") for slot in there if slot is not keep]
    if wish.exclusive and facts.document:
        names = {one.name for one in wish.slots}
        gone += [
            (slot, "is not listed and keyslots_exclusive is set") for slot in facts.document.keyslots if slot.name not in names
        ]
    removals = [
        Step("remove_keyslot", f"keyslot {slot.name} of {obj}", why, {"name": slot.name, "uid": slot.uid}) for slot, why in gone
    ]
    return [*additions, *removals]


class SecretService:
    """One wrapped secret and what is wished for it.

    :param check: check mode: a token that does not exist yet counts as one to come, if there is no file yet.
    """

    def __init__(self, file: SecretFile, wish: Wish, state: StateDirectory, *, check: bool = False) -> None:
        self.file, self.wish, self.state, self.check = file, wish, state, check
        self.warnings: list[str] = []
        self._registry = Registry(state)
        self._key = b""
        self._slot: Keyslot | None = None
        self._secret: Secret | None = None

    def inspect(self) -> Facts:
        """The facts; opens the file if there is one.

        :raises TdeError: what reading, opening and finding the tokens raise.
        """
        wish = self.wish
        if not self._exists():
            return Facts(None, keks_missing=self._missing(exists=False))
        opened, self._secret = self.file.open([self._credential(one) for one in (*wish.credentials, *wish.slots)])
        self._key, self._slot = opened.key, opened.slot
        same = None if wish.secret is None else wish.secret == self._secret
        if same is False and wish.state == "present" and not wish.update:
            self.warnings.append("The file holds another secret than the one given; it was left (update=on_create).")
        rewrap = wish.state == "rewrapped"
        # A token is asked for only where a keyslot may have to be made: else any one credential is enough.
        missing = self._missing(exists=True) if rewrap or (same is False and wish.update) else []
        fitting = {one.name: self._fitting(one) for one in wish.slots} if rewrap else {}
        delivered = wish.destination is not None and delivered_to(wish.destination, self._secret)
        return Facts(opened.document, fitting, missing, same, delivered)

    def _missing(self, exists: bool) -> list[str]:
        return [one.name for one in self.wish.slots if one.passphrase is None and self._kek(one, exists) is None]

    def run(self) -> Plan:
        """Decide, and act unless in check mode.

        :returns: the steps, done or to be done.
        """
        steps = plan(self.inspect(), self.wish, self.file.file.identity.words())
        self._ready(steps)
        if not self.check:
            run(
                steps,
                {
                    "create_kek": lambda step: self._create_kek(step.data["name"]),
                    "create_secret": lambda step: self._create(None),
                    "replace_secret": lambda step: self._create(self.file.file.judged().document),
                    "add_keyslot": lambda step: _void(self.file.file.add(self._key, self._store_slot(step.data["name"]))),
                    "prove_keyslot": lambda step: _void(self.file.file.prove(self._store_slot(step.data["name"]))),
                    "remove_keyslot": lambda step: _void(self.file.file.remove(self._key, step.data["name"], step.data["uid"])),
                    "write_destination": lambda step: self._deliver(),
                },
            )
        return steps

    def _ready(self, steps: Plan) -> None:
        """Refuse, before the first step, what would stop the plan half-way. Check mode needs no PIN, nor the token of a task before.

        :raises TdeError: ``passphrase_length``, what a login or the KMIP server answers and what :func:`create_kek` refuses.
        """
        new: set[str] = set()
        for step in steps:
            if step.action in ("create_secret", "replace_secret"):
                new.update(step.data["slots"])
            elif step.action == "add_keyslot":
                new.add(step.data["name"])
        for one in self.wish.slots:
            if one.passphrase is not None and one.name in new:
                check_length(PassphraseSlot(one.name, one.passphrase))
            if one.kmip and one.name in new:
                with Client(one.kmip) as client:
                    kmip_kek.standing(client, self.wish.kek_label, self._registry, Journal(self.state.journal))
        for step in steps:
            access = self._named(step.data["name"]).access if step.action == "create_kek" else None
            if access:
                if self.check and (access.pin is None or self._token(access, exists=False) is None):
                    continue
                with open_session(access, self.state) as session:
                    check_kek(session, self.wish.kek_label, registry=self._registry, journal=Journal(self.state.journal))

    def _named(self, name: str) -> SlotWish:
        return next(one for one in self.wish.slots if one.name == name)

    def facts(self) -> dict[str, t.Any]:
        """Public facts of the file as it is now; empty if there is none."""
        if not self._exists():
            return {}
        judged = self.file.file.judged()
        return document_facts(judged.document, judged.verdict)

    def _exists(self) -> bool:
        try:
            return self.file.file.exists()
        except TdeError as exc:
            if exc.code == "keystore_unreachable" and self.wish.replace_lost and self.wish.state == "present":
                return False
            raise

    def _credential(self, one: SlotWish) -> Credential:
        if one.kmip:
            return KmipCredential(one.kmip)
        if one.passphrase is not None:
            return PassphraseSlot(one.name, one.passphrase)
        return TokenCredential(t.cast(TokenAccess, one.access))

    def _token(self, access: TokenAccess, exists: bool = True) -> tuple[str, str] | None:
        """Label and serial of a token; None if an earlier task is still to make it."""
        try:
            info = find(load(access.library), access.selector, self._registry)
        except TdeError as exc:
            if exc.code in _NOT_YET and self.check and not exists:
                return None
            raise
        return info.label, info.serial

    def _kek(self, one: SlotWish, exists: bool = True) -> KeyRef | kmip_kek.KekRef | None:
        """The KEK that the host made before, in the token or at the service."""
        if one.kmip:
            return kmip_kek.registered(self._registry, one.kmip.service, self.wish.kek_label)
        token = self._token(t.cast(TokenAccess, one.access), exists)
        for entry in self._registry.keys() if token else ():
            on_token = token and entry["token_label"] == token[0] and same_serial(entry["token_serial"], token[1])
            if on_token and entry["label"] == self.wish.kek_label:
                return KeyRef(entry["label"], bytes.fromhex(entry["id"]))
        return None

    def _fitting(self, one: SlotWish) -> str | None:
        if one.passphrase is not None or self._kek(one):
            return self.file.file.find(self._store_slot(one.name))
        return None

    def _create_kek(self, name: str) -> None:
        one, label, journal = self._named(name), self.wish.kek_label, Journal(self.state.journal)
        if one.kmip:
            with Client(one.kmip) as client:
                kmip_kek.create_kek(client, label, cluster="", registry=self._registry, journal=journal, state=self.state)
            return
        access = t.cast(TokenAccess, one.access)
        with open_session(access, self.state, rw=True) as session:
            # From now on a token that does not show is unreachable, whoever initialised it.
            self._registry.remember_token(session.token.label, session.token.serial, access.library.path)
            create_kek(session, label, cluster="", registry=self._registry, journal=journal)

    def _store_slot(self, name: str) -> Slot:
        one = self._named(name)
        if one.passphrase is not None:
            return PassphraseSlot(name, one.passphrase)
        kek = self._kek(one)
        if kek is None:
            raise TdeError("key_unreachable", "nothing on this host tells its id", obj=f"KEK {self.wish.kek_label}")
        if one.kmip:
            return KmipSlot(name, one.kmip, t.cast(kmip_kek.KekRef, kek))
        return TokenSlot(name, t.cast(TokenAccess, one.access), t.cast(KeyRef, kek))

    def _create(self, replace: Document | None) -> None:
        wish = self.wish
        value = wish.secret or Secret("".join(secrets.choice(_ALPHABET) for dummy in range(wish.generate or 0)))
        slots = [self._store_slot(one.name) for one in wish.slots]
        self.file.create(value, slots, replace=replace, replace_lost=wish.replace_lost)

    def _deliver(self) -> None:
        destination, secret = t.cast(Destination, self.wish.destination), t.cast(Secret, self._secret)
        # What is given out is written down first; it may be used from the moment of the rename.
        note_unwrapped(self.file, t.cast(Keyslot, self._slot), destination=destination.path)
        with lock(self.file.file.lock_path, wait_seconds=10):
            _sweep(destination)
            write_atomic(
                destination.path,
                secret.reveal(),
                uid=destination.uid,
                gid=destination.gid,
                owners=(os.geteuid(), destination.uid),
            )


def _void(_answer: object) -> None:
    """Drop an answer: a handler has none."""


def _sweep(destination: Destination) -> None:
    """A killed run may have left the secret in a temporary file beside the destination."""
    sweep(destination.path, owners=(os.geteuid(), destination.uid))


def delivered_to(destination: Destination, secret: Secret) -> bool:
    """Whether the destination holds the secret, with its owner, group and mode, and nothing of a killed run beside it.

    :raises TdeError: ``file_not_private`` for a link or anything but a regular file, or a folder that others can write.
    """
    owners = (os.geteuid(), destination.uid)
    name = os.path.basename(destination.path)
    with trusted_directory(os.path.dirname(destination.path), owners) as folder:
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        left = [other for other in os.listdir(folder) if other.startswith(f".{name}.") and other.endswith(".tmp")]
    if not stat.S_ISREG(info.st_mode):
        raise TdeError("file_not_private", "is a link or not a regular file", obj=destination.path)
    as_wished = (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (destination.uid, destination.gid, 0o600)
    return not left and as_wished and Secret(read_private(destination.path, owners=owners)) == secret
