# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A token brought to a standby in three acts: asked for there, packed on the primary, installed there."""

from __future__ import annotations

import dataclasses
import grp

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.state import StateDirectory
from ..pkcs11 import opencryptoki as base
from . import opencryptoki as facts
from . import opencryptoki_conf as conf
from . import opencryptoki_rules as rules
from . import opencryptoki_store as store
from . import opencryptoki_transport as transport


@dataclasses.dataclass
class Outcome:
    """What an act did, or would do.

    :ivar folder: the token's folder's name; :ivar former: the digest of its content before, empty where there is no token.
    :ivar digest: after.
    :ivar public_key: of this host, for :func:`request`; :ivar archive: for :func:`pack`.
    """

    plan: Plan
    folder: str
    former: str
    digest: str
    public_key: str = ""
    archive: str = ""


def _slot(number: int) -> tuple[str, dict[str, str]]:
    """A configured slot's folder and keys.

    :raises TdeError: ``opencryptoki_slot_absent``, ``opencryptoki_conf_invalid``.
    """
    try:
        settings = conf.slots(facts.configuration()).get(number)
    except conf.ConfSyntaxError as exc:
        raise TdeError("opencryptoki_conf_invalid", str(exc), obj="opencryptoki.conf") from None
    if settings is None:
        raise TdeError("opencryptoki_slot_absent", "is not in opencryptoki.conf", obj=f"slot {number}")
    folder = rules.folder_of(settings)
    if folder is None:
        raise TdeError("opencryptoki_store_absent", "gives its token no folder that is known: set tokname", obj=f"slot {number}")
    return folder, settings


def request(number: int, state: StateDirectory, *, check_mode: bool) -> Outcome:
    """On the receiver: its public key, made once, and what it has of the token."""
    folder, dummy = _slot(number)
    key = transport.public_key(state)
    plan = [] if key else [Step("make_transport_key", f"key pair of this host ({transport.key_file(state)})", "it has none yet")]
    if plan and not check_mode:
        with state.locked(2.0):
            planning.run(plan, {"make_transport_key": lambda step: transport.make_key(state)})
            key = transport.public_key(state)
    there = transport.digest(folder)
    return Outcome(plan, folder, there, there, key or "")


def pack(number: int, recipient: str, state: StateDirectory, *, check_mode: bool) -> Outcome:
    """On the sender: the token's folder, encrypted for the receiver.

    :raises TdeError: as :func:`.opencryptoki_transport.pack`.
    """
    folder, dummy = _slot(number)
    archive = transport.pack(folder, recipient)
    mark = transport.header(archive)["digest"]
    if not check_mode:
        Journal(state.journal).append("pack_token", f"token folder {store.folder(folder)}", digest=mark, recipient=recipient)
    return Outcome([], folder, mark, mark, archive=archive)


def install(number: int, archive: str, state: StateDirectory, *, replace: bool, check_mode: bool) -> Outcome:
    """On the receiver: the token's folder as it was packed.

    :param replace: destroy keys that this host's token has and the archive has not.
    :raises TdeError: ``opencryptoki_archive_invalid``; ``opencryptoki_store_format``; ``opencryptoki_in_use``; ``destroy_unconfirmed``.
    """
    folder, settings = _slot(number)
    files = transport.unpack(archive, folder, state)
    came = store.format_of(len(files["NVTOK.DAT"].data))
    if came in ("old", "3.12") and came != store.wished_format(settings):
        raise TdeError(
            "opencryptoki_store_format",
            f"the primary's token is in the {came} format, and here the slot has "
            + (f"tokversion = {settings['tokversion']}" if "tokversion" in settings else "no tokversion"),
            obj=f"slot {number}",
            next_step="Give the slot the same tokversion as on the primary.",
        )
    wished, there = transport.header(archive)["digest"], transport.digest(folder)
    plan: Plan = []
    obj = f"token folder {store.folder(folder)}"
    if wished != there:
        own = _own(transport.objects(folder), transport.packed_objects(files), obj, state)
        if own and not replace:
            raise TdeError(
                "destroy_unconfirmed",
                f"holds {own} keys that the primary's has not, or has otherwise",
                obj=obj,
                next_step="See that primary and standby are not taken for one another. To destroy these keys on purpose, set replace.",
            )
        plan = [
            Step(
                "install_token",
                obj,
                "it differs from the primary's" if there else "it holds no token",
            )
        ]
        programs = store.users()
        if programs:
            raise TdeError(
                "opencryptoki_in_use",
                f"programs use the token's former state: {store.named(programs)}",
                obj=store.folder(folder),
                next_step="End them, then run again.",
                details={"programs": [{"pid": pid, "name": name} for pid, name in programs]},
            )
    if plan and not check_mode:
        with state.locked(2.0):
            gid = grp.getgrnam(settings.get("usergroup", base.GROUP)).gr_gid
            planning.run(plan, {"install_token": lambda step: transport.install(folder, files, gid)})
            mark = transport.objects_mark(transport.packed_objects(files))
            Journal(state.journal).append("install_token", obj, digest=wished, former=there, objects=mark)
    return Outcome(plan, folder, there, wished)


def _own(there: dict[str, str], packed: dict[str, str], obj: str, state: StateDirectory) -> int:
    """How many keys of this host's token are none of the primary's: neither as it has them now, nor as they were installed last."""
    installed = ""
    for entry in Journal(state.journal).entries():
        detail = entry["detail"]
        # A migration on this host encrypts them anew; they are the same keys.
        if entry["object"] == obj and (
            entry["action"] == "install_token"
            or (entry["action"] == "migrate_token" and installed and detail.get("former_objects") == installed)
        ):
            installed = detail.get("objects", "")
    if installed and installed == transport.objects_mark(there):
        return 0
    return sum(packed.get(path) != digest for path, digest in there.items())
