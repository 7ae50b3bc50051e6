"""A target and an engine outside of llmc: programs that torch runs. A test registers them as a plugin.

The artifact is the program as Python text and its weights. Executing text from an artifact is for this test only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.config import CompileConfig
from llmc.compiler.options import check_options, option
from llmc.compiler.targets.base import KernelFacts, Lowered, Target, Watch
from llmc.passes.quantize.schemes import Grid, Scheme
from llmc.runtimes.artifact.manifest import Manifest, Phase
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec

if TYPE_CHECKING:
    from llmc.ir.program import Program
    from llmc.passes.base import Pass
    from llmc.passes.quantize.quantization_plan import QuantizationPlan

PROGRAM, WEIGHTS = "program.py.txt", "weights.safetensors"


@dataclass(frozen=True)
class ToyOptions:
    """Options that only this target has."""

    motto: str = option("", "A sentence for the manifest.", section="Target toy")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ToySection:
    """The target's section of the manifest: its options, and the inputs of the program by role."""

    motto: str
    inputs: list[str]


class ToyTarget(Target):
    """Writes the cached program as Python text."""

    name = "toy"
    summary = "programs that torch runs"
    options = ToyOptions
    facts = KernelFacts(
        dtypes=("fp32",),
        schemes={"int8": Scheme("int8", Grid("int8"), Grid("int8"), group_sizes=(64, 32, 16))},
        stored=Scheme("stored", None, group_sizes=(64, 32, 16)),
        packages={"compile": ("safetensors",), "run": ("torch", "safetensors")},
    )

    def finishing_passes(
        self, config: CompileConfig, plan: QuantizationPlan | None, exact_inputs: Collection[str]
    ) -> Mapping[str, Sequence[Pass]]:
        return {"step": []}

    def lower(self, graphs: Mapping[str, Program], folder: Path, config: CompileConfig, watch: Watch) -> Lowered:
        from safetensors.torch import save_file

        program = graphs["step"]
        (folder / PROGRAM).write_text(str(program))
        save_file({name: weight.evaluate().contiguous() for name, weight in program.weights.items()}, folder / WEIGHTS)
        roles = program.signature.roles
        inputs = [roles.get(str(node.target), "cache") for node in program.inputs]
        return Lowered({"step": Phase(1)}, ToySection(self.options_of(config).motto, inputs), {"torch": ">=2.0"})


TARGET = ToyTarget()


class ToyEngine:
    """Runs the program with torch."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, slots: int = 1) -> None:
        from safetensors.torch import load_file

        from llmc.ir.printer import from_python

        self.manifest = manifest
        self.spec = EngineSpec(manifest.model.vocab_size, manifest.max_seq_len, threads=threads, rollback=1)
        self.slots = self.runs = 0
        self._caches: list[Any] = []
        self._inputs = manifest.read_section(ToySection).inputs
        self._program = from_python((folder / PROGRAM).read_text())
        self._weights = load_file(folder / WEIGHTS)
        self.open_slots(slots)

    def open_slots(self, count: int) -> None:
        import torch

        shapes = [(cache.heads, cache.length, part.width) for cache in self.manifest.caches for part in cache.parts]
        opened = [torch.zeros(count, *shape) for shape in shapes]
        for new, old in zip(opened, self._caches, strict=bool(self._caches)):
            kept = min(count, self.slots)
            new[:kept] = old[:kept]
        self._caches, self.slots = opened, count

    def forward(self, batch: Batch) -> HostLogits:
        batch.check(self.spec, self.slots)
        ends = batch.lengths.cumsum()
        parts = zip(ends - batch.lengths, ends, batch.starts, batch.slots, strict=True)
        logits = [self._run(batch.tokens[first:end], start, slot) for first, end, start, slot in parts]
        return HostLogits(np.concatenate(logits)[batch.wanted])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        for cache in self._caches:
            cache[target] = cache[source]

    def close(self) -> None:
        self._caches, self.slots = [], 0

    def _run(self, tokens: np.ndarray, start: int, slot: int) -> np.ndarray:
        """Run new tokens of one sequence; return the logits of all, [S, V]."""
        import torch

        roles: dict[str, Any] = {
            "tokens": torch.as_tensor(tokens[None]),
            "starts": torch.tensor([start]),
            "wanted": torch.arange(len(tokens)),
        }
        caches = iter([cache[slot : slot + 1] for cache in self._caches])
        given = [next(caches) if role == "cache" else roles[role] for role in self._inputs]
        with torch.no_grad():
            logits, *written = self._program(self._weights, *given)
        for cache, new in zip(self._caches, written, strict=True):
            cache[slot : slot + 1] = new
        self.runs += 1
        return logits[0].numpy()


ENGINE = ToyEngine
