"""The quality comparison's costs, stored results, and repeated runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compiled import artifact
from safetensors.torch import save_file

import llmc
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec
from llmc.runtimes.measure.windows import Window

COMPARE = Path(llmc.__file__).resolve().parent / "examples" / "compare"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMPARE))


def test_peak_memory_is_the_sum_over_child_processes():
    from cost import Watch

    hold = "import time; x = bytearray(40_000_000); time.sleep(1)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait()"
    own = np.ones(200_000_000, np.uint8)  # memory of this process itself, which must not count
    with Watch() as watch:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 80_000_000 < watch.peak_bytes < own.nbytes
    assert 1 < watch.seconds < 30


def test_a_peak_between_two_samples_counts():
    from cost import Watch

    code = "import time; x = bytearray(150_000_000); del x; time.sleep(0.7)"
    with Watch() as watch:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert watch.peak_bytes > 150_000_000


def test_the_cost_of_two_steps_is_the_sum_of_time_and_the_larger_peak():
    from cost import Cost

    assert Cost(1.5, 10, True) + Cost(2.0, 7, False, {"a": 1}) == Cost(3.5, 10, False, {"a": 1})


def test_a_folder_is_made_and_timed_once(tmp_path):
    from quality_make import make_timed

    calls = []

    def write(out: Path) -> dict[str, int]:
        out.mkdir()
        calls.append(out)
        return {"seconds": 3}

    first = make_timed(tmp_path / "x", "key", False, write)
    assert first is not None and first.report == {"seconds": 3} and not first.quiet
    assert make_timed(tmp_path / "x", "key", False, write) == first
    assert len(calls) == 1
    make_timed(tmp_path / "x", "another key", False, write)
    assert len(calls) == 2


def test_a_folder_made_otherwise_has_no_cost(tmp_path):
    from prepare import make_folder
    from quality_make import make_timed

    make_folder(tmp_path / "x", Path.mkdir, "key")
    assert make_timed(tmp_path / "x", "key", False, Path.mkdir) is None


def test_an_exit_of_a_converter_becomes_an_error_and_leaves_no_cost(tmp_path):
    from quality_make import make_timed

    make_timed(tmp_path / "x", "key", False, Path.mkdir)

    def fail(out: Path) -> None:
        raise SystemExit("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        make_timed(tmp_path / "x", "new key", False, fail)
    assert not (tmp_path / "x.cost.json").exists()


def test_only_making_a_folder_waits_for_a_quiet_machine(tmp_path, monkeypatch):
    import quality_make

    waited = []
    monkeypatch.setattr(quality_make, "wait_until_quiet", lambda: waited.append(1))
    assert quality_make.make_timed(tmp_path / "x", "key", True, Path.mkdir).quiet
    quality_make.make_timed(tmp_path / "x", "key", True, Path.mkdir)
    assert len(waited) == 1


def test_the_compiler_gets_the_flags_and_its_error_is_reported(tmp_path, monkeypatch):
    import quality_make

    seen = []

    def run(command, **rest):
        seen.append(command)
        return SimpleNamespace(returncode=0, stderr="", stdout=json.dumps({"report": {"seconds": {"write": 1}}}))

    monkeypatch.setattr(quality_make.subprocess, "run", run)
    report = quality_make.compile_llmc(Path("python"), ("--int4", "--algo", "awq"), tmp_path, tmp_path / "out")
    assert report == {"seconds": {"write": 1}}
    flags = ["--int4", "--algo", "awq", "--max-seq-len=2048", "--json"]
    assert seen[0][3:] == ["compile", str(tmp_path), "-o", str(tmp_path / "out"), *flags]
    refused = json.dumps({"error": {"code": "GATE_FAILED", "what": "It differs.", "hint": ""}})
    monkeypatch.setattr(
        quality_make.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="", stdout=refused)
    )
    with pytest.raises(RuntimeError, match="GATE_FAILED: It differs"):
        quality_make.compile_llmc(Path("python"), (), tmp_path, tmp_path / "out")


def test_parameters_are_counted_in_the_file(tmp_path):
    from quality_make import parameters

    values = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    assert parameters(tmp_path) == 22


def test_bytes_cover_all_files_and_weight_bytes_only_files_with_weights(tmp_path):
    from quality_make import Made

    for name, size in (("model.onnx", 3), ("model.onnx.data", 5), ("prefill.onnx", 7), ("tokenizer.json", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    made = Made("llmc", tmp_path, tmp_path, None)
    assert (made.bytes, made.weight_bytes) == (115, 15)


class Uniform:
    """An engine started by a command.

    All logits are 0, except that of token 2, which is the command's first word.
    """

    version, spec = "9", EngineSpec(vocab_size=4, max_seq_len=4)
    started: list[list[str]] = []

    def __init__(self, command, capacity):
        self.started.append(command)
        self.bias = float(command[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def open_slots(self, count):
        pass

    def forward(self, batch):
        return HostLogits(np.tile(np.float32([0, 0, self.bias, 0]), (len(batch.wanted), 1)))


@pytest.fixture
def reference(tmp_path, monkeypatch):
    import quality_reference

    monkeypatch.setattr(quality_reference, "PipedEngine", Uniform)
    monkeypatch.setattr(Uniform, "started", [])
    (tmp_path / "hf").mkdir()
    reference = object.__new__(quality_reference.ReferenceLogits)
    reference.hf, reference.capacity = tmp_path / "hf", 4
    reference.windows = [Window(np.array([0, 1, 2, 3]), 1), Window(np.array([2, 3, 1]), 2)]
    reference.predictions = SimpleNamespace(
        vocab_size=4, window=lambda i: (np.zeros((len(reference.windows[i].targets), 4), np.float32), None)
    )
    return reference


def test_measurements_are_stored_by_everything_they_depend_on(reference, tmp_path):
    first = reference.measured("a", "files", tmp_path / "results", ["0.0"])
    assert first["perplexity"]["value"] == pytest.approx(4) and first["kld"]["mean"] == 0
    assert (first["tokens"], first["windows"], first["version"]) == (4, 2, "9")
    assert Uniform.started == [["0.0", "--capacity=4"]]
    assert reference.measured("a", "files", tmp_path / "results", ["0.0"]) == first
    assert len(Uniform.started) == 1
    other = reference.measured("a", "other files", tmp_path / "results", ["2.0"])
    assert len(Uniform.started) == 2 and other["kld"]["mean"] > 0.1
    reference.windows = reference.windows[:1]
    assert reference.measured("a", "files", tmp_path / "results", ["0.0"])["tokens"] == 3


def test_window_digests_depend_on_tokens_and_scored_tokens():
    from quality_reference import windows_digest

    cuts = [([1, 2, 3], 1), ([1, 2, 3], 2), ([1, 2, 4], 1)]
    assert len({windows_digest([Window(np.array(tokens), first)]) for tokens, first in cuts}) == 3
    assert windows_digest([Window(np.array([1, 2]), 1)]) == windows_digest([Window(np.array([1, 2]), 1)])


def test_a_fingerprint_depends_on_files_and_code(tmp_path):
    from quality_reference import fingerprint

    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(content)
    a, b, c = (fingerprint("llama", tmp_path / name, ["peer_llama.py"]) for name in "abc")
    assert a == b != c
    assert (
        len({a, fingerprint("genai", tmp_path / "a", ["peer_llama.py"]), fingerprint("llama", tmp_path / "a", [])}) == 3
    )
    (tmp_path / "b" / "model").rename(tmp_path / "b" / "other")
    from quality_reference import folder_digest

    folder_digest.cache_clear()
    assert fingerprint("llama", tmp_path / "b", ["peer_llama.py"]) != a


def test_a_speed_key_depends_on_candidates_and_conditions():
    from quality_speed import Workload, speed_key

    usual = Workload(512, 128, 2, 3)
    assert usual.options() == ["--prompt=512", "--tokens=128", "--threads=2", "--repeats=3"]
    key = speed_key({"a": "1", "b": "2"}, usual, True)
    assert key == speed_key({"b": "2", "a": "1"}, usual, True)
    others = [({"a": "1"}, usual, True), ({"a": "1", "b": "3"}, usual, True), ({"a": "1", "b": "2"}, usual, False)]
    others.append(({"a": "1", "b": "2"}, Workload(512, 128, 1, 3), True))
    assert len({key, *(speed_key(*other) for other in others)}) == 5


def test_graph_hashes_ignore_weight_values():
    from quality_speed import graphs_of

    int8, nearest = artifact("speaking", quantize="int8"), artifact("speaking", quantize="int8", algo="rtn")
    assert (int8 / "model.onnx.data").read_bytes() != (nearest / "model.onnx.data").read_bytes()
    assert graphs_of(int8) == graphs_of(nearest)
    others = [artifact("speaking", quantize="int4"), artifact("speaking", quantize="int8", group_size="channel")]
    assert len({graphs_of(int8), *map(graphs_of, others)}) == 3


def test_engines_take_turns_and_an_interrupted_run_resumes(tmp_path):
    from quality_speed import run_rounds

    log, order = tmp_path / "log", []

    def measure(name: str) -> dict[str, int]:
        if len(order) == 3:
            raise KeyboardInterrupt
        order.append(name)
        return {"number": len(order)}

    with pytest.raises(KeyboardInterrupt):
        run_rounds(["a", "b"], 2, log, measure, pytest.fail)
    assert order == ["a", "b", "a"]
    order.append("stopped")
    results = run_rounds(["a", "b"], 2, log, measure, pytest.fail)
    assert order == ["a", "b", "a", "stopped", "b"]
    assert results == {"a": [{"number": 1}, {"number": 3}], "b": [{"number": 2}, {"number": 5}]}
    assert run_rounds(["a", "b"], 2, log, pytest.fail, pytest.fail) == results


def test_a_failed_engine_does_not_stop_the_others(tmp_path):
    from quality_speed import run_rounds

    measured, reported = [], []

    def measure(name: str) -> dict[str, int]:
        measured.append(name)
        if name == "a":
            raise RuntimeError("no")
        return {}

    results = run_rounds(
        ["a", "b"], 2, tmp_path / "log", measure, lambda name, error: reported.append((name, str(error)))
    )
    assert results == {"b": [{}, {}]}
    assert measured == ["a", "b", "b"] and reported == [("a", "no")]


def test_a_failed_step_is_the_reason_and_later_steps_are_skipped(capsys):
    from quality import attempt
    from quality_report import Row
    from quality_variants import CANDIDATES

    row = Row(CANDIDATES[0])

    def fail(row: Row) -> None:
        raise RuntimeError("many\nwords")

    attempt(row, "making", fail)
    assert row.failed == "words"
    attempt(row, "measuring", lambda row: pytest.fail("went on"))
    assert "many" in capsys.readouterr().err


def test_an_engines_fingerprint_depends_on_every_module_of_the_runtime(tmp_path, monkeypatch):
    import quality_reference

    (tmp_path / "artifact").mkdir()
    for name in ("runtimes/__init__.py", "runtimes/engines/ort/engine.py"):
        path = tmp_path / "llmc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(quality_reference, "PACKAGE", tmp_path / "llmc")
    before = quality_reference.fingerprint("llmc", tmp_path / "artifact", [])
    (tmp_path / "llmc" / "runtimes" / "engines" / "ort" / "engine.py").write_text("changed = True")
    assert quality_reference.fingerprint("llmc", tmp_path / "artifact", []) != before
