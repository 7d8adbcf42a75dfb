#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The promise of the README, tried: a fresh Debian 12 with nothing but git, make and certificates, a clone, `make`.

Runs in a container with this machine's network, apt sources and pip settings, on the last commit. Without
arguments: `make demo` twice, the second of which must change nothing, then `make test`.

    fresh.py [COMMAND...]        other commands, each one argument, run in the clone one after the other
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

import machine

PACKAGES = ("ca-certificates", "git", "make")
COMMANDS = ("make demo", "make demo", "make test")

#: Of this machine's environment, what says how packages are reached.
_ENVIRONMENT = re.compile(r"(?i:https?_proxy|no_proxy)|PIP_(INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST|CERT|PROXY|DEFAULT_TIMEOUT)")

_NAME = "tdefresh"

_CLONE = """
set -euo pipefail
update-ca-certificates >/dev/null 2>&1
cd /root
git -c advice.detachedHead=false clone --quiet hsm.tde.bundle hsm.tde
cd hsm.tde
"""


def registries(root: pathlib.Path, suite: str = machine.SUITE) -> None:
    """Let a tree of a release reach the package registries as this machine does."""
    machine.write(root / "etc/apt/sources.list", machine.sources(suite))
    machine.write(root / "etc/apt/apt.conf.d/99machine", machine.apt_options())
    certificates = pathlib.Path("/usr/local/share/ca-certificates")
    if certificates.is_dir():
        shutil.copytree(certificates, root / certificates.relative_to("/"), dirs_exist_ok=True)
    for settings, name in (
        (pathlib.Path("/etc/pip.conf"), "etc/pip.conf"),
        (pathlib.Path.home() / ".config/pip", "root/.config/pip"),
    ):
        if settings.is_dir():
            shutil.copytree(settings, root / name, dirs_exist_ok=True)
        elif settings.exists():
            shutil.copy(settings, root / name)


def environment() -> list[str]:
    """The options of systemd-nspawn that say in a container how packages are reached."""
    return [f"--setenv={key}={value}" for key, value in os.environ.items() if _ENVIRONMENT.fullmatch(key)]


def script(commands: list[str]) -> str:
    """What runs inside: the clone, then each command with its time; the second of two equal demos must change nothing."""
    lines = [_CLONE]
    for number, command in enumerate(commands):
        lines.append(f"echo '== '{shlex.quote(command)}; SECONDS=0")
        if command == "make demo" and command in commands[:number]:
            lines.append(
                f"{command} | tee /tmp/second; grep -q 'changed=0 ' /tmp/second || {{ echo '== it changed something'; exit 1; }}"
            )
        else:
            lines.append(command)
        lines.append(f"echo '== '{shlex.quote(command)}: $SECONDS s")
    return "\n".join(lines)


def main() -> int:
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        print(__doc__)
        return 2
    # Ended by a time limit, it cleans up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine.require()
    lower = machine.build(PACKAGES)
    name = f"{_NAME}{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=machine.CACHE, prefix="fresh-") as scratch:
        root = machine.mount_disk(pathlib.Path(scratch), lower)
        try:
            registries(root)
            machine.write(root / "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {_NAME}\n")
            repository = pathlib.Path(__file__).resolve().parents[2]
            bundle = ["git", "-C", str(repository), "bundle", "create", "--quiet", str(root / "root/hsm.tde.bundle"), "HEAD"]
            subprocess.run(bundle, check=True)
            command = [
                "systemd-nspawn",
                "--quiet",
                "--register=no",
                "--keep-unit",
                "--as-pid2",
                f"--directory={root}",
                f"--machine={_NAME}",
                "--console=pipe",
                "--resolv-conf=copy-host",
                "--timezone=off",
                "--link-journal=no",
                *machine.loop_binds(),
                *environment(),
                "bash",
                "-c",
                script(sys.argv[1:] or list(COMMANDS)),
            ]
            # As on a host without a container around it, /tmp lies on the disk.
            settings = {**os.environ, "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
            return subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, env=settings, preexec_fn=lambda: machine.enter_cgroup(name)
            ).returncode
        finally:
            machine.remove_cgroup(name)
            machine.unmount(root)


if __name__ == "__main__":
    machine.run(main, "a fresh Debian needs")
