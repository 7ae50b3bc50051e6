"""InsertKvCache: chunks over a cache have the logits of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attending import (
    DIM,
    HEADS,
    KV_HEADS,
    MAX_SEQ_LEN,
    SCALE,
    VALUE_DIM,
    Attend,
    Attending,
    channel_scales,
    join,
    optimized,
    qkv,
)
from check_pass import VOCAB, check_rerun
from torch import Tensor

from llmc.compiler.gate.quantized_cache import with_quantized_cache
from llmc.errors import LlmcError
from llmc.ir.caches import Cache
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import attention, embedding, rope
from llmc.kernels.ops.quantized import CACHE_CODES
from llmc.passes.cache.insert_kv_cache import InsertKvCache

WINDOW = 5
LENGTH = 29
AHEAD = 6  # the second sequence is ahead by this many positions
CHUNKS = (3, 1, WINDOW, 9, 1, LENGTH - AHEAD - 19)


def plain(**options: Any) -> Attend:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        named = {name: getattr(m, value) if isinstance(value, str) else value for name, value in options.items()}
        return join(attention(*qkv(m, place, x), SCALE, **named))

    return attend


def rotated(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    q, k, v = qkv(m, place, x)
    q, k = (rope(each, positions, m.cos, m.sin) for each in (q, k))
    return join(attention(q, k, v, SCALE, window=WINDOW if place else None))


def learned_positions(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """Positions are used by an embedding instead of rope, as are their sizes."""
    x = x + embedding(positions, m.cos).repeat(1, 1, 2)[..., :12] / positions.shape[0] * x.shape[0]
    return join(attention(*qkv(m, place, x), SCALE))


def shared(first: int | None, second: int | None) -> Attend:
    """Both layers attend over the first one's keys and values, in their own windows."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, place, x)
        if place == 0:
            m.held = k, v
        k, v = m.held  # type: ignore[misc]
        return join(attention(q, k, v, SCALE, window=(first, second)[place]))

    return attend


def run_in_chunks(program: Program, tokens: Tensor) -> Tensor:
    """Return logits [B, S, V], computed a few tokens per call.

    The second sequence is ahead of the first by AHEAD tokens.
    """
    caches = [[], []]  # type: ignore[var-annotated]
    for sequence in range(2):
        for cache in program.caches:
            for part in cache.tensors:  # large values, which would show if they were used
                caches[sequence].append(torch.full((1, cache.heads, cache.length, part.width), 1e2).to(part.dtype))
    _, *caches[1] = program.run(tokens[1:, :AHEAD], torch.tensor([0]), *caches[1])
    held = [torch.cat([x.view(torch.uint8) for x in pair]).view(pair[0].dtype) for pair in zip(*caches, strict=True)]
    logits = torch.zeros(2, LENGTH, VOCAB)
    starts = torch.tensor([0, AHEAD])
    for count in CHUNKS:
        new = torch.stack([ids[s : s + count] for ids, s in zip(tokens, starts.tolist(), strict=True)])
        out, *held = program.run(new, starts, *held)
        for sequence, start in enumerate(starts.tolist()):
            logits[sequence, start : start + count] = out[sequence]
        starts = starts + count
    return logits


def cache(number: int, length: int = MAX_SEQ_LEN, window: int | None = None, ring: bool = False) -> Cache:
    names = f"keys_{number}", f"values_{number}"
    return Cache(*names, KV_HEADS, DIM, VALUE_DIM, length, ring, window, torch.float32)


WHOLE = (cache(0), cache(1))
RINGS = (cache(0, WINDOW, WINDOW, True), cache(1, WINDOW, WINDOW, True))
VARIANTS: dict[str, tuple[Attend, tuple[Cache, ...]]] = {
    "plain": (plain(), WHOLE),
    "rotated, a window in one layer": (rotated, (cache(0), RINGS[1])),
    "learned positions": (learned_positions, WHOLE),
    "rings": (plain(window=WINDOW), RINGS),
    "chunks": (plain(chunk=WINDOW), RINGS),
    "chunks and a wider window": (plain(chunk=WINDOW, window=7), RINGS),
    "a ring of one": (plain(window=1), (cache(0, 1, 1, True), cache(1, 1, 1, True))),
    "a window as long as the model": (plain(window=MAX_SEQ_LEN), (cache(0, window=32), cache(1, window=32))),
    "softcap, sinks and slopes": (plain(softcap=1.5, sinks="sinks", slopes="slopes"), WHOLE),
    "all of it in rings": (plain(softcap=1.5, sinks="sinks", slopes="slopes", window=WINDOW), RINGS),
    "shared": (shared(None, None), (cache(0),)),
    "shared, one window": (shared(WINDOW, WINDOW), (RINGS[0],)),
    "shared, two windows": (shared(WINDOW, 3), (RINGS[0], cache(1, 3, 3, True))),
    "shared, a window in one layer": (shared(WINDOW, None), (RINGS[0], cache(1))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_few_tokens_at_a_time_equal_all_at_once(name: str) -> None:
    attend, caches = VARIANTS[name]
    before = optimized(attend)
    program = before.copy()
    assert InsertKvCache()(program).matches == 2
    assert program.stage is Stage.CACHED and program.caches == caches and before.caches == ()
    assert not program.ops()["llmc.attention"] and program.ops()["llmc.cached_attention"] == 2
    assert [str(n.target) for n in program.inputs] == [
        "tokens",
        "starts",
        *(n for c in caches for n in (c.keys, c.values)),
    ]

    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    got, want = run_in_chunks(program, tokens), before(tokens, torch.arange(LENGTH).repeat(2, 1))
    for i, (start, end) in enumerate(((0, LENGTH - AHEAD), (AHEAD, LENGTH))):
        torch.testing.assert_close(got[i, start:end], want[i, start:end], atol=1e-5, rtol=0)
    check_rerun(program)


# Tolerances by codes: a sum in another order may round a number to a neighbouring code.
QUANTIZED = {"int8": 5e-3, "fp8": 3e-2}


@pytest.mark.parametrize("codes", QUANTIZED)
@pytest.mark.parametrize("name", ["plain", "rings", "all of it in rings", "shared, a window in one layer"])
def test_a_quantized_cache_equals_attention_over_quantized_keys_and_values(name: str, codes: str) -> None:
    attend, caches = VARIANTS[name]
    before = optimized(attend)
    program = before.copy()
    assert InsertKvCache(codes=codes)(program).matches == 2
    expected = [
        replace(c, dtype=CACHE_CODES[codes], key_scales=f"key_scales_{i}", value_scales=f"value_scales_{i}")
        for i, c in enumerate(caches)
    ]
    assert program.caches == tuple(expected) and program.ops()["llmc.quant_cached_attention"] == 2
    assert not {"llmc.attention", "llmc.cached_attention"} & program.ops().keys()
    names = [part.name for c in program.caches for part in c.tensors]
    assert [str(n.target) for n in program.inputs] == ["tokens", "starts", *names]
    assert {n.meta["val"].dtype for n in program.inputs[2:]} == {CACHE_CODES[codes], torch.float32}

    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    got, positions = run_in_chunks(program, tokens), torch.arange(LENGTH).repeat(2, 1)
    want, unrounded = with_quantized_cache(before, codes, program)(tokens, positions), before(tokens, positions)
    for i, (start, end) in enumerate(((0, LENGTH - AHEAD), (AHEAD, LENGTH))):
        torch.testing.assert_close(got[i, start:end], want[i, start:end], atol=QUANTIZED[codes], rtol=0)
        assert (got[i, start:end] - unrounded[i, start:end]).abs().max() > 2e-4, "nothing was rounded"
    check_rerun(program)


@pytest.mark.parametrize("name", ["plain", "shared", "shared, a window in one layer", "softcap, sinks and slopes"])
def test_int8_codes_with_constant_scales(name: str) -> None:
    """A ring cache has no constant scales; attentions that share a cache share them."""
    attend, caches = VARIANTS[name]
    before = optimized(attend)
    program = before.copy()
    scales = [channel_scales(value_dim=VALUE_DIM)] * 2
    InsertKvCache(codes="int8", scales=scales)(program)
    for made, plain_one in zip(program.caches, caches, strict=True):
        own = (made.key_scales, made.value_scales)
        assert made == replace(plain_one, dtype=torch.int8, key_scales=own[0], value_scales=own[1])
        assert (None in own) == (not plain_one.ring) and made.is_quantized and not plain_one.is_quantized
    found = {name: weight.evaluate() for name, weight in program.weights.items() if name.endswith(".scales")}
    want = {}
    for i, one in enumerate(caches):
        want |= {} if one.ring else {f"keys_{i}.scales": scales[0].keys, f"values_{i}.scales": scales[0].values}
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)

    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    got, positions = run_in_chunks(program, tokens), torch.arange(LENGTH).repeat(2, 1)
    rounded = with_quantized_cache(before, "int8", program)(tokens, positions)
    by_token = with_quantized_cache(before, "int8")(tokens, positions)
    for i, (start, end) in enumerate(((0, LENGTH - AHEAD), (AHEAD, LENGTH))):
        torch.testing.assert_close(got[i, start:end], rounded[i, start:end], atol=QUANTIZED["int8"], rtol=0)
        assert (by_token[i, start:end] - rounded[i, start:end]).abs().max() > 1e-3, "the scales made no difference"
    check_rerun(program)


def test_only_int8_codes_have_constant_scales() -> None:
    with pytest.raises(ValueError, match="not fp8"):
        InsertKvCache(codes="fp8", scales=[channel_scales()])


SLACK = 3


@pytest.mark.parametrize("codes", [None, *QUANTIZED])
@pytest.mark.parametrize("name", ["rotated, a window in one layer", "chunks and a wider window", "all of it in rings"])
def test_rings_with_slack_go_back(name: str, codes: str | None) -> None:
    """Calls of SLACK + 1 tokens of which only some are right; the next one goes back over the others."""
    before = optimized(VARIANTS[name][0])
    program = before.copy()
    InsertKvCache(codes=codes, slack=SLACK)(program)
    sizes = [c.length + SLACK if c.ring else c.length for c in VARIANTS[name][1]]
    assert [c.length for c in program.caches] == sizes and program.caches[1].slack == SLACK
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    reference = before if codes is None else with_quantized_cache(before, codes, program)
    want = reference(tokens, torch.arange(LENGTH).repeat(2, 1))
    start, right, held = 0, 0, program.empty_caches(2)
    while start + SLACK + 1 <= LENGTH:
        right = right % (SLACK + 1) + 1
        new = tokens[:, start : start + SLACK + 1].clone()
        new[:, right:] = (new[:, right:] + 1) % VOCAB
        for _ in range(2):  # the second time, it goes back over all tokens of the first
            out, *held = program.run(new, torch.tensor([start, start]), *held)
            got, tolerance = out[:, :right], 1e-5 if codes is None else QUANTIZED[codes]
            torch.testing.assert_close(got, want[:, start : start + right], atol=tolerance, rtol=0)
        start += right


@pytest.mark.parametrize(("slack", "ring"), [(26, True), (27, False)])
def test_a_ring_as_long_as_the_model_is_none(slack: int, ring: bool) -> None:
    program = optimized(plain(window=WINDOW))
    InsertKvCache(slack=slack)(program)
    assert program.caches == tuple(cache(i, WINDOW + slack, WINDOW, ring) for i in range(2))


@pytest.mark.parametrize(
    ("windows", "window"), [((WINDOW, 3), WINDOW), ((3, WINDOW), WINDOW), ((WINDOW, None), None), ((None, 3), None)]
)
def test_without_rings_caches_hold_all_positions(windows: tuple[int | None, int | None], window: int | None) -> None:
    """A cache of two layers has the larger of their windows."""
    before = optimized(shared(*windows))
    program = before.copy()
    InsertKvCache(ring=False)(program)
    assert program.caches == (cache(0, window=window),)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    got, want = run_in_chunks(program, tokens), before(tokens, torch.arange(LENGTH).repeat(2, 1))
    torch.testing.assert_close(got[0, : LENGTH - AHEAD], want[0, : LENGTH - AHEAD], atol=1e-5, rtol=0)


def test_a_cache_has_the_dtype_of_its_keys_and_values() -> None:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*(each.to(torch.bfloat16) for each in qkv(m, place, x)), SCALE).float())

    program = optimized(attend)
    InsertKvCache()(program)
    assert {c.dtype for c in program.caches} == {torch.bfloat16}
    assert {n.meta["val"].dtype for n in program.inputs[2:]} == {torch.bfloat16}
    check_rerun(program)


# Refused ------------------------------------------------------------------------------------------------------------


def biased(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(
        attention(*qkv(m, place, x), SCALE, bias=(positions[:, None, None] - positions[:, None, :, None]) * 0.1)
    )


def without_attention(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return x.repeat(1, 1, 2)[..., : HEADS * VALUE_DIM]


def more_keys(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """Two keys and values that belong to no token precede the others."""
    q, k, v = qkv(m, place, x)
    k, v = (torch.cat((each.new_ones(each.shape[0], KV_HEADS, 2, each.shape[3]), each), 2) for each in (k, v))
    return join(attention(q, k, v, SCALE))


def more_sequences(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """Each sequence attends twice."""
    q, k, v = (torch.cat((each, each.flip(-1))) for each in qkv(m, place, x))
    one, other = attention(q, k, v, SCALE).split([x.shape[0], x.shape[0]])
    return join(one + other)


REFUSED: dict[str, tuple[Attend, str]] = {
    "1. not causal": (plain(causal=False), "In layers.0, attention is not causal"),
    "2. a bias": (biased, "In layers.0, attention adds a bias"),
    "3. more keys than tokens": (
        more_keys,
        "In layers.0, attention does not have one query and one key for each token",
    ),
    "3. more sequences than the input has": (
        more_sequences,
        "In layers.0, attention does not have one query and one key",
    ),
    "4. no attention": (without_attention, "the program has no attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    attend, message = REFUSED[name]
    program = optimized(attend)
    before = str(program)
    with pytest.raises(LlmcError) as caught:
        InsertKvCache()(program)
    assert caught.value.code == "CACHE_IMPOSSIBLE" and message in caught.value.what and caught.value.hint
    assert str(program) == before and program.caches == () and program.stage is Stage.OPTIMIZED
