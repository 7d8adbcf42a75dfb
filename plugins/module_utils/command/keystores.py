# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde open``, ``close`` and ``status``: every cluster in a child of its own, the engine does the work."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
import typing as t

from .. import engines
from ..common.errors import TdeError
from ..common.isolate import SECONDS, isolated
from ..common.plan import public as public_plan
from ..common.state import StateDirectory, check_name
from ..engines import record as records
from ..engines.base import Engine, KeystoreWish, Request
from ..keystore.store import KeyStore
from . import credentials
from .exits import DONE, UNREACHABLE, exit_code
from .output import Output, public

#: Seconds between two tries of a token that does not answer.
_PAUSE = 5.0

#: After these the other PIN, or passphrase, of an unfinished change may be tried.
_REFUSED = ("pin_refused", "pin_refused_before", "keystore_not_opened")

Facts = t.Dict[str, t.Any]


def read_record(state: StateDirectory, cluster: str) -> records.Record:
    """A cluster's record.

    :raises TdeError: ``cluster_unknown``, those of reading it.
    """
    record = records.read(state, check_name("cluster", cluster))
    if record is None:
        raise TdeError(
            "cluster_unknown",
            f"has no record in {state.path}",
            obj=f"cluster {cluster}",
            next_step="Known here: " + (", ".join(records.clusters(state)) or "none") + ".",
        )
    return record


def keyslot_tokens(state: StateDirectory, cluster: str) -> list[credentials.TokenName]:
    """The tokens that the cluster's keyslots are on, the first to be used first.

    That is one under which every data key is (a change of token may be unfinished), of the keyslot ``primary``, the oldest.
    """
    keys = KeyStore(state, cluster).describe()
    found: dict[credentials.TokenName, tuple[bool, set[str]]] = {}
    for slot, key_id in sorted(
        ((slot, key["key_id"]) for key in keys for slot in key["keyslots"]), key=lambda one: one[0]["created"]
    ):
        if slot["protection"] == "token":
            name = credentials.TokenName(slot["token_label"], slot["token_serial"])
            primary, opens = found.get(name, (False, set()))
            found[name] = (primary or slot["name"] == "primary", opens | {key_id})
    return sorted(found, key=lambda name: (len(found[name][1]) < len(keys), not found[name][0]))


def keyslot_services(state: StateDirectory, cluster: str) -> list[str]:
    """The KMIP services under each of which every data key of the cluster is."""
    keys = KeyStore(state, cluster).describe()
    under = [{slot["kmip_service"] for slot in key["keyslots"] if slot["protection"] == "kmip"} for key in keys]
    return sorted(set.intersection(*under)) if under else []


def engine_of(state: StateDirectory, record: records.Record, credential: credentials.Credential | None = None) -> Engine:
    """The cluster's engine, with what opens its keyslots."""
    credential = credential or credentials.Credential()
    request = Request(
        state,
        record.cluster,
        record.options,
        access=credential.access,
        passphrase=credential.passphrase,
        kmip=credential.kmip,
    )
    return engines.load(record.engine)(request)


def _named(arguments: argparse.Namespace) -> list[str]:
    """The clusters meant.

    :raises TdeError: ``invalid_option`` if none is named and not all are meant.
    """
    if arguments.clusters and getattr(arguments, "all", False):
        raise TdeError("invalid_option", "and names of clusters exclude each other", obj="--all")
    if arguments.clusters:
        return list(arguments.clusters)
    if getattr(arguments, "all", True):
        return records.clusters(arguments.state)
    raise TdeError("invalid_option", "name a cluster, or give --all", obj="hsm-tde")


def each(
    arguments: argparse.Namespace, output: Output, act: t.Callable[[str], Facts], line: t.Callable[[str, Facts], str]
) -> int:
    """Act on every cluster meant and print what came of it; one that fails does not stop the others.

    :param line: the result in one line, for people.
    :returns: the exit code of the first failure, 0 if there was none.
    """
    results: dict[str, Facts] = {}
    lines: list[str] = []
    code = DONE
    for cluster in _named(arguments):
        try:
            results[cluster] = act(cluster)
            for warning in results[cluster].pop("warnings", ()):
                output.warn(f"{cluster}: {warning}")
            lines.append(line(cluster, results[cluster]))
        except TdeError as error:
            code = code or exit_code(error)
            results[cluster] = {"failed": True, **public(error)}
            if not output.as_json:
                output.error(error)
    output.result({"clusters": results}, lines)
    return code


#: As the boot asks for it.
_OPEN = KeystoreWish("open", boot=True)


def open_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``open``."""
    stated = credentials.given(arguments)
    deadline = time.monotonic() + arguments.wait

    def act(cluster: str) -> Facts:
        while True:
            try:
                return open_cluster(arguments.state, cluster, stated)
            except TdeError as error:
                again = error.code == "busy" or exit_code(error) == UNREACHABLE
                if not again or time.monotonic() + _PAUSE > deadline:
                    raise
                output.warn(f"{error} Trying again.")
                time.sleep(_PAUSE)

    return each(
        arguments, output, act, lambda cluster, facts: f"{cluster}: {'opened' if facts['changed'] else 'nothing to open'}"
    )


def open_cluster(state: StateDirectory, cluster: str, stated: credentials.Given) -> Facts:
    """Open one cluster's keystore, asking for a credential only if something is closed.

    :returns: ``changed`` and the ``plan``.
    """
    record = read_record(state, cluster)
    planned = isolated(lambda: _keystore(state, record, _OPEN, check=True))
    if not planned["changed"]:
        return t.cast(Facts, planned)
    tries = tries_of(state, record, stated)
    return t.cast(Facts, try_each(tries, lambda one: _keystore(state, record, _OPEN, check=False, credential=one)))


def tries_of(
    state: StateDirectory, record: records.Record, stated: credentials.Given, *, may_ask: bool = True
) -> list[credentials.Credential]:
    """The credentials that open a cluster's keystore, in the order in which they are tried.

    :raises TdeError: as :func:`credentials.tries`.
    """
    how = engine_of(state, record).opened_with()
    if how == "nothing":
        return [credentials.Credential()]
    if how == "passphrase":
        return credentials.passphrases(record, stated, may_ask=may_ask)
    on, services = keyslot_tokens(state, record.cluster), keyslot_services(state, record.cluster)
    if how == "token":
        on = [credentials.TokenName(token.label, token.serial) for token in record.tokens]
    return credentials.tries(record, on, stated, services=services, may_ask=may_ask)


def after_start(state: StateDirectory, cluster: str) -> bool:
    """Whether a cluster's keystore is opened in the running server; not, where there is no record of it yet."""
    record = records.read(state, check_name("cluster", cluster))
    return record is not None and engines.load(record.engine).opens_after_start


def try_each(
    tries: t.Sequence[credentials.Credential], act: t.Callable[[credentials.Credential], t.Any], seconds: float = SECONDS
) -> t.Any:
    """Act with the first credential in a child; with the next only if the token refused that PIN.

    :param act: gives JSON's kinds of value. :param seconds: for each try.
    """
    for number, one in enumerate(tries):
        try:
            return isolated(functools.partial(act, one), seconds)
        except TdeError as error:
            if error.code not in _REFUSED or number == len(tries) - 1:
                raise
    raise ValueError("no credential")


def close_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``close``."""
    state: StateDirectory = arguments.state
    wish = KeystoreWish("closed", force=arguments.force)

    def act(cluster: str) -> Facts:
        record = read_record(state, cluster)
        return t.cast(Facts, isolated(lambda: _keystore(state, record, wish, check=False)))

    return each(arguments, output, act, lambda cluster, facts: f"{cluster}: {'closed' if facts['changed'] else 'is closed'}")


def _keystore(
    state: StateDirectory,
    record: records.Record,
    wish: KeystoreWish,
    *,
    check: bool,
    credential: credentials.Credential | None = None,
) -> Facts:
    outcome = engine_of(state, record, credential).keystore(wish, check=check)
    return {"changed": outcome.changed, "plan": public_plan(outcome.plan), "warnings": outcome.warnings}


def status_command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``status``."""
    return each(arguments, output, lambda cluster: isolated(lambda: status(arguments.state, cluster)), _status_line)


def status(state: StateDirectory, cluster: str) -> Facts:
    """What can be said of a cluster without a secret.

    :returns: ``engine``, ``open`` (whether nothing is left to open), ``missing`` (the steps that would open it),
        ``places``, ``keys`` with their ``keyslots``, ``pin_source``.
    """
    record = read_record(state, cluster)
    planned = _keystore(state, record, _OPEN, check=True)
    return {
        "engine": record.engine,
        "open": not planned["changed"],
        "missing": planned["plan"],
        "places": [dataclasses.asdict(place) for place in record.places],
        "data_keys": KeyStore(state, cluster).describe(),
        "pin_source": dict(record.pin_source),
    }


def _status_line(cluster: str, facts: Facts) -> str:
    lines = [
        f"{cluster} ({facts['engine']}): {'open' if facts['open'] else 'closed'}; PIN source: {_source(facts['pin_source'])}"
    ]
    lines += [f"  place {place['path']} (data key {place['key_id']})" for place in facts["places"]]
    lines += [f"  to open: {step['object']}" for step in facts["missing"]]
    for key in facts["data_keys"]:
        slots = ", ".join(_slot(slot) for slot in key["keyslots"])
        lines.append(f"  data key {key['key_id']}: {slots}")
    return "\n".join(lines)


def _slot(slot: t.Mapping[str, t.Any]) -> str:
    where = {"token": f" {slot['token_label']}", "kmip": f" {slot['kmip_service']}"}.get(slot["protection"], "")
    return f"{slot['name']} ({slot['protection']}{where})"


def _source(source: t.Mapping[str, str]) -> str:
    return {"file": f"file {source.get('path', '')}", "credential": f"systemd credential {source.get('path', '')}"}.get(
        source.get("kind", "none"), "none, an operator opens it"
    )
