#!/usr/bin/env python
"""Transactions on shop.orders until a file appears; prints how many ended and how many statements failed."""

from __future__ import annotations

import json
import os
import sys
import time

import pymysql


def main(socket: str, stop: str) -> None:
    if os.path.exists(stop):
        os.unlink(stop)
    done, failures = 0, []
    connection = pymysql.connect(unix_socket=socket, user="root", database="shop", autocommit=False)
    with connection, connection.cursor() as cursor:
        while not os.path.exists(stop):
            try:
                cursor.execute("UPDATE orders SET body = CONCAT(body, '') WHERE id = %s", (1 + done % 1000,))
                cursor.execute("INSERT INTO orders (body) VALUES ('HSMTDEMARKER load')")
                connection.commit()
                done += 1
            except pymysql.err.MySQLError as error:
                failures.append(repr(error))
                connection.rollback()
            time.sleep(0.005)
    print(json.dumps({"done": done, "failed": len(failures), "errors": failures[:5]}))


main(*sys.argv[1:])
