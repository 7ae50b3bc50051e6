"""compressed-tensors: packed integers, int8 and fp8.

Scales are per tensor, channel, group or block.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.ir.stored import stored_codes

from .files import (
    Linear,
    Make,
    change,
    check,
    check_damage,
    check_dequantized,
    check_model,
    half,
    int32,
    refusal,
    tiny_llama,
    value,
    weights_of,
    word,
    write,
)  # fmt: skip
from .test_fp8_blocks import NAN, NUMBERS
from .test_fp8_blocks import make as make_blocks


def config(form: str, *schemes: dict[str, Any], **more: Any) -> dict[str, Any]:
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": scheme} for i, scheme in enumerate(schemes)}
    named = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**named, "config_groups": groups, "ignore": ["lm_head"], **more}


def scheme(bits: int = 4, strategy: str = "group", group_size: int | None = 16, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size, **more,
    }  # fmt: skip


def effective_group_size(strategy: str, group_size: int | None, inputs: int) -> int:
    return group_size if strategy == "group" and group_size else inputs


def packed(matrix: list[list[int]], bits: int) -> torch.Tensor:
    """Pack each line of signed numbers as unsigned fields in words.

    Unused fields of the last word are 0.
    """
    per = 32 // bits
    offset = 2 ** (bits - 1)
    return int32(
        [[word([v + offset for v in line[i : i + per]], bits) for i in range(0, len(line), per)] for line in matrix]
    )


def make_packed(bits: int, strategy: str, group_size: int | None, symmetric: bool = True, order: bool = False) -> Make:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        size = effective_group_size(strategy, group_size, inputs)
        groups = -(-inputs // size)
        codes = [[rng.choice([low, high, rng.randint(low, high)]) for _ in range(inputs)] for _ in range(outputs)]
        zeros = [[rng.choice([low, high, rng.randint(low, high)]) for _ in range(groups)] for _ in range(outputs)]
        if symmetric:
            zeros = [[0] * groups for _ in range(outputs)]
        scales = [[half(rng) for _ in range(groups)] for _ in range(outputs)]
        index = [i // size for i in range(inputs)]
        if order:
            rng.shuffle(index)
        parts = {
            "weight_packed": packed(codes, bits),
            "weight_scale": torch.tensor(scales, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        scales = parts["weight_scale"].double().tolist()
        if strategy == "tensor":
            scales = [[scales[0][0]] for _ in range(outputs)]
            parts["weight_scale"] = parts["weight_scale"][:1, 0]
        if not symmetric:
            by_group = [[zeros[o][g] for o in range(outputs)] for g in range(groups)]
            parts["weight_zero_point"] = packed(by_group, bits).T
        if order:
            parts["weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
        values = [
            [value(codes[o][i], zeros[o][index[i]], scales[o][index[i]]) for i in range(inputs)] for o in range(outputs)
        ]
        return parts, values

    return linear


def make_plain(kind: str, strategy: str, group_size: int | None, symmetric: bool = True) -> Make:
    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        size = effective_group_size(strategy, group_size, inputs)
        groups = inputs // size
        shape = {"tensor": (1,), "channel": (outputs, 1), "group": (outputs, groups)}[strategy]
        scales = [[half(rng) for _ in range(groups)] for _ in range(outputs)]
        zeros = [[0 if symmetric else rng.choice([-128, 127, 3]) for _ in range(groups)] for _ in range(outputs)]
        if strategy == "tensor":
            scales, zeros = [scales[0]] * outputs, [zeros[0]] * outputs
        parts = {"weight_scale": torch.tensor(scales)[: shape[0]].reshape(shape)}
        if not symmetric:
            parts["weight_zero_point"] = torch.tensor(zeros, dtype=torch.int8)[: shape[0]].reshape(shape)
        bits = [[rng.choice([b for b in range(256) if b not in NAN]) for _ in range(inputs)] for _ in range(outputs)]
        raw = torch.tensor(bits, dtype=torch.uint8)
        if kind == "fp8":
            parts["weight"] = raw.view(torch.float8_e4m3fn)
            numbers = [[NUMBERS[b] for b in line] for line in bits]
        else:
            parts["weight"] = raw.view(torch.int8)
            numbers = [[b - 256 if b > 127 else b for b in line] for line in bits]
        values = [
            [np.float32(numbers[o][i] - zeros[o][i // size]) * np.float32(scales[o][i // size]) for i in range(inputs)]
            for o in range(outputs)
        ]
        return parts, values

    return linear


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("strategy", "group_size", "symmetric"),
    [("group", 16, True), ("group", 16, False), ("channel", None, False), ("tensor", None, True)],
)
def test_packed_integers(tmp_path: Path, bits: int, strategy: str, group_size: int | None, symmetric: bool) -> None:
    settings = config("pack-quantized", scheme(bits, strategy, group_size, symmetric=symmetric))
    expected = write(tmp_path, make_packed(bits, strategy, group_size, symmetric), settings)
    check(tmp_path, expected, f"int{bits}", group_size)


def test_partly_used_words(tmp_path: Path) -> None:
    """20 and 90 channels end in the middle of a word.

    These are input channels of codes, and output channels of zero points.
    """
    settings = config("pack-quantized", scheme(4, "group", 10, symmetric=False))
    make = make_packed(4, "group", 10, symmetric=False)
    check(tmp_path, write(tmp_path, make, settings, model=tiny_llama(20, 90)), "int4", 10)


def test_groups_of_scattered_input_channels(tmp_path: Path) -> None:
    settings = config("pack-quantized", scheme(4, "group", 16, actorder="group"))
    expected = write(tmp_path, make_packed(4, "group", 16, order=True), settings)
    check_dequantized(tmp_path, expected, "its groups are not consecutive input channels (weight_g_idx)")


@pytest.mark.parametrize(
    ("strategy", "group_size", "symmetric"),
    [("channel", None, True), ("channel", None, False), ("tensor", None, False), ("group", 16, True)],
)
def test_int8(tmp_path: Path, strategy: str, group_size: int | None, symmetric: bool) -> None:
    settings = config("int-quantized", scheme(8, strategy, group_size, symmetric=symmetric))
    check(tmp_path, write(tmp_path, make_plain("int8", strategy, group_size, symmetric), settings), "int8", group_size)


@pytest.mark.parametrize(("strategy", "group_size"), [("tensor", None), ("channel", None), ("group", 16)])
def test_fp8(tmp_path: Path, strategy: str, group_size: int | None) -> None:
    settings = config("float-quantized", scheme(8, strategy, group_size, type="float"))
    check(tmp_path, write(tmp_path, make_plain("fp8", strategy, group_size), settings), "fp8", group_size)


def test_fp8_in_blocks(tmp_path: Path) -> None:
    settings = config("float-quantized", scheme(8, "block", None, type="float", block_structure=[16, 16]))
    check(tmp_path, write(tmp_path, make_blocks((16, 16), "weight_scale"), settings), "fp8", 16)


def test_several_schemes(tmp_path: Path) -> None:
    """A linear's scheme is found by its shapes or by its zero points."""

    def make(outputs: int, inputs: int, rng: random.Random) -> Linear:
        if inputs == 96:
            return make_packed(8, "channel", None)(outputs, inputs, rng)
        return make_packed(4, "group", 16, symmetric=outputs == 96)(outputs, inputs, rng)

    schemes = scheme(), scheme(symmetric=False), scheme(8, "channel", None)
    expected = write(tmp_path, make, config("mixed-precision", *schemes))
    weights = weights_of(tmp_path)
    for name, want in expected.items():
        assert torch.equal(weights[name].evaluate(), want), name
        stored = stored_codes(weights[name])
        assert stored and stored.scheme == ("int8" if "down_proj" in name else "int4")
    check_model(tmp_path, expected)


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point", "weight_shape"])
def test_damage(tmp_path: Path, part: str) -> None:
    settings = config("pack-quantized", scheme(symmetric=False))
    write(tmp_path, make_packed(4, "group", 16, False), settings)
    check_damage(tmp_path, part)


def test_a_shape_that_does_not_fit_the_words(tmp_path: Path) -> None:
    write(tmp_path, make_packed(4, "group", 16), config("pack-quantized", scheme()))
    name = "model.layers.0.mlp.up_proj.weight_"
    change(tmp_path, lambda tensors: tensors[f"{name}shape"].mul_(2))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and f"{name}packed" in error.what and "192 x 64" in error.what


def test_two_schemes_for_one_shape(tmp_path: Path) -> None:
    write(tmp_path, make_packed(4, "group", 30), config("pack-quantized", scheme(group_size=30), scheme(group_size=31)))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and "several schemes" in error.what


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"config_groups": None}, "config_groups is None"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
        ({"config_groups": {"a": {"weights": scheme(3)}}}, "3 bits"),
        ({"config_groups": {"a": {"weights": scheme(4, type="float")}}}, "'float' in 4 bits"),
        ({"config_groups": {"a": {"weights": scheme(4, "block", None, block_structure=[8, 8])}}}, "'block'"),
        ({"config_groups": {"a": {"weights": scheme(4, "tensor_group")}}}, "'tensor_group'"),
        ({"config_groups": {"a": {"weights": scheme(), "format": "nvfp4-pack-quantized"}}}, "'nvfp4-pack-quantized'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform"),
    ],
)
def test_unsupported_settings(tmp_path: Path, settings: dict[str, Any], detail: str) -> None:
    write(tmp_path, make_packed(4, "group", 16), config("pack-quantized", scheme()) | settings)
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and detail in error.what
