"""What compiling a model would take, said before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...errors import UsageError
from ...ir.program import Miss, Program, layer_of, where
from ...ir.stages import Stage
from ...ir.weights import Weight
from ...kernels.ops import op_of
from ...kernels.ops.quantized import CACHE_CODES
from ...passes.base import Pass, PassResult
from ...passes.pipeline import run_pipeline
from ..api import DTYPES, capture
from ..config import KV_CACHE_DTYPES
from .layers import count_ops
from .output_size import FORMULAS, output_bytes

# Each key and each value in a cache of 8 bits has a scale of its own.
SCALE_BYTES = 4


@dataclass(frozen=True)
class Coverage:
    """Which ops the canonical program is made of.

    Attributes:
        dialect, aten: how often each op occurs; arithmetic on sizes is not counted.
        fallbacks: what stayed plain ATen although a pass looked at it, by pass.
    """

    dialect: dict[str, int]
    aten: dict[str, int]
    fallbacks: tuple[tuple[str, Miss], ...]


@dataclass(frozen=True)
class Group:
    """Weights of one purpose: how many, how large on disk and in the program's dtype."""

    tensors: int
    parameters: int
    disk_bytes: int
    bytes: int


@dataclass(frozen=True)
class KvLayer:
    """The cache of one attention: bytes a position and row, and after how many positions it stops growing."""

    where: str
    bytes_per_token: int
    limit: int | None


@dataclass(frozen=True)
class CompilePlan:
    """What compiling takes and gives.

    Attributes:
        groups: the weights by purpose, each tensor counted once, however many ops share it.
        output_bytes: the size of all weights, by what they may be rounded to.
        peak_bytes: of memory while compiling.
        formulas: how the estimates are made, by the name of what they estimate.
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

    @property
    def total(self) -> Group:
        """All groups together."""
        parts = self.groups.values()
        return Group(*(sum(getattr(g, name) for g in parts) for name in Group.__dataclass_fields__))

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.kv_cache)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches at the full length and batch."""
        length = self.max_seq_len
        positions = sum(layer.bytes_per_token * min(length, layer.limit or length) for layer in self.kv_cache)
        return positions * self.max_batch_size


def plan(
    model: str | Path | nn.Module,
    *,
    dtype: str = "fp32",
    kv_cache_dtype: str = "auto",
    max_seq_len: int | None = None,
    max_batch_size: int = 1,
    watch: Callable[[Pass, PassResult], None] = lambda subject, result: None,
) -> CompilePlan:
    """Capture and canonicalize a model, and add up what compiling it would take; no weight is read.

    Raises:
        LlmcError: as `capture` and the passes do; such a model can't be compiled.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise UsageError(
            "CONFIG_INVALID",
            f"Kv_cache_dtype is {kv_cache_dtype!r}.",
            f"Choose one of {', '.join(KV_CACHE_DTYPES)}.",
        )
    program = capture(model, dtype=dtype, max_seq_len=max_seq_len, until=Stage.CAPTURED)
    run_pipeline(program, Stage.CANONICAL, watch=watch)
    weights = {name: weight for name, weight in program.weights.items() if not weight.is_constant}
    largest = max(weights, key=lambda name: weights[name].nbytes)
    return CompilePlan(
        model=program.source,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_seq_len=program.max_seq_len,
        max_batch_size=max_batch_size,
        coverage=_coverage(program),
        groups=_groups(program, weights),
        kv_cache=tuple(_kv_layers(program, DTYPES[dtype] if kv_cache_dtype == "auto" else CACHE_CODES[kv_cache_dtype])),
        largest_tensor=largest,
        largest_tensor_bytes=weights[largest].nbytes,
        peak_bytes=_resident_bytes() + 2 * weights[largest].nbytes,
        output_bytes=output_bytes(program),
        formulas={
            "peak": "this process as it is now + 2 x the largest tensor (what is read, and what is made of it);"
            " calibration holds its texts and what flows through a layer, too",
            **FORMULAS,
            "kv cache": "kv heads x (key dim + value dim) x bytes a number, for each attention with keys of its own"
            + ("" if kv_cache_dtype == "auto" else f"; {SCALE_BYTES} a scale, of each key and of each value"),
        },
    )


def _coverage(program: Program) -> Coverage:
    calls = [n for n in program.nodes if n.op == "call_function" and isinstance(n.meta["val"], (Tensor, list, tuple))]
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
    """What a weight is for, by the op that reads it and by the module that the op came from.

    What a layer multiplies with and doesn't belong to its attention is its MLP: routers and shared experts too.
    """

    def __init__(self, program: Program) -> None:
        self.attention = {where(n) for n in program.nodes if _is(n, "attention")} - {layer_of(n) for n in program.nodes}
        self.last = program.output

    def of(self, weight: fx.Node) -> str:
        readers = list(weight.users)
        if any(_is(n, "embedding") for n in readers):
            return "embedding"
        if any(_is(n, "moe") for n in readers):
            return "experts"
        if any(_is(n, "rms_norm") or _is(n, "layer_norm") for n in readers):
            return "norms"
        if all(layer_of(n) for n in readers):
            inside = any(where(n) == m or where(n).startswith(m + ".") for n in readers for m in self.attention)
            return "attention" if inside else "mlp" if any(_is(n, "linear") for n in readers) else "other"
        return "head" if any(_is(n, "linear") for n in readers) else "other"


def _is(node: fx.Node, name: str) -> bool:
    defined = op_of(node.target)
    return defined is not None and defined.name == name


def _kv_layers(program: Program, dtype: torch.dtype) -> Iterable[KvLayer]:
    """One for each pair of keys and values, kept as `dtype`; layers that share them share their cache."""
    seen = set()
    for node in program.nodes:
        defined = op_of(node.target)
        if defined is None or defined.name != "attention":
            continue
        call: dict[str, Any] = defined.bind(node.args, node.kwargs)
        k, v = call["k"].meta["val"], call["v"].meta["val"]
        if (call["k"], call["v"]) in seen:
            continue
        seen.add((call["k"], call["v"]))
        scales = 2 * SCALE_BYTES if dtype in CACHE_CODES.values() else 0
        per_token = k.shape[1] * ((k.shape[3] + v.shape[3]) * dtype.itemsize + scales)
        yield KvLayer(where(node), int(per_token), call["window"] or call["chunk"])


def _resident_bytes() -> int:
    """Memory that this process holds now: transformers, torch and the program."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows, which tells it in no such way
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes
