"""Each op of the dialect in plain ONNX equals the op's meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calling import calling, check_call, random
from check_lowering import check, lowered
from torch import Tensor

from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.kernels.ops import (
    add_rms_norm,
    embedding,
    gated_act,
    layer_norm,
    linear,
    rms_norm,
    rope,
    take_rows,
)
from llmc.kernels.ops.gated_act import ACTS

WIDTH = 32


@pytest.mark.parametrize("weighted", [True, False])
def test_norms(weighted: bool) -> None:
    gain, shift = (random(WIDTH, seed=1), random(WIDTH, seed=2)) if weighted else (None, None)
    weights = {"gain": gain, "shift": shift} if weighted else {}

    # The mean is not zero, so that the norms differ. The eps is larger than the tolerance.
    def norms(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        gain, shift = (m.gain, m.shift) if weighted else (None, None)
        x = x + 0.7
        y, total = add_rms_norm(x, x.sin(), gain, 0.1)
        return torch.cat((rms_norm(x, gain, 0.1), layer_norm(x, gain, shift, 0.1), y, total), -1)

    program = check_call(norms, STANDARD, WIDTH, **weights)
    assert {"llmc.rms_norm", "llmc.layer_norm", "llmc.add_rms_norm"} <= set(program.ops())


def test_the_weight_of_a_linear_is_stored_transposed(tmp_path: Path) -> None:
    weights = {"v": random(24, WIDTH, seed=2), "w": random(24, WIDTH), "b": random(24, seed=1)}
    program = check_call(lambda m, x, _: linear(x, m.v) + linear(x, m.w, m.b), STANDARD, WIDTH, **weights)
    model = lowered(program, STANDARD, tmp_path)
    assert "Transpose" not in {node.op_type for node in model.graph.node}
    assert [list(t.dims) for t in model.graph.initializer if t.name == "w.transposed"] == [[WIDTH, 24]]


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    def tied(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return linear(embedding(positions, m.w), m.w)

    program = check_call(tied, STANDARD, w=random(24, WIDTH))
    model = lowered(program, STANDARD, tmp_path)
    assert [t.name for t in model.graph.initializer if 24 in t.dims] == ["w"]


def test_take_rows() -> None:
    def last_and_first(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return x + take_rows(x, m.indices).sum(1, keepdim=True)

    check_call(last_and_first, STANDARD, indices=torch.tensor([-1, 0]))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
def test_rope(rotary_dim: int, interleaved: bool) -> None:
    angles = random(32, rotary_dim // 2)

    def rotate(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        by_head = x.unflatten(-1, (2, 16)).transpose(1, 2)
        # Positions that descend and do not end at 0, so that ignoring them changes the result.
        rotated = rope(by_head, 29 - positions, m.cos, m.sin, interleaved)
        return rotated.transpose(1, 2).flatten(2)

    check_call(rotate, STANDARD, WIDTH, cos=angles.cos(), sin=angles.sin())


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("limit", "offset"), [(None, 0.0), (0.4, 0.0), (0.4, 1.5)])
def test_gated_units(act: str, limit: float | None, offset: float) -> None:
    check(
        lambda gate, up: gated_act(gate, up, act, limit=limit, offset=offset),
        lambda b, s: (random(b, s, 8), random(b, s, 8, seed=1)),
        STANDARD,
    )


def test_silu_with_alpha() -> None:
    make = lambda b, s: (random(b, s, 8), random(b, s, 8, seed=1))  # noqa: E731
    check(lambda gate, up: gated_act(gate, up, "silu", alpha=1.702), make, STANDARD)


def test_only_standard_ops_are_used(tmp_path: Path) -> None:
    def block(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        by_head = x.unflatten(-1, (2, 16)).transpose(1, 2)
        rotated = rope(by_head, positions, m.cos, m.sin).transpose(1, 2).flatten(2)
        y, total = add_rms_norm(rotated, x, m.gain, 1e-5)
        return linear(gated_act(y, total, "gelu"), m.w)

    angles = random(32, 8)
    weights = {"gain": random(WIDTH), "w": random(WIDTH, WIDTH), "cos": angles.cos(), "sin": angles.sin()}
    model = lowered(calling(block, WIDTH, **weights), STANDARD, tmp_path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert all(onnx.defs.has(node.op_type, "") for node in model.graph.node)
