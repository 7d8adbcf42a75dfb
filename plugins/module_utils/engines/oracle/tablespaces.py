# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tablespaces, named ``PDB.NAME``: made encrypted, or encrypted where they are while they are used."""

from __future__ import annotations

import re

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from ..base import Outcome, TablespacesWish, TablespaceWish
from . import plan
from .engine import Work
from .facts import Facts
from .options import word
from .plan import Decision, Wish

#: What online encryption leaves behind (Oracle's Advanced Security Guide, "Encrypting existing tablespaces").
FREED = "Online encryption writes new data files; what the file system freed of the former ones keeps plain text, and so do backups of before."


def tablespaces(work: Work, wish: TablespacesWish) -> Outcome:
    """Carry the wish out.

    :raises TdeError: ``invalid_option``, ``engine_unsupported``, ``keystore_closed``, ``oracle_containers_behind``.
    """
    remembered = work.acts.memo.guard
    if work.acts.memo.change or work.guard != remembered:
        raise TdeError(
            "invalid_option",
            f"the keystore is under {remembered.words if remembered else 'nothing yet'}, not under {work.guard.words}, or on its way",
            obj="option keyslots",
            next_step="Leave it out, or change the keystore first (tde_keystore).",
        )
    for item in wish.items:
        _check(item)
    outcome, dummy = work.rounds(lambda facts, wished: Decision(steps(facts, wished, wish.items)))
    outcome.facts.update(
        {
            "cluster": work.request.cluster,
            "tablespaces": [
                {"name": item.name, "location": item.location, "key_id": None, "check_value": None, "algorithm": item.algorithm}
                for item in wish.items
            ],
            "moved": work.acts.converted,
            "notes": [FREED] if any(step.action == "encrypt_tablespace" for step in outcome.plan) else [],
        }
    )
    return outcome


def split(name: str) -> tuple[str, str]:
    """Container and tablespace of ``PDB.NAME``.

    :raises TdeError: ``invalid_option``.
    """
    container, dot, tablespace = name.partition(".")
    if not dot:
        raise TdeError("invalid_option", "is named PDB.TABLESPACE", obj=f"tablespace {name!r}")
    root = container.upper() == "CDB$ROOT"
    return "CDB$ROOT" if root else word("PDB", container), word("tablespace", tablespace)


def steps(facts: Facts, wish: Wish, items: tuple[TablespaceWish, ...]) -> Plan:
    """What is left to do; pure.

    :raises TdeError: ``keystore_closed``, ``oracle_containers_behind``, ``database_absent``, ``encryption_foreign``.
    """
    found: Plan = []
    for item in items:
        container, name = split(item.name)
        one = next(one for one in plan.chosen(facts, [container]) if one.name == container)
        obj = f"tablespace {container}.{name}"
        if not one.open:
            raise TdeError("oracle_containers_behind", "is not open", obj=f"PDB {container}")
        space = next((space for space in facts.spaces if (space.con_id, space.name) == (one.con_id, name)), None)
        data = {"container": container, "name": name, "algorithm": item.algorithm, "location": item.location}
        if space is not None and space.algorithm and space.status == "NORMAL":
            continue
        if not facts.opened(one.con_id, wish.guard.hsm) or (facts.asked and facts.active(one.con_id) is None):
            raise TdeError(
                "keystore_closed",
                "its keystore is not open, or has no master key",
                obj=f"container {container}",
                next_step="Open it (tde_keystore), and set a master key (tde_master_key).",
            )
        if space is None:
            found.append(Step("create_tablespace", obj, f"is to be made, with {item.algorithm}", data))
        elif not space.algorithm:
            found.append(Step("encrypt_tablespace", obj, f"from plain to {item.algorithm}", {**data, "finish": False}))
        elif space.status == "ENCRYPTING":
            why = f"its encryption was broken off after {space.blocks} blocks"
            found.append(Step("encrypt_tablespace", obj, why, {**data, "finish": True}))
        else:
            raise TdeError(
                "encryption_foreign", f"is {space.status}", obj=obj, next_step="Let whoever began it end it, then run again."
            )
    return found


def _check(item: TablespaceWish) -> None:
    """Refuse what means nothing here."""
    split(item.name)
    if item.owner or item.move.any:
        raise TdeError(
            "engine_unsupported",
            "A tablespace has no owner, and is encrypted where it is: nothing moves into it.",
            obj=f"tablespace {item.name}",
        )
    if item.location and not re.fullmatch(r"[+/][A-Za-z0-9_./+@-]*", item.location):
        raise TdeError("invalid_option", "is a path, or a disk group, of A-Z a-z 0-9 _ . / + @ -", obj=f"location of {item.name}")
