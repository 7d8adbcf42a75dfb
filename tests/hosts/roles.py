#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The role opencryptoki on two hosts of a release, with their own systemd: configured, a token initialised and brought to the
standby, once more without a change, after a reboot, with a second daemon that somebody started by hand, and, where the version
can, the token's folders migrated.

    roles.py [--suite trixie]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import typing as t

import hosts
import machine
import suite

_NAMES = ("db1", "db2")
_PLAYBOOK = pathlib.Path(__file__).with_name("opencryptoki.yml")
#: With the PINs of the playbook.
_MIGRATED = '{"migrated": [{"slot": 7, "pin": "13579246", "so_pin": "97531864"}]}'


class Run:
    """Playbooks against a group of hosts.

    :param inventories: of variables of theirs; a later one wins.
    """

    def __init__(self, group: hosts.Group, inventories: t.Sequence[pathlib.Path] = ()) -> None:
        self._group = group
        self._inventories = [*inventories, group.directory / "inventory.json"]

    def play(self, playbook: pathlib.Path, *arguments: str, changed: bool | None = None) -> str:
        """Run a playbook.

        :param changed: whether it must change something; None where either is right.
        """
        command = ["ansible-playbook", *(f"--inventory={path}" for path in self._inventories), str(playbook), *arguments]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=suite.REPOSITORY)
        print(done.stdout[done.stdout.rfind("PLAY RECAP") :], flush=True)
        if done.returncode:
            raise RuntimeError(f"ansible-playbook ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        counts = {int(number) for number in re.findall(r"changed=(\d+)", done.stdout)}
        if changed is not None and (counts != {0}) != changed:
            raise RuntimeError(f"changed={sorted(counts)}, and it should {'' if changed else 'not '}have changed\n{done.stdout}")
        return done.stdout

    def on(self, name: str, command: str) -> str:
        """A command as root on a host."""
        ssh = ["ssh", "-F", str(self._group.ssh_config), "-o", "BatchMode=yes", name, f"sudo sh -c '{command}'"]
        return subprocess.run(ssh, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(hosts.SUITES), default="trixie", help="Debian's release")
    options = parser.parse_args()
    # Ended by a time limit, it cleans up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine.require()
    libraries = suite.libraries(options.suite)
    if not (libraries / "complete").exists():
        suite.inside(options.suite, ["true"])
    with tempfile.TemporaryDirectory(dir=machine.CACHE, prefix="roles-") as scratch:
        group = hosts.Group(pathlib.Path(scratch, "hosts"))
        run = Run(group)
        try:
            group.up(_NAMES, options.suite, ["opencryptoki"])
            for name in _NAMES:
                shutil.copytree(libraries, hosts.Host(group, name).root / "opt/libraries", symlinks=True)
            run.play(_PLAYBOOK, changed=True)
            run.play(_PLAYBOOK, changed=False)
            run.play(_PLAYBOOK, "--check", "--diff", changed=False)
            first = run.on("db1", "pgrep -x pkcsslotd").split()
            hosts.Host(group, "db1").reboot()
            run.play(_PLAYBOOK, changed=False)
            # Somebody starts a second one by hand. Where it finds the first one's lock it ends by itself.
            run.on("db1", "/usr/sbin/pkcsslotd || true")
            two = run.on("db1", "pgrep -x pkcsslotd").split()
            run.play(_PLAYBOOK, changed=len(two) > 1)
            left = run.on("db1", "pgrep -x pkcsslotd").split()
            if run.on("db1", "ls /usr/sbin/pkcstok_migrate || true"):
                run.play(_PLAYBOOK, "-e", _MIGRATED, changed=True)
                run.play(_PLAYBOOK, "-e", _MIGRATED, changed=False)
                if "3.12" not in run.on("db2", "grep tokversion /etc/opencryptoki/opencryptoki.conf"):
                    raise RuntimeError("the slot does not say tokversion = 3.12")
            if len(first) != 1 or len(left) != 1:
                raise RuntimeError(f"daemons: {first}, then {two}, then {left}")
        finally:
            group.down()
    print(f"== {options.suite}: the role opencryptoki does what it should, with {len(two)} daemons started by hand put in order")
    return 0


if __name__ == "__main__":
    machine.run(main, "the hosts need")
