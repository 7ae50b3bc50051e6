"""`llmc.capture` on one screen: what each argument does, and that it leaves no trace on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from check_pass import VOCAB, inputs
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc import Stage
from llmc.ir.printer import from_python

WIDTH = 16


class Block(nn.Module):
    """Rotary-free attention-free model, small enough to be captured in no time."""

    def __init__(self, positions: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.norm.weight.data.add_(torch.rand(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("table", torch.linspace(-1, 1, WIDTH))
        if positions is not None:
            self.config = type("Config", (), {"max_position_embeddings": positions})()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)) + self.table.to(self.head.weight.dtype))


def refusal(**arguments: Any) -> llmc.LlmcError:
    with pytest.raises(llmc.LlmcError) as caught:
        llmc.capture(Block(), **arguments)
    assert "\n" not in str(caught.value) and caught.value.hint
    return caught.value


@pytest.mark.parametrize("until", [Stage.CAPTURED, Stage.CANONICAL, Stage.OPTIMIZED])
def test_a_program_is_brought_to_the_stage_that_was_asked_for(until: Stage) -> None:
    program = llmc.capture(Block(), until=until)
    assert program.stage is until
    assert isinstance(program, llmc.Program)
    torch.testing.assert_close(program(*inputs(2, 7)), Block()(inputs(2, 7)[0]))


def test_canonical_is_the_default() -> None:
    assert llmc.capture(Block()).ops() == {"llmc.embedding": 1, "llmc.rms_norm": 1, "aten.add": 1, "llmc.linear": 1}


@pytest.mark.parametrize("until", [Stage.QUANTIZED, Stage.CACHED])
def test_a_stage_that_no_pass_reaches(until: Stage) -> None:
    error = refusal(until=until)
    assert error.code == "STAGE_UNREACHED" and str(until) in error.what


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_module_is_computed_in_the_dtype_that_was_asked_for(
    name: str, dtype: torch.dtype, given: torch.dtype
) -> None:
    model = Block()
    model.embed, model.norm, model.head = model.embed.to(given), model.norm.to(given), model.head.to(given)
    program = llmc.capture(model, dtype=name)
    logits = program(*inputs(2, 7))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), deepcopy(model).double()(inputs(2, 7)[0]), atol=0.03, rtol=0)
    assert {w.dtype for n, w in program.weights.items() if n.endswith("weight")} == {dtype}


def test_a_folder_is_computed_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    program = llmc.capture(tmp_path, dtype="bf16")
    tokens, positions = inputs(2, 7)
    with torch.no_grad():
        want = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    got = program(tokens, positions)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0)
    # Half precision hides no rotation and no norm from its matcher.
    ops = program.ops()
    assert (ops["llmc.rope"], ops["llmc.rms_norm"], ops["llmc.gated_act"]) == (4, 5, 2)


def test_a_dtype_that_there_is_not() -> None:
    error = refusal(dtype="int8")
    assert error.code == "DTYPE_UNKNOWN" and "fp32, fp16, bf16" in error.what


@pytest.mark.parametrize(
    ("positions", "asked", "want"), [(None, None, 2048), (77, None, 77), (9999, None, 2048), (77, 99, 99), (None, 1, 1)]
)
def test_the_longest_sequence(positions: int | None, asked: int | None, want: int) -> None:
    assert llmc.capture(Block(positions), max_seq_len=asked, until=Stage.CAPTURED).max_seq_len == want


@pytest.mark.parametrize("length", [0, -1])
def test_a_sequence_of_no_length(length: int) -> None:
    assert refusal(max_seq_len=length).code == "MAX_SEQ_LEN_INVALID"


def test_dumps_are_written_where_they_were_asked_for(tmp_path: Path) -> None:
    program = llmc.capture(Block(), dump_ir=tmp_path / "new" / "ir")
    last = sorted((tmp_path / "new" / "ir").iterdir())[-1]
    values = {name: weight.evaluate() for name, weight in program.weights.items()}
    assert torch.equal(from_python(last.read_text())(values, *inputs(2, 3))[0], program(*inputs(2, 3)))


# Traces -------------------------------------------------------------------------------------------------------------

_watching: list[list[str]] = []
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.copyfile"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    path = str(arguments[0]) if arguments else ""
    writes = event in _WRITES
    if event == "open" and isinstance(arguments[2], int):
        writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    # Python's own cache of compiled modules is no doing of ours.
    if writes and "__pycache__" not in path and path != os.devnull:
        _watching[-1].append(f"{event} {path}")


@contextmanager
def watched_writes() -> Iterator[list[str]]:
    """Collect the writes to disk inside the block, as the interpreter reports them."""
    if not hasattr(watched_writes, "hooked"):
        sys.addaudithook(_audit)
        watched_writes.hooked = True  # type: ignore[attr-defined]
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def test_writes_are_seen(tmp_path: Path) -> None:
    with watched_writes() as writes:
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").read_text()
    assert writes == [f"open {tmp_path / 'file'}", f"os.mkdir {tmp_path / 'folder'}"]


def test_nothing_is_written(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with watched_writes() as writes:
        program = llmc.capture(tmp_path)
        program(*inputs(1, 3))
        with pytest.raises(llmc.LlmcError):
            llmc.capture(tmp_path / "nothing")
        (tmp_path / "model.safetensors").touch()
        with (tmp_path / "model.safetensors").open("rb+") as file:
            file.truncate(100)
        with pytest.raises(llmc.LlmcError):
            llmc.capture(tmp_path)
    assert [w for w in writes if str(tmp_path / "model.safetensors") not in w] == []
