"""Playing is safe: what is changed and run in JupyterLab leaves the record, the runner and git as they were."""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from apexlib.suite import cli
from apexlib.suite.agreement import agreement, compared
from apexlib.suite.bases import models_table
from apexlib.suite.comparison import chosen_runs
from apexlib.suite.folders import NotReadyError, folders
from apexlib.suite.notebooks import read_notebook
from apexlib.suite.play import lay_out

ROOT = Path(__file__).parents[1]


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
    assert "left as you changed it" in said[0]
    assert mine.read_text() == "{}"
    assert "**The question.**" in theirs.read_text()
    assert "**Question.**" in duplicate.read_text()


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


@pytest.mark.parametrize(("profile", "found"), [("cpu", "play"), ("study", "play"), ("smoke", "smoke"), ("my", "my")])
def test_a_committed_notebook_that_jupyterlab_runs_does_not_write_over_the_record(profile, found, monkeypatch):
    assert folders(profile).results.name == profile
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/03_instruction_tuning.ipynb")
    assert {path.name for path in (folders(profile).results, folders(profile).figures)} == {found}
    assert folders(profile, ROOT).results.name == profile  # as the runner asks


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
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

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
    by_table = agreement("cpu", project).set_index("table")
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


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], ("equal", "")),
        ([1.0, float("inf")], [1.0, float("inf")], ("equal", "")),
        ([1.0, 2.0], [1.0, float("nan")], ("different", "a: 1 of 2 rows, by inf at most")),
        (["x", "y"], ["x", "z"], ("different", "a: 1 of 2 rows")),
        ([0.0, 2.0], [1e-300, 2.0], ("different", "a: 1 of 2 rows, by 1e-300 at most")),
        ([0.0, 2.0], [0.0, 2.0 + 1e-7], ("to 1e-6", "")),
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
    assert cli.main(["play"]) == 0
    assert json.loads((project / "play" / ".written.json").read_text())
