# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Does a database's access to its keys come back by itself after an outage of the HSM? A decision table, pure.

Source: Entrust's nShield integration guide for Oracle TDE, appendix, "Security Worlds, key protection, and failure recovery":
the table of twelve cells (FIPS level 2 or 3; module, softcard or OCS; stand-alone or cluster), the two remarks below it, the
sentences above it and the one after it. :data:`CELLS` is the table; :data:`REQUIREMENTS` holds each condition once.
"""

from __future__ import annotations

import dataclasses
import typing as t

#: A condition's answer: met, not met, or nobody has said.
Answer = t.Optional[bool]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the verdict stands on; None is "not known".

    :param fips_level: 2 or 3 (2 stands for every world that asks for no FIPS authorisation).
    :param protection: ``module``, ``softcard`` or ``ocs``, of the keys.
    :param cluster: more than one HSM serves the database.
    :param auto_login: the database opens its keystore by itself (Oracle's auto-login).
    :param quorum: ``(k, n)`` of the card set that holds the credential.
    :param same_passphrase: all its cards have the same passphrase.
    :param same_cardset: the cards left in the slots for the credential are all of one set.
    :param modules: how many HSMs there are; :param modules_with_credential_card: how many have a card of that set in a slot.
    :param modules_with_fips_card: how many have an operator card of any set in a slot.
    :param fips_authorisation: ``ocs`` or ``acs``: by which cards FIPS authorisation is given.
    :param same_world: softcard and cards belong to the Security World that is loaded.
    :param remote_administration: cards are read through a Remote Administration (RA) channel; :param channel_script: a script
        of the user's makes that channel again.
    :param persistent_only: the authorisation was had by a persistent operator card that is not left in the slot.
    :param cards: how many cards the set has (N), for the advice on spare ones.
    """

    fips_level: int | None
    protection: str
    cluster: bool
    auto_login: Answer = None
    quorum: tuple[int, int] | None = None
    same_passphrase: Answer = None
    same_cardset: Answer = None
    modules: int | None = None
    modules_with_credential_card: int | None = None
    modules_with_fips_card: int | None = None
    fips_authorisation: str | None = None
    same_world: Answer = None
    remote_administration: Answer = None
    channel_script: Answer = None
    persistent_only: Answer = None
    cards: int | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer.

    :ivar cell: the cell of the guide's table, such as ``fips3.softcard.cluster``; empty if the FIPS level is not known.
    :ivar automatic: True: it recovers by itself; False: something is missing; None: something is not known.
    :ivar missing: codes of what is missing; :ivar unknown: codes of what nobody has said; keys of :data:`REQUIREMENTS`.
    :ivar advice: sentences that do not decide.
    """

    cell: str
    automatic: Answer
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    advice: tuple[str, ...]

    def public(self) -> dict[str, t.Any]:
        """As a module returns it: each code with its sentence."""
        return {
            "cell": self.cell,
            "automatic": self.automatic,
            "missing": [{"code": code, "sentence": _sentence(code)} for code in self.missing],
            "unknown": [{"code": code, "sentence": _sentence(code)} for code in self.unknown],
            "advice": list(self.advice),
        }


class _Requirement(t.NamedTuple):
    sentence: str
    met: t.Callable[[Facts], Answer]


def _in_slots(found: int | None, facts: Facts) -> Answer:
    """One card in a slot; in a cluster, a card in a slot of every HSM."""
    if found is None:
        return None
    if not facts.cluster:
        return found >= 1
    return None if facts.modules is None else facts.modules > 0 and found >= facts.modules


def _not(answer: Answer) -> Answer:
    return None if answer is None else not answer


def _channel(facts: Facts) -> Answer:
    if facts.remote_administration:
        return bool(facts.channel_script)
    return _not(facts.remote_administration)


def recovery_options() -> dict[str, t.Any]:
    """What only people know of it, as options of a module; what is not given is not known."""
    names = ("cluster", "same_passphrase", "remote_administration", "channel_script", "persistent_only")
    return {name: {"type": "bool"} for name in names}


#: Every condition of the guide, once. The sentence says what must be so.
REQUIREMENTS: dict[str, _Requirement] = {
    "fips_level": _Requirement("The Security World's FIPS level is known.", lambda facts: facts.fips_level in (2, 3) or None),
    "auto_login": _Requirement(
        "The database's auto-login is set up: without it nobody gives the credential after an outage.",
        lambda facts: facts.auto_login,
    ),
    "same_world": _Requirement(
        "Softcard and operator cards belong to the Security World that is loaded.", lambda facts: facts.same_world
    ),
    "quorum_one": _Requirement(
        "The card set's quorum is 1/N: one card that is left in a slot must suffice.",
        lambda facts: None if facts.quorum is None else facts.quorum[0] == 1,
    ),
    "same_passphrase": _Requirement("All cards of the card set have the same passphrase.", lambda facts: facts.same_passphrase),
    "same_cardset": _Requirement("All cards for one credential are of the same card set.", lambda facts: facts.same_cardset),
    "credential_card_in_slot": _Requirement(
        "A card of the card set is left in a slot of the HSM; in a cluster, of every HSM.",
        lambda facts: _in_slots(facts.modules_with_credential_card, facts),
    ),
    "fips_card_in_slot": _Requirement(
        "An operator card is left in a slot of the HSM, for FIPS authorisation; in a cluster, of every HSM."
        " Of any card set: the quorum counts as 1/N and the passphrase is ignored.",
        lambda facts: _in_slots(facts.modules_with_fips_card, facts),
    ),
    "fips_not_acs": _Requirement(
        "FIPS authorisation is given by an operator card, not by an administrator card: that one does not recover by itself.",
        lambda facts: None if facts.fips_authorisation is None else facts.fips_authorisation == "ocs",
    ),
    "no_remote_channel": _Requirement(
        "Cards are in the HSM's own readers, or a script makes the Remote Administration channel again; nothing else does.",
        _channel,
    ),
    "not_persistent_only": _Requirement(
        "The card stays in the slot: authorisation by a persistent card that was taken out does not come back.",
        lambda facts: _not(facts.persistent_only),
    ),
}

_CREDENTIAL = ("quorum_one", "same_passphrase", "same_cardset", "credential_card_in_slot")
_FIPS = ("fips_not_acs", "fips_card_in_slot")
_CARDS = ("no_remote_channel", "not_persistent_only")

#: The guide's table: (FIPS level, protection) → what is asked for beside auto-login. Stand-alone and cluster ask for the same
#: conditions; for a card in "the slot" or in "the slot of every HSM" see :func:`_in_slots`.
CELLS: dict[tuple[int, str], tuple[str, ...]] = {
    (2, "module"): (),
    (2, "softcard"): ("same_world",),
    (2, "ocs"): ("same_world", *_CREDENTIAL, *_CARDS),
    (3, "module"): ("same_world", *_FIPS, *_CARDS),
    (3, "softcard"): ("same_world", *_FIPS, *_CARDS),
    # One card serves both, so the card of the credential is the one for FIPS authorisation.
    (3, "ocs"): ("same_world", *_CREDENTIAL, "fips_not_acs", *_CARDS),
}


def verdict(facts: Facts) -> Verdict:
    """Look the facts up in the table."""
    if facts.fips_level not in (2, 3):
        return Verdict("", None, (), ("fips_level",), ())
    asked = ("auto_login", *CELLS[facts.fips_level, facts.protection])
    answers = {code: REQUIREMENTS[code].met(facts) for code in asked}
    missing = tuple(code for code, answer in answers.items() if answer is False)
    unknown = tuple(code for code, answer in answers.items() if answer is None)
    cell = f"fips{facts.fips_level}.{facts.protection}.{'cluster' if facts.cluster else 'stand_alone'}"
    return Verdict(cell, False if missing else None if unknown else True, missing, unknown, _advice(facts))


def _advice(facts: Facts) -> tuple[str, ...]:
    advice = []
    if facts.protection == "ocs" and facts.cards is not None and facts.modules is not None and facts.cards <= facts.modules:
        advice.append(
            f"The card set has {facts.cards} cards for {facts.modules} HSMs: make more than there are HSMs, a lost card has no spare."
        )
    if facts.remote_administration:
        advice.append("Remote Administration is not recommended for systems that are to recover by themselves.")
    return tuple(advice)


def _sentence(code: str) -> str:
    return REQUIREMENTS[code].sentence
