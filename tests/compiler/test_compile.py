"""From a model to an artifact that answers as the model does, or to none at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from compiled import artifact, speaking_model
from progress_lines import rest
from torch import fx
from zoo.tiny import tiny_model

import llmc
from llmc import LLM, LlmcError, SamplingParams
from llmc.compiler.cli.main import main
from llmc.compiler.targets.onnx import quantized_cache
from llmc.compiler.targets.onnx.lower import Lowering
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.compiler.targets.ort import write
from llmc.compiler.targets.ort.group_query_attention import GroupQueryAttention
from llmc.ir.program import Miss, Program
from llmc.kernels.ops import quant_linear
from llmc.passes.quantize.quantization_plan import is_head
from llmc.passes.quantize.quantize_activations import QuantizeActivations
from llmc.passes.quantize.schemes import Grid, Override
from llmc.passes.queries import is_op
from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.engines.ort.section import read_section
from llmc.runtimes.engines.selfcheck import GateReference, limits_key

# fp32, weights on 8 and 4 bits, activations and caches too; both tables; rings, slopes, learned positions.
MADE: list[tuple[str, dict[str, Any]]] = [
    ("speaking", {}),
    ("speaking", {"quantize": "int4"}),
    ("gemma3_text", {}),
    ("gemma3_text", {"kv_cache": "static", "ops": "standard"}),
    ("gpt2", {}),
    ("gpt2", {"quantize": "w8a8", "ops": "standard"}),
    ("speaking", {"quantize": "w8a8"}),
    ("bloom", {"quantize": "int8"}),
    ("bloom", {"kv_cache_dtype": "int8"}),
    ("speaking", {"kv_cache_dtype": "int8", "quantize": "int4"}),
    ("gemma3_text", {"kv_cache_dtype": "fp8", "ops": "standard"}),
    ("gemma3_text", {"spec_tokens": 3, "ops": "standard"}),
]


@pytest.mark.parametrize(("model", "options"), MADE)
def test_the_gate_passes_and_passes_again(model: str, options: dict[str, Any]) -> None:
    folder = artifact(model, **options)
    report = json.loads((folder / "verify.json").read_text())
    assert report["passed"]
    assert report["precision"] == limits_key(options.get("quantize", "fp32"), False, options.get("kv_cache_dtype"))
    again = llmc.Artifact(folder, open_artifact(folder), {}).verify()
    assert again.passed and [c.name for c in again.checks] == [c["name"] for c in report["checks"]]


@pytest.mark.parametrize(("model", "count"), [("gemma3_text", 0), ("speaking", 3)])
def test_without_slack_no_byte_differs(model: str, count: int) -> None:
    """Neither if it is 0, nor if no layer has a window."""
    without, with_option = artifact(model), artifact(model, spec_tokens=count)
    files = {path.relative_to(without): path.read_bytes() for path in without.rglob("*") if path.is_file()}
    assert files == {path.relative_to(with_option): path.read_bytes() for path in with_option.rglob("*")}
    assert open_artifact(with_option).rollback == (1 if model == "gemma3_text" else None)


@pytest.mark.parametrize(
    ("model", "options", "scales"),
    [
        ("speaking", {"kv_cache_dtype": "int8"}, "channel"),
        ("speaking", {"kv_cache_dtype": "int8", "ops": "standard"}, "token"),
        ("speaking", {"kv_cache_dtype": "fp8"}, "token"),
        ("llama", {"kv_cache_dtype": "int8"}, "token"),  # no tokenizer: nothing to calibrate with
    ],
)
def test_what_scales_of_keys_and_values_are_for(model: str, options: dict[str, Any], scales: str) -> None:
    assert {cache.scales for cache in open_artifact(artifact(model, **options)).caches} == {scales}


STATIC = (Override("*.layers.*", Grid("int8", activation="int8", static=True)),)
# Which ops multiply the weights of layers, by graph.
EXPANDS, INTEGERS = "MatMulNBits", "MatMulIntegerToFloat"
GRAPHS: list[tuple[dict[str, Any], dict[str, set[str]]]] = [
    ({"quantize": "int8"}, {"step": {EXPANDS}}),
    ({"quantize": "int4"}, {"step": {EXPANDS}, "prefill": {EXPANDS, INTEGERS}}),
    ({"quantize": "w8a8"}, {"step": {EXPANDS}, "prefill": {EXPANDS, INTEGERS}}),
    ({"quantize": "w8a8", "overrides": STATIC}, {"step": {EXPANDS, INTEGERS}}),
]


@pytest.mark.parametrize(("options", "graphs"), GRAPHS)
def test_few_tokens_and_many_have_graphs_of_their_own(options: dict[str, Any], graphs: dict[str, set[str]]) -> None:
    """Prompts get a graph if inputs are quantized by token; the LM head's kernel expands codes in both."""
    folder = artifact("speaking", **options)
    found = {}
    for name, spec in read_section(open_artifact(folder)).graphs.items():
        ops = {node.op_type for node in onnx.load(folder / spec.file, load_external_data=False).graph.node}
        found[name] = ops & {EXPANDS, INTEGERS}
    assert found == graphs


@pytest.mark.parametrize("model_type", ["speaking", "gemma3_text", "gpt2"])
def test_what_it_writes_is_what_transformers_writes(model_type: str) -> None:
    """40 tokens, the likeliest each, beyond a window of 6 several times; without a penalty random models repeat one."""
    model = tiny_model("llama" if model_type == "speaking" else model_type)
    prompts = [[5, 9, 33, 60, 12], list(range(3, 25))]
    llm = LLM(artifact(model_type))
    made = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=5.0))
    model.generation_config.eos_token_id = None
    for prompt, completion in zip(prompts, made, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, repetition_penalty=5.0
            )
        assert completion.token_ids == want[0, len(prompt) :].tolist()
        assert len(set(completion.token_ids)) > 10


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    old = artifact("speaking", quantize="int4", algo="rtn")
    made = llmc.compile(speaking_model(), tmp_path / "out", quantize="int4", algo="rtn")
    files = sorted(path.name for path in old.iterdir())
    assert files == sorted(path.name for path in made.path.iterdir())
    for name in files:
        assert (old / name).read_bytes() == (made.path / name).read_bytes(), name
    assert list(made.report["seconds"]) == ["capture", "hash", "passes", "quantize", "write", "reference", "gate"]
    assert made.report["peak_rss_bytes"]["gate"] > 1 << 20


def swapped(g: Any, gate: Any, up: Any, act: str, **options: Any) -> str:
    """A lowering that takes one input for the other."""
    return STANDARD["llmc.gated_act"](g, up, gate, act, **options)


def test_a_wrong_artifact_never_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = shutil.copytree(artifact("speaking"), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.setitem(write.TABLES, "contrib", {**write.TABLES["contrib"], "llmc.gated_act": swapped})
    with pytest.raises(LlmcError) as caught:
        llmc.compile(speaking_model(), old, max_seq_len=64)
    assert caught.value.code == "GATE_FAILED" and "prompts: " in caught.value.what
    assert "the lowering or the runtime" in caught.value.what  # no pass is at fault
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


DEQUANTIZED = quantized_cache.dequantized


def scales_too_large(g: Lowering, codes: str, scales: str, *rest: Any) -> str:
    return DEQUANTIZED(g, codes, g.op("Mul", scales, g.constant(1.1, torch.float32)), *rest)


def scales_of_another_head(g: Lowering, codes: str, scales: str, *rest: Any) -> str:
    parts = (g.op("Slice", scales, *map(g.constant, ([start], [end], [1]))) for start, end in ((1, 99), (0, 1)))
    return DEQUANTIZED(g, codes, g.op("Concat", *parts, axis=1), *rest)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("dequantized", [scales_too_large, scales_of_another_head])
def test_a_wrong_scale_in_a_cache_is_refused(
    tmp_path: Path, codes: str, dequantized: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_cache, "dequantized", dequantized)
    with pytest.raises(LlmcError) as caught:
        llmc.compile(speaking_model(), tmp_path / "out", kv_cache_dtype=codes, ops="standard")
    assert caught.value.code == "GATE_FAILED" and "rounded alike" in caught.value.what


def constants_too_large(self: GroupQueryAttention, g: Lowering) -> None:
    self._scales = [g.op("Mul", each, g.constant(1.1, torch.float32)) for each in self._scales]


def constants_of_another_head_for_many_queries(self: GroupQueryAttention, g: Lowering) -> None:
    for i, each in enumerate(self._scales_by_head):
        halves = (g.op("Slice", each, *map(g.constant, ([start], [end], [0]))) for start, end in ((32, 64), (0, 32)))
        self._scales_by_head[i] = g.op("Concat", *halves, axis=0)


@pytest.mark.parametrize("fault", [constants_too_large, constants_of_another_head_for_many_queries])
def test_a_wrong_constant_scale_is_refused(
    tmp_path: Path, fault: Callable[[GroupQueryAttention, Lowering], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = GroupQueryAttention.__init__

    def make_wrong(self: GroupQueryAttention, g: Lowering, *rest: Any, **shared: Any) -> None:
        make(self, g, *rest, **shared)
        fault(self, g)

    monkeypatch.setattr(GroupQueryAttention, "__init__", make_wrong)
    with pytest.raises(LlmcError) as caught:
        llmc.compile(speaking_model(), tmp_path / "out", kv_cache_dtype="int8")
    assert caught.value.code == "GATE_FAILED" and "rounded alike" in caught.value.what


# A fault in a pass of the prefill graph -------------------------------------------------------------------------------


def negate_input(self: QuantizeActivations, program: Program, node: fx.Node) -> bool | Miss | None:
    """Quantize the input of a linear, with its sign flipped."""
    if not is_op(node, quant_linear) or is_head(program, node):
        return None
    call = quant_linear.bind(node.args, dict(node.kwargs))
    if call["activation"] != "none" or call["scales"].meta["val"].shape[1] != 1:
        return None
    with program.graph.inserting_before(node):
        x = program.call(torch.ops.aten.neg.default, call["x"], like=node)
    program.replace_with(node, quant_linear, *(call | {"x": x, "activation": "int8"}).values())
    return True


def rewrites(made: llmc.Artifact) -> tuple[int, int]:
    """Return the number of rewrites before the passes of the prefill graph that quantize inputs, and with them."""
    burning = [run for run in made.passes if run.record.name not in ("CheckTokenIndependence", "InsertKvCache")]
    counts = [run.record.matches for run in burning]
    at = [(run.graph, run.record.name) for run in burning].index(("prefill", "QuantizeActivations"))
    return sum(counts[:at]), sum(counts[: at + 1])


def test_fuel_dumps_and_the_gate_reach_a_fault_in_the_prefill_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"quantize": "int4", "algo": "rtn"}
    sound = llmc.compile(speaking_model(), tmp_path / "sound", **options)
    monkeypatch.setattr(QuantizeActivations, "rewrite", negate_input)
    with pytest.raises(LlmcError) as caught:
        llmc.compile(speaking_model(), tmp_path / "out", dump_ir=tmp_path / "ir", **options)
    assert caught.value.code == "GATE_FAILED"
    assert "QuantizeActivations of the prefill graph is the first pass to change the result" in caught.value.what
    (dump,) = (tmp_path / "ir").glob("*_prefill_QuantizeActivations.py")
    assert "aten.neg.default" in dump.read_text()
    assert "aten.neg.default" not in "".join(path.read_text() for path in (tmp_path / "ir").glob("*_step_*.py"))
    before, after = rewrites(sound)
    assert after > before
    monkeypatch.setenv("LLMC_FUEL", str(before))
    llmc.compile(speaking_model(), tmp_path / "out", **options)
    monkeypatch.setenv("LLMC_FUEL", str(before + 1))
    with pytest.raises(LlmcError, match="GATE_FAILED"):
        llmc.compile(speaking_model(), tmp_path / "out", **options)


# A process that is stopped --------------------------------------------------------------------------------------------

# Forks a process of `llmc compile` for each moment, which sends itself a signal when it comes to a function.
STOPPED = """
import importlib, json, os, sys
import torch
from llmc.compiler import api
from llmc.compiler.cli.main import main
arguments, moments = json.loads(sys.argv[1])
torch.set_num_threads(1)  # a process with threads can't be forked
api.capture(arguments[1])  # loads what every compilation needs, once
for number, place, output, *more in moments:
    pid = os.fork()
    if not pid:
        if place:
            module, name = place.split(":")
            module = importlib.import_module(module)
            there = getattr(module, name)
            def stop(*given, **named):
                os.kill(os.getpid(), number)
                return there(*given, **named)
            setattr(module, name, stop)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main([*arguments, "-o", output, *more], prog_name="llmc")
        except SystemExit as end:
            os._exit(end.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILL, INTERRUPT = 9, 2
WRITING, CHECKING = "llmc.compiler.build:save_metadata_files", "llmc.compiler.build:check_in_new_process"
BEFORE, AFTER = "llmc.runtimes.artifact.write:move_into_place", "llmc.runtimes.artifact.write:remove_folder"
# Signal, moment, and which artifact stands there afterwards.
MOMENTS = [
    (KILL, WRITING, "old"),
    (KILL, BEFORE, "old"),
    (KILL, AFTER, "new"),
    (INTERRUPT, CHECKING, "old"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_whatever_stops_it_a_whole_artifact_stands_there(tmp_path: Path) -> None:
    rooms = [tmp_path / f"{i}" for i in range(len(MOMENTS))]
    for room in rooms:
        shutil.copytree(artifact("speaking"), room / "out")
    moments = [
        (number, place, str(room / "out"), *(["--no-verify"] if number == KILL else []))
        for (number, place, _), room in zip(MOMENTS, rooms, strict=True)
    ]
    # And where a killed one has left its pieces, another comes to its end.
    moments.append((0, "", str(rooms[0] / "out")))
    arguments = ["compile", str(speaking_model()), "--max-seq-len", "20"]
    child = [sys.executable, "-c", STOPPED, json.dumps([arguments, moments])]
    run = subprocess.run(child, capture_output=True, text=True, check=True)
    statuses = [int(line) for line in run.stdout.split()]
    assert statuses == [-9 if number == KILL else 130 for number, _, _ in MOMENTS] + [0]
    lengths = {"old": 128, "new": 20}
    for room, (number, place, left) in zip(rooms[1:], MOMENTS[1:], strict=True):
        assert open_artifact(room / "out").max_seq_len == lengths[left], place
        assert (len(list(room.iterdir())) > 1) == (number == KILL), place
    assert [path.name for path in rooms[0].iterdir()] == ["out"]
    assert open_artifact(rooms[0] / "out").max_seq_len == 20
    # Nor was more asked of so short a model than it has room for.
    reference = GateReference.read(rooms[0] / "out")
    assert (reference.prompts.tolist(), int(reference.steps), reference.tokens.shape[1]) == ([7, 10, 10], 10, 20)
    for room in (rooms[0], rooms[1], rooms[3]):
        assert CliRunner().invoke(main, ["verify", str(room / "out")]).exit_code == 0


# What the command says of an artifact ---------------------------------------------------------------------------------


def test_the_command_answers_and_verifies() -> None:
    folder = str(artifact("speaking"))
    run = CliRunner().invoke(main, ["run", folder, "To be", "--max-tokens", "5", "--json"])
    assert run.exit_code == 0 and len(json.loads(run.stdout)["token_ids"]) <= 5
    verify = CliRunner().invoke(main, ["verify", folder])
    assert verify.exit_code == 0 and verify.stdout.endswith("All checks passed.\n")


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


def say(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(document | changes))

    return change


@pytest.mark.parametrize("verb", ["run", "verify"])
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (flip, "ARTIFACT_DAMAGED"),
        (say(format=99), "ARTIFACT_NEWER"),
        (say(requires={"onnxruntime": ">=99"}), "RUNTIME_VERSION"),
        (say(target="abacus"), "TARGET_UNKNOWN"),
    ],
)
def test_what_is_wrong_is_one_paragraph(tmp_path: Path, verb: str, damage: Callable[[Path], None], code: str) -> None:
    folder = shutil.copytree(artifact("speaking"), tmp_path / "out")
    damage(folder)
    result = CliRunner().invoke(main, [verb, str(folder), *(["Hello"] if verb == "run" else [])])
    assert (result.exit_code, result.stdout) == (3, "")
    assert " ".join(rest(result.stderr).split()).startswith(f"{code}: ")
    assert "\n\n" not in result.stderr and "Traceback" not in result.stderr
