# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is told of an estate, what is read from options, and what is remembered of a cluster."""

from __future__ import annotations

import copy
import json
import typing as t
from pathlib import Path

import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.hsm.tde.plugins.module_utils import engines
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import record as records
from ansible_collections.hsm.tde.plugins.module_utils.engines import request
from ansible_collections.hsm.tde.plugins.module_utils.engines.postgresql import gaps, info, options, server
from ansible_collections.hsm.tde.plugins.module_utils.kmip.access import KmipAccess
from hypothesis import given
from hypothesis import strategies as st

PLACE = {"path": "/srv/tde/sealed", "encryption": "ours", "problem": None}
DATA = {"path": "/var/lib/postgresql/15/main", "encryption": "plain", "problem": None, "kernel_key": "present"}
SLOT = {"name": "primary", "protection": "token", "proved": True}

#: A cluster with one encrypted tablespace, in good order.
ESTATE: dict[str, t.Any] = {
    "managed": True,
    "problems": [],
    "server": {"address": "/run", "answers": True, "problem": None, "standbys_attached": 0, "settings": {"archive_mode": "off"}},
    "data_directory": DATA,
    "elsewhere": [],
    "adopted": [],
    "tablespaces": [
        {**DATA, "name": "pg_default", "path": DATA["path"] + "/base"},
        {**PLACE, "name": "sealed"},
    ],
    "databases": [{"name": "shop", "tablespace": "pg_default"}],
    "places": [{"path": PLACE["path"], "exists": True, "kernel_key": "present"}],
    "data_keys": [{"key_id": "tablespace.sealed", "keyslots": [SLOT, {**SLOT, "name": "recovery"}], "formerly": []}],
    "tokens": [{"label": "demo", "library": "/usr/lib/vendor.so"}],
    "pin_source": {"kind": "none"},
    "same_disk": False,
}


def told(**changes: t.Any) -> list[str]:
    return gaps.sentences({**copy.deepcopy(ESTATE), **changes})


def test_what_a_tablespace_does_not_cover_is_said_in_so_many_words() -> None:
    found = " ".join(told())
    for words in ("data directory", "write-ahead log", "pg_statistic", "Temporary files", "swap", "moved", "Base backups"):
        assert words in found
    assert "pg_default" not in found, "what lies in the data directory is told with it"


def test_a_cluster_that_is_encrypted_wholly_has_fewer_gaps() -> None:
    whole = {**DATA, "encryption": "ours", "path": "/srv/tde/data"}
    found = " ".join(told(data_directory=whole, tablespaces=[{**whole, "name": "pg_default", "path": "/srv/tde/data/base"}]))
    assert "write-ahead" not in found
    assert "Base backups" in found
    estate = {"data_directory": whole, "elsewhere": [], "tablespaces": [whole]}
    assert gaps.covered(estate)
    assert not gaps.covered(ESTATE)
    assert not gaps.covered({**estate, "elsewhere": [{**DATA, "name": "pg_wal"}]}), "a part of it is in the clear"
    assert not gaps.covered({**estate, "data_directory": {**whole, "kernel_key": "absent"}}), "its links do not show"


def test_parts_of_a_data_directory_that_lie_elsewhere_are_found(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("base/5", "pg_tblspc"):
        (data / folder).mkdir(parents=True)
    for link in ("pg_wal", "base/5/16384", "pg_tblspc/16385"):
        (data / link).symlink_to(tmp_path)
    found = info.elsewhere(str(data), {}, [])
    assert [(one["name"], one["path"]) for one in found] == [("base/5/16384", str(tmp_path)), ("pg_wal", str(tmp_path))]
    assert not any(one["encryption"] == "ours" for one in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"managed": False}, "no record of the cluster"),
        ({"problems": ["the store is damaged"]}, "the store is damaged"),
        ({"server": {**ESTATE["server"], "answers": False, "problem": "does not answer"}}, "does not answer"),
        ({"server": {**ESTATE["server"], "standbys_attached": 2}}, "2 standbys"),
        ({"server": {**ESTATE["server"], "settings": {"archive_mode": "on"}}}, "WAL is archived"),
        ({"tablespaces": [{**PLACE, "name": "x", "encryption": "plain"}]}, "Tablespace x (/srv/tde/sealed) is in the clear"),
        ({"tablespaces": [{**PLACE, "name": "x", "encryption": "unknown_key"}]}, "a key that this host's store does not hold"),
        ({"tablespaces": [{**PLACE, "name": "x", "encryption": "dm_crypt"}]}, "dm-crypt"),
        ({"tablespaces": [{**PLACE, "name": "x", "encryption": "unknown", "problem": "because"}]}, "could not be established (because)"),
        ({"elsewhere": [{**DATA, "name": "pg_wal", "path": "/w"}]}, "The data directory's pg_wal (/w) is in the clear"),
        ({"places": [{"path": "/p", "exists": False, "kernel_key": ""}]}, "/p does not show"),
        ({"places": [{"path": "/p", "exists": True, "kernel_key": "absent"}]}, "/p is closed"),
        ({"data_keys": [{"key_id": "k", "keyslots": [SLOT], "formerly": []}]}, "single keyslot (primary)"),
        ({"data_keys": [{"key_id": "k", "keyslots": [SLOT, SLOT], "formerly": []}]}, "two keyslots of one name"),
        ({"data_keys": [{"key_id": "k", "keyslots": [SLOT, {**SLOT, "name": "r", "proved": False}], "formerly": []}]}, "never proved"),
        ({"data_keys": [{"key_id": "k", "keyslots": [SLOT], "formerly": ["hsm-tde.main in token old"]}]}, "once under hsm-tde.main in token old"),
        ({"data_keys": [{"key_id": "k", "keyslots": [SLOT], "formerly": []}], "adopted": ["k"]}, "came to this host without its journal"),
        ({"tokens": [{"label": "demo", "library": "/usr/lib/softhsm/libsofthsm2.so"}]}, "Token demo is software"),
        ({"pin_source": {"kind": "file", "path": "/etc/pin"}, "same_disk": True}, "on the same file system as the store"),
        ({"pin_source": {"kind": "credential", "path": "pin"}}, "without a TPM"),
    ],
)  # fmt: skip
def test_each_gap_is_told(changes: dict[str, t.Any], words: str) -> None:
    assert any(words in sentence for sentence in told(**changes))
    assert not any(words in sentence for sentence in told())


def test_temporary_files_are_covered_where_they_go_to_an_encrypted_tablespace() -> None:
    for changes in (
        {"server": {**ESTATE["server"], "settings": {"temp_tablespaces": '"sealed"'}}},
        {"databases": [{"name": "shop", "tablespace": "sealed"}]},
    ):
        assert not any(sentence.startswith("Temporary files") for sentence in told(**changes))


# --- options


def params(**given_: t.Any) -> dict[str, t.Any]:
    spec = {**engines.database_options(), "keyslots": engines.keyslots_option()}
    result = ArgumentSpecValidator(spec).validate({"engine": "postgresql", "cluster": "main", **given_})
    assert not result.error_messages
    return t.cast("dict[str, t.Any]", result.validated_parameters)


TASK = {"library": "/lib/token.so", "token_label": "demo", "pin": "task-pin"}


@pytest.mark.parametrize(
    ("slot", "label", "pin"),
    [
        ({}, "demo", b"task-pin"),
        ({"token_label": "demo"}, "demo", b"task-pin"),
        # A PIN is never tried on a token that it may not belong to.
        ({"token_label": "second"}, "second", None),
        ({"token_label": "second", "pin": "own-pin"}, "second", b"own-pin"),
        ({"library": "/lib/other.so", "token_label": "demo"}, "demo", None),
        ({"token_serial": "01"}, None, None),
    ],
)
def test_a_keyslot_takes_token_and_pin_of_the_task_unless_it_names_another(
    slot: dict[str, t.Any], label: str | None, pin: bytes | None
) -> None:
    (wish,) = request.slots(params(**TASK, keyslots=[slot])) or ()
    assert wish.access
    assert wish.access.selector.label == label
    assert (wish.access.pin.reveal() if wish.access.pin else None) == pin


@pytest.mark.parametrize("slots", [[], [{}, {}], [{"name": "../x"}]])
def test_keyslots_that_cannot_be(slots: list[dict[str, t.Any]]) -> None:
    with pytest.raises(TdeError) as caught:
        request.slots(params(**TASK, keyslots=slots))
    assert caught.value.code == "invalid_option"


def test_nothing_of_a_request_prints_a_secret() -> None:
    made = request.request(params(**TASK, passphrase="phrase-4711", login_password="login-4711"))
    wishes = request.slots(params(**TASK, keyslots=[{"protection": "passphrase", "passphrase": "slot-4711"}]))
    assert not any(secret in repr((made, wishes)) for secret in ("task-pin", "phrase-4711", "login-4711", "slot-4711"))


def test_a_task_that_says_less_keeps_what_is_recorded() -> None:
    full = params(postgresql={"coverage": "cluster", "storage": "image", "mount_point": "/srv/tde", "image": "/var/lib/tde.img",
                              "image_size": "1G", "data_directory": "/srv/tde/data"})["postgresql"]  # fmt: skip
    first = options.complete(full, {})
    options.check_present(first)
    assert options.complete(params()["postgresql"], first.given) == first
    assert json.loads(json.dumps(first.given)) == first.given


@pytest.mark.parametrize(
    "given_",
    [
        {},
        {"mount_point": "relative"},
        {"storage": "image", "mount_point": "/srv/tde"},
        {"coverage": "cluster", "mount_point": "/srv/tde"},
        {"coverage": "cluster", "mount_point": "/srv/tde", "data_directory": "/var/lib/data"},
    ],
)
def test_options_that_are_not_enough(given_: dict[str, t.Any]) -> None:
    with pytest.raises(TdeError) as caught:
        options.check_present(options.complete(params(postgresql=given_)["postgresql"], {}))
    assert caught.value.code == "invalid_option"


# --- what is remembered

text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=20)


@given(
    st.lists(
        st.builds(records.Place, text, text.map(lambda end: "/" + end), st.just("/srv"), st.none() | text, text, st.booleans())
    )
)
def test_a_record_comes_back_as_it_was_written(places: list[records.Place]) -> None:
    record = records.Record(
        "main",
        "postgresql",
        {"a": 1},
        "c0ffee",
        tokens=(records.Token("/lib", {"A": "b"}, "demo", ""),),
        kmip=(KmipAccess("kmip", ("kms1:5696", "kms2:5696"), "/ca", "/certificate", "/key", 5.0),),
        places=tuple(places),
    )
    assert records.parse(json.loads(json.dumps(record.public())), "x") == record


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"version": 2}, {"version": 1}, {"version": 1, "cluster": "main", "engine": "postgresql", "options": 1}],
)
def test_a_record_that_cannot_be_read_is_damaged_not_absent(content: t.Any) -> None:
    with pytest.raises(TdeError) as caught:
        records.parse(content, "x")
    assert caught.value.code == "record_damaged"


def test_the_record_of_another_cluster_is_damaged(tmp_path: Path) -> None:
    state = StateDirectory(str(tmp_path / "state"))
    assert records.read(state, "main") is None
    assert records.clusters(state) == []
    records.write(state, records.Record("main", "postgresql"))
    assert records.clusters(state) == ["main"]
    Path(state.cluster_record("main")).rename(state.cluster_record("other"))
    with pytest.raises(TdeError) as caught:
        records.read(state, "other")
    assert caught.value.code == "record_damaged"


# --- the server from outside


def test_debians_list_of_clusters() -> None:
    rows = server.parse_clusters(
        "15  main    5432 online          postgres /var/lib/postgresql/15/main /var/log/postgresql/postgresql-15-main.log\n"
        "13  old     5433 down,recovery   pg       /srv/old                    <unknown>\nnonsense\n"
    )
    assert [(row.version, row.name, row.port, row.running, row.data_directory) for row in rows] == [
        ("15", "main", 5432, True, "/var/lib/postgresql/15/main"),
        ("13", "old", 5433, False, "/srv/old"),
    ]


@pytest.mark.parametrize("name", ["main", "15/", "/main", "15/main/x", "15/../../etc", "15/..", "../x", "x/main"])
def test_a_packaged_cluster_by_a_name_that_is_none(name: str) -> None:
    with pytest.raises(TdeError) as caught:
        server.split_cluster(name)
    assert caught.value.code == "invalid_option"
