"""Attention over an 8-bit cache in ONNX is the op's own meaning, call after call, past and present in one memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attending import SCALE, VALUE_DIM, Attend, Attending, cached, join, qkv
from check_lowering import run_in_onnx, traced
from stepping import CALLS, Stepping, check_steps, engine_of
from torch import Tensor

from llmc.compiler.targets.onnx import rounded_cache
from llmc.compiler.targets.onnx.graph import Value
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.ir.program import Program
from llmc.kernels.ops import attention
from llmc.kernels.ops.quantized import CACHE_CODES
from llmc.passes.cache.fuse_attention import FuseAttention

WINDOW = 6
# A sum in another order may move a number across the middle between two codes.
TOLERANCE = {"int8": 5e-3, "fp8": 3e-2}
FORMS: dict[str, dict[str, Any]] = {
    "all positions": {},
    "a window": {"window": WINDOW},
    "a window, a cap, sinks and slopes": {"window": WINDOW, "softcap": 0.5, "sinks": "sinks", "slopes": "slopes"},
}


def attending(**options: Any) -> Attend:
    """Attention with these options in the first layer and without a window in the second."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        given = {n: getattr(m, v) if isinstance(v, str) else v for n, v in options.items()}
        if place:
            given.pop("window", None)
        return join(attention(*qkv(m, place, x), SCALE, **given))

    return attend


def rounded(name: str, ring: bool, codes: str) -> Program:
    return cached(attending(**FORMS[name]), ring, VALUE_DIM, codes)


@pytest.mark.parametrize("codes", CACHE_CODES)
@pytest.mark.parametrize(("name", "ring"), [*((name, False) for name in FORMS), *((n, True) for n in list(FORMS)[1:])])
def test_attention_as_the_op_means_it(tmp_path: Path, name: str, ring: bool, codes: str) -> None:
    program = rounded(name, ring, codes)
    assert [cache.ring for cache in program.caches] == [ring, False]
    check_steps(program, tmp_path, ops="standard", tolerance=TOLERANCE[codes])


@pytest.mark.parametrize("codes", CACHE_CODES)
@pytest.mark.parametrize("ring", [False, True])
def test_the_contrib_table_does_the_same(tmp_path: Path, codes: str, ring: bool) -> None:
    program = rounded("a window", ring, codes)
    assert FuseAttention()(program).matches == 0
    check_steps(program, tmp_path, ops="contrib", tolerance=TOLERANCE[codes])
    kinds = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert "Attention" in kinds and "GroupQueryAttention" not in kinds


@pytest.mark.parametrize("codes", CACHE_CODES)
def test_memory_holds_the_programs_codes_and_scales(tmp_path: Path, codes: str) -> None:
    program = rounded("a window", True, codes)
    engine, wanted = engine_of(program, tmp_path, ops="standard", slots=2), Stepping(program, 2)
    for starts, count in CALLS:
        tokens = torch.randint(engine.vocab_size, (2, count), generator=torch.Generator().manual_seed(sum(starts)))
        wanted.forward(tokens, torch.tensor(starts))
        engine.forward(tokens.numpy(), np.array(starts))
    got = [array for _, arrays in engine._caches for array in arrays]
    assert [array.itemsize for array in got] == [1, 1, 4, 4] * 2
    for array, want in zip(got, wanted.caches, strict=True):
        if want.dtype == torch.float32:
            np.testing.assert_allclose(array, want.numpy(), rtol=1e-2)
        else:
            same = array.view(np.uint8) == want.view(torch.uint8).numpy()
            assert same.mean() > 0.99


def _bytes_of(g: Lowering, input: Value) -> str:
    return g.op("Cast", rounded_cache._e4m3_bytes(g, input), to=onnx.TensorProto.FLOAT)


def test_bytes_are_those_of_e4m3() -> None:
    """Every number of the grid, the middles between them, and their neighbours in float32."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (grid[1:] + grid[:-1]) / 2
    points = torch.cat((grid, middles))
    around = (torch.nextafter(points, torch.tensor(end)) for end in (0.0, 448.0))
    numbers = torch.cat((points, *around))
    numbers = torch.stack((numbers, -numbers))
    run = run_in_onnx(traced(torch.neg, (torch.zeros(2, 3),)), STANDARD | {"aten.neg": _bytes_of})
    (got,) = run(numbers)
    want = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    signed_zero = (want & 127) == 0  # of a zero the sign may be either
    assert torch.equal(got.to(torch.uint8)[~signed_zero], want[~signed_zero])
    assert set(got[signed_zero].tolist()) <= {0.0, 128.0}


def test_what_a_slot_held_before_is_not_seen(tmp_path: Path) -> None:
    """A new sequence in a used slot gives what it gives in a fresh one, in a ring as well."""
    engine = engine_of(rounded("a window", True, "int8"), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.vocab_size
    start = np.zeros(1, np.int64)
    fresh = engine.forward(tokens[:, :3], start).copy()
    engine.forward(tokens, start)
    assert np.array_equal(engine.forward(tokens[:, :3], start), fresh)


def test_layers_that_share_keys_and_values_round_them_once(tmp_path: Path) -> None:
    def shared(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, place, x)
        if place == 0:
            m.held = k, v
        return join(attention(q, *m.held, SCALE))  # type: ignore[misc]

    program = cached(shared, codes="int8")
    assert len(program.caches) == 1
    check_steps(program, tmp_path, ops="standard", tolerance=TOLERANCE["int8"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("TensorScatter"), kinds.count("DequantizeLinear"), kinds.count("Attention")) == (4, 2, 2)


# What a mistake would be, and that the comparison above sees it ------------------------------------------------------


def one_slot_off(g: Lowering, *kinds: Any) -> Any:
    """Scales of the neighbouring tokens."""
    looked_at, codes, scales = [], [], []
    for cache, old_scales, new in kinds:
        new_codes, new_scales = rounded_cache._rounded(g, new, cache.dtype)
        codes.append(g.op("TensorScatter", cache, new_codes, g.starts, axis=2))
        scales.append(g.op("TensorScatter", old_scales, new_scales, g.starts, axis=2))
        held = rounded_cache._held(g, scales[-1])
        first = g.op("Slice", held, g.constant([0]), g.constant([1]), g.constant([2]))
        rest = g.op("Slice", held, g.constant([0]), g.constant([-1]), g.constant([2]))
        shifted = g.op("Concat", first, rest, axis=2)
        looked_at.append(rounded_cache._expanded(g, rounded_cache._held(g, codes[-1]), shifted, cache, g.total))
    return (looked_at[0], looked_at[1]), (*codes, *scales)


@pytest.mark.parametrize("codes", CACHE_CODES)
def test_scales_one_slot_off_are_seen(tmp_path: Path, codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_cache, "_kept", one_slot_off)
    with pytest.raises(AssertionError, match="are off by"):
        check_steps(rounded("all positions", False, codes), tmp_path, ops="standard", tolerance=TOLERANCE[codes])
