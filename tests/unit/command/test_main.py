# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The command line: what is done with an engine's answers, what is printed, which exit code."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import credentials, keystores, main
from ansible_collections.hsm.tde.plugins.module_utils.common import isolate
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.engines import record as records
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import KeystoreWish, Outcome, Request

PIN = "0123-marker"


class FakeEngine:
    """An engine whose places are open or closed as a file says; it wants :data:`PIN`.

    It is called in children, so what it saw is in files.
    """

    folder: Path
    error: str | None = None

    def __init__(self, request: Request) -> None:
        self.request = request
        self.flag = self.folder / request.cluster

    def opened_with(self) -> str:
        return "keyslot"

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        is_open = self.flag.exists()
        if is_open == (wish.state == "open"):
            return Outcome([], {}, {})
        plan = [Step(f"{wish.state}_place", "/srv/tde")]
        if check:
            return Outcome(plan, {}, {})
        if wish.state == "open":
            with (self.folder / "tries").open("a") as handle:
                handle.write("x")
            access = self.request.access
            if self.error and not (self.folder / "answers").exists():
                raise TdeError(self.error, "by the test")
            if access is None or access.pin != Secret(PIN):
                raise TdeError("pin_refused", "by the test")
            self.flag.touch()
        else:
            self.flag.unlink()
        return Outcome(plan, {}, {})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    fake = type("Engine", (FakeEngine,), {"folder": tmp_path})
    monkeypatch.setattr(keystores.engines, "load", lambda name: fake, raising=False)
    monkeypatch.setattr(keystores, "keyslot_tokens", lambda state, cluster: [credentials.TokenName("demo", "1")])
    return fake


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDirectory:
    for module in (main, isolate):
        monkeypatch.setattr(module, "harden_process", lambda: [])
    monkeypatch.setattr(main.os, "geteuid", lambda: 0)
    monkeypatch.setattr(credentials, "has_terminal", lambda: False)
    return StateDirectory(str(tmp_path / "state"))


def add_cluster(state: StateDirectory, name: str = "main", pin: str | None = PIN) -> None:
    state.create()
    source = {"kind": "none"}
    if pin is not None:
        path = Path(state.path, f"{name}.pin")
        path.write_text(pin)
        path.chmod(0o600)
        source = {"kind": "file", "path": str(path)}
    records.write(
        state, records.Record(name, "postgresql", tokens=(records.Token("/usr/lib/p11.so", {}, "demo", "1"),), pin_source=source)
    )


def run(state: StateDirectory, *arguments: str) -> int:
    return main.main(["--state-directory", state.path, *arguments])


def test_open_and_close_and_again_nothing(
    state: StateDirectory, engine: type, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    add_cluster(state)
    assert run(state, "open", "main") == 0
    assert run(state, "open", "main") == 0
    assert run(state, "close", "main") == 0
    assert run(state, "close", "main") == 0
    assert capsys.readouterr().out == "main: opened\nmain: nothing to open\nmain: closed\nmain: is closed\n"
    assert (tmp_path / "tries").read_text() == "x"


def test_what_is_open_needs_no_credential(state: StateDirectory, engine: type, tmp_path: Path) -> None:
    add_cluster(state, pin=None)
    assert run(state, "open", "main") == 3
    (tmp_path / "main").touch()
    assert run(state, "open", "main") == 0


def test_a_refused_pin_is_tried_once_although_there_is_time(state: StateDirectory, engine: type, tmp_path: Path) -> None:
    add_cluster(state, pin="wrong")
    assert run(state, "open", "--wait", "60", "main") == 4
    assert (tmp_path / "tries").read_text() == "x"


def test_the_other_pin_of_an_unfinished_change_is_tried(state: StateDirectory, engine: type, tmp_path: Path) -> None:
    add_cluster(state)
    coming = Path(state.path, "main.pin.new")
    coming.write_text("not yet")
    coming.chmod(0o600)
    assert run(state, "open", "main") == 0
    assert (tmp_path / "tries").read_text() == "xx"


def test_after_another_answer_than_a_refusal_the_other_pin_is_not_tried(
    state: StateDirectory, engine: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_cluster(state)
    coming = Path(state.path, "main.pin.new")
    coming.write_text("not yet")
    coming.chmod(0o600)
    monkeypatch.setattr(engine, "error", "pin_locked")
    assert run(state, "open", "main") == 5
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.parametrize("error", ["token_unreachable", "busy"])
def test_a_token_that_comes_back_is_waited_for(
    state: StateDirectory, engine: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str
) -> None:
    add_cluster(state)
    monkeypatch.setattr(engine, "error", error)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (tmp_path / "answers").touch()

    monkeypatch.setattr(keystores.time, "sleep", sleep)
    assert run(state, "open", "--wait", "60", "main") == 0
    assert len(pauses) == 2


def test_without_time_an_unreachable_token_is_told_at_once(
    state: StateDirectory, engine: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cluster(state)
    monkeypatch.setattr(engine, "error", "token_unreachable")
    monkeypatch.setattr(keystores.time, "sleep", lambda seconds: pytest.fail("waited"))
    assert run(state, "open", "main") == 6


def test_one_cluster_that_fails_does_not_keep_the_others_closed(
    state: StateDirectory, engine: type, capsys: pytest.CaptureFixture[str]
) -> None:
    add_cluster(state, "a", pin="wrong")
    add_cluster(state, "b")
    assert run(state, "open", "--all", "--json") == 4
    said = json.loads(capsys.readouterr().out)["clusters"]
    assert said["a"]["error_code"] == "pin_refused"
    assert said["b"]["plan"] == [{"action": "open_place", "object": "/srv/tde", "why": ""}]


def test_no_secret_is_printed(
    state: StateDirectory, engine: type, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cluster(state)
    for arguments in (["open", "main"], ["open", "main", "--json"], ["close", "main"], ["journal", "show", "--json"]):
        run(state, *arguments)
    monkeypatch.setattr(engine, "error", "pin_locked")
    run(state, "open", "main")
    out = capfd.readouterr()
    assert PIN not in out.out + out.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["open"], 2), (["open", "--all", "main"], 2), (["open", "nosuch"], 3), (["open", "../x"], 2), (["close", "nosuch"], 3)],
)
def test_wrong_calls(
    state: StateDirectory, engine: type, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    add_cluster(state)
    assert run(state, *arguments) == code
    assert capsys.readouterr().err.startswith("hsm-tde: ")


@pytest.mark.parametrize(
    "arguments", [[], ["nosuch"], ["open", "--pin", "1234"], ["open", "--wait", "-1"], ["open", "--wait", "nan"]]
)
def test_what_argparse_refuses(state: StateDirectory, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(state, *arguments)
    assert caught.value.code == 2


def test_a_defect_shows_its_place_and_not_its_text(
    state: StateDirectory, engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: t.Any) -> t.NoReturn:
        raise RuntimeError(PIN)

    add_cluster(state)
    monkeypatch.setattr(keystores, "each", broken)
    assert run(state, "close", "main") == 1
    err = capsys.readouterr().err
    assert "RuntimeError" in err
    assert PIN not in err


def test_it_wants_root(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.os, "geteuid", lambda: 1000)
    assert run(state, "status") == 4


def test_the_journal_is_shown_and_verified(state: StateDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(state, "journal", "verify") == 0
    journal = Journal(state.journal)
    for number in range(3):
        journal.append("open_key", f"data key {number}", cluster="main" if number else "other")
    assert run(state, "journal", "verify") == 0
    assert "3 entries, the chain is whole" in capsys.readouterr().out
    assert run(state, "journal", "show", "--last", "1") == 0
    shown = capsys.readouterr().out
    assert "data key 2" in shown
    assert "data key 1" not in shown
    assert run(state, "journal", "show", "--cluster", "other", "--json") == 0
    assert [entry["object"] for entry in json.loads(capsys.readouterr().out)["entries"]] == ["data key 0"]
    path = Path(state.journal)
    path.write_text(path.read_text().replace("data key 1", "data key 9"))
    assert run(state, "journal", "verify") == 8
    assert "journal_damaged" in capsys.readouterr().err
