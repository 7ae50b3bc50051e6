"""From a scheme and an algorithm to the passes that put quantized weights in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import LlmcError
from ...ir.program import Program
from ...passes.base import Pass
from ...passes.quantize.move_scales import MoveScales
from ...passes.quantize.quantization_plan import Choice, QuantizationPlan, analyse
from ...passes.quantize.quantize import Quantize
from ...passes.quantize.schemes import Grid
from ...runtimes.artifact.manifest import MaxKlSpec, QuantizationSpec
from ...runtimes.measure.texts import Text
from ..config import CompileConfig
from ..frontend.sources import ModelSource
from ..targets.base import Target
from .bit_allocation import Candidate, by_sensitivity, choose_until
from .cache import CalibrationCache
from .calibrate import ALGORITHMS, Calibration, calibrate
from .calibration_text import calibration_tokens
from .dequantized import why_dequantized_weights
from .finite import check_finite
from .sensitivity import Sensitivity, sensitivity

Watch = Callable[[str, int, int], None]

# Sequences that sensitivity is measured on; a sample of those that calibration used.
_SENSITIVITY_SEQUENCES = 4


@dataclass(frozen=True)
class Quantization:
    """The decisions about a program's weights.

    Attributes:
        algorithm: "rtn", "smoothquant", "awq" or "gptq"; "as stored" if only codes of the checkpoint are kept.
        why: the reason for an algorithm that was not asked for.
        promoted: what weights in `raised` become.
        candidates: weights that could have more bits, the most sensitive per byte first.
        input_channels: number of input channels of each candidate.
        raised: the weights that have more bits.
        exact_inputs: weights of linears whose inputs stay exact where the target quantizes those of others.
        max_kl: the result of `--max-kl`.
    """

    plan: QuantizationPlan
    algorithm: str
    why: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    promoted: Grid | None = None
    candidates: tuple[Candidate, ...] = ()
    input_channels: Mapping[str, int] = field(default_factory=dict)
    raised: frozenset[str] = frozenset()
    exact_inputs: frozenset[str] = frozenset()
    max_kl: MaxKlSpec | None = None

    @property
    def precision(self) -> str:
        """The key of the gate's limits: that of the coarsest grid in use."""
        grids = {choice.grid for choice in self.final_plan.weights.values() if choice.grid}
        schemes = {grid.scheme for grid in grids}
        for name in ("int4", "nf4"):
            if name in schemes:
                return name
        if any(scheme.startswith("fp8") for scheme in schemes):
            return "fp8"
        return "w8a8" if any(grid.activation != "none" for grid in grids) else "int8"

    @property
    def passes(self) -> list[Pass]:
        """The passes that apply the decisions to the program they were made for, or to another capture of it."""
        found = self.calibration
        quantized = {name: parts for name, parts in found.quantized.items() if name not in self.raised}
        moved: list[Pass] = [MoveScales(found.scales)] if found.scales else []
        return [*moved, Quantize(self.final_plan, quantized)]

    @property
    def final_plan(self) -> QuantizationPlan:
        """The plan, with the weights that have more bits."""
        if not self.raised:
            return self.plan
        assert self.promoted is not None
        return self.plan.with_grid(self.raised, self.promoted, self.input_channels, "sensitive: more bits")

    def raise_bits(self, names: Iterable[str]) -> Quantization:
        """Return the same decisions, but these weights and no others have more bits."""
        return replace(self, raised=frozenset(names))

    def spec(self) -> QuantizationSpec:
        """Return the manifest's account of it."""
        counts = Counter(_words(choice) for choice in self.final_plan.weights.values())
        return QuantizationSpec(
            scheme=self.plan.scheme,
            precision=self.precision,
            algorithm=self.algorithm,
            why="; ".join(filter(None, (self.why, why_dequantized_weights(self.plan.weights.values())))),
            weights=dict(sorted(counts.items())),
            exact_inputs=len(self.exact_inputs),
            max_kl=self.max_kl,
        )


def quantize(
    source: ModelSource,
    program: Program,
    config: CompileConfig,
    target: Target,
    text: Text | None,
    cache: CalibrationCache,
    watch: Watch = lambda phase, done, total: None,
) -> Quantization | None:
    """Decide what the weights of an optimized program become; None if all of them stay.

    Codes that the checkpoint holds are kept, whatever the config asks of the other weights.

    Args:
        text: the calibration text, if the config asks for one.
        cache: stores results of calibration until the artifact is written.
    """
    scheme = target.scheme(config)
    plan = analyse(
        program, scheme or target.facts_for(config).stored, config.overrides, exact=config.group_size is not None
    )
    if not any(choice.grid for choice in plan.weights.values()):
        return None  # also if codes were dequantized: see `describe_dequantized`
    check_finite(program)
    if scheme is None:
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
        input_group=lambda choice: target.input_group(config, choice),
        keep_zeros=config.prune is not None,
        watch=lambda done, total: watch("calibrate", done, total),
    )
    result = Quantization(plan, config.algorithm, "", found)
    exemption = target.input_exemption(config)
    promotion = target.facts_for(config).promotion if config.raises else None
    if promotion is None and exemption is None:
        return result
    losses = _sensitivity(program, result, tokens, cache, watch)
    numbers = {name: program.weights[name].numel for name in losses.weights}
    if exemption is not None:
        exact = choose_until(by_sensitivity(losses.inputs, numbers), exemption.target_loss, exemption.share)
        result = replace(result, exact_inputs=frozenset(exact))
    if promotion is None:
        return result
    result = replace(
        result,
        promoted=promotion.grid,
        candidates=tuple(by_sensitivity(losses.weights, numbers)),
        input_channels={name: program.weights[name].shape[1] for name in numbers},
    )
    if config.raise_share is not None:
        return result.raise_bits(choose_until(result.candidates, 0.0, config.raise_share))
    return result.raise_bits(choose_until(result.candidates, promotion.target_loss, promotion.share))


def _tokens(source: ModelSource, program: Program, config: CompileConfig, text: Text | None) -> Tensor | None:
    if text is None or not config.calibrates:
        return None
    try:
        return calibration_tokens(source, text, config.calib_samples, config.calib_length, program.max_seq_len)
    except LlmcError as error:
        if config.algo is None and error.code.startswith("TOKENIZER"):
            return None
        raise


def _sensitivity(
    program: Program, found: Quantization, tokens: Tensor, cache: CalibrationCache, watch: Watch
) -> Sensitivity:
    """Predict the loss from storing each weight in 4 bits, and from quantizing its inputs."""
    moved = program.copy()
    MoveScales(found.calibration.scales)(moved)

    def error_of(name: str) -> Callable[[], Tensor]:
        choice = found.plan.weights[name]
        return lambda: found.calibration.quantized[name].value(choice) - moved.weights[name].evaluate().float()

    names = [n for n in found.calibration.quantized if (grid := found.plan.grid(n)) and grid.scheme in ("int4", "nf4")]

    def measure() -> dict[str, Tensor]:
        errors = {name: error_of(name) for name in names}
        sample = tokens[:: max(1, len(tokens) // _SENSITIVITY_SEQUENCES)][:_SENSITIVITY_SEQUENCES]
        scores = sensitivity(moved, sample, errors, lambda done, total: watch("sensitivity", done, total))
        return {
            part: torch.tensor([losses[name] for name in names], dtype=torch.float64)
            for part, losses in vars(scores).items()
        }

    kept = {part: losses.evaluate().tolist() for part, losses in cache.keep("sensitivity", measure).items()}
    return Sensitivity(**{part: dict(zip(names, losses, strict=True)) for part, losses in kept.items()})


def _words(choice: Choice) -> str:
    """Describe a format for the manifest, such as `int4 in groups of 64`."""
    if choice.grid is None:
        return "as it was"
    grid = choice.grid
    inputs = "" if grid.activation == "none" else f", inputs {grid.activation}"
    spread = f"by {grid.group}" if isinstance(grid.group, str) else f"in groups of {choice.group_size}"
    return f"{grid.scheme} {spread}{'' if grid.symmetric else ' with zero points'}{inputs}"
