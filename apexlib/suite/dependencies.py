"""Which code of the library a function can reach: its definitions, as hashes of their syntax trees.

Files are parsed, never imported. A definition is a function, a class or an assignment of a module. All names that it
uses are followed: in its module, through imports, and as attributes of modules. The other statements of a module
(`register(…)`, `TABLE[…] = …`) belong to all that imports it, and so does what a decorator or a base class of the
library may enter in a registry. Where a name is only known when the code runs, the whole module or package counts.
"""

import ast
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from apexlib.suite.syntax import Part, Target, chain_of, defined, parsed

LIBRARY = Path(__file__).parents[1]

Found = set[tuple[str, str]]  # parts of modules: a module and a definition of it, _REST or _ALL
_REST, _ALL = "", "*"  # the statements of a module that define nothing; all that it has


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """Hash every definition that a call of `function` can reach, by dotted name; a module's name: its statements.

    The library is `apexlib` and the package, or else the file, in which the function stands.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "").split(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if not name or file is None:
        raise ValueError(f"{function!r}: need a function of a module that has a source file")
    path = Path(file).parent if Path(file).name == "__init__.py" else Path(file).with_suffix("")
    top, *inner = module.split(".")
    library = _Library({LIBRARY.name: LIBRARY, top: [path, *path.parents][len(inner)]})
    return library.reach([(module, name if name in library.module(module).statements else _ALL)])


def code_of_source(source: str | Sequence[str], package: Path = LIBRARY) -> dict[str, str]:
    """Hash every definition of `package`, a folder, that code can reach: a text, or the cells of a notebook."""
    library, code = _Library({package.name: package}), _Module("", "", parsed(source))
    library.modules[""] = code
    reached = library.reach(("", part) for part in code.statements)
    return {name: digest for name, digest in reached.items() if name.split(".")[0] == package.name}


class _Module:
    """A parsed file: its definitions and the rest of its statements, and what its imports stand for."""

    def __init__(self, name: str, package: str, tree: ast.Module) -> None:
        self.name, self.package = name, package
        self.statements: dict[str, list[ast.stmt]] = {_REST: []}
        self.imports: dict[str, Target] = {}
        # where a package may take names from when they are asked for: the entries of its tables of text
        nodes = ast.walk(tree) if name == package else ()
        pairs = chain(*(zip(node.keys, node.values, strict=True) for node in nodes if isinstance(node, ast.Dict)))
        texts = [pair for pair in pairs if all(isinstance(each, ast.Constant) for each in pair)]
        self.homes = {key.value: f"{name}.{value.value}" for key, value in texts}
        waiting = [*tree.body]
        while waiting:
            node = waiting.pop(0)
            test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
            if test.rpartition(".")[2] == "TYPE_CHECKING":
                self.imports |= Part(node.body, package).imports
                waiting[:0] = node.orelse
            elif test == "__name__ == '__main__'":
                waiting[:0] = node.orelse
            else:
                for part in defined(node) or [_REST]:
                    self.statements.setdefault(part, []).append(node)
        self.parts = {part: Part(nodes, package) for part, nodes in self.statements.items()}
        for part in self.parts if name == package else [_REST]:  # a package may hand on what a function imports
            self.imports = self.parts[part].imports | self.imports


@cache
def _read(name: str, package: str, path: Path, size: int, changed: int) -> _Module:
    return _Module(name, package, parsed(path.read_text(encoding="utf-8")))


class _Library:
    """The packages that are followed, by name, each with its folder, or its file without the suffix."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = roots
        self.modules: dict[str, _Module | None] = {}

    def reach(self, parts: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Hash parts of modules and all that they reach."""
        todo, seen, hashes = list(parts), set(), dict[str, str]()
        while todo:
            if (part := todo.pop()) not in seen:
                seen.add(part)
                text, found = ("", self.everything(part[0])) if part[1] == _ALL else self.follow(*part)
                todo += found
                if text:
                    hashes[".".join(filter(None, part))] = hashlib.sha256(text.encode()).hexdigest()
        return dict(sorted(hashes.items()))

    def module(self, name: str) -> _Module | None:
        """Parse a module of the library; None for any other name."""
        if name not in self.modules:
            path = self.path(name)
            files = ((path / "__init__.py", name), (Path(f"{path}.py"), name.rpartition(".")[0]))
            found = [(*way, way[0].stat()) for way in files if name.split(".")[0] in self.roots and way[0].is_file()]
            read = [_read(name, package, file, about.st_size, about.st_mtime_ns) for file, package, about in found[:1]]
            self.modules[name] = read[0] if read else None
        return self.modules[name]

    def path(self, name: str) -> Path:
        """Where a module is, without a suffix."""
        root, *rest = name.split(".")
        return self.roots.get(root, Path()).joinpath(*rest)

    def follow(self, name: str, part: str) -> tuple[str, Found]:
        """Return the text that decides the hash of a part of a module, and the parts that it leads to at once."""
        module, found, origins = self.module(name), self.loaded(name), set()
        read = module.parts[part]
        for names in read.chains:
            found |= (parts := self.resolve(module, names, read.imports))
            if target := read.imports.get(names[0]) or module.imports.get(names[0]):
                origins.add(f"{names} {sorted(parts) or target}")
        stars = [target for bound, (target, *_) in read.imports.items() if bound.startswith("*")]
        asked = self.roots if None in read.asked else read.asked
        found = found.union(*map(self.loaded, read.loads), *map(self.find, [*stars, *asked]))
        if part == _REST:
            found |= {(name, each) for each in module.statements if self.enters(module, each)}
        return f"{read.tree or ''}{sorted(origins) or ''}", found

    def everything(self, name: str) -> Found:
        """Lead to all parts of a module, to what it imports, and to the modules of a package."""
        module = self.module(name)
        files = self.path(name).iterdir() if name == module.package else ()
        inner = [f"{name}.{path.stem}" for path in files if path.stem != "__init__"]
        found = {(name, part) for part in module.statements} | {(each, _ALL) for each in inner if self.module(each)}
        return found.union(*(self.find(*target) for target in module.imports.values()))

    def loaded(self, name: str) -> Found:
        """What runs when a module is imported: its statements, and those of the packages around it."""
        parts = name.split(".")
        names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return {(each, _REST) for each in names if self.module(each)}

    def resolve(self, module: _Module, chain: Sequence[str], own: Mapping[str, Target]) -> Found:
        """Find what a dotted name means in a part of a module that has imports of its `own`."""
        name, *path = chain
        found = {(module.name, name)} if name in module.statements else set()
        if name in ("globals", "eval", "exec"):
            found.add((module.name, _ALL))
        target = own.get(name) or module.imports.get(name)
        return found | self.find(*target, *path) if target else found

    def find(self, name: str, *path: str, seen: tuple[Target, ...] = ()) -> Found:
        """Find what `path` means in the module `name`; where that cannot be told, it is the whole module."""
        module = self.module(name)
        if module is None or (name, *path) in seen:
            return set()
        if not path:
            return {(name, _ALL)}
        first, *rest = path
        found = {(name, first)} if first in module.statements else set()
        target = module.imports.get(first, ())
        if not found and not target:
            ways = ((f"{name}.{first}",), (module.homes.get(first, name), first))
            target = next((way for way in ways if way[0] != name and self.module(way[0])), ())
        found |= self.find(*target, *rest, seen=(*seen, (name, *path))) if target else set()
        return found if found or target else {(name, _ALL)}

    def enters(self, module: _Module, name: str) -> bool:
        """Whether a decorator or a base class of the library may enter a definition somewhere when it is made."""
        for node in module.statements[name]:
            marks = [getattr(each, "func", each) for each in getattr(node, "decorator_list", ())]
            marks += [each.value for each in getattr(node, "keywords", ())]  # a metaclass
            if any(self.resolve(module, names, {}) for names in Part(marks).chains):
                return True
            for base in map(chain_of, getattr(node, "bases", ())):
                for where, what in self.resolve(module, base, {}) - {(module.name, name)} if base else ():
                    above = self.module(where)
                    if "__init_subclass__" in repr(above.parts[what].tree) or self.enters(above, what):
                        return True
        return False
