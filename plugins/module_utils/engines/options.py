# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What every engine does with its dictionary of a task."""

from __future__ import annotations

import os
import pwd
import typing as t

from ..common.errors import TdeError


def with_recorded(given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """The options that a task gives; what it leaves out is taken from the cluster's record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    """
    return {**recorded, **{name: value for name, value in given.items() if value is not None}}


def absolute_path(name: str, value: t.Any) -> str | None:
    """A path in its plain form.

    :raises TdeError: ``invalid_option``.
    """
    if value is None:
        return None
    if not os.path.isabs(value):
        raise TdeError("invalid_option", "must be an absolute path", obj=f"{name} {value!r}")
    return os.path.normpath(str(value))


class OfServer:
    """Options of an engine whose server runs on this host as a user of its own."""

    os_user: str

    def account(self) -> pwd.struct_passwd:
        """The operating system's user of the server.

        :raises TdeError: ``os_user_absent``, ``invalid_option``.
        """
        try:
            found = pwd.getpwnam(self.os_user)
        except KeyError:
            raise TdeError("os_user_absent", "does not exist on this host", obj=f"user {self.os_user}") from None
        if found.pw_uid == 0:
            raise TdeError("invalid_option", "must not be root", obj=f"os_user {self.os_user}")
        return found
