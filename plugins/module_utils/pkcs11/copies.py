# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Copies of files that soft tokens empty before they write them anew, put back where a kill or a power cut came in between.

SoftHSM 2.6.1 (ObjectFile.cpp, store) and openCryptoki 3.8.1 and 3.23 (loadsave.c) rewrite in place:

- the token's own file at each login: SoftHSM's ``token.object``, under whose key all keys of the token are encrypted, and
  openCryptoki's ``NVTOK.DAT``, without which the token cannot be opened;
- the file of an object at each C_SetAttributeValue: without its bytes the key is gone;
- openCryptoki's list of all objects, ``OBJ.IDX``, at each C_DestroyObject: an object that it does not name is not seen.

The copy of the token's own file stays, and is refreshed before each login of ours. Those of objects exist while one of ours
changes or destroys some, together in one file, whose lock says that the changer lives. The copies hold nothing that the
files did not, and no library looks at them. An object that was destroyed is never put back: only a file that is there is filled.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
import syslog
import time
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error
from . import opencryptoki, softhsm

#: How the copies' names end, and those of copies half written.
SUFFIXES = (".copy", ".copy.tmp")
_OBJECTS_COPY = "objects" + SUFFIXES[0]
#: Before each object in their copy: bytes of its name, bytes of its content.
_HEAD = struct.Struct(">HI")
#: SoftHSM's files begin with a counter of their writes (ObjectFile.cpp, writeAttributes).
_COUNTER_BYTES = 8
#: Larger than any file of a token or key: an RSA key of 8192 bits has some 6 KiB.
_MAX_BYTES = 1 << 16
#: Seconds after which an empty file of a token is not one that somebody is about to write.
_SETTLED = 0.5


class Store(t.NamedTuple):
    """Where a token keeps its files.

    :param folder: the token's; the copies lie in it.
    :param file: name of its own file; :param copy: of the copy.
    :param objects: folder of the objects, from there.
    :param counter: bytes at its beginning that count its writes, which is no reason to copy it anew.
    :param named: what the objects' files are called.
    :param listing: the list of them in the same folder, if the token has one.
    """

    folder: str
    file: str
    copy: str
    counter: int
    objects: str
    named: re.Pattern[str]
    listing: str | None


#: SoftHSM's have a UUID for a name (OSToken.cpp).
_SOFTHSM_OBJECT = re.compile(r"(?!token\.)[^/]+\.object")
#: OpenCryptoki's have eight letters or digits (obj_mgr.c, object_mgr_add; PK_LITE_OBJ_IDX).
_OPENCRYPTOKI_OBJECT = re.compile(r"[0-9A-Za-z]{8}")


#: Folders of which this process keeps copies at present.
_KEPT: set[str] = set()


def rewriting(path: str) -> frozenset[str]:
    """The acts of a plan on keys in which a library rewrites what it already has; none for one that has no files here."""
    if softhsm.is_softhsm(path):
        return frozenset({"change_key"})
    if opencryptoki.is_opencryptoki(path):
        return frozenset({"change_key", "destroy_key"})
    return frozenset()


def keep(path: str) -> None:
    """Refresh the copies of the tokens' own files. What cannot be copied is left: a login must not fail for it.

    :param path: the library's.
    """
    for store in _stores(path):
        with contextlib.suppress(OSError), _opened(store.folder) as fd:
            content, info = _read(fd, store.file)
            if info is not None and content and content[store.counter :] != _read(fd, store.copy)[0][store.counter :]:
                os.close(_write_copy(fd, store.copy, content, info))


@contextlib.contextmanager
def objects_kept(path: str) -> t.Iterator[None]:
    """Keep copies of all objects while some are changed or destroyed; within another such act, that one's do.

    All, because a token does not tell which file an object has.

    :param path: the library's.
    :raises TdeError: ``busy`` if another process changes some; ``disk_full`` and others where they cannot be copied.
    """
    with contextlib.ExitStack() as stack:
        for store in _stores(path):
            if store.folder not in _KEPT:
                stack.enter_context(_objects_kept(store))
                _KEPT.add(store.folder)
                stack.callback(_KEPT.discard, store.folder)
        yield


@contextlib.contextmanager
def _objects_kept(store: Store) -> t.Iterator[None]:
    try:
        with _opened(store.folder) as fd:
            if not _mend_objects(fd, store):
                raise TdeError("busy", "another process changes its keys", obj=f"token in {store.folder}")
            kept = b"".join(map(_packed, _objects(store)))
            owner = _read(fd, store.file)[1]
            if not kept or owner is None:
                yield
                return
            # Its lock is held until this process ends, however it does.
            with open(_write_copy(fd, _OBJECTS_COPY, kept, owner), "rb"):
                try:
                    yield
                finally:
                    _settle(fd, store, kept)
    except OSError as exc:
        raise os_error(exc, f"copy of the keys in {store.folder}", kept="Run again.") from None


def mend(path: str) -> list[str]:
    """Fill what was left empty or cut short from the copies. To be called before the library reads the files.

    :param path: the library's.
    :returns: the folders of tokens whose own file was filled.
    """
    stores = _stores(path)
    for store in stores:
        with contextlib.suppress(OSError), _opened(store.folder) as fd:
            _mend_objects(fd, store)
    empty = [store for store in stores if _is_empty(store)]
    if not empty:
        return []
    time.sleep(_SETTLED)
    mended = []
    for store in empty:
        with contextlib.suppress(OSError), _opened(store.folder) as fd:
            copy = _read(fd, store.copy)[0]
            if copy and _fill(fd, store.file, copy, lambda now, before: None if now else before):
                mended.append(store.folder)
    return mended


def _mend_objects(folder: int, store: Store) -> bool:
    """Settle what a changer left that is no more; False if it lives."""
    try:
        fd = os.open(_OBJECTS_COPY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return True
    with os.fdopen(fd, "rb") as handle:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        info = os.fstat(fd)
        # No links: it was settled between the two calls.
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
            _settle(folder, store, handle.read())
    return True


def _settle(folder: int, store: Store, kept: bytes) -> None:
    """Fill the files that are shorter than they were, and see that all lie on the disk; then the copy goes.

    :raises OSError: of a file that could not be filled; the copy stays.
    """
    failed: OSError | None = None
    with _opened(os.path.join(store.folder, store.objects)) as fd:
        for name, content in _unpack(kept):
            try:
                if name == store.listing:
                    _fill(fd, name, content, lambda now, before: _whole_listing(now, before, os.listdir(fd)))
                elif store.named.fullmatch(name):
                    # The attributes that we change keep their length.
                    _fill(fd, name, content, lambda now, before: before if len(now) < len(before) else None)
            except OSError as exc:
                failed = exc
    if failed:
        raise failed
    os.unlink(_OBJECTS_COPY, dir_fd=folder)


def _whole_listing(now: bytes, before: bytes, files: t.Collection[str]) -> bytes | None:
    """A list of objects that lacks some which are there, with them; None if it lacks none.

    :param now: the list; :param before: the copy of it, one name a line.
    """
    listed = [line for line in now.splitlines(keepends=True) if line.endswith(b"\n")]
    there = {os.fsencode(name) + b"\n" for name in files}
    lost = [line for line in before.splitlines(keepends=True) if line in there.difference(listed)]
    return b"".join(listed + lost) if lost else None


def _fill(folder: int, name: str, before: bytes, wish: t.Callable[[bytes, bytes], bytes | None]) -> bool:
    """Write a file anew, if it is there and is not as it should be; if it is not as it was, see that it lies on the disk.

    :param before: the copy of it.
    :param wish: what it should be, by what it is and the copy; None: as it is.
    :returns: whether it was written.
    """
    # In place: whoever has the file open goes on with the same one.
    try:
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return False
    with os.fdopen(fd, "r+b") as handle:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            return False
        now = handle.read()
        content = wish(now, before)
        if content is not None:
            handle.seek(0)
            handle.write(content)
            handle.flush()
            syslog.syslog(syslog.LOG_WARNING, f"hsm-tde: a soft token left {name} cut short; its copy was put back")
        # SoftHSM and openCryptoki do not. A flush for each of thousands of keys would take long.
        if content is not None or now != before:
            os.fsync(fd)
    return content is not None


def _stores(path: str) -> list[Store]:
    """The stores of a library's tokens."""
    if softhsm.is_softhsm(path):
        return [
            Store(folder, "token.object", "token.copy", _COUNTER_BYTES, ".", _SOFTHSM_OBJECT, None)
            for folder in softhsm.token_folders()
        ]
    if opencryptoki.is_opencryptoki(path):
        return [
            Store(folder, "NVTOK.DAT", "NVTOK.copy", 0, "TOK_OBJ", _OPENCRYPTOKI_OBJECT, "OBJ.IDX")
            for folder in opencryptoki.token_folders()
        ]
    return []


def _objects(store: Store) -> t.Iterator[tuple[bytes, bytes]]:
    """Name and content of every file of an object, and of the list of them."""
    if not os.path.isdir(os.path.join(store.folder, store.objects)):
        return
    with _opened(os.path.join(store.folder, store.objects)) as fd:
        for name in os.listdir(fd):
            if name == store.listing or store.named.fullmatch(name):
                content = _read(fd, name, None)[0]
                if content:
                    yield os.fsencode(name), content


def _packed(item: tuple[bytes, bytes]) -> bytes:
    name, content = item
    return _HEAD.pack(len(name), len(content)) + name + content


def _unpack(kept: bytes) -> t.Iterator[tuple[str, bytes]]:
    place = 0
    while place + _HEAD.size <= len(kept):
        name, content = _HEAD.unpack_from(kept, place)
        start = place + _HEAD.size
        place = start + name + content
        yield os.fsdecode(kept[start : start + name]), kept[start + name : place]


@contextlib.contextmanager
def _opened(folder: str) -> t.Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_empty(store: Store) -> bool:
    try:
        return os.lstat(os.path.join(store.folder, store.file)).st_size == 0
    except OSError:
        return False


def _read(folder: int, name: str, most: int | None = _MAX_BYTES) -> tuple[bytes, os.stat_result | None]:
    """A regular file's content and facts, of one descriptor; nothing and None for one that does not exist."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return b"", None
    with os.fdopen(fd, "rb") as handle:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise OSError(f"{name} is not one regular file")
        return handle.read(most), info


def _write_copy(folder: int, name: str, content: bytes, owner: os.stat_result) -> int:
    """Write a copy; :returns: a locked descriptor of it."""
    temporary = f".{name}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=folder)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with os.fdopen(os.dup(fd), "wb") as handle:
            handle.write(content)
        # Whoever owns the token owns the copy; others never get more than they had.
        os.fchown(fd, owner.st_uid, owner.st_gid)
        os.fchmod(fd, owner.st_mode & 0o660)
        os.fsync(fd)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return fd
