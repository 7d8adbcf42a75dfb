# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the engine mariadb decides, and what it reads off files: pure functions."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import Connection, MoveWish, TablespaceWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.keyslots import Key, Wanted
from ansible_collections.hsm.tde.plugins.module_utils.engines.mariadb import (
    conf,
    former,
    gaps,
    keyfile,
    logs,
    look,
    options,
    pages,
    plan,
    sql,
)
from ansible_collections.hsm.tde.plugins.module_utils.engines.mariadb.keyfile import Name
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import server
from ansible_collections.hsm.tde.plugins.module_utils.keystore.format import check_value
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

OPTIONS = options.complete("main", {"include_directory": "/etc/x", "key_directory": "/run/k"}, {}, socket=None, user=None)
FIRST = [Name(number, tablespace) for number, tablespace in keyfile.FIRST.items()]
KEYS = [Key(name.key_id, f"check{name.number}", ()) for name in FIRST]
KEY = b"k" * 32
ACCESS = sql.access(Connection(), "mysql", path="/s", user=None)


def table(name: str, engine: str = "InnoDB", database: str = "shop") -> sql.Table:
    return sql.Table(database, name, engine, f"{database}/{name}", 1)


def answer(spaces: t.Mapping[str, int | None], tables: t.Sequence[sql.Table] = (), **more: t.Any) -> sql.Server:
    """A server with tablespaces under keys, None for one that is plain."""
    found = tuple(sql.Space(name, f"./{name}.ibd", key is not None, key or 0) for name, key in spaces.items())
    wish = plan.include_wish(OPTIONS, FIRST)
    fields: dict[str, t.Any] = {
        "version": "10.11", "account": "root", "data_directory": "/d", "variables": {**wish.at_start, **wish.dynamic},
        "plugins": {conf.PLUGIN: "FORCE_PLUS_PERMANENT"}, "databases": ("shop", "other"), "spaces": found, "tables": tuple(tables),
        "replicas": 0, "logs": (), **more,
    }  # fmt: skip
    return sql.Server(**fields)


def state(said: sql.Server | None = None, **more: t.Any) -> look.State:
    """A server with our keys in memory, started after they came there."""
    keys = keyfile.KeyFile({name.number: f"check{name.number}" for name in FIRST}, dict.fromkeys(keyfile.FIRST, 5.0))
    include = conf.render("main", plan.include_wish(OPTIONS, FIRST))
    found = look.State(ACCESS, "/d", True, keys, include, 0.0, look.Process(1, 10.0), said or answer({}), None, None)
    return dataclasses.replace(found, **more)


def actions(steps: t.Iterable[t.Any]) -> list[str]:
    return [step.action for step in steps]


# --- names and the key file


@given(st.dictionaries(st.integers(1, 2**32 - 1), st.binary(min_size=32, max_size=32), min_size=1, max_size=5))
def test_a_key_file_tells_its_keys(keys: dict[int, bytes]) -> None:
    since = {number: number / 8 for number in keys}
    content = keyfile.render(keys, since)
    assert keyfile.keys_of(content) == keys
    found = keyfile.parse(content)
    assert found.checks == {number: check_value(key) for number, key in keys.items()}
    assert all(abs(found.since[number] - since[number]) < 0.001 for number in keys)


def test_names_of_data_keys() -> None:
    assert keyfile.parse_name("key.12.a.b-c") == Name(12, "a.b-c")
    assert [keyfile.parse_name(name) for name in ("key.0.x", "key.3", "cluster", "key.3.", "key.03.x")] == [None] * 5
    assert keyfile.current([*FIRST, Name(7, "default"), Name(4, "sealed")]) == {
        "system": 1,
        "temporary": 2,
        "default": 7,
        "sealed": 4,
    }
    for wrong in (["cluster"], ["key.3.a", "key.3.b"]):
        with pytest.raises(TdeError) as caught:
            keyfile.names(wrong)
        assert caught.value.code == "keystore_foreign"


# --- what the server is given


def test_the_include_file_names_its_cluster_and_stops_a_start_without_keys() -> None:
    text = conf.render("main", plan.include_wish(OPTIONS, FIRST))
    assert conf.owner(text) == "main"
    assert b"\nfile_key_management = FORCE_PLUS_PERMANENT\n" in text
    assert b"\ninnodb_default_encryption_key_id = 3\n" in text
    assert conf.owner(b"[mariadb]\n") is None


def test_keys_come_before_the_settings_that_name_them() -> None:
    steps = plan.delivery(OPTIONS, "main", state(keys=None, include=None, answer=answer({}, plugins={})), KEYS)
    assert actions(steps) == ["write_key_file", "write_include"]
    assert plan.delivery(OPTIONS, "main", state(), KEYS) == []
    coming = plan.delivery(OPTIONS, "main", state(), KEYS, [Name(4, "default")])
    assert actions(coming) == ["write_key_file", "write_include"], "the default is not set before the server has read it"
    changed = state(answer({}, variables={**answer({}).variables, "innodb_encrypt_tables": "OFF"}))
    assert [step.obj for step in plan.delivery(OPTIONS, "main", changed, KEYS)] == ["variable innodb_encrypt_tables"]


@pytest.mark.parametrize(
    ("include", "said", "code"),
    [
        (b"[mariadb]\n", {}, "file_foreign"),
        (conf.MARK.encode() + b"other: x\n", {}, "file_foreign"),
        (None, {"plugins": {"hashicorp_key_management": "ON"}}, "encryption_foreign"),
        (None, {"variables": {"file_key_management_filename": "/theirs"}}, "encryption_foreign"),
        (None, {"plugins": {}, "variables": {"wsrep_on": "ON"}}, "engine_unsupported"),
        (None, None, "server_down"),
    ],
)
def test_what_is_not_ours_is_left_alone(include: bytes | None, said: dict[str, t.Any] | None, code: str) -> None:
    looked = state(include=include)
    if said is None:
        looked = dataclasses.replace(looked, answer=None, error=TdeError("server_down", "does not answer"))
    else:
        looked = dataclasses.replace(looked, answer=answer({}, **said))
    with pytest.raises(TdeError) as caught:
        plan.delivery(OPTIONS, "main", looked, KEYS)
    assert caught.value.code == code


def test_why_a_server_must_be_restarted() -> None:
    assert plan.restart_reasons(OPTIONS, state(), FIRST) == []
    assert plan.restart_reasons(OPTIONS, state(answer({}, plugins={})), FIRST) == ["It has not loaded file_key_management."]
    off = {**answer({}).variables, "encrypt_binlog": "OFF"}
    assert plan.restart_reasons(OPTIONS, state(answer({}, variables=off)), FIRST) == ["It has other values of encrypt_binlog."]
    late = keyfile.KeyFile(dict.fromkeys(keyfile.FIRST, ""), {**dict.fromkeys(keyfile.FIRST, 5.0), 3: 20.0})
    assert plan.restart_reasons(OPTIONS, state(keys=late), FIRST) == ["It has not read key 3."]
    assert plan.restart_reasons(OPTIONS, state(answer({"shop/a": 3}), keys=late), FIRST) == [], "it uses it"
    assert plan.restart_reasons(OPTIONS, state(include=None), FIRST) == []


def test_a_server_that_was_restarted_in_vain() -> None:
    with pytest.raises(TdeError) as caught:
        plan.restart_reasons(OPTIONS, state(answer({}, plugins={}), include_age=1e9), FIRST)
    assert caught.value.code == "setting_ineffective"


# --- a server that a key file of its own encrypts

TAKEN = options.Former("/theirs", "AES_CBC", "c", ("key.1.system", "key.5.default"))
#: ``1;`` and 7 in 64 digits, with the salt 0102030405060708 and the password secret.
OPENSSL = bytes.fromhex(
    "53616c7465645f5f0102030405060708c72d47e946de4ea72ac4f0af75ba24268019be4ba5c0d57e9422fe8ec7ae9bff"
    "ba80a57a64b6a1ede34fc21a2395f8179e0171cbb7d25a969fa069627729dcfca6dedfdfe9b212aa734add76798d50e2"
)
AFTER = dataclasses.replace(OPTIONS, former=TAKEN)


def on_file(path: str) -> sql.Server:
    """A server that works with a key file."""
    return answer({}, variables={**answer({}).variables, "file_key_management_filename": path})


def test_the_lines_of_a_former_key_file() -> None:
    content = f"# a note\n\n1;{'AB' * 32}\n 7 ;{'cd' * 16} # b\n300;{'0f' * 24}".encode()
    assert former.parsed(content, "/k") == {1: b"\xab" * 32, 7: b"\xcd" * 16, 300: b"\x0f" * 24}
    for wrong in (
        f"2;{'ab' * 32}",
        f"1;{'ab' * 32}\n1;{'ab' * 32}",
        f"1;{'ab' * 15}",
        f"1;{'ab' * 33}",
        f"0;{'ab' * 32}",
        "1 2",
        "",
    ):
        with pytest.raises(TdeError) as caught:
            former.parsed(wrong.encode(), "/k")
        assert caught.value.code == "former_key_file_unreadable", wrong


def test_a_key_file_that_openssl_encrypted() -> None:
    made = former.decrypted(OPENSSL, b"secret", "/k")
    assert former.parsed(made, "/k") == {1: bytes(31) + b"\7"}
    for content, password in ((OPENSSL, b"secreu"), (OPENSSL[:-1], b"secret")):
        with pytest.raises(TdeError) as caught:
            former.parsed(former.decrypted(content, password, "/k"), "/k")
        assert caught.value.code == "former_key_file_unreadable"


def test_what_keys_of_a_former_file_are_called() -> None:
    assert former.names([1, 2, 5, 7], 5) == (Name(1, "system"), Name(2, "temporary"), Name(5, "default"), Name(7, "former.7"))
    assert former.names([1, 5], 1) == (Name(1, "system"), Name(5, "former.5")), "key 1 is never that of a tablespace"
    assert former.names([1, 5, 7], 7, [Name(5, "default")])[1:] == (Name(5, "default"), Name(7, "former.7")), "a name stays"
    assert keyfile.first([]) == FIRST
    assert keyfile.first([Name(1, "system"), Name(3, "former.3")]) == [Name(2, "temporary"), Name(4, "default")]
    assert keyfile.first([*FIRST, Name(9, "default")]) == []


def test_the_settings_of_a_server_keep_its_cipher_and_end_its_password() -> None:
    text = conf.render("main", plan.include_wish(AFTER, [Name(1, "system"), Name(5, "default")])).decode()
    for line in ("encryption_algorithm = AES_CBC", "filekey =", "filename = /run/k/keys"):
        assert f"\nfile_key_management_{line}\n" in text
    assert "\ninnodb_default_encryption_key_id = 5\n" in text
    assert b"filekey" not in conf.render("main", plan.include_wish(OPTIONS, FIRST))


@pytest.mark.parametrize(
    ("memory", "store", "refused"),
    [
        ({}, {1: "a"}, False),
        ({1: "a"}, {1: "a", 2: "b"}, False),
        # A damaged line, among others of ours.
        ({1: "x", 2: "b"}, {1: "a", 2: "b"}, False),
        ({1: "x"}, {1: "a"}, True),
        ({1: "a"}, {}, True),
        ({1: "a", 2: "b"}, {1: "a"}, True),
    ],
)
def test_keys_that_are_in_memory_only_are_left_there(memory: dict[int, str], store: dict[int, str], refused: bool) -> None:
    here = dataclasses.replace(state(), keys=keyfile.KeyFile(memory, dict.fromkeys(memory, 0.0)))
    keys = [Key(f"key.{number}.t{number}", check, ()) for number, check in store.items()]
    if not refused:
        plan.check_memory("main", here, keys)
        return
    with pytest.raises(TdeError) as caught:
        plan.check_memory("main", here, keys)
    assert caught.value.code == "keystore_unreachable"


def test_a_server_gets_our_keys_once_all_of_its_own_are_in_the_store() -> None:
    keys = [Key("key.1.system", "a", ()), Key("key.5.default", "b", ())]
    here = dataclasses.replace(state(on_file("/theirs"), include=None, former=former.Lying("c", False)), keys=None)
    assert actions(plan.delivery(AFTER, "main", here, keys))[:2] == ["write_key_file", "write_include"]
    for options_, looked, there in (
        (AFTER, here, keys[:1]),
        (AFTER, dataclasses.replace(here, former=former.Lying("d", False)), keys),
        (AFTER, dataclasses.replace(here, answer=on_file("/another")), keys),
        (OPTIONS, here, keys),
    ):
        with pytest.raises(TdeError) as caught:
            plan.delivery(options_, "main", looked, there)
        assert caught.value.code == "encryption_foreign"


def test_the_former_file_goes_when_the_server_works_with_ours() -> None:
    lying = former.Lying("c", False)
    assert plan.removal(AFTER, state(on_file("/theirs"), former=lying)) == []
    assert plan.removal(AFTER, state(former=None)) == []
    assert plan.removal(AFTER, state(answer=None, former=lying)) == []
    assert actions(plan.removal(AFTER, state(former=lying))) == ["remove_former_key_file"]
    for wrong in (former.Lying("d", False), former.Lying("", False, "belongs to user id 7")):
        with pytest.raises(TdeError) as caught:
            plan.removal(AFTER, state(former=wrong))
        assert caught.value.code == "file_foreign"


def test_a_store_with_another_key_of_the_number_takes_none() -> None:
    taken = former.Taken(TAKEN, {"key.1.system": Secret(KEY)})
    former.check_store(taken, {"key.1.system": check_value(KEY), "key.2.temporary": "x"})
    with pytest.raises(TdeError) as caught:
        former.check_store(taken, {"key.1.system": "other"})
    assert caught.value.code == "encryption_foreign"


def test_the_record_tells_the_former_file() -> None:
    again = options.complete("main", {}, json.loads(json.dumps(AFTER.given)), socket=None, user=None)
    assert again.former == TAKEN
    assert "former" not in OPTIONS.given
    assert "former_key_file" not in AFTER.given, "it is no wish for later tasks"


# --- tables


def test_the_closest_name_of_a_table_counts() -> None:
    tables = [table("a"), table("b"), table("c"), table("old", "MyISAM"), table("x", database="mysql")]
    said = answer({"shop/a": 1, "shop/b": None, "shop/c": 4}, tables)
    names = [*FIRST, Name(4, "kept"), Name(5, "sealed")]
    items = [
        TablespaceWish("sealed", move=MoveWish(tables=("shop.b",))),
        TablespaceWish("default", move=MoveWish(databases=("shop",))),
    ]
    found = plan.wishes(items, said, names)
    assert {one.name: tablespace for one, tablespace in found.items()} == {"a": "default", "b": "sealed"}, (
        "c stays where it was put"
    )
    steps = plan.tables(found, said, keyfile.current(names))
    assert [(step.data["table"], step.data["key"]) for step in steps] == [("a", 3), ("b", 5)]
    assert [one.name for one in plan.left_out(["shop"], said)] == ["old"]


@pytest.mark.parametrize(
    ("move", "code"),
    [
        (MoveWish(tables=("b",)), "invalid_option"),
        (MoveWish(tables=("shop.none",)), "relation_absent"),
        (MoveWish(tables=("shop.old",)), "engine_unsupported"),
        (MoveWish(databases=("none",)), "database_absent"),
        (MoveWish(schemas=("mysql",)), "invalid_option"),
    ],
)
def test_tables_that_cannot_be(move: MoveWish, code: str) -> None:
    with pytest.raises(TdeError) as caught:
        plan.wishes([TablespaceWish("default", move=move)], answer({}, [table("old", "MyISAM")]), FIRST)
    assert caught.value.code == code


def test_a_table_counts_when_all_its_partitions_do() -> None:
    said = answer({"shop/a#P#p0": 3, "shop/a#P#p1": 1, "shop/ab": 3}, [table("a"), table("ab")])
    assert [step.data["table"] for step in plan.tables(dict.fromkeys(said.tables, "default"), said, {"default": 3})] == ["a"]


def test_a_generation_of_keys_leaves_the_server_s_own_alone() -> None:
    names = [*FIRST, Name(4, "sealed")]
    assert plan.new_generation(names, 4) == [Name(5, "default"), Name(6, "sealed")]
    # A run that was stopped between the two makes the other one only.
    assert plan.new_generation([*names, Name(5, "default")], 4) == [Name(6, "sealed")]
    assert plan.new_generation([*names, Name(5, "default"), Name(6, "sealed")], 4) == []


def test_no_key_with_a_single_keyslot() -> None:
    with pytest.raises(TdeError) as caught:
        plan.data_keys(FIRST, [], [Wanted("primary", "token")], no_recovery=False, why="")
    assert caught.value.code == "recovery_keyslot_missing"
    made = plan.data_keys(FIRST, KEYS[:1], [Wanted("primary", "token")], no_recovery=True, why="")
    assert [step.data["key_id"] for step in made] == ["key.2.temporary", "key.3.default"]


def test_options_are_completed_from_the_record() -> None:
    recorded = {**OPTIONS.given, "refuse_plain_tables": False, "encryption_threads": 2, "reencryption": {"label": "x"}}
    found = options.complete("main", {"reencrypt": True}, recorded, socket="/t", user=None)
    assert (found.refuse_plain_tables, found.encryption_threads, found.reencrypt, found.socket) == (False, 2, True, "/t")
    assert found.key_file == "/run/k/keys"
    assert "reencrypt" not in found.given
    for wrong in ({"encryption_threads": 0}, {"key_directory": "relative"}, {"key_directory": "/a\nb"}):
        with pytest.raises(TdeError):
            options.complete("main", wrong, {}, socket=None, user=None)


# --- what files say of themselves

#: Beginnings of files of MariaDB 10.11.19.
REDO_PLAIN = bytes.fromhex("50687973" + "00" * 8 + "00003000") + b"MariaDB 10.11.19" + bytes(32)
REDO_ENCRYPTED = (
    bytes.fromhex("f09f979d" + "00" * 8 + "004bcb3a") + b"MariaDB 10.11.19" + bytes(16) + bytes.fromhex("0000000100000001")
)
BINLOG = bytes.fromhex("fe62696e" + "144d026b0f01000000fc000000000100000100")


def test_headers_of_logs() -> None:
    assert logs.redo_encrypted(REDO_PLAIN) is False
    assert logs.redo_encrypted(REDO_ENCRYPTED) is True
    assert logs.redo_encrypted(b"") is None
    assert logs.redo_encrypted(bytes(512)) is None
    plain = BINLOG + bytes(0x100 - len(BINLOG)) + bytes.fromhex("144d026ba3")
    assert logs.binlog_encrypted(plain) is False
    assert logs.binlog_encrypted(plain[:-1] + b"\xa4") is True
    assert logs.binlog_encrypted(plain[:0x100]) is False
    assert logs.binlog_encrypted(b"\xfebin") is None


SIZE = 16384
IV = bytes(range(16))


def first_page(key: int | None) -> bytes:
    """The first page of a tablespace with number 9 in the form full_crc32, with or without encryption's data."""
    data = b"s\x0e\x0cREt\x01\x10" + IV + struct.pack(">IIB", 1, key, 1) if key else b""
    page = bytes(34) + struct.pack(">I", 9) + bytes(16) + struct.pack(">I", 0x15) + bytes(100) + data
    return page + bytes(SIZE - len(page))


def index_page(number: int, key: bytes | None, algorithm: str = "AES_CTR") -> bytes:
    """An index page, in the clear or encrypted as the server does it; of AES_CBC without what comes after the last whole block."""
    version = b"\0\0\0\1" if key else bytes(4)
    head = version + struct.pack(">I", number) + bytes(8) + struct.pack(">Q", 77) + struct.pack(">H", 17855)
    body = bytes(73) + b"infimum\0" + b"rows" * 10
    body += bytes(SIZE - 26 - 4 - len(body))
    if key:
        ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - as the server derives it
        counter = struct.pack("<IIQ", 9, number, 77)
        mode = modes.CTR(counter) if algorithm == "AES_CTR" else modes.CBC(counter)
        body = Cipher(algorithms.AES(ecb.update(IV)), mode).encryptor().update(body).ljust(len(body), b"t")
    return head + body + b"crcs"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([first_page(3), index_page(1, KEY), bytes(SIZE), index_page(3, KEY)], {"opened": 2, "zero": 1}),
        ([first_page(3), index_page(1, KEY), index_page(2, None)], {"opened": 1, "plain": 1}),
        ([first_page(3), index_page(1, b"x" * 32)], {"shut": 1}),
        ([first_page(4), index_page(1, KEY)], {"shut": 1}),
        ([first_page(None), index_page(1, None)], {"plain": 1}),
        # A page that says that it is encrypted and shows what it holds all the same.
        ([first_page(3), b"\0\0\0\1" + index_page(1, None)[4:]], {"shut": 1}),
    ],
)
def test_pages(content: list[bytes], expected: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "t.ibd"
    path.write_bytes(b"".join(content))
    counts, dummy = pages.examine(str(path), {3: KEY}, random.Random(1))
    seen = {name: getattr(counts, name) for name in ("opened", "plain", "shut", "sealed", "zero", "unreadable")}
    assert {name: count for name, count in seen.items() if count} == expected


@pytest.mark.parametrize("algorithm", ["AES_CTR", "AES_CBC"])
def test_pages_open_with_the_cipher_of_their_server_only(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "t.ibd"
    path.write_bytes(first_page(3) + index_page(1, KEY, algorithm))
    for other in ("AES_CTR", "AES_CBC"):
        counts, dummy = pages.examine(str(path), {3: KEY}, random.Random(1), other)
        assert (counts.opened, counts.shut) == ((1, 0) if other == algorithm else (0, 1))


@given(st.binary(max_size=200))
def test_any_file_can_be_looked_at(content: bytes) -> None:
    logs.redo_encrypted(content)
    logs.binlog_encrypted(content)
    pages.layout(content)
    pages.crypt(content + b"s\x0e\x0cREt" + content[:40])


# --- the process, and what is told


def test_the_process_by_its_working_directory(tmp_path: Path) -> None:
    base = tmp_path / "4711"
    (tmp_path / "data").mkdir()
    base.mkdir()
    (base / "exe").symlink_to("/usr/sbin/mariadbd")
    (base / "cwd").symlink_to(tmp_path / "data")
    (base / "stat").write_text("4711 (maria) db) S " + " ".join(["0"] * 18) + " 12345 0 0\n")
    assert look.process(str(tmp_path / "data"), str(tmp_path)) == look.Process(4711, 12345 / os.sysconf("SC_CLK_TCK"))
    assert look.process(str(tmp_path), str(tmp_path)) is None


def facts(**server: t.Any) -> dict[str, t.Any]:
    said = {
        "address": "/s", "answers": True, "problem": None, "restart_required": [], "replicas_attached": 0, "redo_log": "encrypted",
        "binary_logs": {"/b.1": "encrypted"}, "tables_of_other_engines": [], "former_key_file": None,
        "settings": {**dict.fromkeys(gaps.SETTINGS, "ON"), "secure_file_priv": "/x"}, **server,
    }  # fmt: skip
    space = {"name": "shop/a", "encryption": "ours"}
    return {
        "problems": [], "managed": True, "server": said, "tablespaces": [space], "data_keys": [], "adopted": [], "tokens": [],
        "pin_source": {"kind": "none"}, "same_disk": False,
    }  # fmt: skip


def test_what_is_in_the_clear_is_said() -> None:
    well = gaps.sentences(facts())
    assert gaps.covered(facts())
    for more, words in (
        ({"redo_log": "plain"}, "redo log is in the clear"),
        ({"binary_logs": {"/b.1": "plain"}}, "binary logs from before"),
        ({"replicas_attached": 2}, "needs TLS"),
        ({"restart_required": ["It has not read key 4."]}, "must be restarted"),
        ({"tables_of_other_engines": ["shop.old"]}, "not InnoDB's"),
        (
            {"settings": {**dict.fromkeys(gaps.SETTINGS, "ON"), "encrypt_binlog": "OFF", "secure_file_priv": "/x"}},
            "encrypt_binlog is off",
        ),
        ({"settings": dict.fromkeys(gaps.SETTINGS, "ON")}, "LOAD DATA INFILE"),
        (
            {"former_key_file": {"path": "/k", "there": True, "encrypted": False, "keys_in_use": []}},
            "/k lies there, in the clear",
        ),
        ({"former_key_file": {"path": "/k", "there": False, "encrypted": False, "keys_in_use": [1, 5]}}, "Keys 1, 5 come from"),
    ):
        new = [sentence for sentence in gaps.sentences(facts(**more)) if sentence not in well]
        assert len(new) == 1, new
        assert words in new[0]
    assert not gaps.covered(facts(redo_log="unknown"))
    plain = {**facts(), "tablespaces": [{"name": "shop/a", "encryption": "plain"}]}
    assert not gaps.covered(plain)
    assert "1 InnoDB tablespaces are in the clear: shop/a." in gaps.sentences(plain)


def test_a_pipe_of_the_server_s_user_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("postmaster.pid", "orders.ibd"):
        os.mkfifo(tmp_path / name)
    assert server.postmaster(str(tmp_path)) is None
    with pytest.raises(OSError, match="Invalid argument"):
        pages.examine(str(tmp_path / "orders.ibd"), {}, random.Random(1))
