"""Compare attention over 8-bit caches with attention over dequantized vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from histories import GARBAGE, SCALE, H, History

from llmc.kernels.ops import quant_cached_attention
from llmc.kernels.ops.quantized import CACHE_CODES

# The value of each byte as a code. E4M3 has a sign bit, four exponent bits and three mantissa bits.
INT8 = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
E4M3 = np.array(
    [
        (-1.0 if byte & 128 else 1.0)
        * ((byte & 7) / 8 * 2.0**-6 if not byte & 120 else (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3 & 15) - 7))
        for byte in range(256)
    ]
)
GRIDS = {"int8": (INT8, 127), "fp8": (np.where(np.abs(E4M3) > 448, np.nan, E4M3), 448)}


def quantized(tokens: torch.Tensor, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantize each head of each token: bytes of the nearest codes, and scales."""
    values, largest = GRIDS[codes]
    vectors = tokens.numpy().astype(np.float32)
    scales = np.abs(vectors).max(-1, keepdims=True) / np.float32(largest)
    distance = np.abs((vectors / scales).astype(np.float64)[..., None] - values)
    distance = np.where(np.isnan(distance), np.inf, distance) + 1e-12 * (np.arange(256) & 1)
    return distance.argmin(-1).astype(np.uint8), scales


class QuantizedHistory:
    """A plain history, a history of its dequantized keys and values, and their codes."""

    def __init__(self, size: int, ring: bool, codes: str, dtype: torch.dtype = torch.float32) -> None:
        self.plain, self.dequantized = (History(size, ring, dtype) for _ in range(2))
        self.dequantized.q = self.plain.q
        self.dtype, self.parts = CACHE_CODES[codes], {}
        for name in ("k", "v"):
            code_bytes, scales = quantized(getattr(self.plain, name).float(), codes)
            setattr(self.dequantized, name, torch.from_numpy(GRIDS[codes][0][code_bytes] * scales.astype(np.float64)))
            self.parts[name] = torch.from_numpy(code_bytes), torch.from_numpy(scales)

    def caches(self, lengths: list[int]) -> list[torch.Tensor]:
        """Return codes of keys and of values, then their scales.

        Entries without a token hold a large number.
        """
        caches = []
        for part in (0, 1):
            for name in ("k", "v"):
                cache = self.plain.cache(lengths, self.parts[name][part].float())
                if part == 0:
                    cache = torch.where(cache == GARBAGE, 100.0, cache).to(torch.uint8).view(self.dtype)
                caches.append(cache)
        return caches

    def arguments(self, starts: list[int], count: int) -> tuple[Any, ...]:
        q, k, v, _, _, starts_tensor = self.plain.arguments(starts, count)
        return q, k, v, *self.caches(starts), starts_tensor, SCALE

    def exact(self, starts: list[int], count: int, extra: dict[str, Any]) -> tuple[Any, ...]:
        out, *_ = self.dequantized.exact(starts, count, extra)
        return out, *self.caches([start + count for start in starts])


RICH = {"softcap": 1.5, "sinks": torch.linspace(-1, 2, H), "slopes": torch.linspace(0.1, 0.9, H)}


def run_check(check: Any, history: QuantizedHistory, starts: list[int], count: int, **extra: Any) -> None:
    kwargs = {**extra, "ring": history.plain.ring}
    check(quant_cached_attention, history.arguments(starts, count), kwargs, history.exact(starts, count, extra))


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("starts", [[0, 0], [7, 3]])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("extra", [{}, {"window": 4, "chunk": 3, **RICH}], ids=["plain", "rich"])
def test_static(check: Any, codes: str, starts: list[int], count: int, extra: dict[str, Any]) -> None:
    run_check(check, QuantizedHistory(12, False, codes), starts, count, **extra)


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("starts", [[0, 5], [30, 11]])
@pytest.mark.parametrize("count", [1, 4, 9], ids=["one", "some", "more than the ring"])
def test_ring(check: Any, codes: str, starts: list[int], count: int) -> None:
    run_check(check, QuantizedHistory(6, True, codes), starts, count, window=6)


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(check: Any, codes: str, dtype: torch.dtype) -> None:
    run_check(check, QuantizedHistory(12, False, codes, dtype), [7, 3], 4)


@pytest.mark.parametrize("codes", GRIDS)
def test_contract(contract: Any, codes: str) -> None:
    contract(quant_cached_attention, QuantizedHistory(12, False, codes).arguments([7, 3], 4), {"window": 6, **RICH})


@pytest.mark.parametrize("codes", GRIDS)
@pytest.mark.parametrize("ring", [False, True])
def test_several_calls_equal_one_call(codes: str, ring: bool) -> None:
    """True because a token attends to its own quantized key, as later tokens do."""
    history = QuantizedHistory(8 if ring else 24, ring, codes)
    q, k, v, *caches, starts, _ = history.arguments([0, 2], 20)
    whole = quant_cached_attention(q, k, v, *caches, starts, SCALE, window=5, ring=ring)
    done, pieces = 0, []
    for count in (3, 1, 7, 1, 8):
        new = (tensor[:, :, done : done + count] for tensor in (q, k, v))
        out, *caches = quant_cached_attention(*new, *caches, starts + done, SCALE, window=5, ring=ring)
        pieces.append(out)
        done += count
    torch.testing.assert_close(torch.cat(pieces, 2), whole[0], rtol=0, atol=1e-6)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, whole[1:], strict=True))


@pytest.mark.parametrize("codes", GRIDS)
def test_zero_keys_and_huge_values(codes: str) -> None:
    q, k, v, *caches, starts, _ = QuantizedHistory(12, False, codes).arguments([0, 0], 2)
    out, *caches = quant_cached_attention(q, k * 0, v * 1e30, *caches, starts, SCALE)
    assert out.isfinite().all() and (caches[0][:, :, :2].float() == 0).all()
    assert (caches[1][:, :, :2].float().abs().amax(-1) == GRIDS[codes][1]).all()


def test_a_ring_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a ring cache of 6 positions requires a window or a chunk of at most 6"):
        quant_cached_attention(*QuantizedHistory(6, True, "int8").arguments([0, 3], 1), ring=True, window=7)
