# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All that can be told of an Enterprise Postgres without a secret, ours or not: read only, and every failure is a fact."""

from __future__ import annotations

import dataclasses
import datetime
import os
import typing as t

from ...common.journal import Journal
from ..postgresql import info as postgres
from ..postgresql import look as postgres_look
from ..postgresql.gaps import covered
from ..telling import ALWAYS, host_gaps, same_disk, tried
from . import look, plan
from .options import FILE, HSM, PLUGIN

if t.TYPE_CHECKING:
    from .engine import Fep

Facts = t.Dict[str, t.Any]

#: How a tablespace is encrypted whose pages the server encrypts, as ``encryption`` says it.
ENGINE = "engine"


def collect(engine: Fep) -> Facts:
    """Everything; nothing is changed, nothing is needed but root."""
    problems: list[str] = []
    options, record, cluster = engine.options, engine.record, engine.request.cluster
    today = datetime.datetime.now(datetime.timezone.utc).date()
    memory = look.memory(record)
    connection = engine.request.connection
    server = look.server(options, connection, memory.get("login") or {})
    if options.data_directory is None and server.answer:
        options = dataclasses.replace(options, data_directory=server.answer.data_directory)
    location = tried(problems, lambda: look.location(options), look.Location())
    unseen = look.Files(False, "", "")
    files = tried(problems, lambda: look.files(options, None), unseen) if options.data_directory else unseen
    entries = tried(problems, lambda: Journal(engine.request.state.journal).entries(), [])
    key, open_act = look.master_key(entries, cluster, location.digest)
    slot = (files.settings or {}).get("tde_z.slot_id", "")
    state = look.State(
        cluster=cluster,
        files=files,
        location=location,
        server=server,
        slot_id=int(slot) if slot.isdigit() else None,
        key=key,
        auto_open_here=look.enabled_here(entries, cluster),
        life=str(memory.get("life") or ""),
    )
    shown = postgres_look.Server(server.access, options.data_directory or "", server.process, server.answer, server.error)
    tablespaces = postgres.tablespaces_of(shown, {}, problems)
    algorithms = server.facts.algorithms if server.facts else None
    for one in tablespaces:
        one["algorithm"] = (algorithms or {}).get(one["name"])
        if one["algorithm"]:
            one["encryption"] = ENGINE
    directory = postgres.encryption(os.path.realpath(options.data_directory), {}) if options.data_directory else None
    found: Facts = {
        "cluster": cluster,
        "engine": engine.name,
        "managed": record is not None,
        "coverage": "tablespaces" if record else None,
        "pin_source": dict(record.pin_source) if record else None,
        "tokens": [dataclasses.asdict(token) for token in record.tokens] if record else [],
        "master_keys": _master_keys(state, options.keystore, today, record.tokens[0] if record and record.tokens else None),
        "kmip": [],
        "data_keys": [],
        "adopted": [],
        "places": [],
        "server": postgres.server_facts(shown),
        "data_directory": directory,
        "elsewhere": postgres.elsewhere(directory["path"], {}, problems) if directory else [],
        "tablespaces": tablespaces,
        "databases": postgres.databases_of(server.answer),
        "problems": problems,
        "keystore": {
            "kind": options.keystore,
            "location": options.keystore_location,
            "made": state.made,
            "open": True if state.known_open else None,
            "opens_by_itself": plan.opens_by_itself(options, state),
            "pin_at_rest": files.pin != look.ABSENT,
            "slot_id": state.slot_id if options.keystore == HSM else None,
            "tag": key.tag if key else None,
            "set": key.since[:10] if key else None,
        },
    }
    found["same_disk"] = same_disk(engine.request.state.path, found)
    others = [one for one in tablespaces if one["encryption"] != ENGINE]
    found["encrypted"] = bool(directory) and covered({**found, "tablespaces": others})
    found["gaps"] = list(sentences(found, state, bool(options.auto_open), algorithms is not None, bool(open_act)))
    return found


def _master_keys(state: look.State, kind: str, today: datetime.date, token: t.Any) -> list[Facts]:
    """The current master key; of former ones the server tells nothing."""
    if not state.made:
        return []
    key = state.key
    return [
        {
            "label": key.key_id if key and key.key_id else f"fep.{state.cluster}" + (f".{key.tag}" if key and key.tag else ""),
            "id": "",
            "token_label": token.label if token and kind != FILE else "",
            "token_serial": token.serial if token and kind != FILE else "",
            "age_days": plan.age_days(key, today),
            "current": True,
        }
    ]


def sentences(found: Facts, state: look.State, auto_open: bool, viewed: bool, interrupted: bool) -> t.Iterator[str]:
    """What is in the clear or weak, one sentence a gap; pure.

    :param auto_open: as wished; :param viewed: whether the view of encrypted tablespaces could be read.
    :param interrupted: an act on the master key was killed.
    """
    yield from found["problems"]
    if not found["managed"]:
        yield "This host has no record of the cluster: nothing here was set up by this collection."
    server, keystore = found["server"], found["keystore"]
    if not server["answers"]:
        yield f"The server at {server['address']} {server['problem'] or 'was not asked'}, so its tablespaces and databases are not all known."
    elif not viewed:
        yield "The server has no view pgx_tablespaces that could be read, so nothing tells which tablespaces it encrypts."
    yield from _keystore(found, state, auto_open)
    if interrupted:
        yield "An act on the master key was interrupted. Run it again."
    plain = sorted(one["name"] for one in found["tablespaces"] if one["encryption"] == "plain")
    if plain:
        yield f"Tablespaces in the clear: {', '.join(plain)} (pg_default and pg_global cannot be encrypted, so neither can catalogs and statistics)."
    unknown = sorted(one["name"] for one in found["tablespaces"] if one["encryption"] == "unknown")
    if unknown:
        yield f"Tablespaces of which it could not be established whether they are encrypted below the server: {', '.join(unknown)}."
    encrypted = [one["name"] for one in found["tablespaces"] if one["encryption"] == ENGINE]
    if encrypted:
        yield (
            f"Of {', '.join(sorted(encrypted))} the server says that it encrypts their pages, and what it writes of them to WAL and temporary files; "
            "hsm.tde.tde_proof looks at the pages."
        )
    if server["settings"].get("archive_mode") in ("on", "always"):
        yield "WAL is archived: a restore needs the master key of that time, so old keystores are kept."
    if keystore["made"] and server["standby"]:
        yield from _standby(keystore["kind"])
    elif server["standbys_attached"]:
        yield f"{server['standbys_attached']} standbys are attached: each needs its own keystore, opened at each start. {_supply(keystore['kind'])}"
    yield from host_gaps(found)
    yield from ALWAYS


def _keystore(found: Facts, state: look.State, auto_open: bool) -> t.Iterator[str]:
    keystore = found["keystore"]
    if not keystore["made"]:
        yield "There is no master key yet: nothing can be encrypted."
        return
    if keystore["kind"] != PLUGIN and not state.location.private:
        yield f"The keystore {keystore['location']} can be read by others than the server's user."
    if found["server"]["answers"] and not keystore["open"]:
        yield (
            "The keystore ought to have opened by itself when the server started; nothing but opening it tells whether it did."
            if keystore["opens_by_itself"]
            else "The keystore is not known to be open since the server's start: open it (hsm.tde.tde_keystore with state=open)."
        )
    if look.AUTO_OPEN in state.location.files and not state.auto_open_here:
        yield "keystore.aks was not made on this host, as far as its journal knows: a copied one opens nothing. Enable automatic opening here."
    if keystore["pin_at_rest"]:
        yield "The user PIN rests in hsm-tde.conf beside the keystore; superusers of the database read it with SHOW."
    elif look.AUTO_OPEN in state.location.files:
        yield "keystore.aks holds the opened keystore, obfuscated only: whoever takes it and this host's identity has the master key."
    if not auto_open and not keystore["opens_by_itself"]:
        yield (
            "Without automatic opening, a recovery after a crash or from an archive needs PIN or passphrase at the start itself: "
            "encrypted WAL cannot be read before."
        )


def _supply(kind: str) -> str:
    return {
        HSM: "Same HSM master key, keystore file and token directory copied, owners kept; token name and slot may differ.",
        FILE: "Copy keystore.ks and enable automatic opening on each node; a copied keystore.aks opens nothing.",
        PLUGIN: "Same connection name, plugin and key on each node.",
    }[kind]


def _standby(kind: str) -> t.Iterator[str]:
    yield f"This is a standby: it replays encrypted WAL with its own copy of the keystore only. {_supply(kind)}"
    if kind != PLUGIN:
        yield "On a standby automatic opening is needed: it must open the keystore at its start, before it can be asked."
