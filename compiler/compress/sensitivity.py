"""Sensitivity: an estimate of the divergence that rounding each linear causes.

To second order, an error e of a linear's output causes a divergence of half the mean of (g e)^2. Here g is the gradient
of the log probability of a token drawn from the model's own prediction: the Fisher information, estimated with one
sample per token. The interaction of errors at several tokens in attention is neglected. The estimates are good enough
to rank weights; their sum is only a guess, which `--max-kl` replaces by a measurement. Rounding the inputs instead of
the weight is another error of the same output.

One run forward and one backward per sequence suffice. All sequences go through a layer before the next one, so that
its weights are computed once in each direction, and only the values between layers are kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program, layer_of
from ...kernels.ops import linear
from ...kernels.ops.op import op_of
from ...kernels.ops.quantized import quantize_activation
from ...passes.queries import arguments, is_op

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Sensitivity:
    """Divergence caused by each linear alone, by weight name, in nats per token.

    Attributes:
        weights: divergence by rounding the weight.
        inputs: divergence by rounding the inputs to int8, with a scale per token.
    """

    weights: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, weight: float, inputs: float) -> None:
        """Add divergence by another sequence, or by another linear with the same weight."""
        for scores, score in ((self.weights, weight), (self.inputs, inputs)):
            scores[name] = scores.get(name, 0.0) + score


def sensitivity(
    program: Program,
    tokens: Tensor,
    errors: Mapping[str, Callable[[], Tensor]],
    watch: Callable[[int, int], None] = lambda done, total: None,
    segments: Sequence[list[fx.Node]] | None = None,
) -> Sensitivity:
    """Estimate the divergence that rounding each linear causes on its own.

    Args:
        tokens: sequences of one length, [sequences, length].
        errors: by the name of each rounded weight, a function that returns the rounded weight minus the weight.
        watch: called with the number of segments done, forward and backward, and the number of all.
        segments: the program's ops in order, in pieces that are run and differentiated one at a time. By default
            they are `layer_segments(program)`.
    """
    segments = layer_segments(program) if segments is None else segments
    last = _last_user(segments, program)
    runs = [_Run(program, sequence) for sequence in tokens.split(1)]
    result = Sensitivity()
    total = (2 * len(segments) - 1) * len(runs)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        watch(done, total)

    for index, segment in enumerate(segments[:-1]):
        weights = _Weights(program, errors)
        used = {node for node, user in last.items() if user > index}
        for run in runs:
            run.forward(segment, weights, used)
            step()
    generator = torch.Generator().manual_seed(0)
    for segment in reversed(segments):
        weights = _Weights(program, errors)
        for run in runs:
            run.backward(segment, weights, generator, result)
            step()
    by_token = ({name: scores.get(name, 0.0) / tokens.numel() for name in errors} for scores in vars(result).values())
    return Sensitivity(*by_token)


class _Weights:
    """Weights of a segment and their errors. Each is computed once, because that can take longer than its use."""

    def __init__(self, program: Program, errors: Mapping[str, Callable[[], Tensor]]) -> None:
        self.rounded = errors.keys()
        self.value = cache(lambda name: program.weights[name].evaluate())
        self.error = cache(lambda name: errors[name]())


class _Run:
    """A sequence on its way through the segments and back.

    Attributes:
        before: the values that each segment begins with, up to the one that runs next.
        gradients: of the values that the segments after this one use.
    """

    def __init__(self, program: Program, sequence: Tensor) -> None:
        first, second = program.inputs
        self.output = program.output
        self.before: list[Values] = [{first: sequence, second: torch.arange(sequence.shape[1])[None]}]
        self.gradients: dict[fx.Node, Tensor] = {}

    def forward(self, segment: list[fx.Node], weights: _Weights, used: Collection[fx.Node]) -> None:
        """Run a segment, and keep the values that later ones use."""
        with torch.no_grad():
            after = _run(segment, self.before[-1], weights)
        self.before.append({node: value for node, value in after.items() if node in used})

    def backward(
        self, segment: list[fx.Node], weights: _Weights, generator: torch.Generator, result: Sensitivity
    ) -> None:
        """Run the last segment of `before` again, and backward; add to the result."""
        inputs: Values = {
            node: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for node, value in self.before.pop().items()
        }
        with torch.enable_grad():
            after = _run(segment, inputs, weights)
        if self.output in segment:
            self.gradients[self.output] = _gradient_of_sampled_tokens(after[self.output].detach(), generator)
        outputs = [node for node in segment if node in self.gradients]
        linears = [node for node in segment if is_op(node, linear) and _weight_name(node) in weights.rounded]
        wanted = [node for node, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
        if not wanted and not linears:
            return  # it uses only tokens and positions
        derivatives = torch.autograd.grad(
            [after[node] for node in outputs],
            [after[node] for node in [*wanted, *linears]],
            [self.gradients.pop(node) for node in outputs],
            allow_unused=True,
        )
        for node, gradient in zip(wanted, derivatives, strict=False):
            if gradient is not None:
                self.gradients[node] = self.gradients[node] + gradient if node in self.gradients else gradient
        for node, gradient in zip(linears, derivatives[len(wanted) :], strict=True):
            if gradient is not None:
                _add_losses(node, after[arguments(node)["x"]].detach(), gradient, weights, result)


def _weight_name(node: fx.Node) -> str:
    return str(getattr(node.args[1], "target", ""))


def _add_losses(node: fx.Node, x: Tensor, gradient: Tensor, weights: _Weights, result: Sensitivity) -> None:
    """Add the losses of a linear, whose input is x and whose output has this gradient."""
    x, gradient, name = x.flatten(0, -2), gradient.flatten(0, -2), _weight_name(node)
    codes, scale = quantize_activation(x, "int8")
    # Sum over output channels of (e w) g = sum over input channels of e (g w).
    at_inputs = gradient @ weights.value(name).to(x)
    at_weight = gradient @ weights.error(name).to(x)
    result.add(name, _loss(x * at_weight), _loss((codes * scale - x) * at_inputs))


def _gradient_of_sampled_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of the log probability of tokens drawn from the logits."""
    probability = logits.float().softmax(-1)
    drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
    gradient = probability.neg_().flatten(0, -2)
    gradient.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=gradient.dtype))
    return gradient.view_as(logits)


def _loss(products: Tensor) -> float:
    """Return half the sum over tokens of (g e)^2.

    Args:
        products: the contribution of each input channel to g e, [tokens, I].
    """
    return float(products.sum(1).square().sum()) / 2


def _run(segment: list[fx.Node], given: Values, weights: _Weights) -> Values:
    """Return `given` and the values that a segment computes.

    Ops of the dialect run as the torch functions that define them, which autograd can differentiate.
    """
    values = dict(given)

    def evaluate(node: fx.Node) -> Any:
        return values[node] if node.op != "get_attr" else weights.value(str(node.target))

    for node in segment:
        args, kwargs = fx.map_arg((node.args, node.kwargs), evaluate)
        op = op_of(node.target)
        function = op.meaning if op is not None else node.target
        assert callable(function)
        values[node] = value = function(*args, **kwargs)
        # Values of tokens and weights alone are where the backward run ends.
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.is_floating_point():
            values[node] = value if value.requires_grad else value.requires_grad_()
    return values


def layer_segments(program: Program) -> list[list[fx.Node]]:
    """Return the program's ops in order, split where a layer begins or ends."""
    segments: list[list[fx.Node]] = [[]]
    layer = ""
    for node in program.nodes:
        if node.op != "call_function":
            continue
        if layer_of(node) != layer and segments[-1]:
            segments.append([])
        layer = layer_of(node)
        segments[-1].append(node)
    return segments


def _last_user(segments: Sequence[list[fx.Node]], program: Program) -> dict[fx.Node, int]:
    """Return the index of the last segment that uses each value.

    For the logits, it is the number of segments.
    """
    last = {used: index for index, segment in enumerate(segments) for node in segment for used in node.all_input_nodes}
    return last | {program.output: len(segments)}
