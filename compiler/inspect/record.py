"""Watching the pipeline: the program before the first pass and after each, as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx, nn

from ...errors import LlmcError
from ...ir.printer import statements
from ...ir.program import PassRecord, Program, where
from ...ir.stages import Stage
from ...passes.base import Pass, PassResult
from ...passes.pipeline import run_pipeline
from ..api import capture
from .drawing import Drawing, draw
from .layers import OUTSIDE, count_ops, fold, sections, signature


@dataclass(frozen=True)
class View:
    """A section of a program: its Python, in which `*` stands for the layer's name, and its dataflow."""

    text: str
    drawing: Drawing


@dataclass(frozen=True)
class Snapshot:
    """A program at one moment.

    Attributes:
        nodes, weights: how many it has.
        ops: how often each op occurs.
        kinds: the signature of each layer.
        ops_of: the ops of each section.
        views: each section to read and to look at, if that was asked for.
    """

    nodes: int
    weights: int
    ops: dict[str, int]
    kinds: dict[str, str]
    ops_of: dict[str, dict[str, int]]
    views: dict[str, View]


@dataclass(frozen=True)
class RecordedStep:
    """One pass: what it is for, what it says that it did, and what came out."""

    about: str
    record: PassRecord
    after: Snapshot


@dataclass
class Inspection:
    """A model's way through the pipeline.

    Attributes:
        program: what came out; if refused, what the refusing pass left.
        parameters: how many trained numbers it has, tied ones counted once.
        captured: before the first pass.
        refusal: why the pipeline stopped early.
    """

    program: Program
    dtype: str
    parameters: int
    captured: Snapshot
    steps: list[RecordedStep] = field(default_factory=list)
    refusal: LlmcError | None = None

    @property
    def stage(self) -> Stage:
        """The last stage whose promise the program kept."""
        return self.steps[-1].record.stage if self.steps else Stage.CAPTURED

    @property
    def moments(self) -> dict[str, Snapshot]:
        """The program as captured and at each stage that it reached; also as it is now, if it stands between two."""
        found = {str(Stage.CAPTURED): self.captured}
        stage = Stage.CAPTURED
        for step in self.steps:
            if step.record.stage > stage:
                stage = step.record.stage
                found[str(stage)] = step.after
        if self.steps and self.steps[-1].after not in found.values():
            found["now"] = self.steps[-1].after
        return found

    @property
    def layers(self) -> list[list[str]]:
        """The layers that are the same in every snapshot, together."""
        snapshots = [self.captured, *(step.after for step in self.steps)]
        return fold({layer: tuple(s.kinds.get(layer) for s in snapshots) for layer in self.captured.kinds})


def inspect_model(
    model: str | Path | nn.Module,
    *,
    until: Stage = Stage.OPTIMIZED,
    dtype: str = "fp32",
    max_seq_len: int | None = None,
    dump_ir: Path | None = None,
    details: bool = False,
    watch: Callable[[Pass, PassResult], None] = lambda subject, result: None,
) -> Inspection:
    """Bring a model up to a stage and keep what happened; no weight is read.

    A program that a pass refuses is not lost: what came before the refusal is there, and so is the refusal.

    Args:
        details: keep views as well, for the page.
        watch: called after each pass.
    """
    program = capture(model, dtype=dtype, max_seq_len=max_seq_len, until=Stage.CAPTURED)
    trained = {w.key: w.numel for w in program.weights.values() if not w.is_constant}
    result = Inspection(program, dtype, sum(trained.values()), _snapshot(program, details))

    def keep(subject: Pass, outcome: PassResult) -> None:
        record = program.history[-1]
        result.steps.append(RecordedStep(inspect.getdoc(subject) or "", record, _snapshot(program, details)))
        watch(subject, outcome)

    try:
        run_pipeline(program, until, dump=dump_ir, watch=keep)
    except LlmcError as error:
        result.refusal = error
    return result


def _snapshot(program: Program, details: bool) -> Snapshot:
    parts = sections(program)
    lines = statements(program) if details else {}
    return Snapshot(
        nodes=len(program.graph.nodes),
        weights=len(program.weights),
        ops=dict(program.ops()),
        kinds={layer: signature(layer, nodes) for layer, nodes in parts.items() if layer != OUTSIDE},
        ops_of={layer: count_ops(nodes) for layer, nodes in parts.items()},
        views={layer: _view(layer, nodes, lines) for layer, nodes in parts.items()} if details else {},
    )


def _view(layer: str, nodes: Sequence[fx.Node], lines: Mapping[fx.Node, str]) -> View:
    text, place = [], None
    for node in nodes:
        if where(node) != place:
            place = where(node)
            text.append(f"# {_within(layer, place) or 'the program'}")
        text.append(_shorten(layer, lines[node]))
    return View("\n".join(text), draw(layer, nodes, lines))


def _within(layer: str, path: str) -> str:
    return "*" + path.removeprefix(layer) if layer else path


def _shorten(layer: str, line: str) -> str:
    return line.replace(f'weights["{layer}.', 'weights["*.') if layer else line
