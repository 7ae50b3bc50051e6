"""A call of the dialect as a module: rows that follow from the tokens, and weights that a program then holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime
import torch
from check_lowering import lowered
from check_pass import VOCAB, capture, inputs
from torch import Tensor, nn

from llmc.compiler.frontend import capture as capturing
from llmc.compiler.targets.onnx.lower import Table
from llmc.ir.program import Program
from llmc.kernels.ops import embedding

# One token; some, more than one sequence; many.
SIZES = ((1, 1), (2, 3), (3, 16))
Function = Callable[["Calling", Tensor, Tensor], Any]


class Calling(nn.Module):
    """`function(self, x, positions)` with x [B, S, width] and the weights as attributes."""

    def __init__(self, function: Function, width: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.rows = nn.Buffer(torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(5)))
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.function(self, embedding(tokens, self.rows), positions)


def calling(function: Function, width: int = 32, **weights: Tensor) -> Program:
    """The program of a call, which may be of an op that only later stages allow."""
    with mock.patch.object(capturing, "verify"):
        return capture(Calling(function, width, weights))


def run_in_onnx(program: Program, table: Table, *, as_written: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """What a table makes of a call, opened by ONNX Runtime.

    Args:
        as_written: without its rewrites, one of which makes a kernel that rounds inputs of a plain dequantized matmul.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        lowered(program, table, Path(folder))
        onnx.checker.check_model(f"{folder}/model.onnx", full_check=True)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    names = {i.name for i in session.get_inputs()}

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        given = {"input_0": tokens.numpy(), "input_1": positions.numpy()}
        return torch.from_numpy(session.run(None, {n: x for n, x in given.items() if n in names})[0])

    return run


def check_call(
    function: Function,
    table: Table,
    width: int = 32,
    *,
    tolerance: float = 2e-6,
    as_written: bool = False,
    **weights: Tensor,
) -> Program:
    """Hold what a table makes of a call to the meaning of the ops in it; the program is returned."""
    program = calling(function, width, **weights)
    run = run_in_onnx(program, table, as_written=as_written)
    for size in SIZES:
        sample = inputs(*size)
        torch.testing.assert_close(run(*sample), program(*sample), rtol=tolerance, atol=tolerance)
    return program


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
