"""Sets of runs: kept once finished, continued where they stopped, the same whoever runs them."""

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apexlib.progress import hide_progress
from apexlib.suite import trials
from apexlib.suite.bars import Counts, read_counts
from apexlib.suite.trials import OutOfTimeError, Trial, run_trials, time_left
from apexlib.training.interruption import Stop


def stored(run, trial, folder):
    """The result of a trial that is up to date, None for any other."""
    return trials._written(folder / trial.name, trials._key(run, trial)).get("result")


def square(folder, number, fail=False, die=False):
    """Square a number; note each call in a file beside the trials."""
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{number}\n")
    if fail:
        raise ValueError(f"{number} is no good")
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "note").write_text(str(number))
    return {"square": number**2, "threads": torch.get_num_threads()}


def some(*numbers, **changes):
    return [Trial(f"n{number}", {"number": number, **changes}) for number in numbers]


def calls(folder):
    path = folder / "calls"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def here(monkeypatch):
    """Run trials in this process, as where there is one core or a GPU."""
    monkeypatch.setattr(trials, "default_workers", lambda: 1)


def where(folder):
    return {"pid": os.getpid()}


@pytest.mark.parametrize(("asked", "here"), [("", True), ("1", True), ("2", False)])
def test_on_a_gpu_trials_run_side_by_side_where_that_is_asked_for(asked, here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "one")
    monkeypatch.setenv("APEXLIB_PROCESSES", asked)
    ran_in = {result["pid"] for result in run_trials(where, [Trial("a", {}), Trial("b", {})], tmp_path)}
    assert (ran_in == {os.getpid()}) is here


def test_results_come_in_order_and_are_made_once(here, tmp_path):
    assert [result["square"] for result in run_trials(square, some(3, 1, 2), tmp_path)] == [9, 1, 4]
    assert calls(tmp_path) == [3, 1, 2]
    assert [result["square"] for result in run_trials(square, some(1, 2, 3, 4), tmp_path)] == [1, 4, 9, 16]
    assert calls(tmp_path) == [3, 1, 2, 4]


def test_shares_are_done_apart_and_found_together(here, tmp_path, monkeypatch):
    """Each process of an array does its own part, whatever is done already; the last, and any other, find them all."""
    for part, done, left in (("2/3", [2, 5], "n1, n3, n4"), ("3/3", [3], "n1, n4"), ("2/3", [], "n1, n4")):
        monkeypatch.setenv("APEXLIB_SHARE", part)
        before = calls(tmp_path)
        with pytest.raises(OutOfTimeError, match=rf"of 5 trials are left: {left}"):
            run_trials(square, some(1, 2, 3, 4, 5), tmp_path)
        assert calls(tmp_path)[len(before) :] == done
    monkeypatch.setenv("APEXLIB_SHARE", "1/3")
    assert [result["square"] for result in run_trials(square, some(1, 2, 3, 4, 5), tmp_path)] == [1, 4, 9, 16, 25]
    monkeypatch.delenv("APEXLIB_SHARE")
    run_trials(square, some(1, 2, 3, 4, 5), tmp_path)
    assert sorted(calls(tmp_path)) == [1, 2, 3, 4, 5]


def test_a_trial_that_another_process_is_at_is_passed_over(here, tmp_path):
    with (tmp_path / ".n2.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutOfTimeError, match="1 of 3 trials are left: n2"):
            run_trials(square, some(1, 2, 3), tmp_path)
    assert [result["square"] for result in run_trials(square, some(1, 2, 3), tmp_path)] == [1, 4, 9]
    assert calls(tmp_path) == [1, 3, 2]


def test_what_a_result_depends_on_makes_it_stale(here, tmp_path, monkeypatch):
    read = tmp_path / "read.txt"
    read.write_text("one")
    trial = [Trial("n1", {"number": 1}, (read,))]
    run_trials(square, trial, tmp_path)
    for change in (
        lambda: read.write_text("other"),
        lambda: monkeypatch.setattr(trials, "_software", lambda run: ["another version"]),
    ):
        change()
        assert stored(square, trial[0], tmp_path) is None
        run_trials(square, trial, tmp_path)
        assert stored(square, trial[0], tmp_path) is not None
    run_trials(square, [Trial("n1", {"number": 5}, (read,))], tmp_path)
    assert calls(tmp_path) == [1, 1, 1, 5]


def other(folder):
    """Be another function."""
    return {"other": True}


@pytest.mark.parametrize(("one", "two", "same"), [("+ 1  # why", "+ 1", True), ("+ 1", "+ 2", False)])
def test_the_code_that_a_run_reaches_makes_it_stale(one, two, same, here, tmp_path, monkeypatch):
    file = tmp_path / "reached_module.py"
    monkeypatch.syspath_prepend(tmp_path)
    trial, results = Trial("a", {}), []
    for code in (one, two):
        file.write_text(f"def run(folder):\n    return {{'value': helper()}}\ndef helper():\n    return 0 {code}\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "reached_module", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        run = importlib.import_module("reached_module").run
        results.append(stored(run, trial, tmp_path / "out"))
        run_trials(run, [trial], tmp_path / "out")
    assert results == [None, {"value": 1} if same else None]
    assert stored(other, trial, tmp_path / "out") is None


def test_a_failure_spares_the_others_and_is_tried_again(here, tmp_path):
    mixed = [*some(1), *some(2, fail=True), *some(3)]
    with pytest.raises(RuntimeError, match="1 of 3 trials failed, first n2: ValueError: 2 is no good"):
        run_trials(square, mixed, tmp_path)
    with pytest.raises(RuntimeError, match="n2"):
        run_trials(square, mixed, tmp_path)
    assert calls(tmp_path) == [1, 2, 3, 2]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}'])
def test_a_damaged_result_is_made_again(damage, here, tmp_path):
    run_trials(square, some(1), tmp_path)
    (tmp_path / "n1" / trials.RESULT).write_bytes(damage)
    assert run_trials(square, some(1), tmp_path)[0]["square"] == 1
    assert calls(tmp_path) == [1, 1]


def test_a_trial_starts_in_a_clean_folder(here, tmp_path):
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1" / "half").write_text("of an interrupted run")
    run_trials(square, some(1), tmp_path)
    assert sorted(path.name for path in (tmp_path / "n1").iterdir()) == ["note", trials.RESULT]


def test_no_trial_is_started_after_the_time_given(here, tmp_path, monkeypatch):
    monkeypatch.delenv("APEXLIB_DEADLINE", raising=False)
    run_trials(square, some(2), tmp_path)
    assert "APEXLIB_DEADLINE" not in os.environ
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() - 1))
    with pytest.raises(OutOfTimeError, match="2 of 3 trials are left: n1, n3") as caught:
        run_trials(square, some(1, 2, 3), tmp_path)
    assert caught.value.left == ("n1", "n3")
    assert calls(tmp_path) == [2]
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() + 60))
    assert len(run_trials(square, some(1, 2, 3), tmp_path)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_deadline_from_outside_ends_a_set_too(workers, here, tmp_path, monkeypatch):
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() - 1))
    with pytest.raises(OutOfTimeError, match="1 of 1 trials are left: n1"):
        run_trials(square, some(1), tmp_path, workers=workers)
    assert calls(tmp_path) == []
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() + 60))
    assert 50 < time_left() < 61
    assert len(run_trials(square, some(1), tmp_path, workers=workers)) == 1


def test_without_a_deadline_time_has_no_end(monkeypatch):
    monkeypatch.delenv("APEXLIB_DEADLINE", raising=False)
    assert time_left() is None


class Interrupted(KeyboardInterrupt):
    """What a training raises that was told to leave."""

    def __init__(self, code):
        self.code = code
        super().__init__(code)


def patient(folder, goal, stop=3, at_once=False):
    """Count up to a goal, one step a call unless `at_once`, and leave by `Interrupted`; tell the time that is left."""
    file = folder / "count"
    count = int(file.read_text()) if file.exists() else 0
    while count < goal:
        count += 1
        file.write_text(str(count))
        if not at_once and count < goal:
            if stop == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted(stop) if stop else ValueError("it failed")
    return {"count": count, "left": time_left()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_left_for_want_of_time_goes_on_where_it_was(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("APEXLIB_DEADLINE", str(time.time() + 60))
    trial = Trial("p", {"goal": 3})
    for done in (1, 2):
        with pytest.raises(OutOfTimeError, match="1 of 1 trials are left: p"):
            run_trials(patient, [trial], tmp_path, workers=workers)
        assert (tmp_path / "p" / "count").read_text() == str(done)
    (result,) = run_trials(patient, [trial], tmp_path, workers=workers)
    assert result["count"] == 3
    assert 0 < result["left"] < 60
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["count", trials.RESULT]
    assert stored(patient, trial, tmp_path) == result


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    trial = Trial("p", {"goal": 2, "stop": "die"})
    with pytest.raises(RuntimeError, match="its process died"):
        run_trials(patient, [trial], tmp_path, workers=2)
    assert run_trials(patient, [trial], tmp_path, workers=2)[0]["count"] == 2


def test_a_signal_stops_the_set_and_the_run_goes_on_next_time(here, tmp_path):
    trial = Trial("p", {"goal": 2, "stop": 143})
    with pytest.raises(Interrupted):
        run_trials(patient, [trial], tmp_path)
    assert run_trials(patient, [trial], tmp_path)[0]["count"] == 2


@pytest.mark.parametrize("change", [{"goal": 4}, {"goal": 3, "at_once": True}])
def test_a_run_with_other_settings_starts_anew(change, here, tmp_path):
    with pytest.raises(OutOfTimeError):
        run_trials(patient, [Trial("p", {"goal": 3})], tmp_path)
    (tmp_path / "p" / "left").touch()
    with suppress(OutOfTimeError):
        run_trials(patient, [Trial("p", change)], tmp_path)
    assert not (tmp_path / "p" / "left").exists()


def test_a_run_that_failed_starts_anew(here, tmp_path):
    trial = Trial("p", {"goal": 2, "stop": None})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="first p: ValueError: it failed"):
            run_trials(patient, [trial], tmp_path)
        assert (tmp_path / "p" / "count").read_text() == "1"


def test_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match=r"trials \['n1'\]: need a name of its own"):
        run_trials(square, some(1, 1), tmp_path)


def test_processes_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "default_workers", lambda: 2)
    mixed = [*some(1, 2, 3), *some(4, fail=True)]
    with pytest.raises(RuntimeError, match="1 of 4 trials failed, first n4"):
        run_trials(square, mixed, tmp_path)
    assert sorted(calls(tmp_path)) == [1, 2, 3, 4]
    assert [stored(square, trial, tmp_path)["threads"] for trial in some(1, 2, 3)] == [1, 1, 1]


def test_a_killed_process_is_reported_and_what_was_done_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "default_workers", lambda: 2)
    run_trials(square, some(1), tmp_path)
    with pytest.raises(RuntimeError, match=r"first n2: its process died.*out of memory\?"):
        run_trials(square, [*some(1), *some(2, die=True), *some(3, 4, 5)], tmp_path)
    assert stored(square, some(1)[0], tmp_path)["square"] == 1


def linger(folder):
    """Say which process this is, and stay."""
    (folder.parent / f"{os.getpid()}.pid").touch()
    time.sleep(120)
    return {}


def linger_until_asked(folder):
    """Stay as a training does, which saves and leaves when it is asked to."""
    with Stop(SimpleNamespace(world_size=1)) as stop:
        (folder.parent / f"{os.getpid()}.pid").touch()
        while not stop.asked():
            time.sleep(0.05)
    (folder.parent / f"{os.getpid()}.saved").touch()
    return {}


@pytest.mark.parametrize("run", ["linger", "linger_until_asked"])
def test_no_process_outlives_a_killed_parent_for_longer_than_it_needs_to_save(run, tmp_path):
    code = (
        f"from pathlib import Path; from test_trials import {run}; from apexlib.suite.trials import Trial, run_trials\n"
        "if __name__ == '__main__':\n"
        f"    run_trials({run}, [Trial('a', {{}}), Trial('b', {{}})], Path({str(tmp_path)!r}), workers=2)\n"
    )
    (tmp_path / "set.py").write_text(code)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "set.py")], env=environment)
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(alive(worker) for worker in workers), seconds=20)
    assert len(list(tmp_path.glob("*.saved"))) == (2 if run == "linger_until_asked" else 0)


def test_trials_are_counted_for_who_watches_from_outside(here, tmp_path, monkeypatch):
    file = tmp_path / "counts"
    monkeypatch.setenv(trials.COUNTS, str(file))
    run_trials(square, some(1), tmp_path)
    run_trials(square, some(1, 2, 3), tmp_path)
    assert read_counts(file) == Counts(before=1, now=3, total=4)
    monkeypatch.setenv(trials.COUNTS, str(tmp_path / "gone" / "counts"))
    assert len(run_trials(square, some(4), tmp_path)) == 1
    for damaged in ("", "x", "1 2", "1 2 3\n4 5", "1 2 3 4"):
        file.write_text(damaged)
        assert read_counts(file) == Counts()


def test_the_bar_of_a_set_stays(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "hide_progress", lambda: True)
    run_trials(square, some(1), tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(trials, "hide_progress", lambda: False)
    run_trials(square, some(1, 2, 3), tmp_path)
    shown = capsys.readouterr().err
    assert re.search(r"trials: +33%.* 1/3 ", shown)
    assert re.search(r"trials: 100%.* 3/3 .*\n$", shown)


def test_processes_show_no_bars(tmp_path):
    assert run_trials(hides, [Trial("a", {})], tmp_path, workers=2) == [{"hides": True}]


def hides(folder):
    sys.stderr.isatty = lambda: True
    return {"hides": hide_progress()}


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.1)


def alive(process):
    """Whether a process runs; one that has ended but was not collected does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")
    return not (status.exists() and "\nState:\tZ" in status.read_text())
