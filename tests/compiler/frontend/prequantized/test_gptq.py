"""GPTQ: words of consecutive input channels, with groups in any order.

Version 1 stores zero points minus one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from .files import (
    Linear,
    Make,
    change,
    check,
    check_damage,
    check_dequantized,
    half,
    int32,
    refusal,
    value,
    word,
    write,
)


def config(bits: int = 4, group_size: int = 16, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": False, **more}


def make(
    bits: int, group_size: int, version: int, *, sym: bool = False, order: str = "plain", with_index: bool = True
) -> Make:
    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        size = inputs if group_size == -1 else group_size
        groups = -(-inputs // size)
        zeros = [
            [rng.choice([0, 1, 2**bits - 1, rng.randrange(2**bits)]) for _ in range(outputs)] for _ in range(groups)
        ]
        if sym:
            zeros = [[2 ** (bits - 1)] * outputs for _ in range(groups)]
        scales = [[half(rng) for _ in range(outputs)] for _ in range(groups)]
        codes = [[rng.choice([0, 2**bits - 1, rng.randrange(2**bits)]) for _ in range(inputs)] for _ in range(outputs)]
        index = [i // size for i in range(inputs)]
        if order == "shuffled":
            rng.shuffle(index)
        per = 32 // bits
        one = word([1] * per, bits) if version == 1 else 0
        qweight = [
            [word([codes[o][r * per + j] for j in range(per)], bits) for o in range(outputs)]
            for r in range(inputs // per)
        ]
        qzeros = [[word(line[c * per : (c + 1) * per], bits) - one for c in range(outputs // per)] for line in zeros]
        parts = {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": torch.tensor(scales, dtype=torch.half)}
        if with_index:
            parts["g_idx"] = torch.tensor(index, dtype=torch.int32)
        values = [
            [value(codes[o][i], zeros[index[i]][o], scales[index[i]][o]) for i in range(inputs)] for o in range(outputs)
        ]
        return parts, values

    return linear


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "scheme"), [(2, "int4"), (4, "int4"), (8, "int8")])
def test_codes_are_kept(tmp_path: Path, bits: int, scheme: str, version: int) -> None:
    form = {1: {}, 2: {"checkpoint_format": "gptq_v2"}}[version]
    check(tmp_path, write(tmp_path, make(bits, 16, version), config(bits, **form)), scheme, 16)


def test_one_scale_per_output_channel(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make(4, -1, 1), config(group_size=-1)), "int4")


def test_symmetric_codes(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make(4, 32, 1, sym=True), config(group_size=32, sym=True)), "int4", 32)


def test_a_shorter_last_group(tmp_path: Path) -> None:
    # 32 input channels have groups of 20 + 12, 96 have 4 * 20 + 16. Groups of 4 divide all of them.
    check(tmp_path, write(tmp_path, make(4, 20, 1), config(group_size=20)), "int4", 4)


def test_a_group_size_above_the_number_of_input_channels(tmp_path: Path) -> None:
    # The greatest common divisor of 128 and 96 is 32, but 96 input channels still form one group.
    check(tmp_path, write(tmp_path, make(4, 128, 1), config(group_size=128)), "int4")


def test_missing_codes(tmp_path: Path) -> None:
    write(tmp_path, make(4, 16, 1), config())
    change(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.qweight"))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and "model.layers.0.mlp.up_proj.qweight" in error.what


def test_without_g_idx_groups_are_consecutive(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make(4, 16, 1, with_index=False), config()), "int4", 16)


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (8, 20)])
def test_groups_of_scattered_input_channels(tmp_path: Path, bits: int, size: int) -> None:
    expected = write(tmp_path, make(bits, size, 1, order="shuffled"), config(bits, size, desc_act=True))
    check_dequantized(tmp_path, expected, "its groups are not consecutive input channels (g_idx)")


def test_truncated_codes_do_not_fit_the_other_tensors(tmp_path: Path) -> None:
    write(tmp_path, make(4, 16, 1), config())
    name = "model.layers.0.mlp.up_proj"
    change(tmp_path, lambda tensors: tensors.update({f"{name}.qweight": tensors[f"{name}.qweight"][:-1].contiguous()}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and f"{name}.g_idx" in error.what and "(24,)" in error.what


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_damage(tmp_path: Path, part: str) -> None:
    write(tmp_path, make(4, 16, 1), config())
    check_damage(tmp_path, part)


@pytest.mark.parametrize("bad", [-1, 2])
def test_an_index_of_a_group_that_does_not_exist(tmp_path: Path, bad: int) -> None:
    write(tmp_path, make(4, 16, 1), config())
    name = "model.layers.0.self_attn.k_proj.g_idx"
    change(tmp_path, lambda tensors: tensors[name].fill_(bad))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and name in error.what and "0 to 1" in error.what


def test_a_wrong_group_size(tmp_path: Path) -> None:
    write(tmp_path, make(4, 16, 1), config(group_size=32))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and ".scales" in error.what


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({"bits": 3}, "3 bits"),
        ({"bits": "four"}, "bits is 'four'"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 0}, "group_size is 0"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"format": "bitblas"}, "'bitblas'"),
        ({"dynamic": {"-:.*head": {}, "+:.*layers.0.*": {"bits": 8}}}, "layers.0"),
    ],
)
def test_unsupported_settings(tmp_path: Path, settings: dict[str, Any], detail: str) -> None:
    write(tmp_path, make(4, 16, 1), config() | settings)
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and detail in error.what


def test_rules_that_exclude_modules(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, make(4, 16, 1), config(dynamic={"-:.*v_proj": {}}), ["v_proj"]), "int4", 16)
