# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A PIN at rest: a 0600 file of one line, and beside it ``<file>.new`` while the PIN is being changed.

A change writes ``<file>.new``, changes the token, proves the new PIN and renames. In between the token has the
one PIN or the other, so whoever opens it at boot knows both (:func:`resting_pins`).

The file of a database's own user, mode 0400, lies in a folder of root's as well; a change keeps its owner and mode.
"""

from __future__ import annotations

import os
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import leftovers_of, os_error, read_private, remove_leftovers_of, trusted_directory, write_atomic
from ..common.secret import Secret

#: Longer than any token's PIN (nShield and CloudHSM: below 256 bytes).
_MAX_BYTES = 1024


class Resting(t.NamedTuple):
    """What lies at rest.

    :param coming: the content of ``<file>.new``: a change was begun and not ended.
    :param settled: the content of the file itself.
    """

    coming: Secret | None
    settled: Secret | None


def coming_path(path: str) -> str:
    """Where the new PIN is while it is not yet proved."""
    return path + ".new"


def at_rest(path: str, *, of_anybody: bool = False) -> Resting:
    """Both files' PINs, None for a file that does not exist.

    :param of_anybody: whose they are does not matter, as long as nobody else reads them and only root could have put them there.
    :raises TdeError: ``pin_file_damaged``, ``file_not_private`` and what reading a private file raises.
    """
    return Resting(_read(coming_path(path), of_anybody), _read(path, of_anybody))


def resting_pins(path: str) -> list[Secret]:
    """The PINs that the token may have, newest first: one, or two after a change that was interrupted.

    :raises TdeError: ``file_absent`` if there is neither file; as :func:`at_rest`.
    """
    found = [pin for pin in at_rest(path) if pin is not None]
    if not found:
        raise TdeError("file_absent", "does not exist", obj=f"PIN file {path}", kept="No PIN was tried.")
    return found[:1] if len(found) == 2 and found[0] == found[1] else found


def write_coming(path: str, pin: Secret) -> None:
    """Write ``<file>.new``, of the owner and mode of the file."""
    mode, uid, gid = 0o600, -1, -1
    info = _owner(path)
    if info is not None and info.st_uid != os.geteuid():
        mode, uid, gid = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
    write_atomic(coming_path(path), pin.reveal() + b"\n", mode=mode, uid=uid, gid=gid)


def settle(path: str) -> None:
    """Put ``<file>.new`` in the file's place."""
    with trusted_directory(os.path.dirname(os.path.normpath(path))) as folder:
        name = os.path.basename(path)
        try:
            os.rename(coming_path(name), name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        except OSError as exc:
            raise os_error(exc, path, kept="The new PIN is in the file with .new at its end.") from None


def discard_coming(path: str) -> None:
    """Remove ``<file>.new``: the token has the former PIN, and the change to this one is given up."""
    with trusted_directory(os.path.dirname(os.path.normpath(path))) as folder:
        try:
            os.unlink(coming_path(os.path.basename(path)), dir_fd=folder)
            os.fsync(folder)
        except OSError as exc:
            raise os_error(exc, path) from None


def leftovers(path: str) -> list[str]:
    """Temporary files with a PIN in them that a killed run left."""
    return leftovers_of(path) + leftovers_of(coming_path(path))


def remove_leftovers(path: str) -> None:
    """Remove them."""
    remove_leftovers_of(path)
    remove_leftovers_of(coming_path(path))


def _owner(path: str) -> os.stat_result | None:
    """The file itself, in a folder that nobody but root and this user could have put it into; None if there is none."""
    with trusted_directory(os.path.dirname(os.path.normpath(path))) as folder:
        try:
            return os.stat(os.path.basename(path), dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None


def _read(path: str, of_anybody: bool) -> Secret | None:
    try:
        info = _owner(path) if of_anybody else None
        owners = None if info is None else (os.geteuid(), info.st_uid)
        raw = read_private(path, owners=owners, max_bytes=_MAX_BYTES)
    except TdeError as exc:
        if exc.code == "file_absent" and os.path.isdir(os.path.dirname(os.path.normpath(path))):
            return None
        raise
    pin = raw[:-1] if raw.endswith(b"\n") else raw
    if not pin or b"\n" in pin or b"\0" in pin:
        raise TdeError(
            "pin_file_damaged",
            "is empty or holds more than one line",
            obj=f"PIN file {path}",
            kept="No PIN was tried.",
            next_step="Write the PIN into it, one line, mode 0600.",
        )
    return Secret(pin)
