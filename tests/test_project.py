"""The frame: lock, environment and borders between modules agree with what the project says of itself."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from readme import PAGES, SECTIONS, rendered

import apexlib
from apexlib.provenance import git
from apexlib.suite.agreement import agreement
from apexlib.suite.figures import FIGURES
from apexlib.suite.ledger import read_claims
from apexlib.suite.notebooks import read_notebook, read_profile, resolve
from apexlib.suite.runner import plan_profile
from apexlib.suite.variants import VARIANTS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# rooms, from the top to the bottom: a room imports from itself and from those below it
ROOMS = ("suite", "explore", "plot", "analysis", "training", "text", "")
# the one exception: what a run will cost is asked of the registry of methods
NOT_OF = {"analysis": {"training"}}
EXCEPTIONS = {("analysis/budget.py", "training.methods")}
# in the method's room, who may import whom
ARROWS = {
    "files": set(),
    "progress": set(),
    "provenance": {"files"},
    "operators": set(),
    "fused_ffn": set(),
    "plan": {"files", "operators"},  # the operators' names only, when they are asked for
    "selection": {"plan"},
    "evaluation": {"progress", "projections"},
    "architectures": {"plan"},
    "activations": {"architectures", "evaluation", "fused_ffn", "progress"},
    "projections": {"architectures", "fused_ffn"},
    "inspection": {"architectures", "projections"},
    "expansion": {"architectures", "fused_ffn", "inspection", "operators", "plan", "projections"},
    "certificate": {"evaluation", "expansion", "files", "inspection", "plan", "projections", "provenance"},
}
SOURCES = sorted((ROOT / "apexlib").rglob("*.py"))
LINES = {"a file": 400, "the method": 3079, "explore": 722, "the library": 14585}  # at most
SHAPE = ("d_model", "layers", "heads", "groups", "d_ff")


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
            if not inner:  # public names, from where they live
                found |= {apexlib._HOMES.get(name, f"apexlib.{name}").removeprefix("apexlib.") for name in names}
            else:
                found |= {f"{inner}.{name}" for name in names} if inner in ROOMS else {inner}
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


def test_the_arrows_of_the_method_form_no_circle():
    tuple(TopologicalSorter(ARROWS).static_order())


def test_the_library_stays_small():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert max(lines.values()) <= LINES["a file"], max(lines, key=lines.get)
    for room, name in (("the method", "apexlib"), ("explore", "explore")):
        assert sum(lines[path] for path in SOURCES if path.parent.name == name) <= LINES[room]
    assert sum(lines.values()) <= LINES["the library"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:apexlib|notebooks|data|figures)/[\w/.]*)`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert len(named) + len(linked) > 20 or page.name != "README.md"
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in linked if not (page.parent / name).exists()] == []


def test_a_page_without_the_end_of_a_section_is_refused():
    start = "<!-- reliability: made by `make readme` -->\n"
    for text in (f"{start}lost", f"{start}<!-- end of reliability -->\n" * 2):
        with pytest.raises(ValueError, match="section 'reliability': need one, that ends"):
            rendered(text)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 170


def test_importing_the_library_stays_light():
    heavy = {"datasets", "peft", "papermill", "matplotlib", "seaborn", "accelerate", "pyarrow", "yaml", "IPython"}
    for path in SOURCES:
        if path.parent.name in ("suite", "explore", "plot"):
            continue
        top_level = ast.parse(path.read_text(encoding="utf-8")).body
        found = {alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in top_level if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in found} & heavy, path


def test_figures_ledger_and_runner_need_no_torch():
    modules = ", ".join(f"apexlib.suite.{n}" for n in ("overview", "figures", "ledger", "runner", "cli"))
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


def code_cells(path):
    """The code cells of a notebook after its parameters, each as its lines without blank ones and comments."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    stripped = [[line.strip() for line in cell.source.splitlines()] for cell in cells[1:]]
    return [[line for line in lines if line and not line.startswith("#")] for lines in stripped]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_is_longer_than_25_lines(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 25, cell.source.splitlines()[0]


def test_no_two_notebooks_share_a_block_of_more_than_three_lines():
    blocks = {}
    for path in NOTEBOOKS:
        for lines in code_cells(path):
            for start in range(len(lines) - 3):
                blocks.setdefault(tuple(lines[start : start + 4]), set()).add(path.stem)
    assert not {block: names for block, names in blocks.items() if len(names) > 1}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_notebooks_import_exists(path):
    for cell in nbformat.read(path, 4).cells:
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "apexlib":
                module = import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not [name for name in missing if not find_spec(f"{node.module}.{name}")], node.module


def test_the_cpu_profile_is_the_notebooks_own_values():
    profile = read_profile("cpu", ROOT / "notebooks" / "profiles")
    assert {name: {} for name in (path.stem for path in NOTEBOOKS)} == {
        name: values or {} for name, values in profile.notebooks.items()
    }


def test_the_study_of_the_shipped_base_resolves():
    read = read_profile("study", ROOT / "notebooks" / "profiles")
    found = {
        name: resolve(read_notebook(ROOT / "notebooks" / f"{name}.ipynb", "study"), read, {}) for name in read.notebooks
    }
    assert set(found["03_instruction_tuning"]["methods"] + found["06_ablations"]["variants"]) <= set(VARIANTS)
    assert {found[name]["model"] for name in found if name[:2] in ("03", "04", "06")} == {"data/models/python-3m"}
    assert [step.notebook for step in plan_profile("study")] == [*found]


@pytest.mark.parametrize("profile", ["study-25m", "study-110m"])
def test_the_study_resolves_and_is_planned(profile):
    read = read_profile(profile, ROOT / "notebooks" / "profiles")
    found = {path.stem: resolve(read_notebook(path, profile), read, {}) for path in NOTEBOOKS}
    bases, largest = found["00_base_model"], profile.removeprefix("study-")
    assert bases["names"][-1] == largest
    for name in ("03_instruction_tuning", "04_continued_pretraining", "06_ablations"):
        assert found[name]["model"] == largest
        assert set(found[name].get("methods", found[name].get("variants"))) <= set(VARIANTS)
    assert [step.notebook for step in plan_profile(profile)] == [path.stem for path in NOTEBOOKS]


def test_the_models_of_the_study_have_the_sizes_that_their_names_say():
    for profile in ("study-25m", "study-110m"):
        read = read_profile(profile, ROOT / "notebooks" / "profiles")
        given = resolve(read_notebook(NOTEBOOKS[0], profile), read, {})
        for index, name in enumerate(given["names"]):
            width, layers, heads, groups, channels = (given[key][index] for key in SHAPE)
            head = width // heads
            layer = width * head * (2 * heads + 2 * groups) + 3 * width * channels
            millions = (layers * layer + given["vocabulary"] * width) / 1e6
            assert millions == pytest.approx(int(name.removesuffix("m")), rel=0.1), name


TOY = """
description: The study at toy values.
extends: study-25m
notebooks:
  00_base_model: {corpus: stdlib-code, skill_documents: 1000, vocabulary: 512, context: 64, batch_size: 8,
    d_model: [32, 48], layers: [2, 2], heads: [4, 4], groups: [4, 2], d_ff: [64, 128], steps: [64, 64],
    learning_rate: 0.01, valid_blocks: 32, seeds: [0], rivals: [unigram]}
  01_parameter_difference: {context: 64, assessment_blocks: 32, evaluation_blocks: 16, channel_fractions: [0.1],
    head_fractions: [0.25], draws: 1}
  02_expansion_step_by_step: {context: 64, assessment_blocks: 64, steps: 8}
  03_instruction_tuning: {methods: [full, apex], learning_rates: [0.003], grid_seeds: [0], seeds: [0], steps: 4,
    batch_size: 8, assessment_samples: 16, difficulties: [1], train_examples: 64, valid_examples: 28,
    test_examples: 28, max_new_tokens: 2, retention_context: 64, retention_blocks: 8}
  04_continued_pretraining: {methods: [full, apex], falling: ["full-all-100%"], learning_rates: [0.003],
    grid_seeds: [0], seeds: [0], context: 64,
    steps: 4, batch_size: 4, assessment_samples: 8, evaluations: 2, test_blocks: 8, retention_blocks: 8}
  05_effective_rank: {constructed_draws: 2, strengths: [0.5], context: 64, hidden_blocks: 8}
  06_ablations: {variants: [apex, halve], seeds: [0], steps: 6, batch_size: 8, assessment_samples: 16,
    difficulties: [1], train_examples: 64, valid_examples: 28, test_examples: 28, max_new_tokens: 2,
    retention_context: 64, retention_blocks: 8}
"""


@pytest.fixture
def toy_study(tmp_path):
    """A copy of the project's notebooks with the study at toy values."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(ROOT / "apexlib", tmp_path / "apexlib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    for name in ("pyproject.toml", "data/claims.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "data" / "models" / "python-3m", tmp_path / "data" / "models" / "python-3m")
    for name in ("results/bench", "results/toy", "models/toy"):
        (tmp_path / "data" / name).mkdir(parents=True)
    shutil.copy(ROOT / "data/results/bench/steps.csv", tmp_path / "data/results/bench")
    (tmp_path / "notebooks" / "profiles" / "toy.yaml").write_text(TOY, encoding="utf-8")
    return tmp_path


def test_the_study_is_planned_at_toy_values(toy_study):
    read = read_profile("toy", toy_study / "notebooks" / "profiles")
    for path in NOTEBOOKS:
        values = resolve(read_notebook(path, "toy"), read, {})
        assert values["profile"] == "toy"
        assert values.get("context", 64) == 64, path.stem
    assert len(plan_profile("toy", root=toy_study)) == len(NOTEBOOKS)


def reproduce(folder, *arguments, unset=(), **environment):
    """Run the toy study in a process of its own; return what it printed."""
    around = {name: value for name, value in os.environ.items() if name not in unset}
    around |= {"PYTHONPATH": str(folder), **environment}
    run = [sys.executable, "-m", "apexlib", "reproduce", "--profile", "toy", *arguments]
    done = subprocess.run(run, cwd=folder, env=around, capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode(errors="replace")


@pytest.mark.slow
def test_the_study_runs_at_toy_values(toy_study):
    reproduce(toy_study)
    table = pd.read_csv(toy_study / "data" / "results" / "toy" / "ablations.csv")
    assert set(table["variant"]) == {"apex", "halve"}


def test_a_model_that_is_given_takes_the_place_of_those_that_are_trained(toy_study):
    texts = [json.dumps({"text": f"def f{n}(x):\n    return x + {n}\n"}) for n in range(2000)]
    (toy_study / "data/results/toy/text.jsonl").write_text("\n".join(texts))
    (toy_study / "notebooks/profiles/toy.yaml").write_text("""
description: A model that is there already.
notebooks:
  00_base_model: {model: data/models/python-3m/step-00425, corpus: data/results/toy/text.jsonl, skill_documents: 0,
    context: 32, valid_blocks: 4, rivals: [], shipped: null}
""")
    reproduce(toy_study)
    (model,) = pd.read_csv(toy_study / "data/results/toy/models.csv").to_dict("records")
    assert (model["model"], model["path"]) == ("step-00425", "data/models/python-3m/step-00425")


@pytest.mark.slow
def test_what_lies_around_a_run_does_not_matter(toy_study, tmp_path_factory, tally):
    chosen = ("--only", "00", "--only", "02")
    surroundings = {
        "as usual": {},
        "file times of 1980": {"times": 315_532_800},
        "file times of 2090": {"times": 3_786_912_000},
        "HOME unset": {"unset": ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")},
        "locale C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "umask 077": {"umask": 0o077},
    }
    found = {}
    for name, around in surroundings.items():
        folder = shutil.copytree(toy_study, tmp_path_factory.mktemp("around") / name)
        if times := around.pop("times", None):
            for path in folder.rglob("*"):
                os.utime(path, (times, times))
        mask = os.umask(around.pop("umask", 0o022))
        try:
            reproduce(folder, *chosen, **around)
            assert "never run" not in reproduce(folder, "--dry-run", *chosen, **around), name
        finally:
            os.umask(mask)
        results = folder / "data" / "results" / "toy"
        found[name] = {path.name: path.read_bytes() for path in sorted(results.glob("*.csv"))}
    assert {"models.csv", "movement.csv"} <= set(found["as usual"])
    same = [name for name, tables in found.items() if tables == found["as usual"]]  # none has times in it
    assert same == list(surroundings)
    tally("surroundings", f"a run with {', '.join(same[1:])}", len(same) - 1, len(same) - 1)


def test_the_last_notebook_draws_every_figure_and_reads_every_table_that_decides_a_claim():
    notebooks = {path.stem: read_notebook(path, "cpu") for path in NOTEBOOKS}
    last = notebooks.pop("07_figures_and_claims")
    written = [Path(path) for notebook in notebooks.values() for path in notebook.writes if path.endswith(".csv")]
    drawn = [path for path in written if path.parts[0] == "figures"]
    own = {Path(path).stem for path in last.writes if path.startswith("figures/") and path.endswith(".csv")}
    assert {path.stem for path in drawn} | own == set(FIGURES)
    suite = ROOT / "apexlib" / "suite"
    source = "".join((suite / f"{name}.py").read_text(encoding="utf-8") for name in ("ledger", "measures"))
    read = set(re.findall(r"(?:read_table|per_seed)\(\w+, \"(\w+)\"", source))
    read |= {claim.arguments["table"] for claim in read_claims() if "table" in claim.arguments}
    assert {"masking", "instruction", "rank_gain"} <= read
    read |= {claim.gate for claim in read_claims() if claim.gate}
    deciding = [path for path in written if path.parts[0] == "data" and path.stem in read]
    deciding.append(Path("data/results/bench/steps.csv"))  # which no notebook writes
    rooms = (suite, suite.with_name("plot"))
    beside = [path for room in rooms for path in room.iterdir() if path.suffix in (".html", ".mplstyle", ".yaml")]
    beside.remove(suite / "cli.yaml")  # of the command line, which draws nothing
    beside = {path.relative_to(ROOT).as_posix() for path in (*beside, ROOT / "data" / "claims.yaml")}
    assert {path.as_posix() for path in (*drawn, *deciding)} | beside == set(last.needs)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_keeps_what_is_shipped(toy_study):
    shutil.copy(ROOT / "Makefile", toy_study)
    (toy_study / "data" / "cache").mkdir()
    subprocess.run(["make", "clean"], cwd=toy_study, check=True, capture_output=True)
    assert not (toy_study / "data" / "cache").exists()
    assert [path.name for path in (toy_study / "data" / "models").iterdir()] == ["python-3m"]
    assert (toy_study / "data" / "claims.yaml").exists()


def test_claims_are_numbered_in_order_and_name_their_source():
    claims = read_claims(ROOT / "data" / "claims.yaml")
    assert [claim.number for claim in claims] == list(range(1, len(claims) + 1))
    assert all("2505.24241" in claim.source for claim in claims)
    assert {name for claim in claims for name in claim.notebooks} <= {path.stem for path in NOTEBOOKS}


def test_the_readme_says_what_the_results_say():
    changed = subprocess.run(["git", "status", "--porcelain", "data/results"], cwd=ROOT, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        pytest.skip("data/results are not those of the commit: you have run the notebooks yourself")
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    assert [rendered(text) for text in texts] == texts, "run `make readme`"
    assert sorted(re.findall(r"<!-- (\w+): made by", "".join(texts))) == sorted(SECTIONS)  # each stands on one page


def test_what_the_page_of_the_study_is_made_from_is_held_by_compare(monkeypatch):
    if not git(ROOT, "ls-tree", "HEAD"):
        pytest.skip("no repository: nothing is recorded")
    held = pd.concat(agreement(profile, ROOT) for profile in ("study", "cpu"))
    held, read, read_csv = {*(held["folder"] + "/" + held["table"] + ".csv")}, set(), pd.read_csv

    def noted(path, *arguments, **options):
        table = read_csv(path, *arguments, **options)
        read.add(Path(path))  # which is there: claims ask for tables of notebooks that a profile lacks
        return table

    monkeypatch.setattr(pd, "read_csv", noted)
    rendered((ROOT / "docs" / "study.md").read_text(encoding="utf-8"))
    assert len({path.parent for path in read}) > 5
    timed = {"data/results/bench/steps.csv"}  # for one claim; how long a step takes is no number of a run
    assert {path.relative_to(ROOT).as_posix() for path in read} - timed <= held


def test_no_file_names_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users)/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".json", ".csv") and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), name
