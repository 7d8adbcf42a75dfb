# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the tests' containers need of this machine: Debian's trees, overlays, control groups, loop devices.

A tree is built from the mirror that apt uses, once for a list of packages, and kept under :data:`CACHE`; every
container is an overlay on it, so that what runs inside leaves the tree as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import typing as t

#: Debian 12, which the tests run on for the most part.
SUITE = "bookworm"
CACHE = pathlib.Path("/var/cache/hsm-tde-hosts")

#: Exit code of a script that ran nothing because the machine cannot, as Automake's tests use it.
SKIPPED = 77

#: Programs, and Debian's packages that hold them.
PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "mount": "mount",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "nsenter": "util-linux",
    "git": "git",
}

#: Free loop devices that a container finds: it sees none that is made later, and shares them with the machine.
FREE_LOOP_DEVICES = 16

#: What a disk may grow to; it is a sparse file.
DISK_BYTES = 40 << 30

#: linux/loop.h
_LOOP_CTL_ADD, _LOOP_CLR_FD, _LOOP_GET_STATUS64 = 0x4C80, 0x4C01, 0x4C05
_LOOP_INFO_BYTES = 232

_DPKG_OPTIONS = (
    "force-unsafe-io",
    *(f"path-exclude=/usr/share/{folder}/*" for folder in ("man", "doc", "info", "locale", "lintian")),
    "path-include=/usr/share/doc/*/copyright",
)


class LacksError(Exception):
    """What this machine lacks to run hosts of its own."""

    def __init__(self, lacks: list[str]) -> None:
        super().__init__("; ".join(lacks))


def run(main: t.Callable[[], int], what: str) -> t.NoReturn:
    """Run a program, and end; SKIPPED where this machine lacks something.

    :param what: who needs it, and "needs".
    """
    try:
        sys.exit(main())
    except LacksError as exc:
        print(f"SKIPPED: this machine has not what {what}: {exc}", file=sys.stderr)
        sys.exit(SKIPPED)


def require() -> None:
    """Install missing programs, and try what cannot be installed.

    :raises LacksError: what is missing.
    """
    if os.geteuid() != 0:
        raise LacksError(["root"])
    missing = {package for program, package in PROGRAMS.items() if not shutil.which(program)}
    if missing and shutil.which("apt-get"):
        print(f"Installing: {' '.join(sorted(missing))}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *sorted(missing)]
        subprocess.run(install, check=True, env=environment, stdout=subprocess.DEVNULL)
    lacks = [f"the program {program}" for program in PROGRAMS if not shutil.which(program)]
    if lacks:
        raise LacksError(lacks)
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    lacks = []
    if not cgroup_roots():
        lacks.append("a writable cgroup file system under /sys/fs/cgroup")
    if not os.path.exists("/sys/fs/ext4/features/encryption"):
        lacks.append("ext4 with encryption in the kernel")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        lower = pathlib.Path(scratch, "lower")
        lower.mkdir()
        try:
            unmount(mount(pathlib.Path(scratch), lower))
        except (OSError, subprocess.CalledProcessError):
            lacks.append(f"overlayfs on the file system of {CACHE}")
    try:
        loop_devices()
    except OSError as exc:
        lacks.append(f"loop devices (/dev/loop-control: {exc.strerror})")
    if lacks:
        raise LacksError(lacks)


def cgroup_roots() -> list[pathlib.Path]:
    """Where groups of processes are made: the one hierarchy of cgroup 2, or the two that systemd uses beside version 1."""
    base = pathlib.Path("/sys/fs/cgroup")
    return [path for path in (base, base / "systemd", base / "unified") if os.access(path / "cgroup.procs", os.W_OK)]


def enter_cgroup(name: str) -> None:
    """Put this process, and all that it starts, into control groups of their own: systemd-nspawn makes its own below."""
    for root in cgroup_roots():
        (root / name).mkdir(exist_ok=True)
        (root / name / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def cgroup_processes(name: str) -> set[int]:
    """Who runs in the control groups of that name and below."""
    found: set[int] = set()
    for root in cgroup_roots():
        for folder, dummy_folders, dummy_files in os.walk(root / name):
            try:
                found.update(int(line) for line in pathlib.Path(folder, "cgroup.procs").read_text(encoding="ascii").split())
            except OSError:  # the group went meanwhile
                continue
    return found


def remove_cgroup(name: str) -> None:
    """End who still runs in the control groups of that name, and take them away."""
    end = time.monotonic() + 30
    while processes := cgroup_processes(name):
        if time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(processes)} do not end")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    for root in cgroup_roots():
        for folder, dummy_folders, dummy_files in os.walk(root / name, topdown=False):
            os.rmdir(folder)


def loop_devices() -> list[str]:
    """The nodes of loop devices to be bound into a container; makes those that are missing.

    The kernel hands out the free one with the lowest number: so all in use, and some more.
    """
    used = [int(path.parent.parent.name[4:]) for path in pathlib.Path("/sys/block").glob("loop*/loop/backing_file")]
    nodes = [f"/dev/loop{number}" for number in range(max(used, default=-1) + 1 + FREE_LOOP_DEVICES)]
    with open("/dev/loop-control", "rb") as control:
        for number, node in enumerate(nodes):
            if not os.path.exists(node):
                try:
                    fcntl.ioctl(control, _LOOP_CTL_ADD, number)
                except FileExistsError:  # the device is there, its node is not: udev's or a container's affair
                    os.mknod(node, 0o660 | stat.S_IFBLK, os.makedev(7, number))
    return nodes


def loop_binds() -> list[str]:
    """The options of systemd-nspawn that give a container the machine's loop devices."""
    return ["--bind=/dev/loop-control", *(f"--bind={node}" for node in loop_devices())]


def detach_loops(root: pathlib.Path) -> None:
    """Detach the loop devices whose file lies in a tree that nothing runs in any more, as a machine's end would.

    The device number of the file's file system tells whose they are: an overlay has one of its own.
    """
    device = os.stat(root).st_dev
    for node in sorted(pathlib.Path("/dev").glob("loop[0-9]*")):
        info = bytearray(_LOOP_INFO_BYTES)
        try:
            with open(node, "rb") as handle:
                fcntl.ioctl(handle, _LOOP_GET_STATUS64, info)
                if int.from_bytes(info[:8], sys.byteorder) == device:
                    fcntl.ioctl(handle, _LOOP_CLR_FD, 0)
        except OSError:  # not attached
            continue


def mount(directory: pathlib.Path, lower: pathlib.Path) -> pathlib.Path:
    """An overlay on a tree: what is written lands in ``directory/upper``. Mounted already, it is left alone.

    :returns: its root, ``directory/root``.
    """
    root, upper, work = (directory / name for name in ("root", "upper", "work"))
    for path in (root, upper, work):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not os.path.ismount(root):
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "hsm-tde", root], check=True, capture_output=True)
    return root


def mount_disk(directory: pathlib.Path, lower: pathlib.Path) -> pathlib.Path:
    """A copy of a tree on an ext4 of its own, as Debian's installer makes it: what looks at the disk finds one.

    :returns: its root, ``directory/root``.
    """
    root, disk = directory / "root", directory / "disk.img"
    root.mkdir(mode=0o755)
    with open(disk, "wb") as handle:
        handle.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-d", lower, disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, root], check=True)
    return root


def unmount(root: pathlib.Path) -> None:
    """Take an overlay or disk away, with the loop devices on its files."""
    if os.path.ismount(root):
        detach_loops(root)
        subprocess.run(["umount", "--recursive", root], check=True)


def sources(suite: str = SUITE) -> str:
    """Lines of sources.list for Debian's own archives of a release, at the mirrors that apt uses."""
    ask = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Origin: Debian", "Created-By: Packages"]
    targets = sorted(set(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.splitlines()))
    lines = []
    for target in targets:
        label, uri = target.split()
        archive = f"{suite}-security" if label == "Debian-Security" else suite
        lines.append(f"deb {uri} {archive} main\n")
    if not any(f" {suite} " in line for line in lines):
        raise LacksError(["Debian's archive in apt's sources, and its lists (apt-get update)"])
    return "".join(lines)


def apt_options() -> str:
    """How apt downloads on this machine: proxies, certificates, checks. Not for a tree that is kept."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return "".join(f"{line}\n" for line in dump.splitlines() if re.match(r"Acquire::(?!IndexTargets|cdrom|Languages)", line))


def write(path: pathlib.Path, text: str, mode: int = 0o644) -> None:
    """A file of root's in a tree, whatever was there."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as handle:
        os.fchmod(handle.fileno(), mode)
        handle.write(text)


def build(packages: t.Sequence[str], suite: str = SUITE) -> pathlib.Path:
    """A tree with Debian's smallest set and these packages.

    :param suite: the release's code name.
    :returns: its folder, which nobody changes.
    """
    wish = "\n".join([suite, *_DPKG_OPTIONS, *sorted(packages)])
    tree = CACHE / f"{suite}-{hashlib.sha256(wish.encode()).hexdigest()[:16]}"
    with open(CACHE / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.exists():
            return tree
        print(f"Building {tree} once, of {len(packages)} packages", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="new-") as scratch:
            options = pathlib.Path(scratch, "apt.conf")
            options.write_text(apt_options(), encoding="utf-8")
            new = pathlib.Path(scratch, "tree")
            subprocess.run(
                [
                    "mmdebstrap",
                    "--quiet",
                    "--mode=root",
                    "--variant=minbase",
                    f"--include={','.join(sorted(packages))}",
                    f"--aptopt={options}",
                    *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
                    "--customize-hook=rm $1/etc/apt/apt.conf.d/99mmdebstrap $1/etc/apt/sources.list",
                    suite,
                    str(new),
                    "-",
                ],
                check=True,
                input=sources(suite),
                text=True,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
            new.rename(tree)
    return tree
