# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The module wrapped_secret as Ansible runs it, on real tokens and files."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import unwrap_secret
from ansible_collections.hsm.tde.tests.integration.support import SoftHsm, run_module_file
from ansible_collections.hsm.tde.tests.unit.keystore.support import credential

SECRET = "marker-of-the-wrapped-secret"
PASSPHRASE, NEW_PASSPHRASE = "marker-of-the-passphrase", "marker-of-the-new-passphrase"
RECOVERY = {"name": "recovery", "protection": "passphrase", "passphrase": PASSPHRASE}
PRIMARY = {"name": "primary"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="modules act as root")


class Bench:
    """One path, one state directory, one private SoftHSM; every result is searched for the secrets."""

    def __init__(self, home: Path, softhsm: SoftHsm | None) -> None:
        self.folder = home / "secrets"
        self.folder.mkdir(mode=0o700)
        self.path = self.folder / "app.key"
        self.state = StateDirectory(str(home / "state"))
        self.softhsm = softhsm
        self.markers = [SECRET, PASSPHRASE, NEW_PASSPHRASE]

    def run(self, wish: t.Mapping[str, t.Any] | None = None, *, check: bool = False, pin: bool = True, **options: t.Any) -> t.Any:
        """The module's result; a wish and options together are its arguments."""
        token = {}
        if self.softhsm:
            token = self.softhsm.options(token_label="demo", **({"pin": self.softhsm.pin} if pin else {}))
        options = {"path": str(self.path), "state_directory": self.state.path, **token, **(wish or {}), **options}
        result = run_module_file("wrapped_secret", options, check=check, diff=True)
        assert result.get("failed") is True or "changed" in result
        for marker in self.markers:
            assert marker not in json.dumps(result)
        return result

    def journal(self) -> list[tuple[str, str]]:
        return [(entry["action"], entry["result"]) for entry in Journal(self.state.journal).entries()]


@pytest.fixture
def plain(tmp_path: Path) -> Bench:
    return Bench(tmp_path, None)


@pytest.fixture
def bench(tmp_path: Path, softhsm: SoftHsm) -> Bench:
    return Bench(tmp_path, softhsm)


def test_from_nothing_to_a_destination(bench: Bench, tmp_path: Path) -> None:
    """Generated, wrapped under a token whose KEK is made on the way, opened by token and by passphrase, and each run again."""
    wish = {"generate_length": 43, "keyslots": [PRIMARY, RECOVERY]}
    planned = bench.run(wish, check=True)
    assert (planned["changed"], [step["action"] for step in planned["plan"]]) == (True, ["create_kek", "create_secret"])
    assert not bench.path.exists()
    assert not os.path.exists(bench.state.path)
    made = bench.run(wish)
    assert made["changed"]
    assert [slot["name"] for slot in made["wrapped_keyslots"]] == ["primary", "recovery"]
    assert made["wrapped_keyslots"][0]["kek_label"] == "hsm-tde.secrets"
    assert [step["action"] for step in made["plan"]] == ["create_kek", "create_secret"]
    before = bench.path.read_bytes()
    for again in (wish, {"keyslots": [PRIMARY]}):
        assert bench.run(again)["changed"] is False
    assert bench.run(credentials=[RECOVERY], pin=False)["changed"] is False
    assert bench.path.read_bytes() == before

    destination = tmp_path / "run" / "app.key"
    destination.parent.mkdir(mode=0o755)
    out = {"state": "unwrapped", "destination": str(destination), "owner": "nobody", "credentials": [PRIMARY]}
    assert bench.run(out, check=True)["changed"]
    assert not destination.exists()
    delivered = bench.run(out)
    assert (delivered["changed"], delivered["destination"]) == (True, str(destination))
    value = destination.read_text()
    assert len(value) == 43
    assert value.isalnum()
    assert value not in json.dumps(delivered) + Path(bench.state.journal).read_text()
    info = destination.stat()
    assert (info.st_mode & 0o7777, info.st_uid) == (0o600, 65534)
    assert bench.run(out)["changed"] is False
    # Somebody changed it, or a killed run left the secret beside it: corrected.
    destination.chmod(0o644)
    assert bench.run(out)["changed"]
    left = destination.with_name(".app.key.0123456789ab.tmp")
    left.write_text(value)
    assert bench.run(out)["changed"]
    assert os.listdir(destination.parent) == ["app.key"]
    assert unwrap_secret(str(bench.path), [credential(PASSPHRASE)], bench.state).text() == value
    assert bench.journal().count(("unwrap_secret", "done")) == 4


def test_from_passphrase_to_token_and_back_out(bench: Bench) -> None:
    old, new = ({"protection": "passphrase", "passphrase": text} for text in (PASSPHRASE, NEW_PASSPHRASE))
    assert bench.run(secret=SECRET, keyslots=[old])["changed"]
    change = {"state": "rewrapped", "keyslots": [new], "credentials": [old]}
    assert [step["action"] for step in bench.run(change, check=True)["plan"]] == [
        "add_keyslot",
        "prove_keyslot",
        "remove_keyslot",
    ]
    changed = bench.run(change)
    assert (changed["changed"], len(changed["wrapped_keyslots"]), len(changed["history"])) == (True, 1, 1)
    assert bench.run(change)["changed"] is False
    assert bench.run(credentials=[old])["error_code"] == "passphrase_refused"

    move = {"state": "rewrapped", "keyslots": [PRIMARY], "credentials": [new]}
    moved = bench.run(move)
    actions = ["create_kek", "add_keyslot", "prove_keyslot", "remove_keyslot"]
    assert [step["action"] for step in moved["plan"]] == actions
    assert moved["wrapped_keyslots"][0]["protection"] == "token"
    assert bench.run(move)["changed"] is False
    # Rotation of the KEK, and a keyslot beside it that goes when only the listed may stay.
    rotate = {"state": "rewrapped", "keyslots": [PRIMARY, RECOVERY], "kek_label": "hsm-tde.secrets.2"}
    rotated = bench.run(rotate)
    assert {slot["name"]: slot["kek_label"] for slot in rotated["wrapped_keyslots"]} == {
        "primary": "hsm-tde.secrets.2",
        "recovery": None,
    }
    assert bench.run(rotate)["changed"] is False
    alone = {"state": "rewrapped", "keyslots": [RECOVERY], "keyslots_exclusive": True}
    assert [slot["name"] for slot in bench.run(alone)["wrapped_keyslots"]] == ["recovery"]
    assert unwrap_secret(str(bench.path), [credential(PASSPHRASE)], bench.state).text() == SECRET


def test_bad_input_changes_nothing(plain: Bench) -> None:
    slots = [{"protection": "passphrase", "passphrase": PASSPHRASE}]
    assert plain.run(secret=SECRET, keyslots=[PRIMARY])["error_code"] == "credential_missing"
    assert plain.run(secret=12345678, keyslots=slots)["error_code"] == "secret_not_text"
    assert plain.run(state="unwrapped", credentials=slots)["error_code"] == "invalid_option"
    assert plain.run(secret=SECRET, keyslots=slots, secrte=SECRET)["error_code"] == "invalid_option"
    assert not plain.path.exists()


def test_a_token_that_does_not_show(bench: Bench, tmp_path: Path) -> None:
    assert bench.softhsm
    bench.run(secret=SECRET, keyslots=[PRIMARY, RECOVERY])
    before = bench.path.read_bytes()
    bench.softhsm.tokendir.rename(tmp_path / "aside")
    bench.softhsm.tokendir.mkdir()
    for options in (
        {"keyslots": [PRIMARY]},
        {"state": "rewrapped", "keyslots": [PRIMARY, RECOVERY]},
        {"secret": SECRET, "keyslots": [PRIMARY], "path": str(bench.folder / "second.key")},
    ):
        assert bench.run(options)["error_code"] == "token_unreachable"
    # The recovery keyslot needs no token.
    assert bench.run(keyslots=[PRIMARY, RECOVERY])["changed"] is False
    assert (bench.path.read_bytes(), os.listdir(bench.softhsm.tokendir), os.listdir(bench.folder)) == (before, [], ["app.key"])


def test_the_key_under_a_secret_is_not_destroyed(bench: Bench) -> None:
    """Whoever destroys the key loses the secret: the refusal names the file."""
    assert bench.run({"generate_length": 20, "keyslots": [PRIMARY, RECOVERY]})["changed"]
    assert bench.softhsm
    token = bench.softhsm.options(token_label="demo", pin=bench.softhsm.pin)
    gone = {"label": "hsm-tde.secrets", "id": kek_id(bench), "state": "absent", "confirm_destroy": "hsm-tde.secrets"}
    refused = run_module_file("pkcs11_key", {"state_directory": bench.state.path, **token, "keys": [gone]})
    assert refused["error_code"] == "key_in_use"
    assert f"wrapped secret {bench.path}" in refused["msg"]
    assert bench.run(credentials=[PRIMARY])["changed"] is False


def kek_id(bench: Bench) -> str:
    """The id of the key that the primary keyslot names."""
    return str(json.loads(bench.path.read_text())["keyslots"][0]["target"]["kek_id"])
