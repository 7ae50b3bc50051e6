"""From a choice of scheme and algorithm to the passes that put rounded weights in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LlmcError
from ...ir.program import Program
from ...passes.base import Pass
from ...passes.quantize.move_scales import MoveScales
from ...passes.quantize.quantize import Quantize
from ...passes.quantize.rounding_plan import AS_STORED, Choice, Grid, RoundingPlan, analyse
from ...runtimes.measure.texts import Text
from ..config import CompileConfig
from ..frontend.sources import ModelSource
from .bit_allocation import Candidate, by_worth, spare_until
from .cache import CalibrationCache
from .calibrate import ALGORITHMS, Calibration, calibrate
from .calibration_text import calibration_tokens
from .dequantized import why_dequantized_weights
from .finite import check_finite
from .sensitivity import Foretold, sensitivity

Watch = Callable[[str, int, int], None]

# What a weight becomes that is worth more bits: integer kernels take one scale a channel for many rows, too.
RAISED = Grid("int8")
# How far raising goes by itself: until the others are foretold to cost so many nats a token, or to that share of all.
RAISE_TARGET, RAISE_SHARE = 0.02, 0.275
# The same for linears whose inputs stay as they are where a prompt runs; those run slower there.
EXACT_TARGET, EXACT_SHARE = 0.003, 0.15
# Texts on which it is foretold; they are a sample of those that rounding looked at.
_FORETOLD_ON = 4


@dataclass(frozen=True)
class Quantization:
    """What was decided about a program's weights.

    Attributes:
        algorithm: by what they were rounded: "rtn", "smoothquant", "awq" or "gptq"; or "as stored".
        why: the reason for an algorithm that the user did not ask for.
        candidates: weights that could have more bits, those first that are worth it most.
        columns: of each candidate.
        raised: those that have more bits.
        exact: those whose inputs are not rounded by row where a prompt runs, for they are worth it most.
        measured: what `--max-kl` asked for, and what the artifact measured.
    """

    plan: RoundingPlan
    algorithm: str
    why: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    candidates: tuple[Candidate, ...] = ()
    columns: Mapping[str, int] = field(default_factory=dict)
    raised: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    measured: dict[str, float] | None = None

    @property
    def precision(self) -> str:
        """The row of the gate's limits that applies: that of the coarsest grid in use."""
        grids = {choice.grid for choice in self._plan.weights.values() if choice.grid}
        schemes = {grid.scheme for grid in grids}
        for name in ("int4", "nf4"):
            if name in schemes:
                return name
        if any(scheme.startswith("fp8") for scheme in schemes):
            return "fp8"
        return "w8a8" if any(grid.activation != "none" for grid in grids) else "int8"

    @property
    def rounds_rows(self) -> bool:
        """Whether inputs of linears are rounded to int8 by a scale of each row."""
        grids = (choice.grid for choice in self._plan.weights.values())
        return any(grid.activation == "int8" and not grid.static for grid in grids if grid)

    @property
    def passes(self) -> list[Pass]:
        """What applies the decisions to the program that they were made for, or to another capture of it."""
        found = self.calibration
        rounded = {name: parts for name, parts in found.rounded.items() if name not in self.raised}
        moved: list[Pass] = [MoveScales(found.scales)] if found.scales else []
        return [*moved, Quantize(self._plan, rounded)]

    def raise_bits(self, names: Iterable[str]) -> Quantization:
        """The same, but that these weights and no others have more bits."""
        return replace(self, raised=frozenset(names))

    def as_dict(self) -> dict[str, Any]:
        """What the manifest says of it."""
        counts = Counter(_words(choice) for choice in self._plan.weights.values())
        lost = why_dequantized_weights(self.plan.weights.values())
        return {
            "scheme": self.plan.scheme,
            "precision": self.precision,
            "algorithm": self.algorithm,
            "why": "; ".join(filter(None, (self.why, lost))),
            "weights": dict(sorted(counts.items())),
            "exact_in_prompts": len(self.exact),
        } | ({"max_kl": self.measured} if self.measured else {})

    @property
    def _plan(self) -> RoundingPlan:
        return self.plan.with_grid(self.raised, RAISED, self.columns, "worth more bits")


def quantize(
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch = lambda phase, done, total: None,
) -> Quantization | None:
    """Decide what an optimized program's weights become; None where all of them stay.

    What the checkpoint holds as codes is taken as it is, whatever the config says of the rest.

    Args:
        text: what to calibrate on, where the config asks for that.
        cache: stores results of calibration until the artifact is written.
    """
    plan = analyse(program, config.scheme or AS_STORED, config.overrides, exact=config.group_size is not None)
    if not any(choice.grid for choice in plan.weights.values()):
        return None  # also if codes were dequantized: see `describe_dequantized`
    check_finite(program)
    if config.scheme is None:
        return Quantization(plan, "as stored")
    tokens = _tokens(source, program, config, text)
    if tokens is None:
        why = "the model has no tokenizer to read the calibration text with" if config.algorithm != "rtn" else ""
        return Quantization(plan, "rtn", why)
    found = calibrate(
        program,
        plan,
        ALGORITHMS[config.algorithm],
        tokens,
        cache,
        many_rows=config.rounds_prefill,
        keep_zeros=config.prune is not None,
        watch=lambda done, total: watch("calibrate", done, total),
    )
    result = Quantization(plan, config.algorithm, "", found)
    if not (config.raises or config.rounds_prefill):
        return result
    foretold = _foretold(program, result, tokens, cache, watch)
    numbers = {name: program.weights[name].numel for name in foretold.weights}
    if config.rounds_prefill:
        exact = spare_until(by_worth(foretold.inputs, numbers), EXACT_TARGET, EXACT_SHARE)
        result = replace(result, exact=frozenset(exact))
    if not config.raises:
        return result
    columns = {name: program.weights[name].shape[1] for name in numbers}
    result = replace(result, candidates=tuple(by_worth(foretold.weights, numbers)), columns=columns)
    share = RAISE_SHARE if config.raise_share is None else config.raise_share
    target = RAISE_TARGET if config.raise_share is None else 0.0
    return result.raise_bits(spare_until(result.candidates, target, share))


def _tokens(source: ModelSource, program: Program, config: CompileConfig, text: Text | None) -> Tensor | None:
    if text is None or not config.calibrates:
        return None
    try:
        return calibration_tokens(source, text, config.calibration, program.max_seq_len)
    except LlmcError as error:
        if config.algo is None and error.code.startswith("TOKENIZER"):
            return None
        raise


def _foretold(program: Program, found: Quantization, tokens: Tensor, cache: CalibrationCache, watch: Watch) -> Foretold:
    """What the rounding of each weight on 4 bits costs, and that of its inputs."""
    moved = program.copy()
    MoveScales(found.calibration.scales)(moved)

    def error_of(name: str) -> Callable[[], Tensor]:
        choice = found.plan.weights[name]
        return lambda: found.calibration.rounded[name].value(choice) - moved.weights[name].evaluate().float()

    names = [n for n in found.calibration.rounded if (grid := found.plan.grid(n)) and grid.scheme in ("int4", "nf4")]

    def measure() -> dict[str, Tensor]:
        errors = {name: error_of(name) for name in names}
        sample = tokens[:: max(1, len(tokens) // _FORETOLD_ON)][:_FORETOLD_ON]
        scores = sensitivity(moved, sample, errors, lambda done, total: watch("weigh", done, total))
        return {
            part: torch.tensor([losses[name] for name in names], dtype=torch.float64)
            for part, losses in vars(scores).items()
        }

    kept = {part: losses.evaluate().tolist() for part, losses in cache.keep("foretold", measure).items()}
    return Foretold(**{part: dict(zip(names, losses, strict=True)) for part, losses in kept.items()})


def _words(choice: Choice) -> str:
    """`int4 in groups of 64`"""
    if choice.grid is None:
        return "as it was"
    grid = choice.grid
    inputs = "" if grid.activation == "none" else f", inputs {grid.activation}"
    spread = f"by {grid.group}" if isinstance(grid.group, str) else f"in groups of {choice.group_size}"
    return f"{grid.scheme} {spread}{'' if grid.symmetric else ' with zero points'}{inputs}"
