# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What this host remembers of nShield beside the Security World itself: changes that other clients have yet to get.

``<state>/nshield.json``: ``changes`` (numbered sentences), ``clients`` (the number up to which each other client was supplied),
``copies`` (digest of the copy of the world that each was supplied with), ``committed`` (digest of the world that was last given to
the remote file system), ``gang_clients`` (clients that this remote file system lets in), ``cards`` (cards of a set that have got its
new passphrase).
"""

from __future__ import annotations

import datetime
import os
import typing as t

from ..common.state import StateDirectory, read_json, write_json

#: Sentences kept; older ones concern nobody who still needs single steps.
_KEPT = 200

Remembered = dict[str, t.Any]


def _path(state: StateDirectory) -> str:
    return os.path.join(state.path, "nshield.json")


def load(state: StateDirectory) -> Remembered:
    """What is remembered; empty lists where nothing is."""
    empty: Remembered = {"changes": [], "clients": {}, "copies": {}, "committed": {}, "gang_clients": [], "cards": {}}
    return {**empty, **read_json(_path(state), "record_damaged", {})}


def save(state: StateDirectory, remembered: Remembered) -> None:
    write_json(_path(state), remembered)


def remember(state: StateDirectory, what: str) -> None:
    """Note a change of the world that other clients need. The caller holds the lock.

    :param what: a clause, such as "softcard x was made".
    """
    remembered = load(state)
    number = remembered["changes"][-1]["number"] + 1 if remembered["changes"] else 1
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    remembered["changes"] = [*remembered["changes"], {"number": number, "time": time, "what": what}][-_KEPT:]
    save(state, remembered)


def behind(remembered: Remembered, digest: str | None) -> list[dict[str, t.Any]]:
    """The other clients that have not got all changes; pure. :returns: ``name``, ``needs`` (sentences).

    :param digest: of this client's copy now; it tells of keys that a database made, which nobody notes.
    """
    found = []
    for name, number in sorted(remembered["clients"].items()):
        needs = [f"{change['time']}: {change['what']}" for change in remembered["changes"] if change["number"] > number]
        if not needs and remembered["copies"].get(name, digest) != digest:
            needs = ["Files of the Security World, which are the keys, have changed since it was supplied."]
        if needs:
            found.append({"name": name, "needs": needs})
    return found


def cards_done(
    state: StateDirectory, cardset: str, total: int, done_now: t.Collection[int], restarted: bool, *, write: bool
) -> set[int]:
    """Which cards of a set have its new passphrase, those of earlier runs included.

    :param done_now: the cards in slots, which have it now.
    :param restarted: a card that had got it has another one: what is remembered is of an earlier change.
    """
    remembered = load(state)
    before = set() if restarted else set(remembered["cards"].get(cardset, []))
    done = before | set(done_now)
    if write and done != before:
        # Nothing is left to be remembered of a change that all cards have got.
        kept = {name: cards for name, cards in remembered["cards"].items() if name != cardset}
        remembered["cards"] = kept if len(done) >= total else {**kept, cardset: sorted(done)}
        save(state, remembered)
    return done
