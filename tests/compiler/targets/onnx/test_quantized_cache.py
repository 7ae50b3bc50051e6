"""Attention over an 8-bit cache in ONNX equals the op's meaning in several calls.

Past and present caches share their memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attending import SCALE, VALUE_DIM, Attend, Attending, cached, join, qkv
from batches import forward
from check_lowering import run_in_onnx, traced
from stepping import CALLS, GOING_BACK, Stepping, check_steps, engine_of
from torch import Tensor

from llmc.compiler.targets.onnx import quantized_cache
from llmc.compiler.targets.onnx.graph import Value
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort.write import TABLES
from llmc.ir.program import Program
from llmc.kernels.ops import attention
from llmc.kernels.ops.quantized import CACHE_CODES
from llmc.passes.cache.fuse_attention import FuseAttention

WINDOW = 6
# Sums in another order may change the nearest code of a value.
TOLERANCE = {"int8": 5e-3, "fp8": 3e-2}
FORMS: dict[str, dict[str, Any]] = {
    "all positions": {},
    "a window": {"window": WINDOW},
    "a window, a cap, sinks and slopes": {"window": WINDOW, "softcap": 0.5, "sinks": "sinks", "slopes": "slopes"},
}


def attending(**options: Any) -> Attend:
    """Return two layers: attention with these options, and the same without a window."""

    def attend(m: Attending, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        arguments = {n: getattr(m, v) if isinstance(v, str) else v for n, v in options.items()}
        if layer:
            arguments.pop("window", None)
        return join(attention(*qkv(m, layer, x), SCALE, **arguments))

    return attend


def quantized(name: str, ring: bool, codes: str) -> Program:
    return cached(attending(**FORMS[name]), ring, VALUE_DIM, codes)


@pytest.mark.parametrize("codes", CACHE_CODES)
@pytest.mark.parametrize(("name", "ring"), [*((name, False) for name in FORMS), *((n, True) for n in list(FORMS)[1:])])
def test_attention_equals_the_meaning_of_the_op(tmp_path: Path, name: str, ring: bool, codes: str) -> None:
    program = quantized(name, ring, codes)
    assert [cache.ring for cache in program.caches] == [ring, False]
    check_steps(program, tmp_path, ops="standard", tolerance=TOLERANCE[codes])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ops", ["standard", "contrib"])
def test_constant_scales(tmp_path: Path, ops: str, name: str) -> None:
    """A ring beside it keeps scales of tokens."""
    program = cached(attending(**FORMS[name]), True, VALUE_DIM, "int8", by_channel=True)
    assert [cache.key_scales is None for cache in program.caches] == [name == "all positions", True]
    check_steps(program, tmp_path, ops=ops, tolerance=TOLERANCE["int8"])


@pytest.mark.parametrize("codes", CACHE_CODES)
@pytest.mark.parametrize("ring", [False, True])
def test_the_contrib_table_uses_standard_ops(tmp_path: Path, codes: str, ring: bool) -> None:
    program = quantized("a window", ring, codes)
    assert FuseAttention(8)(program).matches == 0
    check_steps(program, tmp_path, ops="contrib", tolerance=TOLERANCE[codes])
    kinds = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert "Attention" in kinds and "GroupQueryAttention" not in kinds


@pytest.mark.parametrize("codes", CACHE_CODES)
@pytest.mark.parametrize("ops", ["standard", "contrib"])
def test_rings_longer_than_their_window(tmp_path: Path, ops: str, codes: str) -> None:
    program = cached(attending(**FORMS["a window"]), True, VALUE_DIM, codes, slack=3)
    engine = check_steps(program, tmp_path, ops=ops, calls=GOING_BACK, tolerance=TOLERANCE[codes])
    assert engine.spec.rollback == 4


@pytest.mark.parametrize("codes", CACHE_CODES)
def test_caches_hold_the_same_codes_and_scales_as_the_program(tmp_path: Path, codes: str) -> None:
    program = quantized("a window", True, codes)
    engine, reference = engine_of(program, tmp_path, ops="standard", slots=2), Stepping(program, 2)
    for starts, count in CALLS:
        tokens = torch.randint(engine.spec.vocab_size, (2, count), generator=torch.Generator().manual_seed(sum(starts)))
        reference.forward(tokens, torch.tensor(starts))
        forward(engine, tokens.numpy(), np.array(starts))
    got = [array for arrays in engine.caches.arrays for array in arrays]
    assert [array.itemsize for array in got] == [1, 1, 4, 4] * 2
    for array, expected in zip(got, reference.caches, strict=True):
        if expected.dtype == torch.float32:
            np.testing.assert_allclose(array, expected.numpy(), rtol=1e-2)
        else:
            same = array.view(np.uint8) == expected.view(torch.uint8).numpy()
            assert same.mean() > 0.99


def _bytes_of(g: Lowering, input: Value) -> str:
    return g.op("Cast", quantized_cache.e4m3_bytes(g, input), to=onnx.TensorProto.FLOAT)


def test_e4m3_bytes() -> None:
    """Every E4M3 number, the midpoints between them, and their neighbours in float32."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (grid[1:] + grid[:-1]) / 2
    points = torch.cat((grid, midpoints))
    neighbours = (torch.nextafter(points, torch.tensor(end)) for end in (0.0, 448.0))
    numbers = torch.cat((points, *neighbours))
    numbers = torch.stack((numbers, -numbers))
    run = run_in_onnx(traced(torch.neg, (torch.zeros(2, 3),)), STANDARD | {"aten.neg": _bytes_of})
    (got,) = run(numbers)
    expected = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    is_zero = (expected & 127) == 0  # zeros may have either sign
    assert torch.equal(got.to(torch.uint8)[~is_zero], expected[~is_zero])
    assert set(got[is_zero].tolist()) <= {0.0, 128.0}


def test_earlier_contents_of_a_slot_are_not_seen(tmp_path: Path) -> None:
    """A sequence has the same logits in a used slot as in a new one, rings included."""
    engine = engine_of(quantized("a window", True, "int8"), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.spec.vocab_size
    start = np.zeros(1, np.int64)
    fresh = forward(engine, tokens[:, :3], start)
    forward(engine, tokens, start)
    assert np.array_equal(forward(engine, tokens[:, :3], start), fresh)


def test_shared_keys_and_values_are_quantized_once(tmp_path: Path) -> None:
    def shared(m: Attending, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, layer, x)
        if layer == 0:
            m.held = k, v
        return join(attention(q, *m.held, SCALE))  # type: ignore[misc]

    program = cached(shared, codes="int8")
    assert len(program.caches) == 1
    check_steps(program, tmp_path, ops="standard", tolerance=TOLERANCE["int8"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("TensorScatter"), kinds.count("DequantizeLinear"), kinds.count("Attention")) == (4, 2, 2)


# The comparison above detects mistakes --------------------------------------------------------------------------------


def off_by_one(g: Lowering, k_scales: Value, v_scales: Value, **arguments: Any) -> Any:
    """Dequantize each token of earlier calls with the scales of the token before it."""
    shifted = []
    for scales in (k_scales, v_scales):
        first = g.op("Slice", scales, g.constant([0]), g.constant([1]), g.constant([2]))
        rest = g.op("Slice", scales, g.constant([0]), g.constant([-1]), g.constant([2]))
        shifted.append(Value(g.op("Concat", first, rest, axis=2), scales.dtype, scales.shape))
    return quantized_cache.attend(g, k_scales=shifted[0], v_scales=shifted[1], **arguments)


@pytest.mark.parametrize("codes", CACHE_CODES)
def test_scales_of_other_tokens_are_detected(tmp_path: Path, codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = STANDARD | {"llmc.quant_cached_attention": off_by_one}
    assert wrong.keys() == STANDARD.keys()
    monkeypatch.setitem(TABLES, "standard", wrong)
    with pytest.raises(AssertionError, match="are off by"):
        check_steps(quantized("all positions", False, codes), tmp_path, ops="standard", tolerance=TOLERANCE[codes])
