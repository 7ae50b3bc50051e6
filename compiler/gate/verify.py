"""The gate: no artifact exists that was not held against the model itself, in its real runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import CheckFailedError, CompilerError, LlmcError
from ...runtimes.measure.selfcheck import Check, GateReference, GateReport, check, limits_row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...ir.program import Program
    from ..frontend.sources import ModelSource

# Prompts of a batch, and how many tokens follow each one by one.
PROMPTS = (7, 26, 70)
STEPS = 12
# Of a model that has a tokenizer the prompts are pieces of this.
TEXT = (
    "A compiler reads a program that says what should happen and writes one that says how. In between it must not "
    "change the meaning, which is harder than it sounds: additions of numbers with a fixed number of digits are not "
    "associative, a table that is read may be written later, and the order in which two threads arrive is nobody's "
    "promise. So a careful compiler checks itself. It keeps the slow and simple program beside the fast one, feeds "
    "both the same questions, and compares the answers before it lets the fast one out of the door. Everything else, "
    "from the choice of registers to the last trick with the cache, is only worth having if that comparison holds."
)
# Places of the vocabulary that are compared for each token: the most probable, and as many spread over the rest.
TOP, SPREAD = 32, 32


def make_reference(
    source: ModelSource, module: nn.Module, program: Program, *, precision: str, rounded: Program | None = None
) -> GateReference:
    """What the model gives, by its own code, for fixed sequences.

    Args:
        program: made from the model; says how long sequences and how wide logits are.
        rounded: the program over what is rounded alike, without a cache.
    """
    import torch

    from ..frontend.eager import eager_logits

    steps = min(STEPS, program.max_seq_len // 2)
    prompts = [min(size, program.max_seq_len - steps) for size in PROMPTS]
    tokens = _sequences(source, [size + steps for size in prompts], int(program.output.meta["val"].shape[-1]))
    logits = eager_logits(module, source.weights(module), tokens)
    if not torch.isfinite(logits).all():
        raise LlmcError(
            "MODEL_NOT_FINITE", "The model itself gives NaN or infinite logits.", "Check the checkpoint's weights."
        )
    ids = _places(logits)
    wanted = logits.gather(2, ids)
    del logits
    other = torch.zeros(0)
    if rounded is not None:
        positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
        other = rounded(tokens, positions).gather(2, ids)
    return GateReference(
        precision=np.array(precision),
        tokens=tokens.numpy(),
        prompts=np.array(prompts),
        steps=np.array(steps),
        ids=ids.numpy(),
        logits=wanted.numpy(),
        rounded=other.numpy(),
    )


def _sequences(source: ModelSource, lengths: list[int], vocab_size: int) -> Tensor:
    """Rows of these lengths, filled up with zeros: English where the model has a tokenizer, random tokens where not."""
    import torch

    try:
        text = torch.tensor(source.tokenizer()(TEXT)["input_ids"])
    except Exception:  # there is none, or one that can't read English; each kind has errors of its own
        text = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    text = text.repeat(1 + sum(lengths) // len(text))
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, piece in enumerate(text[: sum(lengths)].split(lengths)):
        tokens[row, : lengths[row]] = piece
    return tokens


def _places(logits: Tensor) -> Tensor:
    import torch

    vocab_size = logits.shape[2]
    top = logits.topk(min(TOP, vocab_size), dim=2).indices
    spread = torch.linspace(0, vocab_size - 1, min(SPREAD, vocab_size)).long()
    return torch.cat((top, spread.expand(*top.shape[:2], -1)), 2)


@dataclass(frozen=True)
class Verdict:
    """What a process of its own found, and the memory that it took."""

    report: GateReport
    peak_rss_bytes: int


def check_apart(folder: Path) -> Verdict:
    """Check an artifact in a fresh process, which loads it as production would: without the compiler, without torch."""
    child = [sys.executable, "-m", "llmc.runtimes.measure.selfcheck", str(folder.resolve())]
    # Not from here: a folder called llmc beside the user would be taken for the package.
    run = subprocess.run(child, capture_output=True, text=True, cwd=folder, env=os.environ | _where_llmc_is())
    try:
        found = json.loads(run.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        what = (run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"])[-1]
        raise CompilerError(
            "GATE_BROKEN", f"The artifact broke the process that ran it: {what}", "Report the model; this is a defect."
        ) from None
    if error := found.get("error"):
        raise LlmcError(error["code"], error["what"], error["hint"])
    checks = [Check(c["name"], c["measured"], c["limit"]) for c in found["checks"]]
    return Verdict(GateReport(found["precision"], found["tokens"], checks), found["peak_rss_bytes"])


def _where_llmc_is() -> dict[str, str]:
    """The import path of this process, so that the child finds the same packages."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def verify(folder: str | Path, model: str | Path | nn.Module | None = None) -> GateReport:
    """The gate, again, on this machine.

    Args:
        model: what the artifact was compiled from, to make the reference anew; else the one that it carries serves.
    """
    from ...runtimes.engines.load import load

    folder = Path(folder)
    engine = load(folder)
    if model is None:
        return check(engine, GateReference.read(folder))
    return check(engine, _reference_of(model, engine))


def _reference_of(model: Any, engine: Any) -> GateReference:
    import torch

    from ...ir.stages import Stage
    from ..api import capture
    from ..frontend.sources import find_source

    source = find_source(model)
    program = capture(model, max_seq_len=engine.max_seq_len, until=Stage.CAPTURED)
    precision = (engine.manifest.quantization or {}).get("precision", "fp32")
    rounded_cache = next((cache.dtype for cache in engine.manifest.caches if cache.scales), None)
    row = limits_row(precision, engine.manifest.pruning is not None, rounded_cache)
    return make_reference(source, source.build(torch.float32), program, precision=row)


def gate_failed(report: GateReport, culprit: str) -> LlmcError:
    """The refusal of an artifact that failed a check."""
    failed = [check for check in report.checks if not check.ok]
    found = "; ".join(f"{c.name}: {c.measured:g}, the limit is {c.limit:g}" for c in failed)
    return CheckFailedError(
        "GATE_FAILED",
        f"The artifact differs from the model by more than {report.precision} explains: {found}. {culprit}",
        "Nothing was written. Report the model with this message; LLMC_FUEL=n finds the one rewrite of a pass.",
    )
