"""The loop continues each prompt as if it were alone, in few forward calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import EOS, ToyEngine, byte_tokenizer, hashed, scripted

from llmc.errors import LlmcError
from llmc.runtimes.generate.loop import NextToken, generate
from llmc.runtimes.generate.sampling import SamplingParams

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [13]]


def outputs(steps: Sequence[NextToken]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for step in steps:
        found.setdefault(step.prompt_index, []).append(step.token)
    return found


def reasons(steps: Sequence[NextToken]) -> dict[int, str]:
    return {step.prompt_index: step.finish_reason for step in steps if step.finish_reason}


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation of one prompt, computed without the loop."""
    history, rule = list(prompt), hashed()
    for _ in range(count):
        history.append(int(rule(history).argmax()))
    return history[len(prompt) :]


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_batched_prompts_equal_single_prompts(batch_size: int, chunk_size: int) -> None:
    each = [SamplingParams(max_tokens=count) for count in (3, 9, 1, 5, 7)]
    found = list(generate(ToyEngine(hashed()), PROMPTS, each, batch_size=batch_size, chunk_size=chunk_size))
    assert outputs(found) == {
        index: greedy(prompt, one.max_tokens) for index, (prompt, one) in enumerate(zip(PROMPTS, each, strict=True))
    }
    assert reasons(found) == dict.fromkeys(range(5), "length")


def test_seeded_sampling_is_independent_of_the_batch() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=3)
    together = outputs(list(generate(ToyEngine(hashed()), PROMPTS, params, batch_size=2)))
    for index, prompt in enumerate(PROMPTS):
        assert outputs(list(generate(ToyEngine(hashed()), [prompt], params)))[0] == together[index]


def test_penalties_see_prompt_and_output() -> None:
    flat = ToyEngine(lambda history: np.arange(8, 0, -1.0), vocab_size=8)
    steps = list(generate(flat, [[0, 1]], SamplingParams(max_tokens=4, no_repeat_ngram_size=1)))
    assert outputs(steps) == {0: [2, 3, 4, 5]}


def test_steps_have_text_and_logprobs(tmp_path: Path) -> None:
    engine = ToyEngine(scripted(258, (b"a", [*"é!".encode(), EOS])), vocab_size=258)
    steps = list(generate(engine, [list(b"a")], SamplingParams(logprobs=1), [EOS], byte_tokenizer(tmp_path)))
    assert [step.text for step in steps] == ["", "é", "!", ""]
    assert [step.finish_reason for step in steps] == [None, None, None, "stop"]
    assert all(step.logprobs and step.logprobs.top[0] == (step.token, step.logprobs.logprob) for step in steps)


def test_a_character_can_begin_in_the_prompt(tmp_path: Path) -> None:
    start, rest = list("é".encode())
    engine = ToyEngine(scripted(258, ([start], [rest, EOS])), vocab_size=258)
    steps = list(generate(engine, [[start]], SamplingParams(), [EOS], byte_tokenizer(tmp_path)))
    assert [step.text for step in steps] == ["é", ""]


@pytest.mark.parametrize(
    ("params", "want"),
    [
        (SamplingParams(max_tokens=9), [7, 31]),
        (SamplingParams(max_tokens=3, ignore_eos=True), [7, 31, 8]),
        (SamplingParams(max_tokens=9, stop_token_ids=[7]), [7]),
        (SamplingParams(max_tokens=3, ignore_eos=True, stop_token_ids=[31]), [7, 31]),
    ],
)
def test_end_tokens(params: SamplingParams, want: list[int]) -> None:
    steps = list(generate(ToyEngine(scripted(32, ([1], [7, 31, 8, 9]))), [[1]], params, eos_ids=[31]))
    assert outputs(steps) == {0: want}
    assert reasons(steps) == {0: "length" if len(want) == 3 else "stop"}


def test_no_end_before_min_tokens() -> None:
    steps = list(generate(ToyEngine(hashed()), [[1]], SamplingParams(max_tokens=9, min_tokens=6), eos_ids=range(31)))
    assert len(steps) == 7 and outputs(steps)[0][:6] == [31] * 6


def test_a_full_cache_ends_a_sequence() -> None:
    engine = ToyEngine(hashed(), max_seq_len=8)
    steps = list(generate(engine, [[1] * 5, [1] * 7, [2]], SamplingParams(max_tokens=4)))
    assert {index: len(tokens) for index, tokens in outputs(steps).items()} == {0: 3, 1: 1, 2: 4}
    assert reasons(steps) == {0: "max_seq_len", 1: "max_seq_len", 2: "length"}


# Forward calls --------------------------------------------------------------------------------------------------------


def test_prefill_runs_one_prompt_in_chunks_and_decode_runs_the_batch() -> None:
    engine = ToyEngine(hashed())
    list(generate(engine, [[1, 2, 3, 4, 5], [6]], SamplingParams(max_tokens=3), chunk_size=2))
    assert engine.calls == [
        ((1, 2), [0], [0], True),
        ((1, 2), [2], [0], True),
        ((1, 1), [4], [0], True),
        ((1, 1), [0], [1], True),
        ((2, 1), [5, 1], [0, 1], True),
        ((2, 1), [6, 2], [0, 1], True),
    ]


def test_a_waiting_prompt_takes_the_slot_of_a_finished_sequence() -> None:
    engine = ToyEngine(hashed())
    each = [SamplingParams(max_tokens=count) for count in (2, 5, 3)]
    list(generate(engine, [[1], [2], [3, 3]], each, batch_size=2))
    assert [(shape, slots) for shape, _, slots, _ in engine.calls] == [
        ((1, 1), [0]),
        ((1, 1), [1]),
        ((2, 1), [0, 1]),
        ((1, 2), [0]),
        ((2, 1), [1, 0]),
        ((2, 1), [1, 0]),
        ((1, 1), [1]),
    ]


def test_slots_are_opened_when_their_number_changes() -> None:
    engine = ToyEngine(hashed())
    for prompts in (PROMPTS[:2], PROMPTS[2:4], PROMPTS[:1]):
        list(generate(engine, prompts, SamplingParams(max_tokens=2)))
    assert engine.opened == [2, 1]


def test_forward_runs_only_when_the_next_token_is_requested() -> None:
    engine = ToyEngine(hashed())
    steps = generate(engine, [[1]], SamplingParams(max_tokens=5))
    assert engine.calls == []
    next(steps)
    next(steps)
    steps.close()
    assert len(engine.calls) == 2


def test_logits_are_not_read_after_a_step_is_yielded() -> None:
    engine = ToyEngine(hashed())
    found = []
    for step in generate(engine, PROMPTS, SamplingParams(max_tokens=4, logprobs=2)):
        engine.logits.fill(np.nan)
        found.append(step)
    assert outputs(found) == {index: greedy(prompt, 4) for index, prompt in enumerate(PROMPTS)}


def test_no_prompts_give_no_steps() -> None:
    engine = ToyEngine(hashed())
    engine.open_slots(2)
    assert list(generate(engine, [], SamplingParams())) == []
    assert engine.slots == 2


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ([], "PROMPT_EMPTY", "Prompt 1 "),
        ([1, 32], "PROMPT_INVALID", "0 to 31"),
        ([-1], "PROMPT_INVALID", "0 to 31"),
        ([1.5], "PROMPT_INVALID", "0 to 31"),
        ("text", "PROMPT_INVALID", "0 to 31"),
        ([1] * 8, "PROMPT_TOO_LONG", "8 tokens; prompt and output together may have 8"),
        ([1] * 11, "PROMPT_TOO_LONG", "11 tokens; prompt and output together may have 8"),
    ],
)
def test_invalid_prompts_are_refused_at_once(prompt: Any, code: str, message: str) -> None:
    engine = ToyEngine(hashed(), max_seq_len=8)
    with pytest.raises(LlmcError, match=message) as caught:
        generate(engine, [[1], prompt], SamplingParams())
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("params", "code"),
    [
        (SamplingParams(logit_bias={32: 1.0}), "SAMPLING_INVALID"),
        ([SamplingParams()], "SAMPLING_INVALID"),
        (SamplingParams(stop="x"), "TOKENIZER_MISSING"),
    ],
)
def test_invalid_params_are_refused_at_once(params: Any, code: str) -> None:
    with pytest.raises(LlmcError) as caught:
        generate(ToyEngine(hashed()), [[1], [2]], params)
    assert caught.value.code == code
