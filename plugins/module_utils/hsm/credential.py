# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The credential by which Oracle TDE reaches keys in an nShield HSM: ``passphrase``, or ``passphrase|name`` of a softcard or card set.

A credential that the library does not recognise is taken for a module passphrase, without a word, and the keys made with it
come under module protection. So every rule is checked here, before anybody sees the credential.

Source of all lengths and characters: Entrust's nShield integration guide for Oracle TDE, appendix, "About the HSM credential".
"""

from __future__ import annotations

import string
import typing as t

from ..common.errors import TdeError
from ..common.secret import Secret

#: The whole string that Oracle's SQL takes, separator included.
MAX_TOTAL = 30
#: Of a name, and of a passphrase beside a name: one character for each other part and the separator.
MAX_PART = 28
#: nShield's own limit for names and passphrases, far above Oracle's.
MAX_NSHIELD = 254

SEPARATORS = ("|", ":")

_ALPHANUMERIC = string.ascii_letters + string.digits
NAME_CHARACTERS = frozenset(_ALPHANUMERIC + "$-_")
#: What nShield takes in a passphrase, and Oracle's SQL does not, is the last argument.
PASSPHRASE_CHARACTERS = frozenset(_ALPHANUMERIC + "!@#$%^&*-_+=[]{}\\,.?/~<>();")
NSHIELD_PASSPHRASE_CHARACTERS = PASSPHRASE_CHARACTERS | frozenset("|:'`\"")

#: Every rule: its name, and what it says. Never a value.
RULES: dict[str, str] = {
    "name_missing": "a softcard or card set is named in the credential",
    "name_unexpected": "module protection has no name: with one, the credential would be taken for a softcard's or card set's",
    "name_length": f"a name has 1 to {MAX_PART} characters",
    "name_characters": "a name has only A-Z a-z 0-9 $ - _ (7-bit ASCII, no white space)",
    "passphrase_length": f"a passphrase has 1 to {MAX_PART} characters, without a name to {MAX_TOTAL}",
    "passphrase_separator": "a passphrase has no | and no : because they separate it from the name",
    "passphrase_quote": "a passphrase has no \" and no ' because Oracle's SQL takes them for quotes",
    "passphrase_white_space": "a passphrase has no white space",
    "passphrase_characters": r"a passphrase has only A-Z a-z 0-9 ! @ # $ % ^ & * - _ + = [ ] { } \ , . ? / ~ < > ( ) ; (7-bit ASCII)",
    "total_length": f"passphrase, separator and name have {MAX_TOTAL} characters together at most",
    "wallet_manager": "Oracle Wallet Manager asks for 8 characters at least, letters together with digits or special characters",
    "nshield_name_length": f"nShield takes names of 1 to {MAX_NSHIELD} characters",
    "nshield_passphrase_length": f"nShield takes passphrases of 1 to {MAX_NSHIELD} characters",
    "nshield_passphrase_characters": "nShield takes passphrases of printable 7-bit ASCII without white space",
}

PROTECTIONS = ("module", "softcard", "ocs")


def broken_rules(protection: str, passphrase: str, name: str | None = None, *, wallet_manager: bool = False) -> list[str]:
    """The rules that a credential breaks, by their names in :data:`RULES`, in the table's order; empty if it may be used.

    :param protection: ``module``, ``softcard`` or ``ocs``.
    :param name: of the softcard or card set; None for module protection.
    :param wallet_manager: judge the strength as Oracle Wallet Manager does, too.
    """
    broken = _of_name(protection, name) + _of_passphrase(passphrase, MAX_TOTAL if protection == "module" else MAX_PART)
    # Where a part alone is too long, that is the rule that broke.
    parts_fit = "name_length" not in broken and "passphrase_length" not in broken
    if protection != "module" and name is not None and parts_fit and len(passphrase) + 1 + len(name) > MAX_TOTAL:
        broken.append("total_length")
    if wallet_manager and not _strong(passphrase):
        broken.append("wallet_manager")
    return broken


def nshield_broken_rules(name: str | None, passphrase: str | None) -> list[str]:
    """The rules of nShield alone, for a token that Oracle does not use."""
    broken = []
    if name is not None:
        if not 1 <= len(name) <= MAX_NSHIELD:
            broken.append("nshield_name_length")
        if not NAME_CHARACTERS.issuperset(name):
            broken.append("name_characters")
    if passphrase is not None:
        if not 1 <= len(passphrase) <= MAX_NSHIELD:
            broken.append("nshield_passphrase_length")
        if not NSHIELD_PASSPHRASE_CHARACTERS.issuperset(passphrase):
            broken.append("nshield_passphrase_characters")
    return broken


def _of_name(protection: str, name: str | None) -> list[str]:
    if protection == "module":
        return [] if name is None else ["name_unexpected"]
    if name is None:
        return ["name_missing"]
    broken = [] if 1 <= len(name) <= MAX_PART else ["name_length"]
    return broken if NAME_CHARACTERS.issuperset(name) else [*broken, "name_characters"]


def _of_passphrase(passphrase: str, longest: int) -> list[str]:
    broken = [] if 1 <= len(passphrase) <= longest else ["passphrase_length"]
    rest = set(passphrase) - PASSPHRASE_CHARACTERS
    for rule, characters in (
        ("passphrase_separator", {*SEPARATORS}),
        ("passphrase_quote", {'"', "'"}),
        ("passphrase_white_space", {character for character in rest if character.isspace()}),
    ):
        if rest & characters:
            broken.append(rule)
            rest -= characters
    return [*broken, "passphrase_characters"] if rest else broken


def _strong(passphrase: str) -> bool:
    letters = [character for character in passphrase if character in string.ascii_letters]
    return len(passphrase) >= 8 and bool(letters) and len(letters) < len(passphrase)


def refuse(broken: t.Sequence[str], obj: str) -> None:
    """Raise for broken rules, each in its own words, never with a value.

    :raises TdeError: ``credential_forbidden``; ``details.rules`` names them.
    """
    if broken:
        raise TdeError(
            "credential_forbidden",
            "; ".join(RULES[rule] for rule in broken),
            obj=obj,
            kept="It was not tried anywhere, and nothing was changed.",
            details={"rules": list(broken)},
        )


def compose(
    protection: str,
    passphrase: Secret | None,
    name: str | None = None,
    *,
    separator: str = "|",
    wallet_manager: bool = False,
) -> Secret:
    """The credential as Oracle's SQL takes it between ``IDENTIFIED BY "`` and ``"``.

    :raises TdeError: ``credential_forbidden``, ``credential_missing``, ``invalid_option``.
    """
    if protection not in PROTECTIONS or separator not in SEPARATORS:
        raise TdeError(
            "invalid_option", "protection is module, softcard or ocs; the separator is | or :", obj="Oracle credential"
        )
    if passphrase is None:
        raise TdeError("credential_missing", "no passphrase was given", obj="Oracle credential", next_step="Give it.")
    try:
        text = passphrase.text()
    except UnicodeDecodeError:
        refuse(["passphrase_characters"], "Oracle credential")
        raise
    refuse(broken_rules(protection, text, name, wallet_manager=wallet_manager), f"Oracle credential ({protection})")
    return Secret(text if name is None else f"{text}{separator}{name}")
