"""Write a model folder for Triton Inference Server.

A folder has a config and the plan as version 1:

    config.pbtxt
    1/model.plan

The KV caches are inputs and outputs of the plan. The server keeps them for each sequence, so that they never travel:
`sequence_batching` names each cache as a state, which begins with zeros. A state has one buffer for input and output
(`use_same_buffer_for_input_output`), because the plan updates caches in place.

A client sends a sequence as requests with one correlation id, of which the first has the sequence's start flag and the
last its end flag. Each request has

    input_ids [1, S]  new tokens: at most as many as the prefill profile takes
    starts [1]        how many tokens the sequence has sent before
    rows [R]          indices from 0 to S-1 of the tokens whose logits are wanted

and gets logits [1, R, V]. A smaller `starts` goes back in the sequence. The server chooses the profile of each request.
A call serves one sequence: `rows` has no batch dimension, so the server can't join requests. Several sequences can be
open at once. For calls of several sequences, use llmc's own engine.

The config follows the server's documentation; a server has not been run with it yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ....errors import LlmcError
from ....runtimes.artifact.link_file import link_file
from ....runtimes.artifact.manifest import Manifest
from ....runtimes.engines.onnx_names import past_name, present_name
from ....runtimes.engines.tensorrt.section import DECODE, Library, Plan, TensorRtSection

REPOSITORY = "triton-server"
"""The folder in an artifact that the server takes as its model repository."""

_TYPES = {"fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}


def check_library(library: Library) -> None:
    """Refuse a library whose plans the server can't load.

    Raises:
        LlmcError: SERVER_PLAN_MISSING.
    """
    if library != "tensorrt":
        raise LlmcError(
            "SERVER_PLAN_MISSING",
            f"Triton Inference Server loads plans of TensorRT for data centres, and {library} builds others.",
            "On the machine of the server, where the package tensorrt is installed: "
            "llmc finalize DIR --library tensorrt --export triton-server",
        )


def write_model_folder(folder: Path, manifest: Manifest, section: TensorRtSection, plan: Plan) -> Path:
    """Write a model folder with a plan into an artifact's folder. The plan is linked, not copied.

    Args:
        folder: the artifact.

    Returns:
        The path of the config.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(manifest.model.name).name) or "model"
    out = folder / REPOSITORY / name
    link_file(folder / plan.file, out / "1" / "model.plan")
    config = out / "config.pbtxt"
    config.write_text(model_config(manifest, section))
    return config


def model_config(manifest: Manifest, section: TensorRtSection) -> str:
    """Return the text of config.pbtxt."""
    inputs = [("input_ids", [-1, -1]), ("starts", [-1]), ("rows", [-1])]
    lines = ['backend: "tensorrt"', "max_batch_size: 0"]  # 0: shapes are those of the plan, batch dimension included
    lines += ["input [", *_joined(_tensor(name, "TYPE_INT64", dims) for name, dims in inputs), "]"]
    lines += ["output [", *_tensor("logits", "TYPE_FP32", [-1, -1, manifest.model.vocab_size]), "]"]
    lines += ["sequence_batching {", f"  oldest {{ max_candidate_sequences: {section.profiles[DECODE].batch} }}"]
    lines += ["  state [", *_joined(_states(manifest, _TYPES[section.dtype])), "  ]", "}"]
    lines += ['instance_group [ { kind: KIND_GPU count: 1 profile: [ "0", "1" ] } ]']
    return "\n".join(lines) + "\n"


def _tensor(name: str, dtype: str, dims: list[int]) -> list[str]:
    return [f'  {{ name: "{name}" data_type: {dtype} dims: {dims} }}']


def _states(manifest: Manifest, dtype: str) -> Iterator[list[str]]:
    for index, cache in enumerate(manifest.caches):
        for part in cache.parts:
            past, present = past_name(index, part.role), present_name(index, part.role)
            dims = [1, cache.heads, cache.length, part.width]
            yield [
                "    {",
                f'      input_name: "{past}" output_name: "{present}" data_type: {dtype} dims: {dims}',
                "      use_same_buffer_for_input_output: true",
                f'      initial_state {{ name: "empty" data_type: {dtype} dims: {dims} zero_data: true }}',
                "    }",
            ]


def _joined(items: Iterator[list[str]]) -> Iterator[str]:
    """Yield the lines of items of a list, with commas between the items."""
    for index, lines in enumerate(items):
        if index:
            yield ","
        yield from lines
