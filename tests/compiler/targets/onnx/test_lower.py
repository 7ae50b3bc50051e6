"""The walk from a program to a graph: names that the ecosystem knows, and refusals that name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from attending import DIM, KV_HEADS, SCALE, VALUE_DIM, Attending, cached, join, qkv
from check_pass import VOCAB, inputs
from stepping import engine_of
from torch import Tensor

from llmc import LlmcError
from llmc.compiler.targets.onnx.external import ExternalData
from llmc.compiler.targets.onnx.lower import Lowering, Table
from llmc.compiler.targets.onnx.standard import STANDARD
from llmc.ir.program import Program
from llmc.kernels.ops import attention
from llmc.passes.cache.select_logits import SelectLogits

WINDOW, MAX = 6, 32


def windowed_first(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, place, x), SCALE, window=None if place else WINDOW))


@pytest.fixture(scope="module")
def program() -> Program:
    return cached(windowed_first, value_dim=VALUE_DIM)


def lowered(program: Program, folder: Path, table: Table = STANDARD) -> onnx.ModelProto:
    with ExternalData(folder / "data") as data:
        lowering = Lowering(program, table, data)
        lowering.run()
        lowering.save(folder / "model.onnx")
    return onnx.load(folder / "model.onnx", load_external_data=False)


def signature(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_inputs_and_outputs(program: Program, tmp_path: Path) -> None:
    model = lowered(program, tmp_path)
    ring, static = ["batch_size", KV_HEADS, WINDOW], ["batch_size", KV_HEADS, "past_sequence_length"]
    assert list(signature(model.graph.input).items()) == [
        ("input_ids", ["batch_size", "sequence_length"]),
        ("attention_mask", ["batch_size", "total_sequence_length"]),
        ("past_key_values.0.key", [*ring, DIM]),
        ("past_key_values.0.value", [*ring, VALUE_DIM]),
        ("past_key_values.1.key", [*static, DIM]),
        ("past_key_values.1.value", [*static, VALUE_DIM]),
    ]
    present = ["batch_size", KV_HEADS, "present_sequence_length"]
    assert list(signature(model.graph.output).items()) == [
        ("logits", ["batch_size", "sequence_length", VOCAB]),
        ("present.0.key", [*ring, DIM]),
        ("present.0.value", [*ring, VALUE_DIM]),
        ("present.1.key", [*present, DIM]),
        ("present.1.value", [*present, VALUE_DIM]),
    ]


def test_the_selection_of_logits_is_optional(program: Program, tmp_path: Path) -> None:
    chosen = program.copy()
    assert SelectLogits()(chosen).matches == 1
    model = lowered(chosen, tmp_path)
    assert list(signature(model.graph.input))[:3] == ["input_ids", "attention_mask", "rows"]
    assert signature(model.graph.output)["logits"] == ["batch_size", 1, VOCAB]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    assert [i.name for i in session.get_overridable_initializers()] == ["rows"]
    tokens = inputs(1, 5)[0]
    given = {"input_ids": tokens.numpy(), "attention_mask": torch.ones(1, 5, dtype=torch.int64).numpy()}
    for i, cache in enumerate(chosen.caches):
        for kind, dim in (("key", cache.key_dim), ("value", cache.value_dim)):
            given[f"past_key_values.{i}.{kind}"] = torch.zeros(1, cache.heads, cache.length, dim).numpy()
    (last,) = session.run(["logits"], given)
    (three,) = session.run(["logits"], given | {"rows": torch.tensor([4, 0, -2]).numpy()})
    assert last.shape == (1, 1, VOCAB) and three.shape == (1, 3, VOCAB)
    want = program(tokens, torch.zeros(1, dtype=torch.int64), *(torch.from_numpy(given[n]) for n in list(given)[2:]))
    torch.testing.assert_close(torch.from_numpy(three), want[:, [4, 0, -2]], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(last), want[:, -1:], rtol=0, atol=1e-5)


def test_starts_follow_from_the_attention_mask(program: Program, tmp_path: Path) -> None:
    """Sequences of one call hold different numbers of positions; the length of the mask does not matter."""
    lowered(program, tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
    tokens, starts = torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 3])
    caches = [
        torch.randn(2, c.heads, c.length, dim, generator=torch.Generator().manual_seed(i))
        for i, c in enumerate(program.caches)
        for dim in (c.key_dim, c.value_dim)
    ]
    names = [i.name for i in session.get_inputs()][2:]
    want = program.run(tokens, starts, *caches)
    for width in (7, 12):
        mask = (torch.arange(width) < starts[:, None] + 2).long()
        given = {"input_ids": tokens, "attention_mask": mask} | dict(zip(names, caches, strict=True))
        got = session.run(None, {name: value.numpy() for name, value in given.items()})
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=0, atol=1e-5)


def test_an_op_without_an_entry_is_named_with_its_place(program: Program, tmp_path: Path) -> None:
    for op, place in (("llmc.cached_attention", "layers.0"), ("llmc.linear", "layers.0")):
        table = {name: entry for name, entry in STANDARD.items() if name != op}
        with pytest.raises(LlmcError) as caught:
            lowered(program, tmp_path, table)
        assert caught.value.code == "OP_UNSUPPORTED"
        assert op in caught.value.what and place in caught.value.what


def test_the_same_program_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lowered(program.copy(), tmp_path / name)
    for name in ("model.onnx", "data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_caches_go_out_by_no_copy(program: Program, tmp_path: Path) -> None:
    engine_of(program, tmp_path, ops="standard")
    made = {
        o: n.op_type for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node for o in n.output
    }
    assert {made[o] for o in made if o.startswith("present.")} == {"TensorScatter"}
    assert program.max_seq_len == MAX
