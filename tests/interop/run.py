"""Check that other runtimes generate the same greedy tokens as llmc for the demo.

`make interop` runs it. transformers runs the original model in this environment. The other runtimes run the artifact's
folder, each in its own environment under .cache/interop, with the pins of its requirements file next to this script.
lm-eval evaluates both the artifact and the model.
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
# The runtimes to compare for each scheme. Optimum needs growing caches, which the fp32 artifact has.
CASES = {"fp32": ("transformers", "genai", "optimum"), "int8": ("genai",), "int4": ("genai",)}


def main() -> int:
    CACHE.mkdir(parents=True, exist_ok=True)
    failed = []
    for scheme, runtimes in CASES.items():
        folder = CACHE / f"demo-{scheme}"
        llmc.compile("demo", folder, quantize=None if scheme == "fp32" else scheme, max_seq_len=256)
        llm = llmc.LLM(folder)
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        expected = greedy(llm, prompts)
        for runtime in runtimes:
            got = other_greedy(runtime, demo_path() if runtime == "transformers" else folder, prompts)
            equal = [ours == theirs for ours, theirs in zip(expected, got, strict=True)]
            print(
                f"{scheme:5} {runtime:13} the same {COUNT} tokens for {sum(equal)} of {len(equal)} prompts", flush=True
            )
            for prompt, ours, theirs in zip(PROMPTS, expected, got, strict=True):
                if ours != theirs:
                    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                    failed.append(f"{scheme} in {runtime}: {prompt!r} differs, first at token {first + 1}")
    failed += differing_answers(CACHE / "demo-fp32", demo_path())
    for line in failed:
        print(line)
    return 1 if failed else 0


def greedy(llm: llmc.LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Generate with llmc.

    End-of-text tokens are suppressed, as the minimum length does in the other runtimes.
    """
    no_eos = dict.fromkeys(llm.tokenizer.eos_ids, -1e9)
    params = llmc.SamplingParams(max_tokens=COUNT, logit_bias=no_eos)
    return [list(llm.generate(prompt, params)[0].token_ids) for prompt in prompts]


def other_greedy(runtime: str, model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Generate with another runtime."""
    return output_of(runtime, model, json.dumps(prompts), str(COUNT))


def differing_answers(folder: Path, model: Path) -> list[str]:
    """List the lm-eval answers in which an artifact differs from its model."""
    pairs = list(zip(*output_of("lm_eval", folder, model), strict=True))
    different = [
        f"lm_eval: {ours} of the artifact, {theirs} of the model" for ours, theirs in pairs if not same(ours, theirs)
    ]
    print(
        f"fp32  lm_eval       the same answers to {len(pairs) - len(different)} of {len(pairs)} questions", flush=True
    )
    return different


def same(ours: Any, theirs: Any) -> bool:
    """True if two answers agree.

    An answer is a text, a log probability, or a log probability with a flag for the likeliest.
    """
    if isinstance(ours, list):
        return ours[1] == theirs[1] and same(ours[0], theirs[0])
    return ours == theirs if isinstance(ours, str) else abs(ours - theirs) < 1e-3


def output_of(runtime: str, *arguments: str | Path) -> Any:
    """Run a runtime's script and parse the last line that it prints."""
    process = subprocess.run(
        [environment(runtime), HERE / f"with_{runtime}.py", *arguments], capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(f"{runtime} can't run {arguments[0]}:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def environment(runtime: str) -> Path:
    """The interpreter of a runtime's environment, created if needed.

    Without a requirements file, this one.
    """
    requirements = HERE / f"{runtime}.txt"
    if not requirements.exists():
        return Path(sys.executable)
    folder = CACHE / "envs" / runtime
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists() or ready.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # Run in this folder: one requirements file refers to this checkout by a relative path.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True, cwd=HERE)
        ready.write_text(requirements.read_text())
    return python


if __name__ == "__main__":
    sys.exit(main())
