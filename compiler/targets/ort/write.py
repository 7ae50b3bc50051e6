"""From lowered programs to the ONNX files of an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import onnx

from ....ir.program import Program
from ....runtimes.artifact.manifest import Phase
from ....runtimes.engines.onnx_names import DERIVED_FILE
from ....runtimes.engines.ort.section import DerivedSpec, GraphFile, OrtSection, StoredSpec
from ..base import Lowered, Watch
from ..onnx.check import check_onnx
from ..onnx.external import ExternalData
from ..onnx.lower import Derived, Lowering, Table
from ..onnx.standard import STANDARD
from .contrib import CONTRIB, CUDA
from .facts import BATCH_TOKENS, PREFILL_TOKENS, REQUIRES
from .mixing import MixingLowering, can_mix

DATA = "model.onnx.data"
# Files by graph; onnxruntime-genai and Optimum expect the first name.
FILES = {"step": "model.onnx", "prefill": "prefill.onnx"}
TABLES: dict[str, Table] = {"contrib": CONTRIB, "standard": STANDARD, "cuda": CUDA}


def write_graphs(
    graphs: Mapping[str, Program],
    folder: Path,
    ops: str,
    watch: Watch = lambda name: None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Lowered:
    """Write the graphs, and one data file with the weights of all of them.

    Args:
        graphs: "step", and "prefill" if many tokens take another graph.
        ops: the table: "contrib", "standard" or "cuda".
        watch: called with each weight's name before it is computed.
        device: what runs the graphs: "cpu" or "cuda".
    """
    with ExternalData(folder / DATA, watch) as data:
        # The step graph comes first: its weights are stored, and the prefill graph may derive its own from them.
        files = {name: _write(name, graphs[name], ops, data, folder) for name in FILES if name in graphs}
    last = PREFILL_TOKENS - 1 if "prefill" in graphs else None
    phases = {"step": Phase(1, last), "prefill": Phase(PREFILL_TOKENS)}
    return Lowered({name: phases[name] for name in files}, OrtSection(files, device), REQUIRES)


def _write(name: str, program: Program, ops: str, data: ExternalData, folder: Path) -> GraphFile:
    is_prefill = name == "prefill"
    mixes = is_prefill and ops == "contrib" and can_mix(program)
    lowering = (
        MixingLowering(program, data, derives=True)
        if mixes
        else Lowering(program, TABLES[ops], data, derives=is_prefill)
    )
    lowering.run()
    path = folder / FILES[name]
    lowering.save(path)
    check_onnx(path)
    derived = [_derived_spec(made, offset) for offset, made in lowering.derived.items()]
    stored = _stored_specs(lowering) if derived else []
    return GraphFile(path.name, derived, stored, BATCH_TOKENS if is_prefill else None)


def _stored_specs(lowering: Lowering) -> list[StoredSpec]:
    """Describe the weights that are in the data file as the graph takes them."""
    found = []
    for tensor in lowering.initializers.values():
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and place["location"] != DERIVED_FILE:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
            found.append(StoredSpec(tensor.name, dtype, list(tensor.dims), place["location"], int(place["offset"])))
    return found


def _derived_spec(made: Derived, offset: int) -> DerivedSpec:
    return DerivedSpec(
        name=made.name,
        scheme=made.scheme,
        rows=made.output_channels,
        columns=made.input_channels,
        group_size=made.group_size,
        file=made.codes.file,
        codes_offset=made.codes.offset,
        zeros_offset=made.zeros.offset if made.zeros else None,
        multiples_offset=made.multiples.offset if made.multiples else None,
        offset=offset,
    )
