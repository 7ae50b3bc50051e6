"""Graphs, pieces and limits of the engine; the contract of every engine is in test_contract.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from attending import SCALE, Attending, cached, join, qkv
from batches import forward
from compiled import artifact
from stepping import engine_of
from torch import Tensor

import llmc
from llmc import LLM, LlmcError, SamplingParams
from llmc.compiler.targets.ort.facts import PREFILL_TOKENS
from llmc.kernels.ops import attention
from llmc.runtimes.engines.cores import physical_cores


def close(got: np.ndarray, want: np.ndarray) -> None:
    """The same but for the order of sums."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("last_only", [False, True])
def test_long_calls_go_in_pieces(last_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llmc.load(artifact("gemma3_text"), threads=1, slots=3)
    tokens = np.random.default_rng(0).integers(3, 72, (3, 40))
    whole = forward(engine, tokens, np.zeros(3, np.int64))
    monkeypatch.setattr(engine.device, "longest_run", 8)
    starts, slots = np.array([3, 0, 5]), np.array([2, 0, 1])
    for sequence in (0, 2):
        forward(
            engine, tokens[sequence : sequence + 1, : starts[sequence]], np.array([0]), slots[sequence : sequence + 1]
        )
    given = np.stack([tokens[i, start : start + 19] for i, start in enumerate(starts)])
    wanted = np.stack([whole[i, start : start + 19] for i, start in enumerate(starts)])
    before = engine.runs
    logits = forward(engine, given, starts, slots, last_only)
    assert engine.runs - before == 3 * 3
    close(logits, wanted[:, -1:] if last_only else wanted)


# Of one artifact ------------------------------------------------------------------------------------------------------


def test_many_tokens_take_their_own_graph(tmp_path: Path) -> None:
    tokens, many = np.random.default_rng(1).integers(0, 60, (1, 128)), PREFILL_TOKENS
    folder = shutil.copytree(artifact("speaking", quantize="int4"), tmp_path / "out")
    whole = forward(llmc.load(folder, threads=1), tokens[:, :many], np.array([0]))
    (folder / "prefill.onnx").write_bytes(bytes((folder / "prefill.onnx").stat().st_size))
    engine = llmc.load(folder, threads=1, check_files=False)
    step = forward(engine, tokens[:, : many - 1], np.array([0]))
    # The same weights, but inputs on another grid: near, and not the same.
    error = np.sqrt(np.square(step - whole[:, : many - 1]).mean() / np.square(step).mean())
    assert 1e-4 < error < 0.1
    with pytest.raises(LlmcError) as caught:
        forward(engine, tokens[:, :many], np.array([0]))
    assert caught.value.code == "GRAPH_REFUSED" and "prefill.onnx" in caught.value.what


def test_the_last_token_of_a_graph_that_returns_all(tmp_path: Path) -> None:
    """If the LM head is not a linear, the graph cannot select logits."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, place, x), SCALE))

    engine = engine_of(cached(attend), tmp_path, ops="standard")
    tokens, start = np.arange(1, 8)[None], np.zeros(1, np.int64)
    every = forward(engine, tokens, start)
    last = forward(engine, tokens, start, last_only=True)
    assert last.shape == (1, 1, engine.spec.vocab_size) and every.shape[1] == 7
    close(last, every[:, -1:])


def test_threads() -> None:
    assert llmc.load(artifact("speaking"), threads=2).spec.threads == 2
    assert llmc.load(artifact("speaking")).spec.threads == physical_cores()


def test_an_output_ends_where_the_room_does() -> None:
    llm = LLM(artifact("speaking"))
    prompt = list(range(3, 60)) * 2
    (done,) = llm.generate(prompt, SamplingParams(max_tokens=99, ignore_eos=True))
    assert done.finish_reason == "max_seq_len"
    assert len(prompt) + len(done.token_ids) == llm.engine.spec.max_seq_len == 128


@pytest.mark.parametrize(("slack", "least"), [(0, 16), (3, 13)])
def test_a_full_ring_goes_back_by_its_slack_and_one_or_to_the_beginning(tmp_path: Path, slack: int, least: int) -> None:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        return join(attention(*qkv(m, place, x), SCALE, window=6))

    engine = engine_of(cached(attend, slack=slack), tmp_path, ops="standard")
    tokens = np.arange(1, 18)[None] % engine.spec.vocab_size
    forward(engine, tokens, np.array([0]))
    forward(engine, tokens[:, -1:], np.array([least]))
    said = f"Slot 0 has held 17 positions and can't go back to {least - 1}, only to {least} or later"
    with pytest.raises(llmc.LlmcError, match=said) as caught:
        forward(engine, tokens[:, :1], np.array([least - 1]))
    assert caught.value.code == "ROLLBACK_TOO_FAR"
    forward(engine, tokens[:, : 5 + slack], np.array([0]))
    forward(engine, tokens[:, :1], np.array([2]))  # it is not full yet: nothing was overwritten
