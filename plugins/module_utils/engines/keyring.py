# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A cluster's data keys at work: the facts that ``keyslots`` decides on, and the acts that it orders.

For every engine whose data keys are wrapped by us. Secrets stay in here: a plan and its steps name keyslots only.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ..common.check import established
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Handlers, Plan, Step
from ..keystore.passphrase import check_length
from ..keystore.store import (
    KeyStore,
    KmipCredential,
    KmipSlot,
    PassphraseCredential,
    PassphraseSlot,
    TokenCredential,
    TokenSlot,
)
from ..kmip import kek as kmip_kek
from ..kmip.client import Client
from ..pkcs11.envelope import load_kek
from ..pkcs11.kek import check_kek, create_kek
from ..pkcs11.keys import KeyRef
from ..pkcs11.library import load
from ..pkcs11.registry import Registry
from ..pkcs11.token import TokenAccess, find, open_session
from . import record as records
from .base import Request, SlotWish
from .keyfacts import read_keks, read_keys, token_of
from .keyslots import KMIP, PASSPHRASE, TOKEN, Kek, Key, Slot, Token, Wanted, current_label, remembered
from .record import Token as RecordedToken

if t.TYPE_CHECKING:
    from ..keystore.store import Credential, DataKey
    from ..keystore.store import Slot as StoreSlot
    from ..kmip.access import KmipAccess

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


class Keyring:
    """The data keys and keyslots of a cluster. Making the object touches nothing.

    :param request: the cluster, and the credentials of the options at top level.
    :param wishes: keyslots wished for, with their credentials.
    :param length: bytes of a new data key; :param check: its check value as its consumer tells it.
    :param dry: check mode: a token that does not answer, and of which nothing is remembered, counts as one to come.
    """

    def __init__(
        self,
        request: Request,
        wishes: t.Sequence[SlotWish],
        *,
        length: int,
        check: t.Callable[[bytes], str],
        dry: bool,
    ) -> None:
        self.request = request
        self.wishes = list(wishes)
        self.length = length
        self.check = check
        self.dry = dry
        self.warnings: list[str] = []
        self.store = KeyStore(request.state, request.cluster)
        self.registry = Registry(request.state)
        self.journal = Journal(request.state.journal)
        self.keys: list[Key] = []
        self.keks: list[Kek] = []
        self._tokens: dict[tuple[t.Any, ...], Token] = {}
        self._opened: dict[str, DataKey] = {}
        self._checked: set[tuple[Token | None, str]] = set()
        #: Tokens that an earlier task will make, in check mode.
        self._coming: set[Token] = set()
        self._answers: dict[tuple[str, str, tuple[str, ...]], str | None] = {}

    # --- looking

    def look(self) -> None:
        """Read the public facts anew, into :attr:`keys` and :attr:`keks`.

        :raises TdeError: what reading raises; ``keystore_rolled_back``, ``keystore_unrecorded`` or, where a credential can tell
            more, what opening raises: nothing is decided on a file that is not the one written last.
        """
        self.keys = read_keys(self.store)
        self.keks = read_keks(self.registry, self.request.cluster)
        for key in self.keys:
            if not key.last:
                if self.credentials():
                    self.unlock([key.key_id])
                self.store.refuse(key.key_id)

    def key(self, key_id: str) -> Key | None:
        """The data key of a name."""
        return next((key for key in self.keys if key.key_id == key_id), None)

    def token(self, access: TokenAccess) -> Token:
        """The token that is meant, found without a login.

        :raises TdeError: what the library and the search answer; ``token_unreachable`` where a key file names it.
        """
        index = (access.library.path, access.selector)
        if index not in self._tokens:
            try:
                info = find(load(access.library), access.selector, self.registry)
                self._tokens[index] = Token.of(info.label, info.serial)
            except TdeError as exc:
                self._tokens[index] = self._absent(access, exc)
        return self._tokens[index]

    def _absent(self, access: TokenAccess, exc: TdeError) -> Token:
        if exc.code not in _NOT_YET:
            raise exc
        uris = access.selector.uris()
        label = next((uri.token for uri in uris if uri.token is not None), None)
        slots = [slot for key in self.keys for slot in key.slots if slot.token and label in (None, slot.token.label)]
        if slots and exc.code == "token_absent":
            raise TdeError(
                "token_unreachable",
                f"keyslot {slots[0].name} names it, and the library does not list it",
                obj=str(access.selector),
                kept="Nothing was created in its place.",
                next_step="Mount the token's folder, plug the device in or start its service.",
            ) from None
        if slots or not self.dry or self.registry.names_token(label=label):
            raise exc
        self.warnings.append(
            f"{exc.obj or access.selector}: {exc.message}. The plan takes it for one that an earlier task will make."
        )
        token = Token.of(label or "?", "")
        self._coming.add(token)
        return token

    def wanted(self) -> list[Wanted]:
        """The keyslots wished for, with the master keys that they are, or would be, under."""
        found = []
        for wish in self.wishes:
            token = self._place(wish)
            if token is None:
                found.append(Wanted(wish.name, wish.protection))
                continue
            label = current_label(self.request.cluster, token, self.keys, self.keks)
            found.append(Wanted(wish.name, wish.protection, token, label))
        return found

    def _place(self, wish: SlotWish) -> Token | None:
        """Where the master key of a keyslot wished for lies; None under a passphrase, or where the task does not say."""
        if wish.protection == KMIP and wish.kmip:
            return Token.service(wish.kmip.service)
        return self.token(wish.access) if wish.protection == TOKEN and wish.access else None

    def same_as_before(self) -> None:
        """Wish for the keyslots of the data keys that there are, with the task's credentials; for ``primary`` if there are none."""
        request = self.request
        slots = {slot.name: slot for key in self.keys for slot in key.slots}
        self.wishes = [
            SlotWish(slot.name, PASSPHRASE, passphrase=request.passphrase)
            if slot.protection == PASSPHRASE
            else SlotWish(slot.name, slot.protection, access=request.access)
            if slot.protection == TOKEN
            else SlotWish(slot.name, slot.protection, kmip=request.kmip)
            for slot in slots.values()
        ] or [default_wish(request)]

    def rotate_in(self, keyslot: str) -> Token:
        """Take the task's token, or its KMIP service where the keyslot is under one, as the wish for a keyslot.

        Before there is a data key, the place of the cluster's newest master key tells which of the two.

        :returns: where its master key is, or is to be.
        :raises TdeError: ``invalid_option`` if the task names neither.
        """
        protections = {slot.protection for key in self.keys for slot in key.named(keyslot)}
        protections = protections or {kek.token.protection for kek in self.keks[-1:]}
        wish = default_wish(self.request, keyslot, prefer=KMIP if KMIP in protections else TOKEN)
        token = self._place(wish)
        if token is None:
            raise TdeError("invalid_option", "no token was named", obj="options library and token_label")
        self.wishes = [wish]
        return token

    def log_in(self, wanted: t.Iterable[Wanted], *, needed: bool = False) -> None:
        """Log in where a PIN was given, and see that the master keys which must exist do; each token once.

        :param needed: the plan cannot do without: a PIN that was not given is an error.
        :raises TdeError: ``key_unreachable``, and what the login answers.
        """
        for one in wanted:
            wish = self.wish(one.name)
            access = wish.access
            index = (one.token, one.kek_label)
            if one.token and wish.kmip and index not in self._checked:
                with Client(wish.kmip) as client:
                    if remembered(one.kek_label, one.token, self.keys, self.keks):
                        kmip_kek.load_kek(client, kmip_kek.KekRef(one.kek_label, self._kek_id(one.token, one.kek_label)))
                    # A server that does not answer is told before the first step.
                    client.locate(one.kek_label)
                self._checked.add(index)
            if not (one.token and access and (access.pin or needed)) or index in self._checked or one.token in self._coming:
                continue
            with open_session(access, self.request.state) as session:
                if remembered(one.kek_label, one.token, self.keys, self.keks):
                    load_kek(session, self._kek(one.token, one.kek_label))
            self._checked.add(index)

    def probe(self, keys: t.Iterable[Key]) -> None:
        """Find out which keyslots the passphrases given open; into :attr:`keys`."""
        for key in list(keys):
            answers: dict[str, str | None] = {}
            for wish in self.wishes:
                secret = self._passphrase(wish)
                there = tuple(slot.uid for slot in key.named(wish.name) if slot.protection == PASSPHRASE)
                if secret and there:
                    # The answer is the same for the same keyslots, and costs half a second.
                    index = (key.key_id, wish.name, there)
                    if index not in self._answers:
                        self._answers[index] = self.store.find_keyslot(key.key_id, PassphraseSlot(wish.name, secret))
                    answers[wish.name] = self._answers[index]
            slots = tuple(
                _with_answer(slot, answers[slot.name]) if slot.name in answers and slot.protection == PASSPHRASE else slot
                for slot in key.slots
            )
            self.keys[self.keys.index(key)] = Key(key.key_id, key.check_value, slots, key.formerly)

    def same_passphrases(self) -> None:
        """Refuse a new data key under another passphrase than its siblings: a slip of the hand would only show in need.

        :raises TdeError: ``passphrase_refused``.
        """
        for wish in self.wishes:
            secret = self._passphrase(wish)
            for key in self.keys:
                if secret and any(slot.protection == PASSPHRASE and slot.proved for slot in key.named(wish.name)):
                    if self.store.find_keyslot(key.key_id, PassphraseSlot(wish.name, secret)) is None:
                        raise TdeError(
                            "passphrase_refused",
                            f"does not open the keyslot of that name of data key {key.key_id}",
                            obj=f"passphrase of keyslot {wish.name}",
                            next_step="Correct it; or take another name for a keyslot under another passphrase.",
                        )
                    break

    def wish(self, name: str) -> SlotWish:
        """The keyslot wished for under a name."""
        return next(wish for wish in self.wishes if wish.name == name)

    def _passphrase(self, wish: SlotWish) -> t.Any:
        return (wish.passphrase or self.request.passphrase) if wish.protection == PASSPHRASE else None

    # --- before acting

    def ready(self, plan: Plan) -> None:
        """See that every secret is there and every key opens that the plan needs, before its first step.

        :raises TdeError: ``credential_missing``, and what opening the keys answers.
        """
        names: list[str] = []
        for step in plan:
            if step.action == "create_data_key":
                names += step.data["slots"]
            elif step.action in ("add_keyslot", "prove_keyslot", "create_kek"):
                names.append(step.data["name"])
        for name in dict.fromkeys(names):
            self._demand(name)
        self._not_of_another_cluster(plan)
        self.log_in((one for one in self.wanted() if one.name in names), needed=True)
        for step in plan:
            if step.action == "create_kek" and step.data["protection"] == KMIP:
                with Client(established(self.wish(step.data["name"]).kmip, "the KMIP service")) as client:
                    kmip_kek.standing(client, step.data["kek_label"], self.registry, self.journal)
            elif step.action == "create_kek":
                with open_session(established(self.wish(step.data["name"]).access, "the token"), self.request.state) as session:
                    check_kek(session, step.data["kek_label"], registry=self.registry, journal=self.journal)
        if any(step.action == "create_data_key" for step in plan):
            self.same_passphrases()
        needed = [step.data["key_id"] for step in plan if step.action in ("add_keyslot", "remove_keyslot", "add_kernel_key")]
        self.unlock([key_id for key_id in dict.fromkeys(needed) if self.key(key_id)])

    def _not_of_another_cluster(self, plan: Plan) -> None:
        """Refuse a master key's label that is another cluster's: ``a`` with tag ``b`` and ``a.b`` without one are the same."""
        for step in plan:
            if step.action != "create_kek":
                continue
            token = Token(step.data["token_label"], step.data["token_serial"], step.data["protection"])
            for entry in self.registry.keys():  # noqa: SIM118 - a registry is no dictionary
                same = entry["label"] == step.data["kek_label"] and token_of(entry) == token
                if same and entry["cluster"] not in ("", self.request.cluster):
                    raise TdeError(
                        "invalid_option",
                        f"is the master key of cluster {entry['cluster']}",
                        obj=step.obj,
                        next_step="Take another tag.",
                    )

    def _demand(self, name: str) -> None:
        wish = self.wish(name)
        if wish.protection == PASSPHRASE and not self._passphrase(wish):
            raise TdeError(
                "credential_missing",
                "its passphrase was not given",
                obj=f"keyslot {name}",
                next_step="Set passphrase in keyslots.",
            )
        if wish.protection == PASSPHRASE:
            check_length(PassphraseSlot(name, self._passphrase(wish)))
        if wish.protection == KMIP and wish.kmip is None:
            raise TdeError(
                "credential_missing",
                "no KMIP server was named",
                obj=f"keyslot {name}",
                next_step="Set kmip_servers, kmip_ca, kmip_certificate and kmip_certificate_key.",
            )
        if wish.protection == TOKEN and wish.access is None:
            raise TdeError(
                "credential_missing", "no token was named", obj=f"keyslot {name}", next_step="Set library, token_label and pin."
            )

    def unlock(self, key_ids: t.Sequence[str]) -> None:
        """Open data keys, all with one login."""
        closed = [key_id for key_id in key_ids if key_id not in self._opened]
        if closed:
            self._opened.update(self.store.open_keys(closed, self.credentials()))

    def data_key(self, key_id: str) -> DataKey:
        """An opened data key."""
        self.unlock([key_id])
        return self._opened[key_id]

    def credentials(self) -> list[Credential]:
        """All credentials given, those of the options at top level first; each once."""
        accesses: list[TokenAccess] = []
        for access in [self.request.access, *(wish.access for wish in self.wishes)]:
            if access and access not in accesses:
                accesses.append(access)
        secrets = []
        for secret in [self.request.passphrase, *(wish.passphrase for wish in self.wishes)]:
            if secret and secret not in secrets:
                secrets.append(secret)
        services = self.services()
        tokens = [TokenCredential(access) for access in accesses if access.pin or not (secrets or services)]
        return [*tokens, *map(KmipCredential, services), *map(PassphraseCredential, secrets)]

    def services(self) -> list[KmipAccess]:
        """The KMIP services given, that of the options at top level first, and those of the record that keyslots are at; each once."""
        given = [one for one in (self.request.kmip, *(wish.kmip for wish in self.wishes)) if one]
        at = {slot.token.label for key in self.keys for slot in key.slots if slot.token and slot.protection == KMIP}
        recorded = [one for one in self.recorded_services() if one.service in at - {one.service for one in given}]
        return list(dict.fromkeys([*given, *recorded]))

    def recorded_services(self) -> t.Sequence[KmipAccess]:
        """The KMIP services that the cluster's record names."""
        record = records.read(self.request.state, self.request.cluster)
        return record.kmip if record else ()

    # --- acting

    def handlers(self) -> Handlers:
        """The acts of the steps that ``keyslots`` and an engine's plan order."""
        return {
            "create_keystore": lambda step: self._create_keystore(),
            "create_kek": self._create_kek,
            "create_data_key": self._create_data_key,
            "add_keyslot": lambda step: self._keyslot(self.store.add_keyslot, step),
            "prove_keyslot": lambda step: void(
                self.store.prove_keyslot(step.data["key_id"], self._store_slot(step.data["name"], step))
            ),
            "remove_keyslot": self._remove_keyslot,
        }

    def _create_keystore(self) -> None:
        self.store.create()

    def _create_kek(self, step: Step) -> None:
        if step.data["protection"] == KMIP:
            with Client(established(self.wish(step.data["name"]).kmip, "the KMIP service")) as client:
                kmip_kek.create_kek(
                    client,
                    step.data["kek_label"],
                    cluster=self.request.cluster,
                    registry=self.registry,
                    journal=self.journal,
                    state=self.request.state,
                )
            self.keks = read_keks(self.registry, self.request.cluster)
            return
        access = established(self.wish(step.data["name"]).access, "the token")
        with open_session(access, self.request.state, rw=True) as session:
            info = session.token
            # From now on a token that does not show is unreachable, whoever initialised it.
            self.registry.remember_token(info.label, info.serial, access.library.path)
            create_kek(
                session, step.data["kek_label"], cluster=self.request.cluster, registry=self.registry, journal=self.journal
            )
        self.keks = read_keks(self.registry, self.request.cluster)

    def _create_data_key(self, step: Step) -> None:
        slots = [self._store_slot(name, step) for name in step.data["slots"]]
        key_id = step.data["key_id"]
        self._opened[key_id] = self.store.create_key(key_id, self.length, slots, self.check)

    def _keyslot(self, act: t.Callable[[str, DataKey, StoreSlot], bool], step: Step) -> None:
        key_id = step.data["key_id"]
        act(key_id, self.data_key(key_id), self._store_slot(step.data["name"], step))

    def _remove_keyslot(self, step: Step) -> None:
        key_id = step.data["key_id"]
        self.store.remove_keyslot(key_id, self.data_key(key_id), step.data["name"], step.data["uid"])

    def _store_slot(self, name: str, step: Step) -> StoreSlot:
        """A keyslot wished for, with its secret, as the store takes it."""
        wish = self.wish(name)
        secret = self._passphrase(wish)
        if wish.protection == PASSPHRASE:
            return PassphraseSlot(name, secret)
        token = established(self._place(wish), "where the master key lies")
        label = step.data.get("kek_label") or current_label(self.request.cluster, token, self.keys, self.keks)
        if wish.kmip:
            return KmipSlot(name, wish.kmip, kmip_kek.KekRef(label, self._kek_id(token, label)))
        return TokenSlot(name, established(wish.access, "the token"), self._kek(token, label))

    def _kek(self, token: Token, label: str) -> KeyRef:
        return KeyRef(label, bytes.fromhex(self._kek_id(token, label)))

    def _kek_id(self, token: Token, label: str) -> str:
        """A master key's id: CKA_ID in hex, or the KMIP server's unique identifier."""
        ids = [kek.id for kek in self.keks if (kek.token, kek.label) == (token, label)]
        ids += [slot.kek_id for key in self.keys for slot in key.slots if (slot.token, slot.kek_label) == (token, label)]
        if not ids:
            raise TdeError("key_unreachable", "nothing on this host tells its id", obj=f"master key {label} {token.where}")
        return ids[0]

    def recorded_tokens(self) -> list[RecordedToken]:
        """How the tokens of the credentials are reached, for the cluster's record."""
        found = []
        for access in [self.request.access, *(wish.access for wish in self.wishes)]:
            if access:
                token = self.token(access)
                found.append(RecordedToken(access.library.path, dict(access.library.environment), token.label, token.serial))
        return found


def default_wish(request: Request, name: str = "primary", prefer: str = TOKEN) -> SlotWish:
    """The keyslot that a task means which lists none: in its token, or at its KMIP service if it names no token.

    :param prefer: which of the two, if it names both.
    """
    if request.kmip and (prefer == KMIP or request.access is None):
        return SlotWish(name, KMIP, kmip=request.kmip)
    return SlotWish(name, TOKEN, access=request.access)


def void(_answer: object) -> None:
    """Drop an answer: a handler has none."""


def _with_answer(slot: Slot, uid: str | None) -> Slot:
    return dataclasses.replace(slot, opens=slot.uid == uid)
