"""Names in ONNX graphs that the lowering writes and the engines of such graphs read."""

from __future__ import annotations

# The file, made when a graph is opened, in which the graph looks for its derived matrices.
DERIVED_FILE = "derived"


def past_name(cache: int, role: str) -> str:
    """Return the name of the graph input with a part of a cache, as the ecosystem calls it."""
    return f"past_key_values.{cache}.{role}"


def present_name(cache: int, role: str) -> str:
    """Return the name of the graph output that aliases that input."""
    return f"present.{cache}.{role}"


# The graph input with the number of positions that the sequence of a piece holds: [1], or [0] without a piece.
PIECE = "piece"


def piece_name(name: str) -> str:
    """Return the name of the input or output that is to a piece what `name` is to the other sequences."""
    return f"{PIECE}.{name}"
