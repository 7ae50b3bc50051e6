"""A fake artifact and engine that count: word n is followed by word n+1.

They need neither torch nor a graph; the tokenizer is real.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import tokenizers
from artifacts import manifest

from llmc.runtimes.artifact.write import ArtifactWriter
from llmc.runtimes.engines.batch import Batch
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec

WORDS = [f"w{i}" for i in range(19)] + ["</s>"]


class Counting:
    """The counting engine; each call takes `delay` seconds."""

    spec = EngineSpec(len(WORDS), 64, threads=3)

    def __init__(self, slots: int = 1, delay: float = 0.0) -> None:
        self.slots, self.delay, self.runs = slots, delay, 0

    def open_slots(self, count: int) -> None:
        self.slots = count

    def forward(self, batch: Batch) -> HostLogits:
        time.sleep(self.delay)
        self.runs += 1
        return HostLogits(np.eye(len(WORDS), dtype=np.float32)[(batch.tokens[batch.wanted] + 1) % len(WORDS)])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        pass

    def close(self) -> None:
        pass


def write_speaking(folder: Path, *, chat: bool = True) -> Path:
    """Write an artifact with a manifest and the tokenizer's files; return its folder."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    with ArtifactWriter(folder) as writer:
        words.save(str(writer.folder / "tokenizer.json"))
        (writer.folder / "generation_config.json").write_text('{"eos_token_id": 19}')
        (writer.folder / "model.onnx").write_bytes(b"graph")
        checks = [{"name": "prefill of 7", "measured": 1.25e-6, "limit": 1e-4, "ok": True}]
        (writer.folder / "verify.json").write_text(json.dumps({"passed": True, "checks": checks}))
        if chat:
            template = "{% for m in messages %}{{ m.role[0] == 'u' and 'w0 ' or 'w1 ' }}{{ m.content }} {% endfor %}"
            (writer.folder / "chat_template.jinja").write_text(template)
        writer.commit(manifest())
    return folder


def stand_in_load(delay: float = 0.0) -> types.ModuleType:
    """Make a module like `llmc.runtimes.engines.load` that loads counting engines.

    Its attribute `asked` is (path, threads, slots) of the last call of `load`.
    """
    module = types.ModuleType("llmc.runtimes.engines.load")

    def load(path: str | Path, *, threads: int | None = None, slots: int = 1) -> Counting:
        module.asked = (Path(path), threads, slots)  # type: ignore[attr-defined]
        return Counting(slots, delay)

    module.load = load  # type: ignore[attr-defined]
    return module


def main() -> None:
    """Run `llmc` with counting engines; the arguments are the delay, then llmc's."""
    from llmc.compiler.cli.main import main as llmc
    from llmc.runtimes.engines import load

    load.load = stand_in_load(float(sys.argv[1])).load
    llmc(sys.argv[2:], prog_name="llmc")


if __name__ == "__main__":
    main()
