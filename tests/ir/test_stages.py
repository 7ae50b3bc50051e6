"""Every way to break a program's promise is refused by an error that names the node, the op, the stage and a remedy."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture
from torch import Tensor, fx, nn

from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import SPEC, Stage, verify
from llmc.ir.weights import constant, fold
from llmc.kernels.ops import add_rms_norm, all_ops, attention, embedding, linear, quant_linear, round_weight, take_rows

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(tokens)))


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Model())


@pytest.fixture
def program(captured: Program) -> Program:
    """One that keeps the promise of every stage."""
    program = captured.copy()
    head, lookup = the(program, "linear"), the(program, "embedding")
    program.replace_with(head, linear, *head.args)
    program.replace_with(lookup, embedding, lookup.args[1], lookup.args[0])
    return program


def the(program: Program, name: str) -> fx.Node:
    (node,) = [n for n in program.nodes if n.op == "call_function" and n.name.startswith(name)]
    return node


def _after_relu(program: Program, target: Callable[..., object], *more: object) -> fx.Node:
    relu = the(program, "relu")
    with program.graph.inserting_after(relu):
        node = program.graph.call_function(target, (relu, *more))  # type: ignore[arg-type]
    node.meta = {"val": relu.meta["val"], "where": "layers.3.mlp"}
    return node


def unknown_aten(program: Program) -> fx.Node:
    return _after_relu(program, aten.special_airy_ai.default)


def in_place(program: Program) -> fx.Node:
    return _after_relu(program, aten.relu_.default)


def python_function(program: Program) -> fx.Node:
    return _after_relu(program, torch.compiler.is_compiling)


def op_of_a_later_stage(program: Program) -> fx.Node:
    return _after_relu(program, quant_linear.overload)


def attention_after_the_cache(program: Program) -> fx.Node:
    return _after_relu(program, attention.overload)


def rows_before_the_cache(program: Program) -> fx.Node:
    return _after_relu(program, take_rows.overload)


def norm_of_a_sum_at_once(program: Program) -> fx.Node:
    return _after_relu(program, add_rms_norm.overload)


def rounding_in_a_program(program: Program) -> fx.Node:
    return _after_relu(program, round_weight.overload)


def module_call(program: Program) -> fx.Node:
    program.module.add_module("act", nn.ReLU())
    relu = the(program, "relu")
    with program.graph.inserting_after(relu):
        node = program.graph.call_module("act", (relu,))
    node.meta = dict(relu.meta)
    return node


def missing_weight(program: Program) -> fx.Node:
    del program.weights["head.weight"]
    (node,) = program.graph.find_nodes(op="get_attr", target="head.weight")
    return node


def wrong_shape(program: Program) -> fx.Node:
    program.weights["head.weight"] = constant(torch.ones(VOCAB, 9), "head.weight")
    (node,) = program.graph.find_nodes(op="get_attr", target="head.weight")
    return node


def wrong_dtype(program: Program) -> fx.Node:
    program.weights["head.weight"] = constant(torch.ones(VOCAB, 8, dtype=torch.float16), "head.weight")
    (node,) = program.graph.find_nodes(op="get_attr", target="head.weight")
    return node


def no_example_value(program: Program) -> fx.Node:
    node = _after_relu(program, aten.neg.default)
    del node.meta["val"]
    return node


REFUSED: dict[str, tuple[Callable[[Program], fx.Node], Stage, str, str]] = {
    "an op that is not allowed": (unknown_aten, Stage.CANONICAL, "special_airy_ai", "canonicalizing pass"),
    "a change in place": (in_place, Stage.CAPTURED, "relu_", "report the model"),
    "a change in place, later": (in_place, Stage.OPTIMIZED, "relu_", "report the model"),
    "a Python function": (python_function, Stage.CAPTURED, "is no tensor op", "report the model"),
    "an op of a later stage": (op_of_a_later_stage, Stage.CANONICAL, "llmc.quant_linear", "canonicalizing pass"),
    "attention after the cache": (attention_after_the_cache, Stage.CACHED, "llmc.attention", "InsertKvCache"),
    "rows before the cache": (rows_before_the_cache, Stage.QUANTIZED, "llmc.take_rows", "canonicalizing pass"),
    "a fused norm, captured": (norm_of_a_sum_at_once, Stage.CAPTURED, "llmc.add_rms_norm", "report the model"),
    "the rounding of a weight": (rounding_in_a_program, Stage.CACHED, "llmc.round_weight", "InsertKvCache"),
    "a module": (module_call, Stage.CAPTURED, "call_module", "calls, weights, inputs"),
    "a missing weight": (missing_weight, Stage.CAPTURED, "'head.weight'", "Program.add_weight"),
    "a weight of another shape": (wrong_shape, Stage.CAPTURED, f"({VOCAB}, 9)", "together"),
    "a weight of another dtype": (wrong_dtype, Stage.CAPTURED, "float16", "together"),
    "no example value": (no_example_value, Stage.CAPTURED, "no example value", "Program.call"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_the_promise_is_named(program: Program, name: str) -> None:
    damage, stage, what, remedy = REFUSED[name]
    node = damage(program)
    program.stage = stage
    with pytest.raises(LlmcError) as caught:
        verify(program)
    error = caught.value
    assert error.code == "IR_INVALID"
    assert node.name in error.what and str(stage) in error.what and what in error.what
    assert node.meta.get("where", "") in error.what
    assert remedy in error.hint
    assert "\n" not in str(error)


def test_a_weight_that_no_node_names_is_refused(program: Program) -> None:
    program.weights["stray"] = fold(program.weights["head.weight"], 2.0)
    with pytest.raises(LlmcError, match=r"stray.*sweep"):
        verify(program)


def test_a_node_that_reads_a_later_one_is_refused(program: Program) -> None:
    relu = the(program, "relu")
    with program.graph.inserting_before(relu):
        early = program.call(aten.neg.default, relu, like=relu)
    relu.users.pop(early)
    early.prepend(relu)  # neg, then relu
    relu.prepend(early)
    with pytest.raises(LlmcError, match=r"captured program is no graph.*neg") as caught:
        verify(program)
    assert caught.value.code == "IR_INVALID"


@pytest.mark.parametrize("stage", SPEC)
def test_a_sound_program_passes_with_arithmetic_on_its_sizes(program: Program, stage: Stage) -> None:
    relu = the(program, "relu")
    with program.graph.inserting_before(relu):
        size = program.call(aten.sym_size.int, program.inputs[0], 1, like=relu)
        double = program.call(operator.mul, size, 2, like=relu)
        program.call(operator.add, double, 1, like=relu)
    program.stage = stage
    verify(program)


def test_what_was_just_captured_is_not_canonical(captured: Program) -> None:
    verify(captured)
    program = captured.copy()
    program.stage = Stage.CANONICAL
    with pytest.raises(LlmcError, match=r"aten\.embedding|aten\.linear"):
        verify(program)


# The specs -----------------------------------------------------------------------------------------------------------


def test_stages_only_go_up() -> None:
    assert list(map(str, Stage)) == ["captured", "canonical", "optimized", "quantized", "cached"]
    assert Stage.CAPTURED < Stage.CANONICAL < Stage.OPTIMIZED < Stage.QUANTIZED < Stage.CACHED


def test_the_dialect_of_each_stage() -> None:
    everything = set(all_ops()) - {"round_weight"}
    dialect = {stage: set(spec.dialect) for stage, spec in SPEC.items()}
    rounded = {"quant_linear", "quant_embedding"}
    over_caches = {"cached_attention", "fused_attention", "quant_cached_attention", "take_rows"}
    assert dialect[Stage.CAPTURED] == everything - rounded - over_caches - {"add_rms_norm"}
    assert dialect[Stage.CANONICAL] == everything - rounded - over_caches
    assert dialect[Stage.OPTIMIZED] == everything - rounded - over_caches
    assert dialect[Stage.QUANTIZED] == everything - over_caches
    assert dialect[Stage.CACHED] == everything - {"attention"}


def test_the_aten_ops_of_each_stage() -> None:
    assert SPEC[Stage.CAPTURED].aten is None
    canonical = SPEC[Stage.CANONICAL].aten
    assert canonical is not None
    assert all(SPEC[stage].aten == canonical for stage in SPEC if stage >= Stage.CANONICAL)
    # What the dialect has a name for, and what has no name there on purpose.
    assert not canonical & {"linear", "embedding", "rms_norm", "layer_norm", "scaled_dot_product_attention"}
    assert not canonical & {"dropout", "rand", "nonzero", "item", "_local_scalar_dense"}


def test_every_allowed_name_is_an_op_of_torch() -> None:
    for spec in SPEC.values():
        unknown = [name for name in spec.aten or () if not hasattr(aten, name)]
        assert not unknown


def test_every_stage_has_a_hint() -> None:
    assert all(spec.hint.endswith(".") for spec in SPEC.values())
