"""The stages of a program and what each of them promises, as data; `verify` checks the promise.

A stage is reached, never declared: a pass that leaves an op behind which the stage doesn't allow is stopped here,
by an error that names the node, the op, the stage and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..errors import CompilerError
from ..kernels.ops import all_ops, op_of

if TYPE_CHECKING:
    from .program import Program


class Stage(IntEnum):
    """Where a program is on its way to an engine; stages only ever go up."""

    CAPTURED = 0
    CANONICAL = 1
    OPTIMIZED = 2
    QUANTIZED = 3
    CACHED = 4
    LOWERED = 5

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Spec:
    """What a program of a stage may hold.

    Attributes:
        dialect: names of the ops of the `llmc` dialect.
        aten: names of the ATen ops, or None for any that changes nothing in place.
        hint: what to do about an op that is not among them.
    """

    dialect: frozenset[str]
    aten: frozenset[str] | None
    hint: str


# What moves, selects, combines or compares values without being worth a name of its own in the dialect.
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
# Arithmetic on sizes, which is plain Python and no tensor op.
_ON_SIZES = frozenset(
    "add eq floordiv ge getitem gt le lt mod mul ne neg pow sub sym_float sym_int sym_max sym_min truediv".split()
)

_DIALECT = frozenset(all_ops()) - {"round_weight"}  # that is for weights, not for programs
_QUANTIZED = frozenset({"quant_linear", "quant_embedding"})
_CACHED = frozenset({"cached_attention", "fused_attention", "quant_cached_attention", "take_rows"})
_FUSED = frozenset({"add_rms_norm"})

SPEC: dict[Stage, Spec] = {}
SPEC[Stage.CAPTURED] = Spec(
    # capture makes `attention` and `moe`, canonicalizing passes the others
    dialect=_DIALECT - _QUANTIZED - _CACHED - _FUSED,
    aten=None,
    hint="Capture hands on no op that changes a tensor in place; report the model that made it.",
)
SPEC[Stage.CANONICAL] = replace(
    SPEC[Stage.CAPTURED],
    dialect=_DIALECT - _QUANTIZED - _CACHED,
    aten=_VIEWS | _ARITHMETIC | _CONTRACTIONS | _SOURCES,
    hint="A canonicalizing pass must turn it into an op of the dialect; `llmc inspect` shows which came near.",
)
SPEC[Stage.OPTIMIZED] = SPEC[Stage.CANONICAL]
SPEC[Stage.QUANTIZED] = replace(SPEC[Stage.OPTIMIZED], dialect=SPEC[Stage.OPTIMIZED].dialect | _QUANTIZED)
SPEC[Stage.CACHED] = replace(
    SPEC[Stage.QUANTIZED],
    dialect=SPEC[Stage.QUANTIZED].dialect - {"attention"} | _CACHED,
    hint="Attention must go through the cache; InsertKvCache says why one does not.",
)


def verify(program: Program) -> None:
    """Check that the program is well formed and keeps the promise of its stage."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise CompilerError(
            "IR_INVALID",
            f"The {program.stage} program is no graph: {error}.",
            "Make nodes before those that read them.",
        ) from error
    spec = SPEC[program.stage]
    for node in program.nodes:
        if node.op == "call_function":
            _check_op(node, program.stage, spec)
        elif node.op == "get_attr":
            _check_weight(program, node)
        elif node.op not in ("placeholder", "output"):
            raise _broken(
                node, program.stage, f"is a {node.op}", "A program holds calls, weights, inputs and one output."
            )
        if node.op != "output" and "val" not in node.meta:
            raise _broken(node, program.stage, "has no example value", "Make nodes through Program.call.")
    missing = {str(n.target) for n in program.graph.find_nodes(op="get_attr")} ^ set(program.weights)
    if missing:
        raise CompilerError(
            "IR_INVALID", f"Weights and graph disagree about {sorted(missing)[:3]}.", "Call Program.sweep()."
        )


def _check_op(node: fx.Node, stage: Stage, spec: Spec) -> None:
    target = node.target
    if defined := op_of(target):
        if defined.name not in spec.dialect:
            raise _broken(node, stage, f"calls {defined}, which does not belong there", spec.hint)
    elif isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            raise _broken(node, stage, f"calls {target}, which changes a tensor in place", SPEC[Stage.CAPTURED].hint)
        name = target._schema.name.removeprefix("aten::")
        if spec.aten is not None and name not in spec.aten and name != "sym_size":
            raise _broken(node, stage, f"calls {target}, which is not allowed there", spec.hint)
    elif getattr(target, "__name__", "") not in _ON_SIZES:
        raise _broken(node, stage, f"calls {target}, which is no tensor op", spec.hint)


def _check_weight(program: Program, node: fx.Node) -> None:
    name, value = str(node.target), node.meta.get("val")
    if name not in program.weights:
        raise _broken(
            node,
            program.stage,
            f"names the weight {name!r}, which the program does not have",
            "Add it by Program.add_weight.",
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
    place = node.meta.get("where", "")
    return CompilerError(
        "IR_INVALID", f"In the {stage} program, {node.name}{f' of {place}' if place else ''} {what}.", hint
    )
