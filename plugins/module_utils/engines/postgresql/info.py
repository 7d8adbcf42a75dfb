# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All that can be told of a PostgreSQL estate without a secret, ours or not: read only, and every failure is a fact.

:func:`collect` looks; the sentences about what is in the clear come from ``gaps``.
"""

from __future__ import annotations

import dataclasses
import os
import typing as t

from ...common.errors import TdeError
from ...storage import fscrypt
from ...storage.mounts import device_layers, mount_of, raw_device
from ..telling import of_store, same_disk
from . import gaps, look, public, sql
from .options import Options

if t.TYPE_CHECKING:
    from .engine import Postgresql

Facts = t.Dict[str, t.Any]

#: How a place is encrypted, as ``encryption`` says it.
OURS, FOREIGN, DM_CRYPT, PLAIN, UNKNOWN = "ours", "unknown_key", "dm_crypt", "plain", "unknown"


def encryption(path: str, identifiers: t.Mapping[str, str]) -> Facts:
    """How the directory at a path is encrypted, judged by its inode's policy and by what lies under its file system.

    :param identifiers: data key names by key identifier.
    :returns: ``path``, ``encryption`` (ours, unknown_key, dm_crypt, plain, unknown), ``key_id``, ``identifier``,
        ``kernel_key``, ``mount``, ``problem``.
    """
    facts = _facts(path)
    try:
        mount = mount_of(path)
        facts["mount"] = {"mount_point": mount.mount_point, "filesystem": mount.filesystem, "source": mount.source}
        raw = raw_device(path)
        device = raw if raw.node else device_layers(mount.device)
        # Where the file system has no encryption of its own, "no policy" needs no asking.
        policy = fscrypt.policy(path) if fscrypt.supported(path)["supported"] else None
        if policy:
            facts["identifier"] = policy["identifier"]
            facts["key_id"] = identifiers.get(policy["identifier"])
            facts["encryption"] = OURS if facts["key_id"] else FOREIGN
            if policy["version"] > 1:
                facts["kernel_key"] = fscrypt.key_status(path, policy["identifier"])
        elif device.node:
            facts["encryption"] = DM_CRYPT if device.crypt_whole else PLAIN
        else:
            facts["problem"] = raw.reason
    except TdeError as exc:
        facts["problem"] = exc.message
    return facts


def _facts(path: str) -> Facts:
    """What :func:`encryption` tells, before anything was seen."""
    return {
        "path": path,
        "encryption": UNKNOWN,
        "key_id": None,
        "identifier": None,
        "kernel_key": None,
        "mount": None,
        "problem": None,
    }


def elsewhere(directory: str, identifiers: t.Mapping[str, str], problems: list[str]) -> list[Facts]:
    """The parts of a data directory that a link or a mount puts elsewhere (``pg_wal`` first of all), tablespaces aside.

    Below a directory that is encrypted all is, but for these.
    """
    found: list[Facts] = []
    folders = [directory]
    while folders:
        folder = folders.pop()
        try:
            device = os.stat(folder).st_dev
            with os.scandir(folder) as entries:
                for entry in entries:
                    inner = entry.is_dir(follow_symlinks=False)
                    if entry.is_symlink() or (inner and entry.stat(follow_symlinks=False).st_dev != device):
                        path = os.path.realpath(entry.path)
                        facts = encryption(path if os.path.isdir(path) else os.path.dirname(path), identifiers)
                        found.append({"name": os.path.relpath(entry.path, directory), **facts, "path": path})
                    elif inner and entry.path != os.path.join(directory, "pg_tblspc"):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError as exc:
            problems.append(f"{folder}: {os.strerror(exc.errno or 0)}")
    return sorted(found, key=lambda one: str(one["name"]))


def tablespaces_of(server: look.Server, identifiers: t.Mapping[str, str], problems: list[str]) -> list[Facts]:
    """Every tablespace; of a server that does not answer, those that its data directory links to."""
    found = []
    if server.answer:
        for one in server.answer.tablespaces:
            if one.location == sql.UNKNOWN_LOCATION:
                found.append({"name": one.name, "owner": one.owner, **_facts("?"), "problem": "the server cannot read its link"})
                continue
            inner = os.path.join(server.answer.data_directory, {"pg_global": "global"}.get(one.name, "base"))
            found.append(
                {"name": one.name, "owner": one.owner, **encryption(os.path.realpath(one.location or inner), identifiers)}
            )
        return found
    links = os.path.join(server.data_directory, "pg_tblspc")
    try:
        names = sorted(os.listdir(links)) if server.data_directory else []
    except OSError:
        return []
    for oid in names:
        path = os.path.realpath(os.path.join(links, oid))
        facts = encryption(path, identifiers)
        name = facts["key_id"].partition(".")[2] if facts["key_id"] else f"oid {oid}"
        found.append({"name": name, "owner": None, **facts})
    return found


def databases_of(answer: sql.Server | None) -> list[Facts]:
    """The databases as ``databases`` tells them."""
    if answer is None:
        return []
    return [
        {"name": one.name, "tablespace": one.tablespace, "default_tablespace": one.default_setting or one.tablespace}
        for one in answer.databases
        if not one.template
    ]


def server_facts(server: look.Server) -> Facts:
    """The server as ``server`` tells it."""
    answer = server.answer
    return {
        "address": server.access.where,
        "running": server.postmaster is not None or answer is not None,
        "pid": server.postmaster.pid if server.postmaster else None,
        "data_directory": server.data_directory or None,
        "answers": answer is not None,
        "problem": None if answer or server.error is None else server.error.message,
        "error_code": None if answer or server.error is None else server.error.code,
        "version": answer.version if answer else None,
        "standby": answer.standby if answer else None,
        "standbys_attached": answer.standbys if answer else None,
        "settings": dict(answer.settings) if answer else {},
    }


def collect(engine: Postgresql) -> Facts:
    """Everything; nothing is changed, nothing is needed but root."""
    problems: list[str] = []
    options, record = engine.options, engine.record
    keys, found = of_store(engine, problems)
    identifiers = {key.check_value: key.key_id for key in keys}
    server = look_at_server(engine, options, problems)
    tablespaces = tablespaces_of(server, identifiers, problems)
    data_directory = encryption(os.path.realpath(server.data_directory), identifiers) if server.data_directory else None
    parts = elsewhere(data_directory["path"], identifiers, problems) if data_directory else []
    known = {key.key_id: key for key in keys}
    places = []
    for place in record.places if record else ():
        try:
            facts = look.place(place.key_id, place.path, known.get(place.key_id), place)
        except TdeError as exc:
            problems.append(f"{place.path}: {exc.message}")
            continue
        places.append(
            {"key_id": place.key_id, **public.place_facts(facts), "exists": facts.exists, "mount_point": place.mount_point}
        )
    found |= {
        "coverage": options.coverage if record else None,
        "places": places,
        "server": server_facts(server),
        "data_directory": data_directory,
        "elsewhere": parts,
        "tablespaces": tablespaces,
        "databases": databases_of(server.answer),
    }
    found["same_disk"] = same_disk(engine.request.state.path, found)
    found["gaps"] = gaps.sentences(found)
    found["encrypted"] = bool(data_directory) and not server.misplaced and gaps.covered(found)
    return found


def look_at_server(engine: Postgresql, options: Options, problems: list[str]) -> look.Server:
    """The server; Debian's tools may be missing, which is no more than a problem."""
    try:
        return look.server(engine.request.connection, options)
    except TdeError as exc:
        problems.append(f"{exc.obj}: {exc.message}")
        bare = dataclasses.replace(options, debian_cluster=None)
        return look.server(engine.request.connection, bare)
