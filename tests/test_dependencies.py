"""What a result depends on: each change of code either leaves the key as it is, or makes another."""

import json
import subprocess
import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest

from apexlib.files import content_hash
from apexlib.suite.dependencies import code_of, code_of_source, normalised

PACKAGE = {
    "__init__.py": '''
"""A package that hands names on when they are asked for."""
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib.handed import handed_on as handed_on, typed as typed

def __getattr__(name):
    return getattr(import_module("lib.handed"), name)
''',
    "tables/__init__.py": """
from importlib import import_module

_HOME = {"handed_on": "handed"}

def __getattr__(name):
    return getattr(import_module(f"lib.{_HOME[name]}"), name)
""",
    "tabled.py": """
from lib.tables import handed_on

def run():
    return handed_on(1)
""",
    "runs.py": '''
"""Runs and what stands beside them."""
import logging
import warnings
from math import sqrt

import lib.spelled
from lib import handed_on, modules, typed
from lib import modules as other_name
from lib.kinds import Child, Settings
from lib.marked import MARKED
from lib.plots import draw
from lib.registry import CHOICES
from lib.statements import TABLE

SCALE = 2.0
UNUSED = 1.0
_log = logging.getLogger(__name__)


def run(folder, size: int = 3, *, choice="first"):
    """Compute a number."""
    # this is a comment
    if size < 0:
        raise ValueError(f"size {size}: " + "need a positive one")
    _log.warning("size %s is used", size)
    warnings.warn("a warning")
    for step in progress(range(size), "working"):
        size = size + helper(step)
    show_stages(size, 2)
    from lib.lazy import late

    size = sum(call(size) for call in (handed_on, typed, modules.called, other_name.renamed, late, MARKED["double"]))
    size += lib.spelled.out(size) + CHOICES[choice](size) + TABLE["entry"]
    return {"size": SCALE * Child(Settings()).value(size) + sqrt(size)}


def helper(x, factor=2):
    return x * factor


@wrap
def progress(items, text):
    return items


def show_stages(size, stages):
    draw(size, "green")


def plot(table):
    return draw(table, "red")


def unreached(x):
    return x - UNUSED
''',
    "kinds.py": '''
from dataclasses import dataclass

def rate():
    return 0.5

class Base:
    def inherited(self):
        return 1

class Child(Base):
    factory = staticmethod(rate)
    def __init__(self, settings):
        self.settings = settings
    def value(self, x):
        """Describe."""
        return x * self.factory() + self.inherited()
    def other(self):
        return 0

@dataclass
class Settings:
    steps: int = 10
    seed: int = 0
''',
    "registry.py": """
from lib.handed import chosen
CHOICES = {"first": chosen}
OTHERS = {"first": 1}
""",
    "marked.py": """
MARKED = {}

def mark(function):
    MARKED[function.__name__] = function
    return function

@mark
def double(x):
    return deeper(x)

def deeper(x):
    return 2 * x

def unmarked(x):
    return 3 * x
""",
    "statements.py": """
from lib.handed import entered
TABLE = {}
TABLE["entry"] = entered(1)

if __name__ == "__main__":
    print("as a program")
""",
    "handed.py": """
def handed_on(x):
    return x + 10

def typed(x):
    return x + 20

def chosen(x):
    return x + 30

def entered(x):
    return x + 40

def never(x):
    return x + 50
""",
    "modules.py": """
def called(x):
    return x + 60

def renamed(x):
    return x + 70

def ignored(x):
    return x + 80
""",
    "lazy.py": """
def late(x):
    return x + 90

def later(x):
    return x + 91
""",
    "spelled.py": """
def out(x):
    return x + 92
""",
    "plots.py": """
def draw(table, colour):
    return colour
""",
    "dynamic.py": """
import sys
from importlib import import_module
from lib import modules
from lib.handed import *
from lib.lazy import *

def by_attribute(name):
    return getattr(modules, name)(1)

def by_constant():
    return import_module("lib.modules")

def by_name(name):
    return import_module(name)

def by_table(name):
    return globals()[name](1)

def by_loaded():
    return sys.modules["lib.modules"].ignored(1)

def by_asking():
    return sys.modules.get("lib.modules")

def aside(x):
    return x + 93
""",
    "subclasses.py": """
class Kind:
    known = []
    def __init_subclass__(cls):
        Kind.known.append(cls)

class Special(Kind):
    number = 94

class Meta(type):
    def __new__(cls, *parts):
        made = super().__new__(cls, *parts)
        Kind.known.append(made)
        return made

class Made(metaclass=Meta):
    number = 95

def count():
    return [kind.number for kind in Kind.known]
""",
    "based.py": """
import lib.tables

class Based(lib.tables.Base):
    number = 97

def run():
    return 1
""",
    "relative.py": """
import typing
from . import modules
from .lazy import late

if typing.TYPE_CHECKING:
    OTHERWISE = 0
else:
    OTHERWISE = 1

try:
    TRIED = 1
except ImportError:
    TRIED = 0

def hand(function):
    return function

handed = hand(print)

def run():
    return modules.ignored(late(OTHERWISE)) + TRIED + handed()
""",
    "swapped.py": """
from math import floor as one, ceil as two
from lib.handed import chosen as three, entered as four

def both(x):
    return one(x) - two(x) - three(x) + 2 * four(x)
""",
}

SAME = {
    "a comment": ("runs.py", "# this is a comment", "# another"),
    "a docstring": ("runs.py", "Compute a number.", "Work out a number."),
    "the docstring of a module": ("runs.py", "Runs and what", "All runs and what"),
    "the docstring of a method": ("kinds.py", "Describe.", "Tell."),
    "formatting": ("runs.py", "return x * factor", "return (\n        x\n        *   factor )"),
    "an error's message": ("runs.py", 'f"size {size}: " + "need a positive one"', '"a size must be positive"'),
    "a log's text": ("runs.py", '"size %s is used", size', '"%s of %s", size, choice'),
    "a warning's text": ("runs.py", "a warning", "take care"),
    "the text over a bar": ("runs.py", '"working"', '"at work"'),
    "what is shown over a bar": ("runs.py", "show_stages(size, 2)", "show_stages(3)"),
    "a bar that is not shown": ("runs.py", "    show_stages(size, 2)\n", ""),
    "how a bar is shown": ("runs.py", 'draw(size, "green")', 'draw(stages, "green")'),
    "an annotation of an argument": ("runs.py", "size: int = 3", "size: float = 3"),
    "a function not reached": ("runs.py", "return x - UNUSED", "return x - 5 * UNUSED"),
    "a constant not reached": ("runs.py", "UNUSED = 1.0", "UNUSED = 2.0"),
    "a plot": ("plots.py", "return colour", "return colour, table"),
    "a plot in the same module": ("runs.py", '"red"', '"blue"'),
    "another function of an imported module": ("modules.py", "x + 80", "x + 81"),
    "another function of a lazily imported module": ("lazy.py", "x + 91", "x - 91"),
    "another registry": ("registry.py", '{"first": 1}', '{"first": 2}'),
    "a function beside decorated ones": ("marked.py", "3 * x", "4 * x"),
    "what runs as a program": ("statements.py", "as a program", "as the main one"),
    "a function that a star brings elsewhere": ("handed.py", "x + 50", "x + 51"),
    "an import that is not used": ("runs.py", "import warnings", "import json\nimport warnings"),
    "the order of imports": ("runs.py", "import logging\nimport warnings", "import warnings\nimport logging"),
}

OTHER = {
    "a constant": ("runs.py", "SCALE = 2.0", "SCALE = 3.0"),
    "an int that is a float now": ("runs.py", "SCALE = 2.0", "SCALE = 2"),
    "a default": ("runs.py", "size: int = 3", "size: int = 4"),
    "a default of a function reached": ("runs.py", "factor=2", "factor=3"),
    "an operator": ("runs.py", "x * factor", "x + factor"),
    "a condition": ("runs.py", "if size < 0", "if size <= 0"),
    "the kind of an error": ("runs.py", "raise ValueError", "raise KeyError"),
    "a decorator": ("runs.py", "@wrap\n", ""),
    "which function of another package a name stands for": (
        "runs.py",
        "from math import sqrt",
        "from cmath import sqrt",
    ),
    "an entry of a registry": ("registry.py", '{"first": chosen}', '{"second": chosen}'),
    "the function of a registry's entry": ("handed.py", "x + 30", "x + 31"),
    "the function of a class attribute": ("kinds.py", "return 0.5", "return 0.6"),
    "a method of a class": ("kinds.py", "x * self.factory()", "x - self.factory()"),
    "another method of a class": ("kinds.py", "return 0\n", "return 9\n"),
    "a base class": ("kinds.py", "return 1\n", "return 2\n"),
    "the default of a field": ("kinds.py", "steps: int = 10", "steps: int = 11"),
    "the type of a field": ("kinds.py", "steps: int = 10", "steps: float = 10"),
    "the order of fields": ("kinds.py", "steps: int = 10\n    seed: int = 0", "seed: int = 0\n    steps: int = 10"),
    "a lazily imported function": ("lazy.py", "x + 90", "x - 90"),
    "a function called through its module": ("modules.py", "x + 60", "x - 60"),
    "a function called through a renamed module": ("modules.py", "x + 70", "x - 70"),
    "a function called by its whole name": ("spelled.py", "x + 92", "x - 92"),
    "a function that the package hands on by an import": ("handed.py", "x + 20", "x - 20"),
    "another function that the package hands on by an import": ("handed.py", "x + 10", "x - 10"),
    "where the package finds a name": ("__init__.py", "from lib.handed import", "from lib.lazy import"),
    "a function entered by a decorator": ("marked.py", "return deeper(x)", "return deeper(x) + 1"),
    "what a decorated function calls": ("marked.py", "2 * x", "5 * x"),
    "a decorator that enters": ("marked.py", "MARKED[function.__name__]", "MARKED[function.__qualname__]"),
    "a statement of a module": ("statements.py", "entered(1)", "entered(2)"),
    "the function called by a statement": ("handed.py", "x + 40", "x - 40"),
    "a statement of an imported module that nothing names": ("plots.py", "def draw", "print(1)\ndef draw"),
}

ELSEWHERE = {
    "an attribute by a name": ("dynamic.by_attribute", "modules.py", "x + 80", "x + 81"),
    "a module by a constant": ("dynamic.by_constant", "modules.py", "x + 80", "x + 81"),
    "a module by a name": ("dynamic.by_name", "kinds.py", "return 0.5", "return 0.6"),
    "globals": ("dynamic.by_table", "dynamic.py", "x + 93", "x - 93"),
    "a loaded module": ("dynamic.by_loaded", "modules.py", "x + 80", "x + 81"),
    "a loaded module that may be there": ("dynamic.by_asking", "modules.py", "x + 80", "x + 81"),
    "a star": ("dynamic.aside", "handed.py", "x + 50", "x - 50"),
    "another star": ("dynamic.aside", "lazy.py", "x + 91", "x - 91"),
    "a module that an import brings by its place": ("relative.run", "modules.py", "x + 80", "x - 80"),
    "a function that an import brings by its place": ("relative.run", "lazy.py", "x + 90", "x - 90"),
    "what stands there for a program that runs": ("relative.run", "relative.py", "OTHERWISE = 1", "OTHERWISE = 2"),
    "what is tried": ("relative.run", "relative.py", "TRIED = 1", "TRIED = 2"),
    "what a function is handed to": ("relative.run", "relative.py", "hand(print)", "hand(repr)"),
    "a class that its metaclass enters in a list": ("subclasses.count", "subclasses.py", "number = 95", "number = 96"),
    "a subclass that its base enters in a list": ("subclasses.count", "subclasses.py", "number = 94", "number = 95"),
    "a function that a package hands on by a table": ("tabled.run", "handed.py", "x + 10", "x - 10"),
    "where a package finds a name": ("tabled.run", "tables/__init__.py", '": "handed"', '": "lazy"'),
    "a class whose base is known when it runs": ("based.run", "based.py", "number = 97", "number = 98"),
    "names of another package that change places": (
        "swapped.both",
        "swapped.py",
        "floor as one, ceil as two",
        "floor as two, ceil as one",
    ),
    "names of the library that change places": (
        "swapped.both",
        "swapped.py",
        "chosen as three, entered as four",
        "chosen as four, entered as three",
    ),
}


def keys(folder, call="runs.run", change=None):
    """Write the package, with one text in it replaced, and return what a notebook that makes a call depends on."""
    root = folder / "lib"
    (root / "tables").mkdir(parents=True)
    for name, text in PACKAGE.items():
        (root / name).write_text(text)
    if change:
        name, old, new = change
        assert (count := PACKAGE[name].count(old)) == 1, f"{name}: {old!r} is there {count} times"
        (root / name).write_text(PACKAGE[name].replace(old, new))
    module, function = call.split(".")
    return code_of_source(["import os", f"from lib.{module} import {function}", f"{function}()"], root)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """What a call depends on in the package as it stands."""
    return cache(lambda call="runs.run": keys(tmp_path_factory.mktemp("before"), call))


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_decides_no_number_leaves_the_key(change, before, tmp_path):
    assert before() == keys(tmp_path, change=change)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_decides_a_number_changes_the_key(change, before, tmp_path):
    assert before() != keys(tmp_path, change=change)


@pytest.mark.parametrize(("call", "file", "old", "new"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_other_calls_depend_on(call, file, old, new, before, tmp_path):
    assert before(call) != keys(tmp_path, call, (file, old, new))


def test_a_notebook_depends_on_what_it_uses_of_what_it_imports(tmp_path):
    keys(tmp_path)
    cells = ["from lib import handed, modules", "from lib.lazy import late", "print(handed.never(1))"]
    assert [*code_of_source(cells, tmp_path / "lib")] == ["lib.handed.never"]
    whole = code_of_source([*cells, "use(modules)"], tmp_path / "lib")
    assert {"lib.modules.called", "lib.modules.renamed", "lib.modules.ignored"} < {*whole}
    magic = code_of_source(["%load_ext something"], tmp_path / "lib")
    assert {"lib.runs.plot", "lib.kinds.Base", "lib.statements"} < {*magic}


def test_code_is_the_same_without_what_decides_no_number():
    code = 'def f(x):\n    """Say."""\n    raise ValueError("no")  # why'
    assert normalised(code) == normalised(["def f(x: int):", "", "    raise ValueError(f'no, {x}')"])
    assert normalised(code) != normalised(code.replace("Value", "Key"))
    assert normalised("x = 'a'") != normalised("x = 'b'")
    assert normalised("%magic one") != normalised("%magic two")


def computed(x):
    """Compute something by the library."""
    return content_hash(x, helped(x))


def helped(x):
    return x


def outside(x):
    return helped(x)


def test_a_function_of_any_module_is_followed_in_its_file_and_in_the_library():
    found = {name.removeprefix(f"{__name__}.") for name in code_of(computed)}
    assert found == {"computed", "helped", "apexlib.files.content_hash"}
    assert {*code_of(outside)} == {f"{__name__}.outside", f"{__name__}.helped"}


def test_a_function_that_stands_in_no_file_is_refused():
    namespace = {"__name__": "nowhere"}
    exec("def made(): pass", namespace)
    with pytest.raises(ValueError, match="need a function of a module that has a source file"):
        code_of(namespace["made"])
    with pytest.raises(ValueError, match="need a function"):
        code_of(partial(computed, 1))


def test_a_file_is_read_again_once_it_has_changed(tmp_path, monkeypatch):
    file = tmp_path / "changing_module.py"
    file.write_text("def run():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = import_module("changing_module").run
    before = code_of(run)
    assert code_of(run) == before
    file.write_text("def run():\n    return 100\n")
    assert code_of(run) != before


def test_a_run_of_the_library_depends_on_what_computes_it_and_on_nothing_else():
    from apexlib.suite.runs import instruction_run

    found = code_of(instruction_run)
    modules = {name.rpartition(".")[0] for name in found}
    for name in ("suite.runs.instruction_run", "training.stages.train_in_stages", "operators.MonarchOperator"):
        assert f"apexlib.{name}" in found
    assert {"apexlib.expansion", "apexlib.selection", "apexlib.activations", "apexlib.text.skills"} <= modules
    assert "apexlib.text.skills._calendar" in found  # an entry of a table
    assert "apexlib.suite.variants.Variant" in found
    assert (
        "apexlib.suite.variants.VARIANTS" not in found
    )  # a run is given its own: one more leaves the others' as they are
    found = set(found) - {"apexlib.suite.trials.DEADLINE", "apexlib.suite.trials.time_left"}  # when to stop, not what
    others = (*(f"suite.{name}" for name in ("figures", "overview", "runner", "ledger", "trials")), "training.bar")
    for room in (*others, "analysis.difference", "analysis.function_spectrum"):
        assert not [name for name in found if name.startswith(f"apexlib.{room}")]


@pytest.mark.parametrize("notebook", ["03_instruction_tuning", "04_continued_pretraining", "06_ablations"])
def test_a_notebook_that_keeps_its_runs_depends_on_nothing_that_only_keys_or_shows_them(notebook):
    cells = json.loads((Path(__file__).parents[1] / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    found = code_of_source(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    for name in ("suite.runner", "suite.overview", "suite.cli", "analysis.family_check", "analysis.function_spectrum"):
        assert not [each for each in found if each.startswith(f"apexlib.{name}")]


def test_it_takes_no_torch_and_little_time():
    code = (
        "import sys, time; from apexlib.suite.dependencies import *\n"
        "start = time.process_time()\n"
        "found = code_of_source('from apexlib.suite.runs import instruction_run; instruction_run()')\n"
        "print(len(found), time.process_time() - start, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    count, seconds, torch = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) > 100
    assert float(seconds) < 2
    assert torch == "False"
