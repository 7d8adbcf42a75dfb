# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  state_directory:
    description:
      - Folder in which the target remembers what must exist and what was done, root's own.
      - It holds the registry of tokens and keys, the fingerprints of refused PINs, the journal, and the wrapped data keys.
      - Every task that concerns the same tokens and clusters must name the same folder.
    type: path
    default: /var/lib/hsm-tde
"""
