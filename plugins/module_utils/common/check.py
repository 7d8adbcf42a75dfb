# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Two questions that Python's own words answer badly: is it a whole number, and was it really established."""

from __future__ import annotations

import typing as t

from .errors import TdeError

T = t.TypeVar("T")


def is_int(value: object) -> t.TypeGuard[int]:
    """Whether a JSON value is a whole number: true and false are integers to isinstance, and none to us."""
    return isinstance(value, int) and not isinstance(value, bool)


def established(value: T | None, what: str) -> T:
    """A value that an earlier step has established; that it is missing is a defect.

    :raises TdeError: ``internal_error``.
    """
    if value is None:
        raise TdeError("internal_error", "was used before it was established", obj=what)
    return value
