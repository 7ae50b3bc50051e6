"""A program runs at every stage, is copied without ties, and is changed by a handful of building blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture, inputs
from torch import Tensor, fx, nn

from llmc.ir.caches import Cache
from llmc.ir.program import Program, layer_of, op_name
from llmc.ir.stages import Stage, verify
from llmc.ir.weights import Leaf, TensorSource, Weight, constant, fold
from llmc.kernels.ops import add_rms_norm, linear, rms_norm

WIDTH = 12
aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two layers between a table and a head that is the same table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Model())


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def find(program: Program, name: str) -> list[fx.Node]:
    return [node for node in program.nodes if node.op == "call_function" and op_name(node) == name]


def test_it_computes_what_the_module_does(program: Program) -> None:
    for size in ((2, 7), (1, 1), (3, 20)):
        tokens, positions = inputs(*size)
        torch.testing.assert_close(program(tokens, positions), Model()(tokens))


@pytest.mark.parametrize("stage", Stage)
def test_it_runs_at_every_stage(program: Program, stage: Stage) -> None:
    program.stage = stage
    assert program(*inputs(2, 3)).shape == (2, 3, VOCAB)


def test_tied_parameters_are_one_weight(program: Program) -> None:
    assert sorted(program.weights) == [
        "embed.weight",
        *(f"layers.{i}.{name}" for i in range(2) for name in ("down.weight", "up.bias", "up.weight")),
    ]


def test_ops_are_counted_by_name(program: Program) -> None:
    assert program.ops() == {
        "aten.embedding": 1,
        "aten.linear": 5,
        "aten.relu": 2,
        "aten.add": 2,
        "aten.sym_size": 2,
        "aten.view": 1,
    }


def test_calls_know_their_module(program: Program) -> None:
    assert [node.meta["where"] for node in find(program, "aten.relu")] == ["layers.0", "layers.1"]
    assert [layer_of(node) for node in find(program, "aten.linear")] == 2 * ["layers.0"] + 2 * ["layers.1"] + [""]


def test_its_output_is_the_logits(program: Program) -> None:
    assert str(program.output.meta["val"].shape[-1]) == str(VOCAB)
    assert [node.name for node in program.inputs] == ["tokens", "positions"]


# Running ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted(TensorSource):
    """A tensor whose reads are written down, with what had been read and was still alive."""

    log: list[str] = field(default_factory=list, compare=False)

    def read(self) -> Tensor:
        self.log.append(self.name)
        return self.tensor.detach().clone()


def test_a_weight_is_read_when_a_call_needs_it(program: Program) -> None:
    log: list[str] = []
    for name, weight in program.weights.items():
        program.weights[name] = Leaf(Counted(weight.evaluate(), name, log))
    seen: list[tuple[str, list[str]]] = []

    def spy(node: fx.Node, target: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append((node.meta["where"], list(log)))
            return target(*args, **kwargs)

        call.__name__ = "spy"
        return call

    for node in find(program, "aten.relu"):
        node.target = spy(node, node.target)
    program(*inputs(2, 3))
    first = ["embed.weight", "layers.0.up.weight", "layers.0.up.bias"]
    second = [*first, "layers.0.down.weight", "layers.1.up.weight", "layers.1.up.bias"]
    assert seen == [("layers.0", first), ("layers.1", second)]
    assert sorted(log) == sorted(program.weights), "one is read twice"


def test_run_gives_all_outputs_and_a_call_the_logits(program: Program) -> None:
    (end,) = program.graph.find_nodes(op="output")
    total = find(program, "aten.add")[0]
    end.args = ((*end.args[0], total),)
    logits, other = program.run(*inputs(2, 3))
    assert logits.shape == (2, 3, VOCAB) and other.shape == (2, 3, WIDTH)
    assert torch.equal(program(*inputs(2, 3)), logits)
    assert not logits.requires_grad


def test_an_input_is_added_where_it_belongs(program: Program) -> None:
    tokens, positions = program.inputs
    with program.fake_mode:
        value = torch.empty(2 * WIDTH)
    last, between = program.add_input("last", value, after=positions), program.add_input("starts", value, after=tokens)
    assert program.inputs == [tokens, between, positions, last]
    assert between.meta["val"] is value and between.op == "placeholder"
    program.replace_with(find(program, "aten.relu")[0], aten.mul.Tensor, find(program, "aten.relu")[0].args[0], last)
    verify(program)
    token_values, position_values = inputs(2, 3)
    weights = torch.arange(2.0 * WIDTH)
    got = program.copy()(token_values, torch.empty(2 * WIDTH), position_values, weights)
    assert torch.equal(got, program(token_values, torch.empty(2 * WIDTH), position_values, weights))
    assert not torch.equal(got, program(token_values, torch.empty(2 * WIDTH), position_values, 2 * weights))


# Copies -------------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_program(program: Program) -> None:
    program.caches = (Cache("k", "v", 2, 4, 4, 8, True, 8, torch.float32),)
    twin = program.copy()
    assert str(twin) == str(program) and twin.caches == program.caches
    assert (twin.stage, twin.source, twin.max_seq_len) == (program.stage, program.source, program.max_seq_len)
    assert twin.weights == program.weights
    verify(twin)


def test_a_copy_changes_alone(program: Program) -> None:
    before, twin = str(program), program.copy()
    for node in find(twin, "aten.relu"):
        twin.replace_with(node, aten.neg.default, node.args[0])
        node.meta["where"] = "elsewhere"
    twin.add_weight("more", constant(torch.ones(2), "more"), like=twin.output)
    twin.stage = Stage.CANONICAL
    twin.caches = (Cache("k", "v", 2, 4, 4, 8, True, 8, torch.float32),)
    twin.history.append(None)  # type: ignore[arg-type]
    assert str(program) == before
    assert (program.stage, program.history, program.caches) == (Stage.CAPTURED, [], ())
    assert "more" not in program.weights and not hasattr(program.module, "more")
    assert not torch.equal(twin(*inputs(1, 4)), program(*inputs(1, 4)))


# Building blocks ----------------------------------------------------------------------------------------------------


def test_replace_with_puts_a_call_in_the_place_of_another(program: Program) -> None:
    want = program(*inputs(2, 5))
    for node in find(program, "aten.linear"):
        new = program.replace_with(node, linear, *node.args)
        assert new.meta["where"] == node.meta["where"]
        assert list(map(str, new.meta["val"].shape)) == list(map(str, node.meta["val"].shape))
        assert node not in program.nodes
    assert program.ops()["llmc.linear"] == 5 and not program.ops()["aten.linear"]
    assert torch.equal(program(*inputs(2, 5)), want)
    verify(program)


def test_items_of_a_call_with_several_values(program: Program) -> None:
    (total, _) = find(program, "aten.add")
    with program.graph.inserting_before(total):
        fused = program.call(add_rms_norm, *total.args, None, 1e-5, like=total)
        normed, summed = program.item(fused, 0), program.item(fused, 1)
    program.replace(total, summed)
    assert normed.meta["where"] == summed.meta["where"] == "layers.0"
    assert str(summed.meta["val"].shape) == str(fused.meta["val"][1].shape)
    torch.testing.assert_close(program(*inputs(2, 5)), Model()(inputs(2, 5)[0]))


def test_sizes_stay_symbolic_in_inferred_values(program: Program) -> None:
    (total, _) = find(program, "aten.add")
    value = program.infer(rms_norm.overload, (total, None, 1e-5), {})
    assert [str(size) for size in value.shape[:2]] == [str(s) for s in program.inputs[0].meta["val"].shape]


def scaled(program: Program, factor: float) -> Weight:
    return fold(program.weights["layers.0.up.weight"], factor)


def test_a_weight_is_added_under_its_name(program: Program) -> None:
    node = program.add_weight("layers.0.up.scaled", scaled(program, 2.0), like=find(program, "aten.relu")[0])
    assert (node.target, node.meta["where"]) == ("layers.0.up.scaled", "layers.0")
    assert tuple(node.meta["val"].shape) == (2 * WIDTH, WIDTH) and node.meta["val"].fake_mode is program.fake_mode
    (relu, _) = find(program, "aten.relu")
    program.replace_with(relu, linear, find(program, "aten.add")[0].args[0], node)
    verify(program)
    assert program.copy()(*inputs(2, 3)).shape == (2, 3, VOCAB)


def test_the_same_value_is_added_once(program: Program) -> None:
    nodes = [program.add_weight("w", scaled(program, 2.0), like=program.output) for _ in range(2)]
    assert nodes[0] is nodes[1]


def test_a_name_that_another_value_has_gets_a_number(program: Program) -> None:
    names = [program.add_weight("w", scaled(program, f), like=program.output).target for f in (2.0, 3.0, 4.0, 3.0)]
    assert names == ["w", "w_2", "w_3", "w_2"]
    assert program.weights["w"].key == scaled(program, 2.0).key


@pytest.mark.parametrize("name", ["embed.weight.scaled", "layers.0", "layers"])
def test_a_name_may_lie_inside_or_around_another(program: Program, name: str) -> None:
    inner = program.add_weight(name, scaled(program, 2.0), like=program.output)
    (relu, _) = find(program, "aten.relu")
    program.replace_with(relu, linear, find(program, "aten.add")[0].args[0], inner)
    verify(program)
    assert torch.equal(program.copy()(*inputs(1, 3)), program(*inputs(1, 3)))


def test_sweep_takes_out_what_nothing_reads(program: Program) -> None:
    (relu, _) = find(program, "aten.relu")
    total = find(program, "aten.add")[0]
    program.replace(total, total.args[0])  # type: ignore[arg-type]
    assert program.sweep() == 6, "two linears, their three weights and relu"
    assert relu not in program.nodes
    assert not [name for name in program.weights if name.startswith("layers.0")]
    assert [node.name for node in program.inputs] == ["tokens", "positions"], "an input stays, read or not"
    verify(program)
    assert program.sweep() == 0


def test_lots_that_nobody_draws_and_checks_are_swept_too(program: Program) -> None:
    before = str(program)
    total = find(program, "aten.add")[0]
    with program.graph.inserting_after(total):
        program.call(aten.bernoulli.default, total, like=total)
    size = find(program, "aten.sym_size")[0]
    with program.graph.inserting_after(size):
        program.call(aten._assert_scalar.default, size, "it is positive", like=size)
    assert program.sweep() == 2 and str(program) == before


def test_it_shows_itself(program: Program) -> None:
    assert repr(program) == f"<Program of Model: captured, {len(program.nodes)} nodes, 7 weights>"
    assert str(program).startswith("# Model, captured\ndef forward(weights, tokens, positions):")
