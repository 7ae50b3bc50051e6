"""Runs the compiler over every causal language model type of transformers, and writes the table of what came of it.

python tests/model_coverage.py --write docs/coverage.md      # all types
python tests/model_coverage.py llama gemma3_text             # some
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from llmc.runtimes.measure.selfcheck import LIMITS

MAX_SEQ_LEN = 64
LIMIT = 1e-4  # at logits of order one in float32, where reordered sums differ by 1e-6
SHAPES = ((2, 29), (1, 12), (3, 1))  # none is the one that was captured
# What has other state than keys and values, or looks ahead.
ENGINE_REFUSALS = frozenset({"CACHE_IMPOSSIBLE"})
# What a user may be told about a model. Any other error is a defect of llmc, not a refusal.
REFUSALS = frozenset(
    "CAPTURE_SPECIALIZED CAPTURE_DATA_DEPENDENT CAPTURE_FAILED MASK_UNKNOWN EXPERTS_UNKNOWN NOT_BUILDABLE".split()
)


@dataclass(frozen=True)
class Engine:
    """What came of compiling for ONNX Runtime: the gate's worst error, or a refusal."""

    error: float | None = None
    code: str = ""
    reason: str = ""

    @property
    def right(self) -> bool:
        if self.error is None:
            return self.code in ENGINE_REFUSALS
        return self.error <= LIMITS["fp32"].model


@dataclass(frozen=True)
class Outcome:
    """What came of one model type: an error against eager, or a refusal."""

    model_type: str
    error: float | None = None  # worst absolute difference of logits over all shapes
    code: str = ""
    reason: str = ""
    dialect: dict[str, int] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    seconds: float = 0.0
    engine: Engine | None = None

    @property
    def captured(self) -> bool:
        return self.error is not None and self.error <= LIMIT

    @property
    def refused(self) -> bool:
        return self.code in REFUSALS

    @property
    def right(self) -> bool:
        """Captured and compiled, or refused, each for a reason that a user may be told."""
        return self.refused or (self.captured and (self.engine is None or self.engine.right))


def eager_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What transformers itself computes, positions given as the program gets them."""
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
    """The worst absolute difference of logits between program and eager over some shapes."""
    worst = 0.0
    for shape in shapes:
        tokens = torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(sum(shape)))
        got, want = program(tokens, positions_of(tokens)), eager_logits(model, tokens)
        if got.shape != want.shape or not torch.isfinite(got).all():
            return float("inf")
        worst = max(worst, (got - want).abs().max().item())
    return worst


def compile_and_check(model: PreTrainedModel, **options: str) -> Engine:
    """Compile a model and run the gate on what came out: whole prompts, a ragged batch of three, pieces."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        try:
            llmc.compile(model, path, max_seq_len=MAX_SEQ_LEN, verify=False, **options)
        except llmc.LlmcError as error:
            return Engine(code=error.code, reason=error.what)
        return Engine(error=max(check.measured for check in verify(path, model).checks))


def cover(model_type: str, engine: bool = False) -> Outcome:
    """Capture the tiny model of a type, bring it to the canonical stage and compare it with eager.

    Args:
        engine: compile it for ONNX Runtime, too.
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
        engine=compile_and_check(model) if engine else None,
        seconds=time.perf_counter() - start,
    )


def leftovers(program: llmc.Program) -> list[str]:
    """What the canonicalizing passes saw and left alone, with their reasons: op by op in plain ATen."""
    found = Counter(f"{record.name}: {m.reason}" for record in program.history for m in record.misses)
    return [f"{reason} ({n})" for reason, n in sorted(found.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="the table to write, as Markdown")
    options = parser.parse_args()
    types = options.types or tiny_model_types()
    outcomes = []
    with Pool(options.jobs, initializer=_take_a_core, initargs=(Value("i", 0),), maxtasksperchild=20) as pool:
        for outcome in pool.imap(_cover_safely, types):
            outcomes.append(outcome)
            shown = f"{outcome.error:.1e}" if outcome.error is not None else f"{outcome.code}: {outcome.reason}"
            if made := outcome.engine:
                shown += f"  ort {made.error:.1e}" if made.error is not None else f"  ort {made.code}: {made.reason}"
            print(f"{outcome.model_type:28} {outcome.seconds:5.1f} s  {shown}", flush=True)
    captured = [o for o in outcomes if o.captured]
    refused = [o for o in outcomes if o.refused]
    compiled = [o for o in captured if o.engine and o.engine.error is not None and o.engine.right]
    wrong = [o.model_type for o in outcomes if not o.right]
    print(f"{len(captured)} captured, canonical and equal to eager; {len(refused)} refused; {len(compiled)} compiled")
    print(f"wrong: {', '.join(wrong) or 'none'}")
    if options.write:
        page = options.write.read_text() if options.types and options.write.exists() else ""
        options.write.write_text(table(outcomes, page))
    return 1 if wrong else 0


def _take_a_core(taken: Any) -> None:
    """Keep this worker's threads, torch's and ONNX Runtime's, on one core: more would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    with taken.get_lock():
        os.sched_setaffinity(0, {cores[taken.value % len(cores)]})
        taken.value += 1
    torch.set_num_threads(1)


def _cover_safely(model_type: str) -> Outcome:
    transformers.logging.set_verbosity_error()
    try:
        return cover(model_type, engine=True)
    except Exception as error:  # one broken type must not hide the others; it counts as wrong
        return Outcome(model_type, code="CRASHED", reason=f"{type(error).__name__}: {str(error).splitlines()[:1]}")


def table(outcomes: Sequence[Outcome], page: str = "") -> str:
    """The coverage page; rows of `page` for other types are kept."""
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    rows |= {outcome.model_type: _row(outcome) for outcome in outcomes}
    rows = {name: rows[name] for name in sorted(rows) if name in tiny_model_types()}
    refused = sum("| refused |" in row for row in rows.values())
    compiled = sum("CACHE_IMPOSSIBLE" not in row for row in rows.values()) - refused
    head = f"""
# Coverage

Made by `make coverage` (`python tests/model_coverage.py --write docs/coverage.md`). Each causal language model type of
transformers {transformers.__version__}, with a tiny random config of its own config class, is captured, brought to the
canonical stage and compared with eager at {len(SHAPES)} shapes other than the captured one (float32, limit {LIMIT:g}
absolute at the logits, which are of order one); or it is refused, with the code and the reason that a user sees.

{len(rows) - refused} of {len(rows)} types are captured, canonical and equal to eager; {refused} are refused.

Each is then compiled for ONNX Runtime in float32 and goes through the gate (whole prompts, a ragged batch of three rows
token by token, a prompt in pieces; `max_seq_len` {MAX_SEQ_LEN}): the column has the worst error, relative to the
logits' spread, limit {LIMITS["fp32"].model:g}. {compiled} types compile; the others keep more than keys and values
between calls, or look ahead, and are refused with `CACHE_IMPOSSIBLE`.

| model type | worst difference | onnxruntime | ops of the dialect | left as plain ATen, or why it is refused |
|---|---|---|---|---|
"""
    return "\n".join([head.strip(), *rows.values()]) + "\n"


def _row(outcome: Outcome) -> str:
    if outcome.error is None:
        cells = ["refused", "", "", f"`{outcome.code}` {outcome.reason}"]
    else:
        ops = ", ".join(f"{name} {n}" for name, n in outcome.dialect.items())
        cells = [f"{outcome.error:.0e}", _engine_cell(outcome.engine), ops, "; ".join(outcome.plain)]
    return " | ".join([f"| {outcome.model_type}", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def _engine_cell(engine: Engine | None) -> str:
    if engine is None:
        return ""
    return f"{engine.error:.0e}" if engine.error is not None else f"`{engine.code}` {engine.reason}"


if __name__ == "__main__":
    sys.exit(main())
