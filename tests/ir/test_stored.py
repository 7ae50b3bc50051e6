"""Codes are kept through slices, concatenations and casts, or there is a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmc
from llmc.ir import stored as module
from llmc.ir.stages import Stage
from llmc.ir.stored import OnlyNumbers, StoredCodes, stored_codes, why_dequantized
from llmc.ir.weights import Weight, cast, concat, fold, parameter, record, recorded, slice_dim0, transpose
from llmc.kernels.ops.quantized import dequantize

from ..compiler.frontend.prequantized.files import write
from ..compiler.frontend.prequantized.test_gptq import config, make


def codes(
    outputs: int = 6, group_size: int = 4, scheme: str = "int4", zeros: bool = True, seed: int = 0
) -> StoredCodes:
    generator = torch.Generator().manual_seed(seed)
    kind = torch.uint8 if scheme == "int4" else torch.int8
    groups = 8 // group_size

    def integers(*shape: int) -> Weight:
        return parameter(torch.randint(0, 16, shape, generator=generator).to(kind), "codes")

    packed = integers(outputs, 4 if scheme == "int4" else 8)
    scales = parameter(torch.rand(outputs, groups, generator=generator), "scales")
    return StoredCodes(packed, scales, integers(outputs, groups) if zeros else None, scheme, group_size)


def dequantized(stored: StoredCodes | None) -> Tensor:
    assert stored is not None
    zeros = None if stored.zeros is None else stored.zeros.evaluate()
    return dequantize(stored.codes.evaluate(), stored.scales.evaluate(), zeros, stored.scheme, stored.group_size)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("zeros", [True, False])
def test_codes_are_kept_through_slices_concatenations_and_casts(scheme: str, zeros: bool) -> None:
    one, other = (codes(outputs, scheme=scheme, zeros=zeros, seed=outputs) for outputs in (6, 2))
    both = concat([one, other], 0)
    for weight in (
        one,
        both,
        slice_dim0(both, 4, 7),
        concat([slice_dim0(both, 5, 8), slice_dim0(one, 0, 1)], 0),
        cast(both, torch.half),
    ):
        assert weight.shape[1] == 8 and why_dequantized(weight) is None
        assert torch.equal(dequantized(stored_codes(weight)).to(weight.dtype), weight.evaluate())
    assert stored_codes(one) is one


def test_a_float_weight_has_neither_codes_nor_a_reason() -> None:
    plain = parameter(torch.ones(6, 8), "plain")
    for weight in (
        plain,
        concat([plain, plain], 0),
        slice_dim0(plain, 0, 2),
        cast(plain, torch.half),
        transpose(plain),
    ):
        assert stored_codes(weight) is None and why_dequantized(weight) is None


ONE = codes()
UNUSABLE = OnlyNumbers(ONE, "a test reason")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (UNUSABLE, "a test reason"),
        (cast(slice_dim0(concat([ONE, UNUSABLE], 0), 0, 2), torch.half), "a test reason"),
        (transpose(UNUSABLE), "a test reason"),
        (concat([ONE, parameter(torch.ones(6, 8), "plain")], 0), "not quantized"),
        (concat([ONE, codes(group_size=2)], 0), "another scheme, group size or symmetry"),
        (concat([ONE, codes(zeros=False)], 0), "another scheme, group size or symmetry"),
        (concat([ONE, codes(scheme="int8")], 0), "another scheme, group size or symmetry"),
        (concat([ONE, ONE], 1), "changed by cat"),
        (transpose(ONE), "changed by transpose"),
        (fold(ONE, 2.0), "changed by mul"),
        (recorded(torch.stack([record(ONE), record(ONE)])), "changed by stack"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_codes_have_a_reason(weight: Weight, reason: str) -> None:
    assert stored_codes(weight) is None
    assert reason in (why_dequantized(weight) or "")


def test_keys_are_equal_only_for_equal_values() -> None:
    one = codes()
    same = StoredCodes(one.codes, one.scales, one.zeros, one.scheme, one.group_size)
    assert one.key == same.key == OnlyNumbers(one, "").key
    others = [
        StoredCodes(one.codes, one.scales, None, "int4", 4),
        StoredCodes(one.codes, one.scales, one.scales, "int4", 4),
        StoredCodes(one.codes, one.scales, one.zeros, "nf4", 4),
        StoredCodes(one.codes, one.scales, one.zeros, "int4", 8),
        StoredCodes(one.zeros or one.codes, one.scales, one.zeros, "int4", 4),
    ]
    assert len({one.key, *(other.key for other in others)}) == 6
    assert [leaf.key for leaf in one.leaves()] == [part.key for part in (one.codes, one.scales, one.zeros) if part]


def test_the_block_size_does_not_change_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    one = codes(7)
    whole = one.evaluate()
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 17)
    assert torch.equal(one.evaluate(), whole) and torch.equal(whole, dequantized(one))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_projections_keep_their_codes(tmp_path: Path, dtype: str) -> None:
    expected = write(tmp_path, make(4, 16, 1), config())
    program = llmc.capture(tmp_path, until=Stage.OPTIMIZED, dtype=dtype)
    attention = "model.layers.0.self_attn."
    expected_codes = torch.cat([expected[f"{attention}{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(dequantized(stored_codes(program.weights[f"{attention}qkv_proj.weight"])), expected_codes)
    with_codes = {name for name, weight in program.weights.items() if stored_codes(weight)}
    assert len(with_codes) == 4  # qkv, o, gate and up, down
