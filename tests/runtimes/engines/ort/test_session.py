"""Opening graphs: matrices that are made for them, in a file or in memory."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
from compiled import artifact

import llmc
from llmc.compiler.targets.onnx.build import PREFILL_ROWS
from llmc.runtimes.engines.ort import session as ort_session


def many_rows(folder: Path) -> np.ndarray:
    """Logits of the graph for many tokens, when whatever its opening left behind is gone."""
    engine = llmc.load(folder, threads=1)
    engine.open_slots(1)
    tokens = np.random.default_rng(0).integers(3, 72, (1, PREFILL_ROWS))
    engine.forward(tokens, np.zeros(1, np.int64))
    gc.collect()
    return engine.forward(tokens, np.zeros(1, np.int64)).copy()


def test_without_room_for_a_file_memory_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact("speaking", quantize="int4", algo="rtn")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    derived: list[str] = []
    derive = ort_session.derive
    monkeypatch.setattr(ort_session, "derive", lambda *a: derived.append(a[1].name) or derive(*a))
    by_file = many_rows(folder)
    assert not derived

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort_session, "write_derived", full)
    assert np.array_equal(many_rows(folder), by_file)
    assert derived
    assert not list(tmp_path.iterdir())
