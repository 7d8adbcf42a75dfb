"""Conversations with programs that ask on their terminal."""

from __future__ import annotations

import sys
import time

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.terminal import Answer, converse

SECRET = Secret("Pass-phrase!{}\\")


def program(code: str) -> list[str]:
    return [sys.executable, "-IS", "-c", f"import getpass, sys, os, time\n{code}"]


def test_a_secret_is_typed_at_the_prompt_and_shows_nowhere():
    code = "a = getpass.getpass('Enter new pass phrase:'); b = getpass.getpass('again pass phrase:'); print(a == b, len(a)); sys.exit(3)"
    said = converse(program(code), [Answer("pass phrase:", SECRET, times=2)])
    assert (said.code, said.last_line, said.asked_again) == (3, f"True {len(SECRET)}", False)
    assert SECRET.text() not in said.text


def test_a_program_that_repeats_the_secret_is_scrubbed():
    said = converse(program("print('you said', getpass.getpass('pass phrase:'))"), [Answer("pass phrase:", SECRET)])
    assert (said.last_line, SECRET.text() in said.text) == ("you said ***", False)


def test_an_answer_that_is_refused_is_not_given_twice():
    code = "n = 0\nwhile True:\n n += 1\n getpass.getpass('pass phrase:')\n print('tries', n)"
    said = converse(program(code), [Answer("pass phrase:", SECRET)], timeout=10)
    assert said.asked_again
    assert said.code < 0
    assert "tries 2" not in said.text


def test_answers_are_chosen_by_what_was_said_since_the_last_one():
    code = (
        "for who in ('Admin Card #1', 'Operator'):\n print(who)\n print(getpass.getpass('passphrase:') == "
        "{'Admin Card #1': 'one', 'Operator': 'two'}[who])"
    )
    answers = [Answer(r"(?s)Admin Card.*passphrase:", Secret("one")), Answer("passphrase:", Secret("two"))]
    assert "False" not in converse(program(code), answers).text


def test_a_program_that_waits_is_ended_and_told_at_what():
    begun = time.monotonic()
    with pytest.raises(TdeError) as caught:
        converse(program("print('Please insert a card', flush=True); time.sleep(60)"), [], timeout=1)
    assert (caught.value.code, time.monotonic() - begun < 15) == ("timeout", True)
    assert "Please insert a card" in caught.value.message


def test_what_a_terminal_would_act_on_is_refused_before():
    with pytest.raises(TdeError) as caught:
        converse(program("pass"), [Answer("x", Secret("a\x03b"))])
    assert caught.value.code == "invalid_option"


def test_a_program_that_is_not_there():
    with pytest.raises(TdeError) as caught:
        converse(["/opt/nothing/bin/ppmk"], [])
    assert caught.value.code == "command_missing"
