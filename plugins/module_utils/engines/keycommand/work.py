# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is done as the database's own user: the master key in the token or at a KMIP service, the wrapped secret, its keyslots.

Everything here runs in a child that has become this user, on the user's own state directory, and gives plain data
back. The decisions are those of ``keyslots``, the acts those of ``keyring``; a secret counts as the cluster's one data key.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import secrets
import string
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.files import make_private_directory
from ...common.journal import Journal
from ...common.plan import Plan, Step
from ...common.secret import Secret
from ...common.state import StateDirectory
from ...keystore.keyfile import KeyFile
from ...keystore.sealed import ADOPT, Opened
from ...keystore.secretfile import SecretFile
from ...keystore.store import Credential, DataKey, KeyStore, KmipCredential, TokenCredential
from ...keystore.store import Slot as StoreSlot
from ...kmip import kek as kmip_kek
from ...kmip.client import Client
from ...pkcs11.envelope import COMPANION, check_fit
from ...pkcs11.keys import find
from ...pkcs11.registry import Registry
from ...pkcs11.resting import resting_pins
from ...pkcs11.token import TokenAccess, open_session
from .. import keyslots
from ..base import KeystoreWish, MasterKeyWish, Request, SlotWish
from ..keyfacts import describe_keks, describe_keys, kek_words, key_facts, read_keks, read_keys
from ..keyring import Keyring
from ..postgresql import public
from .options import GENERATED, Options
from .secret import CYBERTEC, secret_file, secret_path, travels

if t.TYPE_CHECKING:
    from ...kmip.access import KmipAccess

Facts = t.Dict[str, t.Any]
Handlers = t.Dict[str, t.Callable[[Step], None]]

_LETTERS = string.ascii_letters + string.digits


class SecretStore(KeyStore):
    """A store whose only data key is the cluster's wrapped secret, wherever the server wants it.

    :param make: gives the secret when there is none yet.
    """

    def __init__(self, own: StateDirectory, cluster: str, options: Options, make: t.Callable[[], Secret]) -> None:
        super().__init__(own, cluster)
        self.options = options
        self._make = make
        self.secret: SecretFile = secret_file(
            own, secret_path(options.given, own, cluster), cluster, carried=travels(options.kind)
        )

    def file(self, key_id: str) -> KeyFile:
        return self.secret.file

    def exists(self) -> bool:
        return self.state.exists()

    def key_ids(self) -> list[str]:
        return [self.cluster] if self.secret.file.exists() else []

    def create_key(
        self, key_id: str, length: int, slots: t.Sequence[StoreSlot], check: t.Callable[[bytes], str] | None = None
    ) -> DataKey:
        make_private_directory(os.path.dirname(self.secret.path))
        self.secret.create(self._make(), slots)
        return DataKey(self.open([slots[0]])[0])

    def open(self, credentials: t.Sequence[Credential]) -> tuple[Opened, Secret]:
        """The file and the secret in it."""
        return self.secret.open(credentials)

    def taken(self) -> bool:
        """Whether the file was taken as it was found once, by this user."""
        return any(entry["action"] == ADOPT and entry["key"] == self.cluster for entry in Journal(self.state.journal).entries())


class _Ring(Keyring):
    """A keyring of the user's, who reads no record of root's. :param services: what the record says of KMIP services."""

    def __init__(self, request: Request, wishes: t.Sequence[SlotWish], services: t.Sequence[KmipAccess], *, dry: bool) -> None:
        super().__init__(request, wishes, length=0, check=lambda key: "", dry=dry)
        self._recorded = services

    def recorded_services(self) -> t.Sequence[KmipAccess]:
        return self._recorded


class Work:
    """One task's work as the user.

    :param request: the task's, with the user's own state directory.
    :param services: the KMIP services of the cluster's record.
    :param given: the secret as the task gives it; None to make one.
    :param check: only decide.
    """

    def __init__(
        self,
        request: Request,
        options: Options,
        wishes: t.Sequence[SlotWish],
        services: t.Sequence[KmipAccess],
        *,
        given: Secret | None,
        check: bool,
    ) -> None:
        self.request = request
        self.options = options
        self.check = check
        self.ring = _Ring(request, wishes, services, dry=check)
        self.store = SecretStore(request.state, request.cluster, options, lambda: given or _generated(options))
        self.ring.store = self.store
        self.given = given

    @property
    def _obj(self) -> str:
        return f"secret of cluster {self.request.cluster}"

    # --- the services

    def keystore(self, wish: KeystoreWish, *, removing: bool, made: bool) -> Facts:
        """Master key, secret and keyslots as wished.

        :param removing: remove keyslots, too: not before the PIN of the new ones is where the server's command finds it.
        :param made: the host knows that a secret was made, so that one that does not show is none to make anew.
        """
        update = wish.slots is not None and wish.update

        def decide() -> Plan:
            ring = self.ring
            if update:
                ring.probe(ring.keys)
            wanted = ring.wanted()
            later: Plan = []
            if update:
                later = keyslots.change(ring.keys, wanted, exclusive=wish.exclusive, no_recovery=wish.no_recovery)
            if not ring.keys and not travels(self.options.kind):
                if made:
                    raise TdeError(
                        "keystore_unreachable",
                        "was made by this host, and does not show",
                        obj=self._obj,
                        kept="None was made in its place.",
                        next_step=f"Mount the file system of {self.request.state.path}, or restore that folder from a backup.",
                    )
                if self.options.kind == CYBERTEC:
                    keyslots.demand_recovery(wanted, wish.no_recovery, self._obj)
                names = [one.name for one in wanted]
                data = {"key_id": self.request.cluster, "slots": names}
                later.append(Step("create_data_key", self._obj, f"under keyslots {', '.join(names)}", data))
            if not removing:
                later = [step for step in later if step.action != "remove_keyslot"]
            return keyslots.master_keys(ring.keys, ring.keks, wanted, later) + later

        facts = self._rounds(decide, self._act)
        there = self.ring.keys and not self.check and not facts["plan"]
        if there and self.given is not None and self.store.open(self.ring.credentials())[1] != self.given:
            facts["warnings"].append(f"{self._obj}: it is another than the one given, and was left.")
        return facts

    def master_key(self, wish: MasterKeyWish) -> Facts:
        """The master key of the wish, the secret under it."""
        rotated = wish.state == "rotated"
        today = datetime.datetime.now(datetime.timezone.utc).date()
        self.ring.look()
        token = self.ring.rotate_in(wish.keyslot)

        def decide() -> Plan:
            return keyslots.rotate(
                self.request.cluster,
                self.ring.keys,
                self.ring.keks,
                slot=wish.keyslot,
                token=token,
                tag=wish.tag if rotated else None,
                max_age=wish.max_age if rotated else None,
                today=today,
            )

        def act(steps: Plan) -> None:
            def note(result: str) -> None:
                if rotated:
                    self.ring.journal.append(
                        "rotate_master_key",
                        f"keyslot {wish.keyslot} {token.where}",
                        result=result,
                        cluster=self.request.cluster,
                        tag=wish.tag,
                        max_age=wish.max_age,
                    )

            self.ring.ready(steps)
            note("begun")
            self._run(steps)
            note("done")

        facts = self._rounds(decide, act)
        current = keyslots.current_label(self.request.cluster, token, self.ring.keys, self.ring.keks)
        facts["master_key"] = current
        facts["age_days"] = keyslots.age(current, token, self.ring.keys, self.ring.keks, today)
        return facts

    # --- looking and acting

    def _rounds(self, decide: t.Callable[[], Plan], act: t.Callable[[Plan], None]) -> Facts:
        ring = self.ring
        ring.look()
        ring.log_in(ring.wanted())
        before = public.facts(ring.keys, ring.keks, [], None)
        steps = self._adopting(decide())
        if steps and not self.check:
            with self.request.state.locked(wait_seconds=10):
                act(steps)
            ring.look()
            left = self._adopting(decide())
            if left:
                raise TdeError(
                    "unfinished",
                    f"there is still to do: {left[0].obj} ({left[0].action})",
                    obj=f"cluster {self.request.cluster}",
                    kept="What was done stays done.",
                )
        after = public.expected(before, steps) if self.check else public.facts(ring.keys, ring.keks, [], None)
        return {
            "plan": [dataclasses.asdict(step) for step in steps],
            "before": before,
            "after": after,
            "warnings": ring.warnings,
            "tokens": [[one.label, one.serial] for one in ring.recorded_tokens()],
            "slots": [[place.label, place.serial] for place in self._places(keyslots.TOKEN)],
            "services": [place.label for place in self._places(keyslots.KMIP)],
            "keks": [[kek.token.protection, kek.token.label, kek.token.serial, kek.label, kek.id] for kek in ring.keks],
            "master_keys": kek_words(ring.keks),
            "data_keys": key_facts(ring.keys),
        }

    def _places(self, protection: str) -> list[keyslots.Token]:
        """The tokens, or the services, of the secret's keyslots, the one to be asked first: that of the newest keyslot ``primary``."""
        slots = [slot for key in self.ring.keys for slot in reversed(key.slots) if slot.protection == protection]
        slots.sort(key=lambda slot: slot.name != "primary")
        return list(dict.fromkeys(slot.token for slot in slots if slot.token))

    def _act(self, steps: Plan) -> None:
        self.ring.ready(steps)
        self._run(steps)

    def _run(self, steps: Plan) -> None:
        plans.run(steps, {**self.ring.handlers(), "adopt_kek": self._adopt})

    def _adopting(self, steps: Plan) -> Plan:
        """A plan with the master keys that another node of the cluster made already taken as they are, where that is wished."""
        if not self.options.adopt_master_key:
            return steps
        found: Plan = []
        for step in steps:
            if step.action == "create_kek" and self._made_elsewhere(self.ring.wish(step.data["name"]), step.data["kek_label"]):
                step = Step("adopt_kek", step.obj, "another node of the cluster made it", step.data)
            found.append(step)
        return found

    def _made_elsewhere(self, wish: SlotWish, label: str) -> bool:
        if wish.kmip:
            with Client(wish.kmip) as client:
                return kmip_kek.made_elsewhere(client, label, self.ring.registry, self.ring.journal)
        if not wish.access or not wish.access.pin:
            return False
        with open_session(wish.access, self.request.state) as session:
            return bool(find(session, label, cls="secret"))

    def _adopt(self, step: Step) -> None:
        ring, wish, label = self.ring, self.ring.wish(step.data["name"]), step.data["kek_label"]
        if wish.kmip:
            with Client(wish.kmip) as client:
                kmip_kek.adopt_kek(client, label, cluster=self.request.cluster, registry=ring.registry, journal=ring.journal)
            ring.keks = read_keks(ring.registry, self.request.cluster)
            return
        access = t.cast(TokenAccess, wish.access)
        with open_session(access, self.request.state) as session:
            there = find(session, label, cls="secret")
            obj = f"master key {label} in {session.token}"
            if len(there) != 1 or there[0].type != "aes":
                raise TdeError("key_ambiguous", f"{len(there)} keys have this label", obj=obj)
            check_fit(there[0], obj)
            if any(there[0].flags.get(name) is False for name in ("local", "always_sensitive", "never_extractable")):
                raise TdeError("kek_unfit", "was not generated in the token, or could be read once", obj=obj)
            info = session.token
            ring.registry.remember_token(info.label, info.serial, access.library.path)
            for key in (*there, *find(session, label + COMPANION, id=there[0].id, cls="secret")):
                ring.registry.remember_key(
                    info.label, info.serial, key.label, key.id.hex(), f"{key.cls}_key", self.request.cluster
                )
            ring.journal.append(
                "adopt_kek", obj, cluster=self.request.cluster, key=label, key_id=there[0].id.hex(),
                token_label=info.label, token_serial=info.serial,
            )  # fmt: skip
        ring.keks = read_keks(ring.registry, self.request.cluster)


def _generated(options: Options) -> Secret:
    if options.kind == CYBERTEC:
        return Secret(secrets.token_bytes(options.key_bits // 8).hex())
    return Secret("".join(secrets.choice(_LETTERS) for dummy in range(GENERATED)))


def opens(
    request: Request,
    options: Options,
    source: t.Mapping[str, str],
    tokens: t.Sequence[TokenAccess],
    services: t.Sequence[KmipAccess],
) -> bool:
    """Whether the server's command would get the secret: opened once, given to nobody.

    :param source: the record's source of the PIN, used where the task gives none.
    :param tokens: how the record reaches the tokens, without PINs; :param services: the record's KMIP services.
    :returns: False if there is nothing to open yet.
    """
    store = SecretStore(request.state, request.cluster, options, lambda: _generated(options))
    if not store.key_ids():
        return False
    accesses = [request.access] if request.access and request.access.pin else []
    if not accesses and source.get("kind") == "file":
        # Two while a change of PIN is unfinished; the second is the one that the token had before.
        accesses = [
            dataclasses.replace(access, pin=pin, allow_low_pin_count=number > 0)
            for number, pin in enumerate(resting_pins(source["path"]))
            for access in tokens[:1]
        ]
    store.open([*map(TokenCredential, accesses), *map(KmipCredential, services)])
    return True


def describe(own: StateDirectory, cluster: str, options: Options) -> Facts:
    """What can be told of the secret and its master keys without a credential, as ``tde_info`` returns it."""
    store = SecretStore(own, cluster, options, lambda: _generated(options))
    registry, today = Registry(own), datetime.datetime.now(datetime.timezone.utc).date()
    keys, keks = read_keys(store) if store.exists() else [], read_keks(registry, cluster)
    return {
        "secret": store.secret.path,
        "data_keys": describe_keys(keys, today),
        "master_keys": describe_keks(keys, keks, today),
        "adopted": [cluster] if store.taken() else [],
    }
