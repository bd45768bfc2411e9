"""Which code of the library a function can reach: its definitions, as hashes of their syntax trees.

Files are parsed, never imported. A definition is a function, a class or an assignment of a module. All names that it
uses are followed: in its module, through imports, and as attributes of modules. The other statements of a module
(`register(…)`, `TABLE[…] = …`) belong to all that imports it, and so does what a decorator or a base class of the
library may enter in a registry. Where a name is only known when the code runs, the whole module or package counts.
The text of a `Part` has no docstrings, comments, formatting, messages and statements that show a bar: they decide no
number.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parents[1]

Target = tuple[str, ...]  # what an imported name stands for: a module, or a module and a name in it
Found = set[tuple[str, str]]  # parts of modules: a module and a definition of it, _REST or _ALL
_REST, _ALL = "", "*"  # the statements of a module that define nothing; all that it has

_IMPORTERS = ("import_module", "__import__")
_LOADED = ("sys", "modules")
_LOGS = ("debug", "info", "warning", "error", "exception", "critical", "log")
_BARS = ("progress", "tqdm", "trange", "set_description")
_SHOWING = [("show_stages",)]  # a statement that calls one of these only tells how far a run is


def code_of(function: Callable[..., Any]) -> dict[str, str]:
    """Hash every definition that a call of `function` can reach, by dotted name; a module's name: its statements.

    The library is `apexlib` and the package, or else the file, in which the function stands.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "").split(".")[0]
    file = getattr(inspect.getmodule(function), "__file__", None)
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
        waiting = [*tree.body]
        while waiting:
            node = waiting.pop(0)
            test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
            if test.rpartition(".")[2] == "TYPE_CHECKING" or test == "__name__ == '__main__'":
                self.imports |= Part(node.body, package).imports
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
            files = {path / "__init__.py": name, Path(f"{path}.py"): name.rpartition(".")[0]}
            file = next(filter(Path.is_file, files), None) if name.split(".")[0] in self.roots else None
            self.modules[name] = file and _read(name, files[file], file, file.stat().st_size, file.stat().st_mtime_ns)
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
        return f"{read.text}{sorted(origins) or ''}", found

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
            target = (f"{name}.{first}",) if self.module(f"{name}.{first}") else ()
        found |= self.find(*target, *rest, seen=(*seen, (name, *path))) if target else set()
        return found if found or target else {(name, _ALL)}

    def enters(self, module: _Module, name: str) -> bool:
        """Whether a decorator or a base class of the library may enter a definition somewhere when it is made."""
        for node in module.statements[name]:
            marks = [getattr(each, "func", each) for each in getattr(node, "decorator_list", ())]
            marks += [each.value for each in getattr(node, "keywords", ())]  # a metaclass
            if any(self.resolve(module, names, {}) for names in Part(marks).chains):
                return True
            for base in Part(getattr(node, "bases", ())).chains:
                for where, what in self.resolve(module, base, {}) - {(module.name, name)}:
                    above = self.module(where)
                    if what == _ALL or "__init_subclass__" in above.parts[what].text or self.enters(above, what):
                        return True
        return False


def normalised(source: str | Sequence[str]) -> str:
    """Write code, a text or the cells of a notebook, without what decides no number.

    >>> normalised("x = f( 1 )  # why") == normalised(["x = f(1)"]) != normalised("x = f(2)")
    True
    """
    return Part(parsed(source).body).text


def parsed(source: str | Sequence[str]) -> ast.Module:
    """Parse code; what is no Python (a notebook's magic) counts as text that may import anything."""
    text = source if isinstance(source, str) else "\n".join(source)
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(f"__import__(_ + {text!r})")


def chain_of(node: ast.AST) -> tuple[str, ...]:
    """Cut `a.b.c` into its names; () for any other expression."""
    if isinstance(node, ast.Attribute):
        return (*before, node.attr) if (before := chain_of(node.value)) else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def defined(node: ast.stmt) -> list[str]:
    """Name what a statement defines, if it does nothing else."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    inner = [each for target in targets for each in ast.walk(target)]
    only_names = not any(isinstance(each, ast.Attribute | ast.Subscript) for each in inner)
    return [each.id for each in inner if isinstance(each, ast.Name)] if only_names else []


class Part(ast.NodeTransformer):
    """Statements, read once: as a `text` of what decides numbers, with what they use."""

    def __init__(self, statements: Sequence[ast.AST], package: str = "") -> None:
        self.package = package  # in which relative imports start
        self.chains: set[tuple[str, ...]] = set()  # names, with the attributes asked of them
        self.imports: dict[str, Target] = {}  # by the names that they bind
        self.loads: set[str] = set()  # modules, or names in them, that imports load
        self.asked: set[str | None] = set()  # modules loaded by a value that is their name; None: it is not known
        kept = [self.visit(each) for each in statements]
        self.text = "\n".join(ast.dump(each) for each in kept if each)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        shows = isinstance(node.value, ast.Call) and chain_of(node.value.func) in _SHOWING
        return None if shows or isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:  # what it binds counts where it is used
        for each in node.names:
            top = each.name.split(".")[0]
            self.loads.add(each.name)
            self.imports[each.asname or top] = (each.name if each.asname else top,)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        around = self.package.rsplit(".", node.level - 1)[:1] if node.level else []
        module = ".".join([*around, *filter(None, [node.module])])
        for each in node.names:
            self.loads.add(f"{module}.{each.name}")
            self.imports[f"* {module}" if each.name == "*" else each.asname or each.name] = (module, each.name)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        if not node.decorator_list:  # else, as of variables and fields, something may ask for annotations
            node.returns = None
            for each in ast.walk(node.args):
                each.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Name(self, node: ast.Name | ast.Attribute) -> ast.AST:
        if not (chain := chain_of(node)):
            return self.generic_visit(node)
        self.chains.add(chain)
        self.asked |= {None for name in chain if name in (*_IMPORTERS, "__subclasses__")}
        return node

    visit_Attribute = visit_Name  # noqa: N815

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            _leave_out_text(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        *before, name = chain = chain_of(node.func) or ("",)
        if (name in _LOGS and "log" in "".join(before[-1:]).lower()) or chain == ("warnings", "warn"):
            node.args, node.keywords = [], []
        elif name in _BARS:
            _leave_out_text(node)
        elif node.args and (name in _IMPORTERS or chain == (*_LOADED, "get")):
            self._ask(node.args[0])
            for each in (*node.args, *node.keywords):
                self.visit(each)
            return node
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if chain_of(node.value) == _LOADED:
            self._ask(node.slice)
        return self.generic_visit(node)

    def _ask(self, name: ast.expr) -> None:
        known = isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith(".")
        self.asked.add(name.value if known else None)


def _is_text(node: ast.expr) -> bool:
    match node:
        case ast.JoinedStr() | ast.Constant(value=str()):
            return True
        case ast.BinOp(left=left, right=right):  # "…" + name, "…" % value
            return _is_text(left) or _is_text(right)
        case ast.Call(func=ast.Attribute(value=text)):  # "…".join(names)
            return _is_text(text)
    return False


def _leave_out_text(call: ast.Call) -> None:
    call.args = [value for value in call.args if not _is_text(value)]
    call.keywords = [keyword for keyword in call.keywords if not _is_text(keyword.value)]
