"""Check that tokens interact in attention only.

Any other op that mixes tokens would need state of its own between calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.nodes import value_of
from ...ir.program import Program, op_name, where
from ...ir.stages import Stage
from ...kernels.ops import op_of
from ..base import Fuel, Pass, PassResult

# Probe sizes: a model is unlikely to have such a dim, and none of them divides another.
_BATCH, _LENGTH, _SHORTER = 3, 7, 5
_CHANGED = 2  # the position whose values are changed


class CheckTokenIndependence(Pass):
    """Refuse a program in which tokens interact outside of attention.

    With a cache, a call sees only the new tokens. A convolution over the sequence, a running sum or a recurrence would
    restart at each call and silently compute wrong values. There is no list of such ops. Instead, each ATen call is
    run on small random values, once as they are and once with the values of one position changed. Only results at this
    position may change. Results may not depend on the number of tokens or on a token's index in the call either.

    Example:  y = conv1d(x, w)
    Becomes:  an error that names the op

    Left alone: 1. ops of the dialect: all of them but attention process each token on its own.
    """

    needs = Stage.CANONICAL

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        probe = _Probe(program)
        checked: set[str] = set()
        for node in program.nodes:
            if node.op != "call_function" or op_of(node.target) is not None:
                continue
            key = probe.key(node)
            if key in checked:
                continue
            checked.add(key)
            if reason := probe.why_dependent(node):
                raise LlmcError(
                    "CACHE_IMPOSSIBLE",
                    f"In {where(node) or 'the model'}, {op_name(node)} {reason}.",
                    "llmc keeps only keys and values between calls; this op needs other state. See docs/coverage.md.",
                )
        return PassResult(len(checked))


class _Probe:
    """Runs single calls on random values of small sizes.

    Attributes:
        positions_innermost: True reads a dim of size 4*B*S as all positions four times, False as four values for each
            position.
        largest_index: the largest random integer; it must be a valid index, for the call may index a dim with it.
    """

    def __init__(self, program: Program) -> None:
        self.batch, self.length = map(str, value_of(program.tokens).shape)
        self.positions_innermost = False
        self.largest_index = 1

    def key(self, node: fx.Node) -> str:
        """Return equal keys for calls of the same op, sizes, dtypes and constants."""

        def describe(value: Any) -> str:
            example = value_of(value)
            return f"{example.dtype}{list(example.shape)}" if isinstance(example, Tensor) else str(example)

        return str((node.target, fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Unquoted(describe(n)))))

    def why_dependent(self, node: fx.Node) -> str:
        """Return why the call does not process each token on its own, or "" if it does."""
        example = value_of(node)
        if not any(self._has_length(e) for e in _tensors(example)) and not any(
            self._has_length(e) for n in node.all_input_nodes for e in _tensors(value_of(n))
        ):
            return ""
        # A dim of 4*B*S holds four values for each position, or all positions four times. If the call is independent in
        # any reading of its arguments and its results, that reading is the right one.
        readings = itertools.product((False, True), repeat=2)
        reasons = [self._why_dependent_as_read(node, *reading) for reading in readings]
        return "" if "" in reasons else reasons[0]

    def _why_dependent_as_read(self, node: fx.Node, innermost_in: bool, innermost_out: bool) -> str:
        try:
            self.largest_index = 1
            return self._compare_runs(node, innermost_in, innermost_out)
        except (IndexError, RuntimeError):  # an index into a dim of size 1
            self.largest_index = 0
            return self._compare_runs(node, innermost_in, innermost_out)

    def _compare_runs(self, node: fx.Node, innermost_in: bool, innermost_out: bool) -> str:
        example = value_of(node)
        self.positions_innermost = innermost_in
        inputs = {n: self._value(value_of(n), _LENGTH) for n in node.all_input_nodes}
        changed = {n: self._with_one_changed(value_of(n), value) for n, value in inputs.items()}
        shorter = {n: self._shortened(value_of(n), value) for n, value in inputs.items()}
        self.positions_innermost = innermost_out
        before = self._run(node, inputs, _LENGTH)
        if any(self._position_dims(e) is None for e in _tensors(example)):
            return "returns a tensor whose token positions cannot be identified"
        after = self._run(node, changed, _LENGTH)
        for e, one, other in zip(_tensors(example), before, after, strict=True):
            if self._differs_elsewhere(e, one, other):
                return "mixes tokens outside of attention"
        if not any(self._has_length(e) for n in node.all_input_nodes for e in _tensors(value_of(n))):
            if any(self._differs_by_position(e, one) for e, one in zip(_tensors(example), before, strict=True)):
                return "numbers the tokens of each call from zero"
            return ""
        fewer = self._run(node, shorter, _SHORTER)
        for e, one, other in zip(_tensors(example), before, fewer, strict=True):
            if not _same(self._shortened(e, one), other):
                return "returns values that depend on the number of tokens"
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

    def _with_one_changed(self, example: Any, value: Any) -> Any:
        """Return the value with other numbers at position `_CHANGED`."""
        if isinstance(value, list):
            return [self._with_one_changed(e, v) for e, v in zip(example, value, strict=True)]
        if not isinstance(value, Tensor):
            return value
        here = self._changed_mask(example, value.shape)
        if value.dtype == torch.bool:
            return torch.where(here, ~value, value)
        if value.is_floating_point() or value.is_complex():
            return torch.where(here, value * 1.5 + 0.25, value)
        return torch.where(here, self.largest_index - value, value)

    def _differs_elsewhere(self, example: Any, before: Tensor, after: Tensor) -> bool:
        elsewhere = ~self._changed_mask(example, before.shape)
        return not _same(before[elsewhere], after[elsewhere])

    def _differs_by_position(self, example: Any, value: Tensor) -> bool:
        """True if the values at two positions differ."""
        dims = self._position_dims(example)
        if not dims:
            return False
        (dim, outer, _), *_ = dims
        split = value.unflatten(dim, (outer, _LENGTH, -1))
        return not _same(split, split.narrow(dim + 1, 0, 1).expand_as(split))

    def _shortened(self, example: Any, value: Any) -> Any:
        """Return the value's first `_SHORTER` positions."""
        if isinstance(value, list):
            return [self._shortened(e, v) for e, v in zip(example, value, strict=True)]
        if not isinstance(value, Tensor):
            return self._size(example, _SHORTER) if isinstance(example, torch.SymInt) else value
        for dim, outer, _ in self._position_dims(example) or ():
            value = value.unflatten(dim, (outer, _LENGTH, -1)).narrow(dim + 1, 0, _SHORTER).flatten(dim, dim + 2)
        return value

    def _changed_mask(self, example: Any, shape: torch.Size) -> Tensor:
        """Return a mask of the changed position; all False in a tensor without positions."""
        dims = self._position_dims(example)
        if not dims:
            return torch.zeros(shape, dtype=torch.bool)
        mask = torch.ones(shape, dtype=torch.bool)
        for dim, outer, inner in dims:
            line = (torch.arange(outer * _LENGTH * inner) // inner) % _LENGTH == _CHANGED
            view = [1] * len(shape)
            view[dim] = -1
            mask = mask & line.view(view)
        return mask

    def _position_dims(self, example: Any) -> list[tuple[int, int, int]] | None:
        """Return (dim, outer size, inner size) for each dim that contains positions.

        None if positions cannot be identified in it.
        """
        found = []
        for dim, size in enumerate(example.shape):
            if isinstance(size, int) or self.length not in {str(s) for s in size.node.expr.free_symbols}:
                continue
            once, longer = self._size(size, 1, 1), self._size(size, 2, 1)
            wider, zero = self._size(size, 1, 2), self._size(size, 0, 1)
            if zero or longer != 2 * once or wider not in (once, 2 * once):
                return None
            outer = _BATCH if wider == 2 * once else 1
            found.append((dim, outer * once, 1) if self.positions_innermost else (dim, outer, once))
        return found

    def _has_length(self, example: Any) -> bool:
        sizes = [size for size in example.shape if isinstance(size, torch.SymInt)]
        return any(self.length in {str(s) for s in size.node.expr.free_symbols} for size in sizes)


class _Unquoted(str):
    """A string that is printed without quotes, to describe a node in a key."""

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
