# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Plans for keyslots: whatever the start, the wish and the moment of a kill, the next runs reach the wish and no key is lost."""

from __future__ import annotations

import dataclasses
import datetime
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step
from ansible_collections.hsm.tde.plugins.module_utils.engines import keyslots
from ansible_collections.hsm.tde.plugins.module_utils.engines.keyslots import Kek, Key, Slot, Token, Wanted
from hypothesis import given, settings
from hypothesis import strategies as st

DEMO, SECOND = Token("demo", "01"), Token("second", "02")
TODAY = datetime.date(2026, 11, 21)
NOW = "2026-11-21T10:00:00Z"


class Model:
    """What the store and the token do with a step, as their documentation says."""

    def __init__(self, keys: t.Sequence[Key], keks: t.Sequence[Kek], secrets: t.Mapping[str, bool] | None = None) -> None:
        self.keys = {key.key_id: key for key in keys}
        self.keks = list(keks)
        self.wanted: dict[str, Wanted] = {}
        self.uid = 100
        self.secrets = dict(secrets or {})

    def apply(self, step: Step) -> None:
        data = step.data
        if step.action == "create_kek":
            self.keks.append(Kek(Token(data["token_label"], data["token_serial"]), data["kek_label"], NOW))
            return
        key = self.keys[data["key_id"]]
        if step.action == "add_keyslot":
            self.uid += 1
            wanted = self.wanted[data["name"]]
            label = data["kek_label"]
            assert wanted.token is None or any(kek.token == wanted.token and kek.label == label for kek in self.keks)
            new = Slot(data["name"], str(self.uid), wanted.protection, NOW, None, wanted.token, label, opens=True)
            kept = tuple(slot for slot in key.slots if slot.name != data["name"] or slot.proved)
            self.keys[key.key_id] = dataclasses.replace(key, slots=(*kept, new))
        elif step.action == "prove_keyslot":
            newest = key.named(data["name"])[0]
            slots = tuple(dataclasses.replace(slot, proved=NOW) if slot.uid == newest.uid else slot for slot in key.slots)
            self.keys[key.key_id] = dataclasses.replace(key, slots=slots)
        elif step.action == "remove_keyslot":
            gone = next(slot for slot in key.slots if slot.uid == data["uid"])
            left = tuple(slot for slot in key.slots if slot.uid != gone.uid)
            assert any(slot.proved for slot in left), "the last proved keyslot was to be removed"
            self.keys[key.key_id] = dataclasses.replace(key, slots=left, formerly=(*key.formerly, gone))
        else:
            raise AssertionError(step.action)
        self.sound()

    def sound(self) -> None:
        for key in self.keys.values():
            assert any(slot.proved for slot in key.slots)


def token_slot(name: str, token: Token, label: str, uid: str, proved: bool = True) -> Slot:
    return Slot(name, uid, keyslots.TOKEN, NOW, NOW if proved else None, token, label)


tokens = st.sampled_from([DEMO, SECOND])
labels = st.sampled_from(["hsm-tde.main", "hsm-tde.main.2"])
names = st.sampled_from(["primary", "recovery", "third"])


@st.composite
def key_files(draw: st.DrawFn) -> list[Key]:
    keys = []
    for number in range(draw(st.integers(0, 3))):
        slots = []
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
            # A change of this keyslot may have been interrupted: an older one beside it, the newer proved or not.
            for copy in range(draw(st.integers(1, 2))):
                uid = f"{number}-{name}-{copy}"
                proved = copy == 0 or draw(st.booleans())
                if draw(st.booleans()):
                    slots.append(token_slot(name, draw(tokens), draw(labels), uid, proved))
                else:
                    opens = draw(st.sampled_from([True, False]))
                    slots.append(Slot(name, uid, keyslots.PASSPHRASE, NOW, NOW if proved else None, opens=opens))
        keys.append(Key(f"k{number}", "00", tuple(slots)))
    return keys


@st.composite
def wishes(draw: st.DrawFn) -> list[Wanted]:
    found = []
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        if draw(st.booleans()):
            found.append(Wanted(name, keyslots.TOKEN, draw(tokens), draw(labels)))
        else:
            found.append(Wanted(name, keyslots.PASSPHRASE))
    return found


def keks_of(keys: t.Sequence[Key]) -> list[Kek]:
    return list({(s.token, s.kek_label): Kek(s.token, s.kek_label, NOW) for k in keys for s in k.slots if s.token}.values())


@settings(max_examples=400)
@given(key_files(), wishes(), st.booleans(), st.lists(st.integers(0, 12), max_size=4))
def test_a_change_of_keyslots_survives_kills_and_settles(
    keys: list[Key], wanted: list[Wanted], exclusive: bool, kills: list[int]
) -> None:
    model = Model(keys, keks_of(keys))
    model.wanted = {one.name: one for one in wanted}
    had = {key.key_id: len({slot.name for slot in key.slots}) for key in keys}

    def plan() -> list[Step]:
        found = list(model.keys.values())
        steps = keyslots.change(found, wanted, exclusive=exclusive, no_recovery=False)
        return keyslots.master_keys(found, model.keks, wanted, steps) + steps

    if exclusive and len(wanted) == 1 and any(slot.name not in model.wanted for key in keys for slot in key.slots):
        with pytest.raises(TdeError) as caught:
            plan()
        assert caught.value.code == "recovery_keyslot_missing"
        return
    for after in kills:
        for step in plan()[:after]:
            model.apply(step)
    for step in plan():
        model.apply(step)
    assert plan() == []
    for key in model.keys.values():
        for one in wanted:
            (slot,) = key.named(one.name)
            assert slot.protection == one.protection
            assert slot.token == one.token
            assert slot.proved
            assert slot.opens is not False
        if exclusive:
            assert {slot.name for slot in key.slots} == set(model.wanted)
            continue
        assert len({slot.name for slot in key.slots}) >= had[key.key_id]


@settings(max_examples=500)
@given(
    st.lists(st.sampled_from(["hsm-tde.main", "hsm-tde.main.1"]), max_size=4),
    st.sampled_from(["2", "3"]),
    st.lists(st.integers(0, 14), max_size=4),
)
def test_a_rotation_survives_kills_and_settles_on_one_master_key(under: list[str], tag: str, kills: list[int]) -> None:
    order = ["hsm-tde.main", "hsm-tde.main.1"]
    keys = [
        Key(
            f"k{n}", "00", (token_slot("primary", DEMO, label, f"{n}p"), Slot("recovery", f"{n}r", keyslots.PASSPHRASE, NOW, NOW))
        )
        for n, label in enumerate(under)
    ]
    made = [Kek(DEMO, label, NOW) for label in order[: max((order.index(label) + 1 for label in under), default=0)]]
    model = Model(keys, made)

    def plan(**more: t.Any) -> list[Step]:
        arguments: dict[str, t.Any] = {"slot": "primary", "token": DEMO, "today": TODAY, "tag": tag, **more}
        return keyslots.rotate("main", list(model.keys.values()), model.keks, **arguments)

    model.wanted = {"primary": Wanted("primary", keyslots.TOKEN, DEMO)}
    for after in kills:
        for step in plan()[:after]:
            model.apply(step)
    # Whatever is asked next, an interrupted rotation is finished.
    for step in plan():
        model.apply(step)
    assert plan() == plan(tag=None) == []
    target = f"hsm-tde.main.{tag}"
    for key in model.keys.values():
        (slot,) = key.named("primary")
        assert slot.kek_label == target
        assert slot.proved
        assert len(key.named("recovery")) == 1
    assert keyslots.current_label("main", DEMO, list(model.keys.values()), model.keks) == target
    assert [kek.label for kek in model.keks].count(target) == 1


def rotated(*labels_: str) -> tuple[list[Key], list[Kek]]:
    """A key that went through these master keys."""
    slots = [token_slot("primary", DEMO, label, label) for label in labels_]
    return [Key("cluster", "00", (slots[-1],), tuple(slots[:-1]))], [
        Kek(DEMO, label, f"2026-0{n + 1}-01T00:00:00Z") for n, label in enumerate(labels_)
    ]


def test_a_former_tag_is_not_taken_back() -> None:
    keys, keks = rotated("hsm-tde.main", "hsm-tde.main.2", "hsm-tde.main.3")
    for former in ([], keys[0].formerly):
        with pytest.raises(TdeError) as caught:
            keyslots.rotate(
                "main",
                [dataclasses.replace(keys[0], formerly=tuple(former))],
                keks,
                slot="primary",
                token=DEMO,
                tag="2",
                today=TODAY,
            )
        assert caught.value.code == "tag_superseded"


@pytest.mark.parametrize(("days", "due"), [(30, True), (292, True), (293, False), (400, False)])
def test_max_age_rotates_what_is_older(days: int, due: bool) -> None:
    # Made on the first of February, 293 days before.
    keys, keks = rotated("hsm-tde.main", "hsm-tde.main.2")
    steps = keyslots.rotate("main", keys, keks, slot="primary", token=DEMO, max_age=days, today=TODAY)
    assert [step.data["kek_label"] for step in steps[:1]] == (["hsm-tde.main.20261121"] if due else [])


def test_an_interrupted_rotation_by_age_is_finished_when_it_is_no_longer_due() -> None:
    keys, keks = rotated("hsm-tde.main")
    keks.append(Kek(DEMO, "hsm-tde.main.20261120", "2026-11-20T00:00:00Z"))
    done = dataclasses.replace(keys[0], key_id="done", slots=(token_slot("primary", DEMO, "hsm-tde.main.20261120", "n"),))
    steps = keyslots.rotate("main", [*keys, done], keks, slot="primary", token=DEMO, max_age=30, today=TODAY)
    assert [step.action for step in steps] == ["add_keyslot", "prove_keyslot", "remove_keyslot"]
    assert steps[0].data["kek_label"] == "hsm-tde.main.20261120"


@pytest.mark.parametrize(
    ("slots", "code"),
    [
        ((Slot("primary", "1", keyslots.PASSPHRASE, NOW, NOW),), "rotation_unsupported"),
        ((token_slot("primary", SECOND, "hsm-tde.main", "1"),), "keyslot_on_other_token"),
        ((token_slot("other", DEMO, "hsm-tde.main", "1"),), "keyslot_absent"),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_a_master_key_is_made(slots: tuple[Slot, ...], code: str) -> None:
    with pytest.raises(TdeError) as caught:
        keyslots.rotate("main", [Key("cluster", "00", slots)], [], slot="primary", token=DEMO, tag="2", today=TODAY)
    assert caught.value.code == code


def test_a_token_new_to_the_cluster_keeps_the_tag() -> None:
    keys, keks = rotated("hsm-tde.main", "hsm-tde.main.2")
    assert keyslots.current_label("main", SECOND, keys, keks) == "hsm-tde.main.2"
    assert keyslots.current_label("main", DEMO, [], []) == "hsm-tde.main"


def test_a_master_key_that_a_keyslot_names_is_never_made_anew() -> None:
    keys, _keks = rotated("hsm-tde.main")
    wanted = [Wanted("third", keyslots.TOKEN, DEMO, "hsm-tde.main")]
    steps = keyslots.change(keys, wanted, exclusive=False, no_recovery=False)
    assert keyslots.master_keys(keys, [], wanted, steps) == []


def test_the_others_go_only_after_what_is_kept_was_proved_in_the_same_run() -> None:
    slots = (token_slot("primary", DEMO, "hsm-tde.main", "p"), Slot("recovery", "r", keyslots.PASSPHRASE, NOW, NOW))
    key = Key("cluster", "00", slots)
    kept = [Wanted("primary", keyslots.TOKEN, DEMO, "hsm-tde.main")]
    steps = keyslots.change([key], kept, exclusive=True, no_recovery=True)
    assert [(step.action, step.data["name"]) for step in steps] == [("prove_keyslot", "primary"), ("remove_keyslot", "recovery")]
    assert steps[0].data["kek_label"] == "hsm-tde.main"
    settled = dataclasses.replace(key, slots=slots[:1])
    assert keyslots.change([settled], kept, exclusive=True, no_recovery=True) == []


def test_a_new_data_key_wants_two_keyslots_or_the_word() -> None:
    one = [Wanted("primary", keyslots.PASSPHRASE)]
    with pytest.raises(TdeError) as caught:
        keyslots.demand_recovery(one, False, "data key cluster")
    assert caught.value.code == "recovery_keyslot_missing"
    keyslots.demand_recovery(one, True, "data key cluster")
    keyslots.demand_recovery([*one, Wanted("recovery", keyslots.PASSPHRASE)], False, "data key cluster")
