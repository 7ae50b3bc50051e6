"""Ops that move, select and join values, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....errors import LlmcError
from .graph import Value
from .lower import Entry, Lowering, Table

# What torch and ONNX alike read as "to the end", and ONNX as "down to the first" where it steps back.
_END, _BEFORE_FIRST = 2**63 - 1, -(2**63)


def unsupported(g: Lowering, what: str) -> LlmcError:
    """The error for a spelling of an op that no entry writes."""
    return LlmcError(
        "OP_UNSUPPORTED",
        f"The ONNX back end has no lowering for {what}, which {g.scope or 'the model'} does in {g.node.name}.",
        "Report the model; no other option of this target will help.",
    )


def same(g: Lowering, input: Value, **_: Any) -> str:
    return g.op("Identity", input)


# Shapes ------------------------------------------------------------------------------------------------------------


def reshape(g: Lowering, input: Value, **sizes: Any) -> str:
    (shape,) = sizes.values()
    return g.reshape(input, shape)


def as_result(g: Lowering, input: Value, **_: Any) -> str:
    """A reshape to what the program knows of the result."""
    return g.reshape(input, g.node.meta["val"].shape)


def reshape_as(g: Lowering, input: Value, other: Value) -> str:
    return g.reshape(input, other.shape)


def unsqueeze(g: Lowering, input: Value, dim: int) -> str:
    return g.op("Unsqueeze", input, g.constant([dim % (len(input.shape) + 1)]))


def squeeze(g: Lowering, input: Value, dim: int | Sequence[int] | None = None) -> str:
    """Without dims that the program knows to be 1."""
    rank = len(input.shape)
    asked = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = sorted({d % rank for d in asked if str(input.shape[d]) == "1"})
    return g.op("Squeeze", input, g.constant(axes)) if axes else g.op("Identity", input)


def transpose(g: Lowering, input: Value, **dims: int) -> str:
    """Two dims swapped; `transpose` and `swapaxes` name them differently."""
    one, other = dims.values()
    order = list(range(len(input.shape)))
    order[one], order[other] = order[other], order[one]
    return g.op("Transpose", input, perm=order)


def matrix_transpose(g: Lowering, input: Value) -> str:
    return g.op("Transpose", input, perm=list(range(len(input.shape)))[::-1])


def permute(g: Lowering, input: Value, dims: Sequence[int]) -> str:
    return g.op("Transpose", input, perm=[d % len(input.shape) for d in dims])


def movedim(g: Lowering, input: Value, source: Any, destination: Any) -> str:
    """The other dims keep their order."""
    rank = len(input.shape)
    froms, tos = ([x] if isinstance(x, int) else list(x) for x in (source, destination))
    placed = {to % rank: d % rank for to, d in zip(tos, froms, strict=True)}
    rest = iter(d for d in range(rank) if d not in placed.values())
    return g.op("Transpose", input, perm=[placed[i] if i in placed else next(rest) for i in range(rank)])


def expand(g: Lowering, input: Value, size: Sequence[Any], implicit: bool = False) -> str:
    """Broadcast to a size, of which -1 keeps what is there."""
    # ONNX broadcasts both ways: 1 keeps what is there, whatever it is.
    known = [*[None] * (len(size) - len(input.shape)), *map(str, input.shape)]
    kept = [old == str(new) for old, new in zip(known, g.node.meta["val"].shape, strict=True)]
    return g.op("Expand", input, g.sizes([1 if keep else s for keep, s in zip(kept, size, strict=True)]))


def expand_as(g: Lowering, input: Value, other: Value) -> str:
    return g.op("Expand", input, g.op("Shape", other))


def repeat(g: Lowering, input: Value, repeats: Sequence[Any]) -> str:
    missing = len(repeats) - len(input.shape)
    wide = g.op("Unsqueeze", input, g.constant(list(range(missing)))) if missing else input
    return g.op("Tile", wide, g.sizes(repeats))


def repeat_interleave(g: Lowering, dim: int | None = None, output_size: Any = None, **given: Any) -> str:
    """Each slice of a dim several times in a row."""
    if "input" not in given or (isinstance(given["repeats"], Value) and not given["repeats"].symbol):
        raise unsupported(g, "aten.repeat_interleave by a tensor")
    input: Value = given["input"]
    flat: Any = input if dim is not None else g.op("Reshape", input, g.constant([-1]))
    rank, at = (len(input.shape), dim % len(input.shape)) if dim is not None else (1, 0)
    tiles: list[Any] = [1] * (rank + 1)
    tiles[at + 1] = given["repeats"]
    wide = g.op("Tile", g.op("Unsqueeze", flat, g.constant([at + 1])), g.sizes(tiles))
    # 0 keeps the dims before the repeated one; those behind it have moved and are named.
    if dim is None:
        return g.op("Reshape", wide, g.constant([-1]))
    behind = [g.length(input, d) for d in range(at + 1, rank)]
    return g.op("Reshape", wide, g.op("Concat", g.constant([0] * at + [-1]), *behind, axis=0))


# Parts -------------------------------------------------------------------------------------------------------------


def slice_(g: Lowering, input: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> str:
    """torch's `slice`; its ends are cut off at the dim's, as ONNX does it."""
    first, last = 0 if start is None else start, _END if end is None else end
    return g.op("Slice", input, g.size(first), g.size(last), g.constant([dim]), g.size(step))


def narrow(g: Lowering, input: Value, dim: int, start: Any, length: Any) -> str:
    """So many slices of a dim from one on."""
    if isinstance(start, Value) and not start.symbol:
        raise unsupported(g, "aten.narrow from a tensor")
    if isinstance(start, int) and isinstance(length, int):
        last: Any = g.constant([start + length or _END])
    else:
        last = g.op("Add", g.size(start), g.size(length))
    return g.op("Slice", input, g.size(start), last, g.constant([dim]))


def select(g: Lowering, input: Value, dim: int, index: Any) -> str:
    at = g.constant(index) if isinstance(index, int) else index
    return g.op("Gather", input, at, axis=dim)


def unbind(g: Lowering, input: Value, dim: int = 0) -> tuple[str, ...]:
    return tuple(g.op("Gather", input, g.constant(i), axis=dim) for i in range(len(g.node.meta["val"])))


def parts(g: Lowering, input: Value, dim: int = 0, **_: Any) -> tuple[str, ...]:
    """`split`, `split_with_sizes` and `chunk`: in parts of the sizes that the program knows of the results."""
    return split(g, input, [part.shape[dim] for part in g.node.meta["val"]], dim)


def split(g: Lowering, input: Value, split_sizes: Sequence[Any], dim: int = 0) -> tuple[str, ...]:
    """In parts of these sizes."""
    if len(split_sizes) == 1:
        return (g.op("Identity", input),)
    if not all(isinstance(size, (int, Value)) for size in split_sizes):
        raise unsupported(g, f"{g.node.target} of a dim that is not static")
    return g.op("Split", input, g.sizes(split_sizes), axis=dim, count=len(split_sizes))


def flip(g: Lowering, input: Value, dims: Sequence[int]) -> str:
    back = [g.constant([x] * len(dims)) for x in (-1, _BEFORE_FIRST)]
    return g.op("Slice", input, *back, g.constant(list(dims)), g.constant([-1] * len(dims)))


def roll(g: Lowering, input: Value, shifts: Sequence[Any], dims: Sequence[int] = ()) -> str:
    """What falls off the end comes in at the front, and the reverse."""
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
    return g.op("Concat", *(g.cast(t, g.node.meta["val"].dtype) for t in tensors), axis=dim)


def stack(g: Lowering, tensors: Sequence[Value], dim: int = 0) -> str:
    axis = dim % (len(tensors[0].shape) + 1)
    wide = [g.op("Unsqueeze", g.cast(t, g.node.meta["val"].dtype), g.constant([axis])) for t in tensors]
    return g.op("Concat", *wide, axis=axis)


def pad(g: Lowering, input: Value, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> str:
    """torch counts dims from the last one, a pair each; ONNX wants all befores and then all afters."""
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
    """Where each index is, its dim goes; what they name together stands at the first of them, or in front of all
    where other dims lie between them."""
    at = [dim for dim, picked in enumerate(indices) if picked is not None]
    given = [picked for picked in indices if picked is not None]
    if any(picked.dtype == torch.bool for picked in given):
        raise unsupported(g, "aten.index by a mask, of which nobody knows the size")
    if len(at) == 1:
        return g.op("Gather", input, given[0], axis=at[0])
    rank = len(input.shape)
    rest = [dim for dim in range(rank) if dim not in at]
    zero: Any = g.op("Sub", given[0], given[0])
    for picked in given[1:]:
        zero = g.op("Add", zero, g.op("Sub", picked, picked))
    columns = [g.op("Unsqueeze", g.op("Add", picked, zero), g.constant([-1])) for picked in given]
    front = g.op("Transpose", input, perm=[*at, *rest]) if at != list(range(len(at))) else input
    found = g.op("GatherND", front, g.op("Concat", *columns, axis=-1))
    if at != list(range(at[0], at[-1] + 1)) or at[0] == 0:
        return found
    width = len(g.node.meta["val"].shape) - len(rest)
    order = [*range(width, width + at[0]), *range(width), *range(width + at[0], width + len(rest))]
    return g.op("Transpose", found, perm=order)


def scatter(g: Lowering, input: Value, dim: int, index: Value, **given: Any) -> str:
    how = {None: None, "add": "add", "multiply": "mul"}[given.get("reduce")]
    return _scatter(g, input, dim, index, given["src"] if "src" in given else given["value"], how)


def scatter_add(g: Lowering, input: Value, dim: int, index: Value, src: Value) -> str:
    return _scatter(g, input, dim, index, src, "add")


def _scatter(g: Lowering, input: Value, dim: int, index: Value, new: Any, how: str | None) -> str:
    if not isinstance(new, Value):
        new = g.op("Expand", g.constant(new, input.dtype), g.op("Shape", index))
    elif [*map(str, new.shape)] != [*map(str, index.shape)]:  # torch reads as much of it as there are indices
        rank = g.constant(list(range(len(index.shape))))
        new = g.op("Slice", new, g.constant([0] * len(index.shape)), g.op("Shape", index), rank)
    return g.op("ScatterElements", input, index, new, axis=dim, reduction=how)


def slice_scatter(
    g: Lowering, input: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> str:
    """`src` in place of what `slice` would take."""
    length = g.op("Squeeze", g.length(input, dim))
    every = Value(g.op("Range", g.constant(0), length, g.constant(1)), torch.int64, (input.shape[dim],))
    return _put(g, input, dim, slice_(g, every, 0, start, end, step), src)


def select_scatter(g: Lowering, input: Value, src: Value, dim: int, index: Any) -> str:
    at = g.constant([index % input.shape[dim]]) if isinstance(input.shape[dim], int) else g.size(index)
    return _put(g, input, dim, at, g.op("Unsqueeze", src, g.constant([dim % len(input.shape)])))


def _put(g: Lowering, input: Value, dim: int, at: str, new: str) -> str:
    """`new` in place of the slices of `dim` that `at` [N] names."""
    rank = len(input.shape)
    swapped = list(range(rank))
    swapped[0], swapped[dim] = swapped[dim], 0

    def turned(value: str) -> str:
        return g.op("Transpose", value, perm=swapped) if dim % rank else value

    return turned(g.op("ScatterND", turned(input), g.op("Unsqueeze", at, g.constant([1])), turned(new)))


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
