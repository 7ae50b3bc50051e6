"""Measure the speed of a table's candidates in rounds.

Results are stored on disk, so that a run can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from quality_reference import write_atomically


@dataclass(frozen=True)
class Workload:
    """The options of `peer_*.py`."""

    prompt: int
    tokens: int
    threads: int
    repeats: int

    def options(self) -> list[str]:
        """The command-line arguments."""
        return [f"--{name}={value}" for name, value in vars(self).items()]


def graphs_of(folder: Path) -> str:
    """Hash an artifact's graphs without their weights' values."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        for node in graph.node:
            digest.update(node.SerializeToString(deterministic=True))
        for weight in graph.initializer:
            digest.update(repr((weight.name, weight.data_type, list(weight.dims))).encode())
    return digest.hexdigest()[:16]


def speed_key(parts: Mapping[str, str], workload: Workload, quiet: bool) -> str:
    """Hash the candidates and conditions of a run.

    These are names and contents, the workload, and if the machine was quiet.

    Speeds are compared only within one run, under the same conditions. Another set of candidates is another run.
    """
    return hashlib.sha256(json.dumps([sorted(parts.items()), vars(workload), quiet]).encode()).hexdigest()[:16]


def run_rounds(
    names: Sequence[str],
    rounds: int,
    log: Path,
    measure: Callable[[str], dict[str, Any]],
    failed: Callable[[str, Exception], None],
) -> dict[str, list[dict[str, Any]]]:
    """Run the engines in turns (A B C A B C).

    Return the results of those that finished all rounds. Rounds that are in the log are not run again. An engine that
    fails is not run again, either.

    Args:
        names: the engines.
        rounds: number of rounds.
        log: file for the results.
        measure: runs one engine once.
        failed: called with the name and the error of an engine that fails.
    """
    entries = json.loads(log.read_text()) if log.exists() else []
    finished = {(entry["name"], entry["round"]): entry["result"] for entry in entries}
    broken: set[str] = set()
    for number in range(rounds):
        for name in names:
            if (name, number) in finished or name in broken:
                continue
            try:
                result = measure(name)
            except RuntimeError as error:
                broken.add(name)
                failed(name, error)
                continue
            finished[name, number] = result
            entries.append({"name": name, "round": number, "result": result})
            write_atomically(log, json.dumps(entries, indent=2))
    by_name = {
        name: [finished[name, number] for number in range(rounds) if (name, number) in finished] for name in names
    }
    return {name: results for name, results in by_name.items() if len(results) == rounds}
