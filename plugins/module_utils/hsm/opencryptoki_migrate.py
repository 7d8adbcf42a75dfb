# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A token's folder brought to the format that is fit for FIPS, by openCryptoki's own pkcstok_migrate.

That program writes opencryptoki.conf anew, in a layout of its own. So it is given a copy; the real file gets its tokversion by
:mod:`.opencryptoki_config`, after the folder. A kill between the two is seen at the next run, which sets it.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.run import run_program
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..pkcs11 import opencryptoki as base
from . import opencryptoki as facts
from . import opencryptoki_api as api
from . import opencryptoki_conf as conf
from . import opencryptoki_config as config
from . import opencryptoki_rules as rules
from . import opencryptoki_store as store
from . import opencryptoki_transport as transport

TOOL = "/usr/sbin/pkcstok_migrate"
#: pkcstok_migrate.c: the tokens that it takes.
_KINDS = ("libpkcs11_sw.so", "libpkcs11_ica.so", "libpkcs11_cca.so", "libpkcs11_ep11.so")
_NEW = "3.12"
#: Seconds; thousands of objects are encrypted anew.
_TIMEOUT = 600


@dataclasses.dataclass
class Outcome:
    """What :func:`migrate` did, or would do. ``backup`` is the former folder, empty if none was made."""

    plan: Plan
    before: str
    after: str
    backup: str


def decide(there: str, settings: t.Mapping[str, str], folder: str, number: int) -> Plan:
    """The steps, from the folder's format and the slot's settings. Pure."""
    steps: Plan = []
    if there == "old":
        steps.append(Step("migrate_store", f"token folder {store.folder(folder)}", "it is in the old format"))
    if store.wished_format(settings) != _NEW:
        steps.append(Step("set_tokversion", f"slot {number} of {api.CONF}", f"it does not say tokversion = {_NEW}"))
    return steps


def migrate(
    number: int, so_pin: Secret | None, pin: Secret | None, state: StateDirectory, *, check_mode: bool = False
) -> Outcome:
    """Bring a slot's token to the new format.

    :raises TdeError: ``opencryptoki_slot_absent``, ``opencryptoki_migrate_unsupported``, ``opencryptoki_migrate_failed``,
        ``opencryptoki_in_use``, ``pin_missing``, ``pin_refused``.
    """
    try:
        settings = conf.slots(facts.configuration()).get(number)
    except conf.ConfSyntaxError as exc:
        raise TdeError("opencryptoki_conf_invalid", str(exc), obj=api.CONF) from None
    if settings is None:
        raise TdeError("opencryptoki_slot_absent", "is not in opencryptoki.conf", obj=f"slot {number}")
    folder = rules.folder_of(settings) or ""
    there = store.store_format(folder) if folder else "none"
    plan = decide(there, settings, folder, number)
    _check(plan, settings, folder, so_pin, pin)
    outcome = Outcome(plan, there, there, "")
    if check_mode or not plan:
        return outcome
    with state.locked(2.0):
        former = _objects(folder)
        planning.run(
            plan,
            {
                "migrate_store": lambda step: _run(number, folder, t.cast(Secret, so_pin), t.cast(Secret, pin), state),
                "set_tokversion": lambda step: _set_tokversion(number),
            },
            lambda step: _record(step, folder, former, state),
        )
    if there == "old":
        outcome.backup = f"{store.folder(folder)}_BAK"
    outcome.after = store.store_format(folder)
    return outcome


def _check(plan: Plan, settings: t.Mapping[str, str], folder: str, so_pin: Secret | None, pin: Secret | None) -> None:
    if not any(step.action == "migrate_store" for step in plan):
        return
    obj = store.folder(folder)
    if not os.path.exists(TOOL) or os.path.basename(settings.get("stdll", "")) not in _KINDS:
        lacks = (
            "there is no pkcstok_migrate"
            if not os.path.exists(TOOL)
            else f"it does not migrate tokens of {settings.get('stdll')}"
        )
        raise TdeError("opencryptoki_migrate_unsupported", lacks, obj=obj)
    if not so_pin or not pin:
        raise TdeError("pin_missing", "needs so_pin and pin: the token's master key is encrypted under both", obj=obj)
    running = [(pid, base.DAEMON) for pid in base.daemons()] + store.users()
    if running:
        raise TdeError(
            "opencryptoki_in_use",
            f"while its folder is migrated nobody may use the token: {store.named(running)}",
            obj=obj,
            next_step="End the programs and the daemon (hsm.tde.opencryptoki_daemon with state stopped), then run again.",
        )
    backup = f"{obj}_BAK"
    if os.path.exists(backup):
        raise TdeError(
            "opencryptoki_migrate_failed",
            f"the backup of an earlier migration is in the way: {backup}",
            obj=obj,
            next_step="Move it off the host; it holds the same keys under weaker protection.",
        )


def _set_tokversion(number: int) -> None:
    config.apply(config.ConfigWish({number: {"tokversion": _NEW}}), act=True)


def _objects(folder: str) -> str:
    return transport.objects_mark(transport.objects(folder)) if folder else ""


def _record(step: Step, folder: str, former: str, state: StateDirectory) -> None:
    """Write it into the journal. :param former: the mark of its keys before, by which opencryptoki_copy knows what was installed."""
    if step.action == "migrate_store":
        backup = f"{store.folder(folder)}_BAK"
        Journal(state.journal).append("migrate_token", step.obj, former=backup, former_objects=former, objects=_objects(folder))


def _run(number: int, folder: str, so_pin: Secret, pin: Secret, state: StateDirectory) -> None:
    home = store.folder(folder)
    with tempfile.TemporaryDirectory(dir=state.path, prefix="migrate-") as scratch:
        with open(os.path.join(scratch, "opencryptoki.conf"), "wb") as handle:
            handle.write(conf.encode(facts.configuration()))
        argv = [TOOL, "--slotid", str(number), "--datastore", home, "--confdir", scratch]
        # It asks for a yes and for both PINs, in this order.
        answers = b"y\n" + so_pin.reveal() + b"\n" + pin.reveal() + b"\n"
        done = run_program(argv, stdin=answers, timeout=_TIMEOUT, ok=range(256))
    said = (done.stderr + done.stdout).decode("utf-8", "replace")
    if "verify pins" in said:
        raise TdeError(
            "pin_refused",
            "pkcstok_migrate refused the SO PIN or the user PIN; it counts no tries",
            obj=home,
            kept="The folder is as it was.",
        )
    if done.returncode or store.store_format(folder) != _NEW:
        lines = [line for line in said.splitlines() if "pkcstok_migrate:" in line or "rror" in line]
        raise TdeError("opencryptoki_migrate_failed", "; ".join(lines[-3:]) or f"exit code {done.returncode}", obj=home)
