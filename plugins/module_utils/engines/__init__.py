# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The database engines. A new one is one module or package here, one line in :func:`load`, its dictionary in
:func:`database_options` and in the doc fragment ``hsm.tde.database``."""

from __future__ import annotations

import typing as t

from ..common.errors import TdeError
from ..common.options import kmip_options, kmip_service_options, pkcs11_options
from ..hsm.nshield_recovery import recovery_options

if t.TYPE_CHECKING:
    from .base import Engine

#: The engines by the name under which users choose them; the doc fragment has a sentence on each.
ENGINES = ("postgresql", "keycommand", "fep", "mariadb", "pg_tde", "oracle")


#: What a keyslot can be under; each engine says which of them (``Engine.protections``).
PROTECTIONS = ("token", "passphrase", "kmip", "module", "softcard", "ocs")


def load(name: str) -> type[Engine]:
    """The engine of a name.

    :raises TdeError: ``invalid_option``.
    """
    if name == "postgresql":
        from .postgresql.engine import Postgresql

        return Postgresql
    if name == "keycommand":
        from .keycommand.engine import Keycommand

        return Keycommand
    if name == "fep":
        from .fep.engine import Fep

        return Fep
    if name == "mariadb":
        from .mariadb.engine import MariaDb

        return MariaDb
    if name == "pg_tde":
        from .pg_tde.engine import PgTde

        return PgTde
    if name == "oracle":
        from .oracle.engine import Oracle

        return Oracle
    raise TdeError("invalid_option", "is not an engine that this version knows", obj=f"engine {name!r}")


def postgresql_options() -> dict[str, t.Any]:
    """The dictionary of the engine postgresql."""
    return {
        "coverage": {"type": "str", "choices": ["tablespaces", "cluster"], "default": "tablespaces"},
        "data_directory": {"type": "path"},
        "storage": {"type": "str", "choices": ["directory", "image"], "default": "directory"},
        "mount_point": {"type": "path"},
        "image": {"type": "path"},
        "image_size": {"type": "str"},
        "bin_directory": {"type": "path"},
        "os_user": {"type": "str", "default": "postgres"},
        "create_cluster": {"type": "bool", "default": False},
        "debian_cluster": {"type": "str"},
        "initdb_options": {"type": "list", "elements": "str", "default": ["--encoding=UTF8", "--locale=C.UTF-8"]},
    }


def keycommand_options() -> dict[str, t.Any]:
    """The dictionary of the engine keycommand."""
    return {
        "kind": {"type": "str", "choices": ["edb", "cybertec", "ssl_passphrase", "secret"]},
        "os_user": {"type": "str"},
        "data_directory": {"type": "path"},
        "command": {"type": "path"},
        "secret": {"type": "str", "no_log": True},
        "key_bits": {"type": "int", "choices": [128, 192, 256]},
        "adopt_master_key": {"type": "bool", "no_log": False},
    }


def fep_options() -> dict[str, t.Any]:
    """The dictionary of the engine fep."""
    return {
        "keystore": {"type": "str", "choices": ["hsm", "file", "plugin"], "no_log": False},
        "keystore_location": {"type": "path", "no_log": False},
        "auto_open": {"type": "bool"},
        "data_directory": {"type": "path"},
        "bin_directory": {"type": "path"},
        "os_user": {"type": "str"},
        "create_cluster": {"type": "bool"},
        "initdb_options": {"type": "list", "elements": "str"},
        "tablespace_directory": {"type": "path"},
        "plugin_directory": {"type": "path"},
        "command": {"type": "path"},
        "kms_name": {"type": "str"},
        "key_id": {"type": "str", "no_log": False},
    }


def mariadb_options() -> dict[str, t.Any]:
    """The dictionary of the engine mariadb."""
    return {
        "data_directory": {"type": "path"},
        "key_directory": {"type": "path", "no_log": False},
        "include_directory": {"type": "path"},
        "os_user": {"type": "str"},
        "refuse_plain_tables": {"type": "bool"},
        "encryption_threads": {"type": "int"},
        "former_key_file": {"type": "str", "choices": ["refuse", "take", "remove"], "default": "refuse", "no_log": False},
        "reencrypt": {"type": "bool", "default": False},
    }


def pg_tde_options() -> dict[str, t.Any]:
    """The dictionary of the engine pg_tde."""
    return {
        "extension": {"type": "str", "choices": ["pg_tde", "open_pg_tde"]},
        "provider": {"type": "str", "choices": ["file", "vault-v2", "kmip"]},
        "provider_name": {"type": "str"},
        "scope": {"type": "str", "choices": ["global", "database"]},
        "databases": {"type": "list", "elements": "str"},
        "wal_encrypt": {"type": "bool"},
        "enforce_encryption": {"type": "bool"},
        "cipher": {"type": "str", "choices": ["aes_128", "aes_256"]},
        "data_directory": {"type": "path"},
        "key_directory": {"type": "path", "no_log": False},
        "os_user": {"type": "str"},
        "vault_url": {"type": "str"},
        "vault_mount_path": {"type": "str"},
        "vault_token": {"type": "path", "no_log": False},
        "vault_ca": {"type": "path"},
        "vault_namespace": {"type": "str"},
    }


def oracle_options() -> dict[str, t.Any]:
    """The dictionary of the engine oracle."""
    return {
        "service": {"type": "str"},
        "privilege": {"type": "str", "choices": ["sysdba", "syskm", "none"]},
        "thick": {"type": "bool"},
        "client_directory": {"type": "path"},
        "wallet_root": {"type": "path"},
        "containers": {"type": "list", "elements": "str"},
        "auto_login": {"type": "bool"},
        "software_passphrase": {"type": "str", "no_log": True},
        "external_store": {"type": "bool"},
        "sid": {"type": "str"},
        "separator": {"type": "str", "choices": ["|", ":"]},
        "call_timeout": {"type": "float"},
        "recovery": {"type": "dict", "options": recovery_options()},
        "nfast_home": {"type": "path"},
        "kmdata": {"type": "path"},
        "transfer_keys": {"type": "bool", "default": False, "no_log": False},
        "safe_way_round": {"type": "bool", "default": False},
        "acs_passphrase": {"type": "str", "no_log": True},
        "backup_directory": {"type": "path"},
    }


def database_options() -> dict[str, t.Any]:
    """Options of every module of the action group ``hsm.tde.database`` (fragment ``hsm.tde.database``)."""
    return {
        "engine": {"type": "str", "required": True, "choices": list(ENGINES)},
        "cluster": {"type": "str", "required": True},
        "login_host": {"type": "str"},
        "login_port": {"type": "int"},
        "login_unix_socket": {"type": "path"},
        "login_user": {"type": "str"},
        "login_password": {"type": "str", "no_log": True},
        "login_db": {"type": "str", "default": "postgres"},
        "passphrase": {"type": "str", "no_log": True},
        "postgresql": {"type": "dict", "apply_defaults": True, "options": postgresql_options()},
        "keycommand": {"type": "dict", "no_log": False, "apply_defaults": True, "options": keycommand_options()},
        "fep": {"type": "dict", "apply_defaults": True, "options": fep_options()},
        "mariadb": {"type": "dict", "apply_defaults": True, "options": mariadb_options()},
        "pg_tde": {"type": "dict", "apply_defaults": True, "options": pg_tde_options()},
        "oracle": {"type": "dict", "apply_defaults": True, "options": oracle_options()},
        **pkcs11_options(),
        **kmip_options(),
    }


def secret_slots_option() -> dict[str, t.Any]:
    """The keyslots of a secret of the user's own: those that need nothing but the file and what opens it."""
    return {
        "type": "list",
        "elements": "dict",
        "no_log": False,
        "options": {
            "name": {"type": "str", "default": "primary"},
            "protection": {"type": "str", "choices": ["token", "passphrase", "kmip"], "default": "token"},
            "passphrase": {"type": "str", "no_log": True},
            "token_label": {"type": "str", "no_log": False},
            "token_serial": {"type": "str", "no_log": False},
            "slot_id": {"type": "int"},
            "pin": {"type": "str", "no_log": True},
            "library": {"type": "path"},
            "kmip": {"type": "dict", "options": kmip_service_options()},
        },
    }


def keyslots_option() -> dict[str, t.Any]:
    """The option ``keyslots`` of the modules that make or change keyslots (fragment ``hsm.tde.database.keyslots``)."""
    option = secret_slots_option()
    option["options"]["protection"]["choices"] = list(PROTECTIONS)
    return option
