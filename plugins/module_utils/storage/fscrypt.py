# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The Linux kernel's file encryption through its ioctls: policies of version 2 only.

Sources: ``linux/fscrypt.h`` (numbers and structures), ``Documentation/filesystems/fscrypt.rst`` of the
kernel (what the calls do), ``fs/crypto/hkdf.c`` and ``fscrypt_private.h`` (the key identifier).

Nothing here writes the journal: the caller knows the cluster and the key's name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import struct
import time
import typing as t

from ..common.errors import TdeError
from ..common.files import os_error
from .ioctl import READ, WRITE, number
from .mounts import mount_of

#: Length of the keys that this collection uses: FSCRYPT_MAX_KEY_SIZE, all that AES-256-XTS can take, in bytes.
KEY_BYTES = 64
#: FSCRYPT_KEY_IDENTIFIER_SIZE.
_IDENTIFIER_BYTES = 16
#: FSCRYPT_POLICY_V2, FSCRYPT_MODE_AES_256_XTS, FSCRYPT_MODE_AES_256_CTS, FSCRYPT_POLICY_FLAGS_PAD_32 (names padded to 32 bytes).
_POLICY_V2, _AES_256_XTS, _AES_256_CTS, _PAD_32 = 2, 1, 4, 3
#: struct fscrypt_policy_v2 and _v1.
_POLICY_2 = struct.Struct("=BBBB4x16s")
_POLICY_1 = struct.Struct("=BBBB8s")
#: struct fscrypt_key_specifier with FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER.
_SPECIFIER = struct.Struct("=I4x32s")
_BY_IDENTIFIER = 2
#: struct fscrypt_add_key_arg up to its ``raw``: specifier, raw_size, key_id, 32 reserved bytes.
_ADD_HEAD = struct.Struct("=40sII32x")
#: struct fscrypt_remove_key_arg: specifier, flags, 20 reserved bytes; fscrypt_get_key_status_arg: specifier, 24 reserved
#: bytes, status, status_flags, user_count, 52 reserved bytes.
_REMOVE = struct.Struct("=40sI20x")
_STATUS = struct.Struct("=40s24xIII52x")

_FILES_BUSY = 0x1
_OTHER_USERS = 0x2
_STATUS_WORDS = {1: "absent", 2: "present", 3: "incompletely_removed"}

_MODES = {
    1: "AES-256-XTS",
    4: "AES-256-CTS",
    5: "AES-128-CBC",
    6: "AES-128-CTS",
    7: "SM4-XTS",
    8: "SM4-CTS",
    9: "Adiantum",
    10: "AES-256-HCTR2",
}


_SET_POLICY = number(READ, "f", 19, _POLICY_1.size)
_GET_POLICY_EX = number(READ | WRITE, "f", 22, 9)
_ADD_KEY = number(READ | WRITE, "f", 23, _ADD_HEAD.size)
_REMOVE_KEY = number(READ | WRITE, "f", 24, _REMOVE.size)
_KEY_STATUS = number(READ | WRITE, "f", 26, _STATUS.size)

#: fcntl.ioctl copies buffers of up to 1024 bytes onto the C stack, where nobody wipes them; a larger one is handed over itself.
_OVER_STACK_COPY = 2048

#: Filesystems of the kernel that can carry fscrypt, with the command that switches it on. Others cannot.
_ENABLE = {
    "ext4": "tune2fs -O encrypt {source}",
    "f2fs": "fsck.f2fs -O encrypt {source}",
}


class Support(t.TypedDict):
    """Whether a directory can be encrypted where it lies."""

    supported: bool
    filesystem: str
    mount_point: str
    device: str
    block_size: int
    page_size: int
    reason: str
    how_to_enable: str


class Policy(t.TypedDict):
    """An inode's encryption policy. ``identifier`` is hexadecimal (of a version 1 policy: its descriptor)."""

    version: int
    identifier: str
    contents: str
    names: str
    flags: int


class Removal(t.TypedDict):
    """What a removal left: ``status`` as :func:`key_status` says it afterwards; ``reason`` is empty if it is absent."""

    status: str
    removed: bool
    files_busy: bool
    other_users: bool
    reason: str


def identifier(master_key: bytes) -> str:
    """The key identifier that the kernel derives from a master key: 16 bytes in hexadecimal.

    HKDF-SHA512 (RFC 5869) without salt, info ``fscrypt`` NUL and the context byte 1 (HKDF_CONTEXT_KEY_IDENTIFIER).
    """
    pseudo_random_key = hmac.digest(bytes(64), master_key, "sha512")
    # One block of output is enough, so HKDF's expansion is a single HMAC with the counter 1.
    return hmac.digest(pseudo_random_key, b"fscrypt\0\x01" + b"\x01", hashlib.sha512)[:_IDENTIFIER_BYTES].hex()


@contextlib.contextmanager
def _opened(path: str, flags: int = 0) -> t.Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as exc:
        if exc.errno == errno.ENOKEY:
            raise _key_absent(path) from None
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise TdeError("place_not_directory", "is a link or not a directory", obj=path) from None
        raise os_error(exc, path) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _key_absent(path: str) -> TdeError:
    return TdeError(
        "fscrypt_key_absent",
        "the kernel does not hold the key of this directory",
        obj=path,
        next_step="Open the keystore: tde_keystore with state=open, or hsm-tde open.",
    )


def _unsupported(path: str) -> TdeError:
    support = supported(path)
    return TdeError(
        "fscrypt_unsupported",
        support["reason"] or "the kernel does not encrypt here",
        obj=path,
        next_step=support["how_to_enable"],
        details={key: support[key] for key in ("filesystem", "device", "mount_point", "block_size", "page_size")},  # type: ignore[literal-required]
    )


def _failed(exc: OSError, path: str) -> TdeError:
    """Errno of any fscrypt ioctl as one of ours (fscrypt.rst, "User API")."""
    if exc.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
        return _unsupported(path)
    if exc.errno == errno.ENOKEY:
        return _key_absent(path)
    return os_error(exc, path)


def _policy_of(fd: int) -> Policy | None:
    argument = bytearray(struct.pack("=Q", _POLICY_2.size) + bytes(_POLICY_2.size))
    try:
        fcntl.ioctl(fd, _GET_POLICY_EX, argument)
    except OSError as exc:
        if exc.errno == errno.ENODATA:
            return None
        raise
    raw = bytes(argument[8:])
    layout = _POLICY_2 if raw[0] == _POLICY_V2 else _POLICY_1
    version, contents, names, flags, key = layout.unpack_from(raw)
    # The kernel writes version 1 policies as 0.
    return {
        "version": version or 1,
        "identifier": key.hex(),
        "contents": _MODES.get(contents, f"mode {contents}"),
        "names": _MODES.get(names, f"mode {names}"),
        "flags": flags,
    }


def supported(path: str) -> Support:
    """Whether the file system at an existing path can encrypt directories, and if not, why and what would help.

    :raises TdeError: ``file_absent``, ``permission_denied``, ``mount_table_unreadable``.
    """
    mount = mount_of(path)
    block_size, page_size = os.statvfs(path).f_bsize, os.sysconf("SC_PAGE_SIZE")
    reason = how = ""
    with _opened(path) as fd:
        try:
            _policy_of(fd)
        except OSError as exc:
            reason, how = _why_not(exc, mount.filesystem, mount.source, block_size, page_size)
    return {
        "supported": not reason,
        "filesystem": mount.filesystem,
        "mount_point": mount.mount_point,
        "device": mount.source,
        "block_size": block_size,
        "page_size": page_size,
        "reason": reason,
        "how_to_enable": how,
    }


def _why_not(exc: OSError, filesystem: str, source: str, block_size: int, page_size: int) -> tuple[str, str]:
    if filesystem not in _ENABLE:
        return f"{filesystem} has no file encryption (fscrypt)", "Use storage=image, or a directory on an ext4 file system."
    if exc.errno == errno.EOPNOTSUPP:
        how = f"As root: {_ENABLE[filesystem].format(source=source)}."
        how += " If the host boots from this file system, make sure first that its GRUB can read it with that feature: older ones cannot."
        if block_size != page_size:
            how += f" Its blocks have {block_size} bytes and the memory's pages {page_size}: before Linux 5.5 it can then not be mounted any more."
        return f"the {filesystem} file system on {source} has no encrypt feature", how + " Or use storage=image."
    if exc.errno == errno.ENOTTY:
        return "this kernel was built without file encryption or is older than 5.4", "Boot a kernel with CONFIG_FS_ENCRYPTION."
    return f"the kernel answered {errno.errorcode.get(exc.errno or 0, exc.errno)}", ""


def policy(path: str) -> Policy | None:
    """The encryption policy of a file or directory; None: it lies on a file system that encrypts and has none.

    :raises TdeError: ``fscrypt_unsupported`` (the file system cannot encrypt: that is not the same as "not encrypted", an overlay may
        lie on an encrypted directory), ``fscrypt_key_absent`` (a locked file cannot be opened), ``file_absent``, ``permission_denied``.
    """
    with _opened(path) as fd:
        return policy_of_descriptor(fd, path)


def policy_of_descriptor(fd: int, path: str) -> Policy | None:
    """As :func:`policy`, of an open file. :param path: its name, for messages."""
    try:
        return _policy_of(fd)
    except OSError as exc:
        raise _failed(exc, path) from None


def set_policy(path: str, key_identifier: str) -> bool:
    """Encrypt an empty directory: AES-256-XTS contents, AES-256-CTS names, under a key that the kernel holds.

    :returns: whether it was set now; False if the directory carries this policy already.
    :raises TdeError: ``place_not_empty``, ``place_not_directory``, ``fscrypt_policy_other``, ``fscrypt_key_absent``,
        ``fscrypt_unsupported``, ``permission_denied`` (wrong owner), ``file_absent``.
    """
    wanted = _POLICY_2.pack(_POLICY_V2, _AES_256_XTS, _AES_256_CTS, _PAD_32, bytes.fromhex(key_identifier))
    with _opened(path, os.O_DIRECTORY | os.O_NOFOLLOW) as fd:
        present = policy_of_descriptor(fd, path)
        if present is not None:
            _check_same_policy(path, present, key_identifier)
            return False
        # Root may set a policy whose key the kernel never saw: a directory that nothing could ever use.
        if _status_of(fd, path, key_identifier) != "present":
            raise _key_absent(path)
        try:
            fcntl.ioctl(fd, _SET_POLICY, bytearray(wanted))
            os.fsync(fd)
        except OSError as exc:
            raise _policy_refused(exc, fd, path) from None
    return True


def _check_same_policy(path: str, present: Policy, key_identifier: str) -> None:
    if present["version"] == _POLICY_V2 and present["identifier"] == key_identifier:
        if (present["contents"], present["names"]) == (_MODES[_AES_256_XTS], _MODES[_AES_256_CTS]):
            return
        found = f"is encrypted with {present['contents']} and {present['names']}"
    else:
        found = f"is encrypted under another key ({present['identifier']}, policy version {present['version']})"
    raise TdeError(
        "fscrypt_policy_other",
        found,
        obj=path,
        next_step="A policy cannot be changed: choose another directory, or open the keystore that the key belongs to.",
        details={"wanted": key_identifier, "found": present["identifier"]},
    )


def _policy_refused(exc: OSError, fd: int, path: str) -> TdeError:
    if exc.errno == errno.ENOTEMPTY:
        return TdeError(
            "place_not_empty",
            "has entries in the clear; only an empty directory can be encrypted",
            obj=path,
            next_step="Choose another directory, or move its content away.",
        )
    if exc.errno == errno.EACCES:
        owner = os.fstat(fd).st_uid
        return TdeError(
            "permission_denied",
            f"belongs to user id {owner}; only its owner or root may encrypt it",
            obj=path,
            next_step="Run as root.",
        )
    return _failed(exc, path)


def add_key(mount: str, key: bytes | bytearray) -> str:
    """Give the kernel a key for one file system; given twice it is there once.

    Added by root it serves every user of that file system until it is removed, unmounted or the host restarts.

    :param mount: any directory on the file system. :param key: :data:`KEY_BYTES` bytes.
    :returns: the key identifier.
    :raises TdeError: ``fscrypt_key_invalid``, ``fscrypt_unsupported``, ``permission_denied``.
    """
    if len(key) != KEY_BYTES:
        raise TdeError("fscrypt_key_invalid", f"a key has {KEY_BYTES} bytes, this one {len(key)}", obj=mount)
    expected = identifier(bytes(key))
    argument = bytearray(_OVER_STACK_COPY)
    try:
        _ADD_HEAD.pack_into(argument, 0, _SPECIFIER.pack(_BY_IDENTIFIER, b""), KEY_BYTES, 0)
        argument[_ADD_HEAD.size : _ADD_HEAD.size + KEY_BYTES] = key
        with _opened(mount, os.O_DIRECTORY) as fd:
            try:
                fcntl.ioctl(fd, _ADD_KEY, argument)
            except OSError as exc:
                raise _failed(exc, mount) from None
        given = bytes(argument[8 : 8 + _IDENTIFIER_BYTES]).hex()
    finally:
        argument[:] = bytes(len(argument))
    if given != expected:
        raise TdeError(
            "fscrypt_key_invalid", f"the kernel calls the key {given}, not {expected}", obj=mount, kept="The key was added."
        )
    return given


def key_status(mount: str, key_identifier: str) -> str:
    """``present``, ``absent`` or ``incompletely_removed`` (files that were open at the removal can still be read).

    "Absent" says nothing about a database being stopped.

    :raises TdeError: ``fscrypt_unsupported``, ``file_absent``, ``permission_denied``.
    """
    with _opened(mount, os.O_DIRECTORY) as fd:
        return _status_of(fd, mount, key_identifier)


def _specifier(key_identifier: str) -> bytes:
    return _SPECIFIER.pack(_BY_IDENTIFIER, bytes.fromhex(key_identifier))


def _status_of(fd: int, path: str, key_identifier: str) -> str:
    argument = bytearray(_STATUS.pack(_specifier(key_identifier), 0, 0, 0))
    try:
        fcntl.ioctl(fd, _KEY_STATUS, argument)
    except OSError as exc:
        raise _failed(exc, path) from None
    status: int = _STATUS.unpack(argument)[1]
    if status not in _STATUS_WORDS:
        raise TdeError("io_error", f"the kernel answered the unknown key status {status}", obj=path)
    return _STATUS_WORDS[status]


def remove_key(mount: str, key_identifier: str, wait_seconds: float = 2.0) -> Removal:
    """Take a key from the kernel and lock the files that it opened.

    While files are open the kernel forgets the key but keeps those files readable, and it does not come back to them:
    the call is repeated until they are closed or ``wait_seconds`` have passed. A key that another user added as well
    stays present; that claim is not ours to take away.

    :returns: what is left; success is ``status == "absent"``.
    :raises TdeError: ``fscrypt_unsupported``, ``file_absent``, ``permission_denied``.
    """
    deadline = time.monotonic() + wait_seconds
    removed = False
    flags = 0
    with _opened(mount, os.O_DIRECTORY) as fd:
        while _status_of(fd, mount, key_identifier) != "absent":
            argument = bytearray(_REMOVE.pack(_specifier(key_identifier), 0))
            try:
                fcntl.ioctl(fd, _REMOVE_KEY, argument)
            except OSError as exc:
                if exc.errno == errno.ENOKEY:  # between the two calls somebody else removed it, or it is another user's only
                    flags = _OTHER_USERS if _status_of(fd, mount, key_identifier) == "present" else 0
                    break
                raise _failed(exc, mount) from None
            removed = True
            flags = _REMOVE.unpack(argument)[1]
            if not flags & _FILES_BUSY or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        status = _status_of(fd, mount, key_identifier)
    reason = ""
    if status == "incompletely_removed":
        reason = "Files under this key are still open: end the programs that use them, then remove the key again."
    elif status == "present":
        reason = "Another user of this host added the same key: that user, or root with fscryptctl remove_key --all-users, must remove it too."
    return {
        "status": status,
        "removed": removed,
        "files_busy": bool(flags & _FILES_BUSY),
        "other_users": bool(flags & _OTHER_USERS),
        "reason": reason,
    }
