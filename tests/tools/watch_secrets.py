"""Run a command, and look for secrets wherever they could come out.

``watch_secrets.py --secrets DIR --look PATH … -- COMMAND …``

Every file in DIR holds a secret (made by the command itself or before it). While the command runs,
its output, every process's arguments and environment, and what is sent to the system log are kept;
afterwards the files under each PATH are searched too. A find ends in exit code 1 and says where,
never what. A search that finds none of the secrets in DIR itself is broken, and fails as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

#: Below DIR and in a virtual environment there is nothing to find, or everything.
_SKIPPED = ("venv", "proc", "sys")


class Watch:
    """What was seen outside of files while the command ran."""

    def __init__(self) -> None:
        self.processes: dict[bytes, set[str]] = {}
        self.log: list[bytes] = []
        self.output = bytearray()
        self.looks = 0
        self._ended = threading.Event()

    def watch_processes(self) -> None:
        own = {os.getpid(), os.getppid()}
        while not self._ended.is_set():
            self.looks += 1
            for name in os.listdir("/proc"):
                if not name.isdigit() or int(name) in own:
                    continue
                for what in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        self.processes.setdefault(pathlib.Path("/proc", name, what).read_bytes(), set()).add(what)
            time.sleep(0.01)

    def watch_log(self, listener: socket.socket) -> None:
        listener.settimeout(0.2)
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                self.log.append(listener.recv(1 << 20))

    def run(self, command: list[str]) -> int:
        threads = [threading.Thread(target=self.watch_processes)]
        listener = None
        if not os.path.exists("/dev/log"):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            listener.bind("/dev/log")
            threads.append(threading.Thread(target=self.watch_log, args=(listener,)))
        for thread in threads:
            thread.start()
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
            assert process.stdout
            while chunk := process.stdout.read(1 << 16):
                self.output += chunk
            return process.wait()
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()
            if listener:
                listener.close()
                os.unlink("/dev/log")


def secrets_in(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes().strip().split(b" ")[0] for path in folder.iterdir() if path.is_file()}


def search_files(paths: list[pathlib.Path], secrets: dict[str, bytes], skipped: pathlib.Path | None) -> list[str]:
    found = []
    for top in paths:
        for folder, names, files in os.walk(top):
            names[:] = [name for name in names if name not in _SKIPPED and pathlib.Path(folder, name) != skipped]
            for file in files:
                path = pathlib.Path(folder, file)
                if not path.is_file() or path.is_symlink():
                    continue
                found += [f"{name} in the file {path}" for name, value in secrets.items() if holds(path, value)]
    return found


def holds(path: pathlib.Path, value: bytes) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as handle:
        rest = b""
        while chunk := handle.read(1 << 22):
            if value in rest + chunk:
                return True
            rest = chunk[-len(value) :]
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--secrets", type=pathlib.Path, required=True)
    parser.add_argument("--look", type=pathlib.Path, action="append", default=[])
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    watch = Watch()
    code = watch.run(options.command)
    sys.stdout.buffer.write(b"\n".join(bytes(watch.output).splitlines()[-12:]) + b"\n")
    if code:
        failed = options.secrets.parent / "watched-output.log"
        failed.write_bytes(watch.output)
        print(f"the command failed; its whole output is in {failed}")
        return code

    secrets = secrets_in(options.secrets)
    found = [f"{name} in the output" for name, value in secrets.items() if value in watch.output]
    for text, where in watch.processes.items():
        found += [f"{name} in a process's {', '.join(where)}" for name, value in secrets.items() if value in text]
    for text in watch.log:
        found += [f"{name} in the system log" for name, value in secrets.items() if value in text]
    found += search_files(options.look, secrets, options.secrets)
    controls = search_files([options.secrets], secrets, None)
    print(
        f"{len(secrets)} secrets: {len(watch.output)} bytes of output, {watch.looks} looks at all processes, "
        f"{len(watch.log)} log messages, the files under {', '.join(map(str, options.look))}"
    )
    if len(secrets) == 0 or len(controls) != len(secrets):
        print("the search itself is broken: it does not find the secrets where they are")
        return 1
    for line in sorted(set(found)):
        print(f"FOUND {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
