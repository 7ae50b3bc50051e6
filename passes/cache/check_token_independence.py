"""Whether tokens meet in attention only: what else mixes them would need a state of its own between calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.program import Program, op_name, where
from ...ir.stages import Stage
from ...kernels.ops import op_of
from ..base import Fuel, Pass, PassResult

# Sizes for probing that no dim of a model is likely to have, and that divide no other.
_BATCH, _LENGTH, _SHORTER = 3, 7, 5
_TOUCHED = 2  # the position whose values are changed


class CheckTokenIndependence(Pass):
    """Refuse a program in which a token sees another one by other means than attention.

    With a cache, a call sees the new tokens only: a convolution over the sequence, a running sum, a recurrence would
    start anew each time and be silently wrong. Nobody keeps a list of such ops: each ATen call is run on small random
    values, once as they are and once with those of one position changed; only that position's results may change.
    Nor may they depend on how many tokens there are, or on a token's place among them.

    Example:  y = conv1d(x, w)
    Becomes:  an error that names it

    Left alone: 1. ops of the dialect, all of which but attention treat tokens one by one.
    """

    needs = Stage.CANONICAL

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        probe = _Probe(program)
        seen: set[str] = set()
        for node in program.nodes:
            if node.op != "call_function" or op_of(node.target) is not None:
                continue
            key = probe.key(node)
            if key in seen:
                continue
            seen.add(key)
            if reason := probe.mixes(node):
                raise LlmcError(
                    "CACHE_IMPOSSIBLE",
                    f"In {where(node) or 'the model'}, {op_name(node)} {reason}.",
                    "llmc keeps keys and values between calls and no other state, which this layer would need.",
                )
        return PassResult(len(seen))


class _Probe:
    """Runs single calls at sizes of its own."""

    def __init__(self, program: Program) -> None:
        self.batch, self.length = map(str, program.inputs[0].meta["val"].shape)
        self.inside_out = 0
        self.largest_index = 1

    def key(self, node: fx.Node) -> str:
        """Calls of one key behave alike: same op, same sizes and dtypes, same plain arguments."""

        def shown(value: Any) -> str:
            example = value.meta["val"]
            return f"{example.dtype}{list(example.shape)}" if isinstance(example, Tensor) else str(example)

        return str((node.target, fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Shown(shown(n)))))

    def mixes(self, node: fx.Node) -> str:
        """Why the call is not one that treats each position by itself; empty if it is."""
        example = node.meta["val"]
        if not any(self._has_length(e) for e in _tensors(example)) and not any(
            self._has_length(e) for n in node.all_input_nodes for e in _tensors(n.meta["val"])
        ):
            return ""
        # 4*B*S values are four for each position, or four times all positions. Whichever reading of a call's arguments
        # and results leaves its tokens apart is the one that is meant.
        reasons = [self._mixes_as_read(node, reading) for reading in ((0, 0), (0, 1), (1, 0), (1, 1))]
        return "" if "" in reasons else reasons[0]

    def _mixes_as_read(self, node: fx.Node, reading: tuple[int, int]) -> str:
        try:
            self.largest_index = 1
            return self._mixes(node, reading)
        except (IndexError, RuntimeError):  # an index into a dim of one
            self.largest_index = 0
            return self._mixes(node, reading)

    def _mixes(self, node: fx.Node, reading: tuple[int, int]) -> str:
        example = node.meta["val"]
        self.inside_out = reading[0]
        inputs = {n: self._value(n.meta["val"], _LENGTH) for n in node.all_input_nodes}
        changed = {n: self._touched(n.meta["val"], value) for n, value in inputs.items()}
        shorter = {n: self._cut(n.meta["val"], value) for n, value in inputs.items()}
        self.inside_out = reading[1]
        before = self._run(node, inputs, _LENGTH)
        if any(self._along(e) is None for e in _tensors(example)):
            return "makes a tensor in which tokens can't be told apart"
        after = self._run(node, changed, _LENGTH)
        for e, one, other in zip(_tensors(example), before, after, strict=True):
            if self._differs_elsewhere(e, one, other):
                return "lets a token see others outside of attention"
        if not any(self._has_length(e) for n in node.all_input_nodes for e in _tensors(n.meta["val"])):
            if any(self._varies(e, one) for e, one in zip(_tensors(example), before, strict=True)):
                return "counts tokens from the first of each call on"
            return ""
        fewer = self._run(node, shorter, _SHORTER)
        for e, one, other in zip(_tensors(example), before, fewer, strict=True):
            if not _same(self._cut(e, one), other):
                return "gives other values where there are more tokens"
        return ""

    def _run(self, node: fx.Node, values: dict[fx.Node, Any], length: int) -> list[Tensor]:
        def value(n: fx.Node) -> Any:
            return values[n]

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
        args, kwargs = (self._sizes(x, length) for x in (args, kwargs))
        with torch.no_grad():
            return list(_tensors(node.target(*args, **kwargs)))  # type: ignore[operator]

    def _sizes(self, value: Any, length: int) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._sizes(v, length) for v in value)
        if isinstance(value, dict):
            return {k: self._sizes(v, length) for k, v in value.items()}
        return self._size(value, length) if isinstance(value, torch.SymInt) else value

    def _size(self, size: Any, length: int, batch: int = _BATCH) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        values = {s: {self.batch: batch, self.length: length}.get(str(s), 0) for s in expression.free_symbols}
        return int(expression.subs(values))

    def _value(self, example: Any, length: int) -> Any:
        if isinstance(example, (list, tuple)):
            return [self._value(e, length) for e in example]
        if not isinstance(example, Tensor):
            return self._size(example, length) if isinstance(example, torch.SymInt) else example
        shape = [self._size(size, length) for size in example.shape]
        generator = torch.Generator().manual_seed(len(shape))
        if example.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.5
        if example.is_floating_point():
            return (torch.rand(shape, generator=generator) + 0.5).to(example.dtype)
        if example.is_complex():
            return torch.rand(shape, generator=generator).to(example.dtype)
        return torch.randint(0, self.largest_index + 1, shape, generator=generator).to(example.dtype)

    def _touched(self, example: Any, value: Any) -> Any:
        """The value with other numbers at one position."""
        if isinstance(value, list):
            return [self._touched(e, v) for e, v in zip(example, value, strict=True)]
        if not isinstance(value, Tensor):
            return value
        here = self._mask(example, value.shape)
        if value.dtype == torch.bool:
            return torch.where(here, ~value, value)
        if value.is_floating_point() or value.is_complex():
            return torch.where(here, value * 1.5 + 0.25, value)
        return torch.where(here, self.largest_index - value, value)

    def _differs_elsewhere(self, example: Any, before: Tensor, after: Tensor) -> bool:
        elsewhere = ~self._mask(example, before.shape)
        return not _same(before[elsewhere], after[elsewhere])

    def _varies(self, example: Any, value: Tensor) -> bool:
        """Whether positions hold different values."""
        along = self._along(example)
        if not along:
            return False
        (dim, outer, _), *_ = along
        split = value.unflatten(dim, (outer, _LENGTH, -1))
        return not _same(split, split.narrow(dim + 1, 0, 1).expand_as(split))

    def _cut(self, example: Any, value: Any) -> Any:
        """The first positions of a value."""
        if isinstance(value, list):
            return [self._cut(e, v) for e, v in zip(example, value, strict=True)]
        if not isinstance(value, Tensor):
            return self._size(example, _SHORTER) if isinstance(example, torch.SymInt) else value
        for dim, outer, _ in self._along(example) or ():
            value = value.unflatten(dim, (outer, _LENGTH, -1)).narrow(dim + 1, 0, _SHORTER).flatten(dim, dim + 2)
        return value

    def _mask(self, example: Any, shape: torch.Size) -> Tensor:
        """True at the touched position; everywhere False in a tensor without positions."""
        along = self._along(example)
        if not along:
            return torch.zeros(shape, dtype=torch.bool)
        mask = torch.ones(shape, dtype=torch.bool)
        for dim, outer, inner in along:
            line = (torch.arange(outer * _LENGTH * inner) // inner) % _LENGTH == _TOUCHED
            view = [1] * len(shape)
            view[dim] = -1
            mask = mask & line.view(view)
        return mask

    def _along(self, example: Any) -> list[tuple[int, int, int]] | None:
        """Each dim in which positions lie, and how much of it is outside and inside of them; None if it is unclear."""
        found = []
        for dim, size in enumerate(example.shape):
            if isinstance(size, int) or self.length not in {str(s) for s in size.node.expr.free_symbols}:
                continue
            once, longer = self._size(size, 1, 1), self._size(size, 2, 1)
            wider, zero = self._size(size, 1, 2), self._size(size, 0, 1)
            if zero or longer != 2 * once or wider not in (once, 2 * once):
                return None
            outer = _BATCH if wider == 2 * once else 1
            found.append((dim, outer * once, 1) if self.inside_out else (dim, outer, once))
        return found

    def _has_length(self, example: Any) -> bool:
        sizes = [size for size in example.shape if isinstance(size, torch.SymInt)]
        return any(self.length in {str(s) for s in size.node.expr.free_symbols} for size in sizes)


class _Shown(str):
    """What stands for a node in a key."""

    def __repr__(self) -> str:
        return str(self)


def _tensors(value: Any) -> Iterator[Tensor]:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, Tensor):
            yield item


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    return torch.equal(one, other)
