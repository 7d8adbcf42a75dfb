# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an estate leaves in the clear, or protects weakly, in plain words: a pure function of ``info``'s facts."""

from __future__ import annotations

import typing as t

from ..telling import ALWAYS, host_gaps, keyslot_gaps

Facts = t.Mapping[str, t.Any]


def covered(facts: Facts) -> bool:
    """Whether the data directory, what it keeps elsewhere and every tablespace are encrypted.

    A data directory that is closed shows neither its links nor its tablespaces, so nothing is said of it.
    """
    directory = facts["data_directory"]
    places = [directory, *facts["elsewhere"], *facts["tablespaces"]]
    if not directory or not (directory["encryption"] == "dm_crypt" or directory["kernel_key"] == "present"):
        return False
    return all(place["encryption"] in ("ours", "unknown_key", "dm_crypt") for place in places)


def sentences(facts: Facts) -> list[str]:
    """One sentence a gap, the widest first."""
    return [*facts["problems"], *_places(facts), *_inside(facts), *keyslot_gaps(facts), *host_gaps(facts), *ALWAYS]


def _places(facts: Facts) -> t.Iterator[str]:
    if not facts["managed"]:
        yield "This host has no record of the cluster: nothing here is encrypted by this collection."
    server = facts["server"]
    if not server["answers"]:
        yield f"The server at {server['address']} {server['problem'] or 'was not asked'}, so its tablespaces and databases are not all known."
    words = {
        "plain": "is in the clear",
        "unknown_key": "is encrypted by the kernel, with a key that this host's store does not hold",
        "dm_crypt": "lies on a dm-crypt device: encrypted below the file system, with a key that this collection does not manage",
    }
    directory = facts["data_directory"]
    rows = [(f"The data directory {directory['path']}", directory)] if directory else []
    rows += [(f"The data directory's {one['name']} ({one['path']})", one) for one in facts["elsewhere"]]
    rows += [
        (f"Tablespace {one['name']} ({one['path']})", one) for one in facts["tablespaces"] if not _in_directory(one, directory)
    ]
    for name, place in rows:
        if place["encryption"] in words:
            yield f"{name} {words[place['encryption']]}."
        elif place["encryption"] == "unknown":
            yield f"{name}: whether it is encrypted could not be established ({place['problem'] or 'no reason given'})."
    for place in facts["places"]:
        if not place["exists"]:
            yield f"The encrypted place {place['path']} does not show: its file system may not be mounted."
        elif place["kernel_key"] != "present":
            yield f"The encrypted place {place['path']} is closed (kernel key {place['kernel_key']})."


def _in_directory(tablespace: Facts, directory: Facts | None) -> bool:
    return bool(directory) and str(tablespace["path"]).startswith(f"{directory['path']}/")  # type: ignore[index]


def _inside(facts: Facts) -> t.Iterator[str]:
    """What an encrypted tablespace in a plain data directory does not cover."""
    directory = facts["data_directory"]
    encrypted = [one for one in facts["tablespaces"] if one["encryption"] == "ours" and not _in_directory(one, directory)]
    if directory and directory["encryption"] == "plain" and encrypted:
        yield "The write-ahead log is in the clear, with every change of the encrypted tablespaces in it, and so is its archive."
        yield "Column statistics and catalogs are in the clear: pg_statistic holds the most common values of encrypted tables."
        if not _temporary_covered(facts, [one["name"] for one in encrypted]):
            yield "Temporary files of sorts and hashes are in the clear, unless a database or temp_tablespaces puts them elsewhere."
        yield "Sequences, the server's log and the host's swap space are in the clear."
        yield "Blocks that data took before it moved may still stand on the former file system in plain text."
    elif directory and directory["encryption"] == "ours":
        yield "The server's log, if it lies outside of the data directory, and the host's swap space are not covered."
    if facts["server"]["settings"].get("archive_mode") in ("on", "always"):
        yield "WAL is archived: the archive is a copy outside of the encrypted place."
    if facts["server"]["standbys_attached"]:
        yield f"{facts['server']['standbys_attached']} standbys receive the data: each must be encrypted on its own."


def _temporary_covered(facts: Facts, encrypted: t.Collection[str]) -> bool:
    names = [name.strip(' "') for name in facts["server"]["settings"].get("temp_tablespaces", "").split(",") if name.strip()]
    if names:
        return all(name in encrypted for name in names)
    return all(one["tablespace"] in encrypted for one in facts["databases"]) and bool(facts["databases"])
