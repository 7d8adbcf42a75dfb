# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What can be told of a cluster whose server asks a command for its secret, and what is weak about it."""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ..postgresql.server import postmaster
from ..telling import host_gaps, keyslot_gaps, same_disk
from .secret import CYBERTEC, EDB, SSL
from .work import describe

if t.TYPE_CHECKING:
    from .engine import Keycommand
    from .options import Options

Facts = t.Dict[str, t.Any]

#: What each kind of secret does not protect.
_KINDS = {
    EDB: "Whether the server encrypts its pages is not asked here: tde_proof with data_directory reads them.",
    CYBERTEC: "Whether the server encrypts its pages is not asked here: tde_proof with data_directory reads them.",
    SSL: "The secret opens the server's TLS key; data on the disk is in the clear.",
}


def collect(engine: Keycommand) -> Facts:
    """Everything; nothing is changed, and the user's store is read as the user."""
    record, cluster = engine.record, engine.request.cluster
    problems: list[str] = []
    inner: Facts = {"secret": "", "data_keys": [], "master_keys": [], "adopted": []}
    options = None
    try:
        # Of a cluster that is not ours, what asks need not be known.
        if record or engine.request.options.get("kind"):
            options, side = engine.options, engine.side()
            inner = side.run(lambda: describe(side.own, cluster, engine.options))
    except TdeError as exc:
        problems.append(f"{exc.obj}: {exc.message}" if exc.obj else exc.message)
    directory = options.data_directory if options else None
    running = postmaster(directory) if directory else None
    source = dict(record.pin_source) if record else None
    found: Facts = {
        "cluster": cluster,
        "engine": engine.name,
        "managed": record is not None,
        "encrypted": False,
        "coverage": options.kind if record and options else None,
        "pin_source": source,
        "tokens": [dataclasses.asdict(token) for token in record.tokens] if record else [],
        "kmip": [service.stored() for service in record.kmip] if record else [],
        "data_keys": inner["data_keys"],
        "master_keys": inner["master_keys"],
        "adopted": inner["adopted"],
        "places": [],
        "server": {
            "address": running.socket if running else None,
            "running": running is not None,
            "pid": running.pid if running else None,
            "data_directory": directory,
            "answers": False,
            "problem": None,
            "error_code": None,
            "version": None,
            "standby": None,
            "standbys_attached": None,
            "settings": {},
        },
        "data_directory": None,
        "elsewhere": [],
        "tablespaces": [],
        "databases": [],
        "problems": problems,
    }
    found["same_disk"] = same_disk(engine.request.state.users, found)
    found["gaps"] = [*problems, *_gaps(found, options)]
    return found


def _gaps(found: Facts, options: Options | None) -> t.Iterator[str]:
    """The sentences; pure."""
    if not found["managed"] or options is None:
        yield "This host has no record of the cluster: nothing tells where its server has its key from."
        return
    if not found["data_keys"]:
        yield "There is no wrapped secret yet: the server would not get one."
    if options.kind in _KINDS:
        yield _KINDS[options.kind]
    yield from keyslot_gaps(found)
    yield from host_gaps(found)
    yield (
        f"Who acts as user {options.os_user} gets the secret without any further credential, and so does the server's superuser: "
        "the command answers that user."
    )
    if (found["pin_source"] or {}).get("kind", "none") == "none" and not found["kmip"]:
        yield "No PIN source is set: the command gives nothing to the server."
