"""Texts to measure and calibrate with: two that come with every Python, and those that a user brings.

The built-in ones are English with some code in it, the same wherever the same Python is. A model has likely seen both;
numbers on them compare artifacts of one model with each other, not one model with another.
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

# Modules with much prose and few examples, at the same place from Python 3.10 to 3.13. Their order is the text's.
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
    """A text and where it is from.

    Attributes:
        content: never blank.
        source: the name of a built-in text, or the path as it was given.
        sha256: of `content` in UTF-8.
    """

    content: str
    source: str
    sha256: str


def read_text(name_or_path: str | Path) -> Text:
    """The built-in text of that name (`docstrings`, `topics`), or what a file holds.

    A file is plain UTF-8, or JSON Lines if it is named so (`.jsonl`): an object a line, with its text under `text`;
    the texts are joined by blank lines.

    Raises:
        LlmcError: TEXT_NOT_FOUND; TEXT_INVALID where a file can't be decoded; TEXT_EMPTY where nothing is in it.
    """
    source = str(name_or_path)
    built_in = BUILT_IN.get(source)
    content = built_in() if built_in else _read_file(Path(name_or_path).expanduser())
    if not content.strip():
        raise LlmcError("TEXT_EMPTY", f"There is no text in {source!r}.", "Give a file that holds some.")
    return Text(content, source, hashlib.sha256(content.encode()).hexdigest())


def docstrings() -> str:
    """The docstrings of modules of Python's standard library, about 400 kB, in the order of their source.

    Raises:
        LlmcError: TEXT_NOT_FOUND if this Python came without its source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    try:
        sources = [(folder / f"{name}.py").read_bytes() for name in _MODULES]
    except OSError as error:
        raise _absent(f"the source of its library: {error.filename}") from None
    return _BLANK_LINE.join(doc for source in sources for doc in _docstrings_of(ast.parse(source)))


def topics() -> str:
    """The reference of the Python language as `help()` shows it, about 460 kB, its topics by name.

    Raises:
        LlmcError: TEXT_NOT_FOUND if this Python came without it.
    """
    try:
        from pydoc_data.topics import topics as by_name
    except ImportError:
        raise _absent("the module pydoc_data") from None
    return _BLANK_LINE.join(by_name[name].strip() for name in sorted(by_name))


BUILT_IN = {"docstrings": docstrings, "topics": topics}


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Depth first, which is the order of the source."""
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
        raise _invalid(path, f"byte {error.start} is no UTF-8", "Convert it to UTF-8.") from None
    return content if path.suffix.lower() != ".jsonl" else _BLANK_LINE.join(_texts_of(path, content))


def _texts_of(path: Path, content: str) -> Iterator[str]:
    # Not splitlines(): JSON leaves U+2028 and its like as they are, within a line.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can spell half a surrogate pair, which is no text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            hint = 'Each line is an object that has a text: {"text": "..."}'
            raise _invalid(path, f"line {number} is no object with a text", hint) from None
        yield text


def _invalid(path: Path, why: str, hint: str) -> LlmcError:
    return LlmcError("TEXT_INVALID", f"The text {str(path)!r} can't be read: {why}.", hint)


def _absent(what: str) -> LlmcError:
    return LlmcError("TEXT_NOT_FOUND", f"This Python came without {what}.", "Give a text file or a .jsonl file.")
