# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A PIN that is tried before another one, noted first: a kill between the two leaves a wrong try in the token's flags.

The next run would take it for somebody's mistake and stop. With the note it knows whose it was, and which PIN it is not.
``trying.json``, there only while two PINs may be tried::

    {"salt": hex, "token_label": str, "token_serial": str, "user": "user"|"so", "fingerprint": hex}
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets

from ..common.errors import TdeError
from ..common.files import lock, remove_leftovers_of, trusted_directory
from ..common.secret import Secret
from ..common.state import StateDirectory, read_json, write_json
from .refused import SALT_BYTES, pin_fingerprint


class Trying:
    """The note on one token's user.

    :param state: the state directory; it is created by the first note.
    """

    def __init__(self, state: StateDirectory, token_label: str, token_serial: str, user: str) -> None:
        self._state = state
        self._path = state.trying
        self._whose = {"token_label": token_label, "token_serial": token_serial, "user": user}

    def _fingerprint(self, salt: str, pin: Secret) -> str:
        return pin_fingerprint(salt, self._whose["token_label"], self._whose["token_serial"], self._whose["user"], pin)

    def begin(self, pin: Secret) -> None:
        """Note the PIN that is tried first."""
        salt = secrets.token_hex(SALT_BYTES)
        self._state.create()
        with lock(self._path + ".lock", wait_seconds=10):
            remove_leftovers_of(self._path)
            write_json(self._path, {"salt": salt, "fingerprint": self._fingerprint(salt, pin), **self._whose})

    def end(self) -> None:
        """Strike the note out, if there is one."""
        if self._state.exists():
            with trusted_directory(self._state.path) as folder, contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.basename(self._path), dir_fd=folder)

    def was(self, pin: Secret) -> bool:
        """Whether a run was killed that tried this PIN first.

        :raises TdeError: ``refused_pins_damaged``, and what reading a private file raises.
        """
        note = read_json(self._path, "refused_pins_damaged", {}) if self._state.exists() else {}
        if not isinstance(note, dict) or any(note.get(name) != value for name, value in self._whose.items()):
            return False
        try:
            found = self._fingerprint(note["salt"], pin)
            return hmac.compare_digest(note["fingerprint"], found)
        except (KeyError, TypeError, ValueError):
            raise TdeError("refused_pins_damaged", "is of another shape", obj=self._path, next_step="Remove the file.") from None
