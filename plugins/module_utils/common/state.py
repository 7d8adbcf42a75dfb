# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The root-only folder in which a host remembers what must exist and what was done.

========================  ==========================================================
``registry.json``         tokens and keys that were created or used (pkcs11/registry.py)
``refused.json``          salted fingerprints of refused PINs (pkcs11/refused.py)
``trying.json``           the one of two PINs that is tried first (pkcs11/trying.py)
``journal.jsonl``         every act on a key, hash-chained (common/journal.py)
``clusters/<name>.json``  a cluster's engine, places and token access, for the next boot
``store/<name>/``         a cluster's wrapped data keys (keystore/store.py)
``lock``                  one run at a time
========================  ==========================================================

What a database asks a command for runs as the database's own user, in a state directory of that user's. It lies beside root's:

==================================  ================================================
``<state>.users/clusters/<n>.json``  a cluster's record, root's own and readable: which library, token and PIN source
``<state>.users/state/<user>/``      as above, the user's own, 0700; root never reads it
==================================  ================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import typing as t

from .errors import TdeError
from .files import leftovers_of, lock, make_private_directory, read_private, remove_leftovers, remove_leftovers_of, write_atomic

DEFAULT_PATH = "/var/lib/hsm-tde"

#: Names of clusters and data keys: they become file names, so nothing that a path would read.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_name(kind: str, name: str) -> str:
    """A cluster's or data key's name, if it may become a file name.

    :raises TdeError: ``invalid_option``.
    """
    if not NAME.fullmatch(name):
        raise TdeError(
            "invalid_option", "must be 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit", obj=f"{kind} {name!r}"
        )
    return name


class StateDirectory:
    """Paths inside the state directory, and its lock. Making the object touches nothing.

    :param path: absolute path; root-owned, as are its parents.
    """

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        if not os.path.isabs(path):
            raise TdeError("invalid_option", "must be an absolute path", obj=f"state_directory {path!r}")
        self.path = os.path.normpath(path)

    @property
    def registry(self) -> str:
        return os.path.join(self.path, "registry.json")

    @property
    def refused(self) -> str:
        return os.path.join(self.path, "refused.json")

    @property
    def trying(self) -> str:
        return os.path.join(self.path, "trying.json")

    @property
    def journal(self) -> str:
        return os.path.join(self.path, "journal.jsonl")

    def store(self, cluster: str) -> str:
        """The folder of a cluster's wrapped data keys."""
        return os.path.join(self.path, "store", check_name("cluster", cluster))

    def cluster_record(self, cluster: str) -> str:
        """The file with a cluster's engine, places and token access (never a secret)."""
        return os.path.join(self.path, "clusters", check_name("cluster", cluster) + ".json")

    @property
    def users(self) -> str:
        """The folder with all that the databases' own users work with; root's own, readable for all."""
        return self.path + ".users"

    def published_record(self, cluster: str) -> str:
        """The copy of a cluster's record that the database's user reads and cannot write."""
        return os.path.join(self.users, "clusters", check_name("cluster", cluster) + ".json")

    def of_user(self, user: str) -> StateDirectory:
        """The state directory of a database's own user."""
        return StateDirectory(os.path.join(self.users, "state", check_name("user", user)))

    def create(self) -> bool:
        """Create the folder if it is missing; :returns: whether it was."""
        return make_private_directory(self.path)

    def exists(self) -> bool:
        return os.path.isdir(self.path)

    @contextlib.contextmanager
    def locked(self, wait_seconds: float = 0.0) -> t.Iterator[None]:
        """One run at a time on this state directory; creates it first.

        :raises TdeError: ``busy``.
        """
        self.create()
        with lock(os.path.join(self.path, "lock"), wait_seconds):
            self._tidy()
            yield

    def _tidy(self) -> None:
        """Remove what killed runs left of files that this one may have no reason to write."""
        left = [path for path in (self.registry, self.refused, self.trying, self.journal + ".head") if leftovers_of(path)]
        for path in left:
            # A task that does not hold this lock may be writing: each file has one of its own.
            with lock(path.removesuffix(".head") + ".lock", wait_seconds=10):
                remove_leftovers_of(path)
        clusters = os.path.dirname(self.cluster_record("x"))
        if os.path.isdir(clusters):
            remove_leftovers(clusters)


def read_json(path: str, damaged_code: str, missing: t.Any = None) -> t.Any:
    """A private JSON file's content, ``missing`` if there is no such file.

    Only the file itself may be missing from an existing or missing folder; every other failure is raised.

    :param damaged_code: the error code for content that is not JSON.
    """
    try:
        raw = read_private(path)
    except TdeError as exc:
        if exc.code == "file_absent":
            return missing
        raise
    try:
        return json.loads(raw)
    except ValueError:
        raise TdeError(damaged_code, "is not valid JSON", obj=path, next_step="Restore it from a backup.") from None


def write_json(path: str, content: t.Any) -> None:
    """Write a private JSON file atomically, its folder created if missing."""
    make_private_directory(os.path.dirname(path))
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
