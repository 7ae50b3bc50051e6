"""From a folder to an engine: what it is given, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from artifacts import write
from batches import forward
from compiled import artifact

import llmc
from llmc import LlmcError
from llmc.runtimes.engines.ort.engine import OrtEngine


def refused(folder: Path, **options: bool) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        llmc.load(folder, **options)
    assert "\n" not in str(caught.value) and caught.value.hint
    return caught.value


def test_options_reach_the_engine() -> None:
    engine = llmc.load(str(artifact("speaking")), threads=1, slots=3)
    assert isinstance(engine, OrtEngine)
    assert (engine.spec.threads, engine.slots, engine.spec.vocab_size, engine.spec.max_seq_len) == (1, 3, 96, 128)
    assert llmc.load(artifact("speaking")).slots == 1


def test_a_target_of_tomorrow(tmp_path: Path) -> None:
    write(tmp_path / "out", target="abacus")
    error = refused(tmp_path / "out")
    assert error.code == "TARGET_UNKNOWN" and "'abacus'" in error.what


def test_checksums_may_be_left_out(tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("speaking"), tmp_path / "out")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    assert refused(folder).code == "ARTIFACT_DAMAGED"
    engine = llmc.load(folder, check_files=False)
    assert forward(engine, np.array([[1]]), np.array([0])).shape == (1, 1, 96)


def test_a_graph_that_the_runtime_does_not_open(tmp_path: Path) -> None:
    write(tmp_path / "out")
    error = refused(tmp_path / "out")
    assert error.code == "GRAPH_REFUSED" and "model.onnx" in error.what
