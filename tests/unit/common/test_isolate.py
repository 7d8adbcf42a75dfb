# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""An act in a child: its result, its error, its end in time."""

from __future__ import annotations

import os
import signal
import time

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.isolate import isolated


def test_the_result_comes_back_and_the_parent_is_untouched() -> None:
    def act() -> dict[str, object]:
        os.environ["ISOLATED"] = "yes"
        return {"pid": os.getpid(), "long": "x" * 300_000}

    result = isolated(act)
    assert result["pid"] != os.getpid()
    assert len(result["long"]) == 300_000
    assert "ISOLATED" not in os.environ


def test_one_of_our_errors_is_the_same_error_here() -> None:
    error = TdeError("pin_refused", "wrong", obj="token demo", kept="K.", next_step="N.", details={"ckr": "X"})

    def act() -> None:
        raise error

    with pytest.raises(TdeError) as caught:
        isolated(act)
    assert caught.value.result() == error.result()
    assert str(caught.value) == str(error)


def test_a_foreign_error_s_text_does_not_come_out() -> None:
    def act() -> None:
        raise ValueError("PIN 1234")

    with pytest.raises(TdeError) as caught:
        isolated(act)
    assert caught.value.code == "internal_error"
    assert "1234" not in str(caught.value)
    assert "ValueError" in str(caught.value)


def test_a_library_that_hangs_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(TdeError) as caught:
        isolated(lambda: time.sleep(60), seconds=0.3)
    assert caught.value.code == "timeout"
    assert time.monotonic() - started < 5


def test_a_library_that_crashes_is_told_apart() -> None:
    with pytest.raises(TdeError) as caught:
        isolated(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert caught.value.code == "internal_error"
    assert f"signal {int(signal.SIGKILL)}" in str(caught.value)
