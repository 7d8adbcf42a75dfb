# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One wrapped-key file on the disk, written so that a kill at any moment leaves one that opens.

Every write is: ``begun`` in the journal, a temporary file renamed over the former, ``done`` in the journal. A new file
is proved under another name first, so a file that shows was proved. A new keyslot never replaces another before it was
proved: two of one name stand side by side meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hmac
import os
import re
import secrets
import typing as t

from ..common.errors import TdeError
from ..common.files import lock, os_error, read_private, trusted_directory, write_atomic
from . import format as fmt
from . import recorded
from .format import Document, Keyslot
from .protection import Slot, load, unlock
from .sealed import SealedFile, open_files

#: Seconds to wait for another run's write, which may ask a slow token.
_WAIT = 10


def now() -> str:
    """The time as the file writes it: UTC, seconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class KeyFile(SealedFile):
    """A wrapped-key file and what may be done to it. See :class:`SealedFile` for the parameters."""

    def create(
        self,
        key: bytes,
        slots: t.Sequence[Slot],
        *,
        check: t.Mapping[str, str] | None,
        payload: t.Mapping[str, str] | None = None,
        replace: Document | None = None,
        replace_lost: bool = False,
    ) -> Document:
        """Write a new file, proved before it shows.

        :param key: the data key, random. :param slots: the keyslots, in order.
        :param replace: the document that it replaces (another secret under the same name).
        :param replace_lost: write it although the journal says that there was one which does not show.
        :raises TdeError: ``key_exists``, ``keystore_unreachable``, ``keyslot_unsound``.
        """
        if not slots or len({slot.name for slot in slots}) != len(slots):
            raise TdeError(
                "invalid_option", "the keyslots must be one or more, each with a name of its own", obj=self.identity.words()
            )
        with self._writing():
            self._may_create(replace, replace_lost)
            started = now()
            document = Document(
                identity=self.identity,
                length=len(key),
                created=started,
                generation=replace.generation + 1 if replace else 1,
                check=check,
                keyslots=tuple(self._wrapped(slot, key, proved=True) for slot in slots),
                payload=payload,
            )
            if replace:
                gone = replace.without({slot.uid for slot in replace.keyslots}, started)
                document = dataclasses.replace(document, history=gone.history, history_omitted=gone.history_omitted)
            document = fmt.seal(document, key)
            candidate = self._candidate()
            write_atomic(candidate, document.raw)
            again = self.decoded(candidate, read_private(candidate))
            for slot, keyslot in zip(slots, again.keyslots, strict=True):
                self._prove(again, slot, keyslot, key)
            # Before the file shows: a run that finds it has nothing to write, and so would leave the candidate lying.
            self._sweep()
            self._publish(document, "create_data_key" if self.identity.cluster else "create_wrapped_secret")
        return document

    def _may_create(self, replace: Document | None, replace_lost: bool) -> None:
        try:
            there: Document | None = self.judged().document
        except TdeError as exc:
            if exc.code != "data_key_absent" and not (exc.code == "keystore_unreachable" and replace_lost):
                raise
            there = None
        if there and (replace is None or there.raw != replace.raw):
            raise TdeError("key_exists", "exists already; nothing is written over it", obj=self.identity.words())

    def add(self, key: bytes, slot: Slot) -> bool:
        """Add a keyslot, unproved; beside one of the same name if there is one.

        :param key: the data key, from :meth:`open`.
        :returns: False if the file has this very keyslot.
        :raises TdeError: ``keystore_too_large`` and what reading, the protection and the token raise.
        """
        with self._writing():
            document = self._for_change(key)
            named = [keyslot for keyslot in document.keyslots if keyslot.name == slot.name]
            if any(self._is(document, keyslot, slot) for keyslot in named):
                return False
            # Nobody ever relied on one that was not proved: a run that was killed left it.
            left = document.without({keyslot.uid for keyslot in named if not keyslot.proved}, now())
            new = self._wrapped(slot, key, proved=False)
            self._publish(
                fmt.seal(dataclasses.replace(left, keyslots=(*left.keyslots, new), generation=document.generation + 1), key),
                "add_keyslot",
                new,
            )
        return True

    def find(self, slot: Slot) -> str | None:
        """The uid of the newest keyslot of the wish's name that the wish opens; None if none does.

        :raises TdeError: what opening raises, but for a passphrase that is not the keyslot's.
        """
        document = self.judged().document
        for keyslot in reversed(document.keyslots):
            if keyslot.name == slot.name and self._is(document, keyslot, slot):
                return keyslot.uid
        return None

    def prove(self, slot: Slot) -> bool:
        """Open the file that lies on the disk with one keyslot, by a login of its own, and mark the keyslot as proved.

        :returns: whether it was not marked before.
        :raises TdeError: ``keyslot_absent``, and what opening raises.
        """
        protection = load(slot.protection)

        def meant(keyslot: Keyslot) -> bool:
            return keyslot.name == slot.name and protection.is_target(keyslot, slot)

        if not any(meant(keyslot) for keyslot in self.judged().document.keyslots):
            raise TdeError("keyslot_absent", f"is not there under protection {slot.protection}", obj=self._named(slot.name))
        document, keyslot, key = open_files([self], [slot], eligible=meant)[0]
        if keyslot.proved:
            return False
        with self._writing():
            again = self._for_change(key)
            if again.raw != document.raw:
                raise TdeError("busy", "another run changed the file meanwhile", obj=self.path, next_step="Run again.")
            proved = dataclasses.replace(keyslot, proved=now())
            slots = tuple(proved if each.uid == keyslot.uid else each for each in again.keyslots)
            self._publish(
                fmt.seal(dataclasses.replace(again, keyslots=slots, generation=again.generation + 1), key),
                "prove_keyslot",
                proved,
            )
        return True

    def remove(self, key: bytes, name: str, uid: str | None = None) -> list[Keyslot]:
        """Remove a keyslot; of several of one name, all but the newest proved one.

        Not a revocation: an older copy of the file still opens with it. The file remembers it.

        :param uid: this one only, whatever others have its name.
        :returns: the keyslots removed; none if there is nothing of the name, or nothing left to remove.
        :raises TdeError: ``keyslot_last``, ``keyslot_unproved``.
        """
        with self._writing():
            document = self._for_change(key)
            gone = superseded(document, name, uid, self._named(name))
            if not gone:
                return []
            uids = {keyslot.uid for keyslot in gone}
            if not any(keyslot.proved for keyslot in document.keyslots if keyslot.uid not in uids):
                raise TdeError(
                    "keyslot_last",
                    "no other keyslot that was proved would be left",
                    obj=self._named(name),
                    next_step="Add another keyslot and prove it first.",
                )
            left = document.without(uids, now())
            self._publish(fmt.seal(dataclasses.replace(left, generation=document.generation + 1), key), "remove_keyslot", *gone)
        return gone

    def _named(self, name: str) -> str:
        return f"keyslot {name} of {self.identity.words()}"

    def _wrapped(self, slot: Slot, key: bytes, *, proved: bool) -> Keyslot:
        uid = secrets.token_hex(16)
        wrapped = load(slot.protection).wrap(slot, key, self.identity.context(uid), self.state)
        started = now()
        return Keyslot(slot.name, uid, slot.protection, started, started if proved else None, wrapped.target, wrapped.blob)

    def _is(self, document: Document, keyslot: Keyslot, slot: Slot) -> bool:
        """Whether a keyslot is the one wished for: its facts fit, and the wish opens it."""
        if not load(slot.protection).is_target(keyslot, slot):
            return False
        found = unlock([document], [slot], self.state, eligible=lambda each: each.uid == keyslot.uid)[0]
        if isinstance(found, TdeError):
            if found.code == "passphrase_refused":
                return False
            raise found
        return True

    def _prove(self, document: Document, slot: Slot, keyslot: Keyslot, key: bytes) -> None:
        found = unlock([document], [slot], self.state, eligible=lambda each: each.uid == keyslot.uid)[0]
        if isinstance(found, TdeError):
            raise found
        if not hmac.compare_digest(found[1], key):
            raise TdeError("keyslot_unsound", "gives another key than was wrapped", obj=self._named(slot.name))

    def _for_change(self, key: bytes) -> Document:
        """The file as it is now, if it may be written anew: a MAC is never put over what was not verified first."""
        judged = self.judged()
        self.verify(judged.document, key, judged.document.keyslots[0])
        self.refuse(judged)
        return judged.document

    @contextlib.contextmanager
    def _writing(self) -> t.Iterator[None]:
        with lock(self.lock_path, wait_seconds=_WAIT):
            self._sweep()
            try:
                judged = self.judged()
            except TdeError as exc:
                if exc.code not in ("data_key_absent", "keystore_unreachable"):
                    raise
            else:
                if judged.verdict == recorded.PENDING:
                    self.settle_locked(judged)
            yield

    def _publish(self, document: Document, action: str, *slots: Keyslot) -> None:
        self.record(action, recorded.BEGUN, document, *slots)
        mode, gid = self._attributes()
        write_atomic(self.path, document.raw, mode=mode, gid=gid)
        if read_private(self.path, forbidden_mode=self.forbidden_mode) != document.raw:
            raise TdeError("keyslot_unsound", "does not read back as it was written", obj=self.path, kept="It was not used.")
        self.record(action, recorded.DONE, document, *slots)

    def _attributes(self) -> tuple[int, int]:
        """Mode and group of the file as it is written; -1 for the writer's group."""
        return 0o600, -1

    def _candidate(self) -> str:
        return os.path.join(os.path.dirname(self.path), f".{os.path.basename(self.path)}.candidate")

    def _sweep(self) -> None:
        sweep(self.path)


def sweep(path: str, owners: t.Collection[int] | None = None) -> None:
    """Remove the temporary files that a killed writer of this path left; no others. Call it with the lock held.

    :param owners: as for :func:`trusted_directory`.
    """
    name = re.escape(os.path.basename(path))
    ours = re.compile(rf"\.{name}\.candidate|\.{name}\.[0-9a-f]{{12}}\.tmp|\.\.{name}\.candidate\.[0-9a-f]{{12}}\.tmp")
    with trusted_directory(os.path.dirname(path), owners) as folder:
        try:
            for found in os.listdir(folder):
                if ours.fullmatch(found):
                    os.unlink(found, dir_fd=folder)
        except OSError as exc:
            raise os_error(exc, path) from None


def superseded(document: Document, name: str, uid: str | None, obj: str) -> list[Keyslot]:
    """Which keyslots a removal means.

    :raises TdeError: ``keyslot_unproved`` if the newest of the name was not proved.
    """
    named = [keyslot for keyslot in document.keyslots if keyslot.name == name and uid in (None, keyslot.uid)]
    if len(named) < 2:
        return named
    if not named[-1].proved:
        raise TdeError(
            "keyslot_unproved", "is to be replaced by one that was not proved yet", obj=obj, next_step="Prove the new one first."
        )
    return named[:-1]
