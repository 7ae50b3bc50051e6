"""Make the files that each engine runs from one model.

Usage: `python prepare.py --model demo --cache DIR`.

    CACHE/models/MODEL/hf             config, tokenizer and safetensors, from which all other folders are made
    CACHE/models/MODEL/FORMAT         one folder for each engine and format, such as llama-Q4_0
    CACHE/models/MODEL/workload.json  the workload for all engines

Each folder is written under a temporary name and then renamed, so that the remains of an interrupted run are not used
as a model. A folder is made again if package versions, its recipe or llmc's sources have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from environments import HERE, python_of, requirements
from protocol import WORKLOAD

import llmc

DEFAULT_CACHE = HERE.parents[1] / ".cache" / "compare"
# llmc's caches, like those of its peers, are only slightly larger than needed.
LLMC_MAX_SEQ_LEN = 2048


@dataclass(frozen=True)
class Variant:
    """An engine with one of its formats.

    Formats with equal `bits` are compared with each other.

    Attributes:
        batch_format: format of the files for several sequences at once; empty: those of `format`.
    """

    engine: str
    format: str
    bits: int
    batch_format: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.format}"

    @property
    def for_batches(self) -> Variant:
        """The variant of the files for several sequences at once."""
        return replace(self, format=self.batch_format or self.format, batch_format="")


VARIANTS = [
    Variant("llmc", "int4", 4),
    Variant("llmc", "int4-kv-int8", 4),
    Variant("llama", "Q4_0", 4),
    Variant("llama", "Q4_K_M", 4),
    Variant("genai", "int4", 4, batch_format="int4-all-logits"),
    Variant("openvino", "int4", 4),
    Variant("llmc", "int8", 8),
    Variant("llmc", "int8-kv-int8", 8),
    Variant("llmc", "w8a8", 8),
    Variant("llama", "Q8_0", 8),
    Variant("genai", "int8", 8, batch_format="int8-all-logits"),
    Variant("openvino", "int8", 8),
]


def prepare(model: str, variants: list[Variant], cache: Path) -> dict[Variant, Path]:
    """Return the folder of each variant, and make those that don't exist yet."""
    home = cache / "models" / model
    hf = make_folder(home / "hf", lambda out: run_python(Path(sys.executable), "-c", _WRITE_MODEL, model, out))
    if not (home / WORKLOAD).exists():
        run_python(Path(sys.executable), "-c", _WRITE_WORKLOAD, hf, home)
    return {variant: _make_variant(variant, hf, home / variant.name, cache) for variant in variants}


def _make_variant(variant: Variant, hf: Path, target: Path, cache: Path) -> Path:
    python = python_of(variant.engine, cache)
    recipe = RECIPES[variant.engine]
    return make_folder(target, lambda out: recipe(python, variant.format, hf, out), recipe_key(variant.engine))


def recipe_key(engine: str) -> str:
    """Hash all inputs of an engine's recipe.

    These are its source, and the pinned versions or llmc's own sources.
    """
    root = Path(llmc.__file__).parent
    packages = (root / name for name in ("compiler", "ir", "kernels", "passes", "runtimes"))
    sources = sorted(path for package in packages for path in package.rglob("*.py"))
    dependencies = sources if engine == "llmc" else requirements(engine)
    digest = hashlib.sha256(inspect.getsource(RECIPES[engine]).encode())
    for path in dependencies:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _llmc(python: Path, format: str, hf: Path, out: Path) -> None:
    code = "from llmc.compiler.cli.main import main; main()"
    scheme, _, cache = format.partition("-kv-")
    options = [f"--quantize={scheme}", f"--kv-cache-dtype={cache or 'auto'}", f"--max-seq-len={LLMC_MAX_SEQ_LEN}"]
    run_python(python, "-c", code, "compile", hf, "-o", out, *options)


def _llama(python: Path, format: str, hf: Path, out: Path) -> None:
    full = make_folder(
        hf.parent / "gguf", lambda folder: run_python(Path(sys.executable), "-c", WRITE_GGUF, hf, folder)
    )
    out.mkdir()
    run_python(python, HERE / "quantize_gguf.py", full / "model.gguf", out / "model.gguf", format)


def _genai(python: Path, format: str, hf: Path, out: Path) -> None:
    # Logits of the last position only, and int8 activations: the fastest settings of its builder for a CPU. In a batch
    # of prompts that are padded on the right, the last position is padding, so a batch needs all logits.
    precision, _, all_logits = format.partition("-")
    options = ["accuracy_level=4", f"prune_lm_head={'false' if all_logits else 'true'}"]
    cache = out.with_name(f"{out.name}-work")
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", out, "-p", precision, "-e", "cpu", "-c", cache]
    run_python(python, *builder, "--extra_options", *options)
    shutil.rmtree(cache, ignore_errors=True)


def _openvino(python: Path, format: str, hf: Path, out: Path) -> None:
    options = ["--weight-format", format]
    if format == "int4":
        options += ["--sym", "--ratio", "1.0", "--group-size", group_size(hf)]
    export = ["export", "openvino", "-m", hf, "--task", "text-generation-with-past"]
    run_python(python, python.parent / "optimum-cli", *export, *options, out)


def group_size(hf: Path) -> str:
    """Return the group size for nncf's 4-bit weights.

    It is 128, or the largest smaller power of two that divides the input channels of every linear.
    """
    config = json.loads((hf / "config.json").read_text())
    return str(math.gcd(128, config["hidden_size"], config["intermediate_size"]))


RECIPES: dict[str, Callable[[Path, str, Path, Path], None]] = {
    "llmc": _llmc,
    "llama": _llama,
    "genai": _genai,
    "openvino": _openvino,
}

# These run in separate processes, so that the comparing process stays small.
_WRITE_MODEL = (
    "import sys; from pathlib import Path; import source_models as s; s.MODELS[sys.argv[1]](Path(sys.argv[2]))"
)
_WRITE_WORKLOAD = (
    "import sys; from pathlib import Path; import source_models as s; s.write_workload(*map(Path, sys.argv[1:]))"
)
WRITE_GGUF = """
import sys
from pathlib import Path
from write_gguf import write_gguf
hf, folder = map(Path, sys.argv[1:])
folder.mkdir()
write_gguf(hf, folder / "model.gguf")
"""


def make_folder(target: Path, write: Callable[[Path], None], key: str = "") -> Path:
    """Make a folder if it does not exist or was made with another key.

    Args:
        target: the folder.
        write: writes the folder's content to the path that it is given.
        key: hash of everything that the content depends on.
    """
    stamp = target.with_name(f"{target.name}.key")
    if not target.exists() or (stamp.read_text() if stamp.exists() else "") != key:
        print(f"making {target}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        stamp.write_text(key)
    return target


def run_python(python: Path, *arguments: str | Path) -> None:
    """Run a Python command to its end.

    Converters print a lot, so their output is shown only if they fail.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in (python, *arguments)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise SystemExit(f"{process.stdout[-4000:]}\nfailed with status {process.returncode}: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files that each engine runs.")
    parser.add_argument("--model", choices=["demo", "llama-1b"], default="demo")
    parser.add_argument("--engine", action="append", choices=list(RECIPES), help="repeatable; default: all")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args()
    selected = [variant for variant in VARIANTS if not args.engine or variant.engine in args.engine]
    for variant, folder in prepare(args.model, selected, args.cache.resolve()).items():
        print(f"{variant.name:16} {folder}")


if __name__ == "__main__":
    main()
