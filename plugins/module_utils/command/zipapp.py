# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The command ``hsm-tde`` as one file: this tree of modules, packed as a Python zip application.

Its sources are taken from where this very module was imported from (a checkout, an installed collection or
the zip that Ansible sends to a target), so what opens the keystore at boot is what configured it.
"""

from __future__ import annotations

import io
import os
import re
import sys
import typing as t
import zipfile

from ..common.errors import TdeError
from . import main as _main

#: Name of the package inside the command; relative imports make the tree independent of it.
PACKAGE = "hsm_tde"

#: What the command cannot run with: the bridge imports Ansible.
_LEFT_OUT = frozenset({"common/bridge.py"})

#: The earliest time that a zip entry can carry (APPNOTE.TXT 4.4.6); every entry has it, so that two builds are equal.
_TIME = (1980, 1, 1, 0, 0, 0)

#: Linux before 5.1 reads 128 bytes of a script's first line, the NUL included (linux/binfmts.h, BINPRM_BUF_SIZE).
_SHEBANG_BYTES = 127

#: Characters of a path that mean nothing to a shebang line or a systemd unit.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9_.+/-]*")

_ENTRY = f"from {PACKAGE}.command.main import main\n\nraise SystemExit(main(state_directory={{!r}}))\n"


def plain_path(option: str, path: str) -> str:
    """A path that may stand in a shebang line and in a unit.

    :raises TdeError: ``invalid_option``.
    """
    if not PLAIN_PATH.fullmatch(path):
        raise TdeError("invalid_option", "must be an absolute path of A-Z a-z 0-9 _ . + - and /", obj=f"{option} {path!r}")
    return os.path.normpath(path)


def is_command(data: bytes) -> bool:
    """Whether a file's content is the command, of whatever version."""
    return data.startswith(b"#!/") and f"{PACKAGE}/command/main.py".encode() in data


def _files(entry: str) -> t.Iterator[tuple[str, bytes]]:
    """The Python files below one entry of a package's path, which is a folder or a folder inside a zip file."""
    if os.path.isdir(entry):
        for folder, dummy, names in os.walk(entry):
            for name in names:
                path = os.path.join(folder, name)
                if name.endswith(".py"):
                    with open(path, "rb") as handle:
                        yield os.path.relpath(path, entry).replace(os.sep, "/"), handle.read()
        return
    archive = entry
    while not os.path.isfile(archive):
        archive = os.path.dirname(archive)
    inner = os.path.relpath(entry, archive).replace(os.sep, "/") + "/"
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if name.startswith(inner) and name.endswith(".py"):
                yield name[len(inner) :], opened.read(name)


def sources() -> dict[str, bytes]:
    """Every module of the tree by its path below ``module_utils``, without what the command cannot use.

    Through Ansible the tree holds what the installing module imports, which is all that the command imports:
    the import of ``command.main`` above is what makes Ansible send it.
    """
    root = _main.__name__.rsplit(".", 2)[0]
    found: dict[str, bytes] = {}
    for entry in sys.modules[root].__path__:
        found.update(_files(entry))
    return {path: data for path, data in found.items() if path not in _LEFT_OUT}


def build(python: str, state_directory: str) -> bytes:
    """The command's content; the same tree and interpreter give the same bytes.

    :param python: the interpreter that the first line names; run isolated (``-I``), so that neither the
        environment nor the current folder chooses code that root loads.
    :param state_directory: where the host remembers, if the caller of the command does not say.
    :raises TdeError: ``invalid_option``.
    """
    shebang = f"#!{plain_path('python', python)} -I\n".encode()
    if len(shebang) > _SHEBANG_BYTES:
        raise TdeError(
            "invalid_option", f"is too long for a script's first line ({_SHEBANG_BYTES} bytes)", obj=f"python {python}"
        )
    tree = {f"{PACKAGE}/{path}": data for path, data in sources().items()}
    for path in list(tree):
        folder = os.path.dirname(path)
        while folder:
            tree.setdefault(f"{folder}/__init__.py", b"")
            folder = os.path.dirname(folder)
    tree["__main__.py"] = _ENTRY.format(state_directory).encode()
    packed = io.BytesIO()
    packed.write(shebang)
    # Stored, not deflated: the bytes then do not depend on the host's zlib.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(tree):
            info = zipfile.ZipInfo(path, _TIME)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, tree[path])
    return packed.getvalue()
