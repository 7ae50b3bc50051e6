"""LLM accepts all kinds of prompts and returns whole completions or streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import BOS, EOS, ToyEngine, byte_tokenizer, hashed, scripted

from llmc.errors import LlmcError
from llmc.runtimes.engines import load as engine_loading
from llmc.runtimes.generate.llm import LLM
from llmc.runtimes.generate.request import Token
from llmc.runtimes.generate.sampling import SamplingParams

HELLO = ([BOS, *b"Say hello: "], [*"héllo 🎉".encode(), EOS])
BYE = ([BOS, *b"And bye: "], [*b"bye", EOS])
ASKED = ([BOS, *b"user:hi\n"], [*b"yes?", EOS])
TALK = [{"role": "user", "content": "hi"}]


def llm(tmp_path: Path, **options: Any) -> LLM:
    engine = ToyEngine(scripted(258, HELLO, BYE, ASKED), vocab_size=258)
    return LLM(engine, byte_tokenizer(tmp_path), **options)


@pytest.mark.parametrize(
    ("prompts", "chat", "want"),
    [
        ("Say hello: ", False, ["héllo 🎉"]),
        (["Say hello: "], False, ["héllo 🎉"]),
        (["Say hello: ", "And bye: "], False, ["héllo 🎉", "bye"]),
        (list(BYE[0]), False, ["bye"]),
        (np.array(list(BYE[0])), False, ["bye"]),
        ([list(BYE[0]), list(HELLO[0])], False, ["bye", "héllo 🎉"]),
        ([np.array(list(BYE[0]))], False, ["bye"]),
        (["And bye: ", list(HELLO[0]), TALK], False, ["bye", "héllo 🎉", "yes?"]),
        ("hi", True, ["yes?"]),
        (["hi", "hi"], True, ["yes?", "yes?"]),
        (TALK, True, ["yes?"]),
        ([TALK, TALK], False, ["yes?", "yes?"]),
        ([], False, []),
    ],
)
def test_all_kinds_of_prompts(tmp_path: Path, prompts: Any, chat: bool, want: list[str]) -> None:
    assert [one.text for one in llm(tmp_path).generate(prompts, chat=chat)] == want


def test_completion_fields(tmp_path: Path) -> None:
    (found,) = llm(tmp_path).generate("And bye: ", SamplingParams(logprobs=0))
    assert (found.text, found.token_ids, found.finish_reason) == ("bye", [*b"bye", EOS], "stop")
    assert found.logprobs and [one.token for one in found.logprobs] == found.token_ids
    stats = found.stats
    assert (stats.prompt_tokens, stats.completion_tokens) == (10, 4)
    assert stats.ttft_s > 0 and stats.decode_s > 0
    assert stats.tokens_per_s == pytest.approx(3 / stats.decode_s)


def test_a_single_token_has_no_decode_speed(tmp_path: Path) -> None:
    (found,) = llm(tmp_path).generate("And bye: ", SamplingParams(max_tokens=1))
    assert (found.text, found.finish_reason, found.logprobs) == ("b", "length", None)
    assert (found.stats.decode_s, found.stats.tokens_per_s) == (0, 0)


def test_time_to_first_token_includes_waiting(tmp_path: Path) -> None:
    first, second = llm(tmp_path, batch_size=1).generate(["Say hello: ", "And bye: "])
    assert second.stats.ttft_s > first.stats.ttft_s + first.stats.decode_s


def test_params_for_each_prompt(tmp_path: Path) -> None:
    found = llm(tmp_path).generate(["And bye: "] * 2, [SamplingParams(max_tokens=1), SamplingParams(stop="e")])
    assert [one.text for one in found] == ["b", "by"]
    with pytest.raises(LlmcError, match="2 prompts and 0 sampling"):
        llm(tmp_path).generate(["And bye: "] * 2, [])


def test_batch_size_limits_the_slots(tmp_path: Path) -> None:
    model = llm(tmp_path, batch_size=2)
    assert [one.text for one in model.generate(["And bye: "] * 5)] == ["bye"] * 5
    assert model.engine.slots == 2


# Streams --------------------------------------------------------------------------------------------------------------


def pieces(stream: Iterator[Token]) -> list[str]:
    return [token.text for token in stream if token.text]


def test_a_stream_yields_the_text_in_pieces(tmp_path: Path) -> None:
    assert pieces(llm(tmp_path).stream("Say hello: ")) == ["h", "é", "l", "l", "o", " ", "🎉"]
    assert pieces(llm(tmp_path).stream(TALK)) == pieces(llm(tmp_path).stream("hi", chat=True)) == list("yes?")
    assert pieces(llm(tmp_path).stream("Say hello: ", SamplingParams(stop="llo"))) == ["h", "é"]


def test_a_stream_yields_what_a_completion_holds(tmp_path: Path) -> None:
    params = SamplingParams(logprobs=1)
    (whole,) = llm(tmp_path).generate("And bye: ", params)
    tokens = list(llm(tmp_path).stream("And bye: ", params))
    assert [token.token for token in tokens] == whole.token_ids
    assert [token.logprobs for token in tokens] == whole.logprobs
    assert [token.finish_reason for token in tokens] == [None, None, None, whole.finish_reason]


def test_a_stream_stops_with_its_reader(tmp_path: Path) -> None:
    model = llm(tmp_path)
    for token in model.stream("Say hello: "):
        assert token.text == "h"
        break
    assert len(model.engine.calls) == 1
    assert [one.text for one in model.generate("And bye: ")] == ["bye"]
    assert len(model.engine.calls) == 1 + 4


def test_streams_and_calls_take_turns(tmp_path: Path) -> None:
    model = llm(tmp_path)
    stream, other = model.stream("Say hello: "), model.stream("And bye: ")
    assert (next(stream).text, next(other).text) == ("h", "b")
    assert [one.text for one in model.generate("And bye: ")] == ["bye"]
    assert pieces(other) == ["y", "e"]
    assert "".join(pieces(stream)) == "éllo 🎉"


def test_tasks_share_batches(tmp_path: Path) -> None:
    model = llm(tmp_path)

    async def stream() -> str:
        return "".join([token.text async for token in model.stream_async("Say hello: ")])

    async def generate() -> str:
        (found,) = await model.generate_async(TALK)
        return found.text

    async def both() -> list[str]:
        return await asyncio.gather(stream(), generate())

    assert asyncio.run(both()) == ["héllo 🎉", "yes?"]
    assert len(model.engine.calls) <= len("héllo 🎉".encode()) + 2


def test_a_chat_keeps_its_cache(tmp_path: Path) -> None:
    engine = ToyEngine(hashed(258), vocab_size=258, max_seq_len=256)
    model, fresh = (LLM(one, byte_tokenizer(tmp_path)) for one in (engine, ToyEngine(hashed(258), 258, 256)))
    history = [{"role": "user", "content": "a long question, for a chat of two turns"}]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    model.generate([history], params)
    prompt = len(engine.calls[0].tokens)
    history.append({"role": "user", "content": "and more"})
    assert model.generate([history], params)[0].token_ids == fresh.generate([history], params)[0].token_ids
    assert len(engine.calls[4].tokens) == len(b"user:and more\n") < prompt
    # Whoever uses the engine directly says so.
    model.forget()
    calls = len(engine.calls)
    model.generate([history], params)
    assert len(engine.calls[calls].tokens) > prompt


def test_a_closed_model_is_refused(tmp_path: Path) -> None:
    with llm(tmp_path) as model:
        assert model.generate("And bye: ")[0].text == "bye"
    with pytest.raises(LlmcError, match="ENGINE_CLOSED"):
        model.generate("And bye: ")


def test_a_stream_checks_its_prompt_before_the_first_read(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="PROMPT_TOO_LONG"):
        llm(tmp_path).stream("x" * 64)


# Tokenizers and folders -----------------------------------------------------------------------------------------------


def test_token_ids_work_without_a_tokenizer() -> None:
    model = LLM(ToyEngine(hashed()))
    (found,) = model.generate([1, 2], SamplingParams(max_tokens=3))
    assert (found.text, len(found.token_ids)) == ("", 3)
    assert [token.token for token in model.stream([1, 2], SamplingParams(max_tokens=3))] == found.token_ids
    for call in (lambda: model.generate("a"), lambda: model.generate(TALK), lambda: model.stream("a")):
        with pytest.raises(LlmcError, match="TOKENIZER_MISSING"):
            call()


def test_token_ids_with_chat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="chat is set, but the prompt is token ids"):
        llm(tmp_path).generate([1, 2], chat=True)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: bool) -> None:
    calls: list[object] = []

    def load(path: Path, *, threads: int | None) -> ToyEngine:
        calls.append((path, threads))
        return ToyEngine(scripted(258, BYE), vocab_size=258)

    monkeypatch.setattr(engine_loading, "load", load)
    if tokenizer:
        byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    model = LLM(str(tmp_path), threads=3)
    assert calls == [(str(tmp_path), 3)]
    (found,) = model.generate(list(BYE[0]))
    assert (found.text, found.finish_reason) == ("bye" if tokenizer else "", "stop")


def test_generation_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, llmc.runtimes.generate.llm; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert {"llmc", "numpy", "tokenizers"} <= {*done.stdout.split()}
    assert not {"torch", "transformers", "onnx", "safetensors"} & {*done.stdout.split()}
