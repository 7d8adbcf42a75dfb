# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What must be done to places, keystore and tablespaces: pure functions from facts and wishes to steps.

The order for a new place never changes: data key made and proved, kernel key added, empty directory made in the
root-owned parent, policy set, handed over to the server's user, recorded; only then does the server get to use it.
A run that was stopped between any two steps is finished by the next: a data key without a place is used, not made anew.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..base import TablespaceWish
from ..keyslots import Key, Wanted, demand_recovery, recovery_missing

#: Mode of a place once it is the server's (PostgreSQL refuses a data directory that others can read).
PLACE_MODE = 0o700
#: The data key's name for the whole cluster.
CLUSTER_KEY = "cluster"


def tablespace_key(name: str) -> str:
    """The data key's name for a tablespace."""
    return f"tablespace.{name}"


@dataclasses.dataclass(frozen=True)
class PlaceFacts:
    """An encrypted directory, there or wished for.

    :param exists: something is at the path; :param directory: a real directory, not a link.
    :param empty: None where it cannot be told (the key is absent), or nothing is there.
    :param owner: user id, None if nothing is there; :param mode: permission bits.
    :param policy: identifier of the key that the directory is encrypted with, in hex; "" if it is not encrypted.
    :param kernel_key: ``present``, ``absent`` or ``incompletely_removed``: the kernel's answer for our data key there, or
        for the policy's where the store has none; "" where there is nothing to ask about.
    :param unsupported: why the file system cannot encrypt, "" if it can.
    :param parent: what is wrong with the parent folder, "" if it is root's own.
    :param parent_exists: the parent folder is there.
    :param overlaps: the path lies inside the data directory, or around it.
    :param made: the record or the journal says that it was made; :param recorded: the record does.
    :param same_file_system: it lies on the file system that the record names.
    :param filled: the server's files are there: a data directory's PG_VERSION, a tablespace in the catalog.
    :param begun: creating the cluster there was begun and not finished.
    """

    key_id: str
    path: str
    exists: bool = False
    directory: bool = True
    empty: bool | None = None
    owner: int | None = None
    mode: int | None = None
    policy: str = ""
    kernel_key: str = ""
    unsupported: str = ""
    parent: str = ""
    parent_exists: bool = True
    overlaps: bool = False
    made: bool = False
    recorded: bool = False
    same_file_system: bool = True
    filled: bool = False
    begun: bool = False

    @property
    def open(self) -> bool:
        """Whether the kernel can read it."""
        return self.kernel_key == "present"


def _unreachable(place: PlaceFacts, reason: str) -> TdeError:
    return TdeError(
        "place_unreachable",
        reason,
        obj=place.path,
        kept="Nothing was created in its place.",
        next_step="Mount the file system it lies on, then run again.",
    )


def _foreign(place: PlaceFacts, reason: str) -> TdeError:
    return TdeError(
        "place_foreign",
        reason,
        obj=place.path,
        next_step="Restore the store that its key belongs to, or choose another location.",
        details={"policy": place.policy},
    )


def check_made(place: PlaceFacts, key: Key | None) -> None:
    """Judge a place that was made once.

    :raises TdeError: ``place_unreachable``, ``keystore_unreachable``, ``place_foreign``.
    """
    if not place.exists or not place.directory:
        raise _unreachable(place, "was made once and does not show")
    if not place.same_file_system:
        raise _unreachable(place, "lies on another file system than it was made on")
    if not place.policy:
        raise _unreachable(place, "was made once, and a directory that is not encrypted stands there now")
    if key is None:
        raise TdeError(
            "keystore_unreachable",
            "the place is there and the store has no data key for it",
            obj=f"data key {place.key_id}",
            kept="Nothing was created in its place.",
            next_step="Mount the state directory, or restore the store from a backup.",
        )
    if place.policy != key.check_value:
        raise _foreign(place, "is encrypted with another key than the one that the store holds for it")


def _check_new(place: PlaceFacts, key: Key | None) -> None:
    """Judge a place that is to be made, or whose making was interrupted."""
    obj = place.path
    if place.overlaps:
        raise TdeError(
            "place_inside_data_directory",
            "lies inside the data directory of the server, or around it",
            obj=obj,
            next_step="Choose a location outside of it.",
        )
    if place.unsupported:
        raise TdeError(
            "fscrypt_unsupported", place.unsupported, obj=obj, next_step="Choose a file system that can, or storage: image."
        )
    if place.parent:
        raise TdeError(
            "place_parent_unsafe",
            place.parent,
            obj=obj,
            next_step="Choose a folder that belongs to root and that nobody else can write to, for it and all its parents.",
        )
    if not place.exists:
        return
    if not place.directory:
        raise TdeError(
            "place_not_directory", "is a link or not a directory", obj=obj, next_step="Remove it, or choose another location."
        )
    if place.policy and key is None:
        raise _foreign(place, "is encrypted with a key that the store does not hold")
    if place.policy and key is not None and place.policy != key.check_value:
        raise _foreign(place, "is encrypted with another key than the one that the store holds for it")
    if not place.policy and place.filled:
        raise TdeError(
            "place_plain",
            "is in use and not encrypted",
            obj=obj,
            next_step="Encryption does not happen in place: choose a new location and move the data there.",
        )
    if place.empty is False and not place.filled:
        raise TdeError("place_not_empty", "is not empty", obj=obj, next_step="Choose another location, or move its content away.")


def make_place(place: PlaceFacts, key: Key | None, slots: t.Sequence[Wanted], *, owner: int, no_recovery: bool) -> Plan:
    """The steps that make an encrypted directory, from wherever an earlier run stopped.

    :param key: its data key if the store has one.
    :param slots: the keyslots of a new data key.
    :param owner: user id of the server's user.
    :raises TdeError: what makes the place impossible or unreachable.
    """
    data = {"key_id": place.key_id, "path": place.path}
    obj = f"directory {place.path}"
    record = Step("record_place", obj, "so that it is never taken for new when it does not show", data)
    if place.made:
        check_made(place, key)
        return [] if place.recorded else [record]
    _check_new(place, key)
    plan: Plan = []
    if key is None:
        demand_recovery(slots, no_recovery, f"data key {place.key_id}")
        names = [one.name for one in slots]
        plan.append(
            Step("create_data_key", f"data key {place.key_id}", f"under keyslots {', '.join(names)}", {**data, "slots": names})
        )
    elif len({slot.name for slot in key.slots}) < 2 and not no_recovery:
        raise recovery_missing(f"data key {place.key_id}", "its only keyslot would be the only way to the data")
    if not place.open:
        plan.append(add_kernel_key(place))
    if not place.exists:
        plan.append(Step("make_directory", obj, "the place, in a folder that only root can write to", data))
    if not place.policy:
        plan.append(Step("set_policy", obj, "encrypted from here on", data))
    if not place.exists or place.owner != owner or place.mode != PLACE_MODE:
        plan.append(Step("hand_over", obj, "to the server's user, after it is encrypted", data))
    return [*plan, record]


def add_kernel_key(place: PlaceFacts) -> Step:
    """The step that opens a place."""
    return Step("add_kernel_key", f"data key {place.key_id}", f"opens {place.path}", {"key_id": place.key_id, "path": place.path})


def open_places(places: t.Sequence[PlaceFacts], keys: t.Mapping[str, Key]) -> Plan:
    """The steps that open every place that was made.

    :raises TdeError: as :func:`check_made`; all places are judged before the first step.
    """
    plan: Plan = []
    for place in places:
        if place.made:
            check_made(place, keys.get(place.key_id))
            if not place.open:
                plan.append(add_kernel_key(place))
    return plan


def close_places(places: t.Sequence[PlaceFacts], *, running: str, users: t.Sequence[str], force: bool) -> Plan:
    """The steps that close every place whose key the kernel holds, wholly or in part.

    :param running: what says that the server runs, "" if nothing does.
    :param users: processes that have files of the places open.
    :raises TdeError: ``server_running``, ``place_in_use``.
    """
    plan = [
        Step(
            "remove_kernel_key", f"data key {place.key_id}", f"closes {place.path}", {"key_id": place.key_id, "path": place.path}
        )
        for place in places
        if place.kernel_key in ("present", "incompletely_removed")
    ]
    if plan and not force and running:
        raise TdeError(
            "server_running",
            running,
            obj="the keystore",
            kept="It stays open.",
            next_step="Stop the server first; force closes it anyhow, and the server will crash.",
        )
    if plan and not force and users:
        raise TdeError(
            "place_in_use",
            f"in use by {', '.join(users)}",
            obj="the keystore",
            kept="It stays open.",
            next_step="End these processes first.",
        )
    return plan


def fill_cluster(place: PlaceFacts, *, create: bool, how: str) -> Plan:
    """The steps that create the database cluster in its place.

    :param create: whether that is wished.
    :param how: the program that does it, in words.
    """
    if not create or place.filled:
        return []
    data = {"key_id": place.key_id, "path": place.path}
    plan: Plan = [add_kernel_key(place)] if place.made and not place.open else []
    if place.begun:
        plan.append(
            Step("clear_place", f"directory {place.path}", "an earlier run was stopped while it created the cluster", data)
        )
    plan.append(Step("create_cluster", f"directory {place.path}", how, data))
    return plan


@dataclasses.dataclass(frozen=True)
class CatalogFacts:
    """What the server says of one tablespace wished for.

    :param exists: a tablespace of the name; :param location: its directory, links resolved.
    :param owner: its owner.
    :param taken: the name of another tablespace at the wished location, "" if none.
    """

    exists: bool = False
    location: str = ""
    owner: str = ""
    taken: str = ""


def tablespace(
    wish: TablespaceWish,
    place: PlaceFacts,
    key: Key | None,
    catalog: CatalogFacts,
    slots: t.Sequence[Wanted],
    *,
    owner: int,
    no_recovery: bool,
    moves: bool,
) -> Plan:
    """The steps that make one encrypted tablespace, without what moves into it.

    :param moves: something is to move into it, so it must be open.
    :raises TdeError: what makes it impossible or unreachable.
    """
    obj = f"tablespace {wish.name}"
    if catalog.exists and catalog.location != place.path:
        raise TdeError(
            "tablespace_elsewhere",
            f"exists at {catalog.location or 'its own place in the data directory'}, not at {place.path}",
            obj=obj,
            next_step="Take another name, or name that location.",
        )
    if catalog.taken:
        raise TdeError(
            "tablespace_elsewhere",
            f"its location belongs to tablespace {catalog.taken}",
            obj=obj,
            next_step="Take another location.",
        )
    if catalog.exists and not (place.exists and place.directory):
        raise _unreachable(place, f"tablespace {wish.name} is in the catalog and its directory does not show")
    if catalog.exists and not place.policy and not place.made:
        raise TdeError(
            "place_plain",
            "exists and is not encrypted",
            obj=obj,
            next_step="Encryption does not happen in place: list a new tablespace, and move the tables into it.",
        )
    plan = make_place(place, key, slots, owner=owner, no_recovery=no_recovery)
    if not catalog.exists:
        if place.made and not place.open:
            plan.append(add_kernel_key(place))
        if place.made and place.empty is False:
            raise TdeError(
                "place_not_empty", "is not empty", obj=place.path, next_step="Find out what is in it, and move it away."
            )
        data = {"name": wish.name, "path": place.path, "owner": wish.owner or ""}
        plan.append(Step("create_tablespace", obj, f"at {place.path}", data))
        return plan
    if wish.owner and wish.owner != catalog.owner:
        plan.append(
            Step(
                "set_tablespace_owner", obj, f"{wish.owner} instead of {catalog.owner}", {"name": wish.name, "owner": wish.owner}
            )
        )
    if moves and place.made and not place.open:
        raise TdeError(
            "place_closed",
            "the kernel does not hold its key",
            obj=obj,
            next_step="Open the keystore: tde_keystore with state=open, or hsm-tde open.",
        )
    return plan
