"""Separate the progress lines of a command's stderr from the rest."""

from __future__ import annotations

import re

_LINE = re.compile(r"llmc: (.+) \.\.\. \d+\.\d s\n")


def phases(stderr: str) -> list[str]:
    """Return the phases that a command showed, in order."""
    return _LINE.findall(stderr)


def rest(stderr: str) -> str:
    """Return everything else on stderr."""
    return _LINE.sub("", stderr)
