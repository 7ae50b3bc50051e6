from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.kernels.ops import rope

ANGLES = torch.rand(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6.3
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [9, 15, 3, 3, 0]])


def exact(x: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> np.ndarray:
    """Rotate each pair as a complex number by the angle of its position."""
    out = x.double().numpy().copy()
    half = angles.shape[1]
    for b, h, s, i in np.ndindex(x.shape[0], x.shape[1], x.shape[2], half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        number = complex(out[b, h, s, first], out[b, h, s, second])
        number *= np.exp(1j * float(angles[positions[b, s], i]))
        out[b, h, s, first], out[b, h, s, second] = number.real, number.imag
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [8, 11], ids=["whole", "partial"])
def test_rope(check, dtype: torch.dtype, interleaved: bool, dims: int):
    x = torch.randn(2, 3, 5, dims).to(dtype)
    tables = (ANGLES.cos(), ANGLES.sin()) if dtype == torch.float64 else (ANGLES.cos().float(), ANGLES.sin().float())
    check(rope, (x, POSITIONS, *tables), {"interleaved": interleaved}, exact(x, POSITIONS, ANGLES, interleaved))


def test_pairs_are_not_interleaved_by_default(check):
    x = torch.randn(2, 3, 5, 8)
    check(rope, (x, POSITIONS, ANGLES.cos(), ANGLES.sin()), {}, exact(x, POSITIONS, ANGLES, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [8, 11])
def test_contract(contract, dtype: torch.dtype, dims: int):
    x = torch.randn(2, 5, 3, dims).to(dtype).transpose(1, 2)
    contract(rope, (x, POSITIONS, ANGLES.cos().float(), ANGLES.sin().float()))
    contract(rope, (x, POSITIONS, ANGLES.cos().float(), ANGLES.sin().float()), {"interleaved": True})


@pytest.mark.parametrize("interleaved", [False, True])
def test_tracing(traces, interleaved: bool):
    cos, sin = ANGLES.cos().float(), ANGLES.sin().float()
    traces(
        lambda x, positions: rope(x, positions, cos, sin, interleaved),
        (torch.randn(2, 5, 3, 11).transpose(1, 2), POSITIONS),
        (torch.randn(1, 3, 1, 11), torch.tensor([[7]])),
        ("BhSd", "BS"),
    )
