"""Polished networks compute what the graph says, in the interpreter, and store an embedding once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tensorrt_decoders import Decoder, write_decoder

from llmc.compiler.targets.tensorrt.build_log import BuildLog
from llmc.compiler.targets.tensorrt.interpreter.constants import collect_constants
from llmc.compiler.targets.tensorrt.interpreter.run import run
from llmc.compiler.targets.tensorrt.logger import make_logger
from llmc.compiler.targets.tensorrt.network import MatMul, Network, find_matmuls, parse
from llmc.compiler.targets.tensorrt.polish import polish
from llmc.runtimes.engines.tensorrt.library import find_library

pytest.importorskip("tensorrt_rtx")

DECODERS = {
    "fp16": Decoder(layers=1),
    "int8": Decoder(layers=1, scheme="int8", wide="int8"),
    "int4": Decoder(layers=1, scheme="int4", wide="int8"),
    "w8a8": Decoder(layers=1, scheme="w8a8", wide="int8"),
    "composed": Decoder(layers=1, composed=True),
    "untied": Decoder(layers=1, scheme="int8", wide="int8", tied=False),
}
# Sums of fp16 products in another order, and the scale of attention rounded once, not twice.
TOLERANCE = 2e-3


def load(path: Path) -> Network:
    library = find_library("tensorrt_rtx")
    return parse(library, make_logger(library.module, BuildLog()), path)


def evaluate(network: Network, path: Path, decoder: Decoder) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (2, decoder.kv_heads, decoder.length, decoder.head_dim)
    feeds = {
        "input_ids": np.array([[3, 500, 7], [1, 2, 400]]),
        "starts": np.array([0, 5]),
        "rows": np.array([0, 2]),
        "past_key_values.0.key": random.standard_normal(shape).astype(np.float16),
        "past_key_values.0.value": random.standard_normal(shape).astype(np.float16),
    }
    return run(network.definition, feeds, collect_constants(path))


@pytest.mark.parametrize("name", DECODERS)
def test_polishing_changes_no_result(tmp_path: Path, name: str) -> None:
    path = write_decoder(DECODERS[name], tmp_path)
    network = load(path)
    before = evaluate(network, path, DECODERS[name])
    layers = network.definition.num_layers
    polish(network)
    assert network.definition.num_layers > layers
    after = evaluate(network, path, DECODERS[name])
    assert before.keys() == after.keys()
    scale = np.abs(before["logits"]).max()
    for output, value in before.items():
        error = np.abs(after[output].astype(np.float32) - value.astype(np.float32)).max()
        assert error <= TOLERANCE * max(scale, 1), output


def test_a_cache_is_multiplied_as_stored(tmp_path: Path) -> None:
    network = load(write_decoder(DECODERS["composed"], tmp_path))
    polish(network)
    readers = [one for one in network.layers if one.num_inputs and one.get_input(0).name == "present.0.key"]
    (keys,) = [one for one in readers if one.type.name == "MATRIX_MULTIPLY"]
    (product,) = [one for one, index in network.users(keys.get_output(0)) if index == 0]
    assert product.type.name == "SHUFFLE"
    assert network.users(product.get_output(0))


@pytest.mark.parametrize(("name", "expected"), [("int8", 1), ("untied", 0), ("fp16", 0)])
def test_only_a_quantized_embedding_that_is_the_head_is_looked_up_by_column(
    tmp_path: Path, name: str, expected: int
) -> None:
    decoder = DECODERS[name]
    network = load(write_decoder(decoder, tmp_path))
    polish(network)
    tables = {layer.get_input(0).name: layer for layer in network.layers if layer.type.name == "GATHER"}
    by_column = [one for one in tables.values() if one.axis == 1 and one.get_input(0).shape[0] == decoder.hidden]
    weights = [one for one in by_column if tuple(one.get_input(0).shape) == (decoder.hidden, decoder.vocab)]
    assert len(weights) == expected
    head = next(one for one in find_matmuls(network) if one.outputs == decoder.vocab)
    wide = "int8" if name != "fp16" else "fp16"
    assert head == MatMul(head.node, wide, "fp16", decoder.hidden, decoder.vocab)
