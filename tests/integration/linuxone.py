# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""docs/from-a-bare-linuxone-host.md: its blocks, and a host to run them on.

The host is this machine in name spaces of its own, its folders under layers. What no such machine has is stood in for: the
adapters are a tree mounted over /sys, the libraries of EP11 and CCA tokens are openCryptoki's soft token under their names, and
Enterprise Postgres is the stand-in that encrypts nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import typing as t
from pathlib import Path

import yaml
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import opencryptoki
from ansible_collections.hsm.tde.tests.integration import fep, support
from ansible_collections.hsm.tde.tests.unit.hsm import cryptocard_tree as tree

DOCUMENT = support.ROOT / "docs/from-a-bare-linuxone-host.md"
#: Enterprise Postgres on the page: its user, its programs, and the folder of its data.
USER, PROGRAMS, FOLDER = "fsepuser", "/opt/fsepv17server64", "/var/lib/fep"
_BLOCK = re.compile(r"^(?:`([\w/.]+)`(?:,[^\n]*)?:\n\n)?```(\w*)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
#: As openCryptoki's packages for IBM Z have it, in short.
_PACKAGED = """version opencryptoki-3.1

# See man(5) opencryptoki.conf for further information.
#
slot 3
{
stdll = libpkcs11_sw.so
}

slot 4
{
stdll = libpkcs11_ep11.so
confname = ep11tok.conf
}
"""


class Block(t.NamedTuple):
    """A block of the page. ``kind`` is ``shell`` for a command, ``sql``, or ``text`` for what is printed by the command before it; a file has a name."""

    line: int
    kind: str
    name: str
    text: str


class Page:
    """The page's blocks, those that tests claim, and those that were run.

    A test file names what it runs when it is loaded, so that a block which none names shows without running any.
    """

    def __init__(self, text: str) -> None:
        self.blocks = [
            Block(text.count("\n", 0, found.start()) + 1, found[2], found[1] or "", found[3]) for found in _BLOCK.finditer(text)
        ]
        self.text = text
        self.claimed: set[Block] = set()
        self.ran: set[Block] = set()

    def command(self, part: str) -> Block:
        """The one command that has ``part`` in it; what it prints is claimed with it."""
        (found,) = (block for block in self.blocks if block.kind == "shell" and part in f"{block.text}\n")
        self.claimed |= {found, *self.printed(found)}
        return found

    def file(self, name: str, number: int = 0) -> Block:
        """The file of that name; ``number`` tells blocks of the same name apart."""
        found = [block for block in self.blocks if block.name == name][number]
        self.claimed.add(found)
        return found

    def sql(self) -> Block:
        """The one block for psql."""
        (found,) = (block for block in self.blocks if block.kind == "sql")
        self.claimed.add(found)
        return found

    def printed(self, command: Block) -> list[Block]:
        """The blocks right behind a command that show what it prints."""
        after = self.blocks[self.blocks.index(command) + 1 :]
        return [after[0]] if after and after[0].kind == "text" else []


class LinuxOne(fep.TokenHost):
    """The host, and the folder ``play`` on the machine that Ansible runs on.

    :param home: a folder that everybody may pass through (``postgres.folder``).
    """

    def __init__(self, home: Path, page: Page) -> None:
        super().__init__(support.OpenCryptoki(home / "opencryptoki", ("swtok", "ep11tok", "ccatok")))
        self.home, self.page, self.play = home, page, home / "play"
        self.play.mkdir()
        self._there: dict[str, Block] = {}

    def __enter__(self) -> LinuxOne:
        super().__enter__()
        try:
            # Bare: the daemon is for the page to start.
            self.stop_daemon()
            self._furnish()
        except BaseException:
            super().__exit__()
            raise
        return self

    def _furnish(self) -> None:
        """What the host has that this machine has not, and the folder ``play``."""
        upper = self.home / "upper"
        self._etc(upper / "etc")
        self._usr(upper / "usr")
        (upper / "opt").mkdir()
        (upper / "opt" / Path(PROGRAMS).name).symlink_to(fep.tree())
        (upper / "var/lib/fep").mkdir(parents=True)
        (self.home / "fep").mkdir()
        (self.home / "sys").mkdir()
        (self.home / "comm").write_text("sh\n")
        mounts = [mount for name in ("etc", "usr", "opt", "var/lib") for mount in self._layer(name)]
        mounts += [
            ["--bind", f"{self.opencryptoki.home}/var", "/var/lib/opencryptoki"],
            # No layer: a proof reads blocks.
            ["--bind", f"{self.home}/fep", FOLDER],
            # Whatever starts this machine, nothing on the host is started by systemd.
            ["--bind", f"{self.home}/comm", "/proc/1/comm"],
            ["-t", "tmpfs", "tmpfs", "/sys"],
        ]
        commands = [["mount", *mount] for mount in mounts]
        commands += [
            ["useradd", "--system", "--no-create-home", USER],
            *(["install", "-d", "-o", USER, folder] for folder in (FOLDER, f"{FOLDER}/tablespaces", "/run/postgresql")),
        ]
        self.run(lambda: [subprocess.run(argv, check=True, timeout=20, capture_output=True) for argv in commands] and None)
        python = self.home / "python"
        python.write_text(f'#!/bin/sh\nexec nsenter --target={self.pid} --mount --ipc -- {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.write(
            {
                "host_vars/linuxone1.yml": yaml.safe_dump(self._differences()),
                "restart.yml": yaml.safe_dump(
                    [{"name": "Restart", "ansible.builtin.command": {"argv": self._pg_ctl("restart")}}]
                ),
                "vault-password": "of the vault\n",
            }
        )

    def __exit__(self, *exc: object) -> None:
        if (self.home / "fep/data/postmaster.pid").exists():
            self.server("stop")
        for pid in self.run(opencryptoki.daemons):
            # Nobody's child by now. 3.8.1 sometimes takes SIGTERM for nothing; what it would tidy up goes with the folders.
            os.kill(pid, signal.SIGKILL)
        super().__exit__(*exc)

    def _layer(self, name: str) -> list[list[str]]:
        """The mounts that put a layer over a folder; what is mounted below it stays."""
        layer = ",".join(f"{kind}={place}" for kind, place in (("lowerdir", f"/{name}"), ("upperdir", self._at("upper", name))))
        mounts = [["-t", "overlay", "overlay", f"/{name}", "-o", f"{layer},workdir={self._at('work', name)}"]]
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for number, point in enumerate(point for point in points if point.startswith(f"/{name}/") and os.path.isdir(point)):
            kept = str(self._at("kept", f"{name}/{number}"))
            mounts = [["--bind", point, kept], *mounts, ["--bind", kept, point]]
        return mounts

    def _at(self, *names: str) -> Path:
        """A folder of the host's own, made if it is missing."""
        folder = self.home.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @staticmethod
    def _etc(etc: Path) -> None:
        (etc / "opencryptoki").mkdir(parents=True)
        (etc / "opencryptoki/opencryptoki.conf").write_text(_PACKAGED)
        lines = Path("/etc/group").read_text().splitlines()
        (etc / "group").write_text("".join(re.sub(r"^(pkcs11:.*:).*", r"\1", line) + "\n" for line in lines))

    def _usr(self, usr: Path) -> None:
        """The soft token under the names of the others', and the library where Red Hat's package has it."""
        library = Path(self.opencryptoki.library)
        soft = (library.parent / "stdll/libpkcs11_sw.so").resolve()
        places = [usr / library.parent.parent.relative_to("/usr"), usr / library.parent.relative_to("/usr") / "stdll"]
        for place in places:
            place.mkdir(parents=True)
            for name in ("libpkcs11_ep11.so", "libpkcs11_cca.so"):
                shutil.copy2(soft, place / name)
        if not Path("/usr/lib64/opencryptoki").exists():
            (usr / "lib64/opencryptoki").mkdir(parents=True)
            (usr / "lib64/opencryptoki/libopencryptoki.so").symlink_to(library)

    def _differences(self) -> dict[str, object]:
        """What no file of the page says: how this host is reached, and what it has not."""
        return {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(self.home / "python"),
            "hsm_tde_units": "never",
            "hsm_tde_restart_tasks": str(self.play / "restart.yml"),
            # Where the page proves the table, the stand-in's verdict is "plain".
            "encrypted_tablespaces_prove": False,
        }

    def adapters(self, cards: dict[int, tree.Card]) -> None:
        """The host has these cards."""
        system = self.home / "sys"
        shutil.rmtree(system)
        tree.build(system, tree.bus(), cards)
        argv = ["sh", "-c", f"umount /sys; mount --rbind {system} /sys"]
        self.run(lambda: subprocess.run(argv, check=True, timeout=20) and None)

    def write(self, files: t.Mapping[str, str]) -> None:
        """Put files into the folder ``play``."""
        for name, content in files.items():
            (self.play / name).parent.mkdir(parents=True, exist_ok=True)
            (self.play / name).write_text(content, encoding="utf-8")

    def has(self, *files: Block, fit: t.Callable[[str], str] = str) -> None:
        """Put files of the page where it says. They were run when a command was that reads them.

        :param fit: what the page has done to a file on such a host.
        """
        self.write({block.name: fit(block.text) + "\n" for block in files})
        self._there |= {block.name: block for block in files}

    def does(self, command: Block, code: int = 0, shows: bool = True) -> str:
        """Run a command of the page as it stands; what it prints.

        :param code: the exit code; any but 0 is not what the page is about. :param shows: False where what it prints differs from the page.
        """
        argv = ["sh", "-c", command.text]
        if command.kind == "sql":
            argv = self._psql(command.text)
        done = subprocess.run(
            argv,
            cwd=self.play,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(support.ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(support.ROOT / ".collections"),
                "ANSIBLE_FORCE_COLOR": "0",
                # The libraries are in the interpreter.
                "ANSIBLE_SKIP_TAGS": "prerequisites",
                "ANSIBLE_VAULT_PASSWORD_FILE": str(self.play / "vault-password"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{command.text}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
        if code == 0:
            for block in self.page.printed(command) if shows else ():
                _shows(done.stdout, block)
                self.page.ran.add(block)
            always = ("hosts", "group_vars/")
            self.page.ran |= {block for name, block in self._there.items() if name.startswith(always) or name in command.text}
            self.page.ran.add(command)
        return done.stdout

    def _inside(self, *argv: str) -> list[str]:
        """The command line that runs a program inside, as root."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--ipc", "--", *argv]

    def _psql(self, statement: str) -> list[str]:
        return self._inside(
            "runuser",
            "-u",
            USER,
            "--",
            f"{PROGRAMS}/bin/psql",
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            "postgres",
            "-c",
            statement,
        )

    def _pg_ctl(self, act: str) -> list[str]:
        options = "-c listen_addresses='' -c fsync=off -c log_statement=all -c unix_socket_directories=/run/postgresql"
        return [
            "runuser", "-u", USER, "--", f"{PROGRAMS}/bin/pg_ctl", "-D", f"{FOLDER}/data", "-l", f"{FOLDER}/server.log",
            "-o", options, "-w", "-m", "fast", act,
        ]  # fmt: skip

    def server(self, act: str) -> None:
        """Start, stop or restart it."""
        argv = self._inside(*self._pg_ctl(act))
        subprocess.run(argv, check=True, timeout=60, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def sql(self, statement: str) -> str:
        """Run SQL; what it answers, or its error."""
        done = subprocess.run(self._psql(statement), check=False, capture_output=True, text=True, timeout=60, cwd="/")
        return (done.stdout or done.stderr).strip()

    def file(self, path: str) -> str:
        """What a file of the host says."""
        return subprocess.run(self._inside("cat", path), check=True, capture_output=True, text=True, timeout=20).stdout

    def is_open(self) -> bool:
        """Whether the keystore is open (see ``fep.FepServer.is_open``)."""
        wish = "CREATE TABLESPACE probe LOCATION '/nonexistent' WITH (tablespace_encryption_algorithm = 'AES256')"
        return 'directory "/nonexistent" does not exist' in self.sql(wish)

    def said(self) -> str:
        """The server's log."""
        return self.file(f"{FOLDER}/server.log")


def _shows(output: str, block: Block) -> None:
    """Each line that the page shows is printed, in this order; blanks at the ends and Ansible's quotes aside."""
    place = 0
    for line in filter(None, map(str.strip, block.text.splitlines())):
        found = output.find(line, place)
        assert found >= 0, f"line {block.line} of the page shows {line!r}, which is not printed:\n{output}"
        place = found + len(line)
