"""Take the lines of progress out of what a command wrote to stderr."""

from __future__ import annotations

import re

_LINE = re.compile(r"llmc: (.+) \.\.\. \d+\.\d s\n")


def phases(stderr: str) -> list[str]:
    """The phases that a command showed, in order."""
    return _LINE.findall(stderr)


def rest(stderr: str) -> str:
    """Everything else on stderr."""
    return _LINE.sub("", stderr)
