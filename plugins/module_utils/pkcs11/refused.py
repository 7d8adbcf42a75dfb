# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PINs that a token refused: kept as salted fingerprints, root only, so that none is tried twice.

PKCS#11 has no counter of tries; a play that runs again with the same wrong PIN locks the token. A PIN has few
digits, so no fingerprint hides it from who can read the file: the mode 0600 does. ``refused.json``::

    {"version": 1, "salt": hex,
     "refused": [{"token_label": str, "token_serial": str, "user": "user"|"so", "fingerprint": hex, "time": ISO 8601}]}
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import typing as t

from ..common.errors import TdeError
from ..common.files import lock, remove_leftovers_of
from ..common.secret import Secret
from ..common.state import StateDirectory, read_json, write_json

_VERSION = 1
#: PBKDF2 is there under FIPS rules too, where scrypt is not. Iterations: NIST SP 800-132 asks for as many as the
#: user bears; this is below 0.1 s, paid only while the token has an entry.
_ITERATIONS = 200_000
SALT_BYTES = 32
#: Of each token and user, the oldest go first; more wrong PINs than this lock any token that counts.
_KEEP = 16


class RefusedPins:
    """A host's refused PINs.

    :param state: the state directory; it is created by the first refusal.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._state = state

    def knows(self, token_label: str, token_serial: str, user: str, pin: Secret) -> bool:
        """Whether the token refused this PIN for this user before.

        :raises TdeError: ``refused_pins_damaged``.
        """
        content = self._read()
        mine = [row for row in content["refused"] if _of(row, token_label, token_serial, user)]
        if not mine:
            return False
        fingerprint = pin_fingerprint(content["salt"], token_label, token_serial, user, pin)
        return any(hmac.compare_digest(row["fingerprint"], fingerprint) for row in mine)

    def count(self, token_label: str, token_serial: str, user: str) -> int:
        """How many different PINs the token refused since the last change."""
        return sum(_of(row, token_label, token_serial, user) for row in self._read()["refused"])

    def remember(self, token_label: str, token_serial: str, user: str, pin: Secret) -> None:
        """Enter a refused PIN."""

        def change(content: dict[str, t.Any]) -> None:
            fingerprint = pin_fingerprint(content["salt"], token_label, token_serial, user, pin)
            others = [row for row in content["refused"] if row["fingerprint"] != fingerprint]
            mine = [row for row in others if _of(row, token_label, token_serial, user)]
            if len(mine) >= _KEEP:
                others.remove(mine[0])
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            content["refused"] = [
                *others,
                {"token_label": token_label, "token_serial": token_serial, "user": user, "fingerprint": fingerprint, "time": now},
            ]

        self._change(change)

    def forget(self, token_label: str, token_serial: str, user: str) -> None:
        """Strike out all of a token's user: its PIN was set anew, so that a former refusal says nothing."""
        if not self.count(token_label, token_serial, user):
            return

        def change(content: dict[str, t.Any]) -> None:
            content["refused"] = [row for row in content["refused"] if not _of(row, token_label, token_serial, user)]

        self._change(change)

    def _read(self) -> dict[str, t.Any]:
        content = read_json(self._state.refused, "refused_pins_damaged", {"version": _VERSION, "salt": "", "refused": []})
        if not _sound(content):
            raise TdeError(
                "refused_pins_damaged",
                "is of another version or shape",
                obj=self._state.refused,
                next_step="Check that the PIN is right, then remove the file.",
            )
        return t.cast("dict[str, t.Any]", content)

    def _change(self, change: t.Callable[[dict[str, t.Any]], None]) -> None:
        self._state.create()
        with lock(self._state.refused + ".lock", wait_seconds=10):
            remove_leftovers_of(self._state.refused)
            content = self._read()
            content["salt"] = content["salt"] or secrets.token_hex(SALT_BYTES)
            change(content)
            write_json(self._state.refused, content)


def _of(row: dict[str, str], token_label: str, token_serial: str, user: str) -> bool:
    return (row["token_label"], row["token_serial"], row["user"]) == (token_label, token_serial, user)


def pin_fingerprint(salt: str, token_label: str, token_serial: str, user: str, pin: Secret) -> str:
    """A PIN's fingerprint, in hex.

    :param salt: in hex.
    """
    # The lengths are written out, so that no two tokens' fields run into one another.
    context = "".join(f"{len(part)}:{part}" for part in (token_label, token_serial, user)).encode()
    return hashlib.pbkdf2_hmac("sha256", pin.reveal(), bytes.fromhex(salt) + context, _ITERATIONS).hex()


def _sound(content: t.Any) -> bool:
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return False
    if not isinstance(content.get("salt"), str) or not isinstance(content.get("refused"), list):
        return False
    fields = {"token_label", "token_serial", "user", "fingerprint", "time"}
    return all(
        isinstance(row, dict) and fields <= set(row) and all(isinstance(row[field], str) for field in fields)
        for row in content["refused"]
    )
