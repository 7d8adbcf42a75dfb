"""Every rule of the guide on names and passphrases, each by a value that breaks only that rule, and both ways by Hypothesis."""

from __future__ import annotations

import re
import string

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.hsm.tde.plugins.filter.oracle_credential import oracle_credential
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.hsm import credential
from hypothesis import given, settings
from hypothesis import strategies as st

#: (rule, protection, passphrase, name): the value breaks this rule and no other.
BREAKING = [
    ("name_missing", "softcard", "Passw0rd", None),
    ("name_missing", "ocs", "Passw0rd", None),
    ("name_unexpected", "module", "Passw0rd", "softcard1"),
    ("name_length", "softcard", "p", ""),
    ("name_length", "softcard", "p", "n" * 29),
    ("name_characters", "softcard", "Passw0rd", "soft card"),
    ("name_characters", "softcard", "Passw0rd", "soft\tcard"),
    ("name_characters", "softcard", "Passw0rd", "soft|card"),
    ("name_characters", "softcard", "Passw0rd", "soft:card"),
    ("name_characters", "softcard", "Passw0rd", 'soft"card'),
    ("name_characters", "softcard", "Passw0rd", "soft'card"),
    ("name_characters", "softcard", "Passw0rd", "soft.card"),
    ("name_characters", "softcard", "Passw0rd", "soft@card"),
    ("name_characters", "ocs", "Passw0rd", "kärtchen"),
    ("passphrase_length", "softcard", "", "n"),
    ("passphrase_length", "softcard", "p" * 29, "n"),
    ("passphrase_length", "module", "", None),
    ("passphrase_length", "module", "p" * 31, None),
    ("passphrase_separator", "softcard", "pass|word", "n"),
    ("passphrase_separator", "softcard", "pass:word", "n"),
    ("passphrase_separator", "module", "pass|word", None),
    ("passphrase_quote", "softcard", 'pass"word', "n"),
    ("passphrase_quote", "softcard", "pass'word", "n"),
    ("passphrase_white_space", "softcard", "pass word", "n"),
    ("passphrase_white_space", "softcard", "password\n", "n"),
    ("passphrase_white_space", "module", "pass\u00a0word", None),
    ("passphrase_characters", "softcard", "pass`word", "n"),
    ("passphrase_characters", "softcard", "pässword", "n"),
    ("passphrase_characters", "softcard", "pass\x07word", "n"),
    ("total_length", "softcard", "p" * 15, "n" * 15),
    ("total_length", "ocs", "p" * 28, "nn"),
    ("total_length", "ocs", "pp", "n" * 28),
]


@pytest.mark.parametrize(("rule", "protection", "passphrase", "name"), BREAKING)
def test_a_value_that_breaks_one_rule_is_refused_for_that_rule(rule, protection, passphrase, name):
    assert credential.broken_rules(protection, passphrase, name) == [rule]
    with pytest.raises(TdeError) as caught:
        credential.compose(protection, Secret(passphrase), name)
    assert caught.value.code == "credential_forbidden"
    assert caught.value.details == {"rules": [rule]}
    assert credential.RULES[rule] in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "passphrase"), [("wallet_manager", "Pa55w0r"), ("wallet_manager", "passwords"), ("wallet_manager", "12345678")]
)
def test_wallet_manager_s_strength_is_asked_for_on_wish(rule, passphrase):
    assert credential.broken_rules("softcard", passphrase, "n") == []
    assert credential.broken_rules("softcard", passphrase, "n", wallet_manager=True) == [rule]
    assert credential.broken_rules("softcard", "passw0rd", "n", wallet_manager=True) == []


@pytest.mark.parametrize(
    ("rule", "name", "passphrase"),
    [
        ("nshield_name_length", "n" * 255, "p"),
        ("nshield_name_length", "", "p"),
        ("name_characters", "a b", "p"),
        ("nshield_passphrase_length", "n", "p" * 255),
        ("nshield_passphrase_characters", "n", "a b"),
        ("nshield_passphrase_characters", "n", "ä"),
    ],
)
def test_nshield_s_own_rules(rule, name, passphrase):
    assert credential.nshield_broken_rules(name, passphrase) == [rule]
    assert credential.nshield_broken_rules("n" * 254, "|:'`\"" + "p" * 249) == []


def test_every_rule_has_a_value_that_breaks_only_it():
    tried = {row[0] for row in BREAKING} | {"wallet_manager"}
    assert tried == {rule for rule in credential.RULES if not rule.startswith("nshield_")}


@pytest.mark.parametrize("character", sorted("!@#$%^&*-_+=[]{}\\,.?/~<>();" + string.ascii_letters + string.digits))
def test_every_permitted_character_is_accepted_in_a_passphrase(character):
    assert credential.compose("softcard", Secret(character), "n").text() == f"{character}|n"


@pytest.mark.parametrize(
    ("protection", "passphrase", "name", "separator", "composed"),
    [
        ("module", "p" * 30, None, "|", "p" * 30),
        ("softcard", "p", "n" * 28, "|", "p|" + "n" * 28),
        ("ocs", "p" * 28, "n", ":", "p" * 28 + ":n"),
        ("softcard", "p" * 14, "n" * 15, "|", "p" * 14 + "|" + "n" * 15),
    ],
)
def test_the_longest_credentials(protection, passphrase, name, separator, composed):
    assert credential.compose(protection, Secret(passphrase), name, separator=separator).text() == composed


# The guide's rules once more, as one pattern a protection, written apart from the code.
_PASSPHRASE = r"[A-Za-z0-9!@#$%^&*\-_+=\[\]{}\\,.?/~<>();]"
_WITH_NAME = re.compile(rf"(?=.{{3,30}}\Z)({_PASSPHRASE}{{1,28}})\|([A-Za-z0-9$\-_]{{1,28}})", re.ASCII)
_MODULE = re.compile(rf"{_PASSPHRASE}{{1,30}}", re.ASCII)

_CHARACTERS = st.one_of(
    st.sampled_from(string.printable), st.characters(), st.sampled_from("!@#$%^&*-_+=[]{}\\,.?/~<>();|:'\"` ")
)
_TEXTS = st.one_of(
    st.text(_CHARACTERS, max_size=33),
    st.text(string.ascii_letters + string.digits + "$-_", max_size=31),
)


@given(_TEXTS, st.one_of(st.none(), _TEXTS), st.sampled_from(["module", "softcard", "ocs"]))
def test_accepted_is_exactly_what_the_guide_permits(passphrase, name, protection):
    if protection == "module":
        permitted = name is None and _MODULE.fullmatch(passphrase) is not None
    else:
        found = name is not None and _WITH_NAME.fullmatch(f"{passphrase}|{name}")
        permitted = bool(found) and (found.group(1), found.group(2)) == (passphrase, name)
    broken = credential.broken_rules(protection, passphrase, name)
    assert (broken == []) == permitted
    assert set(broken) <= set(credential.RULES)


# The first error of Ansible loads what it is shown with.
@settings(deadline=None)
@given(st.text("".join(sorted(credential.NAME_CHARACTERS)), min_size=12, max_size=60), st.sampled_from(["|", " ", "'", "ä", ""]))
def test_no_message_holds_the_passphrase(passphrase, wrong):
    wrong = wrong or "n" * 30
    with pytest.raises(AnsibleFilterError) as caught:
        oracle_credential(passphrase + wrong, name="softcard1")
    # Rules name single characters; a run of the value's would be a leak.
    assert passphrase not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_the_filter_composes():
    assert oracle_credential("Passw0rd", name="oracle-tde") == "Passw0rd|oracle-tde"
    assert oracle_credential("Passw0rd", name="oracle-tde", separator=":") == "Passw0rd:oracle-tde"
    assert oracle_credential("Passw0rd") == "Passw0rd"


@pytest.mark.parametrize("arguments", [{"passphrase": 1234}, {"passphrase": "Passw0rd", "name": 12}, {"passphrase": None}])
def test_the_filter_refuses_what_yaml_did_not_read_as_text(arguments):
    with pytest.raises(AnsibleFilterError) as caught:
        oracle_credential(**arguments)
    assert "1234" not in str(caught.value)
