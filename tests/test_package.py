"""What a user gets who installs the library: names at once, a wheel with all rooms, nothing of the notebooks' needs."""

import ast
import inspect
import operator
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from conftest import build
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement

import apexlib
from apexlib import ApexConfig, plot, train_tokenizer

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_public_names_are_there_without_torch():
    code = "import sys, apexlib; print(dir(apexlib) == apexlib.__all__, 'torch' in sys.modules)"
    assert run(sys.executable, "-c", code) == "True False\n"


def test_every_public_name_is_where_the_package_says():
    assert len(apexlib.__all__) > 40
    for name in apexlib.__all__:
        assert getattr(apexlib, name).__name__.removeprefix("apexlib.") == name
    with pytest.raises(AttributeError, match="no attribute 'expnad'"):
        _ = apexlib.expnad


def test_help_lists_every_public_name_once_under_its_use():
    groups = re.findall(r"^([A-Z]\w+): .+:\n((?: {4}.+\n?)+)", apexlib.__doc__, flags=re.MULTILINE)
    assert {"Look", "Expand", "Train", "Measure", "Data", "Share", "Plot"} <= {name for name, _ in groups}
    assert sorted(re.findall(r"\w+", " ".join(names for _, names in groups))) == apexlib.__all__


@pytest.mark.parametrize("name", [*apexlib.__all__, *(f"plot.{name}" for name in plot.__all__)])
def test_a_public_name_says_what_it_is_in_one_line(name):
    first = inspect.getdoc(operator.attrgetter(name)(apexlib)).splitlines()[0]
    assert re.fullmatch(r"[A-Z].{19,119}[.:]", first), first


def test_every_setting_is_explained():
    told = re.findall(r"^- `(\w+)`: \S", inspect.getdoc(ApexConfig), flags=re.MULTILINE)
    assert sorted(told) == sorted(field.name for field in fields(ApexConfig))


def test_tab_offers_what_is_public():
    shell = InteractiveShell()
    shell.run_cell("import apexlib")
    for text, names in (("apexlib.", apexlib.__all__), ("apexlib.plot.", plot.__all__)):
        with provisionalcompleter():
            assert {each.text for each in shell.Completer.completions(text, len(text))} == set(names)


def test_an_editor_sees_public_names_and_modules_only():
    jedi = pytest.importorskip("jedi")
    offered = {each.name for each in jedi.Script("from apexlib import ", path=ROOT / "x.py").complete()}
    modules = {path.stem for path in (ROOT / "apexlib").iterdir()}
    assert set(apexlib.__all__) <= offered
    assert not {name for name in offered - set(apexlib.__all__) - modules if not name.startswith("_")}


def test_nothing_needs_a_module_that_windows_lacks():
    unix = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
    for path in (ROOT / "apexlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not unix & {name.split(".")[0] for name in names}, path


def needed(names):
    """The installed distributions that these need, at any depth, extras aside."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found[name] = metadata.distribution(name)
            requirements = (Requirement(text) for text in found[name].requires or ())
            waiting += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A Python with the built wheel and what it needs, and nothing of the notebooks' needs."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("apexlib", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, folder)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "clean")
    (packages,) = (folder / "clean").glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", packages, wheel)
    (own,) = metadata.distributions(path=[str(packages)])
    core = [r.name for r in map(Requirement, own.requires) if not r.marker or r.marker.evaluate({"extra": ""})]
    for distribution in needed(core):
        for part in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / part).exists():
                (packages / part).symlink_to(distribution.locate_file(part))
    return folder / "clean" / "bin" / "python"


def test_the_wheel_has_every_room(clean_python):
    code = "import importlib.metadata as m; print(*(f for f in m.files('apexlib') if f.parts[0] == 'apexlib'))"
    files = [path for path in (ROOT / "apexlib").rglob("*.*") if path.suffix != ".pyc" and path.is_file()]
    packed = {name for name in run(clean_python, "-I", "-c", code).split() if not name.endswith(".pyc")}
    assert {path.relative_to(ROOT).as_posix() for path in files} == packed


@pytest.mark.parametrize("module", ["papermill", "matplotlib", "peft", "datasets", "yaml_never"])
def test_the_clean_environment_is_clean(clean_python, module):
    done = subprocess.run([clean_python, "-I", "-c", f"import {module}"], capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


def test_help_works_without_what_plots_need(clean_python):
    said = run(clean_python, "-I", "-c", "import apexlib; help(apexlib)")
    assert "\n    masking_curve(model: " in said
    assert "\n    draw_figure(" not in said


@pytest.mark.case("a plain `pip install`, without the notebooks' packages: looking, expanding, training", "works")
def test_the_readmes_example_runs_on_a_plain_install(clean_python, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = next(code for code in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "masking_curve" in code)
    documents = [f"{n} and {n + 1} make {2 * n + 1}, says the book of numbers." for n in range(400)]
    tokenizer = train_tokenizer(documents, 300)
    tokenizer.save_pretrained(tmp_path / "model")
    build("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    lines = "".join(f'{{"text": "{document}"}}\n' for document in documents)
    (tmp_path / "my.jsonl").write_text(lines, encoding="utf-8")
    assert 'name = "…"' in example
    assert "length=512" in example
    code = example.replace('name = "…"', 'name = "model"').replace("length=512", "length=64")
    out = run(clean_python, "-I", "-c", code + "\nprint(len(statistics))", cwd=tmp_path)
    assert out.endswith(f"{2 * (2 + 24)}\n")
