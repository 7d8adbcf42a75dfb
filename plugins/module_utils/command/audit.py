# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``hsm-tde journal``: verify the chain, show the entries."""

from __future__ import annotations

import argparse
import typing as t

from ..common.journal import Journal
from .exits import DONE
from .output import Output


def _line(entry: t.Mapping[str, t.Any]) -> str:
    about = " ".join(f"{name}={entry[name]}" for name in ("cluster", "key", "key_id", "kcv") if entry[name])
    return f"{entry['seq']:>6} {entry['time']} {entry['result']:<7} {entry['action']}: {entry['object']} ({entry['actor']}) {about}".rstrip()


def command(arguments: argparse.Namespace, output: Output) -> int:
    """Run ``journal``.

    :raises TdeError: ``journal_damaged``.
    """
    journal = Journal(arguments.state.journal)
    entries = journal.entries()
    if arguments.what == "verify":
        head = entries[-1]["hash"] if entries else ""
        words = f"{len(entries)} entries, the chain is whole" + (f"; the last hash is {head}" if head else "")
        output.result({"entries": len(entries), "whole": True, "head": head}, [words])
        return DONE
    if arguments.cluster is not None:
        entries = [entry for entry in entries if entry["cluster"] == arguments.cluster]
    if arguments.last is not None:
        entries = entries[-arguments.last :] if arguments.last > 0 else []
    output.result({"entries": entries}, [_line(entry) for entry in entries])
    return DONE
