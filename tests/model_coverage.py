"""Runs the compiler over every causal language model type of transformers, and writes the table of what came of it.

python tests/model_coverage.py --write docs/coverage.md      # all types
python tests/model_coverage.py llama gemma3_text             # some
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from zoo.facts import WRONG_POSITION_IDS
from zoo.tiny import UNBUILDABLE, tiny_model, tiny_model_types

import llmc

MAX_SEQ_LEN = 64
LIMIT = 1e-4  # at logits of order one in float32, where reordered sums differ by 1e-6
SHAPES = ((2, 29), (1, 12), (3, 1))  # none is the one that was captured
# What a user may be told about a model. Any other error is a defect of llmc, not a refusal.
REFUSALS = frozenset(
    "CAPTURE_SPECIALIZED CAPTURE_DATA_DEPENDENT CAPTURE_FAILED MASK_UNKNOWN EXPERTS_UNKNOWN NOT_BUILDABLE".split()
)


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

    @property
    def captured(self) -> bool:
        return self.error is not None and self.error <= LIMIT

    @property
    def refused(self) -> bool:
        return self.code in REFUSALS


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


def cover(model_type: str) -> Outcome:
    """Capture the tiny model of a type, bring it to the canonical stage and compare it with eager."""
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
    with Pool(options.jobs, initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=20) as pool:
        for outcome in pool.imap(_cover_safely, types):
            outcomes.append(outcome)
            shown = f"{outcome.error:.1e}" if outcome.error is not None else f"{outcome.code}: {outcome.reason}"
            print(f"{outcome.model_type:28} {outcome.seconds:5.1f} s  {shown}", flush=True)
    captured = [o for o in outcomes if o.captured]
    refused = [o for o in outcomes if o.refused]
    wrong = len(outcomes) - len(captured) - len(refused)
    print(f"{len(captured)} captured, canonical and equal to eager; {len(refused)} refused; {wrong} wrong")
    if options.write:
        page = options.write.read_text() if options.types and options.write.exists() else ""
        options.write.write_text(table(outcomes, page))
    return 1 if wrong else 0


def _cover_safely(model_type: str) -> Outcome:
    transformers.logging.set_verbosity_error()
    try:
        return cover(model_type)
    except Exception as error:  # one broken type must not hide the others; it counts as wrong
        return Outcome(model_type, code="CRASHED", reason=f"{type(error).__name__}: {str(error).splitlines()[:1]}")


def table(outcomes: Sequence[Outcome], page: str = "") -> str:
    """The coverage page; rows of `page` for other types are kept."""
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    rows |= {outcome.model_type: _row(outcome) for outcome in outcomes}
    rows = {name: rows[name] for name in sorted(rows) if name in tiny_model_types()}
    refused = sum("| refused |" in row for row in rows.values())
    head = f"""
# Coverage

Made by `make coverage` (`python tests/model_coverage.py --write docs/coverage.md`). Each causal language model type of
transformers {transformers.__version__}, with a tiny random config of its own config class, is captured, brought to the
canonical stage and compared with eager at {len(SHAPES)} shapes other than the captured one (float32, limit {LIMIT:g}
absolute at the logits, which are of order one); or it is refused, with the code and the reason that a user sees.

{len(rows) - refused} of {len(rows)} types are captured, canonical and equal to eager; {refused} are refused.

| model type | worst difference | ops of the dialect | left as plain ATen, or why it is refused |
|---|---|---|---|
"""
    return "\n".join([head.strip(), *rows.values()]) + "\n"


def _row(outcome: Outcome) -> str:
    if outcome.error is None:
        cells = ["refused", "", f"`{outcome.code}` {outcome.reason}"]
    else:
        ops = ", ".join(f"{name} {n}" for name, n in outcome.dialect.items())
        cells = [f"{outcome.error:.0e}", ops, "; ".join(outcome.plain)]
    return " | ".join([f"| {outcome.model_type}", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


if __name__ == "__main__":
    sys.exit(main())
