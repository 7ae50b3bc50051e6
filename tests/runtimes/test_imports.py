"""An artifact needs its runtime, numpy and a tokenizer to run, and nothing of the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from compiled import artifact

HEAVY = {"torch", "transformers", "onnx", "safetensors", "gguf", "click", "rich", "huggingface_hub", "accelerate"}
OURS = ("llmc.compiler", "llmc.passes", "llmc.kernels")


def imported(code: str, *arguments: str | Path) -> set[str]:
    """Return the names of the modules that a new interpreter has imported after the code."""
    names = "import sys\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{names}", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return set(run.stderr.splitlines())


ANSWER = """
import sys, llmc, llmc.runtimes.measure.selfcheck
llm = llmc.LLM(sys.argv[1])
done = llm.generate("To be, or", llmc.SamplingParams(max_tokens=3, temperature=0.7, seed=1))
assert done[0].text
chat = llm.generate([{"role": "user", "content": "Hello"}], llmc.SamplingParams(max_tokens=20))
assert chat[0].token_ids
"""


def test_an_answer_takes_no_compiler() -> None:
    modules = imported(ANSWER, artifact("speaking", quantize="int4"))
    assert {"onnxruntime", "numpy", "tokenizers", "llmc.runtimes.engines.ort.engine"} <= modules
    assert not {name for name in modules if name.split(".")[0] in HEAVY or name.startswith(OURS)}


def test_the_package_itself_imports_only_its_version() -> None:
    modules = imported("import llmc") - imported("pass")
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) == {"llmc"}
    assert {name for name in modules if name.startswith("llmc.")} == {"llmc.version"}


def test_asyncio_is_imported_when_it_is_used() -> None:
    """It takes as long as a third of the rest."""
    assert "asyncio" not in imported("import llmc; llmc.LLM")
