"""The newest state of a run, whether it has ended or not, as a plain model."""

from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedModel

from apexlib.files import content_hash, pretrained, read_object
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.training.checkpoints import RUN, Progress, RunFolder, load_trained, position, read_state, stage_borders
from apexlib.training.checks import fingerprints
from apexlib.training.methods import method_of


def newest_model(
    run: str | Path, base: str | Path | None = None
) -> tuple[PreTrainedModel, Path, tuple[ExpansionPlan, ...]]:
    """Read the newest complete state of the run in a folder: its plain model, where that was read, the plans so far.

    A state inside a stage holds what trains; it is loaded into the model that its stage began with, expanded again, and
    fused. Inside the first stage that model is `base`, a folder or a name on the Hub, and has to be the very one that
    the run began with. Nothing is written, and the run may be under way. Raises ValueError or OSError in one line.
    """
    run = Path(run)
    if not (run / RUN).is_file():
        raise FileNotFoundError(f"{run}: has no {RUN}; need the output_dir of a run")
    try:
        identity = read_object(run / RUN)["identity"]
        method = method_of(identity["method"], ApexConfig(**identity["config"]), **identity["options"])
        steps, kind = identity["steps"], getattr(transformers, identity["model"]["class"])
        folder = RunFolder(run, stage_borders(steps, method.config.stages if method.staged else 1))
        weights = identity["model"]["weights"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / RUN}: not that of a run ({type(error).__name__}: {error})") from None
    if (state := folder.newest()) is None:
        raise ValueError(f"{run}: has no state yet that is complete; need a step or a stage that was saved")
    (stage, begun, _), assessed = position(state), Progress.read(state).assessed
    statistics = assessed.pop() if begun and method.assesses else None
    for number, table in enumerate(assessed):
        method.plan(table, number)
    if stage:
        model = pretrained(kind, folder.model(stage - 1), dtype="auto")
    elif base is None:
        raise ValueError(f"{state}: is inside the first stage; need base, the model that the run began with")
    else:
        model = _base(kind, base, weights)
    if begun:
        trained = method.begin(model, stage, statistics)
        load_trained(trained, read_state(state)["parameters"])
        model = method.end(trained)
    return model, state, tuple(method.plans)


def _base(kind: type[PreTrainedModel], base: str | Path, weights: str) -> PreTrainedModel:
    """Load the model that a run began with, in the dtype in which it did."""
    own = pretrained(AutoConfig, base).dtype
    for dtype in dict.fromkeys(("float32", own or "float32")):
        model = pretrained(kind, base, dtype=dtype)
        if content_hash(fingerprints(model)) == weights:
            return model
    raise ValueError(f"{base}: is not the model that the run began with; need that one")
