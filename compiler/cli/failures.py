"""Convert any exception of a command to an `LlmcError`, and its message to the command's flags."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from ...errors import LlmcError, UsageError

TRACEBACK = "LLMC_TRACEBACK"
_LONGEST = 300  # characters of another library's message
_PACKAGE = Path(__file__).parents[2]
# torch raises a plain RuntimeError if memory runs out on the CPU.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def as_llmc_error(error: Exception) -> LlmcError:
    """Return the `LlmcError` to report for an exception, with the class that its code is registered with."""
    if isinstance(error, LlmcError):
        return _of_registered_class(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_about_memory(str(error))):
        return LlmcError(
            "OUT_OF_MEMORY",
            f"The machine has too little memory: {_first_line(error)}.",
            "Give a smaller --max-seq-len, or use a larger machine; `llmc plan MODEL` shows what compiling needs.",
        )
    if isinstance(error, ImportError):
        from ...extras import import_failure

        return import_failure(error) or _internal(error)
    if isinstance(error, OSError):
        return _of_files(error) or _internal(error)
    return _internal(error)


def _of_registered_class(error: LlmcError) -> LlmcError:
    """Return an error with its registered class; an error from another process arrives as a plain `LlmcError`."""
    from ...error_codes import make_error

    return make_error(error.code, error.what, error.hint) if type(error) is LlmcError else error


def _of_files(error: OSError) -> LlmcError | None:
    reason = error.strerror or _first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" where {str(error.filename)!r} is written" if error.filename else ""
        return LlmcError("DISK_FULL", f"The disk is full{where}.", "Free some space, or write to another disk.")
    if error.filename is not None:
        what = f"{str(error.filename)!r} can't be used: {reason}."
        return LlmcError("FILE_UNUSABLE", what, "Check the path and its permissions.")
    return None


def _internal(error: Exception) -> LlmcError:
    from ...errors import CompilerError

    return CompilerError(
        "INTERNAL_ERROR",
        f"{type(error).__name__}: {_first_line(error)} ({_place(error)}).",
        f"This is a defect of llmc. Run the command again with {TRACEBACK}=1 and report the traceback.",
    )


def _place(error: Exception) -> str:
    """Return the innermost frame, and the innermost frame of llmc if that is another one.

    For example: `raised at torch/x.py:3, called from compiler/y.py:7`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "raised at an unknown place"
    raised = f"raised at {frames[-1].filename}:{frames[-1].lineno}"
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours or ours[-1] is frames[-1]:
        return raised
    return f"{raised}, called from {ours[-1].filename}:{ours[-1].lineno}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:_LONGEST].rstrip(".")


def _is_about_memory(text: str) -> bool:
    return any(mark in text.lower() for mark in _NO_MEMORY)


def with_flags(error: LlmcError, parameters: Iterable[click.Parameter]) -> LlmcError:
    """Return the same error with the names of a command's options as its flags: `--max-tokens` for `max_tokens`.

    Names in backticks are always replaced. Names with an underscore are replaced in a `UsageError` and in every hint.
    A name without one may be an ordinary word: it is also replaced at the beginning of "seed is -1".
    """
    what, hint = _with_backticks_replaced(error.what, parameters), name_flags(error.hint, parameters)
    if isinstance(error, UsageError):
        what = name_flags(what, parameters)
        for name, flag in _flags(parameters):
            what = re.sub(rf"^{name}(?= is )", flag, what, flags=re.IGNORECASE)
    return type(error)(error.code, what, hint)


def name_flags(text: str, parameters: Iterable[click.Parameter]) -> str:
    """Replace names of options in backticks, and names with an underscore, by their flags."""
    text = _with_backticks_replaced(text, parameters)
    for name, flag in _flags(parameters):
        if "_" in name:
            text = re.sub(rf"(?<![\w-]){name}(?!\w)", flag, text, flags=re.IGNORECASE)
    return text


def _with_backticks_replaced(text: str, parameters: Iterable[click.Parameter]) -> str:
    for name, flag in _flags(parameters):
        text = text.replace(f"`{name}`", flag)
    return text


def _flags(parameters: Iterable[click.Parameter]) -> Iterator[tuple[str, str]]:
    for option in parameters:
        if isinstance(option, click.Option) and option.name is not None:
            yield option.name, max(option.opts, key=len)
