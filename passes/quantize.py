"""Weights on fewer bits: which become what, decided first, and then applied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..compiler.ir.program import Program, where
from ..compiler.ir.stages import Stage
from ..compiler.ir.weights import Call, Weight
from ..errors import LlmcError
from ..kernels.ops import embedding, linear, quant_embedding, quant_linear, round_int4, round_int8
from .base import Fuel, Pass, PassResult, miss
from .match import is_op

# Groups that a scale may serve, the wanted one first; kernels take powers of two from 16 on.
_GROUPS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Scheme:
    """How a model's weights are rounded.

    Attributes:
        weights: what linears become, "int8" (one scale a row) or "int4" (one a group, a multiple of its row's).
        group_size: of int4, where it divides the inputs; else the largest power of two below that does.
        activation: the grid of the inputs of linears, "none" or "int8".
        wide: what the head and the embedding become.
    """

    name: str
    weights: str
    group_size: int = 128
    activation: str = "none"
    wide: str = "int8"


SCHEMES = {
    "int8": Scheme("int8", weights="int8"),
    "int4": Scheme("int4", weights="int4"),
    "w8a8": Scheme("w8a8", weights="int8", activation="int8"),
}


@dataclass(frozen=True)
class Rounding:
    """What one weight becomes: codes and scales, by which scheme and group, and the grid of the inputs."""

    scheme: str
    group_size: int
    activation: str


def plan_rounding(program: Program, scheme: Scheme) -> dict[str, Rounding | str]:
    """For each weight that a linear or an embedding reads: what it becomes, or the reason why it stays."""
    plan: dict[str, Rounding | str] = {}
    for node in program.nodes:
        if not (is_op(node, linear) or is_op(node, embedding)):
            continue
        read = node.args[1]
        weight = program.weight_of(read)
        if isinstance(read, fx.Node) and weight is not None and not weight.is_constant:
            plan[str(read.target)] = _round(program, read, scheme)
    return plan


def _round(program: Program, node: fx.Node, scheme: Scheme) -> Rounding | str:
    if others := [user for user in node.users if not (is_op(user, linear) or is_op(user, embedding))]:
        return f"{others[0].name} reads it too"
    if any(is_op(user, embedding) and user.args[0] is not program.inputs[0] for user in node.users):
        return "it is looked up by something else than tokens"
    columns = int(node.meta["val"].shape[1])
    is_wide = any(is_op(user, embedding) for user in node.users) or any(_is_head(program, user) for user in node.users)
    kind = scheme.wide if is_wide else scheme.weights
    group = next((g for g in _GROUPS if g <= scheme.group_size and columns % g == 0), None)
    if group is None:
        return f"its {columns} inputs don't divide into groups of 16 or more"
    activation = "none" if is_wide else scheme.activation
    return Rounding(kind, group if kind == "int4" else columns, activation)


def _is_head(program: Program, node: fx.Node) -> bool:
    """Whether a linear gives a row as wide as the logits outside of every layer."""
    return node.meta["val"].shape[-1] == program.output.meta["val"].shape[-1] and not any(
        part.isdigit() for part in where(node).split(".")
    )


class Quantize(Pass):
    """Round the weights of linears, of the head and of the embedding.

    Example:  y = linear(x, w)
    Becomes:  y = quant_linear(x, w.codes, w.scales, scheme="int4", group_size=64, multiples=w.multiples)

    A weight that several read is rounded once. Nothing is computed here: codes are expressions like other weights.

    Left alone: 1. a weight that something else reads too; 2. a table of something else than tokens; 3. inputs that
    don't divide into groups; 4. experts.
    """

    needs = Stage.OPTIMIZED
    reaches = Stage.QUANTIZED

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        plan = plan_rounding(program, self.scheme)
        matches, misses = 0, []
        for node in program.nodes:
            if not (is_op(node, linear) or is_op(node, embedding)) or fuel.empty:
                continue
            name = str(getattr(node.args[1], "target", ""))
            rounding = plan.get(name)
            if isinstance(rounding, str):
                misses.append(miss(rounding, node))
            elif rounding is not None:
                self._apply(program, node, name, rounding)
                matches += 1
                fuel.burn()
        return PassResult(matches, misses)

    @staticmethod
    def _apply(program: Program, node: fx.Node, name: str, rounding: Rounding) -> None:
        parts = _parts(program.weights[name], rounding)
        codes, scales, multiples = (
            program.add_weight(f"{name}.{part}", weight, like=node) if weight is not None else None
            for part, weight in zip(("codes", "scales", "multiples"), parts, strict=True)
        )
        if is_op(node, embedding):
            program.replace_with(
                node, quant_embedding, node.args[0], codes, scales, None, rounding.scheme, rounding.group_size
            )
            return
        call = linear.bind(node.args, dict(node.kwargs))
        program.replace_with(
            node, quant_linear, call["x"], codes, scales, None, call["bias"], rounding.scheme, rounding.group_size,
            activation=rounding.activation, multiples=multiples,
        )  # fmt: skip


def _parts(weight: Weight, rounding: Rounding) -> tuple[Weight, Weight, Weight | None]:
    """Codes, scales and multiples of a rounded weight, as expressions."""
    if rounding.scheme == "int8":
        codes, scales = (Call(round_int8.overload, (weight,), output=i) for i in range(2))
        return codes, scales, None
    if rounding.scheme == "int4":
        codes, scales, multiples = (
            Call(round_int4.overload, (weight, rounding.group_size), output=i) for i in range(3)
        )
        return codes, scales, multiples
    raise LlmcError("SCHEME_UNKNOWN", f"No rounding is called {rounding.scheme!r}.", "Choose int8 or int4.")


class RoundActivations(Pass):
    """Round the inputs of linears over integer weights too, for integer kernels are the fastest for many rows.

    Example:  y = quant_linear(x, codes, scales, scheme="int4", activation="none")
    Becomes:  y = quant_linear(x, codes, scales, scheme="int4", activation="int8")

    Left alone: 1. the head, which sees one row.
    """

    needs = Stage.CACHED
    after = (Quantize,)

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches = 0
        for node in program.nodes:
            if not is_op(node, quant_linear) or _is_head(program, node) or fuel.empty:
                continue
            call = quant_linear.bind(node.args, dict(node.kwargs))
            if call["activation"] == "none" and call["scheme"] in ("int8", "int4"):
                program.replace_with(node, quant_linear, *(call | {"activation": "int8"}).values())
                matches += 1
                fuel.burn()
        return PassResult(matches)
