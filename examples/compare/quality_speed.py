"""How fast the candidates of one table are: rounds over all of them, kept on disk, so that a run can be continued."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from quality_ruler import write_whole


@dataclass(frozen=True)
class Workload:
    """What `peer_*.py` is told."""

    prompt: int
    tokens: int
    threads: int
    repeats: int

    def options(self) -> list[str]:
        return [f"--{name}={value}" for name, value in vars(self).items()]


def graphs_of(folder: Path) -> str:
    """Names what an artifact's graphs compute, whatever numbers they compute with."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False).graph
        for node in graph.node:
            digest.update(node.SerializeToString(deterministic=True))
        for weight in graph.initializer:
            digest.update(repr((weight.name, weight.data_type, list(weight.dims))).encode())
    return digest.hexdigest()[:16]


def speed_key(parts: Mapping[str, str], workload: Workload, quiet: bool) -> str:
    """Names a run: who takes part, by name and content, and under what conditions.

    Engines are compared within a run, where the machine was the same for all: another of them makes it another run.
    """
    return hashlib.sha256(json.dumps([sorted(parts.items()), vars(workload), quiet]).encode()).hexdigest()[:16]


def run_rounds(
    names: Sequence[str],
    rounds: int,
    log: Path,
    measure: Callable[[str], dict[str, Any]],
    failed: Callable[[str, Exception], None],
) -> dict[str, list[dict[str, Any]]]:
    """What each engine's rounds gave, A B C A B C; those that the log holds are not run again, nor those that fail.

    Args:
        measure: runs one engine once.
        failed: told what went wrong, and with whom.
    """
    kept = json.loads(log.read_text()) if log.exists() else []
    done = {(entry["name"], entry["round"]): entry["result"] for entry in kept}
    broken: set[str] = set()
    for number in range(rounds):
        for name in names:
            if (name, number) in done or name in broken:
                continue
            try:
                result = measure(name)
            except RuntimeError as error:
                broken.add(name)
                failed(name, error)
                continue
            done[name, number] = result
            kept.append({"name": name, "round": number, "result": result})
            write_whole(log, json.dumps(kept, indent=2))
    found = {name: [done[name, number] for number in range(rounds) if (name, number) in done] for name in names}
    return {name: results for name, results in found.items() if len(results) == rounds}


def run_peer(command: Sequence[str | Path]) -> dict[str, Any]:
    """The last line that a peer prints."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.stderr[-4000:]}\nfailed with status {done.returncode}: {' '.join(words)}")
    return json.loads(done.stdout.splitlines()[-1])
