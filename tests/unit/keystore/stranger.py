# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A second implementation of docs/keystore-format.md, for tests. Written from the document; imports nothing of the collection."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import typing as t

from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class Refused(Exception):
    """The file is not one that the document allows, or the credential is wrong."""


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def hkdf(key: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 by hand."""
    prk = _hmac(bytes(32), key)
    output, block, counter = b"", b"", 1
    while len(output) < length:
        block = _hmac(prk, block + info + bytes([counter]))
        output += block
        counter += 1
    return output[:length]


def label(file: dict[str, t.Any], purpose: str) -> bytes:
    return b"\0".join(text.encode() for text in ("hsm-tde 1 " + purpose, file["kind"], file["cluster"], file["key_id"]))


def context(file: dict[str, t.Any], uid: str) -> bytes:
    return label(file, "keyslot") + b"\0" + uid.encode()


# --- the one spelling


def _string(text: str) -> str:
    out = ""
    for unit in text.encode("utf-16-be").hex(" ", 2).split():
        code = int(unit, 16)
        if code > 0x7E:
            out += f"\\u{code:04x}"
        else:
            out += {'"': '\\"', "\\": "\\\\"}.get(chr(code), chr(code))
    return f'"{out}"'


def spell(value: t.Any, depth: int = 0) -> str:
    if value is None:
        return "null"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        names = sorted(name for name in value if depth or name not in ("mac", "checksum"))
        names += [name for name in ("mac", "checksum") if not depth and name in value]
        lines = [f"{_string(name)}: {spell(value[name], depth + 1)}" for name in names]
        return "{" + inner + ("," + inner).join(lines) + outer + "}" if lines else "{}"
    lines = [spell(item, depth + 1) for item in value]
    return "[" + inner + ("," + inner).join(lines) + outer + "]" if lines else "[]"


def compact(value: t.Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_string(name)}:{compact(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(compact, value)) + "]"
    return spell(value)


# --- writing


def seal(file: dict[str, t.Any], key: bytes) -> bytes:
    """The bytes of a file whose keyslots have their blobs; MACs and checksum are put on."""
    for slot in file["keyslots"]:
        slot.pop("mac", None)
        slot["mac"] = _hmac(hkdf(key, label(file, "keyslot mac")), compact(slot).encode()).hex()
    text = spell({**file, "mac": "", "checksum": ""})
    head = text[: text.rindex('"mac": "') + len('"mac": "')]
    mac = _hmac(hkdf(key, label(file, "file mac")), head.encode()).hex()
    head += mac + '",\n "checksum": "'
    return (head + hashlib.sha256(head.encode()).hexdigest() + '"\n}\n').encode()


def _derive(blob: dict[str, t.Any], passphrase: str) -> bytes:
    salt = base64.b64decode(blob["salt"])
    if blob["kdf"] == "scrypt":
        cost = 128 << blob["log_n"]
        return hashlib.scrypt(
            passphrase.encode(), salt=salt, n=1 << blob["log_n"], r=blob["r"], p=blob["p"], maxmem=2 * cost * blob["r"], dklen=32
        )
    return hashlib.pbkdf2_hmac("sha256", passphrase.encode(), salt, blob["iterations"], 32)


def passphrase_blob(
    file: dict[str, t.Any], uid: str, key: bytes, passphrase: str, kdf: dict[str, t.Any], salt: bytes, iv: bytes
) -> dict[str, t.Any]:
    blob = {**kdf, "salt": base64.b64encode(salt).decode(), "cipher": "AES-256-GCM", "iv": base64.b64encode(iv).decode()}
    k = _derive(blob, passphrase)
    blob["verifier"] = base64.b64encode(hkdf(k, b"hsm-tde 1 passphrase verifier")).decode()
    sealed = AESGCM(hkdf(k, b"hsm-tde 1 passphrase wrap")).encrypt(iv, key, context(file, uid))
    blob["ciphertext"] = base64.b64encode(sealed).decode()
    return blob


def _f(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _a(file: dict[str, t.Any], uid: str, blob: dict[str, t.Any]) -> bytes:
    return _f(
        b"hsm.tde envelope 1",
        blob["mechanism"].encode(),
        blob["kek_label"].encode(),
        bytes.fromhex(blob["kek_id"]),
        bytes.fromhex(blob["kek_kcv"]),
        context(file, uid),
    )


def token_blob(
    file: dict[str, t.Any], uid: str, key: bytes, kek: bytes, mac_key: bytes | None, kek_label: str, kek_id: str, iv: bytes
) -> dict[str, t.Any]:
    encryptor = Cipher(algorithms.AES(kek), modes.ECB()).encryptor()  # noqa: S305 - the check value is defined so
    blob: dict[str, t.Any] = {
        "version": 1,
        "mechanism": "AES-CBC-PAD+HMAC-SHA256" if mac_key else "AES-GCM",
        "kek_label": kek_label,
        "kek_id": kek_id,
        "kek_kcv": encryptor.update(bytes(16))[:3].hex(),
        "iv": base64.b64encode(iv).decode(),
    }
    a = _a(file, uid, blob)
    if not mac_key:
        blob["ciphertext"] = base64.b64encode(AESGCM(kek).encrypt(iv, key, a)).decode()
        return blob
    padder = padding.PKCS7(128).padder()
    padded = padder.update(b"hsm.tde envelope" + key) + padder.finalize()
    cbc = Cipher(algorithms.AES(kek), modes.CBC(iv)).encryptor()
    ciphertext = cbc.update(padded) + cbc.finalize()
    mac_kcv = _hmac(mac_key, b"hsm.tde check value")[:3]
    blob["ciphertext"] = base64.b64encode(ciphertext).decode()
    blob["mac_kcv"] = mac_kcv.hex()
    blob["mac"] = base64.b64encode(_hmac(mac_key, a + _f(mac_kcv, iv, ciphertext))).decode()
    return blob


def payload(file: dict[str, t.Any], key: bytes, secret: bytes, iv: bytes) -> dict[str, str]:
    where = label(file, "payload")
    return {
        "cipher": "AES-256-GCM",
        "iv": base64.b64encode(iv).decode(),
        "ciphertext": base64.b64encode(AESGCM(hkdf(key, where)).encrypt(iv, secret, where)).decode(),
    }


def check_value(key: bytes) -> str:
    return hkdf(key, b"hsm-tde 1 check value", 16).hex()


# --- reading


def parse(raw: bytes) -> dict[str, t.Any]:
    """Checksum and spelling; the members one by one are the other implementation's business."""
    if not raw.endswith(b'"\n}\n'):
        raise Refused("truncated")
    if hashlib.sha256(raw[:-68]).hexdigest().encode() != raw[-68:-4]:
        raise Refused("checksum")
    file = json.loads(raw)
    if (spell(file) + "\n").encode() != raw:
        raise Refused("spelling")
    return t.cast("dict[str, t.Any]", file)


def unwrap_passphrase(file: dict[str, t.Any], slot: dict[str, t.Any], passphrase: str) -> bytes:
    blob = slot["blob"]
    k = _derive(blob, passphrase)
    if base64.b64decode(blob["verifier"]) != hkdf(k, b"hsm-tde 1 passphrase verifier"):
        raise Refused("passphrase")
    key = AESGCM(hkdf(k, b"hsm-tde 1 passphrase wrap"))
    return key.decrypt(base64.b64decode(blob["iv"]), base64.b64decode(blob["ciphertext"]), context(file, slot["uid"]))


def unwrap_token(file: dict[str, t.Any], slot: dict[str, t.Any], kek: bytes, mac_key: bytes | None) -> bytes:
    blob = slot["blob"]
    iv, ciphertext, a = base64.b64decode(blob["iv"]), base64.b64decode(blob["ciphertext"]), _a(file, slot["uid"], blob)
    if not mac_key:
        return AESGCM(kek).decrypt(iv, ciphertext, a)
    if base64.b64decode(blob["mac"]) != _hmac(mac_key, a + _f(bytes.fromhex(blob["mac_kcv"]), iv, ciphertext)):
        raise Refused("mac")
    cbc = Cipher(algorithms.AES(kek), modes.CBC(iv)).decryptor()
    unpadder = padding.PKCS7(128).unpadder()
    plain = unpadder.update(cbc.update(ciphertext) + cbc.finalize()) + unpadder.finalize()
    return plain.removeprefix(b"hsm.tde envelope")


def verify(raw: bytes, file: dict[str, t.Any], key: bytes) -> None:
    head = raw[: raw.rindex(b'"mac": "') + len(b'"mac": "')]
    if _hmac(hkdf(key, label(file, "file mac")), head).hex() != file["mac"]:
        raise Refused("file mac")
    for slot in file["keyslots"]:
        bare = {name: value for name, value in slot.items() if name != "mac"}
        if _hmac(hkdf(key, label(file, "keyslot mac")), compact(bare).encode()).hex() != slot["mac"]:
            raise Refused("keyslot mac")


def open_payload(file: dict[str, t.Any], key: bytes) -> bytes:
    where, sealed = label(file, "payload"), file["payload"]
    return AESGCM(hkdf(key, where)).decrypt(base64.b64decode(sealed["iv"]), base64.b64decode(sealed["ciphertext"]), where)
