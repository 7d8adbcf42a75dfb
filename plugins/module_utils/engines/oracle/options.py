# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``oracle`` of a task, completed from the cluster's record."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ...common.errors import TdeError
from ...common.secret import Secret, secret_from_option
from ...hsm import credential
from ...hsm.nshield import HOME, Nshield

#: Names that stand in SQL: PDBs and tablespaces as Oracle takes them unquoted, one word (SQL Language Reference, "Database object names").
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_$#]{0,127}")
#: A path within a quoted text of SQL.
_PATH = re.compile(r"/[A-Za-z0-9_./+@-]+")
PRIVILEGES = ("sysdba", "syskm", "none")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the engine works with; ``given`` is what the record keeps.

    :ivar containers: PDBs that are meant; None for all.
    :ivar call_timeout: seconds for one statement.
    :ivar recovery: what only people know of the recovery after an outage; of :func:`nshield_recovery.recovery_options`.
    """

    service: str
    privilege: str
    thick: bool
    client_directory: str | None
    wallet_root: str | None
    containers: tuple[str, ...] | None
    auto_login: bool
    external_store: bool
    sid: str
    separator: str
    call_timeout: float
    recovery: t.Mapping[str, bool | None] | None
    nfast_home: str
    kmdata: str | None
    transfer_keys: bool
    safe_way_round: bool
    backup_directory: str | None
    software_passphrase: Secret | None
    acs_passphrase: Secret | None

    @property
    def given(self) -> dict[str, t.Any]:
        """The lasting options as plain data; no secret, and not what one run is told to do."""
        fleeting = ("software_passphrase", "acs_passphrase", "transfer_keys", "safe_way_round")
        shown = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in fleeting}
        return {**shown, "containers": list(self.containers) if self.containers is not None else None}

    def tools(self) -> Nshield:
        """nShield's software on this host."""
        return Nshield(self.nfast_home, kmdata=self.kmdata, timeout=self.call_timeout)


_DEFAULTS: dict[str, t.Any] = {
    "service": None,
    "privilege": "sysdba",
    "thick": False,
    "client_directory": None,
    "wallet_root": None,
    "containers": None,
    "auto_login": False,
    "external_store": False,
    "sid": "*",
    "separator": "|",
    "call_timeout": 120.0,
    "recovery": None,
    "nfast_home": HOME,
    "kmdata": None,
    "backup_directory": None,
}


def complete(given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any], database: str) -> Options:
    """The task's options, then the record's, then the defaults.

    :raises TdeError: ``invalid_option``, ``credential_forbidden``, ``secret_not_text``.
    """
    found = {}
    for name, default in _DEFAULTS.items():
        told = given.get(name)
        found[name] = told if told is not None else recorded.get(name, default)
    containers = found.pop("containers")
    options = Options(
        **{**found, "service": found["service"] or database},
        containers=None if containers is None else tuple(containers),
        transfer_keys=bool(given.get("transfer_keys")),
        safe_way_round=bool(given.get("safe_way_round")),
        software_passphrase=_passphrase("software_passphrase", given),
        acs_passphrase=secret_from_option("acs_passphrase", given.get("acs_passphrase")),
    )
    if options.wallet_root is not None and not (os.path.isabs(options.wallet_root) and _PATH.fullmatch(options.wallet_root)):
        raise _invalid("wallet_root", "must be an absolute path of A-Z a-z 0-9 _ . / + @ -")
    for name in options.containers or ():
        word("PDB", name)
    if not re.fullmatch(r"\*|[A-Za-z0-9_]+", options.sid):
        raise _invalid("sid", "is * or the name of one instance")
    if options.call_timeout <= 0:
        raise _invalid("call_timeout", "must be more than 0; the library takes 0 for no limit")
    return options


def _passphrase(name: str, given: t.Mapping[str, t.Any]) -> Secret | None:
    """A software keystore's passphrase stands between the same quotes as a credential."""
    secret = secret_from_option(name, given.get(name))
    return None if secret is None else credential.compose("module", secret)


def _invalid(name: str, reason: str) -> TdeError:
    return TdeError("invalid_option", reason, obj=f"option oracle.{name}")


def word(kind: str, name: str) -> str:
    """A name that may stand in SQL.

    :raises TdeError: ``invalid_option``.
    """
    if not _WORD.fullmatch(name):
        raise TdeError("invalid_option", "must be a letter and then A-Z a-z 0-9 _ $ #", obj=f"{kind} {name!r}")
    return name.upper()
