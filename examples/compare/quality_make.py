"""Make the files of each candidate from one model, and measure the cost.

CACHE/models/MODEL/llmc/FORMAT       the artifact of `llmc compile` with the candidate's flags
CACHE/models/MODEL/logits/genai-...  the same weights in a graph that returns all logits; the fastest graph returns only
                                     the last token's
CACHE/models/MODEL/...               the other folders, as prepare.py makes them
NAME.cost.json                       next to each folder: seconds and memory
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prepare
from cost import Cost, Watch
from environments import python_of
from machine import wait_until_quiet
from quality_variants import Candidate

import llmc

# Pattern of the files with graph and weights, as in each engine's peer_*.py.
WEIGHT_FILES = {"llmc": "*.onnx*", "llama": "model.gguf", "genai": "model.onnx*"}


@dataclass(frozen=True)
class Made:
    """A candidate's files.

    Attributes:
        engine: name of the engine.
        folder: the folder that the engine runs.
        measured: the folder with a graph that returns the logits of all tokens; usually the same folder.
        cost: cost of making it; None if quality.py did not make it.
    """

    engine: str
    folder: Path
    measured: Path
    cost: Cost | None

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob(WEIGHT_FILES[self.engine]))


def make(candidate: Candidate, model: str, cache: Path, quiet: bool) -> Made:
    """Return a candidate's files.

    If they don't exist yet, make them and measure the cost.

    Args:
        candidate: the candidate.
        model: name of the model.
        cache: folder for environments and models.
        quiet: wait for a quiet machine before making files.

    Raises:
        RuntimeError: the error message of its converter or environment.
    """
    home = cache / "models" / model
    hf, engine, format = home / "hf", candidate.engine, candidate.format
    with _exit_as_error():
        python = python_of(engine, cache)
    if engine == "llmc":
        folder = home / "llmc" / format
        key = hashlib.sha256(f"{prepare.recipe_key('llmc')} {candidate.flags}".encode()).hexdigest()
        cost = make_timed(folder, key, quiet, lambda out: compile_llmc(python, candidate.flags, hf, out))
        return Made(engine, folder, folder, cost)

    def recipe(out: Path) -> None:
        prepare.RECIPES[engine](python, format, hf, out)

    key = prepare.recipe_key(engine)
    if engine == "llama":
        written = make_timed(home / "gguf", "", quiet, lambda out: _write_gguf(hf, out))
        cost = make_timed(home / candidate.name, key, quiet, recipe)
        return Made(engine, home / candidate.name, home / candidate.name, written and cost and written + cost)
    cost = make_timed(home / candidate.name, key, quiet, recipe)
    with _exit_as_error():
        full = prepare.make_folder(
            home / "logits" / candidate.name, lambda out: _all_logits(python, format, hf, out), key
        )
    return Made(engine, home / candidate.name, full, cost)


def parameters(hf: Path) -> int:
    """Count the values in a model's safetensors file.

    A matrix that two layers share counts once.
    """
    with (hf / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def make_timed(folder: Path, key: str, quiet: bool, write: Callable[[Path], Any]) -> Cost | None:
    """Make a folder if it does not exist, and return the cost, now or earlier.

    The value that `write` returns becomes the cost's report.
    """
    stamp, costs = (folder.with_name(f"{folder.name}.{kind}") for kind in ("key", "cost.json"))
    if folder.exists() and stamp.exists() and stamp.read_text() == key:
        return Cost(**json.loads(costs.read_text())) if costs.exists() else None
    costs.unlink(missing_ok=True)  # it belongs to the previous content
    if quiet:
        wait_until_quiet()
    report: list[Any] = []
    with Watch() as watch, _exit_as_error():
        prepare.make_folder(folder, lambda out: report.append(write(out)), key)
    cost = Cost(watch.seconds, watch.peak_bytes, quiet, report[0])
    costs.write_text(json.dumps(asdict(cost)))
    return cost


@contextmanager
def _exit_as_error() -> Iterator[None]:
    """Turn an exit of prepare.py into an error of one candidate.

    prepare.py stops at the first error.
    """
    try:
        yield
    except (SystemExit, subprocess.CalledProcessError) as error:
        raise RuntimeError(str(error)) from None


def compile_llmc(python: Path, flags: tuple[str, ...], hf: Path, out: Path) -> dict[str, Any]:
    """Run `llmc compile`; its report is seconds and peak memory of each phase."""
    main = "from llmc.compiler.cli.main import main; main()"
    options = [*flags, f"--max-seq-len={prepare.LLMC_MAX_SEQ_LEN}", "--json"]
    command = [str(part) for part in (python, "-c", main, "compile", hf, "-o", out, *options)]
    # Compile with the llmc that also measures, even if another one is installed.
    paths = [str(Path(llmc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    document = json.loads(process.stdout or "{}")
    if error := document.get("error"):
        raise RuntimeError(f"{error['code']}: {error['what']}")
    if process.returncode:
        raise RuntimeError(f"{process.stderr[-4000:]}\nfailed with status {process.returncode}: {' '.join(command)}")
    return document["report"]


def _write_gguf(hf: Path, out: Path) -> None:
    prepare.run_python(Path(sys.executable), "-c", prepare.WRITE_GGUF, hf, out)


def _all_logits(python: Path, format: str, hf: Path, out: Path) -> None:
    """Run prepare.py's builder for a graph with the logits of all tokens."""
    work = out.with_name(f"{out.name}-work")
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", out, "-p", format, "-e", "cpu", "-c", work]
    prepare.run_python(python, *builder, "--extra_options", "accuracy_level=4")
    shutil.rmtree(work, ignore_errors=True)
