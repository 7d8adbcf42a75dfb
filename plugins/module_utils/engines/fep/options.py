# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dictionary ``fep`` of a task, completed from the cluster's record."""

from __future__ import annotations

import dataclasses
import os
import re
import typing as t

from ...common.errors import TdeError
from ..options import OfServer, absolute_path, with_recorded

#: Kinds of keystore: the library tde_z with a slot of openCryptoki, a file, the library tde_kms with a plugin.
HSM, FILE, PLUGIN = "hsm", "file", "plugin"
KINDS = (HSM, FILE, PLUGIN)

#: Names that stand between blanks in the connection file, and the plugin's, which is a file's name in its folder.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclasses.dataclass(frozen=True)
class Options(OfServer):
    """What the engine works with; ``given`` is what the record keeps.

    :param auto_open: whether the server opens the keystore by itself at each start; None if nobody ever said.
    :param tablespace_directory: the folder above tablespaces that give no location.
    :param plugin_directory: tde_kms.plugin_path; :param command: what the plugin in it is a link to.
    :param kms_name: the plugin's name in the connection file; :param key_id: the label of the key that it is asked for.
    """

    keystore: str
    keystore_location: str | None
    auto_open: bool | None
    data_directory: str | None
    bin_directory: str | None
    os_user: str
    create_cluster: bool
    initdb_options: tuple[str, ...]
    tablespace_directory: str | None
    plugin_directory: str | None
    command: str
    kms_name: str
    key_id: str

    @property
    def given(self) -> dict[str, t.Any]:
        """The options as plain data."""
        return {**dataclasses.asdict(self), "initdb_options": list(self.initdb_options)}

    def program(self, name: str) -> str:
        """The path of one of the server's programs.

        :raises TdeError: ``invalid_option``, ``command_missing``.
        """
        if self.bin_directory is None:
            raise TdeError("invalid_option", "is missing", obj="option bin_directory", next_step=f"Name the folder with {name}.")
        path = os.path.join(self.bin_directory, name)
        if not os.access(path, os.X_OK):
            raise TdeError("command_missing", "is not there", obj=path, next_step="Correct bin_directory.")
        return path


def complete(given: t.Mapping[str, t.Any], recorded: t.Mapping[str, t.Any], cluster: str) -> Options:
    """Options of a task; what it leaves out is taken from the record.

    :param given: the task's dictionary; :param recorded: the record's, empty if there is none.
    :param cluster: names the plugin's key where nothing else does.
    :raises TdeError: ``invalid_option``.
    """
    merged = with_recorded(given, recorded)
    for name in ("kms_name", "key_id"):
        if merged.get(name) is not None and not _WORD.fullmatch(str(merged[name])):
            raise TdeError(
                "invalid_option",
                "must be 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
                obj=f"{name} {merged[name]!r}",
            )
    return Options(
        keystore=merged.get("keystore") or HSM,
        keystore_location=absolute_path("keystore_location", merged.get("keystore_location")),
        auto_open=merged.get("auto_open"),
        data_directory=absolute_path("data_directory", merged.get("data_directory")),
        bin_directory=absolute_path("bin_directory", merged.get("bin_directory")),
        os_user=merged.get("os_user") or "fsepuser",
        create_cluster=bool(merged.get("create_cluster")),
        initdb_options=tuple(merged.get("initdb_options") or ("--encoding=UTF8", "--locale=C.UTF-8")),
        tablespace_directory=absolute_path("tablespace_directory", merged.get("tablespace_directory")),
        plugin_directory=absolute_path("plugin_directory", merged.get("plugin_directory")),
        command=absolute_path("command", merged.get("command")) or "/usr/local/sbin/hsm-tde",
        kms_name=merged.get("kms_name") or "hsm-tde",
        key_id=merged.get("key_id") or f"hsm-tde.{cluster}",
    )


def check_present(options: Options) -> None:
    """What a keystore needs to know.

    :raises TdeError: ``invalid_option``.
    """
    needed = {HSM: ("data_directory", "keystore_location"), FILE: ("data_directory", "keystore_location")}
    for name in needed.get(options.keystore, ("data_directory", "plugin_directory")):
        if getattr(options, name) is None:
            raise TdeError(
                "invalid_option", "is missing", obj=f"option {name}", next_step=f"keystore: {options.keystore} needs it."
            )
    location, data = options.keystore_location, options.data_directory
    if location and data and (location == data or location.startswith(f"{data}/")):
        raise TdeError(
            "invalid_option",
            f"lies in the data directory {data}: base backups would carry the keystore with the data",
            obj=f"keystore_location {location}",
            next_step="Choose a folder outside of it.",
        )
    if options.auto_open and options.keystore == PLUGIN:
        raise TdeError(
            "invalid_option",
            "is not for keystore: plugin, whose plugin needs no secret of the server",
            obj="option auto_open",
            next_step="Leave it out; hsm-tde open opens the keystore after each start.",
        )
