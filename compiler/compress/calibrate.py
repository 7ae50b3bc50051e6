"""Calibration: rounding each linear by what flows into it, in the order in which a text flows through the model.

What a linear reads has passed the rounded linears before it, so each makes good what it can of the errors so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from ...ir.program import Program
from ...kernels.ops import linear
from ...kernels.ops.quantized import FLOAT8
from ...kernels.ops.rounding import GridScales, codes_of, packed, plain_steps
from ...passes.quantize.move_scales import ScaleSite, divide_rows, find_site, move
from ...passes.quantize.quantize import Rounded
from ...passes.quantize.rounding_plan import Choice, RoundingPlan
from ...passes.queries import arguments, is_op
from .cache import CalibrationCache
from .channel_scales import AWQ, SMOOTHQUANT, Inputs, search_scales
from .clipping import best_steps
from .gptq import gptq
from .stream import Stream


@dataclass(frozen=True)
class Algorithm:
    """How calibration rounds.

    Attributes:
        scales: the family of channel scales that is searched, "smoothquant", "awq" or None.
        codes: "nearest", or "gptq": errors are made good by the columns that are not rounded yet.
        clips: the range of a group may be cut where that is better on the whole.
        damping: of GPTQ, a share of the mean of the Hessian's diagonal.
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
    """What calibration found.

    Attributes:
        scales: for MoveScales, by the name of a weight.
        rounded: for Quantize, by the name of a weight.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Rounded] = field(default_factory=dict)


def calibrate(
    program: Program,
    plan: RoundingPlan,
    algorithm: Algorithm,
    tokens: Tensor,
    cache: CalibrationCache,
    *,
    many_rows: bool,
    keep_zeros: bool = False,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Round the linears of an optimized program that the plan names.

    Args:
        program: is left as it was.
        tokens: texts of one length, [texts, length].
        cache: stores the results; those that are stored already are not computed again.
        many_rows: whether inputs of int4 linears are rounded by rows when there are many.
        keep_zeros: whether what is zero stays so, for a program that is pruned.
        watch: called with the linears that are done and all of them.
    """
    calibrator = _Calibrator(program.copy(), plan, algorithm, tokens, cache, many_rows, keep_zeros)
    calibrator.run(watch)
    return calibrator.found


class _Calibrator:
    def __init__(
        self,
        program: Program,
        plan: RoundingPlan,
        algorithm: Algorithm,
        tokens: Tensor,
        cache: CalibrationCache,
        many_rows: bool,
        keep_zeros: bool,
    ) -> None:
        self.program, self.plan, self.algorithm = program, plan, algorithm
        self.stream, self.cache, self.many_rows = Stream(program, tokens), cache, many_rows
        self.keep_zeros = keep_zeros
        self.found = Calibration()
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
            place = find_site(self.program, node)
            if isinstance(place, ScaleSite) and self._is_free(place):
                self._move(place, choice)
        if choice.is_wide or name in self.found.rounded:
            return  # the head is the last: nothing behind it could make its errors good
        rounded = Rounded(**self.cache.keep(name, lambda: self._rounded(name, value, choice)))
        self.found.rounded[name] = rounded
        self.stream.use(name, rounded.value(choice))

    def _is_free(self, place: ScaleSite) -> bool:
        """Whether all that would change is rounded here, or not at all."""
        divided = (self.plan.weights.get(name) for name, _ in place.divided)
        readers = (self._choice(reader) for reader in place.readers)
        return all(readers) and not any(choice and choice.is_stored for choice in divided)

    def _move(self, place: ScaleSite, choice: Choice) -> None:
        """Find scales of the channels that a place can take, and move them."""
        kept = self.cache.keep(f"{place.weights[0]} channels", lambda: self._search(place, choice))
        scales = kept["scales"].evaluate()
        if not len(scales):
            return
        self.found.scales[place.weights[0]] = scales
        for name, start in place.divided:
            if name in self.found.rounded:  # rows that are rounded already have their scales divided
                parts = self.found.rounded[name]
                self.found.rounded[name] = replace(parts, scales=divide_rows(parts.scales, scales, start))
        move(self.program, place, scales)
        self.stream.replace(place.value, lambda value: value / scales)

    def _search(self, place: ScaleSite, choice: Choice) -> dict[str, Tensor]:
        inputs = Inputs.of(self.stream.inputs(place.value))
        weight = torch.cat([self.program.weights[name].evaluate().float() for name in place.weights])
        found = search_scales(inputs, weight, choice, str(self.algorithm.scales), self._input_block(choice))
        return {"scales": torch.zeros(0) if found is None else found.scales}

    def _input_block(self, choice: Choice) -> int | None:
        """How many channels of an input are rounded together by the kernels that the linear runs on."""
        assert choice.grid is not None
        if self.algorithm.scales == AWQ:
            return None
        if choice.grid.activation == "int8" or (self.many_rows and not choice.is_wide):
            return 0
        return choice.group_size if choice.grid.scheme in ("int8", "int4") else None

    def _rounded(self, name: str, value: fx.Node, choice: Choice) -> dict[str, Tensor]:
        """A weight in the parts of `Rounded`."""
        assert choice.grid is not None
        grid, inputs = choice.grid, self.stream.inputs(value)
        weight = self.program.weights[name].evaluate().float()
        steps, codes = self._codes(value, inputs, weight, choice)
        made = {"codes": packed(codes, grid.scheme), "scales": steps.scales}
        made |= {
            key: part for key, part in (("zeros", steps.zeros), ("multiples", steps.multiples)) if part is not None
        }
        if grid.static:
            largest = torch.stack([batch.abs().amax() for batch in inputs]).amax()
            end = 127.0 if grid.activation == "int8" else torch.finfo(FLOAT8[grid.activation]).max
            made["x_scale"] = largest / end
        return made

    def _codes(self, value: fx.Node, inputs: list[Tensor], weight: Tensor, choice: Choice) -> tuple[GridScales, Tensor]:
        assert choice.grid is not None
        scheme, group, symmetric = choice.grid.scheme, choice.group_size or weight.shape[1], choice.grid.symmetric
        if self.algorithm.clips:
            matters = torch.stack([batch.square().sum(0) for batch in inputs]).sum(0)
            steps = best_steps(weight, matters, scheme, group, symmetric)
        else:
            largest = None if choice.group_size else weight.abs().amax()
            steps = plain_steps(weight, scheme, group, symmetric, largest)
        if self.algorithm.codes == "gptq":
            hessian = self._hessian_of(value, inputs)
            return steps, gptq(weight, hessian, steps, scheme, group, self.algorithm.damping, self.keep_zeros)
        return steps, codes_of(weight, steps, scheme, group)

    def _hessian_of(self, value: fx.Node, inputs: list[Tensor]) -> Tensor:
        """X'X of a value, which several linears may read."""
        if self._hessian is None or self._hessian[0] is not value:
            self._hessian = value, torch.stack([batch.T @ batch for batch in inputs]).sum(0)
        return self._hessian[1]
