# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Texts of the systemd units that open a cluster's keystore before its database starts.

``hsm-tde@CLUSTER.service`` opens and closes one cluster's keystore. The database's unit gets a drop-in with
``Requires=`` and ``After=``, so that it does not start on a locked place. A keystore that is opened in the running server
is opened after it, at each of its starts, and ends with it.
"""

from __future__ import annotations

import os
import re
import typing as t

from ..common.errors import TdeError
from . import exits

TEMPLATE = "hsm-tde@.service"

#: sd_booted(3): systemd runs this host if and only if this folder exists.
_BOOTED = "/run/systemd/system"

#: First line of every file written here; a file without it is somebody else's and is left alone.
MARK = "# Written by hsm.tde.tde_command; changes are overwritten.\n"

#: Seconds that the unit waits for a token that must exist and does not answer: a network HSM after a power
#: outage comes back later than its clients.
WAIT_SECONDS = 300

#: systemd.unit(5), "Unit names": prefix, optional instance, suffix.
_UNIT = re.compile(r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]*)?\.service")

# No directive here may give the service a mount name space of its own (ProtectSystem=, PrivateTmp=,
# ProtectKernelTunables= and their kind, systemd.exec(5)): an image mounted inside it would stay invisible to
# the database. MemoryDenyWriteExecute= breaks libffi's callbacks, ProtectClock= and DevicePolicy= the loop devices.
# CAP_SYS_PTRACE reads the working directory of another user's process (proc(5), /proc/pid/cwd), by which a server is known
# to run. CAP_IPC_OWNER attaches to the shared memory of openCryptoki's daemon, which in 3.23 runs as its own user:
# a unit of root's is in no further group.
_TEMPLATE_TEXT = """{mark}[Unit]
Description=Open the encrypted places of database cluster %i
Documentation=https://github.com/hsm-tde/hsm.tde
After=local-fs.target remote-fs.target network-online.target pkcsslotd.service nc_hardserver.service
Wants=network-online.target
RequiresMountsFor={state_directory} {command}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={command} open --wait {wait} %i
ExecStop={command} close %i
TimeoutStartSec={timeout}
Restart=on-failure
RestartSec=60
# Only a token that does not answer is asked again; a refused PIN never is.
RestartPreventExitStatus={no_restart}
StandardInput=null
UMask=0077
LimitCORE=0
LimitMEMLOCK=infinity
KeyringMode=private
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_CHOWN CAP_FOWNER CAP_SETUID CAP_SETGID CAP_IPC_LOCK
CapabilityBoundingSet=CAP_IPC_OWNER CAP_SYS_PTRACE
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


def booted() -> bool:
    """Whether systemd runs this host."""
    return os.path.isdir(_BOOTED)


def check_unit(name: str) -> str:
    """The name of a service's unit.

    :raises TdeError: ``invalid_option``.
    """
    if not _UNIT.fullmatch(name):
        raise TdeError("invalid_option", "is not the name of a service's unit (NAME.service)", obj=f"database_units {name!r}")
    return name


def template(command: str, state_directory: str) -> str:
    """``hsm-tde@.service``.

    :param command: path of the command, :param state_directory: where the host remembers; both plain paths.
    """
    return _TEMPLATE_TEXT.format(
        mark=MARK,
        command=command,
        state_directory=state_directory,
        wait=WAIT_SECONDS,
        timeout=WAIT_SECONDS + 120,
        no_restart=" ".join(str(code) for code in exits.NOT_TRIED_AGAIN),
    )


def instance(database_units: t.Sequence[str], credential: str | None, after_start: bool = False) -> str | None:
    """The drop-in of one ``hsm-tde@CLUSTER.service``, None where it needs none.

    :param database_units: started when the keystore opens late, since their own start failed with it.
    :param after_start: the keystore is opened in the running server, which closes it by ending.
    :param credential: path of the PIN encrypted by ``systemd-creds encrypt``; its name is the file's.
    """
    parts = []
    if database_units:
        units = " ".join(database_units)
        if after_start:
            parts.append(f"[Unit]\nAfter={units}\nBindsTo={units}\nPartOf={units}\n[Service]\nExecStop=\n")
        else:
            parts.append(f"[Unit]\nBefore={units}\nWants={units}\n")
    if credential:
        parts.append(f"[Service]\nLoadCredentialEncrypted={os.path.basename(credential)}:{credential}\n")
    return MARK + "\n".join(parts) if parts else None


def database(cluster: str, after_start: bool = False) -> str:
    """The drop-in of a database's unit: no start without the open keystore; or, opened after it, each start opens it."""
    unit = f"hsm-tde@{cluster}.service"
    if after_start:
        return f"{MARK}[Unit]\nWants={unit}\n"
    return f"{MARK}[Unit]\nRequires={unit}\nAfter={unit}\n"
