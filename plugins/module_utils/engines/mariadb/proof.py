# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether files are encrypted, judged from their content and never by the server's word.

The rule: ``encrypted`` only if no page of data is in the clear, and index pages were opened with the key of our store;
``plain`` if one page is in the clear; else ``unknown``, with the reasons.
"""

from __future__ import annotations

import os
import random
import typing as t

from ...common.check import established
from ...common.errors import TdeError
from ...common.files import os_error, read_private
from ...keystore.store import KeyStore
from ..base import ProofWish
from ..keyfacts import read_keys
from . import keyfile, logs, pages, plan, sql

if t.TYPE_CHECKING:
    from .engine import MariaDb

Facts = t.Dict[str, t.Any]

_HOW = (
    "The files' pages were read as they lie on the disk: those of data that say that they are not encrypted were counted as equal, and "
    "index pages were decrypted with the key of the key file, which is right if their first record appears (control_blocks_equal)."
)


class Proof:
    """One task's look.

    :param keys: the keys in memory that are the store's own, by number.
    """

    def __init__(self, engine: MariaDb) -> None:
        self.engine = engine
        self.state = engine.state()
        self.answer = self.state.answer
        ours = read_keys(KeyStore(engine.request.state, engine.request.cluster))
        self.names = keyfile.names(key.key_id for key in ours)
        self.keys: dict[int, bytes] = {}
        if self.state.keys:
            wished = {name.number: key.check_value for key in ours for name in [keyfile.parse_name(key.key_id)] if name}
            there = keyfile.keys_of(read_private(engine.options.key_file, forbidden_mode=0o027))
            self.keys = {number: key for number, key in there.items() if wished.get(number) == self.state.keys.checks[number]}
        self.rng = random.SystemRandom()
        self.left_out: list[str] = []

    def place(self, name: str, directory: str, files: t.Sequence[str], others: t.Sequence[tuple[str, bool | None]] = ()) -> Facts:
        """Judge a place.

        :param files: InnoDB's files, absolute; :param others: further files, and whether they are encrypted.
        """
        counts, read, doubts, seen, notes = pages.Counts(), 0, [], [], []
        for path in files:
            try:
                found, crypt = pages.examine(path, self.keys, self.rng, self.engine.options.algorithm)
            except OSError as exc:
                doubts.append(f"{path}: {os_error(exc, path).message}.")
                continue
            read += 1
            counts.add(found)
            if found.plain:
                seen.append(f"{found.plain} of {found.pages} pages of {path} are in the clear.")
            if crypt is None and found.pages:
                doubts.append(f"{path} says nothing of encryption.")
            elif crypt and crypt.key not in self.keys:
                doubts.append(f"{path} is under key {crypt.key}, which is not in memory or not the store's: open the keystore.")
            elif found.shut:
                doubts.append(f"{found.shut} index pages of {path} do not open with key {crypt.key if crypt else '?'}.")
            elif found.unreadable:
                doubts.append(f"{path} is in a compressed format: its pages say that they are encrypted, which was not shown.")
        for path, encrypted in others:
            if encrypted is None:
                doubts.append(f"Whether {path} is encrypted does not show.")
            elif not encrypted:
                seen.append(f"{path} is in the clear.")
        if not counts.opened and not seen:
            doubts.append("No index page was opened with a key of ours, so there is nothing that proves it.")
        if counts.sampled:
            notes.append(f"Of large files pages by chance were read, {pages.BUDGET >> 20} MiB of each.")
        if self.answer is None:
            notes.append("The server does not answer: what it had in memory only was not looked at.")
        if self.left_out:
            notes.append(
                f"Tables in use, of which what the server had in memory only was not looked at: {', '.join(self.left_out)}."
            )
        verdict = "plain" if seen else "unknown" if doubts else "encrypted"
        if not files and not others:
            verdict, doubts = "empty", ["It holds nothing yet."]
        sure = [
            f"0 of {counts.pages} pages are in the clear.",
            f"{counts.opened} index pages were opened with keys of the store.",
        ]
        return {
            "place": name,
            "path": directory,
            "verdict": verdict,
            "examined": {
                "files": len(files) + len(others),
                "files_read": read + len(others),
                "blocks": counts.pages,
                "blocks_equal": counts.plain,
                "blocks_zero": counts.zero,
                "bytes": counts.bytes_read,
                "control_blocks_equal": counts.opened,
            },
            "how": _HOW,
            "reasons": seen or doubts or sure,
            "notes": notes,
        }

    def server(self) -> sql.Server:
        """The server's answer.

        :raises TdeError: why there is none.
        """
        if self.answer is None:
            raise established(self.state.error, "the error")
        return self.answer

    def flush(self, tables: t.Sequence[sql.Table]) -> None:
        """Let the server write what it has in memory."""
        with sql.connect(self.state.access) as connection:
            self.left_out = sql.flush(connection, tables)

    def tables(self, name: str, tables: t.Sequence[sql.Table]) -> Facts:
        """The files of some tables, after the server has written their pages."""
        answer = self.server()
        self.flush(tables)
        spaces = [space for table in tables for space in answer.spaces_of(table)]
        # A full-text index's own tables follow their table's file name nowhere; they count with the data directory.
        return self.place(name, answer.data_directory, [_path(answer, space) for space in spaces])

    def data_directory(self) -> Facts:
        """All of it: every tablespace, the logs, tables of other engines."""
        directory = self.state.data_directory
        if not directory:
            raise TdeError("invalid_option", "is not known while the server is down", obj="option mariadb.data_directory")
        others: list[tuple[str, bool | None]] = []
        redo = os.path.join(directory, "ib_logfile0")
        if self.answer:
            self.flush(plan.own(self.answer))
            files = [_path(self.answer, space) for space in self.answer.spaces]
            others += [(path, logs.binlog_encrypted(logs.beginning(path))) for path in self.answer.logs]
        else:
            files = sorted(
                os.path.join(folder, one) for folder, dummy, names in os.walk(directory) for one in names if one.endswith(".ibd")
            )
        system = [os.path.join(directory, one) for one in sorted(os.listdir(directory)) if one.startswith(("ibdata", "undo0"))]
        if os.path.exists(redo):
            others.append((redo, logs.redo_encrypted(logs.beginning(redo))))
        others += [
            (os.path.join(folder, one), False if one.endswith(".MYD") else None)
            for folder, dummy, names in os.walk(directory)
            for one in names
            if one.endswith((".MYD", ".MAD")) and os.path.relpath(folder, directory).split("/")[0] not in sql.SYSTEM_DATABASES
        ]
        return self.place("data directory", directory, sorted({*files, *system}), others)


def _path(answer: sql.Server, space: sql.Space) -> str:
    return os.path.normpath(os.path.join(answer.data_directory, space.path))


def proofs(engine: MariaDb, wish: ProofWish) -> list[Facts]:
    """The proofs wished for, tablespaces first.

    :raises TdeError: ``tablespace_absent``, ``relation_absent``, ``server_down``.
    """
    proof = Proof(engine)
    found = []
    if wish.data_directory:
        found.append(proof.data_directory())
    for name in wish.tablespaces:
        if name not in keyfile.current(proof.names):
            raise TdeError("tablespace_absent", "has no key in the store", obj=f"tablespace {name}")
        answer = proof.server()
        tables = [table for table in plan.own(answer) if plan.tablespace_of(table, answer, proof.names) == name]
        found.append(proof.tables(name, tables))
    for name in wish.relations:
        table = next((one for one in proof.server().tables if one.words == name), None)
        if table is None:
            raise TdeError("relation_absent", "does not exist", obj=f"relation {name}", next_step="Name it as DATABASE.TABLE.")
        found.append(proof.tables(name, [table]))
    return found
