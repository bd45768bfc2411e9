"""The frame: lock, environment and borders between modules agree with what the project says of itself."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from readme import rendered

from apexlib.suite.figures import FIGURES
from apexlib.suite.ledger import read_claims
from apexlib.suite.notebooks import read_notebook, read_profile

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# rooms, from the top to the bottom: a room imports from itself and from those below it
ROOMS = ("suite", "explore", "analysis", "training", "text", "")
# the one exception: what a run will cost is asked of the registry of methods
NOT_OF = {"analysis": {"training"}}
EXCEPTIONS = {("analysis/budget.py", "training.methods")}
# in the method's room, who may import whom
ARROWS = {
    "files": set(),
    "progress": set(),
    "provenance": {"files"},
    "architectures": set(),
    "activations": {"architectures", "progress"},
    "operators": set(),
    "selection": {"files"},
    "fused_ffn": set(),
    "expansion": {"architectures", "fused_ffn", "operators", "selection"},
    "certificate": {"expansion", "files", "provenance"},
    "evaluation": {"progress"},
}
SOURCES = sorted((ROOT / "apexlib").rglob("*.py"))
LIMIT = 400


def room_of(module):
    """The room of a module by its name below apexlib: "suite" of "suite.ledger", "" of "expansion"."""
    return module.split(".")[0] if "." in module or module in ROOMS else ""


def imports(path):
    """Names of the modules of apexlib that a file imports, at any depth, without the leading "apexlib."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "apexlib":
            inner = node.module.removeprefix("apexlib").lstrip(".")
            names = {alias.name for alias in node.names}
            found |= {inner} if inner and inner not in ROOMS else {f"{inner}.{name}".lstrip(".") for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("apexlib.") for alias in node.names if alias.name.startswith("apexlib.")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT / "apexlib").as_posix())
def test_arrows_between_rooms_go_down_only(path):
    name = path.relative_to(ROOT / "apexlib").as_posix()
    own = name.split("/")[0] if "/" in name else ""
    if name in ("__init__.py", "__main__.py"):  # the names of the library, and its command line
        return
    for module in imports(path) - {inner for where, inner in EXCEPTIONS if where == name}:
        room = room_of(module)
        assert ROOMS.index(room) >= ROOMS.index(own), module
        assert room not in NOT_OF.get(own, ()), module


@pytest.mark.parametrize("path", sorted((ROOT / "apexlib").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_the_modules_of_the_method_import_only_what_the_design_allows(path):
    assert imports(path) <= ARROWS[path.stem]


def test_importing_the_library_stays_light():
    heavy = {"datasets", "peft", "papermill", "matplotlib", "seaborn", "accelerate", "pyarrow", "yaml", "IPython"}
    for path in SOURCES:
        if path.parent.name == "suite":
            continue
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        found = {alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in top_level if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in found} & heavy, path


def test_figures_ledger_and_runner_need_no_torch():
    modules = "apexlib.suite.overview, apexlib.suite.figures, apexlib.suite.ledger, apexlib.suite.runner"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def pins():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split(" ;")[0].strip().split("==") for line in lines if line)


def test_the_lock_pins_every_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[requirement.name]), text


def test_what_is_installed_is_what_the_lock_says():
    for name in ("torch", "transformers", "tokenizers", "datasets", "pandas", "papermill", "matplotlib"):
        assert metadata.version(name).split("+")[0] == pins()[name], name


def test_conda_installs_from_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-c requirements-cuda.lock", "-e ."]
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{wanted}").specifier.contains(python.split("=")[1])
    assert not any(line.startswith(("nvidia-", "cuda-", "triton")) for line in pins())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean_and_thin(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    opening = notebook.cells[0].source
    assert all(word in opening for word in ("**Question.**", "**Needs**", "**Writes**", "**Costs**"))
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 10, node.name
    declared = read_notebook(path, "cpu").writes
    missing = [name for name in declared if not name.endswith("/") and Path(name).stem not in opening]
    assert not missing, "the opening does not mention what the notebook writes"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_notebooks_import_exists(path):
    for cell in nbformat.read(path, 4).cells:
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "apexlib":
                module = import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def test_the_cpu_profile_is_the_notebooks_own_values():
    profile = read_profile("cpu", ROOT / "notebooks" / "profiles")
    assert {name: {} for name in (path.stem for path in NOTEBOOKS)} == {
        name: values or {} for name, values in profile.notebooks.items()
    }


def test_the_last_notebook_draws_every_figure_and_reads_every_table_that_decides_a_claim():
    *others, last = (read_notebook(path, "cpu") for path in NOTEBOOKS)
    written = [Path(path) for notebook in others for path in notebook.writes if path.endswith(".csv")]
    drawn = [path for path in written if path.parts[0] == "figures"]
    assert {path.stem for path in drawn} == set(FIGURES)
    suite = ROOT / "apexlib" / "suite"
    source = "".join((suite / f"{name}.py").read_text(encoding="utf-8") for name in ("ledger", "measures"))
    read = set(re.findall(r"(?:read_table|per_seed)\(\w+, \"(\w+)\"", source))
    read |= {claim.arguments["table"] for claim in read_claims() if "table" in claim.arguments}
    assert {"masking", "instruction", "rank_gain"} <= read
    deciding = [path for path in written if path.parts[0] == "data" and path.stem in read]
    assert {path.as_posix() for path in (*drawn, *deciding)} | {"data/claims.yaml"} == set(last.needs)


def test_claims_are_numbered_in_order_and_name_their_source():
    claims = read_claims(ROOT / "data" / "claims.yaml")
    assert [claim.number for claim in claims] == list(range(1, len(claims) + 1))
    assert all("2505.24241" in claim.source for claim in claims)
    assert {name for claim in claims for name in claim.notebooks} <= {path.stem for path in NOTEBOOKS}


def test_the_readme_says_what_the_results_say():
    changed = subprocess.run(["git", "status", "--porcelain", "data/results"], cwd=ROOT, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        pytest.skip("data/results are not those of the commit: you have run the notebooks yourself")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rendered(text) == text, "run `make readme`"


def test_no_file_names_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users)/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".json", ".csv") and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), name
