"""Scales of keys and values are what the calibration text needs, and some more."""

from __future__ import annotations

import pytest
import torch
from attending import MAX_SEQ_LEN, SCALE, Attending, join, optimized, qkv
from check_pass import VOCAB
from torch import Tensor

from llmc.compiler.compress.cache_scales import HEADROOM, cache_scales
from llmc.errors import LlmcError
from llmc.ir.weights import constant
from llmc.kernels.ops import attention


def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    q, k, v = qkv(m, place, x)
    if place:  # a channel that is zero, and values of which all are
        k = k * torch.arange(k.shape[-1]).clamp(max=1)
        v = v * 0
    return join(attention(q, k, v, SCALE, window=None if place else 6))


def test_the_largest_number_of_each_channel() -> None:
    program = optimized(attend)
    tokens = torch.randint(0, VOCAB, (5, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(0))
    steps: list[tuple[int, int]] = []
    first, second = cache_scales(program, tokens, lambda *done: steps.append(done))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    largest: list[Tensor] = []

    def seen(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        largest.extend(each.abs().amax((0, 2)) for each in qkv(m, place, x)[1:])
        return attend(m, place, x, positions)

    Attending(seen, 4)(tokens, torch.arange(MAX_SEQ_LEN).expand(5, -1))
    keys, values, second_keys, _ = (each.detach() * HEADROOM / 127 for each in largest)
    torch.testing.assert_close(first.keys, keys)
    torch.testing.assert_close(first.values, values)
    torch.testing.assert_close(second.keys[:, 1:], second_keys[:, 1:])
    torch.testing.assert_close(second.keys[:, 0], second_keys[:, 1:].amin(1))
    assert second.values.shape == values.shape and (second.values > 0).all()


def test_it_is_measured_over_all_sequences() -> None:
    program = optimized(attend)
    tokens = torch.randint(0, VOCAB, (300, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(0))  # several batches
    together = cache_scales(program, tokens)
    each = [cache_scales(program, part) for part in (tokens[:100], tokens[100:])]
    for i, found in enumerate(together):
        for name in ("keys", "values"):
            want = torch.maximum(*(getattr(part[i], name) for part in each))
            torch.testing.assert_close(getattr(found, name), want)


def test_a_model_that_is_not_finite_is_refused() -> None:
    program = optimized(attend)
    (name,) = (n for n in program.weights if n.endswith("0.v.bias"))
    program.weights[name] = constant(torch.full(program.weights[name].shape, torch.nan), name)
    with pytest.raises(LlmcError) as caught:
        cache_scales(program, torch.zeros(1, 4, dtype=torch.int64))
    assert caught.value.code == "MODEL_NOT_FINITE"
