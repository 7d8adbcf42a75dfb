# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the journal knows of a wrapped-key file: the copy elsewhere of its generation and digest.

A write is two entries around the rename: ``begun`` with the generation and digest that the file is about to have, and
``done`` with the same. So, whatever moment a writer is killed at,

* a file with the digest of the last ``done`` is the one written last (or its successor was never renamed into place);
* a file with the digest of a ``begun`` after that was renamed, and only the acknowledgement is missing: whoever sees
  it first, and holds the lock, writes it (:meth:`SealedFile.settle`), after which the former content counts as rolled back;
* any other file is rolled back, or not from this host.

Nothing is reported as done before ``done`` is on the disk, so a rollback to before it can hide nothing that was reported.
"""

from __future__ import annotations

import typing as t

from .format import Document, Identity

BEGUN = "begun"
DONE = "done"

#: Verdicts on a file.
SAME = "same"
PENDING = "pending"
ROLLED_BACK = "rolled_back"
OTHER = "other"
UNKNOWN = "unknown"

Entries = t.Sequence[t.Mapping[str, t.Any]]


def facts(identity: Identity, path: str, document: Document) -> dict[str, t.Any]:
    """What both entries of a write say about the file; detail of the journal's entry."""
    return {**place(identity, path), "file_generation": document.generation, "file_digest": document.digest()}


def place(identity: Identity, path: str) -> dict[str, str]:
    """Which file is meant. A data key is known by its name in its cluster; a secret by its path as well."""
    return {"file_kind": identity.kind, "file_path": path}


def _of(entries: Entries, identity: Identity, path: str) -> t.Iterator[t.Mapping[str, t.Any]]:
    for entry in entries:
        detail = entry.get("detail")
        if not isinstance(detail, dict) or "file_digest" not in detail or entry.get("result") not in (BEGUN, DONE):
            continue
        if (detail.get("file_kind"), entry.get("cluster"), entry.get("key_id")) != (
            identity.kind,
            identity.cluster,
            identity.key_id,
        ):
            continue
        # The state directory may be moved as a whole; a secret's file has no other home than its path.
        if not identity.cluster and detail.get("file_path") != path:
            continue
        yield entry


def exists(entries: Entries, identity: Identity, path: str) -> bool:
    """Whether the file was written to the end once, so that it must be there."""
    return any(entry["result"] == DONE for entry in _of(entries, identity, path))


def key_ids(entries: Entries, kind: str, cluster: str) -> set[str]:
    """The keys of a cluster whose files must be there."""
    return {
        str(entry["key_id"])
        for entry in entries
        if entry.get("cluster") == cluster
        and entry.get("result") == DONE
        and isinstance(entry.get("detail"), dict)
        and entry["detail"].get("file_kind") == kind
    }


def judge(entries: Entries, identity: Identity, path: str, document: Document) -> tuple[str, int]:
    """Compare a file with the journal.

    :returns: a verdict and the generation recorded last (0: none).
    """
    generation, current = 0, ""
    pending: set[str] = set()
    for entry in _of(entries, identity, path):
        digest = entry["detail"]["file_digest"]
        if entry["result"] == DONE:
            generation, current = entry["detail"]["file_generation"], digest
            pending.clear()
        else:
            pending.add(digest)
    digest = document.digest()
    if digest == current:
        return SAME, generation
    if digest in pending:
        return PENDING, generation
    if not current:
        return UNKNOWN, generation
    return (ROLLED_BACK if document.generation < generation else OTHER), generation
