"""Text is returned complete and as early as possible; completions end correctly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from fake_engines import EOS, byte_tokenizer, word_tokenizer

from llmc.runtimes.generate.sampling import SamplingParams
from llmc.runtimes.generate.stopping import Detokenizer, Ending, StopStrings
from llmc.runtimes.generate.tokenizer import Tokenizer

TEXTS = ["plain words", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family 🎉🎉", "mixed 日🎉é end", "\ufffd real \ufffd"]


@pytest.fixture
def bytes_(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def words() -> tokenizers.Tokenizer:
    return word_tokenizer()


def in_bytes(text: str) -> list[int]:
    """Encode a text as byte tokens of the word tokenizer."""
    return [5 + byte for byte in text.encode()]


def pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


# Characters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_is_shown_with_its_last_byte(bytes_: Tokenizer, text: str) -> None:
    ids = list(text.encode())
    detokenizer, shown = Detokenizer(bytes_), ""
    for count, token in enumerate(ids, 1):
        shown += detokenizer.push(token)
        # A real U+FFFD looks like an incomplete character until another token follows.
        assert shown == bytes(ids[:count]).decode(errors="ignore").rstrip("\ufffd")[: len(shown)]
        if "\ufffd" not in text:
            assert shown == bytes(ids[:count]).decode(errors="ignore")
    assert shown + detokenizer.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_of_a_sentencepiece_model(words: tokenizers.Tokenizer, text: str) -> None:
    ids = [2, *in_bytes(text), 3, 4]
    found = pieces(Detokenizer(words), ids)
    assert "".join(found) == words.decode(ids) == f"Hello{text} world!"
    if "\ufffd" not in text:
        assert not [piece for piece in found if "\ufffd" in piece]


def test_a_token_that_ends_one_character_and_begins_another() -> None:
    class Halves:
        """Each token reaches from the middle of one character to the middle of the next."""

        tokens = [b"\xe6", b"\x97\xa5\xe6", b"\x9c\xac\xe8", b"\xaa\x9e"]

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    assert pieces(Detokenizer(Halves()), range(4)) == ["", "日", "本", "語", ""]


@pytest.mark.parametrize("noise", [0x80, EOS])
def test_noise_does_not_grow_the_decoded_window(bytes_: Tokenizer, noise: int) -> None:
    class Measured:
        longest = 0

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            self.longest = max(self.longest, len(ids))
            return bytes_.decode(ids)

    measured = Measured()
    ids = [*b"a", *[noise] * 1000, *"end 🎉".encode()]
    found = pieces(Detokenizer(measured), ids)
    assert "".join(found) == bytes_.decode(ids)
    assert measured.longest < 200
    assert any(found[1:100]) == (noise == 0x80)


def test_an_incomplete_character_is_shown_only_at_the_end(bytes_: Tokenizer) -> None:
    assert pieces(Detokenizer(bytes_), list("a🎉".encode())[:-1]) == ["a", "", "", "", "\ufffd"]


# Spaces ---------------------------------------------------------------------------------------------------------------


def test_a_word_after_the_prompt_keeps_its_space(words: tokenizers.Tokenizer) -> None:
    assert pieces(Detokenizer(words, [2]), [3, 3]) == [" world", " world", ""]
    assert pieces(Detokenizer(words), [3, 3]) == ["world", " world", ""]
    assert pieces(Detokenizer(words, [1]), [3, 3]) == ["world", " world", ""]


def test_special_tokens_between_words_keep_the_space(words: tokenizers.Tokenizer) -> None:
    ids = [2, 1, 3, 1, 1, 3]
    found = pieces(Detokenizer(words), ids)
    assert found == ["Hello", "", " world", "", "", " world", ""]
    assert "".join(found) == words.decode(ids)


def test_a_prompt_is_not_cut_inside_a_character(words: tokenizers.Tokenizer) -> None:
    prompt = [2, *in_bytes("🎉🎉🎉🎉")]
    assert pieces(Detokenizer(words, prompt), in_bytes("🎉!")) == ["", "", "", "🎉", "!", ""]


def test_a_character_may_begin_in_the_prompt(bytes_: Tokenizer) -> None:
    ids = list("a🎉".encode())
    assert pieces(Detokenizer(bytes_, ids[:3]), ids[3:]) == ["", "🎉", ""]


def test_a_prompt_may_begin_with_noise(bytes_: Tokenizer) -> None:
    assert pieces(Detokenizer(bytes_, [*[0x80] * 20, *b"a"]), list(b"bc")) == ["b", "c", ""]


# Stop strings ---------------------------------------------------------------------------------------------------------


def stopped(stops: Sequence[str], chunks: Sequence[str]) -> tuple[str, bool]:
    found = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        text, met = found.push(chunk)
        shown += text
        if met:
            return shown, True
    return shown + found.flush(), False


def test_the_possible_beginning_of_a_stop_string_is_held_back() -> None:
    found = StopStrings(["STOP", "\n\n"])
    assert [found.push(text) for text in ("a S", "T", "A", "S", "TOP b")] == [
        ("a ", False),
        ("", False),
        ("STA", False),
        ("", False),
        ("", True),
    ]


def test_the_longest_possible_beginning_is_held_back() -> None:
    found = StopStrings(["aab"])
    assert found.push("xaaa") == ("xa", False)
    assert found.push("b") == ("", True)


def test_the_split_of_the_text_makes_no_difference() -> None:
    chance = random.Random(0)
    ends = 0
    for _ in range(2000):
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
        text = "".join(chance.choices("abc", weights=(3, 3, 2), k=12))
        cuts = sorted(chance.choices(range(13), k=3))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        want = stopped(stops, list(text))
        assert stopped(stops, chunks) == want
        ends += want[1]
        if not want[1]:
            assert want[0] == text and not any(stop in text for stop in stops)
    assert 500 < ends < 1900


# The end --------------------------------------------------------------------------------------------------------------


def ended(ending: Ending, ids: Sequence[int]) -> tuple[str, str | None, int]:
    """Return the text, the finish reason, and the number of tokens until the end."""
    shown = ""
    for count, token in enumerate(ids, 1):
        text, reason = ending.push(token)
        shown += text
        if reason:
            return shown, reason, count
    return shown, None, len(ids)


@pytest.mark.parametrize(
    ("params", "ids", "want"),
    [
        (SamplingParams(), [*b"hi", EOS, *b"on"], ("hi", "stop", 3)),
        (SamplingParams(), [*b"hi."], ("hi.", None, 3)),
        (SamplingParams(max_tokens=3), [*b"hi", EOS], ("hi", "stop", 3)),
        (SamplingParams(max_tokens=3), b"hiho", ("hih", "length", 3)),
        (SamplingParams(max_tokens=9), b"hi there!", ("hi there", "max_seq_len", 8)),
        (SamplingParams(max_tokens=8), b"hi there!", ("hi there", "length", 8)),
        (SamplingParams(stop="ere"), b"hi there", ("hi th", "stop", 8)),
        (SamplingParams(stop=["t", "hi"]), b"hi there", ("", "stop", 2)),
        (SamplingParams(stop="hi", min_tokens=2), b"hi hi", ("hi ", "stop", 5)),
        (SamplingParams(max_tokens=5, stop="i h", min_tokens=2), b"hi hi", ("hi hi", "length", 5)),
        (SamplingParams(max_tokens=4, stop="ths"), b"hi there", ("hi t", "length", 4)),
        (SamplingParams(stop="ths"), [*b"hi th", EOS], ("hi th", "stop", 6)),
        (SamplingParams(max_tokens=2, stop="\ufffd"), b"a\xf0\x9f", ("a", "stop", 2)),
    ],
)
def test_finish_reasons(
    bytes_: Tokenizer, params: SamplingParams, ids: Sequence[int], want: tuple[str, str | None, int]
) -> None:
    assert ended(Ending(params, {EOS}, 8, bytes_), list(ids)) == want


def test_the_text_of_a_stop_token_is_left_out(bytes_: Tokenizer) -> None:
    assert ended(Ending(SamplingParams(), {ord(".")}, 8, bytes_), list(b"hi.")) == ("hi", "stop", 3)


def test_without_a_decoder_there_is_no_text() -> None:
    assert ended(Ending(SamplingParams(max_tokens=2), {EOS}, 8), [1, 2]) == ("", "length", 2)
