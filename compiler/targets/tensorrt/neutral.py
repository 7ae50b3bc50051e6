"""Run the neutral artifact in onnxruntime, in the precision that its engines have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from ....errors import LlmcError, UsageError
from ....runtimes.artifact.manifest import Manifest
from ....runtimes.artifact.open import open_artifact
from ....runtimes.engines.batch import Batch, check_slots
from ....runtimes.engines.logits import HostLogits
from ....runtimes.engines.onnx_names import past_name, present_name
from ....runtimes.engines.runs import Run, plan_runs
from ....runtimes.engines.spec import EngineSpec
from ....runtimes.engines.tensorrt.section import PREFILL, read_section
from ..onnx.rounded import rounded_model

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# Otherwise each call would dequantize all weights again.
_FOLD_WEIGHTS = "session.disable_quant_qdq"


def open_neutral(folder: Path, *, check_files: bool = True) -> NeutralEngine:
    """Open the neutral artifact in a folder, as `load` opens an engine."""
    return NeutralEngine(folder, open_artifact(folder, check_files))


class NeutralEngine:
    """The graph that engines are built from, on a CPU; see `Engine`.

    It is for checks: numbers are held in float32 and rounded to the precision of the artifact after each op.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, slots: int = 1) -> None:
        self.manifest = manifest
        section = read_section(manifest)
        self.spec = EngineSpec(vocab_size=manifest.model.vocab_size, max_seq_len=manifest.max_seq_len)
        self.runs = self.slots = 0
        self._longest = section.profiles[PREFILL].tokens
        self._session: ort.InferenceSession | None = _open(folder / section.graph)
        self._caches: dict[tuple[str, str], np.ndarray] = {}  # by the names of the input and of the output
        self.open_slots(slots)

    def open_slots(self, count: int) -> None:
        self._check_open()
        old = self._caches
        self._caches = {}
        for i, spec in enumerate(self.manifest.caches):
            for part in spec.parts:
                names = past_name(i, part.role), present_name(i, part.role)
                array = np.zeros((count, spec.heads, spec.length, part.width), np.float32)
                if names in old:
                    array[: self.slots] = old[names][:count]
                self._caches[names] = array
        self.slots = count

    def forward(self, batch: Batch) -> HostLogits:
        self._check_open()
        batch.check(self.spec, self.slots)
        logits = np.empty((len(batch.wanted), self.spec.vocab_size), np.float32)
        for run in plan_runs(batch, self._longest):
            values = self.run(batch, run).reshape(-1, self.spec.vocab_size)
            logits[run.target[run.target >= 0]] = values[run.target >= 0]
        return HostLogits(logits)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._check_open()
        check_slots(np.array([source, target]), self.slots)
        for array in self._caches.values():
            array[target, :, :length] = array[source, :, :length]

    def close(self) -> None:
        self._session, self._caches, self.slots = None, {}, 0

    def run(self, batch: Batch, run: Run) -> np.ndarray:
        """Run tokens; return the logits of the wanted ones, [B, W, V]."""
        session = self._check_open()
        count, length = run.tokens.shape
        rows = run.wanted if len(run.wanted) else np.array([length - 1])
        binding = session.io_binding()
        for (past, present), array in self._caches.items():
            memory = array[run.slot : run.slot + count]
            at = ("cpu", 0, np.float32, memory.shape, memory.ctypes.data)
            binding.bind_input(past, *at)
            binding.bind_output(present, *at)
        binding.bind_output("logits", "cpu")
        inputs = {"input_ids": batch.tokens[run.tokens], "starts": run.ends - length, "rows": rows}
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        self.runs += 1
        session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits[:, : len(run.wanted)]

    def _check_open(self) -> ort.InferenceSession:
        if self._session is None:
            raise UsageError("ENGINE_CLOSED", "The engine has been closed.", "Load the artifact again.")
        return self._session


def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    options.add_session_config_entry(_FOLD_WEIGHTS, "1")
    model = rounded_model(onnx.load(path, load_external_data=False))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's exception classes are private
        raise LlmcError(
            "GRAPH_REFUSED",
            f"ONNX Runtime {ort.__version__} can't open {path.name}: {str(error).splitlines()[0][:300]}",
            "Update onnxruntime, or report the model.",
        ) from error
