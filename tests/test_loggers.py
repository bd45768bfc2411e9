"""Loggers hear one run, by the steps of the whole run, whatever its stages; each where it is installed, offline."""

import json

import pytest
from conftest import build
from test_training import SMALL, Blocks, arguments
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from apexlib.plan import ApexConfig
from apexlib.training.stages import train_in_stages

THREE = ApexConfig(**(vars(SMALL) | {"stages": 3}))  # whose borders are 2 and 5 of 7 steps
STEPS = list(range(1, 8))


def log_to(name, folder, **more):
    held_out = Blocks(size=8, start=100)
    args = arguments(folder, max_steps=7, report_to=name, eval_strategy="steps", eval_steps=3, run_name="mine")
    return train_in_stages(build("llama", vocab_size=160), Blocks(), args, THREE, eval_dataset=held_out, **more)


@pytest.mark.case("TensorBoard: one run over all stages, by the steps of the whole run", "works")
def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    log_to("tensorboard", tmp_path)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file)).Reload()
    seen = {name: [event.step for event in read.Scalars(name)] for name in read.Tags()["scalars"]}
    assert seen["train/loss"] == seen["train/learning_rate"] == STEPS
    assert seen["eval/loss"] == [3, 6, 7]
    assert all(steps == sorted(set(steps)) for name, steps in seen.items() if name != "train/epoch")
    (told,) = read.Tensors("args/text_summary")
    assert json.loads(told.tensor_proto.string_val[0])["max_steps"] == 7


@pytest.mark.case("Weights & Biases, offline: one run over all stages, by the steps of the whole run", "works")
def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, str(value))
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, *a, **k: logged.append(data) or log(run, data, *a, **k))
    log_to("wandb", tmp_path / "run")
    assert wandb.run.config["max_steps"] == 7
    wandb.finish()
    assert [row["train/global_step"] for row in logged if "train/loss" in row] == STEPS
    assert [row["train/global_step"] for row in logged if "eval/loss" in row] == [3, 6, 7]
    assert len(list(tmp_path.rglob("offline-run-*"))) == 1


@pytest.mark.case("MLflow: one run over all stages, by the steps of the whole run", "works")
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    where = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    mlflow.set_tracking_uri(where)
    log_to("mlflow", tmp_path / "run")
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient(where)
    (run,) = client.search_runs(["0"])
    assert (run.info.status, run.data.params["max_steps"]) == ("FINISHED", "7")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == STEPS
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval_loss")] == [3, 6, 7]


@pytest.mark.case("trackio: one run over all stages, by the steps of the whole run", "works")
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    started, logged, init = [], [], trackio.init

    def noting(*given, **named):
        run = init(*given, **named)
        started.append(run)
        log = run.log
        run.log = lambda metrics, *a, **k: logged.append(metrics) or log(metrics, *a, **k)
        return run

    monkeypatch.setattr(trackio, "init", noting)
    log_to("trackio", tmp_path / "run")
    assert [run.name for run in started] == ["mine"]
    assert [row["train/global_step"] for row in logged if "train/loss" in row] == STEPS
    assert [row["train/global_step"] for row in logged if "eval/loss" in row] == [3, 6, 7]


class Noting(TrainerCallback):
    """A logger that notes what it hears."""

    def __init__(self):
        self.heard = []

    def on_train_begin(self, args, state, control, model=None, **_):
        self.heard.append(("begin", args.max_steps))

    def on_log(self, args, state, control, logs=None, **_):
        self.heard += [("loss", state.global_step)] * ("loss" in logs)

    def on_train_end(self, args, state, control, model=None, **_):
        self.heard.append(("end", model))


@pytest.mark.case("any logger of transformers, by `report_to` or as a callback: one run", "works")
@pytest.mark.parametrize("by_name", [True, False])
def test_any_logger_begins_and_ends_once_with_the_model_that_is_returned(by_name, tmp_path, monkeypatch):
    made = []

    class Logger(Noting):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "clearml", Logger)
    monkeypatch.setattr("apexlib.training.loggers._LOGGERS", (Logger,))
    options = {} if by_name else {"callbacks": [Logger()]}
    for again in (1, 2):  # the same instance is good for another run
        record = log_to("clearml" if by_name else "none", tmp_path / str(again), **options)
        heard = [each for logger in made for each in logger.heard]
        assert heard == [("begin", 7), *(("loss", step) for step in STEPS), ("end", record.model)]
        for logger in made:
            logger.heard.clear()
