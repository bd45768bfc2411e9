"""Trials on a real Dask scheduler with two workers: what processes of this machine give, also when a worker dies."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import build
from faults import CONFIG, digest
from test_reproduce import Project, main
from test_training import Blocks, arguments

from apexlib.suite import trials
from apexlib.suite.trials import OutOfTimeError, Trial, run_trials, time_left
from apexlib.training.stages import train_in_stages

HERE = Path(__file__).parent
SECONDS = 180  # at most, until what is waited for has come
NEEDS = "needs Dask: pip install 'apexlib[cluster]'"


class Slow(Blocks):
    def __getitem__(self, row):
        time.sleep(0.01)
        return super().__getitem__(row)


def tune(folder, seed):
    """Train a model that is kept at every step; note who began with it."""
    note(folder, seed)
    given = arguments(folder / "run", seed=seed, save_strategy="steps", save_steps=1)
    return {"digest": digest(train_in_stages(build("llama", seed=seed), Slow(), given, CONFIG, resume=True))}


def tell(folder, number, fail=False):
    """Tell what a trial can see of where it runs."""
    note(folder, number)
    if fail:
        raise ValueError(f"{number} is no good")
    import torch

    return {"cwd": os.getcwd(), "left": time_left(), "threads": torch.get_num_threads(), "number": number}


def note(folder, what):
    with (folder.parent / "began").open("a") as file:
        file.write(f"{os.getpid()} {what}\n")


def began(folder):
    """Processes and what they began with, in order."""
    path = folder / "began"
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def some(*numbers, **settings):
    return [Trial(f"n{number}", {"number": number, **settings}) for number in numbers]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder of which the workers can import modules, beside this one."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="module")
def address(tmp_path_factory, modules):
    """A scheduler and two workers, each in a process that is started anew if it dies."""
    pytest.importorskip("distributed", reason=NEEDS)
    folder = tmp_path_factory.mktemp("dask")
    file, paths = folder / "scheduler.json", [HERE.parent, HERE, modules, os.environ.get("PYTHONPATH")]
    around = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))), "OMP_NUM_THREADS": "1"}
    around |= {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "10"}
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = ["worker", "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    worker += ["--local-directory", str(folder)]
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{command}", "--scheduler-file", str(file), *more],
                env=around,
                cwd=folder,
                stdout=log,
                stderr=log,
            )
            for command, *more in (scheduler, worker)
        ]
        try:
            wait_until(lambda: file.is_file() and file.read_text().strip())
            address = json.loads(file.read_text())["address"]
            wait_until(lambda: workers(address) == 2)
            yield address
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(timeout=60)


@pytest.fixture
def cluster(address, monkeypatch):
    monkeypatch.setenv(trials.WORKERS, address)
    return address


def workers(address):
    from distributed import Client

    with Client(address, timeout=f"{SECONDS}s", set_as_default=False) as client:
        return len(client.ncores())


def wait_until(holds):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What four trainings give on this machine."""
    tuned = [Trial(f"seed-{seed}", {"seed": seed}) for seed in range(4)]
    return tuned, run_trials(tune, tuned, tmp_path_factory.mktemp("local"), workers=2)


def killed_at(moment, folder, local):
    """Train on the cluster; kill, so many seconds after a first trial began, the worker that began the last one."""
    tuned, expected = local
    struck = []

    def kill():
        wait_until(lambda: began(folder))
        time.sleep(moment)
        process, seed = began(folder)[-1]
        if "result" not in json.loads((folder / f"seed-{seed}" / trials.RESULT).read_text()):
            struck.append(seed)
        os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = run_trials(tune, tuned, folder)
    killer.join()
    assert found == expected
    again = Counter(seed for _, seed in began(folder)) - Counter(range(len(tuned)))
    assert again <= Counter(struck)  # whatever else there was of it is not done again
    return bool(again)


@pytest.mark.case("a run's trainings on a Dask cluster, `--workers tcp://host:8786`, workers killed", "works")
def test_workers_of_a_cluster_give_the_bits_that_processes_here_give(cluster, local, tmp_path):
    tuned, expected = local
    assert run_trials(tune, tuned, tmp_path) == expected
    assert len({process for process, _ in began(tmp_path)} - {os.getpid()}) == 2
    assert run_trials(tune, tuned, tmp_path) == expected
    assert sorted(seed for _, seed in began(tmp_path)) == [0, 1, 2, 3]


def test_a_worker_that_is_killed_repeats_the_trial_under_way_and_no_other(cluster, local, tmp_path):
    assert killed_at(0.5, tmp_path, local)


@pytest.mark.slow
def test_workers_killed_at_ten_random_moments(cluster, local, tmp_path, tally):
    draw = random.Random(0)
    struck = 0
    for number in range(10):
        struck += killed_at(draw.uniform(0, 3), tmp_path / f"{number}", local)
        wait_until(lambda: workers(cluster) == 2)
    assert struck >= 3
    tally("cluster", "SIGKILL of a Dask worker at random moments of a set of trainings", 10, 10)


def test_a_trial_runs_where_it_was_sent_from_with_its_threads_and_its_deadline(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() + 60))
    for number, deadline in ((1, True), (2, False)):  # of the first run nothing is left in a worker
        for result in run_trials(tell, some(number, 10 * number), Path("out"), threads=number):
            assert (result["cwd"], result["threads"]) == (str(tmp_path), number)
            assert 0 < result["left"] < 60 if deadline else result["left"] is None
        monkeypatch.delenv("APEXLIB_DEADLINE", raising=False)
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() - 1))
    with pytest.raises(OutOfTimeError, match="1 of 3 trials are left: n3"):
        run_trials(tell, some(1, 2, 3), Path("out"))


def test_a_failure_comes_back_and_spares_the_others(cluster, tmp_path):
    with pytest.raises(RuntimeError, match="1 of 3 trials failed, first n2: ValueError: 2 is no good"):
        run_trials(tell, [*some(1), *some(2, fail=True), *some(3)], tmp_path)
    assert sorted(number for _, number in began(tmp_path)) == [1, 2, 3]
    assert len(run_trials(tell, some(1, 3), tmp_path)) == 2
    assert len(began(tmp_path)) == 3


def test_two_runners_in_one_folder_do_no_trial_twice(cluster, tmp_path):
    every = some(*range(12))

    def runner(_):
        try:
            return run_trials(tell, every, tmp_path)
        except OutOfTimeError as error:  # the other one was at a trial
            return error.left

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(runner, range(2)))
    assert [result["number"] for result in run_trials(tell, every, tmp_path)] == [*range(12)]
    assert sorted(number for _, number in began(tmp_path)) == [*range(12)]


def test_a_scheduler_that_goes_ends_the_set(tmp_path, monkeypatch):
    @contextmanager
    def gone(*_):
        yield lost, lambda: 2

    def lost(*_):
        (future := Future()).cancel()
        future.set_running_or_notify_cancel()
        return future

    monkeypatch.setenv(trials.WORKERS, "tcp://host:8786")
    monkeypatch.setattr(trials, "_cluster", gone)
    with pytest.raises(RuntimeError, match="2 of 3 trials failed, first n1: its scheduler is gone"):
        run_trials(tell, some(1, 2, 3), tmp_path)


def test_a_worker_older_than_the_code_is_refused(cluster, modules, tmp_path, monkeypatch):
    """Else results of the old code would pass for those of the new one."""
    monkeypatch.syspath_prepend(modules)
    for value in (1, 2):
        (modules / "edited.py").write_text(f"def run(folder, number):\n    return {{'value': {value} + 0 * number}}\n")
        shutil.rmtree(modules / "__pycache__", ignore_errors=True)
        sys.modules.pop("edited", None)
        trials._software.cache_clear()
        import edited

        if value == 1:
            assert run_trials(edited.run, some(1, 2, 3, 4), tmp_path) == [{"value": 1}] * 4
    with pytest.raises(RuntimeError, match=r"first n\d: .* has other files, code or versions; need /.* its worker"):
        run_trials(edited.run, some(1, 2, 3, 4), tmp_path)


def test_a_notebook_hands_its_trials_to_the_workers(address, modules, tmp_path, monkeypatch, capsys):
    project = Project(tmp_path / "project").make()
    job = "import os\ndef run(folder, number):\n    return {'number': number, 'process': os.getpid()}\n"
    (modules / "job.py").write_text(job)
    project.notebook(
        "00_trials",
        f"""
        import sys
        from pathlib import Path
        sys.path.append({str(modules)!r})
        from job import run
        from apexlib.suite.trials import Trial, run_trials
        trials = [Trial(f"t{{number}}", {{"number": number}}) for number in range(4)]
        found = run_trials(run, trials, Path("../data/trials"))
        Path("../data/t.csv").write_text("x\\n" + "".join(f"{{each['process']}}\\n" for each in found))
        """,
        writes={"data/t.csv": ["x"]},
    )
    project.profile(notebooks={"00_trials": None})
    (project.root / "data").mkdir()
    monkeypatch.chdir(project.root)
    assert main(["--workers", address]) == 0, capsys.readouterr().err
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        there = set(client.run(os.getpid).values())
    assert {int(line) for line in (project.root / "data" / "t.csv").read_text().split()[1:]} <= there
    assert project.manifest["notebooks"]["00_trials"]["trials"] == 4


def test_without_dask_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    project = Project(tmp_path).make().notebook("00_any", "1").profile(notebooks={"00_any": None})
    monkeypatch.chdir(project.root)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["--workers", "tcp://host:8786"]) == 2
    said = "error: workers tcp://host:8786: need Dask, pip install 'apexlib[cluster]', here and there\n"
    assert capsys.readouterr().err == said
    assert project.run() == {"00": "done"}


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1:1", "nowhere://host", "host"])
def test_an_address_without_a_scheduler_is_refused(wrong, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed", reason=NEEDS)
    project = Project(tmp_path).make().notebook("00_any", "1").profile(notebooks={"00_any": None})
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(trials, "_PATIENCE", "1s")
    assert main(["--workers", wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: workers {wrong}: need the address of a Dask scheduler (")
