"""Programs with a cache as engines, and both driven through the same calls."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from artifacts import manifest
from torch import Tensor

from llmc.compiler.targets.ort.write import build_onnx, cache_specs
from llmc.ir.program import Program
from llmc.passes.pipeline import many_rows_passes
from llmc.runtimes.engines.ort.engine import OrtEngine


def engine_of(program: Program, folder: Path, *, ops: str, prefill: bool = False, slots: int = 1) -> OrtEngine:
    """The graphs of a program, opened as an artifact's would be."""
    graphs = build_onnx(program, folder, ops=ops, many_rows=many_rows_passes() if prefill else ())
    model = manifest().model | {"vocab_size": int(program.output.meta["val"].shape[-1])}
    said = manifest(model=model, max_seq_len=program.max_seq_len, graphs=graphs, caches=cache_specs(program))
    return OrtEngine(folder, said, threads=1, slots=slots)


class Stepping:
    """The program itself behind the calls of an engine: the cache goes out and comes in again."""

    def __init__(self, program: Program, slots: int) -> None:
        self.program = program
        self.caches = [
            torch.zeros(slots, cache.heads, cache.length, part.width, dtype=part.dtype)
            for cache in program.caches
            for part in cache.tensors
        ]

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        values = iter(self.caches)
        given = {"tokens": tokens, "starts": starts, "rows": torch.arange(tokens.shape[1])}
        sample = [given[n] if (n := str(node.target)) in given else next(values) for node in self.program.inputs]
        logits, *self.caches = self.program.run(*sample)
        return logits


# Positions that two rows hold before each call, and how many tokens the call has: prompts of unequal lengths in the
# second and third, then one by one past a window of 6 twice, more tokens than a ring has slots, and one step back.
CALLS: tuple[tuple[tuple[int, int], int], ...] = (
    ((0, 0), 2),
    ((2, 2), 3),
    ((5, 1), 1),
    *(((5 + i, 2 + i), 1) for i in range(1, 13)),
    ((18, 15), 9),
    ((26, 23), 2),
    ((28, 25), 1),
)


def check_steps(
    program: Program,
    folder: Path,
    *,
    ops: str,
    calls: Iterable[tuple[tuple[int, int], int]] = CALLS,
    tolerance: float = 1e-5,
) -> OrtEngine:
    """Hold a program's engine to the program at every call."""
    engine, wanted = engine_of(program, folder, ops=ops, slots=2), Stepping(program, 2)
    generator = torch.Generator().manual_seed(3)
    for starts, count in calls:
        tokens = torch.randint(engine.vocab_size, (2, count), generator=generator)
        at = torch.tensor(starts)
        want = wanted.forward(tokens, at)
        got = torch.from_numpy(np.array(engine.forward(tokens.numpy(), at.numpy())))
        off = float((got - want).abs().max())
        assert off <= tolerance, f"{count} tokens at {starts} are off by {off:g}"
    return engine
