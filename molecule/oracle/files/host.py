#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The scenario's hosts, by the stand-ins: what people do beside Ansible, and a look from outside.

``host.py HERE STANDINS create``: HSMs, clients, databases; the passphrases lie in HERE/secrets.
``host.py HERE STANDINS bounce DATABASE``: all its instances restart.
``host.py HERE STANDINS read DATABASE INSTANCE``: prints what an instance reads of the tablespace, or the number of its error.
``host.py HERE STANDINS mistype DATABASE SOFTCARD``: a master key is made by SQL, with a letter too much in the passphrase; prints its name.
``host.py HERE STANDINS look``: prints all that a refused change must leave as it is.
``host.py HERE STANDINS protection KEY``: prints what protects a key, as the files of each client have it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
import typing as t

HERE, STANDINS = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.path[:0] = [str(STANDINS / "oracledb"), str(STANDINS / "nshield")]

import oracledb  # noqa: E402
import world  # noqa: E402
from oracledb.database import Database  # noqa: E402

#: Each database host has an HSM; the remote file system has none.
CLIENTS: dict[str, list[int]] = {"db1": [1], "db2": [2], "rfs": []}


def secret(name: str) -> str:
    return (HERE / "secrets" / name).read_text().strip()


def client(name: str) -> t.Any:
    return world.Client(HERE / name / "nfast")


def session(database: str, instance: str) -> t.Any:
    os.environ["ORACLEDB_STANDIN"] = str(HERE / database)
    connection = oracledb.connect(f"{instance}:1521/x", user="sys", password=secret("sys"), mode=oracledb.AUTH_MODE_SYSDBA)
    return connection.cursor()


def create() -> None:
    hsm = world.Hsm.create(HERE / "hsm", modules=2, slots=3)
    for name, modules in CLIENTS.items():
        world.Client.install(HERE / name / "nfast", hsm, name, modules)
    first = client("db1")
    first.create_world(acs_passphrase=secret("acs"))
    cards = first.create_cardset("cards", secret("cards"), quorum=(1, 3))
    hsm.insert(f"{cards}:1", module=1)
    hsm.insert(f"{cards}:2", module=2)
    hsm.insert("acs:1", module=1, slot=2)
    instances = {name: str(client(name).home) for name in ("db1", "db2")}
    for name, pdbs in (("main", ("PDB1",)), ("orders", ())):
        Database.create(HERE / name, pdbs=pdbs, instances=instances, users={"SYS": secret("sys")})
    Database(HERE / "main").add_tablespace("PDB1", "USERS", "content")


def bounce(name: str) -> None:
    database = Database(HERE / name)
    database.bounce()
    with database.change() as state:
        for number, container in state["containers"].items():
            # As with SAVE STATE.
            container["open"] = number != "2"


def read(database: str, instance: str) -> str:
    cursor = session(database, instance)
    cursor.execute("ALTER SESSION SET CONTAINER = PDB1")
    try:
        cursor.execute("SELECT CONTENT FROM STANDIN$TABLESPACE WHERE NAME = :1", ["USERS"])
    except oracledb.DatabaseError as exc:
        return str(exc.args[0].full_code)
    return str(cursor.fetchall()[0][0])


def mistype(database: str, softcard: str) -> str:
    bounce(database)
    cursor = session(database, "db1")
    credential = f"{secret(softcard)}x|{softcard}"
    cursor.execute(f'ADMINISTER KEY MANAGEMENT SET KEYSTORE OPEN IDENTIFIED BY "{credential}" CONTAINER = ALL')
    cursor.execute(f"ADMINISTER KEY MANAGEMENT SET KEY USING TAG 'by-hand' FORCE KEYSTORE IDENTIFIED BY \"{credential}\"")
    return str(Database(HERE / database).state()["keys"][-1]["label"])


def look() -> str:
    files = {}
    for name in CLIENTS:
        for path in sorted(client(name).local.iterdir()):
            files[f"{name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    remembered = HERE / "db1" / "state" / "oracle" / "main.json"
    return json.dumps(
        {
            "files": files,
            "statements": Database(HERE / "main").journal(),
            "keys made": [entry for entry in world.Hsm(HERE / "hsm").journal() if entry.get("library") == "C_GenerateKey"],
            "remembered": hashlib.sha256(remembered.read_bytes()).hexdigest(),
            "read": {name: read("main", name) for name in ("db1", "db2")},
        }
    )


def protection(key: str) -> str:
    found = {}
    for name in CLIENTS:
        found[name] = [content["protection"] for content in client(name).keys().values() if content["name"] == key]
    return json.dumps(found)


if __name__ == "__main__":
    acts: dict[str, t.Callable[..., str | None]] = {
        "create": create,
        "bounce": bounce,
        "read": read,
        "mistype": mistype,
        "look": look,
        "protection": protection,
    }
    print(acts[sys.argv[3]](*sys.argv[4:]) or "")
