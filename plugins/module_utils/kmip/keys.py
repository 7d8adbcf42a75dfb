# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keys at a KMIP server by their names, and making one so that there are never two.

Names need not be unique there, and two hosts may make the same key at the same moment. So one run a host makes keys at a
time (a lock), and each looks again after it has made one: whoever then sees another key of the name takes back its own,
pre-active and never used, and looks again later. The server takes one request after the other, so whoever saw its own key
alone is seen by everybody who comes later.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
import typing as t

from ..common.errors import TdeError
from ..common.files import lock
from .client import Client, KeyFacts

if t.TYPE_CHECKING:
    from ..common.journal import Journal
    from ..common.state import StateDirectory

#: Seconds to wait for another run of this host that makes keys; each of its requests has a time-out of its own.
_WAIT = 180
#: How often hosts may meet before one gives up, and the seconds (at most) before the second try; twice as many before each other.
_ROUNDS, _PAUSE = 8, 0.5
#: Seconds between two looks at a key that may go.
_LOOK = 0.5
#: Seconds after which nobody takes back a key any more; hosts' clocks may differ by less.
_YOUNG = 300


class Spec(t.NamedTuple):
    """A symmetric key to be made. :param length: bits; :param usage: as in :class:`KeyFacts`."""

    name: str
    algorithm: str = "aes"
    length: int = 256
    usage: tuple[str, ...] = ("encrypt", "decrypt")


@contextlib.contextmanager
def one_at_a_time(state: StateDirectory) -> t.Iterator[None]:
    """Hold the lock under which this host makes keys at KMIP servers.

    :raises TdeError: ``busy``.
    """
    state.create()
    with lock(os.path.join(state.path, "kmip.lock"), _WAIT):
        yield


def find(client: Client, name: str) -> list[KeyFacts]:
    """The keys of a name that are not destroyed, the oldest first.

    :raises TdeError: ``kmip_key_foreign``: one is seen, and belongs to another owner.
    """
    found = []
    for uid in client.locate(name):
        try:
            facts = client.attributes(uid)
        except TdeError as exc:
            if exc.code == "kmip_key_absent":
                continue  # destroyed meanwhile
            if exc.code == "kmip_permission_denied":
                raise TdeError(
                    "kmip_key_foreign",
                    f"key {uid} has this name, and the server does not let this client look at it",
                    obj=f"key {name!r} at {client.access.words()}",
                    details=exc.details,
                ) from None
            raise
        # Not every server compares names as it should.
        if name in facts.names and not facts.gone:
            found.append(facts)
    return sorted(found, key=lambda one: (one.created or 0, one.uid))


def find_one(client: Client, name: str, journal: Journal) -> KeyFacts | None:
    """The key of a name that stays, None if there is none.

    One that another host may be about to take back is waited for, as long as a request of that host may take.

    :param journal: names the keys that this host made to the end.
    :raises TdeError: ``key_ambiguous``, naming the ids.
    """
    deadline = time.monotonic() + client.access.timeout
    found = find(client, name)
    while any(_may_go(one, journal) for one in found) and time.monotonic() < deadline:
        time.sleep(_LOOK)
        found = find(client, name)
    if len(found) > 1:
        raise ambiguous(client, name, found)
    return found[0] if found else None


def _may_go(facts: KeyFacts, journal: Journal) -> bool:
    """Whether its maker may be about to take it back: it was made just now, not by this host, and nobody activated it."""
    if facts.state != "pre_active" or abs(time.time() - (facts.created or 0)) > _YOUNG:
        return False
    return journal.last(action="create_kmip_key", key_id=facts.uid) is None


def ambiguous(client: Client, name: str, found: t.Sequence[KeyFacts]) -> TdeError:
    """The refusal to choose between keys of one name."""
    ids = [one.uid for one in found]
    return TdeError(
        "key_ambiguous",
        f"{len(ids)} keys have this name: {', '.join(ids)}",
        obj=f"key {name!r} at {client.access.words()}",
        next_step="Name the one that is meant by its id; destroy the others if nothing needs them.",
        details={"ids": ids},
    )


def note(journal: Journal, client: Client, action: str, name: str, uid: str, *, cluster: str = "", **facts: t.Any) -> None:
    """Write an act on a key into the journal."""
    obj = f"key {name!r} at {client.access.words()}"
    journal.append(action, obj, cluster=cluster, key=name, key_id=uid, service=client.access.service, **facts)


def create(client: Client, spec: Spec, journal: Journal, *, cluster: str = "") -> KeyFacts:
    """Make a key whose name nobody has, pre-active. Call it within :func:`one_at_a_time`, after :func:`find_one` gave None.

    :returns: the key; where another host made one of the name at the same moment, perhaps that one.
    :raises TdeError: ``kmip_answer_lost``, ``key_ambiguous``, ``kmip_name_taken`` and what the server answers.
    """
    for number in range(_ROUNDS):
        uid = _create(client, spec)
        if uid is not None:
            note(journal, client, "create_kmip_key", spec.name, uid, cluster=cluster)
            found = find(client, spec.name)
            if [one.uid for one in found] == [uid]:
                return found[0]
            _take_back(client, spec, uid, journal, cluster)
        time.sleep(random.uniform(0.1, _PAUSE * 2**number))  # noqa: S311 - not for a secret
        other = find_one(client, spec.name, journal)
        if other:
            return other
    raise TdeError(
        "busy",
        f"other hosts made keys of this name at the same moment, {_ROUNDS} times",
        obj=f"key {spec.name!r} at {client.access.words()}",
        kept="This host's keys were taken back.",
        next_step="Run again.",
    )


def _create(client: Client, spec: Spec) -> str | None:
    """The new key's id; None if the answer was lost and a look shows that the name is there now."""
    try:
        return client.create(spec.name, spec.algorithm, spec.length, spec.usage)
    except TdeError as exc:
        if exc.code != "kmip_answer_lost":
            raise
        try:
            if find(client, spec.name):
                return None
        except TdeError:
            raise exc from None
        raise


def _take_back(client: Client, spec: Spec, uid: str, journal: Journal, cluster: str) -> None:
    # Nobody was given it, and it never was active.
    client.destroy(uid)
    note(journal, client, "destroy_kmip_key", spec.name, uid, cluster=cluster, why="another host made one at the same moment")
