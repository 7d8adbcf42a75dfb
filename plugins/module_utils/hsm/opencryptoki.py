# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What there is to know of openCryptoki on a host, as plain data."""

from __future__ import annotations

import grp
import os
import pwd
import typing as t

from ..common.errors import TdeError
from ..pkcs11 import opencryptoki as base
from . import opencryptoki_api as api
from . import opencryptoki_conf as conf
from . import opencryptoki_config as config
from . import opencryptoki_daemon as daemon
from . import opencryptoki_rules as rules
from . import opencryptoki_store as store


def gather(users: t.Sequence[str]) -> dict[str, t.Any]:
    """Everything that shows without a PIN.

    :param users: whose membership of the group is told.
    :returns: as RETURN of hsm.tde.opencryptoki_info.
    """
    running = daemon.look()
    found: dict[str, t.Any] = {
        "installed": True,
        "library": "",
        "version": None,
        "api": {"answers": False, "error_code": "", "message": "", "next_step": ""},
        "slots": [],
        "configuration_problems": [],
        "daemon": {**running.public(), "restart_required": daemon.stale(running)},
        "programs": [{"pid": pid, "name": name} for pid, name in store.users()],
        "group": {"name": base.GROUP, "exists": base.members() is not None, "members": base.members() or []},
        "users": [_membership(user) for user in users],
    }
    try:
        path = api.library_path()
    except TdeError as exc:
        found["installed"] = False
        found["api"] |= {"error_code": exc.code, "message": exc.message, "next_step": exc.next_step}
        return found
    answer = api.ask(path)
    found["library"] = path
    found["api"] = {
        "answers": answer.version is not None,
        "error_code": answer.error.get("code", ""),
        "message": answer.error.get("message", ""),
        "next_step": answer.error.get("next_step", ""),
    }
    version = config.installed_version(path, answer)
    found["version"] = "{}.{}".format(*version)
    text = configuration()
    problems = rules.problems(text, version)
    found["configuration_problems"] = [{"line": problem.line, "reason": problem.reason} for problem in problems]
    try:
        configured = conf.slots(text)
    except conf.ConfSyntaxError:
        configured = {}
    found["slots"] = [
        _slot(number, configured.get(number), answer, path) for number in sorted({*configured, *answer.slots, *answer.empty})
    ]
    return found


def configuration() -> str:
    """The text of opencryptoki.conf, empty if there is none."""
    try:
        with open(api.CONF, "rb") as handle:
            return conf.decode(handle.read())
    except FileNotFoundError:
        return ""


def _slot(number: int, settings: t.Mapping[str, str] | None, answer: api.Answer, path: str) -> dict[str, t.Any]:
    listed = answer.slots.get(number)
    folder = rules.folder_of(settings or {})
    stdll = (settings or {}).get("stdll", "")
    reason = ""
    if settings is None:
        reason = "opencryptoki.conf has it no more; the daemon was not started anew"
    elif listed is None and answer.version:
        reason = f"{stdll} finds no token" if api.stdll_installed(path, stdll) else f"{stdll} is not installed"
    return {
        "number": number,
        "configured": settings is not None,
        "listed": listed is not None,
        "reason": reason,
        "stdll": stdll,
        "tokversion": (settings or {}).get("tokversion", ""),
        "confname": (settings or {}).get("confname", ""),
        "usergroup": (settings or {}).get("usergroup", base.GROUP),
        "description": listed.description if listed else (settings or {}).get("description", ""),
        "label": listed.label if listed else "",
        "model": listed.model if listed else "",
        "flags": list(listed.flags) if listed else [],
        "store": _store(folder) if folder else None,
    }


def _store(folder: str) -> dict[str, t.Any]:
    path, owner, group = store.folder(folder), "", ""
    try:
        info = os.stat(path)
        owner, group = _name(pwd.getpwuid, info.st_uid), _name(grp.getgrgid, info.st_gid)
    except OSError:
        return {"path": path, "exists": False, "owner": "", "group": "", "format": "none"}
    return {"path": path, "exists": True, "owner": owner, "group": group, "format": store.store_format(folder)}


def _name(ask: t.Callable[[int], t.Any], number: int) -> str:
    try:
        return str(ask(number)[0])
    except KeyError:
        return str(number)


def _membership(user: str) -> dict[str, t.Any]:
    """Whether a user may use the library: root, or named in the group."""
    named = base.members() or []
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return {"name": user, "exists": False, "member": False, "may_use": False}
    return {"name": user, "exists": True, "member": user in named, "may_use": user in named or account.pw_uid == 0}
