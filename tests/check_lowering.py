"""A function of plain tensors, exported, lowered by one table and run in ONNX Runtime beside torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from llmc.compiler.targets.onnx.external import ExternalData
from llmc.compiler.targets.onnx.lower import Lowering, Table
from llmc.ir.program import Program
from llmc.ir.stages import Stage

# Sizes to trace with, and to run at: as traced, another, the smallest.
TRACED = (2, 5)
SIZES = (TRACED, (3, 7), (1, 1))


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        made = self.function(*inputs)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


class _Plain(Lowering):
    """Takes inputs as they are and gives all outputs as they are, where a model's have names and meanings."""

    def _make_inputs(self) -> None:
        for i, node in enumerate(self.program.inputs):
            value = node.meta["val"]
            shape = [s if isinstance(s, int) else str(s) for s in value.shape]
            self._values[node] = self.input(f"input_{i}", value.dtype, shape)
            self._values[node].shape = tuple(value.shape)

    def _make_outputs(self) -> None:
        (end,) = self.program.graph.find_nodes(op="output")
        for i, node in enumerate(end.args[0]):
            value = node.meta["val"]
            shape = [s if isinstance(s, int) else f"{i}_{d}" for d, s in enumerate(value.shape)]
            self.output(self._values[node], f"output_{i}", value.dtype, shape)


def traced(function: Callable[..., Any], examples: tuple[Tensor, ...]) -> Program:
    """`function` as a program whose inputs' first two dims, the batch and the length, are symbols."""
    shapes = {"inputs": tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in examples)}
    exported = torch.export.export(_Module(function), examples, dynamic_shapes=shapes, strict=False)
    program = Program(exported.graph_module, {}, Stage.CANONICAL, "a function", 32)
    program.sweep()
    for node in program.inputs:
        assert not any(isinstance(size, int) for size in node.meta["val"].shape[:2]), "the function fixes a size"
    return program


def lowered(program: Program, table: Table, folder: Path) -> onnx.ModelProto:
    """The model that the table makes of a program; it is written to the folder with its weights."""
    with ExternalData(folder / "data") as data:
        lowering = _Plain(program, table, data)
        lowering.run()
        lowering.save(folder / "model.onnx")
    return lowering.model()


def run_in_onnx(program: Program, table: Table) -> Callable[..., list[Tensor]]:
    """The lowered program, to be called with tensors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        lowered(program, table, Path(folder))
        onnx.checker.check_model(f"{folder}/model.onnx", full_check=True)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    names = {i.name for i in session.get_inputs()}

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {f"input_{i}": x.numpy() for i, x in enumerate(inputs) if f"input_{i}" in names}
        return [torch.from_numpy(y) for y in session.run(None, feeds)]

    return run


def check(function: Callable[..., Any], make: Callable[[int, int], tuple[Tensor, ...]], table: Table) -> None:
    """Hold the lowered function to torch: values, shapes and dtypes, at sizes that it was not traced with, too."""
    run = run_in_onnx(traced(function, make(*TRACED)), table)
    for size in SIZES:
        inputs = make(*size)
        want = _Module(function)(*inputs)
        got = run(*inputs)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6, equal_nan=True)
