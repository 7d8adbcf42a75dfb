# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Put the command ``hsm-tde`` and its systemd units in place, or take them away: by content, in a plan."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import stat
import typing as t

from ..common.errors import TdeError
from ..common.files import (
    check_parents,
    make_private_directory,
    os_error,
    read_private,
    remove_leftovers_of,
    trusted_directory,
    write_atomic,
)
from ..common.plan import Plan, Step, public, run
from ..common.run import run_program
from ..common.state import check_name
from . import units, zipapp

#: Larger than the command will be; a bound on what is read before it is compared.
_MAX_BYTES = 16 << 20

_TARGET = "multi-user.target"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What ties one cluster to the boot.

    :param database_units: units that start only with an open keystore.
    :param credential: path of the encrypted PIN that systemd hands to the command, or None.
    :param enabled: False takes the ties away.
    :param after_start: the keystore is opened in the running server.
    """

    name: str
    database_units: tuple[str, ...] = ()
    credential: str | None = None
    enabled: bool = True
    after_start: bool = False


@dataclasses.dataclass(frozen=True)
class File:
    """A file or link that is there or shall be. ``link`` is a symbolic link's target, else ``data`` and ``mode`` count."""

    data: bytes = b""
    mode: int = 0o644
    link: str | None = None

    def public(self) -> str:
        """One line for a diff."""
        return (
            f"link to {self.link}"
            if self.link
            else f"mode {self.mode:04o}, {len(self.data)} bytes, SHA-256 {hashlib.sha256(self.data).hexdigest()}"
        )


Files = t.Dict[str, "File | None"]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the module was asked for; paths are plain (:data:`zipapp.PLAIN_PATH`)."""

    present: bool
    path: str
    python: str
    state_directory: str
    unit_directory: str
    with_units: bool
    clusters: tuple[Cluster, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """What is there: files by path (None: nothing), and whether systemd has older unit files in memory."""

    files: Files
    stale: bool


def units_wished(choice: str) -> tuple[bool, str]:
    """Whether units are looked after, and why.

    :param choice: ``auto``, ``always`` or ``never``.
    """
    if choice == "auto":
        return (
            (True, "systemd runs this host.")
            if units.booted()
            else (
                False,
                "systemd does not run this host: no units were written. Call 'hsm-tde open --all' before the database is started.",
            )
        )
    return choice == "always", f"units: {choice}"


def check_wish(wish: Wish) -> None:
    """Refuse what cannot stand in a shebang line or a unit.

    :raises TdeError: ``invalid_option``.
    """
    for option in ("path", "python", "state_directory", "unit_directory"):
        zipapp.plain_path(option, getattr(wish, option))
    for cluster in wish.clusters:
        check_name("cluster", cluster.name)
        for unit in cluster.database_units:
            units.check_unit(unit)
        if cluster.credential is not None:
            zipapp.plain_path("credential", cluster.credential)


def check_python(python: str) -> None:
    """Refuse an interpreter that somebody beside root could replace, the virtual environment's and the real one.

    :raises TdeError: ``file_absent``, ``file_not_private``.
    """
    check_parents(python)
    real = os.path.realpath(python)
    try:
        info = os.stat(real)
    except OSError as exc:
        error = os_error(exc, python)
        error.next_step = "Run the role hsm.tde.prerequisites first, or set python."
        raise error from None
    check_parents(real)
    if info.st_uid not in (0, os.geteuid()) or info.st_mode & 0o022:
        raise TdeError(
            "file_not_private",
            f"belongs to user id {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}: root will not run it",
            obj=real,
            next_step="Make the environment anew with the role hsm.tde.prerequisites.",
        )


def wished_files(wish: Wish, ours: t.Iterable[str]) -> Files:
    """Every path that the wish decides over, with what shall be there.

    :param ours: our unit files that are there now; those of a cluster asked for that are not wished for go.
    """
    if not wish.present:
        return {path: None for path in [wish.path, *ours]}
    wished: Files = {wish.path: File(zipapp.build(wish.python, wish.state_directory), 0o755)}
    if not wish.with_units:
        return wished
    folder = wish.unit_directory
    wished[os.path.join(folder, units.TEMPLATE)] = File(units.template(wish.path, wish.state_directory).encode())
    for cluster in wish.clusters:
        wished.update({path: None for path in ours if _ties(cluster.name, folder, path)})
        if not cluster.enabled:
            continue
        text = units.instance(cluster.database_units, cluster.credential, cluster.after_start)
        if text is not None:
            wished[_instance_path(cluster.name, folder)] = File(text.encode())
        for unit in cluster.database_units:
            wished[os.path.join(folder, f"{unit}.d", f"hsm-tde-{cluster.name}.conf")] = File(
                units.database(cluster.name, cluster.after_start).encode()
            )
        if not cluster.database_units:
            wished[_enabled_path(cluster.name, folder)] = File(link=os.path.join(folder, units.TEMPLATE))
    return wished


def _instance_path(cluster: str, folder: str) -> str:
    return os.path.join(folder, f"hsm-tde@{cluster}.service.d", "hsm-tde.conf")


def _enabled_path(cluster: str, folder: str) -> str:
    return os.path.join(folder, f"{_TARGET}.wants", f"hsm-tde@{cluster}.service")


def _ties(cluster: str, folder: str, path: str) -> bool:
    """Whether a path is one of those that tie this cluster to the boot."""
    return (
        path in (_instance_path(cluster, folder), _enabled_path(cluster, folder))
        or os.path.basename(path) == f"hsm-tde-{cluster}.conf"
    )


def _our_units(folder: str) -> list[str]:
    """Our unit files that are there, by name and mark."""
    escaped = glob.escape(folder)
    patterns = (
        units.TEMPLATE,
        "hsm-tde@*.service.d/hsm-tde.conf",
        "*.service.d/hsm-tde-*.conf",
        f"{_TARGET}.wants/hsm-tde@*.service",
    )
    there = {path: _read(path) for pattern in patterns for path in glob.glob(f"{escaped}/{pattern}")}
    return sorted(path for path, file in there.items() if file and _is_ours(file))


def _read(path: str) -> File | None:
    """What is at a path of ours; a link only where we make one.

    :raises TdeError: ``file_not_private`` for anything that somebody beside root could have put there.
    """
    if os.path.dirname(path).endswith(f"{_TARGET}.wants"):
        return File(link=os.readlink(path)) if os.path.islink(path) else None
    if not os.path.lexists(path):
        return None
    data = read_private(path, forbidden_mode=0o022, max_bytes=_MAX_BYTES)
    return File(data, stat.S_IMODE(os.lstat(path).st_mode))


def _is_ours(file: File) -> bool:
    if file.link is not None:
        return os.path.basename(file.link) == units.TEMPLATE
    return file.data.startswith(units.MARK.encode()) or zipapp.is_command(file.data)


def inspect(wish: Wish) -> tuple[Found, Files]:
    """What is there and what shall be there, by path.

    :raises TdeError: ``file_foreign`` where something stands that is not ours, ``file_not_private``.
    """
    ours = _our_units(wish.unit_directory) if wish.with_units else []
    wished = wished_files(wish, ours)
    files = {path: _read(path) for path in wished}
    for path, file in files.items():
        if file and not _is_ours(file):
            raise TdeError(
                "file_foreign", "was not written by this module", obj=path, next_step="Move it away, or choose another path."
            )
    return Found(files, wish.with_units and units.booted() and _stale(wish)), wished


def _stale(wish: Wish) -> bool:
    """Whether systemd holds a unit of the clusters in an older state than its files: a run ended before its reload."""
    names = [name for cluster in wish.clusters for name in (f"hsm-tde@{cluster.name}.service", *cluster.database_units)]
    if not names:
        return False
    shown = run_program(["systemctl", "show", "--property=NeedDaemonReload", "--value", *names], timeout=30)
    return b"yes" in shown.stdout.split()


def decide(wish: Wish, found: Found, wished: Files, *, reload: bool) -> Plan:
    """The steps from what is there to what shall be.

    :param reload: whether systemd runs and must read changed units.
    """
    plan: Plan = []
    for path in sorted(wished):
        before, after = found.files[path], wished[path]
        if before == after:
            continue
        if after is None:
            plan.append(Step("remove_file", path, "not wished for", {"path": path}))
        else:
            plan.append(Step("write_file", path, "missing" if before is None else "different", {"path": path}))
    if reload and (found.stale or any(step.obj != wish.path for step in plan)):
        plan.append(Step("reload_systemd", "systemd", "its unit files changed"))
    return plan


def carry_out(plan: Plan, wished: Files) -> None:
    """Write and remove the files of a plan."""

    def write(step: Step) -> None:
        path = step.data["path"]
        file = t.cast("File", wished[path])
        make_private_directory(os.path.dirname(path), 0o755)
        if file.link is None:
            remove_leftovers_of(path)
            write_atomic(path, file.data, mode=file.mode, uid=0 if os.geteuid() == 0 else -1, gid=0 if os.geteuid() == 0 else -1)
        else:
            with trusted_directory(os.path.dirname(path)) as folder:
                if os.path.lexists(path):
                    os.unlink(os.path.basename(path), dir_fd=folder)
                os.symlink(file.link, os.path.basename(path), dir_fd=folder)

    def remove(step: Step) -> None:
        path = step.data["path"]
        with trusted_directory(os.path.dirname(path)) as folder:
            os.unlink(os.path.basename(path), dir_fd=folder)
            os.fsync(folder)
        if os.path.dirname(path).endswith(".service.d") and not os.listdir(os.path.dirname(path)):
            os.rmdir(os.path.dirname(path))

    def reload_systemd(step: Step) -> None:
        run_program(["systemctl", "daemon-reload"], timeout=90)

    run(plan, {"write_file": write, "remove_file": remove, "reload_systemd": reload_systemd})


def _public(files: t.Mapping[str, File | None]) -> dict[str, str]:
    return {path: file.public() if file else "absent" for path, file in sorted(files.items())}


def ensure(wish: Wish, *, check: bool) -> dict[str, t.Any]:
    """Bring command and units to the wish.

    :param check: only decide.
    :returns: ``changed``, ``command``, ``plan``, ``diff`` and, for a command wished for, its ``sha256``.
    """
    check_wish(wish)
    if wish.present and not check:
        check_python(wish.python)
    found, wished = inspect(wish)
    plan = decide(wish, found, wished, reload=wish.with_units and units.booted())
    if not check:
        carry_out(plan, wished)
    result: dict[str, t.Any] = {
        "changed": bool(plan),
        "command": wish.path,
        "plan": public(plan),
        "diff": {"before": _public(found.files), "after": _public(wished)},
    }
    command = wished[wish.path]
    if command:
        result["sha256"] = hashlib.sha256(command.data).hexdigest()
    return result
