"""What code depends on: the library's definitions that it can reach, each by the hash of its syntax tree."""

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from apexlib.files import content_hash

_LIBRARY = Path(__file__).parents[1]


def normalised(source: str) -> str:
    """Write code as a syntax tree: comments, formatting and docstrings do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def code_of_source(cells: Sequence[str]) -> dict[str, str]:
    """Hash the whole library, file by file, if the cells import it."""
    return _modules() if any("apexlib" in cell for cell in cells) else {}


@cache
def _modules() -> dict[str, str]:
    files = {path: path.relative_to(_LIBRARY.parent).with_suffix("") for path in sorted(_LIBRARY.rglob("*.py"))}
    return {".".join(name.parts): content_hash(normalised(path.read_text("utf-8"))) for path, name in files.items()}
