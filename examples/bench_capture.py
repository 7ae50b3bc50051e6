"""Measure the time and peak memory of capture.

The models are the 135M demo and a 1.1B-parameter Llama with weights on disk.

    python examples/bench_capture.py

Each run is a separate process. Peak memory is what the operating system reports for that process, including imports.
The capture time excludes imports, whose time is a separate column.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 3

_MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
import llmc, torch, transformers
transformers.logging.set_verbosity_error()
imported = time.perf_counter()
program = llmc.capture(sys.argv[1])
captured = time.perf_counter()
print(json.dumps({
    "import_s": imported - start, "capture_s": captured - imported, "stage": str(program.stage),
    "parameters": sum(w.numel for w in program.weights.values() if not w.is_constant),
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
}))
"""


def write_llama_1b(folder: Path) -> None:
    """Write the config and a safetensors file of a 1.1B Llama.

    The file's data is sparse and uses no disk space.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": [32000, 2048], "lm_head.weight": [32000, 2048], "model.norm.weight": [2048]}
    for layer in range(22):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": [2048, 2048],
            f"{prefix}.self_attn.k_proj.weight": [256, 2048],
            f"{prefix}.self_attn.v_proj.weight": [256, 2048],
            f"{prefix}.self_attn.o_proj.weight": [2048, 2048],
            f"{prefix}.mlp.gate_proj.weight": [5632, 2048],
            f"{prefix}.mlp.up_proj.weight": [5632, 2048],
            f"{prefix}.mlp.down_proj.weight": [2048, 5632],
            f"{prefix}.input_layernorm.weight": [2048],
            f"{prefix}.post_attention_layernorm.weight": [2048],
        }
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def measure(model: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, "-c", _MEASURE, model], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_llama_1b(Path(folder))
        print(f"{'model':12} {'parameters':>12} {'import s':>9} {'capture s':>10} {'min':>6} {'max':>6} {'peak MB':>8}")
        for name, model in (("demo", "demo"), ("llama 1.1B", folder)):
            runs = [measure(model) for _ in range(RUNS)]
            seconds = [r["capture_s"] for r in runs]
            imports, peak = (statistics.median(r[key] for r in runs) for key in ("import_s", "peak_mb"))
            print(
                f"{name:12} {runs[0]['parameters']:12,} {imports:9.1f} {statistics.median(seconds):10.1f} "
                f"{min(seconds):6.1f} {max(seconds):6.1f} {peak:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
