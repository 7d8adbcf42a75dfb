# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the whole site playbook costs when there is nothing to do.

``playbooks/site.yml`` on a token, a server and an image of its own, by real runs of ansible-playbook: the first run,
then in turns the same again and a playbook that does nothing in as many plays and tasks of the same kinds (a module on
the target, a task of the controller, a skipped one). The target's environment is there before the first run, with the
libraries of the Python that runs this: what an installation takes says more about the network.

Run it as root with the Python that has ansible-core, python-pkcs11 and cryptography. Exit status 1 if the second run
changes something.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import typing as t
from pathlib import Path

from keys import ROOT, timed
from place import copy, place

#: The second run and the empty one are made so often, in turns, and the best counts; fewer when BUDGET is spent.
ROUNDS, BUDGET = 3, 45.0
NOTHING: dict[str, dict[str, t.Any]] = {
    "module": {"ansible.builtin.ping": {}},
    "controller": {"ansible.builtin.assert": {"that": True, "quiet": True}},
    "skipped": {"ansible.builtin.ping": {}, "when": False},
}


class Run(t.NamedTuple):
    """A run of a playbook.

    :ivar seconds: wall time; :ivar plays: the kinds of the tasks that ran, a list a play; :ivar changed: the names of those that changed something.
    """

    seconds: float
    plays: list[list[str]]
    changed: list[str]


class Playbooks:
    """Playbooks on this host."""

    def __init__(self, home: Path, variables: dict[str, t.Any]) -> None:
        self.home = home
        self.variables = home / "variables.json"
        self.variables.touch(mode=0o600)
        self.variables.write_text(json.dumps(variables))
        self.environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(home / "collections"),
            "ANSIBLE_HOME": str(home / "ansible"),
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).resolve().with_name("callbacks")),
            "ANSIBLE_CALLBACKS_ENABLED": "kinds",
            "BENCH_KINDS": str(home / "kinds.json"),
        }

    def run(self, path: Path) -> Run:
        argv = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(path)]
        argv += ["-e", f"@{self.variables}"]
        seconds = timed(lambda: self._call(argv))
        return Run(seconds, **json.loads((self.home / "kinds.json").read_text()))

    def _call(self, argv: list[str]) -> None:
        process = subprocess.Popen(
            argv, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _nothing = process.communicate(timeout=300)
        except BaseException:
            # Its workers and modules too: nothing may mount or write while all is removed.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode:
            sys.exit(f"the playbook failed:\n{output}")

    def write(self, name: str, plays: list[dict[str, t.Any]]) -> Path:
        path = self.home / name
        path.write_text(json.dumps([{"hosts": "localhost", "become": True, **play} for play in plays]))
        return path


def environment(home: Path) -> None:
    """Make what the role prerequisites looks for: an environment with the libraries and the list that it was made from."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    shutil.copy(ROOT / "roles/prerequisites/files/requirements.txt", home / "venv")
    inside = sysconfig.get_path("purelib", vars={"base": str(home / "venv")})
    (Path(inside) / "bench.pth").write_text("".join(f"{sysconfig.get_path(name)}\n" for name in ("purelib", "platlib")))


def variables(home: Path) -> dict[str, t.Any]:
    from ansible_collections.hsm.tde.tests.integration.support import PIN, SO_PIN, SoftHsm

    softhsm = SoftHsm(home / "softhsm")
    return {
        "hsm_tde_hosts": "localhost",
        "ansible_connection": "local",
        "prerequisites_venv": str(home / "venv"),
        "ansible_python_interpreter": str(home / "venv/bin/python"),
        "hsm_tde_library": softhsm.library,
        "hsm_tde_library_environment": softhsm.environment,
        "hsm_tde_state_directory": str(home / "state"),
        "hsm_tde_command_path": str(home / "hsm-tde"),
        "hsm_tde_units": "never",
        "hsm_tde_token_label": "bench",
        "hsm_tde_so_pin": SO_PIN,
        "hsm_tde_pin": PIN,
        "hsm_tde_recovery_passphrase": "correct horse battery",
        "hsm_tde_cluster": "bench",
        "hsm_tde_login_unix_socket": str(home / "socket"),
        "hsm_tde_postgresql": {
            "storage": "image",
            "image": str(home / "image"),
            "image_size": "300M",
            "mount_point": str(home / "encrypted"),
        },
        "hsm_tde_tablespaces": [{"name": "sealed", "move": {"database": "postgres", "schemas": ["public"]}}],
    }


def main() -> int:
    deadline = time.monotonic() + BUDGET
    with place() as home:
        from ansible_collections.hsm.tde.tests.integration.postgres import server

        environment(home)
        books = Playbooks(home, variables(home))
        with server(home) as running:
            running.psql("CREATE TABLE orders AS SELECT g AS id, 'order ' || g AS body FROM generate_series(1, 100000) g")
            site = copy(home) / "playbooks" / "site.yml"
            first = books.run(site)
            again = [books.run(site)]
            tasks = [[NOTHING[kind] for kind in kinds] for kinds in again[0].plays]
            nothing = books.write("nothing.json", [{"tasks": listed} for listed in tasks])
            empty = [books.run(nothing)]
            while len(again) < ROUNDS and time.monotonic() < deadline:
                again.append(books.run(site))
                empty.append(books.run(nothing))
    kinds = [kind for listed in again[0].plays for kind in listed]
    changed = [name for run in again for name in run.changed]
    second, floor = (min(run.seconds for run in runs) for runs in (again, empty))
    print(f"site.yml on one host, whole playbooks, best of {len(again)}, the first run once")
    print(f"  first run                      {first.seconds:8.2f} s   {len(first.changed)} tasks changed something")
    print(
        f"  run again                      {second:8.2f} s   {len(changed)} tasks changed something (must be 0) {', '.join(changed)}"
    )
    print(f"  as many tasks that do nothing  {floor:8.2f} s")
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in NOTHING)
    print(f"  {len(again[0].plays)} plays that gather facts, {len(kinds)} tasks: {counts}")
    print(f"  ratio of the second run to the first {second / first.seconds:.2f}, to doing nothing {second / floor:.2f}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
