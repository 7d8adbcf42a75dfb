# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  engine:
    description: The database engine.
    type: str
    required: true
    choices:
      postgresql: Stock PostgreSQL on directories that the Linux kernel encrypts (fscrypt), each data key wrapped by the token.
  cluster:
    description:
      - Name of the cluster in the wrapped-key store, in the token's key labels and in the journal.
      - 1 to 63 of C(A-Z a-z 0-9 _ . -), beginning with a letter or digit.
    type: str
    required: true
  login_host:
    description:
      - Host of the database server. Without it the server's socket is used, as the operating system's user of the server.
      - The server's files must lie on the target in any case.
    type: str
  login_port:
    description: Port of the database server. Without it the running server's own, or the engine's default.
    type: int
  login_unix_socket:
    description: Folder of the server's socket. Without it the running server's own, or the engine's default.
    type: path
  login_user:
    description: The database role. Without it the one with the name of the operating system's user. It must be a superuser to change anything.
    type: str
  login_password:
    description: Its password, in quotes. Not needed on the local socket.
    type: str
  login_db:
    description: The database to connect to.
    type: str
    default: postgres
  passphrase:
    description:
      - Opens keyslots under a passphrase, where the token cannot or need not; also the passphrase of such keyslots that are
        listed without one.
    type: str
  postgresql:
    description:
      - Options of the engine V(postgresql).
      - What a task leaves out is taken from the cluster's record on the target, once there is one.
    type: dict
    suboptions:
      coverage:
        description: What is encrypted.
        type: str
        choices:
          tablespaces: Named tablespaces. The write-ahead log, temporary files, statistics and catalogs stay in the clear.
          cluster: The whole data directory of a new cluster, with all of these.
        default: tablespaces
      data_directory:
        description:
          - The data directory.
          - With O(postgresql.coverage=cluster) it is the encrypted place and required, under O(postgresql.mount_point).
          - With O(postgresql.coverage=tablespaces) it is found by asking the running server.
        type: path
      storage:
        description: What O(postgresql.mount_point) is.
        type: str
        choices:
          directory: A directory on a file system of the target that has the feature C(encrypt).
          image: The mount point of an ext4 file system in the file O(postgresql.image), made, grown and mounted by this collection.
        default: directory
      mount_point:
        description:
          - Root's own folder above all encrypted places; nobody else can write to it or to a folder above it.
          - So a missing mount or a locked key stops the server, instead of letting crash recovery make a tablespace anew in plain text.
        type: path
      image:
        description: The image's file, required with O(postgresql.storage=image).
        type: path
      image_size:
        description: Its size, for example V(2G). A larger size than it has makes it grow; it never shrinks.
        type: str
      bin_directory:
        description: Folder of PostgreSQL's programs. Without it the newest under C(/usr/lib/postgresql).
        type: path
      os_user:
        description: The operating system's user of the server.
        type: str
        default: postgres
      create_cluster:
        description:
          - With O(postgresql.coverage=cluster), create the database cluster in its place with C(initdb), or with
            C(pg_createcluster) if O(postgresql.debian_cluster) is set. The server is never started.
        type: bool
        default: false
      debian_cluster:
        description: Version and name of the cluster in Debian's packaging, for example V(15/main).
        type: str
      initdb_options:
        description: Further options of C(initdb).
        type: list
        elements: str
        default: ['--encoding=UTF8', '--locale=C.UTF-8']
requirements:
  - psycopg 3.1 or newer and cryptography on the target; the role P(hsm.tde.prerequisites#role) installs them
extends_documentation_fragment:
  - hsm.tde.pkcs11
"""

    KEYSLOTS = r"""
options:
  keyslots:
    description:
      - The keyslots wished for. Each holds the same data key under one protection, and any one of them opens it.
      - A keyslot that names no token lies in the token of the task, and is opened with the task's PIN. One that names
        another token needs a PIN of its own, so that no PIN is tried on a token that it does not belong to.
    type: list
    elements: dict
    suboptions:
      name:
        description: The keyslot's name.
        type: str
        default: primary
      protection:
        description: What guards the data key in it.
        type: str
        choices:
          token: A master key that never leaves a PKCS#11 token.
          passphrase: A key derived from a passphrase.
        default: token
      passphrase:
        description: The passphrase, in quotes, at least 12 characters. Without it, the passphrase that the task itself gives.
        type: str
      token_label:
        description: Label of the token.
        type: str
      token_serial:
        description: Serial number of the token.
        type: str
      slot_id:
        description: Id of the token's slot.
        type: int
      pin:
        description: The token's user PIN, in quotes.
        type: str
      library:
        description: Path of the token's PKCS#11 library. All tokens of one task share the environment of its library.
        type: path
"""
