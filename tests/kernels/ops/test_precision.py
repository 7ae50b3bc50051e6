from __future__ import annotations

import pytest
import torch

from llmc.kernels.ops.precision import widen


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_widen(narrow: torch.dtype, wide: torch.dtype):
    assert widen(torch.ones(1, dtype=narrow)).dtype == wide
