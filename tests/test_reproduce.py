"""The runner runs what changed and nothing else, refuses what it does not know, and takes nothing for a success."""

import fcntl
import io
import json
import logging
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path

import nbformat
import pytest
import yaml
from papermill.iorw import read_yaml_file

from apexlib.files import file_hash
from apexlib.suite import cli, execution
from apexlib.suite import runner as reproduce
from apexlib.suite.bars import RunBars
from apexlib.suite.notebooks import ReproduceError, load_yaml, read_notebook, read_profile
from apexlib.suite.runner import RunError, plan_profile, run_profile

PROFILE = 'profile: str = "cpu"  # whose folders'
COMMAND = [sys.executable, "-m", "apexlib", "reproduce"]


def main(arguments):
    return cli.main(["reproduce", *arguments])


class Project:
    """A folder with notebooks that start in a second, since they import nothing heavy."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self) -> "Project":
        (self.root / "notebooks" / "profiles").mkdir(parents=True)
        for name in ("pyproject.toml", "requirements.lock"):
            (self.root / name).write_text("")
        return self

    def notebook(self, name, *cells, parameters=PROFILE, needs=(), writes=None, minutes=1.0, prose="# Why?", tags=()):
        content = nbformat.v4.new_notebook()
        content.cells = [
            nbformat.v4.new_markdown_cell(prose),
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *(nbformat.v4.new_code_cell(textwrap.dedent(cell), metadata={"tags": list(tags)}) for cell in cells),
        ]
        content.metadata["apexlib"] = {"needs": list(needs), "writes": writes or {}, "timeout_minutes": minutes}
        nbformat.write(content, self.root / "notebooks" / f"{name}.ipynb")
        return self

    def profile(self, name="cpu", **content):
        path = self.root / "notebooks" / "profiles" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"description": "as written", **content}), encoding="utf-8")
        return self

    def table(self, name: str) -> Path:
        return self.root / "data" / "results" / "cpu" / name

    @property
    def runs(self) -> Path:
        return self.root / "data" / "runs" / "cpu"

    @property
    def manifest(self) -> dict:
        return json.loads(self.table("manifest.json").read_text(encoding="utf-8"))

    def plan(self, **options) -> dict[str, tuple[str, str]]:
        return {step.notebook[:2]: (step.status, step.reason) for step in plan_profile(root=self.root, **options)}

    def run(self, **options) -> dict[str, str]:
        return {step.notebook[:2]: step.status for step in run_profile(root=self.root, **options)}


def four_notebooks(root: Path) -> Project:
    """00 → 01 → 02, and 03 beside them."""
    project = Project(root).make()
    (root / "apexlib").mkdir()
    (root / "apexlib" / "__init__.py").write_text("WHERE = 'the project'\n")
    project.notebook(
        "00_make",
        """
        import hashlib, json, os, resource, sys
        from pathlib import Path
        import apexlib
        results = Path("../data/results") / profile
        """,
        """
        models = Path("../data/models") / profile / "tiny"
        for folder in (results, models):
            folder.mkdir(parents=True, exist_ok=True)
        table = f"step,loss\\n{n},{n * 2}\\n".encode()
        (results / "a.csv").write_bytes(table)
        facts = {"sha256": hashlib.sha256(table).hexdigest(), "data": {"corpus": "c0ffee"}, "device": "cpu, 1 threads"}
        (results / "a.json").write_text(json.dumps(facts))
        (models / "weights.bin").write_bytes(bytes(n))
        """,
        """
        seen = {key: os.environ.get(key) for key in ("PYTHONHASHSEED", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY")}
        seen |= {"python": sys.executable, "where": apexlib.WHERE, "cwd": os.getcwd(), "text": text, "rates": rates}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(11):
            print((b"0" * 80_000_000)[-1])  # 80 MB for a moment, 20 thousand pages
        seen |= {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}
        (results / "seen.json").write_text(json.dumps(seen))
        """,
        parameters=PROFILE
        + '\nn: int = 3  # größe\ntext: str = ""\nrates: list[float] | None = None\nspare: bool = False',
        writes={
            "data/results/{profile}/a.csv": ["step", "loss"],
            "data/results/{profile}/seen.json": [],
            "data/models/{profile}/tiny/": [],
        },
    )
    project.notebook(
        "01_use",
        """
        import csv
        from pathlib import Path
        results = Path("../data/results") / profile
        with open(results / "a.csv") as file:
            steps = int(next(csv.DictReader(file))["step"])
        (results / "b.csv").write_text(f"even\\n{steps % 2 == 0}\\n")
        """,
        needs=["data/results/{profile}/a.csv", "data/models/{profile}/tiny/weights.bin"],
        writes={"data/results/{profile}/b.csv": ["even"]},
    )
    project.notebook(
        "02_last",
        """
        from pathlib import Path
        figure = Path("../figures") / profile / "f.svg"
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_text("<svg/>")
        """,
        needs=["data/results/{profile}/b.csv"],
        writes={"figures/{profile}/f.svg": []},
    )
    project.notebook("03_beside", "1 + 1", parameters=PROFILE + '\nbeside: list[str] = ["other"]')
    text = 'ä "quoted" \\ {n} $HOME'
    values = {"text": text, "rates": [1, 0.5]}
    return project.profile(notebooks={"00_make": values, "01_use": {}, "02_last": None, "03_beside": {}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project after its first run; its folder has every character that papermill or jupyter give a meaning to."""
    project = four_notebooks(tmp_path_factory.mktemp("runner") / "prö ject {n} $HOME")
    kernels = project.root.parent / "kernels" / "python3"
    kernels.mkdir(parents=True)
    kernels.joinpath("kernel.json").write_text(
        '{"argv": ["/nowhere/python"], "display_name": "", "language": "python"}'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(project.root.parent))  # another environment's kernel of the same name
        assert project.run() == dict.fromkeys(("00", "01", "02", "03"), "done")
    return project


@pytest.fixture
def project(finished, tmp_path):
    """A copy of the finished project, times included, to go on from."""
    return Project(shutil.copytree(finished.root, tmp_path / finished.root.name))


@pytest.fixture
def no_kernel(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a notebook was run")

    monkeypatch.setattr(reproduce, "execute", refuse)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# a run that goes well


def test_a_kernel_is_this_interpreter_in_the_notebooks_folder_and_sees_the_project(finished):
    seen = json.loads(finished.table("seen.json").read_text())
    assert seen["python"] == sys.executable
    assert Path(seen["cwd"]) == finished.root / "notebooks"
    assert (seen["where"], seen["PYTHONHASHSEED"], seen["TOKENIZERS_PARALLELISM"]) == ("the project", "0", "false")
    assert seen["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    assert (seen["text"], seen["rates"]) == ('ä "quoted" \\ {n} $HOME', [1.0, 0.5])
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        assert seen["faults"] < 50_000  # what is freed is used again, without asking the system for it


def test_the_executed_copies_lie_in_the_runs_folder_and_the_sources_stay_clean(finished):
    for path in sorted(finished.root.glob("notebooks/*.ipynb")):
        copy = nbformat.read(finished.runs / path.name, as_version=4)
        assert all(cell.execution_count for cell in copy.cells if cell.cell_type == "code")
        assert not any(cell.get("execution_count") for cell in nbformat.read(path, as_version=4).cells)


def test_executed_notebooks_are_published_for_readers(finished):
    published = {path.name: nbformat.read(path, 4) for path in finished.root.glob("notebooks/executed/cpu/*.ipynb")}
    assert sorted(published) == [f"{name}.ipynb" for name in ("00_make", "01_use", "02_last", "03_beside")]
    for name, notebook in published.items():
        source = nbformat.read(finished.root / "notebooks" / name, 4)
        own = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        assert [(cell.cell_type, cell.source) for cell in own] == [(c.cell_type, c.source) for c in source.cells]
        assert notebook.metadata["run"]["profile"] == "cpu"
    injected = published["00_make.ipynb"].cells[2].source
    assert injected == "# changed for this run\ntext = 'ä \"quoted\" \\\\ {n} $HOME'\nrates = [1.0, 0.5]"
    assert len(published["01_use.ipynb"].cells) == 3  # nothing else was changed


def test_the_manifest_tells_what_was_run_with_what(finished):
    manifest, entry = finished.manifest, finished.manifest["notebooks"]["00_make"]
    assert manifest["profile"] == "cpu"
    assert {"commit", "python", "versions", "created"} <= set(manifest)
    assert "device" not in manifest  # the runner itself sees no accelerator
    assert set(manifest["notebooks"]) == {"00_make", "01_use", "02_last", "03_beside"}
    assert entry["parameters"]["n"] == 3
    assert entry["parameters"]["profile"] == "cpu"
    table = "data/results/cpu/a.csv"
    assert entry["artifacts"][table] == file_hash(finished.root / table)
    assert set(entry["artifacts"]) == {table, "data/results/cpu/seen.json", "data/models/cpu/tiny/"}
    assert (entry["data"], entry["device"]) == ({table: {"corpus": "c0ffee"}}, "cpu, 1 threads")
    assert 0 < entry["seconds"] < 60
    assert str(finished.root) not in json.dumps(manifest)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell peak memory")
def test_peak_memory_is_that_of_each_notebooks_own_kernel(finished):
    peak = {name: entry["peak_memory_mb"] for name, entry in finished.manifest["notebooks"].items()}
    assert 70 < peak["00_make"] - peak["03_beside"] < 120  # 80 MB more, though it ran before
    assert 20 < peak["03_beside"] < 200


# what runs again


def test_a_second_run_does_nothing(project, no_kernel):
    results = {path: path.stat().st_mtime_ns for path in project.table("").iterdir()}
    assert set(project.run().values()) == {"up to date"}
    assert {path: path.stat().st_mtime_ns for path in project.table("").iterdir()} == results


def test_touched_files_do_nothing(project, no_kernel):
    for path in project.root.rglob("*"):
        os.utime(path)
    assert set(project.run().values()) == {"up to date"}


def test_bytes_are_hashed_again_only_when_a_file_was_touched(project, no_kernel, monkeypatch):
    hashed = []
    monkeypatch.setattr(reproduce, "file_hash", lambda path: hashed.append(path.name) or file_hash(path))
    project.run()
    assert hashed == []
    os.utime(project.table("a.csv"))
    project.run()
    assert hashed == ["a.csv"]
    project.run()
    assert hashed == ["a.csv"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("# Why?", "# Because"), ("größe", "size"), ('"timeout_minutes": 1.0', '"timeout_minutes": 2.0')],
)
def test_prose_help_and_time_limit_do_not_count(project, no_kernel, old, new):
    edit(project.root / "notebooks" / "00_make.ipynb", old, new)
    assert set(project.run().values()) == {"up to date"}


def test_a_changed_parameter_reruns_its_notebook_and_only_those_whose_inputs_changed_with_it(project):
    spare = {"00_make.spare": True}  # 00 writes the same bytes again
    assert project.run(settings=spare) == {"00": "done", "01": "up to date", "02": "up to date", "03": "up to date"}
    assert project.manifest["notebooks"]["00_make"]["parameters"]["spare"] is True
    odd = spare | {"00_make.n": 5}  # other bytes from 00, but 5 is as odd as 3, so the same from 01
    assert project.run(settings=odd) == {"00": "done", "01": "done", "02": "up to date", "03": "up to date"}
    assert project.table("a.csv").read_text() == "step,loss\n5,10\n"
    assert set(project.manifest["notebooks"]) == {"00_make", "01_use", "02_last", "03_beside"}


def other_run(project: Project) -> None:
    project.table("../other").mkdir()
    project.table("../other/claims.csv").write_text("number,verdict\n")


def changed(reason: str, *notebooks: str) -> dict[str, str]:
    return dict.fromkeys(notebooks, reason)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        pytest.param(
            lambda p: edit(p.root / "notebooks/01_use.ipynb", "% 2", "% 3"),
            changed("changed: code cell 2", "01"),
            id="source",
        ),
        pytest.param(
            lambda p: edit(p.root / "notebooks/00_make.ipynb", "n: int = 3", "n: int = 4"),
            changed("changed: parameter n", "00"),
            id="parameter",
        ),
        pytest.param(
            lambda p: edit(p.root / "notebooks/00_make.ipynb", '/a.csv": [', '/a.csv": ["step", '),
            changed("changed: what it writes", "00"),
            id="promise",
        ),
        pytest.param(
            lambda p: p.table("a.csv").write_text("step,loss\n3,7\n"),
            {"00": "not as it was written: data/results/cpu/a.csv", "01": "changed: data/results/cpu/a.csv"},
            id="edited table",
        ),
        pytest.param(
            lambda p: p.table("seen.json").unlink(), {"00": "missing: data/results/cpu/seen.json"}, id="deleted file"
        ),
        pytest.param(
            lambda p: (p.root / "data/models/cpu/tiny/extra").write_text("x"),
            {"00": "not as it was written: data/models/cpu/tiny/"},
            id="folder",
        ),
        pytest.param(other_run, {"03": "changed: data/results/other/"}, id="beside"),
        pytest.param(
            lambda p: (p.runs / "state.json").write_text("{"), changed("never run", "00", "01", "02", "03"), id="state"
        ),
    ],
)
def test_the_plan_names_what_changed_and_whom_it_may_concern(project, no_kernel, change, reasons):
    change(project)
    state = (project.runs / "state.json").read_bytes()
    plan = project.plan()
    assert {name: reason for name, (status, reason) in plan.items() if status == "run"} == reasons
    for name, (status, reason) in plan.items():
        upstream = {"01": "00", "02": "01"}.get(name)
        if name not in reasons:
            moves = upstream is not None and plan[upstream][0] != "skip"
            assert status == ("maybe" if moves else "skip")
            assert not moves or reason.startswith(f"if {upstream}_")
    assert (project.runs / "state.json").read_bytes() == state


def test_what_of_the_library_a_notebook_does_not_reach_is_no_input(project, no_kernel):
    (project.root / "apexlib" / "reproduce.py").write_text("")
    assert set(project.run().values()) == {"up to date"}


def code_cells(*cells: str) -> list:
    return [nbformat.v4.new_code_cell(cell) for cell in cells]


def rewrite(path: Path, change) -> None:
    """Apply `change` to the code cells that follow the parameters."""
    content = nbformat.read(path, as_version=4)
    content.cells[2:] = change(content.cells[2:])
    nbformat.write(content, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda cells: code_cells(*(f"# why\n\n{cell.source}  # because" for cell in cells)),
        lambda cells: code_cells(*(cell.source.replace("(", "(\n").replace('"', "'") for cell in cells)),
        lambda cells: [*code_cells("# a cell of words"), *cells, *code_cells("")],
        lambda cells: [*cells, nbformat.v4.new_markdown_cell("And so?")],
    ],
    ids=["comments", "formatting", "empty cells", "prose"],
)
def test_comments_formatting_and_prose_are_no_code(project, no_kernel, change):
    rewrite(project.root / "notebooks" / "03_beside.ipynb", change)
    rewrite(project.root / "notebooks" / "02_last.ipynb", change)
    assert set(project.run().values()) == {"up to date"}


@pytest.mark.parametrize(
    ("change", "cell"),
    [
        (lambda cells: code_cells("1 - 1"), "code cell 2"),
        (lambda cells: [*cells, *code_cells("2 + 2")], "code cell 3"),
        (lambda cells: [*cells, *code_cells("%time 2")], "code cell 3, apexlib.WHERE"),  # it may reach anything
        (lambda cells: [], "code cell 2"),
    ],
)
def test_changed_code_is_named_by_its_cell(project, no_kernel, change, cell):
    rewrite(project.root / "notebooks" / "03_beside.ipynb", change)
    assert project.plan()["03"] == ("run", f"changed: {cell}")


def test_the_library_that_counts_is_the_one_that_the_kernel_imports(project, no_kernel):
    edit(project.root / "apexlib" / "__init__.py", "the", "The")
    status, reason = project.plan()["00"]
    assert status == "run"
    assert reason.startswith("changed: apexlib.")
    assert project.plan()["03"] == ("skip", "up to date")  # it imports nothing of it


def test_a_definition_that_a_notebook_reaches_is_named(project, no_kernel, monkeypatch):
    """As are the versions of what computes; a lock file is no version."""
    (project.root / "requirements.lock").write_text("numpy==2\n")
    assert {status for status, _ in project.plan().values()} == {"skip"}
    spectrum, reached = "apexlib.analysis.spectrum.effective_rank", reproduce.code_of_source

    def after_a_change(cells, package):
        more = {spectrum: "new"} if "import apexlib" in "".join(cells) else {}
        return reached(cells, package) | more

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "code_of_source", after_a_change)
        assert project.plan()["00"] == ("run", f"changed: {spectrum}")
        assert project.plan()["03"] == ("skip", "up to date")
    version = reproduce.metadata.version
    for name in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(reproduce.metadata, "version", lambda of, name=name: "0.0" if of == name else version(of))
            assert project.plan()["03"] == ("run", f"changed: {name}")


def test_dry_run_prints_a_table(project, no_kernel, monkeypatch, capsys):
    monkeypatch.chdir(project.root / "notebooks" / "profiles")  # anywhere in the project will do
    assert main(["--dry-run", "--set", "00_make.n=4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "00_make    run    changed: parameter n",
        "01_use     maybe  if 00_make changes data/results/cpu/a.csv",
        "02_last    maybe  if 01_use changes data/results/cpu/b.csv",
        "03_beside  skip   up to date",
    ]


def test_only_from_and_force_choose(project):
    assert set(project.plan(only=["03", "01"])) == {"01", "03"}
    assert set(project.plan(start="02")) == {"02", "03"}
    assert project.plan(start="02", force=True) == {"02": ("run", "forced"), "03": ("run", "forced")}
    before = project.manifest["notebooks"]
    with redirect_stderr(Terminal()) as error:
        assert project.run(only=["03_b"], force=True) == {"03": "done"}
    assert re.search(r"notebook 1 of 1 .*03_beside  cell \d of 2 ", error.getvalue(), flags=re.S)
    after = project.manifest["notebooks"]
    assert {name for name in after if after[name] != before[name]} == {"03_beside"}


def test_a_clone_keeps_what_the_manifest_tells_of_notebooks_it_has_not_run(project):
    before, text = project.manifest["notebooks"], project.table("manifest.json").read_bytes()
    for ignored in ("models", "runs"):
        shutil.rmtree(project.root / "data" / ignored)
    assert project.run(only=["03"]) == {"03": "done"}
    after = project.manifest["notebooks"]
    assert {name for name in {**before, **after} if after.get(name) != before.get(name)} == {"03_beside"}

    shutil.rmtree(project.runs)
    project.table("manifest.json").write_bytes(text)
    source = project.root / "notebooks" / "00_make.ipynb"
    edit(source, "import hashlib,", "raise ValueError('no data')\\nimport hashlib,")
    with pytest.raises(RunError, match="no data"):
        project.run(only=["00"])
    assert project.table("manifest.json").read_bytes() == text

    edit(source, "raise ValueError('no data')\\n", "")
    edit(source, '"seen = {', '"raise ValueError(\'too late\')\\n", "seen = {')
    with pytest.raises(RunError, match="too late"):  # it has written another table by then
        project.run(only=["00"], settings={"00_make.n": 5})
    assert set(project.manifest["notebooks"]) == {"01_use", "02_last", "03_beside"}


CLAIMS = """
- {number: 1, id: made, source: s, statement: It is made., expected: yes it is, rule: r, unit: x, limits: None here.,
   margin: 0, because: b,
   measure: {rise: {table: a, of: apex, column: step}}, notebooks: [00_make]}
- {number: 2, id: used, source: s, statement: It is used., expected: yes it is, rule: r, unit: x, limits: None here.,
   margin: 0, because: b,
   measure: {rise: {table: used, of: apex, column: step}}, notebooks: [01_use]}
- {number: 3, id: none, source: s, statement: It is not., expected: yes it is, rule: r, unit: x, limits: None here.,
   margin: 0, because: b,
   measure: {rise: {table: c, of: apex, column: step}}, notebooks: [09_gone]}
"""


def test_a_claim_runs_what_it_needs_and_nothing_else(project, no_kernel, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    assert main(["--claim", "1"]) == 2
    assert "data/claims.yaml" in capsys.readouterr().err
    (project.root / "data" / "claims.yaml").write_text(CLAIMS)
    edit(project.root / "apexlib" / "__init__.py", "the project", "elsewhere")  # everything is stale
    for arguments, notebooks in ((["1"], ["00"]), (["2"], ["00", "01"]), (["2", "--claim", "1"], ["00", "01"])):
        assert main(["--dry-run", "--claim", *arguments]) == 0
        assert [line[:2] for line in capsys.readouterr().out.splitlines()] == notebooks
    for number, said in (
        ("3", "unknown notebook '09_gone' in data/claims.yaml"),
        ("4", "unknown claim 4: need one of 1 to 3"),
    ):
        assert main(["--claim", number]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--claim", "1", "--only", "00"])


COMPARED = """
- {number: 1, id: rows, source: s, statement: It does., expected: yes it does, rule: r, unit: x, limits: None here.,
   margin: 0, because: b, notebooks: [00_compare],
   measure: {lead: {table: tried, of: direct, over: direct-random, column: answer_loss}}}
- {number: 2, id: order, source: s, statement: All count., expected: yes they do, rule: r, unit: x, limits: None here.,
   margin: 0, because: b, notebooks: [00_compare], measure: {rank_correlation: {}}}
"""


@pytest.fixture
def comparing(tmp_path):
    """A project whose notebook writes down the methods that it was given."""
    project = Project(tmp_path).make().profile(notebooks={"00_compare": {}})
    project.notebook(
        "00_compare",
        """
        from pathlib import Path
        table = Path("../data/results") / profile / "tried.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\\n".join(["method", *methods]) + "\\n")
        """,
        parameters=PROFILE + '\nmethods: list[str] = ["apex", "full", "lora", "direct", "direct-random", "random"]',
        writes={"data/results/{profile}/tried.csv": ["method"]},
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.yaml").write_text(COMPARED)
    return project


def test_a_claim_is_run_with_what_it_compares_and_leaves_the_tables_of_all_alone(comparing):
    assert comparing.run(profile="cpu") == {"00": "done"}
    whole = comparing.table("tried.csv").read_text()
    edit(comparing.root / "notebooks" / "00_compare.ipynb", "exist_ok=True", "exist_ok=1")  # it is stale
    assert comparing.run(profile="cpu", claims=[1]) == {"00": "done"}
    found = (comparing.root / "data" / "results" / "cpu-claims" / "tried.csv").read_text()
    assert found.split() == ["method", "apex", "full", "direct", "direct-random"]
    assert comparing.table("tried.csv").read_text() == whole
    assert comparing.plan(claims=[1])["00"][0] == "skip"


def test_what_a_claim_is_run_with_is_told_before(comparing, monkeypatch, capsys):
    monkeypatch.chdir(comparing.root)
    assert main(["--claim", "1", "--dry-run"]) == 0
    told = ["cpu-claims  00_compare, methods: apex, full, direct, direct-random", "00_compare  run    never run"]
    assert capsys.readouterr().out.splitlines() == told


def test_a_claim_takes_what_the_whole_profile_has_found_if_that_is_up_to_date(comparing):
    comparing.run(profile="cpu")
    assert comparing.run(profile="cpu", claims=[1]) == {"00": "up to date"}
    assert not (comparing.root / "data" / "results" / "cpu-claims").exists()


@pytest.mark.parametrize("claims", [[2], [1, 2]])
def test_a_claim_on_the_order_of_all_methods_has_them_all(comparing, claims):
    assert reproduce.job_of("cpu", claims=claims, root=comparing.root).profile.name == "cpu"


def test_a_claim_is_printed_with_its_verdict(project, no_kernel, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    (project.root / "data" / "claims.yaml").write_text(CLAIMS)
    rows = "".join(f"apex,{seed},{step}\n" for seed, step in enumerate((1.0, 1.1, 1.2)))
    monkeypatch.setattr(reproduce.Job, "run", lambda *_: None)
    assert main(["--claim", "1"]) == 1  # the table is another one
    assert "no column seed" in capsys.readouterr().err
    project.table("a.csv").write_text(f"method,seed,step\n{rows}")
    assert main(["--claim", "1", "--claim", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "claim 1: It is made.",
        "  the paper  yes it is",
        "  here       +1.10 [+0.85, +1.35] x; r; seeds: 3",
        "  verdict    reproduced",
        "  limits     None here.",
        "claim 2: It is used.",
        "  the paper  yes it is",
        "  here       –; r; seeds: 0",
        "  verdict    not measured",
        "  limits     None here.",
    ]


def test_a_missing_input_is_traced_to_its_notebook(project, no_kernel):
    project.table("a.csv").unlink()
    with pytest.raises(ReproduceError, match=r"01_use needs data/results/cpu/a.csv.*00_make writes it.*--from 00"):
        project.run(only=["01"])
    project.profile("part", notebooks={"01_use": {}})
    with pytest.raises(ReproduceError, match=r"00_make writes it, but is not in profile part"):
        project.plan(profile="part")
    project.notebook("03_beside", needs=["data/given.csv"])
    with pytest.raises(ReproduceError, match=r"03_beside needs data/given.csv.*no notebook writes"):
        project.plan(only=["03"])


def test_outdated_inputs_are_mentioned(project, no_kernel, capsys):
    edit(project.root / "notebooks" / "00_make.ipynb", "n: int = 3", "n: int = 4")
    assert project.run(only=["01"]) == {"01": "up to date"}
    assert "data/results/cpu/a.csv is out of date, 00_make: changed: parameter n" in capsys.readouterr().err


def test_one_runner_at_a_time(project, no_kernel, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    with (project.runs / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([]) == 2
    assert capsys.readouterr().err == "error: profile cpu: another run of it has not ended yet\n"
    assert main([]) == 0


# runs that fail

FAILURES = {
    "raises": "code cell 3 of 4: ValueError: no such luck",
    "dies": "code cell 2 of 3: the kernel died (out of memory?)",
    "hangs": "code cell 3 of 4: not done after 0.04 minutes, the notebook's timeout_minutes",
    "exits": "code cell 2 of 3 left the notebook by sys.exit",
    "skips": "code cell 2 of 2 was not run",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("failing")).make()
    promise = {"data/results/{profile}/never.csv": ["x"]}
    project.notebook("00_raises", "before = 1", "raise ValueError('no such luck')", "after = 1", writes=promise)
    project.notebook("01_needs", "1", needs=list(promise), writes={"data/results/{profile}/next.csv": []})
    project.notebook("02_needs", "1", needs=["data/results/{profile}/next.csv"])
    project.notebook("03_dies", "import os\nos.kill(os.getpid(), 9)", "1")
    project.notebook("04_hangs", "import time\ntime.sleep(1.5)", "time.sleep(1.5)", "1", minutes=0.04)
    project.notebook("05_exits", "import sys\nsys.exit(0)", "1")
    project.notebook("06_skips", "1", tags=["skip-execution"])
    project.notebook("07_good", "1")
    names = sorted(path.stem for path in project.root.glob("notebooks/*.ipynb"))
    project.profile(notebooks=dict.fromkeys(names))
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as error:
        patch.chdir(project.root)
        patch.setattr(execution, "_LONG_CELL", 0.0)
        noise = logging.StreamHandler(error)
        logging.getLogger("papermill").addHandler(noise)
        code = main([])
        logging.getLogger("papermill").removeHandler(noise)
    return project, code, error.getvalue()


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_names_the_cell_and_shows_its_source(failed, name):
    project, code, error = failed
    assert code == 1
    notebook = next(project.root.glob(f"notebooks/*_{name}.ipynb"))
    report, copy = error.split(f"{notebook.stem}  failed  ")[1].split("  as far as it got: ", 1)
    assert report.startswith(FAILURES[name])
    source = nbformat.read(notebook, as_version=4).cells[3 if name in ("raises", "hangs") else 2].source
    assert all(f"    | {line}\n" in report for line in source.splitlines())
    assert Path(copy.splitlines()[0]) == project.runs / notebook.name
    assert nbformat.read(project.runs / notebook.name, as_version=4).cells
    assert "\x1b" not in error
    assert "waiting for execute reply" not in error  # papermill's own words


def test_what_depends_on_a_failed_notebook_does_not_run_and_the_rest_does(failed):
    project, _, error = failed
    assert "01_needs  not run  needs 00_raises\n02_needs  not run  needs 01_needs\n" in error
    assert re.search(r"^07_good  done  ", error, flags=re.M)
    assert error.splitlines()[-1].startswith("error: 00_raises (failed), 01_needs (not run), ")
    assert set(project.manifest["notebooks"]) == {"07_good"}
    assert not (project.runs / "01_needs.ipynb").exists()
    assert not kernels_of(project.root)


def test_long_cells_get_a_line_where_there_is_no_progress_bar(failed):
    cells = re.findall(r"^  code cell (\d of \d) took [\d.]+ s$", failed[2].split("07_good  start")[1], flags=re.M)
    assert cells == ["1 of 2", "2 of 2"]


def test_after_a_failure_the_run_goes_on_from_there(failed):
    project, _, _ = failed
    assert project.plan()["00"] == ("run", "the last run did not finish")
    assert project.plan()["01"] == ("run", "never run")
    assert project.plan()["07"] == ("skip", "up to date")


def kernels_of(root: Path) -> list[str]:
    """Command lines of the kernels whose working directory is in `root`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if "ipykernel" in command and (process / "cwd").resolve().is_relative_to(root):
                found.append(command)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_stops_the_kernel_too(number, code, tmp_path):
    project = Project(tmp_path).make().notebook("00_long", "import time\nopen('begun', 'w').close()\ntime.sleep(60)")
    project.profile(notebooks={"00_long": {}})
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it from birth
    with subprocess.Popen(COMMAND, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "notebooks" / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert kernels_of(tmp_path)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert error.splitlines() == [
        "00_long  start: never run",  # and no word of papermill's or the kernel's own
        "interrupted: the notebook under way starts again next time",
    ]
    assert not kernels_of(tmp_path)
    assert project.plan() == {"00": ("run", "the last run did not finish")}


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    """No file may grow beyond 1500 bytes: neither the executed copy nor what the runner remembers fits."""
    project = Project(tmp_path).make().notebook("00_any", "1").profile(notebooks={"00_any": {}})
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    found = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert found.returncode == 1
    assert "File too large" in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.rglob(".partial-*"))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert project.plan() == {"00": ("skip", "up to date")}


def test_what_a_killed_runner_left_is_cleared(project, no_kernel):
    left = [project.runs / ".partial-state-x.json", project.table(".partial-a-x.csv")]
    for path in left:
        path.write_text("half")
    assert project.run() == dict.fromkeys(("00", "01", "02", "03"), "up to date")
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"sha256": 1}', '{"sha256": "1", "notebooks": [], "files": 1}', "[" * 10**5]
)
def test_a_damaged_memory_makes_notebooks_run_again(project, no_kernel, content):
    (project.runs / "state.json").write_text(content)
    assert set(project.plan().values()) == {("run", "never run")}


@pytest.mark.parametrize("old", ['"peak_memory_mb"', '"code cell 2"', '"artifacts"', "c0ffee"])
def test_a_memory_damaged_anywhere_counts_as_nothing(project, no_kernel, old):
    edit(project.runs / "state.json", old, old.replace("c", "k").replace("m", "n"))
    assert set(project.plan().values()) == {("run", "never run")}


# runs whose time is over

LEFT = "3 of 4 trials are left: a, b, c"


@pytest.fixture
def long(tmp_path, monkeypatch):
    """00 runs into its deadline the first time; 01 needs it, 02 does not."""
    project = Project(tmp_path / "long").make()
    project.notebook(
        "00_trials",
        """
        import os, time
        from pathlib import Path
        from apexlib.suite.trials import OutOfTimeError
        done = Path("../data/done")
        deadline = float(os.environ.get("APEXLIB_DEADLINE", "inf"))
        done.open("a").write("x")
        if deadline < 2e10 and len(done.read_text()) < 2:
            time.sleep(max(0, deadline - time.time()))
            raise OutOfTimeError(["a", "b", "c"], 4)
        Path("../data/t.csv").write_text("x\\n1\\n")
        """,
        writes={"data/t.csv": ["x"]},
    )
    project.notebook("01_needs", "1", needs=["data/t.csv"], writes={})
    project.notebook("02_other", "1").notebook("03_other", "1")
    project.profile(notebooks=dict.fromkeys(("00_trials", "01_needs", "02_other")))
    (project.root / "data").mkdir()
    monkeypatch.chdir(project.root)
    return project


def test_a_run_ends_when_its_time_is_over_and_the_next_call_goes_on(long, capsys):
    assert main(["--budget", "3s"]) == 3
    *lines, last = capsys.readouterr().err.splitlines()
    assert f"00_trials  unfinished  {LEFT}" in lines
    assert "01_needs  not run  needs 00_trials" in lines
    assert "02_other  not run  the time is over" in lines
    left = "00_trials (unfinished), 01_needs (not run), 02_other (not run)"
    assert last == f"time is over; left: {left}; run again to go on"
    assert (long.root / "data" / "done").read_text() == "x"
    assert long.plan()["00"] == ("run", "the last run did not finish")
    assert main(["--budget", "10m"]) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("02_other  done  ")
    assert main(["--budget", "0s"]) == 0  # nothing is left
    assert set(long.plan().values()) == {("skip", "up to date")}


def test_after_the_deadline_nothing_starts_and_what_is_up_to_date_still_counts(project, no_kernel):
    edit(project.root / "notebooks" / "02_last.ipynb", "<svg/>", "<svg></svg>")
    with pytest.raises(RunError) as error:
        project.run(budget=0.0)
    assert not error.value.failed
    assert {step.notebook[:2]: (step.status, step.reason) for step in error.value.steps} == {
        "00": ("up to date", ""),
        "01": ("up to date", ""),
        "02": ("not run", "the time is over"),
        "03": ("up to date", ""),
    }


def test_a_failure_outweighs_work_that_is_left(long, capsys):
    long.notebook("00_trials", "raise ValueError('no')", writes={"data/t.csv": []})
    long.notebook("02_other", "class OutOfTimeError(Exception): ...\nraise OutOfTimeError('1 of 2 is left')")
    assert main(["--budget", "1h"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: 00_trials (failed), 01_needs (not run), 02_other (unfinished)"
    )


JOB = """
def run(folder, number):
    (folder.parents[1] / f"{number} ran").open("a").write("x")
    return {"number": number}
"""


def test_jobs_of_an_array_share_trials_and_a_run_of_all_finds_them(long, monkeypatch, capsys):
    """Without a scheduler, `--share 1/2` and `--share 2/2` each do their part; exit code 3 says that work is left."""
    (long.root / "notebooks" / "job.py").write_text(JOB)
    long.notebook(
        "00_trials",
        """
        from pathlib import Path
        from job import run
        from apexlib.suite.trials import Trial, run_trials
        trials = [Trial(f"t{number}", {"number": number}) for number in range(3)]
        found = run_trials(run, trials, Path("../data/trials"), workers=1)
        Path("../data/t.csv").write_text("x\\n" + "".join(f"{each['number']}\\n" for each in found))
        """,
        writes={"data/t.csv": ["x"]},
    )
    assert main(["--only", "00", "--share", "2/2"]) == 3
    said = "others have the rest; left: 00_trials (unfinished); run again to go on"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (long.root / "data" / "t.csv").exists()
    assert long.plan()["00"] == ("run", "never run")  # what a part did, the run of all does not take for its own
    with (long.runs / "share-2-of-2" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--only", "00"]) == 2  # while a part is under way
        assert main(["--only", "00", "--share", "1/2"]) == 0  # another part may
    assert main(["--only", "00"]) == 0
    assert (long.root / "data" / "t.csv").read_text() == "x\n0\n1\n2\n"
    assert {path.name: path.read_text() for path in (long.root / "data").glob("* ran")} == {
        f"{number} ran": "x" for number in range(3)
    }
    assert long.plan()["00"] == ("skip", "up to date")


@pytest.mark.parametrize("share", ["3", "0/2", "3/2", "a/b"])
def test_a_wrong_share_is_refused(share, long, capsys):
    assert main(["--share", share]) == 2
    assert f"share '{share}': need a part of all, such as 3/16" in capsys.readouterr().err


def test_trainings_side_by_side_are_as_many_as_are_asked_for(long, capsys):
    long.notebook(
        "00_trials",
        """
        import os
        from pathlib import Path
        Path("../data/t.csv").write_text("processes\\n" + os.environ["APEXLIB_PROCESSES"])
        """,
        writes={"data/t.csv": ["processes"]},
    )
    assert main(["--only", "00", "--processes", "3"]) == 0
    assert (long.root / "data" / "t.csv").read_text() == "processes\n3"
    assert main(["--only", "00", "--processes", "0"]) == 2
    assert "processes 0: need at least one" in capsys.readouterr().err


def test_without_a_budget_there_is_no_deadline(long):
    assert long.run(only=["00"]) == {"00": "done"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("9m", 540), ("8m30s", 510), ("2h", 7200), ("45s", 45), ("1h1m1s", 3661)]
)
def test_a_budget_is_read(small, monkeypatch, text, seconds):
    seen = []
    monkeypatch.setattr(reproduce.Job, "run", lambda _, budget: seen.append(budget) or [])
    assert main(["--budget", text]) == 0
    assert seen == [seconds]


@pytest.mark.parametrize("text", ["", "30", "m", "1.5h", "-3m", "30s8m", "3 m", "9min"])
def test_a_wrong_budget_is_refused(small, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        main([f"--budget={text}"])
    assert f"{text!r}: need a time such as 30m, 8m30s, 2h or 45s" in capsys.readouterr().err


def test_a_kernel_that_does_not_start_says_why(tmp_path):
    project = Project(tmp_path).make().notebook("00_any", "1").profile(notebooks={"00_any": {}})
    (tmp_path / "notebooks" / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    with pytest.raises(RunError, match=r"00_any failed: before the first cell: (?s:.*)\| no kernel today"):
        project.run()


TABLE = "data/results/cpu/t.csv"


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({TABLE: "x,y\n1,2\n"}, ""),
        ({TABLE: "y,z,x\n1,2,3\n"}, ""),
        ({TABLE: "x,y\n0,0\n"}, ""),  # the same bytes as before, but written again
        ({}, f"promised {TABLE}, but left an older one in place"),
        ({TABLE: None}, f"promised {TABLE}, but did not write it"),
        ({TABLE: ""}, f"promised {TABLE}, but it is empty"),
        ({TABLE: "x,y\n"}, f"promised {TABLE}, but it has no rows"),
        ({TABLE: "x,z\n1,2\n"}, f"promised {TABLE} with y; its columns are x, z"),
        ({TABLE: "x,y\n1,2\n", "models/a": None}, "promised models/, but did not write it"),
        ({TABLE: "x,y\n1,2\n", "models/a": ""}, "promised models/, but it is empty"),
    ],
)
def test_every_promise_is_checked(tmp_path, monkeypatch, written, problem):
    project = Project(tmp_path).make()
    project.notebook("00_any", "1", writes={TABLE: ["x", "y"], "models/": []})
    for path, text in {TABLE: "x,y\n0,0\n", "models/a": "0", "runs/old": ""}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        os.utime(tmp_path / path, (1e9, 1e9))

    def papermill_does(*_, **__):
        for path, text in {"models/a": "0", **written}.items():
            (tmp_path / path).unlink() if text is None else (tmp_path / path).write_text(text)
        return nbformat.v4.new_notebook()

    monkeypatch.setattr("papermill.execute_notebook", papermill_does)
    notebook, copy = read_notebook(tmp_path / "notebooks" / "00_any.ipynb", "cpu"), tmp_path / "runs" / "00_any.ipynb"
    done = execution.execute(notebook, {}, root=tmp_path, copy=copy, environment={}, bars=RunBars({}))
    assert done.problem == problem


# what is refused before anything starts


@pytest.fixture
def small(tmp_path, no_kernel, monkeypatch):
    """One notebook with a parameter of every kind; whatever is run here is a mistake."""
    lines = (PROFILE, "n: int = 1", "lr: float = 0.1", "on: bool = True", "s: str | None = None", "l: list[int] = [1]")
    project = Project(tmp_path).make().notebook("00_only", "1", parameters="\n".join(lines), writes={"data/x": []})
    monkeypatch.chdir(tmp_path)
    return project.profile(notebooks={"00_only": {}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"m": 1}, "unknown parameter 'm' in profile cpu, 00_only: need one of l, lr, n, on, profile, s"),
        ({"lrr": 1}, "unknown parameter 'lrr' in profile cpu, 00_only: did you mean lr?"),
        ({"n": 1.5}, "cpu, 00_only, parameter n: need int, got 1.5 (float)"),
        ({"n": True}, "cpu, 00_only, parameter n: need int, got True (bool)"),
        ({"n": None}, "cpu, 00_only, parameter n: need int, got None (NoneType)"),
        ({"on": "false"}, "cpu, 00_only, parameter on: need bool, got 'false' (str)"),
        ({"on": 0}, "cpu, 00_only, parameter on: need bool, got 0 (int)"),
        ({"lr": True}, "cpu, 00_only, parameter lr: need float, got True (bool)"),
        ({"lr": float("nan")}, "cpu, 00_only, parameter lr: need float, got nan (float)"),
        ({"lr": "fast"}, "cpu, 00_only, parameter lr: need float, got 'fast' (str)"),
        ({"s": 7}, "cpu, 00_only, parameter s: need str | None, got 7 (int)"),
        ({"l": 7}, "cpu, 00_only, parameter l: need list[int], got 7 (int)"),
        ({"l": [1, "2"]}, "cpu, 00_only, parameter l: need list[int], got [1, '2'] (list)"),
        ({"profile": "gpu"}, "cpu, 00_only: parameter profile is set by the runner"),
        ([1], "cpu.yaml, notebooks.00_only: need a mapping, got [1]"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(small, capsys, values, said):
    small.profile(notebooks={"00_only": values})
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (small.root / "data").exists()


def test_a_number_may_have_an_exponent_and_no_point():
    assert load_yaml("[1e-4, 1.5E3, 1e, e3, 0x1e4]", "") == [1e-4, 1500.0, "1e", "e3", 0x1E4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("00_only.n=1.5", "--set, 00_only, parameter n: need int, got 1.5 (float)"),
        ("00_only.on='false'", "need bool, got 'false' (str)"),
        ("00_only.steps=1", "unknown parameter 'steps' in --set, 00_only"),
        ("01_other.n=1", "unknown notebook '01_other': need one of 00_only"),
        ("00_only.n", "--set 00_only.n: need NOTEBOOK.PARAMETER=VALUE"),
        ("00_only.n=[", "--set 00_only.n=[: while parsing"),
    ],
)
def test_wrong_settings_are_refused(small, capsys, text, said):
    assert main(["--set", text]) == 2
    assert said in capsys.readouterr().err


def test_right_values_arrive_as_they_are(small, monkeypatch):
    small.profile(notebooks={"00_only": {"lr": 2, "s": "x", "l": []}})
    seen = {}
    monkeypatch.setattr(
        reproduce, "execute", lambda _, values, **__: seen.update(values) or execution.Execution("stop", 0.0, None)
    )
    assert main(["--set", "00.n=7", "--set", "00_only.on=false"]) == 1
    assert seen == {"profile": "cpu", "n": 7, "lr": 2.0, "on": False, "s": "x", "l": []}
    assert isinstance(seen["lr"], float)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"notebooks": {"00_onyl": {}}}, "unknown notebook '00_onyl' in profile cpu: did you mean 00_only?"),
        ({"notebooks": {"00_only": {}}, "note": 1}, "unknown key 'note' in cpu.yaml"),
        ({"notebook": {"00_only": {}}}, "unknown key 'notebook' in cpu.yaml: did you mean notebooks?"),
        ({"notebooks": ["00_only"]}, "cpu.yaml, notebooks: need a mapping, got ['00_only']"),
        ({"notebooks": {}}, "cpu.yaml: need both description and notebooks"),
        ({"runnable": "no", "notebooks": {"00_only": {}}}, "cpu.yaml, runnable: need a valid boolean, got 'no'"),
        ({"runnable": False}, "cpu.yaml: need `why`, since it is not runnable"),
        ({"runnable": False, "why": "Needs\n8 GPUs."}, "profile cpu is not run here: Needs 8 GPUs."),
    ],
)
def test_wrong_profiles_are_refused(small, capsys, content, said):
    small.profile(**content)
    assert main(["--force"]) == 2
    assert said in capsys.readouterr().err


def test_a_profile_takes_over_anothers_values(small):
    small.notebook("01_more", "1", parameters=f"{PROFILE}\nn: int = 1")
    small.profile("base", notebooks={"00_only": {"n": 5, "lr": 0.5}, "01_more": {"n": 2}})
    small.profile("large", extends="base", notebooks={"00_only": {"n": 7, "s": "x"}})
    small.profile("larger", extends="large", notebooks={"00_only": {"lr": 0.25}, "01_more": None})
    folder = small.root / "notebooks" / "profiles"
    assert read_profile("large", folder).notebooks == {"00_only": {"n": 7, "lr": 0.5, "s": "x"}, "01_more": {"n": 2}}
    larger = read_profile("larger", folder)
    assert larger.notebooks == {"00_only": {"n": 7, "lr": 0.25, "s": "x"}, "01_more": {"n": 2}}
    assert (larger.name, larger.description) == ("larger", "as written")
    small.profile("same", extends="base")
    assert read_profile("same", folder).notebooks == read_profile("base", folder).notebooks
    assert set(small.plan(profile="larger")) == {"00", "01"}


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("cpuu", "unknown profile 'cpuu' in mine.yaml, extends: did you mean cpu?"),
        ("mine", "mine.yaml extends itself: mine.yaml → mine.yaml"),
        ("other", "mine.yaml extends itself: mine.yaml → other.yaml → mine.yaml"),
        (["cpu"], "mine.yaml, extends: need a valid string, got ['cpu']"),
    ],
)
def test_a_profile_that_cannot_extend_is_refused(small, extends, said):
    small.profile("other", extends="mine").profile("mine", extends=extends)
    with pytest.raises(ReproduceError, match=re.escape(said)):
        small.plan(profile="mine")


def test_unknown_names_are_refused_with_the_nearest_known_one(small, capsys):
    assert main(["--profile", "cpuu"]) == 2
    assert "unknown profile 'cpuu': did you mean cpu?" in capsys.readouterr().err
    assert main(["--only", "07"]) == 2
    assert "unknown notebook '07': need one of 00_only" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "00", "--from", "00"])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
BOMB += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("text", [f"description: [*a]\nnotebooks: &a {{}}\n{BOMB}", BOMB + "description: *a11\n"])
def test_a_profile_with_aliases_is_refused_at_once(text, small, capsys):
    (small.root / "mine.yaml").write_text(text)
    began = time.process_time()
    assert main(["--profile", str(small.root / "mine.yaml"), "--dry-run"]) == 2
    assert re.search(r"mine\.yaml: .*alias", capsys.readouterr().err)
    assert time.process_time() - began < 10  # seconds, of which a value of 10¹¹ words would leave none


def test_a_setting_with_aliases_is_refused_at_once(small, capsys):
    assert main(["--set", f"00_only.n={{{BOMB.strip().replace(chr(10), ', ')}}}"]) == 2
    assert "alias *a0, need the value" in capsys.readouterr().err


def test_a_profile_file_of_ones_own(small, capsys):
    own = small.root / "mine.yaml"
    own.write_text("description: mine\nnotebooks: {00_only: {n: 9}}\n")
    assert main(["--profile", str(own), "--dry-run"]) == 0
    assert plan_profile(str(own))[0].reason == "never run"
    for name, said in {"cpu.yaml": "the project has a profile cpu", "a b.yaml": "need letters"}.items():
        shutil.copy(own, small.root / name)
        assert main(["--profile", name]) == 2
        assert said in capsys.readouterr().err
    assert main(["--profile", "gone.yaml"]) == 2
    assert "profile file gone.yaml: not found" in capsys.readouterr().err
    (small.root / "named.yaml").write_text("description: mine\nname: cpu\nnotebooks: {00_only: {n: 9}}\n")
    assert main(["--profile", "named.yaml"]) == 2  # the file's name is the profile's
    assert "unknown key 'name' in named.yaml" in capsys.readouterr().err
    (small.root / "bad.yaml").write_text("description: [\n")
    assert main(["--profile", "bad.yaml"]) == 2
    assert "error: bad.yaml: while parsing" in capsys.readouterr().err


def test_list_shows_profiles_notebooks_and_parameters(small, capsys):
    small.profile("paper", runnable=False, why="8 GPUs")
    small.profile("more", notebooks={"00_only": {"n": 9}})
    small.profile("one-of-a-long-name", notebooks={"00_only": {}})
    assert main(["--list", "--profile", "more"]) == 0
    shown = capsys.readouterr().out
    assert f"profile {'paper':<18}  as written (not run here)" in shown
    assert "profile one-of-a-long-name  as written\n" in shown
    assert "00_only  writes data/x" in shown
    assert "  n: int = 9\n" in shown
    assert "  profile: str = 'more'  # whose folders\n" in shown


def test_the_values_of_a_profile_are_shown_as_papermill_takes_them(small, capsys):
    small.profile("more", notebooks={"00_only": {"n": 9, "lr": 6e-5, "s": "ä: 'b'"}})
    assert main(["--parameters", "more", "00"]) == 0
    (small.root / "values.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    taken = read_yaml_file(str(small.root / "values.yaml"))
    assert taken == {"profile": "more", "n": 9, "lr": 6e-5, "on": True, "s": "ä: 'b'", "l": [1]}
    for arguments, said in ((["gone", "00"], "unknown profile 'gone'"), (["more", "7"], "unknown notebook '7'")):
        assert main(["--parameters", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("m = 2", "got `m = 2`"),
        ("m: int = 2 * 3", "got `m: int = 2 * 3`"),
        ("m: int", "got `m: int`"),
        ("m: dict = {}", "got `m: dict = {}`"),
        ("m: str = {[]: 1}", "got `m: str = {[]: 1}`"),
        ("import os", "got `import os`"),
        ("m: int = 'a'", "parameter m: need int, got 'a' (str)"),
        ("m: int =", "invalid syntax"),
        ('profile: str = "cpu"', "profile is there already"),
    ],
)
def test_a_parameters_cell_holds_annotated_literals_only(tmp_path, line, said):
    Project(tmp_path).make().notebook("00_any", parameters=f"{PROFILE}\n# a comment is fine\n{line}")
    with pytest.raises(ReproduceError) as error:
        read_notebook(tmp_path / "notebooks" / "00_any.ipynb", "cpu")
    assert str(error.value).startswith("00_any.ipynb, parameters cell, line 3")
    assert said in str(error.value)


def test_parameters_are_read_with_type_and_help(tmp_path):
    cell = f'{PROFILE}\nn: int | None = -3  # a "#" = b\nsizes: list[int] = [\n    1,  # one\n    2,\n]  # both, größer'
    Project(tmp_path).make().notebook("00_any", parameters=cell)
    found = read_notebook(tmp_path / "notebooks" / "00_any.ipynb", "cpu").parameters
    assert [(p.name, p.kind, p.default, p.help) for p in found.values()] == [
        ("profile", "str", "cpu", "whose folders"),
        ("n", "int | None", -3, 'a "#" = b'),
        ("sizes", "list[int]", [1, 2], "both, größer"),
    ]


def writing(paths):
    return {"needs": [], "writes": paths, "timeout_minutes": 1}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "00_any.ipynb, metadata apexlib: need a mapping with needs, writes, timeout_minutes, got None"),
        ({"needs": [], "writes": {}}, "00_any.ipynb, metadata apexlib: need timeout_minutes"),
        ({**writing({}), "need": []}, "unknown key 'need' in 00_any.ipynb, metadata apexlib: did you mean needs?"),
        ({"needs": [], "writes": {}, "timeout_minutes": 0}, "timeout_minutes: need > 0, got 0"),
        ({"needs": "x", "writes": {}, "timeout_minutes": 1}, "needs: need a valid list, got 'x'"),
        (writing({"/etc/x": []}), "need paths relative to the project's root, got '/etc/x'"),
        (writing({"data/../../x": []}), "need paths relative to the project's root"),
        (writing({"x.csv": "step"}), "writes.x.csv: need a valid list, got 'step'"),
        (writing({"x.svg": ["step"]}), "writes: need columns of a .csv only, got {'x.svg': ['step']}"),
    ],
)
def test_declarations_are_checked(tmp_path, metadata, said):
    path = tmp_path / "notebooks" / "00_any.ipynb"
    Project(tmp_path).make().notebook("00_any")
    content = json.loads(path.read_text())
    content["metadata"]["apexlib"] = metadata
    path.write_text(json.dumps(content))
    with pytest.raises(ReproduceError, match=re.escape(said)):
        read_notebook(path, "cpu")


def test_notebooks_that_cannot_be_ordered_are_refused(small):
    small.profile(notebooks={"00_only": {}, "01_again": {}}).notebook("01_again", writes={"data/": []})
    with pytest.raises(ReproduceError, match="01_again writes data/, which 00_only writes already"):
        small.plan()
    small.notebook("01_again", writes={"late/": []}).notebook("00_only", needs=["late/x"])
    with pytest.raises(ReproduceError, match="00_only needs late/x, which 01_again writes: need an earlier one"):
        small.plan()
    small.notebook("01_again", writes={}).notebook("00_only", parameters="n: int = 1")
    with pytest.raises(ReproduceError, match='need `profile: str = "cpu"` as the first parameter'):
        small.plan()
    (small.root / "notebooks" / "00_only.ipynb").write_text("{")
    with pytest.raises(ReproduceError, match=r"00_only\.ipynb: need a notebook of format 4"):
        small.plan()


# what a person does beside the runner


def test_notebooks_that_the_profile_does_not_name_are_not_looked_into(small):
    """A broken one, a copy that writes the same files, somebody else's without our declarations."""
    (small.root / "notebooks" / "01_broken.ipynb").write_text("{")
    shutil.copy(small.root / "notebooks" / "00_only.ipynb", small.root / "notebooks" / "00_only-Copy1.ipynb")
    (small.root / "notebooks" / "02_foreign.ipynb").write_text(json.dumps(nbformat.v4.new_notebook()))
    assert small.plan() == {"00": ("run", "never run")}
    small.notebook("00_only", needs=["data/given.csv"])
    with pytest.raises(ReproduceError, match=r"00_only needs data/given.csv.*no notebook writes"):
        small.plan()


def test_the_profile_that_a_notebook_was_left_with_does_not_matter(project, no_kernel):
    edit(project.root / "notebooks" / "00_make.ipynb", 'profile: str = \\"cpu\\"', 'profile: str = \\"smoke\\"')
    assert set(project.run().values()) == {"up to date"}


def test_a_notebook_that_is_not_as_committed_gets_one_note(project, no_kernel, capsys):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *arguments], cwd=project.root, check=True, capture_output=True)

    git("init")
    git("add", "notebooks/00_make.ipynb", "notebooks/01_use.ipynb", "notebooks/03_beside.ipynb")
    git("commit", "-m", "a")
    project.run()
    assert "note" not in capsys.readouterr().err
    for name in ("00_make", "03_beside"):
        edit(project.root / "notebooks" / f"{name}.ipynb", "# Why?", "# Because")
    (project.root / ".git" / "index.lock").touch()  # as if somebody committed just now
    project.run()
    assert capsys.readouterr().err.count("note: 00_make, 03_beside: not as committed\n") == 1
    project.profile("one", notebooks={"02_last": {}})  # which does not name them
    with suppress(ReproduceError):
        run_profile("one", root=project.root)
    assert capsys.readouterr().err == ""


def test_the_runner_starts_light():
    heavy = "sys.exit(bool({'torch', 'papermill', 'IPython'} & set(sys.modules)))"
    code = f"import sys, apexlib.suite.runner, apexlib.suite.cli as c; c._parser(()); {heavy}"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
