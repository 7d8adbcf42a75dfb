# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Engine fep: its configuration files, its plans and what the journal knows, without a server."""

from __future__ import annotations

import dataclasses
import datetime
import os
import random
import string
import struct
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection, SlotWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.fep import conf, look, options, plan, sql
from ansible_collections.hsm.tde.plugins.module_utils.storage import pages
from hypothesis import given
from hypothesis import strategies as st

OPTIONS = options.complete({"data_directory": "/data", "keystore_location": "/ks"}, {}, "main")
FILES = look.Files(True, "/data/postgresql.conf", "/ks/hsm-tde.conf")
ACCESS = sql.access(Connection(), "fsepuser", socket=None, port=None)
TODAY = datetime.date(2026, 11, 22)

values = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


def running(**settings: str) -> look.Server:
    """A server that works with some settings."""
    facts = sql.Facts({"open_keystore": ("pg_catalog", "pgx_open_keystore")}, settings, {}, False, {}, "1/2", False)
    return look.Server(ACCESS, None, facts=facts)


READY = running(shared_preload_libraries="tde_z", keystore_location="/ks", **{"tde_z.slot_id": "5"})
STATE = look.State(
    cluster="main", files=FILES, location=look.Location(True, True, (look.KEYSTORE,), "d"), server=READY, slot_id=5
)


def changed(**more: t.Any) -> look.State:
    return dataclasses.replace(STATE, **more)


def code(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as raised:
        act()
    return raised.value.code


@given(st.dictionaries(st.sampled_from(["keystore_location", "tde_z.SLOT_ID", "shared_preload_libraries"]), values), values)
def test_what_is_written_is_read_back(settings: dict[str, str], pin: str) -> None:
    found = conf.parse(conf.render(settings, pin))
    assert found.pop(conf.PIN.lower()) == pin
    assert found == {name.lower(): value for name, value in settings.items()}


@given(st.lists(st.sampled_from(["port = 5432", "# a comment", "", "include_if_exists 'hsm-tde.conf'", "include 'other.conf'"])))
def test_our_line_is_the_last_and_there_once(lines: list[str]) -> None:
    text = conf.with_include("\n".join(lines), "/ks/hsm-tde.conf")
    assert conf.includes(text, "/ks/hsm-tde.conf")
    assert text.count("hsm-tde.conf") == 1
    kept = [line for line in text.splitlines() if "hsm-tde" not in line]
    assert [line for line in kept if line] == [line for line in lines if line and "hsm-tde" not in line]
    assert conf.with_include(text, "/ks/hsm-tde.conf") == text
    assert not conf.includes(text + "port = 1\n", "/ks/hsm-tde.conf")


def test_lines_end_where_they_end_for_the_server() -> None:
    """str.splitlines knows more ends of lines than PostgreSQL: a comment would come alive, a PIN be cut."""
    text = "# a\x0cport = 1\u2028port = 2\n"
    assert conf.parse(text) == {}
    assert conf.with_include(text, "/ks/hsm-tde.conf").startswith(text)
    assert conf.parse(conf.render({}, "12\u202834"))[conf.PIN.lower()] == "12\u202834"


def test_a_control_character_cannot_end_a_line() -> None:
    assert code(lambda: conf.quote("12\nport = 1")) == "invalid_option"


def test_libraries_that_others_load_stay() -> None:
    wished = conf.wished(OPTIONS, 5, 'pg_stat_statements, "auto_explain",tde_kms', "")
    assert wished["shared_preload_libraries"] == "pg_stat_statements,auto_explain,tde_z"


def test_options_are_kept_from_task_to_task() -> None:
    again = options.complete({"auto_open": True}, OPTIONS.given, "main")
    assert again == dataclasses.replace(OPTIONS, auto_open=True)
    assert (again.os_user, again.key_id) == ("fsepuser", "hsm-tde.main")
    for wrong in ({"key_id": "a b"}, {"kms_name": ""}, {"data_directory": "data"}):
        assert code(lambda wrong=wrong: options.complete(wrong, {}, "main")) == "invalid_option"
    inside = options.complete({"data_directory": "/data", "keystore_location": "/data/ks"}, {}, "main")
    assert code(lambda: options.check_present(inside)) == "invalid_option"


@pytest.mark.parametrize(
    ("slots", "good"),
    [
        ([SlotWish("primary", "token")], True),
        ([SlotWish("primary", "passphrase")], False),
        ([SlotWish("primary", "token"), SlotWish("recovery", "passphrase")], False),
        ([SlotWish("other", "token")], False),
    ],
)
def test_one_keyslot_is_all_there_is(slots: list[SlotWish], good: bool) -> None:
    if good:
        assert plan.check_slots(OPTIONS, slots) is slots[0]
    else:
        assert code(lambda: plan.check_slots(OPTIONS, slots)) == "engine_unsupported"


@pytest.mark.parametrize("before", options.KINDS)
@pytest.mark.parametrize("after", options.KINDS)
def test_a_kind_of_keystore_never_changes_once_there_is_a_key(before: str, after: str) -> None:
    wished = dataclasses.replace(OPTIONS, keystore=after)
    unset = changed(location=look.Location(), server=look.Server(ACCESS, None))
    plan.check_kind(wished, before, unset)
    if before == after:
        plan.check_kind(wished, before, changed(server=look.Server(ACCESS, None)))
    else:
        assert (
            code(lambda: plan.check_kind(wished, before, changed(server=look.Server(ACCESS, None)))) == "protection_unchangeable"
        )


def test_a_master_key_is_set_once_and_on_no_standby() -> None:
    given_ = plan.Credential(True)
    assert plan.master_key(OPTIONS, STATE, given_) == []
    empty = changed(location=look.Location(True))
    assert [step.action for step in plan.master_key(OPTIONS, empty, given_)] == ["set_master_key"]
    assert code(lambda: plan.master_key(OPTIONS, empty, plan.Credential())) == "credential_missing"
    # The journal knows of a key that does not show: the folder may not be mounted.
    lost = dataclasses.replace(empty, key=look.MasterKey("", "2026-11-01T00:00:00"))
    assert code(lambda: plan.configuration(OPTIONS, lost, pin_wished=False, pin_given=True)) == "keystore_unreachable"


def test_a_pin_rests_only_where_it_is_wished() -> None:
    def steps(pin: str, wished: bool) -> list[str]:
        settings = {name.lower(): value for name, value in plan.settings(OPTIONS, STATE).items()}
        files = dataclasses.replace(FILES, included=True, settings=settings, pin=pin)
        return [step.action for step in plan.configuration(OPTIONS, changed(files=files), pin_wished=wished, pin_given=True)]

    assert steps(look.ABSENT, False) == steps(look.RIGHT, True) == []
    assert steps(look.OTHER, True) == steps(look.ABSENT, True) == steps(look.RIGHT, False) == ["write_include_file"]


def test_the_server_is_ready_when_it_works_with_what_is_wished() -> None:
    assert plan.ready(OPTIONS, STATE)
    for name, value in (("tde_z.slot_id", "4"), ("keystore_location", "/elsewhere"), ("shared_preload_libraries", "")):
        facts = dataclasses.replace(
            t.cast(sql.Facts, READY.facts), settings={**t.cast(sql.Facts, READY.facts).settings, name: value}
        )
        assert not plan.ready(OPTIONS, changed(server=dataclasses.replace(READY, facts=facts)))
    assert not plan.ready(OPTIONS, changed(server=look.Server(ACCESS, None)))


def test_it_is_known_to_be_open_in_the_life_in_which_it_was_opened() -> None:
    assert changed(life="1/2").known_open
    assert not changed(life="1/1").known_open, "the same postmaster after a crash"
    assert not changed(life="").known_open


def test_rotation_by_tag_and_by_age() -> None:
    def steps(tag: str | None = None, max_age: int | None = None, key: look.MasterKey | None = None) -> list[str]:
        found = plan.rotation(OPTIONS, changed(key=key), tag=tag, max_age=max_age, tags={"1", "2"}, today=TODAY)
        return [f"{step.action} {step.data['tag']}" for step in found]

    current = look.MasterKey("2", "2026-11-12T00:00:00")
    assert steps(tag="2", key=current) == []
    assert steps(tag="3", key=current) == ["rotate_master_key 3"]
    assert code(lambda: steps(tag="1", key=current)) == "tag_superseded"
    assert steps(max_age=10, key=current) == []
    assert steps(max_age=9, key=current) == steps(max_age=9) == ["rotate_master_key 20261122"]


def entry(seq: int, action: str, result: str, **detail: str) -> dict[str, t.Any]:
    return {
        "seq": seq,
        "time": f"2026-11-0{seq}T00:00:00",
        "cluster": "main",
        "action": action,
        "result": result,
        "detail": detail,
    }


@pytest.mark.parametrize(
    ("last", "digest", "tag", "unsettled"),
    [
        ([], "a", "", None),
        ([entry(3, look.ROTATE, "begun", tag="2", before="a")], "a", "", False),
        ([entry(3, look.ROTATE, "begun", tag="2", before="a")], "b", "2", True),
        ([entry(3, look.ROTATE, "begun", tag="2", before="a"), entry(4, look.ROTATE, "done", tag="2")], "b", "2", None),
        ([entry(3, look.ROTATE, "begun", tag="2", before="a"), entry(4, look.ROTATE, "failed", tag="2")], "b", "", None),
        ([entry(3, look.DECLARE, "begun", tag="2")], "", "", False),
    ],
)
def test_the_keystore_s_file_settles_what_a_kill_left_open(
    last: list[dict[str, t.Any]], digest: str, tag: str, unsettled: bool | None
) -> None:
    entries = [entry(1, look.SET, "begun", before=""), entry(2, look.SET, "done"), *last]
    key, open_act = look.master_key(entries, "main", digest)
    assert key is not None
    assert key.tag == tag
    assert (open_act.took if open_act else None) is unsettled


def test_a_keystore_that_does_not_show_settles_nothing() -> None:
    """A rotation that was carried out, and a file system that is not mounted at the next run: it did not fail."""
    begun = [entry(1, look.SET, "done"), entry(2, look.ROTATE, "begun", tag="2", before="a")]
    unseen = {digest: look.master_key(begun, "main", digest)[1] for digest in ("", "a", "b")}
    assert {digest: act.unseen for digest, act in unseen.items() if act} == {"": True, "a": False, "b": False}


def test_another_cluster_s_journal_says_nothing() -> None:
    assert look.master_key([{**entry(1, look.SET, "done"), "cluster": "other"}], "main", "a") == (None, None)


def test_pages_are_judged_by_what_stands_in_them() -> None:
    chance = random.Random(1)
    header = struct.pack("<QHHHHHHI", 1, 0, 0, 28, 8100, 8192, 8192 | 4, 0)
    plain = header + struct.pack("<I", 8100 | 1 << 15 | 92 << 17)
    plain += bytes(8100 - len(plain)) + (string.ascii_letters * 2)[:92].encode()
    assert pages.kind_of(plain) == pages.PLAIN
    assert pages.kind_of(bytes(pages.PAGE)) == pages.ZERO
    assert pages.kind_of(chance.randbytes(pages.PAGE)) == pages.OPAQUE
    # A header that the server leaves in the clear is no plain page.
    assert pages.kind_of(header + chance.randbytes(pages.PAGE - len(header))) == pages.OPAQUE
    assert pages.kind_of(b"a sentence, again and again. " * 400) == pages.UNCLEAR


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.sampled_from([None, 0, 5]), st.booleans())
def test_encrypted_is_said_only_if_nothing_speaks_against_it(
    plain: int, opaque: int, unclear: int, found: int, control: int | None, tablespace: bool
) -> None:
    facts = pages.PageFacts(known=2, found=found, control=control)
    facts.pages.update({pages.PLAIN: plain, pages.OPAQUE: opaque, pages.UNCLEAR: unclear})
    facts.size, facts.may_be_empty = pages.PAGE * (plain + opaque + unclear), tablespace
    verdict = pages.judge(facts)[0]
    assert (verdict == "plain") == bool(plain or found)
    assert (verdict == "encrypted") == bool(opaque and not plain and not unclear and not found and control)
    assert (verdict == "empty") == (tablespace and not (plain or opaque or unclear or found))
    facts.problems.append("1 could not be read.")
    assert pages.judge(facts)[0] in ("plain", "unknown")


def test_what_a_removed_row_leaves_in_a_page_is_not_taken_for_a_cipher_s(tmp_path: Path) -> None:
    """Two rows of 4080 bytes that nothing compresses, the second one deleted and the page pruned, as PostgreSQL 15 leaves it."""
    noise = random.Random(7).randbytes
    path = tmp_path / "pruned"
    header = struct.pack("<QHHHHHHI", 1, 0, 4, 28, 4112, 8192, 8196, 0)
    path.write_bytes(b"".join(header + struct.pack("<I", 4080 << 17 | 1 << 15 | 4112) + noise(8164) for dummy in range(4)))
    facts = pages.read([str(path)])
    facts.control = 1
    assert pages.judge(facts)[0] == "plain"
    # The header alone in the clear, above a body that is a cipher's.
    path.write_bytes(b"".join(header + noise(8168) for dummy in range(500)))
    assert pages.read([str(path)]).pages[pages.PLAIN] == 0


def test_no_file_of_a_large_place_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones took all that was to be read; a plain one after them was never looked at, and the verdict was encrypted."""
    monkeypatch.setattr(pages, "PLACE_BUDGET", 8 * pages.PAGE)
    noise = random.Random(3)
    for number in range(3):
        (tmp_path / str(number)).write_bytes(noise.randbytes(8 * pages.PAGE))
    (tmp_path / "3").write_bytes(struct.pack("<QHHHHHHI", 1, 0, 0, 24, 8192, 8192, 8196, 0) + bytes(8168))
    facts = pages.read(sorted(str(path) for path in tmp_path.iterdir()))
    facts.control = 1
    assert pages.judge(facts)[0] == "plain"
    assert facts.size <= 8 * pages.PAGE
    assert facts.unread == 3


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1")
    (tmp_path / "2").write_bytes(b"x" * (pages.FILE_BUDGET + 1))
    (tmp_path / "3").symlink_to("/etc/passwd")
    facts = pages.read([str(tmp_path / name) for name in ("1", "2", "3", "gone")], known=[b"xxxx"])
    assert (facts.files, facts.read, facts.unread, facts.found, len(facts.problems)) == (4, 1, 1, 1, 2)
    notes = pages.told("place", "/place", facts, [])["notes"]
    assert notes == ["Of 1 of the files no more than the beginning was read."]
