"""The engine's contract, on real artifacts: where a token stands and what came before it is all that counts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from attending import SCALE, Attending, cached, join, qkv
from compiled import artifact
from stepping import engine_of
from torch import Tensor

import llmc
from llmc import LLM, LlmcError, SamplingParams
from llmc.compiler.targets.ort.facts import PREFILL_TOKENS
from llmc.kernels.ops import attention
from llmc.runtimes.engines.base import Engine
from llmc.runtimes.engines.cores import physical_cores
from llmc.runtimes.engines.ort import engine as ort

# Every layer keeps all positions; most layers keep a window of 6; the standard's ops, which see the whole cache; codes.
ARTIFACTS = {
    "static": ("speaking", {}),
    "ring": ("gemma3_text", {}),
    "standard": ("gemma3_text", {"ops": "standard", "kv_cache": "static"}),
    "int8 cache": ("speaking", {"kv_cache_dtype": "int8"}),
    "fp8 rings": ("gemma3_text", {"kv_cache_dtype": "fp8"}),
}
LENGTH = 40


@pytest.fixture(scope="module", params=ARTIFACTS)
def engine(request: pytest.FixtureRequest) -> Engine:
    model, options = ARTIFACTS[request.param]
    return llmc.load(artifact(model, **options), threads=1)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Unlike sequences, [4, LENGTH]."""
    return np.random.default_rng(0).integers(3, 72, (4, LENGTH))


def run(engine: Engine, tokens: np.ndarray, start: int = 0, slot: int = 0) -> np.ndarray:
    """Logits [S, V] of one sequence's next tokens."""
    return engine.forward(tokens[None], np.array([start]), np.array([slot]))[0].copy()


@pytest.fixture(scope="module")
def whole(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    """Logits [4, LENGTH, V] of each sequence, run alone and at once."""
    logits = []
    for sequence in tokens:
        engine.open_slots(1)
        logits.append(run(engine, sequence))
    return np.stack(logits)


def close(engine: Engine, got: np.ndarray, want: np.ndarray) -> None:
    """The same but for the order of sums, which may move a key or value across the middle between two codes."""
    rounded = any(cache.has_scales for cache in engine.manifest.caches)  # type: ignore[attr-defined]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 if rounded else 2e-5)


@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (3, 20, 1, 16), (25, 15), (15, 25)])
def test_a_prompt_in_pieces(engine: Engine, tokens: np.ndarray, whole: np.ndarray, sizes: Sequence[int]) -> None:
    engine.open_slots(1)
    start = 0
    for size in sizes:
        close(engine, run(engine, tokens[0, start : start + size], start), whole[0, start : start + size])
        start += size
    assert start == LENGTH


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (5, 1, 3), (3, 4, 0)])
def test_sequences_at_different_starts_in_any_slots(
    engine: Engine, tokens: np.ndarray, whole: np.ndarray, slots: Sequence[int]
) -> None:
    engine.open_slots(6)
    held = np.array([7, 19, 2])
    for i, (slot, start) in enumerate(zip(slots, held, strict=True)):
        run(engine, tokens[i, :start], 0, slot)
    for _ in range(15):
        logits = engine.forward(tokens[[0, 1, 2], held][:, None], held, np.array(slots), last_only=True)
        assert logits.shape == (3, 1, 96)
        close(engine, logits[:, 0], whole[[0, 1, 2], held])
        held += 1
    several = np.stack([tokens[i, start : start + 3] for i, start in enumerate(held)])
    logits = engine.forward(several, held, np.array(slots))
    close(engine, logits, np.stack([whole[i, start : start + 3] for i, start in enumerate(held)]))


def test_slots_are_the_first_ones_if_none_are_named(engine: Engine, tokens: np.ndarray, whole: np.ndarray) -> None:
    engine.open_slots(3)
    engine.forward(tokens[:2, :9], np.zeros(2, np.int64))
    close(engine, engine.forward(tokens[:2, 9:10], np.full(2, 9))[:, 0], whole[:2, 9])
    close(engine, run(engine, tokens[1, 9:10], 9, slot=1), whole[1, 9:10])


def test_going_back_and_on_otherwise(engine: Engine, tokens: np.ndarray, whole: np.ndarray) -> None:
    """One step back: a ring of a window's size keeps no more."""
    engine.open_slots(1)
    run(engine, tokens[0, :11])
    run(engine, tokens[1, 11:12], 11)
    close(engine, run(engine, tokens[0, 11:13], 11), whole[0, 11:13])
    close(engine, run(engine, tokens[2, :5]), whole[2, :5])


def test_opening_slots_anew(engine: Engine, tokens: np.ndarray, whole: np.ndarray) -> None:
    for count in (2, 1, 4):
        engine.open_slots(count)
        assert engine.slots == count
        close(engine, run(engine, tokens[count - 1], slot=count - 1), whole[count - 1])


@pytest.mark.parametrize("length", [1, 15, 16, 33])
def test_the_last_token_only(engine: Engine, tokens: np.ndarray, whole: np.ndarray, length: int) -> None:
    engine.open_slots(2)
    for last_only, count in ((True, 1), (False, length), (True, 1)):
        logits = engine.forward(tokens[:2, :length], np.zeros(2, np.int64), last_only=last_only)
        assert logits.shape == (2, count, 96) and logits.dtype == np.float32
        close(engine, logits, whole[:2, length - count : length])


def test_long_calls_go_in_pieces(
    engine: Engine, tokens: np.ndarray, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "PIECE", 8)
    engine.open_slots(3)
    starts, slots = np.array([3, 0, 5]), np.array([2, 0, 1])
    given = np.stack([tokens[i, start : start + 19] for i, start in enumerate(starts)])
    wanted = np.stack([whole[i, start : start + 19] for i, start in enumerate(starts)])
    for last_only, want in ((False, wanted), (True, wanted[:, -1:])):
        for i in (0, 2):
            run(engine, tokens[i, : starts[i]], 0, slots[i])
        logits = engine.forward(given, starts, slots, last_only)
        assert logits.shape == want.shape
        close(engine, logits, want)


def test_what_is_refused_changes_nothing(engine: Engine, tokens: np.ndarray, whole: np.ndarray) -> None:
    engine.open_slots(2)
    run(engine, tokens[0, :20])
    wrong = [
        ("SEQUENCE_TOO_LONG", tokens[:1, :20], [engine.max_seq_len - 19], [0]),
        ("TOKEN_UNKNOWN", np.array([[engine.vocab_size]]), [20], [0]),
        ("TOKEN_UNKNOWN", np.array([[-1]]), [20], [0]),
        ("SLOT_CLOSED", tokens[:1, :1], [0], [2]),
    ]
    for code, given, starts, slots in wrong:
        with pytest.raises(LlmcError) as caught:
            engine.forward(given, np.array(starts), np.array(slots))
        assert caught.value.code == code and caught.value.hint
    close(engine, run(engine, tokens[0, 20:22], 20), whole[0, 20:22])


def test_the_last_position_is_served(engine: Engine) -> None:
    engine.open_slots(1)
    sequence = np.arange(engine.max_seq_len) % 60 + 3
    logits = run(engine, sequence)
    close(engine, run(engine, sequence[-1:], engine.max_seq_len - 1), logits[-1:])


# Of one artifact ------------------------------------------------------------------------------------------------------


def test_many_tokens_take_their_own_graph(tmp_path: Path) -> None:
    tokens, many = np.random.default_rng(1).integers(0, 60, (1, 128)), PREFILL_TOKENS
    folder = shutil.copytree(artifact("speaking", quantize="int4"), tmp_path / "out")
    whole = llmc.load(folder, threads=1).forward(tokens[:, :many], np.array([0]))
    (folder / "prefill.onnx").write_bytes(bytes((folder / "prefill.onnx").stat().st_size))
    engine = llmc.load(folder, threads=1, check_files=False)
    step = engine.forward(tokens[:, : many - 1], np.array([0]))
    # The same weights, but inputs on another grid: near, and not the same.
    error = np.sqrt(np.square(step - whole[:, : many - 1]).mean() / np.square(step).mean())
    assert 1e-4 < error < 0.1
    with pytest.raises(LlmcError) as caught:
        engine.forward(tokens[:, :many], np.array([0]))
    assert caught.value.code == "GRAPH_REFUSED" and "prefill.onnx" in caught.value.what


def test_the_last_token_of_a_graph_that_returns_all(tmp_path: Path) -> None:
    """If the LM head is not a linear, the graph cannot select logits."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, place, x), SCALE))

    engine = engine_of(cached(attend), tmp_path, ops="standard")
    tokens, start = np.arange(1, 8)[None], np.zeros(1, np.int64)
    every = engine.forward(tokens, start)
    last = engine.forward(tokens, start, last_only=True)
    assert last.shape == (1, 1, engine.vocab_size) and every.shape[1] == 7
    close(engine, last, every[:, -1:])


def test_threads() -> None:
    assert llmc.load(artifact("speaking"), threads=2).threads == 2  # type: ignore[attr-defined]
    assert llmc.load(artifact("speaking")).threads == physical_cores()  # type: ignore[attr-defined]


def test_an_output_ends_where_the_room_does() -> None:
    llm = LLM(artifact("speaking"))
    prompt = list(range(3, 60)) * 2
    (done,) = llm.generate(prompt, SamplingParams(max_tokens=99, ignore_eos=True))
    assert done.finish_reason == "max_seq_len"
    assert len(prompt) + len(done.token_ids) == llm.engine.max_seq_len == 128


def test_a_full_ring_goes_back_by_one_or_to_the_beginning(tmp_path: Path) -> None:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, place, x), SCALE, window=6))

    engine = engine_of(cached(attend), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.vocab_size
    engine.forward(tokens, np.array([0]))
    engine.forward(tokens[:, -1:], np.array([16]))
    with pytest.raises(llmc.LlmcError, match="can't go back to 12") as caught:
        engine.forward(tokens[:, :1], np.array([12]))
    assert caught.value.code == "ROLLBACK_TOO_FAR"
    engine.forward(tokens[:, :5], np.array([0]))
    engine.forward(tokens[:, :1], np.array([2]))  # it is not full yet: nothing was overwritten
