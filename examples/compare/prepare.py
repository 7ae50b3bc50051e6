"""From one model, the files that each engine runs: `python prepare.py --model demo --cache DIR`.

    CACHE/models/MODEL/hf             config, tokenizer, safetensors: what all others are made of
    CACHE/models/MODEL/FORMAT         one folder for each engine and format, such as llama-Q4_0
    CACHE/models/MODEL/workload.json  what is asked of every engine

Each folder is made beside its place and renamed into it, so what an interrupted run leaves is not taken for a model.
One that was made by other versions, by another recipe or by other llmc sources is made again.
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
from dataclasses import dataclass
from pathlib import Path

from environments import HERE, python_of, requirements
from protocol import WORKLOAD

import llmc

DEFAULT_CACHE = HERE.parents[1] / ".cache" / "compare"
LLMC_MAX_SEQ_LEN = 1024  # like its peers, llmc gets a cache of about what is asked for


@dataclass(frozen=True)
class Variant:
    """An engine with a format of its own, at a width at which formats can be compared."""

    engine: str
    format: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.format}"


VARIANTS = [
    Variant("llmc", "int4", 4),
    Variant("llama", "Q4_0", 4),
    Variant("llama", "Q4_K_M", 4),
    Variant("genai", "int4", 4),
    Variant("openvino", "int4", 4),
    Variant("llmc", "int8", 8),
    Variant("llmc", "w8a8", 8),
    Variant("llama", "Q8_0", 8),
    Variant("genai", "int8", 8),
    Variant("openvino", "int8", 8),
]


def prepare(model: str, variants: list[Variant], cache: Path) -> dict[Variant, Path]:
    """The folder of each variant, made where it isn't there yet."""
    home = cache / "models" / model
    hf = _make(home / "hf", lambda out: _python(Path(sys.executable), "-c", _WRITE_MODEL, model, out))
    if not (home / WORKLOAD).exists():
        _python(Path(sys.executable), "-c", _WRITE_WORKLOAD, hf, home)
    return {variant: _make_variant(variant, hf, home / variant.name, cache) for variant in variants}


def _make_variant(variant: Variant, hf: Path, target: Path, cache: Path) -> Path:
    python = python_of(variant.engine, cache)
    recipe = _RECIPES[variant.engine]
    return _make(target, lambda out: recipe(python, variant.format, hf, out), _key(variant.engine))


def _key(engine: str) -> str:
    """Names what makes an engine's files: the recipe, and the versions behind it or llmc's own sources."""
    root = Path(llmc.__file__).parent
    rooms = (root / room for room in ("compiler", "ir", "kernels", "passes", "runtimes"))
    ours = sorted(path for room in rooms for path in room.rglob("*.py"))
    behind = ours if engine == "llmc" else requirements(engine)
    digest = hashlib.sha256(inspect.getsource(_RECIPES[engine]).encode())
    for path in behind:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _llmc(python: Path, format: str, hf: Path, out: Path) -> None:
    code = "from llmc.compiler.cli.main import main; main()"
    _python(python, "-c", code, "compile", hf, "-o", out, f"--quantize={format}", f"--max-seq-len={LLMC_MAX_SEQ_LEN}")


def _llama(python: Path, format: str, hf: Path, out: Path) -> None:
    full = _make(hf.parent / "gguf", lambda folder: _python(Path(sys.executable), "-c", _WRITE_GGUF, hf, folder))
    out.mkdir()
    _python(python, HERE / "quantize_gguf.py", full / "model.gguf", out / "model.gguf", format)


def _genai(python: Path, format: str, hf: Path, out: Path) -> None:
    # Logits of the last position alone and activations in int8: the fastest that its builder offers on a CPU.
    options = ["accuracy_level=4", "prune_lm_head=true"]
    cache = out.with_name(f"{out.name}-work")
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", out, "-p", format, "-e", "cpu", "-c", cache]
    _python(python, *builder, "--extra_options", *options)
    shutil.rmtree(cache, ignore_errors=True)


def _openvino(python: Path, format: str, hf: Path, out: Path) -> None:
    options = ["--weight-format", format]
    if format == "int4":
        options += ["--sym", "--ratio", "1.0", "--group-size", _group_size(hf)]
    export = ["export", "openvino", "-m", hf, "--task", "text-generation-with-past"]
    _python(python, python.parent / "optimum-cli", *export, *options, out)


def _group_size(hf: Path) -> str:
    """128, or the largest power of two below it that divides the rows of every linear."""
    config = json.loads((hf / "config.json").read_text())
    return str(math.gcd(128, config["hidden_size"], config["intermediate_size"]))


_RECIPES: dict[str, Callable[[Path, str, Path, Path], None]] = {
    "llmc": _llmc,
    "llama": _llama,
    "genai": _genai,
    "openvino": _openvino,
}

# In processes of their own: the one that compares stays small, for its memory is not the engines'.
_WRITE_MODEL = (
    "import sys; from pathlib import Path; import source_models as s; s.MODELS[sys.argv[1]](Path(sys.argv[2]))"
)
_WRITE_WORKLOAD = (
    "import sys; from pathlib import Path; import source_models as s; s.write_workload(*map(Path, sys.argv[1:]))"
)
_WRITE_GGUF = """
import sys
from pathlib import Path
from write_gguf import write_gguf
hf, folder = map(Path, sys.argv[1:])
folder.mkdir()
write_gguf(hf, folder / "model.gguf")
"""


def _make(target: Path, write: Callable[[Path], None], key: str = "") -> Path:
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


def _python(python: Path, *arguments: str | Path) -> None:
    """Run to the end, quietly where it succeeds: converters talk a lot."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in (python, *arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nfailed with status {done.returncode}: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files that each engine runs.")
    parser.add_argument("--model", choices=["demo", "llama-1b"], default="demo")
    parser.add_argument("--engine", action="append", choices=list(_RECIPES), help="repeatable; default: all")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args()
    chosen = [variant for variant in VARIANTS if not args.engine or variant.engine in args.engine]
    for variant, folder in prepare(args.model, chosen, args.cache.resolve()).items():
        print(f"{variant.name:16} {folder}")


if __name__ == "__main__":
    main()
