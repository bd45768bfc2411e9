"""Evidence in pieces: killed at any moment and called again, it ends with the tables of a run left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_prepared import write_sources
from transformers import AutoConfig

from apexlib.analysis.budget import plan_budget
from apexlib.suite import evidence
from apexlib.suite.evidence import SCALES, Work, gather, llama, main, pieces, plan, seconds_in
from apexlib.suite.ledger import claims_table
from apexlib.suite.prepared import prepare
from apexlib.suite.trials import RESULT, OutOfTimeError

MEASURED = {"seconds_per_step", "peak_memory_mb", "path"}  # what no two runs share
TABLES = {
    "models", "loss_curve", "activations", "masking", "masking_sizes", "imbalance", "instruction", "learning_rates",
    "instruction_families", "instruction_pairs", "effective_rank", "updates", "rank_gain", "rank_correlation",
    "continued", "continued_rates", "continued_ratio", "ablations",
}  # fmt: skip
REAL = Path(__file__).parents[2] / "shared" / "data"
_TOY = SCALES["toy"]
TINY = replace(
    _TOY,
    models={"less": llama(8, 1, 2, 2, 16), "more": llama(16, 1, 4, 2, 32)},
    pretraining=_TOY.pretraining | {"context": 16, "steps": 32},
    blocks=4,
    difference=_TOY.difference | {"assessment_blocks": 8},
    instruction=_TOY.instruction | {"methods": ("full", "apex", "lora"), "learning_rates": (1e-2,)},
    conversations=_TOY.conversations | {"train": 40, "valid": None, "test": 8, "max_new_tokens": 2},
    continued=_TOY.continued | {"methods": ("full", "apex")},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(**write_sources(tmp_path_factory.mktemp("sources")), out=folder, vocabulary=300, max_length=128)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run left alone, in this process."""
    out = tmp_path_factory.mktemp("alone")
    gather(Work(TINY, data, out, workers=1))
    return out


def assert_same_tables(out, other):
    names = {path.stem for path in (out / "tables").glob("*.csv")}
    assert names == {path.stem for path in (other / "tables").glob("*.csv")}
    for name in names:
        mine, theirs = (pd.read_csv(folder / "tables" / f"{name}.csv") for folder in (out, other))
        same = [column for column in mine if column not in MEASURED]
        pd.testing.assert_frame_equal(mine[same], theirs[same], check_exact=True, obj=name)


def test_tables_are_those_of_the_notebooks(alone):
    tables = {path.stem: pd.read_csv(path) for path in (alone / "tables").glob("*.csv")}
    assert set(tables) == TABLES
    record = Path(__file__).parents[1] / "data" / "results" / "cpu"
    for path in record.glob("*.csv"):
        if path.stem in tables:
            missing = set(pd.read_csv(path, nrows=1)) - set(tables[path.stem])
            assert not missing, path.stem
    runs = tables["instruction"]
    assert runs.groupby("method")["seed"].nunique().eq(len(TINY.seeds)).all()
    assert runs["exact_match"].notna().eq(runs["chosen"]).all()
    assert set(tables["instruction_families"]["family"]) == {"arithmetic", "arc_easy"}
    verdicts = claims_table(alone / "tables").set_index("claim")
    assert verdicts.loc[["masking-heads", "instruction-full-loss", "rank-full", "continued-fewer"], "n"].eq(2).all()
    assert {path.stem for path in (alone / "figures").glob("*.svg")} >= {"masking_curve", "instruction", "continued"}


def test_a_second_call_has_nothing_to_do(alone, data):
    before, figures = {path: path.stat().st_mtime_ns for path in alone.rglob(RESULT)}, plt.get_fignums()
    gather(Work(TINY, data, alone, seconds=-1, workers=1))  # no time: a piece would not be started
    assert plt.get_fignums() == figures  # closed again
    assert {path: path.stat().st_mtime_ns for path in alone.rglob(RESULT)} == before


def test_killed_at_any_moment_it_ends_with_the_same_tables(alone, data, tmp_path):
    call = [sys.executable, __file__, str(data), str(tmp_path)]
    done = 0
    for _ in range(2):
        process = subprocess.Popen(call, start_new_session=True)
        deadline, goal = time.monotonic() + 300, done + random.randint(2, 25)
        while (done := len(list(tmp_path.rglob(RESULT)))) < goal and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(OutOfTimeError):
        gather(Work(TINY, data, tmp_path, seconds=-1, workers=1))
    (tmp_path / "tables").mkdir(exist_ok=True)
    (tmp_path / "tables" / ".partial-models-0.csv").write_text(
        "model,se", encoding="utf-8"
    )  # as a killed call leaves it
    gather(Work(TINY, data, tmp_path, workers=1))
    assert_same_tables(tmp_path, alone)


def test_a_base_model_that_learnt_nothing_is_refused(data, tmp_path):
    lazy = replace(TINY, pretraining=TINY.pretraining | {"learning_rate": 1e-9}, rivals=("trigram",), seeds=(0,))
    with pytest.raises(ValueError, match=r"base models that do not beat trigram \(\d\.\d+ nats per token\).*'more'"):
        gather(Work(lazy, data, tmp_path, workers=1))
    assert not (tmp_path / "instruction").exists()


def test_the_plan_counts_the_pieces_that_there_are(alone, data):
    assert pieces(TINY, data)["count"].sum() == len(list(alone.rglob(RESULT))) - 1  # n-grams are no piece of time


@pytest.mark.parametrize("scale", ["25m", "110m"])
def test_a_piece_fits_a_call_on_a_gpu(scale, data):
    table = plan(SCALES[scale], data, tflops=150)
    assert (table["seconds"] < 120).all()
    assert (table["peak_gib"].dropna() < 78).all()


def test_a_plan_takes_its_costs_from_the_planner(data):
    table = plan(TINY, data, tflops=1e-9).set_index("piece")  # so slow that nothing but products counts
    assert table["minutes"].sum() > 1000 * plan(TINY, data, tflops=1)["minutes"].sum()
    how, shape = TINY.continued, AutoConfig.for_model(**TINY.models["more"], vocab_size=300)
    batch, length = how["batch_size"], TINY.pretraining["context"]
    for method in ("full", "apex"):
        budget = plan_budget(shape, batch=batch, length=length, methods=[method]).iloc[0]
        piece = table.loc[f"continued {method}"]
        assert piece["seconds"] > how["steps"] * budget["flops_per_step"] / 1e3
        assert piece["tokens"] == how["steps"] * batch * length
        assert piece["peak_gib"] == pytest.approx(budget["train_mib"] / 1024, rel=1e-3)


def test_exit_codes_and_what_is_said(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SCALES, "toy", TINY)
    how = ["--data", str(data), "--out", str(tmp_path), "--scale", "toy"]
    assert main([*how, "--budget", "0s"]) == evidence.UNFINISHED
    assert "pieces are left: call again" in capsys.readouterr().out
    assert main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert seconds_in("1h2m3.5s") == 3723.5


def test_importing_it_needs_no_more_than_a_gpu_machine_has():
    hidden = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'papermill', 'pyarrow', 'IPython')));"
    subprocess.run([sys.executable, "-c", f"{hidden} import apexlib.suite.evidence"], check=True)


@pytest.mark.evidence
def test_the_whole_toy_on_real_data_killed_and_resumed(tmp_path):
    if not REAL.is_dir():
        pytest.skip("no real data beside the project")
    run = [sys.executable, "-m", "apexlib.suite.evidence"]
    names = {"general": "corpus/general-*.gz", "domain": "corpus/domain-*.gz", "chat": "instruct/*.jsonl"}
    files = [word for name, many in names.items() for word in (f"--{name}", *map(str, sorted(REAL.glob(many))))]
    data = tmp_path / "data"
    subprocess.run([*run, "--prepare", *files, "--out", str(data)], check=True)
    assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) < 60e6
    toy = [*run, "--data", str(data), "--scale", "toy", "--out"]
    subprocess.run([*toy, str(tmp_path / "alone")], check=True)
    process = subprocess.Popen([*toy, str(tmp_path / "killed")], start_new_session=True)
    for _ in range(6):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(random.uniform(5, 30))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process = subprocess.Popen([*toy, str(tmp_path / "killed")], start_new_session=True)
    assert process.wait() == 0
    assert_same_tables(tmp_path / "killed", tmp_path / "alone")


if __name__ == "__main__":
    gather(Work(TINY, Path(sys.argv[1]), Path(sys.argv[2]), workers=1))
