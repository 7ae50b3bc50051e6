"""Answers to lm-eval's requests by an engine with known logits, without lm-eval."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import BOS, EOS, ToyEngine, byte_tokenizer, hashed, scripted

from llmc import LLM, LlmcError
from llmc.runtimes.generate.tokenizer import Tokenizer
from llmc.runtimes.measure.lm_eval import Scorer, harness

V, ROOM = 258, 24
RULE = hashed(V)


@dataclass(frozen=True)
class Instance:
    args: tuple[Any, ...]


def requests(*args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(one) for one in args]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.fixture
def scorer(tokenizer: Tokenizer) -> Scorer:
    return Scorer(LLM(ToyEngine(RULE, V, ROOM), tokenizer))


def log_probability(history: Sequence[int], token: int, rule: Any = RULE) -> float:
    logits = rule(tuple(history)).astype(np.float32).astype(np.float64)
    return float(logits[token] - np.log(np.exp(logits).sum()))


def expected(context: Sequence[int], continuation: Sequence[int]) -> float:
    whole = [*context, *continuation]
    cuts = range(len(context), len(whole))
    return sum(log_probability(whole[:i], whole[i]) for i in cuts)


def test_log_probability_of_a_continuation(scorer: Scorer) -> None:
    found = scorer.loglikelihood(requests(("ab", " cd"), ("ab ", "cd"), ("", "cd"), ("ab", "")))
    wanted = [
        expected([BOS, *b"ab"], b" cd"),
        expected([BOS, *b"ab"], b" cd"),  # the space is scored with the continuation
        expected([BOS], b"cd"),
        0,
    ]
    assert [value for value, _ in found] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [V, 1 << 18])  # with the large vocabulary, each token is a chunk of its own
def test_greedy_continuations_are_recognized(tokenizer: Tokenizer, size: int) -> None:
    rule = scripted(size, ([BOS, *b"ab"], list(b"cde")))
    scorer = Scorer(LLM(ToyEngine(rule, size, ROOM), tokenizer))
    found = scorer.loglikelihood(requests(("ab", "cde"), ("ab", "c"), ("ab", "cdx"), ("ab", "xde"), ("ab", "cxe")))
    assert [greedy for _, greedy in found] == [True, True, False, False, False]


def test_a_long_context_is_cut_from_the_left(scorer: Scorer) -> None:
    ((found, _),) = scorer.loglikelihood(requests(("x" * 30 + "ab", "cd")))
    kept = [*b"x" * 30, *b"ab"][-(ROOM - 1) :]
    assert found == pytest.approx(expected(kept, b"cd"), rel=1e-6)
    ((found, _),) = scorer.loglikelihood(requests(("ab", "c" * ROOM)))
    assert found == pytest.approx(expected([ord("b")], b"c" * ROOM), rel=1e-6)
    with pytest.raises(LlmcError, match=r"SEQUENCE_TOO_LONG.*25 tokens"):
        scorer.loglikelihood(requests(("ab", "c" * (ROOM + 1))))


def test_a_context_with_an_opening_gets_no_second_one(scorer: Scorer) -> None:
    ((found, _),) = scorer.loglikelihood(requests(("<begin>ab", "c")))
    assert found == pytest.approx(expected([BOS, *b"ab"], b"c"), rel=1e-6)


def test_without_bos_the_first_token_is_predicted_by_eos(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens=True: encode(text, False))
    scorer = Scorer(LLM(ToyEngine(RULE, V, ROOM), tokenizer))
    found = scorer.loglikelihood(requests(("", "cd"), ("ab", "cd")))
    assert [value for value, _ in found] == pytest.approx([expected([EOS], b"cd"), expected(b"ab", b"cd")], rel=1e-6)


def test_bos_predicts_the_first_token_even_if_encode_leaves_it_out(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tokenizer.folder / "tokenizer_config.json").write_text('{"bos_token": "<begin>"}')
    tokenizer = Tokenizer(tokenizer.folder)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special_tokens=True: encode(text, False))
    scorer = Scorer(LLM(ToyEngine(RULE, V, ROOM), tokenizer))
    (found,) = scorer.loglikelihood_rolling(requests(("cd",)))
    assert found == pytest.approx(expected([BOS], b"cd"), rel=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, ROOM, ROOM + 1, 2 * ROOM, 2 * ROOM + 7])
def test_a_rolling_text_is_scored_once_with_as_much_context_as_fits(scorer: Scorer, length: int) -> None:
    text = [i % 90 + 33 for i in range(length)]
    total, whole = 0.0, [BOS, *text]
    for index in range(1, len(whole)):
        piece = (index - 1) // ROOM
        end = min(1 + (piece + 1) * ROOM, len(whole))
        total += log_probability(whole[max(0, end - ROOM - 1) : index], whole[index])
    (found,) = scorer.loglikelihood_rolling(requests((bytes(text).decode(),)))
    assert found == pytest.approx(total, rel=1e-6)


def test_generation(tokenizer: Tokenizer) -> None:
    engine = ToyEngine(scripted(V, ([BOS, *b"ab"], [*b"one. two", EOS])), V, 64)
    scorer = Scorer(LLM(engine, tokenizer))
    found = scorer.generate_until(
        requests(
            ("ab", {"until": ["."]}),
            ("ab", {"until": " t", "do_sample": False, "temperature": 3.0}),
            ("ab", {"until": ["", "\n"], "max_gen_toks": 3}),
            ("ab", {}),
        )
    )
    assert found == ["one", "one.", "one", "one. two"]
    assert scorer.generate_until([]) == []
    with pytest.raises(LlmcError, match=r"SAMPLING_INVALID.*num_beams"):
        scorer.generate_until(requests(("ab", {"num_beams": 4})))


def test_a_long_context_leaves_room_for_the_output(tokenizer: Tokenizer) -> None:
    prompts: list[int] = []

    def rule(history: Sequence[int]) -> np.ndarray:
        prompts.append(len(history))
        return np.eye(V)[ord("y")]

    scorer = Scorer(LLM(ToyEngine(rule, V, ROOM), tokenizer))
    found = scorer.generate_until(
        requests(("x" * 40, {"max_gen_toks": 10}), ("x", {"max_gen_toks": 99}), ("x" * 40, {}))
    )
    assert found == ["y" * 10, "y" * (ROOM - 2), "y" * (ROOM // 2)]
    assert (min(prompts), max(prompts)) == (1, ROOM - 1)


def test_sampling_options_are_passed_on(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(ToyEngine(RULE, V, ROOM), tokenizer)
    received: list[Any] = []
    monkeypatch.setattr(llm, "generate", lambda prompts, params: received.extend(params) or [])
    Scorer(llm).generate_until(requests(("a", {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_tokens": 5})))
    assert (received[0].temperature, received[0].top_p, received[0].max_tokens) == (0.7, 0.9, 5)


def test_chat_template_and_tokenizer_name(scorer: Scorer, tokenizer: Tokenizer) -> None:
    assert scorer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<begin>user:hi\n"
    assert scorer.tokenizer_name == str(tokenizer.folder)


def test_an_engine_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(LlmcError, match="TOKENIZER_MISSING"):
        Scorer(LLM(ToyEngine(RULE, V, ROOM)))


def test_the_harness_is_an_lm_eval_model(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(ToyEngine(RULE, V, ROOM), tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(LlmcError, match=r"EXTRA_MISSING.*llmc\[eval\]"):
        harness(llm)

    class LM:
        def __init__(self) -> None:
            self.ready = True

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

    module = types.ModuleType("lm_eval.api.model")
    module.LM = LM  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    made = harness(llm)
    assert isinstance(made, LM) and made.ready
    assert made.loglikelihood(requests(("ab", "c")))[0][0] == pytest.approx(expected([BOS, *b"ab"], b"c"), rel=1e-6)
