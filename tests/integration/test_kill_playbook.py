# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A whole playbook killed at random moments, ansible-playbook and the module on the target alike, then run to its end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from ansible_collections.hsm.tde.plugins.module_utils.common.secret import Secret
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.library import LibraryAccess
from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import TokenAccess, TokenSelector
from ansible_collections.hsm.tde.tests.integration import killing, leftovers, postgres, support
from ansible_collections.hsm.tde.tests.integration.estate import usable
from ansible_collections.hsm.tde.tests.tools.watch_secrets import search_files, secrets_in

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(not usable(), reason="needs root, PostgreSQL, SoftHSM and loop devices"),
]

KILLS, ROTATIONS = 5, 3
SEED = int(os.environ.get("HSM_TDE_KILL_SEED", "4711"))
#: A folder of its own: the demo may be in use.
DIRECTORY = Path("/var/lib/hsm-tde-kill")
#: Held as long as the folder is in use.
LOCK = Path("/run/hsm-tde-kill.lock")


class Play:
    """ansible-playbook at work.

    :param variables: a file of variables.
    """

    def __init__(self, playbook: str, log: Path, variables: Path | None = None) -> None:
        argv = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", f"playbooks/{playbook}.yml"]
        argv += [f"--extra-vars=demo_directory={DIRECTORY}", *([f"--extra-vars=@{variables}"] if variables else [])]
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(argv, cwd=support.ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def kill(self) -> list[str]:
        """SIGKILL to it and to all that it has started; :returns: the programs' names."""
        # One that has ended is waited for already: its number may be another's.
        found = _descendants(self.process.pid) if self.process.poll() is None else {}
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return sorted(set(found.values()))

    def done(self, seconds: float = 900) -> str:
        """Wait for its end, which must be good; :returns: its output."""
        code = self.process.wait(seconds)
        output = self.log.read_text()
        assert code == 0, output[-6000:]
        return output


def _descendants(pid: int) -> dict[int, str]:
    """A process and all below it, with their names."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                # The name may hold anything; what follows its bracket is numbers.
                name, rest = Path("/proc", entry, "stat").read_text().rsplit(")", 1)
                parents[int(entry)], names[int(entry)] = int(rest.split()[1]), name.partition("(")[2]
    found = {pid: names.get(pid, "")}
    while more := {child: names[child] for child, parent in parents.items() if parent in found and child not in found}:
        found |= more
    return found


def changes(output: str) -> int:
    """How many tasks say that they changed something."""
    found = re.search(r"changed=(\d+)", output.rsplit("PLAY RECAP", 1)[1])
    assert found
    return int(found[1])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Path]:
    """Where a playbook's output goes; at the end everything that the demo made goes."""
    folder = tmp_path_factory.mktemp("playbook")
    with leftovers.alone(LOCK):
        if DIRECTORY.exists():
            # Its tests were killed.
            Play("demo_clean", folder / "before").done(120)
        try:
            yield folder / "log"
        finally:
            Play("demo_clean", folder / "clean").done(120)


def killed(play: Play, moment: float, task: str = "") -> str:
    """Kill a playbook after some seconds; :returns: where it was, in words.

    :param task: the seconds count from its beginning.
    """
    while task not in play.log.read_text() and play.process.poll() is None:
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        play.process.wait(moment)
    programs = play.kill()
    tasks = re.findall(r"TASK \[(.*?)\]", play.log.read_text())
    return f"killed after {moment:.1f} s in {tasks[-1] if tasks else 'nothing'}: {', '.join(programs)}"


def sound() -> None:
    """No secret lies about, nothing half-made, every image attached once."""
    folder, state = DIRECTORY / "secrets", DIRECTORY / "state"
    secrets = secrets_in(folder)
    assert len(secrets) == 5
    looked = [
        state,
        *(DIRECTORY / name for name in ("tokens", "run", "log", "bin")),
        Path("/root/.ansible/tmp"),
        *Path("/tmp").glob("ansible*"),
    ]
    assert search_files([path for path in looked if path.exists()], secrets, folder) == []
    killing.no_leftovers(state, DIRECTORY / "tokens")
    for name in ("cluster", "tablespaces"):
        killing.mounted_once(DIRECTORY / f"{name}.img")


def test_the_demo_killed_at_random_moments(log: Path) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    for _number in range(KILLS):
        # The first run makes Python's environment, which takes as long as all else; what it has done stays.
        print(killed(Play("demo", log), chance.uniform(2, 90)))
    Play("demo", log).done()
    assert changes(Play("demo", log).done()) == 0
    sound()


def test_a_rotation_killed_under_load(log: Path, tmp_path: Path) -> None:
    """As a user runs it: no transaction fails, nothing restarts, the former master key stays, a run again changes nothing."""
    Play("demo", log).done()
    pin = (DIRECTORY / "secrets/pin_a").read_text().split()[0]
    variables = tmp_path / "variables.json"
    variables.touch(0o600)

    def play(number: int) -> Play:
        settings = {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(DIRECTORY / "venv/bin/python"),
            "prerequisites_venv": str(DIRECTORY / "venv"),
            "hsm_tde_hosts": "localhost",
            "hsm_tde_library": support.softhsm_library(),
            "hsm_tde_library_environment": {"SOFTHSM2_CONF": str(DIRECTORY / "softhsm2.conf")},
            "hsm_tde_state_directory": str(DIRECTORY / "state"),
            "hsm_tde_cluster": "demo-cluster",
            "hsm_tde_token_label": "demo-a",
            "hsm_tde_pin": pin,
            "hsm_tde_login_unix_socket": str(DIRECTORY / "run"),
            "hsm_tde_login_port": 54711,
            "hsm_tde_tag": f"under-load-{number}",
        }
        variables.write_text(json.dumps(settings))
        return Play("rotate_keys", log, variables)

    server = ["-h", str(DIRECTORY / "run"), "-p", "54711", "postgres"]
    psql = [f"{postgres.programs()}/psql", "-XAtq", *server, "-c", "SELECT pg_postmaster_start_time()"]
    pgbench = [f"{postgres.programs()}/pgbench", "-n", *server]
    postgres.as_postgres(*pgbench, "-i", "-q")
    started = postgres.as_postgres(*psql).stdout
    load = subprocess.Popen(
        ["runuser", "-u", "postgres", "--", *pgbench, "-c", "4", "-R", "100", "-T", "60"], stdout=subprocess.PIPE, text=True
    )
    chance = random.Random(SEED)
    changed = 0
    for number in range(ROTATIONS):
        print(killed(play(number), chance.uniform(0, 2), "Wrap every data key"))
        changed += changes(play(number).done())
        assert changes(play(number).done()) == 0
    output, dummy = load.communicate(timeout=120)
    done, failed = postgres.pgbench_failures(output)
    print(f"{changed} of {ROTATIONS} second runs had something left to do; {done} transactions, {failed} failed")
    assert (load.returncode, failed) == (0, 0), output
    assert done > 100
    assert postgres.as_postgres(*psql).stdout == started
    registry = json.loads((DIRECTORY / "state/registry.json").read_text())
    keks = [key["label"] for key in registry["keys"] if key["cluster"] == "demo-cluster"]
    assert keks[-ROTATIONS:] == [f"hsm-tde.demo-cluster.under-load-{number}" for number in range(ROTATIONS)]
    library = LibraryAccess(str(support.softhsm_library()), {"SOFTHSM2_CONF": str(DIRECTORY / "softhsm2.conf")})
    access = TokenAccess(library, TokenSelector(label="demo-a"), Secret(pin))
    assert killing.in_token(access, DIRECTORY / "state", keks) == [1] * len(keks)
    sound()
