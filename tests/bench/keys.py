# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What keys cost, measured in one run on a SoftHSM of its own in memory.

1. 20 keys in one ``pkcs11_key`` task against a looped ``ansible.builtin.command: pkcs11-tool``, by real playbooks.
2. The service behind ``pkcs11_key_info`` on 10,000 keys against the bare C calls through ctypes, and ``pkcs11-tool -O``.

Run it with the Python that has ansible-core, python-pkcs11 and cryptography. Exit status 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Bounds that must hold.
AT_LEAST, AT_MOST = 5.0, 1.5
#: Each measurement is made so often, in turns, and the best counts: what else the machine does only ever adds.
ROUNDS = 3


def collections(home: Path) -> Path:
    """A path of collections in which this working copy is hsm.tde."""
    place = home / "collections" / "ansible_collections" / "hsm"
    place.mkdir(parents=True)
    (place / "tde").symlink_to(ROOT)
    return home / "collections"


def timed(fn: t.Callable[[], t.Any]) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


class Playbooks:
    """Playbooks on localhost against one token."""

    def __init__(self, home: Path, softhsm: t.Any) -> None:
        self.home, self.softhsm = home, softhsm
        self.environment = {
            **os.environ,
            **softhsm.environment,
            "ANSIBLE_COLLECTIONS_PATH": str(home / "collections"),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "0",
            "ANSIBLE_HOME": str(home / "ansible"),
            "BENCH_PIN": softhsm.pin,
        }

    def run(self, tasks: list[dict[str, t.Any]]) -> float:
        """Seconds that a whole playbook takes."""
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
        path = self.home / "play.json"
        path.write_text(json.dumps([{**play, "vars": {"ansible_python_interpreter": sys.executable}}]))
        program = Path(sys.executable).with_name("ansible-playbook")

        def call() -> None:
            done = subprocess.run(
                [str(program), str(path)], env=self.environment, capture_output=True, text=True, timeout=600, check=False
            )
            if done.returncode:
                sys.exit(f"the playbook failed:\n{done.stdout}\n{done.stderr}")

        return timed(call)

    def module(self, labels: list[str]) -> list[dict[str, t.Any]]:
        options = {**self.softhsm.options(token_label="small"), "state_directory": str(self.home / "state")}
        keys = [{"label": label} for label in labels]
        return [{"hsm.tde.pkcs11_key": {**options, "pin": self.softhsm.pin, "keys": keys}}]

    def looped(self, labels: list[str]) -> list[dict[str, t.Any]]:
        tool = ["pkcs11-tool", "--module", self.softhsm.library, "--token-label", "small", "--login", "--pin", "env:BENCH_PIN"]
        argv = [*tool, "--keygen", "--key-type", "AES:32", "--sensitive", "--label", "{{ item }}"]
        return [{"ansible.builtin.command": {"argv": argv}, "loop": labels}]


def twenty_keys(home: Path, softhsm: t.Any) -> bool:
    books = Playbooks(home, softhsm)
    books.run([])  # caches of the interpreter and of the file system, for all alike
    times: dict[str, list[float]] = {"empty": [], "module": [], "looped": []}
    for round_ in range(ROUNDS):
        labels = [f"{round_}-{number}" for number in range(20)]
        times["empty"].append(books.run([]))
        times["module"].append(books.run(books.module([f"m{label}" for label in labels])))
        times["looped"].append(books.run(books.looped([f"l{label}" for label in labels])))
    empty, module, looped = (min(times[name]) for name in ("empty", "module", "looped"))
    ratio = (looped - empty) / (module - empty)
    print(f"20 keys, whole playbooks, best of {ROUNDS} (an empty one: {empty:.2f} s)")
    print(f"  one pkcs11_key task            {module:8.2f} s   the task alone {module - empty:6.2f} s")
    print(f"  looped command: pkcs11-tool    {looped:8.2f} s   the task alone {looped - empty:6.2f} s")
    print(f"  ratio of the tasks {ratio:.1f} (at least {AT_LEAST}), of the playbooks {looped / module:.1f}")
    return ratio >= AT_LEAST


class CkAttribute(ctypes.Structure):
    _fields_ = [("type", ctypes.c_ulong), ("value", ctypes.c_void_p), ("length", ctypes.c_ulong)]


class CBench:
    """The bare C calls, written without the collection's code: one search, one reading of the same attributes a key.

    Nothing is decoded, kept or checked: less than any program that does something with the answer must do.
    """

    #: C_GetAttributeValue, C_FindObjectsInit, C_FindObjects, C_FindObjectsFinal in CK_FUNCTION_LIST.
    INDEX = (24, 26, 27, 28)

    def __init__(self, library: str, session: int, attributes: list[tuple[int, int]]) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_ulong
        listed = pointer()
        ctypes.CDLL(library).C_GetFunctionList(ctypes.byref(listed))
        table = ctypes.cast(listed.value + ctypes.sizeof(pointer), ctypes.POINTER(pointer))  # type: ignore[operator]
        kinds = ((number, number, pointer, number), (number, pointer, number), (number, pointer, number, pointer), (number,))
        self.get, self.init, self.find, self.final = (
            ctypes.CFUNCTYPE(number, *kind)(table[index]) for index, kind in zip(self.INDEX, kinds, strict=True)
        )
        self.session = session
        self.buffer = ctypes.create_string_buffer(sum(room for _type, room in attributes))
        self.array = (CkAttribute * len(attributes))()
        address = ctypes.addressof(self.buffer)
        for slot, (kind_, room) in zip(self.array, attributes, strict=True):
            slot.type, slot.value, slot.length = kind_, address, room
            address += room
        self.pristine = bytes(self.array)

    def run(self) -> int:
        batch, count = (ctypes.c_ulong * 1024)(), ctypes.c_ulong()
        handles: list[int] = []
        self.init(self.session, None, 0)
        while not self.find(self.session, batch, 1024, ctypes.addressof(count)) and count.value:
            handles += batch[: count.value]
        self.final(self.session)
        array, pristine, size, attributes, get = self.array, self.pristine, len(self.pristine), len(self.array), self.get
        for handle in handles:
            ctypes.memmove(array, pristine, size)
            get(self.session, handle, array, attributes)
        return len(handles)


def many_keys(home: Path, softhsm: t.Any, count: int) -> bool:
    from ansible_collections.hsm.tde.plugins.module_utils.common.state import StateDirectory
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11 import attributes as attrs
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.keys import DEFAULT_FIELDS, list_keys
    from ansible_collections.hsm.tde.plugins.module_utils.pkcs11.token import open_session
    from pkcs11 import KeyType

    state = StateDirectory(str(home / "state"))
    with open_session(softhsm.access("large"), state, rw=True) as session:
        for number in range(count):
            session.raw.generate_key(KeyType.AES, 256, label=f"key {number:05}", id=number.to_bytes(8, "big"), store=True)
    opened = time.perf_counter()
    with open_session(softhsm.access("large"), state) as session:
        login = time.perf_counter() - opened
        names = sorted({name for field in DEFAULT_FIELDS for name in attrs.FACTS[field]})
        bare = CBench(
            softhsm.library, session.handle, [(attrs.ATTRIBUTES[name].number, attrs.ATTRIBUTES[name].room) for name in names]
        )
        if not bare.run() == len(list_keys(session).keys) == count:
            sys.exit("the two do not see the same keys")
        pairs = [(timed(bare.run), timed(lambda: list_keys(session))) for _round in range(ROUNDS)]
        few = min(timed(lambda: list_keys(session, fields=("label", "id"))) for _round in range(ROUNDS))
    raw, service = (min(times) for times in zip(*pairs, strict=True))
    ratio = service / raw
    tool = ["pkcs11-tool", "--module", softhsm.library, "--token-label", "large", "--login", "--pin", "env:BENCH_PIN", "-O"]
    environment = {**os.environ, **softhsm.environment, "BENCH_PIN": softhsm.pin}
    listed = timed(lambda: subprocess.run(tool, env=environment, capture_output=True, check=True, timeout=600))
    print(f"{count} keys, {len(names)} attributes each, best of {ROUNDS}")
    print(f"  C calls through ctypes         {raw:8.2f} s   nothing decoded")
    print(
        f"  service of pkcs11_key_info     {service:8.2f} s   with fields label, id: {few:.2f} s; opening the session {login:.2f} s"
    )
    print(f"  pkcs11-tool -O                 {listed:8.2f} s   the whole process")
    print(f"  ratio to the C calls {ratio:.2f} (at most {AT_MOST}); pkcs11-tool -O to the service {listed / service:.1f}")
    return ratio <= AT_MOST


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10000, help="how many keys the large token has (10000)")
    count = parser.parse_args().keys
    if not shutil.which("pkcs11-tool"):
        sys.exit("pkcs11-tool is not installed (Debian: opensc)")
    home = Path(tempfile.mkdtemp(prefix="hsm-tde-bench.", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        sys.path.insert(0, str(collections(home)))
        from ansible_collections.hsm.tde.tests.integration.support import SoftHsm

        softhsm = SoftHsm(home / "softhsm")
        softhsm.add_token("small")
        first = twenty_keys(home, softhsm)
        softhsm.add_token("large")
        second = many_keys(home, softhsm, count)
    finally:
        shutil.rmtree(home)
    return 0 if first and second else 1


if __name__ == "__main__":
    sys.exit(main())
