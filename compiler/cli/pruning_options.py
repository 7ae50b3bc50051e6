"""The options of `llmc compile` that leave parts of a model out, and what they don't do for its speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = [
    click.option(
        "--prune",
        metavar="2:4|SHARE",
        help="Set weights of linears to zero: two of four inputs, or a share such as 0.5.",
    ),
    click.option(
        "--prune-algo",
        type=click.Choice(["sparsegpt", "wanda"]),
        help="What chooses the zeros.  [default: sparsegpt]",
    ),
    click.option(
        "--drop-layers", type=click.IntRange(min=1), metavar="N", help="Leave out the N layers that do least."
    ),
]


def pruning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def warn_of_zeros(chosen: dict[str, Any]) -> None:
    """Say on stderr, before any work, what zeros don't bring.

    Args:
        chosen: keywords for `compile`.
    """
    if chosen.get("prune") is not None:
        click.echo(
            f"No kernel of target {chosen['target']} makes use of zeros: --prune saves neither time nor bytes there. "
            "It shows what the zeros cost in quality; --drop-layers saves both.",
            err=True,
        )


def pruning_line(pruning: dict[str, Any]) -> str:
    """`layers.3, layers.5 left out; 2:4 by sparsegpt: 50.0% of 120 weights is zero`"""
    said = []
    if layers := pruning.get("layers"):
        said.append(f"{', '.join(layers['dropped'])} left out")
    if weights := pruning.get("weights"):
        said.append(
            f"{weights['pattern']} by {weights['algorithm']}: {weights['sparsity']:.1%} of {weights['pruned']} weights"
            " is zero"
        )
    return "; ".join(said)
