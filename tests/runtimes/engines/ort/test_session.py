"""Sessions with derived matrices, in a temporary file or in memory."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
from batches import forward
from compiled import artifact

import llmc
from llmc.compiler.targets.ort.facts import PREFILL_TOKENS
from llmc.runtimes.engines.ort import session as ort_session


def prefill_logits(folder: Path) -> np.ndarray:
    """Run the prefill graph again after temporaries of its opening are freed."""
    engine = llmc.load(folder, threads=1)
    engine.open_slots(1)
    tokens = np.random.default_rng(0).integers(3, 72, (1, PREFILL_TOKENS))
    forward(engine, tokens, np.zeros(1, np.int64))
    gc.collect()
    return forward(engine, tokens, np.zeros(1, np.int64))


def test_without_disk_space_derived_matrices_are_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact("speaking", quantize="int4", algo="rtn")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    derived: list[str] = []
    derive = ort_session.derive
    monkeypatch.setattr(ort_session, "derive", lambda *a: derived.append(a[1].name) or derive(*a))
    by_file = prefill_logits(folder)
    assert not derived

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort_session, "write_derived", full)
    assert np.array_equal(prefill_logits(folder), by_file)
    assert derived
    assert not list(tmp_path.iterdir())
