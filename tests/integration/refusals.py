# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What makes a refusal a good one: the right code and cause, a message that helps, and nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import typing as t
from pathlib import Path

from ansible_collections.hsm.tde.plugins.module_utils.common.errors import ERROR_CODES
from ansible_collections.hsm.tde.tests.integration import postgres

#: A run may write down that it was refused, and hold a lock; a login counts tries in the token's own files.
_IMAGE = 1 << 20
_NOTES = (
    *("journal.jsonl", "journal.jsonl.head", "refused.json"),
    *("token.object", "token.copy", "NVTOK.DAT", "NVTOK.copy", "MK_SO", "MK_USER"),
)


def clear(result: t.Mapping[str, t.Any], code: str, *names: str, secrets: t.Iterable[str] = ()) -> t.Mapping[str, t.Any]:
    """Judge what a module, or the command with ``--json``, answered.

    :param names: what the message must name. :param secrets: what must not stand anywhere in the answer.
    """
    assert result.get("failed"), result
    assert result["error_code"] == code, result["msg"]
    assert result["cause"] == ERROR_CODES[code].cause
    for field in ("object", "kept", "next_step"):
        assert result[field], f"no {field}: {result['msg']}"
        assert result[field] in result["msg"]
    for name in names:
        assert name in result["msg"], result["msg"]
    for secret in secrets:
        assert secret not in json.dumps(result), f"a secret shows: {result['msg'].replace(secret, '***')}"
    return result


def _is_note(path: Path) -> bool:
    """A note, or a state directory that was made to hold notes only."""
    if path.is_dir() and not path.is_symlink():
        inside = list(path.iterdir())
        return bool(inside) and all(_is_note(one) for one in inside)
    return path.name in _NOTES or path.name.endswith("lock")


def tree(folder: Path, skip: t.Collection[Path] = ()) -> dict[str, str]:
    """Every file and folder below, with type, mode, owner, links and content; notes, locks and what a login writes are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if _is_note(path) or any(path.is_relative_to(one) for one in skip):
            continue
        info = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            # The content of an image changes below a file system that nobody writes to.
            content = (
                f"{info.st_nlink} {info.st_size if info.st_size > _IMAGE else hashlib.sha256(path.read_bytes()).hexdigest()}"
            )
        found[str(path)] = f"{info.st_mode:o} {info.st_uid} {content}"
    return found


def catalogs(server: postgres.Server) -> dict[str, str]:
    """What a server's catalogs say of places."""
    rows = server.psql(
        "SELECT 'tablespace ' || spcname, pg_tablespace_location(oid), spcowner::text FROM pg_tablespace"
        " UNION ALL SELECT 'database ' || datname, dattablespace::text, '' FROM pg_database"
        " UNION ALL SELECT 'relation ' || oid::regclass, reltablespace::text, relfilenode::text FROM pg_class"
        " UNION ALL SELECT 'setting ' || setdatabase, setconfig::text, '' FROM pg_db_role_setting"
    )
    return dict(row.split("|", 1) for row in rows.splitlines())


@contextlib.contextmanager
def unchanged(*folders: Path, skip: t.Collection[Path] = (), server: postgres.Server | None = None) -> t.Iterator[None]:
    """What runs inside leaves everything in the folders, and what the catalogs say, as it is.

    :param skip: paths below which anything may happen.
    """

    def look() -> dict[str, str]:
        found = {name: value for folder in folders for name, value in tree(folder, skip).items()}
        return {**found, **(catalogs(server) if server else {})}

    before = look()
    yield
    after = look()
    changes = {name: (before.get(name), after.get(name)) for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not changes, f"changed although refused: {changes}"
