# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A stand-in for nShield HSMs and the Security World software: hardware, clients, keys, and what its commands share. See README.md.

:class:`Hsm` is the hardware that all clients of a world share: modules, slots, cards, SoftHSM's tokens. :class:`Client` is a host
with the software: its ``NFAST_HOME`` with ``bin``, ``cknfastrc`` and ``kmdata/local``. The commands find theirs by ``NFAST_HOME``
and ``NFAST_KMDATA``. :meth:`Client.login` is what a database's use of the PKCS#11 library comes to.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import sys
import time

# The commands start often: what only some of them need, and is slow to import, is imported where it is used.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import typing as t

HERE = pathlib.Path(__file__).resolve().parent
COMMANDS = ("nfkminfo", "ppmk", "cardpp", "rocs", "rfs-setup", "rfs-sync")
#: The label of the slot of module-protected keys, with load-sharing.
ACCELERATOR = "loadshared accelerator"

Json = dict


def _hash() -> str:
    return os.urandom(20).hex()


def fingerprint(passphrase: str) -> Json:
    """What a card or softcard keeps of its passphrase."""
    salt = os.urandom(8).hex()
    return {"salt": salt, "hash": _derive(passphrase, salt)}


def matches(kept: Json, passphrase: str) -> bool:
    """Whether it is the passphrase that was kept."""
    return bool(kept["hash"] == _derive(passphrase, kept["salt"]))


def _derive(passphrase: str, salt: str) -> str:
    import hashlib

    return hashlib.scrypt(passphrase.encode(), salt=salt.encode(), n=1024, r=8, p=1).hex()


def read(path: pathlib.Path) -> Json:
    found: Json = json.loads(path.read_text())
    return found


def write(path: pathlib.Path, content: Json) -> None:
    """By a rename, so that a kill leaves the old file or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1, sort_keys=True))
    new.rename(path)


class Hsm:
    """The hardware.

    :param path: its folder: ``hsm.json``, SoftHSM's ``tokens``, the commands' ``journal.jsonl``.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = pathlib.Path(path)

    @classmethod
    def create(cls, path: pathlib.Path, *, modules: int = 1, slots: int = 2) -> Hsm:
        """HSMs without a world, and empty slots."""
        hsm = cls(path)
        (hsm.path / "tokens").mkdir(parents=True)
        (hsm.path / "softhsm2.conf").write_text(f"directories.tokendir = {hsm.path / 'tokens'}\nlog.level = ERROR\n")
        numbers = range(1, modules + 1)
        units = [{"number": n, "esn": f"5F08-02E0-D94{n}", "usable": True, "slots": [None] * slots} for n in numbers]
        write(hsm.path / "hsm.json", {"modules": units, "cards": {}, "tokens": {}, "hosts": {}, "faults": {}})
        return hsm

    def state(self) -> Json:
        return read(self.path / "hsm.json")

    @contextlib.contextmanager
    def change(self) -> t.Iterator[Json]:
        """The state, written back under a lock."""
        with open(self.path / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            state = self.state()
            yield state
            write(self.path / "hsm.json", state)

    def inside(self, act: str, **request: t.Any) -> Json:
        """An act within the HSM, see pkcs11side.py."""
        import subprocess

        done = subprocess.run(
            [sys.executable, str(HERE / "pkcs11side.py")],
            input=json.dumps({"act": act, **request}),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"SOFTHSM2_CONF": str(self.path / "softhsm2.conf"), "PATH": "/usr/bin:/bin"},
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        answer: Json = json.loads(done.stdout)
        return answer

    def add_token(self, name: str, label: str, passphrase: str) -> None:
        """A SoftHSM token for a softcard, card set or the module; its user PIN is the passphrase."""
        serial = self.inside("init", label=label, pin=passphrase or "none")["token"]
        with self.change() as state:
            state["tokens"][name] = serial

    def set_pin(self, name: str, passphrase: str) -> None:
        self.inside("pin", token=self.state()["tokens"][name], pin=passphrase or "none")

    def insert(self, card: str, module: int = 1, slot: int = 0) -> None:
        """Put a card into a slot: ``acs:1``, or ``<hash of the set>:1``."""
        with self.change() as state:
            state["modules"][module - 1]["slots"][slot] = card

    def remove(self, module: int = 1, slot: int = 0) -> None:
        with self.change() as state:
            state["modules"][module - 1]["slots"][slot] = None

    def fault(self, name: str, value: t.Any) -> None:
        """What goes wrong from now on: see README.md."""
        with self.change() as state:
            state["faults"][name] = value

    def journal(self) -> list[Json]:
        """What commands were run, and what was done within the library."""
        path = self.path / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, **entry: t.Any) -> None:
        with open(self.path / "journal.jsonl", "a") as handle:
            handle.write(json.dumps({"time": time.time(), **entry}) + "\n")


class Client:
    """A host with the Security World software.

    :param home: its ``NFAST_HOME``.
    :param kmdata: its ``NFAST_KMDATA``.
    """

    def __init__(self, home: pathlib.Path, kmdata: pathlib.Path | None = None) -> None:
        self.home = pathlib.Path(home)
        self.local = pathlib.Path(kmdata or self.home / "kmdata") / "local"

    @classmethod
    def install(cls, home: pathlib.Path, hsm: Hsm, name: str, modules: t.Sequence[int] | None = None) -> Client:
        """The software on a host: commands, an empty kmdata, the hardserver running.

        :param modules: the HSMs that this host uses, by their numbers; None for all.
        """
        client = cls(home)
        (client.home / "bin").mkdir(parents=True)
        client.local.mkdir(parents=True)
        for command in COMMANDS:
            text = (HERE / command).read_text().replace("#!/usr/bin/env python", f"#!{sys.executable} -IS", 1)
            # An interpreter that is told nothing by the environment, and where the library is.
            text = text.replace("HERE = None", f"HERE = {str(HERE)!r}", 1)
            (client.home / "bin" / command).write_text(text)
            (client.home / "bin" / command).chmod(0o755)
        settings = {
            "hsm": str(hsm.path),
            "name": name,
            "hardserver": True,
            "modules": modules,
            "kneti": _hash(),
            "rfs": None,
            "base": {},
        }
        write(client.home / "standin.json", settings)
        with hsm.change() as state:
            state["hosts"][name] = str(client.home)
        return client

    @classmethod
    def of_environment(cls) -> Client:
        home = pathlib.Path(os.environ.get("NFAST_HOME", "/opt/nfast"))
        return cls(home, pathlib.Path(os.environ["NFAST_KMDATA"]) if "NFAST_KMDATA" in os.environ else None)

    @property
    def settings(self) -> Json:
        return read(self.home / "standin.json")

    def set(self, **settings: t.Any) -> None:
        write(self.home / "standin.json", {**self.settings, **settings})

    @property
    def hsm(self) -> Hsm:
        return Hsm(pathlib.Path(self.settings["hsm"]))

    @property
    def name(self) -> str:
        return str(self.settings["name"])

    # The world, as a ceremony with cards and front panel makes it.

    def create_world(
        self,
        *,
        fips_level: int = 2,
        recovery: bool = True,
        acs: tuple[int, int] = (1, 1),
        acs_passphrase: str = "acs-passphrase",
        old_format: bool = False,
    ) -> None:
        """``new-world``: a Security World, its administrator cards, and the slot of module-protected keys.

        :param old_format: print no line ``mode``, as software before 12.50 does.
        """
        world = {
            "id": _hash(),
            "fips_level": fips_level,
            "recovery": recovery,
            "acs": list(acs),
            "created": "2026-01-05 09:30:00",
            "old_format": old_format,
        }
        write(self.local / "world", world)
        with self.hsm.change() as state:
            state["cards"]["acs"] = {str(n): fingerprint(acs_passphrase) for n in range(1, acs[1] + 1)}
        for module in self.hsm.state()["modules"]:
            write(self.local / f"module_{module['esn']}", {"world": world["id"]})

    def create_cardset(
        self, name: str, passphrase: str, *, quorum: tuple[int, int] = (1, 2), persistent: bool = False, remote: bool = False
    ) -> str:
        """``createocs``; :returns: the set's hash. Its cards are in nobody's slot."""
        identifier = _hash()
        content = {"name": name, "quorum": list(quorum), "persistent": persistent, "remote": remote}
        write(self.local / f"cards_{identifier}", content)
        with self.hsm.change() as state:
            state["cards"][identifier] = {str(n): fingerprint(passphrase) for n in range(1, quorum[1] + 1)}
        self.hsm.add_token(identifier, name, passphrase)
        return identifier

    def create_softcard(self, name: str, passphrase: str, *, recoverable: bool = False) -> str:
        """What ``ppmk --new`` does; :returns: the softcard's hash."""
        identifier = _hash()
        content = {"name": name, "recoverable": recoverable, "passphrase": fingerprint(passphrase)}
        write(self.local / f"softcard_{identifier}", content)
        self.hsm.add_token(identifier, name, passphrase)
        return identifier

    # What lies in kmdata/local.

    @property
    def world(self) -> Json | None:
        path = self.local / "world"
        return read(path) if path.exists() else None

    def softcards(self) -> dict[str, Json]:
        return {path.name.removeprefix("softcard_"): read(path) for path in sorted(self.local.glob("softcard_*"))}

    def cardsets(self) -> dict[str, Json]:
        return {path.name.removeprefix("cards_"): read(path) for path in sorted(self.local.glob("cards_*"))}

    def keys(self) -> dict[str, Json]:
        """Key files by their idents, in the order in which they are listed."""
        return {path.name.removeprefix("key_pkcs11_"): read(path) for path in sorted(self.local.glob("key_pkcs11_*"))}

    def token_name(self, identifier: str) -> str:
        content = self.softcards().get(identifier) or self.cardsets().get(identifier)
        return content["name"] if content else identifier

    def modules(self) -> list[Json]:
        """The HSMs that this host uses, numbered from 1 as its hardserver does."""
        used = self.settings["modules"]
        found = [module for module in self.hsm.state()["modules"] if used is None or module["number"] in used]
        return [{**module, "number": number} for number, module in enumerate(found, 1)]

    def slots(self) -> t.Iterator[tuple[int, int, str | None]]:
        """(module, slot, card) of every slot of a usable module."""
        for module in self.modules():
            for slot, card in enumerate(module["slots"]):
                yield module["number"], slot, card

    # A database's use of the PKCS#11 library.

    def login(self, credential: str) -> Session:
        """Open a session as Oracle does with a credential.

        A name that is not known, a passphrase that is not right, or a card that is in no slot: the whole string is taken for
        a module passphrase, and the session is one on the accelerator slot (seed; see README.md).

        :raises LoginRefused: where ``CKNFAST_NO_ACCELERATOR_SLOTS`` hides that slot.
        """
        token = self._token_of(credential)
        if token is None and self.variable("CKNFAST_NO_ACCELERATOR_SLOTS") == "1":
            raise LoginRefused("no slot takes this credential")
        protection = "module" if token is None else "softcard" if token in self.softcards() else "ocs"
        self.hsm.note(client=self.name, library="C_Login", protection=protection, token=token)
        return Session(self, protection, token)

    def _token_of(self, credential: str) -> str | None:
        separator = min((at for at in (credential.find("|"), credential.find(":")) if at >= 0), default=-1)
        if separator < 0:
            return None
        passphrase, name = credential[:separator], credential[separator + 1 :]
        if self.variable("CKNFAST_LOADSHARING") == "1":
            for identifier, softcard in self.softcards().items():
                if softcard["name"] == name and matches(softcard["passphrase"], passphrase):
                    return identifier
        cards = self.hsm.state()["cards"]
        for identifier, cardset in self.cardsets().items():
            if cardset["name"] != name:
                continue
            present = [card for _m, _s, card in self.slots() if card and card.startswith(identifier)]
            right = [card for card in present if matches(cards[identifier][card.partition(":")[2]], passphrase)]
            if len(right) >= cardset["quorum"][0]:
                return identifier
        return None

    def variable(self, name: str) -> str | None:
        """A variable of the library: of the environment, else of ``cknfastrc``."""
        if name in os.environ:
            return os.environ[name]
        path = self.home / "cknfastrc"
        lines = path.read_text().splitlines() if path.exists() else []
        values = [line.partition("=")[2].strip() for line in lines if line.partition("=")[0].strip() == name]
        return values[-1] if values else None


class LoginRefused(Exception):
    """No slot takes the credential."""


class Session:
    """A process's session: what the database sees of the HSM until it connects again.

    :ivar protection: ``module``, ``softcard`` or ``ocs``: where keys that it makes come to lie.
    :ivar token: the hash of the softcard or card set; None for the module.
    """

    def __init__(self, client: Client, protection: str, token: str | None) -> None:
        self.client, self.protection, self.token = client, protection, token
        self._seen = set(self._on_disk())
        self._scans = self.client.variable("CKNFAST_ASSUME_SINGLE_PROCESS") == "0"

    def _on_disk(self) -> dict[str, Json]:
        return {ident: key for ident, key in self.client.keys().items() if key["token"] == self.token}

    def keys(self) -> dict[str, str]:
        """Idents and names of the keys that it can use: those of its token that the client's files hold.

        Without ``CKNFAST_ASSUME_SINGLE_PROCESS=0`` only those that were there when it began, and its own.
        """
        return {ident: key["name"] for ident, key in self._on_disk().items() if self._scans or ident in self._seen}

    def find(self, name: str) -> str | None:
        """The ident of a key by its name."""
        return next((ident for ident, found in self.keys().items() if found == name), None)

    def create_key(self, name: str) -> str:
        """Make an AES-256 key; :returns: its ident."""
        identifier = _hash()
        ident = f"ua{identifier}" if self.token is None else f"uc{self.token}-{identifier}"
        self.client.hsm.inside("generate", token=self._serial(), id=identifier, label=name)
        content = {
            "name": name,
            "protection": self.protection,
            "token": self.token,
            "object": identifier,
            "hash": _hash(),
            "recovery": bool(self.client.world and self.client.world["recovery"]) and self.protection != "module",
        }
        write(self.client.local / f"key_pkcs11_{ident}", content)
        self._seen.add(ident)
        self.client.hsm.note(client=self.client.name, library="C_GenerateKey", key=name, protection=self.protection)
        return ident

    def wrap(self, ident: str, data: bytes) -> bytes:
        """Encrypt under a key."""
        return self._crypt("wrap", ident, data)

    def unwrap(self, ident: str, data: bytes) -> bytes:
        """Decrypt; :raises KeyError: where the session cannot use the key."""
        return self._crypt("unwrap", ident, data)

    def _crypt(self, act: str, ident: str, data: bytes) -> bytes:
        import base64

        if ident not in self.keys():
            raise KeyError(ident)
        identifier = self.client.keys()[ident]["object"]
        answer = self.client.hsm.inside(act, token=self._serial(), id=identifier, data=base64.b64encode(data).decode())
        return base64.b64decode(answer["data"])

    def _serial(self) -> str:
        if self.token is None and "module" not in self.client.hsm.state()["tokens"]:
            self.client.hsm.add_token("module", ACCELERATOR, "")
        return str(self.client.hsm.state()["tokens"][self.token or "module"])


def copy_world(source: Client, target: Client) -> None:
    """The first copy of a world to another client, by hand."""
    import shutil

    shutil.copytree(source.local, target.local, dirs_exist_ok=True)
