"""A plan runs in order, and not at all when one of its steps cannot be carried out."""

from __future__ import annotations

import ast
import pathlib

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import CAUSES, ERROR_CODES, TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.plan import Step, public, run
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret, secret_from_option


def test_steps_run_in_order():
    seen = []
    run([Step("a", "x"), Step("b", "y")], {"a": lambda s: seen.append(s.obj), "b": lambda s: seen.append(s.obj)})
    assert seen == ["x", "y"]


def test_nothing_runs_when_a_step_has_no_handler():
    seen = []
    with pytest.raises(KeyError):
        run([Step("a", "x"), Step("b", "y")], {"a": lambda s: seen.append(s.obj)})
    assert seen == []


def failing(code: str, **facts: str):
    def act(step):
        raise TdeError(code, "failed", obj=step.obj, **facts)

    return act


def test_a_failure_says_which_steps_were_done_before_it():
    """ "Nothing was changed" would be a lie after the first step."""
    plan = [Step("a", "x"), Step("a", "y"), Step("b", "z")]
    with pytest.raises(TdeError) as first:
        run([Step("b", "z")], {"b": failing("disk_full")})
    assert first.value.kept == "Nothing was changed."
    with pytest.raises(TdeError) as later:
        run(plan, {"a": lambda step: None, "b": failing("disk_full")})
    assert later.value.kept == "What was done before it stays done: a."
    with pytest.raises(TdeError) as own:
        run(plan, {"a": lambda step: None, "b": failing("disk_full", kept="The former file is in place.")})
    own.value.after(["earlier"])
    assert own.value.kept == "What was done before it stays done: earlier, a. The former file is in place."
    assert own.value.kept in str(own.value)


def test_a_failure_of_what_follows_a_step_counts_the_step_as_done():
    with pytest.raises(TdeError) as caught:
        run([Step("a", "x")], {"a": lambda step: None}, failing("disk_full"))
    assert caught.value.kept == "What was done before it stays done: a."


def test_a_step_shows_no_data():
    assert public([Step("a", "x", "because", {"path": "/p"})]) == [{"action": "a", "object": "x", "why": "because"}]


def test_every_code_has_a_known_cause_and_a_meaning():
    assert all(entry.cause in CAUSES and entry.meaning.endswith(".") for entry in ERROR_CODES.values())


def test_an_error_says_object_cause_what_was_kept_and_the_next_step():
    error = TdeError("busy", "another run holds the lock", obj="/state", next_step="Wait.")
    assert str(error) == "/state: another run holds the lock [locked] Nothing was changed. Wait."
    assert error.result()["error_code"] == "busy"


def test_every_error_that_is_raised_has_a_next_step_and_says_what_was_kept():
    """Of the place that raises it, or of its code."""
    silent = []
    for path in sorted((pathlib.Path(__file__).parents[3] / "plugins").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "TdeError":
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            code = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            advised = code is None or ERROR_CODES[code].advice
            if given.get("kept") == "''" or not (given.get("next_step", "''") != "''" or advised or None in given):
                silent.append(f"{path.name}:{node.lineno} {code}")
    assert silent == []


def test_a_secret_does_not_print():
    secret = Secret("geheim")
    assert "geheim" not in f"{secret} {secret!r} {[secret]}"
    assert secret.reveal() == b"geheim"


@pytest.mark.parametrize("value", [1234, 0.5, True, ["a"], {"a": 1}])
def test_a_secret_that_is_not_text_is_refused(value):
    with pytest.raises(TdeError) as caught:
        secret_from_option("pin", value)
    assert caught.value.code == "secret_not_text"
    assert "1234" not in str(caught.value)
