# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""docs/keystore-format.md against the code: a second implementation writes what the code reads, and the other way round.

``python test_vectors.py`` writes the vectors anew (only when the format's version changes: files in the field do not).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
from ansible_collections.hsm.tde.plugins.module_utils.keystore.format import DATA_KEY, Identity, decode, keyslot_mac, verify
from ansible_collections.hsm.tde.plugins.module_utils.keystore.passphrase import PassphraseSlot, Pbkdf2, Scrypt
from ansible_collections.hsm.tde.plugins.module_utils.keystore.protection import load
from ansible_collections.hsm.tde.plugins.module_utils.keystore.secretfile import SecretFile
from ansible_collections.hsm.tde.plugins.module_utils.keystore.store import KeyStore
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import blob
from ansible_collections.hsm.tde.tests.unit.keystore import stranger
from ansible_collections.hsm.tde.tests.unit.keystore.support import credential

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "keystore.json"


def _bytes(case: str, what: str, length: int) -> bytes:
    """A vector's "random" choice: bytes that anybody can see were not chosen for an effect."""
    return hashlib.shake_256(f"hsm.tde test vector: {case}: {what}".encode()).digest(length)


def _slot(file: dict[str, t.Any], key: bytes, case: str, **wish: t.Any) -> dict[str, t.Any]:
    uid, name = _bytes(case, f"uid of {wish['name']}", 16).hex(), wish["name"]
    slot: dict[str, t.Any] = {
        "name": name,
        "uid": uid,
        "protection": "token" if "kek" in wish else "passphrase",
        "created": wish.get("created", "2026-01-02T03:04:05Z"),
        "proved": wish.get("proved", "2026-01-02T03:04:05Z"),
        "target": {},
    }
    if "kek" in wish:
        mac_key = bytes.fromhex(wish["mac_key"]) if wish["mac_key"] else None
        iv = _bytes(case, f"iv of {name}", 16 if mac_key else 12)
        wrapped = stranger.token_blob(file, uid, key, bytes.fromhex(wish["kek"]), mac_key, wish["kek_label"], wish["kek_id"], iv)
        slot["blob"] = wrapped
        slot["target"] = {
            "token_label": 'Bücher "1"',
            "token_serial": "0123",
            **{k: wrapped[k] for k in ("kek_label", "kek_id", "kek_kcv")},
        }
    else:
        salt, iv = _bytes(case, f"salt of {name}", 16), _bytes(case, f"iv of {name}", 12)
        slot["blob"] = stranger.passphrase_blob(file, uid, key, wish["passphrase"], wish["kdf"], salt, iv)
    return slot


def build(case: dict[str, t.Any]) -> bytes:
    """The file of a case, by the stranger."""
    name, key = case["case"], bytes.fromhex(case["key"])
    file: dict[str, t.Any] = {
        "format": "hsm-tde wrapped key",
        "version": 1,
        "kind": case["kind"],
        "cluster": case["cluster"],
        "key_id": case["key_id"],
        "length": len(key),
        "created": "2026-01-02T03:04:05Z",
        "generation": case["generation"],
        "check": {"kind": "hkdf-sha256", "value": stranger.check_value(key)} if case["kind"] == "data_key" else None,
        "history": case["history"],
        "history_omitted": 0,
        "payload": None,
    }
    if case["kind"] == "secret":
        file["payload"] = stranger.payload(file, key, case["secret"].encode(), _bytes(name, "iv of payload", 12))
    file["keyslots"] = [_slot(file, key, name, **wish) for wish in copy.deepcopy(case["slots"])]
    return stranger.seal(file, key)


def cases() -> list[dict[str, t.Any]]:
    cheap = {"kdf": "scrypt", "log_n": 10, "r": 1, "p": 1}

    def one(case: str, slots: list[dict[str, t.Any]], **more: t.Any) -> dict[str, t.Any]:
        key = _bytes(case, "data key", more.pop("length", 64)).hex()
        head = {"case": case, "kind": "data_key", "cluster": "main", "key_id": "cluster", "generation": 1, "key": key}
        return {**head, "history": [], "slots": slots, **more}

    kek = {
        "name": "primary",
        "kek": _bytes("token", "kek", 32).hex(),
        "kek_label": "hsm-tde.main",
        "kek_id": "00ff",
        "mac_key": "",
    }
    removed = {"name": "primary", "uid": "00" * 16, "protection": "passphrase", "created": "2026-01-01T00:00:00Z"}
    return [
        one("passphrase, scrypt", [{"name": "primary", "passphrase": "correct horse battery", "kdf": cheap}]),
        one(
            "passphrase, scrypt at full cost",
            [{"name": "recovery", "passphrase": "Zwölf Boxkämpfer", "kdf": {"kdf": "scrypt", "log_n": 17, "r": 8, "p": 1}}],
            key_id="tablespace.sales",
        ),
        one(
            "passphrase, PBKDF2",
            [
                {
                    "name": "primary",
                    "passphrase": "correct horse battery",
                    "kdf": {"kdf": "pbkdf2-hmac-sha256", "iterations": 1000},
                }
            ],
            length=32,
        ),
        one("token, AES-GCM", [kek]),
        one("token, AES-CBC-PAD+HMAC-SHA256", [{**kek, "mac_key": _bytes("token", "mac key", 32).hex()}]),
        one(
            "several keyslots, one not proved, and a history",
            [
                kek,
                {"name": "recovery", "passphrase": "correct horse battery", "kdf": cheap},
                {"name": "other", "passphrase": "another passphrase", "kdf": {**cheap, "r": 2, "p": 2}, "proved": None},
            ],
            generation=7,
            history=[{**removed, "proved": "2026-01-01T00:00:01Z", "target": {}, "removed": "2026-01-02T00:00:00Z"}],
        ),
        one(
            "secret",
            [{"name": "primary", "passphrase": "correct horse battery", "kdf": cheap}],
            kind="secret",
            cluster="",
            key_id="pgcrypto.key",
            length=32,
            secret="a user's own secret: äöü\n",
        ),
    ]


def vectors() -> list[dict[str, t.Any]]:
    return t.cast("list[dict[str, t.Any]]", json.loads(VECTORS.read_text())["cases"])


@pytest.mark.parametrize("case", vectors() if VECTORS.exists() else [], ids=lambda case: case["case"])
def test_the_code_reads_what_the_document_says(case: dict[str, t.Any], tmp_path: Path) -> None:
    raw = "".join(case["file"]).encode()
    assert build(case) == raw, "the stranger's implementation and the vectors differ"
    key = bytes.fromhex(case["key"])
    identity = Identity(case["kind"], case["cluster"], case["key_id"])
    document = decode(raw, identity)
    verify(document, key, document.keyslots[0])
    state = StateDirectory(str(tmp_path / "state"))
    for slot, wish in zip(document.keyslots, case["slots"], strict=True):
        load(slot.protection).check(slot)
        assert slot.mac == keyslot_mac(identity, slot, key)
        if "passphrase" in wish:
            known = credential(wish["passphrase"])
            with load("passphrase").opened(known, [slot], state) as unwrap:
                assert unwrap(identity, slot) == key
        else:
            wrapped = blob.parse(slot.blob)
            context = identity.context(slot.uid)
            aad = stranger._a(json.loads(raw), slot.uid, json.loads(json.dumps(slot.blob)))
            assert wrapped.associated(context) == aad
            if wish["mac_key"]:
                mac_key = bytes.fromhex(wish["mac_key"])
                assert stranger._hmac(mac_key, wrapped.message(context)) == wrapped.mac
    if case["kind"] == "secret":
        os.makedirs(tmp_path / "secrets", 0o700)
        path = tmp_path / "secrets" / case["key_id"]
        path.write_bytes(raw)
        path.chmod(0o600)
        _opened, secret = SecretFile(state, str(path)).open([credential(case["slots"][0]["passphrase"])])
        assert secret.text() == case["secret"]


@pytest.mark.parametrize("kdf", [Scrypt(10, 2, 3), Pbkdf2(1000)])
def test_the_stranger_reads_what_the_code_writes(store: KeyStore, kdf: Scrypt | Pbkdf2) -> None:
    wishes = [PassphraseSlot(name, Secret(f"passphrase of {name} é"), kdf) for name in ("primary", "recovery")]
    key = store.create_key("cluster", 48, wishes[:1])
    store.add_keyslot("cluster", key, wishes[1])
    store.prove_keyslot("cluster", wishes[1])
    store.remove_keyslot("cluster", key, "primary")
    raw = Path(store.path, "cluster.json").read_bytes()
    file = stranger.parse(raw)
    assert [slot["name"] for slot in file["keyslots"]] == ["recovery"]
    assert [slot["name"] for slot in file["history"]] == ["primary"]
    assert stranger.unwrap_passphrase(file, file["keyslots"][0], "passphrase of recovery é") == key.reveal()
    stranger.verify(raw, file, key.reveal())
    assert file["check"] == {"kind": "hkdf-sha256", "value": stranger.check_value(key.reveal())}
    assert (file["kind"], file["generation"]) == (DATA_KEY, 4)


def test_the_stranger_opens_a_secret_that_the_code_wraps(state: StateDirectory, tmp_path: Path) -> None:
    os.makedirs(tmp_path / "secrets", 0o700)
    path = tmp_path / "secrets" / "app.key"
    SecretFile(state, str(path)).create(Secret("s3cret"), [PassphraseSlot("primary", Secret("a long passphrase"), Scrypt(10))])
    raw = path.read_bytes()
    file = stranger.parse(raw)
    key = stranger.unwrap_passphrase(file, file["keyslots"][0], "a long passphrase")
    stranger.verify(raw, file, key)
    assert stranger.open_payload(file, key) == b"s3cret"
    assert file["check"] is None


def main() -> None:
    about = "Made by tests/unit/keystore/test_vectors.py from docs/keystore-format.md; bytes in hex, a file as its lines."
    made = [{**case, "file": build(case).decode().splitlines(keepends=True)} for case in cases()]
    VECTORS.write_text(json.dumps({"about": about, "cases": made}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
