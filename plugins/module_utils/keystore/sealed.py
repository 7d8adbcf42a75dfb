# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One wrapped-key file on the disk, read: judged by descriptor, form, HMAC and the journal, in this order, and opened."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ..common.errors import TdeError
from ..common.files import lock, read_private, trusted_directory
from ..common.journal import Journal
from . import format as fmt
from . import recorded
from .format import Document, Identity, Keyslot
from .protection import NAMES, Credential, load, unlock

#: The journal's action when a file is taken as it was found, this host having no record of it.
ADOPT = "adopt_key_file"

if t.TYPE_CHECKING:
    from ..common.state import StateDirectory


class Judged(t.NamedTuple):
    """A file that was read and not opened, and what the journal says of it (see :mod:`recorded`)."""

    document: Document
    verdict: str
    recorded_generation: int


class Opened(t.NamedTuple):
    """A file, the keyslot that opened it and the data key."""

    document: Document
    slot: Keyslot
    key: bytes


def naming(exc: TdeError, path: str) -> TdeError:
    """The error with the file's path as its object, if it names none."""
    if exc.obj:
        return exc
    return TdeError(exc.code, exc.message, obj=path, kept=exc.kept, next_step=exc.next_step, details=exc.details)


class SealedFile:
    """A wrapped-key file. Making the object touches nothing.

    :param state: its journal holds the copy elsewhere of the file's generation.
    :param path: absolute; the folder must exist before the first write.
    :param identity: which key the file must hold.
    :param lock_path: a file of its own, in a folder that exists.
    """

    #: Bits that the file's mode must not have.
    forbidden_mode: t.ClassVar[int] = 0o077

    def __init__(self, state: StateDirectory, path: str, identity: Identity, lock_path: str) -> None:
        self.state = state
        self.path = path
        self.identity = identity
        self.lock_path = lock_path
        self.journal = Journal(state.journal)

    def judged(self, entries: recorded.Entries | None = None) -> Judged:
        """The file without opening it.

        :param entries: of the journal, where the caller has read it before; a verdict against the file is never by them alone.
        :raises TdeError: ``data_key_absent``, ``keystore_unreachable``, ``file_not_private``, ``file_too_large`` and
            what :func:`format.decode` and :meth:`Protection.check` raise.
        """
        # The journal first: a writer in between makes the file newer than what was read of the journal, never older.
        # The second look decides then; each further one is for a further writer in between.
        for attempt in range(4):
            entries = entries if entries is not None and not attempt else self.journal.entries()
            document = self._read(entries)
            verdict, generation = recorded.judge(entries, self.identity, self.path, document)
            if verdict not in (recorded.ROLLED_BACK, recorded.OTHER):
                break
        return Judged(document, verdict, generation)

    def _read(self, entries: recorded.Entries) -> Document:
        try:
            raw = read_private(self.path, forbidden_mode=self.forbidden_mode)
        except TdeError as exc:
            if exc.code != "file_absent":
                raise
            if recorded.exists(entries, self.identity, self.path):
                raise TdeError(
                    "keystore_unreachable",
                    f"the journal says that {self.identity.words()} was written here, and the file does not show",
                    obj=self.path,
                    kept="Nothing was changed, and nothing was made in its place.",
                    next_step="Mount the file system that it is on, or restore the state directory from a backup.",
                ) from None
            raise TdeError("data_key_absent", "does not exist", obj=self.identity.words()) from None
        return self.decoded(self.path, raw)

    def decoded(self, path: str, raw: bytes) -> Document:
        """The bytes of ``path`` as a document, every keyslot judged by its protection's rules."""
        try:
            document = fmt.decode(raw, self.identity)
            for slot in document.keyslots:
                if slot.protection in NAMES:
                    load(slot.protection).check(slot)
        except TdeError as exc:
            raise naming(exc, path) from None
        return document

    def exists(self) -> bool:
        """Whether the file is there (whatever its content).

        :raises TdeError: ``keystore_unreachable``, and what reading a private file raises.
        """
        try:
            self.judged()
        except TdeError as exc:
            if exc.code == "data_key_absent":
                return False
            raise
        return True

    def verify(self, document: Document, key: bytes, slot: Keyslot) -> None:
        """As :func:`format.verify`, with the file's path in the error."""
        try:
            fmt.verify(document, key, slot)
        except TdeError as exc:
            raise naming(exc, self.path) from None

    def refuse(self, judged: Judged) -> None:
        """Raise if the journal says that this is not the file written last.

        :raises TdeError: ``keystore_rolled_back``, ``keystore_unrecorded``.
        """
        generation = judged.document.generation
        if judged.verdict == recorded.ROLLED_BACK:
            raise self._not_last(
                "keystore_rolled_back", f"is generation {generation}; generation {judged.recorded_generation} was written last"
            )
        if judged.verdict == recorded.OTHER:
            raise self._not_last("keystore_unrecorded", f"is generation {generation} with a content that this host did not write")

    def _not_last(self, code: str, reason: str) -> TdeError:
        return TdeError(
            code,
            reason,
            obj=self.path,
            kept="It was not used, and nothing was changed.",
            next_step="Find out who replaced it. A restore brings back the whole state directory, the journal with it.",
        )

    def open(self, credentials: t.Sequence[Credential]) -> Opened:
        """Open the file. See :func:`open_files`."""
        return open_files([self], credentials)[0]

    def settle(self, judged: Judged) -> None:
        """Record what was seen first: a write whose writer was killed, or a file that this host has no record of.

        A full disk or a busy lock does not keep a data key from being opened; the next who opens it records it.
        """
        if judged.verdict == recorded.SAME:
            return
        with contextlib.suppress(TdeError, OSError):
            with lock(self.lock_path):
                again = self.judged()
                if again.document.raw == judged.document.raw:
                    self.settle_locked(again)

    def settle_locked(self, judged: Judged) -> None:
        """As :meth:`settle`, with the lock held, on a file that is either verified or one that this host's journal announced."""
        action = {recorded.PENDING: "confirm_key_file", recorded.UNKNOWN: ADOPT}.get(judged.verdict)
        if action:
            # The rename may not have reached the disk when its writer was killed; the journal's entry must not outlive it.
            with trusted_directory(os.path.dirname(self.path)) as folder:
                os.fsync(folder)
            self.record(action, recorded.DONE, judged.document)

    def record(self, action: str, result: str, document: Document, *slots: Keyslot) -> None:
        """Write one of the two entries of a write (see :mod:`recorded`).

        :param slots: those concerned; all if none are given.
        """
        named = slots or document.keyslots
        try:
            self.journal.append(
                action,
                self.identity.words(),
                result=result,
                cluster=self.identity.cluster,
                key=self.identity.key_id,
                key_id=self.identity.key_id,
                kcv=document.check["value"] if document.check else "",
                keyslots=[{"name": slot.name, "uid": slot.uid, "protection": slot.protection, **slot.target} for slot in named],
                **recorded.facts(self.identity, self.path, document),
            )
        except TdeError as exc:
            if result == recorded.DONE:
                exc.kept = "The new content is in place; the next run records it."
            raise


def open_files(
    files: t.Sequence[SealedFile],
    credentials: t.Sequence[Credential],
    *,
    eligible: t.Callable[[Keyslot], bool] = lambda slot: True,
) -> list[Opened]:
    """Open several files: each credential is used once for all of them.

    A file is opened only if one keyslot gives a key under which the whole file's HMAC is right, and if it is the file
    that the journal recorded last.

    :param eligible: which keyslots may be tried.
    :raises TdeError: ``credential_missing``, ``passphrase_refused``, the token's answers, ``keyslot_foreign``,
        ``keystore_edited``, ``keystore_rolled_back``, ``keystore_unrecorded`` and what :meth:`SealedFile.read` raises.
    """
    entries = files[0].journal.entries() if files else []
    read = [each.judged(entries) for each in files]
    results = unlock([judged.document for judged in read], credentials, files[0].state, eligible=eligible) if files else []
    opened = []
    for file, judged, result in zip(files, read, results, strict=True):
        if isinstance(result, TdeError):
            # That somebody replaced the file explains a refusal, or a KEK that does not show, better than they explain themselves.
            if result.cause != "damaged":
                file.refuse(judged)
            raise result
        slot, key = result
        file.verify(judged.document, key, slot)
        file.refuse(judged)
        file.settle(judged)
        opened.append(Opened(judged.document, slot, key))
    return opened
