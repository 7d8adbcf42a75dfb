# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All that can be told of a database without a credential: reads only, and every failure is a fact."""

from __future__ import annotations

import datetime
import typing as t

from ...common.errors import TdeError
from ..telling import ALWAYS
from . import memo as memos
from . import recovery, sql
from .engine import Oracle, age_days, backups_need
from .facts import Facts
from .memo import Memo

Found = t.Dict[str, t.Any]


def collect(engine: Oracle) -> Found:
    """Everything. The view that opens a keystore with auto-login is not queried where it would."""
    problems: list[str] = []
    request, options = engine.request, engine.options
    memo, facts, error, verdict = Memo(), None, None, None
    try:
        memo = memos.read(request.state, request.cluster)
        verdict = recovery.found(memo.guard, options)
    except TdeError as exc:
        problems.append(str(exc))
    try:
        with sql.connect(request.connection, options) as database:
            facts = database.facts(ask=False)
    except TdeError as exc:
        error = exc
        problems.append(str(exc))
    today = datetime.datetime.now(datetime.timezone.utc)
    record = engine.record
    found: Found = {
        "cluster": request.cluster,
        "engine": engine.name,
        "managed": record is not None,
        "coverage": "tablespaces" if record else None,
        "pin_source": dict(record.pin_source) if record else None,
        "tokens": [],
        "kmip": [],
        "master_keys": _master_keys(facts, memo, today) if facts else [],
        "data_keys": [],
        "places": [],
        "server": {
            "address": sql.where(request.connection, options),
            "running": facts is not None,
            "pid": None,
            "data_directory": None,
            "answers": facts is not None,
            "problem": error.message if error else None,
            "error_code": error.code if error else None,
            "version": None,
            "standby": None,
            "standbys_attached": None,
            "settings": {"WALLET_ROOT": facts.wallet_root, "TDE_CONFIGURATION": facts.configuration} if facts else {},
        },
        "data_directory": None,
        "adopted": [],
        "elsewhere": [],
        "tablespaces": _tablespaces(facts) if facts else [],
        "databases": [],
        "same_disk": False,
        "problems": problems,
        "encrypted": bool(facts and facts.spaces) and all(one.algorithm for one in facts.spaces) if facts else False,
    }
    found["gaps"] = [
        *problems,
        *gaps(facts, memo, engine.options.auto_login),
        *(recovery.sentences(verdict) if verdict else ()),
        *ALWAYS,
    ]
    return found


def _master_keys(facts: Facts, memo: Memo, today: datetime.datetime) -> list[Found]:
    return [
        {
            "label": key.tag or key.key_id,
            "id": key.key_id,
            "token_label": (memo.guard.name or "") if memo.guard and key.hsm else "",
            "token_serial": "",
            "kmip_service": None,
            "age_days": age_days(facts, key.con_id, today),
            "current": True,
        }
        for one in facts.containers
        if (key := facts.active(one.con_id))
    ]


def _tablespaces(facts: Facts) -> list[Found]:
    return [
        {
            "name": f"{facts.container(one.con_id)}.{one.name}",
            "owner": None,
            "path": None,
            "encryption": "engine" if one.algorithm else "plain",
            "algorithm": one.algorithm or None,
            "identifier": None,
            "key_id": None,
            "kernel_key": None,
            "mount": None,
            "problem": None if one.status in ("", "NORMAL") else f"it is {one.status}",
        }
        for one in facts.spaces
    ]


def gaps(facts: Facts | None, memo: Memo, auto_login: bool) -> t.Iterator[str]:
    """What is in the clear, weak or unfinished, one sentence each; pure."""
    if memo.change:
        yield f"A change from {memo.change.source.words} to {memo.change.target.words} was begun and is not finished."
    if facts is None:
        return
    plain = [f"{facts.container(one.con_id)}.{one.name}" for one in facts.spaces if not one.algorithm]
    if plain:
        yield f"{len(plain)} tablespaces are in the clear: {', '.join(plain[:3])}{' …' if len(plain) > 3 else ''}."
    for space in facts.spaces:
        if space.status not in ("", "NORMAL"):
            yield f"Tablespace {facts.container(space.con_id)}.{space.name} is {space.status}: run tde_tablespace, which finishes it."
    if memo.guard and memo.guard.protection == "module":
        yield "The master keys are under module protection: whoever can use the HSM from this host can use them without a passphrase."
    if memo.guard and not memo.guard.hsm:
        yield "The master keys are in a file, under a passphrase: a copy of it can be tried on elsewhere."
    if memo.guard and memo.guard.hsm and auto_login:
        yield "Auto-login keeps the HSM's credential in a file beside the database, so that it opens without anybody."
    if memo.guard and memo.guard.hsm and not auto_login:
        yield "Nothing opens the keystore after a start of the database: an operator does."
    yield from backups_need(memo)
