# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every failure of the collection: one exception and one table of stable codes.

``docs/error-codes.md`` is generated from :data:`ERROR_CODES`; a code that is not in the table
cannot be raised.
"""

from __future__ import annotations

import typing as t

#: What can be the matter, and never folded into one another (see docs/architecture.md).
CAUSES: dict[str, str] = {
    "absent": "It was looked for where it would be, and it is not there.",
    "refused": "A credential or a permission was refused.",
    "locked": "The token or the key counts too many wrong tries, or another run holds the lock.",
    "unreachable": "It must exist, and it did not answer or does not show.",
    "unsupported": "This token, kernel, file system or server cannot do it.",
    "damaged": "It is there and its content is not what it was.",
    "client_error": "What was asked for is wrong or incomplete; nothing was tried.",
}


class ErrorCode(t.NamedTuple):
    """A row of the table: its cause (a key of CAUSES) and what it means to the reader."""

    cause: str
    meaning: str


ERROR_CODES: dict[str, ErrorCode] = {
    # common
    "internal_error": ErrorCode("client_error", "A defect of this collection: please report it with the name of the step."),
    "invalid_option": ErrorCode("client_error", "An option is missing, unknown, malformed or contradicts another."),
    "secret_not_text": ErrorCode(
        "client_error", "YAML read a secret as a number or a boolean (01234567 is octal): quote it. It was not tried."
    ),
    "python_too_old": ErrorCode("unsupported", "The target's Python is older than 3.10."),
    "library_missing": ErrorCode("absent", "A Python library is missing on the target: run the role hsm.tde.prerequisites."),
    "permission_denied": ErrorCode("refused", "The operating system refused; most acts need root."),
    "file_absent": ErrorCode("absent", "A file that was named does not exist."),
    "file_not_private": ErrorCode("refused", "A file or one of its parents has the wrong type, owner, mode or link count."),
    "file_too_large": ErrorCode("damaged", "A file is larger than any that this collection writes."),
    "disk_full": ErrorCode("unreachable", "No space left; the former file is untouched."),
    "io_error": ErrorCode("unreachable", "Reading or writing failed in the operating system."),
    "busy": ErrorCode("locked", "Another run holds the lock; nothing was begun."),
    "timeout": ErrorCode("unreachable", "No answer within the time allowed."),
    "command_missing": ErrorCode("absent", "A program that the step needs is not installed."),
    "command_failed": ErrorCode("unreachable", "A program that the step needs ended with an error."),
    "journal_damaged": ErrorCode("damaged", "The journal's hash chain is broken: entries were changed, removed or added."),
    "registry_damaged": ErrorCode("damaged", "The registry of tokens and keys cannot be read."),
}


class TdeError(Exception):
    """A failure that a user reads.

    :param code: a key of :data:`ERROR_CODES`.
    :param message: what happened, in one sentence, never with a secret.
    :param obj: the object concerned (``token demo``, ``keyslot recovery of key cluster`` …).
    :param kept: what was left as it was.
    :param next_step: what the reader can do now.
    :param details: public facts for programs; becomes part of the result.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        obj: str = "",
        kept: str = "Nothing was changed.",
        next_step: str = "",
        details: dict[str, t.Any] | None = None,
    ) -> None:
        entry = ERROR_CODES[code]
        self.code = code
        self.cause = entry.cause
        self.message = message
        self.obj = obj
        self.kept = kept
        self.next_step = next_step
        self.details = details or {}
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.obj}: {self.message}" if self.obj else self.message
        return " ".join(part for part in (f"{head} [{self.cause}]", self.kept, self.next_step) if part)

    def result(self) -> dict[str, t.Any]:
        """The fields that a failed module returns beside ``msg``."""
        return {
            "error_code": self.code,
            "cause": self.cause,
            "object": self.obj,
            "kept": self.kept,
            "next_step": self.next_step,
            "details": self.details,
        }
