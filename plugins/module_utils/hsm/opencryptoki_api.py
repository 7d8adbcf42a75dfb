# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What openCryptoki's library answers: about this host, or about a configuration that is only being considered.

:func:`try_out` starts a daemon of its own in name spaces of its own, on copies of the configuration and empty folders: the
daemon that serves the host, its tokens and its shared memory are neither seen nor touched. What it answers is what the host's
daemon would say after a restart, before the file is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import grp
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import time
import typing as t

from ..common.errors import TdeError
from ..pkcs11 import opencryptoki as base
from ..pkcs11.cryptoki import CkError
from ..pkcs11.errors import ckr_name
from ..pkcs11.library import LibraryAccess, load, text
from ..pkcs11.token import flag_words

CONF_DIR = "/etc/opencryptoki"
CONF = f"{CONF_DIR}/opencryptoki.conf"
STORE = base.STORE
#: The daemon (Debian, Red Hat, SUSE).
PROGRAM = "/usr/sbin/pkcsslotd"
#: The library, by the packages of Debian (a folder an architecture), Red Hat and SUSE.
_LIBRARIES = (
    "/usr/lib/*/opencryptoki/libopencryptoki.so.0",
    "/usr/lib64/opencryptoki/libopencryptoki.so.0",
    "/usr/lib/opencryptoki/libopencryptoki.so.0",
)

#: linux/sched.h, sys/mount.h, linux/prctl.h
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
#: What the private daemon sees empty instead of the host's.
_PRIVATE = ("/run", "/dev/shm", "/var/log", STORE, CONF_DIR)  # noqa: S108 - where the library puts its shared memory

_OK = "CKR_OK"
#: A configuration that every version takes. With no slot at all, 3.23's library does not start.
_SOUND = b"version opencryptoki-3.x\nslot 0\n{\nstdll = libpkcs11_sw.so\n}\n"

#: Seconds for a whole answer, for the daemon to read its file, and until it listens.
_ANSWER, _START, _LISTEN = 60, 20, 5


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot that the library lists. ``label`` and ``model`` are empty where no token answers.

    Newer versions list a slot whose token does not start, with CKR_TOKEN_NOT_PRESENT; 3.8 leaves it out.
    """

    description: str
    manufacturer: str
    hardware_version: str
    firmware_version: str
    label: str
    model: str
    flags: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the library says.

    :ivar version: openCryptoki's; None if the library does not start.
    :ivar slots: those in which a token answers; :ivar empty: those in which none does.
    :ivar error: why it does not: ``code``, ``message``, ``next_step``; empty if it does.
    :ivar said: what the private daemon wrote; empty for the host's.
    """

    version: tuple[int, int] | None
    slots: t.Mapping[int, Slot]
    empty: t.Mapping[int, Slot]
    error: t.Mapping[str, str]
    said: str = ""


def library_path() -> str:
    """The path of openCryptoki's library.

    :raises TdeError: ``opencryptoki_missing``.
    """
    found = [path for place in _LIBRARIES for path in sorted(glob.glob(place))]
    if not found or not os.path.exists(PROGRAM):
        missing = PROGRAM if found else "its library"
        raise TdeError("opencryptoki_missing", f"{missing} is not there", obj="openCryptoki")
    return found[0]


def ask(path: str) -> Answer:
    """What the library says on this host now, asked by a process of its own.

    :param path: of the library.
    """
    return _answer(_in_fork(lambda: _look(path)))


def try_out(path: str, files: t.Mapping[str, bytes], folders: t.Mapping[str, str]) -> Answer | None:
    """What the library would say with other configuration files, asked of a daemon of its own.

    :param files: contents by name in /etc/opencryptoki; all others there are as on the host.
    :param folders: the tokens' folders and the group that each belongs to.
    :returns: None where this process may not make name spaces (a container without CAP_SYS_ADMIN).
    """

    def act() -> dict[str, t.Any]:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID):
            return {"refused": os.strerror(ctypes.get_errno())}
        # Process 1 of the new name space: at its end the kernel ends the daemon.
        return _in_fork(lambda: _privately(libc, path, files, folders), parent_death=True)

    raw = _in_fork(act)
    return None if "refused" in raw else _answer(raw)


def try_sound(path: str) -> Answer | None:
    """What the library says with a configuration that every version takes: its version, if nothing else is in its way."""
    return try_out(path, {os.path.basename(CONF): _SOUND}, {"swtok": base.GROUP})


def _answer(raw: t.Mapping[str, t.Any]) -> Answer:
    slots = {int(number): Slot(**{**facts, "flags": tuple(facts["flags"])}) for number, facts in raw.get("slots", {}).items()}
    version = raw.get("version")
    return Answer(
        (version[0], version[1]) if version else None,
        {number: slot for number, slot in slots.items() if slot.answer == _OK},
        {number: slot for number, slot in slots.items() if slot.answer != _OK},
        raw.get("error", {}),
        raw.get("said", ""),
    )


def _in_fork(act: t.Callable[[], dict[str, t.Any]], *, parent_death: bool = False) -> dict[str, t.Any]:
    """What ``act`` gives in a child; a library and its state stay out of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            if parent_death:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                result = act()
            except TdeError as exc:
                result = {"error": {"code": exc.code, "message": exc.message, "next_step": exc.next_step}}
            except OSError as exc:
                result = {"refused": f"{exc.strerror} ({exc.filename})"}
            with os.fdopen(writer, "wb") as handle:
                handle.write(json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    raw, deadline = b"", time.monotonic() + _ANSWER
    with os.fdopen(reader, "rb", buffering=0) as handle:
        while select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = handle.read(1 << 16)
            if not piece:
                break
            raw += piece
        else:
            os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if not raw:
        message = f"the library gave no answer within {_ANSWER} seconds, or ended the process that asked it"
        return {"error": {"code": "timeout", "message": message, "next_step": "Look at the system's log."}}
    return t.cast("dict[str, t.Any]", json.loads(raw))


def _look(path: str) -> dict[str, t.Any]:
    library = load(LibraryAccess(path))
    slots = {}
    for number in library.slots(with_token=False):
        info = library.slot_info(number)
        facts: dict[str, t.Any] = {
            "description": text(info.description),
            "manufacturer": text(info.manufacturer),
            "hardware_version": f"{info.hardware_version.major}.{info.hardware_version.minor}",
            "firmware_version": f"{info.firmware_version.major}.{info.firmware_version.minor}",
            "label": "",
            "model": "",
            "flags": (),
            "answer": _OK,
        }
        try:
            token = library.token_info(number)
            facts |= {"label": text(token.label), "model": text(token.model), "flags": flag_words(token.flags)}
        except CkError as exc:
            facts["answer"] = ckr_name(exc.rv)
        slots[number] = facts
    return {"version": list(library.raw.library_version), "slots": slots}


def _privately(libc: t.Any, path: str, files: t.Mapping[str, bytes], folders: t.Mapping[str, str]) -> dict[str, t.Any]:
    """In name spaces of its own: the folders, the daemon, the question."""
    if base.members() is None:
        raise TdeError("opencryptoki_missing", f"the group {base.GROUP} does not exist", obj="openCryptoki")
    kept = _configuration()
    _mount(libc, "none", "/", None, _MS_REC | _MS_PRIVATE, None)
    places = [*_PRIVATE, *(["/var/lock"] if os.path.isdir("/var/lock") and not os.path.islink("/var/lock") else [])]
    for place in places:
        if os.path.isdir(place):
            _mount(libc, "tmpfs", place, "tmpfs", 0, "mode=0755")
    os.chmod("/dev/shm", 0o1777)  # noqa: S103, S108 - as the system has it
    group = grp.getgrnam(base.GROUP).gr_gid
    os.makedirs("/run/lock", exist_ok=True)
    for name, (content, info) in {
        **kept,
        **{name: (content, kept.get(name, (b"", None))[1]) for name, content in files.items()},
    }.items():
        target = os.path.join(CONF_DIR, name)
        with open(target, "wb") as handle:
            handle.write(content)
        if info is not None:
            os.chown(target, info.st_uid, info.st_gid)
            os.chmod(target, stat.S_IMODE(info.st_mode))
    _folder(STORE, group)
    for name, owner in folders.items():
        with contextlib.suppress(KeyError):
            gid = grp.getgrnam(owner).gr_gid
            for place in (name, f"{name}/TOK_OBJ"):
                _folder(os.path.join(STORE, place), gid)
    said, failed = _start()
    if failed:
        return {"error": {"code": "opencryptoki_daemon_failed", "message": failed, "next_step": ""}, "said": said}
    return {**_look_or_why(path), "said": said}


def _look_or_why(path: str) -> dict[str, t.Any]:
    try:
        return _look(path)
    except TdeError as exc:
        return {"error": {"code": exc.code, "message": exc.message, "next_step": exc.next_step}}


def _start() -> tuple[str, str]:
    """Start the private daemon; what it wrote, and why it does not serve (empty if it does)."""
    log = "/run/pkcsslotd.said"
    with open(log, "wb") as handle:
        daemon = subprocess.Popen([PROGRAM], stdin=subprocess.DEVNULL, stdout=handle, stderr=handle)
        try:
            code = daemon.wait(_START)
        except subprocess.TimeoutExpired:
            return "", f"it did not become a daemon within {_START} seconds"
    deadline = time.monotonic() + _LISTEN
    while not code and not any(os.path.exists(place) for place in base.SOCKETS) and time.monotonic() < deadline:
        time.sleep(0.005)
    with open(log, encoding="utf-8", errors="replace") as text_handle:
        said = text_handle.read(4000).strip()
    if code:
        return said, f"pkcsslotd ended with exit code {code}"
    return said, "" if any(os.path.exists(place) for place in base.SOCKETS) else "pkcsslotd does not listen"


def _configuration() -> dict[str, tuple[bytes, os.stat_result]]:
    """The host's configuration files by name, with their owners and modes."""
    found = {}
    for entry in os.scandir(CONF_DIR) if os.path.isdir(CONF_DIR) else ():
        if entry.is_file(follow_symlinks=True):
            with open(entry.path, "rb") as handle:
                found[entry.name] = (handle.read(), os.fstat(handle.fileno()))
    return found


def _folder(path: str, group: int) -> None:
    os.makedirs(path, exist_ok=True)
    os.chown(path, 0, group)
    os.chmod(path, 0o770)  # noqa: S103 - as openCryptoki's packages make it


def _mount(libc: t.Any, source: str, place: str, kind: str | None, flags: int, data: str | None) -> None:
    if libc.mount(source.encode(), place.encode(), kind.encode() if kind else None, flags, data.encode() if data else None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), place)


def stdll_installed(path: str, stdll: str) -> bool:
    """Whether the library of a token is on this host: where openCryptoki keeps them, or known to the dynamic linker.

    :param path: of openCryptoki's library; :param stdll: as the configuration names it.
    """
    if os.path.isabs(stdll):
        return os.path.exists(stdll)
    home = os.path.dirname(os.path.realpath(path))
    places = [os.path.join(home, "stdll"), os.path.join(os.path.dirname(path), "stdll"), home, "/usr/lib", "/usr/lib64", "/lib64"]
    if any(os.path.exists(os.path.join(place, stdll)) for place in places):
        return True
    ldconfig = shutil.which("ldconfig", path="/usr/sbin:/sbin")
    if ldconfig is None:
        return False
    known = subprocess.run([ldconfig, "-p"], check=False, capture_output=True, text=True, timeout=20).stdout
    return f"\t{stdll} (" in known
