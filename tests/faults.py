"""Faults for training runs: a process that forks children, each one run, and kills them where it is told to.

A run is a series of moments: every example read, every file opened, made, moved or removed in the run's folder.
`python tests/faults.py FOLDER every N` kills a run at every N-th of them, resumes it and compares the bits.
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from conftest import build
from test_training import Blocks, arguments

from apexlib.plan import ApexConfig
from apexlib.training.stages import TrainingRecord, train_in_stages

CONFIG = ApexConfig(fraction=0.25, direct_heads=0.5, direct_channels=0.6, assessment_samples=8, stages=3)
_WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Counted(Blocks):
    """Each reading of an example is a moment; none is remembered, or a resumed run would differ."""

    def __init__(self, moment, **options):
        super().__init__(**options)
        self.moment = moment

    def __getitem__(self, row):
        self.moment("read")
        self.read.clear()
        return super().__getitem__(row)


class Moments:
    """Counts what happens in `folder`; at moment number `fatal` it does `act`."""

    def __init__(self, folder: Path, fatal: int | None, act) -> None:
        self.folder, self.fatal, self.act, self.kinds = str(folder), fatal, act, []
        sys.addaudithook(self.hear)  # cannot be removed, which is why every run has a process of its own

    def hear(self, event, given):
        if event in _WATCHED and isinstance(given[0], str | bytes | os.PathLike):
            path = os.fsdecode(given[0])
            if path.startswith(self.folder) and not (event == "open" and given[1] in ("r", "rb", "a")):
                self(event)

    def __call__(self, kind):
        self.kinds.append(kind)
        if len(self.kinds) == self.fatal:
            self.act()


def digest(record: TrainingRecord) -> str:
    """A hash of all that a run leaves: weights, log, plans, statistics."""
    found = hashlib.sha256()
    for name, value in sorted(record.model.state_dict().items()):
        found.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
    tables = [record.log, record.trainable, *record.statistics]
    found.update("".join(table.to_json(double_precision=15) for table in tables).encode())
    found.update(repr(record.plans).encode())
    return found.hexdigest()


def run(folder, moment=lambda kind: None, *, dropout=0.1, **changes) -> TrainingRecord:
    """Three stages of three steps, with dropout, evaluation and a state saved every second step."""
    own = ("resume", "overwrite", "trainer_class", "seconds", "checkpoints")
    options = {name: changes.pop(name) for name in own if name in changes}
    method, config = changes.pop("method", "apex"), changes.pop("config", CONFIG)
    given = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 2}
    given |= {"eval_strategy": "steps", "eval_steps": 2}
    model = build("llama", attention_dropout=dropout)
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    train, held_out = Counted(moment), Blocks(size=8, start=7)
    args = arguments(folder, **(given | changes))
    return train_in_stages(model, train, args, config, method=method, eval_dataset=held_out, **options)


def child(folder: Path, result: Path, fatal: int | None = None, act=None, **changes) -> int:
    """Run in a fork; return how it ended: 0, an exit code, or minus the signal."""
    process = os.fork()
    if not process:
        code = 1
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            moments = Moments(folder, fatal, act)
            record = run(folder, moments, **changes)
            result.write_text(json.dumps({"digest": digest(record), "kinds": moments.kinds}))
            code = 0
        except KeyboardInterrupt as error:
            code = error.code
        except BaseException as error:
            result.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def survey(folder: Path, every: int, act=kill, ends=(-signal.SIGKILL,)) -> pd.DataFrame:
    """Stop a run at every `every`-th of its moments, go on, and compare: one row per moment."""
    result, rows = folder / "result.json", []
    assert child(folder / "whole", result) == 0, result.read_text()
    whole = json.loads(result.read_text())
    for fatal in range(1, len(whole["kinds"]) + 1, every):
        attempt = folder / f"{fatal}"
        ended = child(attempt, result, fatal, act)
        result.unlink(missing_ok=True)
        code = child(attempt, result, resume=True)
        found = json.loads(result.read_text()) if result.exists() else {}
        partial = [path.name for path in attempt.rglob(".partial-*")]
        kind = whole["kinds"][fatal - 1]
        rows.append(
            {
                "moment": fatal,
                "kind": kind,
                "stopped": ended in ends,
                "survived": code == 0 and found.get("digest") == whole["digest"],
                "debris": len(partial),
                "error": found.get("error", ""),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    torch.set_num_threads(1)
    folder, every, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    act, ends = {"kill": (kill, (-9,)), "terminate": (terminate, (143,))}[end]
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        table = survey(Path(inner), every, act, ends)
    table.to_csv(folder / f"{end}.csv", index=False)


if __name__ == "__main__":
    main()
