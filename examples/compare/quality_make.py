"""From one model, the files of each candidate, and what it took to make them.

CACHE/models/MODEL/llmc/FORMAT       what `llmc compile` makes with the candidate's flags
CACHE/models/MODEL/logits/genai-...  the same weights in a graph that gives all logits: the fastest gives the last
CACHE/models/MODEL/...               all else lies where prepare.py puts it
NAME.cost.json                       beside each folder: seconds and memory
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

# The files that hold graph and weights, as each engine's peer_*.py names them.
_WEIGHTS = {"llmc": "*.onnx*", "llama": "model.gguf", "genai": "model.onnx*"}


@dataclass(frozen=True)
class Made:
    """A candidate's files.

    Attributes:
        folder: all that its engine needs to run.
        measured: what gives the logits of all tokens; mostly the same folder.
        cost: None where it wasn't quality.py that made it.
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
        return sum(path.stat().st_size for path in self.folder.glob(_WEIGHTS[self.engine]))


def make(candidate: Candidate, model: str, cache: Path, quiet: bool) -> Made:
    """A candidate's files, made and timed where they aren't there yet: on a quiet machine, if asked for.

    Raises:
        RuntimeError: what its converter or its environment says.
    """
    home = cache / "models" / model
    hf, engine, format = home / "hf", candidate.engine, candidate.format
    with _failing():
        python = python_of(engine, cache)
    if engine == "llmc":
        folder = home / "llmc" / format
        key = hashlib.sha256(f"{prepare._key('llmc')} {candidate.flags}".encode()).hexdigest()
        cost = _timed(folder, key, quiet, lambda out: _compile(python, candidate.flags, hf, out))
        return Made(engine, folder, folder, cost)

    def recipe(out: Path) -> None:
        prepare._RECIPES[engine](python, format, hf, out)

    key = prepare._key(engine)
    if engine == "llama":
        written = _timed(home / "gguf", "", quiet, lambda out: _write_gguf(hf, out))
        cost = _timed(home / candidate.name, key, quiet, recipe)
        return Made(engine, home / candidate.name, home / candidate.name, written and cost and written + cost)
    cost = _timed(home / candidate.name, key, quiet, recipe)
    with _failing():
        full = prepare._make(home / "logits" / candidate.name, lambda out: _all_logits(python, format, hf, out), key)
    return Made(engine, home / candidate.name, full, cost)


def parameters(hf: Path) -> int:
    """The numbers in a model's safetensors file, where a matrix that two layers share stands once."""
    with (hf / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _timed(folder: Path, key: str, quiet: bool, write: Callable[[Path], Any]) -> Cost | None:
    """Make a folder if it isn't there, and say what it took, now or when it was made.

    What `write` returns is the report of the compiler itself, if it has one.
    """
    stamp, costs = (folder.with_name(f"{folder.name}.{kind}") for kind in ("key", "cost.json"))
    if folder.exists() and stamp.exists() and stamp.read_text() == key:
        return Cost(**json.loads(costs.read_text())) if costs.exists() else None
    costs.unlink(missing_ok=True)  # of what was there before
    if quiet:
        wait_until_quiet()
    report: list[Any] = []
    with Watch() as watch, _failing():
        prepare._make(folder, lambda out: report.append(write(out)), key)
    cost = Cost(watch.seconds, watch.peak_bytes, quiet, report[0])
    costs.write_text(json.dumps(asdict(cost)))
    return cost


@contextmanager
def _failing() -> Iterator[None]:
    """What ends prepare.py, which stops at the first error, is here one candidate's."""
    try:
        yield
    except (SystemExit, subprocess.CalledProcessError) as error:
        raise RuntimeError(str(error)) from None


def _compile(python: Path, flags: tuple[str, ...], hf: Path, out: Path) -> dict[str, Any]:
    """Run `llmc compile`; its report is seconds and peak memory of each phase."""
    main = "from llmc.compiler.cli.main import main; main()"
    options = [*flags, f"--max-seq-len={prepare.LLMC_MAX_SEQ_LEN}", "--json"]
    command = [str(part) for part in (python, "-c", main, "compile", hf, "-o", out, *options)]
    # The llmc that measures is the one that compiles, installed or not.
    paths = [str(Path(llmc.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    document = json.loads(done.stdout or "{}")
    if error := document.get("error"):
        raise RuntimeError(f"{error['code']}: {error['what']}")
    if done.returncode:
        raise RuntimeError(f"{done.stderr[-4000:]}\nfailed with status {done.returncode}: {' '.join(command)}")
    return document["report"]


def _write_gguf(hf: Path, out: Path) -> None:
    prepare._python(Path(sys.executable), "-c", prepare._WRITE_GGUF, hf, out)


def _all_logits(python: Path, format: str, hf: Path, out: Path) -> None:
    """As prepare.py has it made, but for logits of the last token alone."""
    work = out.with_name(f"{out.name}-work")
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", out, "-p", format, "-e", "cpu", "-c", work]
    prepare._python(python, *builder, "--extra_options", "accuracy_level=4")
    shutil.rmtree(work, ignore_errors=True)
