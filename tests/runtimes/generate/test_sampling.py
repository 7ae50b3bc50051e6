"""Sampling agrees with transformers and follows the reported distribution."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from llmc.errors import LlmcError
from llmc.runtimes.generate.sampling import Sampler, SamplingParams, process

VOCAB = 1000
PROMPT, OUTPUT = [5, 9, 5, 7], [9, 9, 3, 5, 9]


def logits(seed: int = 0, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=size).astype(np.float32)


def theirs(*processors: Any, history: Sequence[int] = (*PROMPT, *OUTPUT), seed: int = 0) -> np.ndarray:
    """Scores of `logits` after transformers' processors."""
    ids, scores = torch.tensor([list(history)]), torch.tensor(logits(seed))[None]
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].double().numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def ours(params: SamplingParams, seed: int = 0) -> np.ndarray:
    return Sampler(params).probabilities(logits(seed), PROMPT, OUTPUT)


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "hint"),
    [
        ("max_tokens", 0, "1 or more"),
        ("max_tokens", 2.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("temperature", -0.1, "0 or more"),
        ("temperature", float("nan"), "a number"),
        ("temperature", "warm", "a number"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_k", -2, "0 for all tokens"),
        ("min_p", 1.5, "0 to 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -2.1, "-2 to 2"),
        ("no_repeat_ngram_size", -1, "0 or more"),
        ("min_tokens", 129, "0 to max_tokens"),
        ("seed", -1, "0 or more"),
        ("logprobs", -1, "0 or more"),
        ("stop", ["a", ""], "non-empty strings"),
        ("stop_token_ids", [-1], "token ids"),
        ("logit_bias", {1: float("inf")}, "finite"),
        ("logit_bias", {"1": 1.0}, "token ids"),
    ],
)
def test_invalid_value_is_refused_with_name_and_range(name: str, bad: object, hint: str) -> None:
    with pytest.raises(LlmcError) as caught:
        SamplingParams(**{name: bad})
    assert caught.value.code == "SAMPLING_INVALID"
    assert caught.value.what.startswith(f"{name} is ")
    assert caught.value.hint.startswith("Give ") and hint in caught.value.hint


@pytest.mark.parametrize(
    "good", [{"temperature": 1}, {"top_k": -1}, {"top_p": np.float32(0.5)}, {"seed": 0}, {"logprobs": 0}]
)
def test_valid_values_are_accepted(good: dict[str, Any]) -> None:
    SamplingParams(**good)


def test_collections_accept_none_and_a_single_string() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()
    assert SamplingParams(stop="end").stop == ("end",)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_params_are_immutable_and_copy_collections() -> None:
    stops, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stops, logit_bias=bias)
    stops.append("b")
    bias[3] = 1.0
    assert params.stop == ("a",) and params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3


@pytest.mark.parametrize("params", [SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[3, 10])])
def test_tokens_outside_the_vocabulary_are_refused(params: SamplingParams) -> None:
    params.check_vocab(11)
    with pytest.raises(LlmcError, match=r"outside the model's vocabulary: \[10\].*from 0 to 9"):
        params.check_vocab(10)


# Penalties ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty(penalty: float) -> None:
    found = process(logits(), SamplingParams(repetition_penalty=penalty), PROMPT, OUTPUT)
    np.testing.assert_array_equal(found, theirs(hf.RepetitionPenaltyLogitsProcessor(penalty)))


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10])
@pytest.mark.parametrize("history", [[1, 2, 3, 1, 2, 4, 1, 2], [7, 7, 7], [1, 2, 3, 4], [6]])
def test_no_repeat_ngram(size: int, history: list[int]) -> None:
    found = process(logits(), SamplingParams(no_repeat_ngram_size=size), history[:2], history[2:])
    np.testing.assert_array_equal(found, theirs(hf.NoRepeatNGramLogitsProcessor(size), history=history))


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    given = logits()
    found = process(given, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), PROMPT, OUTPUT) - given
    want = np.zeros(VOCAB)
    want[[9, 3, 5]] = [-0.5 - 3 * 0.25, -0.5 - 0.25, -0.5 - 0.25]
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_biases_come_before_bans_and_penalties() -> None:
    given = np.full(10, 1.0, dtype=np.float32)
    params = SamplingParams(logit_bias={9: 3.0, 2: 5.0}, repetition_penalty=2.0, presence_penalty=1.0)
    found = process(given, params, PROMPT, OUTPUT, banned=[2])
    assert found.tolist() == [1, 1, -np.inf, -0.5, 1, -0.5, 1, 0.5, 1, 1.0]
    assert given.tolist() == [1.0] * 10


def test_end_tokens_are_banned_before_min_tokens() -> None:
    given = logits()
    best = int(given.argmax())
    sampler = Sampler(SamplingParams(min_tokens=2), {best, VOCAB + 5})
    assert [sampler.sample(given, [1], [1] * count)[0] == best for count in (0, 1, 2)] == [False, False, True]


# Distributions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
        ({"top_k": 40}, [hf.TopKLogitsWarper(40)]),
        ({"top_k": VOCAB + 7}, [hf.TopKLogitsWarper(VOCAB + 7)]),
        ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
        ({"top_p": 0.9}, [hf.TopPLogitsWarper(0.9)]),
        ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
        ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.5, "top_k": 300, "top_p": 0.8},
            [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(300), hf.TopPLogitsWarper(0.8)],
        ),
        (
            {"temperature": 3.0, "top_p": 0.999},
            [hf.TemperatureLogitsWarper(3.0), hf.TopPLogitsWarper(0.999)],
        ),
        (
            {"repetition_penalty": 1.2, "top_p": 0.9},
            [hf.RepetitionPenaltyLogitsProcessor(1.2), hf.TopPLogitsWarper(0.9)],
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_match_transformers(params: dict[str, Any], processors: list[Any], seed: int) -> None:
    found = ours(SamplingParams(**{"temperature": 1.0, **params}), seed)
    want = softmax(theirs(*processors, seed=seed))
    assert ((found > 0) == (want > 0)).all()
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_top_p_keeps_ties_and_at_least_one() -> None:
    given = np.log(np.array([0.3, 0.1, 0.3, 0.3]))
    for top_p, kept in ((0.01, [0, 2, 3]), (0.6, [0, 2, 3]), (0.95, [0, 1, 2, 3])):
        found = Sampler(SamplingParams(temperature=1.0, top_p=top_p)).probabilities(given)
        assert np.flatnonzero(found).tolist() == kept


def test_top_p_just_below_one_keeps_all_despite_rounding() -> None:
    for seed in range(20):
        found = Sampler(SamplingParams(temperature=3.0, top_p=1 - 2**-53)).probabilities(logits(seed))
        assert np.count_nonzero(found) == VOCAB


def test_top_p_of_equal_weights_keeps_all() -> None:
    found = Sampler(SamplingParams(temperature=1.0, top_p=0.25)).probabilities(np.zeros(9))
    assert np.count_nonzero(found) == 9


def test_min_p_comes_before_top_p() -> None:
    given = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    found = Sampler(SamplingParams(temperature=1.0, min_p=0.6, top_p=0.5)).probabilities(given)
    # min_p leaves 0.4 and 0.3. The first has 0.57 of their mass, enough for top_p; of the whole mass it has only 0.4.
    assert found.tolist() == [1, 0, 0, 0]


def test_top_k_keeps_ties_with_the_last() -> None:
    found = Sampler(SamplingParams(temperature=1.0, top_k=2)).probabilities(np.array([1.0, 2.0, 1.0, 0.0]))
    assert (found > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("size", [256 * 40, 256 * 40 + 100])
@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_k": 35}, {"top_k": 60}, {"top_p": 0.9}, {"min_p": 0.02}])
def test_filters_of_a_large_vocabulary(params: dict[str, Any], size: int) -> None:
    """Most tokens are ruled out without being sorted. Equal logits at the border, and the largest in the last place."""
    scores = np.round(logits(size=size), 1)
    scores[-1], scores[5] = 15, -np.inf
    got = Sampler(SamplingParams(temperature=1, **params)).probabilities(scores)
    all_of = softmax(scores.astype(np.float64))
    descending = np.sort(all_of)[::-1]
    if "top_k" in params:
        border = descending[params["top_k"] - 1]
    elif "top_p" in params:
        border = descending[np.searchsorted(descending.cumsum(), params["top_p"])]
    else:
        border = params["min_p"] * descending[0]
    kept = np.where(all_of >= border, all_of, 0)
    np.testing.assert_allclose(got, kept / kept.sum(), rtol=1e-6)
    assert got[-1] > 0


def test_a_tiny_temperature_is_greedy() -> None:
    found = ours(SamplingParams(temperature=1e-300))
    assert found.tolist() == ours(SamplingParams()).tolist()
    assert found[logits().argmax()] == found.sum() == 1


# Draws ----------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_ties_after_penalties() -> None:
    given = np.array([0.0, 3.0, 2.0, 2.0], dtype=np.float32)
    assert Sampler(SamplingParams()).sample(given) == (1, None)
    assert Sampler(SamplingParams(repetition_penalty=3.0)).sample(given, [1])[0] == 2
    assert Sampler(SamplingParams(repetition_penalty=3.0, top_k=1, seed=0)).sample(given, [1])[0] == 2


def test_greedy_without_penalties_only_calls_argmax() -> None:
    class Counted(np.ndarray):
        calls: list[str] = []

        def argmax(self, *args: Any, **kwargs: Any) -> Any:
            self.calls.append("argmax")
            return self.view(np.ndarray).argmax(*args, **kwargs)

        def __array_ufunc__(self, ufunc: np.ufunc, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(ufunc.__name__)
            return NotImplemented

        def __array_function__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(function.__name__)
            return NotImplemented

    Sampler(SamplingParams(top_k=5, top_p=0.5)).sample(logits().view(Counted), PROMPT, OUTPUT)
    assert Counted.calls == ["argmax"]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.8, top_k=6, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
        SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=0.5, seed=4),
    ],
)
def test_draws_follow_the_probabilities(params: SamplingParams) -> None:
    given, count = logits(size=12) / 2, 20_000
    sampler = Sampler(params)
    want = sampler.probabilities(given, PROMPT, OUTPUT)
    drawn = np.bincount([sampler.sample(given, PROMPT, OUTPUT)[0] for _ in range(count)], minlength=12)
    assert not drawn[want == 0].any()
    expected = want[want > 0] * count
    statistic = ((drawn[want > 0] - expected) ** 2 / expected).sum()
    # The 99.9th percentile of chi-square with 11 degrees of freedom; the seeds are fixed.
    assert statistic < 31.3


def test_draws_from_a_large_vocabulary_follow_the_probabilities() -> None:
    """Also in its last, short part; all other tokens count as one."""
    likely, count = np.array([3, 255, 256, 600, 769]), 20_000
    given = np.full(770, -9, np.float32)
    given[likely] = [1.0, 0.5, 0.0, 0.3, 1.2]
    sampler = Sampler(SamplingParams(temperature=0.7, seed=5))
    drawn = np.bincount([sampler.sample(given)[0] for _ in range(count)], minlength=770)
    expected = sampler.probabilities(given)[likely] * count
    assert ((drawn[likely] - expected) ** 2 / expected).sum() < 18.5  # 99.9th percentile with 4 degrees of freedom
    assert drawn.sum() - drawn[likely].sum() < 30


def test_a_seed_makes_draws_reproducible() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.sample(logits())[0] for _ in range(20)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1.0, 3)])  # rounding can turn numbers just below 1 into 1
def test_a_draw_never_returns_a_token_of_probability_zero(number: float, token: int) -> None:
    fixed = types.SimpleNamespace(random=lambda: number)
    sampler = Sampler(SamplingParams(temperature=1.0), random=fixed)  # type: ignore[arg-type]
    assert sampler.choose(np.arange(5), np.array([0.0, 0.25, 0.0, 0.75, 0.0])) == token


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)])
@pytest.mark.parametrize("broken", [[0.0, np.nan, 1.0], [-np.inf] * 3])
def test_broken_logits_are_refused(params: SamplingParams, broken: list[float]) -> None:
    for method in (Sampler(params).sample, Sampler(params).probabilities):
        with pytest.raises(LlmcError, match="LOGITS_INVALID"):
            method(np.array(broken, dtype=np.float32))


# Log probabilities ----------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    given = logits()
    want = np.log(softmax(given.astype(np.float64)))
    order = np.argsort(-want)
    token, found = Sampler(SamplingParams(logprobs=3, logit_bias={8: 90.0}, temperature=0.3, seed=0)).sample(given)
    assert token == found.token == 8
    assert found.logprob == pytest.approx(want[8], abs=1e-9)
    assert [t for t, _ in found.top] == order[:3].tolist()
    np.testing.assert_allclose([p for _, p in found.top], want[order[:3]], atol=1e-9)


def test_top_logprobs_are_ordered_by_id_on_ties_and_may_be_none() -> None:
    given = np.array([0.0, 1.0, 1.0, 0.5])
    by_count = {count: Sampler(SamplingParams(logprobs=count)).sample(given)[1] for count in (0, 3, 9)}
    assert by_count[0].top == ()
    assert [t for t, _ in by_count[3].top] == [1, 2, 3]
    assert [t for t, _ in by_count[9].top] == [1, 2, 3, 0]
