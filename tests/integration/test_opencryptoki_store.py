# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""openCryptoki's token folders: brought to a standby, migrated to the format that is fit for FIPS."""

from __future__ import annotations

import json
import os
import stat
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.hsm import opencryptoki_transport as transport
from ansible_collections.hsm.tde.plugins.module_utils.hsm.opencryptoki_migrate import TOOL
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import load
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
from ansible_collections.hsm.tde.tests.integration.support import OpenCryptoki, new_state, opencryptoki_library, run_module

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not opencryptoki_library(), reason="needs root and openCryptoki: mount namespaces and pkcsslotd"
)


def make_key(here: OpenCryptoki, state: StateDirectory, label: str) -> None:
    def act() -> None:
        import pkcs11

        with open_session(here.access(), state, rw=True) as session:
            session.raw.generate_key(pkcs11.KeyType.AES, 256, store=True, label=label)

    here.run(act)


def keys(here: OpenCryptoki, state: StateDirectory) -> list[str]:
    def act() -> list[str]:
        with open_session(here.access(), state) as session:
            return sorted(key.label for key in session.raw.get_objects())

    return here.run(act)


def copied(
    here: OpenCryptoki, state: StateDirectory, what: str, check: bool = False, daemon: bool = True, **options: t.Any
) -> dict[str, t.Any]:
    options = {"state": what, "slot": 0, "state_directory": state.path, **options}
    return here.run(lambda: run_module("opencryptoki_token_copy", options, check=check), daemon=daemon)


@pytest.fixture
def standby(tmp_path: Path) -> OpenCryptoki:
    return OpenCryptoki(tmp_path / "standby")


@pytest.mark.parametrize("where", ["swtok", "swtok/TOK_OBJ"])
def test_root_follows_no_link_that_the_token_s_group_made(
    opencryptoki: OpenCryptoki, standby: OpenCryptoki, state: StateDirectory, tmp_path: Path, where: str
) -> None:
    """The folders are writable for the group: who is in it chose where root wrote files, gave them away and removed others."""
    other = new_state(tmp_path / "standby-state")
    make_key(opencryptoki, state, "sealed")
    (opencryptoki.home / "var/swtok/TOK_OBJ/evil").write_text("of the group's choice")
    standby.run(lambda: load(standby.library_access()).slots())
    asked = copied(standby, other, "requested")
    packed = copied(opencryptoki, state, "packed", recipient=asked["public_key"])
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("of root's")
    place = standby.home / "var" / where
    place.rename(tmp_path / "aside")
    place.symlink_to(victim)
    refused = copied(standby, other, "installed", archive=packed["archive"])
    assert refused["error_code"] == "file_not_private", refused
    # The folder TOK_OBJ may be there: openCryptoki's own daemon follows the link.
    assert [path.name for path in victim.rglob("*") if path.is_file()] == ["precious"]


def test_a_standby_has_the_primarys_keys(
    opencryptoki: OpenCryptoki, standby: OpenCryptoki, state: StateDirectory, tmp_path: Path
) -> None:
    other = new_state(tmp_path / "standby-state")
    make_key(opencryptoki, state, "sealed")
    factory = copied(standby, other, "requested", check=True)
    assert factory["changed"]
    assert factory["public_key"] == ""
    asked = copied(standby, other, "requested")
    assert not copied(standby, other, "requested")["changed"], "the key pair is made once"
    # The standby's library has made a factory token meanwhile, whose state lies in shared memory.
    standby.run(lambda: load(standby.library_access()).slots())
    packed = copied(opencryptoki, state, "packed", recipient=asked["public_key"])
    assert not packed["changed"]
    raw = (opencryptoki.home / "var/swtok/MK_USER").read_bytes()
    assert raw.hex() not in packed["archive"]
    assert json.loads(packed["archive"])["digest"] == packed["digest"]
    foreseen = copied(standby, other, "installed", check=True, archive=packed["archive"])
    assert [step["action"] for step in foreseen["plan"]] == ["install_token"]
    done = copied(standby, other, "installed", archive=packed["archive"])
    assert done["changed"]
    assert done["digest"] == packed["digest"]
    assert not copied(standby, other, "installed", archive=packed["archive"])["changed"]
    assert keys(standby, other) == ["sealed"]
    for path in (standby.home / "var/swtok").rglob("*"):
        same = opencryptoki.home / "var" / path.relative_to(standby.home / "var")
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(same.stat().st_mode), path
        assert (path.stat().st_uid, path.stat().st_gid) == (same.stat().st_uid, same.stat().st_gid), path
    assert [entry["action"] for entry in Journal(other.journal).entries()] == ["install_token"]
    # A second key on the primary, and the standby's old one goes.
    make_key(opencryptoki, state, "second")
    packed = copied(opencryptoki, state, "packed", recipient=asked["public_key"])
    assert copied(standby, other, "installed", archive=packed["archive"])["changed"]
    assert keys(standby, other) == ["sealed", "second"]
    assert sorted(path.name for path in (standby.home / "var/swtok").iterdir()) == sorted(
        path.name for path in (opencryptoki.home / "var/swtok").iterdir()
    )


def test_keys_of_the_standby_s_own_are_not_written_over(
    opencryptoki: OpenCryptoki, standby: OpenCryptoki, state: StateDirectory, tmp_path: Path
) -> None:
    """The wrong host, or the wrong direction after a failover: both tokens call their first key 00000000."""
    other = new_state(tmp_path / "standby-state")
    make_key(opencryptoki, state, "sealed")
    standby.add_token("demo")
    make_key(standby, other, "own")
    asked = copied(standby, other, "requested")
    packed = copied(opencryptoki, state, "packed", recipient=asked["public_key"])
    for check in (True, False):
        refused = copied(standby, other, "installed", check=check, archive=packed["archive"])
        assert refused.get("error_code") == "destroy_unconfirmed", refused
    assert keys(standby, other) == ["own"]
    assert copied(standby, other, "installed", archive=packed["archive"], replace=True)["changed"]
    assert keys(standby, other) == ["sealed"]
    # What was installed may be replaced by what the primary has now.
    make_key(opencryptoki, state, "second")
    packed = copied(opencryptoki, state, "packed", recipient=asked["public_key"])
    assert copied(standby, other, "installed", archive=packed["archive"])["changed"]

    # What a migration on the standby made of them is still the primary's.
    def mark() -> str:
        return transport.objects_mark(transport.objects("swtok"))

    journal, former = Journal(other.journal), standby.run(mark)
    (standby.home / "var/swtok/TOK_OBJ/00000000").write_bytes(b"encrypted anew")
    assert copied(standby, other, "installed", archive=packed["archive"])["error_code"] == "destroy_unconfirmed"
    journal.append("migrate_token", "token folder /var/lib/opencryptoki/swtok", former_objects=former, objects=standby.run(mark))
    assert copied(standby, other, "installed", archive=packed["archive"])["changed"]
    make_key(standby, other, "own again")
    assert copied(standby, other, "installed", archive=packed["archive"])["error_code"] == "destroy_unconfirmed"


def test_an_archive_for_somebody_else_changes_nothing(
    opencryptoki: OpenCryptoki, standby: OpenCryptoki, state: StateDirectory, tmp_path: Path
) -> None:
    other, third = new_state(tmp_path / "standby-state"), new_state(tmp_path / "third-state")
    packed = copied(opencryptoki, state, "packed", recipient=copied(standby, third, "requested")["public_key"])
    assert copied(standby, other, "installed", archive=packed["archive"])["error_code"] == "opencryptoki_archive_invalid"
    copied(standby, other, "requested")
    for archive in (packed["archive"], packed["archive"].replace("swtok", "lite"), "{}", "nothing"):
        failed = copied(standby, other, "installed", archive=archive)
        assert failed["error_code"] == "opencryptoki_archive_invalid"
        assert packed["archive"] not in json.dumps(failed)
    changed = json.loads(packed["archive"])
    changed["digest"] = "0" * 64
    assert copied(standby, third, "installed", archive=json.dumps(changed))["error_code"] == "opencryptoki_archive_invalid"
    assert not (standby.home / "var/swtok/MK_USER").exists()
    assert copied(standby, other, "packed", recipient="abc")["error_code"] == "invalid_option"
    key = copied(standby, other, "requested")["public_key"]
    assert copied(OpenCryptoki(tmp_path / "empty"), other, "packed", daemon=False, recipient=key)["error_code"] == (
        "opencryptoki_store_absent"
    )
    assert copied(standby, other, "requested", slot=9)["error_code"] == "opencryptoki_slot_absent"


def test_a_token_in_use_is_not_replaced(
    opencryptoki: OpenCryptoki, standby: OpenCryptoki, state: StateDirectory, tmp_path: Path
) -> None:
    other = new_state(tmp_path / "standby-state")
    packed = copied(opencryptoki, state, "packed", recipient=copied(standby, other, "requested")["public_key"])

    def act() -> dict[str, t.Any]:
        load(standby.library_access())
        options = {"state": "installed", "slot": 0, "archive": packed["archive"], "state_directory": other.path}
        return run_module("opencryptoki_token_copy", options)

    assert standby.run(act)["error_code"] == "opencryptoki_in_use"
    assert not (standby.home / "var/swtok/MK_USER").exists()


def migrated(
    here: OpenCryptoki, state: StateDirectory, check: bool = False, daemon: bool = False, **more: t.Any
) -> dict[str, t.Any]:
    options = {"slot": 0, "so_pin": here.so_pin, "pin": here.pin, "state_directory": state.path, **more}
    return here.run(lambda: run_module("opencryptoki_migrate", options, check=check), daemon=daemon)


def test_a_folder_is_migrated_and_the_keys_stay(opencryptoki: OpenCryptoki, state: StateDirectory) -> None:
    here = opencryptoki
    make_key(here, state, "sealed")
    config = here.home / "etc/opencryptoki.conf"
    config.write_text(config.read_text().replace("slot 0", "# the first\nslot 0"))
    before = config.read_text()
    tokversion = {"slots": [{"number": 0, "tokversion": "3.12"}], "state_directory": state.path}
    if not os.path.exists(TOOL):
        assert migrated(here, state)["error_code"] == "opencryptoki_migrate_unsupported"
        assert config.read_text() == before
        return
    refused = here.run(lambda: run_module("opencryptoki_config", tokversion))
    assert refused["error_code"] == "opencryptoki_store_format"
    assert migrated(here, state, daemon=True)["error_code"] == "opencryptoki_in_use"
    assert migrated(here, state, pin=None)["error_code"] == "pin_missing"
    wrong = migrated(here, state, pin="00000000")
    assert wrong["error_code"] == "pin_refused"
    foreseen = migrated(here, state, check=True)
    assert [step["action"] for step in foreseen["plan"]] == ["migrate_store", "set_tokversion"]
    assert config.read_text() == before, "nothing was changed so far"
    assert not (here.home / "var/swtok_BAK").exists()
    done = migrated(here, state)
    assert done["format"] == "3.12"
    assert done["backup"] == "/var/lib/opencryptoki/swtok_BAK"
    assert config.read_text() == before.replace("tokname = swtok\n", "tokname = swtok\ntokversion = 3.12\n")
    assert not migrated(here, state)["changed"]
    assert keys(here, state) == ["sealed"]
    # As if the run had been killed between the folder and the file.
    config.write_text(before)
    again = migrated(here, state)
    assert [step["action"] for step in again["plan"]] == ["set_tokversion"]
    assert keys(here, state) == ["sealed"]


def test_a_new_token_in_the_new_format(factory_opencryptoki: OpenCryptoki, state: StateDirectory, tmp_path: Path) -> None:
    here = factory_opencryptoki
    wish = {"slots": [{"number": 0, "tokversion": "3.12"}], "state_directory": state.path}
    done = here.run(lambda: run_module("opencryptoki_config", wish), daemon=False)
    if not os.path.exists(TOOL):
        assert done["error_code"] == "opencryptoki_conf_invalid"
        return
    assert done["changed"]
    here.add_token("demo")
    make_key(here, state, "sealed")
    info = here.run(lambda: run_module("opencryptoki_info", {}))
    assert info["slots"][0]["store"]["format"] == "3.12"
    back = {"slots": [{"number": 0, "tokversion": ""}], "state_directory": state.path}
    assert here.run(lambda: run_module("opencryptoki_config", back))["error_code"] == "opencryptoki_store_format"
    # A standby whose slot has the old format does not take it.
    other, third = OpenCryptoki(tmp_path / "other"), new_state(tmp_path / "other-state")
    packed = copied(here, state, "packed", recipient=copied(other, third, "requested")["public_key"])
    assert copied(other, third, "installed", archive=packed["archive"])["error_code"] == "opencryptoki_store_format"
    options = here.options(token_label="demo", pin=here.pin, new_pin="newpin-1", state_directory=state.path)
    assert here.run(lambda: run_module("pkcs11_pin", options))["changed"]
    assert not here.run(lambda: run_module("pkcs11_pin", options))["changed"]
