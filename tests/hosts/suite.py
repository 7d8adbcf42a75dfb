#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tests of this tree on another release of Debian: its Python, its openCryptoki, its SoftHSM, in a container.

The tree is bound into the container as it is, read-only; libraries come from the package index once and are kept, as are the
programs that tests build.

    suite.py [--suite trixie] [PYTEST ARGUMENTS...]     without arguments, the tests of openCryptoki, of tokens and of the
                                                        engine fep on the stand-in built with this release's PostgreSQL
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import typing as t

import fresh
import machine

PACKAGES = (
    "ca-certificates",
    "e2fsprogs",
    "gcc",
    "libc6-dev",
    "libpq5",
    "opencryptoki",
    "opensc",
    "patchelf",
    "postgresql",
    "procps",
    "python3",
    "python3-venv",
    "softhsm2",
)
TESTS = (
    "tests/integration/test_opencryptoki.py",
    "tests/integration/test_opencryptoki_store.py",
    "tests/integration/test_opencryptoki_pins.py",
    "tests/integration/test_pkcs11_token.py",
    "tests/integration/test_pkcs11_pin.py",
    "tests/integration/test_pkcs11_library.py",
    "tests/integration/test_standin_fep.py",
    "tests/integration/test_engine_fep.py",
    "tests/integration/test_engine_fep_token.py",
)
#: Beside the libraries of the role prerequisites.
LIBRARIES = ("ansible-core>=2.19,<2.20", "hypothesis>=6.100", "pytest>=8")

#: This tree.
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
#: Where tests build programs, inside (tests/integration/fep.py).
PROGRAMS = "/var/cache/hsm-tde-tests"
_NAME = "tdesuite"

_SCRIPT = """
set -euo pipefail
update-ca-certificates >/dev/null 2>&1
if ! [ -e /opt/libraries/complete ]; then
    python3 -m venv /opt/libraries
    /opt/libraries/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement roles/prerequisites/files/requirements.txt
    /opt/libraries/bin/pip install --quiet --disable-pip-version-check "${LIBRARIES[@]}"
    touch /opt/libraries/complete
fi
export PATH=/opt/libraries/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD/.collections
exec "$@"
"""


def libraries(suite: str) -> pathlib.Path:
    """The folder in which a release's libraries are kept."""
    lock = (REPOSITORY / "roles/prerequisites/files/requirements.txt").read_bytes()
    wish = hashlib.sha256(lock + "\n".join(LIBRARIES).encode()).hexdigest()[:16]
    folder = machine.CACHE / f"{suite}-libraries-{wish}"
    folder.mkdir(mode=0o755, exist_ok=True)
    return folder


def programs(release: str) -> pathlib.Path:
    """The folder in which the programs that tests build on a release are kept (tests/integration/fep.py, TREES)."""
    folder = machine.CACHE / f"{release}-programs"
    folder.mkdir(mode=0o755, exist_ok=True)
    return folder


def inside(release: str, command: t.Sequence[str]) -> int:
    """Run a command on a release, in this tree, with the libraries' Python first on its path; its exit code."""
    lower = machine.build(PACKAGES, release)
    name = f"{_NAME}{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=machine.CACHE, prefix="suite-") as scratch:
        root = machine.mount(pathlib.Path(scratch), lower)
        try:
            fresh.registries(root, release)
            machine.write(root / "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {_NAME}\n")
            argv = [
                "systemd-nspawn",
                "--quiet",
                "--register=no",
                "--keep-unit",
                "--as-pid2",
                f"--directory={root}",
                f"--machine={name}",
                "--console=pipe",
                "--resolv-conf=copy-host",
                "--timezone=off",
                "--link-journal=no",
                f"--bind-ro={REPOSITORY}",
                f"--bind={libraries(release)}:/opt/libraries",
                f"--bind={programs(release)}:{PROGRAMS}",
                f"--chdir={REPOSITORY}",
                *machine.loop_binds(),
                *fresh.environment(),
                "bash",
                "-c",
                "LIBRARIES=(" + " ".join(f"'{library}'" for library in LIBRARIES) + ")\n" + _SCRIPT,
                "suite",
                *command,
            ]
            return subprocess.run(
                argv, check=False, stdin=subprocess.DEVNULL, preexec_fn=lambda: machine.enter_cgroup(name)
            ).returncode
        finally:
            machine.remove_cgroup(name)
            machine.unmount(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="trixie", help="Debian's release")
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine.require()
    tests = arguments or [test for test in TESTS if (REPOSITORY / test).exists()]
    return inside(options.suite, ["python", "-m", "pytest", "-p", "no:cacheprovider", "-q", *tests])


if __name__ == "__main__":
    machine.run(main, "another Debian needs")
