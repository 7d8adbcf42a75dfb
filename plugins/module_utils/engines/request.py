# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a module's options to requests and wishes; the only place that knows the options' names."""

from __future__ import annotations

import typing as t

from ..common.errors import TdeError
from ..common.secret import secret_from_option
from ..common.state import StateDirectory, check_name
from ..kmip.access import KmipAccess, kmip_access, service_of
from ..pkcs11.options import token_access
from . import load
from . import record as records
from .base import Connection, Engine, KeystoreWish, MasterKeyWish, MoveWish, Request, SlotWish, TablespacesWish, TablespaceWish
from .keyslots import KMIP, PASSPHRASE

Params = t.Mapping[str, t.Any]

#: Protections of keys in an nShield HSM, which a database reaches by itself.
NSHIELD = ("module", "softcard", "ocs")

#: What names a token; a keyslot that gives one of them names its token itself.
_SELECTORS = ("token_label", "token_serial", "slot_id")


def request(params: Params) -> Request:
    """What all wishes of a task have in common.

    :raises TdeError: ``invalid_option``, ``secret_not_text``.
    """
    return Request(
        state=StateDirectory(params["state_directory"]),
        cluster=check_name("cluster", params["cluster"]),
        options=dict(params[params["engine"]] or {}),
        connection=Connection(
            host=params["login_host"],
            port=params["login_port"],
            unix_socket=params["login_unix_socket"],
            user=params["login_user"],
            password=secret_from_option("login_password", params["login_password"]),
            database=params["login_db"],
        ),
        access=token_access(params, params["pin"]) if params["library"] and _names_token(params) else None,
        passphrase=secret_from_option("passphrase", params["passphrase"]),
        kmip=_service(params),
    )


def _service(params: Params) -> KmipAccess | None:
    """The KMIP service of the task; what it leaves out is taken from the cluster's record. A user's own secret has none."""
    cluster = params.get("cluster")
    record = records.read(StateDirectory(params["state_directory"]), check_name("cluster", cluster)) if cluster else None
    return kmip_access(params, record.service(params["kmip_service"]) if record else None)


def _names_token(params: Params) -> bool:
    return any(params.get(name) is not None for name in (*_SELECTORS, "token_uri"))


def slots(params: Params) -> tuple[SlotWish, ...] | None:
    """The keyslots wished for, None if the task lists none.

    A keyslot that does not name its token lies in the task's own, with the task's PIN. One that names another token has
    only the PIN that it gives itself: trying a PIN that belongs to another token would spend a try.

    :raises TdeError: ``invalid_option``, ``secret_not_text``.
    """
    if params["keyslots"] is None:
        return None
    found = [_slot(params, item) for item in params["keyslots"]]
    names = [wish.name for wish in found]
    for name in names:
        check_name("keyslot", name)
        if names.count(name) > 1:
            raise TdeError("invalid_option", "is listed twice", obj=f"keyslot {name}")
    if not found:
        raise TdeError("invalid_option", "is empty", obj="option keyslots")
    # A secret of a user's own has no engine.
    protections = (load(params["engine"]) if "engine" in params else Engine).protections
    for wish in found:
        if wish.protection not in protections:
            raise TdeError(
                "engine_unsupported",
                f"can be under {', '.join(protections)} here, not under {wish.protection}",
                obj=f"keyslot {wish.name}",
            )
    return tuple(found)


def _slot(params: Params, item: Params) -> SlotWish:
    if item["protection"] == PASSPHRASE:
        return SlotWish(item["name"], PASSPHRASE, passphrase=secret_from_option("passphrase", item["passphrase"]))
    if item["protection"] == KMIP:
        given = item["kmip"] or {}
        service = given.get("service") or params["kmip_service"]
        return SlotWish(item["name"], KMIP, kmip=service_of(given, _service({**params, "kmip_service": service})))
    if item["protection"] in NSHIELD:
        given = secret_from_option("passphrase", item["passphrase"]) or secret_from_option("pin", item["pin"])
        return SlotWish(item["name"], item["protection"], passphrase=given, token_name=item["token_label"])
    merged = {**params, "library": item["library"] or params["library"]}
    pin = item["pin"]
    if any(item[name] is not None for name in _SELECTORS):
        merged.update({name: item[name] for name in _SELECTORS}, token_uri=None)
        same = all(merged[name] == params[name] for name in _SELECTORS) and params["token_uri"] is None
        same = same and merged["library"] == params["library"]
    else:
        same = True
    if pin is None and same:
        pin = params["pin"]
    access = token_access(merged, pin) if merged["library"] and _names_token(merged) else None
    return SlotWish(item["name"], "token", access=access)


def keystore_wish(params: Params) -> KeystoreWish:
    """The wish of ``tde_keystore``."""
    return KeystoreWish(
        state=params["state"],
        slots=slots(params),
        update=params["update_keyslots"] == "always",
        exclusive=params["keyslots_exclusive"],
        no_recovery=params["no_recovery"],
        force=params["force"],
        pin_source=params["pin_source"],
    )


def master_key_wish(params: Params) -> MasterKeyWish:
    """The wish of ``tde_master_key``.

    :raises TdeError: ``invalid_option``.
    """
    if params["tag"] is not None:
        check_name("tag", params["tag"])
    if params["max_age"] is not None and params["max_age"] < 0:
        raise TdeError("invalid_option", "must not be negative", obj="option max_age")
    if params["state"] == "rotated" and params["tag"] is None and params["max_age"] is None:
        raise TdeError("invalid_option", "tag or max_age tells when to rotate", obj="option state")
    return MasterKeyWish(params["state"], params["tag"], params["max_age"], check_name("keyslot", params["keyslot"]))


def tablespaces_wish(params: Params) -> TablespacesWish:
    """The wish of ``tde_tablespace``.

    :raises TdeError: ``invalid_option``.
    """
    if params["lock_timeout"] <= 0:
        raise TdeError("invalid_option", "must be more than 0; the server takes 0 for no limit", obj="option lock_timeout")
    items = []
    for item in params["tablespaces"]:
        move = item["move"] or {}
        items.append(
            TablespaceWish(
                name=item["name"],
                location=item["location"],
                owner=item["owner"],
                algorithm=item["algorithm"],
                move=MoveWish(
                    tables=tuple(move.get("tables") or ()),
                    schemas=tuple(move.get("schemas") or ()),
                    databases=tuple(move.get("databases") or ()),
                    database=move.get("database") or params["login_db"],
                ),
            )
        )
    return TablespacesWish(tuple(items), slots(params), params["lock_timeout"], params["no_recovery"])
