"""Find the pass that broke a program, and where: used when the gate refuses an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program, layer_of, where
from ...kernels.ops import quant_linear
from ...passes.base import Fuel, Numerics, Pass
from ...passes.queries import is_op
from ...runtimes.engines.selfcheck import LIMITS

# Values of each node that are kept to compare; a mistake rarely spares all of them.
_SAMPLES = 512
# Tokens that go through the cache one by one in a run of a program with caches.
_SINGLE_TOKENS = 2


@dataclass(frozen=True)
class Recipe:
    """The passes that make an artifact's graphs from a captured program.

    Attributes:
        common: captured -> cached, for all graphs.
        finishing: what follows for each graph, by its name.
    """

    common: Sequence[Pass]
    finishing: Mapping[str, Sequence[Pass]]


@dataclass(frozen=True)
class FaultyPass:
    """The first pass after which a program computes something else, and the first module that shows it.

    Attributes:
        graph: the graph that the pass was run for; empty if for all.
    """

    name: str
    graph: str
    place: str
    error: float

    def __str__(self) -> str:
        graph = f" of the {self.graph} graph" if self.graph else ""
        return (
            f"{self.name}{graph} is the first pass to change the result (error {self.error:.2g}), first in {self.place}"
        )


def find_faulty_pass(
    program: Program, recipe: Recipe, tokens: Tensor, limits_key: str, dtype: str = "fp32"
) -> FaultyPass | None:
    """Run a recipe pass by pass and compare the program before and after each.

    Fuel is what LLMC_FUEL says, as in the compilation that is examined.

    Args:
        program: the captured program; it is changed.
        tokens: [B, S] to run it on.
        limits_key: the key of the gate's limits for the artifact.
        dtype: what the program computes in, a key of the limits too.

    Returns:
        The first pass that changes more than it may, or None: then the lowering or the runtime is at fault.
    """
    bisection = _Bisection(tokens, limits_key, dtype)
    found = bisection.run(program, recipe.common, "")
    for graph, passes in recipe.finishing.items():
        if found is not None:
            break
        found = bisection.run(program.copy(), passes, graph)
    return found


class _Bisection:
    def __init__(self, tokens: Tensor, limits_key: str, dtype: str) -> None:
        self.tokens, self.limits_key, self.dtype = tokens, limits_key, dtype
        self.fuel = Fuel.from_environment()

    def run(self, program: Program, passes: Sequence[Pass], graph: str) -> FaultyPass | None:
        before = _observe(program, self.tokens)
        for subject in passes:
            if not subject(program, self.fuel).matches:
                continue
            after = _observe(program, self.tokens)
            errors = [_error(before.whole, after.whole), _error(before.pieces, after.pieces)]
            error, limit = max(errors), self._limit(subject, program)
            if not all(one <= limit for one in errors):  # NaN is not
                return FaultyPass(subject.name, graph, _first_difference(before, after, limit), error)
            before = after
        return None

    def _limit(self, subject: Pass, program: Program) -> float:
        """Return the largest error of a pass: exact ones are held to the dtype's limit unless inputs are quantized."""
        limits = LIMITS[self.limits_key]
        if subject.numerics is Numerics.LOSSY:
            return limits.model
        if subject.numerics is Numerics.QUANTIZES_INPUTS or _quantizes_inputs(program):
            return limits.rounded
        return LIMITS[self.dtype].model


def _quantizes_inputs(program: Program) -> bool:
    """Return True if a sum in another order may move an activation to another code."""
    if any(cache.is_quantized for cache in program.caches):
        return True
    linears = (node for node in program.nodes if is_op(node, quant_linear))
    return any(quant_linear.bind(n.args, dict(n.kwargs))["activation"] != "none" for n in linears)


@dataclass(frozen=True)
class _Run:
    """The results of a program.

    Attributes:
        whole: logits [B, S, V] of whole sequences in one call.
        pieces: the same logits in several calls, through the caches; without caches, `whole` again.
        samples: a few values of every node of the call with whole sequences, and the module they are in.
    """

    whole: Tensor
    pieces: Tensor
    samples: dict[str, tuple[str, Tensor]]


def _observe(program: Program, tokens: Tensor) -> _Run:
    watcher = _Watcher(program)
    batch, length = tokens.shape
    with torch.no_grad():
        (whole, *_) = watcher.feed(tokens, 0, program.empty_caches(batch))
        samples = dict(watcher.samples)
        if not program.caches:
            return _Run(whole, whole, samples)
        pieces, caches, start = [], program.empty_caches(batch), 0
        for size in _pieces(length):
            piece, *caches = watcher.feed(tokens[:, start : start + size], start, caches)
            pieces.append(piece)
            start += size
    return _Run(whole, torch.cat(pieces, 1), samples)


def _pieces(length: int) -> list[int]:
    """Split a sequence into a prompt, single tokens, and several tokens at once."""
    first = max(1, (length - _SINGLE_TOKENS) // 2)
    single = min(_SINGLE_TOKENS, length - first)
    rest = length - first - single
    return [first, *[1] * single, *([rest] if rest else [])]


class _Watcher(fx.Interpreter):
    """Runs a program and keeps samples of what its nodes compute."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program
        self.samples: dict[str, tuple[str, Tensor]] = {}

    def feed(self, tokens: Tensor, start: int, caches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on tokens [B, S] that begin at a position, with the logits of all of them wanted."""
        batch, length = tokens.shape
        roles = {
            "tokens": tokens,
            "positions": torch.arange(start, start + length).repeat(batch, 1),
            "starts": torch.full((batch,), start, dtype=torch.int64),
            "wanted": torch.arange(length),
        }
        outputs: tuple[Tensor, ...] = self.run(*self.program.arguments(roles, caches))
        return outputs

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self.program.weights[target].evaluate()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            flat = value.detach().flatten()
            place = where(n) or layer_of(n) or n.name
            self.samples[n.name] = place, flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()
        return value


def _first_difference(before: _Run, after: _Run, limit: float) -> str:
    """Return the module of the first node that both programs have and that computes something else now."""
    for name, (place, value) in after.samples.items():
        known = before.samples.get(name)
        if known is not None and known[1].shape == value.shape and not _error(known[1], value) <= limit:
            return place
    return "the output"


def _error(one: Tensor, other: Tensor) -> float:
    """Return the root mean square of the difference, relative to the spread of the first."""
    if one.shape != other.shape:
        return float("inf")
    spread = (one.double() - one.double().mean()).square().mean().sqrt().clamp(min=1e-30)
    return float((one.double() - other.double()).square().mean().sqrt() / spread)
