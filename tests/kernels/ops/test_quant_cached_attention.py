"""Attention over 8-bit caches is attention over rows that were rounded one by one, by the definition of each grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from histories import GARBAGE, SCALE, H, History

from llmc.kernels.ops import quant_cached_attention
from llmc.kernels.ops.quantized import CACHE_CODES

# Of each grid the numbers that codes stand for, by byte; E4M3 has a sign, four bits of exponent and three of mantissa.
INT8 = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
E4M3 = np.array(
    [
        (-1.0 if byte & 128 else 1.0)
        * ((byte & 7) / 8 * 2.0**-6 if not byte & 120 else (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3 & 15) - 7))
        for byte in range(256)
    ]
)
GRIDS = {"int8": (INT8, 127), "fp8": (np.where(np.abs(E4M3) > 448, np.nan, E4M3), 448)}


def rounded(tokens: torch.Tensor, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the nearest numbers and scales, of each head of each token by itself; of two the even code."""
    numbers, largest = GRIDS[codes]
    rows = tokens.numpy().astype(np.float32)
    scales = np.abs(rows).max(-1, keepdims=True) / np.float32(largest)
    distance = np.abs((rows / scales).astype(np.float64)[..., None] - numbers)
    distance = np.where(np.isnan(distance), np.inf, distance) + 1e-12 * (np.arange(256) & 1)
    return distance.argmin(-1).astype(np.uint8), scales


class RoundedHistory:
    """A history whose keys and values are what codes stand for, and the codes."""

    def __init__(self, size: int, ring: bool, codes: str, dtype: torch.dtype = torch.float32) -> None:
        self.plain, self.stood_for = (History(size, ring, dtype) for _ in range(2))
        self.stood_for.q = self.plain.q
        self.dtype, self.parts = CACHE_CODES[codes], {}
        for name in ("k", "v"):
            made, scales = rounded(getattr(self.plain, name).float(), codes)
            setattr(self.stood_for, name, torch.from_numpy(GRIDS[codes][0][made] * scales.astype(np.float64)))
            self.parts[name] = torch.from_numpy(made), torch.from_numpy(scales)

    def caches(self, lengths: list[int]) -> list[torch.Tensor]:
        """Codes of keys and values, then scales; a slot that no token was written to holds a large number."""
        kept = []
        for part in (0, 1):
            for name in ("k", "v"):
                held = self.plain.cache(lengths, self.parts[name][part].float())
                if part == 0:
                    held = torch.where(held == GARBAGE, 100.0, held).to(torch.uint8).view(self.dtype)
                kept.append(held)
        return kept

    def arguments(self, starts: list[int], count: int) -> tuple[Any, ...]:
        q, k, v, _, _, at = self.plain.arguments(starts, count)
        return q, k, v, *self.caches(starts), at, SCALE

    def exact(self, starts: list[int], count: int, extra: dict[str, Any]) -> tuple[Any, ...]:
        out, *_ = self.stood_for.exact(starts, count, extra)
        return out, *self.caches([start + count for start in starts])


RICH = {"softcap": 1.5, "sinks": torch.linspace(-1, 2, H), "slopes": torch.linspace(0.1, 0.9, H)}


def hold(check: Any, history: RoundedHistory, starts: list[int], count: int, **extra: Any) -> None:
    given = {**extra, "ring": history.plain.ring}
    check(quant_cached_attention, history.arguments(starts, count), given, history.exact(starts, count, extra))


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("starts", [[0, 0], [7, 3]])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("extra", [{}, {"window": 4, "chunk": 3, **RICH}], ids=["plain", "rich"])
def test_static(check: Any, codes: str, starts: list[int], count: int, extra: dict[str, Any]) -> None:
    hold(check, RoundedHistory(12, False, codes), starts, count, **extra)


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("starts", [[0, 5], [30, 11]])
@pytest.mark.parametrize("count", [1, 4, 9], ids=["one", "some", "more than slots"])
def test_ring(check: Any, codes: str, starts: list[int], count: int) -> None:
    hold(check, RoundedHistory(6, True, codes), starts, count, window=6)


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(check: Any, codes: str, dtype: torch.dtype) -> None:
    hold(check, RoundedHistory(12, False, codes, dtype), [7, 3], 4)


@pytest.mark.parametrize("codes", GRIDS)
def test_contract(contract: Any, codes: str) -> None:
    contract(quant_cached_attention, RoundedHistory(12, False, codes).arguments([7, 3], 4), {"window": 6, **RICH})


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("ring", [False, True])
def test_it_is_the_same_however_a_prompt_is_cut(codes: str, ring: bool) -> None:
    """Bit for bit in the caches: a token sees its own key as later ones will."""
    history = RoundedHistory(8 if ring else 24, ring, codes)
    q, k, v, *caches, starts, _ = history.arguments([0, 2], 20)
    whole = quant_cached_attention(q, k, v, *caches, starts, SCALE, window=5, ring=ring)
    at, pieces = 0, []
    for count in (3, 1, 7, 1, 8):
        new = (tensor[:, :, at : at + count] for tensor in (q, k, v))
        out, *caches = quant_cached_attention(*new, *caches, starts + at, SCALE, window=5, ring=ring)
        pieces.append(out)
        at += count
    torch.testing.assert_close(torch.cat(pieces, 2), whole[0], rtol=0, atol=1e-6)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, whole[1:], strict=True))


@pytest.mark.parametrize("codes", GRIDS)
def test_a_row_of_zeros_and_one_of_huge_numbers(codes: str) -> None:
    q, k, v, *caches, starts, _ = RoundedHistory(12, False, codes).arguments([0, 0], 2)
    out, *caches = quant_cached_attention(q, k * 0, v * 1e30, *caches, starts, SCALE)
    assert out.isfinite().all() and (caches[0][:, :, :2].float() == 0).all()
    assert (caches[1][:, :, :2].float().abs().amax(-1) == GRIDS[codes][1]).all()


def test_a_ring_smaller_than_what_is_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="ring of 6"):
        quant_cached_attention(*RoundedHistory(6, True, "int8").arguments([0, 3], 1), ring=True, window=7)
