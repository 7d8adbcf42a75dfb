# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""InnoDB's files page by page, without the server: which pages are in the clear, and which open with our key.

Every index page begins with a record ``infimum``. So a page is in the clear if it says so and shows that; and it is
encrypted with *our* key if it does not show it, and decrypted with the key of the key file it does.

Sources: MariaDB's storage/innobase/include/fil0fil.h (page header), fsp0types.h (flags), fil0crypt.h and fil0crypt.cc
(encryption's data in page 0, what is encrypted), page0page.h (PAGE_NEW_INFIMUM, PAGE_OLD_INFIMUM), and
mysys_ssl/my_crypt.cc with sql/encryption.cc (the derived key, the counter).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import stat
import struct
import typing as t

#: Bytes of a file that are read at most; of a larger one pages by chance.
BUDGET = 32 << 20

_MAGIC = b"s\x0e\x0cREt"
_IV_BYTES = 16
_FLAGS = 54
#: Of the flags: full_crc32 (MariaDB 10.4.3 and newer), and in its form the page size and a compression.
_FULL_CRC32, _SIZE, _COMPRESSED = 0x10, 0xF, 0xE0
#: Types of pages that hold users' data: indexes (B-tree, R-tree, after an instant change), undo, large values.
_INDEXES = (17855, 17854, 18)
_DATA = (*_INDEXES, 2, 10, 11, 12)
_INFIMUM = b"infimum\0"
#: Where the first record lies, in the newer row formats and in the oldest.
_PLACES = (99, 101)


class Crypt(t.NamedTuple):
    """Encryption's data of a tablespace; :param key: the number of its key."""

    key: int
    iv: bytes


class Layout(t.NamedTuple):
    """How pages lie in a file.

    :param readable: whether an index page shows its first record: not in a compressed format.
    """

    size: int
    full_crc32: bool
    readable: bool


@dataclasses.dataclass
class Counts:
    """What was seen.

    :ivar plain: data pages in the clear; :ivar opened: index pages that our key opened; :ivar shut: those that it did not.
    :ivar sealed: other pages that say that they are encrypted; :ivar zero: pages of zeros; :ivar unreadable: of a format that shows nothing.
    """

    pages: int = 0
    plain: int = 0
    opened: int = 0
    shut: int = 0
    sealed: int = 0
    zero: int = 0
    unreadable: int = 0
    bytes_read: int = 0
    sampled: bool = False

    def add(self, other: Counts) -> None:
        """Add another file's."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def layout(first: bytes) -> Layout | None:
    """How a file's pages lie, from the first bytes of its first page; None if that is no tablespace's."""
    if len(first) < _FLAGS + 4:
        return None
    flags = struct.unpack(">I", first[_FLAGS : _FLAGS + 4])[0]
    if flags & _FULL_CRC32:
        size = 512 << (flags & _SIZE)
        return Layout(size, True, not flags & _COMPRESSED) if 4096 <= size <= 65536 else None
    zipped, shift = (flags >> 1) & 0xF, (flags >> 6) & 0xF
    if zipped:
        return Layout(512 << zipped, False, False)
    return Layout(512 << shift if shift else 16384, False, not flags >> 16 & 1)


def crypt(first: bytes) -> Crypt | None:
    """Encryption's data in the first page, None if it has none."""
    place = first.find(_MAGIC)
    # Magic, type, length of the iv, iv, smallest version of the key, number of the key, whether it is asked for.
    if place < 0 or len(first) < place + 33 or first[place + 7] != _IV_BYTES:
        return None
    return Crypt(struct.unpack(">I", first[place + 28 : place + 32])[0], first[place + 8 : place + 24])


def derived(key: bytes, iv: bytes) -> bytes:
    """The tablespace's own key of 16 bytes: its iv, encrypted with AES-ECB under the data key."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - as the server derives it
    return encryptor.update(iv) + encryptor.finalize()


def opened(page: bytes, form: Layout, key: bytes, space: bytes, algorithm: str = "AES_CTR") -> bytes:
    """A page decrypted: the counter, or with AES_CBC the iv, is of tablespace, page number and log sequence number, each little-endian.

    :param key: as :func:`derived` gives it; :param space: the tablespace's number as the first page has it.
    :returns: with AES_CBC without what comes after the last whole block.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    head, end = (26, 4) if form.full_crc32 else (38, 8)
    counter = space[::-1] + page[4:8][::-1] + page[16:24][::-1]
    mode = modes.CTR(counter) if algorithm == "AES_CTR" else modes.CBC(counter)
    return page[:head] + Cipher(algorithms.AES(key), mode).decryptor().update(page[head:-end]) + page[-end:]


def shows_infimum(page: bytes) -> bool:
    """Whether an index page's first record can be read."""
    return any(page[place : place + len(_INFIMUM)] == _INFIMUM for place in _PLACES)


def examine(
    path: str, keys: t.Mapping[int, bytes], rng: random.Random, algorithm: str = "AES_CTR"
) -> tuple[Counts, Crypt | None]:
    """Look at a file's pages.

    :param keys: the keys of the key file by number; :param algorithm: the server's.
    :returns: what was seen, and what its first page says of its encryption.
    :raises OSError: the file cannot be read.
    """
    counts = Counts()
    # The server's user may have put a pipe there, which would be waited for.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        first = handle.read(65536)
        form = layout(first)
        if form is None:
            return counts, None
        first = first[: form.size]
        found = crypt(first)
        key = derived(keys[found.key], found.iv) if found and found.key in keys else None
        total = handle.seek(0, 2) // form.size
        numbers: t.Sequence[int] = range(1, total)
        if total * form.size > BUDGET:
            numbers, counts.sampled = sorted(rng.sample(numbers, BUDGET // form.size)), True
        for number in numbers:
            page = b""
            # A page that is being written while it is read is read again.
            for _try in range(2):
                handle.seek(number * form.size)
                page = handle.read(form.size)
                if len(page) < form.size or _count(Counts(), page, form, key, first[34:38], algorithm) != "shut":
                    break
            if len(page) == form.size:
                counts.bytes_read += form.size
                _count(counts, page, form, key, first[34:38], algorithm)
    return counts, found


def _count(counts: Counts, page: bytes, form: Layout, key: bytes | None, space: bytes, algorithm: str) -> str:
    """Judge a page; :returns: the name of what was counted."""
    if not page.strip(b"\0"):
        kind = "zero"
    else:
        counts.pages += 1
        # Newer files have the key's version where older ones have the checksum.
        place = 0 if form.full_crc32 else 26
        version, index = any(page[place : place + 4]), struct.unpack(">H", page[24:26])[0]
        if not version:
            # What is no page of data (maps, headers) is never encrypted.
            kind = "plain" if index & 0x7FFF in _DATA else ""
        elif not form.readable:
            kind = "unreadable"
        elif index not in _INDEXES:
            kind = "sealed"
        else:
            kind = (
                "opened"
                if key and not shows_infimum(page) and shows_infimum(opened(page, form, key, space, algorithm))
                else "shut"
            )
    if kind:
        setattr(counts, kind, getattr(counts, kind) + 1)
    return kind
