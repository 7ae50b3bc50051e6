"""Quantize the weights of a program according to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ...ir.nodes import set_quantized_from, value_of
from ...ir.program import Program
from ...ir.stages import Stage
from ...ir.stored import stored_codes
from ...ir.weights import Call, Weight, cast, widened
from ...kernels.ops import embedding, linear, quant_embedding, quant_linear, round_weight
from ...kernels.ops.quantized import dequantize
from ..base import Fuel, Numerics, Pass, PassResult, miss
from ..queries import is_op
from .quantization_plan import Choice, QuantizationPlan


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight, as the operands of `quant_linear`.

    Attributes:
        x_scale: a constant scale of the linear's inputs from calibration, or None.
    """

    codes: Weight
    scales: Weight
    zeros: Weight | None = None
    multiples: Weight | None = None
    x_scale: Weight | None = None

    def value(self, choice: Choice) -> Tensor:
        """Return the dequantized weight, [O, I]."""
        assert choice.grid is not None
        codes, scales, zeros, multiples = (
            None if part is None else part.evaluate() for part in (self.codes, self.scales, self.zeros, self.multiples)
        )
        assert codes is not None and scales is not None
        scheme = choice.grid.scheme
        group_size = choice.group_size or codes.shape[1]
        return dequantize(codes, scales, zeros, scheme, group_size, multiples=multiples)


class Quantize(Pass):
    """Replace the weights that the plan names by quantized ones.

    Example:  y = linear(x, w)
    Becomes:  y = quant_linear(x, w.codes, w.scales, scheme="int4", group_size=64, multiples=w.multiples)

    A weight with several users is quantized once. Weights that calibration has quantized are taken from it; all others
    are rounded to the nearest number of their grid. Nothing is computed yet: codes are weight expressions.

    Left alone: 1. weights without a grid in the plan, which has the reason: another user, an embedding of something
    other than tokens, inputs that don't divide into groups, an override; 2. experts.

    Args:
        plan: the grid of each weight.
        calibrated: weights that calibration has quantized, by name.
    """

    needs = Stage.OPTIMIZED
    reaches = Stage.QUANTIZED
    numerics = Numerics.LOSSY

    def __init__(self, plan: QuantizationPlan, calibrated: Mapping[str, QuantizedWeight] | None = None) -> None:
        self.plan = plan
        self.calibrated = calibrated or {}

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        matches, misses = 0, []
        for node in program.nodes:
            if not (is_op(node, linear) or is_op(node, embedding)) or fuel.empty:
                continue
            name = str(getattr(node.args[1], "target", ""))
            choice = self.plan.weights.get(name)
            if choice is None:
                continue
            if choice.grid is None:
                misses.append(miss(choice.why, node))
                continue
            weight = program.weights[name]
            quantized = self.calibrated.get(name) or round_to_nearest(widened(weight), choice)
            if any(is_op(user, embedding) for user in node.args[1].users):  # type: ignore[union-attr]
                # An embedding has the dtype of its scales.
                quantized = replace(quantized, scales=cast(quantized.scales, weight.dtype))
            self._apply(program, node, name, choice, quantized)
            matches += 1
            fuel.burn()
        return PassResult(matches, misses)

    @staticmethod
    def _apply(program: Program, node: fx.Node, name: str, choice: Choice, quantized: QuantizedWeight) -> None:
        assert choice.grid is not None
        codes, scales, zeros, multiples, x_scale = (
            program.add_weight(f"{name}.{part}", weight, like=node) if weight is not None else None
            for part, weight in vars(quantized).items()
        )
        assert codes is not None
        set_quantized_from(codes, name)
        group_size = choice.group_size or int(value_of(node.args[1]).shape[1])  # type: ignore[arg-type]
        if is_op(node, embedding):
            program.replace_with(
                node, quant_embedding, node.args[0], codes, scales, zeros, choice.grid.scheme, group_size, multiples
            )
            return
        call = linear.bind(node.args, dict(node.kwargs))
        program.replace_with(
            node, quant_linear, call["x"], codes, scales, zeros, call["bias"], choice.grid.scheme, group_size,
            activation=choice.grid.activation, x_scale=x_scale, multiples=multiples,
        )  # fmt: skip


def round_to_nearest(weight: Weight, choice: Choice) -> QuantizedWeight:
    """Round each weight to the nearest number of its grid, as weight expressions.

    Codes that the checkpoint already has are returned unchanged.
    """
    assert choice.grid is not None
    if choice.is_stored:
        stored = stored_codes(weight)
        assert stored is not None, "a pass changed a weight whose stored codes the plan uses"
        return QuantizedWeight(stored.codes, stored.scales, stored.zeros)
    arguments = (weight, choice.grid.scheme, choice.group_size, choice.grid.symmetric)
    codes, scales, *rest = (Call(round_weight.overload, arguments, output=i) for i in range(4))
    zeros, multiples = (part if part.numel else None for part in rest)
    return QuantizedWeight(codes, scales, zeros, multiples)
