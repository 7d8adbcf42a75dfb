# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which protection keys really have, and their transfer to another softcard or card set by ``rocs``.

A key is known by its hash, which a transfer does not change. A transfer that was killed, or another client that has not put
its old files aside, leaves a key with two files: a *copy* under the former token, which its former credential still opens.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..common.terminal import Answer
from . import nshield_changes, nshield_world
from .nshield import ROCS_PROMPT, Estate, Nshield, differences
from .nshield_cards import ADMIN_PROMPT, ANY_PROMPT, check_card, check_softcard, failed, talk
from .nshield_text import Key, KeyDetail


@dataclasses.dataclass(frozen=True)
class Expected:
    """The protection that keys are expected to have.

    :param protection: ``module``, ``softcard`` or ``ocs``; :param token: the hash of the softcard or card set.
    """

    protection: str
    token: str | None
    name: str | None

    @property
    def words(self) -> str:
        return _words(self.protection, self.name)


class File(t.NamedTuple):
    """A key file and what it says of itself."""

    key: Key
    detail: KeyDetail

    def is_under(self, expected: Expected) -> bool:
        return (self.detail.protection, self.detail.token) == (expected.protection, expected.token)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A key with the file that is as expected, if there is one, and its other files.

    :ivar right: the file under the expected protection; :ivar others: all other files of the same key.
    """

    right: File | None
    others: tuple[File, ...]

    @property
    def first(self) -> File:
        return self.right or self.others[0]

    def public(self, estate: Estate) -> dict[str, t.Any]:
        """As a module returns it."""
        key, detail = self.first
        return {
            "name": key.name,
            "ident": key.ident,
            "application": key.application,
            "protection": detail.protection,
            "token": detail.token,
            "token_name": estate.token_name(detail.token),
            "recoverable": detail.recovery,
            "as_expected": self.right is not None,
            "copies": [
                {"ident": other.key.ident, "protection": other.detail.protection, "token": other.detail.token}
                for other in (self.others if self.right else self.others[1:])
            ],
        }


def expectation(estate: Estate, protection: str, token: str | None) -> Expected:
    """What is expected, its token found.

    :raises TdeError: ``token_absent``, ``token_ambiguous``, ``invalid_option``.
    """
    if (protection == "module") != (token is None):
        raise TdeError("invalid_option", "module protection has no token; softcard and ocs name one", obj="option token")
    if token is None:
        return Expected(protection, None, None)
    found = estate.find_token(protection, token)
    return Expected(protection, found.hash, found.name)


def placed(tools: Nshield, estate: Estate, patterns: t.Sequence[str], application: str, expected: Expected) -> list[Placed]:
    """The keys that patterns name, with all their files.

    :param patterns: names or idents, with ``*`` and ``?``; each must find a key.
    :raises TdeError: ``key_absent``.
    """
    own = [key for key in estate.keys if key.application == application]
    chosen: dict[str, Key] = {}
    for pattern in patterns:
        found = [key for key in own if pattern in (key.name, key.ident)]
        found = found or [key for key in own if any(fnmatch.fnmatchcase(text, pattern) for text in (key.name, key.ident))]
        if not found:
            raise TdeError("key_absent", "this client's Security World has none of that name or ident", obj=f"key {pattern}")
        chosen.update({key.ident: key for key in found})
    # All files of a key have its name; keys of the same name are told apart by their hashes.
    names = {key.name for key in chosen.values()}
    files: dict[str, list[File]] = {}
    for key in own:
        if key.name in names:
            detail = tools.key_detail(key)
            files.setdefault(detail.hash, []).append(File(key, detail))
    return [_place(group, expected) for group in files.values() if any(file.key.ident in chosen for file in group)]


def _place(files: t.Sequence[File], expected: Expected) -> Placed:
    right = next((file for file in files if file.is_under(expected)), None)
    return Placed(right, tuple(file for file in files if file is not right))


def verify(tools: Nshield, estate: Estate, keys: t.Sequence[Placed], expected: Expected) -> None:
    """Fail where a key is not under the expected protection, or where ``rocs`` says otherwise.

    :raises TdeError: ``nshield_key_slipped``, ``nshield_key_elsewhere``, ``nshield_answer_unknown``.
    """
    slipped = [key for key in keys if key.right is None and key.first.detail.protection == "module"]
    elsewhere = [key for key in keys if key.right is None and key not in slipped]
    details = {"nshield_keys": [key.public(estate) for key in (*slipped, *elsewhere)]}
    if slipped:
        names = ", ".join(key.first.key.name for key in slipped)
        raise TdeError(
            "nshield_key_slipped", f"under module protection, not under {expected.words}", obj=f"keys {names}", details=details
        )
    if elsewhere:
        where = ", ".join(f"{key.first.key.name} under {_under(estate, key.first)}" for key in elsewhere)
        raise TdeError("nshield_key_elsewhere", f"{where}; expected: {expected.words}", obj="keys", details=details)
    asked = {key.first.key.name for key in keys}
    contrary = [sentence for sentence in differences(estate, tools.rocs_keys()) if any(name in sentence for name in asked)]
    if contrary:
        raise TdeError("nshield_answer_unknown", " ".join(contrary), obj="nfkminfo and rocs")


@dataclasses.dataclass(frozen=True)
class TransferWish:
    """Keys under another softcard or card set.

    :param patterns: names or idents; empty for all keys of ``source``.
    :param source: name or hash of the softcard or card set that they come from; None for whichever of the same kind.
    :param passphrase: of the target; :param acs_passphrase: of the administrator cards.
    :param retire_copies: put files of transferred keys under their former token aside, into the backup.
    :param backup_directory: where the Security World is backed up before.
    """

    patterns: tuple[str, ...]
    application: str
    source: str | None
    protection: str
    token: str | None
    passphrase: Secret | None
    acs_passphrase: Secret | None
    retire_copies: bool
    backup_directory: str


@dataclasses.dataclass(frozen=True)
class TransferOutcome:
    """What was done, where the keys were and are; ``backup``: the folder of the backup, if one was made."""

    plan: Plan
    estate_before: Estate
    keys_before: tuple[Placed, ...]
    estate: Estate
    keys: tuple[Placed, ...]
    backup: str | None


def transfer(tools: Nshield, wish: TransferWish, state: StateDirectory, *, check_mode: bool = False) -> TransferOutcome:
    """Bring keys under the wished softcard or card set; goes on where a killed run stopped.

    :raises TdeError: ``nshield_transfer_forbidden``, ``nshield_not_recoverable``, ``nshield_authorisation_missing``,
        ``nshield_passphrase_refused``, ``credential_missing``, ``nshield_key_elsewhere``, ``nshield_transfer_unfinished``.
    """
    estate = tools.usable()
    expected = expectation(estate, wish.protection, wish.token)
    keys = _chosen(tools, estate, wish, expected)
    plan = transfer_plan(keys, expected, wish.retire_copies)
    moving = any(step.action == "transfer_keys" for step in plan)
    if moving:
        _ready(tools, estate, wish, expected)
    if check_mode or not plan:
        return TransferOutcome(plan, estate, tuple(keys), estate, tuple(keys), None)
    backups: list[str] = []
    journal = Journal(state.journal)

    def back_up(step: Step) -> None:
        backups.append(nshield_world.back_up(tools.local, wish.backup_directory))
        journal.append("back_up_world", backups[-1], digest=nshield_world.digest(nshield_world.files(tools.local)))

    heard: list[str] = []

    def move(step: Step) -> None:
        journal.append("transfer_keys", step.obj, result="begun", idents=list(step.data["idents"]))
        heard.extend(_rocs(tools, estate, wish, expected, step.data["idents"]).splitlines())

    def retire(step: Step) -> None:
        nshield_world.put_aside(tools.local, f"key_{wish.application}_{step.data['ident']}", backups[-1])
        journal.append("retire_key_file", step.obj, key_id=step.data["ident"])

    with state.locked(wait_seconds=tools.timeout):
        planning.run(plan, {"back_up_world": back_up, "transfer_keys": move, "retire_key_file": retire})
        now = tools.usable()
        after = _again(tools, now, keys, wish, expected)
        if moving and all(key.right for key in after):
            # A rocs that was killed at its end leaves a file of the last key under its former token.
            rest = [step for step in transfer_plan(after, expected, wish.retire_copies) if step.action == "retire_key_file"]
            planning.run(rest, {"retire_key_file": retire})
            plan = [*plan, *rest]
            if rest:
                now = tools.usable()
                after = _again(tools, now, keys, wish, expected)
        done = [key.first.key.name for key in after if key.right]
        left = [key.first.key.name for key in after if key.right is None]
        if moving and done:
            nshield_changes.remember(state, f"keys {', '.join(done)} are now under {expected.words}")
        if moving:
            journal.append(
                "transfer_keys", f"{', '.join(done) or 'none'} to {expected.words}", result="failed" if left else "done"
            )
    if left:
        raise TdeError(
            "nshield_transfer_unfinished",
            f"still elsewhere: {', '.join(left)}",
            obj=f"transfer to {expected.words}",
            kept=f"Transferred: {', '.join(done) or 'none'}. Backup: {backups[-1]}.",
            details={"transferred": done, "left": left, "backup": backups[-1], "rocs": heard[-20:]},
        )
    return TransferOutcome(plan, estate, tuple(keys), now, tuple(after), backups[-1])


def _chosen(tools: Nshield, estate: Estate, wish: TransferWish, expected: Expected) -> list[Placed]:
    """The keys that the wish names, or all of the source; the same keys before, during and after the transfer."""
    source = estate.find_token(wish.protection, wish.source).hash if wish.source is not None else None
    if wish.patterns:
        keys = placed(tools, estate, wish.patterns, wish.application, expected)
    else:
        idents = [key.ident for key in estate.keys if key.application == wish.application and key.token == source]
        keys = placed(tools, estate, idents, wish.application, expected)
    if source is not None:
        foreign = [key for key in keys if key.right is None and not any(file.detail.token == source for file in key.others)]
        if foreign and all(key.first.detail.protection == wish.protection for key in foreign):
            names = ", ".join(key.first.key.name for key in foreign)
            raise TdeError(
                "nshield_key_elsewhere", f"neither under {wish.source} nor under {expected.words}", obj=f"keys {names}"
            )
    return keys


def transfer_plan(keys: t.Sequence[Placed], expected: Expected, retire_copies: bool) -> Plan:
    """What is left to do; pure.

    :raises TdeError: ``nshield_transfer_forbidden``, ``nshield_not_recoverable``.
    """
    if expected.protection == "module":
        raise TdeError("nshield_transfer_forbidden", "no key can be transferred to module protection", obj="transfer")
    moving = [key for key in keys if key.right is None]
    for key in moving:
        file = key.first
        if file.detail.protection != expected.protection:
            raise TdeError(
                "nshield_transfer_forbidden",
                f"is under {_words(file.detail.protection, None)} and cannot go under {expected.words}",
                obj=f"key {file.key.name}",
            )
        if not file.detail.recovery:
            raise TdeError("nshield_not_recoverable", "was made without recovery", obj=f"key {file.key.name}")
    copies = [file for key in keys if key.right is not None for file in key.others if file.detail.protection != "module"]
    plan = []
    if moving:
        names = ", ".join(key.first.key.name for key in moving)
        plan.append(
            Step(
                "transfer_keys",
                f"keys {names}",
                f"to {expected.words}",
                {"idents": tuple(key.first.key.ident for key in moving)},
            )
        )
    if retire_copies:
        plan += [
            Step(
                "retire_key_file",
                f"key file {file.key.ident} of {file.key.name}",
                "the key is under its new token, and this file still opens with the former credential",
                {"ident": file.key.ident},
            )
            for file in copies
        ]
    return [Step("back_up_world", "Security World", "before its files change"), *plan] if plan else []


def _ready(tools: Nshield, estate: Estate, wish: TransferWish, expected: Expected) -> None:
    """All that rocs will ask for, looked at before anything is changed."""
    if not estate.world.recovery:
        raise TdeError("nshield_not_recoverable", "was made without recovery", obj="Security World")
    if wish.passphrase is None or wish.acs_passphrase is None:
        raise TdeError(
            "credential_missing", "needs the target's passphrase and that of the administrator cards", obj="transfer of keys"
        )
    needed = estate.world.acs_quorum[0] if estate.world.acs_quorum else 1
    admin = estate.slots("admin")
    if len(admin) < needed:
        raise TdeError(
            "nshield_authorisation_missing",
            f"{needed} administrator cards are asked for, {len(admin)} in slots",
            obj="transfer of keys",
        )
    if expected.protection == "softcard":
        right = check_softcard(tools, expected.token or "", wish.passphrase)
    else:
        present = estate.slots("operator", expected.token)
        if not present:
            raise TdeError("nshield_authorisation_missing", "none of its cards is in a slot", obj=expected.words)
        right = all(check_card(tools, module, slot, wish.passphrase) for module, slot in present)
    if not right:
        raise TdeError("nshield_passphrase_refused", "does not take the passphrase", obj=expected.words)


def _rocs(tools: Nshield, estate: Estate, wish: TransferWish, expected: Expected, idents: t.Sequence[str]) -> str:
    """One run of rocs for all keys: it asks for the administrator cards once. :returns: what it said; no secret is in it."""
    commands = [
        f"target hash {expected.token}",
        *(f"mark {wish.application}:{ident}" for ident in idents),
        "recover",
        "save",
        "quit",
    ]
    quorum = estate.world.acs_quorum[0] if estate.world.acs_quorum else 1
    cards = max(1, len(estate.slots("operator", expected.token)))
    answers = [Answer(ROCS_PROMPT, command) for command in commands]
    if wish.acs_passphrase is not None and wish.passphrase is not None:
        answers += [Answer(ADMIN_PROMPT, wish.acs_passphrase, quorum), Answer(ANY_PROMPT, wish.passphrase, cards)]
    said = talk(tools, ["rocs"], answers)
    # A killed rocs has transferred some: what is where is looked at afterwards.
    if said.asked_again or said.code > 0:
        raise failed("rocs", said)
    return said.text


def _again(tools: Nshield, estate: Estate, keys: t.Sequence[Placed], wish: TransferWish, expected: Expected) -> list[Placed]:
    """The same keys, looked at anew. A key of which no file is left would be missing here."""
    names = [key.first.key.name for key in keys]
    found = placed(tools, estate, names, wish.application, expected)
    hashes = {key.first.detail.hash for key in keys}
    again = [key for key in found if key.first.detail.hash in hashes]
    lost = hashes - {key.first.detail.hash for key in again}
    if lost:
        names = [key.first.key.name for key in keys if key.first.detail.hash in lost]
        raise TdeError(
            "key_unreachable", "has no file any more", obj=f"key {', '.join(names)}", next_step="Restore it from the backup."
        )
    return again


def _under(estate: Estate, file: File) -> str:
    return _words(file.detail.protection, estate.token_name(file.detail.token) or file.detail.token)


def _words(protection: str, name: str | None) -> str:
    words = {"module": "module protection", "softcard": "softcard", "ocs": "card set"}[protection]
    return f"{words} {name}" if name else words
