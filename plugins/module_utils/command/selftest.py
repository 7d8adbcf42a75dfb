# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde self-test``: whether the next boot will open the keystores, told before it, as after an upgrade.

It looks at everything that ``open`` will need, mounts nothing, and gives the kernel no key.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import typing as t

from .. import engines
from ..common.errors import TdeError
from ..common.files import check_parents
from ..common.isolate import isolated
from ..common.run import run_program
from ..common.state import StateDirectory
from ..engines.base import KeystoreWish
from ..engines.record import Place, Record
from ..keystore.store import KeyStore
from ..pkcs11.library import load
from ..pkcs11.registry import Registry
from ..pkcs11.token import check_flags, find, open_session
from ..storage import fscrypt
from ..storage.mounts import mounted_at
from . import credentials, keystores, units
from .exits import BY_CAUSE, DONE
from .output import Output

#: Verdicts of a check. A warning does not fail the test.
OK, FAILED, WARNING = "ok", "failed", "warning"

#: What the kernel's ext4 module says it can do (Documentation/ABI/testing/sysfs-fs-ext4).
_EXT4_ENCRYPTION = "/sys/fs/ext4/features/encryption"

Row = t.Dict[str, t.Any]


class _Note(Exception):
    """A check's answer that is no failure and not all well either."""


def command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``self-test``."""
    state: StateDirectory = arguments.state
    stated = credentials.given(arguments)
    login = not arguments.no_login

    def act(cluster: str) -> dict[str, t.Any]:
        record = keystores.read_record(state, cluster)
        if engines.load(record.engine).asks_command:
            rows = [_row("Python", functools.partial(_python, record))]
            if login:
                rows.append(_row("command", lambda: _asked(state, record)))
        else:
            rows = isolated(lambda: _still(state, cluster))
            rows += _opening(state, cluster, stated, login)
        return {"ok": all(row["verdict"] != FAILED for row in rows), "checks": rows}

    results: dict[str, t.Any] = {}

    def line(cluster: str, facts: dict[str, t.Any]) -> str:
        results[cluster] = facts
        head = f"{cluster}: {'the next boot will open it' if facts['ok'] else 'the next boot will NOT open it'}"
        return "\n".join([head, *(f"  {row['verdict']:<7} {row['check']}: {row['detail']}" for row in facts["checks"])])

    code = keystores.each(arguments, output, act, line)
    failed = [row for facts in results.values() for row in facts["checks"] if row["verdict"] == FAILED]
    return code or (BY_CAUSE[failed[0]["cause"]] if failed else DONE)


def _row(check: str, look: t.Callable[[], str]) -> Row:
    """One check. :param look: what it found, in words."""
    try:
        return {"check": check, "verdict": OK, "detail": look()}
    except _Note as note:
        return {"check": check, "verdict": WARNING, "detail": str(note)}
    except TdeError as error:
        return {"check": check, "verdict": FAILED, "detail": str(error), "error_code": error.code, "cause": error.cause}


def _still(state: StateDirectory, cluster: str) -> list[Row]:
    """What can be looked at without a token."""
    record = keystores.read_record(state, cluster)
    rows = [_row("Python", functools.partial(_python, record)), _row("key files", functools.partial(_key_files, state, record))]
    rows += [_row(f"place {place.path}", functools.partial(_place, place)) for place in record.places]
    if units.booted():
        rows.append(_row("systemd", functools.partial(_systemd, cluster)))
    return rows


def _asked(state: StateDirectory, record: Record) -> str:
    """What the server would get that asks the command; the engine tries it as the server's user."""
    outcome = keystores.engine_of(state, record).keystore(KeystoreWish("open"), check=False)
    for warning in outcome.warnings:
        raise _Note(warning)
    return f"user {record.options.get('os_user')} gets the secret when the server asks"


def _python(record: Record) -> str:
    missing = []
    for name in ("cryptography", "psycopg", *(("pkcs11",) if record.tokens else ()), *(("kmip",) if record.kmip else ())):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise TdeError(
            "library_missing", f"has no {', '.join(missing)}", obj=sys.executable, next_step="Run the role hsm.tde.prerequisites."
        )
    return f"{sys.executable} is {sys.version.split()[0]} and has the libraries"


def _key_files(state: StateDirectory, record: Record) -> str:
    keys = KeyStore(state, record.cluster).describe()
    missing = sorted({place.key_id for place in record.places if place.made} - {key["key_id"] for key in keys})
    if missing:
        raise TdeError("keystore_unreachable", f"has no {', '.join(missing)}", obj=f"keystore of cluster {record.cluster}")
    if not keys and engines.load(record.engine).opens_after_start:
        return "the server has a keystore of its own"
    if not keys:
        raise _Note("there are none yet")
    single = sorted(key["key_id"] for key in keys if len({slot["name"] for slot in key["keyslots"]}) < 2)
    if single:
        raise _Note(f"the only keyslot is the only way to {', '.join(single)}")
    return f"{len(keys)} there and well-formed"


def _place(place: Place) -> str:
    if place.image:
        check_parents(place.image)
        if not os.path.isfile(place.image):
            raise TdeError(
                "place_unreachable", "its image is not there", obj=place.image, next_step="Mount the file system that it is on."
            )
        if not mounted_at(place.mount_point):
            if not os.path.exists(_EXT4_ENCRYPTION):
                raise _Note(f"image {place.image} is there; whether this kernel encrypts shows when it is mounted")
            return f"image {place.image} is there, and the kernel encrypts ext4"
    support = fscrypt.supported(place.mount_point)
    if not support["supported"]:
        raise TdeError("fscrypt_unsupported", support["reason"], obj=place.mount_point, next_step=support["how_to_enable"])
    if place.made and not os.path.isdir(place.path):
        raise TdeError("place_unreachable", "is not there", obj=place.path, next_step="Mount the file system that it is on.")
    return f"the kernel encrypts {support['filesystem']} on {support['mount_point']}"


def _systemd(cluster: str) -> str:
    unit = f"hsm-tde@{cluster}.service"
    shown = run_program(["systemctl", "show", "--property=LoadState,RequiredBy,WantedBy", unit], timeout=30).stdout.decode()
    facts = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    if facts.get("LoadState") != "loaded":
        raise _Note(f"{unit} is not installed: nothing opens the keystore at boot (hsm.tde.tde_command)")
    wanted = " ".join((facts.get("RequiredBy", ""), facts.get("WantedBy", ""))).split()
    if not wanted:
        raise _Note(f"nothing starts {unit}: name the database's units (hsm.tde.tde_command)")
    return f"{unit} is started by {', '.join(wanted)}"


def _opening(state: StateDirectory, cluster: str, stated: credentials.Given, login: bool) -> list[Row]:
    """The source of the PIN, the token, and whether both open every key."""
    record = keystores.read_record(state, cluster)
    how = keystores.engine_of(state, record).opened_with()
    tries: list[credentials.Credential] = []

    def source() -> str:
        tries.extend(keystores.tries_of(state, record, stated, may_ask=False))
        if len(tries) > 1:
            raise _Note("a PIN change is unfinished: both PINs will be tried")
        return (
            credentials.source_words(record, stated, tries) if how != "nothing" else "none is needed: the server asks its plugin"
        )

    def waiting() -> str:
        try:
            return source()
        except TdeError as error:
            if error.code == "pin_source_missing" and record.pin_source.get("kind", "none") == "none":
                raise _Note("none: an operator opens it at each boot; keys were not tried") from None
            raise

    rows = [_row("PIN source", waiting)]
    access = tries[0].access if tries else None
    if access:
        rows.append(_row("token", lambda: t.cast(str, isolated(lambda: _token(state, tries[0], login)))))
    if how == "token" and access and login and rows[-1]["verdict"] != FAILED:
        # The server opens its own keystore; whether the token takes the PIN is what can be told before.
        rows.append(_row("PIN", lambda: t.cast(str, keystores.try_each(tries, lambda one: _login(state, one)))))
    if how == "keyslot" and tries and login and all(row["verdict"] != FAILED for row in rows):
        rows.append(_row("opening", lambda: t.cast(str, keystores.try_each(tries, lambda one: _keys(state, cluster, one)))))
    return rows


def _token(state: StateDirectory, credential: credentials.Credential, login: bool) -> str:
    access = credential.access
    if access is None:
        raise ValueError("no token")
    info = find(load(access.library), access.selector, Registry(state))
    check_flags(info, "user", access.allow_low_pin_count)
    return f"{info} answers through {access.library.path}" + ("" if login else "; nobody logged in")


def _login(state: StateDirectory, credential: credentials.Credential) -> str:
    if credential.access is None:
        raise ValueError("no token")
    with open_session(credential.access, state) as session:
        return f"{session.token} takes it"


def _keys(state: StateDirectory, cluster: str, credential: credentials.Credential) -> str:
    store = KeyStore(state, cluster)
    key_ids = store.key_ids()
    opened = store.open_keys(key_ids, credentials.for_keystore(credential))
    return f"{len(opened)} of {len(key_ids)} data keys open"
