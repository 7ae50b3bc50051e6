"""Attention over int8 caches by GroupQueryAttention equals the op's meaning, for few tokens and for many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from fused_layers import FORMS, fused
from stepping import CALLS, check_steps

from llmc.compiler.targets.ort import group_query_attention
from llmc.compiler.targets.ort.group_query_attention import MANY_QUERIES

# Sums in another order may change the nearest code of a value.
TOLERANCE = 5e-3
# Many tokens, few, one, and many again. The last token sees all of them.
LONG = (((0, 0), 14), ((14, 14), 3), ((17, 15), 1), ((18, 16), MANY_QUERIES), ((30, 28), 1))


@pytest.mark.parametrize("calls", [CALLS, LONG], ids=["few", "many"])
@pytest.mark.parametrize("name", FORMS)
def test_it_equals_the_meaning_of_the_op(tmp_path: Path, name: str, calls: Any) -> None:
    check_steps(fused(**FORMS[name], by_channel=True), tmp_path, ops="contrib", calls=calls, tolerance=TOLERANCE)
    nodes = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node
    (branches,) = [{a.name: {n.op_type for n in a.g.node} for a in n.attribute} for n in nodes if n.op_type == "If"]
    assert branches["else_branch"] == {"GroupQueryAttention"}
    assert branches["then_branch"] >= {"GroupQueryAttention", "TensorScatter", "QuantizeLinear"}


@pytest.mark.parametrize("many", [1, 100])
def test_both_ways_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    monkeypatch.setattr(group_query_attention, "MANY_QUERIES", many)
    program = fused(**FORMS["a window, a cap and sinks"], by_channel=True)
    check_steps(program, tmp_path, ops="contrib", calls=(*CALLS[:6], ((8, 5), 20)), tolerance=TOLERANCE)


def test_codes_are_rounded_to_even_and_saturate_in_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales are so small that most codes saturate: a wrong end of the range would be off by more."""
    program = fused(**FORMS["packed"], by_channel=True)
    for name, weight in program.weights.items():
        if name.endswith(".scales"):
            weight.source.tensor.mul_(0.05)  # type: ignore[attr-defined]
    check_steps(program, tmp_path, ops="contrib", calls=LONG, tolerance=1e-4)


def test_numbers_need_no_if(tmp_path: Path) -> None:
    check_steps(fused(**FORMS["rotated"]), tmp_path, ops="contrib", calls=LONG)
    kinds = {n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node}
    assert "GroupQueryAttention" in kinds and "If" not in kinds
