# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A cluster's record: what the host must know of a cluster at its next boot, without Ansible and without a secret.

``<state>/clusters/<name>.json``, root's own, mode 0600::

    {"version": 1, "cluster": "main", "engine": "postgresql",
     "options": {...},                       the engine's dictionary as it was last given
     "file_system": "c0ffee",                what lay at the mount point then
     "tokens": [{"library": "/usr/lib/softhsm/libsofthsm2.so", "environment": {"SOFTHSM2_CONF": "..."},
                 "label": "demo", "serial": "0a1b"}],
     "kmip": [{"service": "kmip", "servers": ["kms1.example.com"], "ca": "...", "certificate": "...", "key": "...", "timeout": 10.0}],
     "places": [{"key_id": "cluster", "path": "/srv/tde/data", "mount_point": "/srv/tde", "image": null,
                 "file_system": "c0ffee", "made": true, "begun": true, "filled": true}],
     "pin_source": {"kind": "file", "path": "/etc/hsm-tde/pin"}}

A library path and a server's address stand here and never in the store: who can write the store must not choose the
code that root loads, nor whom it believes. A place is ``made`` once its directory was encrypted and handed to the server; from then on, a place that
does not show is unreachable, never new.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ..common.errors import TdeError
from ..common.state import StateDirectory, read_json, write_json
from ..kmip.access import KmipAccess, from_record

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """An encrypted directory.

    :param key_id: its data key's name in the store (``cluster``, ``tablespace.<name>``).
    :param path: the directory, which is the fscrypt policy directory itself.
    :param mount_point: the root-owned folder under which it lies; the kernel key is added to this file system.
    :param image: the file mounted there, if the storage is an image.
    :param file_system: the file system's identifier as statvfs(3) gives it, in hex; another one there is not ours.
    :param made: the directory was encrypted and handed over.
    :param begun: creating a database cluster there has begun; :param filled: it has ended.
    """

    key_id: str
    path: str
    mount_point: str
    image: str | None = None
    file_system: str = ""
    made: bool = False
    begun: bool = False
    filled: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """How to reach a token that a keyslot names; no secret."""

    library: str
    environment: t.Mapping[str, str]
    label: str
    serial: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A cluster as the host remembers it.

    :param file_system: identifier of the file system at the mount point, as of a place; "" if there is none.
    """

    cluster: str
    engine: str
    options: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    file_system: str = ""
    tokens: tuple[Token, ...] = ()
    kmip: tuple[KmipAccess, ...] = ()
    places: tuple[Place, ...] = ()
    pin_source: t.Mapping[str, str] = dataclasses.field(default_factory=lambda: {"kind": "none"})

    def place(self, key_id: str) -> Place | None:
        """The place of a data key."""
        return next((place for place in self.places if place.key_id == key_id), None)

    def with_place(self, place: Place) -> Record:
        """The record with a place added or replaced."""
        others = tuple(one for one in self.places if one.key_id != place.key_id)
        return dataclasses.replace(self, places=tuple(sorted((*others, place), key=lambda one: one.key_id)))

    def with_token(self, token: Token) -> Record:
        """The record with a token added, or its library replaced."""
        others = tuple(one for one in self.tokens if (one.label, one.serial) != (token.label, token.serial))
        return dataclasses.replace(self, tokens=tuple(sorted((*others, token), key=lambda one: (one.label, one.serial))))

    def service(self, name: str | None) -> KmipAccess | None:
        """The KMIP service of a name; None for the only one there is."""
        named = [one for one in self.kmip if name in (None, one.service)]
        return named[0] if len(named) == 1 else None

    def with_service(self, access: KmipAccess) -> Record:
        """The record with a KMIP service added, or what it says of it replaced."""
        others = tuple(one for one in self.kmip if one.service != access.service)
        return dataclasses.replace(self, kmip=tuple(sorted((*others, access), key=lambda one: one.service)))

    def public(self) -> dict[str, t.Any]:
        """The record as plain data, as it is written."""
        return {"version": VERSION, **dataclasses.asdict(self), "kmip": [one.stored() for one in self.kmip]}


def _damaged(path: str, reason: str) -> TdeError:
    return TdeError("record_damaged", reason, obj=path, next_step="Restore it from a backup.")


def parse(content: t.Any, path: str) -> Record:
    """A record from its JSON content.

    :raises TdeError: ``record_damaged``.
    """
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise _damaged(path, f"is not a cluster's record of version {VERSION}")
    try:
        record = Record(
            cluster=content["cluster"],
            engine=content["engine"],
            options=dict(content["options"]),
            file_system=content["file_system"],
            tokens=tuple(Token(**token) for token in content["tokens"]),
            # Records of clusters that never used one may lack it.
            kmip=tuple(from_record(one) for one in content.get("kmip", ())),
            places=tuple(Place(**place) for place in content["places"]),
            pin_source=dict(content["pin_source"]),
        )
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, "lacks a field or has one of another type") from None
    for place in record.places:
        if not (isinstance(place.path, str) and os.path.isabs(place.path) and os.path.isabs(place.mount_point)):
            raise _damaged(path, f"names a place that is no absolute path: {place.path!r}")
    return record


def read(state: StateDirectory, cluster: str) -> Record | None:
    """A cluster's record, or None if there never was one.

    :raises TdeError: ``record_damaged``, and those of reading a private file.
    """
    path = state.cluster_record(cluster)
    content = read_json(path, "record_damaged")
    if content is None:
        return None
    record = parse(content, path)
    if record.cluster != cluster:
        raise _damaged(path, f"is the record of cluster {record.cluster!r}")
    return record


def write(state: StateDirectory, record: Record) -> None:
    """Write a cluster's record atomically."""
    write_json(state.cluster_record(record.cluster), record.public())


def clusters(state: StateDirectory) -> list[str]:
    """The names of all clusters that have a record."""
    folder = os.path.dirname(state.cluster_record("x"))
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(name[: -len(".json")] for name in names if name.endswith(".json") and not name.startswith("."))
