"""The artifact in other runtimes: the same folder must give the same greedy tokens there. `make interop` runs it.

Each runtime lives in an environment of its own under .cache/interop, with the pins of its requirements file here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import llmc

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "interop"
PROMPT = [504, 3575, 282, 4649, 314]
COUNT = 32
# Scheme of the artifact, and which runtimes take it: Optimum drives a graph with caches that grow.
CASES = {"fp32": ("genai", "optimum"), "int8": ("genai",), "int4": ("genai",)}


def main() -> int:
    failed = []
    for scheme, runtimes in CASES.items():
        folder = CACHE / f"demo-{scheme}"
        llmc.compile("demo", folder, quantize=None if scheme == "fp32" else scheme, max_seq_len=256)
        wanted = greedy(folder)
        for runtime in runtimes:
            got = other_greedy(runtime, folder)
            print(f"{scheme:5} {runtime:8} {'the same' if got == wanted else f'differs: {got} instead of {wanted}'}")
            if got != wanted:
                failed.append(f"{scheme} in {runtime}")
    return 1 if failed else 0


def greedy(folder: Path) -> list[int]:
    """What llmc itself generates."""
    params = llmc.SamplingParams(max_tokens=COUNT, ignore_eos=True)
    return list(llmc.LLM(folder).generate(PROMPT, params)[0].token_ids)


def other_greedy(runtime: str, folder: Path) -> list[int]:
    """What another runtime generates from the same folder."""
    python = environment(runtime)
    command = [python, HERE / f"with_{runtime}.py", folder, json.dumps(PROMPT), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{runtime} does not run {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(runtime: str) -> Path:
    """The interpreter with a runtime's pins, made where it is missing."""
    folder = CACHE / "envs" / runtime
    python, ready = folder / "bin" / "python", folder / "ready"
    pins = (HERE / f"{runtime}.txt").read_text()
    if not ready.exists() or ready.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", HERE / f"{runtime}.txt"], check=True)
        ready.write_text(pins)
    return python


if __name__ == "__main__":
    sys.exit(main())
