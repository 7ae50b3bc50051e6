"""The grid that each weight of a model is quantized to, decided as data before any weight is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import fx

from ...errors import UsageError
from ...ir.nodes import value_of
from ...ir.program import Program, where
from ...ir.stored import StoredCodes, stored_codes, why_dequantized
from ...ir.weights import Weight
from ...kernels.ops import embedding, linear
from ..queries import is_op
from .schemes import PER_CHANNEL, PER_TENSOR, Grid, Override, Scheme, listed

_OTHER_OP = "neither a linear nor an embedding reads it"


@dataclass(frozen=True)
class Choice:
    """The decision about one weight.

    Attributes:
        grid: the grid of its codes; None if it is not quantized.
        why: the reason for the decision.
        group_size: the number of input channels that share a scale: all of them if each output channel has one scale,
            0 if the whole weight has one.
        is_wide: True for the LM head and the embedding, which multiply few tokens or none.
        is_stored: True if the checkpoint has codes on this grid; they are kept unchanged.
        not_as_stored: why codes in the checkpoint are not kept unchanged; None if they are, or if there are none.
    """

    grid: Grid | None
    why: str
    group_size: int = 0
    is_wide: bool = False
    is_stored: bool = False
    not_as_stored: str | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """The decisions about all weights that a linear or an embedding reads, by name."""

    scheme: str
    weights: Mapping[str, Choice]
    group_sizes: tuple[int, ...] = ()

    def grid(self, name: str) -> Grid | None:
        """Return the grid of a weight; None if it is not quantized or not in the plan."""
        choice = self.weights.get(name)
        return choice.grid if choice else None

    @property
    def quantizes_inputs_by_token(self) -> bool:
        """True if inputs of some linears are quantized to int8 with one scale per token."""
        grids = (choice.grid for choice in self.weights.values())
        return any(grid.activation == "int8" and not grid.static for grid in grids if grid)

    def with_grid(
        self, names: Iterable[str], grid: Grid, input_channels: Mapping[str, int], why: str
    ) -> QuantizationPlan:
        """Return a copy of the plan with another grid for some weights.

        Args:
            input_channels: the number of input channels of each of these weights.
        """
        changed = {
            name: _chosen(grid, why, input_channels[name], self.weights[name].is_wide, self.group_sizes)
            for name in names
        }
        return replace(self, weights={**self.weights, **changed})


def analyse(
    program: Program, scheme: Scheme, overrides: Iterable[Override] = (), *, exact: bool = False
) -> QuantizationPlan:
    """Choose the grid of each weight. If several overrides match a name, the last one counts.

    Args:
        exact: refuse groups that don't divide a weight's input channels; by default they are made smaller.

    Raises:
        LlmcError: GROUP_SIZE_INDIVISIBLE; RECIPE_UNUSED if an override matches no weight.
    """
    overrides = list(overrides)
    scheme = scheme.of_size(_numbers_in_layers(program))
    weights: dict[str, Choice] = {}
    for node in program.nodes:
        if not (is_op(node, linear) or is_op(node, embedding)):
            continue
        read = node.args[1]
        weight = program.weight_of(read)
        if isinstance(read, fx.Node) and weight is not None and not weight.is_constant:
            weights[str(read.target)] = choice = _choose(program, read, scheme, overrides)
            if exact and choice.grid and isinstance(choice.grid.group, int) and not choice.is_wide:
                _check_divides(str(read.target), int(value_of(read).shape[1]), choice.grid.group, scheme.group_sizes)
    for override in overrides:
        if not any(fnmatchcase(name, override.pattern) for name in weights):
            raise UsageError(
                "RECIPE_UNUSED",
                f"The pattern {override.pattern!r} matches no weight that can be quantized.",
                f"Correct it. Names are, for example, {', '.join(list(weights)[:3])}; `llmc inspect` shows all.",
            )
    for name, weight in program.weights.items():
        # Weights of other ops are not quantized. The plan records those that are codes in the checkpoint.
        if name not in weights and (lost := _why_not_as_stored(weight, _OTHER_OP)):
            weights[name] = Choice(None, _OTHER_OP, not_as_stored=lost)
    return QuantizationPlan(scheme.name, weights, scheme.group_sizes)


def _choose(program: Program, node: fx.Node, scheme: Scheme, overrides: list[Override]) -> Choice:
    if others := [user for user in node.users if not (is_op(user, linear) or is_op(user, embedding))]:
        why = f"{others[0].name} reads it too"
        return Choice(None, why, not_as_stored=_why_not_as_stored(program.weights[str(node.target)], why))
    is_table = any(is_op(user, embedding) for user in node.users)
    if any(is_op(user, embedding) and user.args[0] is not program.tokens for user in node.users):
        why = "it is looked up by something else than tokens"
        return Choice(None, why, not_as_stored=_why_not_as_stored(program.weights[str(node.target)], why))
    is_wide = is_table or any(is_head(program, user) for user in node.users)
    weight = program.weights[str(node.target)]
    stored, lost = stored_codes(weight), why_dequantized(weight)
    if stored and not (lost := scheme.why_not(stored.scheme, _group_of(stored), stored.zeros is not None)):
        grid = Grid(stored.scheme, _group_of(stored), symmetric=stored.zeros is None)
        return Choice(grid, "the checkpoint has it so", stored.group_size, is_wide, is_stored=True)
    wanted, why = (scheme.wide, "head or embedding") if is_wide else (scheme.linears, "linear")
    for override in overrides:
        if fnmatchcase(str(node.target), override.pattern):
            wanted, why = override.grid, f"override {override.pattern}"
    if wanted is None:
        return Choice(None, why, is_wide=is_wide, not_as_stored=lost)
    chosen = _chosen(wanted, why, int(value_of(node).shape[1]), is_wide, scheme.group_sizes)
    return replace(chosen, not_as_stored=lost)


def _chosen(grid: Grid, why: str, input_channels: int, is_wide: bool, group_sizes: tuple[int, ...]) -> Choice:
    if grid.scheme == "int8" and not grid.symmetric:
        raise UsageError(
            "SCHEME_INVALID",
            "The scheme asks for int8 with zero points.",
            "Set symmetric = true, or use int4. Only int8 codes of a quantized checkpoint can have zero points.",
        )
    if (group_size := _group_size(grid, input_channels, group_sizes)) is None:
        return Choice(None, f"its {input_channels} inputs don't divide into groups of 16 or more")
    if is_wide:
        grid = replace(grid, activation="none", static=False)
    return Choice(grid, why, group_size, is_wide)


def _why_not_as_stored(weight: Weight, why_kept_whole: str) -> str | None:
    """Return why codes of the checkpoint are not kept for a weight that can't be quantized; None if it had none."""
    return why_kept_whole if stored_codes(weight) else why_dequantized(weight)


def _group_of(codes: StoredCodes) -> int | str:
    by_channel = codes.group_size == codes.shape[1] and codes.scheme not in ("int4", "nf4")
    return PER_CHANNEL if by_channel else codes.group_size


def _group_size(grid: Grid, input_channels: int, group_sizes: tuple[int, ...]) -> int | None:
    if grid.group == PER_TENSOR:
        return 0
    # Kernels process an output channel in groups, even if it has one scale.
    groups = [g for g in group_sizes if input_channels % g == 0]
    if not groups or grid.group == PER_CHANNEL:
        return input_channels if groups else None
    return next((g for g in groups if g <= int(grid.group)), None)


def _check_divides(name: str, input_channels: int, group: int, group_sizes: tuple[int, ...]) -> None:
    if input_channels % group:
        fitting = [g for g in group_sizes if input_channels % g == 0]
        raise UsageError(
            "GROUP_SIZE_INDIVISIBLE",
            f"The {input_channels} inputs of {name} don't divide into groups of {group}.",
            f"Set --group-size to {listed(fitting)}." if fitting else f"Keep the weight unquantized: --ignore {name}",
        )


def _numbers_in_layers(program: Program) -> int:
    """Count the elements of the weights of all linears except the LM head."""
    weights = {node.args[1] for node in program.nodes if is_op(node, linear) and not is_head(program, node)}
    return sum(weight.numel for node in weights if (weight := program.weight_of(node)) is not None)


def is_head(program: Program, node: fx.Node) -> bool:
    """Return True for a linear outside of all layers that computes as many channels as the logits have."""
    return value_of(node).shape[-1] == value_of(program.output).shape[-1] and not any(
        part.isdigit() for part in where(node).split(".")
    )
