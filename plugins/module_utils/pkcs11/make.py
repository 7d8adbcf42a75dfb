# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keys made, imported, changed and destroyed in a token; each read back before it counts."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import typing as t

from ..common.errors import TdeError
from . import copies
from .attributes import CURVES, USAGE_OF
from .errors import translated
from .keys import KeyInfo, aes_block, find, handle_of, reread
from .keyspec import KeySpec, check_spec

if t.TYPE_CHECKING:
    from ..common.secret import Secret
    from .registry import Entry, Registry
    from .token import Session, TokenInfo

#: What is signed to compare an HMAC key with a value without reading either.
_COMPARED = b"hsm.tde: is it the same key?"


def registered(registry: Registry, token: TokenInfo, label: str) -> list[Entry]:
    """The registry's entries of a label in a token, one an id."""
    listed = registry.keys()
    return list(
        {row["id"]: row for row in listed if row["label"] == label and registry.is_in(row, token.label, token.serial)}.values()
    )


def remember(session: Session, registry: Registry, info: KeyInfo, cluster: str = "") -> None:
    """Enter a key and its token into the registry: from now on neither is ever taken for absent.

    :param cluster: whose keystore needs the key; a key that stands there for a cluster already is left so.
    """
    token = session.token
    registry.remember_token(token.label, token.serial, session.library.path)
    known = registry.names_key(token.label, token.serial, info.label, info.id.hex())
    if not known or cluster:
        registry.remember_key(token.label, token.serial, info.label, info.id.hex(), f"{info.cls}_key", cluster)


def generate(session: Session, spec: KeySpec) -> KeyInfo:
    """Make a key in the token.

    :returns: the secret key, or the private one of a pair, as the token shows it.
    :raises TdeError: ``key_not_protected`` (it was destroyed again); what the token answered.
    """
    from pkcs11 import Attribute, KeyType, Mechanism

    obj = f"key {spec.label!r}"
    common = {"id": spec.new_id(), "label": spec.label, "store": True}
    with translated(obj):
        if not spec.pair:
            template = {**_usage(spec, "secret"), **_guarded(spec)}
            kind = KeyType.AES if spec.type == "aes" else KeyType.GENERIC_SECRET
            made = session.raw.generate_key(kind, spec.new_size(), capabilities=0, template=template, **common)  # type: ignore[arg-type]
            return _guard(session, [made], spec)
        templates = {
            "capabilities": 0,
            "public_template": _usage(spec, "public"),
            "private_template": {**_usage(spec, "private"), **_guarded(spec)},
        }
        if spec.type == "rsa":
            public, private = session.raw.generate_keypair(KeyType.RSA, spec.new_size(), **templates, **common)  # type: ignore[arg-type]
        else:
            curve = session.raw.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: _curve_der(spec.new_curve())}, local=True
            )
            public, private = curve.generate_keypair(mechanism=Mechanism.EC_KEY_PAIR_GEN, **templates, **common)
        return _guard(session, [private, public], spec)


def import_key(session: Session, spec: KeySpec) -> KeyInfo:
    """Bring a key into the token.

    :raises TdeError: as :func:`generate`; ``key_value_invalid``.
    """
    templates = _pair_templates(spec) if spec.pair else [_secret_template(spec)]
    made: list[t.Any] = []
    with translated(f"key {spec.label!r}"):
        try:
            for template in templates:
                made.append(session.raw.create_object(template))
        except Exception:
            _destroy_all(session, made)
            raise
    return _guard(session, made, spec)


def import_public_half(session: Session, spec: KeySpec) -> None:
    """Bring in the public half of a pair whose private half is there; :func:`same_value` has said that it is the one.

    :raises TdeError: ``key_value_invalid``; what the token answered.
    """
    with translated(f"key {spec.label!r}"):
        session.raw.create_object(_pair_templates(spec)[1])


def change(session: Session, label: str, id_: bytes, changes: t.Mapping[str, bool]) -> None:
    """Set boolean attributes of a key, on each half of a pair that has them, and read them back.

    :raises TdeError: ``pkcs11_refused`` where the token keeps the old value; what the token answered.
    """
    from pkcs11 import Attribute

    for info in find(session, label, id=id_):
        for name, value in changes.items():
            if name in USAGE_OF[info.cls] or (name in ("sensitive", "extractable") and info.cls != "public"):
                with translated(str(info.ref), kept="Attributes set before this one keep their new value."):
                    handle_of(session, info)[Attribute[name.upper()]] = value
        now = reread(session, info).flags
        kept = [name for name, value in changes.items() if name in USAGE_OF[info.cls] and now.get(name) is not value]
        if kept:
            raise TdeError(
                "pkcs11_refused",
                f"the token kept {', '.join(kept)} as it was",
                obj=str(info.ref),
                kept="The other attributes have their new value.",
            )


def destroy(session: Session, label: str, id_: bytes) -> None:
    """Destroy a key for good, both halves of a pair.

    :raises TdeError: ``pkcs11_refused`` where the token keeps it; what the token answered.
    """
    # The private half first: a kill in between leaves what cannot decrypt, and a second run finds it.
    for info in sorted(find(session, label, id=id_), key=lambda info: info.cls == "public"):
        with translated(str(info.ref)):
            handle_of(session, info).destroy()
    if find(session, label, id=id_):
        raise TdeError("pkcs11_refused", "the token says that it destroyed the key and still lists it", obj=f"key {label!r}")


def same_value(session: Session, info: KeyInfo, spec: KeySpec) -> bool | None:
    """Whether a key in the token has the value that would be imported; None where the token cannot tell."""
    from pkcs11 import Mechanism

    if spec.type != info.type:
        return None
    if spec.value is not None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        if spec.type == "aes":
            found = None
            if info.flags.get("encrypt"):
                with translated(str(info.ref)):
                    found = aes_block(session, info.handle, _COMPARED[:16])
            encryptor = Cipher(algorithms.AES(spec.value.reveal()), modes.ECB()).encryptor()  # noqa: S305 - one block, compared and dropped
            expected = encryptor.update(_COMPARED[:16]) + encryptor.finalize()
        else:
            found = None
            if info.flags.get("sign"):
                with translated(str(info.ref)):
                    found = handle_of(session, info).sign(_COMPARED, mechanism=Mechanism.SHA256_HMAC)
            expected = hmac.new(spec.value.reveal(), _COMPARED, "sha256").digest()
        return None if found is None else hmac.compare_digest(found, expected)
    return _same_public(session, info, spec)


def _same_public(session: Session, info: KeyInfo, spec: KeySpec) -> bool | None:
    from pkcs11 import Attribute

    public = _pair_templates(spec)[1]
    if spec.type == "rsa":
        return None if not info.modulus else info.modulus.lstrip(b"\0") == public[Attribute.MODULUS]
    halves = find(session, info.label, id=info.id, cls="public")
    if len(halves) != 1:
        return None if halves or not info.flags.get("sign") else _signs_for(session, info, spec)
    with translated(str(info.ref)):
        return bool(handle_of(session, halves[0])[Attribute.EC_POINT] == public[Attribute.EC_POINT])


def _signs_for(session: Session, info: KeyInfo, spec: KeySpec) -> bool:
    """Whether what a private key on a curve signs is signed by the PEM's key: the token does not show its point."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    from pkcs11 import Mechanism

    digest = hashlib.sha256(_COMPARED).digest()
    with translated(str(info.ref)):
        signed = handle_of(session, info).sign(digest, mechanism=Mechanism.ECDSA)
    half = len(signed) // 2
    der = utils.encode_dss_signature(int.from_bytes(signed[:half], "big"), int.from_bytes(signed[half:], "big"))
    try:
        _private_key(spec).public_key().verify(der, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        return True
    except InvalidSignature:
        return False


def _usage(spec: KeySpec, cls: str) -> dict[t.Any, bool]:
    from pkcs11 import Attribute

    return {Attribute[use.upper()]: allowed for use, allowed in spec.new_usage(cls).items()}


def _guarded(spec: KeySpec) -> dict[t.Any, bool]:
    from pkcs11 import Attribute

    return {Attribute.PRIVATE: True, Attribute.SENSITIVE: spec.sensitive, Attribute.EXTRACTABLE: spec.extractable}


def _base(spec: KeySpec) -> dict[t.Any, t.Any]:
    from pkcs11 import Attribute

    return {Attribute.LABEL: spec.label, Attribute.ID: spec.new_id(), Attribute.TOKEN: True}


def _secret_template(spec: KeySpec) -> dict[t.Any, t.Any]:
    from pkcs11 import Attribute, KeyType, ObjectClass

    value = t.cast("Secret", spec.value)
    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.AES if spec.type == "aes" else KeyType.GENERIC_SECRET,
        Attribute.VALUE: value.reveal(),
        **_base(spec),
        **_usage(spec, "secret"),
        **_guarded(spec),
    }


def _private_key(spec: KeySpec) -> t.Any:
    """The key of a PEM.

    :raises TdeError: ``key_value_invalid``.
    """
    from cryptography.hazmat.primitives import serialization

    obj = f"private_key of key {spec.label!r}"
    passphrase = spec.passphrase.reveal() if spec.passphrase else None
    try:
        return serialization.load_pem_private_key(t.cast("Secret", spec.private_key).reveal(), passphrase)
    except Exception as exc:
        # The text of a parser's exception may quote its input.
        raise TdeError(
            "key_value_invalid", f"cannot be read as PEM ({type(exc).__name__})", obj=obj, next_step="Is the passphrase right?"
        ) from None


def _pair_templates(spec: KeySpec) -> list[dict[t.Any, t.Any]]:
    """Templates of the private and the public key of a PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    from pkcs11 import Attribute, KeyType, ObjectClass

    obj = f"private_key of key {spec.label!r}"
    key = _private_key(spec)
    private = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, **_base(spec), **_usage(spec, "private"), **_guarded(spec)}
    public = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, **_base(spec), **_usage(spec, "public")}
    if isinstance(key, rsa.RSAPrivateKey) and spec.type == "rsa":
        if spec.size not in (None, key.key_size):
            raise TdeError("key_value_invalid", f"has {key.key_size} bits; size says {spec.size}", obj=obj)
        check_spec(KeySpec(spec.label, None, "rsa", size=key.key_size))
        numbers = key.private_numbers()
        shared = {
            Attribute.KEY_TYPE: KeyType.RSA,
            Attribute.MODULUS: _bytes(numbers.public_numbers.n),
            Attribute.PUBLIC_EXPONENT: _bytes(numbers.public_numbers.e),
        }
        private.update(
            {
                Attribute.PRIVATE_EXPONENT: _bytes(numbers.d),
                Attribute.PRIME_1: _bytes(numbers.p),
                Attribute.PRIME_2: _bytes(numbers.q),
                Attribute.EXPONENT_1: _bytes(numbers.dmp1),
                Attribute.EXPONENT_2: _bytes(numbers.dmq1),
                Attribute.COEFFICIENT: _bytes(numbers.iqmp),
            }
        )
    elif isinstance(key, ec.EllipticCurvePrivateKey) and spec.type == "ec":
        name = key.curve.name
        if spec.curve not in (None, name):
            raise TdeError("key_value_invalid", f"is on {name}; curve says {spec.curve}", obj=obj)
        point = key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        shared = {Attribute.KEY_TYPE: KeyType.EC, Attribute.EC_PARAMS: _curve_der(name)}
        private[Attribute.VALUE] = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
        public[Attribute.EC_POINT] = _octet_string(point)
    else:
        raise TdeError("key_value_invalid", f"holds another kind of key than {spec.type}", obj=obj)
    return [{**private, **shared}, {**public, **shared}]


def _bytes(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _octet_string(content: bytes) -> bytes:
    """DER OCTET STRING, as PKCS#11 v2.40 2.3.3 has CKA_EC_POINT; a point of 521 bits has 133 bytes."""
    length = bytes([len(content)]) if len(content) < 128 else bytes([0x81, len(content)])
    return b"\x04" + length + content


def _curve_der(name: str | None) -> bytes:
    for der, (known, _bits) in CURVES.items():
        if known == name:
            return der
    raise TdeError("key_value_invalid", f"curve {name} is not known here", obj="curve")


def _guard(session: Session, made: list[t.Any], spec: KeySpec) -> KeyInfo:
    """The new key, if the token made it as protected as it was told; else it goes again."""
    try:
        found = [info for info in find(session, spec.label, id=spec.new_id(), cls=spec.cls) if info.handle == made[0].handle]
        faults = ["is not listed"] if not found else _faults(found[0], spec)
    except BaseException:
        _destroy_all(session, made)
        raise
    if faults:
        gone = _destroy_all(session, made)
        raise TdeError(
            "key_not_protected",
            f"the token made a key that {', '.join(faults)}",
            obj=f"key {spec.label!r}",
            kept="The key was destroyed again." if gone else "The key is still there, for the token did not destroy it.",
            next_step="This token, or its policy, does not protect such keys: use another.",
        )
    return found[0]


def _faults(info: KeyInfo, spec: KeySpec) -> list[str]:
    return [
        words
        for bad, words in (
            (info.flags.get("token") is not True, "is not stored"),
            (info.flags.get("private") is not True, "shows without login"),
            (spec.sensitive and info.flags.get("sensitive") is not True, "can be read"),
            (not spec.extractable and info.flags.get("extractable") is not False, "can be taken out"),
        )
        if bad
    ]


def _destroy_all(session: Session, made: t.Iterable[t.Any]) -> bool:
    """Take new keys away again; what was raised before says what is the matter.

    :returns: whether they are gone.
    """
    path = session.library.path
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Exception))
        if "destroy_key" in copies.rewriting(path):
            stack.enter_context(copies.objects_kept(path))
        for key in made:
            key.destroy()
        return True
    return False
