"""MergeQkv makes one linear of the three projections of an attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn

from llmc.ir.stages import Stage
from llmc.kernels.ops import attention, cached_attention, embedding, linear, rms_norm, rope
from llmc.passes.optimize.merge_qkv import MergeQkv
from llmc.passes.queries import is_op

aten = torch.ops.aten
WIDTH, HEADS, KV_HEADS, DIM = 12, 3, 1, 4
SCALE = DIM**-0.5
Attend = Callable[["Model", Tensor, Tensor], Tensor]


class Projections(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias)


class Model(nn.Module):
    """`attend(model, x, positions)` [B, H, S, D] between an embedding and a head."""

    def __init__(self, attend: Attend, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": Projections(bias)}) for _ in range(2)])
        self.norm = nn.Parameter(torch.rand(DIM) + 0.5)
        self.bare = nn.Parameter(torch.randn(3, DIM, WIDTH))
        self.head = nn.Linear(HEADS * DIM, VOCAB)
        angles = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.1])
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())
        self.attend = attend

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.attend(self, embedding(tokens, self.embed.weight), positions)
        return linear(out.transpose(1, 2).flatten(2), self.head.weight, self.head.bias)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, DIM)).transpose(1, 2)


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return heads(linear(x, layer.weight, layer.bias))


def plain(m: Model, x: Tensor, positions: Tensor, place: int = 0) -> Tensor:
    p = m.layers[place]["attn"]
    return attention(project(x, p.q_proj), project(x, p.k_proj), project(x, p.v_proj), SCALE)


def qwen3(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    """Norms of heads, then rotation, of q and k."""
    p = m.layers[0]["attn"]
    q, k = (rope(rms_norm(project(x, w), m.norm, 1e-6), positions, m.cos, m.sin) for w in (p.q_proj, p.k_proj))
    return attention(q, k, project(x, p.v_proj), SCALE)


def two_layers(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    return plain(m, plain(m, x, positions).transpose(1, 2).flatten(2), positions, 1)


def key_first(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    v, k = project(x, p.v_proj), project(x, p.k_proj)
    return attention(project(x, p.q_proj), k, v, SCALE)


def value_used_elsewhere(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    """The values are added to the output of attention, as a value residual."""
    p = m.layers[0]["attn"]
    v = project(x, p.v_proj)
    return attention(project(x, p.q_proj), project(x, p.k_proj), v, SCALE) + v


MERGED: dict[str, tuple[Attend, bool, int]] = {
    "plain": (plain, False, 1),
    "biases": (plain, True, 1),
    "qwen3": (qwen3, True, 1),
    "two layers": (two_layers, True, 2),
    "in another order": (key_first, True, 1),
    "a value with other users": (value_used_elsewhere, False, 1),
}


@pytest.mark.parametrize("name", MERGED)
def test_projections_of_one_input_become_one_linear(name: str) -> None:
    attend, bias, layers = MERGED[name]
    program = check_pass(MergeQkv(), Model(attend, bias), matches=layers, there={"aten.split_with_sizes"})
    assert program.ops()["llmc.linear"] == layers + 1
    for place in range(layers):
        merged = program.weights[f"layers.{place}.attn.qkv_proj.weight"]
        assert merged.shape == ((HEADS + 2 * KV_HEADS) * DIM, WIDTH)
        assert (f"layers.{place}.attn.qkv_proj.bias" in program.weights) == bias
    assert not {"q_proj", "k_proj", "v_proj"} & {part for name in program.weights for part in name.split(".")}


def test_parts_are_in_the_order_q_k_v() -> None:
    module = Model(key_first)
    program = check_pass(MergeQkv(), module, matches=1)
    p = module.layers[0]["attn"]
    want = torch.cat([p.q_proj.weight, p.k_proj.weight, p.v_proj.weight])
    assert torch.equal(program.weights["layers.0.attn.qkv_proj.weight"].evaluate(), want)


def test_weights_without_a_module_get_a_name_too() -> None:
    def attend(m: Model, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (heads(linear(x, getattr(m, name))) for name in ("wq", "wk", "wv"))
        return attention(q, k, v, SCALE).expand(-1, HEADS, -1, -1)

    module = Model(attend)
    for name in ("wq", "wk", "wv"):
        setattr(module, name, nn.Parameter(torch.randn(DIM, WIDTH)))
    assert "qkv_proj.weight" in check_pass(MergeQkv(), module, matches=1).weights


def test_merges_for_cached_attention_too() -> None:
    program = capture(Model(plain))
    (node,) = [n for n in program.nodes if is_op(n, attention)]
    with program.graph.inserting_before(node):
        batch = program.call(aten.sym_size.int, program.inputs[0], 0, like=node)
        cache = program.call(aten.new_zeros.default, node.args[0], [batch, KV_HEADS, 32, DIM], like=node)
        starts = program.call(aten.new_zeros.default, program.inputs[1], [batch], like=node)
        fused = program.call(cached_attention, *node.args[:3], cache, cache, starts, SCALE, like=node)
        out = program.item(fused, 0)
    program.replace(node, out)
    program.stage = Stage.CACHED
    assert check_pass(MergeQkv(), program, matches=1).ops()["llmc.linear"] == 2


# Left alone -----------------------------------------------------------------------------------------------------------


def one_projection(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    k = project(x, p.k_proj)
    return attention(project(x, p.q_proj), k, k, SCALE)


def scaled_query(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    return attention(project(x, p.q_proj) * 0.5, project(x, p.k_proj), project(x, p.v_proj), SCALE)


def merged_already(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    q, k, v = linear(x, p.q_proj.weight).split(DIM, -1)
    return attention(heads(q), heads(k), heads(v), SCALE).expand(-1, HEADS, -1, -1)


def other_inputs(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    y = x.flip(-1)
    return attention(project(x, p.q_proj), project(y, p.k_proj), project(y, p.v_proj), SCALE)


def shared_weight(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    v = project(x, p.v_proj) + project(x.flip(-1), p.k_proj)
    return attention(project(x, p.q_proj), project(x, p.k_proj), project(x, p.v_proj), SCALE) + v


def one_bias(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    v = heads(linear(x, p.v_proj.weight, p.v_proj.bias))
    return attention(heads(linear(x, p.q_proj.weight)), heads(linear(x, p.k_proj.weight)), v, SCALE)


def computed_weight(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    v = heads(linear(x, p.v_proj.weight * x.mean()))
    return attention(project(x, p.q_proj), project(x, p.k_proj), v, SCALE)


def computed_biases(m: Model, x: Tensor, positions: Tensor) -> Tensor:
    p = m.layers[0]["attn"]
    q, k, v = (heads(linear(x, w.weight, w.bias * x.mean())) for w in (p.q_proj, p.k_proj, p.v_proj))
    return attention(q, k, v, SCALE)


LEFT: dict[str, tuple[Attend, bool, str]] = {
    "1. one projection for k and v": (one_projection, False, "three projections"),
    "1. something else between": (scaled_query, False, "three projections"),
    "1. merged already": (merged_already, False, "three projections"),
    "2. other inputs": (other_inputs, False, "different inputs"),
    "3. a weight that is used elsewhere": (shared_weight, False, "elsewhere"),
    "4. one bias": (one_bias, True, "some projections have a bias"),
    "5. a computed weight": (computed_weight, False, "weight is computed"),
    "5. computed biases": (computed_biases, True, "bias is computed"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_projections_are_left_alone(name: str) -> None:
    attend, bias, reason = LEFT[name]
    check_pass(MergeQkv(), Model(attend, bias), matches=0, miss=reason)
