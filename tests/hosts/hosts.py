#!/usr/bin/env python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Hosts for tests: Debian with its own systemd, PostgreSQL and SoftHSM, in containers that reboot and lose power.

Each host is a systemd-nspawn container on an overlay, with a network name space of its own; the hosts of one
directory share a bridge, which lies in a name space too: nothing of this machine's network is touched, and the
hosts reach nothing outside. ssh comes in through a descriptor opened inside that name space.

    hosts.py --directory DIR up NAME...     make and start hosts; writes DIR/inventory.json and DIR/ssh_config
                                            [--suite trixie] Debian 13, [--packages A,B] more packages; a host keeps both
    hosts.py --directory DIR status         one line a host
    hosts.py --directory DIR reboot NAME    an orderly reboot
    hosts.py --directory DIR kill NAME      the power goes (`up` brings it back)
    hosts.py --directory DIR down           end and remove them all
    hosts.py check                          say what this machine lacks
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing as t
import uuid

import machine

PACKAGES = (
    "dbus",
    "e2fsprogs",
    "iproute2",
    "libpq5",
    "openssh-server",
    "procps",
    "python3",
    "python3-venv",
    "softhsm2",
    "sudo",
    "systemd",
    "systemd-sysv",
)

#: Debian's releases, and the PostgreSQL of each.
SUITES = {"bookworm": "postgresql-15", "trixie": "postgresql-17"}

#: The user that Ansible logs in as; it becomes root by sudo, as on most estates.
USER = "admin"

#: Seconds for a host to boot and answer, and to end.
BOOT, END = 90, 60

#: systemd-nspawn(1), "Exit status": the container asked for a reboot.
_REBOOT = 133

#: systemd(1), "Signals": SIGRTMIN+5 starts reboot.target.
_SIGNAL_REBOOT = signal.SIGRTMIN + 5


def run(*arguments: str | pathlib.Path, **options: t.Any) -> subprocess.CompletedProcess[str]:
    """A program that must succeed."""
    return subprocess.run([str(argument) for argument in arguments], check=True, text=True, **options)


def wait(what: str, done: t.Callable[[], bool], seconds: float) -> None:
    """Look until something is done.

    :raises TimeoutError:
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


class Group:
    """The hosts of one directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory.absolute()
        # Short: an interface's name has at most 15 characters.
        self.name = "tde" + hashlib.sha256(str(self.directory).encode()).hexdigest()[:5]
        self.ssh_config = self.directory / "ssh_config"

    def hosts(self) -> list[Host]:
        return [Host(self, path.parent.name) for path in sorted(self.directory.glob("*/address"))]

    def up(self, names: t.Sequence[str], suite: str, packages: t.Sequence[str]) -> None:
        """Make and start hosts.

        :param suite: of hosts that are new; :param packages: that they have beside :data:`PACKAGES`.
        """
        new = any(not Host(self, name).tree_file.exists() for name in names)
        lower = machine.build((*PACKAGES, SUITES[suite], *packages), suite) if new else None
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key in ("login", "host"):
            path = self.directory / f"{key}_ed25519"
            if not path.exists():
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", path)
        self._bridge()
        for name in names:
            host = Host(self, name)
            if not host.address_file.exists():
                host.path.mkdir(mode=0o700, exist_ok=True)
                host.tree_file.write_text(str(lower), encoding="utf-8")
                used = [int(other.address.rsplit(".", 1)[1]) for other in self.hosts()]
                host.address_file.write_text(f"10.77.0.{max(used, default=10) + 1}", encoding="utf-8")
        self._write_files()
        for name in names:
            Host(self, name).start()
        for name in names:
            Host(self, name).wait_until_up()

    def down(self) -> None:
        for host in self.hosts():
            host.remove()
        if self.name in namespaces():
            run("ip", "netns", "del", self.name)
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def _bridge(self) -> None:
        if self.name not in namespaces():
            run("ip", "netns", "add", self.name)
            for command in ("link add br0 type bridge", "link set br0 up", "addr add 10.77.0.1/24 dev br0"):
                run("ip", "-n", self.name, *command.split())

    def _write_files(self) -> None:
        hosts = self.hosts()
        key = (self.directory / "host_ed25519.pub").read_text(encoding="utf-8")
        known = self.directory / "known_hosts"
        known.write_text("".join(f"{host.name} {key}" for host in hosts), encoding="utf-8")
        self.ssh_config.write_text(
            "".join(
                f"Host {host.name}\n"
                f"  User {USER}\n"
                f"  ProxyCommand ip netns exec {self.name} {sys.executable} {__file__} --directory {self.directory} connect %h\n"
                "  ProxyUseFdpass yes\n"
                f"  IdentityFile {self.directory}/login_ed25519\n"
                "  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {known}\n"
                "  StrictHostKeyChecking yes\n"
                for host in hosts
            ),
            encoding="utf-8",
        )
        inventory = {
            "hsm_tde": {
                "hosts": {host.name: {} for host in hosts},
                "vars": {
                    "ansible_ssh_common_args": f"-F {self.ssh_config}",
                    # Ansible's own name for a connection that it keeps is made of the host's: another group may have one so named.
                    "ansible_control_path": f"%(directory)s/{self.name}-%%h",
                    "hosts_command": [sys.executable, __file__, "--directory", str(self.directory)],
                    "hosts_directory": str(self.directory),
                },
            }
        }
        (self.directory / "inventory.json").write_text(json.dumps(inventory, indent=2), encoding="utf-8")


class Host:
    """One host: its folder, its name space, its processes, which are those of its control group."""

    def __init__(self, group: Group, name: str) -> None:
        self.group = group
        self.name = name
        self.path = group.directory / name
        self.root = self.path / "root"
        self.address_file = self.path / "address"
        self.tree_file = self.path / "tree"
        self.namespace = f"{group.name}-{name}"

    @property
    def address(self) -> str:
        return self.address_file.read_text(encoding="utf-8")

    def processes(self) -> set[int]:
        return machine.cgroup_processes(self.namespace)

    def first_process(self) -> int | None:
        """This machine's number of the host's process 1."""
        for process in self.processes():
            try:
                status = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            except OSError:  # it has ended meanwhile
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
            if len(numbers) > 1 and numbers[-1] == "1":
                return process
        return None

    def start(self) -> None:
        """Make what is missing of it, and boot it unless it runs."""
        if self.processes():
            return
        machine.mount(self.path, pathlib.Path(self.tree_file.read_text(encoding="utf-8")))
        if self.namespace not in namespaces():
            self._network()
        self._configure()
        with open(self.path / "console", "ab") as console:
            subprocess.Popen(
                [sys.executable, __file__, "--directory", self.group.directory, "supervise", self.name],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        wait(f"{self.name}: start", lambda: self.first_process() is not None, BOOT)

    def supervise(self) -> int:
        """Run the host in control groups of its own, again after each reboot, until it ends."""
        machine.enter_cgroup(self.namespace)
        command = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            f"--directory={self.root}",
            f"--machine={self.namespace}",
            f"--hostname={self.name}",
            f"--network-namespace-path=/run/netns/{self.namespace}",
            "--console=pipe",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            *machine.loop_binds(),
        ]
        while True:
            with subprocess.Popen(command) as container:
                wait(f"{self.name}: start", lambda: self.first_process() is not None, BOOT)
                self._renumber()
            machine.detach_loops(self.root)
            if container.returncode != _REBOOT:
                return container.returncode

    def _renumber(self) -> None:
        """Give the processes of this boot other numbers than those of the last ones.

        A container's few processes get nearly the same numbers at each boot, a machine's do not. PostgreSQL takes
        a postmaster.pid that a power cut left for a server that runs, if that number is again a process of its user.
        """
        counter = self.path / "boots"
        boots = int(counter.read_text(encoding="ascii")) + 1 if counter.exists() else 1
        counter.write_text(str(boots), encoding="ascii")
        text = f"echo {boots % 15 * 2000 + 1000} > /proc/sys/kernel/ns_last_pid"
        run("nsenter", f"--target={self.first_process()}", "--pid", "sh", "-c", text)

    def wait_until_up(self) -> None:
        """Until one can log in."""
        ssh = ["ssh", "-F", str(self.group.ssh_config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", self.name, "true"]

        def answers() -> bool:
            if not self.processes():
                raise RuntimeError(f"{self.name} has ended: see {self.path}/console")
            return subprocess.run(ssh, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

        wait(f"{self.name}: ssh", answers, BOOT)

    def reboot(self) -> None:
        before = self.first_process()
        if before is None:
            raise RuntimeError(f"{self.name} does not run")
        os.kill(before, _SIGNAL_REBOOT)
        wait(f"{self.name}: reboot", lambda: self.first_process() not in (None, before), END + BOOT)
        self.wait_until_up()

    def kill(self) -> None:
        """Take the power away: nothing of the host runs on, nothing is written any more by it."""
        first = self.first_process()
        if first is not None:
            # The kernel then ends all others of the host; without process 1 systemd-nspawn and the supervisor end too.
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        wait(f"{self.name}: end", lambda: not self.processes(), END)

    def remove(self) -> None:
        machine.remove_cgroup(self.namespace)
        machine.unmount(self.root)
        if self.namespace in namespaces():
            run("ip", "netns", "del", self.namespace)
        shutil.rmtree(self.path)

    def _network(self) -> None:
        space, group, link = self.namespace, self.group.name, f"v{self.address.rsplit('.', 1)[1]}"
        run("ip", "netns", "add", space)
        run("ip", "-n", group, "link", "add", link, "type", "veth", "peer", "host0", "netns", space)
        run("ip", "-n", group, "link", "set", link, "master", "br0", "up")
        for command in ("link set lo up", "link set host0 up", f"addr add {self.address}/24 dev host0"):
            run("ip", "-n", space, *command.split())

    def _configure(self) -> None:
        """What a host has of its own, beside the machine."""
        root = self.root
        others = "".join(f"{host.address} {host.name}\n" for host in self.group.hosts() if host.name != self.name)
        # Without a line for its own name and with a name server that cannot answer, each sudo waits for seconds.
        machine.write(root / "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}")
        machine.write(root / "etc/hostname", f"{self.name}\n")
        machine.write(root / "etc/resolv.conf", "")
        if not (root / "home" / USER).exists():
            machine.write(root / "etc/machine-id", f"{uuid.uuid4().hex}\n")
            run("useradd", "--root", root, "--create-home", "--shell", "/bin/bash", USER)
            machine.write(root / "etc/sudoers.d/admin", f"{USER} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
            (root / "var/log/journal").mkdir(exist_ok=True)
        for key in (root / "etc/ssh").glob("ssh_host_*"):
            key.unlink()
        key = root / "etc/ssh/ssh_host_ed25519_key"
        machine.write(key, (self.group.directory / "host_ed25519").read_text(encoding="utf-8"), 0o600)
        folder = root / "home" / USER / ".ssh"
        machine.write(folder / "authorized_keys", (self.group.directory / "login_ed25519.pub").read_text(encoding="utf-8"))


def namespaces() -> set[str]:
    """Network name spaces by name."""
    try:
        return set(os.listdir("/run/netns"))
    except FileNotFoundError:
        return set()


def connect(address: str) -> None:
    """Hand ssh a connection to a host's ssh server, made in the name space that this process runs in."""
    with socket.create_connection((address, 22), timeout=5) as connection, socket.socket(fileno=1) as caller:
        connection.settimeout(None)
        socket.send_fds(caller, [b"\0"], [connection.fileno()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, help="where the hosts lie; one directory is one group of hosts")
    parser.add_argument("act", choices=["up", "down", "reboot", "kill", "status", "check", "supervise", "connect"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--suite", choices=sorted(SUITES), default=machine.SUITE, help="Debian's release, for new hosts")
    parser.add_argument("--packages", default="", metavar="A,B", help="more packages, for new hosts")
    options = parser.parse_intermixed_args()
    if options.act == "check":
        machine.require()
        return 0
    if options.directory is None:
        parser.error("--directory is missing")
    group = Group(options.directory)
    if options.act == "up":
        machine.require()
        group.up(options.names, options.suite, [name for name in options.packages.split(",") if name])
    elif options.act == "down":
        group.down()
    elif options.act == "status":
        for host in group.hosts():
            print(host.name, host.address, "up" if host.first_process() else "down")
    elif options.act == "supervise":
        return Host(group, options.names[0]).supervise()
    elif options.act == "connect":
        connect(Host(group, options.names[0]).address)
    else:
        for name in options.names:
            getattr(Host(group, name), options.act)()
    return 0


if __name__ == "__main__":
    machine.run(main, "the hosts need")
