"""The gate: every artifact is compared with the model itself, in its real runtime, before it may exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...error_codes import make_error
from ...errors import CheckFailedError, CompilerError
from ...runtimes.artifact.manifest import Manifest
from ...runtimes.artifact.open import open_artifact, read_manifest
from ...runtimes.engines.base import Engine
from ...runtimes.engines.load import load
from ...runtimes.engines.selfcheck import Check, GateReference, GateReport, check, limits_key
from ...runtimes.measure.selfcheck import find
from ..targets.base import Target
from ..targets.registry import find_target, target_names

if TYPE_CHECKING:
    from torch import nn

    from .bisect import FaultyPass


@dataclass(frozen=True)
class Verdict:
    """The report of a process of its own, and the memory that it took."""

    report: GateReport
    peak_rss_bytes: int


def check_in_new_process(folder: Path, opener: str | None = None) -> Verdict:
    """Check an artifact in a fresh process, which loads it as production would: without torch.

    Args:
        opener: the function that opens it; see `Target.gate_opener`.

    Raises:
        CompilerError: GATE_BROKEN if the process dies; what the process itself refuses.
    """
    given = [str(folder.resolve()), *([opener] if opener else [])]
    child = [sys.executable, "-m", "llmc.runtimes.measure.selfcheck", *given]
    # Not in the current folder: a folder called llmc there would be taken for the package.
    run = subprocess.run(child, capture_output=True, text=True, cwd=folder, env=os.environ | _import_path())
    try:
        found = json.loads(run.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        what = (run.stderr.strip().splitlines() or [f"it ended with status {run.returncode}"])[-1]
        raise CompilerError(
            "GATE_BROKEN", f"The artifact broke the process that ran it: {what}", "Report the model; this is a defect."
        ) from None
    if error := found.get("error"):
        raise make_error(error["code"], error["what"], error["hint"])
    checks = [Check(c["name"], c["measured"], c["limit"]) for c in found["checks"]]
    return Verdict(GateReport(found["precision"], found["tokens"], checks), found["peak_rss_bytes"])


def _import_path() -> dict[str, str]:
    """Return this process's import path, so that the child finds the same packages."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def verify(folder: str | Path, model: str | Path | nn.Module | None = None) -> GateReport:
    """Run the gate again, on this machine: with the artifact's engine, or as it was compiled where that can't run.

    Args:
        model: what the artifact was compiled from, to make the reference anew; by default the artifact's own is used.
    """
    folder = Path(folder)
    engine = open_checked(folder)
    reference = GateReference.read(folder) if model is None else _new_reference(model, folder)
    return check(engine, reference)


def open_checked(folder: Path) -> Engine:
    """Open what checks run on: the artifact's engine, or its graph on a machine that lacks what the engine needs."""
    manifest = read_manifest(folder)
    target = _target_of(manifest)
    opener = None if target is None else target.gate_opener_for(manifest)
    if opener is not None and why_not_engine(folder):
        return find(opener)(folder)
    return load(folder, check_device=False)  # the same check follows, whose result is shown


def why_not_engine(folder: Path) -> str | None:
    """Return why `verify` checks an artifact's graph and not its engine on this machine; None: it checks the engine."""
    manifest = read_manifest(folder)
    target = _target_of(manifest)
    if target is None or target.gate_opener_for(manifest) is None:
        return None
    return target.missing_for(manifest)


def _target_of(manifest: Manifest) -> Target | None:
    """Return an artifact's target; None for one that this llmc doesn't know, which no engine serves either."""
    return find_target(manifest.target) if manifest.target in target_names() else None


def _new_reference(model: Any, folder: Path) -> GateReference:
    import torch

    from ..frontend.from_source import program_of
    from ..frontend.sources import find_source
    from .reference import make_reference

    manifest = open_artifact(folder, check_files=False)
    source = find_source(model)
    module = source.build(torch.float32)
    program = program_of(source, module, manifest.max_seq_len)
    key = limits_key(manifest.precision, manifest.pruning is not None, manifest.cache_codes)
    return make_reference(source, module, program, precision=key)


def gate_failed(report: GateReport, found: FaultyPass | None) -> CheckFailedError:
    """Return the refusal of an artifact that failed a check.

    Args:
        found: the pass at fault, if it is a pass.
    """
    failed = [check for check in report.checks if not check.ok]
    measured = "; ".join(f"{c.name}: {c.measured:g}, the limit is {c.limit:g}" for c in failed)
    culprit = f"{found}." if found else "Every pass keeps the numbers: the lowering or the runtime changes them."
    return CheckFailedError(
        "GATE_FAILED",
        f"The artifact differs from the model by more than {report.precision} explains: {measured}. {culprit}",
        "Nothing was written. Report the model with this message; LLMC_FUEL=n finds the one rewrite of a pass.",
    )
