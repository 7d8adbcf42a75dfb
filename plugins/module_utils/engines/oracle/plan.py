# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From what there is and what is wished to steps; pure.

A change of credential or protection is made of *legs*, and a leg of *phases* that the host remembers (memo.py), so that the next
run goes on after a kill or a restart. Orders are those of Entrust's integration guide, "Change passphrase only" and after.
"""

from __future__ import annotations

import dataclasses
import typing as t

from ...common.errors import TdeError
from ...common.plan import Plan, Step
from .facts import ROOT, SEED, Container, Facts, Guard

#: Kinds of change, each with its legs.
PASSPHRASE, TRANSFER, REPLACE, ROUND_TRIP, MIGRATE, REVERSE = (
    "passphrase",
    "transfer",
    "replace",
    "round_trip",
    "migrate",
    "reverse",
)
LEGS: dict[str, tuple[str, ...]] = {
    PASSPHRASE: ("credential",),
    TRANSFER: ("credential",),
    REPLACE: ("credential",),
    ROUND_TRIP: ("reverse", "credential", "migrate"),
    MIGRATE: ("migrate",),
    REVERSE: ("reverse",),
}
#: What each kind is, in words.
KINDS = {
    PASSPHRASE: "the passphrase is another one",
    TRANSFER: "the token is another one, with its keys",
    REPLACE: "the credential is another one, and nothing is encrypted",
    ROUND_TRIP: "the credential is another one, to which no key can be transferred",
    MIGRATE: "the master key moves into the HSM",
    REVERSE: "the master key moves into the software keystore",
}
#: Phases of the leg ``credential``; the other legs are told by the keys that are there.
BEGUN, CLOSED, TOKEN = "begun", "closed", "token"


@dataclasses.dataclass(frozen=True)
class Change:
    """A change under way.

    :ivar leg: number of the leg; :ivar phase: what of the leg ``credential`` is done.
    :ivar startup: the instance's start before which the credential was changed.
    """

    kind: str
    source: Guard
    target: Guard
    leg: int = 0
    phase: str = BEGUN
    startup: str = ""

    @property
    def leg_name(self) -> str:
        return LEGS[self.kind][self.leg]


@dataclasses.dataclass(frozen=True)
class Wish:
    """A keystore as it is wished, and what is known of its credential.

    :ivar containers: names of PDBs; None for all.
    :ivar new_credential: the wished credential is another than the one that opened the keystore last.
    :ivar secret_current: the secret HSM_PASSWORD is the wished credential, if auto-login is wished; :ivar external_current: so for the external store.
    :ivar software_made: the software keystore was made.
    :ivar keyed: containers that have a master key, as the host remembers.
    """

    guard: Guard
    wallet_root: str
    containers: tuple[str, ...] | None = None
    auto_login: bool = False
    external_store: bool = False
    transfer: bool = False
    round_trip: bool = False
    new_credential: bool = False
    secret_current: bool = True
    external_current: bool = True
    software_made: bool = True
    keyed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done now, why a restart is needed before more can be done, and what comes after it; ``change``: what it is part of."""

    now: Plan
    restart: tuple[str, ...] = ()
    later: Plan = dataclasses.field(default_factory=list)
    change: Change | None = None


def configuration(guard: Guard, auto_login: bool) -> str:
    """TDE_CONFIGURATION for a guard."""
    if not guard.hsm:
        return "FILE"
    return "HSM|FILE" if auto_login else "HSM"


def kind_of(current: Guard | None, wish: Wish, facts: Facts) -> str | None:
    """Which change leads from the present guard to the wished one; None if none is needed.

    :raises TdeError: ``oracle_change_refused``: it would leave data unreadable.
    """
    target = wish.guard
    if current is None or (current == target and not wish.new_credential):
        return None
    if current == target:
        if not target.hsm:
            raise TdeError(
                "oracle_change_refused",
                "the passphrase of a software keystore is changed by ALTER KEYSTORE PASSWORD, which this collection does not do",
                obj="keystore",
            )
        return PASSPHRASE
    if current.hsm != target.hsm:
        return MIGRATE if target.hsm else REVERSE
    if wish.transfer:
        if current.protection != target.protection or target.protection == "module":
            raise TdeError(
                "nshield_transfer_forbidden",
                f"keys go from softcard to softcard or from card set to card set only, not from {current.words} to {target.words}",
                obj="transfer",
            )
        return TRANSFER
    if not facts.encrypted:
        return REPLACE
    if not wish.round_trip:
        shown = ", ".join(facts.encrypted[:3]) + (" …" if len(facts.encrypted) > 3 else "")
        raise TdeError(
            "oracle_change_refused",
            f"without its master keys under {current.words}, {shown} could not be read any more",
            obj=f"change from {current.words} to {target.words}",
            kept="Nothing was changed.",
            next_step="Set oracle.safe_way_round: HSM, software keystore, new credential, HSM. Between two softcards, or two card "
            "sets, oracle.transfer_keys takes the keys along.",
        )
    return ROUND_TRIP


def open_pdbs(facts: Facts) -> Plan:
    """ALTER PLUGGABLE DATABASE ALL OPEN, where one is not."""
    shut = [one.name for one in facts.containers if one.con_id > SEED and not one.open]
    return [Step("open_pdbs", f"PDBs {', '.join(shut)}", "a closed one would be left behind")] if shut else []


def chosen(facts: Facts, names: t.Sequence[str] | None) -> list[Container]:
    """The root, and the PDBs that are meant; the seed never.

    :raises TdeError: ``database_absent``.
    """
    known = {one.name.upper(): one for one in facts.containers if one.con_id != SEED}
    for name in names or ():
        if name.upper() not in known:
            raise TdeError("database_absent", "the root does not list it", obj=f"PDB {name}")
    wanted = None if names is None else {name.upper() for name in names}
    pdbs = [one for one in known.values() if one.con_id != ROOT and (wanted is None or one.name.upper() in wanted)]
    return [one for one in known.values() if one.con_id == ROOT] + sorted(pdbs)


def opening(facts: Facts, wish: Wish, *, hsm: bool) -> Plan:
    """Open the keystore: the root's first (united mode), then each PDB that was left behind."""
    kind = "HSM" if hsm else "software"
    meant = chosen(facts, wish.containers)
    if not facts.opened(ROOT, hsm):
        everywhere = wish.containers is None
        data = {"container": facts.container(ROOT), "all": everywhere, "hsm": hsm}
        return [Step("open_keystore", f"{kind} keystore of {facts.container(ROOT)}", "it is not open", data)]
    return [
        Step(
            "open_keystore",
            f"{kind} keystore of PDB {one.name}",
            "it is not open",
            {"container": one.name, "all": False, "hsm": hsm},
        )
        for one in meant
        if one.open and not facts.opened(one.con_id, hsm)
    ]


def closing(facts: Facts, names: t.Sequence[str] | None, *, hsm: bool, why: str) -> Plan:
    """Close the keystore of all containers, or of the named PDBs."""
    kind = "HSM" if hsm else "software"
    meant = [one for one in chosen(facts, names) if one.open and facts.opened(one.con_id, hsm)]
    if names is None:
        data = {"container": facts.container(ROOT), "all": True, "hsm": hsm}
        return [Step("close_keystore", f"{kind} keystore of all containers", why, data)] if meant else []
    return [
        Step("close_keystore", f"{kind} keystore of PDB {one.name}", why, {"container": one.name, "all": False, "hsm": hsm})
        for one in meant
        if one.con_id != ROOT
    ]


def alter(facts: Facts, wish: Wish, wished: str) -> Plan:
    """Bring the two parameters to the wish. TDE_CONFIGURATION is dynamic once WALLET_ROOT is set."""
    steps = []
    if facts.wallet_root_next != wish.wallet_root:
        data = {"name": "WALLET_ROOT", "value": wish.wallet_root, "scope": "SPFILE"}
        steps.append(
            Step("alter_system", f"parameter WALLET_ROOT to {wish.wallet_root}", f"it is {facts.wallet_root_next!r}", data)
        )
    running = facts.wallet_root == wish.wallet_root
    if facts.configuration_next != wished or (running and facts.configuration != wished):
        why = f"it is {facts.configuration_next or 'not set'}"
        data = {"name": "TDE_CONFIGURATION", "value": wished, "scope": "BOTH" if running else "SPFILE"}
        steps.append(Step("alter_system", f"parameter TDE_CONFIGURATION to {wished}", why, data))
    return steps


def secret(wish: Wish) -> Plan:
    """The credential where Oracle takes it from by itself."""
    if wish.secret_current or not wish.guard.hsm:
        return []
    steps = []
    if wish.auto_login:
        steps.append(Step("write_secret", "secret HSM_PASSWORD", "the keystore opens by it after a start"))
        steps.append(Step("create_auto_login", "auto-login keystore", "it holds the secret HSM_PASSWORD"))
    return steps


def external(wish: Wish) -> Plan:
    """The credential in Oracle's external store, from which the statements take it."""
    if wish.external_current or not wish.external_store or not wish.guard.hsm:
        return []
    return [Step("write_external", "external store", "statements take the credential from there")]


def verify(guard: Guard) -> Plan:
    """Look at where the keys in use really lie."""
    return [Step("verify_protection", "master keys", f"they must be under {guard.words}")] if guard.hsm else []


def software(facts: Facts, wish: Wish) -> Plan:
    """The software keystore, made and open: for itself, for its auto-login secret, or as the far end of a migration."""
    if not wish.software_made:
        return [Step("create_keystore", "software keystore", "there is none")]
    return opening(facts, wish, hsm=False)


def present(facts: Facts, wish: Wish, current: Guard | None, change: Change | None) -> Decision:
    """What leads to the wished keystore, open, under the wished guard and credential.

    :param current: what guards it now, as the host remembers; :param change: what was begun.
    :raises TdeError: ``oracle_change_refused``, ``oracle_change_unfinished``, ``nshield_transfer_forbidden``.
    """
    if change is not None and change.target != wish.guard:
        raise TdeError(
            "oracle_change_unfinished",
            f"a change from {change.source.words} to {change.target.words} was begun",
            obj="keystore",
            kept="It stands where it stopped.",
            next_step=f"Wish for {change.target.words} again, which goes on.",
        )
    if change is None:
        kind = kind_of(current, wish, facts)
        shut = open_pdbs(facts)
        if kind == REPLACE and shut:
            # What is encrypted in a closed PDB does not show, and would be lost.
            return Decision(shut)
        if kind is not None and current is not None:
            change = Change(kind, current, wish.guard)
    if facts.wallet_root != wish.wallet_root:
        # Before the restart nothing but parameters can be set; auto-login is arranged under FILE.
        first = "FILE" if change is None and not wish.secret_current else configuration(wish.guard, wish.auto_login)
        first = first if change is None else facts.configuration_next
        reason = f"WALLET_ROOT is read at the start: it is to be {wish.wallet_root}."
        steps = alter(facts, wish, first)
        return Decision(steps, () if steps else (reason,), [*_restart(reason), *_told(wish)])
    if change is not None:
        return changing(facts, wish, change)
    if wish.auto_login and wish.guard.hsm and not wish.secret_current:
        arranged = _arrange(facts, wish)
        if arranged:
            return Decision(arranged, (), _told(wish))
    steps = external(wish) or alter(facts, wish, configuration(wish.guard, wish.auto_login))
    if not steps:
        steps = opening(facts, wish, hsm=True) if wish.guard.hsm else software(facts, wish)
    return Decision(steps)


def _arrange(facts: Facts, wish: Wish) -> Plan:
    """Auto-login: software keystore under FILE, the secret in it, then HSM|FILE. Where the HSM is in use, it stays so."""
    if not facts.configuration.startswith("HSM"):
        steps = alter(facts, wish, "FILE") or software(facts, wish)
        if steps:
            return steps
    elif not wish.software_made:
        return [Step("create_keystore", "software keystore", "there is none")]
    return secret(wish)


def _told(wish: Wish) -> Plan:
    """What comes later, where the state that it depends on is still to come."""
    name = "HSM keystore" if wish.guard.hsm else "software keystore"
    return [Step("open_keystore", name, "it is not open", {})]


def _restart(why: str) -> Plan:
    return [Step("restart_database", "database", why)]


def changing(facts: Facts, wish: Wish, change: Change) -> Decision:
    """The next steps of a change, and as far as can be told all that follow."""
    if change.leg_name == "credential":
        decision = credential_leg(facts, wish, change)
    else:
        decision = Decision(migration_leg(facts, wish, change))
    rest: Plan = []
    for number, name in enumerate(LEGS[change.kind]):
        if number > change.leg:
            rest += _outline(wish, change, name)
    return dataclasses.replace(decision, later=[*decision.later, *rest], change=change)


def token_step(change: Change) -> Plan:
    """What is done with the HSM's own tools between closing and restart."""
    data = {"phase": TOKEN}
    if change.kind == PASSPHRASE and change.target.protection != "module":
        return [Step("change_token_passphrase", change.target.words, KINDS[PASSPHRASE], data)]
    if change.kind == TRANSFER:
        return [Step("transfer_keys", f"keys of {change.source.words}", f"to {change.target.words}", data)]
    return [Step("credential_changed", "credential", f"Oracle alone knows it: {KINDS[change.kind]}", data)]


def credential_leg(facts: Facts, wish: Wish, change: Change) -> Decision:
    """PDBs open, close, token tool, restart, PDBs open, open, auto-login secret: the guide's order."""
    why = KINDS[change.kind]
    restart = "The HSM's library still holds the former credential."
    # In the midst of a round trip the software keystore guards the master keys.
    hsm = change.kind != ROUND_TRIP
    # Auto-login would open the keystore with the former credential whenever somebody looks, until its secret is another.
    still = alter(facts, wish, "HSM") if hsm else []
    final = alter(facts, wish, configuration(change.target, wish.auto_login)) if hsm else []
    after = [
        *_restart(restart),
        Step("open_pdbs", "all PDBs", "a closed one would be left behind"),
        *([Step("open_keystore", "HSM keystore of all containers", "with the new credential", {})] if hsm else []),
        *(secret(wish) + external(wish) if hsm else []),
        *(still and [Step("alter_system", "parameter TDE_CONFIGURATION to HSM|FILE", "auto-login is arranged again", {})]),
        *(verify(change.target) if hsm and change.kind != REPLACE else []),
        *finish(change),
    ]
    if change.phase == BEGUN:
        steps = open_pdbs(facts) + still + closing(facts, None, hsm=hsm, why=why) if hsm else []
        mark = [Step("mark_closed", "keystore", "closed everywhere", {"phase": CLOSED})]
        return Decision(steps or mark, (), [*(mark if steps else []), *token_step(change), *after])
    if change.phase == CLOSED:
        return Decision(token_step(change), (), after)
    if facts.startup == change.startup:
        return Decision([], (restart,), after)
    steps = open_pdbs(facts)
    if not steps and hsm:
        steps = external(wish) or opening(facts, wish, hsm=True) or secret(wish) or final
    return Decision(steps or [*(verify(change.target) if hsm and change.kind != REPLACE else []), *finish(change)])


def finish(change: Change) -> Plan:
    """A leg's end, and with the last one the change's."""
    last = change.leg + 1 == len(LEGS[change.kind])
    obj = f"change from {change.source.words} to {change.target.words}"
    return [Step("finish_change" if last else "finish_leg", obj, KINDS[change.kind], {"leg": change.leg})]


def migration_leg(facts: Facts, wish: Wish, change: Change) -> Plan:
    """A fresh master key on the other side, the data keys under it, container by container; then only that side is left.

    V$ENCRYPTION_KEYS tells of open keystores only: which key is in use is believed once the far side is open.
    """
    into = change.leg_name == "migrate"
    both = "HSM|FILE" if into else "FILE|HSM"
    final = configuration(change.target, wish.auto_login) if into else "FILE"
    everywhere = dataclasses.replace(wish, containers=None)
    near = software(facts, everywhere) if into else opening(facts, everywhere, hsm=True)
    steps = open_pdbs(facts)
    if not steps and facts.configuration_next not in (both, final):
        made = [] if wish.software_made else software(facts, wish)
        # The secret of auto-login comes before HSM|FILE, which would open the HSM with the former one.
        steps = made or (near + (secret(wish) if not near else []) if into else []) or alter(facts, wish, both)
    steps = steps or (external(wish) or opening(facts, everywhere, hsm=True) if into else software(facts, everywhere))
    if not steps and facts.configuration_next == both:
        steps = near
    if steps:
        return steps
    used = [(one, facts.active(one.con_id)) for one in chosen(facts, None)]
    shown(facts, wish.keyed, hsm_alone=False)
    todo = [one for one, active in used if active and active.hsm != into]
    if todo:
        action, verb = ("migrate_key", "to the HSM") if into else ("reverse_migrate_key", "from the HSM")
        found = [Step(action, f"master key of {one.name}", f"migrated {verb}", {"container": one.name}) for one in todo]
        return [*found, *(verify(change.target) if into else [])]
    arranged = secret(wish) if into else []
    return arranged or alter(facts, wish, final) or [*(verify(change.target) if into else []), *finish(change)]


def _outline(wish: Wish, change: Change, leg: str) -> Plan:
    """A leg that is still to come, in its main steps."""
    if leg == "credential":
        return [*token_step(change), *_restart("The HSM's library still holds the former credential.")]
    word = "to the HSM" if leg == "migrate" else "from the HSM"
    action = "migrate_key" if leg == "migrate" else "reverse_migrate_key"
    end = dataclasses.replace(change, leg=len(LEGS[change.kind]) - 1)
    return [
        Step(action, "master key of each container", f"is to be migrated {word}"),
        *(verify(change.target) if leg == "migrate" else []),
        *finish(end),
    ]


def closed(facts: Facts, wish: Wish) -> Decision:
    """Close it; auto-login, which would open it again as soon as somebody looks, is out of the way until it is opened.

    :raises TdeError: ``invalid_option``.
    """
    steps = closing(facts, wish.containers, hsm=wish.guard.hsm, why="it is to be closed")
    if steps and wish.auto_login and wish.guard.hsm:
        if wish.containers is not None:
            raise TdeError(
                "invalid_option",
                "with auto-login the keystores of single PDBs open again as soon as somebody looks",
                obj="option oracle.containers",
                kept="Nothing was closed.",
                next_step="Close all: leave oracle.containers out.",
            )
        steps = alter(facts, wish, "HSM") + steps
    return Decision(steps)


def shown(facts: Facts, keyed: t.Collection[str], *, hsm_alone: bool) -> None:
    """An open keystore that does not show a container's master key was opened with a credential that is not the right one.

    :param keyed: containers that have a master key, as the host remembers; :param hsm_alone: it is asked of the HSM keystore.
    :raises TdeError: ``oracle_master_key_unreachable``.
    """
    for one in chosen(facts, None):
        opened = facts.opened(one.con_id, True) or (not hsm_alone and facts.opened(one.con_id, False))
        keyed_here = one.name in keyed or any(space.con_id == one.con_id and space.algorithm for space in facts.spaces)
        if facts.asked and one.open and opened and keyed_here and facts.active(one.con_id) is None:
            raise TdeError(
                "oracle_master_key_unreachable",
                "has one, which the open keystore does not show",
                obj=f"container {one.name}",
                kept="Nothing is done with the keys that do not show.",
            )


def tag_of(cluster: str, tag: str | None) -> str:
    """The tag that a master key is given."""
    return f"hsm-tde.{cluster}" + (f".{tag}" if tag else "")


def master_keys(facts: Facts, wish: Wish, cluster: str, tag: str | None, keyed: t.Collection[str] = ()) -> Plan:
    """A master key for every container; with a tag, one of that tag, activated.

    :param keyed: containers that have a master key, as the host remembers.
    :raises TdeError: ``keystore_closed``, ``tag_superseded``, ``oracle_containers_behind``, ``oracle_master_key_unreachable``.
    """
    wished = tag_of(cluster, tag)
    steps: Plan = []
    behind = []
    for one in chosen(facts, wish.containers):
        active = facts.active(one.con_id)
        tagged = [key for key in facts.keys if key.con_id == one.con_id and key.tag == wished]
        if active is not None and (tag is None or active.tag == wished):
            continue
        if active is None and not facts.asked and one.name in keyed:
            # Nobody looked into the keystore.
            continue
        if not one.open:
            behind.append(one.name)
            continue
        if not facts.opened(one.con_id, wish.guard.hsm):
            raise TdeError("keystore_closed", "its keystore is not open", obj=f"container {one.name}")
        if active is None and (
            one.name in keyed or any(space.con_id == one.con_id and space.algorithm for space in facts.spaces)
        ):
            raise TdeError(
                "oracle_master_key_unreachable", "has one, which does not show; no other is made", obj=f"container {one.name}"
            )
        if any(key.activated for key in tagged):
            raise TdeError(
                "tag_superseded",
                "another master key is in use since",
                obj=f"tag {wished} in {one.name}",
                next_step="Take a new tag.",
            )
        if tagged:
            data = {"container": one.name, "key_id": tagged[0].key_id, "tag": wished}
            steps.append(Step("use_key", f"master key {wished} of {one.name}", "it was made and never activated", data))
        else:
            why = "there is none" if active is None else f"the one in use has the tag {active.tag or 'none'}"
            steps.append(Step("set_key", f"master key {wished} of {one.name}", why, {"container": one.name, "tag": wished}))
    if behind:
        raise TdeError(
            "oracle_containers_behind",
            "is not open, and would be left without the master key of the others",
            obj=f"PDB {', '.join(behind)}",
            kept="Nothing was changed.",
            next_step="Open it, or name the others in oracle.containers.",
        )
    return [*steps, *verify(wish.guard)] if steps else []
