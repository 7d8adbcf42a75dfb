# Copyright (c) 2026, the hsm.tde authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether a packed command holds all that it imports of itself."""

from __future__ import annotations

import ast
import io
import zipfile


def archive(packed: bytes) -> dict[str, bytes]:
    """The files of a packed command."""
    with zipfile.ZipFile(io.BytesIO(packed)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def missing_imports(tree: dict[str, bytes]) -> list[str]:
    """The relative imports, those inside functions too, that no file of the tree answers."""
    modules = {name[: -len(".py")].removesuffix("/__init__") for name in tree if name.endswith(".py")}
    missing = []
    for name, source in tree.items():
        package = name.split("/")[:-1]
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.ImportFrom) and node.level):
                continue
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            here = "/".join(base)
            if here not in modules:
                missing.append(f"{name}: {here}")
            elif f"{here}/__init__.py" in tree:
                missing += [
                    f"{name}: {here}/{alias.name}"
                    for alias in node.names
                    if f"{here}/{alias.name}" not in modules and alias.name.encode() not in tree[f"{here}/__init__.py"]
                ]
    return missing
