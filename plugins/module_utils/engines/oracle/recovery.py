# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A keystore with auto-login relies on access to the HSM that comes back by itself: nShield's recovery matrix says whether it does.

It is asked before anything is made. Where auto-login is in use already a card that was taken out must not keep an operator from
opening the keystore: then it is told, and not refused.
"""

from __future__ import annotations

from ...common.errors import TdeError
from ...hsm import nshield_recovery
from ...hsm.nshield import recovery_facts
from ...hsm.nshield_recovery import Verdict
from .facts import Guard
from .memo import Memo
from .options import Options


def found(guard: Guard | None, options: Options) -> Verdict | None:
    """The matrix' answer; None where nobody relies on it.

    :raises TdeError: ``token_absent``, ``token_ambiguous``, and those of nShield's commands.
    """
    if guard is None or not guard.hsm or not options.auto_login:
        return None
    estate = options.tools().inspect()
    if guard.name is not None:
        # A name that was mistyped is no card of another world.
        estate.find_token(guard.protection, guard.name)
    told = options.recovery or {}
    people = {name: told.get(name) for name in nshield_recovery.recovery_options()}
    return nshield_recovery.verdict(
        recovery_facts(estate, {"protection": guard.protection, "token": guard.name, "auto_login": True, **people})
    )


def judge(guard: Guard, options: Options, memo: Memo) -> list[str]:
    """Before a keystore is made or changed. :returns: what is to be told, in sentences.

    :raises TdeError: ``nshield_recovery_attended``, and as :func:`found`.
    """
    verdict = found(guard, options)
    if verdict is None:
        return []
    in_use = memo.change is not None or bool(memo.secret and memo.guard == guard)
    if verdict.missing and not in_use:
        raise TdeError(
            "nshield_recovery_attended",
            f"would not open by itself after an outage. Missing: {_sentences(verdict.missing)}",
            obj=f"keystore with auto-login under {guard.words}",
            details={"recovery": verdict.public()},
        )
    return list(sentences(verdict))


def sentences(verdict: Verdict) -> tuple[str, ...]:
    """What a verdict says of a keystore with auto-login; nothing where it recovers by itself."""
    told = []
    if verdict.missing:
        told.append(f"After an outage of the HSM the keystore does not open by itself. Missing: {_sentences(verdict.missing)}")
    elif verdict.unknown:
        told.append(
            "Whether the keystore opens by itself after an outage of the HSM is not known. It must be so, and what nShield does not"
            f" tell is told in oracle.recovery: {_sentences(verdict.unknown)}"
        )
    return (*told, *verdict.advice)


def _sentences(codes: tuple[str, ...]) -> str:
    return " ".join(f"{nshield_recovery.REQUIREMENTS[code].sentence} ({code})" for code in codes)
