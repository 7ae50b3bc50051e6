"""Open a graph with ONNX Runtime, from its files and derived matrices."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ....errors import LlmcError
from ...memory import trim_memory
from ..onnx_names import DERIVED_FILE
from .derive import derive, write_derived
from .device import Device, without_cuda
from .section import GraphFile, StoredSpec

# Microseconds that an idle thread spins before it sleeps: long enough to bridge the gap between two ops or two tokens,
# but no longer, because spinning takes the core from the other graph's threads and from the caller.
_SPIN_US = 300
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# ONNX's element types for dtypes that numpy doesn't have; numpy arrays of them have dtype uint8.
_FLOAT8 = {"float8_e4m3fn": 17, "float8_e5m2": 19}


def open_session(
    folder: Path, spec: GraphFile, device: Device, model: bytes | None = None, trace: Path | None = None
) -> tuple[ort.InferenceSession, list[Any]]:
    """Open a session; also return the objects that must live as long as it does.

    Args:
        model: the graph, if it is not the one in its file; its weights are those of the artifact.
        trace: profile the session from now on; the trace file's name begins with this path.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    held: list[Any] = []
    if spec.derived:
        session = _open_derived(folder, spec, options, device, held, model)
    elif model is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        session = _open(model, options, spec, device)
    else:
        session = _open(str(folder / spec.file), options, spec, device)
    trim_memory()
    return session, held


def _open_derived(
    folder: Path,
    spec: GraphFile,
    options: ort.SessionOptions,
    device: Device,
    held: list[Any],
    model: bytes | None,
) -> ort.InferenceSession:
    """Open a graph with derived matrices, which are written to a temporary file.

    The session maps the matrices in that file one by one while it packs them, so no matrix is in memory twice.
    """
    files = {name: _map(folder / name) for name in {stored.file for stored in spec.stored}}
    arrays = {stored.name: _array(files[stored.file], stored) for stored in spec.stored}
    element_types = {stored.name: _FLOAT8[stored.dtype] for stored in spec.stored if stored.dtype in _FLOAT8}
    with tempfile.TemporaryDirectory(prefix="llmc-") as temporary:
        try:
            write_derived(folder, spec.derived, Path(temporary, DERIVED_FILE), device.threads)
        except OSError:  # no space for the file: keep the matrices in memory
            arrays |= {derived.name: derive(folder, derived) for derived in spec.derived}
        held += _add_initializers(arrays, element_types, options)
        options.add_session_config_entry(_WEIGHTS_FOLDER, temporary)
        session = _open((folder / spec.file).read_bytes() if model is None else model, options, spec, device)
    if hasattr(mmap, "MADV_DONTNEED"):
        for file in files.values():  # packed weights are not read again; other pages are reloaded when needed
            file.madvise(mmap.MADV_DONTNEED)
    return session


def _open(model: str | bytes, options: ort.SessionOptions, spec: GraphFile, device: Device) -> ort.InferenceSession:
    providers = device.providers()
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the binding's exception classes are private
        raise LlmcError(
            "GRAPH_REFUSED",
            f"ONNX Runtime {ort.__version__} can't open {spec.file}: {str(error).splitlines()[0][:300]}",
            "Install the version that manifest.json requires, or compile again: llmc compile MODEL -o DIR",
        ) from error
    if session.get_providers()[0] != providers[0][0]:  # it prints a warning, and goes on without
        raise without_cuda("its CUDA provider can't be loaded")
    return session


def _array(file: mmap.mmap, stored: StoredSpec) -> np.ndarray:
    dtype = "uint8" if stored.dtype in _FLOAT8 else stored.dtype
    return np.frombuffer(file, dtype, int(np.prod(stored.shape)), stored.offset).reshape(stored.shape)


def _add_initializers(
    arrays: Mapping[str, np.ndarray], element_types: Mapping[str, int], options: ort.SessionOptions
) -> list[ort.OrtValue]:
    """Add arrays to the options as initializers; return values to keep alive."""
    values = [
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_types[name])
        if name in element_types
        else ort.OrtValue.ortvalue_from_numpy(array)
        for name, array in arrays.items()
    ]
    options.add_external_initializers(list(arrays), values)
    return values


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
