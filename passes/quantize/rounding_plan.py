"""What a model's weights become on fewer bits, decided as data before anything is rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import fx

from ...errors import LlmcError, UsageError
from ...ir.program import Program, where
from ...ir.stored import StoredCodes, stored_codes, why_dequantized
from ...ir.weights import Weight
from ...kernels.ops import embedding, linear
from ...kernels.ops.quantized import ACTIVATIONS, SCHEMES
from ..queries import is_op

# Groups that a scale may serve; kernels take powers of two from 16 on.
GROUPS = (256, 128, 64, 32, 16)
PER_CHANNEL, PER_TENSOR = "channel", "tensor"
# A model with fewer numbers than that in the matrices of its layers is small: rounding costs it more, and what its
# short matmuls take is mostly not the kernel's work on groups.
SMALL = 500_000_000


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise _invalid(f"{name} is {value!r}", f"Choose one of {_listed(choices)}.")


def _invalid(what: str, hint: str) -> LlmcError:
    return UsageError("SCHEME_INVALID", f"{what[0].upper()}{what[1:]}.", hint)


def _listed(choices: Iterable[object]) -> str:
    return ", ".join(map(str, choices))


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix may hold, and those that its inputs may.

    Attributes:
        scheme: "int8", "int4", "fp8", "fp8_e5m2" or "nf4": see `kernels.ops.quantized`.
        group: how many inputs share a scale, where that divides them, else the largest power of two below that does;
            or "channel", all inputs of an output, or "tensor", all there are.
        symmetric: whether zero has one code everywhere; else each group of int4 has a zero point.
        activation: what the inputs are rounded to: "none", "int8", "fp8" or "fp8_e5m2".
        static: the scale of the inputs is one number from calibration, not each row's own.
    """

    scheme: str
    group: int | str = PER_CHANNEL
    symmetric: bool = True
    activation: str = "none"
    static: bool = False

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, SCHEMES)
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.scheme in ("int4", "nf4") and self.group not in GROUPS:
            raise _invalid(f"{self.scheme} has groups of {self.group!r}", f"Choose one of {_listed(GROUPS)}.")
        if self.group not in (*GROUPS, PER_CHANNEL, *((PER_TENSOR,) if self.scheme in ("fp8", "fp8_e5m2") else ())):
            hint = f"Choose one of {_listed(GROUPS)} or {PER_CHANNEL!r}; fp8 may also have {PER_TENSOR!r}."
            raise _invalid(f"{self.scheme} has groups of {self.group!r}", hint)
        if not self.symmetric and self.scheme not in ("int4", "int8"):
            raise _invalid(f"{self.scheme} has zero points", "Only integers have them.")
        if self.static and self.activation == "none":
            raise _invalid("inputs that are not rounded have a scale from calibration", "Say what they are rounded to.")


@dataclass(frozen=True)
class Scheme:
    """How a model is rounded.

    Attributes:
        linears: what the matrices of layers become; None: they stay.
        wide: what the head and the embedding become.
        small: what the matrices of layers become in a small model; None: the same as in others.
    """

    name: str
    linears: Grid | None
    wide: Grid | None = Grid("int8", 128)
    small: Grid | None = None

    def of_size(self, numbers: int) -> Scheme:
        """The scheme for a model with so many numbers in the matrices of its layers."""
        return replace(self, linears=self.small, small=None) if self.small and numbers < SMALL else self


_OTHER_OP = "neither a linear nor an embedding reads it"

# What a checkpoint that is quantized already holds as codes, and nothing else.
AS_STORED = Scheme("stored", None, None)


SCHEMES_BY_NAME = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", Grid("int8", 128)),
        Scheme("int4", Grid("int4", 128), small=Grid("int4", 32, symmetric=False)),
        Scheme("w8a8", Grid("int8", activation="int8")),
        Scheme("fp8", Grid("fp8", activation="fp8")),
        Scheme("nf4", Grid("nf4", 64)),
    )
}


@dataclass(frozen=True)
class Override:
    """An exception: weights whose name fits the pattern become something else, or stay as they are (None)."""

    pattern: str
    grid: Grid | None


@dataclass(frozen=True)
class Choice:
    """What one weight becomes, and why; no grid: it stays.

    Attributes:
        group_size: inputs that share a scale in this weight, all of them with one scale a channel, 0 with one for all.
        is_wide: whether it is the head or the embedding, which sees few rows or none.
        is_stored: whether the checkpoint holds it as such codes, which are taken as they are.
        not_as_stored: why the checkpoint's codes of it can't be taken as they are.
    """

    grid: Grid | None
    why: str
    group_size: int = 0
    is_wide: bool = False
    is_stored: bool = False
    not_as_stored: str | None = None


@dataclass(frozen=True)
class RoundingPlan:
    """For each weight that a linear or an embedding reads, by its name: what becomes of it."""

    scheme: str
    weights: Mapping[str, Choice]

    def grid(self, name: str) -> Grid | None:
        """What a weight becomes."""
        choice = self.weights.get(name)
        return choice.grid if choice else None

    def with_grid(self, names: Iterable[str], grid: Grid, columns: Mapping[str, int], why: str) -> RoundingPlan:
        """A plan in which some weights, whose columns are given, become something else."""
        changed = {name: _chosen(grid, why, columns[name], self.weights[name].is_wide) for name in names}
        return replace(self, weights={**self.weights, **changed})


def analyse(
    program: Program, scheme: Scheme, overrides: Iterable[Override] = (), *, exact: bool = False
) -> RoundingPlan:
    """Decide what each weight becomes; of several overrides that fit a name the last one counts.

    Args:
        exact: whether groups that don't divide a weight's inputs are refused, not made smaller.

    Raises:
        LlmcError: GROUP_SIZE_INDIVISIBLE; RECIPE_UNUSED if an override fits no weight, for it was meant for one.
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
                _check_divides(str(read.target), int(read.meta["val"].shape[1]), choice.grid.group)
    for override in overrides:
        if not any(fnmatchcase(name, override.pattern) for name in weights):
            raise UsageError(
                "RECIPE_UNUSED",
                f"No weight that can be rounded fits {override.pattern!r}.",
                f"Their names are such as {', '.join(list(weights)[:3])}; `llmc inspect` shows them all.",
            )
    for name, weight in program.weights.items():
        # Weights of other ops stay numbers. If they were codes in the checkpoint, that is reported.
        if name not in weights and (lost := _why_not_as_stored(weight, _OTHER_OP)):
            weights[name] = Choice(None, _OTHER_OP, not_as_stored=lost)
    return RoundingPlan(scheme.name, weights)


def _choose(program: Program, node: fx.Node, scheme: Scheme, overrides: list[Override]) -> Choice:
    if others := [user for user in node.users if not (is_op(user, linear) or is_op(user, embedding))]:
        why = f"{others[0].name} reads it too"
        return Choice(None, why, not_as_stored=_why_not_as_stored(program.weights[str(node.target)], why))
    is_table = any(is_op(user, embedding) for user in node.users)
    if any(is_op(user, embedding) and user.args[0] is not program.inputs[0] for user in node.users):
        why = "it is looked up by something else than tokens"
        return Choice(None, why, not_as_stored=_why_not_as_stored(program.weights[str(node.target)], why))
    is_wide = is_table or any(is_head(program, user) for user in node.users)
    weight = program.weights[str(node.target)]
    stored, lost = stored_codes(weight), why_dequantized(weight)
    if stored and (choice := _as_stored(stored, is_wide)):
        return choice
    if stored:
        lost = f"no kernel takes its groups of {stored.group_size}"
    grid, why = (scheme.wide, "head or embedding") if is_wide else (scheme.linears, "linear")
    for override in overrides:
        if fnmatchcase(str(node.target), override.pattern):
            grid, why = override.grid, f"override {override.pattern}"
    if grid is None:
        return Choice(None, why, is_wide=is_wide, not_as_stored=lost)
    return replace(_chosen(grid, why, int(node.meta["val"].shape[1]), is_wide), not_as_stored=lost)


def _chosen(grid: Grid, why: str, columns: int, is_wide: bool) -> Choice:
    if grid.scheme == "int8" and not grid.symmetric:
        raise _invalid("int8 has zero points", "Only a checkpoint's own int8 codes may; int4 may have them.")
    if (group_size := _group_size(grid, columns)) is None:
        return Choice(None, f"its {columns} inputs don't divide into groups of 16 or more")
    if is_wide:
        grid = replace(grid, activation="none", static=False)
    return Choice(grid, why, group_size, is_wide)


def _why_not_as_stored(weight: Weight, why_kept_whole: str) -> str | None:
    """Return why codes of the checkpoint are not kept for a weight that can't be quantized; None if it had none."""
    return why_kept_whole if stored_codes(weight) else why_dequantized(weight)


def _as_stored(codes: StoredCodes, is_wide: bool) -> Choice | None:
    """The checkpoint's own codes, where kernels take their groups."""
    columns = codes.shape[1]
    by_channel = codes.group_size == columns and codes.scheme not in ("int4", "nf4")
    if not by_channel and codes.group_size not in GROUPS:
        return None
    group = PER_CHANNEL if by_channel else codes.group_size
    grid = Grid(codes.scheme, group, symmetric=codes.zeros is None)
    return Choice(grid, "the checkpoint has it so", codes.group_size, is_wide, is_stored=True)


def _group_size(grid: Grid, columns: int) -> int | None:
    if grid.group == PER_TENSOR:
        return 0
    # Kernels read one scale a channel by blocks as well.
    groups = [g for g in GROUPS if columns % g == 0]
    if not groups or grid.group == PER_CHANNEL:
        return columns if groups else None
    return next((g for g in groups if g <= int(grid.group)), None)


def _check_divides(name: str, columns: int, group: int) -> None:
    if columns % group:
        fitting = [g for g in GROUPS if columns % g == 0]
        raise UsageError(
            "GROUP_SIZE_INDIVISIBLE",
            f"The {columns} inputs of {name} don't divide into groups of {group}.",
            f"Choose a group size of {_listed(fitting)}." if fitting else "Leave it out of the plan: --ignore.",
        )


def _numbers_in_layers(program: Program) -> int:
    """How many numbers the matrices have that linears read, the head's not among them."""
    read = {node.args[1] for node in program.nodes if is_op(node, linear) and not is_head(program, node)}
    return sum(weight.numel for name in read if (weight := program.weight_of(name)) is not None)


def is_head(program: Program, node: fx.Node) -> bool:
    """Whether a linear gives a row as wide as the logits outside of every layer."""
    return node.meta["val"].shape[-1] == program.output.meta["val"].shape[-1] and not any(
        part.isdigit() for part in where(node).split(".")
    )
