# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The workflows that tests kill, on hosts of their own: how each is begun, and what must be so after a second run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
import typing as t
from pathlib import Path
from unittest import mock

from ansible_collections.hsm.tde.plugins.module_utils.command import credentials
from ansible_collections.hsm.tde.plugins.module_utils.command.keystores import keyslot_tokens, read_record
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import (
    Credential,
    KeyStore,
    PassphraseCredential,
    TokenCredential,
)
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.initialize import TokenWish, ensure
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.pins import PinWish, change
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenSelector
from ansible_collections.hsm.tde.plugins.module_utils.storage import fscrypt
from ansible_collections.hsm.tde.tests.integration import killing, postgres, support
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS, Estate

MARKER = "hsmtde-marker-1147"


def destroy(host: Estate) -> None:
    """Take an estate away; what is in its image goes first, for writing it out would take longer than all else."""
    host.server.stop()
    for place in host.mount.glob("*"):
        if place.is_dir() and place.name != "lost+found":
            shutil.rmtree(place, ignore_errors=True)
    deadline = time.monotonic() + 10
    while os.path.ismount(host.mount) and time.monotonic() < deadline:
        if subprocess.run(["umount", str(host.mount)], check=False, capture_output=True).returncode:
            time.sleep(0.05)
    if host.image.exists():
        killing.detached(host.image)
    shutil.rmtree(host.home)


def clean(host: Estate, secrets: t.Iterable[bytes], pin_file: Path) -> None:
    """What holds after every second run: a journal that verifies, nothing half-made, no secret in the clear, one mount."""
    host.journal()
    killing.no_leftovers(host.home)
    # What the kernel encrypts is searched once, at the end.
    but = [host.mount, host.image, host.server.data, pin_file]
    killing.no_secret([host.hsm.so_pin.encode(), PASSPHRASE.encode(), *secrets], host.home, but=but)
    assert pin_file.stat().st_mode & 0o777 == 0o600
    killing.mounted_once(host.image)


class Workflow:
    """What is begun, killed and finished."""

    name: str

    def once(self, kills: killing.Kills) -> None:
        """One task, and the look at the host afterwards."""
        raise NotImplementedError

    def end(self) -> None:
        """Leave the host to another workflow."""

    def load(self) -> contextlib.AbstractContextManager[None]:
        """What goes on meanwhile."""
        return contextlib.nullcontext()


# --- creation


class Creation(Workflow):
    """From an empty token to a database cluster inside an encrypted directory, on a new host each time.

    :param engine: further options of the engine.
    :ivar fill: create the cluster, too, which takes most of the time.
    :ivar also: looks at the host at the end.
    """

    name = "creation"

    def __init__(self, home: Path, **engine: t.Any) -> None:
        self.home = home
        self.engine = engine
        self.fill = True
        self.also: t.Callable[[Estate], None] = lambda host: None

    def once(self, kills: killing.Kills) -> None:
        self.home.mkdir()
        with mock.patch.object(support.SoftHsm, "add_token"):
            host = Estate(
                self.home, coverage="cluster", data_directory=str(self.home / "mnt/data"), create_cluster=self.fill, image_size="112M",
                initdb_options=["--no-sync", "--no-instructions", "--wal-segsize=1", "--encoding=UTF8", "--locale=C"], **self.engine,
            )  # fmt: skip
        work = self.work(host)
        try:
            kills.begin(work)
            kills.finish(work)
            self.check(host, work)
            self.also(host)
        finally:
            destroy(host)

    def work(self, host: Estate) -> killing.Task:
        pin = {"kind": "file", "path": str(host.home / "etc/pin")}
        wish = TokenWish(host.hsm.library_access(), TokenSelector(label="demo"), Secret(host.hsm.so_pin), Secret(host.hsm.pin))
        keystore = killing.task("tde_keystore", host.arguments(keyslots=SLOTS, pin_source=pin))

        def act() -> dict[str, t.Any]:
            steps = [{"action": step.action} for step in ensure(wish, StateDirectory(str(host.state))).plan]
            result = keystore()
            return {"plan": steps + result["plan"], "changed": bool(steps) or result["changed"]}

        return act

    def check(self, host: Estate, work: killing.Task) -> None:
        assert not killing.run(work)["changed"]
        keys = killing.opened(host.state, [TokenCredential(host.hsm.access())], [PassphraseCredential(Secret(PASSPHRASE))])
        assert list(keys) == ["cluster"]
        policy = fscrypt.policy(str(host.server.data))
        assert policy
        assert policy["identifier"] == fscrypt.identifier(keys["cluster"])
        made = {entry["kcv"] for entry in host.journal() if entry["action"] == "create_data_key" and entry["result"] == "done"}
        assert made <= {policy["identifier"]}
        assert len(host.in_token("hsm-tde.main")) == 1
        pin = host.home / "etc/pin"
        assert pin.read_text() == host.hsm.pin + "\n"
        clean(host, [host.hsm.pin.encode(), *keys.values()], pin)
        if self.fill:
            host.server.start()
            host.server.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 100) g; CHECKPOINT")
            assert host.server.psql("SELECT sum(g) FROM t") == "5050"


# --- what is done to a cluster that is there, under load


class Town(Estate):
    """A server with encrypted tablespaces, filled, and two tokens of different PINs.

    :ivar pins: user PINs by token label; :ivar wish: the keyslots as they are wished for now.
    :ivar data_keys: the data keys as they must stay; :ivar number: of the task at hand, for tags and names.
    """

    def __init__(self, home: Path) -> None:
        home.mkdir()
        super().__init__(home, image_size="400M")
        self.pins = {"demo": self.hsm.pin, "second": "user-of-second-2345"}
        self.pin_file = home / "etc/pin"
        self.number = 0
        self.wish = [self.on_token("demo"), RECOVERY]
        self.server.initdb()
        self.server.start()
        for name in ("bench", "shop", "whole"):
            self.server.psql(f"CREATE DATABASE {name}")
        rows = f"SELECT g, '{MARKER} ' || repeat(md5(g::text), 3) AS body FROM generate_series(1, 20000) g"
        self.server.psql(
            f"CREATE SCHEMA app; CREATE TABLE app.orders (id int PRIMARY KEY, body text); INSERT INTO app.orders {rows}", "shop"
        )
        self.server.psql("CREATE INDEX ON app.orders (body)", "shop")
        self.server.psql(f"CREATE SCHEMA app; CREATE TABLE app.orders AS SELECT g AS id, body FROM ({rows}) r", "whole")
        self.rows = self.read()
        assert self.server.popen("pgbench", "-i", "-q", "-s", "1", "bench").wait(60) == 0
        killing.run(self.change_pin("second", "user", self.pins["second"], None))
        killing.run(self.task("tde_keystore", pin_source={"kind": "file", "path": str(self.pin_file)}))
        move = {"database": "bench", "schemas": ["public"]}
        killing.run(self.task("tde_tablespace", tablespaces=[{"name": "t1", "move": move}, {"name": "t2"}]))
        self.data_keys = self.opened()

    def on_token(self, label: str) -> dict[str, t.Any]:
        """The keyslot ``primary`` on a token."""
        return {"name": "primary", "token_label": label, "pin": self.pins[label]}

    def task(self, module: str, **more: t.Any) -> killing.Task:
        """A module's task with the present PIN, and the keyslots of the wish where it takes them."""
        if module != "tde_master_key":
            more = {"keyslots": self.wish, **more}
        return killing.task(module, self.arguments(**{"pin": self.pins["demo"], **more}))

    def change_pin(self, label: str, user: t.Any, new: str, old: str | None) -> killing.Task:
        """The task that changes a PIN."""
        access = self.hsm.access(label, old)
        wish = PinWish(access, user, Secret(new), str(self.pin_file) if user == "user" and label == "demo" else None)

        def act() -> dict[str, t.Any]:
            plan = change(wish, StateDirectory(str(self.state))).plan
            return {"changed": bool(plan), "plan": [step.public() for step in plan]}

        return act

    def read(self) -> str:
        """Count and checksum of the data, the same in both databases."""
        query = "SELECT count(*), md5(string_agg(body, '' ORDER BY id)) FROM app.orders"
        shop = self.server.psql(query, "shop")
        assert self.server.psql(query, "whole") == shop
        return shop

    def credential(self, slot: t.Mapping[str, t.Any]) -> Credential:
        """What opens a keyslot wished for."""
        if "passphrase" in slot:
            return PassphraseCredential(Secret(slot["passphrase"]))
        return TokenCredential(self.hsm.access(slot["token_label"], slot["pin"]))

    def opened(self) -> dict[str, bytes]:
        """All data keys, which every keyslot of the wish opens alike."""
        return killing.opened(self.state, *([self.credential(slot)] for slot in self.wish))

    def slots(self) -> dict[str, dict[str, dict[str, t.Any]]]:
        """The keyslots of each data key by name: one of each name, and proved."""
        found: dict[str, dict[str, dict[str, t.Any]]] = {}
        for one in KeyStore(StateDirectory(str(self.state)), "main").describe():
            assert sorted(slot["name"] for slot in one["keyslots"]) == sorted(slot["name"] for slot in self.wish)
            assert all(slot["proved"] for slot in one["keyslots"])
            found[one["key_id"]] = {slot["name"]: slot for slot in one["keyslots"]}
        return found

    def sound(self, work: killing.Task) -> None:
        """What holds after every second run."""
        assert not killing.run(work)["changed"]
        assert self.opened() == self.data_keys
        for key_id, key in self.data_keys.items():
            policy = fscrypt.policy(str(self.mount / key_id.partition(".")[2]))
            assert policy
            assert policy["identifier"] == fscrypt.identifier(key)
        self.slots()
        assert self.read() == self.rows
        passphrases = [slot["passphrase"] for slot in self.wish if "passphrase" in slot]
        clean(self, [*self.data_keys.values(), *(one.encode() for one in (*self.pins.values(), *passphrases))], self.pin_file)

    def elsewhere(self, wish: t.Mapping[str, t.Any]) -> list[str]:
        """The relations that a wish means and that do not lie in its tablespace."""
        query = (
            "SELECT c.relname FROM pg_class c LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace, pg_database d"
            " JOIN pg_tablespace own ON own.oid = d.dattablespace WHERE d.datname = current_database() AND relkind IN ('r', 'i')"
            " AND relnamespace = '{}'::regnamespace AND coalesce(s.spcname, own.spcname) <> '" + wish["name"] + "'"
        )
        move = wish["move"]
        asked = [(name, move["database"]) for name in move["schemas"]] + [("app", name) for name in move.get("databases", ())]
        return [line for schema, database in asked for line in self.server.psql(query.format(schema), database).splitlines()]

    def boots(self) -> None:
        """With what the host keeps it opens its keystore at the next boot, whatever moment a task was killed at."""
        state = StateDirectory(str(self.state))
        tries = credentials.tries(read_record(state, "main"), keyslot_tokens(state, "main"), credentials.Given(), may_ask=False)
        for number, one in enumerate(tries):
            try:
                assert killing.opened(self.state, credentials.for_keystore(one)) == self.data_keys
                return
            except TdeError as exc:
                if exc.code != "pin_refused" or number == len(tries) - 1:
                    raise

    def reboot(self) -> None:
        """Everything is taken away and comes back by each of the keyslots alone; the raw image tells nothing."""
        for slot in self.wish:
            self.server.stop()
            self.unmount()
            with_it = {
                "passphrase": None,
                "token_label": None,
                "pin": None,
                **{k: v for k, v in slot.items() if k in ("passphrase", "token_label", "pin")},
            }
            killing.run(killing.task("tde_keystore", self.arguments(state="open", **with_it)))
            self.server.start()
            assert self.read() == self.rows
        self.server.psql("CHECKPOINT", "shop")
        subprocess.run(["sync", "-f", str(self.mount)], check=True)
        texts = [MARKER, PASSPHRASE, *self.pins.values()]
        killing.no_needle([*killing.forms(self.data_keys.values()), *(text.encode() for text in texts)], self.image)

    @contextlib.contextmanager
    def load(self) -> t.Iterator[None]:
        """pgbench meanwhile: no transaction fails, the server is not restarted."""
        failures: list[str] = []
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                output, dummy = self.server.popen("pgbench", "-n", "-c", "2", "-R", "40", "-T", "3", "bench").communicate(
                    timeout=120
                )
                if postgres.pgbench_failures(output)[1] or "abort" in output or "ERROR" in output:
                    failures.append(output)

        started = self.server.psql("SELECT pg_postmaster_start_time()")
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert failures == []
        assert self.server.psql("SELECT pg_postmaster_start_time()") == started
        sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
        assert self.server.psql(sums, "bench") == "t"


class InTown(Workflow):
    """A workflow on the host that is there, under load."""

    def __init__(self, town: Town) -> None:
        self.town = town

    def load(self) -> contextlib.AbstractContextManager[None]:
        return self.town.load()


class Rotation(InTown):
    """To a new master key each time."""

    name = "rotation"

    def once(self, kills: killing.Kills) -> None:
        town = self.town
        before = town.slots()["tablespace.t1"]["primary"]["kek_label"]
        town.number += 1
        work = town.task("tde_master_key", state="rotated", tag=str(town.number))
        kills.begin(work)
        assert town.opened() == town.data_keys
        kills.finish(work)
        town.sound(work)
        label = f"hsm-tde.main.{town.number}"
        assert {slots["primary"]["kek_label"] for slots in town.slots().values()} == {label}
        assert killing.in_token(town.hsm.access(), town.state, [before, label]) == [1, 1], "the former one stays"


class PinChange(InTown):
    """Of the user, with the file that the next boot reads; each fourth time of the security officer."""

    name = "PIN change"

    def once(self, kills: killing.Kills) -> None:
        town = self.town
        town.number += 1
        officer = town.number % 4 == 0
        old, new = (town.hsm.so_pin, f"so-pin-{town.number}") if officer else (town.pins["demo"], f"user-pin-{town.number}")
        work = town.change_pin("demo", "so" if officer else "user", new, old)
        kills.begin(work)
        town.boots()
        kills.finish(work)
        if officer:
            town.hsm.so_pin = new
        else:
            town.pins["demo"] = town.hsm.pin = new
            town.wish = [town.on_token("demo"), RECOVERY]
        town.sound(work)
        town.boots()
        assert town.pin_file.read_text() == town.pins["demo"] + "\n"
        killing.no_secret([old.encode()], town.home, but=[town.mount, town.image, town.server.data])


class ProtectionChange(InTown):
    """Between two tokens and a passphrase; each third time the recovery passphrase changes as well."""

    name = "protection change"

    def wish(self) -> list[dict[str, t.Any]]:
        number = self.town.number
        primary = [
            self.town.on_token("demo"),
            self.town.on_token("second"),
            {"name": "primary", "protection": "passphrase", "passphrase": f"primary passphrase {number}"},
        ][(number + number // 9) % 3]
        return [primary, {**RECOVERY, "passphrase": f"recovery passphrase {number // 3}"}]

    def once(self, kills: killing.Kills) -> None:
        town = self.town
        town.number += 1
        before, town.wish = town.wish, self.wish()
        # The credentials of before are the task's own; the new ones stand in the keyslots.
        task = {name: before[0][name] for name in ("token_label", "pin") if name in before[0]}
        work = town.task("tde_keystore", **task, passphrase=before[1]["passphrase"])
        kills.begin(work)
        ways = [[town.credential(before[number]), town.credential(town.wish[number])] for number in (0, 1)]
        assert killing.opened(town.state, *ways) == town.data_keys
        if "pin" in before[0] and "pin" in town.wish[0] and not self.at_the_turn(town.wish[0]["pin"]):
            town.boots()
        kills.finish(work)
        town.sound(town.task("tde_keystore", **task))

    def at_the_turn(self, pin: str) -> bool:
        """Between the PIN's file and the first removal: the one moment at which the next boot tries a PIN in vain."""
        slots = [one["keyslots"] for one in KeyStore(StateDirectory(str(self.town.state)), "main").describe()]
        return self.town.pin_file.read_text() == pin + "\n" and all(len(one) > 2 for one in slots)

    def end(self) -> None:
        """Back to where the other workflows begin."""
        before, self.town.wish = self.town.wish, [self.town.on_token("demo"), RECOVERY]
        task = {name: before[0][name] for name in ("token_label", "pin") if name in before[0]}
        killing.run(self.town.task("tde_keystore", **task, passphrase=before[1]["passphrase"]))


class Move(InTown):
    """Into a new tablespace each time, from where they are: a schema, what pgbench works on, and a whole database."""

    name = "move of tables"

    def once(self, kills: killing.Kills) -> None:
        town = self.town
        town.number += 1
        move: dict[str, t.Any] = {"database": "shop", "schemas": ["app"]}
        if town.number % 3 == 0:
            move = {"database": "bench", "schemas": ["public"]}
        elif town.number % 3 == 1:
            move["databases"] = ["whole"]
        wish, key_id = {"name": f"m{town.number}", "move": move}, f"tablespace.m{town.number}"
        work = town.task("tde_tablespace", tablespaces=[wish], lock_timeout=20)
        kills.begin(work)
        assert town.read() == town.rows
        kills.finish(work)
        found = town.opened()
        assert set(found) - set(town.data_keys) == {key_id}
        assert {name: found[name] for name in town.data_keys} == town.data_keys
        town.data_keys = found
        town.sound(work)
        made = {entry["kcv"] for entry in town.journal() if entry["action"] == "create_data_key" and entry["key_id"] == key_id}
        assert fscrypt.identifier(found[key_id]) in made
        assert town.elsewhere(wish) == []
