# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What ``hsm-tde`` prints: lines for people, or one JSON object."""

from __future__ import annotations

import json
import sys
import typing as t

from ..common.errors import TdeError


class Output:
    """Standard output and standard error of one run.

    :param as_json: print one JSON object instead of lines.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        """A sentence that does not change the result."""
        if self.as_json:
            self._warnings.append(text)
        else:
            sys.stderr.write(f"hsm-tde: warning: {text}\n")

    def result(self, facts: t.Mapping[str, t.Any], lines: t.Iterable[str]) -> None:
        """The result, as facts for programs and as lines for people. Once a run."""
        if self.as_json:
            sys.stdout.write(json.dumps({**facts, "warnings": self._warnings}, indent=1, sort_keys=True) + "\n")
        else:
            for line in lines:
                sys.stdout.write(f"{line}\n")

    def error(self, error: TdeError) -> None:
        """A failure that ends the run."""
        if self.as_json:
            self.result({"failed": True, **public(error)}, ())
        else:
            sys.stderr.write(f"hsm-tde: {error} ({error.code})\n")


def public(error: TdeError) -> dict[str, t.Any]:
    """A failure as a module returns it."""
    return {"msg": str(error), **error.result()}
