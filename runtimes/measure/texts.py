"""Texts for evaluation and calibration: two that come with Python, and files.

The built-in texts are English with some code, and identical for the same Python version on all machines. Models have
probably been trained on both: use them to compare artifacts of one model, not different models.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import LlmcError

# Modules with much prose and few examples, which have the same paths in Python 3.10 to 3.13; in the order of the text.
_MODULES = (
    "threading", "email/message", "configparser", "subprocess", "inspect", "shutil", "urllib/request",
    "logging/__init__", "http/cookiejar", "tarfile", "asyncio/events", "socketserver", "argparse", "ipaddress",
    "tempfile", "random", "codecs", "smtplib", "os", "ssl", "xml/sax/handler", "logging/handlers", "http/client",
    "functools", "traceback", "concurrent/futures/_base", "imaplib", "optparse", "mailbox", "xmlrpc/server",
    "http/server", "bdb", "textwrap", "asyncio/base_events", "asyncio/locks", "contextlib", "email/_policybase",
    "mimetypes", "socket", "ast", "cmd", "queue",
)  # fmt: skip
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text and its origin.

    Attributes:
        content: the text; never blank.
        source: the name of a built-in text, or the path passed by the caller.
        sha256: hash of `content` in UTF-8.
    """

    content: str
    source: str
    sha256: str


def read_text(name_or_path: str | Path) -> Text:
    """Return a built-in text (`docstrings` or `topics`), or the text of a file.

    A file is plain UTF-8, or JSON Lines if its name ends in `.jsonl`: one object per line, with its text under `text`.
    The texts are joined by blank lines.

    Raises:
        LlmcError: TEXT_NOT_FOUND; TEXT_INVALID if a file can't be decoded; TEXT_EMPTY if it has no text.
    """
    source = str(name_or_path)
    built_in = BUILT_IN.get(source)
    content = built_in() if built_in else _read_file(Path(name_or_path).expanduser())
    if not content.strip():
        raise LlmcError("TEXT_EMPTY", f"There is no text in {source!r}.", "Give a file with text.")
    return Text(content, source, hashlib.sha256(content.encode()).hexdigest())


def docstrings() -> str:
    """Return docstrings of Python's standard library, about 400 kB, in source order.

    Raises:
        LlmcError: TEXT_NOT_FOUND if this Python came without the source of its library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        sources = [(folder / f"{name}.py").read_bytes() for name in _MODULES]
    except OSError as error:
        raise _absent(f"the source of its library: {error.filename}") from None
    return _BLANK_LINE.join(doc for source in sources for doc in _docstrings_of(ast.parse(source)))


def topics() -> str:
    """Return Python's language reference from `help()`, about 460 kB, by topic.

    Raises:
        LlmcError: TEXT_NOT_FOUND if this Python came without the module `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics as by_name
    except ImportError:
        raise _absent("the module pydoc_data") from None
    return _BLANK_LINE.join(by_name[name].strip() for name in sorted(by_name))


BUILT_IN = {"docstrings": docstrings, "topics": topics}


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield docstrings depth first, which is source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
        text := ast.get_docstring(node)
    ):
        yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings_of(child)


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LlmcError(
            "TEXT_NOT_FOUND",
            f"The text {str(path)!r} can't be read: {error.strerror}.",
            f"Give a text file, a .jsonl file, or one of the built-in texts: {', '.join(BUILT_IN)}.",
        ) from None
    except UnicodeDecodeError as error:
        raise _invalid(path, f"byte {error.start} is not valid UTF-8", "Convert it to UTF-8.") from None
    return content if path.suffix.lower() != ".jsonl" else _BLANK_LINE.join(_texts_of(path, content))


def _texts_of(path: Path, content: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may contain U+2028 and similar characters unescaped.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # fails on half a surrogate pair, which JSON can spell
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            why = f"line {number} is not a JSON object with a string under 'text'"
            raise _invalid(path, why, 'Write one object per line: {"text": "..."}') from None
        yield text


def _invalid(path: Path, why: str, hint: str) -> LlmcError:
    return LlmcError("TEXT_INVALID", f"The text {str(path)!r} can't be read: {why}.", hint)


def _absent(what: str) -> LlmcError:
    return LlmcError("TEXT_NOT_FOUND", f"This Python came without {what}.", "Give a text file or a .jsonl file.")
