"""What is measured, by plain arithmetic over known logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fake_engines import ToyEngine, hashed

from llmc import LlmcError
from llmc.runtimes.measure import evaluate as module
from llmc.runtimes.measure.evaluate import EngineReference, Scores, evaluate, log_softmax, mean_by_block, summarise
from llmc.runtimes.measure.windows import Window, cut_windows

V = 32
TEXT = np.random.default_rng(1).integers(0, V, 45).tolist()


def shifted(history: tuple[int, ...]) -> np.ndarray:
    """Close to `hashed`, up to a number that means nothing."""
    random = np.random.default_rng([7, *history])
    return hashed(V)(history) + random.normal(scale=0.5, size=V) + random.normal(scale=100)


def log_probabilities(rule: object, windows: list[Window]) -> np.ndarray:
    """[T, V], one history after the other, in the plainest way."""
    rows = [rule(tuple(w.tokens[:i].tolist())) for w in windows for i in range(w.first, len(w.tokens))]  # type: ignore[operator]
    wide = np.array(rows, np.float32).astype(np.longdouble)
    return np.array(
        wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1)[:, None]
    )


def run(windows: list[Window]) -> module.Evaluation:
    other = EngineReference(ToyEngine(hashed(V), V), windows)
    return evaluate(ToyEngine(shifted, V), windows, other)


@pytest.mark.parametrize("chunk", [1, 3 * V, 1 << 18])
def test_each_measure_is_what_its_definition_says(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    windows = cut_windows(TEXT, 64, 16, 8)
    own, theirs = (log_probabilities(rule, windows) for rule in (shifted, hashed(V)))
    targets = np.array(TEXT[1:])
    rows = np.arange(44)
    found = run(windows)
    assert (found.tokens, found.windows) == (44, 5)

    nll, reference_nll = -own[rows, targets], -theirs[rows, targets]
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

    change, said = (np.exp(-nll) - np.exp(-reference_nll)).astype(float), found.probability_change
    assert said and (said.mean, said.rms) == pytest.approx((change.mean(), np.sqrt(np.mean(change**2))), rel=1e-5)
    percentiles = [said.p1, said.p5, said.p10, said.p90, said.p95, said.p99]
    assert percentiles == pytest.approx(np.percentile(change, [1, 5, 10, 90, 95, 99]).tolist(), rel=1e-5, abs=1e-9)


def test_an_engine_is_no_distance_from_itself() -> None:
    windows = cut_windows(TEXT, 64, 16, 8)
    engine, other = (ToyEngine(hashed(V), V) for _ in range(2))
    found = evaluate(engine, windows, EngineReference(other, windows))
    assert found.kld and (found.kld.mean, found.kld.max) == (0, 0)
    assert found.ratio == module.Estimate(1.0, 0.0)
    assert found.same_top1 == found.same_top5 == module.Estimate(1.0, 0.0)
    assert found.probability_change and found.probability_change.rms == 0


def test_without_a_reference_there_is_a_perplexity_only() -> None:
    windows = cut_windows(TEXT, 64, 16, 8)
    found = evaluate(ToyEngine(lambda history: np.zeros(V), V), windows)
    document = found.as_dict()
    assert document.pop("perplexity") == {"value": pytest.approx(V), "stderr": pytest.approx(0, abs=1e-12)}
    assert (document.pop("tokens"), document.pop("windows")) == (44, 5)
    assert set(document.values()) == {None} and len(document) == 5
    assert found.by_position() == []


def test_the_error_is_that_of_a_mean_over_blocks() -> None:
    """Against what it estimates: the spread of means of many texts, whose tokens are alike within a window."""
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


def test_of_blocks_of_one_value_it_is_the_plain_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = mean_by_block(values, np.arange(50) + 3)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert mean_by_block(values, np.zeros(50, int)).stderr is None


def test_errors_go_through_the_exponential_and_a_ratio_is_paired() -> None:
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


def test_positions_count_what_stands_before() -> None:
    found = evaluate(ToyEngine(hashed(V), V), cut_windows(TEXT[:13], 64, 8, 4, opening=[0, 1]))
    assert found.scores.position.tolist() == [2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6]
    assert found.scores.window.tolist() == [0] * 6 + [1] * 4 + [2] * 3


def test_tokens_that_the_reference_excludes_add_nothing() -> None:
    def without(*ids: int) -> module.Evaluation:
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
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    def rule(history: tuple[int, ...]) -> np.ndarray:
        return np.where(np.arange(V) == 9, value if len(history) > 20 else 0.0, 0.0)

    with pytest.raises(LlmcError, match=r"LOGITS_NOT_FINITE.*window 2"):
        evaluate(ToyEngine(rule, V), [Window(np.array(TEXT[:n]), 1) for n in (15, 20, 25)])


def test_another_vocabulary_is_refused_before_any_work() -> None:
    windows, engine = cut_windows(TEXT, 64, 16, 8), ToyEngine(hashed(V), V)
    with pytest.raises(LlmcError, match=r"REFERENCE_MISMATCH.*predicts 33 tokens, the artifact 32"):
        evaluate(engine, windows, EngineReference(ToyEngine(hashed(33), 33), windows))
    assert not engine.calls


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(ToyEngine(hashed(V), V), cut_windows(TEXT, 64, 30, 15), watch=lambda *step: told.append(step))
    assert told == [("evaluate", 0, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]
