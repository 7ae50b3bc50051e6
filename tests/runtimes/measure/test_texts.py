"""Built-in texts and texts from files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llmc import LlmcError
from llmc.runtimes.measure import texts
from llmc.runtimes.measure.texts import docstrings, read_text, topics


def test_docstrings_are_in_source_order() -> None:
    text = docstrings()
    assert text.startswith("Thread module emulating a subset of Java's threading model.")
    assert (
        text.index("Set a profile function")
        < text.index("Wait until notified")
        < text.index("Configuration file parser")
    )
    assert 300_000 < len(text) < 600_000
    assert "def " not in text[:2000]


def test_topics_are_the_text_of_help() -> None:
    text = topics()
    assert text.startswith('The "assert" statement')
    assert text.index('The "assert" statement') < text.index("Yield expressions")
    assert 300_000 < len(text) < 800_000


def test_another_process_reads_the_same_texts() -> None:
    names = ("docstrings", "topics")
    code = f"from llmc.runtimes.measure import texts; print(*(texts.read_text(n).sha256 for n in {names}))"
    # -OO drops the docstrings of imported modules, and string hashes differ between processes: neither may matter.
    found = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == [read_text(name).sha256 for name in ("docstrings", "topics")]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\n")
    found = read_text(path)
    assert (found.content, found.source) == ("Grüße\r\n", str(path))
    assert found.sha256 == hashlib.sha256("Grüße\r\n".encode()).hexdigest()


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.JSONL"
    path.write_text('{"text": "one\u2028two", "id": 1}\r\n\n{"text": "three"}', encoding="utf-8", newline="")
    assert read_text(str(path)).content == "one\u2028two\n\nthree"


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '"text"', "null", "{}", '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}', "[" * 100_000],
)
def test_an_invalid_json_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line)
    with pytest.raises(LlmcError, match=r"TEXT_INVALID.*line 2"):
        read_text(path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LlmcError, match=r"TEXT_EMPTY"):
            read_text(tmp_path / name)


def test_files_that_are_not_texts(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(LlmcError, match=r"TEXT_INVALID.*byte 4"):
        read_text(tmp_path / "latin")
    with pytest.raises(LlmcError, match=r"TEXT_NOT_FOUND.*docstrings, topics"):
        read_text("docstring")
    with pytest.raises(LlmcError, match=r"TEXT_NOT_FOUND.*directory"):
        read_text(tmp_path)


def test_a_python_without_the_source_of_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for built_in in (texts.docstrings, texts.topics):
        with pytest.raises(LlmcError, match=r"TEXT_NOT_FOUND.*came without"):
            built_in()
