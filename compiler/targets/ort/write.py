"""From a cached program to the ONNX files of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import torch

from ....errors import CompilerError
from ....ir.program import Cache, Program
from ....kernels.ops.quantized import CACHE_CODES
from ....passes.base import Pass
from ....runtimes.artifact.manifest import DERIVED_FILE, CacheSpec, DerivedSpec, GraphSpec, ScalesSpec, StoredSpec
from ..onnx.external import ExternalData
from ..onnx.lower import Derived, Lowering, Table
from ..onnx.standard import STANDARD
from .contrib import CONTRIB

DATA = "model.onnx.data"
# How the manifest calls the codes of rounded caches.
_ROUNDED: dict[torch.dtype, Literal["int8", "fp8"]] = {CACHE_CODES["int8"]: "int8", CACHE_CODES["fp8"]: "fp8"}
TABLES: dict[str, Table] = {"contrib": CONTRIB, "standard": STANDARD}
# From how many tokens in one call on rounding the inputs pays. Below, a matmul mostly waits for weights, and a short
# prompt is answered before the second graph would have been opened.
PREFILL_ROWS = 64


def build_onnx(
    program: Program,
    folder: Path,
    *,
    ops: str,
    few_rows: Sequence[Pass] = (),
    many_rows: Sequence[Pass] = (),
    watch: Callable[[str], None] = lambda name: None,
) -> dict[str, GraphSpec]:
    """Write the graphs and their one data file into `folder`.

    Args:
        ops: the table: "contrib" or "standard".
        few_rows: what makes of the program one that is better for a few tokens.
        many_rows: what makes of it one that is better for many, which gets a graph of its own.
        watch: called with each weight's name before it is written.
    """
    graphs = {}
    with ExternalData(folder / DATA, watch) as data:
        step = _lower(_changed(program, few_rows), ops, data, folder / "model.onnx")
        graphs["step"] = GraphSpec(step.file, 1, PREFILL_ROWS - 1 if many_rows else None)
        if many_rows:
            many = _lower(_changed(program, many_rows), ops, data, folder / "prefill.onnx")
            graphs["prefill"] = replace(many, min_rows=PREFILL_ROWS)
    return graphs


def cache_specs(program: Program) -> list[CacheSpec]:
    """The caches by the names that the graphs call them."""
    return [_cache_spec(i, cache) for i, cache in enumerate(program.caches)]


def _cache_spec(i: int, cache: Cache) -> CacheSpec:
    return CacheSpec(
        key=f"past_key_values.{i}.key",
        value=f"past_key_values.{i}.value",
        present_key=f"present.{i}.key",
        present_value=f"present.{i}.value",
        kind="ring" if cache.ring else "static",
        heads=cache.heads,
        key_dim=cache.key_dim,
        value_dim=cache.value_dim,
        length=cache.length,
        dtype=_ROUNDED.get(cache.dtype, "fp32"),
        scales=_scales(i) if cache.key_scales else None,
    )


def _scales(i: int) -> ScalesSpec:
    return ScalesSpec(
        key=f"past_key_values.{i}.key_scale",
        value=f"past_key_values.{i}.value_scale",
        present_key=f"present.{i}.key_scale",
        present_value=f"present.{i}.value_scale",
    )


def _changed(program: Program, passes: Sequence[Pass]) -> Program:
    changed = program.copy() if passes else program
    for subject in passes:
        subject(changed)
    return changed


def _lower(program: Program, ops: str, data: ExternalData, path: Path) -> GraphSpec:
    lowering = Lowering(program, TABLES[ops], data, derives=path.name == "prefill.onnx")
    lowering.run()
    lowering.save(path)
    _check(path)
    derived = [_derived_spec(made, offset) for offset, made in lowering.derived.items()]
    return GraphSpec(path.name, 1, None, derived, _stored_specs(lowering) if derived else [])


def _stored_specs(lowering: Lowering) -> list[StoredSpec]:
    """The weights that lie in the data file as they are."""
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
        rows=made.rows,
        columns=made.columns,
        group_size=made.group_size,
        file=made.codes.file,
        codes_offset=made.codes.offset,
        zeros_offset=made.zeros.offset if made.zeros else None,
        multiples_offset=made.multiples.offset if made.multiples else None,
        offset=offset,
    )


def _check(path: Path) -> None:
    """Hold the file to the ONNX standard: every op, type and shape that the standard knows."""
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(_without_bytes(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompilerError(
            "ONNX_INVALID", f"{path.name} breaks the ONNX standard: {error}", "Report the model; this is a defect."
        ) from error


def _without_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as inputs: the checker would look for their file, and the runtime makes one of them later."""
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model
