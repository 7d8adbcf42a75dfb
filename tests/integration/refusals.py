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
from ansible_collections.hsm.tde.tests.integration import postgres, support

#: A run may write down that it was refused, and hold a lock.
_NOTES = ("journal.jsonl", "journal.jsonl.head", "refused.json")


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


def tree(folder: Path, *, notes: bool = True) -> dict[str, t.Any]:
    """Every file and folder below, with type, mode, owner, links and content.

    :param notes: without, journal, list of refused PINs and locks are left out.
    """
    found: dict[str, t.Any] = {}
    for path in sorted([folder, *folder.rglob("*")]) if folder.exists() else []:
        if not notes and (path.name in _NOTES or path.name.endswith("lock")):
            continue
        info = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (oct(info.st_mode), info.st_uid, info.st_nlink if path.is_file() else 0, content)
    return found


def objects(hsm: support.Installation) -> dict[str, str]:
    """The objects of a software token's files, by content; what a login writes is left out."""
    top, names = (
        (hsm.tokendir, "*.object") if isinstance(hsm, support.SoftHsm) else (t.cast(support.OpenCryptoki, hsm).home / "var", "*")
    )
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(top.rglob(names))
        if path.is_file() and path.name not in ("token.object", "NVTOK.DAT", "MK_SO", "MK_USER")
    }


def catalogs(server: postgres.Server) -> str:
    """What a server's catalogs say of places."""
    return server.psql(
        "SELECT 'tablespace', spcname, pg_tablespace_location(oid), spcowner::text FROM pg_tablespace"
        " UNION ALL SELECT 'database', datname, dattablespace::text, '' FROM pg_database"
        " UNION ALL SELECT 'relation', oid::regclass::text, reltablespace::text, relfilenode::text FROM pg_class"
        " UNION ALL SELECT 'setting', setdatabase::text, setconfig::text, '' FROM pg_db_role_setting ORDER BY 1, 2"
    )


@contextlib.contextmanager
def unchanged(
    *folders: Path, state: Path | None = None, hsm: support.Installation | None = None, server: postgres.Server | None = None
) -> t.Iterator[None]:
    """What runs inside leaves folders, state directory, token and catalogs as they are."""

    def look() -> dict[str, t.Any]:
        return {
            "folders": [tree(folder) for folder in folders],
            "state": tree(state, notes=False) if state else None,
            "token": objects(hsm) if hsm else None,
            "catalogs": catalogs(server) if server else None,
        }

    before = look()
    yield
    assert look() == before
