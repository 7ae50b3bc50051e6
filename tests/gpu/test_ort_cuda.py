"""Artifacts for ONNX Runtime's CUDA provider on a real GPU: the contract of engines, the gate, and torch's logits.

Needs NVIDIA's driver and onnxruntime-gpu. Skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import engine_contract
import numpy as np
import onnxruntime
import pytest
import torch
from compiled import artifact, speaking_model
from engine_contract import CLAUSES, LENGTH, Clause, Subject, broken_runs
from transformers import AutoModelForCausalLM

import llmc
from llmc.errors import LlmcError
from llmc.runtimes.cache_folder import cache_dir
from llmc.runtimes.cuda.driver import Driver
from llmc.runtimes.cuda.libcuda import open_driver
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.ort.device import CUDA_PROVIDER, Cuda
from llmc.runtimes.engines.ort.engine import OrtEngine
from llmc.runtimes.engines.ort.graph import GraphSession
from llmc.runtimes.engines.selfcheck import GateReference, check

# Prompts and single tokens have kernels of their own.
TOLERANCE = {"fp16": 2e-2, "bf16": 6e-2}
# Every op of the lowering in both dtypes: fused and composed attention, windows, experts, learned positions, and codes
# of each scheme.
MADE: list[tuple[str, dict[str, Any]]] = [
    *(("speaking", {"dtype": dtype}) for dtype in TOLERANCE),
    *(("speaking", {"dtype": dtype, "quantize": q}) for dtype in TOLERANCE for q in ("int8", "int4", "nf4")),
    *((m, {"dtype": d}) for d in TOLERANCE for m in ("qwen3", "gemma3_text", "phi3", "gpt2", "mixtral", "bloom")),
]


@pytest.fixture(scope="module", autouse=True)
def driver() -> Driver:
    try:
        found = open_driver()
        Cuda(found).close()
    except LlmcError as missing:
        pytest.skip(str(missing))
    return found


def loaded(model: str = "speaking", slots: int = 1, **options: Any) -> OrtEngine:
    engine = llmc.load(artifact(model, device="cuda", **options), slots=slots, check_device=False)
    assert isinstance(engine, OrtEngine)
    return engine


@pytest.fixture(scope="module", params=TOLERANCE)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    engine = loaded(dtype=request.param)
    tokens = np.random.default_rng(0).integers(3, 72, (4, LENGTH))
    yield Subject(engine, tokens, TOLERANCE[request.param], lambda error: broken_runs(GraphSession, error))
    engine.close()


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_contract(subject: Subject, clause: Clause) -> None:
    clause(subject)


@pytest.mark.parametrize(("model", "options"), MADE)
def test_the_gate(model: str, options: dict[str, Any]) -> None:
    engine = loaded(model, **options)
    report = check(engine, GateReference.read(engine.folder))
    assert report.passed, report.as_dict()
    engine.close()


def test_loading_checks_the_device_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    folder = artifact("speaking", device="cuda")
    llmc.load(folder).close()
    assert len(list((cache_dir() / "verified").iterdir())) == 1
    opened = llmc.load(folder)
    assert opened.runs == 0 and opened.spec.device == "cuda:0"
    opened.close()


def test_matmuls_and_attention_run_on_the_gpu(tmp_path: Path) -> None:
    """A node that the provider lacks would run on the CPU, with copies around it, and give the same numbers."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "trace")
    graph = artifact("speaking", device="cuda", quantize="int4") / "model.onnx"
    session = onnxruntime.InferenceSession(str(graph), options, providers=[CUDA_PROVIDER, "CPUExecutionProvider"])
    shapes = {i.name: [1 if isinstance(n, str) else n for n in i.shape] for i in session.get_inputs()}
    feeds = {
        i.name: np.ones(shapes[i.name], np.int64 if i.type == "tensor(int64)" else np.float16)
        for i in session.get_inputs()
    }
    session.run(["logits"], feeds)
    text = Path(session.end_profiling()).read_text()
    for op in ("GroupQueryAttention", "MatMulNBits", "SkipSimplifiedLayerNormalization", "GatherBlockQuantized"):
        nodes = [line for line in text.splitlines() if f'"op_name" : "{op}"' in line]
        assert nodes and all(CUDA_PROVIDER in line for line in nodes), op


def test_closing_returns_the_caches(driver: Driver) -> None:
    loaded(slots=4).close()  # what ONNX Runtime allocates once for the process
    before = driver.free_memory()
    opened = loaded(slots=512)
    assert driver.free_memory() < before
    opened.close()
    assert driver.free_memory() >= before - (16 << 20)


def test_beside_torch() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    model = AutoModelForCausalLM.from_pretrained(speaking_model(), dtype=torch.float16).to("cuda").eval()
    tokens = np.random.default_rng(1).integers(3, 72, 96)
    with torch.inference_mode():
        wanted = model(torch.tensor(tokens[None], device="cuda")).logits[0].float().cpu().numpy()
    engine = loaded()
    _close(engine.forward(Batch.one(tokens)).numpy(), wanted)
    engine.forward(Batch.one(tokens[:64]))
    for at in range(64, len(tokens)):
        _close(engine.forward(Batch.step(tokens[at : at + 1], np.array([at]))).numpy(), wanted[at : at + 1])
    engine.close()


def test_closing() -> None:
    engine_contract.closing(Subject(loaded(), np.full((4, LENGTH), 5), 2e-2, lambda error: nullcontext()))


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()) <= TOLERANCE["fp16"]
