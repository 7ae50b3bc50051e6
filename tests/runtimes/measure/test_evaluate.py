"""Evaluation scores equal plain arithmetic on known logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from fake_engines import Rule, ToyEngine, hashed

from llmc import LlmcError
from llmc.runtimes.measure.evaluate import (
    EngineReference,
    Estimate,
    Evaluation,
    Scores,
    chunks,
    evaluate,
    log_softmax,
    mean_by_block,
    summarise,
)
from llmc.runtimes.measure.windows import Window, cut_windows

V = 32
TEXT = np.random.default_rng(1).integers(0, V, 45).tolist()


def noisy(size: int) -> Rule:
    """Logits close to `hashed`, plus a constant per history that must not matter."""

    def rule(history: Sequence[int]) -> np.ndarray:
        random = np.random.default_rng([7, *history])
        return hashed(size)(history) + random.normal(scale=0.5, size=size) + random.normal(scale=100)

    return rule


def log_probabilities(rule: Rule, windows: list[Window]) -> np.ndarray:
    """Log probabilities [T, V] of all scored tokens, computed one history at a time."""
    logits = [rule(tuple(w.tokens[:i].tolist())) for w in windows for i in range(w.first, len(w.tokens))]
    wide = np.array(logits, np.float32).astype(np.longdouble)
    return np.array(
        wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1)[:, None]
    )


@pytest.mark.parametrize("size", [V, 1 << 15])  # with the large vocabulary, a window takes two chunks
def test_each_measure_follows_its_definition(size: int) -> None:
    windows = cut_windows(TEXT, 64, 16, 8)
    own, theirs = (log_probabilities(rule, windows) for rule in (noisy(size), hashed(size)))
    targets = np.array(TEXT[1:])
    tokens = np.arange(44)
    found = evaluate(ToyEngine(noisy(size), size), windows, EngineReference(ToyEngine(hashed(size), size), windows))
    assert (found.tokens, found.windows) == (44, 5)

    nll, reference_nll = -own[tokens, targets], -theirs[tokens, targets]
    assert found.perplexity.value == pytest.approx(float(np.exp(nll.mean())), rel=1e-6)
    assert found.ratio and found.ratio.value == pytest.approx(float(np.exp((nll - reference_nll).mean())), rel=1e-6)
    kld = (np.exp(theirs) * (theirs - own)).sum(1)
    assert np.allclose(found.scores.kld, kld.astype(float), rtol=1e-5, atol=1e-9)
    assert found.kld and found.kld.mean == pytest.approx(float(kld.mean()), rel=1e-6)
    assert (found.kld.median, found.kld.max) == pytest.approx((float(np.median(kld)), float(kld.max())), rel=1e-6)
    assert found.kld.p90 == pytest.approx(float(np.percentile(kld, 90)), rel=1e-6)
    assert found.kld.p99 == pytest.approx(float(np.percentile(kld, 99)), rel=1e-6)

    order, best = np.argsort(-own, 1), theirs.argmax(1)
    top1 = np.mean(order[:, 0] == best)
    top5 = np.mean([b in five for b, five in zip(best, order[:, :5], strict=True)])
    assert 0 < top1 < top5 < 1
    assert found.same_top1 and found.same_top1.value == pytest.approx(top1)
    assert found.same_top5 and found.same_top5.value == pytest.approx(top5)

    change, measured = (np.exp(-nll) - np.exp(-reference_nll)).astype(float), found.probability_change
    expected = change.mean(), np.sqrt(np.mean(change**2))
    assert measured and (measured.mean, measured.rms) == pytest.approx(expected, rel=1e-5)
    percentiles = [measured.p1, measured.p5, measured.p10, measured.p90, measured.p95, measured.p99]
    assert percentiles == pytest.approx(np.percentile(change, [1, 5, 10, 90, 95, 99]).tolist(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(5, 1 << 20), (9, 1 << 16), (1000, 3), (0, 7)])
def test_chunks_cover_each_token_once_and_bound_the_memory(count: int, width: int) -> None:
    pieces = [range(count)[chunk] for chunk in chunks(count, width)]
    assert [token for piece in pieces for token in piece] == list(range(count))
    assert all(len(piece) == 1 or len(piece) * width * 8 <= 2 << 20 for piece in pieces)


def test_an_engine_has_no_divergence_from_itself() -> None:
    windows = cut_windows(TEXT, 64, 16, 8)
    engine, other = (ToyEngine(hashed(V), V) for _ in range(2))
    found = evaluate(engine, windows, EngineReference(other, windows))
    assert found.kld and (found.kld.mean, found.kld.max) == (0, 0)
    assert found.ratio == Estimate(1.0, 0.0)
    assert found.same_top1 == found.same_top5 == Estimate(1.0, 0.0)
    assert found.probability_change and found.probability_change.rms == 0


def test_without_a_reference_there_is_only_a_perplexity() -> None:
    windows = cut_windows(TEXT, 64, 16, 8)
    found = evaluate(ToyEngine(lambda history: np.zeros(V), V), windows)
    document = found.as_dict()
    assert document.pop("perplexity") == {"value": pytest.approx(V), "stderr": pytest.approx(0, abs=1e-12)}
    assert (document.pop("tokens"), document.pop("windows")) == (44, 5)
    assert set(document.values()) == {None} and len(document) == 5
    assert found.by_position() == []


def test_standard_error_of_correlated_tokens() -> None:
    """Compare it with the spread of the means of many texts."""
    random = np.random.default_rng(0)
    blocks = np.repeat(np.arange(40), [10, 30] * 20)
    means, errors = [], []
    for _ in range(2000):
        values = random.normal(size=40)[blocks] + 0.1 * random.normal(size=800)
        found = mean_by_block(values, blocks)
        assert found.stderr is not None
        means.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    independent = np.sqrt(1.01 / 800)
    assert np.mean(errors) > 4 * independent


def test_standard_error_of_blocks_of_one_value() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = mean_by_block(values, np.arange(50) + 3)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_by_block(values, np.zeros(50, int)).stderr is None


def test_standard_errors_of_perplexity_and_paired_ratio() -> None:
    random = np.random.default_rng(0)
    blocks = np.repeat(np.arange(20), 10)
    hard = 3 + random.normal(size=20)[blocks]
    nll = hard + 0.01 * random.normal(size=200)
    found = summarise(Scores(blocks, blocks, nll, hard, np.zeros(200), np.zeros(200, int)))
    error = mean_by_block(nll, blocks).stderr
    assert error and found.perplexity.stderr == pytest.approx(math.exp(nll.mean()) * error)
    assert found.ratio and found.ratio.stderr and found.ratio.stderr < 0.02 * error


def test_ranks() -> None:
    ones = np.ones(5)
    found = summarise(Scores(np.arange(5), np.arange(5), ones, ones, ones, np.array([0, 1, 4, 5, 6])))
    assert found.same_top1 and found.same_top5
    assert (found.same_top1.value, found.same_top5.value) == (0.2, 0.6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 1e4 + 1], [-1e4, -1e4 + 1]], np.float32)
    assert log_softmax(logits)[0] == pytest.approx([-math.log1p(math.e), 1 - math.log1p(math.e)])
    assert np.array_equal(*log_softmax(logits))


def test_by_position() -> None:
    position = np.array([1, 2, 30, 31, 31])
    kld = np.array([1.0, 3.0, 5.0, 6.0, 7.0])
    found = summarise(Scores(np.arange(5), position, kld, kld, kld, np.zeros(5, int))).by_position()
    assert found == [
        {"from": 0, "to": 2, "tokens": 1, "kld": 1.0},
        {"from": 2, "to": 4, "tokens": 1, "kld": 3.0},
        {"from": 30, "to": 32, "tokens": 3, "kld": 6.0},
    ]


def test_positions_count_the_tokens_before() -> None:
    found = evaluate(ToyEngine(hashed(V), V), cut_windows(TEXT[:13], 64, 8, 4, opening=[0, 1]))
    assert found.scores.position.tolist() == [2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6]
    assert found.scores.window.tolist() == [0] * 6 + [1] * 4 + [2] * 3


def test_tokens_of_reference_probability_zero_add_nothing() -> None:
    def without(*ids: int) -> Evaluation:
        def rule(history: tuple[int, ...]) -> np.ndarray:
            logits = hashed(V)(history)
            logits[list(ids)] = -np.inf
            return logits

        windows = [Window(np.array([3, 4, 5, 6, 7]), 1)]
        return evaluate(ToyEngine(rule, V), windows, EngineReference(ToyEngine(excluding, V), windows))

    def excluding(history: tuple[int, ...]) -> np.ndarray:
        logits = hashed(V)(history)
        logits[30:] = -np.inf
        return logits

    assert np.abs(without(30, 31).scores.kld).max() == 0
    assert (without().scores.kld > 0).all()  # type: ignore[operator]
    with pytest.raises(LlmcError, match=r"LOGITS_NOT_FINITE.*window 0"):
        without(29, 30, 31)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    def rule(history: tuple[int, ...]) -> np.ndarray:
        return np.where(np.arange(V) == 9, value if len(history) > 20 else 0.0, 0.0)

    with pytest.raises(LlmcError, match=r"LOGITS_NOT_FINITE.*window 2"):
        evaluate(ToyEngine(rule, V), [Window(np.array(TEXT[:n]), 1) for n in (15, 20, 25)])


def test_another_vocabulary_is_refused_before_any_work() -> None:
    windows, engine = cut_windows(TEXT, 64, 16, 8), ToyEngine(hashed(V), V)
    with pytest.raises(LlmcError, match=r"REFERENCE_MISMATCH.*vocabulary of 33 tokens, the artifact of 32"):
        evaluate(engine, windows, EngineReference(ToyEngine(hashed(33), 33), windows))
    assert not engine.calls


def test_progress_is_reported() -> None:
    progress: list[tuple[str, int, int]] = []
    evaluate(ToyEngine(hashed(V), V), cut_windows(TEXT, 64, 30, 15), watch=lambda *step: progress.append(step))
    assert progress == [("evaluate", 0, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]
