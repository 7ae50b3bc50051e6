from __future__ import annotations

from typing import Any

import pytest
import torch
from histories import GARBAGE, SCALE, H, History

from llmc.kernels.ops import cached_attention

RICH = {"softcap": 1.5, "sinks": torch.linspace(-1, 2, H), "slopes": torch.linspace(0.1, 0.9, H)}
STARTS = [[0, 0], [0, 5], [7, 3]]


def run_check(check, history: History, starts: list[int], count: int, **extra: Any) -> None:
    args = (*history.arguments(starts, count), SCALE)
    check(cached_attention, args, {**extra, "ring": history.ring}, history.exact(starts, count, extra))


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("extra", [{}, {"window": 3}, {"chunk": 3}, RICH, {"window": 4, "chunk": 3, **RICH}])
def test_static(check, starts: list[int], count: int, extra: dict[str, Any]):
    run_check(check, History(12, ring=False), starts, count, **extra)


@pytest.mark.parametrize("starts", [*STARTS, [6, 5], [30, 11]])
@pytest.mark.parametrize("count", [1, 4, 6, 9], ids=["one", "some", "a full ring", "more than the ring"])
@pytest.mark.parametrize("extra", [{"window": 6}, {"window": 3}, {"chunk": 6}, {"window": 4, **RICH}])
def test_ring(check, starts: list[int], count: int, extra: dict[str, Any]):
    run_check(check, History(6, ring=True), starts, count, **extra)


@pytest.mark.parametrize("starts", [[20, 7], [9, 13]])
@pytest.mark.parametrize("extra", [{"window": 6}, {"chunk": 6}, {"window": 6, **RICH}])
def test_going_back_in_a_ring_longer_than_the_window(starts: list[int], extra: dict[str, Any]):
    """Positions after the starts are as if they had never been stored, up to the length of the ring."""
    history, count = History(9, ring=True), 11
    expected = history.exact(starts, count, extra)[0]

    def output(back: int) -> torch.Tensor:
        args = list(history.arguments(starts, count))
        for i, tokens in ((3, history.k), (4, history.v)):
            stale = tokens.clone()
            for b, start in enumerate(starts):
                stale[b, :, start:] = GARBAGE
            args[i] = history.cache([start + back for start in starts], stale)
        return cached_attention(*args, SCALE, **extra, ring=True)[0]

    for back in (1, 2, 3, 4):
        torch.testing.assert_close(output(back), torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert "window" not in extra or (output(5) - torch.from_numpy(expected)).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ring", [False, True])
def test_dtypes(check, dtype: torch.dtype, ring: bool):
    run_check(check, History(8 if ring else 12, ring, dtype), [7, 3], 4, window=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contract(contract, dtype: torch.dtype):
    args = (*History(12, False, dtype).arguments([7, 3], 4), SCALE)
    contract(cached_attention, args, {"window": 6, "ring": dtype == torch.bfloat16, **RICH})


def test_a_token_beyond_a_static_cache_is_not_stored(check):
    run_check(check, History(6, ring=False), [4, 0], 4)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_with_constant_scales(check, dtype: torch.dtype, ring: bool):
    """It equals attention over a history of dequantized keys and values, and stores their codes."""
    starts, count = [7, 3], 4
    plain, dequantized = (History(8 if ring else 12, ring, dtype) for _ in range(2))
    scales, codes = {}, {}
    for name in ("k", "v"):
        tokens = getattr(plain, name).float()
        heads, dim = tokens.shape[1], tokens.shape[3]
        # Of the first channel all numbers saturate; -128 is a code, 128 is none.
        scale = torch.linspace(0.01, 0.04, heads * dim).view(heads, dim)
        scale[:, 0] = 1e-3
        units = (tokens.numpy() / scale.numpy()[:, None]).round()
        codes[name] = torch.from_numpy(units.clip(-128, 127))
        scales[{"k": "k_scales", "v": "v_scales"}[name]] = scale
        setattr(dequantized, name, codes[name].double() * scale.double()[:, None])
    dequantized.q = plain.q

    def caches(lengths: list[int]) -> list[torch.Tensor]:
        held = (plain.cache(lengths, codes[name].float()) for name in ("k", "v"))
        return [torch.where(cache == GARBAGE, 100.0, cache).to(torch.int8) for cache in held]

    q, k, v, _, _, at = plain.arguments(starts, count)
    extra = {"window": 6}
    expected = dequantized.exact(starts, count, extra)[0], *caches([start + count for start in starts])
    assert {-128, 127} <= set(codes["k"].unique().int().tolist())
    check(cached_attention, (q, k, v, *caches(starts), at, SCALE), {**extra, "ring": ring, **scales}, expected)


@pytest.mark.parametrize("ring", [False, True])
def test_several_calls_equal_one_call(ring: bool):
    history = History(8 if ring else 24, ring)
    q, k, v, *caches, starts = history.arguments([0, 2], 20)
    whole = cached_attention(q, k, v, *caches, starts, SCALE, window=5, ring=ring)
    done, pieces = 0, []
    for count in (3, 1, 7, 1, 8):
        new = (tensor[:, :, done : done + count] for tensor in (q, k, v))
        out, *caches = cached_attention(*new, *caches, starts + done, SCALE, window=5, ring=ring)
        pieces.append(out)
        done += count
    torch.testing.assert_close(torch.cat(pieces, 2), whole[0], rtol=0, atol=1e-12)
    assert torch.equal(caches[0], whole[1]) and torch.equal(caches[1], whole[2])


def test_the_arguments_are_not_modified():
    args = History(12, ring=False).arguments([0, 3], 4)
    before = [tensor.clone() for tensor in args]
    cached_attention(*args, SCALE)
    assert all(torch.equal(now, earlier) for now, earlier in zip(args, before, strict=True))


@pytest.mark.parametrize("extra", [{}, {"window": 7}, {"chunk": 7}])
def test_a_ring_smaller_than_the_window_is_refused(extra: dict[str, int]):
    args = History(6, ring=True).arguments([0, 3], 1)
    with pytest.raises(ValueError, match="a ring cache of 6 positions requires a window or a chunk of at most 6"):
        cached_attention(*args, SCALE, ring=True, **extra)


@pytest.mark.parametrize("ring", [False, True])
def test_tracing(traces, ring: bool):
    history = History(12, ring, torch.float32)
    large = history.arguments([7, 3], 4)
    small = tuple(tensor[:1, :, :1] for tensor in large[:3]), tuple(tensor[:1] for tensor in large[3:])
    traces(
        lambda *args: cached_attention(*args, SCALE, window=6, ring=ring, **RICH),
        large,
        (*small[0], *small[1]),
        ("BhSd", "BhSd", "BhSd", "Bhmd", "Bhmd", "B"),
    )
