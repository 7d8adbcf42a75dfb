# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The part of ``tde_info`` that is the same for every engine: what guards the keys, and what that leaves to be wished for."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import typing as t

from ..common.errors import TdeError
from ..keystore.store import KeyStore
from ..pkcs11.registry import Registry
from .keyfacts import describe_keks, describe_keys, read_keks, read_keys

if t.TYPE_CHECKING:
    from .base import Engine
    from .keyslots import Key

Facts = t.Dict[str, t.Any]

#: Libraries that keep keys in files of the host, by a part of their path.
_SOFTWARE = ("softhsm", "libkryoptic")

#: What no coverage reaches.
ALWAYS = (
    "Base backups, dumps and logical replication leave the encrypted layer: encrypt them where they go.",
    "Whoever is root on the running host, or logs in to the database, reads the data: the keys protect disks, not sessions.",
)


def tried(problems: list[str], act: t.Callable[[], t.Any], otherwise: t.Any) -> t.Any:
    """An answer; or, if it could not be had, ``otherwise`` and a sentence among the problems."""
    try:
        return act()
    except TdeError as exc:
        problems.append(f"{exc.obj}: {exc.message}" if exc.obj else exc.message)
        return otherwise


def of_store(engine: Engine, problems: list[str]) -> tuple[list[Key], Facts]:
    """A cluster whose keys lie in our store: what its record, the store and the registry tell.

    :returns: the data keys; and of the answer ``cluster``, ``engine``, ``managed``, ``pin_source``, ``tokens``, ``kmip``,
        ``master_keys``, ``data_keys``, ``adopted``, ``problems``.
    """
    request, record = engine.request, engine.record
    today = datetime.datetime.now(datetime.timezone.utc).date()
    store = KeyStore(request.state, request.cluster)
    keys: list[Key] = tried(problems, lambda: read_keys(store), [])
    for key in keys:
        if not key.last:
            tried(problems, functools.partial(store.refuse, key.key_id), None)
    keks = tried(problems, lambda: read_keks(Registry(request.state), request.cluster), [])
    return keys, {
        "cluster": request.cluster,
        "engine": engine.name,
        "managed": record is not None,
        "pin_source": dict(record.pin_source) if record else None,
        "tokens": [dataclasses.asdict(token) for token in record.tokens] if record else [],
        "kmip": [service.stored() for service in record.kmip] if record else [],
        "master_keys": describe_keks(keys, keks, today),
        "data_keys": describe_keys(keys, today),
        "adopted": tried(problems, store.adopted, []),
        "problems": problems,
    }


def same_disk(state_directory: str, found: Facts) -> bool:
    """Whether the PIN's file and the store lie on one file system."""
    source = found["pin_source"] or {}
    if source.get("kind") != "file":
        return False
    try:
        return os.stat(state_directory).st_dev == os.stat(source["path"]).st_dev
    except OSError:
        return False


def keyslot_gaps(facts: t.Mapping[str, t.Any]) -> t.Iterator[str]:
    """What the keyslots of our store leave to be wished for."""
    for key in facts["data_keys"]:
        names = sorted({slot["name"] for slot in key["keyslots"]})
        if len(names) == 1:
            yield f"Data key {key['key_id']} has a single keyslot ({names[0]}): it is the only way to the data. Add a recovery keyslot."
        for slot in key["keyslots"]:
            if not slot["proved"]:
                yield f"Keyslot {slot['name']} of data key {key['key_id']} was never proved: a change was interrupted. Run it again."
            if slot.get("kek_leaves_server"):
                yield f"The master key of keyslot {slot['name']} of data key {key['key_id']} leaves its KMIP server for each use."
        if len(names) < len(key["keyslots"]):
            yield f"Data key {key['key_id']} has two keyslots of one name: a change was interrupted. Run it again."
        if key["key_id"] in facts["adopted"]:
            yield (
                f"Data key {key['key_id']} came to this host without its journal: whether an older file was put in its place "
                "before that cannot be told."
            )
        if key["formerly"]:
            yield (
                f"Data key {key['key_id']} was once under {', '.join(key['formerly'])}: an old copy of the store still opens with that. "
                "Only encrypting the data anew revokes it."
            )


def host_gaps(facts: t.Mapping[str, t.Any]) -> t.Iterator[str]:
    """Where token, PIN and store lie together."""
    software = sorted(
        {token["label"] for token in facts["tokens"] if any(part in token["library"].lower() for part in _SOFTWARE)}
    )
    if software:
        yield f"Token {', '.join(software)} is software: its keys lie in files of this host, under the PIN alone."
    for service in facts.get("kmip", ()):
        yield (
            f"The client's key for KMIP service {service['service']} rests in {service['key']}: whoever takes the disk, and reaches "
            "the service before the client is struck out there, opens the data."
        )
    source = facts["pin_source"] or {}
    if source.get("kind") == "file":
        where = "on the same file system as the store" if facts["same_disk"] else "on this host"
        more = (
            ", the token's files with them: whoever takes the disk takes all that opens it"
            if software and facts["same_disk"]
            else ""
        )
        yield f"The PIN for the boot rests in {source['path']}, {where}{more}."
    elif source.get("kind") == "credential":
        yield "The PIN for the boot is a systemd credential: without a TPM its key lies on the same disk."
