# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The key file that a server was encrypted with before: its keys are sealed in our store as they are, so that no page changes.

The order: what is taken is written to the cluster's record, then each key is sealed and proved in the store, then the server's
settings name our file in memory, then it is restarted; the former file is removed only when that is asked for, and only once the
server works with ours. What one run began, any later one ends: the record says which keys there are.

Sources: MariaDB's manual, "File Key Management Encryption Plugin" (lines, encrypted files), and the plugin's parser.cc, which takes
keys of 16, 24 or 32 bytes in hex of either case, and an encrypted file as ``openssl enc -aes-256-cbc -md sha1`` writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import re
import types
import typing as t

from ...common.errors import TdeError
from ...common.files import os_error, read_private
from ...common.secret import Secret
from ...keystore.format import check_value
from ...keystore.store import KeyStore
from . import conf, keyfile, pages, sql
from .keyfile import DEFAULT, SYSTEM, SYSTEM_ID, TEMPORARY, TEMPORARY_ID, Name
from .options import REFUSE, Former, Options

_LINE = re.compile(r"\s*([0-9]{1,10})\s*;\s*((?:[0-9A-Fa-f]{16}){2,4})(?![0-9A-Fa-f]).*")
#: How OpenSSL begins what it encrypts under a password; the salt follows (openssl-enc(1)).
_SALTED, _SALT_BYTES = b"Salted__", 8
_KEY_BYTES, _IV_BYTES = 32, 16
#: Tables that are flushed to see one of their pages.
_FILES = 4
#: How a setting says that the password lies in a file.
_FILE = "FILE:"


def passphrase_file(content: bytes) -> bool:
    """Whether a key file is encrypted under a password."""
    return content.startswith(_SALTED)


def decrypted(content: bytes, password: bytes, path: str) -> bytes:
    """A key file that is encrypted under a password; its key and iv are SHA-1's of password and salt (EVP_BytesToKey(3)).

    :raises TdeError: ``former_key_file_unreadable``.
    """
    from cryptography.hazmat.primitives import padding
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    start = len(_SALTED) + _SALT_BYTES
    salt, made, last = content[len(_SALTED) : start], b"", b""
    while len(made) < _KEY_BYTES + _IV_BYTES:
        last = hashlib.sha1(last + password + salt).digest()  # noqa: S324 - as OpenSSL derived it
        made += last
    decryptor = Cipher(algorithms.AES(made[:_KEY_BYTES]), modes.CBC(made[_KEY_BYTES:][:_IV_BYTES])).decryptor()
    unpadder = padding.PKCS7(128).unpadder()
    try:
        padded = decryptor.update(content[start:]) + decryptor.finalize()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError:
        raise _unreadable(path, "does not open with the password that the server has for it") from None


def parsed(content: bytes, path: str) -> dict[int, bytes]:
    """The keys of a key file, by number.

    :raises TdeError: ``former_key_file_unreadable``.
    """
    found: dict[int, bytes] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        number = int(match[1]) if match else 0
        if not match or not number or number in found:
            raise _unreadable(path, "has a line that is no key of a number of its own")
        found[number] = bytes.fromhex(match[2])
    if SYSTEM_ID not in found:
        raise _unreadable(path, f"has no key {SYSTEM_ID}")
    return found


def _unreadable(path: str, reason: str) -> TdeError:
    return TdeError("former_key_file_unreadable", reason, obj=path)


def names(numbers: t.Iterable[int], default: int, known: t.Iterable[Name] = ()) -> tuple[Name, ...]:
    """What the keys of a key file are called in the store.

    :param default: the number of the key that the server takes for new tables; :param known: what some of them were called before.
    """
    called = {SYSTEM_ID: SYSTEM, TEMPORARY_ID: TEMPORARY, **{name.number: name.tablespace for name in known}}
    if DEFAULT not in called.values():
        called.setdefault(default, DEFAULT)
    return tuple(Name(number, called.get(number, f"former.{number}")) for number in sorted(numbers))


def digest(content: bytes) -> str:
    """Tells a key file's content from another, without telling what it is."""
    return check_value(content)


def owners(options: Options) -> set[int]:
    """Who may have written the former key file."""
    return {0, options.account().pw_uid}


def content(options: Options, path: str) -> bytes | None:
    """The former key file as it lies there, None if it does not.

    :raises TdeError: those of reading a private file; that others may read it is said elsewhere.
    """
    try:
        return read_private(path, owners=owners(options), forbidden_mode=0o022)
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        return None


class Lying(t.NamedTuple):
    """The former key file as it lies there.

    :param check: tells its content from another; empty if it could not be read.
    :param encrypted: under a password; :param problem: why it could not be read.
    """

    check: str
    encrypted: bool
    problem: str | None = None


def lying(options: Options) -> Lying | None:
    """The former key file, None if there is none. It never keeps a server from its keys: what is wrong with it is told."""
    if options.former is None:
        return None
    try:
        raw = content(options, options.former.path)
    except TdeError as exc:
        return Lying("", False, str(exc))
    return None if raw is None else Lying(digest(raw), passphrase_file(raw))


class TakingStore(KeyStore):
    """A store to which keys of a former key file are given. :ivar taken: by their names."""

    taken: t.Mapping[str, Secret] = types.MappingProxyType({})

    def material(self, key_id: str, length: int) -> bytes:
        return self.taken[key_id].reveal() if key_id in self.taken else super().material(key_id, length)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was read from the key file of a running server: :param keys: by their names in the store."""

    former: Former
    keys: t.Mapping[str, Secret]


def works_with(answer: sql.Server | None) -> str | None:
    """The key file that a server works with, None if it has none."""
    if answer is None or conf.PLUGIN not in answer.plugins:
        return None
    return os.path.normpath(answer.variables.get("file_key_management_filename", ""))


def take(options: Options, access: sql.Access, answer: sql.Server) -> Taken:
    """Read the key file that a server works with, and see that the server's tables open with its keys.

    :raises TdeError: ``former_key_file_unreadable``, ``encryption_foreign``, those of reading a private file, what the server answers.
    """
    path = works_with(answer) or ""
    raw = content(options, path)
    if raw is None:
        raise _unreadable(path, "does not exist")
    plain = raw
    if passphrase_file(raw):
        with sql.connect(access) as connection:
            said = sql.file_key(connection)
        digests = answer.variables.get("file_key_management_digest", "sha1").lower()
        if digests != "sha1" or answer.variables.get("file_key_management_use_pbkdf2", "0") not in ("0", "OFF", ""):
            raise _unreadable(path, f"is encrypted with a key derived by {digests}, which is not read here")
        plain = decrypted(raw, _password(options, said), path)
    keys = parsed(plain, path)
    default = int(answer.variables.get("innodb_default_encryption_key_id", "1"))
    known = [keyfile.parse_name(key_id) for key_id in (options.former.keys if options.former else ())]
    found = names(keys, default, [name for name in known if name])
    _prove(access, answer, keys)
    algorithm = answer.variables.get("file_key_management_encryption_algorithm", "aes_cbc").upper()
    former = Former(path, algorithm, digest(raw), tuple(name.key_id for name in found))
    return Taken(former, {name.key_id: Secret(keys[name.number]) for name in found})


def _password(options: Options, said: str) -> bytes:
    """The password of an encrypted key file: the setting itself, or the first line of the file that it names."""
    if not said.startswith(_FILE):
        return said.encode()
    path = said[len(_FILE) :]
    raw = content(options, path)
    if raw is None:
        raise _unreadable(path, "does not exist")
    return raw.splitlines()[0] if raw else b""


def _prove(access: sql.Access, answer: sql.Server, keys: t.Mapping[int, bytes]) -> None:
    """Of each number in use, a file opens with the key of the file: one that was changed since the server read it does not.

    :raises TdeError: ``encryption_foreign``, what the server answers.
    """
    algorithm = answer.variables.get("file_key_management_encryption_algorithm", "aes_cbc").upper()
    for number in sorted({space.key for space in answer.spaces if space.encrypted}):
        spaces = [space for space in answer.spaces if space.encrypted and space.key == number]
        counts = _seen(answer, spaces, keys, algorithm)
        if not counts.opened and not counts.shut:
            # The server has all of its pages in memory yet.
            tables = [table for table in answer.tables if any(space in spaces for space in answer.spaces_of(table))]
            with sql.connect(access) as connection:
                sql.flush(connection, tables[:_FILES])
            counts = _seen(answer, spaces, keys, algorithm)
        if number not in keys or counts.shut:
            raise TdeError(
                "encryption_foreign",
                f"has a key {number} that is not the one in its key file",
                obj="the server",
                kept="Nothing was taken.",
                next_step="Find out who changed the key file since the server was started.",
            )


def _seen(answer: sql.Server, spaces: t.Sequence[sql.Space], keys: t.Mapping[int, bytes], algorithm: str) -> pages.Counts:
    """What some files show, one after the other until one shows whether its key is right."""
    counts = pages.Counts()
    for path in [os.path.join(answer.data_directory, space.path) for space in spaces]:
        try:
            counts, dummy = pages.examine(path, keys, random.SystemRandom(), algorithm)
        except OSError as exc:
            raise os_error(exc, path) from None
        if counts.opened:
            # A page that was being written while it was read is no proof against.
            return pages.Counts(opened=counts.opened)
        if counts.shut:
            break
    return counts


def begin(options: Options, access: sql.Access, answer: sql.Server | None) -> Taken | None:
    """What is to be taken from a server that works with a key file of its own, or was changed since it was taken; None if nothing is.

    :raises TdeError: as :func:`take`.
    """
    path = works_with(answer)
    if answer is None or path is None or path == options.key_file:
        return None
    known = options.former is not None and options.former.path == path
    if options.former_key_file == REFUSE and not known:
        return None
    return take(options, access, answer)


def lost(former: Former) -> TdeError:
    """Keys are missing in the store, and the server does not work with the file any more that they were to be taken from."""
    return TdeError(
        "encryption_foreign",
        f"does not work with {former.path} any more, of whose keys the store lacks some",
        obj="the server",
        kept="Nothing was made in their place.",
        next_step="Start the server with that key file again, then run this again.",
    )


def check_store(taken: Taken, checks: t.Mapping[str, str]) -> None:
    """Refuse a store that has another key of a number.

    :param checks: the check values of the data keys that there are, by name.
    :raises TdeError: ``encryption_foreign``.
    """
    by_number = {name.number: key_id for key_id in checks for name in [keyfile.parse_name(key_id)] if name}
    for key_id, key in taken.keys.items():
        name = keyfile.parse_name(key_id)
        there = by_number.get(name.number) if name else None
        if there and checks[there] != check_value(key.reveal()):
            raise TdeError(
                "encryption_foreign",
                f"encrypts with another key of number {name.number if name else '?'} than the store's {there}",
                obj="the server",
                kept="Nothing was taken.",
                next_step="Take another name for the cluster: this one's keys were made before, and encrypt nothing of the server.",
            )


def check_taken(former: Former, lying: Lying | None, there: t.Container[str]) -> None:
    """Refuse to go on with a server that works with its former key file, of which the store lacks something.

    :param lying: the file; :param there: the data keys of the store.
    :raises TdeError: ``encryption_foreign``.
    """
    missing = [key_id for key_id in former.keys if key_id not in there]
    if missing or (lying is not None and lying.check != former.check):
        raise TdeError(
            "encryption_foreign",
            f"still works with {former.path}, of which the store lacks {missing[0] if missing else 'what was changed since'}",
            obj="the server",
            next_step="Run tde_keystore with state=present first, which takes what is missing.",
        )
