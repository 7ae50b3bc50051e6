"""Small programs that call ops of the dialect on embedded tokens and weights, and their lowering."""

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

# [B, S]: one token, several sequences, many tokens.
SIZES = ((1, 1), (2, 3), (3, 16))
Function = Callable[["Calling", Tensor, Tensor], Any]


class Calling(nn.Module):
    """A model that computes `function(self, x, positions)` on embedded tokens x, [B, S, width].

    The weights are attributes.
    """

    def __init__(self, function: Function, width: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Buffer(torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(5)))
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.function(self, embedding(tokens, self.table), positions)


def calling(function: Function, width: int = 32, **weights: Tensor) -> Program:
    """Capture the program of a function, which may call ops that only later stages allow."""
    with mock.patch.object(capturing, "verify"):
        return capture(Calling(function, width, weights))


def run_in_onnx(program: Program, table: Table, *, as_written: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Lower a program with a table, and return a function that runs it in ONNX Runtime.

    Args:
        as_written: disable the rewrites of ONNX Runtime; one of them makes a kernel that also quantizes the inputs of
            a matmul.
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
    """Compare the lowered program of a function with the program itself; return the program."""
    program = calling(function, width, **weights)
    run = run_in_onnx(program, table, as_written=as_written)
    for size in SIZES:
        sample = inputs(*size)
        torch.testing.assert_close(run(*sample), program(*sample), rtol=tolerance, atol=tolerance)
    return program


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
