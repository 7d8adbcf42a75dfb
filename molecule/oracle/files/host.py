#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The scenario's host, by the stand-ins: ``create``, ``bounce``, or ``read``, which prints what can be read of the tablespace.

``host.py ACT HERE STANDINS``; the passphrases lie in HERE/secrets.
"""

from __future__ import annotations

import os
import pathlib
import sys


def main() -> None:
    act, here, standins = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    sys.path[:0] = [str(standins / "oracledb"), str(standins / "nshield")]
    os.environ["ORACLEDB_STANDIN"] = str(here / "oracle")
    import oracledb
    import world
    from oracledb.database import Database

    def secret(name: str) -> str:
        return (here / "secrets" / name).read_text().strip()

    database = Database(here / "oracle")
    if act == "create":
        hsm = world.Hsm.create(here / "hsm", slots=3)
        client = world.Client.install(here / "client", hsm, "database")
        client.create_world(acs_passphrase=secret("acs"))
        (client.home / "cknfastrc").write_text("CKNFAST_LOADSHARING=1\n")
        client.create_softcard("one", secret("one"))
        client.create_softcard("two", secret("two"))
        cards = client.create_cardset("cards", secret("cards"), quorum=(1, 2))
        hsm.insert(f"{cards}:1")
        hsm.insert("acs:1", slot=2)
        Database.create(here / "oracle", pdbs=("PDB1",), nfast_home=str(client.home), users={"SYS": secret("sys")})
        database.add_tablespace("PDB1", "USERS", "content")
    elif act == "bounce":
        database.bounce()
        with database.change() as state:
            # As with SAVE STATE.
            state["containers"]["3"]["open"] = True
    else:
        connection = oracledb.connect("x", user="sys", password=secret("sys"), mode=oracledb.AUTH_MODE_SYSDBA)
        with connection.cursor() as cursor:
            cursor.execute("ALTER SESSION SET CONTAINER = PDB1")
            cursor.execute("SELECT CONTENT FROM STANDIN$TABLESPACE WHERE NAME = :1", ["USERS"])
            print(cursor.fetchall()[0][0])


if __name__ == "__main__":
    main()
