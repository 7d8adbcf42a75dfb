# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the host remembers of a database's keystore that the database tells nobody: ``<state>/oracle/<cluster>.json``, root's own, 0600.

Credentials are kept as salted fingerprints (scrypt), to tell one that was changed already from one that is to be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import typing as t

from ...common.errors import TdeError
from ...common.secret import Secret
from ...common.state import StateDirectory, check_name, read_json, write_json
from .facts import Guard
from .plan import Change

#: RFC 7914; 16 MiB, some 50 ms.
_N, _R, _P = 1 << 14, 8, 1


@dataclasses.dataclass(frozen=True)
class Memo:
    """A keystore as it is remembered.

    :ivar guard: what guards the master keys; None before there was one.
    :ivar credential: fingerprint of the credential that opened the keystore last; :ivar secret: of that in auto-login;
    :ivar external: of that in the external store.
    :ivar software: the software keystore was made; :ivar keyed: containers that were given a master key.
    :ivar former: guards and credentials of before that backups still need, each with the time until which it was in use.
    """

    guard: Guard | None = None
    credential: str = ""
    secret: str = ""
    external: str = ""
    software: bool = False
    keyed: tuple[str, ...] = ()
    former: tuple[t.Mapping[str, t.Any], ...] = ()
    change: Change | None = None


def fingerprint(secret: Secret, kept: str = "") -> str:
    """``salt:hash``, with the salt of a kept one."""
    salt = kept.partition(":")[0] or os.urandom(16).hex()
    return f"{salt}:{hashlib.scrypt(secret.reveal(), salt=salt.encode(), n=_N, r=_R, p=_P).hex()}"


def same(secret: Secret, kept: str) -> bool:
    """Whether a kept fingerprint is of this secret."""
    return bool(kept) and hmac.compare_digest(fingerprint(secret, kept), kept)


def path(state: StateDirectory, cluster: str) -> str:
    """The file."""
    return os.path.join(state.path, "oracle", check_name("cluster", cluster) + ".json")


def read(state: StateDirectory, cluster: str) -> Memo:
    """What is remembered; nothing where there is no file.

    :raises TdeError: ``oracle_memo_damaged``.
    """
    where = path(state, cluster)
    content = read_json(where, "oracle_memo_damaged", {})
    try:
        guard, change = content.get("guard"), content.get("change")
        if change:
            change = Change(**{**change, "source": Guard(**change["source"]), "target": Guard(**change["target"])})
        return Memo(
            guard=Guard(**guard) if guard else None,
            credential=content.get("credential", ""),
            secret=content.get("secret", ""),
            external=content.get("external", ""),
            software=content.get("software", False),
            keyed=tuple(content.get("keyed", ())),
            former=tuple(content.get("former", ())),
            change=change or None,
        )
    except (AttributeError, KeyError, TypeError):
        raise TdeError("oracle_memo_damaged", "lacks a field or has one of another type", obj=where) from None


def write(state: StateDirectory, cluster: str, memo: Memo) -> None:
    """Write it atomically."""
    write_json(path(state, cluster), dataclasses.asdict(memo))
