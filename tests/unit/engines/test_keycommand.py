# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine keycommand without a token: its options, the lines it gives, what it refuses, and the user's side of a host."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import shlex
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import credentials, keycommands
from ansible_collections.hsm.tde.plugins.module_utils.common import plan as plans
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.files import make_owned_directory
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import keycommand_options, userside
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import KeystoreWish, Request, SlotWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.fep import options as fep_options
from ansible_collections.hsm.tde.plugins.module_utils.engines.fep import plan as fep_plan
from ansible_collections.hsm.tde.plugins.module_utils.engines.keycommand.engine import Keycommand
from ansible_collections.hsm.tde.plugins.module_utils.engines.keycommand.options import complete
from ansible_collections.hsm.tde.plugins.module_utils.engines.keycommand.secret import (
    KINDS,
    CarriedFile,
    CarriedSecret,
    secret_path,
)
from ansible_collections.hsm.tde.plugins.module_utils.engines.record import Record, Token
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess

ME = pwd.getpwuid(os.geteuid())


def refusal(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def test_what_a_task_leaves_out_comes_from_the_record() -> None:
    first = complete({"kind": "edb", "data_directory": "/srv/pg/", "os_user": "enterprisedb", "key_bits": None}, {})
    assert (first.data_directory, first.key_bits, first.command) == ("/srv/pg", 256, "/usr/local/sbin/hsm-tde")
    again = complete(dict.fromkeys(keycommand_options()), first.given)
    assert again == first
    assert complete({"key_bits": 128}, first.given) == dataclasses.replace(first, key_bits=128)


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({}, {}),
        ({"kind": "edb"}, {}),
        ({"kind": "edb", "data_directory": "srv"}, {}),
        ({"kind": "secret", "command": "hsm-tde"}, {}),
        ({"kind": "secret", "command": "/usr/bin/hsm tde; rm -rf /"}, {}),
        ({"kind": "secret", "command": "/opt/$(id)"}, {}),
        ({"kind": "secret"}, {"kind": "cybertec"}),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, t.Any], recorded: dict[str, t.Any]) -> None:
    assert refusal(lambda: complete(given, recorded)) == "invalid_option"


def test_the_kinds_of_the_documentation_are_the_engine_s() -> None:
    assert tuple(keycommand_options()["kind"]["choices"]) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_are_what_the_server_s_shell_and_configuration_take(kind: str) -> None:
    parameters, initdb = complete({"kind": kind, "data_directory": "/srv/pg"}, {}).lines("main")
    for line in parameters.values():
        assert "'" not in line
        if line != "on":
            assert shlex.split(line)[:4] == ["/usr/local/sbin/hsm-tde", "unwrap", "--cluster", "main"]
    if kind == "edb":
        assert initdb[0] == "--data-encryption=256"
        assert all(option.endswith("%p") for option in initdb[1:])
        assert parameters["data_encryption_key_unwrap_command"] == initdb[2].partition("=")[2]
    assert bool(initdb) == (kind in ("edb", "cybertec"))


def test_where_the_wrapped_secret_lies(tmp_path: Path) -> None:
    own = StateDirectory("/var/lib/hsm-tde").of_user("postgres")
    assert own.path == "/var/lib/hsm-tde.users/state/postgres"
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    edb = {"kind": "edb", "data_directory": str(tmp_path / "link")}
    assert secret_path(edb, own, "main") == str(tmp_path / "data/pg_encryption/key.bin")
    assert secret_path({"kind": "secret", "data_directory": None}, own, "main") == f"{own.path}/store/main/secret.json"


def test_a_user_s_name_does_not_lead_out_of_its_folder() -> None:
    for name in ("../root", "a/b", "", ".."):
        assert refusal(lambda name=name: StateDirectory("/var/lib/hsm-tde").of_user(name)) == "invalid_option"  # type: ignore[misc]


def test_a_file_of_another_command_is_told(tmp_path: Path) -> None:
    path = tmp_path / "key.bin"
    path.write_bytes(b"Salted__" + os.urandom(96))
    path.chmod(0o600)
    secret = CarriedSecret(StateDirectory(str(tmp_path / "state")), str(path), "main")
    assert isinstance(secret.file, CarriedFile)
    assert secret.file.exists()
    assert refusal(secret.file.judged) == "file_foreign"
    path.chmod(0o604)
    assert refusal(secret.file.judged) == "file_not_private"


def test_what_the_engine_refuses_is_one_sentence_each(tmp_path: Path) -> None:
    request = Request(StateDirectory(str(tmp_path)), "main", {"kind": "ssl_passphrase"})
    engine = Keycommand(request)
    assert refusal(lambda: engine.keystore(KeystoreWish("closed"), check=True)) == "engine_unsupported"
    assert refusal(lambda: engine.require("tablespaces")) == "engine_unsupported"
    assert all(". " not in sentence and len(sentence) < 160 for sentence in engine.refuses.values())


def test_a_cluster_that_nobody_knows_is_told_without_a_kind(tmp_path: Path) -> None:
    facts = Keycommand(Request(StateDirectory(str(tmp_path)), "main", dict.fromkeys(keycommand_options()))).info()
    assert (facts["managed"], facts["problems"]) == (False, [])
    assert facts["gaps"] == ["This host has no record of the cluster: nothing tells where its server has its key from."]


def test_a_secret_of_the_task_is_not_remembered(tmp_path: Path) -> None:
    engine = Keycommand(Request(StateDirectory(str(tmp_path)), "main", {"kind": "secret", "secret": "very-secret"}))
    assert "very-secret" not in repr(engine.options) + repr(engine.options.given)
    assert engine.given == Secret("very-secret")


def test_a_try_ends_before_the_server_s_patience() -> None:
    """pg_ctl waits 60 s (PostgreSQL manual, PGCTLTIMEOUT); while a PIN change is unfinished there are two tries."""
    assert 2 * keycommands.SECONDS < 60


# --- the user's side


@pytest.fixture
def side(tmp_path: Path) -> userside.UserSide:
    return userside.UserSide(StateDirectory(str(tmp_path / "state")), "main", ME)


def record(side: userside.UserSide, **more: t.Any) -> Record:
    return Record(
        "main",
        "keycommand",
        {"os_user": side.user.pw_name, **more},
        pin_source={"kind": "file", "path": f"{side.state.path}.pin"},
    )


def carry_out(side: userside.UserSide, wished: Record, pin: str) -> list[str]:
    steps = side.plan(wished, Secret(pin))
    plans.run(steps, side.handlers(Secret(pin)))
    return [step.action for step in steps]


def test_the_user_s_side_is_made_once_and_brought_up_to_date(side: userside.UserSide) -> None:
    wished = record(side)
    assert carry_out(side, wished, "1234") == ["make_user_state", "publish_record", "write_user_pin"]
    assert carry_out(side, wished, "1234") == []
    assert carry_out(side, wished, "5678") == ["write_user_pin"]
    assert carry_out(side, dataclasses.replace(wished, options={"os_user": ME.pw_name, "x": 1}), "5678") == ["publish_record"]
    pin = Path(wished.pin_source["path"])
    assert (pin.stat().st_mode & 0o777, pin.read_text()) == (0o400, "5678\n")
    published = Path(side.state.published_record("main"))
    assert published.stat().st_mode & 0o777 == 0o644
    assert "5678" not in published.read_text()
    # What a killed write left goes with the next one.
    left = pin.with_name(f".{pin.name}.0123456789ab.tmp")
    left.write_text("5678\n")
    assert carry_out(side, dataclasses.replace(wished, options={"os_user": ME.pw_name, "x": 1}), "5678") == ["write_user_pin"]
    assert not left.exists()


def test_the_folders_can_be_passed_whatever_the_umask(side: userside.UserSide) -> None:
    before = os.umask(0o077)
    try:
        carry_out(side, record(side), "1234")
    finally:
        os.umask(before)
    for folder in ("", "clusters", "state"):
        assert (Path(side.state.users) / folder).stat().st_mode & 0o777 == 0o755
    assert Path(side.own.path).stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files are root's to make")
def test_a_record_that_the_user_could_write_is_not_read(side: userside.UserSide) -> None:
    user = pwd.getpwnam("nobody")
    theirs = userside.UserSide(side.state, "main", user)
    carry_out(theirs, record(theirs), "1234")
    assert Path(theirs.own.path).stat().st_uid == user.pw_uid
    path = Path(side.state.published_record("main"))
    for spoil in (lambda: os.chown(path, user.pw_uid, -1), lambda: path.chmod(0o666)):
        spoil()
        assert refusal(lambda: userside.entered(side.state, "main")) == "file_not_private"
        os.chown(path, 0, -1)
        path.chmod(0o644)
    assert refusal(lambda: userside.entered(side.state, "main")) == "command_of_other_user"
    Path(theirs.own.path).chmod(0o750)
    assert refusal(lambda: theirs.plan(record(theirs), None)) == "file_not_private"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files are root's to make")
def test_a_pin_is_not_put_where_the_user_could_exchange_it(tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody")
    side = userside.UserSide(StateDirectory(str(tmp_path / "state")), "main", user)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "pin").write_text("1234\n")
    for path in (folder, folder / "pin"):
        os.chown(path, user.pw_uid, -1)
    (folder / "pin").chmod(0o400)
    wished = dataclasses.replace(record(side), pin_source={"kind": "file", "path": str(folder / "pin")})
    assert refusal(lambda: side.plan(wished, Secret("1234"))) == "file_not_private"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files are root's to make")
def test_a_folder_that_a_killed_run_left_is_given_away_and_one_with_content_is_not(tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody")
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    assert not make_owned_directory(str(folder), user.pw_uid, user.pw_gid)
    assert folder.stat().st_uid == user.pw_uid
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    (other / "file").write_text("root's")
    assert refusal(lambda: make_owned_directory(str(other), user.pw_uid, user.pw_gid)) == "file_not_private"
    (tmp_path / "link").symlink_to(folder)
    assert refusal(lambda: make_owned_directory(str(tmp_path / "link"), user.pw_uid, user.pw_gid)) == "file_not_private"


def test_a_cluster_without_a_record_and_a_damaged_one(side: userside.UserSide) -> None:
    assert refusal(lambda: userside.entered(side.state, "main")) == "cluster_unknown"
    carry_out(side, record(side), "1234")
    assert userside.is_published(side.state, "main")
    Path(side.state.published_record("main")).write_text(json.dumps({"version": 7}))
    assert refusal(lambda: userside.entered(side.state, "main")) == "record_damaged"


def test_kmip_servers_get_less_time_than_the_command_has() -> None:
    three = KmipAccess("kmip", ("a", "b", "c"), "/ca", "/certificate", "/key")
    own = keycommands.Own(
        Record("main", "keycommand", kmip=(three, dataclasses.replace(three, service="other"))), StateDirectory("/x")
    )
    assert own.services(()) == []
    assert [one.service for one in own.services({"other"})] == ["other"]
    # The service goes by another name where the file comes from.
    found = own.services({"elsewhere"})
    assert [one.service for one in found] == ["kmip", "other"]
    assert sum(one.timeout * len(one.servers) for one in found) < keycommands.SECONDS
    quick = dataclasses.replace(three, timeout=0.5)
    assert keycommands.Own(Record("main", "keycommand", kmip=(quick,)), StateDirectory("/x")).services({"kmip"}) == [quick]


def test_a_service_needs_no_pin_and_a_pin_that_cannot_be_had_does_not_keep_from_it(tmp_path: Path) -> None:
    service = KmipAccess("kmip", ("a",), "/ca", "/certificate", "/key")
    token = Token("/usr/lib/p11.so", {}, "demo", "1")
    on = [credentials.TokenName("demo", "1")]
    for source in ({"kind": "none"}, {"kind": "file", "path": str(tmp_path / "absent")}):
        record = Record("main", "keycommand", tokens=(token,), kmip=(service,), pin_source=source)
        own = keycommands.Own(record, StateDirectory("/x"))
        assert own.tries(on, credentials.Given(), [service]) == [credentials.Credential()]
        assert refusal(lambda own=own: own.tries(on, credentials.Given())) in ("pin_source_missing", "file_absent")  # type: ignore[misc]


def test_the_plugin_of_tde_kms_is_under_a_token_alone() -> None:
    options = fep_options.complete({"keystore": "plugin", "data_directory": "/data"}, {}, "main")
    assert refusal(lambda: fep_plan.check_slots(options, [SlotWish("primary", "kmip")])) == "engine_unsupported"
    own = keycommands.Own(Record("main", "fep", kmip=(KmipAccess("kmip", ("a",), "/ca", "/c", "/k"),)), StateDirectory("/x"))
    assert refusal(own.token) == "invalid_option"
