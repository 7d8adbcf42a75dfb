# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The engine fep: Fujitsu Enterprise Postgres, which encrypts tablespaces itself and has a keystore of its own."""

from __future__ import annotations

import datetime
import typing as t

from ...common import plan as plans
from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Plan
from .. import record as records
from ..base import Engine, KeystoreWish, MasterKeyWish, Outcome, ProofWish, Request, TablespacesWish
from ..rounds import Decision, rounds
from . import look, public, sql
from .act import Acts
from .options import HSM, PLUGIN, Options, complete

Facts = t.Dict[str, t.Any]


class Fep(Engine):
    """See the module."""

    name = "fep"
    refuses = {
        "close": "Enterprise Postgres has no way to close a keystore: it stays open until the server stops",
    }

    algorithms = ("AES128", "AES256")
    opens_after_start = True

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.options: Options = complete(request.options, self.record.options if self.record else {}, request.cluster)

    # --- what all services share

    def acts(self) -> Acts:
        """The acts on this cluster."""
        return Acts(self.request, self.options, self.record or records.Record(self.request.cluster, self.name))

    def state(self, acts: Acts, *, slot_id: int | None = None) -> look.State:
        """All that there is, looked at.

        :param slot_id: the token's slot, if it was looked for.
        """
        options, memory = self.options, look.memory(self.record)
        location = look.location(options)
        entries = Journal(self.request.state.journal).entries()
        cluster = self.request.cluster
        key, dummy = look.master_key(entries, cluster, location.digest)
        files = look.files(options, acts.wished) if options.data_directory else look.Files(False, "/nonexistent", "/nonexistent")
        server = look.server(options, self.request.connection, memory.get("login") or {})
        acts.server = server
        if slot_id is None and files.settings:
            # Who only opens has no token at hand; the settings that were made say its slot.
            recorded = files.settings.get("tde_z.slot_id", "")
            slot_id = int(recorded) if recorded.isdigit() else None
        return look.State(
            cluster=cluster,
            files=files,
            location=location,
            server=server,
            plugin=look.plugin(options) if options.keystore == PLUGIN else "",
            slot_id=slot_id,
            key=key,
            auto_open_here=look.enabled_here(entries, cluster),
            life=str(memory.get("life") or ""),
            adopted=bool(memory.get("adopted")),
            elsewhere=look.elsewhere(options, files, server),
        )

    def settle(self) -> None:
        """Write down how an act on the master key ended whose task was killed."""
        journal = Journal(self.request.state.journal)
        location = look.location(self.options)
        dummy, open_act = look.master_key(journal.entries(), self.request.cluster, location.digest)
        if open_act and not open_act.unseen:
            key = open_act.key
            journal.append(
                open_act.action,
                "the keystore's file says how the interrupted act ended",
                result="done" if open_act.took else "failed",
                cluster=self.request.cluster,
                key_id=key.key_id,
                tag=key.tag,
                kms_name=key.kms_name,
            )

    def rounds(self, decide: t.Callable[[], tuple[Decision, Facts]], run: t.Callable[[Plan], Plan], *, check: bool) -> Outcome:
        """Look, decide and act until there is nothing left to do; see :func:`engines.rounds.rounds`."""
        return rounds(self.request.cluster, decide, run, public.expected, check=check)

    def usable(self, state: look.State) -> None:
        """Refuse a server that answers and is not one to work with.

        :raises TdeError: ``server_starting`` and its kind, ``server_privilege_missing``, ``server_other_product``, ``server_not_local``.
        """
        server = state.server
        if server.process is None:
            return
        if server.answer is None and server.error is not None:
            raise server.error
        where = f"server at {server.access.where}"
        if server.facts is None and server.answer:
            raise TdeError(
                "server_privilege_missing",
                f"{server.answer.user} is no superuser",
                obj=where,
                next_step="Set login_user, or leave it out.",
            )
        if server.facts and not server.facts.enterprise:
            raise sql.not_enterprise(server.access)

    def opened_with(self) -> str:
        return {HSM: "token", PLUGIN: "nothing"}.get(self.options.keystore, "passphrase")

    def secret_kind(self) -> str:
        """What the server's functions are given: ``PIN``, ``passphrase`` or nothing."""
        return {HSM: "PIN", PLUGIN: ""}.get(self.options.keystore, "passphrase")

    # --- the services

    def keystore(self, wish: KeystoreWish, *, check: bool) -> Outcome:
        from .keystore import Keystore

        if wish.state == "closed":
            self.require("close")
        with self.locked(check):
            self.reread()
            return Keystore(self, wish, check).outcome()

    def master_key(self, wish: MasterKeyWish, *, check: bool) -> Outcome:
        from .masterkey import MasterKey

        with self.locked(check):
            self.reread()
            return MasterKey(self, wish, check, datetime.datetime.now(datetime.timezone.utc).date()).outcome()

    def tablespaces(self, wish: TablespacesWish, *, check: bool) -> Outcome:
        from .tablespaces import Tablespaces

        with self.locked(check):
            self.reread()
            return Tablespaces(self, wish, check).outcome()

    def info(self) -> Facts:
        from .info import collect

        return collect(self)

    def proofs(self, wish: ProofWish, *, canary: bool) -> list[Facts]:
        from .proof import proofs

        return proofs(self, wish)


def run_steps(acts: Acts, steps: Plan, more: plans.Handlers | None = None) -> None:
    """Carry a plan out."""
    plans.run(steps, {**acts.handlers(), **(more or {})})
