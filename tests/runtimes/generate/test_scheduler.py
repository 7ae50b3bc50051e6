"""The scheduler continues each request as if it were alone, whatever comes and goes beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from churn import Answer, check_churn, collect
from compiled import artifact
from fake_engines import EOS, ToyEngine, byte_tokenizer, hashed, scripted

import llmc
from llmc.errors import LlmcError
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.generate.request import Failed, Finished, Request
from llmc.runtimes.generate.sampling import SamplingParams
from llmc.runtimes.generate.scheduler import Scheduler

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [13]]


def finish(scheduler: Scheduler) -> dict[int, Answer]:
    """Step until nothing is left to do."""
    answers: dict[int, Answer] = {}
    while not scheduler.is_idle:
        collect(scheduler.step(), answers)
    return answers


def answer_all(
    engine: ToyEngine, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams], **options: Any
) -> list[Answer]:
    scheduler = Scheduler(engine, **options)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [scheduler.add(Request(prompt, one)) for prompt, one in zip(prompts, each, strict=True)]
    answers = finish(scheduler)
    assert scheduler.running == scheduler.waiting == 0
    return [answers[request] for request in ids]


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation of one prompt, computed without a scheduler."""
    history, rule = list(prompt), hashed()
    for _ in range(count):
        history.append(int(np.float32(rule(tuple(history))).argmax()))
    return history[len(prompt) :]


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("longest_piece", [1, 4, 512])
def test_requests_together_equal_requests_alone(batch_size: int, longest_piece: int) -> None:
    each = [SamplingParams(max_tokens=count) for count in (3, 9, 1, 5, 7)]
    found = answer_all(ToyEngine(hashed()), PROMPTS, each, batch_size=batch_size, longest_piece=longest_piece)
    for answer, prompt, one in zip(found, PROMPTS, each, strict=True):
        assert answer.ids == greedy(prompt, one.max_tokens)
        assert isinstance(answer.end, Finished) and answer.end.reason == answer.tokens[-1].finish_reason == "length"
        assert (answer.end.prompt_tokens, answer.end.completion_tokens) == (len(prompt), one.max_tokens)


def test_seeded_sampling_is_independent_of_the_batch() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=3)
    together = answer_all(ToyEngine(hashed()), PROMPTS, params, batch_size=2)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert answer_all(ToyEngine(hashed()), [prompt], params)[0].ids == answer.ids


def test_penalties_see_prompt_and_output() -> None:
    flat = ToyEngine(lambda history: np.arange(8, 0, -1.0), vocab_size=8)
    (answer,) = answer_all(flat, [[0, 1]], SamplingParams(max_tokens=4, no_repeat_ngram_size=1))
    assert answer.ids == [2, 3, 4, 5]


def test_tokens_have_text_and_logprobs(tmp_path: Path) -> None:
    engine = ToyEngine(scripted(258, (b"a", [*"é!".encode(), EOS])), vocab_size=258)
    decoder = byte_tokenizer(tmp_path)
    (answer,) = answer_all(engine, [list(b"a")], SamplingParams(logprobs=1), eos_ids=[EOS], decoder=decoder)
    assert [token.text for token in answer.tokens] == ["", "é", "!", ""]
    assert [token.finish_reason for token in answer.tokens] == [None, None, None, "stop"]
    for token in answer.tokens:
        assert token.logprobs and token.logprobs.top[0] == (token.token, token.logprobs.logprob)


def test_a_character_can_begin_in_the_prompt(tmp_path: Path) -> None:
    start, rest = list("é".encode())
    engine = ToyEngine(scripted(258, ([start], [rest, EOS])), vocab_size=258)
    (answer,) = answer_all(engine, [[start]], SamplingParams(), eos_ids=[EOS], decoder=byte_tokenizer(tmp_path))
    assert [token.text for token in answer.tokens] == ["é", ""]


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
    (answer,) = answer_all(ToyEngine(scripted(32, ([1], [7, 31, 8, 9]))), [[1]], params, eos_ids=[31])
    assert answer.ids == want
    assert answer.tokens[-1].finish_reason == ("length" if len(want) == 3 else "stop")


def test_no_end_before_min_tokens() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=6)
    (answer,) = answer_all(ToyEngine(hashed()), [[1]], params, eos_ids=range(31))
    assert len(answer.ids) == 7 and answer.ids[:6] == [31] * 6


def test_a_full_cache_ends_a_sequence() -> None:
    engine = ToyEngine(hashed(), max_seq_len=8)
    found = answer_all(engine, [[1] * 5, [1] * 7, [2]], SamplingParams(max_tokens=4))
    ends = [(len(answer.ids), answer.tokens[-1].finish_reason) for answer in found]
    assert ends == [(3, "max_seq_len"), (1, "max_seq_len"), (4, "length")]


# Engine calls ---------------------------------------------------------------------------------------------------------


def shapes(engine: ToyEngine) -> list[tuple[list[int], list[int], list[int]]]:
    return [(call.lengths.tolist(), call.starts.tolist(), call.slots.tolist()) for call in engine.calls]


def test_a_call_has_a_token_of_each_running_request_and_pieces_of_prompts() -> None:
    engine = ToyEngine(hashed())
    scheduler = Scheduler(engine, batch_size=4)
    scheduler.add(Request([1, 2, 3], SamplingParams(max_tokens=4)))
    scheduler.add(Request([4], SamplingParams(max_tokens=4)))
    scheduler.step()
    scheduler.step()
    scheduler.add(Request([5, 6], SamplingParams(max_tokens=2)))
    finish(scheduler)
    assert shapes(engine) == [
        ([3, 1], [0, 0], [0, 1]),
        ([1, 1], [3, 1], [0, 1]),
        ([1, 1, 2], [4, 2, 0], [0, 1, 2]),
        ([1, 1, 1], [5, 3, 2], [0, 1, 2]),
    ]


def test_long_prompts_run_in_pieces_oldest_first() -> None:
    engine = ToyEngine(hashed(), max_seq_len=256)
    answer_all(engine, [[1] * 150, [2] * 60], SamplingParams(max_tokens=1), longest_piece=64)
    assert shapes(engine) == [
        ([64], [0], [0]),
        ([64], [64], [0]),
        ([22, 42], [128, 0], [0, 1]),
        ([18], [42], [1]),
    ]
    assert [len(call.wanted) for call in engine.calls] == [0, 0, 1, 1]


def test_running_requests_have_dense_slots() -> None:
    """One run of the graph serves only sequences in adjacent slots."""
    engine = ToyEngine(hashed())
    each = [SamplingParams(max_tokens=count) for count in (2, 9, 4, 7, 3)]
    answer_all(engine, PROMPTS, each, batch_size=3)
    for call in engine.calls:
        decoding = call.slots[call.starts > 0]
        assert decoding.tolist() == list(range(len(decoding)))
    assert engine.copies, "sequences move into the slots of finished ones"


def test_the_slots_of_running_requests() -> None:
    scheduler = Scheduler(ToyEngine(hashed()), batch_size=2)
    requests = [
        scheduler.add(Request([i + 1], SamplingParams(max_tokens=tokens))) for i, tokens in enumerate((2, 4, 1))
    ]
    found = [scheduler.slots]
    while not scheduler.is_idle:
        scheduler.step()
        found.append(scheduler.slots)
    first, second, _ = requests
    # The second request moves into the slot of the first one when that ends.
    assert found == [{}, {first: 0, second: 1}, {second: 0}, {second: 0}, {}]


def test_slots_are_opened_as_they_are_needed() -> None:
    engine = ToyEngine(hashed())
    scheduler = Scheduler(engine, batch_size=4)
    for count in (2, 1, 3, 9):
        for prompt in [*PROMPTS, *PROMPTS][:count]:
            scheduler.add(Request(prompt, SamplingParams(max_tokens=2)))
        finish(scheduler)
    assert engine.opened == [1, 2, 3, 4]


def test_nothing_to_do_runs_nothing() -> None:
    engine = ToyEngine(hashed())
    assert Scheduler(engine).step() == [] and not engine.calls


def test_a_long_prompt_does_not_stall_others() -> None:
    """A step with a piece of a prompt takes at most twice as long as one without."""
    now = 0.0

    class Timed(ToyEngine):
        def forward(self, batch: Batch) -> HostLogits:
            nonlocal now
            now += 0.008 + 0.0005 * len(batch.tokens)
            return super().forward(batch)

    engine = Timed(lambda history: np.arange(32.0), max_seq_len=2000)
    scheduler = Scheduler(engine, clock=lambda: now)
    scheduler.add(Request([1], SamplingParams(max_tokens=600)))
    for _ in range(5):
        scheduler.step()
    began, times = now, []
    long = scheduler.add(Request([2] * 1500, SamplingParams(max_tokens=1)))
    while True:
        before = now
        events = scheduler.step()
        times.append(now - before)
        if any(event.request == long for event in events):
            break
    assert np.percentile(times[1:], 99) <= 2 * 0.0085
    assert len(times) < 170, "pieces are as long as that allows"
    assert now - began < 2.5


# Coming and going -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollback", [None, 1, 4])
@pytest.mark.parametrize(("seed", "batch_size"), [(0, 6), (1, 3), (2, 1)])
def test_churn(seed: int, batch_size: int, rollback: int | None) -> None:
    engine = ToyEngine(hashed(), max_seq_len=96, rollback=rollback)
    reused = check_churn(engine, greedy, seed, batch_size, vocab_size=32)
    assert batch_size == 1 or rollback or reused > 40


@pytest.mark.parametrize(
    ("model", "options"), [("speaking", {}), ("gemma3_text", {"spec_tokens": 2}), ("gemma3_text", {"ops": "standard"})]
)
def test_churn_of_an_artifact(model: str, options: dict[str, Any]) -> None:
    """In float32, with static caches, and with rings that go back by three positions or by one."""
    folder = artifact(model, **options)
    single = Scheduler(llmc.load(folder, threads=1), batch_size=1)

    def alone(prompt: Sequence[int], count: int) -> list[int]:
        request = single.add(Request(prompt, SamplingParams(max_tokens=count)))
        return finish(single)[request].ids

    reused = check_churn(llmc.load(folder, threads=1), alone, seed=4, batch_size=5, vocab_size=72)
    assert reused > 40 or model == "gemma3_text"


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    scheduler = Scheduler(ToyEngine(hashed()), batch_size=2)
    for _ in range(12):
        scheduler.add(Request([1, 2], SamplingParams(max_tokens=3)))
    first: list[int] = []
    while not scheduler.is_idle:
        first += [event.request for event in scheduler.step() if event.request not in first]
    assert first == sorted(first) == list(range(12))


def test_a_cancelled_request_has_no_more_events_and_frees_its_slot() -> None:
    scheduler = Scheduler(ToyEngine(hashed()), batch_size=2)
    ids = [scheduler.add(Request([number], SamplingParams(max_tokens=5))) for number in range(3)]
    scheduler.step()
    scheduler.cancel(ids[0])
    scheduler.cancel(99)
    assert (scheduler.running, scheduler.waiting) == (1, 1)
    answers = finish(scheduler)
    assert sorted(answers) == ids[1:]
    assert [answers[request].ids for request in ids[1:]] == [greedy([1], 5)[1:], greedy([2], 5)]


# A shared beginning ---------------------------------------------------------------------------------------------------


def turns(engine: ToyEngine, key: str | None, change: Callable[[list[int]], list[int]] = list) -> list[Finished]:
    """Run two turns of a chat, the second of which begins with the first."""
    scheduler, ends = Scheduler(engine, batch_size=3), []
    prompt = np.random.default_rng(1).integers(0, 32, 40).tolist()
    for _ in range(2):
        request = scheduler.add(Request(prompt, SamplingParams(max_tokens=5), key))
        answer = finish(scheduler)[request]
        assert answer.ids == greedy(prompt, 5) and isinstance(answer.end, Finished)
        ends.append(answer.end)
        prompt = change([*prompt, *answer.ids, 7, 8, 9])
    return ends


def test_a_second_turn_computes_only_what_is_new() -> None:
    engine = ToyEngine(hashed(), max_seq_len=96)
    first, second = turns(engine, "chat")
    assert (first.reused_tokens, second.reused_tokens) == (0, 44)
    assert [len(call.tokens) for call in engine.calls] == [40, 1, 1, 1, 1, 4, 1, 1, 1, 1]


def test_only_requests_with_the_same_key_share() -> None:
    assert [end.reused_tokens for end in turns(ToyEngine(hashed(), max_seq_len=96), None)] == [0, 0]


def test_a_changed_history_shares_its_unchanged_beginning() -> None:
    def change(prompt: list[int]) -> list[int]:
        return [*prompt[:30], (prompt[30] + 1) % 32, *prompt[31:]]

    assert turns(ToyEngine(hashed(), max_seq_len=96), "chat", change)[1].reused_tokens == 30
    # An engine that can't go back that far computes all of it.
    assert turns(ToyEngine(hashed(), max_seq_len=96, rollback=1), "chat", change)[1].reused_tokens == 0


def test_a_slot_that_went_back_is_reused_as_far_as_it_can_go_back() -> None:
    """A ring overwrites old positions as a slot fills. The most tokens that it has held count, not the last ones."""

    class Counting(ToyEngine):
        refusals = 0

        def forward(self, batch: Batch) -> HostLogits:
            try:
                return super().forward(batch)
            except LlmcError:
                self.refusals += 1
                raise

    engine = Counting(hashed(), max_seq_len=96, rollback=4)
    scheduler = Scheduler(engine, batch_size=1)
    ids = np.random.default_rng(1).integers(0, 32, 41).tolist()
    reused = []
    for prompt in (ids, ids[:38], [*ids[:36], 1], [*ids[:37], 2]):
        request = scheduler.add(Request(prompt, SamplingParams(max_tokens=1), "chat"))
        answer = finish(scheduler)[request]
        assert answer.ids == greedy(prompt, 1) and isinstance(answer.end, Finished)
        reused.append(answer.end.reused_tokens)
    # It held 41 tokens first, so positions before 37 are out of reach until another request begins at 0 (the third).
    assert (reused, engine.refusals) == ([0, 37, 0, 36], 0)


def test_two_chats_keep_their_caches() -> None:
    engine = ToyEngine(hashed(), max_seq_len=200)
    scheduler = Scheduler(engine, batch_size=3)
    prompts = {0: [1] * 40, 1: [2] * 40}
    for turn in range(3):
        for chat in prompts:
            request = scheduler.add(Request(prompts[chat], SamplingParams(max_tokens=4), "chat"))
            if not turn:  # both run at once at first
                continue
            answer = finish(scheduler)[request]
            assert isinstance(answer.end, Finished) and answer.end.reused_tokens > 38
            prompts[chat] = [*prompts[chat], *answer.ids, 5]
        finish(scheduler)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ([], "PROMPT_EMPTY", "no tokens"),
        ([1, 32], "PROMPT_INVALID", "0 to 31"),
        ([-1], "PROMPT_INVALID", "0 to 31"),
        ([1.5], "PROMPT_INVALID", "0 to 31"),
        ("text", "PROMPT_INVALID", "0 to 31"),
        ([1] * 8, "PROMPT_TOO_LONG", "8 tokens; prompt and output together may have 8"),
        ([1] * 11, "PROMPT_TOO_LONG", "11 tokens; prompt and output together may have 8"),
    ],
)
def test_invalid_prompts_are_refused(prompt: Any, code: str, message: str) -> None:
    scheduler = Scheduler(ToyEngine(hashed(), max_seq_len=8))
    with pytest.raises(LlmcError, match=message) as caught:
        scheduler.add(Request(prompt))
    assert caught.value.code == code and scheduler.is_idle


@pytest.mark.parametrize(
    ("params", "code"),
    [
        (SamplingParams(logit_bias={32: 1.0}), "SAMPLING_INVALID"),
        (SamplingParams(stop="x"), "TOKENIZER_MISSING"),
    ],
)
def test_invalid_params_are_refused(params: SamplingParams, code: str) -> None:
    with pytest.raises(LlmcError) as caught:
        Scheduler(ToyEngine(hashed())).add(Request([1], params))
    assert caught.value.code == code


class Broken(ToyEngine):
    """An engine that can't run sequences that hold the token 13."""

    def forward(self, batch: Batch) -> HostLogits:
        if 13 in batch.tokens:
            raise LlmcError("GRAPH_FAILED", "The graph failed.", "")
        return super().forward(batch)


def test_an_error_ends_the_request_that_causes_it_and_no_other() -> None:
    found = answer_all(Broken(hashed()), PROMPTS, SamplingParams(max_tokens=3))
    assert isinstance(found[4].end, Failed) and found[4].end.error.code == "GRAPH_FAILED"
    clean = [(answer.ids, greedy(prompt, 3)) for answer, prompt in zip(found[:4], PROMPTS, strict=False)]
    for ids, want in clean:
        assert ids == (want if 13 not in want[:-1] else want[: want.index(13) + 1])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0)])
def test_logits_without_a_largest_fail_their_request_only(params: SamplingParams) -> None:
    def rule(history: Sequence[int]) -> np.ndarray:
        return np.full(32, np.nan) if history[0] == 2 and len(history) > 2 else np.arange(32.0)

    good, bad = answer_all(ToyEngine(rule), [[1], [2]], SamplingParams(max_tokens=4, temperature=params.temperature))
    assert isinstance(good.end, Finished) and len(good.ids) == 4
    assert isinstance(bad.end, Failed) and bad.end.error.code == "LOGITS_INVALID" and len(bad.ids) == 2
