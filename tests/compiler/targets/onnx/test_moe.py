"""Experts in plain ONNX equal the op's meaning, for any number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_lowering import lowered, run_in_onnx
from check_pass import capture, inputs
from expert_blocks import EXPERTS, FORMS, HIDDEN, SIZES, Block

from llmc.compiler.targets.onnx.aten import ATEN
from llmc.compiler.targets.onnx.lower import Table
from llmc.compiler.targets.onnx.moe import MOE
from llmc.compiler.targets.tensorrt.moe import moe as without_loop

# A loop over the selected experts, and all experts at once.
TABLES: dict[str, Table] = {"loop": {**ATEN, **MOE}, "all experts": {**ATEN, "llmc.moe": without_loop}}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", FORMS)
def test_experts_equal_the_meaning_of_the_op(name: str, table: str) -> None:
    program = capture(Block(**FORMS[name]))
    run = run_in_onnx(program, TABLES[table])
    for size in SIZES:
        sample = inputs(*size)
        torch.testing.assert_close(run(*sample)[0], program(*sample), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table", TABLES)
def test_the_output_is_zero_if_no_expert_is_selected(table: str) -> None:
    run = run_in_onnx(capture(Block(act="silu")), TABLES[table])
    for length in (1, 20):
        tokens = torch.zeros(1, length, dtype=torch.int64)  # token 0 selects the ids -1
        assert torch.equal(run(tokens, tokens)[0], torch.zeros(1, length, HIDDEN))


@pytest.mark.parametrize("table", TABLES)
def test_each_weight_is_stored_once(table: str, tmp_path: Path) -> None:
    model = lowered(capture(Block(act="silu")), TABLES[table], tmp_path)
    stored = [t.name for t in model.graph.initializer if list(t.dims)[:1] == [EXPERTS] and len(t.dims) > 1]
    assert sorted(stored) == ["b_in", "b_out", "w_in.transposed", "w_out.transposed"]
