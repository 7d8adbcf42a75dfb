# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a PIN or passphrase comes from, and which are tried in which order."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import credentials
from ansible_collections.hsm.tde.plugins.module_utils.command.credentials import Given, TokenName
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.engines.record import Record, Token

DEMO = Token("/usr/lib/p11.so", {"CONF": "/etc/p11"}, "demo", "0a1b")
SECOND = Token("/usr/lib/other.so", {}, "second", "22")
ON = [TokenName("demo", "0a1b"), TokenName("second", "22")]


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "has_terminal", lambda: False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def record(kind: str = "none", path: Path | str = "") -> Record:
    return Record("main", "postgresql", tokens=(DEMO, SECOND), pin_source={"kind": kind, "path": str(path)})


def private(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path


def pins(tried: t.Sequence[credentials.Credential]) -> list[tuple[str, bool]]:
    return [(one.access.pin.text(), one.access.allow_low_pin_count) for one in tried if one.access and one.access.pin]


def code(act: t.Callable[[], t.Any]) -> str:
    with pytest.raises(TdeError) as caught:
        act()
    return caught.value.code


def test_the_first_keyslot_s_token_is_reached_through_the_record_s_library(tmp_path: Path) -> None:
    tried = credentials.tries(record("file", private(tmp_path / "pin", "1234\n")), ON, Given())
    assert len(tried) == 1
    access = tried[0].access
    assert access is not None
    assert (access.library.path, dict(access.library.environment)) == ("/usr/lib/p11.so", {"CONF": "/etc/p11"})
    assert (access.selector.label, access.selector.serial) == ("demo", "0a1b")
    assert pins(tried) == [("1234", False)]


def test_after_an_unfinished_pin_change_the_new_pin_is_tried_first_and_the_old_one_although_a_try_was_counted(
    tmp_path: Path,
) -> None:
    private(tmp_path / "pin.new", "new\n")
    tried = credentials.tries(record("file", private(tmp_path / "pin", "old\n")), ON, Given())
    assert pins(tried) == [("new", False), ("old", True)]


def test_a_credential_of_systemd_is_found_under_its_file_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private(tmp_path / "main.pin", "5678")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert pins(credentials.tries(record("credential", "/etc/credstore.encrypted/main.pin"), ON, Given())) == [("5678", False)]


def test_another_token_s_pin_is_not_taken_from_the_source(tmp_path: Path) -> None:
    source = record("file", private(tmp_path / "pin", "1234\n"))
    assert code(lambda: credentials.tries(source, ON, Given(token="second"))) == "pin_source_missing"
    tried = credentials.tries(source, ON, Given(pin=Secret("9"), token="second"))
    assert tried[0].access is not None
    assert tried[0].access.library.path == "/usr/lib/other.so"


def test_a_stated_pin_wins_over_the_source(tmp_path: Path) -> None:
    assert pins(credentials.tries(record("file", private(tmp_path / "pin", "1\n")), ON, Given(pin=Secret("2")))) == [("2", False)]


def test_a_passphrase_needs_no_token() -> None:
    tried = credentials.tries(Record("main", "postgresql"), [], Given(passphrase=Secret("correct horse")))
    assert [(one.access, one.passphrase) for one in tried] == [(None, Secret("correct horse"))]


def test_without_source_and_terminal_nothing_is_tried_and_the_next_step_is_named() -> None:
    with pytest.raises(TdeError) as caught:
        credentials.tries(record(), ON, Given())
    assert caught.value.code == "pin_source_missing"
    assert "hsm-tde open main" in str(caught.value)


@pytest.mark.parametrize(("given", "expected"), [(Given(), "PIN of token demo"), (Given(ask_passphrase=True), "Passphrase")])
def test_somebody_at_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, given: Given, expected: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(credentials, "has_terminal", lambda: True)
    monkeypatch.setattr(credentials.getpass, "getpass", lambda prompt: asked.append(prompt) or "typed")
    tried = credentials.tries(record(), ON, given)
    assert expected in asked[0]
    assert [one.access.pin if one.access else one.passphrase for one in tried] == [Secret("typed")]


def test_a_cluster_without_a_token_is_asked_for_its_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "has_terminal", lambda: True)
    monkeypatch.setattr(credentials.getpass, "getpass", lambda prompt: "typed")
    assert credentials.tries(record(), [], Given())[0].passphrase == Secret("typed")


def test_a_keyslot_s_token_that_the_record_does_not_know_is_not_loaded_from_elsewhere() -> None:
    assert code(lambda: credentials.tries(record(), [TokenName("foreign", "1")], Given(pin=Secret("1")))) == "record_damaged"


def test_a_token_that_no_keyslot_is_on_is_refused() -> None:
    assert code(lambda: credentials.tries(record(), ON, Given(pin=Secret("1"), token="nosuch"))) == "invalid_option"


def descriptor(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


@pytest.mark.parametrize("content", [b"pin", b"pin\n"])
def test_a_secret_from_a_descriptor(content: bytes) -> None:
    assert credentials.read_descriptor(descriptor(content)) == Secret("pin")


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"a\0b", b"x" * (1 << 16) + b"x"])
def test_what_is_not_one_line_is_refused(content: bytes) -> None:
    reader = os.memfd_create("secret")
    os.write(reader, content)
    os.lseek(reader, 0, os.SEEK_SET)
    assert code(lambda: credentials.read_descriptor(reader)) == "invalid_option"


def test_a_descriptor_that_is_a_terminal_or_closed_is_refused() -> None:
    dummy, terminal = os.openpty()
    assert code(lambda: credentials.read_descriptor(terminal)) == "terminal_refused"
    assert code(lambda: credentials.read_descriptor(987)) == "invalid_option"
