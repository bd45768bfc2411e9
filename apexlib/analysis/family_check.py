"""A family's row put to the test: do the units that it names belong together, and does an expansion of them hold?"""

import copy

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from apexlib.analysis.budget import equal_statistics
from apexlib.architectures import FAMILIES, Family, model_components
from apexlib.expansion import expand, fuse
from apexlib.files import untrained
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.projections import SplitProjection
from apexlib.selection import select

_MOST = 50_000_000  # parameters


def check_family(config: PretrainedConfig, *, seed: int = 0) -> None:
    """Expand a random model of this (small) configuration and hold it to the laws that every supported family obeys.

    - *identity*: expanded, in training mode, where its units run in another order, it computes what it did before in
      that mode, given the same random numbers;
    - *gradients*: they are those of the formula, composed as a whole and differentiated by autograd;
    - *movement*: where all that trains has changed, fusing changes the units of the plan and nothing else;
    - *fusing*: the plain model then computes what the expanded one did.

    ValueError says which law fails, and by how much. A row that is wrong, or a family whose heads are tied together in
    a way that its row does not say (a norm with weights for each head, a bias of position), fails the first two. For
    `register_family`, and for a release of transformers that is new.

    >>> from transformers import LlamaConfig
    >>> check_family(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    ...                          num_key_value_heads=2, vocab_size=32, pad_token_id=0))
    """
    model = _random_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, config.get_text_config().vocab_size, (2, 9), generator=generator)
    base, before = copy.deepcopy(model), _log_probabilities(model.train(), ids)
    pairs = ApexConfig(fraction=0.25, direct_heads=2 / 3, direct_channels=2 / 3, strategy="random")
    plan = select(equal_statistics(model), pairs, seed=seed)
    expand(model, plan, ffn="split", seed=seed)
    _compare("identity in training mode", _log_probabilities(model.train(), ids), before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    trained = _gradients(model, ids)
    for module in model.modules():
        if isinstance(module, SplitProjection):  # composes its weight as a whole outside training
            module.eval()
    for name, gradient in _gradients(model, ids).items():
        _compare(f"gradient of {name}", trained[name], gradient)
    expected = _log_probabilities(model.eval(), ids)
    _compare("fusing", _log_probabilities(fuse(model), ids), expected)
    _check_movement(base, model, plan)


def _random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model in float64, without dropout, biases and norms away from what they start at."""
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experts = {} if FAMILIES.get(config.model_type, Family()).down else {"experts_implementation": "eager"}
        own = {"attn_implementation": "eager", "dtype": torch.float64, **experts}  # grouped products lack float64
        model = untrained(AutoModelForCausalLM, config, **own)
        if (size := model.num_parameters()) > _MOST:
            raise ValueError(f"{config.model_type}: {size:,} parameters; need a small configuration, {_MOST:,} at most")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a router may draw experts in training
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def _gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    said = _log_probabilities(model, ids)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.nll_loss(said, ids[:, 1:].flatten())
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def _check_movement(base: PreTrainedModel, model: PreTrainedModel, plan: ExpansionPlan) -> None:
    """Refuse a weight of which anything outside the plan has moved, or a unit of the plan rests."""
    trains = {(each.layer, each.component): [*each.source, *each.target, *each.direct] for each in plan.layers}
    for part in model_components(base):
        inside = trains.get((part.layer, part.component), [])
        outside = sorted(set(range(part.units)) - set(inside))
        for role, slot in part.slots.items():
            old, new = (each.get_submodule(slot.module).weight.movedim(slot.axis, 0) for each in (base, model))
            moved = (old != new).any(1)[slot.index].flatten(1)
            here = f"{base.config.model_type}: movement: {role} of layer {part.layer}"
            if moved[outside].any():
                raise ValueError(f"{here}: a unit outside the plan has changed")
            if not moved[inside].all():
                raise ValueError(f"{here}: a unit of the plan has not changed")


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, rtol=1e-7, atol=1e-9):
        raise ValueError(f"{what}: off by {(found - expected).abs().max():.3g}; the row of the family does not fit")
