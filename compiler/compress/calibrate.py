"""Calibration: quantize each linear by its inputs, in the order in which a text passes through the model.

The inputs of a linear are computed with the quantized linears before it, so it also compensates for their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...kernels.ops import linear
from ...kernels.ops.quantized import FLOAT8
from ...kernels.ops.rounding import QuantizationParameters, codes_of, default_parameters, packed
from ...passes.quantize.move_scales import ScaleSite, divide_channels, find_site, move
from ...passes.quantize.quantization_plan import Choice, QuantizationPlan
from ...passes.quantize.quantize import QuantizedWeight
from ...passes.queries import arguments, is_op
from .cache import CalibrationCache
from .channel_scales import AWQ, SMOOTHQUANT, Inputs, search_scales
from .clipping import best_parameters
from .gptq import gptq
from .stream import Stream


@dataclass(frozen=True)
class Algorithm:
    """The steps of a calibration algorithm.

    Attributes:
        scales: the family of channel scales to search, "smoothquant" or "awq"; None for no channel scales.
        codes: "nearest" rounds each weight to the nearest code. "gptq" also compensates for rounding errors with the
            input channels that are not rounded yet.
        clips: clip the range of a group where that reduces the output error.
        damping: GPTQ's damping, as a share of the mean of the Hessian's diagonal.
    """

    scales: str | None = None
    codes: str = "nearest"
    clips: bool = False
    damping: float = 0.01


ALGORITHMS = {
    "smoothquant": Algorithm(scales=SMOOTHQUANT),
    "awq": Algorithm(scales=AWQ, clips=True),
    "gptq": Algorithm(scales=SMOOTHQUANT, codes="gptq", clips=True),
}


@dataclass
class Calibration:
    """The results of calibration.

    Attributes:
        scales: channel scales for MoveScales, by weight name.
        quantized: quantized weights for Quantize, by weight name.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)


def calibrate(
    program: Program,
    plan: QuantizationPlan,
    algorithm: Algorithm,
    tokens: Tensor,
    cache: CalibrationCache,
    *,
    input_group: Callable[[Choice], int | None],
    keep_zeros: bool = False,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Quantize the linears of an optimized program according to the plan.

    Args:
        program: is not changed.
        tokens: sequences of one length, [sequences, length].
        cache: stores the results; those that are stored already are not computed again.
        input_group: returns how many input channels the kernels of a linear quantize with one scale; 0 means all of a
            token, None means that inputs are not quantized.
        keep_zeros: zeros of the weights stay zero, for a pruned program.
        watch: called with the number of linears that are done and the number of all.
    """
    calibrator = _Calibrator(program.copy(), plan, algorithm, tokens, cache, input_group, keep_zeros)
    calibrator.run(watch)
    return calibrator.result


class _Calibrator:
    def __init__(
        self,
        program: Program,
        plan: QuantizationPlan,
        algorithm: Algorithm,
        tokens: Tensor,
        cache: CalibrationCache,
        input_group: Callable[[Choice], int | None],
        keep_zeros: bool,
    ) -> None:
        self.program, self.plan, self.algorithm = program, plan, algorithm
        self.stream, self.cache, self.input_group = Stream(program, tokens), cache, input_group
        self.keep_zeros = keep_zeros
        self.result = Calibration()
        self._seen: set[fx.Node] = set()
        self._hessian: tuple[fx.Node, Tensor] | None = None

    def run(self, watch: Callable[[int, int], None]) -> None:
        linears = [n for n in self.program.nodes if is_op(n, linear) and self._choice(n) is not None]
        if not linears:
            return
        done = 0

        def before(node: fx.Node) -> None:
            nonlocal done
            if node in linears:
                watch(done, len(linears))
                self._round(node)
                done += 1

        self.stream.run(before, until=linears[-1])
        watch(done, len(linears))

    def _choice(self, node: fx.Node) -> Choice | None:
        choice = self.plan.weights.get(str(getattr(node.args[1], "target", "")))
        return choice if choice and choice.grid and not choice.is_stored else None

    def _round(self, node: fx.Node) -> None:
        name, choice = str(node.args[1].target), self._choice(node)  # type: ignore[union-attr]
        assert choice is not None and choice.grid is not None
        value = arguments(node)["x"]
        if self.algorithm.scales is not None and value not in self._seen:
            self._seen.add(value)
            site = find_site(self.program, node)
            if isinstance(site, ScaleSite) and self._can_scale(site):
                self._move(site, choice)
        if choice.is_wide or name in self.result.quantized:
            return  # Quantize rounds the LM head: no op after it could compensate for its errors
        quantized = QuantizedWeight(**self.cache.keep(name, lambda: self._quantize(name, value, choice)))
        self.result.quantized[name] = quantized
        self.stream.override_weight(name, quantized.value(choice))

    def _can_scale(self, site: ScaleSite) -> bool:
        """Return True if scales change no codes of the checkpoint, and only linears that are quantized here."""
        divided = (self.plan.weights.get(name) for name, _ in site.divided)
        readers = (self._choice(reader) for reader in site.readers)
        return all(readers) and not any(choice and choice.is_stored for choice in divided)

    def _move(self, site: ScaleSite, choice: Choice) -> None:
        """Search channel scales for a site, and move them."""
        stored = self.cache.keep(f"{site.weights[0]} channels", lambda: self._search(site, choice))
        scales = stored["scales"].evaluate()
        if not len(scales):
            return
        self.result.scales[site.weights[0]] = scales
        for name, start in site.divided:
            if name in self.result.quantized:  # divide the scales of output channels that are quantized already
                parts = self.result.quantized[name]
                self.result.quantized[name] = replace(parts, scales=divide_channels(parts.scales, scales, start))
        move(self.program, site, scales)
        self.stream.replace(site.value, lambda value: value / scales)

    def _search(self, site: ScaleSite, choice: Choice) -> dict[str, Tensor]:
        """Return the best scales; an empty tensor if no scales are better than none."""
        inputs = Inputs.of(self.stream.inputs(site.value))
        weight = torch.cat([self.program.weights[name].evaluate().float() for name in site.weights])
        found = search_scales(inputs, weight, choice, str(self.algorithm.scales), self._input_block(choice))
        return {"scales": torch.zeros(0) if found is None else found.scales}

    def _input_block(self, choice: Choice) -> int | None:
        """Return how many input channels are quantized together while scales are searched; AWQ assumes exact inputs."""
        return None if self.algorithm.scales == AWQ else self.input_group(choice)

    def _quantize(self, name: str, value: fx.Node, choice: Choice) -> dict[str, Tensor]:
        """Quantize a weight; return the fields of `QuantizedWeight`."""
        assert choice.grid is not None
        grid, inputs = choice.grid, self.stream.inputs(value)
        weight = self.program.weights[name].evaluate().float()
        parameters, codes = self._codes(value, inputs, weight, choice)
        parts = {"codes": packed(codes, grid.scheme), "scales": parameters.scales}
        parts |= {
            key: part
            for key, part in (("zeros", parameters.zeros), ("multiples", parameters.multiples))
            if part is not None
        }
        if grid.static:
            largest = torch.stack([batch.abs().amax() for batch in inputs]).amax()
            end = 127.0 if grid.activation == "int8" else torch.finfo(FLOAT8[grid.activation]).max
            parts["x_scale"] = largest / end
        return parts

    def _codes(
        self, value: fx.Node, inputs: list[Tensor], weight: Tensor, choice: Choice
    ) -> tuple[QuantizationParameters, Tensor]:
        assert choice.grid is not None
        scheme, group, symmetric = choice.grid.scheme, choice.group_size or weight.shape[1], choice.grid.symmetric
        if self.algorithm.clips:
            importance = torch.stack([batch.square().sum(0) for batch in inputs]).sum(0)
            parameters = best_parameters(weight, importance, scheme, group, symmetric)
        else:
            largest = None if choice.group_size else weight.abs().amax()
            parameters = default_parameters(weight, scheme, group, symmetric, largest)
        if self.algorithm.codes == "gptq":
            hessian = self._hessian_of(value, inputs)
            return parameters, gptq(weight, hessian, parameters, scheme, group, self.algorithm.damping, self.keep_zeros)
        return parameters, codes_of(weight, parameters, scheme, group)

    def _hessian_of(self, value: fx.Node, inputs: list[Tensor]) -> Tensor:
        """X'X of a value. The last result is kept, since several linears may read the value."""
        if self._hessian is None or self._hessian[0] is not value:
            self._hessian = value, torch.stack([batch.T @ batch for batch in inputs]).sum(0)
        return self._hessian[1]
