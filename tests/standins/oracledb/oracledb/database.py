# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The database: a folder with ``state.json`` and ``journal.jsonl``. Each statement reads the state and writes it back under a lock."""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import re
import time
import typing as t

from .hsm import MODULE, Hsm, LoginRefused

Json = t.Dict[str, t.Any]
Rows = t.List[t.Tuple[t.Any, ...]]

ROOT = 1
#: The instance of a database that has but one.
INSTANCE = ""
_Q = r'"([^"]*)"'
_BY = rf"IDENTIFIED BY (?:EXTERNAL STORE|{_Q})"
_EPOCH = datetime.datetime(2026, 1, 1, 9, 0)

TEXTS = {
    "ORA-00900": "invalid SQL statement",
    "ORA-00942": "table or view does not exist",
    "ORA-00959": "tablespace does not exist",
    "ORA-01031": "insufficient privileges",
    "ORA-01109": "database not open",
    "ORA-01543": "tablespace already exists",
    "ORA-03113": "end-of-file on communication channel",
    "ORA-28353": "failed to open wallet",
    "ORA-28354": "Encryption wallet, auto login wallet, or HSM is already open",
    "ORA-28365": "wallet is not open",
    "ORA-28367": "wallet does not exist",
    "ORA-28374": "typed master key not found in wallet",
    "ORA-28407": "Hardware Security Module failed with PKCS#11 error",
    "ORA-28414": "specified keys are in HSM",
    "ORA-28431": "cannot encrypt an already encrypted data file",
    "ORA-46602": "autologin keystore cannot be created",
    "ORA-46630": "keystore cannot be created at the specified location",
    "ORA-46633": "creation of a password-protected keystore failed",
    "ORA-46658": "keystore not open in the container",
    "ORA-46667": "client not found in the keystore",
    "ORA-46670": "client secret keystore operation failed",
    "ORA-46718": "operation not allowed on PDB$SEED",
    "ORA-65011": "Pluggable database does not exist",
}


class Refused(Exception):
    """What the server answers; ``hang``: it does not, for some ``seconds`` or as long as it is waited for."""

    def __init__(self, code: str, *, hang: bool = False, seconds: float | None = None) -> None:
        super().__init__(code)
        self.code, self.hang, self.seconds, self.text = code, hang, seconds, TEXTS.get(code, "")


def _sealed(text: str) -> str:
    """In the place of Oracle's encryption of what lies in a keystore."""
    return base64.b64encode(text.encode()).decode()


def _opened(text: str) -> str:
    return base64.b64decode(text).decode()


def redacted(statement: str) -> str:
    """A statement as the journal keeps it."""
    return re.sub(r"(SECRET )'[^']*'", r"\1'***'", re.sub(r'(IDENTIFIED BY|USING) "[^"]*"', r'\1 "***"', statement))


class Database:
    """The database of a folder."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = pathlib.Path(path)

    @classmethod
    def create(
        cls,
        path: pathlib.Path,
        *,
        pdbs: t.Sequence[str] = ("PDB1", "PDB2"),
        nfast_home: str | None = None,
        instances: t.Mapping[str, str] | None = None,
        users: t.Mapping[str, str] | None = None,
    ) -> Database:
        """A multitenant database that runs, without a keystore.

        :param nfast_home: the host's nShield software (tests/standins/nshield); without it, an HSM of its own.
        :param instances: of a cluster (RAC): the hosts by name, each with its nShield software.
        """
        database = cls(path)
        database.path.mkdir(parents=True, exist_ok=True)
        containers = {"1": {"name": "CDB$ROOT", "open": True}, "2": {"name": "PDB$SEED", "open": False}}
        containers.update({str(number): {"name": name, "open": True} for number, name in enumerate(pdbs, 3)})
        state: Json = {
            "up": True,
            "life": 1,
            "clock": 0,
            "users": {name: _sealed(password) for name, password in (users or {"SYS": "Sys-Password-1"}).items()},
            "spfile": {},
            "running": {},
            "containers": containers,
            "software": None,
            "external": None,
            "open": {"FILE": {}, "HSM": {}},
            "login": None,
            "keys": [],
            "spaces": {number: {} for number in containers},
            "columns": {},
            "faults": {},
            "hsm": {"homes": dict(instances or {INSTANCE: nfast_home}), "tokens": {}, "keys": {}},
        }
        database._write(state)
        return database

    def state(self) -> Json:
        found: Json = json.loads((self.path / "state.json").read_text())
        return found

    def _write(self, state: Json) -> None:
        new = self.path / ".state.json.new"
        new.write_text(json.dumps(state, indent=1, sort_keys=True))
        new.rename(self.path / "state.json")

    @contextlib.contextmanager
    def change(self) -> t.Iterator[Json]:
        """The state, written back."""
        with open(self.path / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            state = self.state()
            yield state
            self._write(state)

    def entries(self) -> list[Json]:
        """The journal: each statement that changed something, and each restart, with its time; without credentials."""
        path = self.path / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def journal(self) -> list[str]:
        """The statements of the journal."""
        return [entry["statement"] for entry in self.entries()]

    def note(self, statement: str) -> None:
        with open(self.path / "journal.jsonl", "a") as handle:
            handle.write(json.dumps({"time": time.time(), "statement": redacted(statement)}) + "\n")

    # --- what people do beside SQL

    def bounce(self) -> None:
        """SHUTDOWN IMMEDIATE and STARTUP."""
        with self.change() as state:
            _bounce(state)
        self.note("-- bounce")

    def knows(self, user: str, password: str) -> bool:
        """Whether it is the user's password."""
        return bool(self.state()["users"].get(user.upper()) == _sealed(password))

    def stop(self) -> None:
        with self.change() as state:
            state["up"] = False

    def fault(self, name: str, value: t.Any) -> None:
        """What goes wrong from now on; see README.md."""
        with self.change() as state:
            state["faults"][name] = value

    def token(self, name: str, protection: str, passphrase: str) -> None:
        """A softcard or card set of the own HSM, made or with its passphrase changed."""
        with self.change() as state:
            state["hsm"]["tokens"][name] = {"protection": protection, "passphrase": _sealed(passphrase)}

    def close_pdb(self, name: str) -> None:
        """ALTER PLUGGABLE DATABASE … CLOSE."""
        with self.change() as state:
            _close_pdb(state, name)

    def encrypt_column(self, container: str) -> None:
        with self.change() as state:
            state["columns"][_number(state, container)] = 1

    def add_tablespace(self, container: str, name: str, content: str) -> None:
        """A plain tablespace with something in it."""
        with self.change() as state:
            spaces = state["spaces"][_number(state, container)]
            spaces[name] = {"number": len(spaces) + 5, "algorithm": "", "status": "", "key": None, "content": content}

    # --- SQL

    def instance(self, host: str) -> str:
        """The instance on a host; the first one where the host has none."""
        found = self.state()["hsm"]["homes"]
        return host if host in found else next(iter(found))

    def execute(
        self, statement: str, parameters: t.Any, container: str, life: int, sysdba: bool, instance: str = INSTANCE
    ) -> tuple[Rows, str]:
        """Carry out one statement. :returns: its rows, and the session's container after it.

        :raises Refused: what the server answers.
        """
        text = " ".join(statement.split())
        refused: Refused | None = None
        with self.change() as state:
            if not state["up"] or life != state["life"]:
                raise Refused("ORA-03113")
            if changes(text):
                self.note(f"{container}: {text}")
            faults = state["faults"]
            closes = faults.get("closes")
            if closes and re.search(closes["at"], text):
                faults["closes"] = None
                _close_pdb(state, closes["pdb"])
            if _meant(faults, "hang", text):
                raise Refused("", hang=True, seconds=faults.get("hang_seconds"))
            session = _Session(state, instance, container, sysdba)
            try:
                rows = session.run(text, parameters)
            except Refused as exc:
                refused, rows = exc, []
            container = session.container
            lost = _meant(faults, "lost", text)
        if refused:
            raise refused
        if lost:
            raise Refused("", hang=True, seconds=faults.get("hang_seconds"))
        return rows, container


def changes(statement: str) -> bool:
    """Whether a statement changes something, and comes into the journal."""
    return not re.match(r"\s*(SELECT|ALTER SESSION)", statement, re.IGNORECASE)


def _meant(faults: Json, name: str, text: str) -> bool:
    pattern = faults.get(name)
    return bool(pattern and re.search(pattern, text))


def _close_pdb(state: Json, name: str) -> None:
    number = _number(state, name)
    state["containers"][number]["open"] = False
    for kind in state["open"].values():
        kind.pop(number, None)


def _bounce(state: Json) -> None:
    state.update(up=True, life=state["life"] + 1, running=dict(state["spfile"]), login=None)
    state["open"] = {"FILE": {}, "HSM": {}}
    for number, one in state["containers"].items():
        # Without SAVE STATE the PDBs are mounted after a start.
        one["open"] = number == str(ROOT)


def _number(state: Json, name: str) -> str:
    for number, one in state["containers"].items():
        if one["name"] == name.upper():
            return str(number)
    raise Refused("ORA-65011")


class _Session:
    """One statement of one session."""

    def __init__(self, state: Json, instance: str, container: str, sysdba: bool) -> None:
        self.state, self.instance, self.container, self.sysdba = state, instance, container, sysdba
        self.hsm = Hsm(state["hsm"], instance)

    @property
    def number(self) -> str:
        return _number(self.state, self.container)

    @property
    def configuration(self) -> str:
        return str(self.state["running"].get("TDE_CONFIGURATION", "")).rpartition("=")[2]

    def run(self, text: str, parameters: t.Any) -> Rows:
        for pattern, act in self._STATEMENTS:
            match = re.fullmatch(pattern, text, re.IGNORECASE)
            if match:
                return act(self, match, parameters) or []
        raise Refused("ORA-00900")

    # sessions, parameters, PDBs

    def _set_container(self, match: re.Match[str], dummy: t.Any) -> None:
        number = _number(self.state, match[1])
        if not self.state["containers"][number]["open"]:
            raise Refused("ORA-01109")
        self.container = match[1].upper()

    def _alter_system(self, match: re.Match[str], dummy: t.Any) -> None:
        self._dba()
        name, value, scope = match[1].upper(), match[2], match[3].upper()
        if name == "WALLET_ROOT" and scope != "SPFILE":
            raise Refused("ORA-02095")
        if name == "TDE_CONFIGURATION" and scope == "BOTH" and not self.state["running"].get("WALLET_ROOT"):
            raise Refused("ORA-46693")
        self.state["spfile"][name] = value
        if scope == "BOTH":
            self.state["running"][name] = value

    def _open_pdbs(self, dummy: re.Match[str], dummy2: t.Any) -> None:
        self._dba()
        for number, one in self.state["containers"].items():
            if int(number) > 2:
                one["open"] = True

    def _dba(self) -> None:
        if not self.sysdba:
            raise Refused("ORA-01031")

    # keystores

    def _credential(self, given: str | None) -> str:
        if given is not None:
            return given
        if self.state["external"] is None:
            raise Refused("ORA-28353")
        return _opened(self.state["external"])

    def _create(self, match: re.Match[str], dummy: t.Any) -> None:
        if not self.state["running"].get("WALLET_ROOT"):
            raise Refused("ORA-46630")
        if self.state["software"] is not None:
            raise Refused("ORA-46630")
        self.state["software"] = {"password": _sealed(match[1]), "secrets": {}, "auto_login": None}

    def _auto_login(self, match: re.Match[str], dummy: t.Any) -> None:
        software = self._software(match[1])
        software["auto_login"] = dict(software["secrets"])

    def _software(self, password: str) -> Json:
        software: Json | None = self.state["software"]
        if software is None:
            raise Refused("ORA-28367")
        if _opened(software["password"]) != password:
            raise Refused("ORA-28353")
        return software

    def _secret(self, match: re.Match[str], dummy: t.Any) -> None:
        verb, value, client = match[1].upper(), match[2], match[3]
        software = self._software(match[4])
        if (verb == "ADD") == (client in software["secrets"]):
            raise Refused("ORA-46670" if verb == "ADD" else "ORA-46667")
        software["secrets"][client] = _sealed(value)

    def _external(self, match: re.Match[str], dummy: t.Any) -> None:
        there = self.state["external"] is not None
        if (match[1].upper() == "ADD") == there:
            raise Refused("ORA-46670" if there else "ORA-46667")
        self.state["external"] = _sealed(match[2])

    def _is_hsm(self, given: str | None) -> bool:
        """Which keystore a credential is for: the software keystore's own password opens that one, under FILE or a migration."""
        configuration = self.configuration
        if configuration == "FILE":
            return False
        if configuration == "HSM":
            return True
        software = self.state["software"]
        return not (software and given is not None and _opened(software["password"]) == given)

    def _login(self, credential: str) -> None:
        try:
            token = self.hsm.login(credential)
        except LoginRefused:
            raise Refused("ORA-28353") from None
        except OSError:
            raise Refused("ORA-28407") from None
        known = self.state["login"]
        if known is not None and known["credential"] != _sealed(credential):
            # The library of a running instance keeps its login: the guide bounces the database for another one.
            raise Refused("ORA-28353")
        # What one instance of a cluster does to the keystore, all do, each at its own HSM; who is logged in stays so.
        tokens = {self.instance: token, **(known["tokens"] if known else {})}
        for other in set(self.state["hsm"]["homes"]) - set(tokens):
            with contextlib.suppress(LoginRefused, OSError):
                tokens[other] = Hsm(self.state["hsm"], other).login(credential)
        self.state["login"] = {"credential": _sealed(credential), "tokens": tokens}

    @property
    def _token(self) -> str | None:
        """What this instance's login opened."""
        found: str | None = self.state["login"] and self.state["login"]["tokens"].get(self.instance)
        return found

    def _open(self, match: re.Match[str], dummy: t.Any) -> None:
        credential = self._credential(match[1])
        hsm = self._is_hsm(match[1])
        if not self.configuration:
            raise Refused("ORA-28367")
        opened = self.state["open"]["HSM" if hsm else "FILE"]
        everywhere = (match[2] or "").upper() == "ALL" and self.container == "CDB$ROOT"
        if self.number == "2":
            raise Refused("ORA-46718")
        if self.number != str(ROOT) and str(ROOT) not in opened:
            # United mode: the root's opens first.
            raise Refused("ORA-46658")
        if self.number in opened and not everywhere:
            raise Refused("ORA-28354")
        if hsm:
            self._login(credential)
        else:
            self._software(credential)
        for number, one in self.state["containers"].items():
            if number == self.number or (everywhere and one["open"]):
                opened[number] = "PASSWORD"

    def _close(self, match: re.Match[str], dummy: t.Any) -> None:
        credential = self._credential(match[1])
        hsm = self._is_hsm(match[1])
        opened = self.state["open"]["HSM" if hsm else "FILE"]
        if self.number not in opened:
            raise Refused("ORA-28365")
        if hsm and self.state["login"] and self.state["login"]["credential"] != _sealed(credential):
            raise Refused("ORA-28353")
        if not hsm:
            self._software(credential)
        everywhere = (match[2] or "").upper() == "ALL" or self.number == str(ROOT)
        for number in list(opened):
            if number == self.number or (everywhere and self.state["containers"][number]["open"]):
                del opened[number]

    def _auto_open(self) -> None:
        """What an auto-login keystore does when somebody asks for a key, or only looks (V$ENCRYPTION_WALLET)."""
        software = self.state["software"]
        if not software or software["auto_login"] is None or "FILE" not in self.configuration:
            return
        live = [number for number, one in self.state["containers"].items() if one["open"]]
        for number in live:
            self.state["open"]["FILE"].setdefault(number, "AUTOLOGIN")
        credential = software["auto_login"].get("HSM_PASSWORD")
        if self.configuration == "HSM|FILE" and credential:
            with contextlib.suppress(Refused):
                self._login(_opened(credential))
                for number in live:
                    self.state["open"]["HSM"].setdefault(number, "AUTOLOGIN")

    # master keys

    def _visible(self, number: str) -> list[Json]:
        """The keys that open keystores of a container show."""
        found = []
        for key in self.state["keys"]:
            if key["container"] != number or number not in self.state["open"][key["store"]]:
                continue
            if key["store"] == "HSM" and not self.hsm.has(self._token, key["label"]):
                continue
            found.append(key)
        return found

    def _tick(self) -> int:
        self.state["clock"] += 1
        return int(self.state["clock"])

    def _make_key(self, store: str, tag: str, *, activate: bool) -> Json:
        now = self._tick()
        identifier = f"06{os.urandom(16).hex().upper()}"
        key = {"id": identifier, "tag": tag, "container": self.number, "store": store, "created": now, "activated": 0}
        key["label"] = f"ORACLE.TDE.HSM.MK.{identifier}"
        if store == "HSM":
            try:
                self.hsm.make(self._token or MODULE, key["label"])
            except OSError:
                raise Refused("ORA-28407") from None
        self.state["keys"].append(key)
        if activate:
            self._activate(key)
        return key

    def _activate(self, key: Json) -> None:
        """The data keys are re-wrapped, for which the key before must be at hand."""
        for space in self.state["spaces"][self.number].values():
            if space["key"] is not None:
                self._at_hand(space["key"])
                space["key"] = key["id"]
        key["activated"] = self._tick()

    def _at_hand(self, identifier: str) -> None:
        if not any(key["id"] == identifier for key in self._visible(self.number)):
            raise Refused("ORA-28374" if any(self.number in one for one in self.state["open"].values()) else "ORA-28365")

    def _set_key(self, match: re.Match[str], dummy: t.Any) -> None:
        credential = self._credential(match[2])
        hsm = self._is_hsm(match[2])
        self._holder(credential, hsm)
        self._make_key("HSM" if hsm else "FILE", match[1], activate=True)

    def _create_key(self, match: re.Match[str], dummy: t.Any) -> None:
        hsm = self._is_hsm(match[2])
        self._holder(self._credential(match[2]), hsm)
        self._make_key("HSM" if hsm else "FILE", match[1], activate=False)

    def _use_key(self, match: re.Match[str], dummy: t.Any) -> None:
        self._holder(self._credential(match[2]), self._is_hsm(match[2]))
        for key in self._visible(self.number):
            if key["id"] == match[1]:
                return self._activate(key)
        raise Refused("ORA-28374")

    def _holder(self, credential: str, hsm: bool) -> None:
        if self.number not in self.state["open"]["HSM" if hsm else "FILE"]:
            raise Refused("ORA-28365")
        if hsm:
            self._login(credential)
        else:
            self._software(credential)

    def _migrate(self, match: re.Match[str], dummy: t.Any) -> None:
        if self.configuration != "HSM|FILE":
            raise Refused("ORA-28414")
        self._holder(match[2], False)
        credential = self._credential(match[1])
        self._login(credential)
        self.state["open"]["HSM"].setdefault(self.number, "PASSWORD")
        self._make_key("HSM", "", activate=True)

    def _reverse(self, match: re.Match[str], dummy: t.Any) -> None:
        if self.configuration != "FILE|HSM":
            raise Refused("ORA-28414")
        self._holder(match[1], False)
        self._holder(match[2], True)
        self._make_key("FILE", "", activate=True)

    # tablespaces

    def _master(self) -> str:
        used = [key for key in self._visible(self.number) if key["activated"]]
        if not used:
            raise Refused("ORA-28374" if any(self.number in one for one in self.state["open"].values()) else "ORA-28365")
        return str(max(used, key=lambda key: key["activated"])["id"])

    def _space(self, name: str) -> Json:
        spaces = self.state["spaces"][self.number]
        if name.upper() not in spaces:
            raise Refused("ORA-00959")
        found: Json = spaces[name.upper()]
        return found

    def _create_space(self, match: re.Match[str], dummy: t.Any) -> None:
        spaces = self.state["spaces"][self.number]
        if match[1].upper() in spaces:
            raise Refused("ORA-01543")
        spaces[match[1].upper()] = {
            "number": len(spaces) + 5,
            "algorithm": match[2],
            "status": "NORMAL",
            "key": self._master(),
            "content": "",
        }

    def _encrypt(self, match: re.Match[str], dummy: t.Any) -> None:
        space = self._space(match[1])
        if space["algorithm"]:
            raise Refused("ORA-28431")
        space.update(algorithm=match[2], status="ENCRYPTING", key=self._master())
        if self.state["faults"].pop("bounce_while_encrypting", None):
            _bounce(self.state)
            raise Refused("ORA-03113")
        space["status"] = "NORMAL"

    def _finish(self, match: re.Match[str], dummy: t.Any) -> None:
        space = self._space(match[1])
        if space["status"] != "ENCRYPTING":
            raise Refused("ORA-28431")
        self._at_hand(space["key"])
        space["status"] = "NORMAL"

    def _read(self, dummy: re.Match[str], parameters: t.Any) -> Rows:
        """The stand-in's own view of what is in a tablespace."""
        space = self._space(parameters[0])
        if space["key"] is not None:
            self._auto_open()
            self._at_hand(space["key"])
        return [(space["content"],)]

    # views

    def _select(self, match: re.Match[str], parameters: t.Any) -> Rows:
        columns = [column.strip().upper() for column in match[1].split(",")]
        view = match[2].upper()
        if view not in self._VIEWS:
            raise Refused("ORA-00942")
        found = []
        for row in self._VIEWS[view](self):
            found.append(tuple(row[column] for column in columns))
        return found

    def _live(self) -> list[str]:
        return [number for number, one in self.state["containers"].items() if one["open"]]

    def _wallets(self) -> list[Json]:
        self._auto_open()
        kinds = self.configuration.split("|") if self.configuration else []
        found = []
        for number in self._live() if kinds else ():
            for kind in kinds:
                opened = number in self.state["open"][kind]
                status = "CLOSED"
                if kind == "FILE" and self.state["software"] is None:
                    status = "NOT_AVAILABLE"
                elif opened:
                    mine = [key for key in self._visible(number) if key["store"] == kind and key["activated"]]
                    status = "OPEN" if mine else "OPEN_NO_MASTER_KEY"
                order = "SINGLE" if len(kinds) == 1 else "PRIMARY" if kind == kinds[0] else "SECONDARY"
                kind_word = self.state["open"][kind].get(number, "UNKNOWN") if kind == "FILE" else "HSM"
                found.append(
                    {
                        "CON_ID": int(number),
                        "STATUS": status,
                        "WALLET_TYPE": kind_word,
                        "WALLET_ORDER": order,
                        "KEYSTORE_MODE": "NONE" if number == "1" else "UNITED",
                    }
                )
        return found

    def _keys(self) -> list[Json]:
        return [
            {
                "CON_ID": int(number),
                "KEY_ID": key["id"],
                "TAG": key["tag"] or None,
                "CREATION_TIME": _EPOCH + datetime.timedelta(seconds=key["created"]),
                "ACTIVATION_TIME": _EPOCH + datetime.timedelta(seconds=key["activated"]) if key["activated"] else None,
                "KEYSTORE_TYPE": "HSM" if key["store"] == "HSM" else "SOFTWARE KEYSTORE",
            }
            for number in self._live()
            for key in self._visible(number)
        ]

    def _spaces(self) -> list[Json]:
        return [
            {
                "CON_ID": int(number),
                "TS#": space["number"],
                "NAME": name,
                "ENCRYPTIONALG": space["algorithm"],
                "STATUS": space["status"],
                "BLOCKS_ENCRYPTED": 640 if space["status"] == "ENCRYPTING" else 1280,
                "MASTERKEYID": space["key"],
            }
            for number in self._live()
            for name, space in self.state["spaces"][number].items()
        ]

    _VIEWS: t.ClassVar[dict[str, t.Callable[[_Session], list[Json]]]] = {
        "V$INSTANCE": lambda self: [{"STARTUP_TIME": _EPOCH + datetime.timedelta(days=self.state["life"]), "STATUS": "OPEN"}],
        "V$CONTAINERS": lambda self: [
            {
                "CON_ID": int(number),
                "NAME": one["name"],
                "OPEN_MODE": "READ WRITE" if one["open"] else "READ ONLY" if number == "2" else "MOUNTED",
            }
            for number, one in self.state["containers"].items()
        ],
        "V$PARAMETER": lambda self: [
            {"NAME": name.lower(), "VALUE": self.state["running"].get(name)} for name in ("WALLET_ROOT", "TDE_CONFIGURATION")
        ],
        "V$SPPARAMETER": lambda self: [
            {"NAME": name.lower(), "VALUE": self.state["spfile"].get(name)} for name in ("WALLET_ROOT", "TDE_CONFIGURATION")
        ],
        "V$ENCRYPTION_WALLET": _wallets,
        "V$ENCRYPTION_KEYS": _keys,
        "V$ENCRYPTED_TABLESPACES": lambda self: [one for one in self._spaces() if one["ENCRYPTIONALG"]],
        "V$TABLESPACE": _spaces,
        "V$DATABASE_KEY_INFO": lambda self: [],
        "CDB_ENCRYPTED_COLUMNS": lambda self: [
            {"CON_ID": int(number), "COLUMN_NAME": f"C{one}"}
            for number in self._live()
            for one in range(self.state["columns"].get(number, 0))
        ],
        "V$CLIENT_SECRETS": lambda self: [
            {"CLIENT": client}
            for client in (self.state["software"]["secrets"] if str(ROOT) in self.state["open"]["FILE"] else ())
        ],
    }

    _STATEMENTS: t.ClassVar[tuple[tuple[str, t.Callable[..., t.Any]], ...]] = (
        (r"SELECT CONTENT FROM STANDIN\$TABLESPACE WHERE NAME = :1", _read),
        (r"SELECT (.+?) FROM ([A-Z0-9_$]+)(?: WHERE NAME IN \('wallet_root', 'tde_configuration'\))?", _select),
        (r"ALTER SESSION SET CONTAINER = \"?([A-Z0-9_$]+)\"?", _set_container),
        (r"ALTER SYSTEM SET (WALLET_ROOT|TDE_CONFIGURATION) = '([^']*)' SCOPE = (BOTH|SPFILE) SID = '[^']+'", _alter_system),
        (r"ALTER PLUGGABLE DATABASE ALL OPEN", _open_pdbs),
        (rf"ADMINISTER KEY MANAGEMENT CREATE KEYSTORE IDENTIFIED BY {_Q}", _create),
        (rf"ADMINISTER KEY MANAGEMENT CREATE AUTO_LOGIN KEYSTORE FROM KEYSTORE IDENTIFIED BY {_Q}", _auto_login),
        (
            rf"ADMINISTER KEY MANAGEMENT (ADD|UPDATE) SECRET '([^']*)' FOR CLIENT '([^']*)' FORCE KEYSTORE IDENTIFIED BY {_Q} WITH BACKUP",
            _secret,
        ),
        (
            r"ADMINISTER KEY MANAGEMENT (ADD|UPDATE) SECRET '([^']*)' FOR CLIENT 'TDE_WALLET' TO AUTO_LOGIN KEYSTORE '[^']*'",
            _external,
        ),
        (rf"ADMINISTER KEY MANAGEMENT SET KEYSTORE OPEN {_BY}(?: CONTAINER = (ALL|CURRENT))?", _open),
        (rf"ADMINISTER KEY MANAGEMENT SET KEYSTORE CLOSE {_BY}(?: CONTAINER = (ALL|CURRENT))?", _close),
        (
            rf"ADMINISTER KEY MANAGEMENT SET KEY USING TAG '([^']*)' FORCE KEYSTORE {_BY}(?: WITH BACKUP)?(?: CONTAINER = CURRENT)?",
            _set_key,
        ),
        (rf"ADMINISTER KEY MANAGEMENT CREATE KEY USING TAG '([^']*)' {_BY}(?: WITH BACKUP)?", _create_key),
        (rf"ADMINISTER KEY MANAGEMENT USE KEY '([^']*)' FORCE KEYSTORE {_BY}(?: WITH BACKUP)?", _use_key),
        (rf"ADMINISTER KEY MANAGEMENT SET KEY {_BY} FORCE KEYSTORE MIGRATE USING {_Q} WITH BACKUP", _migrate),
        (
            rf"ADMINISTER KEY MANAGEMENT SET KEY IDENTIFIED BY {_Q} FORCE KEYSTORE REVERSE MIGRATE USING {_Q} WITH BACKUP",
            _reverse,
        ),
        (
            r"CREATE TABLESPACE \"?([A-Z0-9_$]+)\"? DATAFILE (?:'[^']+' )?SIZE 100M AUTOEXTEND ON ENCRYPTION USING '(AES\d+)' ENCRYPT",
            _create_space,
        ),
        (r"ALTER TABLESPACE \"?([A-Z0-9_$]+)\"? ENCRYPTION ONLINE USING '(AES\d+)' ENCRYPT", _encrypt),
        (r"ALTER TABLESPACE \"?([A-Z0-9_$]+)\"? ENCRYPTION FINISH ENCRYPT", _finish),
    )
