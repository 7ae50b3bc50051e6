"""The comparison of many requests at once in examples/compare, with fake engines."""

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
from llmc.runtimes.measure.workload import seeded_workload

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


class _Clocked:
    """A server that takes a second for each token, and generates `surplus` tokens too many."""

    version, weights = "1", ()

    def __init__(self, surplus: int = 0, concurrency: int = 1) -> None:
        self.now, self.surplus, self.concurrency = 50.0, surplus, concurrency

    def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
        for index, request in enumerate(requests):
            for token in range(request.new_tokens + self.surplus):
                self.now += 1
                on_token(index, token)
        self.now += 1000  # what follows the last token is not measured


def test_times_count_from_the_beginning_for_all_requests(monkeypatch):
    import serving_protocol
    from serving_protocol import Request, Served, timed

    server = _Clocked()
    monkeypatch.setattr(serving_protocol, "time", SimpleNamespace(perf_counter=lambda: server.now))
    tokens, served = timed(server, [Request([1], 2), Request([1], 3), Request([1], 1)])
    assert tokens == [[0, 1], [0, 1, 2], [0]]
    assert served == Served(tokens=6, seconds=6.0, ttft_ms=3000.0)  # first tokens after 1, 3 and 6 seconds


@pytest.mark.parametrize("surplus", [-1, 1])
def test_another_number_of_tokens_is_refused(surplus):
    from serving_protocol import Request, timed

    with pytest.raises(RuntimeError, match=f"{2 + surplus} tokens instead of 2 for request 0"):
        timed(_Clocked(surplus), [Request([1], 2), Request([1], 2)])


@pytest.mark.parametrize(("concurrency", "accepted"), [(2, True), (1, False)])
def test_more_requests_at_once_are_refused(concurrency, accepted):
    from serving_protocol import Request, timed

    class Pairs(_Clocked):
        def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
            for index in (0, 1, 0, 1, 2, 2):
                on_token(index, 7)

    requests, server = [Request([1], 2)] * 3, Pairs(concurrency=concurrency)
    if accepted:
        assert timed(server, requests)[0] == [[7, 7]] * 3
    else:
        with pytest.raises(RuntimeError, match="2 requests at once instead of 1"):
            timed(server, requests)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_result_has_the_measured_requests_and_the_checks(monkeypatch, tmp_path, capsys, lost):
    import serving_protocol
    from serving_protocol import Server

    loaded = []

    class Toy(Server):
        version, weights = "7", ()

        def __init__(self, *arguments: Any) -> None:
            loaded.append(arguments)
            self.concurrency = arguments[2]

        def serve(self, requests: Sequence[Any], on_token: Callable[[int, int], None]) -> None:
            for index, request in enumerate(requests):
                for token in _after(request.prompt, request.new_tokens):
                    on_token(index, token)

        def measure(self, requests: Sequence[Any]) -> Any:
            served = super().measure(requests)
            return serving_protocol.Served(served.tokens - lost, 2.0, 5.0)

    parts = {"warm_up": [([1, 2], 3)], "measured": [([3], 4), ([4, 5, 6], 6)], "checks": [[7], [7, 8, 9, 10, 11]]}
    (tmp_path / "requests.json").write_text(json.dumps(parts))
    arguments = [str(tmp_path), f"--requests={tmp_path / 'requests.json'}", "--concurrency=2", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["peer", *arguments])
    if lost:
        with pytest.raises(RuntimeError, match="9 tokens instead of 10"):
            serving_protocol.run("toy", Toy)
        return
    serving_protocol.run("toy", Toy)
    assert loaded == [(tmp_path, 1, 2, 9)]
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"], result["version"], result["requests"], result["concurrency"]) == ("toy", "7", 2, 2)
    assert (result["tokens"], result["seconds"], result["ttft_ms"], result["tokens_per_s"]) == (10, 2.0, 5.0, [5.0])
    assert result["following"] == [_next([7]), _next([7, 8, 9, 10, 11])]


def test_requests_are_those_of_the_seeded_workload(tmp_path):
    from serving import write_requests

    (tmp_path / "workload.json").write_text(json.dumps({"check": {"prompt": [1, 2], "expected": [3, 4]}}))
    written = json.loads(write_requests(tmp_path, 1000, 64).read_text())
    expected = [[arrival.prompt.tolist(), arrival.new_tokens] for arrival in seeded_workload(64, 1000)]
    assert written["measured"] == expected
    assert written["checks"] == [[1, 2], [1, 2, 3]]
    measured = {tuple(prompt[:4]) for prompt, _ in written["measured"]}
    assert written["warm_up"] and not measured & {tuple(prompt[:4]) for prompt, _ in written["warm_up"]}


def test_every_variant_has_a_peer_and_files_for_batches():
    from prepare import RECIPES, VARIANTS

    for variant in VARIANTS:
        assert (COMPARE / f"serving_peer_{variant.engine}.py").exists()
        assert variant.for_batches.engine in RECIPES and variant.for_batches.bits == variant.bits
        assert variant.for_batches.for_batches == variant.for_batches


def test_files_for_batches_have_the_logits_of_all_positions(monkeypatch):
    import prepare

    commands = []
    monkeypatch.setattr(prepare, "run_python", lambda python, *arguments: commands.append(list(map(str, arguments))))
    variant = next(variant for variant in prepare.VARIANTS if variant.name == "genai-int8")
    for one in (variant, variant.for_batches):
        prepare.RECIPES["genai"](Path("python"), one.format, Path("hf"), Path("out"))
    assert [command[command.index("-p") + 1] for command in commands] == ["int8", "int8"]
    assert [command[-1] for command in commands] == ["prune_lm_head=true", "prune_lm_head=false"]


def test_files_for_batches_serve_only_batches(tmp_path):
    from prepare import Variant
    from serving import jobs_of
    from turns import Model

    variants = [Variant("llmc", "int8", 8), Variant("genai", "int8", 8, batch_format="other")]
    names = [*variants, variants[1].for_batches]
    model = Model("demo", tmp_path, {one: tmp_path / one.name for one in names}, 9, [1])
    args = SimpleNamespace(concurrency=[1, 8], threads=2, cache=tmp_path)
    python = {"llmc": Path("ours"), "genai": Path("theirs")}
    jobs = jobs_of(model, variants, tmp_path / "requests.json", args, lambda engine, cache: python[engine])
    assert list(jobs.values()) == [1, 1, 8, 8]
    assert [job.variant for job in jobs] == variants * 2
    assert [Path(job.command[2]).name for job in jobs] == ["llmc-int8", "genai-int8", "llmc-int8", "genai-other"]
    assert {job.command[0].name + job.command[1].name for job in jobs} == {
        "oursserving_peer_llmc.py", "theirsserving_peer_genai.py",
    }  # fmt: skip


def _round(engine: str, speed: float, seconds: float = 1.0, ttft_ms: float = 2.0) -> dict[str, Any]:
    return {"engine": engine, "version": "1", "tokens_per_s": [speed], "seconds": seconds, "ttft_ms": ttft_ms}


def test_ratios_are_relative_to_the_best_peer_at_the_same_concurrency():
    from report import Row, serving_table

    rounds = [_round("llmc", 90, 3.0, 10), _round("llmc", 120, 2.0, 30), _round("llmc", 150, 1.0, 20)]
    measured = [
        (8, Row(8, "int8", rounds)),
        (1, Row(8, "int8", [_round("llmc", 50)])),
        (8, Row(8, "Q8_0", [_round("llama.cpp", 100)])),
        (8, Row(8, "int8", [_round("genai", 60)])),
        (8, Row(4, "int4", [_round("genai", 1000)])),
        (1, Row(8, "Q8_0", [_round("llama.cpp", 200)])),
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in serving_table(measured).splitlines()[2:]]
    assert lines == [
        ["8", "genai", "int4", "1000 (1000 to 1000)", "1.00", "1.0", "2"],
        ["1", "llmc", "int8", "50 (50 to 50)", "0.25", "1.0", "2"],
        ["1", "llama.cpp", "Q8_0", "200 (200 to 200)", "1.00", "1.0", "2"],
        ["8", "llmc", "int8", "120 (90 to 150)", "1.20", "2.0", "20"],
        ["8", "llama.cpp", "Q8_0", "100 (100 to 100)", "1.00", "1.0", "2"],
        ["8", "genai", "int8", "60 (60 to 60)", "0.60", "1.0", "2"],
    ]


def test_jobs_take_turns_and_a_failure_ends_the_run(tmp_path, monkeypatch):
    import turns
    from prepare import Variant

    jobs = [turns.Job("demo", Variant("llmc", name, 8), name, (name,)) for name in ("a", "b")]
    args = SimpleNamespace(cache=tmp_path, rounds=2, noisy=True)
    ran, checked = [], []

    def run_peer(command: tuple[str, ...]) -> dict[str, int]:
        if len(ran) == 4:
            raise RuntimeError("no")
        ran.append(command[0])
        return {"number": len(ran)}

    monkeypatch.setattr(turns, "run_peer", run_peer)
    results = turns.run_in_turns(jobs, args, lambda job, result: checked.append((job.name, result["number"])))
    assert ran == ["a", "b", "a", "b"] and checked == [("a", 1), ("b", 2), ("a", 3), ("b", 4)]
    assert results == {jobs[0]: [{"number": 1}, {"number": 3}], jobs[1]: [{"number": 2}, {"number": 4}]}
    lines = [json.loads(line) for path in (tmp_path / "results").iterdir() for line in path.read_text().splitlines()]
    assert [(line["model"], line["round"], line["number"]) for line in lines] == [
        ("demo", 0, 1), ("demo", 0, 2), ("demo", 1, 3), ("demo", 1, 4),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="a failed: no"):
        turns.run_in_turns(jobs, args, lambda job, result: None)
