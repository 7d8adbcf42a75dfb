# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A real MariaDB whose keys go from a token to a KMIP server and back."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.hsm.tde.tests.integration import mariadb
from ansible_collections.hsm.tde.tests.integration.estate import RECOVERY, SLOTS
from ansible_collections.hsm.tde.tests.integration.kmip import KmipServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not mariadb.usable(), reason="needs root, MariaDB's server and SoftHSM"),
]

NO_TOKEN = {"library": None, "token_label": None, "pin": None}
AT_KMIP = [{"name": "primary", "protection": "kmip"}, RECOVERY]


def under(result: dict[str, t.Any]) -> set[str]:
    """What the keyslots ``primary`` of all data keys are under."""
    return {key["keyslots"]["primary"] for key in result["data_keys"].values()}


def test_from_the_token_to_kmip_and_back(kmip_server: KmipServer) -> None:
    mariadb.preload()
    with mariadb.folder() as home, mariadb.host(home / "one") as host:
        host.server.sql(
            "CREATE DATABASE shop; CREATE TABLE shop.t (id int PRIMARY KEY, body text); INSERT INTO shop.t VALUES (1, 'x')"
        )
        host.configure()
        options = kmip_server.options("mariadb")
        moved = host.run("tde_keystore", **options, keyslots=AT_KMIP)
        assert under(moved) == {"hsm-tde.main at KMIP service kmip"}
        assert not host.run("tde_keystore", **options, keyslots=AT_KMIP)["changed"]
        host.server.stop()
        host.run("tde_keystore", state="closed", **NO_TOKEN, passphrase=None)
        assert not host.server.start(check=False), "it has no keys"
        host.server.stop()
        # The record tells how the service is reached.
        assert host.run("tde_keystore", state="open", **NO_TOKEN, passphrase=None)["changed"]
        host.server.start()
        rotated = host.run("tde_master_key", state="rotated", tag="2", **NO_TOKEN, passphrase=None)
        assert under(rotated) == {"hsm-tde.main.2 at KMIP service kmip"}
        assert under(host.run("tde_keystore", keyslots=SLOTS)) == {"hsm-tde.main in token demo"}
        host.server.restart()
        assert host.server.sql("SELECT body FROM shop.t") == "x"
