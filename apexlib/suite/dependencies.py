"""What code depends on: the library's definitions that it can reach, each by the hash of its syntax tree."""

import ast
from collections.abc import Sequence
from pathlib import Path

from apexlib.files import content_hash

LIBRARY = Path(__file__).parents[1]


def normalised(source: str) -> str:
    """Write code as a syntax tree: comments, formatting and docstrings do not count."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a line of IPython's own
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def code_of_source(source: str | Sequence[str], package: Path = LIBRARY) -> dict[str, str]:
    """Hash the files of `package` that code names."""
    if package.name not in "".join(source):
        return {}
    paths = [path for path in sorted(package.rglob("*.py")) if path.stem == "__init__" or path.stem in "".join(source)]
    files = {path: path.relative_to(package.parent).with_suffix("") for path in paths}
    return {".".join(name.parts): content_hash(normalised(path.read_text("utf-8"))) for path, name in files.items()}
