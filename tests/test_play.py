"""Playing is safe: what is changed and run in JupyterLab leaves the record, the runner and git as they were."""

import builtins
import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_project import toy_study
from test_reproduce import Project

from apexlib.files import file_hash
from apexlib.suite import cli
from apexlib.suite.agreement import agreement, compared
from apexlib.suite.bases import models_table
from apexlib.suite.comparison import chosen_runs
from apexlib.suite.folders import NotReadyError, folders
from apexlib.suite.notebooks import read_notebook, read_profile, resolve
from apexlib.suite.play import lay_out

ROOT = Path(__file__).parents[1]
__all__ = ["toy_study"]  # a fixture


@pytest.fixture
def project(tmp_path):
    """The project's notebooks and recorded tables, in a repository of their own."""
    for name in ("notebooks", "docs", "data/results/cpu", "figures/cpu"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as recorded"]):
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *own, *arguments], cwd=tmp_path, check=True)
    return tmp_path


def status(project) -> str:
    return subprocess.run(["git", "status", "--short"], cwd=project, capture_output=True, text=True).stdout


def test_copies_write_to_folders_of_their_own_and_git_sees_none_of_it(project):
    said = list(lay_out(project))
    names = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert said == [f"play/{name}: new" for name in ["index.ipynb", *names]]
    for name in names:
        source, copy = (nbformat.read(project / folder / name, 4) for folder in ("notebooks", "play"))
        differ = [(one.source, two.source) for one, two in zip(source.cells, copy.cells, strict=True) if one != two]
        ((before, after),) = differ
        assert after == before.replace('profile: str = "cpu"', 'profile: str = "play"', 1) != before
        assert read_notebook(project / "play" / name, "play").parameters["profile"].default == "play"
    assert status(project) == ""


def test_copies_start_from_the_recorded_tables(project):
    list(lay_out(project))
    for kind in ("data/results", "figures"):
        for path in (project / kind / "cpu").glob("*.csv"):
            assert (project / kind / "play" / path.name).read_bytes() == path.read_bytes()
    (project / "data/results/play/instruction.csv").write_text("mine\n")
    list(lay_out(project))
    assert (project / "data/results/play/instruction.csv").read_text() == "mine\n"


def test_recorded_tables_follow_the_record_until_a_run_of_ones_own_writes_over_them(project):
    list(lay_out(project))
    record, own = (project / "data" / "results" / name for name in ("cpu", "play"))
    (own / "masking.csv").write_text("mine\n")
    for name in ("masking.csv", "instruction.csv"):
        (record / name).write_text("another run\n")
    (project / "figures/cpu/expansion.csv").write_text("another run\n")
    list(lay_out(project))
    assert (own / "masking.csv").read_text() == "mine\n"
    assert (own / "instruction.csv").read_text() == "another run\n"
    assert (project / "figures/play/expansion.csv").read_text() == "another run\n"


@pytest.mark.parametrize("damaged", ["", "[]", '{"play/index'])
def test_without_a_note_of_what_was_written_nothing_is_written_over(project, damaged):
    list(lay_out(project))
    mine = next((project / "play").glob("02*"))
    mine.write_bytes(b"\xff")
    (project / "play" / ".written.json").write_text(damaged)
    assert [line.partition(":")[0] for line in lay_out(project)] == [f"play/{mine.name}"]
    assert mine.read_bytes() == b"\xff"


def test_what_else_lies_among_the_notebooks_is_not_copied_and_stops_nothing(project):
    folder = project / "notebooks"
    (folder / "01-notes.ipynb").write_text("{")
    shutil.copyfile(next(folder.glob("02*")), folder / "02_expansion_step_by_step-Copy1.ipynb")
    next(folder.glob("03*")).unlink()
    list(lay_out(project))
    copies = [path.name.partition("_")[0] for path in sorted((project / "play").glob("0*"))]
    assert copies == ["00", "01", "02", "04", "05", "06", "07"]


def test_what_was_changed_stays_what_was_not_follows_and_what_was_removed_comes_again(project):
    list(lay_out(project))
    assert list(lay_out(project)) == []
    mine, theirs, removed = (project / "play" / f"0{n}" for n in (1, 2, 4))
    mine, theirs, removed = (next((project / "play").glob(f"{path.name}*")) for path in (mine, theirs, removed))
    mine.write_text("{}")
    duplicate = shutil.copyfile(theirs, theirs.with_stem(f"{theirs.stem}-Copy1"))
    removed.unlink()
    for name in (mine.name, theirs.name):
        source = project / "notebooks" / name
        source.write_text(source.read_text().replace("**Question.**", "**The question.**"))
    said = list(lay_out(project))
    assert [line.partition(":")[0] for line in said] == [f"play/{p.name}" for p in (mine, theirs, removed)]
    assert "left as you changed or ran it" in said[0]
    assert mine.read_text() == "{}"
    assert "**The question.**" in theirs.read_text()
    assert "**Question.**" in duplicate.read_text()


def test_a_copy_that_was_only_opened_follows_and_one_that_was_run_stays(project):
    list(lay_out(project))
    opened, ran = (next((project / "play").glob(f"{number}*")) for number in ("02", "04"))
    for path in (opened, ran, project / "play" / "index.ipynb"):
        notebook = nbformat.read(path, 4)
        notebook.metadata["language_info"] = {"name": "python", "version": "3"}  # as JupyterLab does
        if path == ran:
            code = next(cell for cell in notebook.cells if cell.cell_type == "code")
            code.outputs.append(nbformat.v4.new_output("stream", text="mine"))
        nbformat.write(notebook, path)
    for name in (f"notebooks/{opened.name}", f"notebooks/{ran.name}", "docs/play.md"):
        source = project / name
        source.write_text(source.read_text().replace("**Question.**", "**Ask.**").replace("**Try**", "**Do**"))
    assert [line.split()[:2] for line in lay_out(project)] == [
        ["play/index.ipynb:", "new"],
        [f"play/{opened.name}:", "new"],
        [f"play/{ran.name}:", "left"],
    ]
    assert "mine" in ran.read_text()


def test_a_copy_is_one_of_the_notebook_whatever_profile_that_was_left_with(project):
    source = next((project / "notebooks").glob("02*"))
    source.write_text(source.read_text().replace('profile: str = \\"cpu\\"', 'profile: str = \\"smoke\\"'))
    list(lay_out(project))
    assert read_notebook(project / "play" / source.name, "play").parameters["profile"].default == "play"


def test_the_index_opens_without_a_question_and_links_to_the_copies(project):
    list(lay_out(project))
    index = nbformat.read(project / "play" / "index.ipynb", 4)
    nbformat.validate(index)
    assert index.metadata.kernelspec.name == "python3"
    (cell,) = index.cells
    links = [part.partition(")")[0] for part in cell.source.split("](")[1:]]
    assert len(links) >= 8
    assert all((project / "play" / link).is_file() for link in links)


@pytest.mark.parametrize(("profile", "found"), [("cpu", "play"), ("study", "play"), ("smoke", "play"), ("my", "my")])
def test_by_hand_the_profiles_of_the_runner_name_the_folders_of_play(profile, found, monkeypatch):
    monkeypatch.delattr(builtins, "__IPYTHON__", raising=False)
    monkeypatch.delenv("APEXLIB_RUNNER", raising=False)
    assert folders(profile).results.name == profile
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert {path.name for path in (folders(profile).results, folders(profile).figures)} == {found}
    assert folders(profile, ROOT).results.name == profile  # the very folder
    monkeypatch.setenv("APEXLIB_RUNNER", "1")
    assert folders(profile).results.name == profile


def by_hand(path: Path, **values) -> None:
    """Run a notebook as an editor does, with other values of parameters."""
    notebook = nbformat.read(path, 4)
    at = next(index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    changed = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(changed))
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute()


def contents(root: Path) -> dict[str, str]:
    """Hashes of all that is not of play."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    kept = (path for path in files if not {"play", "cache", "__pycache__"} & {*path.parts})
    return {path.as_posix(): file_hash(root / path) for path in kept}


def test_what_is_run_by_hand_leaves_what_the_runner_wrote_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    toy = Project(tmp_path).make()
    opening = "from apexlib.suite.folders import folders, needed\npaths = folders(profile)"
    write = "for folder in (paths.results, paths.figures):\n    folder.mkdir(parents=True, exist_ok=True)"
    write += "\n    (folder / 'a.csv').write_text(f'n\\n{n}\\n')"
    read = "n = int(needed(paths.results / 'a.csv', '00').read_text().split()[1])"
    writes = [f"{kind}/{{profile}}/a.csv" for kind in ("data/results", "figures")]
    number = 'profile: str = "cpu"\nn: int = 3'
    toy.notebook("00_make", opening, write, parameters=number, writes={path: ["n"] for path in writes})
    twice = f"{read}\n(paths.results / 'b.csv').write_text(f'twice\\n{{2 * n}}\\n')"
    toy.notebook("01_use", opening, twice, needs=writes[:1], writes={"data/results/{profile}/b.csv": ["twice"]})
    toy.profile(notebooks={"00_make": {}, "01_use": {}})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "play.md").write_text("# Play\n")
    assert set(toy.run().values()) == {"done"}
    own, recorded = tmp_path / "data" / "results" / "play", contents(tmp_path)

    with pytest.raises(CellExecutionError, match=r"data/results/play/a.csv: not there yet; run notebook 00 first"):
        by_hand(tmp_path / "notebooks" / "01_use.ipynb")
    list(lay_out(tmp_path))
    by_hand(tmp_path / "play" / "01_use.ipynb")
    assert (own / "b.csv").read_text() == "twice\n6\n"  # from the recorded table
    for folder, n in (("play", 5), ("notebooks", 7)):
        for name in ("00_make", "01_use"):
            by_hand(tmp_path / folder / f"{name}.ipynb", **({"n": n} if name == "00_make" else {}))
        assert (own / "b.csv").read_text() == f"twice\n{2 * n}\n"
    assert contents(tmp_path) == recorded
    shutil.copy(tmp_path / "notebooks" / "00_make.ipynb", tmp_path / "notebooks" / "00_make-Copy1.ipynb")
    source = tmp_path / "notebooks" / "01_use.ipynb"
    source.write_text(source.read_text().replace('profile: str = \\"cpu', 'profile: str = \\"play'))
    assert {status for status, _ in toy.plan().values()} == {"skip"}


@pytest.mark.slow
def test_every_notebook_that_is_run_by_hand_leaves_the_rest_byte_for_byte(toy_study, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(toy_study))
    for name in ("docs", "data/results/cpu", "figures/cpu"):
        shutil.copytree(ROOT / name, toy_study / name, dirs_exist_ok=True)
    list(lay_out(toy_study))
    before, toy = contents(toy_study), read_profile("toy", toy_study / "notebooks" / "profiles")
    first = {"05": "run notebook 03 first", "01": "run notebook 00 first"}  # to their own models
    for name in first:
        with pytest.raises(CellExecutionError, match=first[name]):
            by_hand(next((toy_study / "play").glob(f"{name}*")))
    for path in sorted((toy_study / "play").glob("0*.ipynb")):
        values = resolve(read_notebook(toy_study / "notebooks" / path.name, "toy"), toy, {})
        by_hand(path, **{name: value for name, value in values.items() if name != "profile"})
    assert contents(toy_study) == before
    assert "halve" in set(pd.read_csv(toy_study / "data/results/play/ablations.csv")["variant"])


def test_what_has_to_run_first_is_one_line(project, monkeypatch):
    monkeypatch.chdir(project)
    list(lay_out(project))
    (project / "data/models/python-3m").mkdir(parents=True)  # the only model of a fresh clone
    results = project / "data/results/play"
    with pytest.raises(NotReadyError, match=r"pretrained/.*is not there; run notebook 00 first") as caught:
        models_table(results)
    assert caught.value._render_traceback_() == [f"NotReadyError: {caught.value}"]
    with pytest.raises(NotReadyError, match=r"instruction/.*are not there; run notebook 03 first"):
        chosen_runs(results)
    with pytest.raises(NotReadyError, match=r"data/results/none/models.csv: not there yet; run notebook 00 first"):
        models_table(project / "data/results/none")
    with pytest.raises(NotReadyError, match=r"instruction.csv: not there yet; run notebook 03 first"):
        chosen_runs(project / "data/results/none")


def test_a_notebook_shows_that_line_and_no_traceback(tmp_path):
    code = "from apexlib.suite.bases import models_table\nfrom pathlib import Path\nmodels_table(Path('none'))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (shown,) = notebook.cells[0].outputs
    assert shown.traceback == ["NotReadyError: none/models.csv: not there yet; run notebook 00 first"]


# does a run agree with the record?


def rewrite(path: Path, change) -> None:
    table = pd.read_csv(path)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


def test_tables_that_agree_and_where_others_do_not(project):
    found = agreement("cpu", project)
    assert set(found["agrees"]) == {"equal"}
    assert found.groupby("folder").size().to_dict() == {
        folder: len([*(ROOT / folder).glob("*.csv")]) for folder in ("data/results/cpu", "figures/cpu")
    }
    results = project / "data" / "results" / "cpu"

    def scaled(column, by, rows=slice(None)):
        def change(table):
            table.loc[rows, column] *= by

        return change

    rewrite(results / "imbalance.csv", scaled("cv", 1 + 1e-8))
    rewrite(results / "masking.csv", scaled("loss", 1.5, slice(0, 1)))
    rewrite(results / "instruction.csv", scaled("seconds_per_step", 3.0))
    rewrite(results / "models.csv", lambda table: table.drop(index=0))
    rewrite(results / "updates.csv", lambda table: table.drop(columns="relative"))
    rewrite(results / "claims.csv", lambda table: table.loc.__setitem__((2, "verdict"), "opposite"))
    (results / "corpus.csv").unlink()
    (results / "new.csv").write_text("a\n1\n")
    by_table = agreement("cpu", project).set_index(["folder", "table"]).loc["data/results/cpu"]
    number = pd.read_csv(ROOT / "data/results/cpu/claims.csv")["number"][2]
    was = pd.read_csv(ROOT / "data/results/cpu/claims.csv")["verdict"][2]
    expected = {
        "imbalance": ("to 1e-6", ""),
        "instruction": ("equal", ""),
        "claims": ("different", f"claim {number} opposite, was {was}"),
        "corpus": ("different", "is missing"),
        "new": ("different", "not recorded in the last commit"),
        "updates": ("different", "columns: relative"),
    }
    assert {name: tuple(by_table.loc[name, ["agrees", "where"]]) for name in expected} == expected
    assert by_table.loc["masking", "where"].startswith("loss: 2 of ")
    assert "rows, recorded" in by_table.loc["models", "where"]


def test_figures_and_what_was_recorded_of_the_same_in_other_settings_are_compared_too(project, monkeypatch, capsys):
    for name in ("cpu-256", "cpu-mine", "cpus"):
        shutil.copytree(project / "data/results/cpu", project / "data/results" / name)
    shutil.copytree(project / "figures/cpu", project / "figures/cpu-256")
    (project / "data/results/cpu-mine/masking.csv").unlink()  # of no concern, since it is not recorded
    for command in (["add", "-f", "data/results/cpu-256", "data/results/cpus", "figures"], ["commit", "-qm", "more"]):
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *own, *command], cwd=project, check=True)
    monkeypatch.chdir(project)
    tables, figures = (len([*(ROOT / kind / "cpu").glob("*.csv")]) for kind in ("data/results", "figures"))
    assert cli.main(["compare"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    others = [["data/results/cpu-256/", tables], ["figures/cpu/", figures], ["figures/cpu-256/", figures]]
    assert said[tables:] == [[name, str(count), "equal"] for name, count in others]
    rewrite(project / "figures/cpu/masking_curve.csv", lambda table: table.drop(index=0))
    (project / "data/results/cpu-256/claims.csv").unlink()
    assert cli.main(["compare"]) == 1
    said = {name: rest for name, *rest in (line.split() for line in capsys.readouterr().out.splitlines())}
    assert said["figures/cpu/masking_curve"][0] == said["data/results/cpu-256/claims"][0] == "different"
    assert said["data/results/cpu-256/masking"] == ["equal"]
    assert said["figures/cpu-256/"] == [str(figures), "equal"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], ("equal", "")),
        ([1.0, float("inf")], [1.0, float("inf")], ("equal", "")),
        ([1.0, 2.0], [1.0, float("nan")], ("different", "a: 1 of 2 rows, by inf at most")),
        (["x", "y"], ["x", "z"], ("different", "a: 1 of 2 rows")),
        ([0.0, 2.0], [1e-300, 2.0], ("different", "a: 1 of 2 rows, by 1e-300 at most")),
        ([0.0, 2.0], [0.0, 2.0 + 1e-7], ("to 1e-6", "")),
        ([0.0, 2.0], [50.0, 2.0], ("different", "a: 1 of 2 rows, by 50 at most")),
        ([True, False], [True, True], ("different", "a: 1 of 2 rows, by 1 at most")),
    ],
)
def test_numbers_and_words_are_compared(old, new, expected):
    assert compared(pd.DataFrame({"a": old}), pd.DataFrame({"a": new})) == expected


def test_the_command_says_it_by_its_exit_code(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert cli.main(["compare"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["ablations", "equal"]
    rewrite(project / "data/results/cpu/masking.csv", lambda table: table.drop(index=0))
    assert cli.main(["compare"]) == 1
    assert cli.main(["compare", "--profile", "smoke"]) == 2
    assert "data/results/smoke: no tables; need a run, make reproduce PROFILE=smoke" in capsys.readouterr().err
    shutil.copytree(project / "data/results/cpu", project / "data/results/smoke")
    assert cli.main(["compare", "--profile", "smoke"]) == 2
    assert "data/results/smoke: the last commit has no tables there to compare with" in capsys.readouterr().err
    assert cli.main(["play"]) == 0
    assert json.loads((project / "play" / ".written.json").read_text())
