# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The verdict, by the thousand on generated facts, and each of its reasons."""

from __future__ import annotations

import copy
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.hsm import cryptocard, cryptocard_verdict
from ansible_collections.hsm.tde.plugins.module_utils.hsm.cryptocard_verdict import Card, Facts, Queue, Register, Verdict
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = cryptocard_verdict.MASTER_KEYS
#: Few patterns, so that equal ones are common.
PATTERNS = {"aes": (tree.AES, tree.OTHER_AES), "apka": (tree.APKA,), "asym": ("0" * 31 + "1",), "wk": (tree.WK, tree.OTHER_WK)}

STATUSES = ("online", "offline", "deconfigured", "checkstopped", "unbound", "unknown")


def register(state: str, pattern: str | None = None) -> Register:
    return {"state": state, "pattern": pattern}


def healthy(cards: t.Sequence[str], domains: t.Sequence[str], usage: list[str] | None) -> Facts:
    """A system where nothing is wrong.

    :param cards: their modes.
    """
    facts: Facts = {
        "present": True,
        "message": "There is none.",
        "bus": {
            "default_domain": "0005",
            "max_domain": "0054",
            "usage_domains": usage,
            "control_domains": usage,
            "features": [],
        },
        "cards": [],
        "queues": [],
    }
    for number, mode in enumerate(cards):
        card: Card = {
            "id": f"{number:02x}",
            "type": "CEX8C",
            "mode": mode,
            "status": "online",
            "restricted": False,
            "hwtype": 14,
            "requests": 1,
            "driver": "cex4card",
            "serial": None,
        }
        facts["cards"].append(card)
        for domain in domains:
            held = {
                key: {"new": register("empty"), "current": register("valid", PATTERNS[key][0]), "old": register("invalid")}
                for key in KEYS.get(mode, ())
            }
            queue: Queue = {
                "id": f"{number:02x}.{domain}",
                "card": f"{number:02x}",
                "domain": domain,
                "type": "CEX8C",
                "mode": mode,
                "status": "online",
                "requests": 1,
                "driver": "cex4queue",
                "se_bind": None,
                "se_associate": None,
                "master_keys": held,
            }
            facts["queues"].append(queue)
    return facts


def harm(draw: st.DrawFn, facts: Facts) -> None:
    """Change one thing, mostly for the worse."""
    kinds = ["key", "key", "key", "key", "queue", "queue"] * bool(facts["queues"]) + ["card"] * bool(facts["cards"]) + ["bus"]
    kind = draw(st.sampled_from(kinds))
    if kind == "bus":
        kind = draw(st.sampled_from(["default_domain", "usage_domains", "present"]))
        if kind == "present":
            facts["present"] = False
        elif kind == "default_domain":
            facts["bus"]["default_domain"] = draw(st.sampled_from([None, "0006", "0009"]))
        else:
            facts["bus"]["usage_domains"] = draw(st.sampled_from([None, ["0005"], ["0006"], []]))
    elif kind == "card":
        card = draw(st.sampled_from(facts["cards"]))
        if draw(st.booleans()):
            card["status"] = draw(st.sampled_from(STATUSES))
        else:
            card["restricted"] = draw(st.sampled_from([True, None]))
    elif kind == "queue":
        queue = draw(st.sampled_from(facts["queues"]))
        field = draw(st.sampled_from(["status", "status", "gone", "se_bind", "se_associate"]))
        if field == "gone":
            facts["queues"].remove(queue)
        elif field == "status":
            queue["status"] = draw(st.sampled_from([*STATUSES, "reserved"]))
        elif field == "se_bind":
            queue["se_bind"] = draw(st.sampled_from(["bound", "unbound"]))
        else:
            queue["se_associate"] = draw(st.sampled_from(["associated 0", "unassociated", "association pending"]))
    else:
        keys = draw(st.sampled_from(facts["queues"]))["master_keys"]
        key = draw(st.sampled_from(sorted(keys) or ["none"]))
        if key in keys:
            patterns = PATTERNS[key]
            which = draw(st.sampled_from(["current", "current", "current", "new", "old", "gone"]))
            if which == "gone":
                del keys[key]
            else:
                states = {"current": "valid", "old": "valid", "new": "full"}
                empty = register(draw(st.sampled_from(["invalid", "unknown"])))
                keys[key][which] = draw(
                    st.sampled_from([*(register(states[which], pattern) for pattern in reversed(patterns)), empty])
                )


@st.composite
def systems(draw: st.DrawFn) -> Facts:
    """A healthy system, and up to four things that are not."""
    modes = st.sampled_from(["cca", "cca", "cca", "ep11", "ep11", "ep11", "accelerator", "unknown"])
    cards = draw(st.sampled_from([2, 3, 1, 2, 3, 0]).flatmap(lambda number: st.lists(modes, min_size=number, max_size=number)))
    usage = draw(st.sampled_from([None, ["0005", "0006"]]))
    facts = healthy(cards, draw(st.sampled_from([["0005"], ["0005", "0006"]])), usage)
    for dummy in range(draw(st.integers(0, 4))):
        harm(draw, facts)
    return facts


wishes = st.sampled_from(
    [{}, {"aes": tree.AES}, {"aes": tree.AES, "apka": tree.APKA}, {"wk": tree.WK[:32]}, {"aes": tree.AES, "wk": tree.WK[:32]}]
)
modes = st.sampled_from([None, None, "cca", "ep11"])


def usable(facts: Facts, name: str) -> bool:
    """Whether a program can use the queue: the rules said a second time, in another way."""
    card = next((card for card in facts["cards"] if card["id"] == name[:2]), None)
    queue = next((queue for queue in facts["queues"] if queue["id"] == name), None)
    return bool(
        card
        and queue
        and card["status"] == queue["status"] == "online"
        and not card["restricted"]
        and queue["se_bind"] in (None, "bound")
        and queue["se_associate"] in (None, "associated 0")
    )


def current(queue: Queue, key: str) -> str | None:
    return queue["master_keys"].get(key, {"current": {"state": "unknown", "pattern": None}})["current"]["pattern"]


def holds(facts: Facts, names: t.Sequence[str], judged: set[str], wish: t.Mapping[str, str]) -> bool:
    """Whether all these queues hold what is wished, or the same where nothing is."""
    queues = [queue for queue in facts["queues"] if queue["id"] in names]
    for mode in judged:
        same = [queue for queue in queues if queue["mode"] == mode]
        wished = [key for key in KEYS[mode] if key in wish]
        if wished:
            if any((current(queue, key) or "")[: len(wish[key])] != wish[key] for queue in same for key in wished):
                return False
            continue
        if any(current(queue, KEYS[mode][0]) is None for queue in same):
            return False
        for key in KEYS[mode]:
            known = [
                queue
                for queue in same
                if queue["master_keys"].get(key, {}).get("current", {}).get("state", "unknown") != "unknown"
            ]
            if len({current(queue, key) for queue in known}) > 1:
                return False
    return True


def judged_modes(wish: t.Mapping[str, str], mode: str | None) -> set[str]:
    return {mode} if mode else {name for name in KEYS if any(key in wish for key in KEYS[name])} or set(KEYS)


def sound(verdict: Verdict) -> None:
    assert verdict["ready"] == (not verdict["reasons"])
    assert len(verdict["codes"]) == len(verdict["reasons"])
    assert len(set(verdict["reasons"])) == len(verdict["reasons"])
    assert all(reason.endswith(".") for reason in verdict["reasons"])
    assert "master_keys_differ" not in verdict["codes"] or verdict["codes"][0] == "master_keys_differ"


def judge_default(facts: Facts, wish: dict[str, str], mode: str | None) -> None:
    before = copy.deepcopy(facts)
    verdict = cryptocard_verdict.default_domain(facts, wish, mode)
    sound(verdict)
    assert facts == before
    judged = judged_modes(wish, mode)
    domain, usage = facts["bus"]["default_domain"], facts["bus"]["usage_domains"]
    names = [f"{card['id']}.{domain}" for card in facts["cards"] if card["mode"] in judged]
    assert verdict["ready"] == (
        facts["present"]
        and domain is not None
        and (usage is None or domain in usage)
        and bool(names)
        and all(usable(facts, name) for name in names)
        and holds(facts, names, judged, wish)
    )
    assert cryptocard_verdict.ready(facts, wish, mode=mode) == verdict


def judge_usage(facts: Facts, wish: dict[str, str], mode: str | None) -> None:
    verdict = cryptocard_verdict.usage_domains(facts, wish, mode)
    sound(verdict)
    judged, usage = judged_modes(wish, mode), facts["bus"]["usage_domains"]
    online = {card["id"] for card in facts["cards"] if card["status"] == "online"}
    names = [
        queue["id"]
        for queue in facts["queues"]
        if queue["mode"] in judged
        and queue["card"] in online
        and queue["status"] == "online"
        and (usage is None or queue["domain"] in usage)
    ]
    if facts["present"]:
        assert verdict["queues"] == names
    assert verdict["ready"] == (
        facts["present"] and bool(names) and all(usable(facts, name) for name in names) and holds(facts, names, judged, wish)
    )


def judge_named(facts: Facts, wish: dict[str, str], mode: str | None, names: list[str]) -> None:
    verdict = cryptocard_verdict.ready(facts, wish, mode=mode, queues=names)
    sound(verdict)
    judged = judged_modes(wish, mode)
    right = {queue["id"] for queue in facts["queues"] if queue["mode"] in judged}
    assert verdict["ready"] == (
        facts["present"]
        and set(names) <= right
        and all(usable(facts, name) for name in names)
        and holds(facts, names, judged, wish)
    )


named = st.lists(st.sampled_from(["00.0005", "00.0006", "01.0005", "02.0006", "7f.0001"]), unique=True)


@settings(deadline=None, max_examples=1000)
@given(systems(), wishes, modes, named)
def test_ready_exactly_when_every_queue_in_question_holds_the_key(
    facts: Facts, wish: dict[str, str], mode: str | None, names: list[str]
) -> None:
    judge_default(facts, wish, mode)
    judge_usage(facts, wish, mode)
    judge_named(facts, wish, mode, names)


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000)
@given(systems(), wishes, modes, named)
def test_the_same_ten_thousand_times(facts: Facts, wish: dict[str, str], mode: str | None, names: list[str]) -> None:
    judge_default(facts, wish, mode)
    judge_usage(facts, wish, mode)
    judge_named(facts, wish, mode, names)


def two(first: str = "", second: str = "", **more: str) -> dict[int, tree.Card]:
    """Two CCA cards with the default domain."""
    return {
        0: tree.card("cca", {5: tree.queue(first or tree.cca())}),
        1: tree.card("cca", {5: tree.queue(second or tree.cca(), **more)}),
    }


def verdict_of(tmp_path: Path, cards: dict[int, tree.Card], wish: dict[str, str] | None = None, **bus: t.Any) -> Verdict:
    return cryptocard_verdict.default_domain(cryptocard.read(str(tree.build(tmp_path, tree.bus(**bus), cards))), wish or {})


CCA = {"aes": tree.AES}


@pytest.mark.parametrize(
    ("cards", "bus", "codes", "said"),
    [
        ({}, {}, ["no_card"], "no crypto adapter"),
        (
            {3: tree.card("accelerator", {5: tree.queue()})},
            {},
            ["no_coprocessor"],
            "No card is a coprocessor in CCA mode; there are 03 (accelerator)",
        ),
        (two(), {"default": -1}, ["default_domain_unset"], "set one (chzcrypt -q 5 sets 0005)."),
        (
            two(),
            {"default": 9},
            ["default_domain_unavailable"],
            "The default domain 0009 is no usage domain of this system (its usage domains are 0005, 0006)",
        ),
        (two(), {"usage": (16, 17)}, ["default_domain_unavailable"], "set another default (chzcrypt -q 16 sets 0010), or have"),
        (two(), {"usage": ()}, ["default_domain_unavailable"], "(it has none): set another default, or have"),
        (two(online="0"), {}, ["queue_offline"], "Queue 01.0005 is offline"),
        (two(online="", driver="vfio_ap"), {}, ["queue_reserved"], "reserved for KVM guests"),
        (two(online="", driver=""), {}, ["queue_unbound"], "no driver"),
        (two(online=""), {}, ["queue_unknown"], "does not say whether it is online"),
        (two(chkstop="1"), {}, ["queue_checkstopped"], "checkstopped"),
        (two(config="0"), {}, ["queue_deconfigured"], "deconfigured, as its card is"),
        ({**two(), 2: tree.card("cca", {6: tree.queue(tree.cca())})}, {}, ["queue_absent"], "Card 02 has no queue 02.0005"),
        ({**two(), 2: tree.card("cca", {5: tree.queue()}, online="0")}, {}, ["card_offline"], "Card 02 is offline"),
        ({**two(), 2: tree.card("cca", {}, config="0")}, {}, ["card_deconfigured"], "chzcrypt --config-on 02"),
        ({**two(), 2: tree.card("cca", {}, chkstop="1")}, {}, ["card_checkstopped"], "the adapter failed"),
        ({**two(), 2: tree.card("cca", {}, online="", driver="")}, {}, ["card_unbound"], "Card 02 has no driver"),
        (
            {2: tree.card("cca", {5: tree.queue(tree.cca())}, ap_functions="0x92400000")},
            {},
            ["functions_restricted"],
            "clear keys only",
        ),
        (two(se_bind="unbound"), {}, ["queue_not_bound"], "chzcrypt --se-bind 01.0005"),
        (two(se_bind="bound", se_associate="unassociated"), {}, ["queue_not_associated"], "--se-associate INDEX 01.0005"),
        (
            two(second=tree.SILENT_CCA),
            {},
            ["master_key_unknown"],
            "Queue 01.0005: the pattern of the AES master key cannot be told",
        ),
        (
            two(second=tree.cca(None)),
            {},
            ["master_keys_differ", "master_key_missing"],
            "00.0005 holds the expected AES master key (pattern 2d6f1a5be9c08347) and 01.0005 does not",
        ),
        (
            two(second=tree.cca(tree.OTHER_AES)),
            {},
            ["master_keys_differ", "master_key_other"],
            "the cause of failures that come and go",
        ),
        (
            two(second=tree.cca(tree.OTHER_AES, new=tree.AES)),
            {},
            ["master_keys_differ", "master_key_not_set"],
            "waits for being set",
        ),
        (two(second=tree.cca(None, new=tree.AES)), {}, ["master_keys_differ", "master_key_not_set"], "waits for being set"),
        (
            two(second=tree.cca(tree.OTHER_AES, old=tree.AES)),
            {},
            ["master_keys_differ", "master_key_changed"],
            "must be re-enciphered",
        ),
        (
            two(tree.cca(tree.OTHER_AES), tree.cca(tree.OTHER_AES)),
            {},
            ["master_key_other", "master_key_other"],
            "Queue 00.0005: the AES master key has the pattern 77e1f0a2b3c4d596, not the expected pattern 2d6f1a5be9c08347.",
        ),
        (
            two(tree.cca(None), tree.cca(None)),
            {},
            ["master_key_missing", "master_key_missing"],
            "Queue 00.0005 holds no AES master key (invalid).",
        ),
        (two(), {}, [], ""),
    ],
)
def test_each_reason(tmp_path: Path, cards: dict[int, tree.Card], bus: dict[str, t.Any], codes: list[str], said: str) -> None:
    verdict = verdict_of(tmp_path, cards, CCA, **bus)
    sound(verdict)
    assert verdict["codes"] == codes
    assert said in " ".join(verdict["reasons"])


def test_where_no_queue_holds_the_expected_key_none_is_held_against_another(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, two(tree.cca(tree.OTHER_AES), tree.cca(None)), CCA)
    assert verdict["codes"] == ["master_key_other", "master_key_missing"]


def test_a_card_is_blamed_once_for_all_its_queues(tmp_path: Path) -> None:
    cards = {0: tree.card("cca", {5: tree.queue(), 6: tree.queue()}, online="0")}
    facts = cryptocard.read(str(tree.build(tmp_path, tree.bus(), cards)))
    assert cryptocard_verdict.ready(facts, CCA, queues=["00.0005", "00.0006"])["codes"] == ["card_offline"]


def test_without_a_wish_the_queues_must_agree(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, two(second=tree.cca(apka=None)))
    assert verdict["codes"] == ["master_keys_differ"]
    assert (
        f"00.0005 holds the APKA master key with pattern {tree.APKA}, 01.0005 holds no APKA master key" in verdict["reasons"][0]
    )


def test_a_key_that_nobody_asks_for_may_differ(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, two(second=tree.cca(apka=None)), CCA)["ready"]


def test_cards_of_another_mode_are_not_judged(tmp_path: Path) -> None:
    cards = {**two(), 2: tree.card("ep11", {5: tree.queue(tree.ep11(None))})}
    facts = cryptocard.read(str(tree.build(tmp_path, tree.bus(), cards)))
    assert cryptocard_verdict.default_domain(facts, CCA)["ready"]
    assert cryptocard_verdict.default_domain(facts, {}, "cca")["ready"]
    assert cryptocard_verdict.default_domain(facts)["codes"] == ["master_key_missing"]
    assert cryptocard_verdict.ready(facts, CCA, queues=["02.0005"])["codes"] == ["queue_other_mode"]
    assert cryptocard_verdict.ready(facts, CCA, queues=["07.0005"])["codes"] == ["card_absent"]


def test_a_committed_wrapping_key_waits(tmp_path: Path) -> None:
    cards = {2: tree.card("ep11", {5: tree.queue(tree.ep11(None, new=tree.WK))})}
    verdict = verdict_of(tmp_path, cards)
    assert verdict["reasons"] == ["Queue 02.0005 holds no wrapping key (invalid). One is loaded and waits for being set."]


def test_no_queue_online(tmp_path: Path) -> None:
    cards = {0: tree.card("cca", {5: tree.queue(online="0")})}
    facts = cryptocard.read(str(tree.build(tmp_path, tree.bus(), cards)))
    verdict = cryptocard_verdict.usage_domains(facts, CCA)
    assert verdict == {
        "queues": [],
        "ready": False,
        "codes": ["no_queue_online"],
        "reasons": ["No CCA queue of this system is online."],
    }


@settings(deadline=None)
@given(st.sampled_from(sorted(PATTERNS)), st.data())
def test_patterns_are_taken_with_and_without_prefix(name: str, data: st.DataObject) -> None:
    digits = cryptocard_verdict.PATTERN_DIGITS[name]
    text = data.draw(st.text("0123456789abcdefABCDEF", min_size=digits, max_size=digits))
    for form in (text, f"0x{text}", f" {text.upper()} "):
        assert cryptocard_verdict.expected_patterns({name: form}) == {name: text.lower()}
    assert cryptocard_verdict.expected_patterns({name: None}) == {}


def test_every_code_is_documented() -> None:
    """The words of the verdict in RETURN, and no others."""
    import re

    from ansible_collections.hsm.tde.plugins.modules import cryptocard_info

    source = Path(cryptocard_verdict.__file__).read_text(encoding="utf-8")
    words = set(re.findall(r'Finding\(\s*"([a-z_]+)"', source))
    words |= {f"card_{status}" for status in (*cryptocard_verdict._CARD_STATUS, "unknown")}
    words |= {f"queue_{status}" for status in (*cryptocard_verdict._QUEUE_STATUS, "unknown")}
    listed = cryptocard_info.RETURN[cryptocard_info.RETURN.index("A stable word") :].partition("type: list")[0]
    assert set(re.findall(r"V\(([a-z_]+)\)", listed)) == words
