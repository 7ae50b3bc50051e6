"""How much the model's predictions suffer from the rounding of each linear, by one run forward and one back.

To second order the divergence that an error e of a linear's output causes is half the mean of (g e)^2, where g is the
gradient of the log probability of a token that the model itself might say (the Fisher information, seen by one sample
a token). That errors at several tokens meet again in attention is left out: it ranks weights, and the sum is a guess
that `--max-kl` measures. Rounding the inputs instead of the weight is another error of the same output.

Weights are read layer by layer in both directions, and only what flows between layers is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Program, layer_of
from ...kernels.ops import linear
from ...kernels.ops.op import op_of
from ...kernels.ops.quantized import round_activation
from ...passes.queries import arguments, is_op

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Foretold:
    """Divergences in nats a token, each caused by one linear alone, by the name of its weight.

    Attributes:
        weights: by the rounding of its weight.
        inputs: by the rounding of its inputs to int8, with a scale for each row.
    """

    weights: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, weight: float, inputs: float) -> None:
        """Count what another token or reader adds."""
        for scores, score in ((self.weights, weight), (self.inputs, inputs)):
            scores[name] = scores.get(name, 0.0) + score


def sensitivity(
    program: Program,
    tokens: Tensor,
    errors: Mapping[str, Callable[[], Tensor]],
    watch: Callable[[int, int], None] = lambda done, total: None,
    segments: Sequence[list[fx.Node]] | None = None,
) -> Foretold:
    """The divergence that the rounding of each linear causes by itself.

    Args:
        tokens: texts of one length, [texts, length].
        errors: of each weight that is rounded, by its name: what rounding adds to it.
        watch: called with the layers that are done, there and back, and all of them.
        segments: the program's ops in order, in pieces that are run and differentiated one at a time; by default its
            layers.
    """
    segments = layer_segments(program) if segments is None else segments
    found = Foretold()
    total = 2 * len(segments) * len(tokens)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        watch(done, total)

    generator = torch.Generator().manual_seed(0)
    for text in tokens.split(1):
        _add_text(program, segments, text, errors, generator, step, found)
    by_token = ({name: scores.get(name, 0.0) / tokens.numel() for name in errors} for scores in vars(found).values())
    return Foretold(*by_token)


def _add_text(
    program: Program,
    segments: Sequence[list[fx.Node]],
    text: Tensor,
    errors: Mapping[str, Callable[[], Tensor]],
    generator: torch.Generator,
    step: Callable[[], None],
    found: Foretold,
) -> None:
    first, second = program.inputs
    values: Values = {first: text, second: torch.arange(text.shape[1])[None]}
    kept: list[Values] = []
    last = _last_reader(segments, program)
    for index, segment in enumerate(segments):
        kept.append(values)
        with torch.no_grad():
            after = _run(program, segment, values)
        values = {node: value for node, value in after.items() if last.get(node, 0) > index}
        step()
    logits = values[program.output]
    gradients: dict[fx.Node, Tensor] = {program.output: _gradient_of_a_sample(logits, generator)}
    for segment, before in zip(reversed(segments), reversed(kept), strict=True):
        _back(program, segment, before, gradients, errors, found)
        step()


def _gradient_of_a_sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of the log probability of tokens drawn from the model, by its logits."""
    probability = logits.float().softmax(-1)
    drawn = torch.multinomial(probability.flatten(0, -2), 1, generator=generator)
    gradient = probability.neg_().flatten(0, -2)
    gradient.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=gradient.dtype))
    return gradient.view_as(logits)


def _back(
    program: Program,
    segment: list[fx.Node],
    before: Values,
    gradients: dict[fx.Node, Tensor],
    errors: Mapping[str, Callable[[], Tensor]],
    found: Foretold,
) -> None:
    """Run a segment again and back; `gradients` of what it gives become those of what it is given."""
    given: Values = {
        node: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for node, value in before.items()
    }
    with torch.enable_grad():
        after = _run(program, segment, given)
    outputs = [node for node in segment if node in gradients]
    linears = [node for node in segment if is_op(node, linear) and str(getattr(node.args[1], "target", "")) in errors]
    wanted = [node for node, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
    if not wanted and not linears:
        return  # nothing is in front of it but tokens
    slopes = torch.autograd.grad(
        [after[node] for node in outputs],
        [after[node] for node in [*wanted, *linears]],
        [gradients.pop(node) for node in outputs],
        allow_unused=True,
    )
    for node, gradient in zip(wanted, slopes, strict=False):
        if gradient is not None:
            gradients[node] = gradients[node] + gradient if node in gradients else gradient
    for node, gradient in zip(linears, slopes[len(wanted) :], strict=True):
        if gradient is None:
            continue
        name = str(node.args[1].target)  # type: ignore[union-attr]
        x = after[arguments(node)["x"]].detach().flatten(0, -2)
        codes, scale = round_activation(x, "int8")
        # The sum over outputs of (e w) g is that over inputs of e (g w).
        at_inputs = gradient.flatten(0, -2) @ program.weights[name].evaluate().to(x)
        at_weight = gradient.flatten(0, -2) @ errors[name]().to(x)
        found.add(name, _loss(x * at_weight), _loss((codes * scale - x) * at_inputs))


def _loss(products: Tensor) -> float:
    """Of all tokens, from what each input's error does to the log probability."""
    return float(products.sum(1).square().sum()) / 2


def _run(program: Program, segment: list[fx.Node], given: Values) -> Values:
    """What is there behind a segment, by the plain meaning of each op, which can be differentiated."""
    values, weights = dict(given), dict[str, Tensor]()

    def read(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return values[node]
        name = str(node.target)
        if name not in weights:
            weights[name] = program.weights[name].evaluate()
        return weights[name]

    for node in segment:
        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        own = op_of(node.target)
        call = own.meaning if own is not None else node.target
        assert callable(call)
        values[node] = value = call(*args, **kwargs)
        # What is made of tokens and weights alone is where the way back ends.
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.is_floating_point():
            values[node] = value if value.requires_grad else value.requires_grad_()
    return values


def layer_segments(program: Program) -> list[list[fx.Node]]:
    """The ops in order, cut where a layer begins."""
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


def _last_reader(segments: Sequence[list[fx.Node]], program: Program) -> dict[fx.Node, int]:
    """The last segment that reads a value; the logits are read behind all."""
    last = {read: index for index, segment in enumerate(segments) for node in segment for read in node.all_input_nodes}
    return last | {program.output: len(segments)}
