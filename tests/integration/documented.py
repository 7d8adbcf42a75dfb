# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a module answers in tests is held against its RETURN: nothing undocumented, nothing missing, nothing of another type."""

from __future__ import annotations

import functools
import importlib
import json
import typing as t

import yaml

#: What Ansible adds, or knows itself.
_CORE = {"changed", "failed", "msg", "invocation", "warnings", "deprecations", "diff"}
_TYPES = {"str": str, "list": list, "dict": dict, "bool": bool, "int": int, "float": float}

Doc = t.Mapping[str, t.Any]


@functools.cache
def _docs(module: str) -> tuple[Doc, bool]:
    """RETURN, and whether the module says that it shows differences."""
    found = importlib.import_module(f"ansible_collections.hsm.tde.plugins.modules.{module}")
    shows = yaml.safe_load(found.DOCUMENTATION)["attributes"]["diff_mode"]["support"] == "full"
    return t.cast(Doc, yaml.safe_load(found.RETURN) or {}), shows


def documented(module: str, result: t.Mapping[str, t.Any], *, diff: bool = False) -> None:
    """Judge a result of success; :param diff: differences were asked for."""
    if result.get("failed") or result.get("prepared") is False:
        return
    docs, shows = _docs(module)
    assert not diff or ("diff" in result) == shows, f"{module}: diff_mode is documented otherwise"
    faults = [
        f"{name} is missing" for name, doc in docs.items() if doc["returned"] in ("always", "success") and name not in result
    ]
    for name in sorted(set(result) - _CORE):
        faults += _faults(name, result[name], docs[name]) if name in docs else [f"{name} is not documented"]
    assert not faults, f"{module}: {faults}"


def _faults(name: str, value: t.Any, doc: Doc) -> list[str]:
    if value is None:
        return [] if "null" in json.dumps(doc).lower() else [f"{name} is null"]
    if not isinstance(value, _TYPES[doc["type"]]):
        return [f"{name} is {type(value).__name__}"]
    items = value if isinstance(value, list) else [value] if isinstance(value, dict) and "contains" in doc else []
    sample = doc.get("sample") or [{}]
    known = (
        set(doc["contains"])
        if "contains" in doc
        else set(sample[0])
        if isinstance(sample, list) and isinstance(sample[0], dict)
        else set()
    )
    return [f"{name}: {sorted(set(item) - known)}" for item in items if isinstance(item, dict) and known and set(item) - known]
