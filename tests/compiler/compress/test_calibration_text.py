"""Calibration texts, and their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled import speaking_model
from zoo.tiny import tiny_model

from llmc.compiler.compress.calibration_text import calibration_tokens
from llmc.compiler.frontend.sources import find_source
from llmc.errors import LlmcError
from llmc.runtimes.measure.texts import read_text


def tokens(
    tmp_path: Path, content: str, *, samples: int = 16, length: int = 512, max_seq_len: int = 64
) -> torch.Tensor:
    path = tmp_path / "text.txt"
    path.write_text(content)
    source = find_source(speaking_model())
    return calibration_tokens(source, read_text(str(path)), samples, length, max_seq_len)


def test_sequences_are_spread_over_the_text(tmp_path: Path) -> None:
    sequences = tokens(tmp_path, "a" * 100 + "b" * 100 + "c" * 100, samples=3, length=20)
    assert sequences.shape == (3, 20) and sequences.dtype == torch.int64
    assert [len(set(sequence.tolist())) for sequence in sequences] == [1, 1, 1]
    assert len(set(sequences[:, 0].tolist())) == 3


def test_no_more_than_the_text_and_max_seq_len(tmp_path: Path) -> None:
    assert tokens(tmp_path, "abc" * 30, samples=50, length=40).shape == (2, 40)
    assert tokens(tmp_path, "abc" * 30, max_seq_len=16, samples=2, length=40).shape == (2, 16)
    assert tokens(tmp_path, "abc", samples=2, length=40).shape == (1, 3)


def test_too_short(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="CALIBRATION_TOO_SHORT"):
        tokens(tmp_path, "a")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="TOKENIZER"):
        calibration_tokens(find_source(tiny_model("llama")), read_text("docstrings"), 16, 512, 64)
