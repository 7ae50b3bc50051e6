"""FP8: codes times the scale of their block, their output channel, or the tensor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .files import Linear, Make, change, check, check_damage, half, refusal, write

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
# Every value of float8_e4m3fn by its bits: sign, 4 exponent bits, 3 mantissa bits.
NUMBERS = [
    (-1.0 if bits & 128 else 1.0)
    * ((8 + bits % 8) * 2.0 ** ((bits >> 3) % 16 - 10) if (bits >> 3) % 16 else bits % 8 * 2.0**-9)
    for bits in range(256)
]
NAN = (0x7F, 0xFF)


def make(block: tuple[int, int] | None, part: str = "weight_scale_inv", exponents: bool = False) -> Make:
    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        height, width = block or (outputs, inputs)
        width = min(width, inputs)
        bits = [[rng.choice([b for b in range(256) if b not in NAN]) for _ in range(inputs)] for _ in range(outputs)]
        scales: list[list[Any]] = [
            [np.float32(half(rng)) for _ in range(-(-inputs // width))] for _ in range(-(-outputs // height))
        ]
        stored = torch.tensor(scales)
        if exponents:
            raw = [[rng.randrange(120, 128) for _ in line] for line in scales]
            scales = [[2.0 ** (e - 127) for e in line] for line in raw]
            stored = torch.tensor(raw, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        values = [
            [np.float32(NUMBERS[bits[o][i]]) * np.float32(scales[o // height][i // width]) for i in range(inputs)]
            for o in range(outputs)
        ]
        weight = torch.tensor(bits, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return {"weight": weight, part: stored if block else stored.reshape(())}, values

    return linear


@pytest.mark.parametrize(("block", "group_size"), [((16, 16), 16), ((20, 20), 4), ((16, 128), None), ((128, 16), 16)])
def test_blocks(tmp_path: Path, block: tuple[int, int], group_size: int | None) -> None:
    config = FP8 | {"weight_block_size": list(block)}
    check(tmp_path, write(tmp_path, make(block), config), "fp8", group_size)


def test_scales_stored_as_exponents(tmp_path: Path) -> None:
    config = FP8 | {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    check(tmp_path, write(tmp_path, make((16, 16), exponents=True), config), "fp8", 16)


def test_one_scale_per_tensor(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make(None), FP8 | {"weight_block_size": None}), "fp8")


def test_one_scale_per_output_channel(tmp_path: Path) -> None:
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    check(tmp_path, write(tmp_path, make((1, 1000), "weight_scale"), config), "fp8")


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_damage(tmp_path: Path, part: str) -> None:
    write(tmp_path, make((16, 16)), FP8 | {"weight_block_size": [16, 16]})
    if part == "weight_scale_inv":
        check_damage(tmp_path, part)
    change(tmp_path, lambda tensors: tensors.pop(f"model.layers.0.mlp.down_proj.{part}"))
    assert refusal(tmp_path).code == "WEIGHTS_MISSING"


def test_codes_without_scales(tmp_path: Path) -> None:
    write(tmp_path, make((16, 16)), FP8 | {"weight_block_size": [16, 16]})
    name = "model.embed_tokens.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and "model.embed_tokens.weight_scale_inv" in error.what


def test_several_scales_for_one_block(tmp_path: Path) -> None:
    write(tmp_path, make(None), FP8 | {"weight_block_size": None})
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    change(tmp_path, lambda tensors: tensors.update({name: torch.ones(2)}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and name in error.what and "(2,)" in error.what


def test_scales_of_the_wrong_dtype(tmp_path: Path) -> None:
    write(tmp_path, make((16, 16)), FP8 | {"weight_block_size": [16, 16]})
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.uint8)}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and name in error.what and "uint8" in error.what


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({"expert_dtype": "fp4"}, "'fp4'"),
        ({"weight_block_size": 128}, "weight_block_size is 128"),
        ({"weight_block_size": [128, 0]}, "[128, 0]"),
    ],
)
def test_unsupported_settings(tmp_path: Path, settings: dict[str, Any], detail: str) -> None:
    write(tmp_path, make((16, 16)), FP8 | settings)
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and detail in error.what
