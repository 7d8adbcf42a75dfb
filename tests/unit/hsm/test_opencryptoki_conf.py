# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki's configuration files: edited without touching a byte beside, judged as each version's own parser does."""

from __future__ import annotations

import re
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_conf as conf
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_rules as rules
from hypothesis import given, settings
from hypothesis import strategies as st

OLD, MIDDLE, DOTTED, NEW, GROUPS = (3, 8), (3, 15), (3, 12), (3, 23), (3, 24)

#: As Debian's packages and the projects' own documentation have them; nothing of it is a daemon's comment text.
DEBIAN_12 = """version opencryptoki-3.1

# The following defaults are defined:
#\thwversion = 0.0
#   slot 0
#   {
#      hwversion = 2.32
#   }
slot 0
{
stdll = libpkcs11_tpm.so
}

slot 4
{
stdll = libpkcs11_ep11.so
confname = ep11tok.conf
}
"""
RED_HAT_9 = """version opencryptoki-3.19
disable-event-support
statistics (on,implicit)

slot 1 { # the accelerator
    stdll = libpkcs11_ica.so
    tokversion = 3.12   # as migrated
}
slot 3
{
    stdll = libpkcs11_sw.so

    # the payroll's
    tokname = "payroll"
    description = "Payroll of the third floor"
    hwversion = "2.32"
    tokversion = 3.12
}
"""


def taken(text: str, version: rules.Version) -> list[str]:
    return [str(problem) for problem in rules.problems(text, version)]


def slot(*lines: str, number: t.Any = 3) -> str:
    return f"version opencryptoki-3.x\nslot {number}\n{{\n" + "".join(f"{line}\n" for line in lines) + "}\n"


SW = "stdll = libpkcs11_sw.so"


@pytest.mark.parametrize("version", [(3, 8), (3, 12), (3, 15), (3, 17), (3, 18), (3, 23), (3, 27)])
def test_what_every_version_takes(version: rules.Version) -> None:
    assert taken(DEBIAN_12, version) == []
    assert taken(slot(SW, "description = Linux", 'manufacturer = "A B"', 'hwversion = "2.32"'), version) == []


def test_what_newer_versions_take() -> None:
    assert taken(RED_HAT_9, NEW) == []
    assert conf.slots(RED_HAT_9) == {
        1: {"stdll": "libpkcs11_ica.so", "tokversion": "3.12"},
        3: {
            "stdll": "libpkcs11_sw.so",
            "tokname": "payroll",
            "description": "Payroll of the third floor",
            "hwversion": "2.32",
            "tokversion": "3.12",
        },
    }
    assert taken(slot(SW, "usergroup = payroll"), GROUPS) == []
    assert "disable-event-support" in taken(RED_HAT_9, MIDDLE)[0]


@pytest.mark.parametrize(
    ("version", "text", "line", "reason"),
    [
        (OLD, slot(SW, "# a comment"), 5, "no comment and no empty line"),
        (OLD, slot("", SW), 4, "no comment and no empty line"),
        (OLD, "slot 3 # mine\n{\n" + SW + "\n}\n", 1, "is not expected"),
        (OLD, slot(SW, "description = My own token"), 5, "several words needs double quotes"),
        (MIDDLE, slot(SW, "description = My own token"), 5, "several words needs double quotes"),
        (NEW, slot(SW, "description = My own token"), 5, "several words needs double quotes"),
        (OLD, slot("tokname = 17", SW), 4, "17 alone is read as a number"),
        (NEW, slot("tokname = 17", SW), 4, "17 alone is read as a number"),
        (OLD, slot(SW, "tokversion = 3.12"), 5, "knows no tokversion (3.12 does)"),
        (NEW, slot(SW, "usergroup = payroll"), 5, "knows no usergroup (3.24 does)"),
        (NEW, slot(SW, "colour = red"), 5, "knows no colour"),
        (DOTTED, slot(SW, "hwversion = 2.32"), 5, "in double quotes only"),
        (OLD, slot("tokname = a"), 2, "has no stdll"),
        (NEW, slot(SW) + slot(SW, "tokname = b").split("\n", 1)[1], 6, "slot 3 is there twice, first on line 2"),
        (NEW, slot(SW) + slot(SW, number=4).split("\n", 1)[1], 6, "the same token folder, swtok"),
        (NEW, slot(SW, number=1024), 2, "slots go from 0 to 1023"),
        (NEW, slot(SW, "tokname = ../x"), 5, "plain name of a folder"),
        (GROUPS, slot(SW, "tokname = HSM_MK_CHANGE"), 5, "plain name of a folder"),
        (NEW, slot(SW, f'description = "{"x" * 65}"'), 5, "more than 64 bytes"),
        (NEW, slot(SW, 'description = ""'), 5, "empty value"),
        (NEW, slot(SW, "description = a$b"), 5, "needs double quotes"),
        (OLD, slot(SW).replace("{\n", "{\r\n"), 3, "Unix line ends"),
        (NEW, slot(SW)[:-2], 3, "brace that does not close"),
        (NEW, "slot 3\n{\nstdll =\n}\n", 3, "stdll has no value"),
        (OLD, "disable-event-support\n" + slot(SW), 1, "is not expected"),
        (OLD, slot(SW).replace("slot 3\n{", "slot 3{"), 2, "a brace needs a blank"),
        (NEW, "statistics (loud)\n", 1, "not loud"),
        (NEW, 'version opencryptoki-3.x\nslot 3\n{\ndescription = "no end\n}\n', 4, "quote that does not end"),
    ],
)
def test_what_a_version_does_not_take_is_told_with_its_line(version: rules.Version, text: str, line: int, reason: str) -> None:
    found = rules.problems(text, version)
    assert found[0].line == line
    assert reason in found[0].reason


def test_a_comment_within_braces_is_right_since_3_15() -> None:
    text = slot(SW, "# a comment", "")
    assert taken(text, OLD)
    assert taken(text, (3, 14))
    assert taken(text, MIDDLE) == []
    assert taken(text, NEW) == []


@pytest.mark.parametrize("text", [DEBIAN_12, RED_HAT_9, slot(SW), "", "version x", "\n\n# only this", "slot 3 { stdll = a.so }"])
def test_nothing_changes_where_nothing_is_wished(text: str) -> None:
    for number, present in conf.slots(text).items():
        assert conf.set_slot(text, number, present) == text
        assert conf.set_slot(text, number, {"usergroup": None}) == text
    assert conf.remove_slot(text, 900) == text
    assert conf.set_flag(text, "no-such-word", False) == text
    assert conf.encode(conf.decode(text.encode())) == text.encode()


def test_bytes_that_are_no_utf8_stay() -> None:
    raw = b"# caf\xe9\nversion x\n" + slot(SW).encode()
    assert conf.encode(conf.set_slot(conf.decode(raw), 3, {"tokname": "a"})).startswith(b"# caf\xe9\n")


def test_a_value_is_changed_in_its_place() -> None:
    text = conf.set_slot(RED_HAT_9, 3, {"description": "Another", "tokname": "payroll"})
    assert text == RED_HAT_9.replace('"Payroll of the third floor"', "Another")


def test_a_key_is_added_in_the_manner_of_its_neighbours() -> None:
    text = conf.set_slot(RED_HAT_9, 1, {"description": "two words"})
    assert text == RED_HAT_9.replace(
        "tokversion = 3.12   # as migrated\n", 'tokversion = 3.12   # as migrated\n    description = "two words"\n', 1
    )
    assert taken(text, NEW) == []
    one_line = conf.set_slot("slot 3 { stdll = libpkcs11_sw.so }\n", 3, {"tokname": "a"})
    assert conf.slots(one_line) == {3: {"stdll": "libpkcs11_sw.so", "tokname": "a"}}


def test_a_key_goes_with_its_line_and_nothing_else() -> None:
    text = conf.set_slot(RED_HAT_9, 1, {"tokversion": None})
    assert text == RED_HAT_9.replace("    tokversion = 3.12   # as migrated\n", "")


def test_a_new_slot_stands_behind_the_last_one() -> None:
    text = conf.set_slot(DEBIAN_12 + "# the end\n", 7, {"stdll": "libpkcs11_sw.so", "tokname": "a", "hwversion": "1.2"})
    assert text == DEBIAN_12 + '\nslot 7\n{\nstdll = libpkcs11_sw.so\ntokname = a\nhwversion = "1.2"\n}\n# the end\n'
    assert taken(text, OLD) == []
    assert conf.set_slot("", 0, {"stdll": "a.so"}) == "slot 0\n{\nstdll = a.so\n}\n"


def test_a_slot_goes_and_its_neighbours_stay() -> None:
    text = conf.remove_slot(DEBIAN_12, 0)
    assert text == DEBIAN_12.replace("slot 0\n{\nstdll = libpkcs11_tpm.so\n}\n", "")
    assert conf.slots(conf.remove_slot(text, 4)) == {}


def test_statistics_and_events() -> None:
    text = conf.set_flag(conf.set_statistics(DEBIAN_12, ["off"]), "disable-event-support", True)
    assert taken(text, NEW) == []
    assert conf.set_statistics(text, ["off"]) == text
    assert conf.set_flag(text, "disable-event-support", True) == text
    back = conf.set_flag(conf.set_statistics(text, ["on", "internal"]), "disable-event-support", False)
    assert "disable-event-support" not in back
    assert "statistics (on,internal)\n" in back


@pytest.mark.parametrize("value", ["", 'a"b', "a\nb", " a", "a "])
def test_a_value_that_no_version_can_read(value: str) -> None:
    with pytest.raises(TdeError) as caught:
        conf.set_slot(DEBIAN_12, 4, {"description": value})
    assert caught.value.code == "invalid_option"


# --- the tokens' own files

EP11 = "#\n# adapters\n#      APQN_ANY\n\nAPQN_ANY\n# the end\n"


def test_adapters_of_an_ep11_token() -> None:
    listed = conf.set_apqns(EP11, [(3, 0x11), (10, 0x11)], "APQN_ALLOWLIST")
    assert rules.ep11_problems(listed, NEW) == []
    assert conf.set_apqns(listed, [(3, 0x11), (10, 0x11)], "APQN_ALLOWLIST") == listed
    assert "#      APQN_ANY\n" in listed
    assert conf.set_apqns(listed, None, "APQN_ALLOWLIST").count("APQN_ANY") == 2
    decimal = EP11.replace("\nAPQN_ANY\n", "\nAPQN_WHITELIST\n 3 17 # first\n 0x0a 0x11\nEND\n")
    assert conf.set_apqns(decimal, [(3, 17), (10, 17)], "APQN_ALLOWLIST") == decimal, "the same adapters, as somebody wrote them"


def test_an_ep11_tokens_file_is_judged() -> None:
    pattern = "0123456789abcdef" * 2
    text = conf.set_keyword(conf.set_flag(EP11, "STRICT_MODE", True), "EXPECTED_WKVP", pattern, quoted=True)
    assert rules.ep11_problems(text, NEW) == []
    assert "knows no EXPECTED_WKVP" in str(rules.ep11_problems(text, MIDDLE)[-1])
    changed = conf.set_keyword(text, "EXPECTED_WKVP", "ff" * 16, quoted=True)
    assert changed == text.replace(pattern, "ff" * 16)
    assert conf.remove_keyword(changed, "EXPECTED_WKVP").count("WKVP") == 0
    for wrong, reason in (
        (text.replace(pattern, "0123"), "16 bytes"),
        (text.replace(f'"{pattern}"', "abc"), "16 bytes"),
        (text + "FIPS_SESSION_MODE\n", "excludes"),
        (text + "APQN_ALLOWLIST\n 1 2\nEND\n", "exclude each other"),
        (text + "APQN_ALLOWLIST\n 1 2\n", "has no END"),
        (text.replace("\nAPQN_ANY\n", "\nAPQN_ALLOWLIST\n 1 256\nEND\n"), "no adapter or domain"),
        (text.replace("\nAPQN_ANY\n", "\nAPQN_ALLOWLIST\n 1 2 3\nEND\n"), "pairs"),
        (text.replace("\nAPQN_ANY\n", "\n"), "neither"),
        (text + "PKEY_MODE ALWAYS\n", "PKEY_MODE is one of"),
        (text + "COLOUR\n", "knows no COLOUR"),
    ):
        assert reason in " ".join(map(str, rules.ep11_problems(wrong, NEW))), wrong


def test_patterns_of_a_cca_token() -> None:
    text = conf.set_expected_mkvps("version cca-0\n# a comment\n", {"AES": "0123456789abcdef", "SYM": "00" * 8})
    assert rules.cca_problems(text, NEW) == []
    assert conf.set_expected_mkvps(text, {"SYM": "00" * 8, "AES": "0123456789abcdef"}) == text
    assert conf.set_expected_mkvps(text, {}) == "version cca-0\n# a comment\n"
    assert "8 bytes" in str(rules.cca_problems(text.replace("0123456789abcdef", "0123"), NEW)[0])
    assert "reads no file" in str(rules.cca_problems(text, OLD)[0])


# --- whatever a file looks like

_WORDS = st.sampled_from(["libpkcs11_sw.so", "a", '"two words"', "swtok", "3.12", '"# no comment"', "/abs/olute", '"é"'])
_COMMENT = st.sampled_from(["# one", "#", "#slot 9 { stdll = x }", '# "quoted', "# } {", "#é \t", "# stdll = libpkcs11_ica.so"])
_GAP = st.sampled_from(["", "\n", "  \n", "\t\n\n"])
_KEYS = st.sampled_from(["stdll", "tokname", "description", "hwversion", "confname", "manufacturer"])


@st.composite
def _lines(draw: st.DrawFn) -> str:
    pieces = []
    for _round in range(draw(st.integers(0, 4))):
        indent, comment = draw(st.sampled_from(["", "  ", "\t"])), draw(st.none() | _COMMENT)
        equal = draw(st.sampled_from(["=", " = ", "\t= "]))
        pieces.append(f"{indent}{draw(_KEYS)}{equal}{draw(_WORDS)}{f' {comment}' if comment else ''}\n")
        pieces.append(draw(st.sampled_from(["", "", "\n"])) + (f"{indent}{draw(_COMMENT)}\n" if draw(st.booleans()) else ""))
    return "".join(pieces)


@st.composite
def files(draw: st.DrawFn) -> str:
    pieces = [draw(st.sampled_from(["", "version opencryptoki-3.x\n", "# first\nversion x # behind\n"]))]
    for number in draw(st.lists(st.integers(0, 9), max_size=4, unique=True)):
        pieces += [draw(_GAP), f"{draw(_COMMENT)}\n" if draw(st.booleans()) else ""]
        opening = draw(st.sampled_from([" {", "\n{", "\n\n  {", "{", " # mine\n{"]))
        behind = draw(st.sampled_from(["\n", " # behind\n", "\n\n"]))
        pieces.append(f"slot {number}{opening}{draw(st.sampled_from([chr(10), ' # in' + chr(10)]))}{draw(_lines())}}}{behind}")
    pieces.append(draw(st.sampled_from(["", "# last", "disable-event-support\n", "statistics (on) # few\n"])))
    return "".join(pieces)


def comments(text: str) -> list[str]:
    return [token.text for token in conf.tokens(text) if token.kind == "comment"]


def round_trip(text: str, number: int, key: str) -> None:
    assert "".join(token.text for token in conf.tokens(text)) == text
    present = conf.slots(text)
    for slot_number, values in present.items():
        if all(
            len([1 for i in b.items if i.key == k]) == 1
            for b in conf.slot_blocks(text)
            if b.number == slot_number
            for k in values
        ):
            assert conf.set_slot(text, slot_number, {k: v for k, v in values.items() if v == v.strip()}) == text
    changed = conf.set_slot(text, number, {key: "wished"})
    assert comments(changed) == comments(text), "every comment stays, in order"
    wish = {**present, number: {**present.get(number, {}), key: "wished"}}
    assert conf.slots(changed) == wish
    assert conf.set_slot(changed, number, {key: "wished"}) == changed
    removed = conf.remove_slot(changed, number)
    assert conf.slots(removed) == {slot: values for slot, values in present.items() if slot != number}
    inside = [c for b in conf.slot_blocks(changed) if b.number == number for c in comments(changed[b.start : b.end])]
    for comment in inside:
        assert comments(changed).count(comment) > 0
    assert sorted(comments(removed) + inside) == sorted(comments(changed)), "the slot's own go with it, no other"
    # What is neither the slot nor an empty line is as it was.
    assert [line for line in removed.splitlines() if line.strip()] == [
        line for line in _without_slot(changed, number).splitlines() if line.strip()
    ]


def _without_slot(text: str, number: int) -> str:
    for block in reversed([block for block in conf.slot_blocks(text) if block.number == number]):
        text = text[: block.start] + re.sub(r"^[ \t]+", "", text[block.end :])
    return text


@settings(max_examples=200, deadline=None)
@given(files(), st.integers(0, 10), _KEYS)
def test_round_trips(text: str, number: int, key: str) -> None:
    round_trip(text, number, key)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(files(), st.integers(0, 10), _KEYS)
def test_ten_thousand_round_trips(text: str, number: int, key: str) -> None:
    round_trip(text, number, key)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='slot 3{}="#\n\tab.,()', max_size=80))
def test_any_text_parses_or_is_refused_with_a_line(text: str) -> None:
    for version in (OLD, MIDDLE, NEW):
        for problem in rules.problems(text, version):
            assert problem.line <= text.count("\n") + 1
    for problem in rules.ep11_problems(text, NEW) + rules.cca_problems(text, NEW):
        assert problem.reason
