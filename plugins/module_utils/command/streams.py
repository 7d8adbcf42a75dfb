# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Standard input and output as what carries a secret: bytes, bounded, and no terminal."""

from __future__ import annotations

import os

from ..common.errors import TdeError
from ..common.secret import Secret

STDIN, STDOUT = 0, 1


def no_terminal(descriptor: int, force: bool, obj: str, why: str) -> None:
    """Refuse a terminal.

    :raises TdeError: ``terminal_refused``.
    """
    if not force and os.isatty(descriptor):
        raise TdeError("terminal_refused", f"is a terminal. {why}", obj=obj, next_step="Use a pipe, or --force.")


def read_secret(most: int) -> Secret:
    """All of standard input.

    :param most: bytes.
    :raises TdeError: ``keystore_too_large``.
    """
    parts: list[bytes] = []
    while sum(map(len, parts)) <= most:
        part = os.read(STDIN, most + 1)
        if not part:
            return Secret(b"".join(parts))
        parts.append(part)
    raise TdeError("keystore_too_large", f"holds more than {most} bytes", obj="standard input")


def write_out(secret: Secret | bytes) -> None:
    """All of it to standard output."""
    left = memoryview(secret.reveal() if isinstance(secret, Secret) else secret)
    while left:
        left = left[os.write(STDOUT, left) :]
