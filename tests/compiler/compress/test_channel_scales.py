"""Channel scales are found where they help, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.compiler.compress.channel_scales import AWQ, SMOOTHQUANT, Inputs, search_scales
from llmc.passes.quantize.quantization_plan import Choice
from llmc.passes.quantize.schemes import Grid

INT8 = Choice(Grid("int8"), "linear", 64)
INT4 = Choice(Grid("int4", 16), "linear", 16)


def outliers(count: int = 512) -> Tensor:
    """Inputs with two channels that are much larger than the others."""
    x = torch.randn(count, 64)
    x[:, [5, 40]] *= 60
    return x


def test_statistics_of_inputs() -> None:
    batches = [torch.randn(300, 8), torch.randn(500, 8)]
    statistics, tokens = Inputs.of(batches), torch.cat(batches)
    torch.testing.assert_close(statistics.largest, tokens.abs().amax(0))
    torch.testing.assert_close(statistics.mean, tokens.abs().mean(0))
    assert 200 <= len(statistics.sample) <= 300
    known = {tuple(token.tolist()) for token in tokens}
    assert all(tuple(token.tolist()) in known for token in statistics.sample)


@pytest.mark.parametrize(("block", "better"), [(0, 0.2), (16, 0.9)])
def test_smoothquant_helps_inputs_with_a_shared_scale(block: int, better: float) -> None:
    torch.manual_seed(0)
    found = search_scales(Inputs.of([outliers()]), torch.randn(32, 64), INT8, SMOOTHQUANT, block)
    assert found is not None and found.error < better * found.before
    assert found.scales[5] > 4 * found.scales.median() and found.scales[40] > 4 * found.scales.median()


def test_awq_helps_weights_with_large_inputs() -> None:
    torch.manual_seed(0)
    found = search_scales(Inputs.of([outliers()]), torch.randn(32, 64), INT4, AWQ, None)
    assert found is not None and found.error < 0.8 * found.before and found.alpha > 0
    assert found.scales[5] > 2 * found.scales.median()


def test_none_if_no_scales_help() -> None:
    """Weights are on the grid and inputs are not rounded, so there is no error."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (32, 64)) / 100
    weight[:, 0] = 1.27
    assert search_scales(Inputs.of([torch.randn(512, 64)]), weight, INT8, SMOOTHQUANT, None) is None


def test_channels_that_are_always_zero() -> None:
    torch.manual_seed(0)
    x = outliers()
    x[:, 7] = 0
    weight = torch.randn(32, 64)
    weight[:, 9] = 0
    for family in (SMOOTHQUANT, AWQ):
        found = search_scales(Inputs.of([x]), weight, INT4, family, 0)
        assert found is not None and torch.isfinite(found.scales).all() and (found.scales > 0).all()
