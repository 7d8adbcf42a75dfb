# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a proof finds in the data directory of a server that encrypts its pages itself: its word is not taken."""

from __future__ import annotations

import os
import struct
import tempfile
import typing as t

from ...common.errors import TdeError
from ...storage import pages
from ..base import ProofWish
from .secret import CYBERTEC, EDB

if t.TYPE_CHECKING:
    from .engine import Keycommand

Facts = t.Dict[str, t.Any]

#: Folders of a data directory whose files with a number for a name hold pages.
_FOLDERS = ("base", "global", "pg_tblspc")
_NOTES = (
    "Of the data directory the relations' files were judged; its write-ahead log and temporary files have no pages of this kind.",
    "Everything in it ought to be encrypted, so a plain page was made elsewhere to show that this reading sees one.",
)


def proofs(engine: Keycommand, wish: ProofWish) -> list[Facts]:
    """The proof of the data directory, read as the server's user.

    :raises TdeError: ``engine_unsupported``, ``invalid_option``, ``file_absent``.
    """
    options = engine.options
    if options.kind not in (EDB, CYBERTEC):
        raise TdeError(
            "engine_unsupported", "its secret protects no file of the database", obj=f"engine {engine.name}, kind {options.kind}"
        )
    if wish.tablespaces or wish.relations or not wish.data_directory:
        raise TdeError(
            "invalid_option",
            "the server encrypts everything or nothing, and only everything is looked at",
            obj="options tablespaces and relations",
            next_step="Set data_directory: true instead.",
        )
    directory = options.data_directory
    if directory is None:
        raise TdeError("invalid_option", "is missing", obj="option data_directory", next_step="Say what is to be looked at.")
    return [t.cast(Facts, engine.side().run(lambda: examine(directory)))]


def examine(directory: str) -> Facts:
    """Judge a data directory's pages.

    :raises TdeError: ``file_absent``.
    """
    if not os.path.isfile(os.path.join(directory, "PG_VERSION")):
        raise TdeError("file_absent", "is no data directory that this user can read", obj=directory)
    facts = pages.read(sorted(_files(directory)))
    facts.control = _control()
    return pages.told("data directory", directory, facts, _NOTES)


def _files(directory: str) -> t.Iterator[str]:
    for name in _FOLDERS:
        # The links of pg_tblspc lead to the tablespaces.
        for folder, dummy, names in os.walk(os.path.join(directory, name), followlinks=name == "pg_tblspc"):
            yield from (os.path.join(folder, one) for one in names if one[:1].isdigit())


def _control() -> int:
    """Plain pages that the same reading finds: an empty page as PostgreSQL initialises it (bufpage.c, PageInit)."""
    page = bytearray(pages.PAGE)
    struct.pack_into("<HHHHH", page, 10, 0, 24, pages.PAGE, pages.PAGE, pages.PAGE | 4)
    with tempfile.NamedTemporaryFile() as file:
        file.write(page)
        file.flush()
        return pages.read([file.name]).pages[pages.PLAIN]
