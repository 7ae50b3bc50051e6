"""The stages of a program and the ops that each allows, as data; `verify` checks a program against them.

A pass reaches a stage only if `verify` accepts the program. Otherwise an error names the node, the op, the stage and
what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..errors import CompilerError
from ..kernels.ops import all_ops, op_of
from .nodes import known_value, where

if TYPE_CHECKING:
    from .program import Program


class Stage(IntEnum):
    """A step on the way from a captured model to a graph; the stage of a program never decreases."""

    CAPTURED = 0
    CANONICAL = 1
    OPTIMIZED = 2
    QUANTIZED = 3
    CACHED = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Spec:
    """The ops that a program of a stage may contain.

    Attributes:
        dialect: names of ops of the `llmc` dialect.
        aten: names of ATen ops; None allows all that change nothing in place.
        hint: the hint of the error about any other op.
    """

    dialect: frozenset[str]
    aten: frozenset[str] | None
    hint: str


# ATen ops that need no op of the dialect: views and copies, elementwise ops and reductions, contractions, sources.
_VIEWS = frozenset(
    """
    _unsafe_view alias cat chunk clone constant_pad_nd contiguous diagonal expand expand_as flatten flip gather index
    index_add index_put index_select movedim narrow pad permute repeat repeat_interleave reshape reshape_as roll scatter
    scatter_add select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes t to _to_copy
    transpose tril triu type_as unbind unflatten unsqueeze view view_as_complex view_as_real
    """.split()
)
_ARITHMETIC = frozenset(
    """
    __and__ __or__ __xor__ abs add addcmul all amax amin any argmax argmin argsort bitwise_and bitwise_not bitwise_or
    bitwise_xor bucketize ceil clamp clamp_max clamp_min cos cumprod cumsum div elu eq erf exp expm1 floor floor_divide
    fmod ge gelu gt hardtanh isinf isnan le leaky_relu lerp linalg_vector_norm log log1p log2 log_sigmoid log_softmax
    logical_and logical_not logical_or logsumexp lt masked_fill max maximum mean min minimum mish mul nan_to_num ne neg
    norm one_hot pow prod reciprocal relu relu6 remainder round rsqrt rsub sigmoid sign silu sin softmax softplus sort
    sqrt square std sub sum tan tanh topk trunc var where
    """.split()
)
_CONTRACTIONS = frozenset("addmm baddbmm bmm conv1d convolution einsum matmul mm".split())
_SOURCES = frozenset(
    "arange empty_like eye full full_like new_empty new_full new_ones new_zeros ones ones_like scalar_tensor zeros "
    "zeros_like".split()
)
# Arithmetic on sizes: Python functions, no tensor ops.
_ON_SIZES = frozenset(
    "add eq floordiv ge getitem gt le lt mod mul ne neg pow sub sym_float sym_int sym_max sym_min truediv".split()
)

_DIALECT = frozenset(all_ops()) - {"round_weight"}  # it is for weight expressions, not for programs
_QUANTIZED = frozenset({"quant_linear", "quant_embedding"})
_CACHED = frozenset({"cached_attention", "fused_attention", "quant_cached_attention", "take_rows"})
_FUSED = frozenset({"add_rms_norm"})

SPEC: dict[Stage, Spec] = {}
SPEC[Stage.CAPTURED] = Spec(
    # Capture inserts `attention` and `moe`; canonicalizing passes may insert the other ops.
    dialect=_DIALECT - _QUANTIZED - _CACHED - _FUSED,
    aten=None,
    hint="A defect of capture or of a pass: report the model.",
)
SPEC[Stage.CANONICAL] = replace(
    SPEC[Stage.CAPTURED],
    dialect=_DIALECT - _QUANTIZED - _CACHED,
    aten=_VIEWS | _ARITHMETIC | _CONTRACTIONS | _SOURCES,
    hint="A canonicalizing pass must replace it by an op of the dialect; `llmc inspect` shows the misses of each pass.",
)
SPEC[Stage.OPTIMIZED] = SPEC[Stage.CANONICAL]
SPEC[Stage.QUANTIZED] = replace(SPEC[Stage.OPTIMIZED], dialect=SPEC[Stage.OPTIMIZED].dialect | _QUANTIZED)
SPEC[Stage.CACHED] = replace(
    SPEC[Stage.QUANTIZED],
    dialect=SPEC[Stage.QUANTIZED].dialect - {"attention"} | _CACHED,
    hint="InsertKvCache must replace every attention; `llmc inspect` shows its misses.",
)


def verify(program: Program) -> None:
    """Check that the program is well formed and contains only ops that its stage allows."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise CompilerError(
            "IR_INVALID",
            f"The {program.stage} program is no graph: {error}.",
            "Insert each node before its users.",
        ) from error
    spec = SPEC[program.stage]
    for node in program.nodes:
        if node.op == "call_function":
            _check_op(node, program.stage, spec)
        elif node.op == "get_attr":
            _check_weight(program, node)
        elif node.op not in ("placeholder", "output"):
            raise _broken(
                node, program.stage, f"is a {node.op}", "A program contains calls, weights, inputs and one output."
            )
        if node.op != "output" and known_value(node) is None:
            raise _broken(node, program.stage, "has no example value", "Insert nodes with Program.call.")
    missing = {str(n.target) for n in program.graph.find_nodes(op="get_attr")} ^ set(program.weights)
    if missing:
        raise CompilerError(
            "IR_INVALID",
            f"These names are only in the weights or only in the graph: {sorted(missing)[:3]}.",
            "Call Program.sweep().",
        )


def _check_op(node: fx.Node, stage: Stage, spec: Spec) -> None:
    target = node.target
    if defined := op_of(target):
        if defined.name not in spec.dialect:
            raise _broken(node, stage, f"calls {defined}, which is not allowed there", spec.hint)
    elif isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            raise _broken(node, stage, f"calls {target}, which changes a tensor in place", SPEC[Stage.CAPTURED].hint)
        name = target._schema.name.removeprefix("aten::")
        if spec.aten is not None and name not in spec.aten and name != "sym_size":
            raise _broken(node, stage, f"calls {target}, which is not allowed there", spec.hint)
    elif getattr(target, "__name__", "") not in _ON_SIZES:
        raise _broken(node, stage, f"calls {target}, which is no tensor op", spec.hint)


def _check_weight(program: Program, node: fx.Node) -> None:
    name, value = str(node.target), known_value(node)
    if name not in program.weights:
        raise _broken(
            node,
            program.stage,
            f"refers to the weight {name!r}, which the program does not have",
            "Add it with Program.add_weight.",
        )
    weight = program.weights[name]
    if value is not None and (tuple(value.shape), value.dtype) != (weight.shape, weight.dtype):
        raise _broken(
            node,
            program.stage,
            f"is {tuple(value.shape)} {value.dtype}, but its weight {name!r} is {weight.shape} {weight.dtype}",
            "Change the weight and its node together.",
        )


def _broken(node: fx.Node, stage: Stage, what: str, hint: str) -> CompilerError:
    place = where(node)
    return CompilerError(
        "IR_INVALID", f"In the {stage} program, {node.name}{f' of {place}' if place else ''} {what}.", hint
    )
