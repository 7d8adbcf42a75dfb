# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where SoftHSM keeps its tokens. What is done about its way of writing them: :mod:`.copies`."""

from __future__ import annotations

import os
import re

#: A configuration has some hundred bytes.
_MAX_BYTES = 1 << 16


def is_softhsm(path: str) -> bool:
    """Whether a library is SoftHSM, by its file's name."""
    return os.path.basename(path).startswith("libsofthsm2")


def configuration() -> str:
    """The file that SoftHSM reads in this process's environment (softhsm2.conf(5); SimpleConfigLoader.cpp, getConfigPath)."""
    own = os.path.expanduser("~/.config/softhsm2/softhsm2.conf")
    return os.environ.get("SOFTHSM2_CONF") or (own if os.path.exists(own) else "/etc/softhsm/softhsm2.conf")


def token_folders() -> list[str]:
    """The folders of the tokens, one a token."""
    try:
        with open(configuration(), encoding="utf-8", errors="replace") as handle:
            found = re.findall(r"^\s*directories\.tokendir\s*=\s*(\S.*?)\s*$", handle.read(_MAX_BYTES), re.MULTILINE)
        return sorted(entry.path for entry in os.scandir(found[-1]) if entry.is_dir(follow_symlinks=False)) if found else []
    except OSError:
        return []
