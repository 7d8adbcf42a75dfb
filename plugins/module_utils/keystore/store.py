# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A cluster's wrapped data keys: one folder, one file a key, in it keyslots that each hold the same data key.

Changing what guards a key is always :meth:`KeyStore.add_keyslot`, :meth:`KeyStore.prove_keyslot`,
:meth:`KeyStore.remove_keyslot`, in this order; a kill between any two, or within one, leaves a file that opens.
"""

from __future__ import annotations

import os
import secrets
import typing as t

from ..common.errors import TdeError
from ..common.files import make_private_directory, trusted_directory
from ..common.journal import Journal
from ..common.secret import Secret
from ..common.state import NAME, StateDirectory
from ..pkcs11.registry import Registry
from . import recorded
from .format import DATA_KEY, Document, Identity, Keyslot, check_value
from .keyfile import KeyFile
from .kmip import TARGET as KMIP_TARGET
from .kmip import KmipCredential, KmipSlot
from .passphrase import PassphraseCredential, PassphraseSlot
from .protection import Credential, Slot
from .sealed import ADOPT, Opened, open_files
from .token import TARGET, TokenCredential, TokenSlot

__all__ = [
    "Credential",
    "DataKey",
    "KeyStore",
    "KmipCredential",
    "KmipSlot",
    "PassphraseCredential",
    "PassphraseSlot",
    "Slot",
    "TokenCredential",
    "TokenSlot",
]

_SUFFIX = ".json"
#: The facts of all protections; a keyslot has None for those of others.
_FACTS = dict.fromkeys((*TARGET, *KMIP_TARGET))


class DataKey:
    """An opened data key. Printing it shows nothing of the key.

    :ivar keyslot: name of the keyslot that opened it; :ivar check_value: see :meth:`KeyStore.create_key`.
    """

    def __init__(self, opened: Opened) -> None:
        document, slot, key = opened
        self.cluster, self.key_id = document.identity.cluster, document.identity.key_id
        self.generation = document.generation
        self.check_value = (document.check or {}).get("value", "")
        self.keyslot = slot.name
        self._secret = Secret(key)

    def reveal(self) -> bytes:
        """The data key."""
        return self._secret.reveal()

    def __repr__(self) -> str:
        return f"DataKey({self.cluster}/{self.key_id})"


def keyslot_facts(slot: Keyslot) -> dict[str, t.Any]:
    """What a keyslot tells without being opened; the facts of a token or service are None under another protection."""
    facts = slot.facts()
    return {**_FACTS, **facts.pop("target"), **facts, "state": "proved" if slot.proved else "new"}


def document_facts(document: Document, verdict: str) -> dict[str, t.Any]:
    """What a wrapped-key file tells without being opened."""
    past = [{**_FACTS, **item["target"], **{k: v for k, v in item.items() if k != "target"}} for item in document.history]
    return {
        "key_id": document.identity.key_id,
        "length": document.length,
        "created": document.created,
        "generation": document.generation,
        "check_value": (document.check or {}).get("value", ""),
        "keyslots": [keyslot_facts(slot) for slot in document.keyslots],
        "history": past,
        "history_omitted": document.history_omitted,
        "recorded": verdict,
    }


class KeyStore:
    """The wrapped data keys of a cluster. Making the object touches nothing.

    A store or a key that the journal or the registry names and that does not show is unreachable, never absent.
    """

    def __init__(self, state: StateDirectory, cluster: str) -> None:
        self.state = state
        self.cluster = cluster
        self.path = state.store(cluster)

    def file(self, key_id: str) -> KeyFile:
        """The file of a data key. :raises TdeError: ``invalid_option`` for a name that may not be a file's."""
        if not NAME.fullmatch(key_id):
            raise TdeError(
                "invalid_option",
                "must be 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
                obj=f"data key {key_id!r}",
            )
        path = os.path.join(self.path, key_id + _SUFFIX)
        return KeyFile(self.state, path, Identity(DATA_KEY, self.cluster, key_id), os.path.join(self.path, "lock"))

    def exists(self) -> bool:
        """Whether the store's folder is there.

        :raises TdeError: ``keystore_unreachable``, ``file_not_private``.
        """
        try:
            with trusted_directory(self.path):
                return True
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
        names = sorted(recorded.key_ids(Journal(self.state.journal).entries(), DATA_KEY, self.cluster))
        if names:
            raise self._unreachable(f"the journal names its data keys {', '.join(names)}")
        registered = Registry(self.state).keys()
        keks = sorted({entry["label"] for entry in registered if entry["cluster"] == self.cluster})
        if keks:
            raise self._unreachable(f"the registry names its master keys {', '.join(keks)}")
        return False

    def create(self) -> bool:
        """Make the folder; before the first KEK is made, so that a KEK in the registry tells that there was a store.

        :returns: whether it was made.
        :raises TdeError: as :meth:`exists`.
        """
        return not self.exists() and make_private_directory(self.path)

    def key_ids(self) -> list[str]:
        """The data keys, in alphabetical order.

        :raises TdeError: ``keystore_unreachable`` if one that the journal names does not show.
        """
        if not self.exists():
            return []
        with trusted_directory(self.path) as folder:
            names = os.listdir(folder)
        there = {name[: -len(_SUFFIX)] for name in names if name.endswith(_SUFFIX) and NAME.fullmatch(name[: -len(_SUFFIX)])}
        missing = recorded.key_ids(Journal(self.state.journal).entries(), DATA_KEY, self.cluster) - there
        if missing:
            raise self._unreachable(f"the journal names its data keys {', '.join(sorted(missing))}")
        return sorted(there)

    def _unreachable(self, reason: str) -> TdeError:
        return TdeError(
            "keystore_unreachable",
            f"{reason}, and they do not show",
            obj=f"keystore {self.path}",
            kept="Nothing was changed, and nothing was made in their place.",
            next_step="Mount the file system that it is on, or restore the state directory from a backup.",
        )

    def describe(self) -> list[dict[str, t.Any]]:
        """Public facts of every key: no credential, no library but Python's own.

        Each: ``key_id``, ``length`` (bytes), ``created``, ``generation``, ``check_value``, ``keyslots`` (in the order in which
        they were added; each ``name``, ``uid``, ``protection``, ``created``, ``proved``, ``state`` new|proved, and ``token_label``,
        ``token_serial``, ``kmip_service``, ``kek_label``, ``kek_id``, ``kek_kcv``, ``kek_leaves_server``, None where the protection
        has no such thing), ``history`` (the keyslots that it was
        once under, with ``removed``: an old copy of the file still opens with them), ``history_omitted``, and ``recorded``
        (the journal's verdict: same, pending, unknown, rolled_back, other).

        :raises TdeError: as :meth:`key_ids` and :meth:`SealedFile.judged`.
        """
        key_ids = self.key_ids()
        entries = Journal(self.state.journal).entries() if key_ids else []
        judged = [self.file(key_id).judged(entries) for key_id in key_ids]
        return [document_facts(each.document, each.verdict) for each in judged]

    def adopted(self) -> list[str]:
        """The keys whose file this host took as it found it, having no record: an older file in its place was not noticed.

        :raises TdeError: as :meth:`describe`.
        """
        taken = {
            entry["key"]
            for entry in Journal(self.state.journal).entries()
            if entry["action"] == ADOPT and entry["cluster"] == self.cluster
        }
        return sorted(taken | {key["key_id"] for key in self.describe() if key["recorded"] == recorded.UNKNOWN})

    def refuse(self, key_id: str) -> None:
        """Raise if a data key's file is not the one that this host wrote last. See :meth:`SealedFile.refuse`."""
        file = self.file(key_id)
        file.refuse(file.judged())

    def create_key(
        self, key_id: str, length: int, slots: t.Sequence[Slot], check: t.Callable[[bytes], str] | None = None
    ) -> DataKey:
        """Make a data key of its :meth:`material`; when this returns it lies on the disk and every keyslot has opened it.

        :param length: bytes. :param slots: its keyslots, each with a name of its own.
        :param check: gives its check value in hex as its consumer tells it (fscrypt's key identifier); else HKDF-SHA256's.
        :raises TdeError: ``key_exists``, ``keystore_unreachable``, ``keyslot_unsound``, and what the protections raise.
        """
        file = self.file(key_id)
        self.create()
        key = self.material(key_id, length)
        value = {"kind": "consumer", "value": check(key)} if check else {"kind": "hkdf-sha256", "value": check_value(key)}
        document = file.create(key, slots, check=value)
        return DataKey(Opened(document, document.keyslots[0], key))

    def material(self, key_id: str, length: int) -> bytes:
        """What a new data key is made of: random bytes, or in the store of an engine that takes keys over those it has."""
        return secrets.token_bytes(length)

    def open_key(self, key_id: str, credentials: t.Sequence[Credential]) -> DataKey:
        """Open a data key with the first credential that can. See :func:`sealed.open_files`."""
        return self.open_keys([key_id], credentials)[key_id]

    def open_keys(self, key_ids: t.Sequence[str], credentials: t.Sequence[Credential]) -> dict[str, DataKey]:
        """Open several data keys: one login a credential, however many keys."""
        self._present()
        opened = open_files([self.file(key_id) for key_id in key_ids], credentials)
        return {key_id: DataKey(each) for key_id, each in zip(key_ids, opened, strict=True)}

    def add_keyslot(self, key_id: str, data_key: DataKey, slot: Slot) -> bool:
        """See :meth:`KeyFile.add`."""
        self._present()
        return self.file(key_id).add(data_key.reveal(), slot)

    def prove_keyslot(self, key_id: str, slot: Slot) -> bool:
        """See :meth:`KeyFile.prove`."""
        self._present()
        return self.file(key_id).prove(slot)

    def find_keyslot(self, key_id: str, slot: Slot) -> str | None:
        """See :meth:`KeyFile.find`."""
        self._present()
        return self.file(key_id).find(slot)

    def remove_keyslot(self, key_id: str, data_key: DataKey, name: str, uid: str | None = None) -> bool:
        """See :meth:`KeyFile.remove`. :returns: whether one was removed."""
        self._present()
        return bool(self.file(key_id).remove(data_key.reveal(), name, uid))

    def _present(self) -> None:
        if not self.exists():
            raise TdeError(
                "data_key_absent", "has no keystore", obj=f"cluster {self.cluster}", next_step="Create it (tde_keystore)."
            )
