# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an encrypted tablespace costs: pgbench against a plain one of the same server, in turns.

Both tablespaces lie in ext4 images made alike, of the same size, on the same disk; the write-ahead log is in the clear
for both, as it is with tablespaces only. Rounds go plain, encrypted, encrypted, plain.

1. Writes: pgbench's TPC-B-like transactions and the CHECKPOINT that brings their pages to the image.
2. Reads: pgbench's SELECTs, the table's pages dropped from memory before each round and the image's kept: what is left
   of the cost of deciphering when the disk costs nothing.

Run it as root with the Python that has ansible-core, python-pkcs11, psycopg and cryptography. Everything is its own.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import typing as t
from pathlib import Path

from place import place

SIDES = ("plain", "sealed")
#: Of an image; the data of a side takes about 150 MB, many times the server's shared_buffers.
SIZE, SCALE = "512M", 10
#: A round's and a warm-up's length; cycles of four rounds for each workload, fewer when BUDGET is spent.
SECONDS, WARM_UP, CYCLES = 2, 1, 3
BUDGET = 50.0
WORKLOADS = {"writes": ["--builtin=tpcb-like"], "reads": ["--select-only"]}


def plain_tablespace(home: Path, server: t.Any) -> Path:
    """A tablespace in an image like the encrypted one's; its folder."""
    from ansible_collections.hsm.tde.plugins.module_utils.common import plan
    from ansible_collections.hsm.tde.plugins.module_utils.storage import image, image_acts

    wish = image.storage_wish(str(home / "plain"), str(home / "plain.img"), SIZE)
    plan.run(image.plan(wish, image_acts.inspect(wish)), image_acts.handlers(wish))
    location = home / "plain" / "plain"
    location.mkdir(mode=0o700)
    shutil.chown(location, "postgres", "postgres")
    server.psql(f"CREATE TABLESPACE plain LOCATION '{location}'")
    return location


class Side:
    """A database whose tables and indexes lie in the tablespace of its name."""

    def __init__(self, server: t.Any, name: str, location: Path) -> None:
        self.server, self.name, self.location = server, name, location
        server.psql(f"CREATE DATABASE {name}")
        self.pgbench("-i", "-q", f"--scale={SCALE}", f"--tablespace={name}", f"--index-tablespace={name}")

    def pgbench(self, *argv: str) -> str:
        process = self.server.popen("pgbench", *argv, self.name)
        output, _nothing = process.communicate(timeout=120)
        if process.returncode:
            sys.exit(f"pgbench failed:\n{output}")
        return t.cast(str, output)

    def evict(self) -> None:
        """Drop the tables' clean pages from memory."""
        for path in self.location.glob("**/*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)

    def round(self, workload: str, seconds: int) -> float:
        """Transactions a second."""
        from ansible_collections.hsm.tde.tests.integration.postgres import pgbench_failures

        if workload == "reads":
            self.evict()
        began = time.perf_counter()
        output = self.pgbench("-n", "-c2", "-j2", "-Mprepared", f"-T{seconds}", *WORKLOADS[workload])
        self.server.psql("CHECKPOINT")
        took = time.perf_counter() - began
        processed, failed = pgbench_failures(output)
        if failed or not processed:
            sys.exit(f"transactions failed:\n{output}")
        return processed / took


def measure(sides: t.Mapping[str, Side], deadline: float) -> dict[str, dict[str, list[float]]]:
    """Rates by workload and side."""
    rates: dict[str, dict[str, list[float]]] = {workload: {name: [] for name in SIDES} for workload in WORKLOADS}
    for workload in WORKLOADS:
        for name in SIDES:
            sides[name].round(workload, WARM_UP)
    for _cycle in range(CYCLES):
        for workload, found in rates.items():
            for name in (*SIDES, *reversed(SIDES)):
                found[name].append(sides[name].round(workload, SECONDS))
        if time.monotonic() > deadline:
            break
    return rates


def report(workload: str, rates: t.Mapping[str, list[float]]) -> None:
    plain, sealed = (statistics.median(rates[name]) for name in SIDES)
    # A round has its neighbour of the other side at the same place of the list: what else the machine does hits both.
    pairs = sorted(second / first for first, second in zip(*(rates[name] for name in SIDES), strict=True))
    print(f"{workload}: {len(pairs)} rounds of {SECONDS} s a side, in turns")
    for name, middle in zip(SIDES, (plain, sealed), strict=True):
        print(f"  {name:8} {middle:10.0f} /s   from {min(rates[name]):.0f} to {max(rates[name]):.0f}")
    print(
        f"  ratio of the medians, encrypted to plain {sealed / plain:.2f};"
        f" of neighbouring rounds from {pairs[0]:.2f} to {pairs[-1]:.2f}, median {statistics.median(pairs):.2f}"
    )


def cipher() -> str:
    """The kernel's driver of the cipher for files: the ratios hang on whether it uses the processor's AES instructions."""
    entries = [
        dict(re.findall(r"^(\w+) *: (.*)$", entry, re.MULTILINE)) for entry in Path("/proc/crypto").read_text().split("\n\n")
    ]
    found = [entry for entry in entries if entry.get("name") == "xts(aes)"]
    return max(found, key=lambda entry: int(entry["priority"]))["driver"] if found else "unknown"


def main() -> int:
    deadline = time.monotonic() + BUDGET
    with place() as home:
        from ansible_collections.hsm.tde.tests.integration.estate import SLOTS, Estate

        estate = Estate(home, image_size=SIZE)
        server = estate.server
        server.initdb()
        server.start()
        estate.run("tde_keystore", keyslots=SLOTS)
        estate.run("tde_tablespace", tablespaces=[{"name": "sealed"}], keyslots=SLOTS)
        locations = {"plain": plain_tablespace(home, server), "sealed": estate.mount / "sealed"}
        sides = {name: Side(server, name, locations[name]) for name in SIDES}
        server.psql("CHECKPOINT")
        subprocess.run(["sync", "--file-system", *map(str, locations.values())], check=True)
        proofs = estate.run("tde_proof", tablespaces=list(SIDES))["proofs"]
        if [(proof["place"], proof["verdict"]) for proof in proofs] != [("plain", "plain"), ("sealed", "encrypted")]:
            sys.exit(f"the tablespaces are not what they are named: {proofs}")
        print(f"pgbench on an encrypted tablespace against a plain one; the kernel's AES-XTS is {cipher()}")
        for workload, rates in measure(sides, deadline).items():
            report(workload, rates)
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
