# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What every database engine answers: one interface, plain wishes in, an :class:`Outcome` out.

An engine states in :attr:`Engine.refuses` what it cannot do, each in one sentence; all else it does.
A wish holds secrets as :class:`Secret`; an outcome, a plan and facts never do.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import typing as t

from ..common.errors import TdeError
from ..common.plan import Plan, public
from ..common.secret import Secret
from ..common.state import StateDirectory
from . import record as records

if t.TYPE_CHECKING:
    from ..kmip.access import KmipAccess
    from ..pkcs11.token import TokenAccess
    from ..storage.proof import ProofTarget


@dataclasses.dataclass(frozen=True)
class Connection:
    """How the database is reached; without host and password the local socket and the operating system's user."""

    host: str | None = None
    port: int | None = None
    unix_socket: str | None = None
    user: str | None = None
    password: Secret | None = None
    database: str = "postgres"


@dataclasses.dataclass(frozen=True)
class SlotWish:
    """A keyslot wished for.

    :param protection: ``token``, ``passphrase`` or ``kmip``; of engines with keys in an nShield HSM ``module``, ``softcard`` or ``ocs``.
    :param access: the token, for the protection ``token``.
    :param passphrase: for the protection ``passphrase``; None if it was not given.
    :param kmip: the service, for the protection ``kmip``.
    :param token_name: of the softcard or card set, for ``softcard`` and ``ocs``.
    """

    name: str
    protection: str
    access: TokenAccess | None = None
    passphrase: Secret | None = None
    kmip: KmipAccess | None = None
    token_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What all wishes have in common: which cluster, and with what it is reached.

    :param options: the engine's own dictionary, its defaults applied.
    :param access: the token of the options at top level, or None if neither library nor token was given.
    :param passphrase: opens keyslots under a passphrase.
    :param kmip: the KMIP service of the options at top level, or of the cluster's record; None if neither names one.
    """

    state: StateDirectory
    cluster: str
    options: t.Mapping[str, t.Any]
    connection: Connection = Connection()
    access: TokenAccess | None = None
    passphrase: Secret | None = None
    kmip: KmipAccess | None = None


@dataclasses.dataclass(frozen=True)
class KeystoreWish:
    """A keystore ``present``, ``open`` or ``closed``.

    :param slots: None: those of existing data keys stay; a new one gets the keyslot ``primary`` in the task's token.
    :param update: bring the keyslots of an existing keystore to the wish.
    :param exclusive: remove keyslots that are not listed.
    :param no_recovery: go without a second keyslot, on purpose.
    :param force: close although the server runs.
    :param boot: open what the server's start waits for: one that does not ask for our keys yet must not be kept from its start.
    :param pin_source: ``{"kind": none|file|credential, "path": …}``, or None to leave what is recorded.
    """

    state: str
    slots: tuple[SlotWish, ...] | None = None
    update: bool = True
    exclusive: bool = False
    no_recovery: bool = False
    force: bool = False
    boot: bool = False
    pin_source: t.Mapping[str, t.Any] | None = None


@dataclasses.dataclass(frozen=True)
class MasterKeyWish:
    """A master key ``present``, or ``rotated`` by a tag or when it is older than ``max_age`` days."""

    state: str
    tag: str | None = None
    max_age: int | None = None
    keyslot: str = "primary"


@dataclasses.dataclass(frozen=True)
class MoveWish:
    """What moves into a tablespace: ``schema.table`` names and schemas of one database, and whole databases."""

    tables: tuple[str, ...] = ()
    schemas: tuple[str, ...] = ()
    databases: tuple[str, ...] = ()
    database: str = "postgres"

    @property
    def any(self) -> bool:
        return bool(self.tables or self.schemas or self.databases)


@dataclasses.dataclass(frozen=True)
class TablespaceWish:
    """An encrypted tablespace.

    :param location: None: a directory of its name under the engine's folder of tablespaces.
    :param algorithm: one of the engine's ``algorithms``.
    """

    name: str
    location: str | None = None
    owner: str | None = None
    algorithm: str = "AES256"
    move: MoveWish = MoveWish()


@dataclasses.dataclass(frozen=True)
class TablespacesWish:
    """Encrypted tablespaces, and the keyslots of the data keys that are made for new ones.

    :param slots: None: the same as those of the data keys that there are.
    :param lock_timeout: seconds that one try to move a relation waits for its lock.
    """

    items: tuple[TablespaceWish, ...]
    slots: tuple[SlotWish, ...] | None = None
    lock_timeout: float = 10.0
    no_recovery: bool = False


@dataclasses.dataclass(frozen=True)
class ProofWish:
    """What is to be proved: tablespaces by name, the data directory, named relations (``database.schema.table``)."""

    tablespaces: tuple[str, ...] = ()
    data_directory: bool = False
    relations: tuple[str, ...] = ()


@dataclasses.dataclass
class Outcome:
    """What was done, or in check mode would be: public facts only.

    :param plan: the steps, empty if the wish was met.
    :param before: public facts; :param after: the same after the run, or as the plan expects them.
    :param facts: further fields of the result.
    """

    plan: Plan
    before: dict[str, t.Any]
    after: dict[str, t.Any]
    facts: dict[str, t.Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def changed(self) -> bool:
        return bool(self.plan)

    def result(self) -> dict[str, t.Any]:
        """The outcome as plain data."""
        return {
            **self.facts,
            "changed": self.changed,
            "plan": public(self.plan),
            "diff": {"before": self.before, "after": self.after},
            "warnings": self.warnings,
        }


#: What an engine may be asked for.
CAPABILITIES = ("keystore", "open", "close", "keyslots", "rotate", "tablespaces", "move", "proof")

#: Seconds in which ``hsm-tde@CLUSTER.service`` has opened a keystore whose server answers.
_UNIT = 30.0


class Engine(abc.ABC):
    """A database engine.

    :param request: the cluster and how it is reached.
    :raises TdeError: ``invalid_option`` for a cluster of another engine; those of reading the record.
    """

    #: The name by which users choose it.
    name: t.ClassVar[str]
    #: What it cannot do: a capability of CAPABILITIES, and one sentence that says why.
    refuses: t.ClassVar[t.Mapping[str, str]] = {}
    #: The ciphers that its tablespaces can have.
    algorithms: t.ClassVar[t.Sequence[str]] = ("AES256",)
    #: The protections that a keyslot of its can have.
    protections: t.ClassVar[t.Sequence[str]] = ("token", "passphrase", "kmip")
    #: Whether its keystore is opened in the running server, so that the boot opens it after the database, not before.
    opens_after_start: t.ClassVar[bool] = False
    #: Whether its server asks a command for its key, as its own user: then nothing is opened at boot.
    asks_command: t.ClassVar[bool] = False

    def __init__(self, request: Request) -> None:
        self.request = request
        self.record = records.read(request.state, request.cluster)
        if self.record and self.record.engine != self.name:
            raise TdeError(
                "invalid_option",
                f"is a cluster of engine {self.record.engine}",
                obj=f"cluster {request.cluster}",
                next_step="Name that engine.",
            )

    def reread(self) -> None:
        """Read the record again."""
        self.record = records.read(self.request.state, self.request.cluster)

    def known(self) -> records.Record:
        """The record of a cluster that must have one.

        :raises TdeError: ``cluster_unknown``.
        """
        if self.record is None:
            raise TdeError(
                "cluster_unknown",
                f"has no record in {self.request.state.path}",
                obj=f"cluster {self.request.cluster}",
                next_step="Make its keystore first (tde_keystore with state=present).",
            )
        return self.record

    def locked(self, check: bool) -> contextlib.AbstractContextManager[None]:
        """One run at a time; a look needs no lock and leaves nothing behind.

        Where a unit opens the keystore at each start of the database, a task that follows a restart waits for it.
        """
        return contextlib.nullcontext() if check else self.request.state.locked(_UNIT if self.opens_after_start else 0.0)

    def require(self, capability: str) -> None:
        """Refuse what the engine cannot do.

        :raises TdeError: ``engine_unsupported``.
        """
        if capability in self.refuses:
            raise TdeError("engine_unsupported", self.refuses[capability], obj=f"engine {self.name}")

    def opened_with(self) -> str:
        """What the boot opens its keystore with: the credential of a ``keyslot`` of our store; the PIN of the record's ``token``,
        or a ``passphrase``, of a keystore of its own; or ``nothing``."""
        return "keyslot"

    def needs_master_key(self, slots: t.Sequence[SlotWish] | None) -> bool:
        """Whether a keystore with these keyslots needs a master key beside it; a keyslot under a passphrase of our store derives its own."""
        own = self.opened_with() != "keyslot"
        return own or slots is None or any(slot.protection != "passphrase" for slot in slots)

    def require_algorithms(self, wish: TablespacesWish) -> None:
        """Refuse a cipher that the engine's tablespaces cannot have.

        :raises TdeError: ``engine_unsupported``.
        """
        for item in wish.items:
            if item.algorithm not in self.algorithms:
                raise TdeError(
                    "engine_unsupported",
                    f"encrypts with {' or '.join(self.algorithms)}, not with {item.algorithm}",
                    obj=f"engine {self.name}, tablespace {item.name}",
                )

    @abc.abstractmethod
    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        """Make, open or close the keystore, and bring its keyslots to the wish."""

    @abc.abstractmethod
    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        """Set or rotate the master key."""

    @abc.abstractmethod
    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        """Create encrypted tablespaces and move data into them."""

    @abc.abstractmethod
    def info(self) -> dict[str, t.Any]:
        """All that can be told without a secret, the gaps in plain words included. Reads only, on any estate."""

    def proof_targets(self, wish: ProofWish) -> list[ProofTarget]:
        """The places that a proof looks at, where the kernel encrypts below the database."""
        return []

    def proofs(self, wish: ProofWish, *, canary: bool) -> list[dict[str, t.Any]]:
        """What a proof finds, as :func:`storage.proof.prove` gives it; an engine whose server encrypts its files reads these itself.

        :param canary: write a marker into places that hold nothing.
        """
        from ..storage.proof import prove

        return [prove(target, canary=canary) for target in self.proof_targets(wish)]
