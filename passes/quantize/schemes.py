"""Number grids for weights, schemes made of them, and exceptions for single weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...errors import UsageError
from ...kernels.formats import ACTIVATIONS, FLOAT8_NAMES, SCHEMES

PER_CHANNEL, PER_TENSOR = "channel", "tensor"


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight matrix may hold, and the numbers that its inputs may hold.

    Which groups a kernel takes is the target's knowledge: see `Scheme.group_sizes`.

    Attributes:
        scheme: the format of the codes: "int8", "int4", "fp8", "fp8_e5m2" or "nf4".
        group: input channels that share a scale. If that doesn't divide the weight, the largest power of two below it
            that does. "channel": all input channels of an output channel. "tensor": the whole matrix.
        symmetric: zero has the same code everywhere. If False, each group has a zero point.
        activation: format that the inputs are quantized to: "none", "int8", "fp8" or "fp8_e5m2".
        static: the scale of the inputs is one number from calibration, not one per token.
    """

    scheme: str
    group: int | str = PER_CHANNEL
    symmetric: bool = True
    activation: str = "none"
    static: bool = False

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, SCHEMES)
        _one_of("activation", self.activation, ACTIVATIONS)
        packed = self.scheme in ("int4", "nf4")
        words = () if packed else (PER_CHANNEL, PER_TENSOR) if self.scheme in FLOAT8_NAMES else (PER_CHANNEL,)
        is_size = type(self.group) is int and self.group >= 2 and self.group & (self.group - 1) == 0
        if not is_size and self.group not in words:
            wanted = " or ".join(["a power of two", *(repr(word) for word in words)])
            raise _invalid(f"{self.scheme} has groups of {self.group!r}", f"Give {wanted}.")
        if not self.symmetric and self.scheme not in ("int4", "int8"):
            raise _invalid(f"{self.scheme} has zero points", "Set symmetric = true: only integer schemes have them.")
        if self.static and self.activation == "none":
            raise _invalid("static is set, but inputs are not quantized", "Set activation, or leave out static.")


@dataclass(frozen=True)
class Scheme:
    """How the weights of a model are quantized for one target.

    Attributes:
        linears: grid of the linears inside layers; None keeps their weights.
        wide: grid of the LM head and the embedding.
        small: grid of the linears inside layers in a small model; None uses `linears`.
        small_below: a model is small if the linears of its layers hold fewer numbers than this.
        group_sizes: the groups that the target's kernels take, largest first.
        formats: the formats of codes that they take.
        grouped: the formats that they take with a scale for each group; others have one for each output channel.
        zero_points: they take codes with zero points.
    """

    name: str
    linears: Grid | None
    wide: Grid | None = None
    small: Grid | None = None
    small_below: int = 0
    group_sizes: tuple[int, ...] = ()
    formats: tuple[str, ...] = SCHEMES
    grouped: tuple[str, ...] = SCHEMES
    zero_points: bool = True

    def of_size(self, numbers: int) -> Scheme:
        """Return the scheme for a model with so many numbers in the linears of its layers."""
        return replace(self, linears=self.small, small=None) if self.small and numbers < self.small_below else self

    def with_group(self, group: int | str) -> Scheme:
        """Return the scheme with another group for the linears inside layers, in models of every size."""
        assert self.linears is not None
        return replace(self, linears=replace(self.linears, group=group), small=None)

    def check(self, grid: Grid) -> None:
        """Refuse a grid that the target's kernels don't take.

        Raises:
            UsageError: SCHEME_INVALID.
        """
        if isinstance(grid.group, int) and grid.group not in self.group_sizes:
            raise _invalid(f"{grid.scheme} has groups of {grid.group}", f"Choose one of {listed(self.group_sizes)}.")
        if why := self.why_not(grid.scheme, grid.group, not grid.symmetric):
            raise _invalid(f"a weight is to be {grid.scheme}, but {why}", "Choose another grid for it.")

    def why_not(self, scheme: str, group: int | str, zero_points: bool) -> str | None:
        """Return why the target's kernels don't take such codes; None if they do.

        Args:
            scheme: the format of the codes.
            group: the channels that share a scale, as in `Grid`.
        """
        if scheme not in self.formats:
            return f"no kernel of the target reads {scheme}"
        if zero_points and not self.zero_points:
            return "no kernel of the target has zero points"
        if isinstance(group, int) and scheme not in self.grouped:
            return f"the target's kernels read {scheme} with one scale for each output channel"
        if isinstance(group, int) and group not in self.group_sizes:
            return f"no kernel of the target supports groups of {group}"
        return None


@dataclass(frozen=True)
class Override:
    """An exception: weights whose name matches the pattern get another grid, or stay as they are (None)."""

    pattern: str
    grid: Grid | None


def listed(choices: Iterable[object]) -> str:
    """Join choices for a message."""
    return ", ".join(map(str, choices))


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise _invalid(f"{name} is {value!r}", f"Choose one of {listed(choices)}.")


def _invalid(what: str, hint: str) -> UsageError:
    return UsageError("SCHEME_INVALID", f"{what[0].upper()}{what[1:]}.", hint)
