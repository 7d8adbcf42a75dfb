#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The scenario fep on two hosts of a release with their own systemd: the release's openCryptoki with its daemon on the one,
SoftHSM behind the plugin of tde_kms on the other, and on both the stand-in, which ENCRYPTS NOTHING, built with the release's
PostgreSQL. The scenario's own playbooks run: the walk, once more without a change, after a reboot without a change, and what it
verifies: a server's restart, a rotation, another PIN.

    fep.py [--suite trixie]
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import signal
import sys
import tempfile

import hosts
import machine
import suite

import roles

_NAMES = ("linuxone", "anywhere")
_SCENARIO = suite.REPOSITORY / "molecule/fep"
#: The scenario's folder on a host.
_HERE = "var/lib/hsm-tde-molecule-fep"
#: The libraries are there already; the hosts reach no package index.
_SKIP = "--skip-tags=prerequisites"
_VERSIONS = "dpkg-query --show --showformat=\\${Package}\\ \\${Version}\\\\n opencryptoki softhsm2"


def _wait_for_keystore(run: roles.Run, name: str) -> None:
    """Until systemd has opened it at boot."""

    def opened() -> bool:
        state = run.on(name, "systemctl show --property=ActiveState --value hsm-tde@secure.service").strip()
        if state == "failed":
            raise RuntimeError(run.on(name, "journalctl --no-pager --unit=hsm-tde@secure.service --unit=fep.service"))
        return state == "active"

    hosts.wait(f"{name}: the keystore opens at boot", opened, hosts.BOOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(hosts.SUITES), default="trixie", help="Debian's release")
    options = parser.parse_args()
    # Ended by a time limit, it cleans up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine.require()
    major = hosts.SUITES[options.suite].rpartition("-")[2]
    code = suite.inside(options.suite, ["tests/standins/fep/build", f"{suite.PROGRAMS}/fep-{major}", major])
    if code:
        return code
    with tempfile.TemporaryDirectory(dir=machine.CACHE, prefix="fep-") as scratch:
        group = hosts.Group(pathlib.Path(scratch, "hosts"))
        run = roles.Run(group, [_SCENARIO / "inventory/hosts.yml", _SCENARIO / "own/inventory.yml"])
        try:
            group.up(_NAMES, options.suite, ["opencryptoki"])
            for name in _NAMES:
                root = hosts.Host(group, name).root
                shutil.copytree(suite.libraries(options.suite), root / "opt/libraries", symlinks=True)
                shutil.copytree(suite.programs(options.suite) / f"fep-{major}", root / _HERE / "tree", symlinks=True)
            print(run.on("linuxone", _VERSIONS), flush=True)
            print(run.on("linuxone", f"/{_HERE}/tree/bin/postgres --version"), flush=True)
            run.play(_SCENARIO / "own/prepare.yml", changed=True)
            run.play(_SCENARIO / "converge.yml", _SKIP, changed=True)
            run.play(_SCENARIO / "converge.yml", _SKIP, changed=False)
            for host in group.hosts():
                host.reboot()
                _wait_for_keystore(run, host.name)
            run.play(_SCENARIO / "converge.yml", _SKIP, changed=False)
            run.play(_SCENARIO / "verify.yml")
        finally:
            group.down()
    print(f"== {options.suite}: the scenario fep passes")
    return 0


if __name__ == "__main__":
    machine.run(main, "the hosts need")
