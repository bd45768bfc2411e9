"""Change the method's room one small thing at a time and see whether a test notices: `make test-mutants`.

Every change (a mutant) is tried in a process of its own, on the tests that run the changed line, the quick ones first.
What was found is kept in `.mutants`, so that a run that was stopped goes on; a file all of whose mutants were tried is
entered in `mutants.csv`, and left alone until it changes or is named. A survivor is a test that is missing, or a change
that changes nothing; those of the second kind stand with their reason in `mutants.yaml`. Exit code 1: fewer than 95 %
of the others were noticed.
"""

import argparse
import ast
import contextlib
import csv
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutants"
REASONS = Path(__file__).with_suffix(".yaml")
RECORD = Path(__file__).with_suffix(".csv")  # of each file as it was when all its mutants had been tried
ROOM = sorted(path for path in (ROOT / "apexlib").glob("*.py") if not path.stem.startswith("__"))
NEEDED = 0.95  # share of mutants that a test must notice
TESTS_FOR = 60.0  # seconds of tests that a mutant is tried on at most, as they took without it
LIKELY = 4  # tests that are tried first, since they noticed other mutants of the same function
SLOW_TEST = 15.0  # seconds; slower ones are left out
LOADED_BEFORE = ("torch", "transformers", "hypothesis", "pandas", "scipy.linalg", "peft", "datasets")
PYTEST = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
PYTEST += ["--assert=plain"]  # pytest would rewrite, and load itself, a module whose doctests are asked for
NOT_LOADED = 71  # exit code
HEADS = ("killed", "survived", "equivalent", "not tried")

_COMPARED = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.Is: ast.IsNot}
_OPERATORS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
_OPERATORS |= {ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.And: ast.Or}
_SWAPPED = {**_COMPARED, **_OPERATORS}
_SWAPPED |= {after: before for before, after in _SWAPPED.items() if before not in (ast.FloorDiv, ast.Pow, ast.MatMult)}
_NAMES = {"min": "max", "any": "all", "mean": "sum", "floor": "ceil", "zeros": "ones", "startswith": "endswith"}
_NAMES |= {"argmin": "argmax", "partition": "rpartition", "removeprefix": "removesuffix", "clamp_min": "clamp_max"}
_NAMES |= {after: before for before, after in _NAMES.items()} | {"float64": "float32", "float32": "bfloat16"}
_NAMES |= {"double": "bfloat16", "sorted": "list", "sqrt": "abs", "square": "abs"}
_GUARDS = ("strict", "device")  # keywords that change nothing in a program that is right, or on one device


@dataclass(frozen=True)
class Mutant:
    """One changed file: where, what it was, what it is, and its whole text."""

    file: str
    line: int
    where: str  # the function or class, by its names from the outside
    change: str
    text: str

    @property
    def key(self) -> str:
        return sha256(f"{self.file}\n{self.text}".encode()).hexdigest()[:24]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.where}: {self.change}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Make every mutant of a file, in the order of its lines.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.py"
    >>> _ = path.write_text("def f(x: int = 1) -> int:\\n    return x + len('a')")
    >>> [mutant.change for mutant in mutants(path)]
    ['1 → 2', "return x + len('a') → return None", "x + len('a') → x - len('a')"]
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, where, put in _places(tree, "", lambda _: None):
        for changed in _changes(node):
            line, before, after = node.lineno, ast.unparse(node), ast.unparse(changed)
            put(changed)
            text = ast.unparse(tree)
            put(node)
            words = (" ".join(part.split()) for part in (before, after))
            yield Mutant(path.name, line, where or "module", " → ".join(w[:90] for w in words), text)


def _places(node: ast.AST, where: str, put: Callable) -> Iterator[tuple[ast.AST, str, Callable]]:
    """Walk over what may change: not annotations, decorators, strings, messages or what is there for type checkers."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.keyword) and node.arg in _GUARDS:
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node, where, put
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    inner = f"{where}.{node.name}".strip(".") if isinstance(node, ast.FunctionDef | ast.ClassDef) else where
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_comment", "ctx"):
            continue
        if isinstance(value, list):
            for index, child in enumerate(value):
                if isinstance(child, ast.AST):
                    yield from _places(child, inner, lambda new, v=value, i=index: v.__setitem__(i, new))
        elif isinstance(value, ast.AST):
            yield from _places(value, inner, lambda new, n=node, f=name: setattr(n, f, new))


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Make what a node may turn into."""
    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                if new := _SWAPPED.get(type(op)):
                    yield _with(node, ops=[*ops[:index], new(), *ops[index + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            if new := _SWAPPED.get(type(op)):
                yield _with(node, op=new())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp) and not _negated(test):
                yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[_, *_]):
            yield _with(node, ifs=[])
        case ast.Call(keywords=keywords, func=function):
            for index, keyword in enumerate(keywords):
                if keyword.arg not in (None, *_GUARDS):
                    yield _with(node, keywords=[*keywords[:index], *keywords[index + 1 :]])
            if new := _NAMES.get(getattr(function, "attr", getattr(function, "id", ""))):
                name = "attr" if isinstance(function, ast.Attribute) else "id"
                yield _with(node, func=_with(function, **{name: new}))
        case ast.Attribute(attr="float64" | "float32" as kind):
            yield _with(node, attr=_NAMES[kind])
        case ast.Slice(lower=lower, upper=upper):
            if lower:
                yield _with(node, lower=None)
            if upper:
                yield _with(node, upper=None)
        case ast.Return(value=value) if value is not None and not _is(value, None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue():
            yield ast.Pass()


def _with(node: ast.AST, **changes: object) -> ast.AST:
    return type(node)(**({name: getattr(node, name, None) for name in node._fields} | changes))


def _negated(test: ast.expr) -> bool:
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


class Covering:
    """Which tests run which lines, and how long each takes: a plugin of pytest for one run of the whole suite."""

    def __init__(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, include=[str(path) for path in ROOM], config_file=False)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed += [report.nodeid] * report.failed

    def found(self) -> dict:
        data = self.coverage.get_data()
        lines = {path.name: data.contexts_by_lineno(str(path)) for path in ROOM}
        return {"seconds": self.seconds, "failed": self.failed, "lines": lines, "loaded": _others()}


def _others() -> list[str]:
    """Modules of other packages that are loaded: to load once what every process would load anew."""
    installed = ((name, getattr(module, "__file__", None) or "") for name, module in sys.modules.items())
    return [name for name, file in installed if "site-packages" in file and "__main__" not in name]


def covering(tests: list[str]) -> dict:
    """Run the suite, or these files of it, once, unmutated, or take what an earlier run found on the same files."""
    files = [*ROOM, *sorted((ROOT / "tests").glob("*.py"))]
    state = sha256(repr(tests).encode() + b"".join(path.read_bytes() for path in files)).hexdigest()
    kept = KEPT / "covering.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["state"] == state:
        return found

    def run() -> int:
        plugin = Covering()
        plugin.coverage.start()
        code = pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests], plugins=[plugin])
        plugin.coverage.stop()
        kept.write_text(json.dumps(plugin.found() | {"state": state}))
        return int(code)

    print("running the tests once, to see which runs what", flush=True)
    os.waitpid(_fork(run, quiet=False), 0)
    found = json.loads(kept.read_text())
    if found["failed"]:
        print(f"left out, for they fail without a mutant: {', '.join(found['failed'])}")
    return found


def tests_of(mutant: Mutant, found: dict) -> list[str]:
    """List the tests that run a mutant's line, the quickest first; those of its file where it runs at import."""
    named = set(found["lines"][mutant.file].get(str(mutant.line), ()))
    if named <= {""}:
        named = {test for tests in found["lines"][mutant.file].values() for test in tests}
    named -= {"", *found["failed"]}
    chosen, total = [], 0.0
    for test in sorted(named, key=lambda test: found["seconds"][test]):
        total += found["seconds"][test]
        if total > TESTS_FOR or found["seconds"][test] > SLOW_TEST:
            break
        chosen.append(test)
    return chosen


class _Mutated(SourceFileLoader):
    text = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


class _Finder:
    """Gives one module of the library a mutant's text."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.path = f"apexlib.{mutant.file[:-3]}", ROOT / "apexlib" / mutant.file
        self.loader = _Mutated(self.name, str(self.path))
        self.loader.text = mutant.text

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self.loader) if name == self.name else None


def _fork(work: Callable[[], int], *, quiet: bool = True) -> int:
    """Do `work` in a process of its own, in a session of its own; return its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        os.setsid()
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
        code = work()
    finally:
        os._exit(code)


class _Killer:
    """Writes down the test that noticed: a plugin of pytest."""

    def __init__(self, folder: str) -> None:
        self.file = Path(folder, "killer")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)


def _try(mutant: Mutant, tests: list[str], likely: list[str], folder: str) -> int:
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    rest = [test for test in tests if test not in likely]
    by_file = Counter(test.partition("::")[0] for test in rest)  # collecting all files takes longer than most tests
    most = {file for file, _ in by_file.most_common(1)}
    parts = ([test for test in rest if (test.partition("::")[0] in most) == first] for first in (True, False))
    code = 0
    for part in filter(None, (likely, *parts)):
        code = code or int(pytest.main([*PYTEST, f"--basetemp={folder}/t", *part], plugins=[_Killer(folder)]))
    return code if code or sys.modules[finder.name].__loader__ is finder.loader else NOT_LOADED


def run(todo: list[Mutant], found: dict, results: dict[str, str], workers: int, seconds: float) -> None:
    """Try mutants, some at a time, and keep what was found of each; start none after so many seconds."""
    from tqdm import tqdm

    KEPT.mkdir(exist_ok=True)
    under_way: dict[int, tuple[Mutant, float, str]] = {}
    killers: dict[tuple[str, str], list[str]] = defaultdict(list)  # what noticed others in a function, the newest first
    bar, end, waiting = tqdm(total=len(todo), disable=not sys.stderr.isatty()), time.monotonic() + seconds, iter(todo)
    mutant = next(waiting, None)
    while mutant or under_way:
        while mutant and len(under_way) < workers:
            if time.monotonic() > end:
                mutant = None
                break
            if tests := tests_of(mutant, found):
                folder = tempfile.mkdtemp(prefix="mutant-")
                limit = time.monotonic() + 30 + 6 * sum(found["seconds"][test] for test in tests)
                likely = [test for test in killers[mutant.file, mutant.where] if test in tests][:LIKELY]
                child = _fork(lambda m=mutant, t=tests, k=likely, f=folder: _try(m, t, k, f))
                under_way[child] = (mutant, limit, folder)
            else:
                results[mutant.key] = "no test"
            mutant = next(waiting, None)
        child, status = os.waitpid(-1, os.WNOHANG) if under_way else (0, 0)
        if not child:
            for other, (_, limit, _) in under_way.items():
                if time.monotonic() > limit:
                    os.killpg(other, signal.SIGKILL)
            time.sleep(0.05)
            continue
        done, _, folder = under_way.pop(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it may have started
        if (noted := Path(folder, "killer")).exists():
            before, killer = killers[done.file, done.where], noted.read_text()
            killers[done.file, done.where] = [killer, *(test for test in before if test != killer)]
        shutil.rmtree(folder, ignore_errors=True)
        if os.waitstatus_to_exitcode(status) == NOT_LOADED:
            raise RuntimeError(f"{done}: the tests ran without it")
        results[done.key] = "survived" if status == 0 else "killed"
        (KEPT / "results.json").write_text(json.dumps(results))
        bar.update()
    bar.close()


def report(every: list[Mutant], results: dict[str, str], recorded: dict[str, Counter]) -> dict[str, Counter]:
    """Print a row a file and every survivor without a reason; return the rows, with those that were recorded."""
    reasons = {(each["file"], each["where"], each["change"]) for each in yaml.safe_load(REASONS.read_text()) or ()}
    rows: dict[str, Counter] = defaultdict(Counter, recorded)
    for mutant in every:
        found = results.get(mutant.key, "not tried")
        if found in ("survived", "no test"):
            known = (mutant.file, mutant.where, mutant.change) in reasons
            found = "equivalent" if known else "survived"
            if not known:
                print(mutant)
        rows[mutant.file][found] += 1
    print(f"{'':22}{''.join(f'{head:>12}' for head in HEADS)}{'noticed':>10}")
    for name, row in {**rows, "all": sum(rows.values(), Counter())}.items():
        print(f"{name:22}{''.join(f'{row[head]:12}' for head in HEADS)}{_noticed(row):10.1%}")
    return rows


def _noticed(row: Counter) -> float:
    return row["killed"] / max(1, row["killed"] + row["survived"])


def _state(file: str) -> str:
    return sha256((ROOT / "apexlib" / file).read_bytes()).hexdigest()[:16]


def read_record() -> dict[str, Counter]:
    """The rows of files that are as they were when all their mutants had been tried."""
    if not RECORD.exists():
        return {}
    now = {path.name: _state(path.name) for path in ROOM}
    with RECORD.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == now.get(row["file"])]
    return {row["file"]: Counter({head: int(row[head]) for head in HEADS[:-1]}) for row in rows}


def write_record(rows: dict[str, Counter]) -> None:
    """Enter the files whose mutants have all been tried."""
    done = {name: row for name, row in sorted(rows.items()) if not row["not tried"]}
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "state", *HEADS[:-1]])
        writer.writerows([name, _state(name), *(row[head] for head in HEADS[:-1])] for name, row in done.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="of the method's room, such as expansion.py; by default all new ones")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="of tests to try; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=float("inf"), help="start none after so many minutes")
    parser.add_argument("--again", action="store_true", help="try those once more that survived")
    parser.add_argument("--report", action="store_true", help="try none")
    asked = parser.parse_args()
    recorded = {name: row for name, row in read_record().items() if name not in asked.files}
    wanted = asked.files or [path.name for path in ROOM if path.name not in recorded]
    every = [each for path in ROOM if path.name in wanted for each in mutants(path)]
    kept = KEPT / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if not asked.report:
        KEPT.mkdir(exist_ok=True)
        for name in LOADED_BEFORE:  # once, for all the processes that are forked
            importlib.import_module(name)
        if loaded := [name for name in sys.modules if name.startswith("apexlib")]:
            raise RuntimeError(f"{loaded[0]} is loaded already; mutants of it would not be seen")
        os.chdir(ROOT)
        todo = [m for m in every if (m.key not in results) or (asked.again and results[m.key] != "killed")]
        found = covering(asked.tests) if todo else {"loaded": []}
        for name in found["loaded"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        run(todo, found, results, asked.workers, 60 * asked.budget)
    rows = report(every, results, recorded)
    if not (asked.report or asked.tests):
        write_record(rows)
    return 0 if _noticed(sum(rows.values(), Counter())) >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
