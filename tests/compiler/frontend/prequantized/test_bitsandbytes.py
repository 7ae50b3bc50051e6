"""bitsandbytes: nf4 and fp4 in blocks, and int8 per output channel.

Blocks may span output channels, and scales may be quantized.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.kernels.ops.quantized import NF4

from .files import Linear, Make, change, check, check_damage, check_dequantized, half, refusal, tiny_llama, write

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = [sign * n for sign in (1, -1) for n in (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)]


def make(kind: str = "nf4", block: int = 32, nested: int | None = None, storage: torch.dtype = torch.uint8) -> Make:
    table = np.array(NF4 if kind == "nf4" else FP4, np.float32)

    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        count = outputs * inputs
        blocks = -(-count // block)
        codes = [rng.randrange(16) for _ in range(count)]
        raw = [16 * codes[i] + codes[i + 1] for i in range(0, count, 2)]
        state: dict[str, Any] = {
            "quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [outputs, inputs],
        }  # fmt: skip
        parts = {"weight": torch.tensor(raw, dtype=torch.uint8).view(storage).unsqueeze(1)}
        parts["weight.quant_map"] = torch.from_numpy(table.copy())
        if nested is None:
            absmax = [np.float32(half(rng)) for _ in range(blocks)]
            parts["weight.absmax"] = torch.tensor(absmax)
        else:
            indices = [rng.randrange(256) for _ in range(blocks)]
            numbers = [np.float32(rng.uniform(-1, 1)) for _ in range(256)]
            largest = [np.float32(half(rng)) for _ in range(-(-blocks // nested))]
            offset = np.float32(0.3)
            absmax = [numbers[index] * largest[b // nested] + offset for b, index in enumerate(indices)]
            parts["weight.absmax"] = torch.tensor(indices, dtype=torch.uint8)
            parts["weight.nested_absmax"] = torch.tensor(largest)
            parts["weight.nested_quant_map"] = torch.tensor(numbers)
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(offset)}
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        flat = [table[codes[i]] * absmax[i // block] for i in range(count)]
        return parts, [flat[o * inputs : (o + 1) * inputs] for o in range(outputs)]

    return linear


def make_int8(outputs: int, inputs: int, rng: random.Random) -> Linear:
    codes = [[rng.choice([-128, 127, rng.randint(-128, 127)]) for _ in range(inputs)] for _ in range(outputs)]
    absmax = [np.float32(rng.uniform(0.1, 2)) for _ in range(outputs)]
    values = [[np.float32(codes[o][i]) * (absmax[o] / np.float32(127)) for i in range(inputs)] for o in range(outputs)]
    weight, scb = torch.tensor(codes, dtype=torch.int8), torch.tensor(absmax)
    return {"weight": weight, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}, values


@pytest.mark.parametrize("nested", [None, 5])
def test_nf4(tmp_path: Path, nested: int | None) -> None:
    check(tmp_path, write(tmp_path, make(nested=nested), CONFIG), "nf4", 32)


def test_blocks_that_span_output_channels(tmp_path: Path) -> None:
    """Blocks have 64 weights, output channels 20 or 84, and the smallest matrix 200."""
    expected = write(tmp_path, make(block=64, nested=3), CONFIG, model=tiny_llama(20, 84))
    check(tmp_path, expected, "nf4", 4)


def test_codes_stored_in_a_float_dtype(tmp_path: Path) -> None:
    expected = write(tmp_path, make(storage=torch.bfloat16), CONFIG | {"bnb_4bit_quant_storage": "bfloat16"})
    check(tmp_path, expected, "nf4", 32)


@pytest.mark.parametrize("nested", [None, 5])
def test_fp4(tmp_path: Path, nested: int | None) -> None:
    check_dequantized(tmp_path, write(tmp_path, make("fp4", nested=nested), CONFIG), "its codes are fp4")


def test_int8(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make_int8, {"load_in_8bit": True}), "int8")


@pytest.mark.parametrize(
    "part",
    [
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    ],
)  # fmt: skip
def test_damage(tmp_path: Path, part: str) -> None:
    write(tmp_path, make(nested=5), CONFIG)
    check_damage(tmp_path, part)


def test_damage_of_int8(tmp_path: Path) -> None:
    write(tmp_path, make_int8, {"load_in_8bit": True})
    check_damage(tmp_path, "SCB")


NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_missing_state(tmp_path: Path) -> None:
    write(tmp_path, make(), CONFIG)
    change(tmp_path, lambda tensors: tensors.pop(f"{NAME}.quant_state.bitsandbytes__nf4"))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and NAME in error.what and "quant_state" in error.what


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"shape": [96], "blocksize": 32}', '{"shape": [96, 32], "blocksize": 0}']
)
def test_an_invalid_state(tmp_path: Path, text: str) -> None:
    write(tmp_path, make(), CONFIG)
    state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    change(tmp_path, lambda tensors: tensors.update({f"{NAME}.quant_state.bitsandbytes__nf4": state}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and NAME in error.what


def test_int8_in_a_gpu_layout(tmp_path: Path) -> None:
    write(tmp_path, make_int8, {"load_in_8bit": True})
    change(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_format"].fill_(2))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and "weight_format" in error.what and "layout 2" in error.what
