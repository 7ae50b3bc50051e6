"""Run an artifact for GPUs on a CPU, in the precision that it has on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from ....runtimes.artifact.open import open_artifact
from ....runtimes.engines.ort.device import Cpu
from ....runtimes.engines.ort.engine import OrtEngine
from ....runtimes.engines.ort.graph import GraphSession
from ....runtimes.engines.ort.section import GraphFile
from ..onnx.rounded import rounded_model


def open_rounded(folder: Path, *, check_files: bool = True) -> RoundedEngine:
    """Open an artifact for GPUs, as `load` opens it there."""
    device = Cpu(dtypes={"fp16": np.float32, "bf16": np.float32})
    return RoundedEngine(folder, open_artifact(folder, check_files), device=device)


class RoundedEngine(OrtEngine):
    """An engine for checks: it holds numbers in float32, and rounds them to the artifact's precision after each op."""

    def _open(self, spec: GraphFile) -> GraphSession:
        model = rounded_model(onnx.load(self.folder / spec.file, load_external_data=False)).SerializeToString()
        return GraphSession(self.folder, spec, self.device, self.spec.vocab_size, model, self._traces)
