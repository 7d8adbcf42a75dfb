# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The server's configuration in files of our own: what they say, pure.

``hsm-tde.conf``, which the last line of ``postgresql.conf`` includes, and ``hsm-tde-kms.conf``, the connections of the
library tde_kms. The first lies with the keystore, not in the data directory: a base backup must not carry the PIN.
Syntax: PostgreSQL's manual, section 20.1.2; the connection file: Enterprise Postgres
Operation Guide, section 6.2.
"""

from __future__ import annotations

import re
import typing as t

from ...common.errors import TdeError
from .options import FILE, HSM, Options

MARK = "# Written by hsm.tde.tde_keystore; changes are overwritten.\n"
NAME = "hsm-tde.conf"
KMS_NAME = "hsm-tde-kms.conf"
#: The plugin's file in its folder, a link to our command.
PLUGIN_NAME = "hsm-tde"
#: The parameter with the user PIN, in the files' spelling and, as all names are compared, in lower case.
PIN = "tde_z.USER_PIN"
#: The library that each kind of keystore needs.
LIBRARIES = {HSM: "tde_z", FILE: "", "plugin": "tde_kms"}

_LINE = re.compile(
    r"^\s*([A-Za-z_][\w$]*(?:\.[A-Za-z_][\w$]*)?)\s*=?\s*(?:'((?:[^'\\]|''|\\.)*)'|([^\s#']+))\s*(?:#.*)?$", re.ASCII
)
_INCLUDE = re.compile(rf"^\s*include_if_exists\s*=?\s*'((?:[^']|'')*/)?{re.escape(NAME)}'\s*(#.*)?$")


def quote(value: str) -> str:
    """A value in single quotes, as the server reads it back (GUC_scanstr)."""
    if any(ord(char) < 32 or char == "\x7f" for char in value):
        raise TdeError("invalid_option", "has a control character, which a configuration file cannot hold", obj="a value")
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _lines(text: str) -> list[str]:
    """As the server tells lines apart: str.splitlines would end one at characters that mean nothing to it."""
    return text.removesuffix("\n").split("\n")


def render(settings: t.Mapping[str, str], pin: str | None = None) -> str:
    """The include file's text. :param pin: a secret; the text is one then."""
    lines = [f"{name} = {quote(value)}\n" for name, value in settings.items()]
    if pin is not None:
        lines.append(f"{PIN} = {quote(pin)}\n")
    return MARK + "".join(lines)


def parse(text: str) -> dict[str, str]:
    """Settings by name in lower case; the last of a name counts. Lines that set nothing are left out."""
    found = {}
    for line in _lines(text):
        match = _LINE.match(line)
        if match and not line.lstrip().startswith("#"):
            value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2].replace("''", "'"))
            found[match[1].lower()] = value
    return found


def include_line(path: str) -> str:
    """The last line of postgresql.conf: what is read last counts."""
    return f"include_if_exists {quote(path)}"


def includes(text: str, path: str) -> bool:
    """Whether a postgresql.conf ends with our line, but for comments and blank lines."""
    lines = [line.strip() for line in _lines(text) if line.strip() and not line.lstrip().startswith("#")]
    return bool(lines) and lines[-1] == include_line(path)


def with_include(text: str, path: str) -> str:
    """The postgresql.conf with our line as its last, once."""
    lines = [line for line in _lines(text) if not _INCLUDE.match(line)]
    return "\n".join([*lines, include_line(path), ""])


def libraries(value: str) -> list[str]:
    """The names in a ``shared_preload_libraries``."""
    return [name.strip().strip('"') for name in value.split(",") if name.strip()]


def wished(options: Options, slot_id: int | None, preloaded: str, kms_file: str) -> dict[str, str]:
    """The settings of the include file, the PIN aside.

    :param slot_id: the token's slot. :param preloaded: what is loaded without us; the include file's value replaces it.
    :param kms_file: path of the connection file.
    """
    library = LIBRARIES[options.keystore]
    others = [name for name in libraries(preloaded) if name not in LIBRARIES.values()]
    settings: dict[str, str] = {}
    if library:
        settings["shared_preload_libraries"] = ",".join([*others, library])
    if options.keystore in (HSM, FILE):
        settings["keystore_location"] = options.keystore_location or ""
    if options.keystore == HSM:
        settings["tde_z.SLOT_ID"] = str(slot_id)
    if library == "tde_kms":
        settings["tde_kms.plugin_path"] = f"{options.plugin_directory}/"
        settings["tde_kms.kms_conninfo_file"] = kms_file
    return settings


def kms_line(name: str, cluster: str) -> str:
    """The line of the connection file for our plugin: ``custom NAME PLUGIN arg=…``."""
    return f"custom {name} {PLUGIN_NAME} arg=--cluster arg={cluster}"


def kms_names(text: str) -> dict[str, str]:
    """The lines of a connection file by the name of the key management system."""
    rows = [line.split() for line in _lines(text) if line.strip() and not line.lstrip().startswith("#")]
    return {row[1]: " ".join(row) for row in rows if len(row) > 2}


def kms_render(lines: t.Mapping[str, str]) -> str:
    """The connection file's text; former names stay, for backups need them."""
    return MARK + "".join(f"{line}\n" for line in lines.values())
