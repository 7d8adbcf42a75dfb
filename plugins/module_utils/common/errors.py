# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every failure of the collection: one exception and one table of stable codes.

``docs/error-codes.md`` is generated from :data:`ERROR_CODES`; a code that is not in the table
cannot be raised.
"""

from __future__ import annotations

import typing as t

#: What can be the matter, and never folded into one another (see docs/architecture.md).
CAUSES: dict[str, str] = {
    "absent": "It was looked for where it would be, and it is not there.",
    "refused": "A credential or a permission was refused.",
    "locked": "The token or the key counts too many wrong tries, or another run holds the lock.",
    "unreachable": "It must exist, and it did not answer or does not show.",
    "unsupported": "This token, kernel, file system or server cannot do it.",
    "damaged": "It is there and its content is not what it was.",
    "client_error": "What was asked for is wrong or incomplete; nothing was tried.",
}


class ErrorCode(t.NamedTuple):
    """A row of the table: its cause (a key of CAUSES), what it means to the reader, and what helps where nothing better is known."""

    cause: str
    meaning: str
    advice: str = ""


ERROR_CODES: dict[str, ErrorCode] = {
    # common
    "internal_error": ErrorCode(
        "client_error",
        "A defect of this collection: please report it with the name of the step.",
        "Report it with this message; run again with --check to see what is left to do.",
    ),
    "invalid_option": ErrorCode(
        "client_error", "An option is missing, unknown, malformed or contradicts another.", "Correct the option, then run again."
    ),
    "secret_not_text": ErrorCode(
        "client_error", "YAML read a secret as a number or a boolean (01234567 is octal): quote it. It was not tried."
    ),
    "python_too_old": ErrorCode("unsupported", "The target's Python is older than 3.10."),
    "library_missing": ErrorCode("absent", "A Python library is missing on the target: run the role hsm.tde.prerequisites."),
    "permission_denied": ErrorCode(
        "refused",
        "The operating system refused; most acts need root.",
        "Run it as root, and see that nothing on the way (a mount option, a container, SELinux) takes root's rights away.",
    ),
    "file_absent": ErrorCode(
        "absent", "A file that was named does not exist.", "Correct its path, or mount the file system that it is on."
    ),
    "file_not_private": ErrorCode(
        "refused",
        "A file or one of its parents has the wrong type, owner, mode or link count.",
        "Find out who changed it before you correct owner and mode.",
    ),
    "file_too_large": ErrorCode(
        "damaged", "A file is larger than any that this collection writes.", "Find out who wrote it; restore it from a backup."
    ),
    "disk_full": ErrorCode(
        "unreachable",
        "No space left; the former file is untouched.",
        "Make room, then run again: it goes on where this run stopped.",
    ),
    "io_error": ErrorCode(
        "unreachable",
        "Reading or writing failed in the operating system.",
        "Look at the kernel's log and at the device, then run again.",
    ),
    "busy": ErrorCode("locked", "Another run holds the lock; nothing was begun.", "Run again when it has ended."),
    "timeout": ErrorCode("unreachable", "No answer within the time allowed.", "Find out what keeps it busy, then run again."),
    "command_missing": ErrorCode(
        "absent", "A program that the step needs is not installed.", "Install the package that has it, then run again."
    ),
    "command_failed": ErrorCode(
        "unreachable", "A program that the step needs ended with an error.", "Correct what it says, then run again."
    ),
    "journal_damaged": ErrorCode("damaged", "The journal's hash chain is broken: entries were changed, removed or added."),
    "registry_damaged": ErrorCode("damaged", "The registry of tokens and keys cannot be read."),
    # pkcs11: the library
    "library_absent": ErrorCode("absent", "There is no PKCS#11 library at the path given."),
    "library_unreadable": ErrorCode(
        "refused",
        "The operating system does not let this user read the PKCS#11 library.",
        "Run it as root, or let this user read the library.",
    ),
    "library_not_trusted": ErrorCode(
        "refused",
        "Somebody other than root could replace the PKCS#11 library or a folder it is in; root does not load it.",
        "Give the library and every folder above it to root, writable for nobody else: root must not load what others can change.",
    ),
    "library_wrong_architecture": ErrorCode("unsupported", "The PKCS#11 library was built for another processor or word size."),
    "library_not_pkcs11": ErrorCode(
        "client_error",
        "The file is not a shared library with the function C_GetFunctionList.",
        "Correct the option library: it names the shared library (.so) that the token's maker delivers for PKCS#11.",
    ),
    "library_not_loaded": ErrorCode(
        "unreachable",
        "The dynamic linker refused the PKCS#11 library; often a library that it needs is missing.",
        "See with ldd which library it needs and does not find, and install that.",
    ),
    "library_not_started": ErrorCode(
        "unreachable", "The PKCS#11 library loaded and refused to start: its configuration, service or device is missing."
    ),
    "library_environment_conflict": ErrorCode(
        "client_error", "A PKCS#11 library reads its environment once a process; two environments need two tasks."
    ),
    # pkcs11: answers of the library without a code of their own, by cause
    "pkcs11_absent": ErrorCode(
        "absent",
        "The token answered that the object, slot or token does not exist.",
        "See with hsm.tde.pkcs11_token_info and hsm.tde.pkcs11_key_info what is there.",
    ),
    "pkcs11_refused": ErrorCode(
        "refused",
        "The token refused: a permission, a policy, or nobody is logged in.",
        "See what the token's policy and the key's usage flags allow.",
    ),
    "pkcs11_locked": ErrorCode(
        "locked", "The token is held by another session or user.", "End the other session, or wait for its end, then run again."
    ),
    "pkcs11_unreachable": ErrorCode(
        "unreachable",
        "The library, its service or the device did not answer as it should.",
        "Look at the token's service, log and device, then run again.",
    ),
    "pkcs11_unsupported": ErrorCode(
        "unsupported",
        "The token cannot do this, or not with these parameters.",
        "See with hsm.tde.pkcs11_token_info what the token can do.",
    ),
    "pkcs11_damaged": ErrorCode(
        "damaged",
        "The token found encrypted data, a wrapped key or a signature invalid.",
        "Restore what was encrypted from a backup, or use another keyslot.",
    ),
    "pkcs11_client_error": ErrorCode(
        "client_error",
        "The token found the request malformed or contradictory.",
        "Correct what the task asks of the token, then run again.",
    ),
    # pkcs11: tokens and PINs
    "uri_invalid": ErrorCode("client_error", "A PKCS#11 URI does not follow RFC 7512."),
    "uri_forbidden": ErrorCode("client_error", "A PKCS#11 URI carries a PIN, a PIN's source or a module: refused."),
    "token_absent": ErrorCode("absent", "No token matches, and the host does not remember that one should."),
    "token_unreachable": ErrorCode(
        "unreachable",
        "The host remembers this token and the library does not list it: unmounted, unplugged or another one in its place.",
        "Mount the token's folder, plug the device in or start its service.",
    ),
    "token_ambiguous": ErrorCode("client_error", "More than one token matches; nothing was tried on any of them."),
    "token_slot_absent": ErrorCode(
        "absent",
        "No slot with a token that may be initialised.",
        "Free a slot or add one in the token's own configuration; hsm.tde.pkcs11_token_info lists what there is.",
    ),
    "token_slot_empty": ErrorCode(
        "absent",
        "The slot is there and no token is in it.",
        "Put the token in, or name another slot; hsm.tde.pkcs11_token_info lists what there is.",
    ),
    "token_initialized": ErrorCode("client_error", "The token in the slot holds another label; it is not initialised again."),
    "token_reinitialize_unsafe": ErrorCode("unsupported", "This token is known to become unusable when it is initialised again."),
    "token_act_lost": ErrorCode(
        "unreachable",
        "The process that changed the token was ended, and it is not known whether the token changed.",
        "Run again: it looks at the token first.",
    ),
    "token_not_ready": ErrorCode(
        "absent",
        "The token is not initialised to the end: the user PIN was never set.",
        "The security officer finishes it (hsm.tde.pkcs11_token with so_pin and pin).",
    ),
    "session_open": ErrorCode(
        "client_error", "A defect of this collection: a second session on the token within the first.", "Report it."
    ),
    "pin_missing": ErrorCode("client_error", "The token asks for a login and no PIN was given.", "Give the PIN."),
    "pin_is_factory": ErrorCode(
        "client_error", "The PIN is the one that every token of this kind has from the factory.", "Choose another PIN."
    ),
    "pin_length": ErrorCode(
        "client_error",
        "The PIN is shorter or longer than the token allows; it was not tried.",
        "Give a PIN within these limits; hsm.tde.pkcs11_token_info shows them as pin_min and pin_max.",
    ),
    "pin_refused": ErrorCode("refused", "The token refused the PIN; the try is spent.", "Give the right PIN."),
    "pin_refused_before": ErrorCode(
        "refused", "This token refused this PIN before; it was not tried again.", "Give the right PIN."
    ),
    "pin_tries_low": ErrorCode("locked", "The token says that wrong PINs were entered; no try was made."),
    "pin_locked": ErrorCode(
        "locked",
        "The PIN is locked after too many wrong tries.",
        "The security officer sets it anew (hsm.tde.pkcs11_token with unlock_user_pin).",
    ),
    "pin_expired": ErrorCode(
        "refused", "The token wants a new PIN before it lets anybody work.", "Change it first (hsm.tde.pkcs11_pin)."
    ),
    "refused_pins_damaged": ErrorCode("damaged", "The list of refused PINs' fingerprints cannot be read; no PIN is tried."),
    "pin_file_damaged": ErrorCode("damaged", "A file with a PIN is empty or holds more than one line."),
    # pkcs11: keys and envelopes
    "key_absent": ErrorCode(
        "absent",
        "The token lists no such key, and this host does not remember that it should.",
        "Correct the label or id; hsm.tde.pkcs11_key_info lists the token's keys.",
    ),
    "key_unreachable": ErrorCode(
        "unreachable",
        "The key must exist and the token does not list it: storage not mounted, another token, or destroyed elsewhere.",
        "Mount the token's folder or plug the right token in; another keyslot opens the data meanwhile.",
    ),
    "key_ambiguous": ErrorCode(
        "client_error",
        "More than one key matches: label and id together must name one.",
        "Name the id as well, or give one of the keys another label by the token's own tools.",
    ),
    "key_mismatch": ErrorCode("client_error", "A key with this label exists and is not what was asked for."),
    "key_foreign": ErrorCode("client_error", "A key with the KEK's label stands in the token and this host did not make it."),
    "key_in_use": ErrorCode("refused", "A keystore needs the key: destroying it would make data unreadable."),
    "key_suspended": ErrorCode("refused", "The key's usage flags forbid this use: it was suspended, or made for something else."),
    "key_not_protected": ErrorCode(
        "refused", "The token made the key readable or fleeting against the request; the key was destroyed again."
    ),
    "key_value_invalid": ErrorCode(
        "client_error",
        "The key to import cannot be read, or is not of the type and size asked for.",
        "Correct the value, then run again.",
    ),
    "destroy_unconfirmed": ErrorCode("client_error", "A key would be destroyed and confirm_destroy does not name its label."),
    "kek_mismatch": ErrorCode("unreachable", "Another key stands under the KEK's label and id: its check value differs."),
    "kek_unfit": ErrorCode(
        "refused",
        "The key is no KEK: not AES, not in the token for good, or readable.",
        "Let hsm.tde make the key, or name another one.",
    ),
    "mechanism_unsupported": ErrorCode(
        "unsupported",
        "The token can neither AES-GCM nor AES-CBC with padding and HMAC-SHA256 with this key.",
        "Use another token, or let the token's policy allow AES-GCM, or AES-CBC with padding and HMAC-SHA256.",
    ),
    "envelope_invalid": ErrorCode(
        "damaged", "A wrapped key is not well-formed.", "Restore what was written, from a backup, and run again."
    ),
    "envelope_damaged": ErrorCode(
        "damaged", "A wrapped key, or the context it is bound to, is not what was written; the KEK is the right one."
    ),
    "envelope_newer": ErrorCode(
        "unsupported",
        "A wrapped key was written by a newer version of this collection.",
        "Use the version of hsm.tde that wrote it, or a newer one.",
    ),
    # hsm: openCryptoki
    "opencryptoki_missing": ErrorCode(
        "absent",
        "openCryptoki is not installed, or not wholly: its library, its daemon or its group is missing.",
        "Install it (the role hsm.tde.opencryptoki).",
    ),
    "opencryptoki_daemon_down": ErrorCode(
        "unreachable", "openCryptoki's daemon pkcsslotd does not run, and without it the library answers nothing."
    ),
    "opencryptoki_user_outside_group": ErrorCode(
        "refused", "The user is not a member of the group pkcs11, or was not when the program was started."
    ),
    "opencryptoki_daemons": ErrorCode(
        "unreachable",
        "More than one pkcsslotd runs, or one beside the system's service; programs reach one of them only.",
        "End all and start one: hsm.tde.opencryptoki_daemon with state restarted.",
    ),
    "opencryptoki_daemon_failed": ErrorCode(
        "unreachable", "openCryptoki's daemon did not start or did not end.", "Correct what it says, then run again."
    ),
    "opencryptoki_in_use": ErrorCode(
        "locked",
        "Programs use openCryptoki; they would lose their sessions, or keep an old state of the token.",
        "End them first, or allow it with force where the module has that option.",
    ),
    "opencryptoki_conf_invalid": ErrorCode(
        "client_error",
        "A configuration file of openCryptoki would not be taken by the version that is installed, or would lose slots.",
        "Correct the task, or the lines that it names.",
    ),
    "opencryptoki_stdll_absent": ErrorCode(
        "absent",
        "The library of a slot's token (stdll) is not installed.",
        "Install the package that has it, or correct stdll.",
    ),
    "opencryptoki_slot_without_token": ErrorCode(
        "unreachable",
        "openCryptoki does not list the slot: the library of its token is there and finds no token, adapter or service.",
        "Look at the adapter (hsm.tde.cryptocard_info), at the token's own configuration file and at the system's log.",
    ),
    "opencryptoki_store_format": ErrorCode(
        "client_error",
        "The token's folder has another format than the slot's tokversion says; the token would not open.",
        "Migrate it first (hsm.tde.opencryptoki_migrate), or correct tokversion.",
    ),
    "opencryptoki_slot_absent": ErrorCode(
        "absent", "opencryptoki.conf has no such slot.", "Correct its number; hsm.tde.opencryptoki_info lists the slots."
    ),
    "opencryptoki_migrate_unsupported": ErrorCode(
        "unsupported",
        "This version of openCryptoki has no pkcstok_migrate, or the token is of a kind that it does not migrate.",
        "Use openCryptoki 3.15 or newer.",
    ),
    "opencryptoki_migrate_failed": ErrorCode(
        "unreachable",
        "pkcstok_migrate did not bring the token's folder to the new format; the former one is in its place.",
        "Correct what pkcstok_migrate says, then run again.",
    ),
    "opencryptoki_store_absent": ErrorCode(
        "absent",
        "The token's folder is not there, or holds no token that was initialised.",
        "Initialise the token on the primary first (hsm.tde.pkcs11_token).",
    ),
    "opencryptoki_archive_invalid": ErrorCode(
        "damaged",
        "The archive of a token was made for another host or token, or was changed on its way; nothing was unpacked.",
        "Make it anew, for the public key that this host shows.",
    ),
    # command
    "file_foreign": ErrorCode("refused", "A file that this collection did not write stands where one of its own would be."),
    "pin_source_missing": ErrorCode(
        "absent", "Nobody gave the PIN: the host keeps none for the cluster, and there is no terminal to ask at."
    ),
    "terminal_refused": ErrorCode(
        "client_error",
        "A secret is piped or written to a file, never shown on or typed into a terminal by default.",
        "Use a pipe or a file.",
    ),
    "command_of_other_user": ErrorCode(
        "client_error",
        "A command that a database asks for runs as that database's own user, and was run by another, root included.",
    ),
    "cluster_unknown": ErrorCode("absent", "This host has no record of a cluster of that name."),
    # keystore: the files of wrapped keys
    "data_key_absent": ErrorCode(
        "absent",
        "The store has no such data key, and the journal does not know of one.",
        "Correct the name; hsm.tde.tde_info lists the data keys.",
    ),
    "key_exists": ErrorCode(
        "client_error",
        "A data key or wrapped secret of this name exists; it is never made anew over it.",
        "Use the one that is there, or take another name.",
    ),
    "keystore_unreachable": ErrorCode(
        "unreachable",
        "The journal or the registry names keys whose wrapped-key files do not show: a store that is not mounted, or files lost.",
        "Mount the file system that it is on, or restore the state directory from a backup.",
    ),
    "keystore_truncated": ErrorCode("damaged", "The end of a wrapped-key file is missing."),
    "keystore_damaged": ErrorCode(
        "damaged", "A wrapped-key file is not what was written: its checksum, its form or a field is wrong."
    ),
    "keystore_newer": ErrorCode("unsupported", "A wrapped-key file has a newer version than this collection knows."),
    "keystore_foreign": ErrorCode("damaged", "A wrapped-key file belongs to another cluster, key or secret than its place says."),
    "keystore_forbidden": ErrorCode(
        "damaged",
        "A wrapped-key file names a library, a PIN or a PIN's source; who can write it must not choose the code that root loads.",
    ),
    "keystore_edited": ErrorCode(
        "damaged", "A wrapped-key file was changed by somebody who does not hold the data key: its HMAC is wrong."
    ),
    "keystore_rolled_back": ErrorCode("damaged", "A wrapped-key file is an older generation than the journal recorded."),
    "keystore_unrecorded": ErrorCode(
        "damaged", "A wrapped-key file is genuine, but not the one that this host wrote last: it came from elsewhere."
    ),
    "keystore_too_large": ErrorCode(
        "client_error",
        "More keyslots, or a longer secret, than a wrapped-key file may hold.",
        "Remove keyslots that nobody needs, or wrap a shorter secret.",
    ),
    "keyslot_absent": ErrorCode(
        "absent",
        "The wrapped-key file has no keyslot of this name or kind.",
        "Correct its name; hsm.tde.tde_info lists the keyslots.",
    ),
    "keyslot_foreign": ErrorCode("damaged", "A keyslot was made for another file or holds another key: copied in, or changed."),
    "keyslot_last": ErrorCode("client_error", "No other proved keyslot would be left; the data key could never be opened again."),
    "keyslot_unproved": ErrorCode("client_error", "The keyslot that is to take over was not proved yet."),
    "keyslot_unsound": ErrorCode(
        "damaged",
        "A keyslot that was just written does not give the data key back.",
        "Run again; if it comes back, look for faults of the token, the memory or the disk.",
    ),
    "kdf_parameters_refused": ErrorCode(
        "damaged", "A keyslot's key derivation asks for parameters outside the bounds; it was not run."
    ),
    "kdf_unsupported": ErrorCode(
        "unsupported",
        "This host cannot run the keyslot's key derivation (FIPS mode forbids scrypt, or too little memory).",
        "Use another keyslot, or a host that can.",
    ),
    "passphrase_refused": ErrorCode("refused", "The passphrase does not open the keyslot."),
    "passphrase_length": ErrorCode("client_error", "The passphrase is shorter or longer than a new keyslot may have."),
    "credential_missing": ErrorCode(
        "client_error",
        "None of the credentials given fits a keyslot of the file.",
        "Give the PIN or the passphrase of one of its keyslots.",
    ),
    # storage: encryption, images and mounts below the database
    "mount_table_unreadable": ErrorCode(
        "unreachable",
        "The kernel does not tell what is mounted, or in a form that is not understood.",
        "See that /proc is mounted and whole, then run again.",
    ),
    "fscrypt_unsupported": ErrorCode(
        "unsupported", "The file system or the kernel cannot encrypt directories (fscrypt), or the feature is off."
    ),
    "fscrypt_key_absent": ErrorCode("absent", "The kernel does not hold the key of an encrypted directory; open the keystore."),
    "fscrypt_key_invalid": ErrorCode(
        "client_error",
        "A key for the kernel has the wrong length or another identifier than expected.",
        "Report it: the kernel and the store do not agree about a key.",
    ),
    "fscrypt_policy_other": ErrorCode(
        "client_error", "The directory is encrypted under another key or in another way; a policy cannot be changed."
    ),
    "place_not_empty": ErrorCode("client_error", "A directory that is to be encrypted has entries in the clear."),
    "place_not_directory": ErrorCode(
        "client_error", "A place is a symbolic link or not a directory.", "Remove it, or choose another location."
    ),
    "image_absent": ErrorCode("unreachable", "The host remembers this image and it is not there; no other is made in its place."),
    "image_foreign": ErrorCode(
        "refused",
        "The image file holds something that this collection did not make; it is never formatted.",
        "Choose another path for the image.",
    ),
    "image_not_private": ErrorCode(
        "refused", "The image has the wrong type, owner, mode or link count, or is attached in part only."
    ),
    "image_shrink": ErrorCode("client_error", "The image is larger than wished; it is never shrunk."),
    "resize_refused": ErrorCode("refused", "The kernel does not let this process grow a mounted file system."),
    "mount_point_absent": ErrorCode(
        "unreachable", "The host remembers this directory and it is not there; no other is made in its place."
    ),
    "mount_point_unsafe": ErrorCode("refused", "Others than root could write to the folder above the encrypted places."),
    "mount_point_not_empty": ErrorCode("client_error", "Nothing is mounted there and it has entries, which a mount would hide."),
    "mount_point_taken": ErrorCode("client_error", "Another file system is mounted there."),
    "mounted_elsewhere": ErrorCode("client_error", "The image is mounted at another place."),
    "mounted_read_only": ErrorCode(
        "unreachable", "The file system is mounted read-only, which the kernel also does after errors."
    ),
    "device_unreadable": ErrorCode(
        "unreachable",
        "The block device below a file cannot be read, so nothing can be proved on it.",
        "Run it as root on the host itself: a container mostly may not read the block device.",
    ),
    "loop_unavailable": ErrorCode(
        "unsupported",
        "No loop device can be had or asked; containers need them handed in.",
        "Hand /dev/loop-control and loop devices into the container, or use storage: directory.",
    ),
    # engines: a cluster's record, its places and its server
    "record_damaged": ErrorCode("damaged", "The record of a cluster cannot be read, or belongs to another cluster."),
    "engine_unsupported": ErrorCode(
        "unsupported", "This database engine cannot do what was asked for.", "Leave it out, or use an engine that can."
    ),
    "os_user_absent": ErrorCode(
        "absent",
        "The operating system's user of the database does not exist on the host.",
        "Install the database first, or correct os_user.",
    ),
    "recovery_keyslot_missing": ErrorCode(
        "client_error",
        "A second keyslot is demanded before the first data key; going without is an explicit choice (no_recovery).",
    ),
    "keyslot_on_other_token": ErrorCode("client_error", "The keyslot lies in another token than the one that the task names."),
    "rotation_unsupported": ErrorCode("unsupported", "The keyslot has no master key in a token that could be rotated."),
    "tag_superseded": ErrorCode(
        "client_error", "The tag names a master key that was replaced by a newer one; it is not taken back."
    ),
    "place_unreachable": ErrorCode(
        "unreachable",
        "The host remembers an encrypted place that does not show: a file system that is not mounted, or another in its stead.",
    ),
    "place_parent_unsafe": ErrorCode(
        "refused",
        "Somebody other than root could replace the place: its parent folder is not root's own, or others can write to it.",
    ),
    "place_inside_data_directory": ErrorCode("client_error", "A tablespace inside the data directory, or around it, is refused."),
    "place_foreign": ErrorCode(
        "damaged",
        "The place is encrypted, but with another key than the one that the store holds for it.",
        "Restore the store that its key belongs to, or choose another location.",
    ),
    "place_plain": ErrorCode(
        "client_error", "The place is in use and not encrypted; what is there is encrypted by moving it to a new place."
    ),
    "place_closed": ErrorCode("locked", "The kernel does not hold the place's key: the keystore is closed."),
    "place_in_use": ErrorCode("locked", "Processes have files of the place open; the kernel keeps the key until they are gone."),
    "server_running": ErrorCode("locked", "The server runs; closing its keystore under it leads to a crash."),
    "server_down": ErrorCode("unreachable", "The database server does not answer.", "Start the server, then run again."),
    "server_starting": ErrorCode(
        "unreachable",
        "The database server is starting, stopping or recovering.",
        "Wait until it takes connections, then run again.",
    ),
    "server_refused": ErrorCode("refused", "The database server refused the connection."),
    "server_failed": ErrorCode(
        "client_error", "The database server answered a statement with an error.", "Correct what the server says, then run again."
    ),
    "server_privilege_missing": ErrorCode("refused", "The database role may not do this; a superuser is needed."),
    "server_is_standby": ErrorCode("client_error", "The server is a standby; tablespaces are created and filled on the primary."),
    "server_not_local": ErrorCode(
        "client_error",
        "The server's files do not lie on this host.",
        "Run this on the server's own host, and name its socket or port.",
    ),
    "server_foreign": ErrorCode(
        "client_error",
        "The server that answers works on another data directory than the cluster's.",
        "Correct login_host, login_port or login_unix_socket, or name the cluster that this server belongs to.",
    ),
    "lock_timeout": ErrorCode("locked", "A lock in the database was not had in time."),
    "move_blocked": ErrorCode("locked", "A relation stayed locked by others through all tries; what was moved stays moved."),
    "unfinished": ErrorCode(
        "unreachable",
        "After several rounds something is still, or again, not as wished; what was done stays done.",
        "Run again; run with --check to see what is left.",
    ),
    "tablespace_elsewhere": ErrorCode("client_error", "A tablespace of this name exists at another location."),
    "tablespace_name_reserved": ErrorCode(
        "client_error", "The name is not possible for a tablespace of users.", "Take another name."
    ),
    "tablespace_absent": ErrorCode(
        "absent", "There is no such tablespace.", "Correct its name; hsm.tde.tde_info lists the tablespaces."
    ),
    "relation_absent": ErrorCode(
        "absent", "A table that is to move does not exist.", "Correct its name (SCHEMA.TABLE) and the database."
    ),
    "schema_absent": ErrorCode("absent", "A schema that is to move does not exist.", "Correct its name and the database."),
    "database_absent": ErrorCode(
        "absent", "A database that is to move does not exist or takes no connections.", "Correct its name."
    ),
    "cluster_exists": ErrorCode("client_error", "A packaged cluster of this name exists with another data directory."),
    # engines: servers that encrypt their own files
    "encryption_foreign": ErrorCode(
        "client_error",
        "The server encrypts with keys that are not this collection's; replacing them would make its tables unreadable.",
        "Take its encryption back first, or leave it to its keys.",
    ),
    "former_key_file_unreadable": ErrorCode(
        "damaged",
        "The key file that the server was encrypted with before cannot be read as one.",
        "See that it is the file the server was started with, then run again.",
    ),
    "setting_ineffective": ErrorCode(
        "client_error",
        "The server was started after its settings were written, and does not have them.",
        "See that it reads the include directory, and that neither its command line nor a later file says otherwise.",
    ),
    # kmip: the servers of a key management service, and their answers
    "kmip_unreachable": ErrorCode(
        "unreachable",
        "No KMIP server of the service takes connections.",
        "Start the server, or correct kmip_servers; see that name resolution, routes and firewalls let this host through.",
    ),
    "kmip_timeout": ErrorCode(
        "unreachable",
        "A KMIP server takes connections and did not answer in time.",
        "Find out what keeps it busy; kmip_timeout gives it longer.",
    ),
    "kmip_answer_lost": ErrorCode(
        "unreachable",
        "A request that changes something was sent to a KMIP server and no answer came: whether it was done is not known.",
        "Run again: it looks at the server first and repeats nothing that was done.",
    ),
    "kmip_ca_mismatch": ErrorCode(
        "refused",
        "The KMIP server's certificate comes from another authority than those in kmip_ca.",
        "Correct kmip_ca. If it is right, another machine answers under the server's name.",
    ),
    "kmip_ca_invalid": ErrorCode(
        "client_error", "The file kmip_ca holds no certificate.", "Give the authority's certificate in PEM."
    ),
    "kmip_certificate_expired": ErrorCode(
        "refused",
        "The KMIP server's certificate is over, or not valid yet.",
        "Renew it on the server; see that this host's clock is right.",
    ),
    "kmip_host_name_mismatch": ErrorCode(
        "refused",
        "The KMIP server's certificate is for another host name.",
        "Name the server as its certificate does, or give it a certificate for that name.",
    ),
    "kmip_certificate_invalid": ErrorCode(
        "refused",
        "The KMIP server's certificate was refused for another reason.",
        "Give the server a certificate that this host accepts.",
    ),
    "kmip_tls_failed": ErrorCode(
        "unsupported",
        "The KMIP server and this host have no TLS 1.2 or newer in common, or there is no TLS at that port.",
        "Correct the port, or let the server speak TLS 1.2.",
    ),
    "kmip_client_certificate_expired": ErrorCode(
        "refused", "The client's certificate for the KMIP server is over.", "Renew it (kmip_certificate)."
    ),
    "kmip_client_certificate_invalid": ErrorCode(
        "client_error",
        "The client's certificate or key for the KMIP server cannot be used.",
        "Give both in PEM, the key not encrypted, in a file of mode 0600.",
    ),
    "kmip_client_certificate_refused": ErrorCode(
        "refused",
        "The KMIP server refused the client's certificate.",
        "Let the server's administrator register it, or give the right one in kmip_certificate.",
    ),
    "kmip_login_refused": ErrorCode(
        "refused",
        "The KMIP server takes the connection and does not take this client.",
        "Let the server's administrator register the client's certificate.",
    ),
    "kmip_permission_denied": ErrorCode(
        "refused",
        "The KMIP server does not let this client do it; some say so of keys that do not exist, too.",
        "Let the server's administrator allow it, or use the client that owns the key.",
    ),
    "kmip_key_foreign": ErrorCode(
        "refused",
        "A key of this name at the KMIP server belongs to another owner.",
        "Use the client that owns it, or another name.",
    ),
    "kmip_key_absent": ErrorCode(
        "absent", "The KMIP server has no such key.", "Correct its name or id; hsm.tde.kmip_key_info lists the keys."
    ),
    "kmip_key_state": ErrorCode(
        "refused",
        "The key's state, or what it was made for, forbids this at the KMIP server.",
        "See its state with hsm.tde.kmip_key_info; a key that was deactivated does not come back.",
    ),
    "kmip_key_locked": ErrorCode(
        "locked",
        "The key is archived at the KMIP server, or its usage limit is spent.",
        "Let the server's administrator recover it.",
    ),
    "kmip_name_taken": ErrorCode(
        "client_error",
        "The KMIP server has an object of this name already that this client does not see as a key of its own.",
        "Take another name, or use the client that owns it.",
    ),
    "kmip_server_failed": ErrorCode(
        "unreachable", "The KMIP server failed and does not say why.", "Look at the server's log, then run again."
    ),
    "kmip_unsupported": ErrorCode(
        "unsupported", "The KMIP server cannot do this.", "Use a server that can, or let it speak KMIP 1.4."
    ),
    "kmip_cryptographic_failure": ErrorCode(
        "damaged", "The KMIP server could not encrypt or decrypt with the key.", "See the key's state and the server's log."
    ),
    "kmip_request_refused": ErrorCode(
        "client_error",
        "The KMIP server found the request malformed or contradictory.",
        "Correct what the task asks for, then run again.",
    ),
    "kmip_answer_invalid": ErrorCode(
        "damaged",
        "What answers is no KMIP server, or one whose answer cannot be read.",
        "Correct the port; see the server's log.",
    ),
    # engines: fep
    "protection_unchangeable": ErrorCode(
        "unsupported",
        "The database's maker supports no change of this kind; it would leave encrypted data without its key.",
        "Take the data to a new cluster whose keystore is of the wished kind.",
    ),
    "data_directory_foreign": ErrorCode("client_error", "The data directory has files in it and is no database cluster."),
    "setting_overridden": ErrorCode(
        "client_error", "Something else sets a parameter of the keystore after our file, so that ours would never count."
    ),
    "standby_unsupplied": ErrorCode(
        "absent", "The standby has no copy of the primary's keystore, and must not make one of its own."
    ),
    "server_other_product": ErrorCode("client_error", "The server that answers is not the product of this engine."),
    "master_key_refused": ErrorCode(
        "refused", "The server refused to set the master key.", "Correct what the server says, then run again."
    ),
    "keystore_not_opened": ErrorCode("refused", "The server refused to open its keystore."),
    "keystore_closed": ErrorCode(
        "locked",
        "The server's keystore is not open.",
        "Open it (hsm.tde.tde_keystore with state=open, or hsm-tde open), then run again.",
    ),
    "passphrase_change_refused": ErrorCode(
        "refused",
        "The server refused to change the keystore's passphrase.",
        "Give the present passphrase at top level, the new one in keyslots.",
    ),
    "tablespace_not_empty": ErrorCode(
        "client_error",
        "Something lies in the tablespace: its encryption can only change while it is empty.",
        "Create another tablespace and move the data there.",
    ),
    # nshield
    "credential_forbidden": ErrorCode(
        "client_error",
        "A credential breaks a rule of length or characters; the message names the rule, never the value.",
        "Choose another passphrase or name. A credential that breaks a rule could silently put keys under module protection.",
    ),
    "nshield_hardserver_down": ErrorCode(
        "unreachable",
        "nShield's hardserver does not answer on this host.",
        "Start it (systemd unit nc_hardserver), then run again.",
    ),
    "nshield_world_unusable": ErrorCode(
        "unreachable",
        "The Security World is not initialised, or no HSM can use it.",
        "Load the Security World onto the HSM, or see which module is not usable with nfkminfo.",
    ),
    "nshield_answer_unknown": ErrorCode(
        "unsupported",
        "One of nShield's commands printed something that this collection does not understand; nothing is guessed.",
        "Report it with the version of the Security World software.",
    ),
    "nshield_passphrase_refused": ErrorCode(
        "refused",
        "The softcard or card refused the passphrase.",
        "Give the right passphrase. Softcards and cards count no tries.",
    ),
    "nshield_authorisation_missing": ErrorCode(
        "refused",
        "The Security World asks for a card in a slot before it lets this be done.",
        "Put an operator card, or an administrator card where one is asked for, into a slot of the HSM, then run again.",
    ),
    "nshield_key_slipped": ErrorCode(
        "damaged",
        "Keys that must be under a softcard or card set are under module protection: the credential was mistyped when they were made.",
        "Do not encrypt anything with them. Correct the credential, make a new master key, and verify again;"
        " keys under module protection cannot be moved.",
    ),
    "nshield_key_elsewhere": ErrorCode(
        "damaged",
        "Keys are under another protection, softcard or card set than expected.",
        "Find out which credential made them; state transferred moves keys between softcards, or between card sets.",
    ),
    "nshield_transfer_forbidden": ErrorCode(
        "unsupported",
        "Keys can be transferred between softcards, or between card sets, and in no other way.",
        "Migrate the database to its software keystore, change the credential, and migrate it back to the HSM.",
    ),
    "nshield_not_recoverable": ErrorCode(
        "unsupported",
        "The Security World or the key was made without recovery, so the key can never be transferred.",
        "Make a new master key under the other softcard or card set, and keep the old one for backups.",
    ),
    "nshield_transfer_unfinished": ErrorCode(
        "damaged",
        "After the transfer not all keys are where they should be.",
        "Run the task again: it goes on with those that are left. The Security World's backup is named in the result.",
    ),
    "nshield_recovery_attended": ErrorCode(
        "refused",
        "Auto-login was wished for, and after an outage access to the HSM would not come back by itself.",
        "See to what is missing, or do without auto-login: then an operator opens the keystore after an outage.",
    ),
    "nshield_client_behind": ErrorCode(
        "unreachable",
        "This client's copy of the Security World is not the one that was expected: keys made elsewhere are missing here.",
        "Bring it up to date (distribution with sync update, or wait for the common store), then run again.",
    ),
    "nshield_store_not_common": ErrorCode(
        "client_error",
        "The Security World's folder is not on the common store.",
        "Mount the common store, or link the folder to it; do not copy keys by hand.",
    ),
    # engines: pg_tde and its key providers
    "provider_without_key": ErrorCode(
        "absent",
        "A key provider does not have a key that it must have.",
        "Bring the key there, or name the provider that has it; then run again.",
    ),
    "backup_running": ErrorCode(
        "locked",
        "A base backup runs, and keys must not change meanwhile: it would hold keys and data of two times.",
        "Wait for the backup's end, then run again.",
    ),
    "vault_unreachable": ErrorCode(
        "unreachable",
        "Vault does not answer, or answers what cannot be read; whether a key is there is not known.",
        "Bring it up, and check vault_url and vault_ca.",
    ),
    "vault_refused": ErrorCode(
        "refused",
        "Vault refused the token, or its policy does not allow what is needed.",
        "Check the token and its policy.",
    ),
    # engines: oracle
    "oracle_change_refused": ErrorCode(
        "client_error",
        "The change would leave encrypted data without its master key, or is one that Oracle does otherwise.",
        "Take the way that the message names.",
    ),
    "oracle_change_unfinished": ErrorCode(
        "client_error",
        "Another change of the keystore's credential or protection was begun and is not finished.",
        "Wish for what was begun again: it goes on where it stopped.",
    ),
    "oracle_client_missing": ErrorCode(
        "absent",
        "Thick mode was wished for, and Oracle's client libraries do not load on the target.",
        "Install Oracle's client, name its folder in oracle.client_directory and see that the system's loader finds it, or leave oracle.thick"
        " and log in with login_host, login_user and login_password.",
    ),
    "oracle_containers_behind": ErrorCode(
        "locked", "A pluggable database is closed and would be left behind.", "Open it, then run again."
    ),
    "oracle_hsm_failed": ErrorCode(
        "unreachable",
        "The HSM's PKCS#11 library answered the database with an error.",
        "Check hardserver, modules and cards (nshield_info), then run again.",
    ),
    "oracle_keystore_missing": ErrorCode(
        "absent",
        "The database finds no keystore, or not exactly one PKCS#11 library.",
        "Check WALLET_ROOT, and that the library is alone under /opt/oracle/extapi/64/hsm.",
    ),
    "oracle_master_key_unreachable": ErrorCode(
        "unreachable",
        "The open keystore does not show the master key that the database was encrypted with.",
        "Find which credential the key is under (nshield_info), and open the keystore with that one.",
    ),
    "oracle_memo_damaged": ErrorCode(
        "damaged", "What the host remembers of the database's keystore cannot be read.", "Restore it from a backup."
    ),
}


#: Of an error that was raised before anything was done.
NOTHING_CHANGED = "Nothing was changed."


class TdeError(Exception):
    """A failure that a user reads.

    :param code: a key of :data:`ERROR_CODES`.
    :param message: what happened, in one sentence, never with a secret.
    :param obj: the object concerned (``token demo``, ``keyslot recovery of key cluster`` …).
    :param kept: what was left as it was.
    :param next_step: what the reader can do now; the code's own advice, if it is not given.
    :param details: public facts for programs; becomes part of the result.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        obj: str = "",
        kept: str = NOTHING_CHANGED,
        next_step: str = "",
        details: dict[str, t.Any] | None = None,
    ) -> None:
        entry = ERROR_CODES[code]
        self.code = code
        self.cause = entry.cause
        self.message = message
        self.obj = obj
        self.kept = kept
        self.next_step = next_step or entry.advice
        self.details = details or {}
        self._done: tuple[str, ...] = ()
        self._kept = ""
        super().__init__(str(self))

    def after(self, done: t.Sequence[str]) -> None:
        """Say in :attr:`kept` that steps were done before it; "nothing was changed" is true of the failed step only.

        :param done: their actions, in order.
        """
        if not done:
            return
        if not self._done:
            self._kept = "" if self.kept == NOTHING_CHANGED else f" {self.kept}"
        self._done = (*done, *self._done)
        self.kept = f"What was done before it stays done: {', '.join(dict.fromkeys(self._done))}.{self._kept}"

    def __str__(self) -> str:
        head = f"{self.obj}: {self.message}" if self.obj else self.message
        return " ".join(part for part in (f"{head} [{self.cause}]", self.kept, self.next_step) if part)

    def result(self) -> dict[str, t.Any]:
        """The fields that a failed module returns beside ``msg``."""
        return {
            "error_code": self.code,
            "cause": self.cause,
            "object": self.obj,
            "kept": self.kept,
            "next_step": self.next_step,
            "details": self.details,
        }
