"""Tests of building plans from graphs, with the library and without a GPU."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorrt_decoders import DECODE_BATCH, Decoder, write_decoder

from llmc.compiler.targets.tensorrt import build as building
from llmc.compiler.targets.tensorrt import worker
from llmc.compiler.targets.tensorrt.build import PLAN_FILE, RECORD_FILE, build
from llmc.compiler.targets.tensorrt.check_record import check_record
from llmc.compiler.targets.tensorrt.forecast import forecast_build, summarize_weights
from llmc.compiler.targets.tensorrt.worker import BuildRequest, build_here
from llmc.errors import LlmcError
from llmc.runtimes.engines.tensorrt.library import TensorRt, find_library
from llmc.runtimes.engines.tensorrt.record import BuildRecord, read_record

pytest.importorskip("tensorrt_rtx")

SMS = ["8.9"]
# Wide enough for each precision to have kernels of its own; TensorRT merges 16-bit and 8-bit multiplications itself.
MERGED = {"merge_qkv": True, "merge_gate_up": True}
PRECISIONS = {
    "bf16": Decoder(dtype="bf16"),
    "int8": Decoder(layers=1, scheme="int8", wide="int8", **MERGED),
    "int4": Decoder(layers=1, scheme="int4", wide="int8", **MERGED),
    "fp8": Decoder(layers=1, scheme="fp8", wide="int8"),
    "w8a8": Decoder(layers=1, scheme="w8a8", wide="int8"),
}
Build = Callable[..., BuildRecord]


@pytest.fixture
def record_of(tmp_path: Path) -> Build:
    """Build a decoder in this process, without the checks before a build, and return the record."""

    def record(decoder: Decoder, batch: int = DECODE_BATCH) -> BuildRecord:
        graph = write_decoder(decoder, tmp_path)
        profiles = decoder.section(batch=batch).profiles
        stored = summarize_weights(graph).data_bytes
        request = BuildRequest("tensorrt_rtx", str(graph), profiles, SMS, str(tmp_path / "plan"), stored)
        return build_here(request, lambda phase, done, total: None)

    return record


def checks(record: BuildRecord, decoder: Decoder) -> set[str]:
    return {problem.check for problem in check_record(record, 2 * decoder.layers)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_keeps_weights_and_caches_as_they_are(record_of: Build, precision: str) -> None:
    decoder = PRECISIONS[precision]
    record = record_of(decoder)
    assert check_record(record, 2 * decoder.layers) == []
    assert record.fallbacks == []
    assert record.weight_ratio < 1.3
    for name, profile in record.profiles.items():
        assert [one.node for one in profile.attentions if one.kernel] == attention_nodes(decoder), name
        assert sorted(profile.caches.in_place) == sorted(cache_outputs(decoder)), name
        assert not profile.caches.copied
        asked = {"bf16": "bf16", "w8a8": "int8"}.get(precision, precision)
        head = "bf16" if precision == "bf16" else "int8"
        assert {gemm.weight for gemm in profile.gemms[:-1]} == {asked}
        assert profile.gemms[-1].weight == head
        assert profile.activation_bytes > 0
        quantized = precision in ("fp8", "w8a8")
        assert {gemm.input for gemm in profile.gemms[:-1]} == {asked if quantized else decoder.dtype}
    assert record.profiles["prefill"].caches.read_in_full and not record.profiles["decode"].caches.read_in_full


def attention_nodes(decoder: Decoder) -> list[str]:
    """Return the names of the attentions in the graph that was written last."""
    return [f"attention.{layer}" for layer in range(decoder.layers)]


def cache_outputs(decoder: Decoder) -> list[str]:
    return [f"present.{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")]


# Plants: graphs and networks that an engine can't serve as they are --------------------------------------------------


def test_weights_expanded_while_the_engine_is_built_fail_a_check(record_of: Build) -> None:
    decoder = Decoder(layers=1, scheme="int8 in groups")
    assert "weight dtype" in checks(record_of(decoder), decoder)


def test_weights_expanded_in_each_step_fail_a_check(record_of: Build) -> None:
    # Steps of a single sequence multiply a vector.
    decoder = Decoder(layers=1, hidden=256, ffn=512, scheme="int8", wide="int8", **MERGED)
    assert "weight expanded" in checks(record_of(decoder, batch=1), decoder)


def test_profiles_that_share_no_weights_fail_a_check(record_of: Build) -> None:
    decoder = Decoder(layers=1, hidden=256, ffn=512, **MERGED)
    assert checks(record_of(decoder), decoder) == {"weight ratio"}


def test_a_multiplication_of_the_cache_would_copy_it(record_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(layers=1, scale_queries=True)
    assert checks(record_of(decoder), decoder) == set()
    monkeypatch.setattr(worker, "polish", lambda network: None)
    assert "cache copied" in checks(record_of(decoder), decoder)


def test_attention_in_basic_ops_would_transpose_the_cache(record_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(layers=1, composed=True)
    assert checks(record_of(decoder), decoder) == set()
    monkeypatch.setattr(worker, "polish", lambda network: None)
    assert "cache read in full" in checks(record_of(decoder), decoder)


@pytest.mark.parametrize(
    ("decoder", "profiles"),
    [
        (Decoder(layers=1, head_dim=512), ["prefill", "decode"]),
        (Decoder(layers=1, heads=2, kv_heads=1), ["decode"]),
    ],
    ids=["heads of 512", "two heads"],
)
def test_attention_without_a_kernel_is_reported(
    record_of: Build, monkeypatch: pytest.MonkeyPatch, decoder: Decoder, profiles: list[str]
) -> None:
    builds = []
    once = worker.build_network
    monkeypatch.setattr(worker, "build_network", lambda *arguments: builds.append(1) or once(*arguments))
    record = record_of(decoder)
    assert len(builds) == 1, "it was not known before the build"
    assert [(one.what, one.profile) for one in record.fallbacks] == [("attention.0", name) for name in profiles]
    assert all("not supported by a dedicated kernel" in one.reason for one in record.fallbacks)
    assert checks(record, decoder) == set()
    unreported = replace(record, fallbacks=[])
    assert checks(unreported, decoder) & {"attention", "cache read in full"}


def test_a_kernel_that_only_fits_alone_is_reported(record_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(network: Any, attentions: Any, shapes: Any, sms: Any) -> list[Any]:
        for one in attentions:
            one.layer.attention.decomposable = False
        return []

    monkeypatch.setattr(worker, "allow_decomposing", forbid)
    record = record_of(Decoder(layers=1, head_dim=512))
    assert [one.profile for one in record.fallbacks] == ["prefill", "decode"]


# The process ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> TensorRt:
    return find_library("tensorrt_rtx")


def test_build_writes_a_plan_and_its_record(library: TensorRt, tmp_path: Path) -> None:
    decoder = Decoder(layers=1)
    graph = write_decoder(decoder, tmp_path)
    phases = []
    plan = build(library, graph, decoder.section(), decoder.caches, SMS, tmp_path, lambda *event: phases.append(event))
    assert (plan.file, plan.record) == (PLAN_FILE, RECORD_FILE)
    assert (plan.library, plan.version, plan.sms) == ("tensorrt_rtx", library.version, SMS)
    record = read_record(tmp_path / RECORD_FILE)
    assert record.plan_bytes == (tmp_path / PLAN_FILE).stat().st_size > record.weight_bytes
    assert record.data_bytes <= (tmp_path / "model.onnx.data").stat().st_size + 200_000
    assert record.peak_bytes and record.peak_bytes > 50e6
    assert not list(tmp_path.glob("*.partial"))
    assert phases[0] == (f"engine: {forecast_build(summarize_weights(graph))}", 0, 0) and " MB" in phases[0][0]
    assert phases[1] == ("Reading graph", 0, 1)
    assert len({phase for phase, *_ in phases}) > 1
    assert all(0 <= done <= total for _, done, total in phases)


def test_a_refused_graph_raises_one_error(library: TensorRt, tmp_path: Path) -> None:
    decoder = Decoder(layers=1)
    graph = write_decoder(decoder, tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(LlmcError) as caught:
        build(library, graph, decoder.section(), decoder.caches, SMS, tmp_path)
    assert caught.value.code == "TRT_PARSE_REFUSED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_failed_build_gives_the_first_error_in_words(record_of: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without profiles, the library refuses dynamic inputs.
    monkeypatch.setattr(worker, "add_profiles", lambda network, config, shapes: None)
    with pytest.raises(LlmcError, match="no optimization profile has been defined") as caught:
        record_of(Decoder(layers=1))
    assert caught.value.code == "TRT_BUILD_FAILED"
    assert "/" not in caught.value.what and "Error Code" not in caught.value.what


PART_OF_PLAN = "import json, os, signal, sys; open(json.loads(sys.stdin.readline())['plan'], 'w').write('part'); "
WORKERS = {
    "a crash": (f"{PART_OF_PLAN} os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal SIGSEGV"),
    "out of memory": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
    "a defect": ("raise ValueError('no such thing')", "Its last line is: ValueError: no such thing"),
}


@pytest.mark.parametrize("kind", WORKERS)
def test_the_end_of_the_process_is_explained(
    library: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    script, expected = WORKERS[kind]
    run_instead(monkeypatch, script)
    decoder = Decoder(layers=1)
    with pytest.raises(LlmcError, match=expected) as caught:
        build(library, write_decoder(decoder, tmp_path), decoder.section(), decoder.caches, SMS, tmp_path)
    assert caught.value.code == "TRT_BUILD_FAILED"
    assert not list(tmp_path.glob("engine*"))


def test_an_error_of_the_disk_reaches_the_caller(
    library: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"os_error": [errno.ENOSPC, "No space left on device", "plan"]}
    run_instead(monkeypatch, f"print({json.dumps(json.dumps(event))})")
    decoder = Decoder(layers=1)
    with pytest.raises(OSError, match="No space left") as caught:
        build(library, write_decoder(decoder, tmp_path), decoder.section(), decoder.caches, SMS, tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_an_interrupt_ends_the_process(library: TensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = building.subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    def interrupt(phase: str, done: int, total: int) -> None:
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(building.subprocess, "Popen", remember)
    decoder = Decoder(layers=1)
    with pytest.raises(KeyboardInterrupt):
        build(library, write_decoder(decoder, tmp_path), decoder.section(), decoder.caches, SMS, tmp_path, interrupt)
    assert started[0].returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("engine*"))


def run_instead(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run a script instead of the process that builds."""
    popen = building.subprocess.Popen
    monkeypatch.setattr(
        building.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", script], **options)
    )
