"""The precision of a training: named, or chosen by what the machine can do."""

import pytest
import torch

from apexlib.training.checks import resolve_precision


@pytest.mark.parametrize(
    ("able", "chosen"),
    [({}, "float32"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True, "amx_bf16": False}, "bf16")],
)
def test_a_cpu_trains_in_bf16_where_it_has_instructions_for_it(able, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_precision("auto") == chosen


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_precision_that_is_named_stays(precision):
    assert resolve_precision(precision) == precision


def test_any_other_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'fp8': need one of auto, bf16, float32"):
        resolve_precision("fp8")
