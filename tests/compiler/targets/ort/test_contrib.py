"""Each op of the dialect in ONNX Runtime's contrib ops equals the op's meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calling import check_call, random
from check_lowering import lowered
from fused_layers import FORMS, WIDTH, fused
from stepping import check_steps
from torch import Tensor

from llmc.compiler.targets.ort.contrib import CONTRIB
from llmc.kernels.ops import add_rms_norm, embedding, linear


@pytest.mark.parametrize("weighted", [True, False])
def test_add_rms_norm(weighted: bool, tmp_path: Path) -> None:
    def norm(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return torch.cat(add_rms_norm(x, x.sin(), m.gain if weighted else None, 0.1), -1)

    program = check_call(norm, CONTRIB, WIDTH, **({"gain": random(WIDTH)} if weighted else {}))
    model = lowered(program, CONTRIB, tmp_path)
    assert "SkipSimplifiedLayerNormalization" in {node.op_type for node in model.graph.node}


def test_the_weight_of_a_linear_is_not_transposed(tmp_path: Path) -> None:
    def tied(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        return linear(embedding(positions, m.w), m.w) + linear(x, m.w, m.b)

    program = check_call(tied, CONTRIB, WIDTH, w=random(24, WIDTH), b=random(24, seed=1))
    model = lowered(program, CONTRIB, tmp_path)
    assert [t.name for t in model.graph.initializer if list(t.dims) in ([24, WIDTH], [WIDTH, 24])] == ["w"]


@pytest.mark.parametrize("name", FORMS)
def test_fused_attention_equals_the_meaning_of_the_op(tmp_path: Path, name: str) -> None:
    check_steps(fused(**FORMS[name]), tmp_path, ops="contrib")
    ops = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (ops.count("GroupQueryAttention"), ops.count("RotaryEmbedding"), ops.count("Split")) == (1, 0, 0)
