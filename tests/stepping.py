"""Compare programs that have caches with the engines of their graphs, call by call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from artifacts import manifest
from batches import forward
from torch import Tensor

from llmc.compiler.describe import cache_spec
from llmc.compiler.targets.ort.write import write_graphs
from llmc.ir.program import Program
from llmc.passes.base import Pass
from llmc.passes.runner import Runner
from llmc.runtimes.artifact.decode import encode
from llmc.runtimes.artifact.manifest import FileSpec
from llmc.runtimes.engines.ort.engine import OrtEngine


def engine_of(
    program: Program, folder: Path, *, ops: str, prefill: Sequence[Pass] | None = None, slots: int = 1
) -> OrtEngine:
    """Lower a program and open its graphs, as those of an artifact.

    Args:
        prefill: the passes of a second graph, for many tokens; None: there is none.
    """
    graphs = {"step": program}
    if prefill is not None:
        graphs["prefill"] = Runner().run(program.copy(), prefill, graph="prefill")
    lowered = write_graphs(graphs, folder, ops)
    fields = {
        "model": replace(manifest().model, vocab_size=int(program.output.meta["val"].shape[-1])),
        "max_seq_len": program.max_seq_len,
        "phases": dict(lowered.phases),
        "section": encode(lowered.section),
        "caches": [cache_spec(cache) for cache in program.caches],
        "files": {path.name: FileSpec("", path.stat().st_size) for path in folder.iterdir()},
    }
    return OrtEngine(folder, manifest(**fields), threads=1, slots=slots)


class Stepping:
    """The program itself with the interface of an engine; it passes the caches of each call to the next."""

    def __init__(self, program: Program, slots: int) -> None:
        self.program = program
        self.caches = program.empty_caches(slots)

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        roles = {"tokens": tokens, "starts": starts, "wanted": torch.arange(tokens.shape[1])}
        logits, *self.caches = self.program.run(*self.program.arguments(roles, self.caches))
        return logits


# The positions that two sequences hold before each call, and the number of new tokens: the second and third call make
# the lengths different. Then single tokens pass a window of 6 twice. Last, a call has more tokens than a ring, and one
# goes back by a position.
CALLS: tuple[tuple[tuple[int, int], int], ...] = (
    ((0, 0), 2),
    ((2, 2), 3),
    ((5, 1), 1),
    *(((5 + i, 2 + i), 1) for i in range(1, 13)),
    ((18, 15), 9),
    ((26, 23), 2),
    ((28, 25), 1),
)


# For rings with 3 positions more than a window of 6: calls that go back by up to 4 positions from the furthest one.
GOING_BACK: tuple[tuple[tuple[int, int], int], ...] = (
    ((0, 0), 12),
    ((8, 8), 3),
    ((8, 11), 5),
    ((9, 12), 1),
    ((10, 13), 3),
    ((9, 12), 9),
    ((14, 17), 1),
    ((15, 18), 10),
    ((25, 28), 4),
)


def check_steps(
    program: Program,
    folder: Path,
    *,
    ops: str,
    calls: Iterable[tuple[tuple[int, int], int]] = CALLS,
    tolerance: float = 1e-5,
) -> OrtEngine:
    """Compare a program's engine with the program at every call; return the engine."""
    engine, wanted = engine_of(program, folder, ops=ops, slots=2), Stepping(program, 2)
    generator = torch.Generator().manual_seed(3)
    for starts, count in calls:
        tokens = torch.randint(engine.spec.vocab_size, (2, count), generator=generator)
        at = torch.tensor(starts)
        want = wanted.forward(tokens, at)
        got = torch.from_numpy(np.array(forward(engine, tokens.numpy(), at.numpy())))
        off = float((got - want).abs().max())
        assert off <= tolerance, f"{count} tokens at {starts} are off by {off:g}"
    return engine
