"""A lowering to ONNX for an engine with caches of a fixed length, which is told where each sequence stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....ir.caches import Cache
from ....ir.program import Program
from ..onnx.external import ExternalData
from ..onnx.graph import Value
from ..onnx.lower import BATCH, ROWS, Lowering
from .ops import TENSORRT


class TensorRtLowering(Lowering):
    """Lowers a program with `starts` and `rows` as inputs of the graph.

    A mask of positions as input would grow with every token; a CUDA graph needs inputs of one shape.
    """

    def __init__(self, program: Program, data: ExternalData) -> None:
        super().__init__(program, TENSORRT, data)

    def _make_starts(self, shape: Sequence[Any]) -> None:
        self.starts = Value(self.input("starts", torch.int64, [BATCH]), torch.int64, shape)

    def _make_rows(self) -> None:
        self.input("rows", torch.int64, [ROWS])

    def _cache_length(self, cache: Cache, name: str) -> int:
        return cache.length

    def _rows(self) -> str:
        return ROWS
