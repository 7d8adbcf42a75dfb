# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Numbers of the kernel's ioctls. Structures are packed with ``=``: the host's byte order, the kernel's sizes."""

from __future__ import annotations

import platform

READ, WRITE = 2, 1

#: Processors whose asm/ioctl.h has 13 bits of size and 3 of direction, with 4 for writing; all others follow asm-generic/ioctl.h.
_OTHER_LAYOUT = ("ppc", "mips", "sparc", "alpha")


def number(direction: int, kind: str, index: int, size: int, machine: str = "") -> int:
    """_IOR, _IOW and _IOWR of the C headers.

    :param direction: :data:`READ` (the kernel fills the structure), :data:`WRITE`, or both.
    :param size: of the structure in bytes.
    :param machine: as ``uname -m`` says; this host's if empty.
    """
    if (machine or platform.machine()).startswith(_OTHER_LAYOUT):
        direction = (direction & READ) | (4 if direction & WRITE else 0)
        return direction << 29 | size << 16 | ord(kind) << 8 | index
    return direction << 30 | size << 16 | ord(kind) << 8 | index
