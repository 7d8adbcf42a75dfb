# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The acts that the engine's plans order. Each can be killed at any moment: the next plan goes on from what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.journal import Journal
from ...common.plan import Handlers, Step
from ...common.secret import Secret
from ...hsm import credential, nshield_cards, nshield_keys
from .. import record as records
from ..base import Request
from . import memo as memos
from . import plan, sql
from .facts import Facts, Guard
from .memo import Memo
from .options import Options, word
from .plan import Change

#: How nShield lists keys that come by its PKCS#11 library (nfkminfo, application "pkcs11").
APPLICATION = "pkcs11"


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Passphrases, each with its guard; ``software`` is the software keystore's.

    :ivar old: that which opened the keystore before the change; without a change the same as ``new``.
    """

    guard: Guard
    new: Secret | None
    old_guard: Guard
    old: Secret | None
    software: Secret | None


def compose(guard: Guard, passphrase: Secret | None, options: Options) -> Secret:
    """The credential between the quotes, judged by every rule.

    :raises TdeError: ``credential_missing``, ``credential_forbidden``.
    """
    protection = guard.protection if guard.hsm else "module"
    return credential.compose(protection, passphrase, guard.name, separator=options.separator)


class Acts:
    """Acts on one database's keystore.

    :ivar memo: what is remembered, as of the last act; :ivar facts: what the plan was made from.
    :ivar converted: tablespaces that were encrypted by this run.
    """

    def __init__(self, request: Request, options: Options, given: Credentials, memo: Memo) -> None:
        self.request, self.options, self.given, self.memo = request, options, given, memo
        self.journal = Journal(request.state.journal)
        self.facts: Facts | None = None
        self.database: sql.Database | None = None
        self.warnings: list[str] = []
        self.converted: list[dict[str, t.Any]] = []

    def handlers(self) -> Handlers:
        """One act a step."""
        return {
            "write_record": self._write_record,
            "alter_system": self._alter_system,
            "open_pdbs": lambda step: self._run("ALTER PLUGGABLE DATABASE ALL OPEN", step),
            "create_keystore": self._create_keystore,
            "open_keystore": lambda step: self._keystore("OPEN", step),
            "close_keystore": lambda step: self._keystore("CLOSE", step),
            "write_secret": self._write_secret,
            "create_auto_login": self._create_auto_login,
            "write_external": self._write_external,
            "set_key": self._set_key,
            "use_key": self._use_key,
            "migrate_key": lambda step: self._migrate(step, into=True),
            "reverse_migrate_key": lambda step: self._migrate(step, into=False),
            "mark_closed": lambda step: None,
            "credential_changed": lambda step: None,
            "change_token_passphrase": self._change_token_passphrase,
            "transfer_keys": self._transfer,
            "verify_protection": lambda step: self.verify(),
            "finish_leg": self._finish_leg,
            "finish_change": self._finish_change,
            "create_tablespace": self._create_tablespace,
            "encrypt_tablespace": self._encrypt_tablespace,
        }

    # --- what is remembered

    def remember(self, **more: t.Any) -> None:
        """Write down what changed."""
        self.memo = dataclasses.replace(self.memo, **more)
        memos.write(self.request.state, self.request.cluster, self.memo)

    def done(self, step: Step) -> None:
        """Note how far a change has come."""
        phase = step.data.get("phase")
        if phase and self.memo.change:
            startup = self.facts.startup if self.facts else ""
            self.remember(change=dataclasses.replace(self.memo.change, phase=phase, startup=startup))

    def _write_record(self, step: Step) -> None:
        path = self.request.state.cluster_record(self.request.cluster)
        with self.request.state.locked(wait_seconds=30):
            records.write(self.request.state, records.parse(step.data["record"], path))
        if self.memo.guard is None:
            self.remember(guard=self.given.guard)

    def _note(self, action: str, step: Step, **more: t.Any) -> None:
        self.journal.append(action, step.obj, cluster=self.request.cluster, **more)

    # --- credentials

    def hsm_credential(self) -> Secret:
        """The credential that the HSM keystore answers to at this moment of a change."""
        change = self.memo.change
        old = change is not None and (
            change.leg_name == "reverse" or (change.leg_name == "credential" and change.phase == plan.BEGUN)
        )
        given = self.given
        return compose(given.old_guard, given.old, self.options) if old else compose(given.guard, given.new, self.options)

    def software(self) -> Secret:
        """The software keystore's passphrase."""
        return compose(Guard("passphrase"), self.given.software, self.options)

    def _by(self, hsm: bool) -> str:
        if not hsm:
            return sql.by(self.software())
        found = self.hsm_credential()
        return sql.by(None if self.options.external_store else found)

    # --- statements

    def _db(self) -> sql.Database:
        return established(self.database, "the session")

    def _run(self, statement: str, step: Step, *, seconds: float | None = None) -> None:
        self._db().within(step.data.get("container", "CDB$ROOT"))
        self._db().run(statement, step.obj, seconds=seconds)

    def _alter_system(self, step: Step) -> None:
        name, value = step.data["name"], step.data["value"]
        text = f"KEYSTORE_CONFIGURATION={value}" if name == "TDE_CONFIGURATION" else value
        self._run(f"ALTER SYSTEM SET {name} = '{text}' SCOPE = {step.data['scope']} SID = '{self.options.sid}'", step)
        self._note("alter_system", step, name=name, value=value, scope=step.data["scope"])

    def _create_keystore(self, step: Step) -> None:
        try:
            self._run(sql.administer(f"CREATE KEYSTORE {sql.by(self.software())}"), step)
        except TdeError as exc:
            # ORA-46630: a killed run made it, or it was there; whether its passphrase is this one shows when it opens.
            if "ORA-46630" not in exc.message:
                raise
        self.remember(software=True)
        self._note("create_keystore", step)

    def _keystore(self, verb: str, step: Step) -> None:
        scope = "ALL" if step.data["all"] else "CURRENT"
        self._run(sql.administer(f"SET KEYSTORE {verb} {self._by(step.data['hsm'])} CONTAINER = {scope}"), step)
        self._note(f"{verb.lower()}_keystore", step)

    def _store(self, step: Step, there: bool, statement: t.Callable[[str], str]) -> None:
        """ADD a secret, or UPDATE one: which of them it must be the server alone knows, for views show open keystores only.

        :param there: whether it is thought to be there; :param statement: by the verb.
        """
        verbs = ("UPDATE", "ADD") if there else ("ADD", "UPDATE")
        try:
            self._run(sql.administer(statement(verbs[0])), step)
        except TdeError as exc:
            # ORA-46667: not there; ORA-46670 and others: it failed, as it does where it is there already.
            if exc.code != "server_failed":
                raise
            with contextlib.suppress(TdeError):
                return self._run(sql.administer(statement(verbs[1])), step)
            raise

    def _write_secret(self, step: Step) -> None:
        value = self.hsm_credential().text()
        there = bool(self.memo.secret) or (self.facts is not None and "HSM_PASSWORD" in self.facts.clients)
        self._store(
            step,
            there,
            lambda verb: (
                f"{verb} SECRET '{value}' FOR CLIENT 'HSM_PASSWORD' FORCE KEYSTORE {sql.by(self.software())} WITH BACKUP"
            ),
        )
        self._note("write_secret", step)

    def _create_auto_login(self, step: Step) -> None:
        # Never a local one: on a cluster the other nodes could not open it.
        self._run(sql.administer(f"CREATE AUTO_LOGIN KEYSTORE FROM KEYSTORE {sql.by(self.software())}"), step)
        self.remember(secret=memos.fingerprint(self.hsm_credential()))
        self._note("create_auto_login", step)

    def _write_external(self, step: Step) -> None:
        value = self.hsm_credential()
        folder = f"{self.options.wallet_root}/tde_seps"
        self._store(
            step,
            bool(self.memo.external),
            lambda verb: f"{verb} SECRET '{value.text()}' FOR CLIENT 'TDE_WALLET' TO AUTO_LOGIN KEYSTORE '{folder}'",
        )
        self.remember(external=memos.fingerprint(value))
        self._note("write_external", step)

    # --- master keys

    def _keyed(self, name: str) -> None:
        self.remember(keyed=tuple(sorted({*self.memo.keyed, name})))

    def _set_key(self, step: Step) -> None:
        hsm = self.given.guard.hsm
        backup = "" if hsm else " WITH BACKUP"
        self._note("set_key", step, result="begun", key=step.data["tag"])
        self._run(
            sql.administer(f"SET KEY USING TAG '{step.data['tag']}' FORCE KEYSTORE {self._by(hsm)}{backup} CONTAINER = CURRENT"),
            step,
        )
        self._keyed(step.data["container"])
        self._note("set_key", step, key=step.data["tag"])

    def _use_key(self, step: Step) -> None:
        hsm = self.given.guard.hsm
        backup = "" if hsm else " WITH BACKUP"
        self._run(sql.administer(f"USE KEY '{step.data['key_id']}' FORCE KEYSTORE {self._by(hsm)}{backup}"), step)
        self._keyed(step.data["container"])
        self._note("use_key", step, key=step.data["tag"], key_id=step.data["key_id"])

    def _migrate(self, step: Step, *, into: bool) -> None:
        own = sql.by(self.software())
        if into:
            statement = f"SET KEY {self._by(True)} FORCE KEYSTORE MIGRATE USING {own.removeprefix('IDENTIFIED BY ')} WITH BACKUP"
        else:
            statement = f'SET KEY {own} FORCE KEYSTORE REVERSE MIGRATE USING "{self.hsm_credential().text()}" WITH BACKUP'
        self._note(step.action, step, result="begun")
        self._run(sql.administer(statement), step)
        self._keyed(step.data["container"])
        self._note(step.action, step)

    def verify(self) -> None:
        """Hold the protection of the master keys in use against the guard.

        :raises TdeError: ``nshield_key_slipped``, ``nshield_key_elsewhere``, ``key_absent``, ``oracle_master_key_unreachable``,
            and those of nShield's commands.
        """
        guard = self.given.guard
        facts = self._db().facts()
        plan.shown(facts, self.memo.keyed, hsm_alone=True)
        used = [key for one in facts.containers if (key := facts.active(one.con_id)) and key.hsm]
        if not used:
            return
        tools = self.options.tools()
        estate = tools.usable()
        expected = nshield_keys.expectation(estate, guard.protection, guard.name)
        found = nshield_keys.placed(tools, estate, [f"*{key.key_id}*" for key in used], APPLICATION, expected)
        nshield_keys.verify(tools, estate, found, expected)

    # --- the HSM's own tools

    def check_credential(self, guard: Guard, passphrase: Secret | None) -> None:
        """Whether the HSM knows a credential, before Oracle is given it: one that it does not know falls to module protection.

        :raises TdeError: as :func:`nshield_cards.check_credential`; ``credential_missing``.
        """
        compose(guard, passphrase, self.options)
        if guard.hsm and passphrase is not None:
            nshield_cards.check_credential(self.options.tools(), guard.protection, guard.name, passphrase)

    def _change_token_passphrase(self, step: Step) -> None:
        guard, state, tools = self.given.guard, self.request.state, self.options.tools()
        new = established(self.given.new, "the new passphrase")
        if guard.protection == "softcard":
            wish = nshield_cards.SoftcardWish(
                name=guard.name,
                hash=None,
                passphrase=new,
                old_passphrase=self.given.old,
                acs_passphrase=self.options.acs_passphrase,
            )
            nshield_cards.softcard(tools, wish, state)
            return
        # Cards that are in no slot are told of by every run until they have it (engine.py).
        nshield_cards.cardset_passphrase(tools, guard.name or "", new, self.given.old, self.options.acs_passphrase, state)

    def _transfer(self, step: Step) -> None:
        source, guard = self.given.old_guard, self.given.guard
        wish = nshield_keys.TransferWish(
            patterns=(),
            application=APPLICATION,
            source=source.name,
            protection=guard.protection,
            token=guard.name,
            passphrase=self.given.new,
            acs_passphrase=self.options.acs_passphrase,
            # What a killed rocs left under the former token would open with its credential for ever.
            retire_copies=True,
            backup_directory=self.options.backup_directory or f"{self.request.state.path}/nshield-backups",
        )
        nshield_keys.transfer(self.options.tools(), wish, self.request.state)

    # --- the end of a change

    def _finish_leg(self, step: Step) -> None:
        change = established(self.memo.change, "the change under way")
        self.remember(change=dataclasses.replace(change, leg=change.leg + 1, phase=plan.BEGUN, startup=""))

    def _finish_change(self, step: Step) -> None:
        change: Change = established(self.memo.change, "the change under way")
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        former = {"kind": change.kind, **change.source.public(), "until": now}
        self._note("change_protection", step, kind=change.kind, source=change.source.words, target=change.target.words)
        self.remember(
            guard=change.target,
            change=None,
            credential=memos.fingerprint(compose(self.given.guard, self.given.new, self.options)),
            keyed=() if change.kind == plan.REPLACE else self.memo.keyed,
            former=(*self.memo.former, former),
        )

    # --- tablespaces

    def _create_tablespace(self, step: Step) -> None:
        data = step.data
        place = f"'{data['location']}' " if data["location"] else ""
        name = word("tablespace", data["name"])
        self._run(
            f"CREATE TABLESPACE {name} DATAFILE {place}SIZE 100M AUTOEXTEND ON ENCRYPTION USING '{data['algorithm']}' ENCRYPT",
            step,
        )
        self._note("create_tablespace", step)

    def _encrypt_tablespace(self, step: Step) -> None:
        data = step.data
        name = word("tablespace", data["name"])
        how = "FINISH ENCRYPT" if data["finish"] else f"ONLINE USING '{data['algorithm']}' ENCRYPT"
        began = datetime.datetime.now(datetime.timezone.utc)
        self._run(f"ALTER TABLESPACE {name} ENCRYPTION {how}", step, seconds=sql.ENCRYPT_SECONDS)
        took = datetime.datetime.now(datetime.timezone.utc) - began
        self.converted.append(
            {
                "database": data["container"],
                "object": name,
                "kind": "tablespace",
                "from": "partly encrypted" if data["finish"] else "plain",
                "to": data["algorithm"],
                "bytes": 0,
                "seconds": round(took.total_seconds(), 3),
                "attempts": 1,
            }
        )
        self._note("encrypt_tablespace", step, finish=data["finish"])
