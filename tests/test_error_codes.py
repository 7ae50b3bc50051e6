"""Compare the table of error codes with the source, and docs/errors.md with the table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc import errors
from llmc.error_codes import ERROR_CODES, SECTIONS, make_error
from llmc.error_codes.page import page

ROOT = Path(llmc.__file__).parent
PARTS = ("compiler", "error_codes", "ir", "kernels", "passes", "runtimes")
CLASSES = {"LlmcError", "UsageError", "CheckFailedError", "CompilerError"}


def raised() -> Iterator[tuple[str, str, str | None]]:
    """Yield file, class and code of every error in the source; the code is None if it is no literal."""
    files = [*ROOT.glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                first = node.args[0] if node.args else None
                literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
                yield path.relative_to(ROOT).as_posix(), node.func.id, first.value if literal else None


RAISED = list(raised())


def test_the_source_is_scanned() -> None:
    assert len(RAISED) > 100
    assert {"extras.py", "ir/weights.py", "passes/base.py", "compiler/cli/failures.py"} <= {file for file, *_ in RAISED}


def test_every_code_is_a_literal() -> None:
    assert not [(file, cls) for file, cls, code in RAISED if code is None]


def test_every_raised_code_is_registered() -> None:
    assert {code for *_, code in RAISED if code is not None} - set(ERROR_CODES) == set()


def test_every_registered_code_is_raised() -> None:
    assert set(ERROR_CODES) - {code for *_, code in RAISED} == set()


def test_every_code_is_raised_as_its_registered_class() -> None:
    wrong = [
        (file, cls, code)
        for file, cls, code in RAISED
        if code in ERROR_CODES and cls != ERROR_CODES[code].error_class.__name__
    ]
    assert not wrong


def test_a_code_has_one_section() -> None:
    codes = [code for _, _, texts in SECTIONS for code in texts]
    assert len(codes) == len(set(codes)) == len(ERROR_CODES)


@pytest.mark.parametrize("code", ERROR_CODES)
def test_texts_are_sentences(code: str) -> None:
    known = ERROR_CODES[code]
    for text in (known.when, known.remedy):
        assert text.endswith(".") and "|" not in text
        assert text[0].isupper() or text.startswith(("`", "llmc", "transformers"))


def test_an_error_is_made_by_its_code() -> None:
    error = make_error("GATE_FAILED", "It differs.", "Report it.")
    assert type(error) is errors.CheckFailedError and str(error) == "GATE_FAILED: It differs. Report it."
    assert type(make_error("NONESUCH", "What.")) is errors.LlmcError


def test_the_page_is_written_from_the_table() -> None:
    """To update the page: python -m llmc.error_codes --write docs/errors.md"""
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == page()
