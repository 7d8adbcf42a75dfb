# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A store that somebody touched, or that decayed: what ``tde_keystore``, ``tde_info`` and ``hsm-tde open`` say, and that nothing opens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.command import exits, zipapp
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import ERROR_CODES
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore, PassphraseSlot
from ansible_collections.hsm.tde.tests.integration.estate import PASSPHRASE, RECOVERY, SLOTS, Estate, estate, usable
from ansible_collections.hsm.tde.tests.integration.refusals import clear
from ansible_collections.hsm.tde.tests.unit.keystore.support import CHEAP, edited

pytestmark = [pytest.mark.root, pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices")]

NO_TOKEN = {"library": None, "token_label": None, "pin": None}


class Store:
    """A host with a closed keystore, two generations of its key file, and files that came from elsewhere."""

    def __init__(self, host: Estate) -> None:
        self.host = host
        host.run("tde_keystore", keyslots=SLOTS[:1], no_recovery=True)
        self.file = host.state / "store/main/cluster.json"
        self.former = self.file.read_bytes()
        host.run("tde_keystore", keyslots=SLOTS, pin_source={"kind": "file", "path": str(host.home / "pin")})
        self.genuine = self.file.read_bytes()
        self.command = host.home / "hsm-tde"
        self.command.write_bytes(zipapp.build(sys.executable, str(host.state)))
        self.command.chmod(0o755)
        mine = PassphraseSlot("attacker", Secret("known to the attacker"), CHEAP)
        self.of_other_cluster = self._made(StateDirectory(str(host.state)), "other", mine)
        self.of_other_host = self._made(StateDirectory(str(host.home / "elsewhere")), "main", mine)
        host.unmount()

    def _made(self, state: StateDirectory, cluster: str, slot: PassphraseSlot) -> bytes:
        store = KeyStore(state, cluster)
        key = store.create_key("cluster", 64, [slot])
        # As many generations as the genuine file has.
        for name in ("second", "third"):
            store.add_keyslot("cluster", key, dataclasses.replace(slot, name=name))
        return Path(store.path, "cluster.json").read_bytes()

    def write(self, raw: bytes) -> None:
        self.file.write_bytes(raw)

    def mend(self) -> None:
        """As it was."""
        folder = self.file.parent
        if folder.is_symlink():
            folder.unlink()
            (self.host.home / "aside").rename(folder)
        self.file.unlink(missing_ok=True)
        self.write(self.genuine)
        self.file.chmod(0o600)
        for name in folder.iterdir():
            if name.name not in ("cluster.json", "lock"):
                name.unlink()

    def hsm_tde(self, *arguments: str, secret: str = "") -> tuple[int, dict[str, t.Any]]:
        """The command, as a unit runs it; :returns: its exit code and what it said of the cluster."""
        reader, writer = os.pipe()
        os.write(writer, secret.encode())
        os.close(writer)
        given = ["--passphrase-fd", str(reader)] if secret else []
        done = subprocess.run(
            ["setsid", "--wait", str(self.command), *arguments, *given, "--json"], cwd="/", env={}, capture_output=True, text=True,
            timeout=60, check=False, pass_fds=[reader],
        )  # fmt: skip
        os.close(reader)
        return done.returncode, json.loads(done.stdout)["clusters"]["main"]


@pytest.fixture(scope="module")
def store() -> t.Iterator[Store]:
    options = {"coverage": "cluster", "data_directory": "{home}/mnt/data", "image_size": "64M"}
    with estate(**options) as host:
        yield Store(host)


@pytest.fixture(autouse=True)
def _mended(store: Store) -> t.Iterator[None]:
    yield
    store.mend()


def _flip(store: Store) -> None:
    raw = bytearray(store.genuine)
    raw[len(raw) // 2] ^= 1
    store.write(bytes(raw))


def _edit(**values: t.Any) -> t.Callable[[Store], None]:
    """A change of the outermost object, by somebody who puts the checksum right."""
    return lambda store: store.write(edited(store.genuine, lambda content: content.update(values)))


def _foreign_keyslot(store: Store) -> None:
    theirs = json.loads(store.of_other_host)["keyslots"][0]
    store.write(edited(store.genuine, lambda content: content["keyslots"].append(theirs)))


def _absurd(store: Store) -> None:
    store.write(edited(store.genuine, lambda content: content["keyslots"][1]["blob"].update(log_n=40)))


def _symlink(store: Store) -> None:
    real = store.host.home / "real.json"
    real.write_bytes(store.genuine)
    real.chmod(0o600)
    store.file.unlink()
    store.file.symlink_to(real)


def _folder_symlink(store: Store) -> None:
    aside = store.host.home / "aside"
    store.file.parent.rename(aside)
    store.file.parent.symlink_to(aside)


def _hard_link(store: Store) -> None:
    os.link(store.file, store.file.with_name("second"))


#: Name, damage, code when it is opened, what the message must say beside the file's name.
DAMAGES: list[tuple[str, t.Callable[[Store], None], str, str]] = [
    ("truncated", lambda store: store.write(store.genuine[:-20]), "keystore_truncated", "backup"),
    ("emptied", lambda store: store.write(b""), "keystore_truncated", "backup"),
    ("bit-flipped", _flip, "keystore_damaged", "checksum"),
    ("of another cluster", lambda store: store.write(store.of_other_cluster), "keystore_foreign", "cluster other"),
    ("of another host", lambda store: store.write(store.of_other_host), "keystore_unrecorded", "this host did not write"),
    ("rolled back", lambda store: store.write(store.former), "keystore_rolled_back", "generation"),
    ("foreign keyslot", _foreign_keyslot, "keyslot_foreign", "keyslot attacker"),
    ("edited metadata", _edit(created="2020-01-01T00:00:00Z"), "keystore_edited", "does not hold the data key"),
    ("newer version", _edit(version=2), "keystore_newer", "version of hsm.tde"),
    ("names a library", _edit(library="/tmp/evil.so"), "keystore_forbidden", "library"),
    ("absurd scrypt", _absurd, "kdf_parameters_refused", "keyslot recovery"),
    ("wrong owner", lambda store: os.chown(store.file, 65534, -1), "file_not_private", "user id 65534"),
    ("wrong mode", lambda store: store.file.chmod(0o640), "file_not_private", "0640"),
    ("behind a link", _symlink, "file_not_private", "link"),
    ("folder behind a link", _folder_symlink, "file_not_private", "link"),
    ("second name", _hard_link, "file_not_private", "2 links"),
]


@pytest.mark.parametrize(
    ("damage", "code", "word"), [row[1:] for row in DAMAGES], ids=[row[0].replace(" ", "-") for row in DAMAGES]
)
def test_a_store_that_is_not_as_it_was_written_opens_nothing(
    store: Store, damage: t.Callable[[Store], None], code: str, word: str
) -> None:
    host, place = store.host, str(store.file.parent)
    damage(store)
    started = time.monotonic()
    for module, more in (
        ("tde_keystore", {"state": "open"}),
        # Nothing is to be done, and no play may be green over it.
        ("tde_keystore", {"keyslots": SLOTS}),
    ):
        clear(host.refused(module, code, **more), code, place, word)
    before = host.fingerprint()
    exit_code, said = store.hsm_tde("open", "main")
    if code in ("keyslot_foreign", "keystore_edited"):
        # The command asks for no PIN before it has looked: that this host did not write the file is reason enough.
        clear(said, "keystore_unrecorded", place, "this host did not write", secrets=[host.hsm.pin])
    else:
        clear(said, code, place, word, secrets=[host.hsm.pin])
    assert exit_code == exits.BY_CAUSE[ERROR_CODES[code].cause]
    # A look fails at nothing, and says it first.
    info = host.run("tde_info", **NO_TOKEN)
    assert place in info["gaps"][0]
    assert info["problems"][0] == info["gaps"][0]
    assert host.fingerprint() == before
    assert not os.path.ismount(host.mount)
    assert time.monotonic() - started < 30, "something was derived that must not be"


def test_a_rolled_back_store_is_not_written_anew(store: Store) -> None:
    """An act would put a right HMAC over it, and nobody could tell any more."""
    host = store.host
    store.write(store.former)
    rotated = {"state": "rotated", "tag": "2"}
    for check in (True, False):
        host.refused("tde_master_key", "keystore_rolled_back", check=check, **rotated)
    third = {**RECOVERY, "name": "third"}
    host.refused("tde_keystore", "keystore_rolled_back", keyslots=[*SLOTS, third], update_keyslots="always")
    host.refused("tde_keystore", "keystore_rolled_back", **NO_TOKEN)
    assert host.in_token("hsm-tde.main.2") == []


def test_a_wrong_passphrase(store: Store) -> None:
    host = store.host
    wrong = "mistyped horse battery"
    result = host.refused("tde_keystore", "passphrase_refused", state="open", passphrase=wrong, **NO_TOKEN)
    clear(result, "passphrase_refused", "keyslot recovery", "data key cluster", secrets=[wrong])
    before = host.fingerprint()
    exit_code, said = store.hsm_tde("open", "main", secret=wrong)
    clear(said, "passphrase_refused", "keyslot recovery", secrets=[wrong])
    assert exit_code == 4
    assert host.fingerprint() == before
    exit_code, said = store.hsm_tde("open", "main", secret=PASSPHRASE)
    assert (exit_code, said["changed"]) == (0, True)
    host.unmount()


def test_a_state_directory_that_others_could_change(store: Store) -> None:
    host = store.host
    host.state.chmod(0o777)
    try:
        for module, more in (("tde_keystore", {"state": "open"}), ("tde_keystore", {"keyslots": SLOTS}), ("tde_master_key", {})):
            clear(host.refused(module, "file_not_private", **more), "file_not_private", str(host.state), "writable for others")
    finally:
        host.state.chmod(0o700)
    link = host.home / "link"
    link.symlink_to(host.state)
    result = host.refused("tde_keystore", "file_not_private", state="open", state_directory=str(link))
    clear(result, "file_not_private", str(link), "link")


def test_a_journal_or_record_that_was_changed(store: Store) -> None:
    """Without the journal nobody can tell a rolled-back store: nothing is opened or written over it."""
    host = store.host
    for name, code in (
        ("journal.jsonl", "journal_damaged"),
        ("registry.json", "registry_damaged"),
        ("clusters/main.json", "record_damaged"),
    ):
        path = host.state / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b"main", b"mane", 1)[: -1 if name.endswith("json") else None])
        if name == "registry.json":
            path.write_bytes(content[:-5])
        try:
            clear(host.refused("tde_keystore", code, keyslots=SLOTS), code, str(path))
            clear(host.refused("tde_keystore", code, state="open"), code, str(path))
        finally:
            path.write_bytes(content)
    shutil.copy(store.file, host.home / "copy")
    assert host.run("tde_keystore", state="open", check=True)["changed"]
