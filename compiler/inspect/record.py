"""Record the program before the first pass and after each pass, as plain data."""

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
from ...passes.pipeline import bring_to
from ...passes.runner import Runner
from ..api import capture
from .drawing import Drawing, draw
from .layers import OUTSIDE, count_ops, fold, sections, signature


@dataclass(frozen=True)
class View:
    """Python text and dataflow of a section.

    In the text, `*` replaces the layer's name.
    """

    text: str
    drawing: Drawing


@dataclass(frozen=True)
class Snapshot:
    """Statistics of a program after one pass, and its sections' views.

    Attributes:
        nodes, weights: number of nodes and of weights.
        ops: number of calls of each op.
        kinds: signature of each layer.
        ops_of: number of calls of each op, per section.
        views: text and drawing of each section; empty unless details were requested.
    """

    nodes: int
    weights: int
    ops: dict[str, int]
    kinds: dict[str, str]
    ops_of: dict[str, dict[str, int]]
    views: dict[str, View]


@dataclass(frozen=True)
class RecordedStep:
    """One pass: its docstring, its matches and misses, and the program after it."""

    about: str
    record: PassRecord
    after: Snapshot


@dataclass
class Inspection:
    """The record of a model's run through the pipeline.

    Attributes:
        program: the final program; if a pass refused it, the program as that pass left it.
        dtype: the program's dtype.
        parameters: number of trained values; a tied weight counts once.
        captured: the program before the first pass.
        steps: the passes that ran, in order.
        refusal: the error that stopped the pipeline early, if any.
    """

    program: Program
    dtype: str
    parameters: int
    captured: Snapshot
    steps: list[RecordedStep] = field(default_factory=list)
    refusal: LlmcError | None = None

    @property
    def stage(self) -> Stage:
        """The last stage that the program reached."""
        return self.steps[-1].record.stage if self.steps else Stage.CAPTURED

    @property
    def moments(self) -> dict[str, Snapshot]:
        """Snapshots of the captured program and of each stage that it reached.

        If the last pass left the program between two stages, its snapshot is added under the name `now`.
        """
        snapshots = {str(Stage.CAPTURED): self.captured}
        stage = Stage.CAPTURED
        for step in self.steps:
            if step.record.stage > stage:
                stage = step.record.stage
                snapshots[str(stage)] = step.after
        if self.steps and self.steps[-1].after not in snapshots.values():
            snapshots["now"] = self.steps[-1].after
        return snapshots

    @property
    def layers(self) -> list[list[str]]:
        """Groups of layers that are identical in every snapshot."""
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
    """Run a model through the passes up to a stage, and record each step.

    No weight is read. If a pass refuses the program, the inspection contains the steps before it and the refusal.

    Args:
        model: anything that `capture` accepts.
        until: the stage to reach.
        dtype: the program's dtype.
        max_seq_len: as in `capture`.
        dump_ir: folder for the program after each pass, as Python.
        details: also record the views of all sections, for the page.
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
        bring_to(program, until, Runner(dump=dump_ir, watch=keep))
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
    text, path = [], None
    for node in nodes:
        if where(node) != path:
            path = where(node)
            text.append(f"# {_within(layer, path) or 'the program'}")
        text.append(_shorten(layer, lines[node]))
    return View("\n".join(text), draw(layer, nodes, lines))


def _within(layer: str, path: str) -> str:
    return "*" + path.removeprefix(layer) if layer else path


def _shorten(layer: str, line: str) -> str:
    return line.replace(f'weights["{layer}.', 'weights["*.') if layer else line
