"""Ops that reshape, move, select and concatenate values, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....errors import LlmcError
from ....ir.nodes import value_of
from .graph import Value
from .lower import Entry, Lowering, Table

# Ends of slices: "to the end" in torch and ONNX, and "down to the first element" in ONNX, with a negative step.
_END, _BEFORE_FIRST = 2**63 - 1, -(2**63)


def unsupported(g: Lowering, what: str) -> LlmcError:
    """Return the error for a form of an op that no entry supports."""
    return LlmcError(
        "OP_UNSUPPORTED",
        f"The ONNX target has no lowering for {what}, which {g.scope or 'the model'} does in {g.node.name}.",
        "Report the model; no other option of this target will help.",
    )


def same(g: Lowering, input: Value, **_: Any) -> str:
    return g.op("Identity", input)


# Shapes ------------------------------------------------------------------------------------------------------------


def reshape(g: Lowering, input: Value, **sizes: Any) -> str:
    """Reshape. Sizes that the program knows are constants, so that -1 stands for one that only a run knows."""
    (shape,) = sizes.values()
    known = (size if isinstance(size, int) else None for size in value_of(g.node).shape)
    return g.reshape(input, [one if size is None else size for one, size in zip(shape, known, strict=True)])


def as_result(g: Lowering, input: Value, **_: Any) -> str:
    """Reshape to the shape of the program's result."""
    return g.reshape(input, value_of(g.node).shape)


def reshape_as(g: Lowering, input: Value, other: Value) -> str:
    return g.reshape(input, other.shape)


def unsqueeze(g: Lowering, input: Value, dim: int) -> str:
    return g.op("Unsqueeze", input, g.constant([dim % (len(input.shape) + 1)]))


def squeeze(g: Lowering, input: Value, dim: int | Sequence[int] | None = None) -> str:
    """Remove dimensions whose size is known to be 1."""
    rank = len(input.shape)
    dims = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = sorted({d % rank for d in dims if str(input.shape[d]) == "1"})
    return g.op("Squeeze", input, g.constant(axes)) if axes else g.op("Identity", input)


def transpose(g: Lowering, input: Value, **dims: int) -> str:
    """Swap two dimensions; `transpose` and `swapaxes` name them differently."""
    first, second = dims.values()
    order = list(range(len(input.shape)))
    order[first], order[second] = order[second], order[first]
    return g.op("Transpose", input, perm=order)


def matrix_transpose(g: Lowering, input: Value) -> str:
    return g.op("Transpose", input, perm=list(range(len(input.shape)))[::-1])


def permute(g: Lowering, input: Value, dims: Sequence[int]) -> str:
    return g.op("Transpose", input, perm=[d % len(input.shape) for d in dims])


def movedim(g: Lowering, input: Value, source: Any, destination: Any) -> str:
    """Move dimensions; the others keep their order."""
    rank = len(input.shape)
    sources, destinations = ([x] if isinstance(x, int) else list(x) for x in (source, destination))
    moved = {to % rank: d % rank for to, d in zip(destinations, sources, strict=True)}
    rest = iter(d for d in range(rank) if d not in moved.values())
    return g.op("Transpose", input, perm=[moved[i] if i in moved else next(rest) for i in range(rank)])


def expand(g: Lowering, input: Value, size: Sequence[Any], implicit: bool = False) -> str:
    """Broadcast to a size, in which -1 keeps a dimension."""
    # ONNX's Expand broadcasts in both directions: 1 keeps a dimension of any size.
    old_sizes = [*[None] * (len(size) - len(input.shape)), *map(str, input.shape)]
    kept = [old == str(new) for old, new in zip(old_sizes, value_of(g.node).shape, strict=True)]
    return g.op("Expand", input, g.sizes([1 if keep else s for keep, s in zip(kept, size, strict=True)]))


def expand_as(g: Lowering, input: Value, other: Value) -> str:
    return g.op("Expand", input, g.op("Shape", other))


def repeat(g: Lowering, input: Value, repeats: Sequence[Any]) -> str:
    missing = len(repeats) - len(input.shape)
    wide = g.op("Unsqueeze", input, g.constant(list(range(missing)))) if missing else input
    return g.op("Tile", wide, g.sizes(repeats))


def repeat_interleave(g: Lowering, dim: int | None = None, output_size: Any = None, **arguments: Any) -> str:
    """Repeat each slice of a dimension."""
    if "input" not in arguments or (isinstance(arguments["repeats"], Value) and not arguments["repeats"].symbol):
        raise unsupported(g, "aten.repeat_interleave by a tensor")
    input: Value = arguments["input"]
    flat: Any = input if dim is not None else g.op("Reshape", input, g.constant([-1]))
    rank, axis = (len(input.shape), dim % len(input.shape)) if dim is not None else (1, 0)
    tiles: list[Any] = [1] * (rank + 1)
    tiles[axis + 1] = arguments["repeats"]
    wide = g.op("Tile", g.op("Unsqueeze", flat, g.constant([axis + 1])), g.sizes(tiles))
    # In Reshape, 0 keeps the size at the same index: true before the repeated dimension, but not after it.
    if dim is None:
        return g.op("Reshape", wide, g.constant([-1]))
    after = [g.length(input, d) for d in range(axis + 1, rank)]
    return g.op("Reshape", wide, g.op("Concat", g.constant([0] * axis + [-1]), *after, axis=0))


# Parts -------------------------------------------------------------------------------------------------------------


def slice_(g: Lowering, input: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> str:
    """Slice a dimension; torch and ONNX both clamp the ends to its size."""
    first, last = 0 if start is None else start, _END if end is None else end
    return g.op("Slice", input, g.size(first), g.size(last), g.constant([dim]), g.size(step))


def narrow(g: Lowering, input: Value, dim: int, start: Any, length: Any) -> str:
    """Return `length` slices of a dimension, beginning at `start`."""
    if isinstance(start, Value) and not start.symbol:
        raise unsupported(g, "aten.narrow from a tensor")
    if isinstance(start, int) and isinstance(length, int):
        last: Any = g.constant([start + length or _END])
    else:
        last = g.op("Add", g.size(start), g.size(length))
    return g.op("Slice", input, g.size(start), last, g.constant([dim]))


def select(g: Lowering, input: Value, dim: int, index: Any) -> str:
    position = g.constant(index) if isinstance(index, int) else index
    return g.op("Gather", input, position, axis=dim)


def unbind(g: Lowering, input: Value, dim: int = 0) -> tuple[str, ...]:
    return tuple(g.op("Gather", input, g.constant(i), axis=dim) for i in range(len(value_of(g.node))))


def parts(g: Lowering, input: Value, dim: int = 0, **_: Any) -> tuple[str, ...]:
    """Write `split` or `chunk`; the sizes are those of the program's results."""
    return split(g, input, [part.shape[dim] for part in value_of(g.node)], dim)


def split(g: Lowering, input: Value, split_sizes: Sequence[Any], dim: int = 0) -> tuple[str, ...]:
    """Split into parts of the given sizes."""
    if len(split_sizes) == 1:
        return (g.op("Identity", input),)
    if not all(isinstance(size, (int, Value)) for size in split_sizes):
        raise unsupported(g, f"{g.node.target} of a dim that is not static")
    return g.op("Split", input, g.sizes(split_sizes), axis=dim, count=len(split_sizes))


def flip(g: Lowering, input: Value, dims: Sequence[int]) -> str:
    ends = [g.constant([x] * len(dims)) for x in (-1, _BEFORE_FIRST)]
    return g.op("Slice", input, *ends, g.constant(list(dims)), g.constant([-1] * len(dims)))


def roll(g: Lowering, input: Value, shifts: Sequence[Any], dims: Sequence[int] = ()) -> str:
    """Shift values along dimensions; values beyond one end reenter at the other."""
    if not dims:
        raise unsupported(g, "aten.roll of no dim")
    value: Any = input
    for shift, dim in zip(shifts, dims, strict=True):
        length = g.length(input, dim)
        cut = g.op("Sub", length, g.op("Mod", g.size(shift), length))
        tail = g.op("Slice", value, cut, g.constant([_END]), g.constant([dim]))
        head = g.op("Slice", value, g.constant([0]), cut, g.constant([dim]))
        value = g.op("Concat", tail, head, axis=dim)
    return value


# Joining -----------------------------------------------------------------------------------------------------------


def cat(g: Lowering, tensors: Sequence[Value], dim: int = 0) -> str:
    return g.op("Concat", *(g.cast(t, value_of(g.node).dtype) for t in tensors), axis=dim)


def stack(g: Lowering, tensors: Sequence[Value], dim: int = 0) -> str:
    axis = dim % (len(tensors[0].shape) + 1)
    wide = [g.op("Unsqueeze", g.cast(t, value_of(g.node).dtype), g.constant([axis])) for t in tensors]
    return g.op("Concat", *wide, axis=axis)


def pad(g: Lowering, input: Value, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> str:
    """Pad dimensions.

    torch has one pair per dimension, beginning with the last. ONNX has all starts and then all ends.
    """
    rank = len(input.shape)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    kind = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    filler = g.constant(value or 0, input.dtype) if kind == "constant" else None
    return g.op("Pad", input, g.sizes([*before, *after]), filler, mode=kind)


# By index ----------------------------------------------------------------------------------------------------------


def gather(g: Lowering, input: Value, dim: int, index: Value, sparse_grad: bool = False) -> str:
    return g.op("GatherElements", input, index, axis=dim)


def index_select(g: Lowering, input: Value, dim: int, index: Value) -> str:
    return g.op("Gather", input, index, axis=dim)


def index(g: Lowering, input: Value, indices: Sequence[Value | None]) -> str:
    """Index dimensions by tensors, as torch's advanced indexing does.

    The broadcast shape of the indices replaces the indexed dimensions. It takes the place of the first one, or comes
    first of all if the indexed dimensions are not adjacent.
    """
    dims = [dim for dim, positions in enumerate(indices) if positions is not None]
    tensors = [positions for positions in indices if positions is not None]
    if any(positions.dtype == torch.bool for positions in tensors):
        raise unsupported(g, "aten.index by a mask, whose result has an unknown size")
    if len(dims) == 1:
        return g.op("Gather", input, tensors[0], axis=dims[0])
    rank = len(input.shape)
    rest = [dim for dim in range(rank) if dim not in dims]
    # Adding a zero of the broadcast shape broadcasts the indices.
    zero: Any = g.op("Sub", tensors[0], tensors[0])
    for positions in tensors[1:]:
        zero = g.op("Add", zero, g.op("Sub", positions, positions))
    indices_per_dim = [g.op("Unsqueeze", g.op("Add", positions, zero), g.constant([-1])) for positions in tensors]
    front = g.op("Transpose", input, perm=[*dims, *rest]) if dims != list(range(len(dims))) else input
    values = g.op("GatherND", front, g.op("Concat", *indices_per_dim, axis=-1))
    if dims != list(range(dims[0], dims[-1] + 1)) or dims[0] == 0:
        return values
    index_rank = len(value_of(g.node).shape) - len(rest)
    before, after = range(index_rank, index_rank + dims[0]), range(index_rank + dims[0], index_rank + len(rest))
    return g.op("Transpose", values, perm=[*before, *range(index_rank), *after])


def scatter(g: Lowering, input: Value, dim: int, index: Value, **arguments: Any) -> str:
    reduction = {None: None, "add": "add", "multiply": "mul"}[arguments.get("reduce")]
    return _scatter(g, input, dim, index, arguments["src"] if "src" in arguments else arguments["value"], reduction)


def scatter_add(g: Lowering, input: Value, dim: int, index: Value, src: Value) -> str:
    return _scatter(g, input, dim, index, src, "add")


def _scatter(g: Lowering, input: Value, dim: int, index: Value, new: Any, reduction: str | None) -> str:
    if not isinstance(new, Value):
        new = g.op("Expand", g.constant(new, input.dtype), g.op("Shape", index))
    elif [*map(str, new.shape)] != [*map(str, index.shape)]:  # torch ignores values beyond the shape of the index
        axes = g.constant(list(range(len(index.shape))))
        new = g.op("Slice", new, g.constant([0] * len(index.shape)), g.op("Shape", index), axes)
    return g.op("ScatterElements", input, index, new, axis=dim, reduction=reduction)


def slice_scatter(
    g: Lowering, input: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> str:
    """Replace the slices that `slice` would return by `src`."""
    length = g.op("Squeeze", g.length(input, dim))
    indices = Value(g.op("Range", g.constant(0), length, g.constant(1)), torch.int64, (input.shape[dim],))
    return _replace(g, input, dim, slice_(g, indices, 0, start, end, step), src)


def select_scatter(g: Lowering, input: Value, src: Value, dim: int, index: Any) -> str:
    indices = g.constant([index % input.shape[dim]]) if isinstance(input.shape[dim], int) else g.size(index)
    return _replace(g, input, dim, indices, g.op("Unsqueeze", src, g.constant([dim % len(input.shape)])))


def _replace(g: Lowering, input: Value, dim: int, indices: str, new: str) -> str:
    """Replace the slices of `dim` at `indices` [N] by `new`."""
    rank = len(input.shape)
    swapped = list(range(rank))
    swapped[0], swapped[dim] = swapped[dim], 0

    def swap(value: str) -> str:
        return g.op("Transpose", value, perm=swapped) if dim % rank else value

    return swap(g.op("ScatterND", swap(input), g.op("Unsqueeze", indices, g.constant([1])), swap(new)))


_ENTRIES: dict[str, Entry] = {
    "alias clone contiguous view_as_complex view_as_real": same,
    "reshape view _unsafe_view": reshape,
    "flatten unflatten": as_result,
    "reshape_as view_as": reshape_as,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "transpose swapaxes": transpose,
    "t": matrix_transpose,
    "permute": permute,
    "movedim": movedim,
    "expand": expand,
    "expand_as": expand_as,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    "chunk split": parts,
    "split_with_sizes": split,
    "flip": flip,
    "roll": roll,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd pad": pad,
    "gather": gather,
    "index_select": index_select,
    "index": index,
    "scatter": scatter,
    "scatter_add": scatter_add,
    "slice_scatter": slice_scatter,
    "select_scatter": select_scatter,
}

VIEWS: Table = {f"aten.{name}": entry for names, entry in _ENTRIES.items() for name in names.split()}
