# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a database and this host say of its keystore, as plain data."""

from __future__ import annotations

import dataclasses
import typing as t

#: What guards the master key: Oracle's own keystore in a file, or one of nShield's protections.
SOFTWARE = "passphrase"
HSM_PROTECTIONS = ("module", "softcard", "ocs")

#: Of V$CONTAINERS: the root, and the seed, whose keystore nobody touches (ORA-46718).
ROOT, SEED = 1, 2


@dataclasses.dataclass(frozen=True)
class Guard:
    """A protection, and the name of the softcard or card set; ``passphrase`` and ``module`` have none."""

    protection: str
    name: str | None = None

    @property
    def hsm(self) -> bool:
        return self.protection != SOFTWARE

    @property
    def words(self) -> str:
        """As a report names it."""
        if self.protection == SOFTWARE:
            return "the software keystore"
        return (
            "module protection" if self.name is None else f"{'card set' if self.protection == 'ocs' else 'softcard'} {self.name}"
        )

    def public(self) -> dict[str, str | None]:
        return {"protection": self.protection, "name": self.name}


class Container(t.NamedTuple):
    """The root or a PDB; ``open`` for reading and writing."""

    con_id: int
    name: str
    open: bool


class Wallet(t.NamedTuple):
    """A row of V$ENCRYPTION_WALLET."""

    con_id: int
    status: str
    type: str
    order: str
    mode: str


class MasterKey(t.NamedTuple):
    """A row of V$ENCRYPTION_KEYS; ``activated`` is empty for a key that was never in use."""

    con_id: int
    key_id: str
    tag: str
    created: str
    activated: str
    keystore: str

    @property
    def hsm(self) -> bool:
        # HSM in 12.x, OKV in 23 (Oracle's reference, V$ENCRYPTION_KEYS.KEYSTORE_TYPE).
        return self.keystore in ("HSM", "OKV")


class Space(t.NamedTuple):
    """A tablespace; ``algorithm`` and ``status`` of V$ENCRYPTED_TABLESPACES, empty where it is plain."""

    con_id: int
    name: str
    algorithm: str
    status: str
    blocks: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """A database.

    :ivar startup: when its instance was started, which tells a restart.
    :ivar wallet_root: of the running instance; :ivar wallet_root_next: of the next one (SPFILE); the same for ``configuration``.
    :ivar asked: whether V$ENCRYPTION_WALLET was queried, which may open a keystore; without, ``wallets`` is empty.
    :ivar columns: how many columns are encrypted; :ivar clients: of V$CLIENT_SECRETS.
    """

    startup: str
    wallet_root: str = ""
    wallet_root_next: str = ""
    configuration: str = ""
    configuration_next: str = ""
    containers: tuple[Container, ...] = ()
    wallets: tuple[Wallet, ...] = ()
    keys: tuple[MasterKey, ...] = ()
    spaces: tuple[Space, ...] = ()
    columns: int = 0
    clients: tuple[str, ...] = ()
    asked: bool = True

    def container(self, con_id: int) -> str:
        """A container's name."""
        return next((one.name for one in self.containers if one.con_id == con_id), f"container {con_id}")

    def opened(self, con_id: int, hsm: bool) -> bool:
        """Whether a container's keystore of a kind is open."""
        if not self.asked:
            return True
        return any(
            one.con_id == con_id and (one.type in ("HSM", "OKV")) == hsm and one.status.startswith("OPEN") for one in self.wallets
        )

    def active(self, con_id: int) -> MasterKey | None:
        """The master key in use."""
        used = [one for one in self.keys if one.con_id == con_id and one.activated]
        return max(used, key=lambda one: one.activated) if used else None

    @property
    def encrypted(self) -> list[str]:
        """What can no longer be read without the master key, in words."""
        found = [f"tablespace {self.container(one.con_id)}.{one.name}" for one in self.spaces if one.algorithm]
        return [*found, f"{self.columns} columns"] if self.columns else found
