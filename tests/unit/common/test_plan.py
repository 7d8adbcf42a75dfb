"""A plan runs in order, and not at all when one of its steps cannot be carried out."""

from __future__ import annotations

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


def test_a_step_shows_no_data():
    assert public([Step("a", "x", "because", {"path": "/p"})]) == [{"action": "a", "object": "x", "why": "because"}]


def test_every_code_has_a_known_cause_and_a_meaning():
    assert all(entry.cause in CAUSES and entry.meaning.endswith(".") for entry in ERROR_CODES.values())


def test_an_error_says_object_cause_what_was_kept_and_the_next_step():
    error = TdeError("busy", "another run holds the lock", obj="/state", next_step="Wait.")
    assert str(error) == "/state: another run holds the lock [locked] Nothing was changed. Wait."
    assert error.result()["error_code"] == "busy"


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
