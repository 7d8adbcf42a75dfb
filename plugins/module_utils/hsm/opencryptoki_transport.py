# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A token's folder brought from one host to another through a controller that cannot read it.

In the folder lies the token's master key under PINs of at most eight bytes: whoever has it tries them all within minutes.
So the receiver makes a key pair (X25519) once, the sender encrypts the archive for its public key, and only the receiver opens
it: HPKE's shape (RFC 9180), with an ephemeral key of the sender, HKDF-SHA256 and AES-256-GCM.

The archive is JSON: ``hsm_tde_token`` (1), ``folder``, ``digest`` (SHA-256 of the content), ``ephemeral``, ``nonce`` and
``sealed``, all in base64. The content is JSON too: path below the folder → mode, owner's name and base64. The digest is over paths,
modes and contents: an owner whom the receiver does not have is no difference.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import pwd
import secrets
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import make_private_directory, os_error, read_private, write_atomic
from ..common.state import StateDirectory
from ..pkcs11.copies import SUFFIXES
from . import opencryptoki_store as store

_FORM = 1
_KEY_BYTES, _NONCE_BYTES = 32, 12
#: A soft token with thousands of keys; the archive passes through a task's arguments.
_MAX_BYTES = 16 << 20
_INFO = b"hsm.tde openCryptoki token 1"
#: How files are called until they take their place.
_BESIDE = ".hsm-tde-new"


def _damaged(reason: str, obj: str = "archive of the token") -> TdeError:
    return TdeError("opencryptoki_archive_invalid", reason, obj=obj)


def key_file(state: StateDirectory) -> str:
    """Where the receiver's private key lies."""
    return os.path.join(state.path, "opencryptoki.transport")


def public_key(state: StateDirectory) -> str | None:
    """The receiver's public key in base64; None if it has none yet."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    try:
        raw = read_private(key_file(state))
    except TdeError as exc:
        if exc.code == "file_absent":
            return None
        raise
    return base64.b64encode(X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()).decode()


def make_key(state: StateDirectory) -> None:
    """Make the receiver's key pair."""
    make_private_directory(state.path)
    write_atomic(key_file(state), secrets.token_bytes(_KEY_BYTES))


def content(name: str) -> bytes:
    """The content of a token's folder, the same bytes for the same files.

    :param name: the folder's name.
    :raises TdeError: ``opencryptoki_store_absent``, ``file_too_large``.
    """
    home, files, size = store.folder(name), {}, 0
    for place, dummy, names, folder in os.fwalk(home) if os.path.lexists(home) else ():
        for file in sorted(names):
            if file.endswith((_BESIDE, *SUFFIXES)):
                continue
            found = _regular(folder, file)
            if found is None:
                continue
            raw, info = found
            size += len(raw)
            if size > _MAX_BYTES:
                raise TdeError("file_too_large", f"has more than {_MAX_BYTES} bytes", obj=home)
            files[os.path.relpath(os.path.join(place, file), home)] = {
                "mode": stat.S_IMODE(info.st_mode),
                "owner": _owner(info.st_uid),
                "data": base64.b64encode(raw).decode(),
            }
    if "NVTOK.DAT" not in files:
        raise TdeError("opencryptoki_store_absent", "holds no token", obj=home)
    return json.dumps(files, sort_keys=True).encode()


def _regular(folder: int, name: str) -> tuple[bytes, os.stat_result] | None:
    """A regular file's content and facts, of one descriptor: the group can put links and pipes there, at any moment."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            return None
        raise
    with os.fdopen(fd, "rb") as handle:
        info = os.fstat(fd)
        return (handle.read(_MAX_BYTES + 1), info) if stat.S_ISREG(info.st_mode) else None


def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "root"


def _mark(plain: bytes) -> str:
    files = {path: [entry["mode"], entry["data"]] for path, entry in json.loads(plain).items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def objects(name: str) -> dict[str, str]:
    """The keys' files in a token's folder, each with the SHA-256 of its content; none where it holds no token."""
    try:
        found = json.loads(content(name))
    except TdeError as exc:
        if exc.code != "opencryptoki_store_absent":
            raise
        return {}
    return _objects({path: base64.b64decode(entry["data"]) for path, entry in found.items()})


def packed_objects(files: t.Mapping[str, File]) -> dict[str, str]:
    """As :func:`objects`, of an archive's files."""
    return _objects({path: file.data for path, file in files.items()})


def _objects(files: t.Mapping[str, bytes]) -> dict[str, str]:
    return {
        path: hashlib.sha256(data).hexdigest()
        for path, data in files.items()
        if os.path.dirname(path) == "TOK_OBJ" and os.path.basename(path) != "OBJ.IDX"
    }


def objects_mark(there: t.Mapping[str, str]) -> str:
    """SHA-256 over them, "" for none."""
    return hashlib.sha256(json.dumps(there, sort_keys=True).encode()).hexdigest() if there else ""


def digest(name: str) -> str:
    """SHA-256 of the content of a token's folder, empty if it holds no token."""
    try:
        return _mark(content(name))
    except TdeError as exc:
        if exc.code != "opencryptoki_store_absent":
            raise
        return ""


def _cipher(shared: bytes, ephemeral: bytes, receiver: bytes) -> t.Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return AESGCM(HKDF(SHA256(), _KEY_BYTES, salt=ephemeral + receiver, info=_INFO).derive(shared))


def pack(name: str, receiver: str) -> str:
    """The archive of a token's folder for one receiver.

    :param receiver: its public key in base64.
    :raises TdeError: as :func:`content`; ``invalid_option``.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        raw = base64.b64decode(receiver, validate=True)
        public = X25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise TdeError("invalid_option", "is no public key of a receiver", obj="option recipient") from None
    plain = content(name)
    private = X25519PrivateKey.generate()
    ephemeral = private.public_key().public_bytes_raw()
    nonce, mark = secrets.token_bytes(_NONCE_BYTES), _mark(plain)
    sealed = _cipher(private.exchange(public), ephemeral, raw).encrypt(nonce, plain, _context(name, mark))
    parts = {"ephemeral": ephemeral, "nonce": nonce, "sealed": sealed}
    shown: dict[str, t.Any] = {key: base64.b64encode(value).decode() for key, value in parts.items()}
    return json.dumps({"hsm_tde_token": _FORM, "folder": name, "digest": mark, **shown})


def _context(name: str, mark: str) -> bytes:
    return json.dumps([name, mark]).encode()


class File(t.NamedTuple):
    """A file of a token's folder."""

    mode: int
    owner: str
    data: bytes


def unpack(archive: str, name: str, state: StateDirectory) -> dict[str, File]:
    """The files of an archive by their path below the folder.

    :raises TdeError: ``opencryptoki_archive_invalid``.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    shown = header(archive)
    if shown["folder"] != name:
        raise _damaged(f"holds the folder {shown['folder']!r}, not {name!r}")
    try:
        private = X25519PrivateKey.from_private_bytes(read_private(key_file(state)))
    except TdeError as exc:
        if exc.code != "file_absent":
            raise
        raise _damaged("this host has no key that it could have been made for") from None
    try:
        ephemeral, nonce, sealed = (base64.b64decode(shown[key], validate=True) for key in ("ephemeral", "nonce", "sealed"))
        shared = private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        cipher = _cipher(shared, ephemeral, private.public_key().public_bytes_raw())
        plain = cipher.decrypt(nonce, sealed, _context(name, shown["digest"]))
    except (InvalidTag, ValueError):
        raise _damaged("does not open with this host's key") from None
    files = {}
    for path, entry in json.loads(plain).items():
        if os.path.isabs(path) or ".." in path.split("/") or path != os.path.normpath(path):
            raise _damaged(f"names a file outside the folder: {path!r}")
        # Whatever its sender's modes were, nobody but owner and group reads it here.
        files[path] = File(int(entry["mode"]) & 0o660, str(entry["owner"]), base64.b64decode(entry["data"]))
    if "NVTOK.DAT" not in files:
        raise _damaged("holds no token")
    return files


def header(archive: str) -> dict[str, t.Any]:
    """What an archive says of itself; not authenticated.

    :raises TdeError: ``opencryptoki_archive_invalid``.
    """
    try:
        shown = json.loads(archive)
        sound = shown["hsm_tde_token"] == _FORM and all(isinstance(shown[key], str) for key in ("folder", "digest"))
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise _damaged("is not an archive of a token, or of a newer form")
    return t.cast("dict[str, t.Any]", shown)


def install(name: str, files: t.Mapping[str, File], gid: int) -> None:
    """Put the files of a token's folder in place of those that are there. Nobody uses the token meanwhile.

    All are written beside before the first takes its place: a full disk changes nothing, and a kill in the moment of the
    renames leaves a folder that differs from the primary's, which the next run mends. Folders are not renamed, which an overlay
    does not let one do. The token's shared memory goes, so that the next program reads the new files.

    The group can write the folders and the one above them, so each is opened once, no link is followed, and what is done is done
    by descriptor.

    :param gid: the token's group on this host.
    :raises TdeError: ``file_not_private``, and those of writing.
    """
    home = store.folder(name)
    written: list[tuple[int, str, str]] = []
    with contextlib.ExitStack() as stack:
        try:
            folders = {"": _folder(stack, home, None, gid)}
            for folder in sorted({"TOK_OBJ", *(os.path.dirname(path) for path in files)} - {""}):
                here = ""
                for part in folder.split("/"):
                    above, here = here, os.path.join(here, part)
                    if here not in folders:
                        folders[here] = _folder(stack, part, folders[above], gid)
            for path, file in files.items():
                place, target = folders[os.path.dirname(path)], os.path.basename(path)
                beside = f"{target}{_BESIDE}"
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=place)
                fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=place)
                with open(fd, "wb") as handle:
                    written.append((place, beside, target))
                    handle.write(file.data)
                    handle.flush()
                    os.fchown(handle.fileno(), _uid(file.owner), gid)
                    os.fchmod(handle.fileno(), file.mode)
                    os.fsync(handle.fileno())
        except OSError as exc:
            for place, beside, dummy in written:
                os.unlink(beside, dir_fd=place)
            raise os_error(exc, home, kept="The folder is as it was.") from None
        remove_shared_memory(name)
        for place, beside, target in written:
            os.rename(beside, target, src_dir_fd=place, dst_dir_fd=place)
        for folder, dummy_folders, names, place in os.fwalk(".", dir_fd=folders[""]):
            for file_name in names:
                if os.path.normpath(os.path.join(folder, file_name)) not in files:
                    os.unlink(file_name, dir_fd=place)
        remove_shared_memory(name)


def _folder(stack: contextlib.ExitStack, name: str, above: int | None, gid: int) -> int:
    """A folder's descriptor, for as long as the stack; one that is missing is made as openCryptoki makes it.

    :raises TdeError: ``file_not_private`` for a link.
    """
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
        made = True
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise TdeError(
            "file_not_private",
            "is a link or not a directory",
            obj=f"token folder {name}",
            kept="The folder is as it was.",
            next_step="Find out who of the token's group put it there.",
        ) from None
    stack.callback(os.close, fd)
    if made:
        os.fchown(fd, 0, gid)
        os.fchmod(fd, 0o770)
    return fd


def _uid(owner: str) -> int:
    """A user's id here; root's for one that this host does not have. The group is what lets the token's users in."""
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        return 0


def remove_shared_memory(name: str) -> None:
    """Remove the token's segment: programs that start later make it anew from the files."""
    path = store.shared_memory(name)
    if os.path.lexists(path):
        os.unlink(path)
