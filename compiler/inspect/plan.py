"""Estimate what compiling a model needs, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.nodes import value_of
from ...ir.program import Miss, Program, layer_of, where
from ...ir.stages import Stage
from ...ir.weights import Weight
from ...kernels.ops import op_of
from ...kernels.ops.quantized import CACHE_CODES
from ...passes.base import Pass, PassResult
from ...passes.pipeline import bring_to
from ...passes.runner import Runner
from ..api import TORCH_DTYPES, capture
from ..config import CompileConfig
from ..options import options_of
from ..targets.base import Table
from ..targets.registry import find_target
from .layers import count_ops
from .output_size import formulas, output_bytes

# In an 8-bit cache, the key and the value of each head and token have one scale each, in bytes, unless scales are
# constants. A ring has no constant scales.
SCALE_BYTES = 4


@dataclass(frozen=True)
class Coverage:
    """The ops of the canonical program.

    Attributes:
        dialect, aten: the number of calls of each op; arithmetic on sizes is not counted.
        fallbacks: the ATen ops that a pass examined but did not replace: the pass and its miss.
    """

    dialect: dict[str, int]
    aten: dict[str, int]
    fallbacks: tuple[tuple[str, Miss], ...]


@dataclass(frozen=True)
class Group:
    """The number and size of the weights of one purpose, on disk and in the program's dtype."""

    tensors: int
    parameters: int
    disk_bytes: int
    bytes: int


@dataclass(frozen=True)
class KvLayer:
    """The cache of one attention.

    Attributes:
        where: the module path of the attention.
        bytes_per_token: bytes per position of one sequence.
        limit: the number of positions after which it stops growing; None if it does not.
    """

    where: str
    bytes_per_token: int
    limit: int | None


@dataclass(frozen=True)
class CompilePlan:
    """The needs of a compilation, and the size of its result.

    Attributes:
        groups: the weights by purpose. A tensor that several ops share counts once.
        output_bytes: the size of all weights, by quantization scheme.
        peak_bytes: the peak memory while compiling.
        formulas: how each estimate is computed, by its name.
        tables: what the target adds.
    """

    model: str
    dtype: str
    kv_cache_dtype: str
    max_seq_len: int
    max_batch_size: int
    coverage: Coverage
    groups: dict[str, Group]
    kv_cache: tuple[KvLayer, ...]
    largest_tensor: str
    largest_tensor_bytes: int
    peak_bytes: int
    output_bytes: dict[str, int]
    formulas: dict[str, str]
    tables: tuple[Table, ...] = ()

    @property
    def total(self) -> Group:
        """The sum of all groups."""
        parts = self.groups.values()
        return Group(*(sum(getattr(g, name) for g in parts) for name in Group.__dataclass_fields__))

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.kv_cache)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches at the full length and batch size."""
        length = self.max_seq_len
        positions = sum(layer.bytes_per_token * min(length, layer.limit or length) for layer in self.kv_cache)
        return positions * self.max_batch_size


def plan(
    model: str | Path | nn.Module,
    *,
    target: str | None = None,
    dtype: str | None = None,
    kv_cache_dtype: str = "auto",
    spec_tokens: int = 0,
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    watch: Callable[[Pass, PassResult], None] = lambda subject, result: None,
) -> CompilePlan:
    """Capture and canonicalize a model, and estimate what compiling it needs. No weight is read.

    Raises:
        LlmcError: if `capture` or a pass refuses the model. Such a model can't be compiled.
    """
    for name, value in (("kv_cache_dtype", kv_cache_dtype), ("spec_tokens", spec_tokens)):
        options_of(CompileConfig)[name].check(value)
    chosen = find_target(target)
    facts = chosen.facts
    dtype = dtype or facts.dtypes[0]
    program = capture(model, dtype=dtype, max_seq_len=max_seq_len, until=Stage.CAPTURED)
    bring_to(program, Stage.CANONICAL, Runner(watch=watch))
    weights = {name: weight for name, weight in program.weights.items() if not weight.is_constant}
    largest = max(weights, key=lambda name: weights[name].nbytes)
    cache_dtype = TORCH_DTYPES[dtype] if kv_cache_dtype == "auto" else CACHE_CODES[kv_cache_dtype]
    has_constants = chosen.has_constant_cache_scales(CompileConfig(kv_cache_dtype=kv_cache_dtype))
    return CompilePlan(
        model=program.source,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_seq_len=program.max_seq_len,
        max_batch_size=max_batch_size,
        coverage=_coverage(program),
        groups=_groups(program, weights),
        kv_cache=tuple(_kv_layers(program, cache_dtype, spec_tokens, has_constants)),
        largest_tensor=largest,
        largest_tensor_bytes=weights[largest].nbytes,
        peak_bytes=_resident_bytes() + 2 * weights[largest].nbytes,
        output_bytes=output_bytes(program, facts),
        formulas={
            "peak": "memory of this process now + 2 x the largest tensor (as read, and as written); calibration also"
            " holds its texts and the values of one layer",
            **formulas(facts),
            "kv cache": "kv heads x (key dim + value dim) x bytes per number, for each attention with keys of its own"
            + ("" if kv_cache_dtype == "auto" else f"; {SCALE_BYTES} bytes for the scale of each key and of each value")
            + (
                ", but none in layers without a window: calibration makes their scales constants"
                if has_constants
                else ""
            ),
        },
        tables=tuple(chosen.plan_tables(program)),
    )


def _coverage(program: Program) -> Coverage:
    calls = [n for n in program.nodes if n.op == "call_function" and isinstance(value_of(n), (Tensor, list, tuple))]
    dialect, aten = ([n for n in calls if (op_of(n.target) is not None) == own] for own in (True, False))
    left = {n.name for n in aten}
    missed = ((record.name, miss) for record in program.history for miss in record.misses)
    return Coverage(
        dialect=count_ops(dialect),
        aten=count_ops(aten),
        fallbacks=tuple((name, miss) for name, miss in missed if miss.node in left),
    )


def _groups(program: Program, weights: dict[str, Weight]) -> dict[str, Group]:
    purposes = _Purposes(program)
    members: dict[str, list[Weight]] = {
        name: [] for name in ("embedding", "attention", "mlp", "experts", "norms", "head", "other")
    }
    for name, weight in weights.items():
        (node,) = program.graph.find_nodes(op="get_attr", target=name)
        members[purposes.of(node)].append(weight)
    return {
        name: Group(
            tensors=len(found),
            parameters=sum(w.numel for w in found),
            disk_bytes=sum({leaf.key: leaf.source.nbytes for w in found for leaf in w.leaves()}.values()),
            bytes=sum(w.nbytes for w in found),
        )
        for name, found in members.items()
        if found
    }


class _Purposes:
    """Find the purpose of a weight by the op that uses it and the module that the op came from.

    All linears of a layer that are not in its attention count as its MLP, also routers and shared experts.
    """

    def __init__(self, program: Program) -> None:
        self.attention = {where(n) for n in program.nodes if _is(n, "attention")} - {layer_of(n) for n in program.nodes}
        self.last = program.output

    def of(self, weight: fx.Node) -> str:
        users = list(weight.users)
        if any(_is(n, "embedding") for n in users):
            return "embedding"
        if any(_is(n, "moe") for n in users):
            return "experts"
        if any(_is(n, "rms_norm") or _is(n, "layer_norm") for n in users):
            return "norms"
        if all(layer_of(n) for n in users):
            inside = any(where(n) == m or where(n).startswith(m + ".") for n in users for m in self.attention)
            return "attention" if inside else "mlp" if any(_is(n, "linear") for n in users) else "other"
        return "head" if any(_is(n, "linear") for n in users) else "other"


def _is(node: fx.Node, name: str) -> bool:
    defined = op_of(node.target)
    return defined is not None and defined.name == name


def _kv_layers(program: Program, dtype: torch.dtype, slack: int, has_constants: bool) -> Iterable[KvLayer]:
    """Yield the cache of each pair of keys and values; layers that share a pair share its cache.

    Args:
        dtype: the dtype of the caches.
        slack: how many positions are kept beyond a window or a chunk.
        has_constants: layers without a window have constant scales.
    """
    seen = set()
    for node in program.nodes:
        defined = op_of(node.target)
        if defined is None or defined.name != "attention":
            continue
        call: dict[str, Any] = defined.bind(node.args, node.kwargs)
        k, v = value_of(call["k"]), value_of(call["v"])
        if (call["k"], call["v"]) in seen:
            continue
        seen.add((call["k"], call["v"]))
        window = call["window"] or call["chunk"]
        has_scales = dtype in CACHE_CODES.values() and (window is not None or not has_constants)
        scales = 2 * SCALE_BYTES if has_scales else 0
        per_token = k.shape[1] * ((k.shape[3] + v.shape[3]) * dtype.itemsize + scales)
        yield KvLayer(where(node), int(per_token), window and window + slack)


def _resident_bytes() -> int:
    """Return the resident memory of this process in bytes, with transformers, torch and the program; 0 if unknown."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
