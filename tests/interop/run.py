"""The demo in other runtimes: the same greedy tokens for every prompt. `make interop` runs it.

transformers runs the model that the artifact was made from, in this environment; the others run the artifact's own
folder, each in an environment of its own under .cache/interop, with the pins of its requirements file here. lm-eval
asks the artifact what it asks the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llmc
from llmc.compiler.frontend.demo import demo_path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "interop"
COUNT = 128
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "Dear Sir or Madam,",
    "To make bread you need flour,",
    "1, 2, 3, 4,",
    "The three laws of motion say that",
]
# Scheme of the artifact, and which runtimes it is held against: Optimum drives a graph with caches that grow.
CASES = {"fp32": ("transformers", "genai", "optimum"), "int8": ("genai",), "int4": ("genai",)}


def main() -> int:
    CACHE.mkdir(parents=True, exist_ok=True)
    failed = []
    for scheme, runtimes in CASES.items():
        folder = CACHE / f"demo-{scheme}"
        llmc.compile("demo", folder, quantize=None if scheme == "fp32" else scheme, max_seq_len=256)
        llm = llmc.LLM(folder)
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        wanted = greedy(llm, prompts)
        for runtime in runtimes:
            got = other_greedy(runtime, demo_path() if runtime == "transformers" else folder, prompts)
            same = [mine == other for mine, other in zip(wanted, got, strict=True)]
            print(f"{scheme:5} {runtime:13} the same {COUNT} tokens for {sum(same)} of {len(same)} prompts", flush=True)
            for prompt, mine, other in zip(PROMPTS, wanted, got, strict=True):
                if mine != other:
                    place = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
                    failed.append(f"{scheme} in {runtime}: {prompt!r} goes on differently from token {place + 1} on")
    failed += differing_answers(CACHE / "demo-fp32", demo_path())
    for line in failed:
        print(line)
    return 1 if failed else 0


def greedy(llm: llmc.LLM, prompts: list[list[int]]) -> list[list[int]]:
    """What llmc itself generates; the end of text is kept out, as the others keep it out of what is too short."""
    never = dict.fromkeys(llm.tokenizer.eos_ids, -1e9)
    params = llmc.SamplingParams(max_tokens=COUNT, logit_bias=never)
    return [list(llm.generate(prompt, params)[0].token_ids) for prompt in prompts]


def other_greedy(runtime: str, model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What another runtime generates."""
    return said_by(runtime, model, json.dumps(prompts), str(COUNT))


def differing_answers(folder: Path, model: Path) -> list[str]:
    """Where lm-eval hears another answer from an artifact than from its model."""
    pairs = list(zip(*said_by("lm_eval", folder, model), strict=True))
    different = [f"lm_eval: {mine} of the artifact, {its} of the model" for mine, its in pairs if not same(mine, its)]
    print(
        f"fp32  lm_eval       the same answers to {len(pairs) - len(different)} of {len(pairs)} questions", flush=True
    )
    return different


def same(mine: Any, its: Any) -> bool:
    """A text; a log probability; or one, and whether it is the likeliest."""
    if isinstance(mine, list):
        return mine[1] == its[1] and same(mine[0], its[0])
    return mine == its if isinstance(mine, str) else abs(mine - its) < 1e-3


def said_by(runtime: str, *arguments: str | Path) -> Any:
    """The last line that a runtime's script prints."""
    done = subprocess.run(
        [environment(runtime), HERE / f"with_{runtime}.py", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{runtime} does not run {arguments[0]}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(runtime: str) -> Path:
    """The interpreter with a runtime's pins, made where it is missing; this one where a runtime has none."""
    requirements = HERE / f"{runtime}.txt"
    if not requirements.exists():
        return Path(sys.executable)
    folder = CACHE / "envs" / runtime
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists() or ready.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # From here, for one of them names this checkout.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True, cwd=HERE)
        ready.write_text(requirements.read_text())
    return python


if __name__ == "__main__":
    sys.exit(main())
