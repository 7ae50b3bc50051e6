"""Estimate the size of an artifact's weights from the plan that would quantize them; no weight is read."""

from __future__ import annotations

from ...ir.program import Program
from ...ir.weights import Weight
from ...passes.quantize.quantization_plan import QuantizationPlan, analyse
from ...passes.quantize.quantize import round_to_nearest
from ..targets.base import KernelFacts

_ESTIMATED = ("int8", "int4")


def formulas(facts: KernelFacts) -> dict[str, str]:
    """Return how the sizes are computed, by the name of what they are of."""
    found = {"fp32, bf16": "4 and 2 bytes a parameter"}
    if known := _known(facts):
        found[", ".join(known)] = (
            "codes, scales and zero points of each matrix that has them; 4 bytes for each other number"
        )
    if (promotion := facts.promotion) and "int4" in facts.schemes:
        found["int4"] = f"with {promotion.share:.1%} of the layers' numbers in 8 bits, the most without --raise"
    return found


def output_bytes(program: Program, facts: KernelFacts) -> dict[str, int]:
    """Return the bytes of all weights of a canonical program, by what `llmc compile` may be asked for."""
    weights = {name: weight for name, weight in program.weights.items() if not weight.is_constant}
    numbers = sum(weight.numel for weight in weights.values())
    found = {"fp32": 4 * numbers, "bf16": 2 * numbers}
    plans = {scheme: analyse(program, facts.schemes[scheme]) for scheme in _known(facts)}
    found |= {scheme: _quantized_bytes(weights, plan) for scheme, plan in plans.items()}
    if (promotion := facts.promotion) and "int4" in plans:
        low, plan = found["int4"], plans["int4"]
        layers = [name for name, one in plan.weights.items() if one.grid and not (one.is_wide or one.is_stored)]
        input_channels = {name: weights[name].shape[1] for name in layers}
        high = _quantized_bytes(weights, plan.with_grid(layers, promotion.grid, input_channels, "all are promoted"))
        found |= {"int4": low + round(promotion.share * (high - low)), "int4 --raise 0": low}
    return found


def _known(facts: KernelFacts) -> list[str]:
    return [scheme for scheme in _ESTIMATED if scheme in facts.schemes]


def _quantized_bytes(weights: dict[str, Weight], plan: QuantizationPlan) -> int:
    total = 0
    for name, weight in weights.items():
        choice = plan.weights.get(name)
        if choice is None or choice.grid is None:
            total += 4 * weight.numel
        else:
            total += sum(part.nbytes for part in vars(round_to_nearest(weight, choice)).values() if part is not None)
    return total
