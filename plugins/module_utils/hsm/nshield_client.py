# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A client of a Security World: the variables of its PKCS#11 library, its hardserver, its copy of the world's files.

Sources: the PKCS#11 guide's page on environment variables (the file's form, "variables set in the environment are used in
preference", no effect before the application's restart); the integration guide's "Latency issues" (common store or local copies,
``CKNFAST_ASSUME_SINGLE_PROCESS`` or a reconnect).
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.files import os_error, write_atomic
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.state import StateDirectory
from . import nshield_changes, nshield_world
from .nshield import Nshield

#: The variables of the library (PKCS#11 guide of release 13.6); a misspelt one has no effect and nobody says so.
VARIABLES = frozenset(
    {
        "CKNFAST_ASSUME_SINGLE_PROCESS",
        "CKNFAST_ASSURANCE_LOG",
        "CKNFAST_CARDSET_HASH",
        "CKNFAST_CONCATENATIONKDF_X963_COMPLIANCE",
        "CKNFAST_DEBUG",
        "CKNFAST_DEBUGDIR",
        "CKNFAST_DEBUGFILE",
        "CKNFAST_DH_LSB",
        "CKNFAST_EDDSA_PUBKEY_FORMAT",
        "CKNFAST_FAKE_ACCELERATOR_LOGIN",
        "CKNFAST_HA_MINIMUM_INTERVAL",
        "CKNFAST_HSM_POOL",
        "CKNFAST_JCE_COMPATIBILITY",
        "CKNFAST_LOADSHARING",
        "CKNFAST_LOAD_KEYS",
        "CKNFAST_NO_ACCELERATOR_SLOTS",
        "CKNFAST_NO_SYMMETRIC",
        "CKNFAST_NO_UNWRAP",
        "CKNFAST_NONREMOVABLE",
        "CKNFAST_NVRAM_KEY_STORAGE",
        "CKNFAST_OVERRIDE_SECURITY_ASSURANCES",
        "CKNFAST_RELOAD_KEYS",
        "CKNFAST_SEED_MAC_ZERO",
        "CKNFAST_SESSION_THREADSAFE",
        "CKNFAST_SHARE_SESSION_KEYS",
        "CKNFAST_TOKENS_PERSISTENT",
        "CKNFAST_USE_THREAD_UPCALLS",
        "CKNFAST_WRITE_PROTECTED",
    }
)
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
#: Port of the remote file system (user guide: 9004).
RFS_PORT = 9004


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How keys get to the other clients.

    :param kind: ``rfs_client``, ``rfs_server`` or ``common_store``.
    :param address: of the remote file system, for a client of it; :param port: its port.
    :param authenticate: by the hardservers' keys; ``key_hash`` (HKNETI) is the other side's.
    :param gang_clients: addresses that a server of it lets in.
    :param sync: ``none``, ``commit`` (give what changed here) or ``update`` (fetch what changed elsewhere).
    :param store: where the common store is mounted.
    """

    kind: str
    address: str | None = None
    port: int = RFS_PORT
    authenticate: bool = True
    key_hash: str | None = None
    esn: str | None = None
    gang_clients: tuple[str, ...] = ()
    sync: str = "none"
    store: str | None = None


@dataclasses.dataclass(frozen=True)
class ClientWish:
    """A client as it shall be.

    :param variables: name → value, or None for "not in the file".
    :param clients: the other clients of the world, remembered from then on; None leaves them as they are.
    :param supplied: those of them that have this client's copy of the world.
    :param digest: the copy that this client must have; None asks nothing.
    :param processes_of: users whose processes' environments are looked at.
    """

    variables: t.Mapping[str, str | None]
    distribution: Distribution | None = None
    clients: tuple[str, ...] | None = None
    supplied: tuple[str, ...] = ()
    digest: str | None = None
    processes_of: tuple[str, ...] = ()


def edited(text: str, wished: t.Mapping[str, str | None]) -> str:
    """``cknfastrc`` with the wished variables; every other line stays as it is. Pure."""
    lines: list[str] = []
    left = dict(wished)
    for line in text.splitlines():
        name = line.partition("=")[0].strip()
        if name not in wished or "=" not in line:
            lines.append(line)
        elif name in left and wished[name] is not None:
            lines.append(f"{name}={left.pop(name)}")
    lines += [f"{name}={value}" for name, value in left.items() if value is not None]
    return "".join(f"{line}\n" for line in lines)


def variables(text: str) -> dict[str, str]:
    """The variables of a ``cknfastrc``; of two lines the last counts. Pure."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, dummy, value in pairs}


def check_variables(wished: t.Mapping[str, str | None]) -> list[str]:
    """Refuse what would spoil the file. :returns: a sentence for each variable that the library does not know.

    :raises TdeError: ``invalid_option``.
    """
    for name, value in wished.items():
        if not _NAME.fullmatch(name) or re.search(r"[\x00-\x1f\x7f]", value or ""):
            raise TdeError(
                "invalid_option", "is no name of a variable, or its value has a control character", obj=f"variable {name!r}"
            )
    return [
        f"{name} is not among the variables of nShield's PKCS#11 library; a misspelt one has no effect."
        for name in wished
        if name.startswith("CKNFAST_") and name not in VARIABLES
    ]


def overriding(users: t.Sequence[str], in_file: t.Mapping[str, str], proc: str = "/proc") -> list[dict[str, t.Any]]:
    """Processes whose environment has another value of a variable than the file, or one that the file lacks: the environment wins.

    :param users: whose processes; :param in_file: the file's variables; :param proc: root of procfs.
    :returns: ``user``, ``variable``, ``file``, ``environment``, ``processes`` (ids).
    """
    found: dict[tuple[str, str, str], list[int]] = {}
    for user in users:
        try:
            uid = pwd.getpwnam(user).pw_uid
        except KeyError:
            raise TdeError("os_user_absent", "there is no such user", obj=f"user {user}") from None
        for pid in sorted(int(name) for name in os.listdir(proc) if name.isdigit()):
            for name, value in _environment(proc, pid, uid).items():
                if name.startswith("CKNFAST_") and in_file.get(name) != value:
                    found.setdefault((user, name, value), []).append(pid)
    return [
        {"user": user, "variable": name, "file": in_file.get(name), "environment": value, "processes": pids}
        for (user, name, value), pids in sorted(found.items())
    ]


def _environment(proc: str, pid: int, uid: int) -> dict[str, str]:
    try:
        if os.stat(f"{proc}/{pid}").st_uid != uid:
            return {}
        with open(f"{proc}/{pid}/environ", "rb") as handle:
            raw = handle.read()
    except OSError:
        # It has ended, or is none that may be looked at.
        return {}
    pairs = (item.decode("utf-8", "replace").partition("=") for item in raw.split(b"\0") if b"=" in item)
    return {name: value for name, dummy, value in pairs}


def needs_after_transfer() -> list[str]:
    """What the other clients of a world need when keys have been made or moved on this one."""
    return [
        "Every other client needs this client's copy of the Security World: commit it here and update there, or wait for the common store.",
        "Where files of the keys under their former token are left on a client, run this task there too: it puts them aside.",
        "Databases on other clients see new keys once they connect anew, or at once with CKNFAST_ASSUME_SINGLE_PROCESS=0 set before"
        " their start.",
    ]


@dataclasses.dataclass(frozen=True)
class ClientOutcome:
    """How the client is.

    :ivar restart_required: variables changed: applications read them at their start only.
    :ivar hardserver: None if it answers, else why not; :ivar digest: of its copy of the world, None if there is none.
    :ivar behind: other clients, with what they need; :ivar before, after: public facts, for the difference.
    """

    plan: Plan
    changed: bool
    warnings: list[str]
    restart_required: bool
    hardserver: str | None
    variables: dict[str, str]
    overridden: list[dict[str, t.Any]]
    digest: str | None
    behind: list[dict[str, t.Any]]
    before: dict[str, t.Any]
    after: dict[str, t.Any]


def configure(tools: Nshield, wish: ClientWish, state: StateDirectory, *, check_mode: bool = False) -> ClientOutcome:
    """Bring a client to the wish.

    :raises TdeError: ``invalid_option``, ``nshield_client_behind``, ``nshield_store_not_common``, and those of the commands.
    """
    warnings = check_variables(wish.variables)
    if wish.distribution is not None and wish.distribution.kind == "common_store":
        check_store(tools, wish.distribution.store)
    rc = os.path.join(tools.home, "cknfastrc")
    text = _text(rc)
    new = edited(text, wish.variables)
    remembered = nshield_changes.load(state)
    digest = _digest(tools)
    before = {"variables": variables(text), "world_digest": digest, "clients_behind": nshield_changes.behind(remembered, digest)}
    plan = _plan(rc, text != new, wish, remembered, digest, _configured(tools, wish.distribution))
    if any(step.action == "update_from_rfs" for step in plan) and check_mode:
        warnings.append("What an update from the remote file system would bring is seen only when it is made.")
    if plan and not check_mode:
        with state.locked(wait_seconds=tools.timeout):
            planning.run(plan, _handlers(tools, wish, state, rc, new))
        text, digest, remembered = _text(rc), _digest(tools), nshield_changes.load(state)
    if wish.digest is not None and digest != wish.digest and not check_mode:
        raise TdeError(
            "nshield_client_behind", "this client's copy is another one", obj="Security World", details={"digest": digest}
        )
    shown = new if check_mode else text
    told = variables(shown)
    changed = [step for step in plan if step.action != "update_from_rfs"]
    after = {"variables": told, "world_digest": digest, "clients_behind": nshield_changes.behind(remembered, digest)}
    return ClientOutcome(
        plan=plan,
        changed=bool(changed) or digest != before["world_digest"],
        warnings=warnings,
        restart_required=variables(_text(rc) if not check_mode else new) != before["variables"],
        hardserver=_hardserver(tools),
        variables=told,
        overridden=overriding(wish.processes_of, told),
        digest=digest,
        behind=nshield_changes.behind(remembered, digest),
        before=before,
        after=after,
    )


def _plan(rc: str, edit: bool, wish: ClientWish, remembered: t.Mapping[str, t.Any], digest: str | None, configured: bool) -> Plan:
    plan = [Step("write_variables", rc, "variables are others than wished")] if edit else []
    known = remembered["clients"]
    last = remembered["changes"][-1]["number"] if remembered["changes"] else 0
    new = {name: known.get(name, last) for name in wish.clients} if wish.clients is not None else dict(known)
    new.update({name: last for name in wish.supplied})
    copies = {name: digest if name in wish.supplied else remembered["copies"].get(name, digest) for name in new}
    if (new, copies) != (known, remembered["copies"]):
        data = {"clients": new, "copies": copies}
        plan.append(Step("remember_clients", f"clients {', '.join(sorted(new))}", "who has which copy of the world", data))
    way = wish.distribution
    if way is None:
        return plan
    for address in way.gang_clients:
        if address not in remembered["gang_clients"]:
            plan.append(
                Step("admit_client", f"client {address}", "the remote file system does not let it in", {"address": address})
            )
    if way.kind == "rfs_client" and not configured:
        plan.append(Step("set_up_sync", f"remote file system {way.address}", "this client does not use it"))
    if way.sync == "update":
        plan.append(Step("update_from_rfs", f"remote file system {way.address}", "keys made elsewhere are looked for"))
    if way.sync == "commit" and remembered["committed"].get(way.address or "") != digest:
        plan.append(Step("commit_to_rfs", f"remote file system {way.address}", "it has not got this copy of the world"))
    return plan


def _handlers(tools: Nshield, wish: ClientWish, state: StateDirectory, rc: str, new: str) -> planning.Handlers:
    way = wish.distribution or Distribution("none")
    journal = Journal(state.journal)

    def remember(change: t.Callable[[dict[str, t.Any]], None]) -> None:
        remembered = nshield_changes.load(state)
        change(remembered)
        nshield_changes.save(state, remembered)

    def write_variables(step: Step) -> None:
        # Every process that loads the library reads it.
        write_atomic(rc, new.encode(), mode=0o644)
        journal.append("write_cknfastrc", rc, variables=sorted(wish.variables))

    def admit(step: Step) -> None:
        address = step.data["address"]
        peer = [part for part in (address, way.esn, way.key_hash) if part]
        tools.run("rfs-setup", "--gang-client", *(peer if way.authenticate else ["--write-noauth", address]))
        remember(lambda remembered: remembered.update(gang_clients=sorted({*remembered["gang_clients"], address})))

    def set_up(step: Step) -> None:
        how = ["--authenticate"] if way.authenticate else ["--no-authenticate"]
        # Security Manual, "Configuring client cooperation"; rfs-setup takes the two without names.
        if way.authenticate and way.key_hash:
            how += ["--rfs-hkneti", way.key_hash, *(["--rfs-esn", way.esn] if way.esn else [])]
        tools.run("rfs-sync", "--setup", "-p", str(way.port), *how, way.address or "")

    def commit(step: Step) -> None:
        tools.run("rfs-sync", "--commit")
        digest = _digest(tools)
        remember(lambda remembered: remembered["committed"].update({way.address or "": digest}))
        journal.append("commit_world", step.obj, digest=digest)

    def update(step: Step) -> None:
        before = _digest(tools)
        tools.run("rfs-sync", "--update")
        digest = _digest(tools)
        if digest != before:
            # What came from elsewhere is no change of this client: who had its copy is not behind by it.
            remember(
                lambda remembered: remembered["copies"].update(
                    {name: digest for name, copy in remembered["copies"].items() if copy == before}
                )
            )
            journal.append("update_world", step.obj, digest=digest)

    return {
        "write_variables": write_variables,
        "remember_clients": lambda step: remember(lambda remembered: remembered.update(step.data)),
        "admit_client": admit,
        "set_up_sync": set_up,
        "commit_to_rfs": commit,
        "update_from_rfs": update,
    }


def _configured(tools: Nshield, way: Distribution | None) -> bool:
    if way is None or way.kind != "rfs_client":
        return True
    if not way.address:
        raise TdeError("invalid_option", "names no address of the remote file system", obj="option distribution")
    return re.search(rf"(?<![\w.]){re.escape(way.address)}(?![\w.])", tools.run("rfs-sync", "--show")) is not None


def check_store(tools: Nshield, store: str | None) -> None:
    """The Security World's folder must lie on the common store, and that be mounted: else keys are made beside it.

    :raises TdeError: ``nshield_store_not_common``, ``invalid_option``.
    """
    if not store:
        raise TdeError("invalid_option", "names no mount point of the common store", obj="option distribution")
    local = os.path.realpath(tools.local)
    if not os.path.ismount(store):
        raise TdeError("nshield_store_not_common", "is not mounted", obj=store)
    if not os.path.isdir(local) or os.path.commonpath([local, os.path.realpath(store)]) != os.path.realpath(store):
        raise TdeError("nshield_store_not_common", f"does not lie below {store}", obj=local)


def _digest(tools: Nshield) -> str | None:
    try:
        content = nshield_world.files(tools.local)
    except TdeError as error:
        if error.code != "file_absent":
            raise
        return None
    return nshield_world.digest(content) if "world" in content else None


def _hardserver(tools: Nshield) -> str | None:
    try:
        tools.world()
    except TdeError as error:
        if error.code in ("nshield_hardserver_down", "timeout", "command_missing"):
            return error.message
        # It answered; that there is no world is another matter.
    return None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as handle:
            return handle.read()
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise os_error(exc, path) from None
