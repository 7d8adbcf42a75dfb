#!/usr/bin/python
# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: tde_proof
short_description: Prove on the raw disk that tablespaces or a data directory are encrypted
version_added: 0.1.0
description:
  - Reads the raw blocks below a place and compares them with what its files say, and asks the kernel of each file whether it is
    encrypted, and under which key.
  - A place is V(encrypted) only if every file is encrypted under the cluster's own data key, blocks with content were compared and none
    was equal, and the same reading was shown to see a file in the clear on the same file system.
  - A place is V(plain) if any block stands on the device as it stands in the file.
  - A place is V(empty) if it holds nothing yet, and its directory, where the kernel encrypts, is encrypted under the cluster's own key.
    That proves nothing of what a server that encrypts its pages itself will put there.
  - All else is V(unknown), with the reasons. That is the answer wherever the blocks cannot be looked at (btrfs, overlay, memory, network
    file systems, a device that the kernel does not let root read), for a keystore that is closed, and for plain text above dm-crypt.
  - Large files are read in part, and of many files some, by chance; RV(proofs[].notes) says so.
  - Needs root on the target, and no PIN. What the verdict does not cover stands in RV(not_covered).
author:
  - The hsm.tde authors (@hsm-tde)
extends_documentation_fragment:
  - hsm.tde.database
  - hsm.tde.kmip
  - hsm.tde.pkcs11
  - hsm.tde.state
options:
  tablespaces:
    description:
      - Names of the tablespaces to be examined, encrypted or not.
      - At least one of O(tablespaces), O(data_directory) and O(relations) is required.
    type: list
    elements: str
  data_directory:
    description:
      - Examine the whole data directory, with the write-ahead log, temporary files and catalogs in it.
    type: bool
  relations:
    description:
      - Tables, indexes and materialized views to be examined with all their segments and forks, as V(database.schema.name).
    type: list
    elements: str
  canary:
    description:
      - Write a file with a marker into each place and one in the clear beside it, look for both on the device and remove them.
      - For places that hold nothing yet, and for file systems on which no file in the clear is found.
      - Not done in check mode.
    type: bool
    default: false
attributes:
  check_mode:
    description: Looks all the same and writes nothing, no canary either.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
seealso:
  - module: hsm.tde.tde_info
  - module: hsm.tde.tde_tablespace
"""

EXAMPLES = r"""
- name: Look at the disk below two tablespaces
  hsm.tde.tde_proof:
    engine: postgresql
    cluster: main
    tablespaces: [sealed, pg_default]
  register: proof

- name: Stop unless the whole cluster is encrypted
  hsm.tde.tde_proof:
    engine: postgresql
    cluster: main
    data_directory: true
  register: proof
  failed_when: not proof.all_encrypted

- name: Prove an encrypted tablespace that is still empty
  hsm.tde.tde_proof:
    engine: postgresql
    cluster: main
    tablespaces: [sealed]
    canary: true
"""

RETURN = r"""
all_encrypted:
  description: Whether there was something to examine and every verdict is V(encrypted).
  returned: success
  type: bool
  sample: true
proofs:
  description: One entry a place, in the order asked for.
  returned: success
  type: list
  elements: dict
  contains:
    place:
      description: The tablespace's or relation's name, or V(data directory).
      type: str
      sample: sealed
    path:
      description: Its directory.
      type: str
      sample: /srv/tde/sealed
    verdict:
      description: V(encrypted), V(plain), V(empty) or V(unknown).
      type: str
      sample: encrypted
    examined:
      description:
        - Counts of what was looked at. RV(proofs[].examined.blocks) are blocks with content that were compared,
          RV(proofs[].examined.blocks_equal) those that stand on the device as they are in the file, RV(proofs[].examined.blocks_zero)
          those left out because they hold zeros only.
      type: dict
      sample:
        files: 94
        files_read: 94
        blocks: 2112
        blocks_equal: 0
        blocks_zero: 40
        bytes: 8814592
        control_blocks_equal: 16
      contains:
        files:
          description: Files whose inode was asked for its encryption and key.
          type: int
        files_read:
          description: Files whose blocks were read.
          type: int
        blocks:
          description: Blocks with content that were compared.
          type: int
        blocks_equal:
          description: Blocks that stand on the device as they are in the file.
          type: int
        blocks_zero:
          description: Blocks of zeros, which prove nothing.
          type: int
        bytes:
          description: Bytes read of the files.
          type: int
        control_blocks_equal:
          description: Blocks of a file in the clear that the same reading found on the device.
          type: int
        marker_in_files:
          description: How often a marker stands in the files. Only if there was one.
          type: int
        marker_on_device:
          description: How often it stands on the device. Only if there was one.
          type: int
    how:
      description: How it was looked at, and on which device.
      type: str
      sample: >-
        Every file's inode was asked for its encryption and key identifier; blocks were located by FIEMAP after a sync, read directly from
        /dev/loop0 (loop on /srv/tde.img) and compared with the files' content.
    reasons:
      description: Why the verdict is what it is.
      type: list
      elements: str
      sample:
        - 0 of 2112 blocks stand on the device as they are in the files.
        - Every inode is encrypted under the key 8699c2c53707405da5aba5ae4d8583c0.
    notes:
      description: What else the reader should know, such as links that lead out of the place and what was read in part.
      type: list
      elements: str
      sample: []
not_covered:
  description: What these proofs say nothing of.
  returned: success
  type: list
  elements: str
  sample:
    - >-
      Freed blocks: what lay on the disk before, at this place or at the one that data moved away from, may still stand there in plain text.
"""

import typing as t

from ansible_collections.hsm.tde.plugins.module_utils.common.bridge import TdeModule, run_module
from ansible_collections.hsm.tde.plugins.module_utils.engines import database_options, load
from ansible_collections.hsm.tde.plugins.module_utils.engines.base import ProofWish
from ansible_collections.hsm.tde.plugins.module_utils.engines.request import request
from ansible_collections.hsm.tde.plugins.module_utils.storage.proof import NOT_COVERED, NOT_COVERED_BY_A_PART

SPEC: dict[str, t.Any] = {
    **database_options(),
    "tablespaces": {"type": "list", "elements": "str"},
    "data_directory": {"type": "bool"},
    "relations": {"type": "list", "elements": "str"},
    "canary": {"type": "bool", "default": False},
}


def act(module: TdeModule) -> dict[str, t.Any]:
    """Look; the result as RETURN says."""
    params = module.params
    engine = load(params["engine"])(request(params))
    engine.require("proof")
    wish = ProofWish(tuple(params["tablespaces"] or ()), bool(params["data_directory"]), tuple(params["relations"] or ()))
    canary = params["canary"] and not module.check_mode
    if params["canary"] and not canary:
        module.warn("No canary is written in check mode; without one, an empty place stays unknown.")
    proofs = engine.proofs(wish, canary=canary)
    return {
        "changed": False,
        "proofs": proofs,
        "all_encrypted": bool(proofs) and all(proof["verdict"] == "encrypted" for proof in proofs),
        "not_covered": [*NOT_COVERED, *([] if wish.data_directory else [NOT_COVERED_BY_A_PART])],
    }


def main() -> None:
    run_module(
        act,
        SPEC,
        libraries=("cryptography", "pkcs11", "psycopg"),
        read_only=True,
        required_one_of=[("tablespaces", "data_directory", "relations")],
    )


if __name__ == "__main__":
    main()
