"""Each op of the dialect in ONNX Runtime's contrib ops equals the op's meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calling import check_call, random
from check_lowering import lowered
from check_pass import capture
from stepping import check_steps
from torch import Tensor, nn

from llmc.compiler.targets.ort.contrib import CONTRIB
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import add_rms_norm, attention, embedding, linear, rope
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.cache.insert_kv_cache import InsertKvCache
from llmc.passes.match.remove_no_ops import RemoveNoOps

WIDTH, VOCAB, HEADS, KV_HEADS = 32, 31, 4, 2


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


class Layer(nn.Module):
    """A layer of attention; if packed, one linear layer computes q, k and v."""

    def __init__(self, dim: int, *, packed: bool = True, rotary: int = 0, interleaved: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.packed, self.rotary, self.interleaved, self.options = dim, packed, rotary, interleaved, options
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.sizes = [HEADS * dim, KV_HEADS * dim, KV_HEADS * dim]
        self.qkv = nn.Linear(WIDTH, sum(self.sizes))
        self.parts = nn.ModuleList(nn.Linear(WIDTH, size) for size in self.sizes)
        self.head = nn.Linear(HEADS * dim, VOCAB)
        angles = torch.arange(32.0)[:, None] * torch.linspace(1, 0.1, max(1, rotary // 2))
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed.weight)
        if self.packed:
            projections = linear(x, self.qkv.weight, self.qkv.bias).split(self.sizes, -1)
        else:
            projections = [linear(x, part.weight, part.bias) for part in self.parts]
        q, k, v = (each.unflatten(-1, (-1, self.dim)).transpose(1, 2) for each in projections)
        if self.rotary:
            q, k = (rope(each, positions, self.cos, self.sin, self.interleaved) for each in (q, k))
        options = self.options | ({"sinks": self.sinks} if "sinks" in self.options else {})
        out = attention(q, k, v, self.dim**-0.5 * 1.3, **options)
        return linear(out.transpose(1, 2).flatten(2), self.head.weight, self.head.bias)


def fused(**options: Any) -> Program:
    program = capture(Layer(**options), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    InsertKvCache(ring=False)(program)
    assert FuseAttention(8)(program).matches == 1
    return program


FORMS: dict[str, dict[str, Any]] = {
    "packed": {"dim": 16},
    "not packed": {"dim": 16, "packed": False},
    "rotated": {"dim": 16, "rotary": 16},
    "rotated, not packed": {"dim": 16, "rotary": 16, "packed": False},
    "interleaved": {"dim": 16, "rotary": 16, "interleaved": True},
    "partly rotated": {"dim": 32, "rotary": 16},
    "partly rotated, interleaved, not packed": {"dim": 32, "rotary": 16, "interleaved": True, "packed": False},
    "a window": {"dim": 16, "rotary": 16, "window": 6},
    "a cap": {"dim": 16, "softcap": 0.5},
    "sinks": {"dim": 16, "sinks": True},
    "a window, a cap and sinks": {"dim": 16, "rotary": 16, "window": 6, "softcap": 0.5, "sinks": True},
    "a head size of 8": {"dim": 8},
}


@pytest.mark.parametrize("name", FORMS)
def test_fused_attention_equals_the_meaning_of_the_op(tmp_path: Path, name: str) -> None:
    check_steps(fused(**FORMS[name]), tmp_path, ops="contrib")
    ops = [n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert (ops.count("GroupQueryAttention"), ops.count("RotaryEmbedding"), ops.count("Split")) == (1, 0, 0)
