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
      keycommand: >-
        Servers that ask a command for their key (EDB Postgres TDE, CYBERTEC PostgreSQL) or for the passphrase of their TLS key (any PostgreSQL).
        The secret is wrapped by the token, and C(hsm-tde) answers as the server's own user.
      fep: Fujitsu Enterprise Postgres, which encrypts tablespaces itself; its master key lies in a slot of openCryptoki, in a file or in any token.
      mariadb: >-
        MariaDB, whose server encrypts tables, logs and temporary files itself (file_key_management). Its keys are wrapped by the token and
        reach it in memory only.
      pg_tde: >-
        PostgreSQL with the extension pg_tde (Percona) or open_pg_tde, which encrypts tables and write-ahead log itself. Its keys lie in a file that
        is in memory only and wrapped by the token, in Vault or at a KMIP server.
      oracle: >-
        Oracle with Transparent Data Encryption. Its master keys lie in a software keystore or in an nShield HSM, under module, softcard or card set
        protection. It needs python-oracledb on the target.
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
    description: >-
      Folder of the server's socket, with V(mariadb) the socket itself or its folder. Without it the running server's own, or the engine's default.
    type: path
  login_user:
    description:
      - The database role. Without it the one with the name of the operating system's user, with V(mariadb) the account V(root).
      - It must be a superuser to change anything.
    type: str
  login_password:
    description: Its password, in quotes. Not needed on the local socket.
    type: str
  login_db:
    description: The database to connect to. Not used with V(mariadb), whose connections need none.
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
  keycommand:
    description:
      - Options of the engine V(keycommand).
      - What a task leaves out is taken from the cluster's record on the target, once there is one.
      - Everything with the token, the KMIP server and the wrapped secret is done as O(keycommand.os_user), in a state directory of that
        user's beside O(state_directory). With C(pin_source) of kind V(file) the PIN's file is that user's, mode 0400. So is the file
        O(kmip_certificate_key).
    type: dict
    suboptions:
      kind:
        description: What asks for the secret. Required the first time; it cannot change.
        type: str
        choices:
          edb: EDB Postgres TDE. Its C(initdb) makes the key and has it wrapped to C(pg_encryption/key.bin) in O(keycommand.data_directory).
          cybertec: CYBERTEC PostgreSQL (C(encryption_key_command)). The key is made here, O(keycommand.key_bits) long, and given as hex.
          ssl_passphrase: The C(ssl_passphrase_command) of any PostgreSQL. The secret is the passphrase of the server's TLS key.
          secret: Anything else that runs a command as its own user and reads a secret from its standard output.
      os_user:
        description: The operating system's user whom the server runs as; V(postgres) if it was never given.
        type: str
      data_directory:
        description: The server's data directory. Required with O(keycommand.kind=edb); it need not exist yet.
        type: path
      command:
        description: Where M(hsm.tde.tde_command) installed the command; V(/usr/local/sbin/hsm-tde) if it was never given.
        type: path
      secret:
        description:
          - The secret to be wrapped, in quotes, when there is none yet. Without it one is made by chance.
          - A wrapped secret is never replaced; another one is reported by a warning.
          - Not used with O(keycommand.kind=edb).
        type: str
      key_bits:
        description: Bits of the data key, with V(edb) and V(cybertec); 256 if it was never given.
        type: int
        choices: [128, 192, 256]
      adopt_master_key:
        description:
          - Take a key of the wished label that the token has already as the cluster's master key; for the further nodes of a cluster on a
            shared HSM, each of which rotates its own copy of the wrapped secret. It must be AES, made in the token and never extractable.
          - At a KMIP server likewise, for nodes that show it the same certificate. It must be an active AES key of 256 bits, which is tried out.
          - Without it such a key is an error.
        type: bool
  fep:
    description:
      - Options of the engine V(fep).
      - What a task leaves out is taken from the cluster's record on the target, once there is one.
      - The server's settings go to a file of their own, C(hsm-tde.conf) beside the keystore, which C(postgresql.conf) includes at its end. The
        server is never restarted; a result says when it must be.
    type: dict
    suboptions:
      keystore:
        description:
          - Where the master key lies; V(hsm) if it was never given.
          - It cannot change once there is a master key. Such a change is not supported by Fujitsu.
        type: str
        choices:
          hsm: In a slot of openCryptoki, by the library C(tde_z) (IBM Z and LinuxONE). The slot is that of the task's token.
          file: In a file under a passphrase of 8 to 200 bytes.
          plugin: In any PKCS#11 token, by the library C(tde_kms) and a custom plugin, which is the command C(hsm-tde).
      keystore_location:
        description:
          - Folder of the keystore's files, outside of the data directory. Required with V(hsm) and V(file) the first time. It is made if it does not exist.
        type: path
      auto_open:
        description:
          - The server opens the keystore by itself at each start. If it was never given, a C(keystore.aks) that is there is left, and no PIN is
            written.
          - With V(hsm) the user PIN rests in C(hsm-tde.conf), mode 0600, and superusers of the database can read it with C(SHOW).
          - With V(file) the server keeps an opened copy, C(keystore.aks), which opens on this host only.
          - Without it, C(hsm-tde open) opens the keystore after each start, or an operator does; a recovery after a crash then
            needs the passphrase or PIN at the start itself (C(pg_ctl --keystore-passphrase), C(pg_ctl -u)).
        type: bool
      data_directory:
        description: The data directory. Required the first time.
        type: path
      bin_directory:
        description: Folder of the server's programs. Required where one is run, with O(fep.create_cluster), or O(fep.auto_open) of a file.
        type: path
      os_user:
        description: The operating system's user of the server; V(fsepuser) if it was never given.
        type: str
      create_cluster:
        description: Create the database cluster with C(initdb) where there is none. The server is never started.
        type: bool
      initdb_options:
        description: Further options of C(initdb); V(--encoding=UTF8) and V(--locale=C.UTF-8) if they were never given.
        type: list
        elements: str
      tablespace_directory:
        description: The folder above tablespaces that give no location.
        type: path
      plugin_directory:
        description: With V(plugin), the folder of plugins (C(tde_kms.plugin_path)), in which the plugin is a link to O(fep.command). Required the first time.
        type: path
      command:
        description: Where M(hsm.tde.tde_command) installed the command; V(/usr/local/sbin/hsm-tde) if it was never given.
        type: path
      kms_name:
        description:
          - With V(plugin), the name of the connection (C(hsm-tde-kms.conf)); V(hsm-tde) if it was never given. A rotation adds one of a new name.
        type: str
      key_id:
        description: With V(plugin), label of the key in the token; V(hsm-tde.CLUSTER) if it was never given. It is made if it does not exist.
        type: str
  mariadb:
    description:
      - Options of the engine V(mariadb). What a task leaves out is taken from the cluster's record on the target, once there is one.
      - "The store holds one data key for each number of a key of the server: C(key.1.system) for redo log, binary logs and the system
        tablespace, C(key.2.temporary) for temporary files, and one for each tablespace, at first C(key.3.default)."
      - A tablespace is here a name for a key and the tables that are under it. Each table keeps the file that it has; one that no tablespace
        was named for belongs to V(default). Neither location nor owner can be given, a schema is a database, and tables are named
        C(DATABASE.TABLE).
      - With M(hsm.tde.tde_keystore) and C(state=open) the keys are written to a file system in memory that is never swapped out, and
        an include file tells the server to encrypt. Its next start needs the keys; with a wrong or missing one it does not start.
      - The server reads keys when it starts only. After a new one, results say C(restart_required), and the same task, run again
        after the restart, goes on.
      - Tables are built anew while others read and write them, one at a time. With a full-text index others can only read meanwhile. The binary
        log does not get it, since each replica has keys of its own, under the same numbers; change replicas first.
    type: dict
    suboptions:
      data_directory:
        description: The data directory. Without it that of the server which answers.
        type: path
      key_directory:
        description:
          - Where the file system in memory is mounted, a folder of root's own. C(/run/hsm-tde/CLUSTER) if it was never given.
        type: path
      include_directory:
        description:
          - Where the server reads include files from. C(/etc/mysql/mariadb.conf.d) or C(/etc/my.cnf.d) if it was never given.
          - The file written there is C(zz-hsm-tde.cnf). It holds no secret.
        type: path
      os_user:
        description: The operating system's user of the server. V(mysql) if it was never given.
        type: str
      refuse_plain_tables:
        description: Whether nobody can make a table that is not encrypted (C(innodb_encrypt_tables=FORCE)). V(true) if it was never given.
        type: bool
      encryption_threads:
        description:
          - How many of the server's threads encrypt, in the background, what is there, the system tablespace with it. 4 if it was never given.
        type: int
      former_key_file:
        description:
          - What becomes of the key file of a server that C(file_key_management) encrypts already. Keys, numbers and cipher stay, so that no
            page changes; C(innodb_default_encryption_key_id) tells which of them is that of V(default), else there is a new one.
          - The keys are read from the file that the running server names, also where it is encrypted under a password (SHA-1), and of each
            number in use a file of the server must open with its key.
        type: str
        choices:
          refuse: Such a server is left alone.
          take: >-
            M(hsm.tde.tde_keystore) with C(state=present) seals the keys in the store, and C(state=open) gives them to the server in memory, which
            it works with after its restart. The file stays.
          remove: >-
            As V(take), and C(state=open) removes the file once the server was restarted and the task's credentials have opened each of its keys in
            the store. Copies of it stay dangerous until O(mariadb.reencrypt) has given the tables new keys.
        default: refuse
      reencrypt:
        description:
          - With M(hsm.tde.tde_master_key) and C(state=rotated), rotate the data keys, too. Each tablespace gets a new key, which needs a restart,
            and then each of its tables is built anew under it. Only this revokes what an old copy of the store opens.
          - The former keys stay in the store for backups. Keys 1 and 2 cannot be replaced.
          - Every keyslot of the data keys needs its credential in the task (O(passphrase), O(pin)).
        type: bool
        default: false
  pg_tde:
    description:
      - Options of the engine V(pg_tde). What a task leaves out is taken from the cluster's record on the target, once there is one.
      - With M(hsm.tde.tde_keystore) and C(state=present) everything is done, if the server answers. The library is loaded, the extension
        created, the provider added, keys made and set, and the write-ahead log encrypted. What the server reads at its start only is told by
        C(restart_required), and the same task, run again after the restart, goes on. C(state=open) gives the server what it needs for its start.
      - The keys are C(hsm-tde.CLUSTER), after a rotation C(hsm-tde.CLUSTER.TAG), with V(database) as O(pg_tde.scope) followed by C(@DATABASE). Each is
        looked for at its provider before it is made, and a key in memory is sealed on the disk before it is set.
      - Another O(pg_tde.provider) gets keys of its own, which are set and verified. Provider and keys of before stay for backups.
      - A tablespace is here the access method V(tde_heap), the only name possible. Tables are built anew under it in the tablespaces that they are
        in, one at a time, each locked meanwhile; with a whole database it becomes the default of tables to come. Neither location nor owner can
        be given.
      - A standby is never changed. Before keys are rotated on the primary, it must reach the same provider under the same paths.
    type: dict
    suboptions:
      extension:
        description: The extension, with which its functions and parameters begin; V(pg_tde) if it was never given.
        type: str
        choices: [pg_tde, open_pg_tde]
      provider:
        description: Where the keys lie; V(file) if it was never given.
        type: str
        choices:
          file: In a file that the server writes in memory only. What is in it lies on the disk sealed by a data key of the store, which the keyslots guard.
          vault-v2: In a key/value engine of version 2 of Vault. It guards the keys, so no keyslot is listed, or V(primary) with V(kmip).
          kmip: At the first of O(kmip_servers), under this client's certificate. It guards the keys, so no keyslot is listed, or V(primary) with V(kmip).
      provider_name:
        description: The provider's name in the server, 1 to 63 of C(A-Z a-z 0-9 _ . -); C(hsm-tde-PROVIDER) if it was never given.
        type: str
      scope:
        description: Whether the databases share a key; V(global) if it was never given.
        type: str
        choices:
          global: A provider and a default key for all databases. One whose own key somebody else set keeps it.
          database: A provider and a key for each of O(pg_tde.databases). The write-ahead log has a global one in any case.
      databases:
        description: Databases that get the extension; O(login_db) if it was never given.
        type: list
        elements: str
      wal_encrypt:
        description:
          - Encrypt the write-ahead log. V(true) if it was never given.
          - The server then does not start while its key cannot be had; with V(kmip) and V(vault-v2) that service must be up before it.
        type: bool
      enforce_encryption:
        description: Whether nobody can make a table that is not encrypted. Left as it is if it was never given.
        type: bool
      cipher:
        description: Cipher of keys and tables that are made from now on; V(aes_256) if it was never given. Versions that have no choice ignore it.
        type: str
        choices: [aes_128, aes_256]
      data_directory:
        description: The data directory. Without it that of the server which answers.
        type: path
      key_directory:
        description: >-
          Where the file system in memory is mounted through which the server gets keys, certificates and tokens, a folder of root's own.
          C(/run/hsm-tde/CLUSTER) if it was never given.
        type: path
      os_user:
        description: The operating system's user of the server; V(postgres) if it was never given.
        type: str
      vault_url:
        description: URL of Vault, with V(vault-v2).
        type: str
      vault_mount_path:
        description: Where the key/value engine is mounted.
        type: str
      vault_token:
        description: File of root's, mode 0600, that holds the token. The server is given a copy in memory.
        type: path
      vault_ca:
        description: File with the certificates (PEM) of the authority that is trusted for Vault.
        type: path
      vault_namespace:
        description: Namespace of Vault.
        type: str
  oracle:
    description:
      - Options of the engine V(oracle). What a task leaves out is taken from the cluster's record on the target, once there is one.
      - It needs python-oracledb 2 or newer in the Python that runs the modules. The role P(hsm.tde.prerequisites#role) installs it where there are
        wheels, on x86_64 and aarch64. Elsewhere build it yourself.
      - The only keyslot is V(primary). Its protection is V(passphrase) for the software keystore, or V(module), V(softcard) or V(ocs), the last two with the
        name of the softcard or card set in C(token_label). O(passphrase) is that of the present credential, the keyslot's own that of the wished one.
      - A credential is judged by all rules of Oracle and nShield, and tried on the HSM, before a statement is sent with it, because one that is mistyped
        falls to module protection without a word. After each master key its real protection is looked at (C(nfkminfo), C(rocs)).
      - With M(hsm.tde.tde_keystore), V(present) and V(open) lead to the same end. Whatever a restart is needed for is told by C(restart_required), and
        the same task, run again after the restart, goes on. PDBs that are closed are left behind, and told.
      - "Changes of the keyslot follow the order of Entrust's guide. Another passphrase: PDBs open, close, the HSM's own tool (C(ppmk), C(cardpp)),
        restart, PDBs open, open, auto-login's secret. Another token takes its keys along with O(oracle.transfer_keys). Any other change of
        token or method is refused while
        anything is encrypted, unless O(oracle.safe_way_round)."
      - A tablespace is named C(PDB.NAME). One that exists is encrypted online where it is; an encryption that was broken off is finished. Nothing moves.
      - Only stand-ins of Oracle and nShield were run with it.
    type: dict
    suboptions:
      service:
        description: Service name of the root container, or without O(login_host) a whole connect string. O(login_db) if it was never given.
        type: str
      privilege:
        description: The administrative privilege of the session; V(sysdba) if it was never given. With V(syskm), parameters and PDBs must be as wished already.
        type: str
        choices: [sysdba, syskm, none]
      thick:
        description: Use Oracle's client libraries, which O(login_user) by the operating system (no user and no password) needs.
        type: bool
      client_directory:
        description: Folder of these libraries.
        type: path
      wallet_root:
        description: C(WALLET_ROOT), an absolute path. Required the first time. It is read when the database starts.
        type: path
      containers:
        description: PDBs that are meant; the root's keystore opens in any case, before theirs. All of them if it was never given.
        type: list
        elements: str
      auto_login:
        description:
          - The HSM keystore opens by itself after a start, by the secret C(HSM_PASSWORD) in an auto-login keystore, never a local one.
          - Each change of the credential updates it. While the credential changes, C(TDE_CONFIGURATION) is V(HSM) alone.
          - It needs O(oracle.software_passphrase).
        type: bool
      software_passphrase:
        description: Passphrase of the software keystore, where that is not the one that the keyslots name.
        type: str
      external_store:
        description:
          - Statements say C(IDENTIFIED BY EXTERNAL STORE), so that the credential stands in one statement only, which writes it there
            (C(WALLET_ROOT/tde_seps)).
        type: bool
      sid:
        description: For which instances parameters are set; V(*) if it was never given.
        type: str
      separator:
        description: What stands between passphrase and name; V(|) if it was never given.
        type: str
        choices: ['|', ':']
      call_timeout:
        description: Seconds for one statement and one of nShield's commands, 120 if it was never given; encrypting a tablespace has a week.
        type: float
      recovery:
        description:
          - What only people know of the HSM, for the question whether a keystore with O(oracle.auto_login) opens by itself after an outage. It is
            looked up in the table of the vendor's guide, as M(hsm.tde.nshield_info) does, before anything is made.
          - Where something is missing, auto-login is refused; where it is in use already, and where something is not known, that is told.
        type: dict
        suboptions:
          cluster:
            description: Whether more than one HSM serves the database. By default, if the world has more than one module.
            type: bool
          same_passphrase:
            description: Whether all cards of the card set have one passphrase.
            type: bool
          remote_administration:
            description: Whether cards are read through a Remote Administration channel.
            type: bool
          channel_script:
            description: Whether a script makes that channel again.
            type: bool
          persistent_only:
            description: Whether authorisation comes from a persistent card that is not left in a slot.
            type: bool
      nfast_home:
        description: Where nShield's software is; C(/opt/nfast) if it was never given.
        type: path
      kmdata:
        description: C(NFAST_KMDATA); C(kmdata) in O(oracle.nfast_home) if it was never given.
        type: path
      transfer_keys:
        description: For this run, another softcard, or another card set, gets the keys of the present one (C(rocs)), after a backup of the Security World.
        type: bool
        default: false
      safe_way_round:
        description: For this run, where no key can be transferred, go from the HSM to the software keystore, and under the new credential back into the HSM.
        type: bool
        default: false
      acs_passphrase:
        description: Passphrase of the administrator cards in the HSM's slots, where a transfer or a world of FIPS 140 level 3 asks for it.
        type: str
      backup_directory:
        description: Where the Security World is backed up before a transfer; C(nshield-backups) in the state directory if it was never given.
        type: path
requirements:
  - psycopg 3.1 or newer, for MariaDB PyMySQL 1.1 or newer, and cryptography on the target; the role P(hsm.tde.prerequisites#role) installs them
extends_documentation_fragment:
  - hsm.tde.pkcs11
  - hsm.tde.kmip
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
          kmip: A master key at a KMIP server, which encrypts and decrypts itself where it speaks KMIP 1.4; else the key is got for each use.
          module: The module of an nShield HSM alone, with the engine V(oracle).
          softcard: The softcard O(keyslots[].token_label) of an nShield HSM, with the engine V(oracle).
          ocs: The operator card set O(keyslots[].token_label) of an nShield HSM, with the engine V(oracle).
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
      kmip:
        description:
          - The key management service of a keyslot with O(keyslots[].protection=kmip). What is left out is the task's own, O(kmip_servers) and
            its kind.
        type: dict
        suboptions:
          service:
            description: As O(kmip_service).
            type: str
          servers:
            description: As O(kmip_servers).
            type: list
            elements: str
          ca:
            description: As O(kmip_ca).
            type: path
          certificate:
            description: As O(kmip_certificate).
            type: path
          certificate_key:
            description: As O(kmip_certificate_key).
            type: path
          timeout:
            description: As O(kmip_timeout).
            type: float
"""
