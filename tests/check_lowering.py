"""Export a function of tensors, lower it with a table, and compare ONNX Runtime's results with torch's."""

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
from llmc.ir.signature import Signature
from llmc.ir.stages import Stage

# Sizes to trace with, and to run at: as traced, another, the smallest.
TRACED = (2, 5)
SIZES = (TRACED, (3, 7), (1, 1))


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.function(*inputs)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


class _Plain(Lowering):
    """A lowering with numbered inputs and outputs, instead of those of a language model."""

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
    """Export a function as a program; the first two dimensions of its inputs are symbolic."""
    shapes = {"inputs": tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in examples)}
    exported = torch.export.export(_Module(function), examples, dynamic_shapes=shapes, strict=False)
    tokens = exported.graph_signature.user_inputs[0]
    signature = Signature(tokens=str(tokens), positions=None)
    program = Program(exported.graph_module, {}, Stage.CANONICAL, "a function", 32, signature)
    program.sweep()
    for node in program.inputs:
        assert not any(isinstance(size, int) for size in node.meta["val"].shape[:2]), "the function fixes a size"
    return program


def lowered(program: Program, table: Table, folder: Path) -> onnx.ModelProto:
    """Lower a program with a table, write model and weights to a folder, and return the model."""
    with ExternalData(folder / "data") as data:
        lowering = _Plain(program, table, data)
        lowering.run()
        lowering.save(folder / "model.onnx")
    return lowering.model()


def run_in_onnx(program: Program, table: Table) -> Callable[..., list[Tensor]]:
    """Lower a program with a table, and return a function that runs it in ONNX Runtime."""
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
    """Compare a lowered function with torch: values, shapes and dtypes, also at other sizes than traced."""
    run = run_in_onnx(traced(function, make(*TRACED)), table)
    for size in SIZES:
        inputs = make(*size)
        want = _Module(function)(*inputs)
        got = run(*inputs)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6, equal_nan=True)
