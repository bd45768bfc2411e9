"""What a run shows while it goes on and in the end: bars on a terminal, lines in a log."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from contextlib import closing, suppress
from functools import partial

import nbformat
import pytest
from test_reproduce import COMMAND, Project

from apexlib.progress import hide_progress, progress
from apexlib.suite import bars
from apexlib.suite.bars import Counts, RunBars, seconds_left
from apexlib.suite.notebooks import read_profile
from apexlib.suite.outcome import outcome
from apexlib.suite.runner import Job

TOY = """
import time

def wait(folder, seconds):
    time.sleep(seconds)
    return {}
"""
TRIALS = """
    from pathlib import Path
    from apexlib.suite.trials import Trial, run_trials
    from toy import wait
    trials = [Trial(name, {"seconds": 0.7}) for name in "abc"]
    run_trials(wait, trials, Path("../data/runs/cpu/toy"), workers=1)
"""
PAUSE = """
    import time
    time.sleep(1.5)
    table = Path("../data/results/cpu/t.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("x\\n1\\n")
"""


@pytest.fixture
def toy(tmp_path):
    project = Project(tmp_path).make()
    (tmp_path / "toy.py").write_text(TOY)
    project.notebook("00_trials", TRIALS, PAUSE, writes={"data/results/{profile}/t.csv": ["x"]})
    return project.notebook("01_other", "1").profile(notebooks={"00_trials": {}, "01_other": {}})


def on_a_terminal(folder, stop=None):
    """Run the project in a folder on a terminal of 90 columns, until `stop` is shown; return exit code and text."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 90))
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    written = b""
    with subprocess.Popen(COMMAND, cwd=folder, stdout=inner, stderr=inner, preexec_fn=hear) as process:
        os.close(inner)
        with suppress(OSError):  # the other end is closed
            while found := os.read(outer, 4096):
                written += found
                if stop and stop in written.decode(errors="ignore"):
                    process.send_signal(signal.SIGINT)
                    stop = None
    os.close(outer)
    return process.returncode, written.decode()


def left_on_the_screen(text):
    """What of a text of rewritten lines is left: each line as it was written last."""
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n")
    return [line.rsplit("\r", 1)[-1] for line in lines]


def test_a_terminal_shows_notebook_trials_a_clock_and_where_all_is(toy):
    code, text = on_a_terminal(toy.root)
    assert code == 0
    assert "notebook 1 of 2 " in text
    assert "notebook 2 of 2 " in text
    assert re.search(r"00_trials  cell 2 of 3  trials [12] of 3 \|.* about \d\d:\d\d left\]", text)
    assert re.search(r"00_trials  cell \d of 3  trials 3 of 3 ", text)
    clock = set(re.findall(r"00_trials .*?\[(\d\d:\d\d)", text))
    assert len(clock) >= 4
    assert max(len(part) for part in re.split(r"[\r\n]", text)) <= 120  # 90, and what moves the cursor
    told = left_on_the_screen(text)
    assert told[-3:] == ["tables     1 in data/results/cpu", "notebooks  2 in notebooks/executed/cpu", ""]
    executed = nbformat.read(toy.runs / "00_trials.ipynb", 4)
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"execute_result"}  # what cells return, and no bar
    assert all(set(output.data) == {"text/plain"} for output in outputs)
    assert "widgets" not in executed.metadata
    assert not list(toy.runs.glob("*.trials"))
    assert [toy.manifest["notebooks"][name].get("trials") for name in ("00_trials", "01_other")] == [3, None]
    assert Job("cpu", toy.root).expected() == {name: {"seconds": 0.0} for name in ("00_trials", "01_other")}


def test_an_interrupt_on_a_terminal_ends_with_its_message(toy):
    code, text = on_a_terminal(toy.root, stop="trials 1 of 3")
    assert code == 130
    assert left_on_the_screen(text)[-2:] == ["interrupted: the notebook under way starts again next time", ""]


def test_a_log_has_a_line_at_each_start_and_end_and_no_control_characters(toy):
    done = subprocess.run(COMMAND, cwd=toy.root, capture_output=True, text=True, check=True)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout + done.stderr)
    told = [line.split("  ")[:2] for line in done.stderr.splitlines() if line[0] != " "]  # of long cells
    names = ("00_trials", "01_other")
    assert told == [[name, what] for name in names for what in ("start: never run", "done")]
    assert done.stdout.splitlines()[-1] == "notebooks  2 in notebooks/executed/cpu"


def test_a_log_is_told_of_trials_now_and_then(monkeypatch, capsys):
    with closing(RunBars({"00_any": {"seconds": 700.0}})) as shown:
        shown.begin("00_any")
        shown.show(1, 2, Counts(0, 1, 10))
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(bars, "_BETWEEN_LINES", 0.0)
        shown.show(1, 2, Counts(5, 2, 10))
        shown.show(1, 2, Counts(5, 2, 10))
    assert re.fullmatch(r"  trials 7 of 10, about 3 min \d+ s left\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("elapsed", "counts", "past", "left"),
    [
        (100, Counts(), {"seconds": 300}, 200),
        (400, Counts(), {"seconds": 300}, 0),
        (0, Counts(0, 0, 60), {"seconds": 300}, 300),
        (0, Counts(45, 0, 60), {"seconds": 300}, 75),
        (0, Counts(0, 0, 60), {"seconds": 300, "trials": 30}, 600),
        (0, Counts(0, 0, 60), {"seconds": 300, "trials": 0}, None),  # it kept all that it had
        (10, Counts(60, 0, 60), {"seconds": 300, "trials": 0}, 290),
        (10, Counts(), {}, None),
        (10, Counts(20, 10, 60), {}, 30),
        (100, Counts(0, 15, 60), {"seconds": 900}, 0.75 * 800 + 0.25 * 300),  # the record weighs what is not done
        (100, Counts(0, 60, 60), {"seconds": 900}, 0),
    ],
)
def test_the_time_left_is_that_of_the_record_and_ever_more_that_of_the_trials_done(elapsed, counts, past, left):
    assert seconds_left(elapsed, counts, past) == (left if left is None else pytest.approx(left))


@pytest.mark.parametrize("manifest", ["", "[]", '{"notebooks": []}', '{"notebooks": {"00_trials": {"seconds": "x"}}}'])
def test_a_damaged_record_tells_nothing(toy, manifest):
    toy.table("manifest.json").parent.mkdir(parents=True)
    toy.table("manifest.json").write_text(manifest)
    assert Job("cpu", toy.root).expected() == {"00_trials": {}, "01_other": {}}


def test_the_record_of_a_notebook_that_will_run_is_what_it_took(toy):
    toy.table("manifest.json").parent.mkdir(parents=True)
    past = {"00_trials": {"seconds": 12.5, "trials": 3, "device": "cpu"}}
    toy.table("manifest.json").write_text(json.dumps({"notebooks": past}))
    assert Job("cpu", toy.root).expected() == {"00_trials": {"seconds": 12.5, "trials": 3}, "01_other": {}}


def test_the_end_tells_verdicts_what_changed_and_the_page(toy, monkeypatch):
    monkeypatch.chdir(toy.root)
    toy.notebook("02_claims", "1", writes={"data/results/{profile}/claims.csv": ["verdict"]})
    toy.profile(notebooks=dict.fromkeys(("00_trials", "01_other", "02_claims")))
    table, page = toy.table("claims.csv"), toy.root / "figures" / "cpu" / "overview.html"
    for path in (table, page):
        path.parent.mkdir(parents=True)
    table.write_text("number,verdict\n1,reproduced\n2,opposite\n3,reproduced\n")
    page.touch()
    read = read_profile("cpu", toy.root / "notebooks" / "profiles")
    tables, to_open = "tables     1 in data/results/cpu", "to open    figures/cpu/overview.html"
    assert [*outcome(read, toy.root, {"01_other"})] == [tables, to_open]
    counts = "verdicts   2 reproduced, 1 opposite"
    assert [*outcome(read, toy.root, {"02_claims"})] == [tables, counts, to_open]
    for command in (["init"], ["add", "data"], ["commit", "-m", "a"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *command], check=True, capture_output=True)
    same = "changed    none (against the last commit)"
    assert [*outcome(read, toy.root, {"02_claims"})] == [tables, counts, same, to_open]
    table.write_text("number,verdict\n1,reproduced\n2,undecided\n3,reproduced\n4,opposite\n")
    changed = "changed    claim 2 undecided, was opposite (against the last commit)"
    assert changed in outcome(read, toy.root, {"02_claims"})
    table.write_text("damaged")
    assert [*outcome(read, toy.root, {"02_claims"})] == [tables, to_open]


class Screen(io.StringIO):
    def __init__(self, *, watched):
        super().__init__()
        self.watched = watched

    def isatty(self):
        return self.watched


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("lab", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_shown_where_somebody_watches(terminal, lab, disabled, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", screen := Screen(watched=terminal))
    if disabled:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    if lab:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    shown = (terminal or lab) and not disabled
    assert hide_progress() is not shown
    assert list(progress(range(3), "counting sheep", file=screen)) == [0, 1, 2]
    assert ("counting sheep" in screen.getvalue()) == shown
    assert screen.getvalue().endswith("\r") == shown  # the line is free again
