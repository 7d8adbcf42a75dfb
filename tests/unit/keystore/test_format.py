# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wrapped-key file's bytes: every damage is noticed, and told from every other."""

from __future__ import annotations

import dataclasses
import hashlib
import typing as t

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.errors import TdeError
from ansible_collections.hsm.tde.plugins.module_utils.keystore import format as fmt
from ansible_collections.hsm.tde.plugins.module_utils.keystore.format import DATA_KEY, SECRET, Document, Identity, Keyslot
from ansible_collections.hsm.tde.tests.unit.keystore.support import edited, refused
from hypothesis import given, settings
from hypothesis import strategies as st

KEY = bytes(range(64))
ME = Identity(DATA_KEY, "main", "tablespace.sales")

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,30}", fullmatch=True)
times = st.datetimes().map(lambda when: when.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0"))
labels = st.text(max_size=12).filter(str.isprintable)
blobs = st.dictionaries(
    st.sampled_from(["kdf", "salt", "iv", "ciphertext", "a", "zz"]), st.one_of(labels, st.integers(0, 2**53 - 1)), max_size=4
)
keyslots = st.builds(
    Keyslot,
    name=names,
    uid=st.binary(min_size=16, max_size=16).map(bytes.hex),
    protection=st.sampled_from(["passphrase", "token", "kmip"]),
    created=times,
    proved=st.none() | times,
    target=st.dictionaries(st.sampled_from(["token_label", "kek_label", "kek_id"]), labels, max_size=3),
    blob=blobs,
)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    secret = draw(st.booleans())
    slots = draw(st.lists(keyslots, min_size=1, max_size=3, unique_by=lambda slot: slot.uid))
    gone = draw(st.lists(keyslots, max_size=2))
    return Document(
        identity=Identity(SECRET, "", draw(names)) if secret else Identity(DATA_KEY, draw(names), draw(names)),
        length=len(KEY),
        created=draw(times),
        generation=draw(st.integers(1, 2**53 - 1)),
        check=None if secret else {"kind": "hkdf-sha256", "value": fmt.check_value(KEY)},
        keyslots=tuple(slots),
        history=tuple({**slot.facts(), "removed": draw(times)} for slot in gone),
        history_omitted=draw(st.integers(0, 5)),
        payload={"cipher": "AES-256-GCM", "iv": "AA==", "ciphertext": draw(labels)} if secret else None,
    )


def sample() -> Document:
    slots = tuple(
        Keyslot(name, digit * 32, "passphrase", "2026-01-02T03:04:05Z", "2026-01-02T03:04:06Z", {}, {"kdf": "x", "log_n": 10})
        for name, digit in (("primary", "a"), ("recovery", "b"))
    )
    return fmt.seal(Document(ME, 64, "2026-01-02T03:04:05Z", 3, {"kind": "consumer", "value": "00ff"}, slots), KEY)


@given(documents())
@settings(deadline=None)
def test_what_is_written_is_read_back_and_verifies(document: Document) -> None:
    sealed = fmt.seal(document, KEY)
    again = fmt.decode(sealed.raw, document.identity)
    assert (
        dataclasses.replace(again, mac="", raw=b"", keyslots=tuple(dataclasses.replace(s, mac="") for s in again.keyslots))
        == document
    )
    fmt.verify(again, KEY, again.keyslots[0])


@given(documents(), st.data())
@settings(max_examples=120, deadline=None)
def test_any_changed_byte_is_damage(document: Document, data: st.DataObject) -> None:
    raw = bytearray(fmt.seal(document, KEY).raw)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TdeError) as caught:
        fmt.decode(bytes(raw))
    assert caught.value.code in ("keystore_damaged", "keystore_truncated")


def test_every_flipped_bit_is_damage() -> None:
    raw = sample().raw
    for place in range(len(raw)):
        for bit in range(8):
            flipped = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
            with pytest.raises(TdeError) as caught:
                fmt.decode(flipped)
            assert caught.value.code == ("keystore_truncated" if place >= len(raw) - 4 else "keystore_damaged")


def test_every_truncation_says_so() -> None:
    raw = sample().raw
    for length in range(len(raw)):
        with refused("keystore_truncated"):
            fmt.decode(raw[:length])
    with refused("keystore_truncated"):
        fmt.decode(bytes(len(raw)))


def _open(raw: bytes) -> None:
    document = fmt.decode(raw)
    fmt.verify(document, KEY, document.keyslots[0])


@given(documents(), st.data())
@settings(max_examples=120, deadline=None)
def test_whoever_puts_the_checksum_right_still_needs_the_data_key(document: Document, data: st.DataObject) -> None:
    """Any byte before the checksum: what still reads as a file does not verify."""
    raw = bytearray(fmt.seal(document, KEY).raw[:-68])
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.sampled_from([byte for byte in b'0123456789abfz"\\ ,{}' if byte != raw[place]]))
    forged = bytes(raw) + hashlib.sha256(raw).hexdigest().encode() + b'"\n}\n'
    with pytest.raises(TdeError) as caught:
        _open(forged)
    assert caught.value.cause in ("damaged", "unsupported")


def _set(**values: t.Any) -> t.Callable[[dict[str, t.Any]], None]:
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_set(created="2020-01-01T00:00:00Z"), "keystore_edited"),
        (_set(generation=9), "keystore_edited"),
        (_set(check={"kind": "consumer", "value": "ff"}), "keystore_edited"),
        (_set(history_omitted=7), "keystore_edited"),
        (lambda content: content["keyslots"].pop(), "keystore_edited"),
        (lambda content: content["keyslots"].reverse(), "keystore_edited"),
        (lambda content: content["keyslots"][1].update(name="other"), "keyslot_foreign"),
        (lambda content: content["keyslots"][1].update(proved=None), "keyslot_foreign"),
        (lambda content: content["keyslots"][0]["blob"].update(log_n=11), "keyslot_foreign"),
        (lambda content: content["keyslots"].append({**content["keyslots"][0], "uid": "c" * 32}), "keyslot_foreign"),
        (_set(mac="0" * 64), "keystore_edited"),
        (_set(length=32), "keystore_edited"),
        (_set(cluster="other"), "keystore_foreign"),
        (_set(key_id="tablespace.other"), "keystore_foreign"),
        (_set(version=2), "keystore_newer"),
        (_set(version=2, keyslots=None, more={"library": "x"}), "keystore_newer"),
        (_set(version=0), "keystore_damaged"),
        (_set(version="1"), "keystore_damaged"),
        (_set(format="other"), "keystore_damaged"),
        (_set(generation=0), "keystore_damaged"),
        (_set(generation=2**53), "keystore_damaged"),
        (_set(generation=-1), "keystore_damaged"),
        (_set(length=8), "keystore_damaged"),
        (_set(length=1 << 40), "keystore_damaged"),
        (_set(keyslots=[]), "keystore_damaged"),
        (lambda content: content.update(keyslots=content["keyslots"] * 20), "keystore_damaged"),
        (lambda content: content["keyslots"][1].update(uid="a" * 32), "keystore_damaged"),
        (_set(comment="hello"), "keystore_damaged"),
        (lambda content: content.pop("payload"), "keystore_damaged"),
        (_set(payload={"cipher": "", "iv": "", "ciphertext": ""}), "keystore_damaged"),
        (_set(check=None), "keystore_damaged"),
        (_set(cluster=""), "keystore_damaged"),
        (_set(cluster="../../etc"), "keystore_damaged"),
        (_set(kind="other"), "keystore_damaged"),
        (lambda content: content["keyslots"][0].update(name="\u001b[2J"), "keystore_damaged"),
        (lambda content: content["keyslots"][0]["target"].update(token_label="\u202e"), "keystore_damaged"),
        (lambda content: content["keyslots"][0]["blob"].update(deep=[[]]), "keystore_damaged"),
        (lambda content: content["keyslots"][0]["blob"].update(library="/tmp/evil.so"), "keystore_forbidden"),
        (lambda content: content["keyslots"][0]["target"].update({"PIN-Source": "/etc/pin"}), "keystore_forbidden"),
        (_set(pin="1234"), "keystore_forbidden"),
        (
            lambda content: content["keyslots"][0]["target"].update(token_label="PKCS11:token=x?Pin-Source=file:/etc/pin"),
            "keystore_forbidden",
        ),
        (
            lambda content: content["keyslots"][0]["target"].update(token_label="pkcs11:token=x?module-path=/tmp/evil.so"),
            "keystore_forbidden",
        ),
    ],
)
def test_edits_with_a_right_checksum(change: t.Callable[[dict[str, t.Any]], None], code: str) -> None:
    forged = edited(sample().raw, change)
    with refused(code):
        document = fmt.decode(forged, ME)
        fmt.verify(document, KEY, document.keyslots[0])


def _with_checksum(text: bytes) -> bytes:
    text += b',\n "mac": "' + b"0" * 64 + b'",\n "checksum": "'
    return text + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100000,
        b'{"a":' * 100000,
        b'{\n "version": ' + b"9" * 500000,
        b'{\n "version": 1e999999',
        b'{\n "version": NaN',
        b'{\n "version": Infinity',
        b'{\n "format": "hsm-tde wrapped key",\n "format": "hsm-tde wrapped key"',
        b'{\n "\xff": 1',
        b"{}",
        b"",
    ],
)
def test_json_that_would_cost_or_confuse(text: bytes) -> None:
    with refused("keystore_damaged"):
        fmt.decode(_with_checksum(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"generation": 3', b'"generation":  3'),
        (b'"generation": 3', b'"generation": 03'),
        (b'"generation": 3', b'"generation": 3.0'),
        (b'"generation": 3', b'"generation": true'),
        (b'"history_omitted": 0', b'"history_omitted": -0'),
        (b'"name": "primary"', b'"name": "prim\\u0061ry"'),
        (b'"name": "primary"', b'"name": "primary",\n   "name": "primary"'),
        (b"{\n", b"{\r\n"),
        (b"{\n", b"\xef\xbb\xbf{\n"),
    ],
)
def test_there_is_one_spelling(old: bytes, new: bytes) -> None:
    raw = sample().raw
    text = raw.replace(old, new, 1)[:-68]
    assert text != raw[:-68]
    with refused("keystore_damaged"):
        fmt.decode(text + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n')


def test_history_is_bounded_and_counts_what_it_forgets() -> None:
    document = sample()
    for number in range(fmt.MAX_HISTORY + 3):
        gone = dataclasses.replace(document.keyslots[0], uid=f"{number:032x}")
        document = dataclasses.replace(document, keyslots=(document.keyslots[0], gone)).without(
            {gone.uid}, "2026-01-02T03:04:05Z"
        )
    assert (len(document.history), document.history_omitted) == (fmt.MAX_HISTORY, 3)
    assert document.history[0]["uid"] == f"{3:032x}"
    fmt.seal(document, KEY)


def test_a_full_file_still_fits() -> None:
    """The most keyslots, the longest history and longest labels stay below the size that is read."""
    wide = "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 32
    target = {"token_label": wide, "token_serial": "x" * 16, "kek_label": wide, "kek_id": "ab" * 64, "kek_kcv": "abcdef"}
    slot = dataclasses.replace(sample().keyslots[0], target=target, blob={**target, "ciphertext": "x" * 1600})
    slots = [dataclasses.replace(slot, uid=f"{number:032x}") for number in range(fmt.MAX_KEYSLOTS + fmt.MAX_HISTORY)]
    document = dataclasses.replace(sample(), keyslots=tuple(slots)).without(
        {slot.uid for slot in slots[fmt.MAX_KEYSLOTS :]}, "2026-01-02T03:04:05Z"
    )
    assert len(document.keyslots) == fmt.MAX_KEYSLOTS
    assert len(fmt.seal(document, KEY).raw) < 1 << 20
    more = dataclasses.replace(document, keyslots=(*document.keyslots, dataclasses.replace(slot, uid="f" * 32)))
    with refused("keystore_too_large"):
        fmt.seal(more, KEY)


def test_identities_do_not_share_a_derived_key() -> None:
    labels = {
        Identity(kind, cluster, key_id).label(purpose)
        for kind in (DATA_KEY, SECRET)
        for cluster in ("a", "a.b", "")
        for key_id in ("b", "a.b")
        for purpose in ("file mac", "keyslot")
    }
    assert len(labels) == 24
