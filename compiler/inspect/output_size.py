"""How large the weights of an artifact will be, by the plan that would round them; none is read for it."""

from __future__ import annotations

from ...ir.program import Program
from ...ir.weights import Weight
from ...passes.quantize.quantize import round_plainly
from ...passes.quantize.rounding_plan import SCHEMES_BY_NAME, RoundingPlan, analyse
from ..compress.quantization import RAISE_SHARE, RAISED

FORMULAS = {
    "fp32, bf16": "4 and 2 bytes a parameter",
    "int8, int4": "codes, scales and zero points of each matrix that has them; 4 bytes for each other number",
    "int4": f"with {RAISE_SHARE:.1%} of the layers' numbers on 8 bits, the most that is raised unless asked for",
}


def output_bytes(program: Program) -> dict[str, int]:
    """Bytes of all weights of a canonical program, by what `llmc compile` may be asked for."""
    weights = {name: weight for name, weight in program.weights.items() if not weight.is_constant}
    numbers = sum(weight.numel for weight in weights.values())
    int8, int4 = (analyse(program, SCHEMES_BY_NAME[scheme]) for scheme in ("int8", "int4"))
    layers = [name for name, one in int4.weights.items() if one.grid and not (one.is_wide or one.is_stored)]
    raised = int4.with_grid(layers, RAISED, {name: weights[name].shape[1] for name in layers}, "all are raised")
    low, high = _rounded_bytes(weights, int4), _rounded_bytes(weights, raised)
    return {
        "fp32": 4 * numbers,
        "bf16": 2 * numbers,
        "int8": _rounded_bytes(weights, int8),
        "int4": low + round(RAISE_SHARE * (high - low)),
        "int4 --raise 0": low,
    }


def _rounded_bytes(weights: dict[str, Weight], plan: RoundingPlan) -> int:
    total = 0
    for name, weight in weights.items():
        choice = plan.weights.get(name)
        if choice is None or choice.grid is None:
            total += 4 * weight.numel
        else:
            total += sum(part.nbytes for part in vars(round_plainly(weight, choice)).values() if part is not None)
    return total
