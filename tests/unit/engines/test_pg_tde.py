# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the engine pg_tde decides, and its key file: pure functions, and a file on the disk."""

from __future__ import annotations

import dataclasses
import json
import struct
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines.pg_tde import engine, keyfile, options, plan, sql
from ansible_collections.hsm.tde.plugins.module_utils.engines.pg_tde.sql import DEFAULT, OWN, SERVER, SetKey
from hypothesis import given
from hypothesis import strategies as st

OPTIONS = options.complete("main", {"databases": ["shop"], "key_directory": "/run/k"}, {}, "postgres")
LABEL = "hsm-tde.main"
WISHED = {"path": "/run/k/keys"}
LOADED = {"shared_preload_libraries": "pg_stat_statements, pg_tde", "pg_tde.cipher": "aes_256", "pg_tde.wal_encrypt": "off"}


def facts(**more: t.Any) -> sql.Facts:
    """A server with the extension in its databases and nothing set."""
    databases = {"shop": sql.Database("shop", "public"), "other": sql.Database("other")}
    fields: dict[str, t.Any] = {"available": True, "running": LOADED, "configured": LOADED, "databases": databases, **more}
    return sql.Facts(**fields)


def key(name: str = LABEL, provider: str = "hsm-tde-file", number: int = -1) -> SetKey:
    return SetKey(name, provider, number)


def refused(code: str, act: t.Callable[[], object]) -> TdeError:
    with pytest.raises(TdeError) as raised:
        act()
    assert raised.value.code == code
    return raised.value


def whose(found: t.Sequence[plan.Target]) -> list[str]:
    return [target.whose for target in found]


def entry(name: str, data: bytes = b"k" * 32) -> bytes:
    return struct.pack("=256s32sI", name.encode(), data, len(data))


def test_a_key_is_made_sealed_and_set_in_this_order() -> None:
    wished = plan.targets(OPTIONS, facts(), LABEL, [LABEL])
    assert whose(wished) == [DEFAULT, SERVER]
    steps = plan.keys(OPTIONS, wished, {LABEL: False})
    assert [step.action for step in steps] == ["create_key", "seal_keys", "set_key", "set_key"]
    # One that is there is not made again.
    assert [step.action for step in plan.keys(OPTIONS, wished, {LABEL: True})] == ["set_key", "set_key"]
    kmip = dataclasses.replace(OPTIONS, provider="kmip")
    assert [step.action for step in plan.keys(kmip, wished, {LABEL: False})] == ["create_key", "set_key", "set_key"]


def test_what_is_set_as_it_is_meant_is_never_set_again() -> None:
    done = facts(default_key=key(), server_key=key())
    assert plan.targets(OPTIONS, done, LABEL, [LABEL]) == []
    assert whose(plan.targets(OPTIONS, done, "hsm-tde.main.2", [LABEL, "hsm-tde.main.2"])) == [DEFAULT, SERVER]
    # The same name at another provider is another key.
    moved = dataclasses.replace(OPTIONS, provider="kmip", provider_name="hsm-tde-kmip")
    assert whose(plan.targets(moved, done, LABEL, [LABEL])) == [DEFAULT, SERVER]


def test_databases_follow_the_default_key_unless_their_own_is_not_ours() -> None:
    def with_own(own: SetKey) -> sql.Facts:
        return facts(default_key=key(), server_key=key(), databases={"shop": sql.Database("shop", "public", own)})

    labels = ["hsm-tde.main.1", LABEL]
    assert plan.targets(OPTIONS, with_own(key("theirs", "their-provider")), LABEL, labels) == []
    left = plan.targets(OPTIONS, with_own(key("hsm-tde.main.1")), LABEL, labels)
    assert [(target.whose, target.database, target.scope) for target in left] == [(OWN, "shop", "global")]


def test_scope_database() -> None:
    own = dataclasses.replace(OPTIONS, scope="database", wal_encrypt=False)
    wished = plan.targets(own, facts(), LABEL, [LABEL])
    assert [(target.whose, target.scope, target.name) for target in wished] == [(OWN, "database", f"{LABEL}@shop")]
    assert [step.data["scope"] for step in plan.providers(own, facts(), WISHED)] == ["database"]
    with_wal = dataclasses.replace(own, wal_encrypt=True)
    assert [step.data["scope"] for step in plan.providers(with_wal, facts(), WISHED)] == ["global", "database"]
    assert whose(plan.targets(with_wal, facts(), LABEL, [LABEL])) == [SERVER, OWN]


def test_a_key_that_the_server_cannot_have_stops_everything() -> None:
    lost = SetKey(problem='key "x" not found in key provider "y"')
    refused("key_unreachable", lambda: plan.targets(OPTIONS, facts(default_key=lost), LABEL, [LABEL]))
    broken = {"shop": sql.Database("shop", "public", lost)}
    refused("key_unreachable", lambda: plan.targets(OPTIONS, facts(databases=broken), LABEL, [LABEL]))


def test_providers_are_compared_by_their_options_and_never_removed() -> None:
    there = sql.Provider(-1, "hsm-tde-file", "file", WISHED)
    former = sql.Provider(-2, "former", "kmip", {"host": "h"})
    assert plan.providers(OPTIONS, facts(providers=(there, former)), WISHED) == []
    assert [step.action for step in plan.providers(OPTIONS, facts(providers=(former,)), WISHED)] == ["add_provider"]
    changed = plan.providers(OPTIONS, facts(providers=(there,)), {"path": "/elsewhere"})
    assert [step.action for step in changed] == ["change_provider"]
    refused(
        "invalid_option", lambda: plan.providers(OPTIONS, facts(providers=(dataclasses.replace(there, type="kmip"),)), WISHED)
    )


def test_keys_do_not_change_during_a_base_backup() -> None:
    busy = facts(backups=("process 7 (streaming)",))
    refused("backup_running", lambda: plan.not_during_backup(busy, plan.targets(OPTIONS, busy, LABEL, [LABEL])))
    plan.not_during_backup(busy, [])


def test_the_library_is_added_to_those_that_are_loaded() -> None:
    without = {"shared_preload_libraries": "pg_stat_statements"}
    (step,) = plan.library(OPTIONS, facts(running=without, configured={}))
    assert step.data["values"] == ["pg_stat_statements", "pg_tde"]
    assert plan.library(OPTIONS, facts(running=without, configured=LOADED)) == []
    assert plan.restart_reasons(OPTIONS, facts(running=without, configured=LOADED)) == ["It has not loaded pg_tde."]
    assert plan.library(OPTIONS, facts()) == []
    refused("server_other_product", lambda: plan.library(OPTIONS, facts(available=False)))


def test_wal_needs_a_restart_once_it_is_configured() -> None:
    assert [step.data["values"] for step in plan.wal(OPTIONS, facts())] == [["on"]]
    configured = facts(configured={**LOADED, "pg_tde.wal_encrypt": "on"})
    assert plan.wal(OPTIONS, configured) == []
    assert len(plan.restart_reasons(OPTIONS, configured)) == 1
    assert plan.restart_reasons(OPTIONS, facts()) == []


def test_labels_of_a_record() -> None:
    first = plan.with_label([], LABEL, "2026-01-01")
    assert first == [[LABEL, "2026-01-01"]]
    before = plan.labels({plan.LABELS: [*first, ["hsm-tde.main.2", "2026-02-01"]]})
    assert plan.current(before, "main") == "hsm-tde.main.2"
    assert plan.with_label(before, "hsm-tde.main.2", "2026-03-01")[-1] == ["hsm-tde.main.2", "2026-02-01"]
    refused("tag_superseded", lambda: plan.with_label(before, LABEL, "2026-03-01"))


def test_options_of_another_provider_get_another_name() -> None:
    recorded = OPTIONS.given
    assert options.complete("main", {}, recorded, "postgres") == OPTIONS
    assert options.complete("main", {"provider": "kmip"}, recorded, "postgres").provider_name == "hsm-tde-kmip"
    refused("invalid_option", lambda: options.complete("main", {"provider": "vault-v2"}, {}, "postgres"))
    refused("invalid_option", lambda: options.complete("main", {"databases": ["a b"]}, {}, "postgres"))
    refused("invalid_option", lambda: options.complete("main", {"provider_name": "../x"}, {}, "postgres"))


@given(st.lists(st.text("abcXYZ.@-0", min_size=1, max_size=40), max_size=4))
def test_names_of_a_key_file(names: list[str]) -> None:
    content = b"".join(map(entry, names))
    assert list(keyfile.names(content)) == names
    refused("keystore_damaged", lambda: keyfile.names(content + b"x"))


def test_sealed_keys_come_back_and_older_ones_are_noticed(tmp_path: Path) -> None:
    state = StateDirectory(str(tmp_path / "state"))
    Path(state.store("main")).mkdir(parents=True)
    for path in (tmp_path / "state", tmp_path / "state/store", tmp_path / "state/store/main"):
        path.chmod(0o700)
    sealed = keyfile.Sealed(state, "main")
    assert sealed.head() is None
    secret = b"\x07" * 32
    sealed.write(entry("one"), secret)
    first = Path(sealed.path).read_bytes()
    sealed.write(entry("one") + entry("two"), secret)
    assert sealed.head().names == ("one", "two")
    assert sealed.content(secret) == entry("one") + entry("two")
    assert b"kkkk" not in Path(sealed.path).read_bytes()
    refused("keystore_damaged", lambda: sealed.content(b"\x08" * 32))
    document = json.loads(Path(sealed.path).read_text())
    for name, value in (("names", ["one"]), ("cluster", "other"), ("content", document["iv"])):
        Path(sealed.path).write_text(json.dumps({**document, name: value}))
        refused("keystore_damaged", lambda: sealed.content(secret))
    Path(sealed.path).write_bytes(first)
    refused("keystore_rolled_back", sealed.head)
    Path(sealed.path).unlink()
    refused("keystore_unreachable", sealed.head)


def test_a_first_seal_that_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was set under what it would have held; that it does not show must not stop every run after it."""
    state = StateDirectory(str(tmp_path / "state"))
    Path(state.store("main")).mkdir(parents=True)
    for path in (tmp_path / "state", tmp_path / "state/store", tmp_path / "state/store/main"):
        path.chmod(0o700)
    sealed = keyfile.Sealed(state, "main")
    secret = b"\x07" * 32
    with monkeypatch.context() as patch:
        patch.setattr(keyfile, "write_atomic", lambda *_args, **_named: refuse())
        refused("disk_full", lambda: sealed.write(entry("one"), secret))
    assert sealed.head() is None
    with monkeypatch.context() as patch:
        # Killed after the rename: the file counts, and once something rests on it, it must exist.
        patch.setattr(keyfile, "read_private", lambda *_args, **_named: refuse())
        refused("disk_full", lambda: sealed.write(entry("one"), secret))
    assert sealed.head().names == ("one",)
    sealed.confirm()
    Path(sealed.path).unlink()
    refused("keystore_unreachable", sealed.head)


def refuse() -> t.NoReturn:
    raise TdeError("disk_full", "there is no space")


def test_a_provider_is_left_once_no_key_of_it_is_set() -> None:
    assert engine._used(facts(default_key=key(), server_key=key(provider="old"))) == {"hsm-tde-file", "old"}
    there = sql.Provider(-1, "hsm-tde-file", "file", WISHED)
    assert engine._used(facts(providers=(there,), default_key=SetKey(problem="down"))) == {"hsm-tde-file"}
