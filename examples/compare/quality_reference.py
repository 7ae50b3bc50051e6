"""Evaluate piped engines as `llmc eval` does.

All engines have the same windows and the same reference logits.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from environments import HERE, requirements
from prepare import LLMC_MAX_SEQ_LEN
from protocol import WORKLOAD
from quality_pipe import PipedEngine

import llmc
from llmc.runtimes.artifact.hashing import sha256_all
from llmc.runtimes.generate.tokenizer import Tokenizer
from llmc.runtimes.measure.evaluate import ReferencePredictions, evaluate
from llmc.runtimes.measure.texts import read_text
from llmc.runtimes.measure.windows import Window, cut_windows, opening

PACKAGE = Path(llmc.__file__).parent
# Sources that every measurement depends on, for any engine.
_EVALUATION_SOURCES = [
    HERE / "quality_pipe.py",
    *(PACKAGE / "runtimes" / "measure" / f"{name}.py" for name in ("evaluate", "windows", "texts")),
    PACKAGE / "runtimes" / "generate" / "tokenizer.py",
    PACKAGE / "compiler" / "gate" / "reference_logits.py",
]


class ReferenceLogits:
    """Windows of a text, with the model's reference logits.

    Attributes:
        hf: the folder of the model.
        text: the text with its source and hash.
        windows: the windows that every engine runs.
        scored: number of scored tokens in all windows.
        capacity: number of tokens of the longest window.
    """

    def __init__(self, hf: Path, text: str, max_tokens: int) -> None:
        self.hf = hf
        self.text = read_text(text)
        tokenizer = Tokenizer(hf)
        tokens = tokenizer.encode(self.text.content, add_special_tokens=False)[:max_tokens]
        self.windows = cut_windows(tokens, LLMC_MAX_SEQ_LEN, opening=opening(tokenizer))
        self.scored = sum(len(window.targets) for window in self.windows)
        self.capacity = max(len(window.tokens) for window in self.windows)

    @cached_property
    def predictions(self) -> ReferencePredictions:
        """Reference logits of all windows, computed on first use."""
        from llmc.compiler.gate.reference_logits import reference_of  # imports torch, so only if needed

        vocab_size = json.loads((self.hf.parent / WORKLOAD).read_text())["vocab_size"]
        return reference_of(str(self.hf), self.windows, vocab_size, watch=progress("the model itself"))

    def measured(self, name: str, fingerprint: str, results: Path, command: list[str | Path]) -> dict[str, Any]:
        """Measure an engine, or read its stored measurement.

        Returns the document of `llmc eval --json`, with `version` and `date` added.

        Args:
            name: name of the candidate.
            fingerprint: hash of the engine and its files.
            results: folder for stored measurements.
            command: starts the engine.
        """
        path = results / f"{name}-{self._key(fingerprint)}.json"
        if not path.exists():
            predictions = self.predictions
            with PipedEngine([*command, f"--capacity={self.capacity}"], self.capacity) as engine:
                measured = evaluate(engine, self.windows, predictions, progress(name)).as_dict()
                document = measured | {"version": engine.version, "date": datetime.date.today().isoformat()}
            write_atomically(path, json.dumps(document, indent=2))
        return json.loads(path.read_text())

    def _key(self, fingerprint: str) -> str:
        digest = hashlib.sha256(f"{fingerprint} {folder_digest(self.hf)}".encode())
        for path in _EVALUATION_SOURCES:
            digest.update(path.read_bytes())
        digest.update(windows_digest(self.windows))
        return digest.hexdigest()[:16]


def windows_digest(windows: Iterable[Window]) -> bytes:
    """Hash the windows' tokens and the first scored token of each."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.first} {window.tokens.tolist()}".encode())
    return digest.digest()


def fingerprint(engine: str, folder: Path, scripts: Iterable[str]) -> str:
    """Hash an engine's files, its code and the scripts that run it.

    The code is given by pinned versions, or for llmc by the sources of its runtime.
    """
    code = sorted((PACKAGE / "runtimes").rglob("*.py")) if engine == "llmc" else requirements(engine)
    digest = hashlib.sha256(folder_digest(folder).encode())
    for path in [*code, *(HERE / script for script in scripts)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@lru_cache
def folder_digest(folder: Path) -> str:
    """Hash the names and contents of a folder's files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in paths]
    return hashlib.sha256(json.dumps([names, sha256_all(paths)]).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it.

    An existing file is therefore always complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def progress(name: str) -> Callable[[str, int, int], None]:
    """Return a callback that prints the progress of a measurement to stderr.

    It prints a line for each quarter.
    """

    def watch(phase: str, done: int, total: int) -> None:
        if total and done * 4 // total != (done - 1) * 4 // total:
            print(f"{name}: {done} of {total} windows", file=sys.stderr, flush=True)

    return watch
