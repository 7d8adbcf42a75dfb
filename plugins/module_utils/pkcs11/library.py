# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A PKCS#11 library in this process: judged, loaded once, with locking, safe after a fork.

python-pkcs11 gives sessions and keys; what it lacks or hides (PIN limits, C_InitToken, C_CloseAllSessions, a
login that leaks no session) goes through :mod:`.cryptoki`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import check_parents
from ..common.secret import Secret
from . import copies, opencryptoki, softhsm
from .cryptoki import CK_ULONG, CkError, FunctionList
from .errors import ckr_of

#: PKCS#11 v2.40 pkcs11t.h: flag and answer of C_Initialize, user types of C_Login.
_CKF_OS_LOCKING_OK = 0x02
_CKR_CANT_LOCK = 0x0A
_USER_TYPES = {"so": 0, "user": 1}
#: Length of a token label, padded with blanks (CK_TOKEN_INFO, C_InitToken).
LABEL_BYTES = 32
#: ELF header (elf(5)): magic, then class and data encoding; e_machine at offset 18.
_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_BYTES = 20

_BYTES = ctypes.c_char_p
_NUMBERS = ctypes.POINTER(CK_ULONG)


class LibraryAccess(t.NamedTuple):
    """Which library, and the environment that it reads its configuration from.

    :param path: absolute path of the shared library.
    :param environment: variables such as SOFTHSM2_CONF; set for the whole process before loading. Never a secret.
    """

    path: str
    environment: t.Mapping[str, str] = {}


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_ubyte), ("minor", ctypes.c_ubyte)]


class SlotInfo(ctypes.Structure):
    """CK_SLOT_INFO."""

    _fields_ = [
        ("description", ctypes.c_char * 64),
        ("manufacturer", ctypes.c_char * 32),
        ("flags", CK_ULONG),
        ("hardware_version", _Version),
        ("firmware_version", _Version),
    ]


class CkTokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO."""

    _fields_ = [
        ("label", ctypes.c_char * LABEL_BYTES),
        ("manufacturer", ctypes.c_char * 32),
        ("model", ctypes.c_char * 16),
        ("serial", ctypes.c_char * 16),
        ("flags", CK_ULONG),
        ("max_sessions", CK_ULONG),
        ("sessions", CK_ULONG),
        ("max_rw_sessions", CK_ULONG),
        ("rw_sessions", CK_ULONG),
        ("pin_max", CK_ULONG),
        ("pin_min", CK_ULONG),
        ("public_total", CK_ULONG),
        ("public_free", CK_ULONG),
        ("private_total", CK_ULONG),
        ("private_free", CK_ULONG),
        ("hardware_version", _Version),
        ("firmware_version", _Version),
        ("utc_time", ctypes.c_char * 16),
    ]


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS."""

    _fields_ = [
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", CK_ULONG),
        ("reserved", ctypes.c_void_p),
    ]


def text(raw: bytes) -> str:
    """A field of fixed width as text: padding off, what is not UTF-8 replaced."""
    return raw.split(b"\0")[0].decode("utf-8", "replace").rstrip(" ")


class Library:
    """A loaded library. Made by :func:`load` only.

    :ivar path: its real path.
    :ivar functions: its C functions.
    :ivar raw: python-pkcs11's ``lib``.
    :ivar open_slots: slots on which :func:`.token.open_session` holds a session now.
    """

    def __init__(self, path: str, environment: t.Mapping[str, str]) -> None:
        import pkcs11

        self.path = path
        self.environment = dict(environment)
        self.open_slots: set[int] = set()
        try:
            self.functions = FunctionList(path)
        except OSError as exc:
            raise TdeError("library_not_loaded", str(exc), obj=f"library {path}") from None
        except (AttributeError, CkError):
            raise TdeError("library_not_pkcs11", "has no working C_GetFunctionList", obj=f"library {path}") from None
        try:
            self.raw = pkcs11.lib(path)
            # python-pkcs11 starts the library without locking and then lets other threads run during calls.
            self.raw.finalize()
            self._initialize()
        except Exception as exc:
            ckr = ckr_of(exc)
            if ckr is None:
                raise
            raise _not_started(path, ckr) from None
        self._pid = os.getpid()

    @property
    def version(self) -> tuple[int, int]:
        """The library's own version."""
        major, minor = self.raw.library_version
        return major, minor

    def _initialize(self) -> None:
        arguments = _InitializeArgs(flags=_CKF_OS_LOCKING_OK)
        try:
            self._call("C_Initialize", (ctypes.c_void_p,), ctypes.addressof(arguments))
        except CkError as exc:
            if exc.rv != _CKR_CANT_LOCK:
                raise
            # No locks for such a library: nothing of ours calls it from two threads.
            self._call("C_Initialize", (ctypes.c_void_p,), None)

    def _call(self, name: str, types: tuple[t.Any, ...], *arguments: t.Any) -> None:
        rv = self.functions.function(name, *types)(*arguments)
        if rv:
            raise CkError(name, rv)

    def after_fork(self) -> None:
        """In a forked child: start the library anew (PKCS#11 v2.40 section 2.5.2: a child must initialise for itself)."""
        if self._pid != os.getpid():
            self.restart()
            self._pid = os.getpid()

    def restart(self) -> None:
        """Finalise and initialise: every session ends, and slots are numbered anew (SoftHSM does after C_InitToken).

        :raises CkError: what C_Initialize answered.
        """
        # Some libraries notice a fork themselves and are not initialised in the child.
        with contextlib.suppress(CkError):
            self._call("C_Finalize", (ctypes.c_void_p,), None)
        copies.mend(self.path)
        self._initialize()
        self.open_slots.clear()

    def _numbers(self, name: str, kind: t.Any, first: int) -> list[int]:
        """What a function of the kind "ask the count, then the list" answers.

        :param kind: ctypes type of its first argument; :param first: that argument.
        """
        ask = self.functions.function(name, kind, _NUMBERS, _NUMBERS)
        count = CK_ULONG(0)
        found = None
        # Twice: the first call, without a place to write to, answers the count.
        for _round in range(2):
            rv = ask(first, found, ctypes.byref(count))
            if rv:
                raise CkError(name, rv)
            if found is None:
                found = (CK_ULONG * max(count.value, 1))()
        return list(found[: count.value]) if found is not None else []

    def slots(self, with_token: bool = True) -> list[int]:
        """The ids of the slots: those with a token in them, initialised or not, or all."""
        return self._numbers("C_GetSlotList", ctypes.c_ubyte, int(with_token))

    def slot_info(self, slot_id: int) -> SlotInfo:
        info = SlotInfo()
        self._call("C_GetSlotInfo", (CK_ULONG, ctypes.c_void_p), slot_id, ctypes.addressof(info))
        return info

    def token_info(self, slot_id: int) -> CkTokenInfo:
        """The token as it is now (python-pkcs11's flags are a snapshot)."""
        info = CkTokenInfo()
        self._call("C_GetTokenInfo", (CK_ULONG, ctypes.c_void_p), slot_id, ctypes.addressof(info))
        return info

    def mechanisms(self, slot_id: int) -> list[int]:
        """The mechanisms' numbers. A listed mechanism may still not work: probe by use."""
        return sorted(set(self._numbers("C_GetMechanismList", CK_ULONG, slot_id)))

    def init_token(self, slot_id: int, so_pin: Secret, label: str) -> None:
        """Initialise the token: **destroys every object in it**.

        :raises CkError: what the token answered.
        """
        pin, padded = so_pin.reveal(), label.encode().ljust(LABEL_BYTES)
        self._call("C_InitToken", (CK_ULONG, _BYTES, CK_ULONG, _BYTES), slot_id, pin, len(pin), padded)

    def close_all_sessions(self, slot_id: int) -> None:
        """Close every session of this process on the slot, and with the last one log out."""
        self._call("C_CloseAllSessions", (CK_ULONG,), slot_id)

    def login(self, session: int, user: str, pin: Secret) -> None:
        """Log in; spends a try.

        :param session: the handle of an open session; :param user: ``user`` or ``so``.
        :raises CkError: what the token answered.
        """
        copies.keep(self.path)
        raw = pin.reveal()
        self._call("C_Login", (CK_ULONG, CK_ULONG, _BYTES, CK_ULONG), session, _USER_TYPES[user], raw, len(raw))

    def init_pin(self, session: int, pin: Secret) -> None:
        """Set the user PIN in a session of the SO.

        :raises CkError: what the token answered.
        """
        raw = pin.reveal()
        self._call("C_InitPIN", (CK_ULONG, _BYTES, CK_ULONG), session, raw, len(raw))

    def set_pin(self, session: int, old: Secret, new: Secret) -> None:
        """Change the PIN of whoever is logged in; a wrong ``old`` spends a try.

        :raises CkError: what the token answered.
        """
        before, after = old.reveal(), new.reveal()
        self._call("C_SetPIN", (CK_ULONG, _BYTES, CK_ULONG, _BYTES, CK_ULONG), session, before, len(before), after, len(after))


_loaded: dict[str, Library] = {}
#: What the libraries loaded so far were given; another value would not reach them any more.
_environment: dict[str, str] = {}


def load(access: LibraryAccess) -> Library:
    """The library, loaded at the first call and the same object after.

    :raises TdeError: ``library_absent``, ``library_unreadable``, ``library_not_trusted``,
        ``library_wrong_architecture``, ``library_not_pkcs11``, ``library_not_loaded``, ``library_not_started``,
        ``library_environment_conflict``; openCryptoki's ``opencryptoki_missing``, ``opencryptoki_daemon_down`` and
        ``opencryptoki_user_outside_group``.
    """
    path = _judged(access.path)
    known = _loaded.get(path)
    if known:
        if known.environment != dict(access.environment):
            raise _conflict(path)
        known.after_fork()
        return known
    for name, value in access.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise TdeError("invalid_option", "is not the name of an environment variable", obj=f"library_environment {name!r}")
        if _environment.get(name, value) != value:
            raise _conflict(path)
    os.environ.update(access.environment)
    copies.mend(path)
    _loaded[path] = Library(path, access.environment)
    _environment.update(access.environment)
    return _loaded[path]


def _conflict(path: str) -> TdeError:
    return TdeError(
        "library_environment_conflict",
        "this process has already loaded a library with another environment",
        obj=f"library {path}",
        next_step="Reach the two tokens in two tasks, or give both configurations in one environment.",
    )


def _judged(path: str) -> str:
    """The library's real path, if root may load it here."""
    obj = f"library {path}"
    if not os.path.isabs(path):
        raise TdeError("invalid_option", "must be an absolute path", obj=obj)
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as handle:
            info = os.fstat(handle.fileno())
            head = handle.read(_ELF_HEADER_BYTES)
        with open("/proc/self/exe", "rb") as handle:
            own = handle.read(_ELF_HEADER_BYTES)
    except PermissionError:
        raise TdeError("library_unreadable", "cannot be read by this user", obj=obj) from None
    except (FileNotFoundError, NotADirectoryError):
        raise TdeError(
            "library_absent", "does not exist", obj=obj, next_step="Install the token's software, or correct the option library."
        ) from None
    except OSError as exc:
        raise TdeError("library_not_pkcs11", os.strerror(exc.errno or 0), obj=obj) from None
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
        raise TdeError(
            "library_not_trusted",
            f"belongs to user id {info.st_uid} and has mode {stat.S_IMODE(info.st_mode):04o}",
            obj=f"library {real}",
            next_step="Only root may be able to change what root loads.",
        )
    try:
        check_parents(real)
    except TdeError as exc:
        raise TdeError("library_not_trusted", str(exc), obj=f"library {real}") from None
    if head[:4] != _ELF_MAGIC or len(head) < _ELF_HEADER_BYTES:
        raise TdeError("library_not_pkcs11", "is not a shared library", obj=obj)
    if (head[4:6], head[18:20]) != (own[4:6], own[18:20]):
        raise TdeError(
            "library_wrong_architecture",
            "was built for another processor or word size than this Python",
            obj=obj,
            next_step="Install the package of this host's architecture.",
        )
    return real


def _not_started(path: str, ckr: str) -> TdeError:
    """What a user looks at first when C_Initialize fails; the answer itself (mostly 5 or 6) does not tell."""
    code, message, next_step = "library_not_started", f"C_Initialize answered {ckr}", ""
    if opencryptoki.is_opencryptoki(path):
        reason = opencryptoki.why_not_started()
        if reason:
            code, message, next_step = reason.code, f"{message}: {reason.message}", reason.next_step
        else:
            next_step = f"The daemon {opencryptoki.DAEMON} runs and does not answer: look at the system's log."
    elif softhsm.is_softhsm(path):
        next_step = f"SoftHSM reads {softhsm.configuration()}: it must exist, and the folder of tokens that it names as well."
    else:
        next_step = "Look at the library's own configuration, service and log."
    return TdeError(code, message, obj=f"library {path}", next_step=next_step, details={"ckr": ckr})
