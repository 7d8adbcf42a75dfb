# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped-key store on a real file system, under passphrases."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.common.journal import Journal
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore import passphrase, protection
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore, PassphraseSlot
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.registry import Registry
from ansible_collections.hsm.tde.tests.unit.keystore.support import CHEAP, credential, edited, refused, slot

PRIMARY, RECOVERY = slot("primary"), slot("recovery")
ROOT = Path(__file__).resolve().parents[3]


def path_of(store: KeyStore, key_id: str = "cluster") -> Path:
    return Path(store.path, f"{key_id}.json")


def slots_of(store: KeyStore, key_id: str = "cluster") -> list[tuple[str, str]]:
    facts = next(each for each in store.describe() if each["key_id"] == key_id)
    return [(each["name"], each["state"]) for each in facts["keyslots"]]


def write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    path.chmod(0o600)


def files(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_key_is_made_and_opened_by_each_keyslot(store: KeyStore) -> None:
    assert not store.exists()
    assert store.key_ids() == []
    assert store.describe() == []
    made = store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    assert len(made.reveal()) == 64
    for wish in (PRIMARY, RECOVERY):
        opened = store.open_key("cluster", [wish])
        assert opened.reveal() == made.reveal()
        assert (opened.keyslot, opened.generation, opened.check_value) == (wish.name, 1, made.check_value)
    assert store.open_key("cluster", [credential("wrong" * 4), credential("passphrase of recovery")]).reveal() == made.reveal()
    assert slots_of(store) == [("primary", "proved"), ("recovery", "proved")]
    assert made.reveal().hex() not in repr(made) + str(vars(made))
    assert files(store.path) == ["cluster.json", "lock"]
    assert path_of(store).stat().st_mode & 0o7777 == 0o600


def test_check_value_comes_from_the_consumer_or_from_us(store: KeyStore) -> None:
    mine = store.create_key("mine", 64, [PRIMARY])
    theirs = store.create_key("theirs", 32, [PRIMARY], check=lambda key: hashlib.sha256(key).hexdigest()[:32])
    assert len(mine.check_value) == 32
    assert theirs.check_value == hashlib.sha256(theirs.reveal()).hexdigest()[:32]
    assert [facts["check_value"] for facts in store.describe()] == [mine.check_value, theirs.check_value]


def test_a_key_is_never_made_over_another(store: KeyStore) -> None:
    made = store.create_key("cluster", 64, [PRIMARY])
    before = path_of(store).read_bytes()
    with refused("key_exists"):
        store.create_key("cluster", 64, [RECOVERY])
    assert path_of(store).read_bytes() == before
    assert store.open_key("cluster", [PRIMARY]).reveal() == made.reveal()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 64, "a\n"])
def test_names_that_a_path_would_read_are_refused(store: KeyStore, name: str) -> None:
    with refused("invalid_option"):
        store.create_key(name, 64, [PRIMARY])


def test_describe_needs_neither_credential_nor_library(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    code = (
        "import json, sys\n"
        "for name in ('cryptography', 'pkcs11'): sys.modules[name] = None\n"
        "from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory\n"
        "from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore\n"
        f"print(json.dumps(KeyStore(StateDirectory({store.state.path!r}), 'main').describe()))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".collections")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    facts = json.loads(done.stdout)
    assert facts == store.describe()
    assert facts[0]["keyslots"][0]["token_label"] is None
    assert facts[0]["recorded"] == "same"


def test_replacing_a_keyslot_keeps_the_old_until_the_new_is_proved(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    new = slot("primary", "another passphrase")
    assert store.add_keyslot("cluster", key, new)
    assert not store.add_keyslot("cluster", key, new)
    assert slots_of(store) == [("primary", "proved"), ("recovery", "proved"), ("primary", "new")]
    for wish in (PRIMARY, new):
        assert store.open_key("cluster", [wish]).reveal() == key.reveal()
    with refused("keyslot_unproved"):
        store.remove_keyslot("cluster", key, "primary")
    assert store.prove_keyslot("cluster", new)
    assert not store.prove_keyslot("cluster", new)
    assert store.remove_keyslot("cluster", key, "primary")
    assert slots_of(store) == [("recovery", "proved"), ("primary", "proved")]
    with refused("passphrase_refused"):
        store.open_key("cluster", [PRIMARY])
    history = store.describe()[0]["history"]
    assert [(past["name"], past["protection"]) for past in history] == [("primary", "passphrase")]
    assert store.open_key("cluster", [new]).generation == 4


def test_a_keyslot_by_its_uid(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    new = slot("primary", "another passphrase")
    old_uid = store.find_keyslot("cluster", PRIMARY)
    assert store.find_keyslot("cluster", new) is None
    store.add_keyslot("cluster", key, new)
    new_uid = store.find_keyslot("cluster", new)
    assert store.find_keyslot("cluster", PRIMARY) == old_uid != new_uid
    # The wish went back to the old one: the new goes, proved or not.
    assert store.remove_keyslot("cluster", key, "primary", new_uid)
    assert not store.remove_keyslot("cluster", key, "primary", new_uid)
    assert store.find_keyslot("cluster", PRIMARY) == old_uid


def test_an_unproved_leftover_makes_room(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY])
    store.add_keyslot("cluster", key, slot("primary", "one that was killed"))
    store.add_keyslot("cluster", key, slot("primary", "one that is finished"))
    assert slots_of(store) == [("primary", "proved"), ("primary", "new")]
    store.prove_keyslot("cluster", slot("primary", "one that is finished"))


def test_the_last_proved_keyslot_stays(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY])
    with refused("keyslot_last"):
        store.remove_keyslot("cluster", key, "primary")
    store.add_keyslot("cluster", key, RECOVERY)
    with refused("keyslot_last"):
        store.remove_keyslot("cluster", key, "primary")
    store.prove_keyslot("cluster", RECOVERY)
    assert store.remove_keyslot("cluster", key, "primary")
    with refused("keyslot_last"):
        store.remove_keyslot("cluster", key, "recovery")
    assert not store.remove_keyslot("cluster", key, "never there")
    assert store.open_key("cluster", [RECOVERY]).reveal() == key.reveal()


def test_proving_what_is_not_there(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    with refused("keyslot_absent"):
        store.prove_keyslot("cluster", RECOVERY)
    with refused("passphrase_refused"):
        store.prove_keyslot("cluster", slot("primary", "not the passphrase"))


def test_refusals_are_told_apart(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    with refused("passphrase_refused"):
        store.open_key("cluster", [credential("wrong passphrase")])
    with refused("credential_missing"):
        store.open_key("cluster", [])
    with refused("data_key_absent"):
        store.open_key("other", [PRIMARY])
    with refused("data_key_absent"):
        KeyStore(store.state, "elsewhere").open_key("cluster", [PRIMARY])


@pytest.mark.parametrize("text", ["", "short", "x" * 11, "y" * 1025])
def test_length_of_a_new_passphrase(store: KeyStore, text: str) -> None:
    with refused("passphrase_length"):
        store.create_key("cluster", 64, [PassphraseSlot("primary", Secret(text), CHEAP)])
    assert store.key_ids() == []


# --- files that somebody touched


def test_rolled_back(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY])
    old = path_of(store).read_bytes()
    store.add_keyslot("cluster", key, RECOVERY)
    write(path_of(store), old)
    assert store.describe()[0]["recorded"] == "rolled_back"
    for act in (
        lambda: store.open_key("cluster", [PRIMARY]),
        lambda: store.add_keyslot("cluster", key, RECOVERY),
        lambda: store.prove_keyslot("cluster", PRIMARY),
        lambda: store.remove_keyslot("cluster", key, "primary"),
    ):
        with refused("keystore_rolled_back"):
            act()
    # A passphrase that was changed since explains nothing: the rollback does.
    with refused("keystore_rolled_back"):
        store.open_key("cluster", [RECOVERY])
    assert path_of(store).read_bytes() == old


def test_a_roll_back_that_took_the_journal_along_is_told(store: KeyStore) -> None:
    """Without the journal nobody can notice it; that nobody could is remembered."""
    key = store.create_key("cluster", 64, [PRIMARY])
    assert store.adopted() == []
    old = path_of(store).read_bytes()
    store.add_keyslot("cluster", key, RECOVERY)
    write(path_of(store), old)
    for name in (store.state.journal, f"{store.state.journal}.head"):
        Path(name).unlink()
    assert store.adopted() == ["cluster"]
    store.open_key("cluster", [PRIMARY])
    assert store.adopted() == ["cluster"]


def test_a_genuine_file_of_another_host(tmp_path: Path, store: KeyStore) -> None:
    """Both hosts have a cluster main; one's file, copied onto the other, is not the one that was written there."""
    store.create_key("cluster", 64, [PRIMARY])
    other = KeyStore(StateDirectory(str(tmp_path / "other")), "main")
    key = other.create_key("cluster", 64, [PRIMARY])
    write(path_of(store), path_of(other).read_bytes())
    with refused("keystore_unrecorded"):
        store.open_key("cluster", [PRIMARY])
    other.add_keyslot("cluster", key, RECOVERY)
    write(path_of(store), path_of(other).read_bytes())
    with refused("keystore_unrecorded"):
        store.open_key("cluster", [PRIMARY])


def test_another_clusters_and_another_keys_file(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    store.create_key("tablespace.a", 64, [PRIMARY])
    other = KeyStore(store.state, "other")
    other.create_key("cluster", 64, [PRIMARY])
    mine = path_of(store).read_bytes()
    for foreign in (path_of(other), path_of(store, "tablespace.a")):
        write(path_of(store), foreign.read_bytes())
        with refused("keystore_foreign"):
            store.describe()
        with refused("keystore_foreign"):
            store.open_key("cluster", [PRIMARY])
    write(path_of(store), mine)
    store.open_key("cluster", [PRIMARY])


def test_a_foreign_keyslot(store: KeyStore) -> None:
    """A keyslot of another file, whose passphrase the attacker knows, opens nothing and is named."""
    store.create_key("cluster", 64, [PRIMARY])
    store.create_key("tablespace.a", 64, [slot("attacker", "known to the attacker")])
    foreign = json.loads(path_of(store, "tablespace.a").read_bytes())["keyslots"][0]
    raw = edited(path_of(store).read_bytes(), lambda content: content["keyslots"].append(foreign))
    write(path_of(store), raw)
    with refused("keyslot_foreign"):
        store.open_key("cluster", [credential("known to the attacker")])
    with pytest.raises(TdeError, match="keyslot attacker was not written by a holder of the data key") as caught:
        store.open_key("cluster", [PRIMARY])
    assert caught.value.code == "keyslot_foreign"


def test_a_file_made_by_the_attacker(store: KeyStore, tmp_path: Path) -> None:
    """Another data key, under a keyslot that the attacker made: neither the owner's credential nor the attacker's opens it."""
    store.create_key("cluster", 64, [PRIMARY])
    theirs = KeyStore(StateDirectory(str(tmp_path / "attacker")), "main")
    theirs.create_key("cluster", 64, [slot("primary", "known to the attacker")])
    write(path_of(store), path_of(theirs).read_bytes())
    for wish in (PRIMARY, credential("known to the attacker")):
        with refused("keystore_unrecorded"):
            store.open_key("cluster", [wish])


def test_edited_metadata(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    genuine = path_of(store).read_bytes()
    write(path_of(store), edited(genuine, lambda content: content.update(created="2020-01-01T00:00:00Z")))
    assert store.describe()[0]["recorded"] == "other"
    for act in (lambda: store.open_key("cluster", [PRIMARY]), lambda: store.add_keyslot("cluster", key, slot("third"))):
        with refused("keystore_edited"):
            act()
    # A changed salt makes the passphrase look wrong; that the file is another is what the reader is told.
    write(path_of(store), edited(genuine, lambda content: content["keyslots"][0]["blob"].update(salt="AAAAAAAAAAAAAAAAAAAAAA==")))
    with refused("keystore_unrecorded"):
        store.open_key("cluster", [PRIMARY])


def _blob(**values: t.Any) -> t.Callable[[dict[str, t.Any]], None]:
    return lambda content: content["keyslots"][0]["blob"].update(values)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"log_n": 40}, "kdf_parameters_refused"),
        ({"log_n": 0}, "kdf_parameters_refused"),
        ({"log_n": 20, "r": 8}, "kdf_parameters_refused"),
        ({"r": 1 << 30}, "kdf_parameters_refused"),
        ({"p": 1 << 30}, "kdf_parameters_refused"),
        ({"p": 0}, "kdf_parameters_refused"),
        ({"log_n": "10"}, "keystore_damaged"),
        ({"kdf": "md5"}, "keystore_damaged"),
        ({"kdf": 7}, "keystore_damaged"),
        ({"cipher": "none"}, "keystore_damaged"),
        ({"salt": "AA=="}, "keystore_damaged"),
        ({"salt": "not base64"}, "keystore_damaged"),
        ({"iv": ""}, "keystore_damaged"),
        ({"verifier": "\u00e9"}, "keystore_damaged"),
        ({"extra": 1}, "keystore_damaged"),
    ],
)
def test_bounds_are_held_before_anything_is_derived(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch, values: dict[str, t.Any], code: str
) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    write(path_of(store), edited(path_of(store).read_bytes(), _blob(**values)))
    monkeypatch.setattr(passphrase, "_derive", lambda *_: pytest.fail("derived"))
    for act in (store.describe, lambda: store.open_key("cluster", [PRIMARY])):
        with refused(code):
            act()


def test_absurd_pbkdf2(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PassphraseSlot("primary", PRIMARY.passphrase, passphrase.Pbkdf2(1000))])
    assert store.open_key("cluster", [PRIMARY]).keyslot == "primary"
    write(path_of(store), edited(path_of(store).read_bytes(), _blob(iterations=1 << 40)))
    with refused("kdf_parameters_refused"):
        store.describe()


def test_changed_ciphertext_is_not_a_wrong_passphrase(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    write(path_of(store), edited(path_of(store).read_bytes(), _blob(ciphertext="AAAA" * 27)))
    Path(store.state.journal).unlink()
    Path(store.state.journal + ".head").unlink()
    with refused("keyslot_foreign"):
        store.open_key("cluster", [PRIMARY])


def test_a_protection_of_a_later_version_is_passed_over(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one keyslot that this version does not know opens with the others, and is described."""
    key = store.create_key("cluster", 64, [PRIMARY])

    class Later:
        PROTECTION = type("P", (), {"wrap": lambda self, *_: protection.Wrapped({"server": "kms"}, {"id": "7"})})()

    load = protection.load
    monkeypatch.setattr(
        "ansible_collections.hsm.tde.plugins.module_utils.keystore.keyfile.load",
        lambda name: Later.PROTECTION if name == "later" else load(name),
    )
    wish = type("S", (), {"name": "kms", "protection": "later", "words": lambda self: "kms"})()
    store.add_keyslot("cluster", key, wish)
    monkeypatch.undo()
    assert store.open_key("cluster", [PRIMARY]).reveal() == key.reveal()
    assert store.describe()[0]["keyslots"][1]["protection"] == "later"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700 | 0o070])
def test_wrong_mode(store: KeyStore, mode: int) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    path_of(store).chmod(mode)
    with refused("file_not_private"):
        store.open_key("cluster", [PRIMARY])


def test_links_and_sizes(store: KeyStore, tmp_path: Path) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    path, aside = path_of(store), tmp_path / "aside"
    os.link(path, aside)
    with refused("file_not_private"):
        store.describe()
    path.unlink()
    path.symlink_to(aside)
    with refused("file_not_private"):
        store.describe()
    path.unlink()
    os.mkfifo(path, 0o600)
    with refused("file_not_private"):
        store.describe()
    path.unlink()
    write(path, b"x" * ((1 << 20) + 1))
    with refused("file_too_large"):
        store.describe()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_wrong_owner(store: KeyStore) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    os.chown(path_of(store), 12345, -1)
    with refused("file_not_private"):
        store.describe()
    os.chown(path_of(store), 0, -1)
    os.chown(store.path, 12345, -1)
    for act in (store.exists, store.describe, lambda: store.create_key("another", 64, [PRIMARY])):
        with refused("file_not_private"):
            act()


def test_a_folder_behind_a_link(store: KeyStore, tmp_path: Path) -> None:
    store.create_key("cluster", 64, [PRIMARY])
    os.rename(store.path, tmp_path / "moved")
    os.symlink(tmp_path / "moved", store.path)
    for act in (store.exists, lambda: store.open_key("cluster", [PRIMARY]), lambda: store.create_key("another", 64, [PRIMARY])):
        with refused("file_not_private"):
            act()


# --- what must exist and does not show


def test_a_store_that_is_not_mounted(store: KeyStore, tmp_path: Path) -> None:
    made = store.create_key("cluster", 64, [PRIMARY])
    for _where in ("file", "folder"):
        aside = tmp_path / "aside"
        place = path_of(store) if _where == "file" else Path(store.path)
        place.rename(aside)
        for act in (
            store.key_ids,
            store.describe,
            lambda: store.open_key("cluster", [PRIMARY]),
            lambda: store.create_key("cluster", 64, [PRIMARY]),
            lambda: store.add_keyslot("cluster", made, RECOVERY),
        ):
            with refused("keystore_unreachable"):
                act()
        aside.rename(place)
        assert store.open_key("cluster", [PRIMARY]).reveal() == made.reveal()
    Path(store.path).rename(tmp_path / "aside")
    for act in (store.exists, store.create, lambda: store.create_key("another", 64, [PRIMARY])):
        with refused("keystore_unreachable"):
            act()
    assert not os.path.exists(store.path)
    # The whole store/ not mounted: the same.
    os.rmdir(os.path.dirname(store.path))
    with refused("keystore_unreachable"):
        store.exists()


def test_the_registry_remembers_where_the_journal_does_not(store: KeyStore) -> None:
    assert store.create()
    assert not store.create()
    Registry(store.state).remember_key("demo", "1", "hsm-tde.main", "00", "secret_key", "main")
    assert store.key_ids() == []
    os.rmdir(store.path)
    for act in (store.exists, lambda: store.create_key("cluster", 64, [PRIMARY])):
        with refused("keystore_unreachable"):
            act()
    assert not KeyStore(store.state, "other").exists()


def test_a_store_restored_on_a_new_host_is_taken_up(store: KeyStore, tmp_path: Path) -> None:
    """No journal there: the recovery keyslot opens it, and from then on a rollback is noticed."""
    key = store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    old = path_of(store).read_bytes()
    store.add_keyslot("cluster", key, slot("third"))
    new = KeyStore(StateDirectory(str(tmp_path / "new")), "main")
    os.makedirs(os.path.dirname(new.path))
    shutil.copytree(store.path, new.path)
    assert new.describe()[0]["recorded"] == "unknown"
    assert new.open_key("cluster", [RECOVERY]).reveal() == key.reveal()
    assert new.describe()[0]["recorded"] == "same"
    write(path_of(new), old)
    with refused("keystore_rolled_back"):
        new.open_key("cluster", [RECOVERY])


def test_a_full_disk_does_not_keep_a_key_closed(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The acknowledgement of a write is missing and cannot be written: the file opens all the same."""
    key = store.create_key("cluster", 64, [PRIMARY])
    append = Journal.append

    def full(self: Journal, action: str, obj: str, **rest: t.Any) -> dict[str, t.Any]:
        if rest.get("result") == "done":
            raise TdeError("disk_full", "No space left on device", obj=self.path)
        return append(self, action, obj, **rest)

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(TdeError, match="The new content is in place") as caught:
        store.add_keyslot("cluster", key, RECOVERY)
    assert caught.value.code == "disk_full"
    assert store.open_key("cluster", [RECOVERY]).reveal() == key.reveal()
    assert store.describe()[0]["recorded"] == "pending"
    monkeypatch.undo()
    store.open_key("cluster", [RECOVERY])
    assert store.describe()[0]["recorded"] == "same"


def test_every_write_is_in_the_journal_without_a_secret(store: KeyStore) -> None:
    key = store.create_key("cluster", 64, [PRIMARY])
    store.add_keyslot("cluster", key, RECOVERY)
    store.prove_keyslot("cluster", RECOVERY)
    store.remove_keyslot("cluster", key, "primary")
    entries = Journal(store.state.journal).entries()
    done = [entry for entry in entries if entry["result"] == "done"]
    assert [entry["action"] for entry in done] == ["create_data_key", "add_keyslot", "prove_keyslot", "remove_keyslot"]
    assert {(entry["cluster"], entry["key_id"], entry["kcv"]) for entry in done} == {("main", "cluster", key.check_value)}
    text = Path(store.state.journal).read_text()
    for secret in (key.reveal().hex(), "passphrase of"):
        assert secret not in text


def test_a_keyslot_that_does_not_give_the_key_back_never_shows(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that wraps wrongly, or a disk that returns something else: no file, so nobody encrypts under such a key."""
    wrap = passphrase._Passphrase.wrap

    def another(self: t.Any, wish: t.Any, key: bytes, *rest: t.Any) -> t.Any:
        return wrap(self, wish, key if wish.name == "primary" else bytes(len(key)), *rest)

    monkeypatch.setattr(passphrase._Passphrase, "wrap", another)
    with refused("keyslot_unsound"):
        store.create_key("cluster", 64, [PRIMARY, RECOVERY])
    assert store.key_ids() == []
    monkeypatch.undo()
    key = store.create_key("cluster", 64, [PRIMARY])
    assert files(store.path) == ["cluster.json", "lock"]
    monkeypatch.setattr(passphrase._Passphrase, "wrap", another)
    store.add_keyslot("cluster", key, RECOVERY)
    with refused("keyslot_foreign"):
        store.prove_keyslot("cluster", RECOVERY)
    assert slots_of(store) == [("primary", "proved"), ("recovery", "new")]


def test_a_writer_between_journal_and_file_is_no_false_alarm(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.create_key("cluster", 64, [PRIMARY])
    entries, writes = Journal.entries, ["first", "second"]

    def racing(self: Journal) -> list[dict[str, t.Any]]:
        found = entries(self)
        if writes:
            name = writes.pop()
            monkeypatch.setattr(Journal, "entries", entries)
            store.add_keyslot("cluster", key, slot(name))
            monkeypatch.setattr(Journal, "entries", racing)
        return found

    monkeypatch.setattr(Journal, "entries", racing)
    assert store.open_key("cluster", [PRIMARY]).reveal() == key.reveal()
    assert (writes, slots_of(store)) == ([], [("primary", "proved"), ("second", "new"), ("first", "new")])


def test_another_run_waits_its_turn(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that holds the lock: another writer stops with a clear error, a reader is not held up."""
    from ansible_collections.hsm.tde.plugins.module_utils.common.files import lock
    from ansible_collections.hsm.tde.plugins.module_utils.keystore import keyfile

    key = store.create_key("cluster", 64, [PRIMARY])
    monkeypatch.setattr(keyfile, "_WAIT", 0)
    with lock(os.path.join(store.path, "lock")):
        with refused("busy"):
            store.add_keyslot("cluster", key, RECOVERY)
        assert store.open_key("cluster", [PRIMARY]).reveal() == key.reveal()


# --- hosts on which scrypt may not run


def test_where_fips_rules_pbkdf2_is_used(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm

    store.create_key("before", 64, [PRIMARY])

    def unsupported(*_: t.Any) -> bytes:
        raise UnsupportedAlgorithm("scrypt")

    monkeypatch.setattr(passphrase.Scrypt, "derive", unsupported)
    key = store.create_key("cluster", 64, [PassphraseSlot("primary", PRIMARY.passphrase)])
    blob = json.loads(path_of(store).read_bytes())["keyslots"][0]["blob"]
    assert (blob["kdf"], blob["iterations"]) == ("pbkdf2-hmac-sha256", 1_000_000)
    assert store.open_key("cluster", [PRIMARY]).reveal() == key.reveal()
    with refused("kdf_unsupported"):
        store.open_key("before", [PRIMARY])


def test_default_parameters_open_in_half_a_second(store: KeyStore) -> None:
    import time

    store.create_key("cluster", 64, [PassphraseSlot("primary", PRIMARY.passphrase)])
    blob = json.loads(path_of(store).read_bytes())["keyslots"][0]["blob"]
    assert (blob["kdf"], blob["log_n"], blob["r"], blob["p"]) == ("scrypt", 17, 8, 1)
    began = time.process_time()
    store.open_key("cluster", [PRIMARY])
    # Twice what is asked for: the machine may be shared.
    assert time.process_time() - began < 1.0


def test_each_credential_is_used_once_for_all_keys(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: store.create_key(name, 64, [PRIMARY]).reveal() for name in ("a", "b", "c")}
    opened = passphrase._Passphrase.opened
    logins: list[str] = []

    def counted(self: t.Any, used: t.Any, *rest: t.Any) -> t.Any:
        logins.append(used.words())
        return opened(self, used, *rest)

    monkeypatch.setattr(passphrase._Passphrase, "opened", counted)
    keys = store.open_keys(["a", "b", "c"], [PRIMARY, RECOVERY])
    assert {name: key.reveal() for name, key in keys.items()} == made
    assert len(logins) == 1
