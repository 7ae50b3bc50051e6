"""The peers of the comparison of many requests at once, with fake libraries."""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engines import Rule, ToyEngine, hashed

import llmc

COMPARE = Path(llmc.__file__).resolve().parent / "examples" / "compare"
VOCAB = 32
RULE: Rule = hashed(VOCAB)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers are imported anew in each test, with the fake libraries of that test."""
    monkeypatch.syspath_prepend(str(COMPARE))
    yield
    for name in [name for name in sys.modules if name.startswith(("peer_", "serving_peer_"))]:
        del sys.modules[name]


def _next(history: Sequence[int]) -> int:
    return int(RULE(tuple(history)).argmax())


def _after(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that an engine without errors generates."""
    history = list(prompt)
    for _ in range(count):
        history.append(_next(history))
    return history[len(prompt) :]


class _FakeLlama:
    """The parts of llama_cpp that the peer uses. The next token depends on all tokens of a sequence."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []  # (sequence, token) of each llama_decode
        self.params = SimpleNamespace()
        self._cached: dict[int, list[int]] = {}
        self._logits: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: SimpleNamespace()  # functions that only prepare

    def llama_version(self) -> bytes:
        return b"1"

    def llama_context_default_params(self) -> SimpleNamespace:
        return self.params

    def llama_vocab_n_tokens(self, vocab: object) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embedding: int, sequences: int) -> SimpleNamespace:
        zeros = {name: [0] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**zeros, seq_id=[[0] for _ in range(size)], n_tokens=0)

    def llama_memory_clear(self, memory: object, data: bool) -> None:
        self._cached.clear()

    def llama_memory_seq_rm(self, memory: object, sequence: int, start: int, end: int) -> None:
        assert (start, end) == (-1, -1)
        del self._cached[sequence]

    def llama_decode(self, context: object, batch: SimpleNamespace) -> int:
        self.batches.append([])
        self._logits = []
        for i in range(batch.n_tokens):
            assert batch.n_seq_id[i] == 1
            sequence = batch.seq_id[i][0]
            cached = self._cached.setdefault(sequence, [])
            assert batch.pos[i] == len(cached)
            assert sequence < self.params.n_seq_max
            cached.append(batch.token[i])
            self.batches[-1].append((sequence, batch.token[i]))
            self._logits.append(RULE(tuple(cached)).astype(np.float32) if batch.logits[i] else None)
        return 0

    def llama_get_logits_ith(self, context: object, index: int) -> Any:
        return self._logits[index].ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class _FakeGenerator:
    """A generator of onnxruntime-genai whose prompts are padded on the right."""

    pad: int

    def __init__(self, model: object, params: SimpleNamespace) -> None:
        self._options = params.options
        self._rows: list[list[int]] = []

    def append_tokens(self, tokens: np.ndarray) -> None:
        for row in tokens.reshape(self._options["batch_size"], -1).tolist():
            while row[-1] == self.pad:
                row.pop()
            assert self.pad not in row
            self._rows.append(row)

    def generate_next_token(self) -> None:
        for row in self._rows:
            assert len(row) < self._options["max_length"] == self._options["min_length"]
            row.append(_next(row))

    def get_next_tokens(self) -> np.ndarray:
        return np.array([row[-1] for row in self._rows], np.int32)


def _fake_genai() -> SimpleNamespace:
    class Config:
        def __init__(self, folder: str) -> None:
            pass

        def overlay(self, text: str) -> None:
            _FakeGenerator.pad = json.loads(text)["model"]["pad_token_id"]

    def params(model: object) -> SimpleNamespace:
        made = SimpleNamespace(options={})
        made.set_search_options = made.options.update
        return made

    return SimpleNamespace(Config=Config, Model=lambda config: None, GeneratorParams=params, Generator=_FakeGenerator)


class _FakePipeline:
    """OpenVINO's pipeline: each step generates a token for every request that is not complete."""

    def __init__(self, folder: str, scheduler: SimpleNamespace, device: str, properties: dict[str, int]) -> None:
        self._handles: list[SimpleNamespace] = []

    def add_request(self, index: int, ids: np.ndarray, config: SimpleNamespace) -> SimpleNamespace:
        assert config.ignore_eos and not config.do_sample and ids.shape[0] == 1
        handle = SimpleNamespace(history=ids[0].tolist(), unread=[], remaining=config.max_new_tokens)

        def read() -> dict[int, SimpleNamespace]:
            tokens, handle.unread = handle.unread, []
            return {0: SimpleNamespace(generated_ids=tokens)}

        handle.read, handle.can_read = read, lambda: bool(handle.unread)
        handle.get_status = lambda: "running" if handle.remaining else "finished"
        self._handles.append(handle)
        return handle

    def step(self) -> None:
        for handle in [one for one in self._handles if one.remaining]:
            handle.history.append(_next(handle.history))
            handle.unread.append(handle.history[-1])
            handle.remaining -= 1


def _fake_openvino() -> SimpleNamespace:
    return SimpleNamespace(
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        ContinuousBatchingPipeline=_FakePipeline,
    )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Load a peer with a fake library."""

    def load(engine: str, concurrency: int, longest: int = 64) -> Any:
        fakes = {
            "llama_cpp": _FakeLlama(),
            "onnxruntime_genai": _fake_genai(),
            "openvino_genai": _fake_openvino(),
            "openvino_genai.py_openvino_genai": SimpleNamespace(GenerationStatus=SimpleNamespace(RUNNING="running")),
            "openvino": SimpleNamespace(Tensor=lambda value: value),
        }
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake)
        module = importlib.import_module(f"serving_peer_{engine}")
        for name in (f"peer_{engine}", f"serving_peer_{engine}"):
            if hasattr(sys.modules.get(name), "version"):
                monkeypatch.setattr(sys.modules[name], "version", lambda package: "1")
        if engine == "llmc":
            monkeypatch.setattr(sys.modules["peer_llmc"], "load", lambda folder, threads: ToyEngine(RULE, VOCAB, 96))
        classes = {"llmc": "LlmcServer", "llama": "LlamaServer", "genai": "GenaiServer", "openvino": "OpenVinoServer"}
        return getattr(module, classes[engine])(Path("model"), 1, concurrency, longest)

    return load


def _requests(count: int) -> list[Any]:
    from serving_protocol import Request

    random = np.random.default_rng(0)
    return [
        Request([int(token) for token in random.integers(4, VOCAB, random.integers(1, 12))], int(random.integers(1, 9)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("concurrency", [1, 3, 16])
@pytest.mark.parametrize("engine", ["llmc", "llama", "genai", "openvino"])
def test_every_peer_continues_each_prompt_by_the_requested_tokens(serve, engine, concurrency):
    from serving_protocol import timed

    requests = _requests(10)
    server = serve(engine, concurrency)
    expected = [_after(request.prompt, request.new_tokens) for request in requests]
    for _ in range(2):  # the second time, caches are not empty
        tokens, served = timed(server, requests)
        assert tokens == expected
        assert served.tokens == sum(request.new_tokens for request in requests)
    assert server.measure(requests).tokens == served.tokens


def test_llama_slots_take_the_next_request_beside_generating_ones(serve):
    from serving_protocol import Request, timed

    server = serve("llama", 2)
    library = sys.modules["llama_cpp"]
    timed(server, [Request([5, 6, 7], 3), Request([8], 1), Request([9, 10], 1)])
    first, second = _after([5, 6, 7], 2)
    assert library.batches == [
        [(1, 8), (0, 5), (0, 6), (0, 7)],
        [(0, first), (1, 9), (1, 10)],
        [(0, second)],
    ]
    assert (library.params.n_seq_max, library.params.n_ctx, library.params.kv_unified) == (2, 128, True)


def test_llama_prompts_are_cut_where_a_batch_is_full(serve):
    from serving_protocol import Request, timed

    server = serve("llama", 2)
    server.batch_size = 4
    requests = [Request([5, 6], 4), Request([7, 8, 9, 10, 11, 12, 13], 2)]
    assert timed(server, requests)[0] == [_after(request.prompt, request.new_tokens) for request in requests]
    assert [len(batch) for batch in sys.modules["llama_cpp"].batches] == [4, 4, 3, 2]


def test_a_prompt_with_the_padding_token_is_refused(serve):
    from serving_protocol import Request

    with pytest.raises(RuntimeError, match="token 3"):
        serve("genai", 2).serve([Request([1, 2, 3], 1)], lambda index, token: None)
