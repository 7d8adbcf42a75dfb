# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Real MariaDB servers that a key file of their own encrypts: its keys go into the store, the server works with them from memory."""

from __future__ import annotations

import os
import subprocess
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import TokenCredential
from ansible_collections.hsm.tde.tests.integration import killing, mariadb
from ansible_collections.hsm.tde.tests.integration.estate import SLOTS
from ansible_collections.hsm.tde.tests.integration.mariadb import FORMER, Host

pytestmark = [pytest.mark.root, pytest.mark.skipif(not mariadb.usable(), reason="needs root, MariaDB's server and SoftHSM")]


@pytest.fixture(scope="module")
def home() -> t.Iterator[Path]:
    """A folder in memory."""
    mariadb.preload()
    with mariadb.folder() as path:
        yield path


def taking(host: Host, way: str = "take") -> dict[str, t.Any]:
    """The option that says what becomes of the former key file."""
    return {"mariadb": {**host.options, "former_key_file": way}}


def gaps(host: Host) -> list[str]:
    return [gap for gap in host.run("tde_info")["gaps"] if "former key file" in gap]


def test_a_key_file_is_sealed_given_from_memory_and_removed_on_request(home: Path) -> None:
    with mariadb.formerly(home / "one", algorithm="AES_CBC", default=5) as host:
        rows = mariadb.rows(host, "under_seven")
        spaces = host.spaces()
        assert (spaces["shop/orders"], spaces["shop/under_seven"], spaces["mysql/innodb_index_stats"]) == ("5", "7", "1")
        host.refused("tde_keystore", "encryption_foreign", keyslots=SLOTS)
        assert not host.state.exists() or not list(host.state.glob("store/*/key.*")), "no key was made that could not be its own"
        planned = host.run("tde_keystore", keyslots=SLOTS, check=True, **taking(host))
        made = host.run("tde_keystore", keyslots=SLOTS, **taking(host))
        assert [step["action"] for step in made["plan"]] == [step["action"] for step in planned["plan"]]
        assert sorted(made["data_keys"]) == ["key.1.system", "key.2.temporary", "key.5.default", "key.7.former.7"]
        # What was begun is ended without being told again, and the server still works with its file.
        assert not host.run("tde_keystore", keyslots=SLOTS)["changed"]
        # A boot at this moment keeps nothing from it, though nobody has a credential.
        host.server.kill()
        assert host.boots()
        host.server.start()
        opened = host.run("tde_keystore", state="open", **taking(host, "remove"))
        assert opened["restart_required"]
        assert host.former.exists()
        assert len(gaps(host)) == 2
        host.server.restart()
        assert mariadb.rows(host, "under_seven") == rows
        assert host.spaces() == spaces, "no page changed"
        keys = killing.opened(host.state, [TokenCredential(host.hsm.access())])
        assert {name: keys[name].hex() for name in keys if name != "key.2.temporary"} == {
            "key.1.system": FORMER[1].lower(), "key.5.default": FORMER[5], "key.7.former.7": FORMER[7],
        }  # fmt: skip
        assert not host.run("tde_keystore", keyslots=SLOTS, **taking(host))["changed"]
        kept = host.run("tde_keystore", state="open", **taking(host))
        assert (kept["changed"], kept["restart_required"]) == (False, False)
        assert host.former.exists(), "it is what backups need until somebody says otherwise"
        removed = host.run("tde_keystore", state="open", **taking(host, "remove"))
        assert [step["action"] for step in removed["plan"]] == ["remove_former_key_file"]
        assert not host.former.exists()
        assert not host.run("tde_keystore", state="open", **taking(host, "remove"))["changed"]
        assert len(gaps(host)) == 1
        assert {"take_key_file", "remove_former_key_file"} <= {entry["action"] for entry in host.journal()}
        killing.no_secret(keys.values(), host.home, but=[host.keys])
        # It boots with what the host keeps, and a proof opens its pages with the keys of the store.
        host.server.kill()
        assert host.boots(mariadb.PASSPHRASE)
        host.server.start()
        assert mariadb.rows(host, "under_seven") == rows
        proofs = host.run("tde_proof", relations=["shop.orders", "shop.under_seven"])["proofs"]
        assert {proof["verdict"] for proof in proofs} == {"encrypted"}
        # Only new keys revoke what copies of the file open; key 1 stays.
        host.rotate("2")
        host.server.restart()
        host.rotate("2")
        assert {host.spaces()[name] for name in ("shop/orders", "shop/under_seven")} == {"8", "9"}
        assert mariadb.rows(host, "under_seven") == rows
        assert "Keys 1 come" in gaps(host)[0]


def test_a_key_file_under_a_password(home: Path) -> None:
    with mariadb.formerly(home / "two", password="correct horse") as host:
        assert host.former.read_bytes().startswith(b"Salted__")
        rows = mariadb.rows(host, "under_seven")
        made = host.run("tde_keystore", keyslots=SLOTS, **taking(host))
        # The server's default was key 1, which cannot be replaced: new tables get one that can.
        assert sorted(made["data_keys"]) == [
            "key.1.system", "key.2.temporary", "key.3.default", "key.5.former.5", "key.7.former.7",
        ]  # fmt: skip
        host.run("tde_keystore", state="open")
        host.server.restart()
        assert mariadb.rows(host, "under_seven") == rows
        host.server.sql("CREATE TABLE shop.late (id INT PRIMARY KEY)")
        assert (host.spaces()["shop/late"], host.spaces()["shop/orders"]) == ("3", "1")
        assert any("under a password" in gap for gap in gaps(host))


def test_what_does_not_fit_is_not_taken(home: Path) -> None:
    with mariadb.formerly(home / "three") as host:
        content = host.former.read_text()
        for broken, code in (
            (content.replace("7;", "8;"), "encryption_foreign"),
            (content.replace(FORMER[7], "ab" * 24), "encryption_foreign"),
            (content + "nonsense\n", "former_key_file_unreadable"),
            (content.replace("1;", "11;", 1), "former_key_file_unreadable"),
        ):
            host.former.write_text(broken)
            host.refused("tde_keystore", code, keyslots=SLOTS, **taking(host))
        assert not list(host.state.glob("store/*/key.*"))
        host.former.write_text(content)
        rows = mariadb.rows(host, "under_seven")
        host.run("tde_keystore", keyslots=SLOTS, **taking(host))
        # Another key came into the file since: the server is not given ours before that is taken, too.
        host.former.write_text(content + f"9;{'12' * 32}\n")
        host.refused("tde_keystore", "encryption_foreign", state="open")
        assert os.listdir(host.server.include) == ["enc.cnf"]
        assert "key.9.former.9" in host.run("tde_keystore", keyslots=SLOTS)["data_keys"]
        host.run("tde_keystore", state="open")
        host.server.restart()
        assert mariadb.rows(host, "under_seven") == rows
        # What was changed since is not removed.
        host.former.write_text(content)
        host.refused("tde_keystore", "file_foreign", state="open", **taking(host, "remove"))
        assert host.former.exists()
        subprocess.run(["umount", str(host.keys)], check=False)
