"""Opening a graph with ONNX Runtime: its own files, and what is made for it from them."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError
from ...artifact.manifest import DERIVED_FILE, GraphSpec, StoredSpec
from ...memory import give_back_memory
from .derive import derive, write_derived

# How long a thread that has nothing to do looks out for more before it sleeps: longer than what lies between two ops
# or two tokens, but no longer, for it takes the core from the other graph's threads and from the caller.
_SPIN_US = 300
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# ONNX's numbers for what numpy has no name for: an array of it is one of bytes.
_FLOAT8 = {"float8_e4m3fn": 17, "float8_e5m2": 19}


def open_session(
    folder: Path, spec: GraphSpec, threads: int, model: bytes | None = None
) -> tuple[ort.InferenceSession, list[Any]]:
    """A session, and what has to live as long as it does.

    Args:
        model: the graph, where it is not the one in its file; its weights are in the artifact all the same.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    held: list[Any] = []
    if spec.derived:
        session = _open_derived(folder, spec, options, threads, held, model)
    elif model is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        session = _open(model, options, spec)
    else:
        session = _open(str(folder / spec.file), options, spec)
    give_back_memory()
    return session, held


def _open_derived(
    folder: Path,
    spec: GraphSpec,
    options: ort.SessionOptions,
    threads: int,
    held: list[Any],
    model: bytes | None,
) -> ort.InferenceSession:
    """With its matrices in a file, the session maps one after the other while it packs them and holds none twice."""
    files = {name: _mapped(folder / name) for name in {stored.file for stored in spec.stored}}
    arrays = {stored.name: _array(files[stored.file], stored) for stored in spec.stored}
    elements = {stored.name: _FLOAT8[stored.dtype] for stored in spec.stored if stored.dtype in _FLOAT8}
    with tempfile.TemporaryDirectory(prefix="llmc-") as made:
        try:
            write_derived(folder, spec.derived, Path(made, DERIVED_FILE), threads)
        except OSError:  # there is no room for a file; there may be in memory
            arrays |= {derived.name: derive(folder, derived) for derived in spec.derived}
        held += _put_in(arrays, elements, options)
        options.add_session_config_entry(_WEIGHTS_FOLDER, made)
        session = _open((folder / spec.file).read_bytes() if model is None else model, options, spec)
    if hasattr(mmap, "MADV_DONTNEED"):
        for file in files.values():  # what was packed is not read again, and the rest comes back from the file
            file.madvise(mmap.MADV_DONTNEED)
    return session


def _open(model: str | bytes, options: ort.SessionOptions, spec: GraphSpec) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's exception classes are private
        raise LlmcError(
            "GRAPH_REFUSED",
            f"ONNX Runtime {ort.__version__} does not open {spec.file}: {str(error).splitlines()[0][:300]}",
            "Compile again, or install the release that manifest.json names.",
        ) from error


def _array(file: mmap.mmap, stored: StoredSpec) -> np.ndarray:
    dtype = "uint8" if stored.dtype in _FLOAT8 else stored.dtype
    return np.frombuffer(file, dtype, int(np.prod(stored.shape)), stored.offset).reshape(stored.shape)


def _put_in(
    arrays: Mapping[str, np.ndarray], elements: Mapping[str, int], options: ort.SessionOptions
) -> list[ort.OrtValue]:
    values = [
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, elements[name])
        if name in elements
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in arrays.items()
    ]
    options.add_external_initializers(list(arrays), values)
    return values


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
