"""Forecast builds of engines for `llmc plan`, from the shapes of the weights. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ....ir.program import Program
from ....ir.stages import Stage
from ....kernels.ops import linear
from ....passes.pipeline import bring_to
from ....passes.quantize.quantization_plan import Choice, QuantizationPlan, analyse
from ....passes.quantize.quantize import round_to_nearest
from ....passes.quantize.schemes import Scheme
from ....passes.queries import arguments, is_op
from ..base import Table
from .facts import FACTS
from .forecast import Forecast, MatMulWeight, WeightSummary, forecast_build, readable

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_TITLE = "Building an engine, before calibration raises weights to more bits"


def build_tables(program: Program) -> list[Table]:
    """Return what builds of engines take, by scheme.

    Args:
        program: a canonical program in the dtype that the engine computes in.
    """
    rows = [
        [name, *(readable(size) for size in (one.peak_bytes, one.plan_bytes, one.data_bytes))]
        for name, one in forecasts(program).items()
    ]
    return [Table(_TITLE, ["scheme", "memory", "plan", "weights"], rows)]


def forecasts(program: Program) -> dict[str, Forecast]:
    """Return a forecast for each scheme, and for weights in the program's dtype."""
    merged = bring_to(program.copy(), Stage.OPTIMIZED)
    found = {"not quantized": _forecast(program, None)}
    for scheme in FACTS.schemes.values():
        # Weights that TensorRT dequantizes stay merged.
        is_merged = scheme.linears is not None and scheme.linears.activation == "none"
        found[scheme.name] = _forecast(merged if is_merged else program, scheme)
    return found


def _forecast(program: Program, scheme: Scheme | None) -> Forecast:
    plan = None if scheme is None else analyse(program, scheme)
    matmuls = tuple(_matmuls(program, plan))
    return forecast_build(WeightSummary({"all": _stored_bytes(program, plan)}, matmuls))


def _stored_bytes(program: Program, plan: QuantizationPlan | None) -> int:
    return sum(_bytes_of(program, name, _choice(plan, name)) for name in program.weights)


def _matmuls(program: Program, plan: QuantizationPlan | None) -> Iterator[MatMulWeight]:
    for node in program.nodes:
        weight = arguments(node)["weight"] if is_op(node, linear) else None
        if isinstance(weight, fx.Node):
            name = str(weight.target)
            choice = _choice(plan, name)
            grid = choice.grid if choice else None
            dtype = grid.scheme if grid else _DTYPES[program.weights[name].dtype]
            takes_codes = grid is not None and grid.activation != "none"
            yield MatMulWeight(_bytes_of(program, name, choice), dtype, True, takes_codes)


def _choice(plan: QuantizationPlan | None, name: str) -> Choice | None:
    choice = plan.weights.get(name) if plan else None
    return choice if choice and choice.grid else None


def _bytes_of(program: Program, name: str, choice: Choice | None) -> int:
    weight = program.weights[name]
    if choice is None:
        return 2 * weight.numel if weight.dtype.is_floating_point else weight.nbytes
    rounded = round_to_nearest(weight, choice)
    # One scale of 16 bits for each group, also where they are stored as multiples of the row's.
    scales = rounded.scales if rounded.multiples is None else rounded.multiples
    return rounded.codes.nbytes + 2 * scales.numel
