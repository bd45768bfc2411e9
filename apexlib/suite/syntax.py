"""Code as what decides its numbers: a tree without docstrings, comments, formatting and messages, and what it uses."""

import ast
from collections.abc import Sequence
from typing import Any

Target = tuple[str, ...]  # what an imported name stands for: a module, or a module and a name in it

_IMPORTERS = ("import_module", "__import__")
_LOADED = ("sys", "modules")
_LOGS = ("debug", "info", "warning", "error", "exception", "critical", "log")
_BARS = ("progress", "tqdm", "trange", "set_description")


def normalised(source: str | Sequence[str]) -> str:
    """Write code, a text or the cells of a notebook, without what decides no number.

    >>> normalised("x = f( 1 )  # why") == normalised(["x = f(1)"]) != normalised("x = f(2)")
    True
    """
    return repr(Part(parsed(source).body).tree)


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


class Part(ast.NodeVisitor):
    """Statements, read once: as a `tree` of what decides numbers, with what they use.

    Annotations count where something may ask for them: of variables and fields, and under a decorator.
    """

    def __init__(self, statements: Sequence[ast.AST], package: str = "") -> None:
        self.package = package  # in which relative imports start
        self.chains: set[tuple[str, ...]] = set()  # names, with the attributes asked of them
        self.imports: dict[str, Target] = {}  # by the names that they bind
        self.loads: set[str] = set()  # modules, or names in them, that imports load
        self.asked: set[str | None] = set()  # modules loaded by a value that is their name; None: it is not known
        self.tree = self._field(list(statements))

    def generic_visit(self, node: ast.AST) -> tuple[Any, ...]:
        return (type(node).__name__, *(self._field(value) for _, value in ast.iter_fields(node)))

    def _field(self, value: Any) -> Any:
        if isinstance(value, list):
            return [kept for each in value if (kept := self._field(each)) != ""]
        return self.visit(value) if isinstance(value, ast.AST) else value

    def visit_Expr(self, node: ast.Expr) -> Any:
        return "" if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> str:
        for each in node.names:
            top = each.name.split(".")[0]
            self.loads.add(each.name)
            self.imports[each.asname or top] = (each.name if each.asname else top,)
        return ""  # what it binds counts where it is used

    def visit_ImportFrom(self, node: ast.ImportFrom) -> str:
        around = self.package.rsplit(".", node.level - 1)[:1] if node.level else []
        module = ".".join([*around, *filter(None, [node.module])])
        for each in node.names:
            self.loads.add(f"{module}.{each.name}")
            self.imports[f"* {module}" if each.name == "*" else each.asname or each.name] = (module, each.name)
        return ""

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Any:
        if not node.decorator_list:
            node.returns = None
            for each in ast.walk(node.args):
                each.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Name(self, node: ast.Name | ast.Attribute) -> Any:
        if not (chain := chain_of(node)):
            return self.generic_visit(node)
        self.chains.add(chain)
        self.asked |= {None for name in chain if name in (*_IMPORTERS, "__subclasses__")}
        return ".".join(chain)

    visit_Attribute = visit_Name  # noqa: N815

    def visit_Raise(self, node: ast.Raise) -> Any:
        if isinstance(node.exc, ast.Call):
            _leave_out_text(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        *before, name = chain = chain_of(node.func) or ("",)
        if (name in _LOGS and "log" in "".join(before[-1:]).lower()) or chain == ("warnings", "warn"):
            node.args, node.keywords = [], []
        elif name in _BARS:
            _leave_out_text(node)
        elif node.args and (name in _IMPORTERS or chain == (*_LOADED, "get")):
            self._ask(node.args[0])
            return (name, self._field([*node.args, *node.keywords]))
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
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
