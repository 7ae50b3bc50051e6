"""Run the compiler on every causal language model type of transformers.

The results become a table.

python tests/model_coverage.py --write docs/coverage.md      # all types
python tests/model_coverage.py llama gemma3_text             # some types
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from multiprocessing import Pool, Value
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from zoo.facts import WRONG_POSITION_IDS
from zoo.tiny import UNBUILDABLE, tiny_model, tiny_model_types

import llmc
from llmc.compiler.gate.verify import verify
from llmc.compiler.targets.registry import find_target
from llmc.runtimes.engines.selfcheck import LIMITS

MAX_SEQ_LEN = 64
LIMIT = 1e-4  # for logits of order one in float32, where reordered sums differ by 1e-6
SHAPES = ((2, 29), (1, 12), (3, 1))  # all differ from the captured shape
# By target: the options to compile with. A target whose packages are absent is left out.
# TensorRT for RTX 1.7 can't build some networks whose caches have 64 positions.
TARGETS: dict[str, dict[str, Any]] = {
    "ort": {"max_seq_len": MAX_SEQ_LEN},
    "trt": {"max_seq_len": 128},
}
# The dtypes to try, in order, until the gate passes: rounding to bf16 can change the experts of a token, which these
# small models have few of. An error by such rounding is 8 times as rare in fp16; any other error stays.
DTYPES: dict[str, tuple[str, ...]] = {"ort": ("fp32",), "trt": ("bf16", "fp16")}
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# For models with state other than keys and values, and for models that are not causal.
ENGINE_REFUSALS = frozenset({"CACHE_IMPOSSIBLE"})
# Of single targets, each before anything is built: what has no kernel, and an op that is not read, with its layer.
TARGET_REFUSALS = {"trt": frozenset({"TRT_UNSUPPORTED", "TRT_PARSE_REFUSED"})}
# Error codes that are valid refusals of a model. Any other error is a defect of llmc.
REFUSALS = frozenset(
    "CAPTURE_SPECIALIZED CAPTURE_DATA_DEPENDENT CAPTURE_FAILED MASK_UNKNOWN EXPERTS_UNKNOWN NOT_BUILDABLE".split()
)


@dataclass(frozen=True)
class Engine:
    """Result of compiling for a target: the gate's worst error, or a refusal; and what is slow in the artifact.

    Attributes:
        others: the dtypes in which the gate had refused it before, with their errors.
        eager: the error of transformers itself in this dtype, where the gate refused all dtypes.
    """

    target: str
    error: float | None = None
    limit: float = 0.0
    code: str = ""
    reason: str = ""
    remarks: tuple[str, ...] = ()
    dtype: str = ""
    others: tuple[str, ...] = ()
    eager: float | None = None

    @property
    def right(self) -> bool:
        """True if the gate passes, or the refusal is a valid one.

        The gate may refuse a model whose logits transformers itself gets as wrong in this dtype.
        """
        if self.error is None:
            # A model that was captured may be refused when it is captured for more positions.
            return self.code in ENGINE_REFUSALS | REFUSALS | TARGET_REFUSALS.get(self.target, frozenset())
        return self.error <= max(self.limit, self.eager or 0.0)

    def __str__(self) -> str:
        result = f"`{self.code}` {self.reason}" if self.error is None else f"{self.error:.0e}"
        if self.others:
            result += f" in {self.dtype} ({', '.join(self.others)})"
        if self.eager is not None:
            result = f"`GATE_FAILED` {result}; transformers itself is off by {self.eager:.0e} there"
        return "; ".join([result, *self.remarks])


@dataclass(frozen=True)
class Outcome:
    """Result for one model type: an error against eager, or a refusal."""

    model_type: str
    error: float | None = None  # worst absolute difference of logits over all shapes
    code: str = ""
    reason: str = ""
    dialect: dict[str, int] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    seconds: float = 0.0
    engines: tuple[Engine, ...] = ()

    @property
    def captured(self) -> bool:
        return self.error is not None and self.error <= LIMIT

    @property
    def refused(self) -> bool:
        return self.code in REFUSALS

    @property
    def right(self) -> bool:
        """True if the model is captured and compiled, or refused for a valid reason."""
        return self.refused or (self.captured and all(engine.right for engine in self.engines))


def eager_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Compute the logits with transformers, on the same positions as the program's."""
    arguments: dict[str, object] = {"input_ids": tokens}
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" in parameters and model.config.model_type not in WRONG_POSITION_IDS:
        arguments["position_ids"] = positions_of(tokens)
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    with torch.no_grad():
        return model(**arguments).logits


def positions_of(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)


def difference(program: llmc.Program, model: PreTrainedModel, shapes: Sequence[tuple[int, int]] = SHAPES) -> float:
    """Compute the worst absolute difference of logits between program and eager."""
    worst = 0.0
    for shape in shapes:
        tokens = torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(sum(shape)))
        got, want = program(tokens, positions_of(tokens)), eager_logits(model, tokens)
        if got.shape != want.shape or not torch.isfinite(got).all():
            return float("inf")
        worst = max(worst, (got - want).abs().max().item())
    return worst


def compile_and_check(model: PreTrainedModel, target: str, dtypes: Sequence[str], **options: Any) -> Engine:
    """Compile a model for a target and run the gate on the artifact.

    Args:
        dtypes: tried in order, until the gate passes.
    """
    others: tuple[str, ...] = ()
    for dtype in dtypes:
        found = replace(_compile_and_check(model, target, dtype=dtype, **options), dtype=dtype, others=others)
        if found.right:
            break
        if dtype == dtypes[-1] and found.error is not None:
            return replace(found, eager=eager_error(model, getattr(torch, TORCH_NAMES[dtype])))
        others += (f"{found.code if found.error is None else format(found.error, '.0e')} in {dtype}",)
    return found


def eager_error(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return how far the logits of transformers are off in a dtype, relative to their spread, as the gate measures."""
    lower, worst = deepcopy(model).to(dtype), 0.0
    for seed in range(12):
        tokens = torch.randint(5, 90, (1, 24), generator=torch.Generator().manual_seed(seed))
        exact, found = eager_logits(model, tokens), eager_logits(lower, tokens).float()
        worst = max(worst, float((found - exact).abs().max() / exact.std()))
    return worst


def _compile_and_check(model: PreTrainedModel, target: str, **options: Any) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        try:
            made = llmc.compile(model, path, target=target, verify=False, **options)
            report = verify(path, model)
        except llmc.LlmcError as error:
            return Engine(target, code=error.code, reason=error.what)
        remarks = tuple(find_target(target).remarks(path, made.manifest))
        return Engine(target, max(c.measured for c in report.checks), LIMITS[report.precision].model, remarks=remarks)


def cover(model_type: str, targets: Sequence[str] = ()) -> Outcome:
    """Capture a type's tiny model up to canonical, and compare it with eager.

    Args:
        model_type: the type.
        targets: also compile it for these, and run the gate.
    """
    start = time.perf_counter()
    if model_type in UNBUILDABLE:
        return Outcome(model_type, code="NOT_BUILDABLE", reason=UNBUILDABLE[model_type])
    model = tiny_model(model_type)
    try:
        program = llmc.capture(model, max_seq_len=MAX_SEQ_LEN)
    except llmc.LlmcError as error:
        return Outcome(model_type, code=error.code, reason=error.what, seconds=time.perf_counter() - start)
    ops = program.ops()
    return Outcome(
        model_type,
        error=difference(program, model),
        dialect={name.removeprefix("llmc."): n for name, n in sorted(ops.items()) if name.startswith("llmc.")},
        plain=leftovers(program),
        engines=tuple(compile_and_check(model, target, DTYPES[target], **TARGETS[target]) for target in targets),
        seconds=time.perf_counter() - start,
    )


def leftovers(program: llmc.Program) -> list[str]:
    """List the misses of the canonicalizing passes, with their counts."""
    reasons = Counter(f"{record.name}: {m.reason}" for record in program.history for m in record.misses)
    return [f"{reason} ({n})" for reason, n in sorted(reasons.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="Markdown page to write")
    options = parser.parse_args()
    types = options.types or tiny_model_types()
    outcomes = []
    with Pool(options.jobs, initializer=_use_one_core, initargs=(Value("i", 0),), maxtasksperchild=20) as pool:
        for outcome in pool.imap(_cover_safely, types):
            outcomes.append(outcome)
            shown = f"{outcome.error:.1e}" if outcome.error is not None else f"{outcome.code}: {outcome.reason}"
            shown += "".join(f"  {engine.target} {engine}" for engine in outcome.engines)
            print(f"{outcome.model_type:28} {outcome.seconds:5.1f} s  {shown}", flush=True)
    captured = [o for o in outcomes if o.captured]
    refused = [o for o in outcomes if o.refused]
    engines = [engine for outcome in captured for engine in outcome.engines]
    compiled = Counter(e.target for e in engines if e.error is not None and e.right and e.eager is None)
    wrong = [o.model_type for o in outcomes if not o.right]
    print(f"{len(captured)} captured, canonical and equal to eager; {len(refused)} refused; compiled: {dict(compiled)}")
    print(f"wrong: {', '.join(wrong) or 'none'}")
    if options.write:
        page = options.write.read_text() if options.types and options.write.exists() else ""
        options.write.write_text(table(outcomes, page))
    return 1 if wrong else 0


def _use_one_core(taken: Any) -> None:
    """Pin this worker, with the threads of torch and ONNX Runtime, to one core.

    On shared cores they would wait.
    """
    cores = sorted(os.sched_getaffinity(0))
    with taken.get_lock():
        os.sched_setaffinity(0, {cores[taken.value % len(cores)]})
        taken.value += 1
    torch.set_num_threads(1)


def _cover_safely(model_type: str) -> Outcome:
    transformers.logging.set_verbosity_error()
    try:
        return cover(model_type, [target for target in TARGETS if not find_target(target).missing("compile")])
    except Exception as error:  # one failing type must not stop the others; it counts as wrong
        return Outcome(model_type, code="CRASHED", reason=f"{type(error).__name__}: {str(error).splitlines()[:1]}")


def table(outcomes: Sequence[Outcome], page: str = "") -> str:
    """Build the coverage page.

    The lines of `page` for types without an outcome are kept.
    """
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    lines |= {outcome.model_type: _table_line(outcome) for outcome in outcomes}
    lines = {name: lines[name] for name in sorted(lines) if name in tiny_model_types()}
    refused = sum("| refused |" in line for line in lines.values())
    compiled = [_compiled(lines.values(), column) for column in (3, 4)]
    head = f"""
# Coverage

`make coverage` (`python tests/model_coverage.py --write docs/coverage.md`) generates this page. It builds a tiny random
model of each causal language model type of transformers {transformers.__version__}, captures it and brings it to the
canonical stage. It then compares the program with eager in float32, at {len(SHAPES)} shapes other than the captured
one. The limit is an absolute difference of {LIMIT:g} in the logits, which are of order one. A model that can't be
captured is refused, with the code and the reason that a user sees.

{len(lines) - refused} of {len(lines)} types are captured, canonical and equal to eager; {refused} are refused.

Each captured model is then compiled for ONNX Runtime in float32 and checked by the gate: whole prompts, a ragged batch
of three sequences token by token, and a prompt in pieces, alone and beside other sequences, with `max_seq_len`
{MAX_SEQ_LEN}. The column `onnxruntime` has the worst error relative to the logits' spread; the limit is
{LIMITS["fp32"].model:g}. {compiled[0]} types compile. The others keep state other than keys and values between
calls, or are not causal, and are refused with `CACHE_IMPOSSIBLE`.

The same is done for target trt in bf16, with {TARGETS["trt"]["max_seq_len"]} positions: the gate checks the graph, with
the limit {LIMITS["bf16"].model:g}, and TensorRT builds an engine from it. Where rounding to bf16 changes the experts of
a token, the error can be larger, because these models have few experts. They are compiled in fp16 then, with the limit
{LIMITS["fp16"].model:g}. {compiled[1]} types compile. The column `TensorRT` has the gate's worst error, and what in the
engine is slower or larger than it could be; or the refusal, which comes before the build and names the op and the
layer. A model that the gate refuses in both dtypes is not counted; the column then has the error of transformers, too.

| model type | worst difference | onnxruntime | TensorRT | ops of the dialect | plain ATen ops, or reason of refusal |
|---|---|---|---|---|---|
"""
    return "\n".join([head.strip(), *lines.values()]) + "\n"


def _table_line(outcome: Outcome) -> str:
    if outcome.error is None:
        cells = ["refused", "", "", "", f"`{outcome.code}` {outcome.reason}"]
    else:
        ops = ", ".join(f"{name} {n}" for name, n in outcome.dialect.items())
        engines = {engine.target: str(engine) for engine in outcome.engines}
        by_target = [engines.get(target, "not tried") for target in TARGETS]
        cells = [f"{outcome.error:.0e}", *by_target, ops, "; ".join(outcome.plain)]
    return " | ".join([f"| {outcome.model_type}", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def _compiled(lines: Iterable[str], column: int) -> int:
    """Count the types whose cell in a column begins with an error."""
    return sum(line.split(" | ")[column - 1][:1].isdigit() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
