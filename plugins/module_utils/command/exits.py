# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Exit codes of ``hsm-tde``: one a cause, so that a unit or a script knows whether trying again can help."""

from __future__ import annotations

from ..common.errors import TdeError

DONE = 0
INTERNAL = 1

#: 2 is also what argparse answers to a wrong command line.
BY_CAUSE = {
    "client_error": 2,
    "absent": 3,
    "refused": 4,
    "locked": 5,
    "unreachable": 6,
    "unsupported": 7,
    "damaged": 8,
}

UNREACHABLE = BY_CAUSE["unreachable"]

#: A unit does not start again on these: only what did not answer may answer later.
NOT_TRIED_AGAIN = tuple(sorted({INTERNAL, *BY_CAUSE.values()} - {UNREACHABLE}))


def exit_code(error: TdeError) -> int:
    """The exit code of a failure."""
    return INTERNAL if error.code == "internal_error" else BY_CAUSE[error.cause]
