"""Windows score each token of a text once and with context."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engines import BOS, byte_tokenizer

from llmc import LlmcError
from llmc.runtimes.measure.windows import Window, cut_windows, opening


def scored(windows: list[Window]) -> list[int]:
    return [token for window in windows for token in window.targets.tolist()]


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 11, 12, 13, 40, 41])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (8, 3), (2, 1)])
def test_each_token_is_scored_once_with_enough_context(length: int, window: int, stride: int) -> None:
    text = list(range(100, 100 + length))
    found = cut_windows(text, 64, window, stride)
    assert scored(found) == text[1:]
    for one in found:
        assert len(one.tokens) <= window and one.tokens.dtype == "int64"
        assert len(one.targets) and one.first >= 1
        begin = one.tokens[0] - 100
        assert one.tokens.tolist() == text[begin : begin + len(one.tokens)]
        assert begin % stride == 0 and (begin == 0 or one.first >= window - stride)


@pytest.mark.parametrize("length", [2, 3, 6, 7, 30])
@pytest.mark.parametrize("stride", [1, 3, 6])
def test_an_opening_begins_each_window_and_predicts_the_first_token(length: int, stride: int) -> None:
    text = list(range(100, 100 + length))
    found = cut_windows(text, 64, 8, stride, opening=[1, 2])
    assert scored(found) == text
    for one in found:
        assert one.tokens[:2].tolist() == [1, 2] and len(one.tokens) <= 8 and one.first >= 2
        assert one.tokens[2] == 100 or one.first >= 8 - stride


def test_default_window_and_stride() -> None:
    assert [len(w.tokens) for w in cut_windows(range(1000), 2048)] == [512, 512, 488]
    assert [(len(w.tokens), w.first) for w in cut_windows(range(9), 6)] == [(6, 1), (6, 3)]


@pytest.mark.parametrize(
    ("window", "stride", "opening"),
    [(65, None, ()), (1, None, ()), (8, 8, ()), (8, 0, ()), (8, 7, (1, 2)), (2, 1, (1, 2))],
)
def test_invalid_window_or_stride_is_refused(window: int, stride: int | None, opening: tuple[int]) -> None:
    with pytest.raises(LlmcError, match="WINDOW_INVALID"):
        cut_windows(range(100), 64, window, stride, opening)


@pytest.mark.parametrize("text", [[], [5]])
def test_a_text_of_fewer_than_two_tokens(text: list[int]) -> None:
    with pytest.raises(LlmcError, match=f"TEXT_TOO_SHORT: The text has {len(text)} tokens"):
        cut_windows(text, 64, opening=[1])


class Encoder:
    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*self.before, 7, *self.after] if add_special_tokens else [7]


def test_the_opening_is_the_prefix_that_the_tokenizer_adds(tmp_path: Path) -> None:
    assert opening(byte_tokenizer(tmp_path)) == [BOS]
    for before, after in (([], []), ([1], []), ([], [2]), ([1, 3], [2])):
        assert opening(Encoder(before, after)) == before  # type: ignore[arg-type]
