# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  nfast_home:
    description: Where nShield's Security World software is installed, its C(NFAST_HOME).
    type: path
    default: /opt/nfast
  bin_directory:
    description: Folder of nShield's commands. By default C(bin) below O(nfast_home).
    type: path
  kmdata:
    description:
      - Folder of the key management data, its C(NFAST_KMDATA). The Security World's files are in C(local) below it.
      - By default C(kmdata) below O(nfast_home).
    type: path
  timeout:
    description: Seconds for one of nShield's commands, people who put cards into slots included. It is ended then.
    type: float
    default: 60.0
notes:
  - Root, or a member of the group C(nfast), can run nShield's commands.
  - This was run against a stand-in for nShield's commands, made from the manuals and published transcripts; no HSM was at hand.
"""
