"""All error codes of llmc, with their class, when they occur, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckFailedError, CompilerError, LlmcError, UsageError
from .artifact import ARTIFACT, MACHINE
from .defect import CHECK_FAILED, DEFECT
from .model import COMPILING, MODEL
from .usage import USAGE


@dataclass(frozen=True)
class ErrorCode:
    """An error code.

    Attributes:
        when: when the error occurs.
        remedy: what to do about it.
    """

    code: str
    error_class: type[LlmcError]
    when: str
    remedy: str


# The sections of docs/errors.md, in its order: title, class, and texts by code.
SECTIONS: tuple[tuple[str, type[LlmcError], dict[str, tuple[str, str]]], ...] = (
    ("Failed checks", CheckFailedError, CHECK_FAILED),
    ("Options and arguments", UsageError, USAGE),
    ("Models", LlmcError, MODEL),
    ("Compiling", LlmcError, COMPILING),
    ("Artifacts, texts and measurements", LlmcError, ARTIFACT),
    ("This machine", LlmcError, MACHINE),
    ("Defects of llmc", CompilerError, DEFECT),
)

ERROR_CODES: dict[str, ErrorCode] = {
    code: ErrorCode(code, error_class, when, remedy)
    for _, error_class, texts in SECTIONS
    for code, (when, remedy) in texts.items()
}


def make_error(code: str, what: str, hint: str = "") -> LlmcError:
    """Make an error of the class that a code is registered with, for example one that another process reported.

    Returns:
        The error; a plain `LlmcError` if the code is not registered.
    """
    known = ERROR_CODES.get(code)
    return (known.error_class if known else LlmcError)(code, what, hint)
