# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Why openCryptoki's library does not start: it answers CKR_FUNCTION_FAILED for more than one reason.

Without its daemon pkcsslotd, and for a user who is not a member of the group pkcs11, every call fails alike
(3.8.1 and 3.23, usr/lib/api/api_interface.c). Which of the two it is decides what the reader does next.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import typing as t

#: openCryptoki's group and daemon (configure.ac, usr/sbin/pkcsslotd).
GROUP, DAEMON = "pkcs11", "pkcsslotd"
#: Where the tokens are kept (configure.ac, localstatedir).
STORE = "/var/lib/opencryptoki"
#: Where the daemon listens: since 3.21, and before (usr/include/slotmgr.h, PROC_SOCKET_FILE_PATH).
SOCKETS = ("/run/opencryptoki/pkcsslotd.socket", "/run/pkcsslotd.socket")


def is_opencryptoki(path: str) -> bool:
    """Whether a library is openCryptoki's, by the names that its packages give it."""
    return os.path.basename(path).startswith(("libopencryptoki.so", "PKCS11_API.so"))


def token_folders() -> list[str]:
    """The folders of the tokens that keep objects, one a token."""
    try:
        found = [entry.path for entry in os.scandir(STORE) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(path for path in found if os.path.isdir(os.path.join(path, "TOK_OBJ")))


def daemons() -> list[int]:
    """The process ids of the daemons that serve this host, lowest first.

    Daemons of containers are not among them: clients and daemon count their sessions in System V shared memory, so one of
    another IPC name space serves nobody here. Who is not root cannot see that, and is shown all.
    """
    own = _ipc("self")
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as handle:
            head, dummy, rest = handle.read().rpartition(") ")
            # Z: ended, and its parent has not asked yet.
            if head.endswith(f"({DAEMON}") and not rest.startswith("Z") and _ipc(name) in (own, None):
                found.append(int(name))
    return sorted(found)


def _ipc(process: str) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/ipc")
    except OSError:
        return None


def members() -> list[str] | None:
    """The users that the group's entry names; None if there is no such group.

    openCryptoki looks them up by name: that pkcs11 is somebody's primary group does not count.
    """
    try:
        return list(grp.getgrnam(GROUP).gr_mem)
    except KeyError:
        return None


class Reason(t.NamedTuple):
    """Why the library does not start: an error code, the fact in a clause, and what to do."""

    code: str
    message: str
    next_step: str


def why_not_started() -> Reason | None:
    """Why, as far as this process can see; None if daemon and group are as they should be."""
    named = members()
    if named is None:
        return Reason("opencryptoki_missing", f"the group {GROUP} does not exist", "Install openCryptoki, or install it anew.")
    if os.geteuid() != 0:
        user = _user()
        if user not in named:
            return Reason(
                "opencryptoki_user_outside_group",
                f"the user {user} is not a member of the group {GROUP}",
                f"Make {user} a member of {GROUP} (the role hsm.tde.opencryptoki does, opencryptoki_users), then start its programs anew.",
            )
        if grp.getgrnam(GROUP).gr_gid not in (os.getegid(), *os.getgroups()):
            return Reason(
                "opencryptoki_user_outside_group",
                f"the user {user} became a member of the group {GROUP} after this program was started",
                "Start the program anew: a process keeps the groups that it was started with.",
            )
    if not daemons():
        return Reason(
            "opencryptoki_daemon_down",
            f"its daemon {DAEMON} does not run",
            "Start it (hsm.tde.opencryptoki_daemon, or systemctl start pkcsslotd).",
        )
    return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"with the id {os.geteuid()}"
