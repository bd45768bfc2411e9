"""Models that do not fit: spread by accelerate over memory and disk, they measure what the whole model measures."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import build
from test_training import METHODS, Blocks, arguments
from transformers import AutoModelForCausalLM

from apexlib.activations import activation_statistics
from apexlib.analysis.difference import masking_curve
from apexlib.analysis.masked_losses import Masking
from apexlib.analysis.spectrum import spectrum_table, update_table
from apexlib.evaluation import perplexity
from apexlib.expansion import expand
from apexlib.plan import ApexConfig
from apexlib.selection import select
from apexlib.training.stages import train_in_stages

MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {}),
}


def limited(model, folder):
    """Load it from its files where memory has room for a part of it."""
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    room = {"cpu": sum(parameter.nbytes for parameter in model.parameters()) * 2 // 3}
    spread = {"device_map": "auto", "max_memory": room, "offload_folder": folder / "offload"}
    found = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", **spread)
    assert set(found.hf_device_map.values()) == {"cpu", "disk"}
    return found


pytestmark = pytest.mark.filterwarnings("ignore:.*experts' channels are not units here")
SPREAD = {
    "limited": limited,
    "in memory": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "on disk": lambda model, folder: disk_offload(model, folder / "weights", torch.device("cpu")),
}


@pytest.fixture(params=[(model, how) for model in MODELS for how in SPREAD], ids=" ".join)
def pair(request, tmp_path):
    """A model, and the same one spread."""
    variant, changes = MODELS[request.param[0]]
    whole, model = (build(variant, num_hidden_layers=6, **changes) for _ in range(2))
    return whole, SPREAD[request.param[1]](model, tmp_path)


def where(model):
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


@pytest.mark.case("models that `device_map` spreads over memory and disk: statistics, masks, losses, spectra", "works")
def test_a_spread_model_measures_what_the_whole_one_does(pair, batch):
    whole, spread = pair
    places = where(spread)
    assert "meta" in places.values()
    batches = [batch, {name: value.flip(0) for name, value in batch.items()}]
    statistics = activation_statistics(whole, batches)
    pd.testing.assert_frame_equal(activation_statistics(spread, batches), statistics, check_exact=True)
    assert perplexity(spread, batches).equals(perplexity(whole, batches))
    asked = {"fractions": [0, 0.25, 0.5], "order": "advantageous"}
    for component in statistics["component"].unique():
        curves = [masking_curve(model, statistics, batches, component=component, **asked) for model in (whole, spread)]
        pd.testing.assert_frame_equal(*curves, check_exact=True)
        assert curves[0]["increase"].abs().max() > 1e-3
    tables = [spectrum_table(model).set_index("weight") for model in (whole, spread)]
    assert set(tables[0].index) == set(tables[1].index)
    pd.testing.assert_frame_equal(tables[1].loc[tables[0].index], tables[0], check_exact=True)
    assert update_table(whole, spread)["frobenius"].eq(0).all()
    assert where(spread) == places  # what was fetched has gone


def test_losses_token_by_token_of_a_spread_model(pair):
    whole, spread = pair
    losses = []
    for model in (whole, spread):
        masking = Masking(model, None, [{"input_ids": torch.arange(2, 20)}])
        mask = masking.mask("head", "advantageous", 0.5, [0, 1])
        losses.append(torch.tensor(masking.token_losses(mask)[0]))
        outputs = masking.outputs("head", 1)[0]
    assert torch.equal(losses[0][1:], losses[1][1:])
    assert outputs.any()


@pytest.mark.case("a model that `device_map` offloads: to expand it, to train it", "refused")
def test_a_spread_model_is_not_expanded_or_trained(pair, batch, tmp_path):
    whole, spread = pair
    places = where(spread)
    plan = select(activation_statistics(whole, [batch]), ApexConfig())
    with pytest.raises(ValueError, match=r"^\S+: is \w+, wrapped, patched or device-mapped; need a plain [^\n]*$"):
        expand(spread, plan)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"^\S+: device_map has it offloaded to memory or disk; need [^\n]*$"):
            train_in_stages(spread, Blocks(), arguments(tmp_path / method), ApexConfig(), method=method)
        assert not (tmp_path / method).exists()
    assert where(spread) == places


MEASURED = """
import sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from apexlib.activations import activation_statistics
from apexlib.analysis.difference import masking_curve
from apexlib.analysis.spectrum import spectrum_table
from apexlib.evaluation import perplexity
from apexlib.suite.memory import peak_mb, reset_peak



def measure(folder, room):
    spread = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": folder / "offload"} if room else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **spread)
    batches = [{"input_ids": torch.arange(32).view(2, 16)}]
    statistics = activation_statistics(model, batches)
    perplexity(model, batches)
    masking_curve(model, statistics, batches, fractions=[0.5], order="random")
    spectrum_table(model)


folder, small = map(Path, sys.argv[1:])
for room in (20_000, None):
    measure(small, room)  # what is loaded at first use
for what, *asked in ((spectrum_table, folder), (measure, folder, 20_000_000), (measure, folder, None)):
    before = reset_peak()
    what(*asked)
    print(peak_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the peak of memory in /proc")
def test_the_memory_that_is_promised(tmp_path):
    """A model of 143 MB in 20: what is asked to stay in memory, a module, activations; by its files, a matrix."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 512}
    for name, shape in (("small", {}), ("model", sizes)):
        model = build("llama", attention="sdpa", **shape)
        model.save_pretrained(tmp_path / name, max_shard_size="10MB")
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "model"), str(tmp_path / "small")]
    around = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr[-2000:]
    by_file, spread, whole = map(float, done.stdout.split())
    assert whole > size  # so is seen what the limit is for
    assert spread < size / 2
    assert by_file < size / 4
