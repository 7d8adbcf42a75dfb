# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Softcards and the passphrases of softcards and operator cards, by ``ppmk`` and ``cardpp``, on a terminal.

Which passphrase a softcard has is found by ``ppmk --check``: softcards and cards count no wrong tries.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

from ..common import plan as planning
from ..common.errors import TdeError
from ..common.journal import Journal
from ..common.plan import Plan, Step
from ..common.secret import Secret
from ..common.state import StateDirectory
from ..common.terminal import Answer, Said, converse
from . import credential, nshield_changes
from .nshield import Estate, Nshield
from .nshield_text import Slot, Softcard

#: ppmk and cardpp say "pass phrase" and "passphrase"; a new one is asked for twice.
NEW_PROMPT = r"(?i)new pass ?phrase[^\n]*:"
ADMIN_PROMPT = r"(?is)admin(?:istrator)? card.*pass ?phrase[^\n]*:"
ANY_PROMPT = r"(?i)pass ?phrase[^\n]*:"
_WRONG = re.compile(r"(?i)incorrect|wrong|not correct|verif\w* failed|DecryptFailed")


@dataclasses.dataclass(frozen=True)
class SoftcardWish:
    """A softcard with a passphrase.

    :param name: its name; :param hash: its hash, where names repeat. One of them.
    :param old_passphrase: the present one, to change it.
    :param acs_passphrase: of administrator cards, where a FIPS level 3 world has them in slots and no operator card.
    :param recoverable: made so that administrator cards can replace its passphrase.
    :param rules: ``oracle``: the credential must be one that Oracle takes; ``nshield``: the HSM's own rules.
    """

    name: str | None
    hash: str | None
    passphrase: Secret
    old_passphrase: Secret | None = None
    acs_passphrase: Secret | None = None
    recoverable: bool = False
    rules: str = "oracle"


@dataclasses.dataclass(frozen=True)
class SoftcardOutcome:
    """What is there after it, and what was done."""

    softcard: Softcard | None
    plan: Plan
    estate: Estate


def softcard(tools: Nshield, wish: SoftcardWish, state: StateDirectory, *, check_mode: bool = False) -> SoftcardOutcome:
    """Make a softcard, or give an existing one the wished passphrase.

    A softcard that a killed run made is found by its name.

    :raises TdeError: ``credential_forbidden``, ``token_absent``, ``token_ambiguous``, ``nshield_passphrase_refused``,
        ``nshield_authorisation_missing``, and those of the commands.
    """
    _judge(wish)
    estate = tools.usable()
    found = _find(estate, wish)
    right = found is not None and check_softcard(tools, found.hash, wish.passphrase)
    plan = softcard_plan(wish, found, right)
    if found is not None and not right:
        _may_change(tools, found, wish.old_passphrase)
    if plan:
        require_authorisation(estate, wish.acs_passphrase)
    if check_mode or not plan:
        return SoftcardOutcome(found, plan, estate)
    with state.locked(wait_seconds=tools.timeout):
        planning.run(
            plan,
            {
                "create_softcard": lambda step: _create(tools, estate, wish, state),
                "change_softcard_passphrase": lambda step: _change(tools, estate, step.data["hash"], wish, state),
            },
        )
    estate = tools.usable()
    found = _find(estate, wish)
    if found is None or not check_softcard(tools, found.hash, wish.passphrase):
        raise TdeError("nshield_passphrase_refused", "does not take the passphrase that was just set", obj=_named(wish))
    return SoftcardOutcome(found, plan, estate)


def softcard_plan(wish: SoftcardWish, found: Softcard | None, right: bool) -> Plan:
    """What is left to do; pure.

    :param right: the softcard takes the wished passphrase.
    """
    if found is None:
        return [Step("create_softcard", f"softcard {wish.name}", "there is none of that name", {"name": wish.name})]
    if right:
        return []
    return [
        Step(
            "change_softcard_passphrase",
            f"softcard {found.name} ({found.hash})",
            "it has another passphrase",
            {"name": found.name, "hash": found.hash},
        )
    ]


def _judge(wish: SoftcardWish) -> None:
    broken = credential.nshield_broken_rules(wish.name, wish.passphrase.text())
    if not broken and wish.rules == "oracle":
        broken = credential.broken_rules("softcard", wish.passphrase.text(), wish.name or "n")
    credential.refuse(broken, _named(wish))


def _named(wish: SoftcardWish) -> str:
    return f"softcard {wish.name or wish.hash}"


def _find(estate: Estate, wish: SoftcardWish) -> Softcard | None:
    try:
        return t.cast(Softcard, estate.find_token("softcard", wish.hash or wish.name or ""))
    except TdeError as error:
        if error.code == "token_absent" and wish.hash is None:
            return None
        raise


def _may_change(tools: Nshield, found: Softcard, old: Secret | None) -> None:
    """The present passphrase, tried before anything is changed."""
    if old is None:
        raise TdeError(
            "nshield_passphrase_refused",
            "has another passphrase, and the present one was not given",
            obj=f"softcard {found.name}",
            next_step="Give old_passphrase.",
        )
    if not check_softcard(tools, found.hash, old):
        raise TdeError(
            "nshield_passphrase_refused", "takes neither the new passphrase nor the old one", obj=f"softcard {found.name}"
        )


def require_authorisation(estate: Estate, acs_passphrase: Secret | None) -> None:
    """A FIPS level 3 world lets softcards be made and changed with an operator card, or administrator cards, in slots only.

    :raises TdeError: ``nshield_authorisation_missing``.
    """
    if estate.world.fips_level != 3 or estate.slots("operator"):
        return
    if not estate.slots("admin"):
        raise TdeError("nshield_authorisation_missing", "is of FIPS 140 level 3, and no slot has a card", obj="Security World")
    if acs_passphrase is None:
        raise TdeError(
            "nshield_authorisation_missing",
            "is of FIPS 140 level 3, slots have administrator cards only, and their passphrase was not given",
            obj="Security World",
        )


def check_credential(tools: Nshield, protection: str, named: str | None, passphrase: Secret) -> str | None:
    """Whether the HSM knows a database's credential, before a key is made with it; nothing is changed.

    The library goes by the name alone, so another softcard or card set of the same name is an error here.

    :param named: name or hash of the softcard or card set; None for module protection, of which the HSM checks nothing.
    :returns: the hash of the softcard or card set.
    :raises TdeError: ``token_absent``, ``token_ambiguous``, ``nshield_passphrase_refused``, ``nshield_authorisation_missing``.
    """
    estate = tools.usable()
    if protection == "module" or named is None:
        return None
    token = estate.find_token(protection, named)
    if sum(other.name == token.name for other in estate.tokens) > 1:
        raise TdeError(
            "token_ambiguous",
            "another softcard or card set has this name, and a credential knows no hash",
            obj=token.name,
            next_step="Make a softcard or card set of another name, and transfer the keys to it.",
        )
    if protection == "softcard":
        right = check_softcard(tools, token.hash, passphrase)
    else:
        slots = estate.slots("operator", token.hash)
        if not slots:
            raise TdeError("nshield_authorisation_missing", "none of its cards is in a slot", obj=f"card set {token.name}")
        right = all(check_card(tools, module, slot, passphrase) for module, slot in slots)
    if not right:
        raise TdeError("nshield_passphrase_refused", "does not take the passphrase", obj=token.name)
    return token.hash


def check_softcard(tools: Nshield, identifier: str, passphrase: Secret) -> bool:
    """Whether a softcard takes a passphrase (``ppmk --check``); nothing is changed.

    :raises TdeError: ``command_failed`` where that is not the reason why it fails.
    """
    said = talk(tools, ["ppmk", "--check", identifier], [Answer(ANY_PROMPT, passphrase)])
    if said.code == 0 and not said.asked_again:
        return True
    if said.asked_again or _WRONG.search(said.text):
        return False
    raise failed("ppmk", said)


def _administrators(estate: Estate, acs_passphrase: Secret | None) -> list[Answer]:
    """The answers to administrator cards' prompts: one a card, never twice."""
    quorum = estate.world.acs_quorum[0] if estate.world.acs_quorum else 1
    return [Answer(ADMIN_PROMPT, acs_passphrase, quorum)] if acs_passphrase is not None else []


def _create(tools: Nshield, estate: Estate, wish: SoftcardWish, state: StateDirectory) -> None:
    recoverable = "--recoverable" if wish.recoverable else "--non-recoverable"
    answers = [*_administrators(estate, wish.acs_passphrase), Answer(NEW_PROMPT, wish.passphrase, times=2)]
    said = talk(tools, ["ppmk", "--new", recoverable, wish.name or ""], answers)
    if said.code or said.asked_again:
        raise failed("ppmk --new", said)
    made = re.search(r"HKLTU ([0-9a-f]{40})", said.text)
    Journal(state.journal).append("create_softcard", _named(wish), key=wish.name or "", key_id=made.group(1) if made else "")
    nshield_changes.remember(state, f"softcard {wish.name} was made")


def _change(tools: Nshield, estate: Estate, identifier: str, wish: SoftcardWish, state: StateDirectory) -> None:
    old = wish.old_passphrase or wish.passphrase
    answers = [Answer(NEW_PROMPT, wish.passphrase, times=2), Answer(ANY_PROMPT, old)]
    said = talk(tools, ["ppmk", "--change", identifier], [*_administrators(estate, wish.acs_passphrase), *answers])
    if said.code or said.asked_again:
        raise failed("ppmk --change", said)
    Journal(state.journal).append("change_softcard_passphrase", _named(wish), key=wish.name or "", key_id=identifier)
    nshield_changes.remember(state, f"the passphrase of softcard {wish.name or identifier} was changed")


@dataclasses.dataclass(frozen=True)
class CardsOutcome:
    """What was done with the cards of a set.

    :ivar changed: cards that were given the passphrase now; :ivar right: those that had it already; numbers on the cards.
    :ivar unseen: cards of the set that are in no slot: a person puts each into one, and runs it again.
    """

    plan: Plan
    changed: tuple[int, ...]
    right: tuple[int, ...]
    unseen: tuple[int, ...]


def cardset_passphrase(
    tools: Nshield,
    named: str,
    passphrase: Secret,
    old_passphrase: Secret | None,
    acs_passphrase: Secret | None,
    state: StateDirectory,
    *,
    check_mode: bool = False,
) -> CardsOutcome:
    """Give all cards of a set that are in slots the same passphrase; a FIPS level 3 world asks for administrator cards.

    The cards that got it stay remembered, so that a set of more cards than slots is done in several runs.

    :raises TdeError: ``token_absent``, ``nshield_passphrase_refused``, ``nshield_authorisation_missing``.
    """
    estate = tools.usable()
    cardset = estate.find_token("ocs", named)
    credential.refuse(credential.nshield_broken_rules(None, passphrase.text()), f"card set {cardset.name}")
    slots = estate.slots("operator", cardset.hash)
    right = [slot.card for module, slot in slots if check_card(tools, module, slot, passphrase)]
    wrong = [(module, slot) for module, slot in slots if slot.card not in right]
    if wrong and old_passphrase is None:
        raise TdeError(
            "nshield_passphrase_refused",
            "a card has another passphrase, and the present one was not given",
            obj=f"card set {cardset.name}",
            next_step="Give old_passphrase.",
        )
    if wrong and estate.world.fips_level == 3 and (acs_passphrase is None or not estate.slots("admin")):
        raise TdeError(
            "nshield_authorisation_missing",
            "FIPS 140 level 3 asks for an administrator card in a slot, and its passphrase",
            obj=f"card set {cardset.name}",
        )
    plan = [
        Step(
            "change_card_passphrase",
            f"card {slot.card} of card set {cardset.name}, module {module} slot {slot.number}",
            "it has another passphrase",
            {"module": module, "slot": slot.number, "card": slot.card},
        )
        for module, slot in wrong
    ]
    if plan and not check_mode:

        def change(step: Step) -> None:
            answers = [*_administrators(estate, acs_passphrase), Answer(NEW_PROMPT, passphrase, times=2)]
            answers.append(Answer(ANY_PROMPT, old_passphrase or passphrase))
            place = ["-m", str(step.data["module"]), "-s", str(step.data["slot"])]
            said = talk(tools, ["cardpp", *place, "--change"], answers)
            if said.code or said.asked_again:
                raise failed("cardpp --change", said)
            Journal(state.journal).append("change_card_passphrase", step.obj, key=cardset.name, key_id=cardset.hash)

        with state.locked(wait_seconds=tools.timeout):
            planning.run(plan, {"change_card_passphrase": change})
    total = next((found.n for found in estate.cardsets if found.hash == cardset.hash), 0)
    seen = {slot.card for dummy, slot in slots if slot.card is not None}
    earlier = set(nshield_changes.load(state)["cards"].get(cardset.hash, []))
    restarted = any(slot.card in earlier for dummy, slot in wrong)
    done = nshield_changes.cards_done(state, cardset.hash, total, seen, restarted, write=not check_mode and bool(plan or earlier))
    return CardsOutcome(
        plan,
        tuple(slot.card or 0 for dummy, slot in wrong),
        tuple(card or 0 for card in right),
        tuple(number for number in range(1, total + 1) if number not in done),
    )


def check_card(tools: Nshield, module: int, slot: Slot, passphrase: Secret) -> bool:
    """Whether the operator card in a slot takes a passphrase (``cardpp --check``); nothing is changed."""
    said = talk(tools, ["cardpp", "-m", str(module), "-s", str(slot.number), "--check"], [Answer(ANY_PROMPT, passphrase)])
    if said.code == 0 and not said.asked_again:
        return True
    if said.asked_again or _WRONG.search(said.text):
        return False
    raise failed("cardpp --check", said)


def talk(tools: Nshield, argv: t.Sequence[str], answers: t.Sequence[Answer]) -> Said:
    """Run one of nShield's commands on a terminal."""
    return converse([tools.command(argv[0]), *argv[1:]], answers, environment=tools.environment, timeout=tools.timeout)


def failed(command: str, said: Said) -> TdeError:
    """Why a command that asked for passphrases failed."""
    if said.asked_again or _WRONG.search(said.text):
        return TdeError("nshield_passphrase_refused", f"{command}: {said.last_line}", obj="passphrase")
    return TdeError("command_failed", f"exit code {said.code}: {said.last_line}", obj=command)
