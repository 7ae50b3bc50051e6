"""AWQ: words of 8 consecutive output channels, even channels before odd ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from .files import Linear, Make, check, check_damage, half, int32, refusal, value, word, write

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output channel of each field of a word


def config(group_size: int = 16, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm", **more}


def make(group_size: int) -> Make:
    def linear(outputs: int, inputs: int, rng: random.Random) -> Linear:
        size = inputs if group_size == -1 else group_size
        groups = -(-inputs // size)
        zeros = [[rng.choice([0, 15, rng.randrange(16)]) for _ in range(outputs)] for _ in range(groups)]
        scales = [[half(rng) for _ in range(outputs)] for _ in range(groups)]
        codes = [[rng.randrange(16) for _ in range(outputs)] for _ in range(inputs)]

        def words(matrix: list[list[int]]) -> torch.Tensor:
            return int32([[word([line[c * 8 + o] for o in ORDER], 4) for c in range(outputs // 8)] for line in matrix])

        parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": torch.tensor(scales, dtype=torch.half)}
        values = [
            [value(codes[i][o], zeros[i // size][o], scales[i // size][o]) for i in range(inputs)]
            for o in range(outputs)
        ]
        return parts, values

    return linear


@pytest.mark.parametrize(("group_size", "expected_size"), [(16, 16), (-1, None), (20, 4)])
def test_codes_are_kept(tmp_path: Path, group_size: int, expected_size: int | None) -> None:
    check(tmp_path, write(tmp_path, make(group_size), config(group_size)), "int4", expected_size)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_damage(tmp_path: Path, part: str) -> None:
    write(tmp_path, make(16), config())
    check_damage(tmp_path, part)


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({"bits": 8}, "8 bits"), ({"version": "gemv"}, "'gemv'"), ({"group_size": None}, "group_size is None")],
)
def test_unsupported_settings(tmp_path: Path, settings: dict[str, Any], detail: str) -> None:
    write(tmp_path, make(16), config() | settings)
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and detail in error.what
